"""What a model answered for one part of the data: one row per image, kept in predictions.parquet, scored whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from ordinalclip.metrics import Metric, against_constant, bootstrap_interval, constant_answer, mae_by_shots
from ordinalclip.ranks import Decoding, Ranks

DECODINGS: tuple[Decoding, ...] = get_args(Decoding)


@dataclass(frozen=True)
class Predictions:
    """Labels and answers of one part, a row per image.

    Attributes:
        names: (N,) file or row names.
        labels, label_ranks: (N,) true values in the label's unit, and their ranks.
        decoded: predicted values (N,) float64 by each decoding; all the same for heads without a distribution.
        ranks: (N,) likeliest rank, or that nearest to the value for heads without a distribution.
        probabilities: (N, R) or None.
    """

    names: Sequence[str]
    labels: np.ndarray
    label_ranks: np.ndarray
    decoded: dict[Decoding, np.ndarray]
    ranks: np.ndarray
    probabilities: np.ndarray | None = None

    @property
    def values(self) -> np.ndarray:
        """(N,) predicted values by `median`, the headline decoding."""
        return self.decoded["median"]

    @property
    def errors(self) -> np.ndarray:
        """(N,) absolute errors in the label's unit."""
        return np.abs(self.values - self.labels)

    def columns(self, decoding: Decoding, ranks: Ranks) -> dict[str, Any]:
        """What metrics are computed from (`Metric.of`), under one decoding."""
        return {
            "values": self.decoded[decoding],
            "labels": self.labels,
            "ranks": self.ranks if decoding == "argmax" else _nearest(self.decoded[decoding], ranks),
            "label_ranks": self.label_ranks,
            "probabilities": self.probabilities,
        }

    def score(
        self,
        metrics: Mapping[str, Metric],
        ranks: Ranks,
        train_counts: Sequence[int] | None = None,
        space: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        """Metrics of the part: each by its own decoding, and those of decoded values under each decoding.

        Args:
            metrics: see `metrics_with`; those of prototypes are left to the model.
            train_counts: number of training labels of each rank; then also the MAE by `metrics.shot_groups`, and what
                `metrics.against_constant` says.
            space: (N, E) points of the feature space, for its metrics; without them those are left out.
        """
        by_decoding: dict[str, Any] = {}
        for how in DECODINGS:
            columns = self.columns(how, ranks)
            decoded = {name: metric for name, metric in metrics.items() if metric.is_decoded}
            by_decoding[how] = {name: metric.score(columns) for name, metric in decoded.items()}
        columns = {**self.columns("median", ranks), "space": space}
        headline: dict[str, Any] = {"num": len(self.labels)}
        for name, metric in metrics.items():
            if metric.decoding is not None:
                headline[name] = by_decoding[metric.decoding][name]
            elif "prototypes" not in metric.of and ("space" not in metric.of or space is not None):
                headline[name] = metric.score(columns)
        if train_counts is not None:
            by_decoding["mae_by_shots"] = mae_by_shots(self.values, self.labels, self.label_ranks, train_counts)
            always = constant_answer(train_counts, ranks.values)
            if np.isfinite(self.values).all():
                by_decoding["constant"] = against_constant(self.values, self.labels, always)
        return {**headline, **by_decoding}

    def intervals(self, metrics: Mapping[str, Metric], ranks: Ranks) -> dict[str, tuple[float, float]]:
        """95 % bootstrap interval over the images of every metric that can be computed; NaN where nothing bounds it. Of
        a single image there is none.

        Args:
            metrics: see `metrics_with`; those of prototypes and of the feature space are left out.
        """
        resamples = 1000 if len(self.labels) <= 10_000 else 200  # seconds, not minutes, for a large part
        found: dict[str, tuple[float, float]] = {}
        if len(self.labels) < 2:
            return found
        for name, metric in metrics.items():
            columns = self.columns(metric.decoding or "median", ranks)
            given = [columns[column] for column in metric.of if columns.get(column) is not None]
            if len(given) == len(metric.of):
                found[name] = bootstrap_interval(metric, *given, resamples=resamples)
        return found

    def select(self, rows: np.ndarray) -> Predictions:
        """The given rows, in the given order."""
        return Predictions(
            names=[self.names[row] for row in rows.tolist()],
            labels=self.labels[rows],
            label_ranks=self.label_ranks[rows],
            decoded={how: values[rows] for how, values in self.decoded.items()},
            ranks=self.ranks[rows],
            probabilities=None if self.probabilities is None else self.probabilities[rows],
        )

    def table(self, part: str) -> pa.Table:
        """A row per image: part, row, label, label_rank, rank, median, argmax, expectation, probabilities (or null)."""
        rows = [None] * len(self.labels) if self.probabilities is None else list(self.probabilities.astype(np.float32))
        columns: dict[str, pa.Array] = {
            "part": pa.array([part] * len(self.labels)),
            "row": pa.array([name.encode("utf-8", "backslashreplace").decode() for name in self.names]),
            "label": pa.array(self.labels),
            "label_rank": pa.array(self.label_ranks),
            "rank": pa.array(self.ranks.astype(np.int64)),
            **{how: pa.array(self.decoded[how].astype(np.float64)) for how in DECODINGS},
            "probabilities": pa.array(rows, type=pa.list_(pa.float32())),
        }
        return pa.table(columns)

    @classmethod
    def from_table(cls, table: pa.Table, part: str) -> Predictions:
        """The rows of a part in such a table."""
        table = table.filter(pc.equal(table["part"], part))
        probabilities = table["probabilities"].combine_chunks()
        known = len(table) > 0 and probabilities.null_count == 0
        arrays = {name: table[name].to_numpy().copy() for name in ("label", "label_rank", "rank", *DECODINGS)}
        return cls(
            names=table["row"].to_pylist(),
            labels=arrays["label"],
            label_ranks=arrays["label_rank"],
            decoded={how: arrays[how] for how in DECODINGS},
            ranks=arrays["rank"],
            probabilities=probabilities.flatten().to_numpy().reshape(len(table), -1) if known else None,
        )


def _nearest(values: np.ndarray, ranks: Ranks) -> np.ndarray:
    return ranks.nearest(torch.from_numpy(values)).numpy()
