"""The report of a comparison: tables, figures and links to the reports of its runs, in one HTML file."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from ordinalclip.files import write_text
from ordinalclip.results import figures
from ordinalclip.results.comparison import Comparison
from ordinalclip.results.leaderboard import Leaderboard
from ordinalclip.results.pages import Figures, inlined, templates
from ordinalclip.run_folder import RunFolder


def write_comparison_report(comparison: Comparison) -> Path:
    """Write `report.html` into a comparison's folder."""
    folder, boards = comparison.folder, comparison.boards
    content = (
        templates()
        .get_template("comparison.html")
        .render(
            title=comparison.title,
            folder=folder,
            boards=boards,
            notes=comparison.notes,
            best=comparison.best,
            tried=comparison.tried,
            validation=_validation_columns(comparison.tried, boards[0]),
            link=lambda run: _link(folder, run),
            overview=inlined(_overview(boards)),
            figures=[
                inlined(board_figures(board), f"-{number}" if number else "") for number, board in enumerate(boards)
            ],
        )
    )
    path = RunFolder(folder).report
    write_text(path, content)
    return path


def comparison_figures(comparison: Comparison, width: float | None = None) -> Figures:
    """Every figure of the report; where there are variants, with the name of theirs.

    Args:
        width: inches; None: a column of a paper, and a page where there is a panel for every metric.
    """
    drawn = _overview(comparison.boards, width)
    for board in comparison.boards:
        label = board.entries[0].folders[0].path.parent.name if board.variant else ""  # a name that files can have
        drawn.update({f"{name}-{label}".rstrip("-"): figure for name, figure in board_figures(board, width).items()})
    return drawn


def board_figures(board: Leaderboard, width: float | None = None) -> Figures:
    """mae_by_method, difference_to_best, error_by_method and metrics_by_method, each with the sentence below it."""
    ranks, unit = board.ranks, board.ranks.unit
    sized: Any = {"width": width} if width else {}
    maes = {entry.name: entry.maes for entry in board.entries}
    answers = {
        entry.name: (
            np.concatenate([each.labels for each in entry.predictions]),
            np.concatenate([each.values for each in entry.predictions]),
        )
        for entry in board.entries
    }
    best, *others = board.entries
    drawn: Figures = {
        "mae_by_method": (
            figures.mae_by_method(maes, unit, **sized),
            "Test MAE: mean and standard deviation over the seeds (blue), each seed (orange); an arrow: farther off.",
        )
    }
    if others:
        drawn["difference_to_best"] = (
            figures.difference_to_best({other.name: board.verdicts[other.name] for other in others}, unit, **sized),
            f"How much larger the error is than that of {best.name}, on the same images, with 95 % interval "
            + (
                "over seeds and images. Filled: the rows with a star."
                if board.is_decided
                else "over images alone: other seeds may bring other differences."
            ),
        )
    drawn["error_by_method"] = (
        figures.error_by_method(answers, ranks, **sized),
        f"Where the errors are: test MAE by true {'rank' if ranks.worded else 'value'}, over all seeds.",
    )
    spread = {name: (board.metrics[name], board.values_of(name)) for name in board.metrics}
    drawn["metrics_by_method"] = (
        figures.metrics_by_method(spread, [entry.name for entry in board.entries], unit, **sized),
        "Every metric on the test part: mean and standard deviation over the seeds; arrows point to the better side.",
    )
    return drawn


def _overview(boards: Sequence[Leaderboard], width: float | None = None) -> Figures:
    """The variants side by side, where there are several."""
    if len(boards) == 1:
        return {}
    names = dict.fromkeys(entry.name for board in boards for entry in board.entries)
    found = [{entry.name: entry.maes for entry in board.entries} for board in boards]
    maes = {name: [each.get(name, [math.nan]) for each in found] for name in names}
    sized: Any = {"width": width} if width else {}
    figure = figures.mae_by_variant(maes, [board.variant for board in boards], boards[0].ranks.unit, **sized)
    return {"mae_by_variant": (figure, "Test MAE in every variant: mean and standard deviation over the seeds.")}


def _validation_columns(tried: Sequence[dict[str, Any]], board: Leaderboard) -> dict[str, str]:
    """Titles of the validation metrics that some run has, by their keys in its row."""
    known = {f"validation_{name}": metric.title for name, metric in board.metrics.items()}
    return {key: title for key, title in known.items() if any(row.get(key) is not None for row in tried)}


def _link(folder: Path, run: RunFolder) -> dict[str, Any]:
    relative = Path(*run.path.parts[len(folder.parts) :]).as_posix()
    written = run.report.is_file()
    return {
        "name": run.path.name.rpartition("-")[2],
        "href": quote(os.fsencode(relative)) + (f"/{run.report.name}" if written else "/"),
        "written": written,
    }
