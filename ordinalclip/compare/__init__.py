"""Methods x settings x seeds on the same data, encoder and budget, in one table.

What a comparison's file says, what is run and what is written: `ordinalclip compare --help`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path

from ordinalclip.compare.execution import execute
from ordinalclip.compare.outcome import Outcome, write_outcome
from ordinalclip.compare.plan import Plan, load_plan
from ordinalclip.quoting import printable
from ordinalclip.run_folder import FolderOccupied, RunFolder

__all__ = ["Outcome", "Plan", "compare", "load_plan", "run_plan"]


def compare(
    path: str | Path,
    overrides: Sequence[str] = (),
    quiet: bool = False,
    executor: Executor | None = None,
    prepared: str | Path | None = None,
) -> tuple[str, list[str]]:
    """Run a comparison file; see `run_plan`.

    Returns:
        its tables as Markdown, with where everything is; and what broke runs off that are missing there.
    """
    started = time.monotonic()
    plan = load_plan(path, overrides, prepared)
    outcome = run_plan(plan, quiet, executor)
    elapsed = time.monotonic() - started
    runs = f"{outcome.num_runs} runs in {printable(plan.folder)}/runs, {elapsed:.0f} s this time."
    report = printable(RunFolder(plan.folder).report)
    return f"{outcome.table}\n{runs}\nreport: {report}\n", outcome.errors


def run_plan(plan: Plan, quiet: bool = False, executor: Executor | None = None) -> Outcome:
    """Train what is missing, choose settings by validation, read the test part, write the tables.

    Args:
        executor: any `concurrent.futures.Executor`, instead of what `execution` and `jobs` say. It gets all runs at
            once. Its workers need this version of the package and see the folder, under the same path; each starts a
            process for a run, with the threads that its environment says, and nothing else is asked of it.

    Raises:
        ValueError: no validation or test part, nothing to compare since all methods failed, or several processes.
        FolderOccupied: a run of another experiment in the place of one of these, without overwrite=true, or the
            comparison's folder is that of a run.
        FolderInUse: another job runs this comparison.
        Preempted: SIGTERM or Ctrl-C came; what was running has stopped at a checkpoint, and the same call goes on.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("a comparison is one process that starts others: set jobs=N instead of launching several")
    folder = RunFolder(plan.config.output_dir)
    with folder.locked():
        if folder.config.is_file() or folder.metrics.is_file():
            raise FolderOccupied(
                f"{folder.path} is the folder of {folder.state().text}; give the comparison another one"
            )
        written = ("results.csv", "settings.csv", "table.md", "report.html", "comparison.json", "model")
        theirs = [name for name in written if (folder.path / name).exists()]
        if theirs and not (folder.path / "runs").is_dir():
            raise FolderOccupied(
                f"{folder.path} holds {theirs[0]}, and no runs of a comparison: it may be yours; give the comparison "
                "another folder"
            )
        return write_outcome(plan, execute(plan, quiet, executor))
