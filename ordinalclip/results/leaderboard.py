"""The table of a comparison: a line per method from the runs of its chosen setting, as Markdown and CSV."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ordinalclip.files import whole
from ordinalclip.metrics import doubt, metrics_with
from ordinalclip.predictions import Predictions
from ordinalclip.quoting import code, markdown, spreadsheet
from ordinalclip.ranks import Ranks
from ordinalclip.results.record import shown
from ordinalclip.results.significance import LEVEL, MIN_SEEDS, Verdict, judge
from ordinalclip.run_folder import RunFolder, local

MEGA = 1e6
STEP_TIMES = ("processor_ms", "device_ms")  # of log.jsonl: see `training.step.StepClock`


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
    folders: Sequence[RunFolder]
    setting: dict[str, Any]
    number: int = 0
    settings_tried: int = 1
    images_recur: bool = True

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """metrics.json of every run."""
        return [folder.read_metrics() for folder in self.folders]

    @cached_property
    def predictions(self) -> list[Predictions]:
        """Those of the test part, by run."""
        return [folder.read_predictions("test") for folder in self.folders]

    @property
    def errors(self) -> list[np.ndarray]:
        """By run, (N,) absolute errors of the test part."""
        return [each.errors for each in self.predictions]

    @cached_property
    def images(self) -> list[list[tuple[str, float, int]]]:
        """By run, what tells the N images of its test part apart: the same in two runs where it is the same picture."""
        return [
            [
                (name, label, 0 if self.images_recur else run)
                for name, label in zip(each.names, each.labels.tolist(), strict=True)
            ]
            for run, each in enumerate(self.predictions)
        ]

    @property
    def maes(self) -> list[float]:
        """Test MAE of every run."""
        return [each["test"]["mae"] for each in self.metrics]

    @property
    def validation_mae(self) -> float:
        """Mean over the runs."""
        return float(np.mean([each["validation"]["mae"] for each in self.metrics]))

    @property
    def doubtful(self) -> int:
        """How many of the runs are no better than one answer for every picture: see `metrics.doubt`."""
        return sum(bool(doubt(each["test"])) for each in self.metrics)

    @property
    def setting_text(self) -> str:
        return in_words(self.setting) or "-"


class Leaderboard:
    """The methods of one variant, best test MAE first.

    Args:
        variant: its name, "" if there is only one.
        entries: at least one.

    Raises:
        ValueError: runs of one seed that were tested on different images.
    """

    def __init__(self, variant: str, entries: Sequence[Entry]):
        self.variant = variant
        for entry in entries:
            if entry.images != entries[0].images:
                raise ValueError(f"{entry.name} and {entries[0].name} were tested on different images")
        self.verdicts = judge({entry.name: entry.errors for entry in entries}, entries[0].images)
        places = {name: place for place, name in enumerate(self.verdicts)}
        self.entries = sorted(entries, key=lambda entry: places[entry.name])
        cs = {key: None for entry in self.entries for key in entry.metrics[0]["test"] if key.startswith("cs@")}
        self.metrics = metrics_with([float(key.removeprefix("cs@")) for key in cs])
        model = json.loads((self.entries[0].folders[0].model / "config.json").read_text(encoding="utf-8"))
        self.ranks = Ranks(**model["ranks"])

    @property
    def titles(self) -> list[str]:
        """Of the columns after the method's."""
        mae, *others = (metric.title for metric in self.metrics.values())
        times = (f"{name.removesuffix('_ms')} ms / step" for name in self.step_times)
        return [mae, "95 %", *others, *times, "trained, M", "MB", "setting chosen"]

    @cached_property
    def step_times(self) -> list[str]:
        """The kinds of time that the steps of these runs have."""
        return [name for name in STEP_TIMES if any(summary[name] is not None for summary in self.summaries)]

    def values_of(self, name: str) -> dict[str, list[float]]:
        """A metric by method, one value per run; methods that lack it in some run are left out."""
        values = {entry.name: [_metric(each, name) for each in entry.metrics] for entry in self.entries}
        return {
            method: [value for value in each if value is not None]
            for method, each in values.items()
            if None not in each
        }

    @cached_property
    def summaries(self) -> list[dict[str, Any]]:
        """Everything known of every method by name, with mean and standard deviation over the runs."""
        return [self._summary(entry, self.verdicts[entry.name]) for entry in self.entries]

    def cells(self, summary: dict[str, Any]) -> list[str]:
        """A method's cells below `titles`."""
        low, high = shown(summary["mae_low"]), shown(summary["mae_high"])
        mae, *others = (shown(summary[name], summary[f"{name}_std"]) for name in self.metrics)
        return [
            mae + (" *" if self.verdicts[summary["method"]].is_worse else ""),
            f"{low} to {high}",
            *others,
            *(shown(summary[name], digits=1) for name in self.step_times),
            shown(summary["parameters"] / MEGA, digits=2) if summary["parameters"] else "-",
            shown(summary["model_bytes"] / MEGA, digits=1),
            summary["setting"],
        ]

    @property
    def is_decided(self) -> bool:
        """Whether there are seeds enough to say anything about methods."""
        return len(self.entries[0].folders) >= MIN_SEEDS

    @property
    def claim(self) -> str:
        """What the table allows to say about the methods, in a sentence."""
        first, *others = (entry.name for entry in self.entries)
        num_seeds = len(self.entries[0].folders)
        if not others:
            return "There is nothing to compare with."
        if not self.is_decided:
            seeds = "one seed" if num_seeds == 1 else f"{num_seeds} seeds"
            return (
                f"With {seeds} nothing can be said about methods, only about these runs: other seeds may change the "
                f"order. {MIN_SEEDS} seeds are the least."
            )
        worse = [name for name in others if self.verdicts[name].is_worse]
        alike = [name for name in others if name not in worse]
        pictures = len({image for each in self.entries[0].images for image in each})
        given = f"{num_seeds} seeds and {pictures:,} pictures"
        if not worse:
            return f"These {given} tell no difference between {first} and {_listed(alike, 'or')}."
        better = f"{first} is better than {_listed(worse, 'and')} (p < {LEVEL})"
        return f"{better}; these {given} do not tell it from {_listed(alike, 'or')}." if alike else f"{better}."

    @property
    def beside_constant(self) -> str:
        """What one answer for every picture would have cost, and which methods are no better, in a sentence or two."""
        maes = [each["test"].get("constant", {}).get("mae") for entry in self.entries for each in entry.metrics]
        known = [mae for mae in maes if mae is not None]
        if not known:
            return ""
        num_runs = len(self.entries[0].folders)
        unit = f" {self.ranks.unit}" if self.ranks.unit else ""
        mean = shown(float(np.mean(known)))
        sentence = f"Always answering the median of the training labels has an MAE of {mean}{unit}."
        tried = [entry for entry in self.entries if entry.metrics[0]["method"] != "constant"]
        poor = [f"{entry.name} ({entry.doubtful} of {num_runs} runs)" for entry in tried if entry.doubtful]
        return sentence + (f" Not shown to be better: {', '.join(poor)}." if poor else "")

    def markdown(self) -> str:
        """The table."""
        lines = [f"| method | {' | '.join(self.titles)} |", "|---|" + "---:|" * (len(self.titles) - 1) + "---|"]
        for summary in self.summaries:
            *cells, setting = self.cells(summary)
            cells = [markdown(summary["method"]), *cells, code(setting).replace("|", "\\|")]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)

    def _summary(self, entry: Entry, verdict: Verdict) -> dict[str, Any]:
        summary: dict[str, Any] = {"variant": self.variant, "method": entry.name, "setting": entry.setting_text}
        summary["settings_tried"], summary["seeds"] = entry.settings_tried, len(entry.folders)
        columns = {name: [_metric(each, name) for each in entry.metrics] for name in [*self.metrics, "train_seconds"]}
        columns["mae_expectation"] = [each["test"]["expectation"]["mae"] for each in entry.metrics]
        for name, values in columns.items():
            known = [value for value in values if value is not None]
            all_known = len(known) == len(values)  # a metric that some runs lack says nothing about the method
            summary[name] = float(np.mean(known)) if all_known else None
            summary[f"{name}_std"] = float(np.std(known, ddof=1)) if all_known and len(known) > 1 else None
        summary["mae_low"], summary["mae_high"] = verdict.interval
        summary["difference"] = verdict.difference
        summary["difference_low"], summary["difference_high"] = verdict.difference_interval
        summary["p"], summary["p_corrected"] = verdict.p, verdict.p_corrected
        for part in ("seeds", "images"):  # standard errors of the difference, and degrees of freedom
            summary[f"difference_se_{part}"] = getattr(verdict.spread, part, None)
            summary[f"df_{part}"] = getattr(verdict.spread, f"df_{part}", None)
        constant = [each["test"].get("constant", {}).get("mae") for each in entry.metrics]
        summary["constant_mae"] = float(np.mean(constant)) if None not in constant else None
        summary["doubtful_runs"] = entry.doubtful
        summary["validation_mae"] = entry.validation_mae
        steps = [step for folder in entry.folders for step in folder.read_log()]
        for name in STEP_TIMES:
            times = [step[name] for step in steps if name in step]
            summary[name] = float(np.median(times)) if times else None
        summary["parameters"] = entry.metrics[0]["parameters"]
        summary["model_bytes"] = (entry.folders[0].model / "model.safetensors").stat().st_size
        return summary


def _metric(metrics: dict[str, Any], name: str) -> float | None:
    """A metric of the test part, or of the run."""
    return metrics["test"].get(name, metrics.get(name))


def in_words(setting: dict[str, Any]) -> str:
    """A setting as key=value, of paths on this machine the last two parts."""
    return ", ".join(f"{key}={local(str(value))}" for key, value in setting.items())


def _listed(names: Sequence[str], last: str) -> str:
    *others, final = names
    return f"{', '.join(others)} {last} {final}" if others else final


def write_csv(path: Path, rows: Sequence[dict[str, Any]], columns: Sequence[str] = ()) -> None:
    """A line per row; columns in the order in which they first appear, empty where a row lacks them.

    Args:
        columns: those of a table that may have no rows.
    """
    columns = columns or list(dict.fromkeys(name for row in rows for name in row))
    with whole(path) as aside, aside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for row in rows:
            writer.writerow({k: spreadsheet(v) if isinstance(v, str) else v for k, v in row.items()})
