"""A finished run, read back from its folder: what reports, figures and model cards are made of."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ordinalclip.config import RunConfig
from ordinalclip.data import Part, Parts, load_parts
from ordinalclip.images import prepare
from ordinalclip.metrics import Metric, doubt, metrics_with
from ordinalclip.model import OrdinalModel
from ordinalclip.predictions import Predictions
from ordinalclip.ranks import Decoding, Ranks
from ordinalclip.run_folder import RunFolder

logger = logging.getLogger(__name__)


class ShownMetric(NamedTuple):
    """A metric as people see it: `value` with its `unit`, and the 95 % `interval` in words, "" where there is none."""

    name: str
    metric: Metric
    value: float | None
    unit: str
    interval: str


@dataclass(frozen=True)
class RunRecord:
    """A finished run.

    Attributes:
        folder, config, metrics: the run folder, its configuration and its metrics.json.
        log: the entries of log.jsonl; none when nothing was trained.
        model: the saved model.
        part: the part that is shown: "test" if it was read, else "validation", "" without either.
        predictions: those of that part, or None.
        images: that part of the data, or None when it is not there (any more).
    """

    folder: RunFolder
    config: RunConfig
    metrics: dict[str, Any]
    log: list[dict[str, Any]]
    model: OrdinalModel
    part: str
    predictions: Predictions | None
    images: Part | None

    @property
    def ranks(self) -> Ranks:
        return self.model.head.ranks

    @property
    def decoding(self) -> Decoding | None:
        """How the model turns its distribution into an answer; None where it gives no distribution."""
        given = self.predictions
        return None if given is None or given.probabilities is None else self.model.head.decoding

    @property
    def answers(self) -> np.ndarray:
        """(N,) values that the model answers for the part that is shown, as the pipeline does."""
        assert self.predictions is not None
        return self.predictions.decoded[self.decoding or "median"]

    @property
    def prototypes(self) -> torch.Tensor | None:
        """(R, D) rank prototypes, or None for heads without."""
        prototypes = self.model.head.rank_prototypes()
        return None if prototypes is None else prototypes.detach()

    @property
    def scores(self) -> dict[str, Any]:
        """The metrics of the part that is shown."""
        return self.metrics.get(self.part, {})

    @cached_property
    def _metrics(self) -> dict[str, Metric]:
        return metrics_with(self.config.evaluation.cs, self.config.evaluation.space_ks)

    @cached_property
    def scored(self) -> dict[str, Metric]:
        """The metrics of predictions that can be computed for this run, defined or not."""
        given = self.predictions
        if given is None:
            return {}
        known = given.columns("median", self.ranks)
        return {
            name: metric
            for name, metric in self._metrics.items()
            if name in self.scores and all(known.get(column) is not None for column in metric.of)
        }

    @cached_property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """95 % bootstrap interval of each of `scored` over the images that are shown."""
        return {} if self.predictions is None else self.predictions.intervals(self.scored, self.ranks)

    @property
    def shown_metrics(self) -> list[ShownMetric]:
        """Every metric of the part that is shown and of the model, in the order of `METRICS`."""
        values = {name: self.scores.get(name, self.metrics.get(name)) for name in self._metrics}
        wanted = {n: m for n, m in self._metrics.items() if n in self.scored or values[n] is not None}
        return show_metrics(wanted, values, self.intervals, self.ranks.unit)

    @cached_property
    def versions(self) -> dict[str, str]:
        """Of Python and the libraries that the run was done with; empty where it is not on record."""
        before = self.folder.read_provenance()
        found = {"python": before.get("python"), **(before.get("versions") or {})}
        return {str(name): str(version) for name, version in found.items() if version is not None}

    @property
    def steps(self) -> str:
        """The steps of the training in words: "40 steps", or "stopped at 12 of 40 steps" for want of patience."""
        done = self.metrics["steps"]
        planned = self.metrics.get("planned_steps", done)
        return f"{done} steps" if done == planned else f"stopped at {done} of {planned} steps"

    @property
    def calibration(self) -> dict[str, Any] | None:
        """What is told of the model's calibration, see `calibrating.Calibrated`; None where it keeps none."""
        return self.metrics.get("calibration")

    @property
    def constant(self) -> dict[str, Any] | None:
        """What `metrics.against_constant` says of the part that is shown."""
        return self.scores.get("constant")

    @property
    def doubt(self) -> str:
        """Why this model is no success: see `metrics.doubt`."""
        return doubt(self.scores, self.ranks.say)


def show_metrics(
    metrics: Mapping[str, Metric],
    values: Mapping[str, float | None],
    intervals: Mapping[str, tuple[float, float]],
    unit: str,
) -> list[ShownMetric]:
    """Metrics as people see them, in the order given."""
    found = []
    for name, metric in metrics.items():
        low, high = map(shown, intervals[name]) if name in intervals else ("-", "-")
        value, interval = values.get(name), "" if low == "-" else f"{low} to {high}"
        found.append(ShownMetric(name, metric, value, unit if metric.in_unit and value is not None else "", interval))
    return found


def read_run(folder: str | Path, parts: Parts | None = None, model: OrdinalModel | None = None) -> RunRecord:
    """Read a finished run.

    Args:
        parts: its data, if it is in memory already; otherwise it is loaded, and done without (with a warning) when
            it is not there any more.
        model: its deployed model, if it is in memory already.

    Raises:
        FileNotFoundError: no finished run there; ValueError: a file of it is damaged.
    """
    run = RunFolder(folder)
    config, metrics = run.read_config(), run.read_metrics()
    part = next((name for name in ("test", "validation") if name in metrics), "")
    predictions = run.read_predictions(part) if part else None
    if predictions is not None and len(predictions.labels) != metrics[part]["num"]:
        raise ValueError(
            f"{run.predictions}: damaged, {len(predictions.labels)} rows of the {part} part, {metrics[part]['num']} in "
            f"{run.metrics.name}"
        )
    return RunRecord(
        folder=run,
        config=config,
        metrics=metrics,
        log=run.read_log(),
        model=model or run.read_model(),
        part=part,
        predictions=predictions,
        images=_images(config, part, predictions, parts) if predictions else None,
    )


def _images(config: RunConfig, part: str, predictions: Predictions, parts: Parts | None) -> Part | None:
    """The part of the data that was predicted; None, with a warning, if it is not there or not the same any more."""
    try:
        parts = parts or load_parts(config.data, config.ranks, config.seed)
    except (FileNotFoundError, ValueError) as error:
        logger.warning("%s: pictures are left out, the data cannot be read: %s", config.output_dir, error)
        return None
    images: Part | None = getattr(parts, part)
    if images is None or not np.array_equal(images.values, predictions.labels):
        logger.warning("%s: pictures are left out, the data is not that of the predictions", config.output_dir)
        return None
    return images


@torch.no_grad()
def points_of(model: OrdinalModel, part: Part, rows: np.ndarray, batch_size: int = 64) -> np.ndarray:
    """Some rows of a part in the space that answers are read from (`Head.space`), (len(rows), E)."""
    weights = next(model.encoder.parameters())
    points = []
    for begin in range(0, len(rows), batch_size):
        images = [prepare(part.image(row), model.config.pixel_spec) for row in rows[begin : begin + batch_size]]
        features = model.encoder(torch.stack(images).to(weights))
        points.append(model.head.space(features).flatten(1).double().cpu())
    return torch.cat(points).numpy()


def shown(value: float | None, spread: float | None = None, digits: int | None = None) -> str:
    """A number as reports and tables show it: two decimals, three below 1, or `digits`; "-" where there is none.

    >>> shown(4.4051), shown(0.97), shown(4.4051, 0.5811), shown(12.345, digits=1), shown(None), shown(-1e-17)
    ('4.41', '0.970', '4.41 ± 0.58', '12.3', '-', '0.000')
    """
    if value is None or math.isnan(value):
        return "-"
    if digits is None:
        digits = 2 if abs(value) >= 1 else 3
    return f"{value:z.{digits}f}" + (f" ± {spread:.{digits}f}" if spread is not None else "")
