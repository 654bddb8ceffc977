"""Several nodes, restarts and signals, with real processes: torchrun agents on loopback."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import NOISY, QUICK, log_of, without_times

from ordinalclip.signals import PREEMPTED
from ordinalclip.training.checkpoint import checkpoints

ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "ACCELERATE_USE_CPU": "true",
    "GLOO_SOCKET_IFNAME": "lo",
}


def overrides(folder, *more):
    return ["train", "default", "--quiet", f"output_dir={folder}", *QUICK, *NOISY, "train.resume=auto", *more]


def workers(folder):
    """Process ids of the trainers of a run, found by its folder on their command line; agents left out."""
    found = []
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{process}/cmdline", encoding="utf-8") as file:
                command = file.read()
        except OSError:  # gone meanwhile
            continue
        if f"output_dir={folder}" in command and "torch.distributed.run" not in command:
            found.append(int(process))
    return found


def wait_for(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.timeout(800)
def test_two_nodes_survive_the_loss_of_a_worker(tmp_path):
    """Two agents stand for two nodes; one worker is killed; torchrun restarts all, and nothing is different."""
    options = ("train.max_steps=40", "train.eval_every=2", "train.process_group_timeout=20")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run(folder, kill):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", folder.name]
        command += ["--local-addr", "127.0.0.1", "--max-restarts", "10", "-m", "ordinalclip"]
        logs = [open(tmp_path / f"{folder.name}-{node}.log", "w") for node in range(2)]  # noqa: SIM115
        agents = [
            subprocess.Popen([*command, *overrides(folder, *options)], env=ENVIRONMENT, stdout=log, stderr=log)
            for log in logs
        ]
        try:
            if kill:
                wait_for(lambda: len(checkpoints(folder / "checkpoints")) >= 2, 120)
                os.kill(workers(folder)[-1], signal.SIGKILL)
            for agent in agents:
                assert agent.wait(280) == 0, (tmp_path / f"{folder.name}-0.log").read_text()[-3000:]
        finally:
            for agent in agents:
                agent.kill()
            for log in logs:
                log.close()
        return "".join((tmp_path / f"{folder.name}-{node}.log").read_text() for node in range(2))

    run(tmp_path / "whole", kill=False)
    assert "failed (exitcode: -9)" in run(tmp_path / "killed", kill=True)  # torchrun saw it and started anew
    assert without_times(log_of(tmp_path / "whole")) == without_times(log_of(tmp_path / "killed"))
    whole, killed = (json.loads((tmp_path / run / "metrics.json").read_text()) for run in ("whole", "killed"))
    assert {**whole, "train_seconds": 0} == {**killed, "train_seconds": 0}


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_stops_both_at_the_same_step(tmp_path):
    """As a scheduler does it: signal, checkpoint, status of its own; and on again to the same end."""
    folder, options = tmp_path / "run", ("train.max_steps=300", "train.eval_every=100", "data.num_validation=4")
    ranks = []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for rank in range(2):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        environment = {**ENVIRONMENT, **place, "MASTER_PORT": port}
        command = [sys.executable, "-m", "ordinalclip", *overrides(folder, *options)]
        ranks.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    wait_for(lambda: (folder / "log.jsonl").exists() and len(log_of(folder)) >= 10, 120)
    ranks[1].send_signal(signal.SIGTERM)
    sent = time.monotonic()
    messages = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert time.monotonic() - sent < 20
    assert [rank.returncode for rank in ranks] == [PREEMPTED, PREEMPTED], messages
    (saved,) = checkpoints(folder / "checkpoints")
    step = int(saved.name.removeprefix("step-"))
    assert 10 <= step < 300
    assert f"told to stop after step {step}; train.resume=auto goes on" in messages[0]
    assert len(log_of(folder)) == step
