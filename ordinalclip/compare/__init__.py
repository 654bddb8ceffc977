"""`ordinalclip compare`: methods x settings x seeds on the same data, encoder and budget, in one table.

A comparison is a YAML file:

    output_dir: runs/compare/demo
    seeds: [1, 2, 3]
    base: {data: ..., ranks: ..., model: ..., train: ...}   # keys of a run, shared by all methods
    settings: [{train.lr: 1e-3}, {train.lr: 3e-3}]          # tried for every method; validation chooses one
    methods:
      OrdinalCLIP:                                          # a row of the table
        base: {method: ordinalclip, head: {...}}            # keys of a run, for this method
        settings: [...]                                     # its own instead of those above, as many
    variants:                                               # a table each; default: one without a name
      all the data: {}
      10 %: {data.train_share: 0.1, train.max_steps: 100}   # keys of a run that are different

Every setting runs on the first `tuning_seeds` seeds; the one with the best mean validation MAE runs on the others too.
Every method must bring the same number of settings, unless nothing of it learns. A run that diverges counts as
infinitely bad; one that breaks off, for a broken picture or want of memory, leaves its method out, the exit status is
1, and the next call tries it again. Runs that are complete are not run again, so an interrupted comparison goes on with
those that are missing, inside the one it was interrupted in; a run of another experiment in its place is refused, or
replaced with overwrite=true. The test part is predicted once, by the runs of the chosen setting, after the choice.
Written: table.md, results.csv, report.html, and model/: of the method with the best mean validation MAE, the run of the
first seed. That run gets a report of its own; evaluation.report=true writes one for every run.
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
    path: str | Path, overrides: Sequence[str] = (), quiet: bool = False, executor: Executor | None = None
) -> tuple[str, list[str]]:
    """Run a comparison file; see `run_plan`.

    Returns:
        its tables as Markdown, with where everything is; and what broke runs off that are missing there.
    """
    started = time.monotonic()
    plan = load_plan(path, overrides)
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
        theirs = [name for name in ("results.csv", "table.md", "report.html", "model") if (folder.path / name).exists()]
        if theirs and not (folder.path / "runs").is_dir():
            raise FolderOccupied(
                f"{folder.path} holds {theirs[0]}, and no runs of a comparison: it may be yours; give the comparison "
                "another folder"
            )
        return write_outcome(plan, execute(plan, quiet, executor))
