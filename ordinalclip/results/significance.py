"""Whether one method's errors are larger than another's beyond the pictures and the seeds at hand.

docs/comparisons.md says why this test and not another; benchmarks/significance.py measures how often it is wrong.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike
from scipy import special
from scipy.interpolate import RegularGridInterpolator
from scipy.optimize import brentq

LEVEL = 0.05  # below it a difference counts
MIN_SEEDS = 3  # below it nothing is said about methods: two seeds have one difference, and no spread of it
SIMULATIONS = 10_000
BLOCK = 1000  # of them at a time
MOST = 1e4  # standard errors beyond which p-values are not told apart


@dataclass(frozen=True)
class Spread:
    """What a mean over seeds and pictures would vary by, were both drawn anew.

    Attributes:
        seeds: standard error by what differs between the seeds: training, and pictures that only one of them tests.
        images: standard error by the pictures that seeds share, which no difference between seeds can show.
        df_seeds, df_images: degrees of freedom of both estimates.
    """

    seeds: float
    images: float
    df_seeds: int
    df_images: int

    def p_value(self, difference: float) -> float:
        """Two-sided: how likely a mean so far from 0 is if it is 0 in truth."""
        total = float(np.hypot(self.seeds, self.images))
        if total == 0:  # t would be 0 / 0, or infinite
            return 1.0 if difference == 0 else 0.0
        share = (self.seeds / total) ** 2
        return float(behrens_fisher(abs(difference) / total, share, self.df_seeds, self.df_images))

    def margin(self) -> float:
        """Half the width of the 95 % interval around the mean: the values that `p_value` does not reject."""
        total = float(np.hypot(self.seeds, self.images))
        if total == 0:
            return 0.0
        share = (self.seeds / total) ** 2
        most = special.stdtrit(min(self.df_seeds, self.df_images), 1 - LEVEL / 2)  # quantiles grow as df fall

        def excess(t: float) -> float:
            return float(behrens_fisher(t, share, self.df_seeds, self.df_images)) - LEVEL

        return total * float(brentq(excess, 0, 1.5 * most))


@dataclass(frozen=True)
class Verdict:
    """A method's absolute errors beside those of the first, the one with the smallest mean.

    Attributes:
        mae: mean over the seeds of the mean over pictures.
        interval: its 95 % interval: over seeds and pictures from `MIN_SEEDS` seeds on, else over pictures.
        difference: to the mean of the first.
        difference_interval: its 95 % interval, over the same; of this pair alone.
        spread: of the difference; None for the first, and under `MIN_SEEDS` seeds.
        p: two-sided, of this pair alone; None where there is no spread.
        p_corrected: the same for all comparisons with the first, and for that it was picked by these errors.
    """

    mae: float
    interval: tuple[float, float]
    difference: float
    difference_interval: tuple[float, float]
    spread: Spread | None = None
    p: float | None = None
    p_corrected: float | None = None

    @property
    def is_worse(self) -> bool:
        """Whether the errors are larger than the first's beyond these seeds and pictures."""
        return self.p_corrected is not None and self.p_corrected < LEVEL


def judge(
    errors: Mapping[str, Sequence[np.ndarray]], images: Sequence[Sequence[Hashable]], simulations: int = SIMULATIONS
) -> dict[str, Verdict]:
    """Compare every method with the one that has the smallest mean error.

    Args:
        errors: by method, for every seed the (N_s,) absolute errors of its run; seeds in the same order for all.
        images: for every seed the N_s images they are on; what is equal in two seeds is the same picture.
        simulations: comparisons of equal methods by which p-values are corrected.

    Returns:
        verdicts by method, the smallest mean first.

    Raises:
        ValueError: methods with other seeds or numbers of images, or fewer than two images under a seed.
    """
    sizes = [len(each) for each in images]
    given = {name: [len(values) for values in runs] for name, runs in errors.items()}
    if any(lengths != sizes for lengths in given.values()) or min(sizes, default=0) < 2:
        raise ValueError(f"every method needs errors on the same images, two at least per seed, got {given} of {sizes}")
    by_seed = [np.stack([runs[seed] for runs in errors.values()], axis=1) for seed in range(len(sizes))]  # (N_s, M)
    covariances = Covariances.of(by_seed, _places(images))
    means = np.stack([values.mean(axis=0) for values in by_seed])  # (S, M)
    maes, unit = means.mean(axis=0), np.eye(len(errors))
    order = np.argsort(maes, kind="stable").tolist()
    gaps = maes - maes[order[0]]
    spreads = [covariances.spread(row - unit[order[0]]) for row in unit]
    p = np.asarray([spread.p_value(gap) for spread, gap in zip(spreads, gaps, strict=True)])
    decided = len(sizes) >= MIN_SEEDS
    corrected = _corrected(p, means, covariances, simulations) if decided else p
    verdicts = {}
    for k in order:
        compared = decided and k != order[0]
        verdicts[list(errors)[k]] = Verdict(
            mae=float(maes[k]),
            interval=_around(maes[k], covariances.spread(unit[k]).margin(), least=0.0),
            difference=float(gaps[k]),
            difference_interval=_around(gaps[k], spreads[k].margin()),
            spread=spreads[k] if compared else None,
            p=float(p[k]) if compared else None,
            p_corrected=float(corrected[k]) if compared else None,
        )
    return verdicts


@dataclass(frozen=True)
class Covariances:
    """Of the mean errors of M methods: (M, M) by what differs between seeds and by pictures that seeds share."""

    seeds: np.ndarray
    images: np.ndarray
    df_seeds: int
    df_images: int

    @classmethod
    def of(cls, by_seed: Sequence[np.ndarray], places: Sequence[np.ndarray]) -> Covariances:
        """Estimate them.

        An error is a method's mean, plus an effect of the seed, of the image, and a rest; all random. Say y_s is the
        mean under seed s and y that of all S. The y_s vary by seed, image and rest together, but what is shared pulls
        them the same way: Var(y) = E(variance of the y_s) / S + mean over s != t of Cov(y_s, y_t). The second is the
        variance of the image effect, which products of errors on one image under two seeds estimate, times the share
        of images in common. Where all seeds test the same images it is the (MS_image - MS_rest) / (images x seeds)
        of a two-way analysis of variance, where they share none it is 0.

        Args:
            by_seed: for every seed (N_s, M) errors.
            places: for every seed (N_s,) which image each is on, 0 to U - 1.
        """
        num_seeds, num_images = len(by_seed), 1 + max(int(each.max()) for each in places)
        if num_seeds < MIN_SEEDS:  # all that is known is how these runs vary over pictures
            given = np.concatenate(by_seed)
            means = by_image(np.concatenate(places), given, num_images)
            covariance = np.atleast_2d(np.cov(means, rowvar=False)) / num_images
            return cls(np.zeros_like(covariance), covariance, 1, num_images - 1)
        means = np.stack([values.mean(axis=0) for values in by_seed])
        seeds = np.atleast_2d(np.cov(means, rowvar=False)) / num_seeds
        counts = np.stack([np.bincount(each, minlength=num_images) for each in places]).astype(float)  # (S, U)
        sums = [
            _sums(each, values - values.mean(axis=0), num_images) for each, values in zip(places, by_seed, strict=True)
        ]
        total = np.sum(sums, axis=0)  # (U, M)
        products = total.T @ total - sum(each.T @ each for each in sums)  # over ordered pairs of different seeds
        sizes = counts.sum(axis=1)
        shared = counts @ counts.T  # (S, S) pairs of errors on one image
        part = shared / np.outer(sizes, sizes)
        pulled = counts @ (counts**2).T / sizes  # [s, t]: what centring under seed t takes away
        expected = shared - pulled - pulled.T + part * shared
        others = ~np.eye(num_seeds, dtype=bool)
        image_effect = products / expected[others].sum() if expected[others].sum() > 0 else np.zeros_like(products)
        recurring = int(((counts > 0).sum(axis=0) > 1).sum())
        return cls(seeds, image_effect * part[others].mean(), num_seeds - 1, max(1, recurring - 1))

    def spread(self, contrast: np.ndarray) -> Spread:
        """Of a sum of means with these (M,) weights."""
        seeds, images = (max(0.0, float(contrast @ each @ contrast)) for each in (self.seeds, self.images))
        return Spread(seeds**0.5, images**0.5, self.df_seeds, self.df_images)

    def own(self) -> tuple[np.ndarray, np.ndarray]:
        """(M,) variances of each method's mean by seeds and by images, without what all methods have in common."""
        num = len(self.seeds)
        centring = np.eye(num) - 1 / num
        seeds, images = (
            np.diag(centring @ each @ centring).clip(min=0) * num / (num - 1) for each in (self.seeds, self.images)
        )
        return seeds, images


def behrens_fisher(t: ArrayLike, share: ArrayLike, df_seeds: int, df_images: int) -> np.ndarray:
    """P(|sqrt(share) A + sqrt(1 - share) B| >= t), A and B independent of Student's t with these degrees of freedom.

    That is the p-value of Behrens (1929) and Fisher (1935) for a mean over its standard error, whose square is the sum
    of two independent estimates; `share` is the part of the first. Where one is 0 it is the t-test with the other.

    Args:
        t, share: (...) of one shape; t >= 0, share in [0, 1].

    >>> round(float(behrens_fisher(4.303, 1.0, 2, 100)), 3), round(float(behrens_fisher(1.984, 0.0, 2, 100)), 3)
    (0.05, 0.05)
    """
    far, part = np.asarray(t, dtype=np.float64)[..., None], np.asarray(share, dtype=np.float64)[..., None]
    nodes = np.linspace(-6, 6, 401)  # of a normal variable that B is a monotone function of
    weights = np.exp(-(nodes**2) / 2) / np.exp(-(nodes**2) / 2).sum()
    by_images = np.sqrt(1 - part) * special.stdtrit(df_images, special.ndtr(nodes))
    by_seeds = np.sqrt(np.maximum(part, 1e-9))
    tails = 2 * special.stdtr(df_seeds, (by_images - far) / by_seeds)  # both: A and B are symmetric
    alone = 2 * special.stdtr(df_images, -far)  # the sum over nodes would meet a step
    return np.where(part > 0, (tails * weights).sum(axis=-1, keepdims=True), alone)[..., 0]


def _corrected(p: np.ndarray, means: np.ndarray, covariances: Covariances, simulations: int) -> np.ndarray:
    """P-values of all comparisons with the first: how often the smallest would be as small, were no method better.

    The whole procedure is repeated on simulated comparisons, picking the first and testing the others against it
    included. In them all methods are equal; their own effects of seeds and images are normal and independent with the
    variances found (a parametric bootstrap; Krishnamoorthy, Lu and Mathew, 2007, for means of unequal variance).
    """
    num_seeds, num = means.shape
    if num == 1:
        return p
    rng = np.random.default_rng(0)
    of_seeds, of_images = covariances.own()
    scale = np.sqrt(of_seeds * num_seeds)
    log_p = _log_p(covariances.df_seeds, int(float(f"{covariances.df_images:.2g}")))  # splits differ by a few images
    smallest = np.empty(simulations)
    for begin in range(0, simulations, BLOCK):
        rows = np.arange(min(BLOCK, simulations - begin))
        drawn = scale * rng.standard_normal((len(rows), num_seeds, num))
        drawn += (np.sqrt(of_images) * rng.standard_normal((len(rows), num)))[:, None]
        first = drawn.mean(axis=1).argmin(axis=1)
        gaps = drawn - drawn[rows, :, first][..., None]
        seeds, images = gaps.var(axis=1, ddof=1) / num_seeds, of_images + of_images[first][:, None]
        total = np.maximum(seeds + images, np.finfo(float).tiny)
        t = np.abs(gaps.mean(axis=1)) / np.sqrt(total)
        found = log_p(np.stack([t.clip(max=MOST), seeds / total], axis=-1))
        found[rows, first] = 0
        smallest[begin : begin + len(rows)] = np.exp(found.min(axis=1))
    exceeded = (1 + np.searchsorted(np.sort(smallest), p, side="right")) / (1 + simulations)
    return np.maximum(p, exceeded)


@lru_cache(maxsize=8)
def _log_p(df_seeds: int, df_images: int) -> RegularGridInterpolator:
    """The logarithm of `behrens_fisher`, interpolated: it is asked for simulations x methods times."""
    t, share = np.concatenate([[0.0], np.geomspace(0.1, MOST, 120)]), np.linspace(0, 1, 33) ** 4
    far, part = np.meshgrid(t, share, indexing="ij")
    grid = behrens_fisher(far, part, df_seeds, df_images)
    return RegularGridInterpolator((t, share), np.log(np.maximum(grid, np.finfo(float).tiny)))


def by_image(places: np.ndarray, errors: np.ndarray, num_images: int) -> np.ndarray:
    """One error per image of runs that test some images several times: errors on one image are not independent.

    Args:
        places: (N,) which of `num_images` each error is on.
        errors: (N, M).

    Returns:
        (num_images, M) sums over an image, over the mean number of errors per image, so that their mean is that of all.

    >>> by_image(np.asarray([0, 1, 0]), np.asarray([[1.0], [5.0], [3.0]]), 2).ravel()
    array([2.66666667, 3.33333333])
    """
    return _sums(places, errors, num_images) * num_images / len(errors)


def _sums(places: np.ndarray, values: np.ndarray, num_images: int) -> np.ndarray:
    """(U, M) sums of (N, M) values by image."""
    return np.stack([np.bincount(places, column, minlength=num_images) for column in values.T], axis=1)


def _places(images: Sequence[Sequence[Hashable]]) -> list[np.ndarray]:
    """Images by number, in order of their first appearance."""
    known: dict[Hashable, int] = {}
    return [np.asarray([known.setdefault(image, len(known)) for image in each], dtype=np.int64) for each in images]


def _around(center: float, margin: float, least: float = -np.inf) -> tuple[float, float]:
    return max(float(center - margin), least), float(center + margin)
