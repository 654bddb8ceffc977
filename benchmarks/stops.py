"""Stopped at any moment, nothing is lost: Ctrl-C, SIGKILL and a full disk, each at random moments of train and compare.

    python benchmarks/stops.py                       # 20 moments of each kind for each command

A tiny run, and a tiny comparison, are started again and again, and disturbed at a random moment, until they are
through: by SIGINT, by SIGKILL, or by a file that takes all the space of their file system (a tmpfs, which only root can
mount) until they end. The table says with which exit statuses, how many tracebacks were seen, how many half-written
files were left in the end, and in how much the results differ from those of a run that nobody disturbed. `chaos.py`
kills inside checkpoint writes, and one of several processes.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from chaos import OPTIONS, differences, running, wait

from ordinalclip.cli import main as ordinalclip

TIMES = {"processor_ms", "train_seconds", "train_seconds_std"}


def train(folder: Path) -> list[str]:
    """The words of the command that trains in `folder`."""
    return ["train", "default", "--quiet", f"output_dir={folder}", *OPTIONS]


def compare(folder: Path) -> list[str]:
    """The words of the command that compares in `folder`."""
    content = {
        "seeds": [1, 2],
        "keep_checkpoints": True,
        "base": {"evaluation": {"report": False}},
        "methods": {"L1": {"base": {"method": "l1"}}, "MSE": {"base": {"method": "mse"}}},
    }
    file = folder.parent / "compare.yaml"
    file.write_text(yaml.safe_dump(content))
    own = ("train.resume", "model.drop")
    keys = [option for option in OPTIONS if not option.startswith(own)]
    return ["compare", str(file), "--quiet", f"output_dir={folder}", *keys, "train.max_steps=8"]


def start(words: list[str], log: Path) -> int:
    """Fork a process that runs a command; its output is added to `log`."""
    if child := os.fork():
        return child
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what a shell starts in the background
    status = 1
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        status = ordinalclip(words)
    finally:
        os._exit(status)  # not the parent's way out


def fill(disk: Path) -> Callable[[], None]:
    """Take all the space of a file system; returns what gives it back."""
    ballast = disk / "ballast"
    descriptor = os.open(ballast, os.O_WRONLY | os.O_CREAT)
    size, step = 0, os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize
    while step >= 512:
        try:
            os.posix_fallocate(descriptor, size, step)
            size += step
        except OSError:
            step //= 2
    os.close(descriptor)
    return ballast.unlink


def disturb(kind: str, child: int, disk: Path) -> int:
    """Disturb a process, wait for its end, give back its exit status."""
    if kind == "full disk":
        empty = fill(disk)
        (status,) = wait([child], 60)
        empty()
        return status
    os.kill(child, signal.SIGINT if kind == "Ctrl-C" else signal.SIGKILL)
    (status,) = wait([child], 60)
    return status


def lasts(child: int, seconds: float) -> bool:
    """Whether a process is still there after so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and running(child):
        time.sleep(0.001)
    return running(child)


def compared(folder: Path, whole: Path) -> list[str]:
    """In what a comparison differs from an undisturbed one; times aside."""

    def rows(path: Path) -> list[dict]:
        with (path / "results.csv").open() as file:
            return [{key: value for key, value in row.items() if key not in TIMES} for row in csv.DictReader(file)]

    found = [] if rows(folder) == rows(whole) else ["results.csv"]
    runs = sorted(path.name for path in (whole / "runs").iterdir())
    if runs != sorted(path.name for path in (folder / "runs").iterdir()):
        found.append("the runs")
    return found + [each for run in runs for each in differences(folder / "runs" / run, whole / "runs" / run)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=20, help="of each kind for each command (default 20)")
    parser.add_argument("--per-run", type=int, default=5, help="most disturbances of one run (default 5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("train", "compare"), help="one of the commands")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    rng = random.Random(arguments.seed)
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, seed {arguments.seed}")
    print(
        "| command | stopped by | moments | exit statuses | tracebacks | half-written | runs | differences | seconds |"
    )
    print("|---|---|---:|---|---:|---:|---:|---:|---:|")
    wrong = 0
    with tempfile.TemporaryDirectory() as temporary:
        disk = Path(temporary) / "disk"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", str(disk)]
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
        kinds = ["Ctrl-C", "SIGKILL", *(["full disk"] if mounted else [])]
        try:
            commands = [(train, differences), (compare, compared)]
            for command, differ in (each for each in commands if arguments.only in (None, each[0].__name__)):
                log = Path(temporary) / "whole.log"
                for number in range(2):  # the first takes longer
                    begun, whole = time.monotonic(), Path(temporary) / f"whole-{command.__name__}-{number}"
                    if wait([start(command(whole), log)], 300) != [0]:
                        raise SystemExit(log.read_text()[-3000:])
                longest = time.monotonic() - begun
                for kind in kinds:
                    begun = time.monotonic()
                    statuses: Counter[int] = Counter()
                    problems: list[str] = []
                    runs = left_over = 0
                    log = Path(temporary) / f"{command.__name__}-{kind.replace(' ', '-')}.log"
                    while sum(statuses.values()) < arguments.moments:
                        folder = disk / f"run-{runs}"
                        left = min(arguments.per_run, arguments.moments - sum(statuses.values()))
                        while True:
                            child = start(command(folder), log)
                            if left and lasts(child, rng.uniform(0.02, longest)):
                                statuses[disturb(kind, child, disk)] += 1
                                left -= 1
                            elif (status := wait([child], 300)[0]) == 0:
                                break
                            else:
                                raise SystemExit(f"status {status}: {log.read_text()[-3000:]}")
                        problems += differ(folder, whole)
                        left_over += len(list(folder.rglob(".partial-*")))
                        runs += 1
                        subprocess.run(["rm", "-rf", str(folder)], check=True)
                    seen = ", ".join(f"{status} x{number}" for status, number in sorted(statuses.items()))
                    tracebacks = log.read_text().count("Traceback")
                    wrong += len(problems) + tracebacks + left_over
                    cells = [command.__name__, kind, sum(statuses.values()), seen, tracebacks, left_over, runs]
                    seconds = time.monotonic() - begun
                    print(f"| {' | '.join(map(str, cells))} | {len(problems)} | {seconds:.0f} |", flush=True)
                    for problem in problems:
                        print(f"differs: {problem}")
                    if tracebacks:
                        print(json.dumps(log.read_text()[-6000:]))
        finally:
            if mounted:
                subprocess.run(["umount", str(disk)], check=False)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
