"""Ctrl-C, SIGTERM, killed processes and full disks: one line, a status of its own, and on again from a checkpoint."""

import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import numpy as np
import pytest
import yaml
from conftest import QUICK, log_of, without_times
from PIL import Image
from test_elastic import ENVIRONMENT, wait_for, workers
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from ordinalclip.cli import main
from ordinalclip.run_folder import RunFolder
from ordinalclip.signals import INTERRUPTED, PREEMPTED, Preempted, leave, listening
from ordinalclip.training.checkpoint import checkpoints, load_checkpoint
from ordinalclip.training.interruption import Interruption, Pruned
from ordinalclip.training.step import Learner

LONG = ("method=l1", "train.max_steps=100000", "train.eval_every=100000", "data.num_validation=4")


def train(folder, *more):
    words = ["train", "default", "-q", f"output_dir={folder}", *QUICK, "train.resume=auto", *more]
    return list({word.partition("=")[0]: word for word in words}.values())  # a key that is given twice would be said


def start(command, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "ordinalclip", *command],
        env={**ENVIRONMENT, **environment},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a process group as a terminal makes it
    )


def ended(process, status, seconds=60):
    """What a process said on stderr: one line of ours."""
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == status, out + err
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("ordinalclip: ")
    return lines[0]


def has_steps(folder, number):
    return lambda: (folder / "log.jsonl").exists() and len(RunFolder(folder).read_log()) >= number


def test_statuses_are_those_that_shells_and_schedulers_know():
    assert [Preempted("").code, Preempted("", signal.SIGINT).code] == [75, 130]
    stopped = pickle.loads(pickle.dumps(Preempted("at step 3", signal.SIGINT)))
    assert (str(stopped), stopped.code, stopped.number) == ("at step 3", 130, signal.SIGINT)


# ---- in one process


def signalled(monkeypatch, where, number):
    """Send a signal when a function is called."""
    module, _, name = where.rpartition(".")
    monkeypatch.setattr(f"{module}.{name}", lambda *_, **__: (os.kill(os.getpid(), number), time.sleep(5)))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("command", "where"),
    [
        (["train", "default", "output_dir=run"], "ordinalclip.training.trainer.load_parts"),
        (["train", "default", "output_dir=run"], "ordinalclip.training.trainer.build_model"),
        (
            ["train", "default", "output_dir=run", "method=constant"],
            "ordinalclip.training.evaluation.Evaluator.outputs",
        ),
        (["check-data", "default"], "ordinalclip.data.load_parts"),
        (["predict", "x.png", "--model", "run"], "ordinalclip.data.pictures.find_images"),
        (["make-gauges", "out"], "ordinalclip.gauges.drawn_gauges"),
        (["convert", "a.pt", "out"], "ordinalclip.convert.convert"),
        (["report", "run"], "ordinalclip.results.comparison.is_comparison"),
        (["evaluate", "run"], "ordinalclip.runs.evaluate_run"),
    ],
)
def test_a_signal_anywhere_is_one_line(tmp_path, monkeypatch, capsys, command, where, number):
    monkeypatch.chdir(tmp_path)
    signalled(monkeypatch, where, number)
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    assert main([*command, "-q"]) == (INTERRUPTED if number == signal.SIGINT else PREEMPTED)
    said = capsys.readouterr().err
    assert said == f"ordinalclip: {'stopped by Ctrl-C' if number == signal.SIGINT else 'told to stop'}\n"
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    assert not (tmp_path / "run").exists()


def test_ctrl_c_in_the_last_step_or_while_its_checkpoint_is_written_is_not_forgotten(tmp_path, monkeypatch, capsys):
    """What is left is the evaluation, which may take long; going on does it."""
    from ordinalclip.training import checkpoint

    save = checkpoint.save_checkpoint

    def interrupted(*given):
        if given[1] == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return save(*given)

    monkeypatch.setattr(checkpoint, "save_checkpoint", interrupted)
    command = train(tmp_path / "run", "method=l1")
    assert main(command) == INTERRUPTED
    monkeypatch.undo()
    said = f"ordinalclip: {tmp_path}/run: told to stop after step 4; train.resume=auto goes on\n"
    assert capsys.readouterr().err == said
    assert main(command) == 0
    assert json.loads((tmp_path / "run/metrics.json").read_text())["steps"] == 4


@pytest.fixture
def pictures(tmp_path):
    """Words of a configuration whose training pictures 1 to 12 are in a table."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = ["image,label"]
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        rows.append(f"{number}.png,{number * 8}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return ["data.source=table", f"data.root={folder}", "data.train_table=labels.csv"]


def test_an_error_in_a_worker_is_that_of_the_picture(tmp_path, pictures, capsys):
    (tmp_path / "pictures/7.png").write_text("text")
    for workers_ in (0, 2):
        assert main(train(tmp_path / "run", "method=l1", *pictures, f"data.workers={workers_}")) == 2
        error = capsys.readouterr().err
        assert re.fullmatch(r"ordinalclip: .*7\.png: not a readable image \(.*\)\n", error)
        assert "Traceback" not in error


@pytest.mark.timeout(100)
@pytest.mark.parametrize(("num", "with_its_lock"), [(1, False), (1, True), (2, True)])
def test_a_killed_worker_is_named_and_the_checkpoints_stay(tmp_path, monkeypatch, capsys, num, with_its_lock):
    """One of `num`. It asks a shared event after each batch; killed in the middle of that, it keeps the lock."""
    step, begun = Learner.step, []
    begin = _MultiProcessingDataLoaderIter.__init__
    monkeypatch.setattr(
        _MultiProcessingDataLoaderIter, "__init__", lambda loader, *given: begun.append(loader) or begin(loader, *given)
    )

    def killing(self, number, *batch):
        if number == 3:
            (loader,) = [loader for loader in begun if not loader._shutdown]
            assert not with_its_lock or loader._workers_done_event._cond.acquire(timeout=60)
            loader._workers[0].kill()
            time.sleep(0.5)
        return step(self, number, *batch)

    monkeypatch.setattr(Learner, "step", killing)
    more = ("method=l1", f"data.workers={num}", "train.eval_every=2", "train.max_steps=8", "data.prefetch=1")
    assert main(train(tmp_path / "run", *more)) == 2
    said = rf"ordinalclip: one of the data\.workers={num} processes that decode images died \(.*\).*\n"
    assert re.fullmatch(said, capsys.readouterr().err)
    assert not any(worker.is_alive() for loader in begun for worker in loader._workers)
    assert [path.name for path in checkpoints(tmp_path / "run/checkpoints")] == ["step-00000002"]
    assert load_checkpoint(tmp_path / "run/checkpoints/step-00000002").state["step"] == 2


# ---- real processes


@pytest.mark.slow
def test_ctrl_c_to_a_terminals_processes_saves_and_goes_on(tmp_path):
    """The workers that decode get the signal, too. What follows is what would have been without it."""
    more = ("method=l1", "train.eval_every=4", "train.max_steps=12", "data.workers=1", "train.log_every=1")
    assert start(train(tmp_path / "whole", *more)).wait(120) == 0
    process = start(train(tmp_path / "cut", *more))
    wait_for(has_steps(tmp_path / "cut", 2), 60)
    os.killpg(process.pid, signal.SIGINT)
    assert "told to stop after step" in ended(process, INTERRUPTED)
    assert start(train(tmp_path / "cut", *more)).wait(120) == 0
    assert without_times(log_of(tmp_path / "whole")) == without_times(log_of(tmp_path / "cut"))


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(tmp_path):
    """In a step that takes long, of short operations: Python hears of two signals during one operation as of one."""
    process = start(train(tmp_path / "run", *LONG, "train.batch_size=6000", "train.micro_batch_size=6"))
    wait_for(lambda: (tmp_path / "run/run.lock").exists(), 60)
    time.sleep(3)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(1)
    try:
        assert process.wait(10) == -signal.SIGINT  # not by the end of the step, after which it would save and say so
    finally:
        process.kill()
    assert not checkpoints(tmp_path / "run/checkpoints")


@pytest.mark.slow
def test_ctrl_c_while_the_libraries_are_imported(tmp_path):
    for seconds in (0.5, 1.5, 2.5):
        process = start(train(tmp_path / "run", *LONG))
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        assert "stopped by Ctrl-C" in ended(process, INTERRUPTED)


@pytest.mark.slow
def test_ctrl_c_stops_two_processes_of_torchrun_at_one_step(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m"]
    command += ["ordinalclip", *train(tmp_path / "run", *LONG, "train.log_every=1")]
    process = subprocess.Popen(
        command, env=ENVIRONMENT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for(has_steps(tmp_path / "run", 3), 100)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    (saved,) = checkpoints(tmp_path / "run/checkpoints")
    step = int(saved.name.removeprefix("step-"))
    assert err.count("ordinalclip: ") == 1, err
    assert f"ordinalclip: {tmp_path}/run: told to stop after step {step}; train.resume=auto goes on" in err
    assert not workers(tmp_path / "run")


@contextmanager
def disk(folder, size):
    """A file system of so many bytes."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk_ends_every_process_and_leaves_what_was_whole(tmp_path, processes):
    with disk(tmp_path / "disk", "40m"):
        folder = tmp_path / "disk/run"
        more = ("method=l1", "train.eval_every=1", "train.keep_checkpoints=99", "train.max_steps=99")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if processes > 1 else {}
        ranks = [
            start(train(folder, *more), **({"RANK": str(rank), "LOCAL_RANK": str(rank), **place} if place else {}))
            for rank in range(processes)
        ]
        for rank in ranks:
            said = ended(rank, 2, 120)
            assert re.search(r"run/\S+: could not be written \(.*[Nn]o space.*\)", said)
        assert not list(folder.rglob(".partial-*"))
        assert not (folder / "metrics.json").exists()
        kept = checkpoints(folder / "checkpoints")
        assert kept
        for path in kept:
            load_checkpoint(path)


@pytest.mark.slow
def test_an_output_that_nobody_reads_to_its_end_or_that_is_full(tmp_path):
    main(["make-gauges", str(tmp_path / "g"), "--num", "3", "-q"])
    main(train(tmp_path / "run", "method=constant"))
    command = f"{sys.executable} -m ordinalclip predict {tmp_path}/g --model {tmp_path}/run -q"
    shell = {"shell": True, "env": ENVIRONMENT, "capture_output": True, "text": True, "executable": "/bin/bash"}
    done = subprocess.run(f"set -o pipefail; {command} | true", **shell, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    done = subprocess.run(f"{command} > /dev/full", **shell, check=False)
    said = "ordinalclip: standard output: could not be written (No space left on device)\n"
    assert (done.returncode, done.stderr) == (2, said)


# ---- comparisons


def comparison(folder, jobs, steps=100000):
    content = {
        "output_dir": str(folder / "out"),
        "seeds": [1, 2],
        "jobs": jobs,
        "base": {
            "method": "l1",
            "data": {"num_train": 16, "num_validation": 8, "num_test": 8},
            "ranks": {"low": 0, "high": 100, "num": 11},
            "train": {"max_steps": steps, "batch_size": 8, "eval_every": steps, "log_every": 1},
        },
        "methods": {"L1": {}, "MSE": {"base": {"method": "mse"}}},
    }
    path = folder / f"c{jobs}.yaml"
    path.write_text(yaml.safe_dump(content))
    return ["compare", str(path), "-q"]


def logs(folder):
    return [log.parent for log in (folder / "out/runs").glob("*/log.jsonl") if has_steps(log.parent, 2)()]


def others(session):
    """Processes of a session but its leader."""
    found = []
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = open(f"/proc/{process}/stat").read().rpartition(")")[2].split()  # noqa: SIM115
        except OSError:
            continue
        if int(fields[3]) == session and int(process) != session and fields[0] != "Z":
            found.append(int(process))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_comparison_stops_with_all_its_processes_and_goes_on_inside_its_runs(tmp_path, jobs, number):
    process = start(comparison(tmp_path, jobs))
    wait_for(lambda: len(logs(tmp_path)) == jobs, 100)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does it
    else:
        process.send_signal(number)
    if number == signal.SIGKILL:
        process.wait()
    else:
        said = ended(process, INTERRUPTED if number == signal.SIGINT else PREEMPTED, 30)
        assert f"{tmp_path}/out: told to stop; 0 of 4 runs are done, the same command goes on" in said
        for run in logs(tmp_path):
            (saved,) = checkpoints(run / "checkpoints")
            assert len(log_of(run)) == int(saved.name.removeprefix("step-"))
    wait_for(lambda: not others(process.pid), 10)


@pytest.mark.slow
def test_a_killed_process_of_a_comparison_is_replaced_and_goes_on_inside_its_run(tmp_path):
    process = start([*comparison(tmp_path, 2, steps=40), "seeds=[1]", "train.eval_every=5"])
    wait_for(lambda: len([run for run in logs(tmp_path) if has_steps(run, 12)()]) > 0, 100)
    run = next(run for run in logs(tmp_path) if has_steps(run, 12)())
    os.kill(json.loads((run / "run.lock").read_text())["process"], signal.SIGKILL)
    out, err = process.communicate(timeout=100)
    assert (process.returncode, err) == (0, "")
    assert "| L1 |" in out
    assert len(RunFolder(run).read_provenance()["continued"]) == 1
    assert [row["step"] for row in log_of(run)] == list(range(1, 41))
    assert not others(process.pid)


@pytest.mark.parametrize(("number", "ends"), [(signal.SIGTERM, Preempted), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_that_another_end_overtakes_is_not_forgotten(number, ends):
    def overtaken(signalled):
        with listening(leave), Interruption():
            if signalled:
                signal.raise_signal(number)
            raise Pruned("before anybody asks whether to stop")

    with pytest.raises(ends):
        overtaken(True)
    with pytest.raises(Pruned):
        overtaken(False)
