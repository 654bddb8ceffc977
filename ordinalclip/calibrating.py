"""How a calibration is learnt, and what is to be told of it: quality of probabilities, coverage of intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from scipy import optimize, special, stats

from ordinalclip.calibration import (
    FLOOR,
    LEVELS,
    OF_SETS,
    OF_VALUES,
    Answered,
    Calibration,
    IntervalKind,
    ScalingKind,
    highest_level,
    likely,
)
from ordinalclip.heads import decode
from ordinalclip.intervals import MOST_RANKS, TIE
from ordinalclip.metrics import ranked_probability_score, ranked_probability_scores
from ordinalclip.ranks import Decoding, Ranks

CHOOSING_LEVEL = 0.9  # at which kinds of intervals are compared
FEW_RANKS = 10  # for vector scaling, which has two numbers a rank
ENOUGH = 20  # pictures, for vector scaling of each rank, from which a scaling or the size of errors is learnt
FOLDS = 5
BINS = 15
KNOTS = (0.1, 0.3, 0.5, 0.7, 0.9)  # quantiles of the answers at which the size of errors is told


@dataclass(frozen=True)
class Calibrated:
    """A calibration, and what is to be told of it, as JSON data.

    Attributes:
        about: `num` pictures (and `groups`) that thresholds come from; `scaling`; `temperature`, if there is one;
            `kind`; `widths` by which it was chosen, and their `level`; `before` and `after` scaling, on the pictures
            that thresholds come from: `ece`, `rps`, `nll`, `mae`, `reliability`.
    """

    calibration: Calibration
    about: dict[str, Any]


def calibrate(
    ranks: Ranks,
    decoding: Decoding,
    choosing: Answered,
    held_out: Answered,
    groups: np.ndarray | None = None,
    kind: IntervalKind | Literal["auto"] = "auto",
    by_rank: bool = False,
) -> Calibrated:
    """Learn a calibration.

    Args:
        decoding: how the model answers.
        choosing: pictures by which the scaling and, by the mean width of its intervals, the kind are chosen: those
            that have chosen the model will do.
        held_out: pictures that have chosen nothing, for the thresholds.
        groups: (N,) patients or subjects of `held_out`.
        kind: of the scores; "auto": of ranks where the method has probabilities, else of values.
        by_rank: see `Calibration`.

    Raises:
        ValueError: no pictures; a kind that cannot be had of this method, of so many ranks, or by so few pictures.
    """
    if not len(choosing) or not len(held_out):
        raise ValueError("a calibration needs pictures to choose by and others for its thresholds")
    kinds: Sequence[IntervalKind] = _possible(ranks, choosing)
    if kind != "auto":
        if why := _impossible(kind, ranks, choosing):
            raise ValueError(f"intervals of kind {kind} {why}")
        kinds = (kind,)
    scaling, scale, bias = _scaling(ranks, choosing)

    def built(kind: IntervalKind, by_rank: bool, grouped: bool) -> Calibration:
        knots = len(KNOTS) if kind == "scaled" and choosing.prediction.probabilities is None else 0
        made = Calibration(ranks, scaling, kind, by_rank, knots, grouped)
        if scaling != "none":
            made.scale.copy_(torch.from_numpy(scale))
            made.bias.copy_(torch.from_numpy(bias))
        if knots:
            _learn_spreads(made, choosing)
        return made

    level, widths = min(CHOOSING_LEVEL, highest_level(len(choosing)) or LEVELS[0]), {}
    for each in kinds:
        candidate = built(each, False, False)
        seen = replace(choosing, prediction=candidate.answer(choosing.prediction, decoding))
        candidate.set_thresholds(seen)
        low, high = candidate.interval(seen.prediction, level)
        widths[each] = float((high - low).mean())
    chosen = min(widths, key=lambda each: widths[each])  # of equal ones the first
    calibration = built(chosen, by_rank, groups is not None)
    after = replace(held_out, prediction=calibration.answer(held_out.prediction, decoding))
    calibration.set_thresholds(after, groups)
    about: dict[str, Any] = {
        "num": len(held_out),
        **({} if groups is None else {"groups": len(np.unique(groups))}),
        "scaling": scaling,
        **({"temperature": 1 / float(scale[0])} if scaling == "temperature" else {}),
        "kind": chosen,
        "by_rank": by_rank,
        "widths": {"level": level, **widths},
        "least": int(calibration.counts.min()),
    }
    if choosing.prediction.probabilities is not None:
        about["before"] = quality(replace(held_out, prediction=decode(likely(held_out.prediction), ranks, decoding)))
        about["after"] = quality(after)
    return Calibrated(calibration, about)


def _impossible(kind: IntervalKind, ranks: Ranks, choosing: Answered) -> str:
    """Why intervals of a kind cannot be had; "" where they can."""
    if choosing.prediction.probabilities is None:
        if kind in OF_SETS:
            return "are made of probabilities, which this method has none of"
        if kind == "scaled" and len(choosing) < ENOUGH:
            return f"take at least {ENOUGH} pictures to learn which errors to expect, there are {len(choosing)}"
    if kind in ("aps", "shortest") and len(ranks) > MOST_RANKS:
        return f"are of at most {MOST_RANKS} ranks, there are {len(ranks)}"
    return ""


def _possible(ranks: Ranks, choosing: Answered) -> list[IntervalKind]:
    """What is compared: sets of ranks where the method has probabilities, else ranges of values."""
    wanted = OF_VALUES if choosing.prediction.probabilities is None else OF_SETS
    return [each for each in wanted if not _impossible(each, ranks, choosing)]


def _scaling(ranks: Ranks, choosing: Answered) -> tuple[ScalingKind, np.ndarray, np.ndarray]:
    """The scaling with the best ranked probability score on folds that it was not learnt from, with scale and bias;
    none where pictures are few. It is learnt by the likelihood, which a single true rank of probability 0 decides, such
    as neighbours give."""
    probabilities = choosing.prediction.probabilities
    if probabilities is None or len(choosing) < ENOUGH:
        return "none", np.ones(1), np.zeros(1)
    logs = probabilities.double().clamp(min=FLOOR).log().numpy()
    truth = choosing.ranks.numpy()
    known: list[ScalingKind] = ["none", "temperature"]
    if len(ranks) <= FEW_RANKS and len(choosing) >= ENOUGH * len(ranks):
        known.append("vector")
    fold = np.random.default_rng(0).permutation(len(truth)) % FOLDS
    losses = dict.fromkeys(known, 0.0)
    for kind in known:
        for number in range(FOLDS):
            left_out = fold == number
            scale, bias = _fitted(kind, logs[~left_out], truth[~left_out])
            told = special.softmax(logs[left_out] * scale + bias, axis=1)
            losses[kind] += float(ranked_probability_scores(told, truth[left_out]).sum())
    best = min(known, key=lambda kind: losses[kind])
    return best, *_fitted(best, logs, truth)


def _fitted(kind: ScalingKind, logs: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale and bias of the largest likelihood, slightly drawn to 1 and 0: one of each or, of "vector", R."""
    if kind == "none":
        return np.ones(1), np.zeros(1)
    number = logs.shape[1] if kind == "vector" else 1
    start = np.concatenate([np.ones(number), np.zeros(number)])  # one bias for all ranks stays at 0
    hot = np.eye(logs.shape[1])[truth]

    def loss(free: np.ndarray) -> tuple[float, np.ndarray]:
        scores = special.log_softmax(logs * free[:number] + free[number:], axis=1)
        excess = (np.exp(scores) - hot) / len(truth)
        by_scale, by_bias = (excess * logs).sum(axis=0), excess.sum(axis=0)
        if number == 1:
            by_scale, by_bias = by_scale.sum(keepdims=True), np.zeros(1)
        away = free - start
        likelihood = scores[np.arange(len(truth)), truth].mean()
        return 1e-3 * (away**2).sum() - likelihood, np.concatenate([by_scale, by_bias]) + 2e-3 * away

    limits = [(0.02, 50.0)] * number + [(-20.0, 20.0)] * number
    free = optimize.minimize(loss, start, jac=True, method="L-BFGS-B", bounds=limits).x
    return free[:number], free[number:]


def _learn_spreads(calibration: Calibration, choosing: Answered) -> None:
    """Mean absolute errors of the fifths of the pictures, in order of the answers."""
    order = choosing.prediction.value.argsort()
    value = choosing.prediction.value[order].double()
    errors = (value - choosing.values[order]).abs()
    least = max(0.1 * float(errors.mean()), TIE * (calibration.ranks.values[-1] - calibration.ranks.values[0]))
    for place, quantile in enumerate(KNOTS):
        begin, end = (int(len(order) * (quantile + side)) for side in (-0.1, 0.1))
        calibration.knots[place] = value[int(len(order) * quantile)]
        calibration.spreads[place] = float(errors[begin : max(end, begin + 1)].mean().clamp(min=least))


def quality(answered: Answered) -> dict[str, Any]:
    """How far probabilities mean what they say.

    Returns:
        `ece`: the expected calibration error of the likeliest rank's probability over 15 bins of equal width (Naeini
        et al., AAAI 2015); `rps`: the mean ranked probability score; `nll`; `mae` in the label's unit; `reliability`:
        of every bin that is not empty its mean `confidence`, its `accuracy` and its `num` of pictures.
    """
    probabilities = likely(answered.prediction).double()
    confidence, likeliest = probabilities.max(dim=1)
    right = (likeliest == answered.ranks).double()
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    curve = []
    for number in range(BINS):
        if (inside := bins == number).any():
            mean = float(confidence[inside].mean()), float(right[inside].mean())
            curve.append({"confidence": mean[0], "accuracy": mean[1], "num": int(inside.sum())})
    gaps = [each["num"] * abs(each["confidence"] - each["accuracy"]) for each in curve]
    true = answered.ranks.unsqueeze(1)
    return {
        "ece": sum(gaps) / len(answered),
        "rps": ranked_probability_score(probabilities, answered.ranks),
        "nll": float(-probabilities.gather(1, true).clamp(min=1e-12).log().mean()),
        "mae": float((answered.prediction.value - answered.values).abs().mean()),
        "reliability": curve,
    }


def coverage(calibration: Calibration, answered: Answered, level: float) -> dict[str, Any]:
    """How many intervals of a level hold the truth.

    Args:
        answered: other pictures, with predictions as `Calibration.answer` gives them.

    Returns:
        `level`, `num`, `coverage`, mean `width` in the label's unit; `band`, in which the coverage of so many pictures
        lies for 95 % of the calibrations of this size where the promise holds, and `p`, the probability of as little
        (beta-binomial: Vovk, "Conditional validity of inductive conformal predictors", ACML 2012), both for pictures
        that are independent, and of a calibration by rank for the rank with the fewest; `by_rank`: num and coverage of
        every rank that occurs.
    """
    low, high = calibration.interval(answered.prediction, level)
    inside = calibration.covered(answered, low, high)
    kept = int(calibration.counts.min())
    place = math.ceil((kept + 1) * level - 1e-9)
    chance = stats.betabinom(len(answered), place, kept + 1 - place)
    by_rank = []
    for rank in answered.ranks.unique().tolist():
        mine = answered.ranks == rank
        share = float(inside[mine].double().mean())
        by_rank.append({"name": calibration.ranks.name(rank), "num": int(mine.sum()), "coverage": share})
    return {
        "level": level,
        "num": len(answered),
        "coverage": float(inside.double().mean()),
        "width": float((high - low).double().mean()),
        "band": [float(each) / len(answered) for each in chance.ppf([0.025, 0.975])],
        "p": float(chance.cdf(int(inside.sum()))),
        "by_rank": by_rank,
    }
