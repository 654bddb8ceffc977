"""Conformal intervals: sets of neighbouring ranks, and ranges of values, that hold the truth as often as they promise.

Split conformal prediction (Vovk et al., "Algorithmic Learning in a Random World", 2005): whatever the model, and for
any finite number n of calibration pictures, the true rank of a new picture is among those whose score is at most the
ceil((n + 1) level)-th smallest calibration score, with a probability of at least the level, if new and calibration
pictures are drawn alike.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

SetKind = Literal["rps", "aps", "shortest"]
TIE = 1e-6  # masses so close are equal: rounding must not decide which of two ranks comes first
MOST_RANKS = 256  # for `aps` and `shortest`, which compare every rank with every other


class TooFewError(ValueError):
    """A calibration set that is too small for a level; `needed` is the number that it would take."""

    def __init__(self, level: float, needed: int, given: int, what: str = "calibration pictures"):
        super().__init__(f"an interval of {level:g} takes at least {needed} {what}, there are {given}")
        self.level, self.needed, self.given = level, needed, given


def rps_scores(probabilities: ArrayLike | Tensor) -> Tensor:
    """The ranked probability score of every rank as if it were the true one: sum over k of (F_k - [k >= y])^2, with F
    the cumulative distribution. It falls to the median and rises after it, so that the ranks of at most any threshold
    are neighbours (Haas et al., UAI 2026, arXiv 2606.24959).

    Args:
        probabilities: (N, R), rows summing to 1.

    Returns:
        (N, R); smaller is more plausible.

    >>> [round(score, 2) for score in rps_scores([[0.1, 0.7, 0.2]])[0].tolist()]
    [0.85, 0.05, 0.65]
    """
    given = _checked(probabilities)
    cumulative = given.cumsum(dim=1)[:, :-1]
    nothing = torch.zeros_like(given[:, :1])
    below = torch.cat([nothing, (cumulative**2).cumsum(dim=1)], dim=1)
    above = torch.cat([((1 - cumulative) ** 2).flip(1).cumsum(dim=1).flip(1), nothing], dim=1)
    return below + above


def aps_scores(probabilities: ArrayLike | Tensor) -> Tensor:
    """The probability that is in an ordinal adaptive set before it takes up a rank: it begins with the likeliest and
    goes on with the likelier of its two neighbours, the lower one where they are equal (Lu et al., MICCAI 2022).

    Of two sides the one waits whose nearer ranks are less likely, so that a rank's turn is told by the least
    probability on its way from the mode, and all are found at once.

    Args:
        probabilities: (N, R), R at most `MOST_RANKS`.

    Returns:
        (N, R), 0 for the likeliest rank.
    """
    given = _few_ranks(_checked(probabilities))
    places = torch.arange(given.shape[1], device=given.device)
    mode = given.argmax(dim=1).view(-1, 1, 1)
    rank, other = places.view(1, -1, 1), places.view(1, 1, -1)
    on_the_way = ((other > mode) & (other <= rank)) | ((other < mode) & (other >= rank))
    narrowest = torch.where(on_the_way, given.unsqueeze(1), torch.inf).amin(dim=2)  # (N, R), infinite for the mode
    mine, theirs = narrowest.unsqueeze(2), narrowest.unsqueeze(1)
    across_left = (other < mode) & (rank > mode) & (theirs >= mine)
    across_right = (other > mode) & (rank < mode) & (theirs > mine)
    earlier = (on_the_way & (other != rank)) | across_left | across_right | ((other == mode) & (rank != mode))
    return (earlier * given.unsqueeze(1)).sum(dim=2)


def shortest_scores(probabilities: ArrayLike | Tensor) -> Tensor:
    """The mass that the shortest sets have to have more than before one of them holds a rank.

    The shortest set of a mass that holds the mode (arXiv 2511.16845) need not hold the shortest of a smaller mass, on
    which the promise rests; their running union does, and its threshold sets are those of these scores.

    Args:
        probabilities: (N, R), R at most `MOST_RANKS`.

    Returns:
        (N, R), 0 for the likeliest rank.
    """
    given = _few_ranks(_checked(probabilities))
    first, mass = _windows(given)
    number = given.shape[1]
    places = torch.arange(number, device=given.device)
    length = (places + 1).view(1, -1, 1)
    inside = (first.unsqueeze(2) <= places) & (places < first.unsqueeze(2) + length)  # (N, length, rank)
    before = torch.cat([torch.zeros_like(mass[:, :1]), mass[:, :-1]], dim=1)
    return torch.where(inside, before.unsqueeze(2), torch.inf).amin(dim=1)


def conformal_threshold(scores: ArrayLike | Tensor, level: float, groups: ArrayLike | None = None) -> float:
    """The threshold below which the true label of a new picture lies with at least this probability.

    Args:
        scores: (n,) of calibration pictures, each of its own true label.
        level: between 0 and 1, e.g. 0.9.
        groups: (n,) what pictures are of the same patient or subject, which are not independent; new pictures are of a
            new group. Then all groups weigh alike, whatever their size (hierarchical conformal prediction: Dunn et al.,
            JASA 2022; Lee et al., arXiv 2306.06342).

    Returns:
        the ceil((n + 1) level)-th smallest score; with groups the smallest score up to which their mean shares come to
        the level, one more group counting as if it lay above all.

    Raises:
        TooFewError: so many are needed; ValueError: another level, scores that are not finite.

    >>> conformal_threshold([0.4, 0.1, 0.3, 0.2], 0.6)
    0.3
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level!r}")
    given = _tensor(scores).detach().cpu().double().numpy().ravel()
    if not np.isfinite(given).all():
        raise ValueError("scores of calibration pictures must be finite")
    needed = least_number(level)
    if groups is None:
        if len(given) < needed:
            raise TooFewError(level, needed, len(given))
        return float(np.sort(given)[math.ceil((len(given) + 1) * level - 1e-9) - 1])
    _, member, sizes = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    if len(member) != len(given):
        raise ValueError(f"{len(given)} scores and {len(member)} groups; one each is wanted")
    if len(sizes) < needed:
        raise TooFewError(level, needed, len(sizes), "calibration groups")
    order = np.argsort(given, kind="stable")
    reached = np.cumsum(1 / sizes[member][order]) / (len(sizes) + 1)
    return float(given[order][np.searchsorted(reached, level - 1e-9)])


def least_number(level: float) -> int:
    """How many calibration pictures a level takes at least.

    >>> least_number(0.9), least_number(0.99)
    (9, 99)
    """
    return max(1, math.ceil(level / (1 - level) - 1e-9))


def contiguous_set(probabilities: ArrayLike | Tensor, threshold: float, kind: SetKind = "rps") -> tuple[Tensor, Tensor]:
    """The set of neighbouring ranks that a threshold means.

    Args:
        probabilities: (N, R), or (R,) for one picture.
        threshold: "rps": the largest score, see `rps_scores`; else the probability that a set has to come to.
        kind: "rps"; "aps", see `aps_scores`; or "shortest", the shortest that holds the likeliest rank, of several the
            likeliest, then the lowest. As published, such sets are not nested, so that no threshold keeps a promise;
            those that models give are those of `shortest_scores`.

    Returns:
        lowest and highest rank index (N,), both included. Where no rank is below the threshold it is the likeliest
        alone, or that of the smallest score.

    Raises:
        ValueError: another kind, probabilities of another shape or that are not finite.
    """
    if kind not in get_args(SetKind):
        raise ValueError(f"kind must be rps, aps or shortest, got {kind!r}")
    given = _tensor(probabilities)
    if given.ndim == 1:
        low, high = contiguous_set(given.unsqueeze(0), threshold, kind)
        return low[0], high[0]
    given = _checked(given)
    if kind == "shortest":
        first, mass = _windows(_few_ranks(given))
        short = (mass < threshold - TIE).sum(dim=1).clamp(max=given.shape[1] - 1)  # masses grow with the length
        low = first.gather(1, short.unsqueeze(1))[:, 0]
        return low, low + short
    scores = rps_scores(given) if kind == "rps" else aps_scores(given)
    return ends(scores <= (threshold if kind == "rps" else threshold - TIE), scores.argmin(dim=1))


def ends(accepted: Tensor, always: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest accepted rank.

    Args:
        accepted: (N, R) bool.
        always: (N,) ranks that are accepted whatever is said of them.
    """
    number = accepted.shape[1]
    places = torch.arange(number, device=accepted.device)
    held = accepted | (places == always.unsqueeze(1))
    low = torch.where(held, places, number).amin(dim=1)
    return low, torch.where(held, places, -1).amax(dim=1)


def _windows(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Of every length 1 .. R the likeliest run of ranks that holds the mode: where it begins, and its mass, both
    (N, R)."""
    number = probabilities.shape[1]
    places = torch.arange(number, device=probabilities.device)
    begin, length = places.view(1, 1, -1), (places + 1).view(1, -1, 1)
    end = begin + length
    total = torch.cat([torch.zeros_like(probabilities[:, :1]), probabilities.cumsum(dim=1)], dim=1)
    mass = total[:, end[0].clamp(max=number)] - total[:, :-1].unsqueeze(1)
    mode = probabilities.argmax(dim=1).view(-1, 1, 1)
    mass = torch.where((end <= number) & (begin <= mode) & (mode < end), mass, -1.0)
    best = mass.amax(dim=2)
    return (mass >= best.unsqueeze(2) - TIE).int().argmax(dim=2), best


def _tensor(given: Any) -> Tensor:
    """A tensor in the precision that it has; numbers of Python in theirs, float64."""
    return given if isinstance(given, Tensor) else torch.from_numpy(np.array(given))


def _checked(probabilities: Any) -> Tensor:
    given = _tensor(probabilities)
    if given.ndim != 2 or given.shape[1] < 2:
        raise ValueError(f"probabilities must be (N, R), R at least 2, got {tuple(given.shape)}")
    return given if given.is_floating_point() else given.float()


def _few_ranks(probabilities: Tensor) -> Tensor:
    if probabilities.shape[1] > MOST_RANKS:
        raise ValueError(
            f"aps and shortest sets are of at most {MOST_RANKS} ranks, got {probabilities.shape[1]}; use rps"
        )
    return probabilities
