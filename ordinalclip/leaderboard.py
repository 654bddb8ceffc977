"""The table of a comparison: a row per method from the runs of its chosen setting, as Markdown and CSV."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ordinalclip.ranks import Ranks
from ordinalclip.record import Predictions, read_predictions, shown
from ordinalclip.significance import LEVEL, Verdict, errors_by_image, judge

FIGURES = {
    "rmse": "RMSE",
    "r2": "R2",
    "accuracy": "accuracy",
    "pearson": "PLC",
    "spearman": "SRC",
    "d5": "D5",
    "residual_variance": "RV",
    "ordinality": "ordinality",
}
MEGA = 1e6


@dataclass(frozen=True)
class Entry:
    """A method of one variant of a comparison.

    Attributes:
        name: of the method.
        folders: the runs of its chosen setting, one per seed; their test part has been read.
        setting: what was chosen, by dotted key.
        number: its place among those that were tried.
        settings_tried: how many those were.
        images_recur: whether rows of one name are one image in all runs, as in splits of one table.
    """

    name: str
    folders: Sequence[Path]
    setting: dict[str, Any]
    number: int = 0
    settings_tried: int = 1
    images_recur: bool = True

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """metrics.json of every run."""
        return [json.loads((folder / "metrics.json").read_text(encoding="utf-8")) for folder in self.folders]

    @cached_property
    def predictions(self) -> list[Predictions]:
        """Those of the test part, by run."""
        return [read_predictions(folder, "test") for folder in self.folders]

    @cached_property
    def errors(self) -> np.ndarray:
        """(N,) absolute errors, one per distinct test image: see `errors_by_image`."""
        images = [
            (name, label, 0 if self.images_recur else run)
            for run, each in enumerate(self.predictions)
            for name, label in zip(each.names, each.labels.tolist(), strict=True)
        ]
        return errors_by_image(images, np.concatenate([each.errors for each in self.predictions]))

    @property
    def maes(self) -> list[float]:
        """Test MAE of every run."""
        return [each["test"]["mae"] for each in self.metrics]

    @property
    def validation_mae(self) -> float:
        """Mean over the runs."""
        return float(np.mean([each["validation"]["mae"] for each in self.metrics]))

    @property
    def setting_text(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.setting.items()) or "-"


class Leaderboard:
    """The methods of one variant, best test MAE first.

    Args:
        variant: its name, "" if there is only one.
        entries: at least one.
    """

    def __init__(self, variant: str, entries: Sequence[Entry]):
        self.variant = variant
        self.entries = sorted(entries, key=lambda entry: float(np.mean(entry.maes)))
        self.verdicts = judge({entry.name: entry.errors for entry in self.entries}, self.entries[0].name)
        keys = [key for entry in self.entries for key in entry.metrics[0]["test"] if key.startswith("cs@")]
        self.cs = list(dict.fromkeys(keys))
        model = self.entries[0].folders[0] / "model" / "config.json"
        self.ranks = Ranks(**json.loads(model.read_text(encoding="utf-8"))["ranks"])

    @property
    def heads(self) -> list[str]:
        """Names of the columns after the method's."""
        named = [FIGURES.get(key, key.upper()) for key in self._keys]
        return ["MAE", "95 %", *named, "ms / step", "trained, M", "MB", "setting chosen"]

    @property
    def _keys(self) -> list[str]:
        """Of the figures between the MAE and what a method costs."""
        keys = list(FIGURES)
        after = keys.index("accuracy") + 1
        return [*keys[:after], *self.cs, *keys[after:]]

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """All figures by name, with mean and standard deviation over the runs."""
        return [self._row(entry, self.verdicts[entry.name]) for entry in self.entries]

    def cells(self, row: dict[str, Any]) -> list[str]:
        """A row below `heads`."""
        low, high = shown(row["mae_low"]), shown(row["mae_high"])
        return [
            shown(row["mae"], row["mae_std"]) + mark(row),
            f"{low} to {high}",
            *(shown(row[key], row[f"{key}_std"]) for key in self._keys),
            shown(row["step_ms"], digits=1),
            shown(row["parameters"] / MEGA, digits=2) if row["parameters"] else "-",
            shown(row["model_bytes"] / MEGA, digits=1),
            row["setting"],
        ]

    def markdown(self) -> str:
        """The rows as a table."""
        lines = [f"| method | {' | '.join(self.heads)} |", "|---|" + "---:|" * (len(self.heads) - 1) + "---|"]
        for row in self.rows:
            *cells, setting = self.cells(row)
            cells = [row["method"].replace("|", "\\|"), *cells, f"`{setting}`".replace("|", "\\|")]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)

    def _row(self, entry: Entry, verdict: Verdict) -> dict[str, Any]:
        row: dict[str, Any] = {"variant": self.variant, "method": entry.name, "setting": entry.setting_text}
        row["settings_tried"], row["runs"] = entry.settings_tried, len(entry.folders)
        flat = [
            {**each, **each["test"], "mae_expectation": each["test"]["expectation"]["mae"]} for each in entry.metrics
        ]
        keys = ["mae", *self._keys, "mae_expectation", "train_seconds"]
        figures = {key: [each.get(key) for each in flat] for key in keys}
        for key, values in figures.items():
            known = [value for value in values if value is not None]
            whole = len(known) == len(values)  # a figure that some runs lack says nothing about the method
            row[key] = float(np.mean(known)) if whole else None
            row[f"{key}_std"] = float(np.std(known, ddof=1)) if whole and len(known) > 1 else None
        row["mae_low"], row["mae_high"] = verdict.interval
        row["difference"] = verdict.difference
        row["difference_low"], row["difference_high"] = verdict.difference_interval
        row["p"], row["p_holm"] = verdict.p, verdict.p_holm
        row["validation_mae"] = entry.validation_mae
        row["step_ms"] = _median_or_none([time for folder in entry.folders for time in step_times(folder)])
        row["parameters"] = entry.metrics[0]["parameters"]
        row["model_bytes"] = (entry.folders[0] / "model" / "model.safetensors").stat().st_size
        return row


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """All rows with all their figures."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def mark(row: dict[str, Any]) -> str:
    """A star where a method is worse than the best by the paired test, two if still so after Holm's correction."""
    stars = sum(row[key] is not None and row[key] < LEVEL for key in ("p", "p_holm"))
    return " " + "*" * stars if stars else ""


def step_times(folder: Path) -> list[float]:
    """Milliseconds between the rows of a run's log; those over a validation or an interruption among them."""
    log = folder / "log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    seconds = [json.loads(line)["seconds"] for line in lines]
    return [1000 * gap for gap in np.diff(seconds).tolist() if gap > 0]


def _median_or_none(values: list[float]) -> float | None:
    return float(np.median(values)) if values else None
