"""Work on executors of all kinds: real processes, real kills, a real Dask cluster on loopback."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import psutil
import pytest
import torch
import yaml
from conftest import log_of
from test_elastic import ENVIRONMENT, wait_for
from test_interruption import comparison, ended, has_steps, logs, start

from ordinalclip import executors
from ordinalclip.compare import load_plan, run_plan
from ordinalclip.executors import Lease, Task, WorkerDied, open_pool
from ordinalclip.run_folder import RunFolder
from ordinalclip.signals import PREEMPTED
from ordinalclip.training.checkpoint import checkpoints


def leases(folder):
    return sorted(folder.glob(".lease-*"))


# ---- work for children: functions of a module that they can import


def double(number):
    return 2 * number


def refuse(number):
    raise ValueError(f"not {number}")


def die_of(victim, folder, number):
    """Kills its own process for one item; says how often it was called."""
    with (folder / f"calls-{number}").open("a") as file:
        file.write("x")
    if number == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    return os.getpid()


def leave_a_file(folder, number):
    (folder / f"begun-{number}").touch()
    time.sleep(0.1)


@pytest.fixture
def importable(monkeypatch):
    """This module, for the children."""
    monkeypatch.setattr(sys, "path", [*sys.path, os.path.dirname(__file__)])


# ---- in one process


def test_items_are_asked_for_when_there_is_a_slot_and_what_has_finished_was_taken_up(tmp_path):
    taken = []

    def items():
        for number in range(4):
            yield number, len(taken)

    with open_pool("local", 1, tmp_path) as pool:
        for item, done in pool.run(lambda item: item[1], items()):
            assert done.result() == item[0] == len(taken)  # one at a time: all before it were taken up
            taken.append(item)
    assert len(taken) == 4


def test_an_error_of_the_work_is_in_its_future(tmp_path):
    with open_pool("local", 1, tmp_path) as pool:
        ((_, done),) = pool.run(refuse, [3])
    with pytest.raises(ValueError, match="not 3"):
        done.result()


def test_leases_of_dead_clients_are_removed_whoever_comes_next(tmp_path):
    (tmp_path / ".lease-0123").write_text("process 1")
    with open_pool("local", 1, tmp_path):
        assert leases(tmp_path) == []


def test_a_lease_holds_until_it_is_emptied_deleted_or_no_longer_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(executors, "RENEWAL", 0.02)
    monkeypatch.setattr(executors, "SILENCE", 0.4)
    with executors._lease(tmp_path) as path:
        lease = Lease(str(path))
        for _ in range(12):  # renewed meanwhile
            assert lease.holds()
            time.sleep(0.05)
        os.truncate(path, 0)
        assert not lease.holds()
    assert not lease.holds()
    assert leases(tmp_path) == []
    silent = tmp_path / ".lease-dead"
    silent.write_text("its client was killed")
    lease, begun = Lease(str(silent)), time.monotonic()
    while lease.holds():
        assert time.monotonic() - begun < 5
        time.sleep(0.05)
    assert time.monotonic() - begun >= 0.4


def test_a_process_that_was_suspended_does_not_take_its_own_silence_for_the_clients(tmp_path, monkeypatch):
    monkeypatch.setattr(executors, "SILENCE", 0.2)
    path = tmp_path / ".lease-1"
    path.write_text("x")
    lease = Lease(str(path))
    assert lease.holds()
    time.sleep(0.5)
    assert lease.holds()


def test_a_worker_that_does_not_see_the_folder_or_has_another_version_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(executors, "APPEARANCE", 0.0)
    task = Task(b"", ".lease-1", str(tmp_path / "elsewhere"), None, executors._origin())
    with pytest.raises(OSError, match=rf"worker on {socket.gethostname()} does not see {tmp_path}/elsewhere: all work"):
        executors.perform(task)
    with pytest.raises(ValueError, match=rf"worker on {socket.gethostname()} has ordinalclip 0.*, the client 9\.9"):
        executors.perform(Task(b"", ".lease-1", str(tmp_path), None, ("9.9", None)))


def test_the_key_execution(tmp_path, monkeypatch):
    command = comparison(tmp_path, 1)
    for wrong in ("dask", "dask://", "dask://host", "dask://host:port", "tcp://host:1", "slurm"):
        with pytest.raises(ValueError, match=rf"execution: .*should be local or dask://HOST:PORT, got '{wrong}'"):
            load_plan(command[1], [f"execution={wrong}"])
    plan = load_plan(command[1], ["execution=dask://127.0.0.1:1"])
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ImportError, match=r"execution=dask://127.0.0.1:1 .*pip install 'ordinalclip\[cluster\]'"):
        run_plan(plan, quiet=True)


# ---- real processes


@pytest.mark.slow
def test_processes_are_kept_and_one_that_dies_costs_no_other_item(tmp_path, importable):
    """The victim is tried three times and named in the end; the others are done once."""
    with open_pool("local", 2, tmp_path) as pool:
        found = dict(pool.run(partial(die_of, 1, tmp_path), range(4)))
        owners = {found[number].result() for number in (0, 2, 3)}
        with pytest.raises(WorkerDied, match=r"its process on .* ended with status -9, 3 times"):
            found[1].result()
        assert len(owners) <= 2
        ((_, doubled),) = pool.run(double, [21])
        assert doubled.result() == 42
    assert [len((tmp_path / f"calls-{number}").read_text()) for number in range(4)] == [1, 3, 1, 1]
    assert leases(tmp_path) == []
    wait_for(lambda: not any(psutil.pid_exists(owner) for owner in owners), 10)


@pytest.mark.slow
def test_after_a_stop_nothing_that_is_queued_is_begun(tmp_path, importable):
    """An executor of one's own has got all items at once, and goes through its queue whatever comes."""
    with ThreadPoolExecutor(1) as executor, open_pool("local", 20, tmp_path, executor) as pool:
        next(pool.run(partial(leave_a_file, tmp_path), range(20)))
        begun = len([*tmp_path.glob("begun-*")])
    assert len([*tmp_path.glob("begun-*")]) <= begun + 1  # one was on its way


def test_after_a_stop_no_process_is_started(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    (tmp_path / ".lease-1").touch()  # emptied
    with pytest.raises(WorkerDied, match="was told to stop"):
        executors.Child(Task(b"", ".lease-1", str(tmp_path), None, ("", None)))


def small(folder, steps, methods=("L1",)):
    """A comparison of one seed; the command for it."""
    command = comparison(folder, 1, steps)
    content = yaml.safe_load((folder / "c1.yaml").read_text())
    content |= {"seeds": [1], "methods": {name: content["methods"][name] for name in methods}}
    (folder / "c1.yaml").write_text(yaml.safe_dump(content))
    return command


def figures(folder, *overrides, executor=None):
    """The table's numbers but times, and the predictions behind them."""
    plan = load_plan(folder / "c1.yaml", overrides)
    rows = run_plan(plan, quiet=True, executor=executor).summaries
    assert {row["method"] for row in rows} == set(plan.config.methods)
    values = {run.output_dir: RunFolder(run.output_dir).read_predictions("test").values for run in plan.runs.values()}
    return (
        [
            {key: value for key, value in row.items() if not key.endswith("_ms") and "seconds" not in key}
            for row in rows
        ],
        {os.path.basename(name): of.tolist() for name, of in values.items()},
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", [ThreadPoolExecutor, ProcessPoolExecutor])
def test_an_executor_of_ones_own_gives_the_same_table(tmp_path, kind, monkeypatch):
    small(tmp_path, 3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as many as each child has: two add up in another order
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    try:
        here = figures(tmp_path, f"output_dir={tmp_path}/here")
    finally:
        torch.set_num_threads(threads)
    with kind(2) as executor:
        assert figures(tmp_path, f"output_dir={tmp_path}/there", executor=executor) == here


class Elsewhere(ThreadPoolExecutor):
    """Its labels are changed once the client has read them: as if its disk were another."""

    def __init__(self, labels):
        super().__init__(1)
        self.labels = labels

    def submit(self, *given):
        self.labels.write_text(self.labels.read_text().replace("cell0.png,0", "cell0.png,2"))
        return super().submit(*given)


@pytest.mark.slow
def test_a_worker_with_other_data_under_the_same_name_is_said(tmp_path, image_folder):
    small(tmp_path, 2)
    content = yaml.safe_load((tmp_path / "c1.yaml").read_text())
    data = {"source": "table", "root": str(image_folder), "table": "labels.csv", "image_column": "file"}
    content["base"] |= {"data": {**data, "label_column": "grade", "split": [0.34, 0.33, 0.33]}}
    content["base"] |= {"ranks": {"values": [0, 1, 2]}, "train": {"max_steps": 1, "batch_size": 2}}
    (tmp_path / "c1.yaml").write_text(yaml.safe_dump(content))
    with (
        Elsewhere(image_folder / "labels.csv") as executor,
        pytest.raises(ValueError, match=r"its worker has other data .*: the \w+ part has changed"),
    ):
        run_plan(load_plan(tmp_path / "c1.yaml"), quiet=True, executor=executor)


@pytest.mark.slow
def test_a_trials_worker_with_other_data_under_the_same_name_is_said(tmp_path, image_folder, monkeypatch):
    from ordinalclip.tuning import trials, tune

    data = [f"data.root={image_folder}", "data.source=table", "data.table=labels.csv", "data.image_column=file"]
    data += ["data.label_column=grade", "data.split=[0.34, 0.33, 0.33]", "ranks.values=[0, 1, 2]"]
    run = ["method=l1", "train.max_steps=1", "train.batch_size=2", "train.lr=1e-4..1e-2"]
    with Elsewhere(image_folder / "labels.csv") as executor:
        monkeypatch.setattr(trials, "open_pool", partial(open_pool, executor=executor))
        with pytest.raises(ValueError, match=r"its worker has other data .*: the \w+ part has changed"):
            tune(None, [f"output_dir={tmp_path}/search", *data, *run], trials=1, quiet=True)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A scheduler and two worker processes on loopback, in a folder of their own."""
    folder = tmp_path_factory.mktemp("cluster")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([os.path.dirname(os.path.dirname(__file__)), os.environ.get("PYTHONPATH", "")])
    environment = {**ENVIRONMENT, "PYTHONPATH": path}
    options = {"cwd": folder, "env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
    dask = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--no-dashboard"]
    scheduler = subprocess.Popen([*dask, "--port", str(port)], **options)
    dask = [sys.executable, "-m", "distributed.cli.dask_worker", f"tcp://127.0.0.1:{port}", "--no-dashboard"]
    workers = subprocess.Popen([*dask, "--nworkers", "2", "--nthreads", "1"], **options)
    yield f"execution=dask://127.0.0.1:{port}"
    workers.terminate()
    workers.wait(30)
    scheduler.terminate()
    scheduler.wait(30)


def owner(run):
    with suppress(OSError, ValueError):
        return psutil.Process(json.loads((run / "run.lock").read_text())["process"])


@pytest.mark.slow
def test_a_cluster_whose_worker_is_killed_gives_the_same_table(tmp_path, cluster):
    """SIGKILL to a worker in the middle of a run: another goes on with it, at its last step."""
    command = small(tmp_path, 40, ("L1", "MSE"))
    here = figures(tmp_path, f"output_dir={tmp_path}/here")
    command += [cluster, "keep_checkpoints=true"]
    process = start(command)
    wait_for(lambda: logs(tmp_path), 150)
    run = logs(tmp_path)[0]
    worker = owner(run).parent()
    assert "ordinalclip" not in " ".join(worker.cmdline())
    worker.kill()
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert "on a Dask cluster" in out
    assert figures(tmp_path) == here  # everything is there: nothing is done again
    assert len(RunFolder(run).read_provenance()["continued"]) == 1
    assert [row["step"] for row in log_of(run)] == list(range(1, 41))


@pytest.mark.slow
def test_a_comparison_on_a_cluster_stops_and_goes_on_inside_its_runs(tmp_path, cluster):
    """After SIGTERM at once; after SIGKILL of the client when the next one comes."""
    command = [*small(tmp_path, 100000), cluster]
    process = start(command)
    wait_for(lambda: len(logs(tmp_path)) == 1, 150)
    process.send_signal(signal.SIGTERM)
    said = ended(process, PREEMPTED, 20)
    assert f"{tmp_path}/out: told to stop; 0 of 1 runs are done, the same command goes on" in said
    (run,) = logs(tmp_path)
    (saved,) = checkpoints(run / "checkpoints")
    reached = int(saved.name.removeprefix("step-"))
    assert len(log_of(run)) == reached
    assert owner(run) is None
    assert leases(tmp_path / "out") == []

    process = start(command)
    wait_for(has_steps(run, reached + 2), 150)
    process.kill()
    process.wait()
    assert len(leases(tmp_path / "out")) == 1
    left = owner(run)
    assert left.is_running()
    process = start(command)
    wait_for(lambda: owner(run) not in (None, left), 150)
    assert not left.is_running()
    wait_for(lambda: len(RunFolder(run).read_provenance().get("continued", [])) == 2, 150)
    process.send_signal(signal.SIGTERM)
    ended(process, PREEMPTED, 20)
    steps = [row["step"] for row in log_of(run)]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) > reached


@pytest.mark.slow
def test_a_cluster_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = start([*comparison(tmp_path, 1), f"execution=dask://127.0.0.1:{port}"])
    said = ended(process, 2, 60)
    assert re.search(rf"execution=dask://127.0.0.1:{port}: no scheduler of Dask answers there", said)
