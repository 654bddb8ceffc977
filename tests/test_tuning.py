"""A search: what Optuna is asked, what survives a kill, what the folder holds in the end."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import QUICK, log_of

from ordinalclip.cli import main
from ordinalclip.config import load_config
from ordinalclip.files import FolderInUse
from ordinalclip.run_folder import FolderOccupied, RunFolder
from ordinalclip.runs import train_run
from ordinalclip.search import Choice, Range
from ordinalclip.signals import Preempted
from ordinalclip.training.interruption import Pruned
from ordinalclip.tuning import load_plan, run_plan, trials, tune
from ordinalclip.tuning.study import STARTUP, Study, TrialState, repair, texts

SEARCH = {
    "train.lr": Range("1e-5..1e-1:log", 1e-5, 1e-1, log=True),
    "train.batch_size": Range("8..32:step=8", 8, 32, step=8),
    "train.schedule": Choice("cosine|constant", ("cosine", "constant")),
}
L1 = (*(each for each in QUICK if "train.lr" not in each), "method=l1", "train.max_steps=2", "train.eval_every=1")
SEARCHED = ("train.lr=1e-4..1e-1:log", "train.schedule=cosine|constant")
LONGER = (*(each for each in L1 if "max_steps" not in each), "train.max_steps=6", *SEARCHED)


def good(setting):
    """A made-up validation MAE, smallest at a learning rate of 1e-3 with a constant one."""
    return abs(math.log10(float(setting["train.lr"])) + 3) + (setting["train.schedule"] == "cosine")


def rows_of(folder):
    with (folder / "trials.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def drawn_by(journal, number, reopen):
    """Settings of trials one after the other; by one process, or each by a new one."""
    settings = []
    study = Study(journal, "none", seed=7)
    for _ in range(number):
        study = Study(journal, "none", seed=7) if reopen else study
        trial = study.draw(SEARCH)
        settings.append(texts(trial))
        study.finish(trial.number, good(texts(trial)))
    return settings


def test_what_is_drawn_does_not_depend_on_how_often_the_search_was_begun(tmp_path):
    settings = drawn_by(tmp_path / "a", STARTUP + 6, reopen=False)
    assert drawn_by(tmp_path / "b", STARTUP + 6, reopen=True) == settings
    assert len({tuple(setting.values()) for setting in settings}) == len(settings)
    for setting in settings:
        assert 1e-5 <= float(setting["train.lr"]) <= 1e-1
        assert setting["train.batch_size"] in ("8", "16", "24", "32")
        assert setting["train.schedule"] in ("cosine", "constant")


def test_what_is_drawn_after_the_first_ten_follows_what_was_good(tmp_path):
    settings = drawn_by(tmp_path / "a", STARTUP + 20, reopen=False)
    first, later = ([good(each) for each in part] for part in (settings[:STARTUP], settings[STARTUP + 5 :]))
    assert sum(later) / len(later) < 0.7 * sum(first) / len(first)


def test_a_journal_survives_a_kill_while_it_is_written(tmp_path):
    journal = tmp_path / "study.journal"
    before = drawn_by(journal, 3, reopen=False)
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code":4,"worker_id":"x","study')  # what a full disk or a dead machine leaves
    lock = journal.with_name("study.journal.lock")
    lock.touch()
    os.utime(lock, (time.time() - 60, time.time() - 60))
    repair(journal)
    assert journal.read_bytes() == whole
    assert not lock.exists()
    study = Study(journal, "none", seed=7)
    assert [texts(trial) for trial in study.trials(SEARCH)] == before
    study.draw(SEARCH)
    assert len(Study(journal, "none").trials(SEARCH)) == 4


def test_a_trial_of_which_half_was_drawn_is_none(tmp_path):
    lines = drawn_by(tmp_path / "whole", 2, reopen=False), (tmp_path / "whole").read_bytes().splitlines(keepends=True)
    settings, written = lines
    for kept in range(1, len(written)):  # killed after every line of the journal
        journal = tmp_path / f"cut{kept}"
        journal.write_bytes(b"".join(written[:kept]))
        repair(journal)
        study = Study(journal, "none", seed=7)
        for trial in study.trials(SEARCH):
            if trial.state == TrialState.RUNNING:
                study.finish(trial.number, good(texts(trial)))
        while len(study.trials(SEARCH)) < 2:
            study.finish(study.draw(SEARCH).number, 1.0)
        assert [texts(trial) for trial in study.trials(SEARCH)] == settings


@pytest.mark.parametrize("pruner", ["median", "hyperband", "none"])
def test_a_trial_is_pruned_where_it_is_behind_the_others(tmp_path, pruner):
    journal = tmp_path / "study.journal"
    study = Study(journal, pruner, seed=7)
    for place in range(6):
        number = study.draw(SEARCH).number
        watch = Study(journal, pruner).watch(number)  # by another process
        for validation in range(1, 10):
            watch(validation, 5 - place / 10 - validation / 10)  # each better than the last
        study.finish(number, 4.0)
    watch = Study(journal, pruner).watch(study.draw(SEARCH).number)
    watch(1, 4.0)
    watch(2, 4.0)  # better than all of them
    bad = study.draw(SEARCH).number
    ended = None
    try:
        for validation in range(1, 10):
            Study(journal, pruner).watch(bad)(validation, 50.0)
    except Pruned:
        ended = validation
    assert ended == {"median": 2, "none": None}.get(pruner, ended)
    assert (ended is None) == (pruner == "none")


def test_a_run_tells_its_validations_and_ends_when_it_is_pruned(quick):
    config = quick("method=l1", "train.max_steps=6", "train.eval_every=2")
    told = []

    def prune(number, mae):
        told.append((number, mae))
        if number == 2 and told.count((number, mae)) == 1:
            raise Pruned("enough")

    with pytest.raises(Pruned):
        train_run(config, quiet=True, watch=prune)
    assert [row["step"] for row in log_of(config.output_dir)] == [1, 2, 3, 4]
    assert RunFolder(config.output_dir).state().kind == "interrupted"
    again = config.model_copy(update={"train": config.train.model_copy(update={"resume": "auto"})})
    metrics = train_run(again, quiet=True, watch=prune)
    validated = [row["validation_mae"] for row in log_of(config.output_dir) if "validation_mae" in row]
    assert told == list(zip((1, 2, 2, 3), (*validated[:2], *validated[1:]), strict=True))  # the second once more
    assert metrics["validation"]["mae"] == pytest.approx(min(validated))


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A search of three trials, and how its command began."""
    folder = tmp_path_factory.mktemp("tuning") / "search"
    overrides = (f"output_dir={folder}", *L1, *SEARCHED)
    text, errors = tune(None, overrides, trials=3, quiet=True)
    assert errors == []
    return folder, overrides, text


def test_a_search_ends_with_the_best_run_and_what_to_train_from(searched):
    folder, _, text = searched
    rows = rows_of(folder)
    best = min(rows, key=lambda row: float(row["validation_mae"]))
    run = RunFolder(best["runs"])
    assert str(run.path) in text
    assert f"{float(best['validation_mae']):.4g}" in text
    metrics = run.read_metrics()
    assert metrics["validation"]["mae"] == float(best["validation_mae"])
    assert run.report.is_file()
    assert {row["runs"] for row in rows if RunFolder(row["runs"]).model.exists()} == {best["runs"]}
    for row in rows:
        assert "test" not in RunFolder(row["runs"]).read_metrics()
        assert not RunFolder(row["runs"]).checkpoints.exists()
    config = load_config(folder / "best.yaml")
    assert config.train.lr == float(best["train.lr"])
    assert config.train.schedule == best["train.schedule"]
    assert (config.evaluation.test, config.evaluation.report) == (True, False)  # as QUICK says
    assert config.output_dir == str(folder / "best")
    loser = next(row["runs"] for row in rows if row is not best)
    with pytest.raises(FileNotFoundError, match="only the best keeps its model"):
        RunFolder(loser).read_model()


def test_a_search_goes_on_without_repeating_and_another_is_refused(searched):
    folder, overrides, _ = searched
    before = {file: file.stat().st_mtime_ns for file in folder.glob("trials/*/metrics.json")}
    tune(None, overrides, trials=4, quiet=True)
    after = {file: file.stat().st_mtime_ns for file in folder.glob("trials/*/metrics.json")}
    assert {file: after[file] for file in before} == before
    assert len(after) == len(before) + 1
    changed = [
        ("train.weight_decay=0.1", r"another search: train\.weight_decay was 0\.0005, is 0\.1"),
        ("train.lr=1e-4..1:log", r"another search: search\.train\.lr was '1e-4\.\.1e-1:log', is '1e-4\.\.1:log'"),
        ("model.drop_path=0..0.1", r"another search: search\.model\.drop_path was None, is '0\.\.0\.1'"),
        ("data.num_train=30", r"another search: data\.num_train was 24, is 30"),
    ]
    for override, message in changed:
        with pytest.raises(ValueError, match=message):
            tune(None, [*overrides, override], trials=4, quiet=True)
    for options, message in (({"seeds": 2}, "seeds was 1, is 2"), ({"pruner": "none"}, "pruner was 'median'")):
        with pytest.raises(ValueError, match=message):
            tune(None, overrides, trials=4, quiet=True, **options)
    with RunFolder(folder).locked(), pytest.raises(FolderInUse):
        tune(None, overrides, trials=4, quiet=True)
    assert len(rows_of(folder)) == 4


def test_data_that_changed_since_an_earlier_call_of_the_process_is_noticed(tmp_path, image_folder):
    overrides = [f"output_dir={tmp_path}/search", f"data.root={image_folder}", "data.source=table", "method=l1"]
    overrides += [
        "data.table=labels.csv",
        "data.image_column=file",
        "data.label_column=grade",
        "ranks.values=[0, 1, 2]",
    ]
    overrides += ["data.split=[0.34, 0.33, 0.33]", "train.max_steps=1", "train.batch_size=2", "train.lr=1e-4..1e-2"]
    tune(None, overrides, trials=1, quiet=True)
    labels = image_folder / "labels.csv"
    labels.write_text(labels.read_text().replace("cell0.png,0", "cell0.png,2"))
    with pytest.raises(ValueError, match=r"holds another search: the \w+ part has changed"):
        tune(None, overrides, trials=2, quiet=True)


@pytest.mark.slow
def test_only_the_best_so_far_keeps_a_model_and_the_page_that_calls_it_so(tmp_path, monkeypatch):
    """Each trial is better than the last; the second seed of the third breaks off."""
    real = trials.train_one

    def improves(run, **options):
        if run.output_dir.endswith("002-seed2"):
            return trials.Result(None, error=f"{run.output_dir}: a broken picture")
        return real(run, **options)

    monkeypatch.setattr(trials, "train_one", improves)
    monkeypatch.setattr(trials, "_value", lambda run, result: 9.0 - int(run.output_dir[-9:-6]))
    overrides, folder = (f"output_dir={tmp_path}/search", *L1, *SEARCHED), tmp_path / "search" / "trials"
    tune(None, overrides, trials=2, seeds=2, quiet=True)
    assert RunFolder(folder / "001-seed1").report.is_file()
    tune(None, overrides, trials=4, seeds=2, quiet=True)
    assert {row["trial"]: row["state"] for row in rows_of(tmp_path / "search")}["2"] == "failed"
    assert {path.parent.name for path in folder.glob("*/model")} == {"003-seed1", "003-seed2"}
    assert {path.parent.name for path in folder.glob("*/report.html")} == {"003-seed1"}


def test_a_trial_ends_with_its_first_run_that_diverges_and_takes_one_that_has(tmp_path, monkeypatch):
    trained = []

    def diverges(run, **options):
        trained.append(run.seed)
        return trials.Result(None, "step 1: loss is nan")

    monkeypatch.setattr(trials, "train_one", diverges)
    plan = load_plan(None, [f"output_dir={tmp_path}/search", *L1, *SEARCHED], trials=1, seeds=3)
    plan.folder.mkdir()
    study = Study(plan.files.journal, "none")
    trial = study.draw(plan.search)
    work = trials.Trial(trial.number, plan.runs(trial.number, texts(trial)))
    assert trials._run_trial(work, plan.files.journal, "none") == trials.Tried(math.inf)
    assert trained == [1]
    folder = RunFolder(work.runs[0].output_dir)
    folder.path.mkdir(parents=True)
    folder.write_config(work.runs[0])
    folder.diverged.write_text("step 1: loss is nan")  # and then it was killed
    assert trials._run_trial(work, plan.files.journal, "none") == trials.Tried(math.inf)
    assert trained == [1]


def test_a_search_takes_no_folder_of_another(tmp_path, quick):
    config = quick("method=constant")
    train_run(config, quiet=True)
    with pytest.raises(FolderOccupied, match=r"the folder of a finished run.*output_dir=.*-tune"):
        tune(None, [f"output_dir={config.output_dir}", *L1, *SEARCHED], trials=2, quiet=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "report.html").write_text("mine")
    with pytest.raises(FolderOccupied, match=r"holds report\.html, and no search"):
        tune(None, [f"output_dir={tmp_path}/mine", *L1, *SEARCHED], trials=2, quiet=True)
    assert (tmp_path / "mine" / "report.html").read_text() == "mine"


def test_a_key_is_either_searched_or_set():
    with pytest.raises(ValueError, match=r"train\.lr is searched, as 1e-4\.\.1e-2, and set, to 1e-3"):
        load_plan(None, ["train.lr=1e-4..1e-2", "train.lr=1e-3"])


def test_without_optuna_the_extra_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "optuna", None)
    for name in ("ordinalclip.tuning.study", "ordinalclip.tuning.trials"):
        monkeypatch.delitem(sys.modules, name)
    assert main(["tune", "default", "train.lr=1e-4..1e-2", f"output_dir={tmp_path}/search"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("pip install 'ordinalclip[tune]'")
    assert not (tmp_path / "search").exists()


@pytest.mark.slow
def test_what_broke_off_is_shown_and_drawn_anew(tmp_path, monkeypatch):
    overrides = (f"output_dir={tmp_path}/search", *L1, *SEARCHED)
    real = trials.train_one

    def breaks(run, **options):
        if run.output_dir.endswith("001-seed1"):
            return trials.Result(None, error=f"{run.output_dir}: a broken picture")
        if run.output_dir.endswith("002-seed1"):
            return trials.Result(None, "step 1: loss is nan")
        return real(run, **options)

    monkeypatch.setattr(trials, "train_one", breaks)
    _, errors = tune(None, overrides, trials=4, quiet=True)
    assert [error.partition(": ")[2] for error in errors] == ["a broken picture"]
    assert [row["state"] for row in rows_of(tmp_path / "search")] == ["complete", "failed", "diverged", "complete"]
    page = (tmp_path / "search" / "report.html").read_text(encoding="utf-8")
    assert "a broken picture" in page
    _, errors = tune(None, overrides, trials=4, quiet=True)
    assert errors == []
    states = [row["state"] for row in rows_of(tmp_path / "search")]
    assert states == ["complete", "failed", "diverged", "complete", "complete"]


@pytest.mark.slow
def test_several_seeds_are_averaged_and_read_once_each(tmp_path):
    tune(None, (f"output_dir={tmp_path}/search", *L1, *SEARCHED), trials=1, seeds=2, quiet=True)
    for row in rows_of(tmp_path / "search"):
        maes = [RunFolder(run).read_metrics()["validation"]["mae"] for run in row["runs"].split()]
        assert len(maes) == 2
        assert float(row["validation_mae"]) == pytest.approx(sum(maes) / 2)


def start(folder, *more):
    """The command in a process of its own."""
    command = [sys.executable, "-m", "ordinalclip", "tune", "default", "-q", "--trials", "8", f"output_dir={folder}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *LONGER, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def wait_for(file, process):
    deadline = time.monotonic() + 120
    while not file.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_a_search_that_was_killed_goes_on_as_if_nothing_had_happened(tmp_path):
    tune(None, (f"output_dir={tmp_path}/calm", *LONGER), trials=8, quiet=True)
    folder, statuses = tmp_path / "killed", []
    for trial, number in ((1, signal.SIGKILL), (6, signal.SIGTERM)):
        process = start(folder)
        wait_for(folder / "trials" / f"{trial:03d}-seed1" / "checkpoints", process)
        process.send_signal(number)
        statuses.append(process.wait(timeout=60))
    assert statuses == [-signal.SIGKILL, 75]
    tune(None, (f"output_dir={folder}", *LONGER), trials=8, quiet=True)
    kept = ("trial", "state", "validation_mae", "train.lr", "train.schedule")
    found = [[{key: row[key] for key in kept} for row in rows_of(each)] for each in (folder, tmp_path / "calm")]
    assert found[0] == found[1]
    assert "pruned" in {row["state"] for row in found[0]}  # or pruning is not tested
    continued = [
        file.parent.name
        for file in sorted(folder.glob("trials/*/provenance.json"))
        if "continued" in json.loads(file.read_text())
    ]
    assert continued  # went on inside a run
    for row in rows_of(folder):
        run = RunFolder(Path(row["runs"]))
        assert run.state().kind == {"complete": "finished"}.get(row["state"], row["state"])
        assert not run.checkpoints.exists()
        assert [entry["step"] for entry in run.read_log()] == list(range(1, len(run.read_log()) + 1))


@pytest.mark.slow
def test_several_trials_at_a_time_are_stopped_and_taken_up(tmp_path):
    folder = tmp_path / "search"
    process = start(folder, "jobs=2")
    wait_for(folder / "trials" / "002-seed1" / "checkpoints", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    text, errors = tune(None, (f"output_dir={folder}", *LONGER, "jobs=2"), trials=5, quiet=True)
    assert errors == []
    assert "best of 5 trials" in text
    assert {row["state"] for row in rows_of(folder)} <= {"complete", "pruned", "diverged"}
    assert len(rows_of(folder)) == 5


def test_told_to_stop_says_how_far_it_is(tmp_path, monkeypatch):
    def stopped(run, **options):
        raise Preempted("told to stop", signal.SIGTERM)

    monkeypatch.setattr(trials, "train_one", stopped)
    plan = load_plan(None, [f"output_dir={tmp_path}/search", *L1, *SEARCHED], trials=2)
    with pytest.raises(Preempted, match="0 of 2 trials have ended, the same command goes on") as told:
        run_plan(plan, quiet=True)
    assert told.value.status == 75
