"""The page and the table of a search: how the trials went, and what of the settings mattered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ordinalclip.files import write_text
from ordinalclip.results import figures
from ordinalclip.results.leaderboard import write_csv
from ordinalclip.results.pages import Figures, inlined, templates
from ordinalclip.run_folder import RunFolder


@dataclass(frozen=True)
class TrialRow:
    """A trial of a search as page and table show it.

    Attributes:
        number: from 0.
        state: "complete", "pruned", "diverged", "failed" or "running".
        setting: its values by key, numbers or texts.
        value: validation MAE, the mean over the seeds; of a pruned trial the smallest it had shown; None without one.
        spread: standard deviation over the seeds; None for one.
        curve: pairs (number of the validation, MAE) of its first seed.
        metrics: of the validation part, means over the seeds.
        why: what broke it off, or how it diverged.
        folders: its runs.
    """

    number: int
    state: str
    setting: Mapping[str, float | str]
    value: float | None
    spread: float | None = None
    curve: Sequence[tuple[int, float]] = ()
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    why: str = ""
    folders: Sequence[RunFolder] = ()


@dataclass(frozen=True)
class SearchRecord:
    """A search as its page shows it.

    Attributes:
        searched: texts of ranges and choices by key, and which of them are logarithmic.
        best: the best row, or None.
        importances: shares by key; empty where the trials are too few to say.
        conditions: what was done how, in sentences.
        unit: of the values.
    """

    folder: Path
    rows: Sequence[TrialRow]
    searched: Mapping[str, str]
    logarithmic: Sequence[str]
    best: TrialRow | None
    importances: Mapping[str, float]
    conditions: Sequence[str]
    unit: str = ""


def write_trials(path: Path, rows: Sequence[TrialRow]) -> None:
    """All trials as a CSV, a line each."""
    write_csv(path, [_line(row) for row in rows])


def _line(row: TrialRow) -> dict[str, Any]:
    line: dict[str, Any] = {"trial": row.number, "state": row.state, "validation_mae": row.value}
    line |= {"validation_mae_std": row.spread, **row.setting}
    line |= {f"validation_{name}": value for name, value in row.metrics.items() if name != "mae"}
    return {**line, "why": row.why, "runs": " ".join(str(folder.path) for folder in row.folders)}


def write_search_report(record: SearchRecord) -> Path:
    """Write `report.html` into the folder of a search."""
    counts = {state: sum(row.state == state for row in record.rows) for row in record.rows for state in [row.state]}
    content = (
        templates()
        .get_template("search.html")
        .render(
            record=record,
            counts=counts,
            rows=sorted(record.rows, key=_order),
            link=lambda row: _link(record.folder, row),
            figures=inlined(search_figures(record)),
        )
    )
    path = RunFolder(record.folder).report
    write_text(path, content)
    return path


def _order(row: TrialRow) -> tuple[bool, float, int]:
    """The best first, what was pruned or came to nothing after them."""
    return row.state != "complete", row.value if row.value is not None else float("inf"), row.number


def search_figures(record: SearchRecord) -> Figures:
    """best_so_far, importances, validations_by_trial and a figure per key, each with the sentence below it."""
    rows = [row for row in record.rows if row.value is not None]
    if not rows:
        return {}
    maes, pruned = [row.value or 0.0 for row in rows], [row.state == "pruned" for row in rows]
    drawn: Figures = {
        "best_so_far": (
            figures.best_so_far([row.number for row in rows], maes, pruned, record.unit),
            "Validation MAE of every trial, and the smallest so far.",
        )
    }
    if record.importances:
        drawn["importances"] = (
            figures.importances(record.importances),
            "Which keys separate good trials from bad ones (PED-ANOVA, over the trials that came to their end).",
        )
    curves = [row.curve for row in rows]
    best = next((place for place, row in enumerate(rows) if row is record.best), -1)
    drawn["validations_by_trial"] = (
        figures.validations_by_trial(curves, pruned, best, record.unit),
        "Validation MAE on the way, of the first seed; a cross where a trial was pruned.",
    )
    for number, key in enumerate(record.searched):
        values = [row.setting[key] for row in rows]
        drawn[f"by_key_{number}"] = (
            figures.mae_by_setting(key, values, maes, pruned, record.unit, log=key in record.logarithmic),
            f"Validation MAE by {key}, searched in {record.searched[key]}.",
        )
    return drawn


def _link(folder: Path, row: TrialRow) -> str:
    """Of a trial's first run: its report where it has one, else the folder."""
    if not row.folders:
        return ""
    run = row.folders[0]
    relative = run.path.relative_to(folder).as_posix()
    return quote(relative) + (f"/{run.report.name}" if run.report.is_file() else "/")
