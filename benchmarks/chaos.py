"""Nothing is lost: runs that are killed at random and resumed end bit for bit as the one that nobody disturbed.

    python benchmarks/chaos.py                       # 24 kills, half of them inside a checkpoint write

A run (OrdinalCLIP, tiny CLIP, dropout, drop-path, running average, validations and checkpoints every other step) is
started again and again with `train.resume=auto` and killed by SIGKILL, at a random moment or as soon as a checkpoint
is being written, until it is through; then its log (times aside), figures, predictions and weights are compared with
those of an undisturbed run. With two processes (gloo) one of them, drawn at random, is killed and the other has to
notice. Every process is forked from one that has imported the libraries, which saves ten seconds each.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

from ordinalclip.cli import main as ordinalclip
from ordinalclip.training.checkpoint import checkpoints, load_checkpoint

OPTIONS = [
    "ranks.low=0",
    "ranks.high=100",
    "ranks.num=21",
    "data.num_train=24",
    "data.num_validation=12",
    "data.num_test=12",
    "data.augment.flip=true",
    "model.dropout=0.1",
    "model.drop_path=0.1",
    "train.max_steps=16",
    "train.batch_size=8",
    "train.lr=1e-3",
    "train.ema=0.9",
    "train.eval_every=2",
    "train.process_group_timeout=20",
    "train.resume=auto",
]


def start(folder: Path, processes: int) -> list[int]:
    """Fork the processes of one run; returns their process ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ids = []
    for rank in range(processes):
        if (child := os.fork()) == 0:
            if processes > 1:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
            with (folder.parent / f"{folder.name}.log").open("a") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            status = 1
            try:
                status = ordinalclip(["train", "default", "--quiet", f"output_dir={folder}", *OPTIONS])
                if torch.distributed.is_initialized():
                    torch.distributed.destroy_process_group()
            finally:
                sys.stdout.flush()
                os._exit(status)  # not the parent's way out
        ids.append(child)
    return ids


def wait(ids: list[int], limit: float) -> list[int]:
    """Exit statuses; whoever is still there after `limit` seconds is killed."""
    deadline, left, statuses = time.monotonic() + limit, list(ids), []
    while left:
        for child in list(left):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                left.remove(child)
                statuses.append(os.waitstatus_to_exitcode(status))
        if time.monotonic() > deadline:
            for child in left:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    return statuses


def running(child: int) -> bool:
    """Whether a child has not ended yet; leaves its status to be waited for."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def kill_at(ids: list[int], folder: Path, in_write: bool, delay: float, rng: random.Random) -> str | None:
    """Kill one process after `delay` seconds, or then at the next checkpoint write; None when it was through before."""
    victim, begun = rng.choice(ids), time.monotonic()
    while running(victim):
        if time.monotonic() - begun >= delay:
            writing = next((folder / "checkpoints").glob(".partial-*"), None)
            if not in_write or writing is not None:
                time.sleep(rng.uniform(0, 0.03) if in_write else 0)
                where = "inside a checkpoint write" if next((folder / "checkpoints").glob(".partial-*"), None) else ""
                os.kill(victim, signal.SIGKILL)
                return where or "elsewhere"
        time.sleep(0.0005)
    return None


def disturbed(folder: Path, processes: int, kills: int, longest: float, rng: random.Random) -> dict[str, int]:
    """Run to the end with up to `kills` kills on the way; returns how many struck where."""
    counts: dict[str, int] = {}
    while True:
        ids = start(folder, processes)
        struck = None
        if sum(counts.values()) < kills:
            struck = kill_at(ids, folder, rng.random() < 0.5, rng.uniform(0.3, longest), rng)
        statuses = wait(ids, 60)
        if struck is None and set(statuses) == {0}:
            return counts
        if struck is None and sum(counts.values()) >= kills:
            raise SystemExit(f"the run failed: {(folder.parent / f'{folder.name}.log').read_text()[-3000:]}")
        if struck is not None:
            counts[struck] = counts.get(struck, 0) + 1


def differences(folder: Path, whole: Path) -> list[str]:
    """What differs from the undisturbed run, bit for bit; times aside."""

    def log(run: Path) -> list[dict]:
        rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        return [{key: value for key, value in row.items() if key not in ("seconds", "processor_ms")} for row in rows]

    def figures(run: Path) -> dict:
        return {**json.loads((run / "metrics.json").read_text()), "train_seconds": None}

    def tensors(run: Path) -> dict[str, torch.Tensor]:
        last = load_checkpoint(checkpoints(run / "checkpoints")[-1])
        model = load_file(run / "model" / "model.safetensors")
        return {**last.weights, **{f"model/{name}": tensor for name, tensor in model.items()}}

    found = [name for name, of in (("log", log), ("figures", figures)) if of(folder) != of(whole)]
    if not pq.read_table(folder / "predictions.parquet").equals(pq.read_table(whole / "predictions.parquet")):
        found.append("predictions")
    first, second = tensors(folder), tensors(whole)
    return found + [name for name in first | second if not torch.equal(first[name], second[name])]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=24, help="for each number of processes, in all (default 24)")
    parser.add_argument("--per-run", type=int, default=6, help="most kills of one run (default 6)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    rng = random.Random(arguments.seed)
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, seed {arguments.seed}")
    print(
        "| processes | kills | of these inside a checkpoint write | runs resumed to the end | differences | seconds |"
    )
    print("|---:|---:|---:|---:|---:|---:|")
    wrong = 0
    with tempfile.TemporaryDirectory() as temporary:
        for processes in arguments.processes:
            begun = time.monotonic()
            whole = Path(temporary) / f"whole-{processes}"
            if set(wait(start(whole, processes), 300)) != {0}:
                raise SystemExit((whole.parent / f"{whole.name}.log").read_text()[-3000:])
            longest = time.monotonic() - begun
            kills = inside = runs = 0
            problems: list[str] = []
            while kills < arguments.kills:
                folder = Path(temporary) / f"run-{processes}-{runs}"
                left = min(arguments.per_run, arguments.kills - kills)
                counts = disturbed(folder, processes, left, longest, rng)
                kills, runs = kills + sum(counts.values()), runs + 1
                inside += counts.get("inside a checkpoint write", 0)
                problems += differences(folder, whole)
            wrong += len(problems)
            seconds = time.monotonic() - begun
            print(f"| {processes} | {kills} | {inside} | {runs} | {len(problems)} | {seconds:.0f} |", flush=True)
            for problem in problems:
                print(f"differs: {problem}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
