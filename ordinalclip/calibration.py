"""What a model has learnt from labelled pictures that neither trained nor chose it: probabilities that mean what they
say, and intervals that keep their promise; buffers of the model, so that they go where it goes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from ordinalclip.heads import Prediction, decode
from ordinalclip.intervals import (
    MOST_RANKS,
    TIE,
    TooFewError,
    aps_scores,
    conformal_threshold,
    ends,
    least_number,
    rps_scores,
    shortest_scores,
)
from ordinalclip.losses import at_least_float32
from ordinalclip.ranks import Decoding, Ranks

ScalingKind = Literal["none", "temperature", "vector"]
IntervalKind = Literal["rps", "aps", "shortest", "residual", "scaled"]
OF_SETS: tuple[IntervalKind, ...] = ("rps", "aps", "shortest")  # of ranks, for heads with probabilities
OF_VALUES: tuple[IntervalKind, ...] = ("residual", "scaled")
LEVELS = tuple(hundredths / 100 for hundredths in range(50, 100))
CHOOSING_LEVEL = 0.9  # at which kinds of intervals are compared
FLOOR = 1e-12  # probabilities below are taken for it where they are scaled
BEYOND = 1e30  # the threshold of a level for which there were too few pictures: everything is inside
FEW_RANKS = 10  # for vector scaling, which has two numbers a rank
ENOUGH = 20  # pictures, for vector scaling of each rank, from which a scaling is learnt
FOLDS = 5
BINS = 15
KNOTS = (0.1, 0.3, 0.5, 0.7, 0.9)  # quantiles of the answers at which the size of errors is told


@dataclass(frozen=True)
class Answered:
    """Answers to N labelled pictures.

    Attributes:
        prediction: as the head gives them, not scaled.
        values, ranks: (N,) true values in the label's unit, and their ranks.
    """

    prediction: Prediction
    values: Tensor
    ranks: Tensor

    def __len__(self) -> int:
        return len(self.values)

    def select(self, rows: np.ndarray) -> Answered:
        """The given rows, in the given order."""
        chosen = torch.from_numpy(np.asarray(rows))
        value, rank, probabilities = self.prediction
        likely = None if probabilities is None else probabilities[chosen]
        return Answered(Prediction(value[chosen], rank[chosen], likely), self.values[chosen], self.ranks[chosen])


class Calibration(nn.Module):
    """Scaled probabilities, and an interval for every level of `LEVELS`.

    Probabilities p become softmax(scale log p + bias): with one scale the temperature scaling of Guo et al. (ICML
    2017), 1 / scale being the temperature; with one of each for every rank their vector scaling.

    Args:
        ranks: the label space.
        scaling: "none", "temperature" or "vector".
        kind: of the scores that intervals are made of: "rps", "aps", "shortest" (see `ordinalclip.intervals`);
            "residual": the error's size; "scaled": as a share of the errors expected of such an answer, which is the
            standard deviation of the distribution or, of heads without, learned from other errors.
        by_rank: a threshold for every rank, so that the promise holds for each (Mondrian, or label-conditional). The
            ranks inside need not be neighbours then; the interval reaches from the first to the last.
        knots: number of answers at which the errors expected of them are kept; 0: none are.
        grouped: the counts are of groups, not of pictures.

    Attributes:
        thresholds: (1 or R, levels); counts: (1 or R,) pictures or groups that they come from.
    """

    thresholds: Tensor
    counts: Tensor
    scale: Tensor
    bias: Tensor
    knots: Tensor
    spreads: Tensor

    def __init__(
        self,
        ranks: Ranks,
        scaling: ScalingKind = "none",
        kind: IntervalKind = "rps",
        by_rank: bool = False,
        knots: int = 0,
        grouped: bool = False,
    ):
        super().__init__()
        if scaling not in get_args(ScalingKind) or kind not in get_args(IntervalKind):
            raise ValueError(f"calibration: scaling {scaling!r} or kind {kind!r} is unknown")
        if not 0 <= knots <= 100 or (kind in OF_SETS and kind != "rps" and len(ranks) > MOST_RANKS):
            raise ValueError(f"calibration: {knots} knots, or {kind} sets of {len(ranks)} ranks")
        self.ranks, self.scaling, self.kind, self.by_rank, self.grouped = ranks, scaling, kind, by_rank, grouped
        if scaling != "none":
            shape = (len(ranks),) if scaling == "vector" else (1,)
            self.register_buffer("scale", torch.ones(shape))
            self.register_buffer("bias", torch.zeros(shape))
        if knots:
            self.register_buffer("knots", torch.zeros(knots))
            self.register_buffer("spreads", torch.ones(knots))
        self.register_buffer("thresholds", torch.full((len(ranks) if by_rank else 1, len(LEVELS)), BEYOND))
        self.register_buffer("counts", torch.zeros(len(ranks) if by_rank else 1, dtype=torch.int64))

    @classmethod
    def of(cls, ranks: Ranks, said: dict[str, Any] | None) -> Calibration | None:
        """What a model's configuration says of it, without its numbers.

        Raises:
            ValueError: something else.
        """
        if said is None:
            return None
        kinds = {"scaling": str, "kind": str, "by_rank": bool, "knots": int, "grouped": bool}
        if said.keys() != kinds.keys() or any(type(said[key]) is not kind for key, kind in kinds.items()):
            raise ValueError(f"calibration must have {', '.join(kinds)}, got {said!r}")
        return cls(ranks, **said)

    def to_dict(self) -> dict[str, Any]:
        """What `of` takes."""
        return {
            "scaling": self.scaling,
            "kind": self.kind,
            "by_rank": self.by_rank,
            "knots": len(self.knots) if hasattr(self, "knots") else 0,
            "grouped": self.grouped,
        }

    def _apply(self, fn: Any, recurse: bool = True) -> Calibration:
        """To another device, but not into another precision, in which thresholds would be other thresholds."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)

    def answer(self, prediction: Prediction, decoding: Decoding) -> Prediction:
        """A head's prediction with scaled probabilities, and the value that those mean."""
        if prediction.probabilities is None or self.scaling == "none":
            return prediction
        return decode(self.probabilities(prediction.probabilities), self.ranks, decoding)

    def probabilities(self, given: Tensor) -> Tensor:
        """(N, R) probabilities, scaled."""
        if self.scaling == "none":
            return given
        return torch.softmax(at_least_float32(given).clamp(min=FLOOR).log() * self.scale + self.bias, dim=1)

    def check_level(self, level: float) -> None:
        """Raises:
        ValueError: a level that is none of `LEVELS`; TooFewError: one that takes more calibration pictures."""
        if isinstance(level, bool) or not isinstance(level, int | float) or _nearest_level(level) is None:
            raise ValueError(
                f"interval must be a level of {LEVELS[0]:g} to {LEVELS[-1]:g} in hundredths, got {level!r}"
            )
        needed, least = least_number(level), int(self.counts.min())
        if least < needed:
            what = ("calibration groups" if self.grouped else "calibration pictures") + " of every rank" * self.by_rank
            raise TooFewError(level, needed, least, what)

    def interval(self, prediction: Prediction, level: float | Tensor) -> tuple[Tensor, Tensor]:
        """(N,) lower and upper ends, in the label's unit, both included, of the interval of a level.

        They are rank values (the edges of their bins, where ranks have such), except where scores are of values
        ("residual", "scaled") and not by rank: then any numbers between the first and the last rank. The answer itself
        is always inside.

        Args:
            prediction: as `answer` gives it.
            level: of `LEVELS`; as a tensor () it is not checked, and one between two is the nearest.

        Raises:
            see `check_level`.
        """
        if not isinstance(level, Tensor):
            self.check_level(level)
            level = torch.tensor(float(level), device=self.thresholds.device)
        place = (level * 100).round().long().clamp(50, 99) - 50
        device = prediction.value.device  # a pipeline's answers are on the CPU, wherever the model is
        threshold = self.thresholds.index_select(1, place.reshape(1))[:, 0].to(device)  # (1 or R,)
        values = torch.tensor(self.ranks.values, dtype=torch.float32, device=device)
        if self.kind in OF_VALUES and not self.by_rank:
            answer = at_least_float32(prediction.value)
            reach = (threshold * self._expected_errors(prediction)).clamp(max=BEYOND)
            low = torch.maximum(answer - reach, torch.minimum(answer, values[0]))
            return low, torch.minimum(answer + reach, torch.maximum(answer, values[-1]))
        first, last = ends(self.scores(prediction) <= threshold, prediction.rank)
        lower, upper = (torch.tensor(edge, device=values.device) for edge in bounds(self.ranks))
        return lower[first], upper[last]

    def scores(self, prediction: Prediction) -> Tensor:
        """(N, R): how little plausible every rank is."""
        if self.kind in OF_VALUES:
            value = at_least_float32(prediction.value)
            values = torch.tensor(self.ranks.values, dtype=value.dtype, device=value.device)
            distance = (value.unsqueeze(1) - values).abs()
            return distance / self._expected_errors(prediction).unsqueeze(1)
        probabilities = at_least_float32(_of(prediction))
        return SCORES[self.kind](probabilities)

    def true_scores(self, answered: Answered) -> Tensor:
        """(N,) scores of the true labels, of which thresholds are made.

        Args:
            answered: with predictions as `answer` gives them.
        """
        if self.kind in OF_VALUES and not self.by_rank:
            inside = answered.values.clamp(self.ranks.values[0], self.ranks.values[-1])
            return (answered.prediction.value - inside).abs() / self._expected_errors(answered.prediction)
        return self.scores(answered.prediction).gather(1, answered.ranks.unsqueeze(1))[:, 0]

    def covered(self, answered: Answered, low: Tensor, high: Tensor) -> Tensor:
        """(N,) whether intervals hold the truth: the true rank's value, or, where ends are numbers, the true one."""
        values = torch.tensor(self.ranks.values)
        truth = values[answered.ranks]
        if self.kind in OF_VALUES and not self.by_rank:
            truth = answered.values.clamp(self.ranks.values[0], self.ranks.values[-1]).float()
        near = TIE * (values[-1] - values[0])
        return (low.cpu() - near <= truth) & (truth <= high.cpu() + near)

    def _expected_errors(self, prediction: Prediction) -> Tensor:
        """(N,) by which residuals are divided."""
        value = at_least_float32(prediction.value)
        if self.kind == "residual":
            return torch.ones_like(value)
        if hasattr(self, "knots"):
            knots, spreads = self.knots.to(value.device), self.spreads.to(value.device)
            found = spreads[0].expand_as(value)
            for place in range(len(knots) - 1):
                low, wide = knots[place], knots[place + 1] - knots[place]
                step = spreads[place + 1] - spreads[place]
                found = found + step * ((value - low) / wide.clamp(min=1e-12)).clamp(0, 1)
            return found
        probabilities = at_least_float32(_of(prediction))
        values = torch.tensor(self.ranks.values, dtype=probabilities.dtype, device=value.device)
        mean = probabilities @ values
        variance = (probabilities * (values - mean.unsqueeze(1)) ** 2).sum(dim=1)
        return variance.sqrt() + 0.01 * (values[-1] - values[0])  # of a distribution that is sure of one rank

    def set_thresholds(self, answered: Answered, groups: np.ndarray | None = None) -> None:
        """Learn the thresholds of all levels that there are pictures enough for.

        Args:
            answered: pictures that have neither trained nor chosen anything of the model or of this, with predictions
                as `answer` gives them.
            groups: (N,) patients or subjects, see `conformal_threshold`.
        """
        scores = self.true_scores(answered).double()
        # Pictures that are calibrated on get the same score again, up to rounding, and are inside.
        reach = self.ranks.values[-1] - self.ranks.values[0] if self.kind == "residual" else 1.0
        for place in range(len(self.thresholds)):
            chosen = (answered.ranks == place if self.by_rank else torch.ones(len(scores), dtype=torch.bool)).numpy()
            named = None if groups is None else groups[chosen]
            self.counts[place] = int(chosen.sum()) if named is None else len(np.unique(named))
            for number, level in enumerate(LEVELS):
                if self.counts[place] >= least_number(level):
                    found = conformal_threshold(scores[chosen], level, named)
                    self.thresholds[place, number] = found + TIE * (reach + abs(found))


SCORES = {"rps": rps_scores, "aps": aps_scores, "shortest": shortest_scores}


def highest_level(number: int) -> float | None:
    """The highest of `LEVELS` that so many calibration pictures are enough for.

    >>> highest_level(9), highest_level(0)
    (0.9, None)
    """
    return max((level for level in LEVELS if least_number(level) <= number), default=None)


def bounds(ranks: Ranks) -> tuple[list[float], list[float]]:
    """(R,) lower and upper ends of what each rank stands for: its value, or the edges of its bin as far as there are.

    >>> bounds(Ranks((0, 15, 30), edges=(10, 20)))
    ([0.0, 10.0, 20.0], [10.0, 20.0, 30.0])
    """
    values = list(ranks.values)
    if ranks.edges is None:
        return values, values
    edges = list(ranks.edges)
    if len(edges) < len(values):
        edges = [values[0], *edges, values[-1]]
    return edges[:-1], edges[1:]


def _of(prediction: Prediction) -> Tensor:
    if prediction.probabilities is None:
        raise ValueError("intervals made of probabilities, of a method that has none")
    return prediction.probabilities


def _nearest_level(level: float) -> float | None:
    return next((each for each in LEVELS if abs(each - level) < 1e-6), None)


# ---- learning it


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
        ValueError: no pictures, a kind that needs probabilities for a method without.
    """
    if not len(choosing) or not len(held_out):
        raise ValueError("a calibration needs pictures to choose by and others for its thresholds")
    distribution = choosing.prediction.probabilities is not None
    if kind in OF_SETS and not distribution:
        raise ValueError(f"intervals of kind {kind} are made of probabilities, which this method has none of")
    scaling = _scaling(ranks, choosing)
    by_knots = not distribution and len(choosing) >= ENOUGH
    kinds: Sequence[IntervalKind] = (kind,) if kind != "auto" else OF_SETS if distribution else OF_VALUES
    if len(ranks) > MOST_RANKS:
        kinds = [each for each in kinds if each not in ("aps", "shortest")] or ["rps"]
    if not distribution and not by_knots:
        kinds = ["residual"]
    widths, candidates = {}, {}
    for each in kinds:
        candidate = Calibration(ranks, scaling.scaling, each, by_rank, 0, groups is not None)
        if each == "scaled" and by_knots:
            candidate = Calibration(ranks, scaling.scaling, each, by_rank, len(KNOTS), groups is not None)
            _learn_spreads(candidate, choosing)
        if scaling.scaling != "none":
            candidate.scale.copy_(scaling.scale)
            candidate.bias.copy_(scaling.bias)
        widths[each], candidates[each] = _mean_width(candidate, choosing, decoding), candidate
    chosen = min(widths, key=lambda each: widths[each])  # of equal ones the first
    calibration = candidates[chosen]
    after = replace(held_out, prediction=calibration.answer(held_out.prediction, decoding))
    calibration.set_thresholds(after, groups)
    about: dict[str, Any] = {
        "num": len(held_out),
        **({} if groups is None else {"groups": len(np.unique(groups))}),
        "scaling": scaling.scaling,
        **({"temperature": 1 / float(scaling.scale)} if scaling.scaling == "temperature" else {}),
        "kind": chosen,
        "by_rank": by_rank,
        "widths": {"level": CHOOSING_LEVEL, **widths},
        "least": int(calibration.counts.min()),
    }
    if distribution:
        about["before"] = quality(replace(held_out, prediction=decode(_of(held_out.prediction), ranks, decoding)))
        about["after"] = quality(after)
    return Calibrated(calibration, about)


def _scaling(ranks: Ranks, choosing: Answered) -> Calibration:
    """The scaling with the best ranked probability score on folds that it was not learnt from; none where pictures are
    few. It is learnt by the likelihood, which a single true rank of probability 0 decides, such as neighbours give."""
    probabilities = choosing.prediction.probabilities
    none = Calibration(ranks)
    if probabilities is None or len(choosing) < ENOUGH:
        return none
    logs = probabilities.double().clamp(min=FLOOR).log().numpy()
    truth = choosing.ranks.numpy()
    known: list[ScalingKind] = ["none", "temperature"]
    if len(ranks) <= FEW_RANKS and len(choosing) >= ENOUGH * len(ranks):
        known.append("vector")
    fold = np.random.default_rng(0).permutation(len(truth)) % FOLDS
    losses = {}
    for kind in known:
        parts = []
        for number in range(FOLDS):
            scale, bias = _fitted(kind, logs[fold != number], truth[fold != number])
            told = _softmax(logs[fold == number] * scale + bias)
            parts.append(rps_scores(told).numpy()[np.arange(len(told)), truth[fold == number]])
        losses[kind] = float(np.concatenate(parts).mean())
    best = min(known, key=lambda kind: losses[kind])
    if best == "none":
        return none
    found = Calibration(ranks, best)
    for buffer, value in zip((found.scale, found.bias), _fitted(best, logs, truth), strict=True):
        buffer.copy_(torch.from_numpy(np.atleast_1d(value)))
    return found


def _fitted(kind: ScalingKind, logs: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale and bias of the largest likelihood, slightly drawn to 1 and 0."""
    from scipy import optimize  # here, or who loads a model would wait for it

    number = logs.shape[1]
    shape = {"none": 0, "temperature": 1, "vector": number}[kind]
    if not shape:
        return np.ones(1), np.zeros(1)
    hot = np.eye(number)[truth]

    def loss(free: np.ndarray) -> tuple[float, np.ndarray]:
        scale, bias = free[:shape], free[shape:] if kind == "vector" else np.zeros(1)
        scores = logs * scale + bias
        excess = (_softmax(scores) - hot) / len(truth)
        by_scale = (excess * logs).sum(axis=0) if kind == "vector" else [(excess * logs).sum()]
        gradient = np.concatenate([by_scale, excess.sum(axis=0) if kind == "vector" else []])
        away = free - start
        return float(_losses(scores, truth).mean() + 1e-3 * (away**2).sum()), gradient + 2e-3 * away

    start = np.concatenate([np.ones(shape), np.zeros(shape if kind == "vector" else 0)])
    limits = [(0.02, 50.0)] * shape + [(-20.0, 20.0)] * (len(start) - shape)
    free = optimize.minimize(loss, start, jac=True, method="L-BFGS-B", bounds=limits).x
    return free[:shape], free[shape:] if kind == "vector" else np.zeros(1)


def _softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def _losses(scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(N,) cross-entropies."""
    return -np.log(_softmax(scores)[np.arange(len(truth)), truth].clip(min=1e-300))


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


def _mean_width(calibration: Calibration, choosing: Answered, decoding: Decoding) -> float:
    """Of the intervals on the pictures that they are made from, in the label's unit; of as high a level as there are
    pictures for."""
    level = max(
        (each for each in LEVELS if least_number(each) <= len(choosing) and each <= CHOOSING_LEVEL), default=0.5
    )
    answered = replace(choosing, prediction=calibration.answer(choosing.prediction, decoding))
    plain = Calibration.of(calibration.ranks, {**calibration.to_dict(), "by_rank": False, "grouped": False})
    assert plain is not None
    plain.load_state_dict({**calibration.state_dict(), "thresholds": plain.thresholds, "counts": plain.counts})
    plain.set_thresholds(answered)
    low, high = plain.interval(answered.prediction, level)
    return float((high - low).mean())


def quality(answered: Answered) -> dict[str, Any]:
    """How far probabilities mean what they say.

    Returns:
        `ece`: the expected calibration error of the likeliest rank's probability over 15 bins of equal width (Naeini
        et al., AAAI 2015); `rps`: the mean ranked probability score; `nll`; `mae` in the label's unit; `reliability`:
        of every bin that is not empty its mean `confidence`, its `accuracy` and its `num` of pictures.
    """
    probabilities = _of(answered.prediction).double()
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
        "rps": float(rps_scores(probabilities).gather(1, true).mean()),
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
        (beta-binomial: Vovk, "Conditional validity of inductive conformal predictors", ACML 2012); `by_rank`: num and
        coverage of every rank that occurs.
    """
    from scipy import stats

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
