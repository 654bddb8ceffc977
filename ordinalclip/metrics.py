"""Metrics of ordered predictions as pure functions, and as modules of the `evaluate` library that need no network.

All but `ordinality`, `shot_groups` and those of a feature space (which live in `space.py`) take (N,) predictions and
references over the WHOLE test part: never average them over batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import stats
from torch import Tensor

from ordinalclip.space import best_residual_variance as best_residual_variance
from ordinalclip.space import d5 as d5
from ordinalclip.space import residual_variance as residual_variance


def mean_absolute_error(predictions: ArrayLike, references: ArrayLike) -> float:
    """MAE, in the label's unit.

    >>> mean_absolute_error([20, 30], [21, 27])
    2.0
    """
    predicted, true = _pair(predictions, references)
    return float(np.abs(predicted - true).mean())


def root_mean_squared_error(predictions: ArrayLike, references: ArrayLike) -> float:
    """RMSE, in the label's unit."""
    predicted, true = _pair(predictions, references)
    return float(np.sqrt(((predicted - true) ** 2).mean()))


def r2_score(predictions: ArrayLike, references: ArrayLike) -> float:
    """Coefficient of determination; NaN when all references are equal."""
    predicted, true = _pair(predictions, references)
    total = ((true - true.mean()) ** 2).sum()
    return float(1 - ((predicted - true) ** 2).sum() / total) if total > 0 else float("nan")


def accuracy(predictions: ArrayLike, references: ArrayLike) -> float:
    """Share of predicted ranks that equal the true rank."""
    predicted, true = _pair(predictions, references)
    return float((predicted == true).mean())


def cumulative_score(predictions: ArrayLike, references: ArrayLike, k: float = 5) -> float:
    """CS@k: share of absolute errors of at most k, in the label's unit (Chang et al., CVPR 2011)."""
    predicted, true = _pair(predictions, references)
    return float((np.abs(predicted - true) <= k + 1e-9).mean())


def pearson(predictions: ArrayLike, references: ArrayLike) -> float:
    """Pearson's linear correlation (PLC); NaN when either side is constant."""
    predicted, true = _pair(predictions, references)
    if np.ptp(predicted) == 0 or np.ptp(true) == 0:
        return float("nan")
    return float(np.corrcoef(predicted, true)[0, 1])


def spearman(predictions: ArrayLike, references: ArrayLike) -> float:
    """Spearman's rank correlation (SRC), ties at their mean rank; NaN when either side is constant."""
    predicted, true = _pair(predictions, references)
    return pearson(stats.rankdata(predicted), stats.rankdata(true))


def bootstrap_interval(
    metric: Callable[..., float],
    predictions: ArrayLike,
    references: ArrayLike,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a metric over the rows of one part (Efron & Tibshirani, 1993).

    It says how far the figure would move with other images of the same kind, not with another training. Resamples on
    which the metric is not defined are left out; NaN where it is defined on none.

    >>> low, high = bootstrap_interval(mean_absolute_error, [20, 30, 44], [21, 27, 40])
    >>> 1 <= low <= 8 / 3 <= high <= 4
    True
    """
    predicted, true = _pair(predictions, references)
    rng = np.random.default_rng(seed)
    rows = (rng.integers(0, len(true), len(true)) for _ in range(resamples))
    figures = np.asarray([metric(predicted[chosen], true[chosen]) for chosen in rows])
    figures = figures[np.isfinite(figures)]
    if figures.size == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(figures, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def shot_groups(train_counts: ArrayLike) -> dict[str, np.ndarray]:
    """Which ranks have many, a medium number of, or few training labels (Yang et al., ICML 2021).

    Args:
        train_counts: (R,) number of training labels of each rank.

    Returns:
        (R,) masks: "many" (more than 100), "medium" (20 to 100), "few" (less than 20, none included), and "unseen",
        those of the few that have no training label at all.
    """
    counts = np.asarray(train_counts)
    return {"many": counts > 100, "medium": (counts >= 20) & (counts <= 100), "few": counts < 20, "unseen": counts == 0}


def mae_by_shots(
    predictions: ArrayLike, references: ArrayLike, label_ranks: ArrayLike, train_counts: ArrayLike
) -> dict[str, dict[str, float | int | None]]:
    """MAE of the images whose rank belongs to each of `shot_groups`.

    Args:
        label_ranks: (N,) true rank of every image.
        train_counts: (R,) number of training labels of each rank.

    Returns:
        by group: "ranks" and "num", the numbers of ranks and of images, and "mae", None without images.
    """
    predicted, true = _pair(predictions, references)
    table: dict[str, dict[str, float | int | None]] = {}
    for name, members in shot_groups(train_counts).items():
        chosen = members[np.asarray(label_ranks)]
        mae = mean_absolute_error(predicted[chosen], true[chosen]) if chosen.any() else None
        table[name] = {"ranks": int(members.sum()), "num": int(chosen.sum()), "mae": mae}
    return table


def ordinality(prototypes: Tensor) -> float:
    """Share of prototype similarities that fall with the distance in rank (OrdinalCLIP, table 6).

    Among all ranks i <= j <= R - 2: how often cosine(i, j) > cosine(i, j + 1).

    Args:
        prototypes: (R, D) rank prototypes, R >= 2; they need not be normalised.

    Returns:
        share in [0, 1]; 1 when similarity falls at every step away from every rank.
    """
    if prototypes.ndim != 2 or len(prototypes) < 2:
        raise ValueError(f"prototypes must be (R, D) with R >= 2, got shape {tuple(prototypes.shape)}")
    unit = torch.nn.functional.normalize(prototypes.detach().double(), dim=1)
    similarity = unit @ unit.t()
    row, column = torch.triu_indices(len(unit) - 1, len(unit) - 1)
    return (similarity[row, column] > similarity[row, column + 1]).double().mean().item()


def _pair(predictions: ArrayLike, references: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    predicted, true = np.asarray(predictions, dtype=np.float64), np.asarray(references, dtype=np.float64)
    if predicted.shape != true.shape or predicted.ndim != 1:
        raise ValueError(f"predictions and references must be (N,), got {predicted.shape} and {true.shape}")
    if predicted.size == 0:
        raise ValueError("no predictions to score: the part is empty")
    return predicted, true


METRICS: dict[str, Callable[..., float]] = {
    "mae": mean_absolute_error,
    "rmse": root_mean_squared_error,
    "r2": r2_score,
    "accuracy": accuracy,
    "cs": cumulative_score,
    "pearson": pearson,
    "spearman": spearman,
}


class OrdinalMetric(evaluate.Metric):
    """One of `METRICS` as a module of the `evaluate` library; build it with `load_metric`."""

    def __init__(self, name: str, **kwargs: Any):
        self.metric_name = name
        super().__init__(config_name=name, keep_in_memory=True, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("float64")
        function = METRICS[self.metric_name]
        return evaluate.MetricInfo(
            description=(function.__doc__ or "").strip(),
            citation="",
            inputs_description="predictions and references: numbers in the label's unit (accuracy: rank indices)",
            features=datasets.Features({"predictions": number, "references": number}),
        )

    def _compute(self, predictions: Sequence[float], references: Sequence[float], **options: Any) -> dict[str, float]:
        return {self.metric_name: METRICS[self.metric_name](predictions, references, **options)}

    def compute(self, **kwargs: Any) -> dict[str, float]:
        """As in `evaluate`; an empty metric raises a ValueError that says so."""
        if not kwargs.get("predictions", True) or (self.writer is None and "predictions" not in kwargs):
            raise ValueError(f"{self.metric_name}: nothing was added; call add_batch first or pass predictions")
        return super().compute(**kwargs)


def load_metric(name: str) -> OrdinalMetric:
    """A metric as an `evaluate` module, without network.

    Raises:
        ValueError: an unknown name; the message lists the choices.

    >>> load_metric("mae").compute(predictions=[20, 30], references=[21, 27])
    {'mae': 2.0}
    """
    if name not in METRICS:
        raise ValueError(f"metric {name!r} is unknown; choices: {', '.join(METRICS)}")
    return OrdinalMetric(name)
