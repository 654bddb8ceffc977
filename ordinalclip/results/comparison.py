"""A finished comparison, kept in its folder: what its report and figures are made of, beside its runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ordinalclip.files import read_json, write_text
from ordinalclip.results.leaderboard import Entry, Leaderboard
from ordinalclip.run_folder import RunFolder

FILE = "comparison.json"


@dataclass(frozen=True)
class Comparison:
    """A finished comparison.

    Attributes:
        folder: its own.
        title: a sentence above the tables.
        boards: one per variant; their runs hold predictions of the test part.
        notes: what the metrics are, in paragraphs below the tables.
        best: which method's model the comparison keeps.
        tried: every run with its validation metrics: see `outcome.runs_tried`.
    """

    folder: Path
    title: str
    boards: Sequence[Leaderboard]
    notes: Sequence[str]
    best: str
    tried: Sequence[dict[str, Any]]

    def write(self) -> None:
        """Write comparison.json: which runs make up the tables, and all that they themselves do not tell."""
        boards = [
            {"variant": board.variant, "entries": [self._plain(entry) for entry in board.entries]}
            for board in self.boards
        ]
        content = {"title": self.title, "best": self.best, "notes": list(self.notes), "boards": boards}
        content["tried"] = list(self.tried)
        write_text(self.folder / FILE, json.dumps(content, indent=2, default=str) + "\n")

    def _plain(self, entry: Entry) -> dict[str, Any]:
        """An entry as plain data, its runs by their paths inside the folder."""
        plain = {field.name: getattr(entry, field.name) for field in fields(entry)}
        return {**plain, "folders": [run.path.relative_to(self.folder).as_posix() for run in entry.folders]}


def is_comparison(run: RunFolder) -> bool:
    """Whether a folder is that of a finished comparison, and not of a finished run.

    Raises:
        FileNotFoundError: it is neither.
    """
    if (run.path / FILE).is_file() or run.is_finished:
        return not run.is_finished
    if (run.path / "runs").is_dir():
        raise FileNotFoundError(
            f"{run.path}: a comparison that is not finished ({FILE} is missing); `ordinalclip compare` with its file "
            "goes on with it"
        )
    missing = run.config if run.metrics.is_file() else run.metrics
    raise FileNotFoundError(
        f"{run.path}: no finished run ({missing.name} is missing), and no finished comparison ({FILE} is missing)"
    )


def read_comparison(folder: Path) -> Comparison:
    """Read a finished comparison.

    Raises:
        FileNotFoundError: there is none, or one of its runs lacks a file; ValueError: a file of it is damaged.
    """
    content = read_json(folder / FILE)
    try:
        found = [
            (
                board["variant"],
                [
                    Entry(**{**e, "folders": [RunFolder(folder / run) for run in e["folders"]]})
                    for e in board["entries"]
                ],
            )
            for board in content["boards"]
        ]
        title, notes, best, tried = (content[name] for name in ("title", "notes", "best", "tried"))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / FILE}: damaged, or of another version ({error})") from error
    return Comparison(folder, title, [Leaderboard(variant, entries) for variant, entries in found], notes, best, tried)
