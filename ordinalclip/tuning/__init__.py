"""The values of some keys with which the validation MAE is smallest: `ordinalclip tune --help`."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from ordinalclip.quoting import printable
from ordinalclip.run_folder import RunFolder
from ordinalclip.tuning.plan import Outcome, TuningPlan, load_plan

__all__ = ["Outcome", "TuningPlan", "load_plan", "run_plan", "tune"]


def tune(
    path: str | Path | None,
    overrides: Sequence[str] = (),
    trials: int = 20,
    seeds: int = 1,
    pruner: str = "median",
    quiet: bool = False,
    prepared: str | Path | None = None,
) -> tuple[str, list[str]]:
    """Search; see above.

    Args:
        path: a configuration; None for the defaults.
        overrides: what is searched, keys of a run, and jobs and execution.
        trials: how many there are to be, those of earlier calls included.
        seeds: runs of each.
        pruner: median, hyperband or none.
        prepared: a prepared folder, laid over the configuration.

    Returns:
        what was found, in words; and what broke trials off.
    """
    started = time.monotonic()
    plan = load_plan(path, overrides, trials, seeds, pruner, prepared)
    found = run_plan(plan, quiet)
    unit = plan.base.ranks.unit
    setting = " ".join(f"{key}={value}" for key, value in found.setting.items())
    lines = [
        f"best of {found.num_trials} trials: validation MAE {found.validation_mae:.4g} {unit}".rstrip()
        + f" with {setting}",
        "the best of many by validation is an optimistic number; the test part has not been read:",
        f"  ordinalclip evaluate {found.run}",
        f"  ordinalclip train {plan.files.best}",
        f"report: {plan.files.report} ({time.monotonic() - started:.0f} s this time)",
    ]
    return "\n".join(map(printable, lines)) + "\n", found.errors


def run_plan(plan: TuningPlan, quiet: bool = False) -> Outcome:
    """Run the trials that are missing and write what they come to.

    Raises:
        ImportError: no Optuna; ValueError: no validation part, another search in the folder, or no trial came to its
            end, or several processes; FolderOccupied: the folder holds something else; FolderInUse: another job
            searches there.
        Preempted: SIGTERM or Ctrl-C came; what was running has stopped at a checkpoint, and the same call goes on.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("a search is one process that starts others: set jobs=N instead of launching several")
    from ordinalclip.tuning.trials import search  # which needs Optuna

    with RunFolder(plan.folder).locked():
        return search(plan, quiet)
