"""What a model is worth on data from elsewhere: numbers as JSON, answers as a table, and one self-contained page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ordinalclip.data import Part
from ordinalclip.drift import LEVEL, Drift
from ordinalclip.files import whole, write_json, write_text
from ordinalclip.metrics import Metric, decodings, doubt
from ordinalclip.model import OrdinalModel
from ordinalclip.predictions import Predictions
from ordinalclip.ranks import Decoding, Ranks
from ordinalclip.results import figures
from ordinalclip.results.leaderboard import write_csv
from ordinalclip.results.pages import Figures, inlined, never_fatal, templates
from ordinalclip.results.record import ShownMetric, show_metrics
from ordinalclip.results.run_report import extremes, prediction_figures
from ordinalclip.run_folder import local

GIVEN = "given "  # before the name of a column of the data that is called like one of ours
OURS = ("evaluation.json", "predictions.parquet", "groups.csv", "report.html")
SHOWN = 0.9  # level of the intervals whose coverage is told first
FEW = 30  # pictures of a group, below which its interval says little


@dataclass(frozen=True)
class Score:
    """Metrics of some pictures.

    Attributes:
        rows: (N,) which pictures.
        metrics: by name; None where one is not defined.
        intervals: 95 % bootstrap interval over the pictures of each; NaN where nothing bounds it.
        coverage: of the model's own intervals, at some levels: see `calibrating.coverage`.
    """

    rows: np.ndarray
    metrics: dict[str, float | None]
    intervals: dict[str, tuple[float, float]]
    coverage: Sequence[dict[str, Any]] = ()

    @property
    def covered(self) -> dict[str, Any] | None:
        """The coverage that is told first: of 90 % intervals, or of the highest level that there is."""
        return max((each for each in self.coverage if each["level"] <= SHOWN), key=lambda e: e["level"], default=None)

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        bounded = {name: list(pair) for name, pair in self.intervals.items() if np.isfinite(pair).all()}
        told = {"coverage": list(self.coverage)} if self.coverage else {}
        return {"num": len(self.rows), "metrics": self.metrics, "intervals": bounded, **told}


@dataclass(frozen=True)
class ExternalEvaluation:
    """A model, scored on every row of data that it was not made from.

    Attributes:
        model: as it is served.
        name: what it is called by.
        images: the data.
        predictions: of every row.
        known: the metrics, by name.
        score: of all rows.
        groups: of the rows with each value of a column, by column and value.
        counts: (R,) number of training labels of each rank; None if that is not known.
        constant: see `metrics.against_constant`; None without `counts`.
        drift: differences from the training data that could be looked for.
        notes: what else is to be known, in sentences.
        record: where it comes from, as JSON data.
    """

    model: OrdinalModel
    name: str
    images: Part
    predictions: Predictions
    known: Mapping[str, Metric]
    score: Score
    groups: dict[str, dict[str, Score]]
    counts: Sequence[int] | None
    constant: dict[str, Any] | None
    drift: Sequence[Drift]
    notes: Sequence[str]
    record: dict[str, Any]

    @property
    def ranks(self) -> Ranks:
        """The model's."""
        return self.model.head.ranks

    @property
    def decoding(self) -> Decoding | None:
        """How the model answers; None where it gives no distribution."""
        return None if self.predictions.probabilities is None else self.model.head.decoding

    @property
    def answers(self) -> np.ndarray:
        """(N,) values that the model answers."""
        return self.predictions.decoded[self.decoding or "median"]

    @cached_property
    def doubt(self) -> str:
        """Why this model is no success here: see `metrics.doubt`."""
        scores = {**self.score.metrics, "constant": self.constant, "num": len(self.images)}
        return doubt(scores, self.ranks.say)

    @property
    def warnings(self) -> list[str]:
        """What is said aloud: no success, and drift that is more than chance."""
        unlike = [f"the {each.what} are unlike those of the training, see below" for each in self.drift if each.found]
        return [*([self.doubt] if self.doubt else []), *self._broken_promise, *unlike]

    @property
    def _broken_promise(self) -> list[str]:
        found = self.score.covered
        if found is None or found["p"] >= LEVEL:
            return []
        text = f"of the {found['level']:.0%} intervals {found['coverage']:.1%} hold the truth here"
        return [f"{text}: calibrate the model on labelled pictures of this kind (`ordinalclip calibrate`)"]

    def to_dict(self) -> dict[str, Any]:
        """All numbers, as JSON data."""
        return {
            **self.score.to_dict(),
            "unit": self.ranks.unit,
            "constant": self.constant,
            "groups": {
                column: {value: score.to_dict() for value, score in each.items()}
                for column, each in self.groups.items()
            },
            "drift": {each.what: each.to_dict() for each in self.drift},
            "doubt": self.doubt,
            "notes": list(self.notes),
            **self.record,
        }

    def lines(self) -> list[str]:
        """What is to be known, a line each, for a terminal."""
        unit = f" {self.ranks.unit}" if self.ranks.unit else ""
        lines = [f"{len(self.images)} images of {local(self.images.source)}"]
        lines += [_line(each) for each in self._shown(self.score) if each.value is not None]
        if self.constant is not None:
            always = self.ranks.say(self.constant["answer"])
            lines.append(f"  always answering {always}: MAE {self.constant['mae']:.4g}{unit}")
        for column, each in self.groups.items():
            lines.append(f"MAE{unit and f' ({self.ranks.unit})'} by {column}:")
            for value, score in each.items():
                mae = next(shown for shown in self._shown(score) if shown.name == "mae")
                few = ", few" if len(score.rows) < FEW else ""
                lines.append(f"  {value} ({len(score.rows)} images{few}): {_number(mae)}")
        lines += [f"{'WARNING: ' * each.found}{each.text}" for each in self.drift]
        if (found := self.score.covered) is not None:
            width = f"mean width {found['width']:.4g}{unit}"
            lines.append(f"{found['level']:.0%} intervals: {found['coverage']:.1%} hold the truth, {width}")
        lines += [f"WARNING: {text}" for text in [self.doubt, *self._broken_promise] if text]
        return [*lines, *self.notes]

    def write(self, folder: Path) -> None:
        """Write predictions.parquet, groups.csv, report.html and, last, evaluation.json."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in OURS:
            (folder / name).unlink(missing_ok=True)
        with whole(folder / "predictions.parquet") as aside, aside.open("wb") as file:
            pq.write_table(self.table(), file)
        if self.groups:
            write_csv(folder / "groups.csv", self.group_rows())
        with never_fatal(folder):
            write_text(folder / "report.html", self._page())
        write_json(folder / "evaluation.json", self.to_dict())

    def table(self) -> pa.Table:
        """The columns of the data but its pictures, then what the model answers: see `Predictions.table`."""
        ours = self.predictions.table("").drop_columns("part")
        given = self.images.rows.with_format("arrow")[:]
        for name, feature in self.images.rows.features.items():
            is_path = isinstance(feature, datasets.Value) and "string" in feature.dtype
            if isinstance(feature, datasets.Image) or (name == self.images.image_column and not is_path):
                given = given.drop_columns(name)
        taken = set(ours.column_names)
        for place, name in enumerate(given.column_names):
            while name in taken:
                name = GIVEN + name
            taken.add(name)
            given = given.rename_columns([*given.column_names[:place], name, *given.column_names[place + 1 :]])
        for name in ours.column_names:
            given = given.append_column(name, ours[name])
        return given

    def group_rows(self) -> list[dict[str, Any]]:
        """A row for every group: column, value, num, and every metric with low and high."""
        rows = []
        for column, each in self.groups.items():
            for value, score in each.items():
                row: dict[str, Any] = {"column": column, "value": value, "num": len(score.rows)}
                for name, metric in score.metrics.items():
                    low, high = score.intervals.get(name, (np.nan, np.nan))
                    row |= {name: metric, f"{name}_low": low, f"{name}_high": high}
                rows.append({key: None if value != value else value for key, value in row.items()})
        return rows

    def figures(self, width: float = figures.COLUMN) -> Figures:
        """Every figure, with the sentence below it."""
        drawn = prediction_figures(self.predictions, self.ranks, self.decoding, self.counts, width)
        for number, (column, each) in enumerate(self.groups.items()):
            unknown = (np.nan, np.nan)  # of a single picture
            shown = {
                value: (score.metrics["mae"], score.intervals.get("mae", unknown)) for value, score in each.items()
            }
            overall = self.score.metrics["mae"]
            assert overall is not None
            drawn[f"groups_{number}"] = (
                figures.mae_by_group(shown, overall, self.ranks.unit, width=width),
                f"MAE by {column} with its 95 % bootstrap interval over the images; the line is that of all images.",
            )
        return drawn

    def _shown(self, score: Score) -> list[ShownMetric]:
        return show_metrics(self.known, score.metrics, score.intervals, self.ranks.unit)

    def _page(self) -> str:
        groups = {
            column: [(value, len(score.rows), self._shown(score)) for value, score in each.items()]
            for column, each in self.groups.items()
        }
        return (
            templates()
            .get_template("external.html")
            .render(
                evaluation=self,
                ranks=self.ranks,
                source=local(self.images.source),
                tiles=self._shown(self.score),
                groups=groups,
                few=FEW,
                decodings=decodings(),
                figures=inlined(self.figures()),
                extremes=extremes(self.predictions, self.answers, self.images, self.ranks),
            )
        )


def _line(each: ShownMetric) -> str:
    return f"  {each.metric.title} {_number(each)}{f' {each.unit}' if each.unit else ''}"


def _number(each: ShownMetric) -> str:
    return f"{each.value:.4g}" + (f" (95 % {each.interval})" if each.interval else "")
