"""What a model keeps of labelled pictures that neither trained nor chose it: probabilities that mean what they say, and
intervals that keep their promise; buffers of the model, so that they go where it goes."""

from __future__ import annotations

from dataclasses import dataclass
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
FLOOR = 1e-12  # probabilities below are taken for it where they are scaled
BEYOND = 1e30  # the threshold of a level for which there were too few pictures: everything is inside


@dataclass(frozen=True)
class Answered:
    """Answers to N labelled pictures.

    Attributes:
        prediction: of the head, or as `Calibration.answer` makes of it.
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

    @property
    def levels(self) -> tuple[float, ...]:
        """Those of `LEVELS` that there were pictures enough for."""
        least = int(self.counts.min())
        return tuple(level for level in LEVELS if least_number(level) <= least)

    def keeps(self, level: float) -> bool:
        """Whether there is an interval of this level."""
        return any(abs(each - level) < 1e-6 for each in self.levels)

    def check_level(self, level: float) -> None:
        """Raises:
        ValueError: a level that is none of `LEVELS`; TooFewError: one that takes more calibration pictures."""
        known = isinstance(level, int | float) and not isinstance(level, bool)
        if not known or not any(abs(each - level) < 1e-6 for each in LEVELS):
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
        is always inside, if it lies between two ranks as an end.

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
        answer = at_least_float32(prediction.value)
        if self.kind in OF_VALUES and not self.by_rank:
            reach = threshold * self._expected_errors(prediction)
            low = torch.maximum(answer - reach, torch.minimum(answer, values[0]))
            return low, torch.minimum(answer + reach, torch.maximum(answer, values[-1]))
        first, last = ends(self.scores(prediction) <= threshold, prediction.rank)
        lower, upper = (torch.tensor(edge, device=values.device) for edge in bounds(self.ranks))
        return torch.minimum(lower[first], answer), torch.maximum(upper[last], answer)

    def scores(self, prediction: Prediction) -> Tensor:
        """(N, R): how little plausible every rank is."""
        if self.kind in OF_VALUES:
            value = at_least_float32(prediction.value)
            values = torch.tensor(self.ranks.values, dtype=value.dtype, device=value.device)
            distance = (value.unsqueeze(1) - values).abs()
            return distance / self._expected_errors(prediction).unsqueeze(1)
        probabilities = at_least_float32(likely(prediction))
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
        probabilities = at_least_float32(likely(prediction))
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


def likely(prediction: Prediction) -> Tensor:
    """The probabilities, of a method that has them."""
    if prediction.probabilities is None:
        raise ValueError("intervals made of probabilities, of a method that has none")
    return prediction.probabilities
