"""The run folder: nothing is lost, one job at a time, whole files or none, and where a run comes from."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import QUICK, log_of

from ordinalclip.backbones import TINY_FOLDER
from ordinalclip.cli import main
from ordinalclip.config import load_config
from ordinalclip.data import load_parts
from ordinalclip.files import FolderInUse, lock, whole, write_json
from ordinalclip.provenance import fingerprint, source
from ordinalclip.run_folder import FolderOccupied, RunFolder, changed_data
from ordinalclip.training import evaluate_run, train
from ordinalclip.training.step import Learner

FAST = ("method=l1", "train.eval_every=2")


def content_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def interrupt(monkeypatch, config, at):
    """Start a run and leave it in the middle of a step."""

    class Stopped(Exception):
        pass

    step = Learner.step

    def stopping(self, number, *batch):
        if number == at:
            raise Stopped
        return step(self, number, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", stopping)
        with pytest.raises(Stopped):
            train(config, quiet=True)
    return RunFolder(config.output_dir)


# ---- nothing is deleted by starting again


def test_a_finished_run_is_not_started_again(quick):
    folder = train(quick(*FAST), quiet=True)
    before = content_of(folder)
    with pytest.raises(FolderOccupied, match=r"holds a finished run, written 20.*train\.resume=auto.*overwrite=true"):
        train(quick(*FAST), quiet=True)
    assert content_of(folder) == before
    (folder / "notes.txt").write_text("mine")
    train(quick(*FAST, "overwrite=true", "train.lr=1e-4"), quiet=True)
    assert load_config(folder / "config.yaml").train.lr == 1e-4
    assert load_config(folder / "config.yaml").overwrite is False  # the next start is asked again
    assert (folder / "notes.txt").read_text() == "mine"
    with pytest.raises(FolderOccupied):
        train(load_config(folder / "config.yaml"), quiet=True)


def test_an_interrupted_run_is_continued_or_replaced_but_never_lost(quick, tmp_path, monkeypatch):
    whole_run = train(quick(*FAST, f"output_dir={tmp_path}/whole"), quiet=True)
    cut = interrupt(monkeypatch, quick(*FAST, f"output_dir={tmp_path}/cut", "train.log_every=1"), at=3)
    assert cut.state().kind == "interrupted"
    before = content_of(cut.path)
    with pytest.raises(FolderOccupied, match=r"a run that was interrupted at step 3, started 20"):
        train(quick(*FAST, f"output_dir={tmp_path}/cut"), quiet=True)
    assert content_of(cut.path) == before
    with pytest.raises(ValueError, match=r"cannot resume under another configuration: train\.lr was 0\.001, is 0\.1"):
        train(quick(*FAST, f"output_dir={tmp_path}/cut", "train.resume=auto", "train.lr=0.1"), quiet=True)
    assert content_of(cut.path) == before
    train(quick(*FAST, f"output_dir={tmp_path}/cut", "train.resume=auto"), quiet=True)
    assert [row["loss"] for row in log_of(cut.path)] == [row["loss"] for row in log_of(whole_run)]


def test_going_back_to_an_earlier_checkpoint_is_not_finished_until_it_is(quick, monkeypatch):
    options = (*FAST, "train.keep_checkpoints=5")
    folder = train(quick(*options), quiet=True)
    back = f"train.resume={folder}/checkpoints/step-00000002"
    assert interrupt(monkeypatch, quick(*options, back), at=3).state().kind == "interrupted"


def test_nothing_of_an_old_run_survives_its_successor(quick):
    """Not even a checkpoint of a later step than the new run has."""
    folder = train(quick(*FAST, "train.max_steps=6"), quiet=True)
    train(quick(*FAST, "overwrite=true"), quiet=True)
    assert [path.name[-1] for path in sorted((folder / "checkpoints").iterdir())] == ["2", "4"]
    assert [row["step"] for row in log_of(folder)] == [1, 2, 3, 4]


def test_checkpoints_on_another_disk_are_cleared_too(quick, tmp_path):
    """The folder is a link: what it leads to is emptied, the link stays."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(scratch)
    train(quick(*FAST, "train.max_steps=6"), quiet=True)
    assert len(list(scratch.iterdir())) == 2
    train(quick(*FAST, "overwrite=true"), quiet=True)
    assert [path.name[-1] for path in sorted(scratch.iterdir())] == ["2", "4"]
    assert (tmp_path / "run" / "checkpoints").is_symlink()


def test_a_saved_configuration_does_not_say_how_it_was_started(quick):
    folder = train(quick(*FAST, "train.resume=auto"), quiet=True)
    assert load_config(folder / "config.yaml").train.resume == "none"
    with pytest.raises(FolderOccupied):
        train(load_config(folder / "config.yaml"), quiet=True)
    train(load_config(folder / "config.yaml", ["overwrite=true"]), quiet=True)


def test_predictions_of_the_other_part_stay(quick):
    folder = RunFolder(train(quick(*FAST, "evaluation.test=false", "data.num_validation=9"), quiet=True))
    validation = folder.read_predictions("validation")
    assert len(validation.labels) == 9
    evaluate_run(folder.path, quiet=True)
    evaluate_run(folder.path, quiet=True)
    assert folder.read_predictions("validation").labels.tolist() == validation.labels.tolist()
    assert len(folder.read_predictions("test").labels) == 12


def test_the_command_says_what_is_there(tmp_path, capsys):
    call = ["train", "default", "--quiet", f"output_dir={tmp_path}/run", *QUICK, *FAST]
    assert main(call) == 0
    capsys.readouterr()
    assert main(call) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ordinalclip: {tmp_path}/run holds a finished run")
    assert main([*call, "overwrite=true", "train.resume=auto"]) == 2
    assert "give one of them" in capsys.readouterr().err
    assert main([*call, "overwrite=true"]) == 0


def test_a_finished_run_without_checkpoints_is_not_resumed_from_nothing(quick):
    folder = RunFolder(train(quick(*FAST), quiet=True))
    for checkpoint in folder.checkpoints.iterdir():
        for file in checkpoint.iterdir():
            file.unlink()
        checkpoint.rmdir()
    before = content_of(folder.path)
    with pytest.raises(ValueError, match=r"holds a finished run.* and no checkpoint to go on from"):
        train(quick(*FAST, "train.resume=auto"), quiet=True)
    assert content_of(folder.path) == before


def test_a_decoding_that_chose_the_best_step_is_part_of_the_experiment(quick):
    train(quick(*FAST), quiet=True)
    with pytest.raises(ValueError, match=r"evaluation\.decoding was 'median', is 'argmax'"):
        train(quick(*FAST, "train.resume=auto", "evaluation.decoding=argmax"), quiet=True)
    train(quick(*FAST, "train.resume=auto", "evaluation.cs=[3]"), quiet=True)  # the rest can be done again


def test_what_is_refused_before_anything_is_trained_leaves_no_folder(quick, tmp_path):
    with pytest.raises(ValueError, match="nothing"):
        train(quick("model.backbone=timm:nothing"), quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["model/weights.txt", "config.yaml", "predictions.parquet"])
def test_files_of_ones_own_are_not_taken_for_a_run(quick, tmp_path, name):
    """A project's folder as output_dir: not even overwrite=true deletes what has a run's names."""
    file = tmp_path / "run" / name
    file.parent.mkdir(parents=True)
    file.write_text("learning_rate: 3\n")
    for more in ((), ("overwrite=true",), ("train.resume=auto",)):
        with pytest.raises(FolderOccupied, match="they may be yours"):
            train(quick(*FAST, *more), quiet=True)
    assert content_of(tmp_path / "run") == {Path(name): b"learning_rate: 3\n"}


def test_states(tmp_path, caplog):
    folder = RunFolder(tmp_path)
    assert folder.state().kind == "empty"
    (tmp_path / "holiday.png").write_text("not ours")
    assert folder.state().kind == "empty"
    folder.log.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert folder.state().text.startswith("a run that was interrupted at step 2")
    assert [row["step"] for row in folder.read_log()] == [1, 2]  # what a crash cut off is no row
    folder.log.write_bytes(b'{"step": 1}\n\0\0\n{"step": 3}\n')
    with caplog.at_level("WARNING"):
        assert [row["step"] for row in folder.read_log()] == [1, 3]
    assert "log.jsonl, line 2: damaged" in caplog.text
    folder.log.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    folder.config.write_text("{}")
    folder.diverged.write_text("step 3: loss is nan")
    assert folder.state().kind == "diverged"
    write_json(folder.metrics, {"num_train": 1})
    assert "metrics.json: damaged, train_counts, best_step, train_seconds missing" in folder.state().text
    write_json(folder.metrics, {"num_train": 1, "train_counts": [], "best_step": 1, "train_seconds": 1})
    assert re.search(r"damaged run \(.*config\.yaml: .*output_dir, .* missing", folder.state().text)
    folder.write_config(load_config())
    assert folder.state().kind == "finished"
    folder.clear()
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.png"]


# ---- whole or not at all


def test_whole_files_and_folders(tmp_path):
    target = tmp_path / "numbers.json"
    write_json(target, [1])

    def break_off(path):
        with whole(path) as aside:
            aside.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        break_off(target)
    assert json.loads(target.read_text()) == [1]
    for number in (1, 2):
        with whole(tmp_path / "folder") as aside:
            aside.mkdir()
            (aside / f"{number}.txt").write_text("x")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["2.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "numbers.json"]


def test_a_folder_is_put_back_where_its_replacement_did_not_come(tmp_path, monkeypatch):
    """Broken off between the two renamings, by an error or by a kill that leaves both aside."""
    target = tmp_path / "model"
    target.mkdir()
    (target / "old.txt").write_text("x")

    def replace_folder():
        with whole(target) as aside:
            aside.mkdir()
            (aside / "new.txt").write_text("y")

    def fail(*_):
        raise OSError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="disk is gone"):
            replace_folder()
    assert [path.name for path in target.iterdir()] == ["old.txt"]
    target.rename(tmp_path / ".partial-old-model")  # what a kill leaves
    with pytest.raises(RuntimeError), whole(target):
        raise RuntimeError
    assert [path.name for path in target.iterdir()] == ["old.txt"]
    replace_folder()
    assert [path.name for path in target.iterdir()] == ["new.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_metrics_file_that_a_crash_cut_is_named(quick):
    folder = train(quick(*FAST), quiet=True)
    (folder / "metrics.json").write_text('{"test": {"ma')
    with pytest.raises(ValueError, match=r"metrics\.json: damaged, not valid JSON"):
        evaluate_run(folder, quiet=True)


# ---- one job at a time

HOLD = """
import os, sys, time
from pathlib import Path
from ordinalclip.run_folder import RunFolder
with RunFolder(sys.argv[1]).locked():
    if sys.argv[2] == "fork" and os.fork() == 0:  # as a decoding worker that outlives its parent
        time.sleep(60)
    print("held", flush=True)
    time.sleep(60)
"""


def hold(folder, how="plain"):
    owner = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), how], stdout=subprocess.PIPE, text=True)
    assert owner.stdout.readline() == "held\n"
    return owner


def test_two_jobs_in_one_folder(quick, tmp_path):
    """A real other process holds the folder: who it is, is said; once it ends the folder is free."""
    owner = hold(tmp_path / "run")
    started = time.time()
    try:
        with pytest.raises(FolderInUse, match=rf"in use by process {owner.pid} on \S+ since 20\d\d-") as refused:
            train(quick(*FAST), quiet=True)
        since = re.search(r"since (\S+);", str(refused.value)).group(1)
        assert abs(time.mktime(time.strptime(since[:19], "%Y-%m-%dT%H:%M:%S")) - time.timezone - started) < 60
    finally:
        owner.terminate()
        owner.wait()
    folder = train(quick(*FAST), quiet=True)
    assert not RunFolder(folder).lock.exists()
    with lock(folder / "run.lock"):
        with pytest.raises(FolderInUse, match=f"process {os.getpid()}"):
            evaluate_run(folder, quiet=True)
        assert evaluate_run(folder, overrides=["evaluation.cs=[3]"], quiet=True)["test"]["num"] == 12  # writes nothing
    with pytest.raises(ValueError, match=r"data.num_test: of no effect on a run that is done; .* --data scores other"):
        evaluate_run(folder, overrides=["data.num_test=6"], quiet=True)


@pytest.mark.parametrize("how", [pytest.param("plain", marks=pytest.mark.slow), "fork"])
def test_the_lock_does_not_outlive_its_owner(tmp_path, how):
    """Killed by SIGKILL, with and without a child that lives on: the lock is free at once."""
    owner = hold(tmp_path, how)
    with pytest.raises(FolderInUse), lock(tmp_path / "run.lock"):
        pass
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert (tmp_path / "run.lock").exists()  # the file of the dead stays; it guards nothing
    with lock(tmp_path / "run.lock"):
        assert json.loads((tmp_path / "run.lock").read_text())["process"] == os.getpid()
    assert not (tmp_path / "run.lock").exists()


def test_the_same_process_cannot_hold_a_folder_twice(tmp_path):
    def hold_again():
        with lock(tmp_path / "run.lock"):
            pass

    with lock(tmp_path / "run.lock"), pytest.raises(FolderInUse, match=f"process {os.getpid()}"):
        hold_again()
    held = os.listdir("/proc/self/fd")
    hold_again()
    assert os.listdir("/proc/self/fd") == held  # nor does it keep the file open


def test_a_file_system_without_locks_is_said_aloud(tmp_path, monkeypatch, caplog):
    import errno
    import fcntl

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with lock(tmp_path / "run.lock"):
        assert "this file system has no locks" in caplog.text


def test_a_restart_by_torchrun_goes_on(quick, tmp_path, monkeypatch):
    """The same job, restarted: neither the lock nor what it left keeps it from going on, even with overwrite=true."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-7")
    options = (*FAST, "train.log_every=1", "overwrite=true")
    cut = interrupt(monkeypatch, quick(*options), at=3)
    taken, step = [], Learner.step

    def counted(self, number, *batch):
        taken.append(number)
        return step(self, number, *batch)

    monkeypatch.setattr(Learner, "step", counted)
    train(quick(*options), quiet=True)
    assert taken == [2, 3]
    assert cut.is_finished
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-8")  # another job's restart
    with pytest.raises(FolderOccupied):
        train(quick(*FAST), quiet=True)


@pytest.mark.slow
def test_a_refusal_reaches_every_process(tmp_path):
    """Two processes of torchrun and a folder that is taken: both leave with the same sentence, none waits for ever."""
    folder = RunFolder(train(load_config(None, [f"output_dir={tmp_path}/run", *QUICK, *FAST]), quiet=True))
    before = content_of(folder.path)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m"]
    command += ["ordinalclip", "train", "default", "--quiet", f"output_dir={folder.path}", *QUICK, *FAST]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode != 0
    assert done.stderr.count(f"ordinalclip: {folder.path} holds a finished run") == 2
    owner = hold(tmp_path / "run")
    try:
        done = subprocess.run(
            [*command, "overwrite=true"], env=environment, capture_output=True, text=True, timeout=200, check=False
        )
    finally:
        owner.kill()
        owner.wait()
    assert done.stderr.count(f"in use by process {owner.pid}") == 2
    assert {name: content for name, content in content_of(folder.path).items() if name.name != "run.lock"} == before


# ---- where a run comes from


def test_provenance(quick, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ordinalclip", "train", "x.yaml"])
    config = quick(*FAST)
    folder = RunFolder(train(config, quiet=True))
    found = folder.read_provenance()
    assert found["versions"]["torch"] == version("torch")
    assert found["command"] == ["ordinalclip", "train", "x.yaml"]
    assert found["processes"] == 1
    parts = load_parts(config.data, config.ranks, config.seed)
    assert found["data"]["test"] == fingerprint(parts.test)
    assert found["data"]["train"]["rows"] == 24
    assert found["licenses"] == {
        "data": "Apache-2.0, generated by ordinalclip",
        "backbone": "Apache-2.0, shipped with ordinalclip",
    }
    assert {"image", "label"} <= set(found["data"]["train"]["columns"])
    first = found["started"]
    train(quick(*FAST, "train.resume=auto"), quiet=True)
    again = folder.read_provenance()
    assert again["started"] == first
    assert len(again["continued"]) == 1


def test_a_fingerprint_knows_names_labels_and_order(quick, monkeypatch):
    config = quick()
    part = load_parts(config.data, config.ranks, config.seed).train
    mark = fingerprint(part)
    assert fingerprint(part.select(np.arange(len(part)))) == mark
    monkeypatch.setattr("ordinalclip.provenance.CHUNK", 5)
    assert fingerprint(part) == mark  # however many names are in memory at a time
    late = part.select([*range(len(part) - 2), len(part) - 1, len(part) - 2])
    alike = replace(late, values=part.values)  # the same labels, two of the last names exchanged
    assert fingerprint(alike)["sha256"] != mark["sha256"]
    swapped = part.select([1, 0, *range(2, len(part))])
    assert fingerprint(swapped)["sha256"] != mark["sha256"]
    assert "first was 'row 1'" in changed_data({"train": mark}, {"train": fingerprint(swapped)})
    assert changed_data({"train": mark}, {"train": mark}) == ""
    assert "the test part" in changed_data({"train": mark}, {"train": mark, "test": mark})


def test_resuming_on_changed_data_is_refused(image_folder, tmp_path):
    data = ["data.source=table", f"data.root={image_folder}", "data.table=labels.csv", "data.image_column=file"]
    data += ["data.label_column=grade", "data.split=[0.5,0,0.5]", "ranks.values=[0,1,2]", "method=l1"]
    options = [
        *data,
        f"output_dir={tmp_path}/run",
        "train.max_steps=2",
        "train.batch_size=2",
        "evaluation.report=false",
    ]
    train(load_config(None, options), quiet=True)
    labels = image_folder / "labels.csv"
    labels.write_text(labels.read_text().replace("cell0.png,0", "cell0.png,2"))
    with pytest.raises(ValueError, match=r"cannot resume with other data: the .* part has changed: names or labels"):
        train(load_config(None, [*options, "train.resume=auto"]), quiet=True)
    before = content_of(tmp_path / "run")
    with pytest.raises(ValueError, match=r"not the data of the run: the .* part has changed"):
        evaluate_run(tmp_path / "run", quiet=True)
    with pytest.raises(ValueError, match=r"not the data of the run: .* --data DATA` scores other data, every row"):
        evaluate_run(tmp_path / "run", overrides=[f"data.root={image_folder}"], quiet=True)
    assert content_of(tmp_path / "run") == before


def test_source_is_the_commit_of_the_checkout_or_nothing(tmp_path, monkeypatch):
    from ordinalclip import provenance

    package = Path(provenance.__file__).parent
    here = subprocess.run(["git", "rev-parse", "HEAD"], cwd=package, capture_output=True, text=True, check=False)
    found = source()
    if here.returncode == 0:
        assert found["commit"] == here.stdout.strip()
    else:
        assert found is None  # tests of an archive without its history
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "site-packages" / "provenance.py"))
    (tmp_path / "site-packages").mkdir()
    assert source() is None


def test_local_paths_are_shortened_in_report_and_card(image_folder, tmp_path):
    deep = tmp_path / "secret" / "study" / "run"
    data = ["data.source=table", f"data.root={image_folder}", f"data.table={image_folder}/labels.csv"]
    data += ["data.image_column=file", "data.label_column=grade", "data.split=[0.5,0,0.5]", "ranks.values=[0,1,2]"]
    folder = train(
        load_config(None, [*data, f"output_dir={deep}", "method=l1", "train.max_steps=2", "train.batch_size=2"]),
        quiet=True,
    )
    for file in (folder / "report.html", folder / "model" / "README.md"):
        text = file.read_text()
        assert str(tmp_path) not in text, file
        assert "secret" not in text
        assert f"{image_folder.name}/labels.csv" in text
    assert "study/run" in (folder / "report.html").read_text()
    clip = tmp_path / "secret" / "clips" / "tiny"
    shutil.copytree(TINY_FOLDER, clip)
    options = [*data, f"output_dir={deep}", "method=l1", "train.max_steps=1", "train.batch_size=2", "overwrite=true"]
    train(load_config(None, [*options, f"model.backbone=open_clip:{clip}"]), quiet=True)
    for file in (folder / "report.html", folder / "model" / "README.md"):
        assert "secret" not in file.read_text(), file
        assert "open_clip:clips/tiny" in file.read_text()
    assert yaml.safe_load((folder / "config.yaml").read_text())["output_dir"] == str(deep)
