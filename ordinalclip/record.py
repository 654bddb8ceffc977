"""A finished run, read back from its folder: what reports, figures and model cards are made of."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from ordinalclip.config import RunConfig, load_config
from ordinalclip.data import Part, Parts, load_parts
from ordinalclip.images import prepare
from ordinalclip.language import PrototypeHead
from ordinalclip.metrics import METRICS, bootstrap_interval, cumulative_score
from ordinalclip.model import OrdinalModel
from ordinalclip.ranks import Ranks

logger = logging.getLogger(__name__)
HEADLINE = {"mae": "MAE", "rmse": "RMSE", "r2": "R²", "accuracy": "accuracy", "spearman": "Spearman"}


@dataclass(frozen=True)
class Predictions:
    """Labels and answers of one part, a row per image.

    Attributes:
        names: (N,) file or row names.
        labels, label_ranks: (N,) true values in the label's unit, and their ranks.
        values: (N,) predicted values by `median`, the headline decoding.
        ranks: (N,) likeliest rank, or that nearest to the value for heads without a distribution.
        probabilities: (N, R) or None.
    """

    names: list[str]
    labels: np.ndarray
    label_ranks: np.ndarray
    values: np.ndarray
    ranks: np.ndarray
    probabilities: np.ndarray | None

    @property
    def errors(self) -> np.ndarray:
        """(N,) absolute errors in the label's unit."""
        return np.abs(self.values - self.labels)


@dataclass(frozen=True)
class RunRecord:
    """A finished run.

    Attributes:
        folder, config, figures: the run folder, its configuration and its metrics.json.
        log: the rows of log.jsonl; none when nothing was trained.
        model: the saved model.
        part: the part that is shown: "test" if it was read, else "validation", "" without either.
        predictions: those of that part, or None.
        images: that part of the data, or None when it is not there (any more).
    """

    folder: Path
    config: RunConfig
    figures: dict[str, Any]
    log: list[dict[str, Any]]
    model: OrdinalModel
    part: str
    predictions: Predictions | None
    images: Part | None

    @property
    def ranks(self) -> Ranks:
        return self.model.head.ranks

    @property
    def prototypes(self) -> torch.Tensor | None:
        """(R, D) rank prototypes, or None for heads without."""
        return self.model.head.prototypes if isinstance(self.model.head, PrototypeHead) else None

    @property
    def scores(self) -> dict[str, Any]:
        """The figures of the part that is shown."""
        return self.figures.get(self.part, {})

    @cached_property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """95 % bootstrap interval of each headline figure, and of the first CS@k, over the images that are shown."""
        given = self.predictions
        if given is None:
            return {}
        resamples = 1000 if len(given.labels) <= 10_000 else 200  # seconds, not minutes, for a large part
        interval = partial(bootstrap_interval, resamples=resamples)
        figures = {name: interval(METRICS[name], given.values, given.labels) for name in HEADLINE}
        figures["accuracy"] = interval(METRICS["accuracy"], given.ranks, given.label_ranks)
        for k in self.config.evaluation.cs[:1]:
            figures[f"cs@{k:g}"] = interval(partial(cumulative_score, k=k), given.values, given.labels)
        return figures

    def constant_error(self) -> float | None:
        """MAE of the answer that is best without looking: always the median of the training labels' ranks."""
        if self.predictions is None:
            return None
        below = np.cumsum(self.figures["train_counts"]) / sum(self.figures["train_counts"])
        median = self.ranks.values[int(np.searchsorted(below, 0.5))]
        return float(np.abs(self.predictions.labels - median).mean())


def read_run(folder: str | Path, parts: Parts | None = None, model: OrdinalModel | None = None) -> RunRecord:
    """Read a finished run.

    Args:
        parts: its data, if it is in memory already; otherwise it is loaded, and done without (with a warning) when
            it is not there any more.
        model: its deployed model, if it is in memory already.

    Raises:
        FileNotFoundError: no finished run there.
    """
    folder = Path(folder)
    if not (folder / "metrics.json").is_file():
        raise FileNotFoundError(f"{folder}: no finished run (metrics.json is missing)")
    config = load_config(folder / "config.yaml")
    figures = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    part = next((name for name in ("test", "validation") if name in figures), "")
    predictions = read_predictions(folder, part) if part else None
    log = folder / "log.jsonl"
    rows = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    return RunRecord(
        folder=folder,
        config=config,
        figures=figures,
        log=[json.loads(row) for row in rows],
        model=model or OrdinalModel.from_pretrained(folder / "model"),
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


def read_predictions(folder: Path, part: str) -> Predictions:
    """The rows of a part in a run's predictions.parquet."""
    table = pq.read_table(folder / "predictions.parquet")
    table = table.filter(pc.equal(table["part"], part))
    probabilities = table["probabilities"].combine_chunks()
    known = probabilities.null_count == 0
    labels, label_ranks, values, ranks = (
        table[name].to_numpy().copy() for name in ("label", "label_rank", "median", "rank")
    )
    return Predictions(
        names=table["row"].to_pylist(),
        labels=labels,
        label_ranks=label_ranks,
        values=values,
        ranks=ranks,
        probabilities=probabilities.flatten().to_numpy().reshape(len(table), -1) if known else None,
    )


@torch.no_grad()
def image_features(model: OrdinalModel, part: Part, rows: np.ndarray, batch_size: int = 64) -> np.ndarray:
    """The image encoder's features of some rows of a part, (len(rows), D)."""
    weights = next(model.encoder.parameters())
    features = []
    for begin in range(0, len(rows), batch_size):
        images = [prepare(part.image(row), model.config.pixel_spec) for row in rows[begin : begin + batch_size]]
        features.append(model.encoder(torch.stack(images).to(weights)).flatten(1).double().cpu())
    return torch.cat(features).numpy()


def shown(value: float | None, spread: float | None = None, digits: int | None = None) -> str:
    """A figure as reports and tables show it: two decimals, three below 1, or `digits`; "-" where there is none.

    >>> shown(4.4051), shown(0.97), shown(4.4051, 0.5811), shown(12.345, digits=1), shown(None)
    ('4.41', '0.970', '4.41 ± 0.58', '12.3', '-')
    """
    if value is None or math.isnan(value):
        return "-"
    if digits is None:
        digits = 2 if abs(value) >= 1 else 3
    return f"{value:.{digits}f}" + (f" ± {spread:.{digits}f}" if spread is not None else "")
