"""Whether the tests would notice: plants the faults of `mutants.yaml` one at a time and runs the tests of that module.

    python benchmarks/mutants.py --out mutants.md           # all of them, one after the other
    python benchmarks/mutants.py --only losses --only data  # those of some modules
    python benchmarks/mutants.py --list                     # look whether every fault still has its place

Prints a table of module, fault, the test that caught it, and seconds. The working tree is never edited: each of
`--jobs` workers has a copy of it, where one file is changed and put back. The selected tests must pass without a fault
first; five times their seconds and a minute more are the time limit, and a fault that makes them hang counts as caught.
Every test run is forked from a process that has imported the libraries, which saves ten seconds each.

All of them take some 30 minutes with one process on two busy cores: 2 to 20 s each, but for four that start torchrun
and take a minute.

Exit status: 0; 1 where a fault survived that is not marked `survives` in the list; 2 where the list or the tests are at
fault themselves.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
FAULTS = Path(__file__).with_suffix(".yaml")
LIBRARIES = (  # imported once; nothing of the package may be among them
    *(
        "torch.distributed",
        "torch.utils.tensorboard",
        "datasets",
        "evaluate",
        "accelerate",
        "open_clip",
        "timm",
        "peft",
    ),
    *("transformers.pipelines", "transformers.models.auto.modeling_auto", "pyarrow.parquet", "pydantic", "jinja2"),
    *("pytorch_metric_learning.losses", "pytorch_metric_learning.miners", "matplotlib.pyplot", "PIL.ImageEnhance"),
    *("scipy.stats", "scipy.sparse.csgraph", "scipy.spatial"),
)


@dataclass(frozen=True)
class Fault:
    """One slip: the only occurrence of `old` in the files that match `file` becomes `new`.

    Attributes:
        module: the heading it stands under.
        text: what is wrong then, in a line.
        file: pattern of files below the root, e.g. "ordinalclip/**/losses.py".
        tests: arguments for pytest.
        slow: whether tests marked slow take part.
        survives: why no test can notice; empty for faults that must be caught.
    """

    module: str
    text: str
    file: str
    old: str
    new: str
    tests: str
    slow: bool = False
    survives: str = ""

    def place(self, root: Path) -> tuple[Path, str]:
        """The file below a root, and its text with the fault.

        Raises:
            ValueError: the old text does not occur exactly once, or the new one is no Python.
        """
        texts = {path: path.read_text(encoding="utf-8") for path in sorted(root.glob(self.file))}
        found = [path for path, text in texts.items() for _ in range(text.count(self.old))]
        if len(found) != 1:
            where = f"{len(texts)} files that match {self.file}"
            raise ValueError(f"{self.module}, {self.text}: must occur once in {where}, got {len(found)}: {self.old!r}")
        changed = texts[found[0]].replace(self.old, self.new)
        try:
            compile(changed, found[0].name, "exec")
        except SyntaxError as error:
            raise ValueError(f"{self.module}, {self.text}: the fault is no Python: {error}") from error
        return found[0], changed


@dataclass(frozen=True)
class Outcome:
    """`caught` says by what; empty where all tests passed."""

    caught: str
    seconds: float


def read_faults(path: Path = FAULTS, only: Sequence[str] = ()) -> list[Fault]:
    """The faults of a list, module by module: what stands beside `faults` holds for all of a module.

    Raises:
        ValueError: a module that is not in the list.
    """
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if unknown := sorted(set(only) - set(content)):
        raise ValueError(f"{', '.join(unknown)} is not in {path.name}; modules: {', '.join(content)}")
    return [
        Fault(module, **{key: value for key, value in {**group, **fault}.items() if key != "faults"})
        for module, group in content.items()
        if not only or module in only
        for fault in group["faults"]
    ]


class Recorder:
    """A plugin of pytest that keeps what failed first."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failed.append(f"{report.nodeid} (cannot be collected)")


class Worker:
    """A copy of the tree and the test run that is going on in it."""

    def __init__(self, folder: Path):
        self.root, self.log, self.report = folder / "tree", folder / "output.txt", folder / "report.json"
        ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "runs")
        shutil.copytree(ROOT, self.root, ignore=ignored, symlinks=True)
        self.child: int | None = None
        self.kept: tuple[Path, str] | None = None

    def start(self, tests: str, slow: bool, fault: Fault | None, limit: float) -> None:
        if fault is not None:
            path, changed = fault.place(self.root)
            self.kept = path, path.read_text(encoding="utf-8")
            self._write(path, changed)
        self.report.unlink(missing_ok=True)
        self.started, self.limit = time.monotonic(), limit
        if (child := os.fork()) == 0:
            self._run(tests, slow)
        self.child = child

    def _run(self, tests: str, slow: bool) -> None:
        """In the forked process: pytest, and a report of what failed; never returns."""
        code = 70
        try:
            os.setsid()  # a group of its own, to be killed as a whole
            output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.chdir(self.root)
            sys.path[0] = os.environ["PYTHONPATH"] = str(self.root)
            arguments = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", f"--basetemp={self.root.parent / 'tmp'}"]
            arguments += ["-m", "" if slow else "not slow", *shlex.split(tests)]
            recorder = Recorder()
            code = int(pytest.main(arguments, plugins=[recorder]))
            self.report.write_text(json.dumps(recorder.failed), encoding="utf-8")
            sys.stdout.flush()
        finally:
            os._exit(code)

    def outcome(self) -> Outcome | None:
        """What became of the run; None as long as it goes on.

        Raises:
            ValueError: no test was run.
        """
        assert self.child is not None
        seconds = time.monotonic() - self.started
        done, status = os.waitpid(self.child, os.WNOHANG)
        if not done and seconds < self.limit:
            return None
        with contextlib.suppress(ProcessLookupError):  # also what the tests started and left behind
            os.killpg(self.child, signal.SIGKILL)
        if not done:
            os.waitpid(self.child, 0)
        self.child = None
        if self.kept is not None:
            self._write(*self.kept)
            self.kept = None
        if not done:
            return Outcome(f"hangs: {seconds:.0f} s", seconds)
        code = os.waitstatus_to_exitcode(status)
        if code in (pytest.ExitCode.NO_TESTS_COLLECTED, pytest.ExitCode.USAGE_ERROR):
            raise ValueError(f"pytest ran no test:\n{self.output()}")
        failed = json.loads(self.report.read_text(encoding="utf-8")) if self.report.is_file() else []
        return Outcome("" if code == 0 else failed[0] if failed else f"the process ended with {code}", seconds)

    def output(self) -> str:
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-40:])

    @staticmethod
    def _write(path: Path, text: str) -> None:
        """Compiled files are known by size and second: that of another text of the same size must not be taken."""
        path.write_text(text, encoding="utf-8")
        Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)


def run(workers: Sequence[Worker], tasks: Sequence[tuple[str, bool, Fault | None, float]]) -> Iterator[Any]:
    """(number of the task, outcome, worker), as they come."""
    waiting, running = list(enumerate(tasks))[::-1], {}
    while waiting or running:
        for worker in workers:
            if worker.child is None and waiting:
                running[worker], task = waiting.pop()
                worker.start(*task)
            elif worker.child is not None and (outcome := worker.outcome()) is not None:
                yield running.pop(worker), outcome, worker
        time.sleep(0.05)


def plant(faults: Sequence[Fault], workers: Sequence[Worker], timeout: float | None) -> list[Outcome]:
    """Run the tests without a fault, then with each.

    Raises:
        ValueError: tests that fail without a fault.
    """
    selections = sorted({(fault.tests, fault.slow) for fault in faults})
    limits = {}
    for number, outcome, worker in run(workers, [(*selection, None, timeout or 900) for selection in selections]):
        if outcome.caught:
            raise ValueError(f"without a fault, {selections[number][0]}: {outcome.caught}\n{worker.output()}")
        limits[selections[number]] = timeout or 60 + 5 * outcome.seconds
        print(f"without a fault: {selections[number][0]}: {outcome.seconds:.1f} s", file=sys.stderr, flush=True)
    outcomes: dict[int, Outcome] = {}
    tasks = [(fault.tests, fault.slow, fault, limits[fault.tests, fault.slow]) for fault in faults]
    for number, outcome, _ in run(workers, tasks):
        outcomes[number] = outcome
        print(f"{len(outcomes)}/{len(tasks)} {row(faults[number], outcome)}", file=sys.stderr, flush=True)
    return [outcomes[number] for number in range(len(faults))]


def row(fault: Fault, outcome: Outcome) -> str:
    result = (
        f"`{outcome.caught.removeprefix('tests/')}`" if outcome.caught else f"**survived** {fault.survives}".rstrip()
    )
    return f"| {fault.module} | {fault.text} | {result} | {outcome.seconds:.1f} |".replace("||", "&#124;&#124;")


def table(faults: Sequence[Fault], outcomes: Sequence[Outcome]) -> str:
    """The faults one by one, then the counts by module, as Markdown."""
    lines = ["| module | fault | caught by | s |", "|---|---|---|---:|"]
    lines += [row(fault, outcome) for fault, outcome in zip(faults, outcomes, strict=True)]
    counts: dict[str, list[bool]] = {}
    for fault, outcome in zip(faults, outcomes, strict=True):
        counts.setdefault(fault.module, []).append(bool(outcome.caught))
    counts["all"] = [caught for group in counts.values() for caught in group]
    lines += ["", "| module | planted | caught |", "|---|---:|---:|"]
    lines += [f"| {module} | {len(group)} | {sum(group)} |" for module, group in counts.items()]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", action="append", default=[], metavar="MODULE", help="faults of this module; repeatable"
    )
    parser.add_argument("--jobs", type=int, default=1, help="workers, each with a copy of the tree (default 1)")
    parser.add_argument("--timeout", type=float, help="seconds for each test run, instead of a limit by its own time")
    parser.add_argument("--list", action="store_true", help="print the faults and where they belong; run nothing")
    parser.add_argument("--out", type=Path, help="file for the table")
    arguments = parser.parse_args()
    try:
        faults = read_faults(only=arguments.only)
        problems = []
        for fault in faults:
            try:
                path, _ = fault.place(ROOT)
                if arguments.list:
                    print(f"{fault.module}: {fault.text} ({path.relative_to(ROOT)}; {fault.tests})")
            except ValueError as error:
                problems.append(str(error))
        if problems:
            raise ValueError("\n".join(problems))
        if arguments.list:
            return 0
        for library in LIBRARIES:
            if importlib.util.find_spec(library.partition(".")[0]):
                importlib.import_module(library)
        with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
            workers = [Worker(Path(folder) / str(number)) for number in range(arguments.jobs)]
            outcomes = plant(faults, workers, arguments.timeout)
    except ValueError as error:
        print(f"mutants: {error}", file=sys.stderr)
        return 2
    text = table(faults, outcomes)
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")
    missed = [
        fault for fault, outcome in zip(faults, outcomes, strict=True) if not outcome.caught and not fault.survives
    ]
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
