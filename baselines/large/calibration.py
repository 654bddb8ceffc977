"""From a distance to a value: which few codes to label, and the line through them."""

from __future__ import annotations

import warnings
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from baselines.large.inputs import check_pairs, numbers

Penalty = Literal["none", "ridge", "lasso", "elastic_net"]
ITERATIONS = 1_000_000


def calibrate(
    distances: ArrayLike | Tensor, labels: ArrayLike | Tensor, penalty: Penalty = "none", strength: float = 1.0
) -> tuple[float, float]:
    """The line y = slope d + offset that is nearest to labelled distances, by squared error.

    Two of them determine it: it goes through both (Nitzan et al., CVPR 2022). For penalties see `calibrate_layers`.

    Args:
        distances, labels: (n,), n >= 2.
        penalty, strength: what holds the slope back.

    Returns:
        slope and offset, in the labels' unit.

    Raises:
        ValueError: fewer than two, other shapes, numbers that are not finite, distances or labels that are all equal
            (up to the rounding of their dtype), an unknown penalty or a strength that is not above 0.

    >>> calibrate([1.0, 3.0], [20.0, 60.0])
    (20.0, 0.0)
    """
    (slope,), offset = calibrate_layers(numbers(distances, "distances", "n")[:, None], labels, penalty, strength)
    return float(slope), offset


def calibrate_layers(
    distances: ArrayLike | Tensor,
    labels: ArrayLike | Tensor,
    penalty: Penalty = "ridge",
    strength: float = 1.0,
    pool: ArrayLike | Tensor | None = None,
) -> tuple[Tensor, float]:
    """y = sum_l slope_l d_l + offset: the distance of every layer as a feature of its own.

    With penalties each distance is standardised first (ours). Published code penalises the slope of the raw feature,
    whose scale is arbitrary: layer weights that sum to 1 / 512 leave so small a covariance with the labels that an
    elastic net of strength 1 answers slope 0, the same value for every picture. The penalty is in the labels' unit:
    scikit-learn's objectives and their default strength.

    Args:
        distances: (n, L), n >= 2.
        labels: (n,).
        penalty: none (least squares; where layers are more than labels, the shortest solution in standardised
            distances), ridge (strength |slope|^2 beside the sum of squared errors), lasso or elastic_net (strength
            |slope|_1, or half of it and a quarter of |slope|^2, beside half of the mean squared error).
        strength: scikit-learn's `alpha`, where there is a penalty.
        pool: (N, L), distances whose deviations are the scale, which need no labels; default: the labelled ones. Of
            few, in some layer nearly equal ones the deviation is next to nothing, and the slope of that layer no guess.

    Returns:
        slopes (L,), float64, of the distances as they came, and the offset.

    Raises:
        ValueError: see `calibrate`.
    """
    given, answers = numbers(distances, "distances", "n L"), numbers(labels, "labels", "n")
    check_pairs(given, answers, "distances and labels")
    if penalty not in get_args(Penalty):
        raise ValueError(f"penalty {penalty!r} is unknown; choices: {', '.join(get_args(Penalty))}")
    if not 0 < strength < float("inf"):
        raise ValueError(f"strength must be a finite number above 0, got {strength}")
    if len(given) < 2:
        raise ValueError(f"a line needs two labelled distances or more, got {len(given)}")
    differs = _differs(given)
    if not differs.any():
        raise ValueError("the distances are all equal: no line goes through them; label codes that differ in it")
    if not _differs(answers[:, None]).all():
        raise ValueError(f"the labels are all equal ({float(answers[0]):g}): label codes of two values or more")
    features, values = (tensor.detach().cpu().double().numpy() for tensor in (given[:, differs], answers))
    every = given if pool is None else numbers(pool, "pool", "N L")
    if every.shape[1] != given.shape[1]:
        raise ValueError(f"pool must have as many layers as distances, {given.shape[1]}, got {every.shape[1]}")
    scale = every[:, differs].detach().cpu().double().numpy().std(axis=0)
    standard = (features - features.mean(axis=0)) / scale
    fitted = np.zeros(given.shape[1])
    fitted[differs.cpu().numpy()] = _slopes(standard, values - values.mean(), penalty, strength) / scale
    slopes = torch.from_numpy(fitted)
    return slopes, float(values.mean() - fitted @ given.detach().cpu().double().numpy().mean(axis=0))


def spread_out(
    distances: ArrayLike | Tensor, budget: int, seed: int, minimum: float | None = None, central: float = 1.0
) -> np.ndarray:
    """Which few codes to label: at random, but apart from each other in their distance, which needs no label.

    The pool is visited in random order; a code is taken if its distance differs from that of every one taken before by
    more than `minimum` (as in the authors' code). Where this gives too few, a warning says so, and the farthest
    from those taken are added, one by one (ours; there the result is shorter).

    Args:
        distances: (N,), one number per code.
        budget: number n of codes that will be labelled, at most N.
        seed: of the random order.
        minimum: default: (largest - smallest distance) / n^1.3; below 0: none.
        central: share of the pool that codes are taken from: those strictly between the quantiles (1 - central) / 2 and
            (1 + central) / 2, so that no outlier is taken. 1: all.

    Returns:
        (budget,) rows, in the order in which they were taken.

    Raises:
        ValueError: another shape, numbers that are not finite, a budget below 1 or larger than the pool, or a share
            outside of 0 to 1.

    >>> spread_out([0.0, 0.1, 0.2, 5.0, 9.9, 10.0], budget=3, seed=0)
    array([3, 2, 5])
    """
    values = numbers(distances, "distances", "N").detach().cpu().double().numpy()
    if not 0 < central <= 1:
        raise ValueError(f"central must be a share above 0, at most 1, got {central}")
    pool = np.arange(len(values))
    if central < 1:
        low, high = np.quantile(values, [(1 - central) / 2, (1 + central) / 2])
        pool = np.flatnonzero((low < values) & (values < high))
    if not 1 <= budget <= len(pool):
        within = f", the central {central:g} of {len(values)}" if central < 1 else ""
        raise ValueError(f"budget must be between 1 and the size of the pool, {len(pool)}{within}; got {budget}")
    order = np.random.default_rng(seed).permutation(pool)
    if budget == len(pool):
        return order
    if minimum is None:
        minimum = np.ptp(values[pool]) / budget**1.3
    gaps = np.full(len(order), np.inf)  # of every code in `order` to the nearest taken one; -1: itself is taken
    taken: list[int] = []

    def take(place: int) -> None:
        taken.append(int(order[place]))
        np.minimum(gaps, np.abs(values[order] - values[order[place]]), out=gaps)
        gaps[place] = -1

    for place in range(len(order)):
        if len(taken) < budget and gaps[place] > minimum:
            take(place)
    if len(taken) < budget:
        warnings.warn(
            f"only {len(taken)} of {budget} codes differ by more than {minimum:g} in their distance; the others are "
            "those farthest from them",
            stacklevel=2,
        )
        while len(taken) < budget:
            take(int(gaps.argmax()))
    return np.array(taken)


def _differs(columns: Tensor) -> Tensor:
    """(n, L) -> (L,): whether the numbers of a column differ by more than the rounding of their dtype."""
    low, high = columns.detach().aminmax(dim=0)
    return high - low > 4 * torch.finfo(columns.dtype).eps * torch.maximum(low.abs(), high.abs())


def _slopes(features: np.ndarray, values: np.ndarray, penalty: Penalty, strength: float) -> np.ndarray:
    """Of (n, L) standardised features and (n,) centred values: (L,)."""
    if penalty == "none" and features.shape[1] == 1:
        return values @ features / (features**2).sum()
    if penalty == "none":
        return np.linalg.lstsq(features, values, rcond=None)[0]
    from sklearn.linear_model import ElasticNet, Lasso, Ridge  # takes a second

    model: Any = {
        "ridge": Ridge(alpha=strength, fit_intercept=False),
        "lasso": Lasso(alpha=strength, fit_intercept=False, max_iter=ITERATIONS),
        "elastic_net": ElasticNet(alpha=strength, fit_intercept=False, max_iter=ITERATIONS),
    }[penalty]
    return model.fit(features, values).coef_
