"""How often the stars of a comparison are wrong: simulated comparisons with planted effects of pictures and seeds.

    python benchmarks/significance.py                   # the tables in results/significance, 6 minutes
    python benchmarks/significance.py --repeats 50      # a first look

An error is mean + picture + method x picture + method x seed + rest; all are normal. Rates are those of what a table
prints: the share of comparisons of EQUAL methods with at least one star (false positives), and the share of worse
methods that have one where all but the best are worse by the same (power). Compared are

* pictures: what tables had before: one-tailed paired t-test over pictures against the first row, * p < 0.05, ** after
  Holm's correction; seeds are averaged over;
* bootstrap: seeds are drawn with replacement, then pictures; two-sided percentile p-values, Holm's correction;
* Satterthwaite: the same variances as here, effective degrees of freedom in place of Behrens and Fisher's
  distribution, Holm's correction;
* rows alone: the p-values of `ordinalclip.results.significance.judge`, with Holm's correction for the rows only;
* here: its corrected p-values, which also know that the first row was picked: what tables print.

Designs: crossed (all seeds test the same pictures), nested (every seed has its own), splits (every seed draws a quarter
of one table). After each rate stands its 95 % binomial margin.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy
from scipy import stats

from ordinalclip.results.significance import LEVEL, Covariances, judge

SEED = 0
RESAMPLES = 500


@dataclass(frozen=True)
class World:
    """Standard deviations of what is planted, each method's own but for what cancels in differences."""

    seeds: int = 3
    pictures: int = 500  # per seed
    methods: int = 2
    design: str = "crossed"
    picture: float = 0.5  # method x picture
    seed: float = 0.05  # method x seed
    rest: float = 0.5  # method x picture x seed
    gap: float = 0.0  # of all methods but the first

    def draw(self, rng: np.random.Generator) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """By seed: (N, M) errors, and the (N,) pictures that they are on."""
        total = {"crossed": self.pictures, "nested": self.seeds * self.pictures, "splits": 4 * self.pictures}
        num = total[self.design]
        if self.design == "crossed":
            places = [np.arange(num)] * self.seeds
        elif self.design == "nested":
            places = list(np.arange(num).reshape(self.seeds, -1))
        else:
            places = [rng.permutation(num)[: self.pictures] for _ in range(self.seeds)]
        own = self.picture * rng.standard_normal((num, self.methods)) + rng.standard_normal((num, 1))
        means = self.seed * rng.standard_normal((self.seeds, self.methods)) + self.gap * (np.arange(self.methods) > 0)
        rest = self.rest * rng.standard_normal((self.seeds, self.pictures, self.methods))
        return [5 + own[place] + mean + each for place, mean, each in zip(places, means, rest, strict=True)], places


Stars = np.ndarray  # (M,) which methods have one


def holm(p_values: np.ndarray) -> np.ndarray:
    """P-values by Holm's step-down procedure (1979)."""
    order = np.argsort(p_values)
    corrected = np.maximum.accumulate(p_values[order] * np.arange(len(p_values), 0, -1))
    return corrected[np.argsort(order)].clip(max=1)


def starred(p_values: np.ndarray, first: int, corrected: bool = True) -> Stars:
    others = np.arange(len(p_values)) != first
    found = np.zeros(len(p_values), dtype=bool)
    found[others] = (holm(p_values[others]) if corrected else p_values[others]) < LEVEL
    return found


def over_pictures(errors: Sequence[np.ndarray], places: Sequence[np.ndarray]) -> np.ndarray:
    """One-tailed p-values against the first, pictures alone."""
    place = np.concatenate(places)
    sums = np.stack([np.bincount(place, column) for column in np.concatenate(errors).T], axis=1)
    values = sums[np.bincount(place) > 0]
    first = values.mean(axis=0).argmin()
    gaps = np.delete(values - values[:, [first]], first, axis=1)
    p_values = stats.ttest_1samp(gaps, 0, alternative="greater").pvalue
    return np.insert(p_values, first, 1.0)


def resampled(num: int, rng: np.random.Generator) -> np.ndarray:
    """(RESAMPLES, num) how often each of num rows is drawn with replacement."""
    rows = rng.integers(0, num, (RESAMPLES, num)) + num * np.arange(RESAMPLES)[:, None]
    return np.bincount(rows.ravel(), minlength=RESAMPLES * num).reshape(RESAMPLES, num).astype(np.float32)


def bootstrap(errors: Sequence[np.ndarray], places: Sequence[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Two-sided percentile p-values against the first; pictures that recur are drawn once for all seeds."""
    seeds, methods = len(errors), errors[0].shape[1]
    drawn = np.empty((RESAMPLES, seeds, methods))
    crossed = all(np.array_equal(place, places[0]) for place in places)
    for seed, values in enumerate(errors):
        if seed == 0 or not crossed:
            weights = resampled(len(values), rng)
        drawn[:, seed] = weights @ values.astype(np.float32) / len(values)
    chosen = rng.integers(0, seeds, (RESAMPLES, seeds))
    means = np.take_along_axis(drawn, chosen[..., None], axis=1).mean(axis=1)
    first = np.mean([values.mean(axis=0) for values in errors], axis=0).argmin()
    below = (means - means[:, [first]] <= 0).mean(axis=0)
    return np.maximum(2 * np.minimum(below, 1 - below), 2 / RESAMPLES)


def satterthwaite(errors: Sequence[np.ndarray], places: Sequence[np.ndarray]) -> np.ndarray:
    """Two-sided p-values against the first; the variances are those of `judge`."""
    found = Covariances.of(errors, places)
    means = np.mean([values.mean(axis=0) for values in errors], axis=0)
    first, unit, p_values = means.argmin(), np.eye(len(means)), np.ones(len(means))
    for k in np.delete(np.arange(len(means)), first):
        spread = found.spread(unit[k] - unit[first])
        seeds, images = spread.seeds**2, spread.images**2
        df = (seeds + images) ** 2 / (seeds**2 / spread.df_seeds + images**2 / spread.df_images)
        p_values[k] = 2 * stats.t.sf((means[k] - means[first]) / (seeds + images) ** 0.5, df)
    return p_values


def here(errors: Sequence[np.ndarray], places: Sequence[np.ndarray], simulations: int) -> tuple[np.ndarray, Stars]:
    """P-values of each pair alone, and the stars of a table."""
    names = [str(k) for k in range(errors[0].shape[1])]
    verdicts = judge({name: [values[:, k] for values in errors] for k, name in enumerate(names)}, places, simulations)
    p_values = np.asarray([1.0 if (p := verdicts[name].p) is None else p for name in names])
    return p_values, np.asarray([verdicts[name].is_worse for name in names])


TITLES = ["pictures *", "pictures **", "bootstrap", "Satterthwaite", "rows alone", "here"]


def stars(world: World, rng: np.random.Generator, simulations: int) -> np.ndarray:
    """(6, M) who has a star in one simulated comparison, by each of `TITLES`."""
    errors, places = world.draw(rng)
    first = int(np.mean([values.mean(axis=0) for values in errors], axis=0).argmin())
    old = over_pictures(errors, places)
    p_values, ours = here(errors, places, simulations)
    return np.stack(
        [
            starred(old, first, corrected=False),
            starred(old, first),
            starred(bootstrap(errors, places, rng), first),
            starred(satterthwaite(errors, places), first),
            starred(p_values, first),
            ours,
        ]
    )


def rates(world: World, repeats: int, simulations: int) -> np.ndarray:
    """(6,) shares, in per cent: of comparisons with a star where all methods are equal, else of worse methods."""
    rng = np.random.default_rng(SEED)
    found = np.stack([stars(world, rng, simulations) for _ in range(repeats)])
    return 100 * (found.any(axis=2) if world.gap == 0 else found[:, :, 1:].mean(axis=2)).mean(axis=0)


def row(cells: Sequence[object], world: World, repeats: int, simulations: int) -> None:
    found = rates(world, repeats, simulations)
    margins = 196 * np.sqrt(found / 100 * (1 - found / 100) / repeats)
    shown = [f"{rate:.1f} ± {margin:.1f}" for rate, margin in zip(found, margins, strict=True)]
    print(f"| {' | '.join(map(str, [*cells, *shown]))} |", flush=True)


def header(cells: Sequence[str]) -> None:
    print(f"\n| {' | '.join([*cells, *TITLES])} |\n|{'---|' * len(cells)}{'---:|' * len(TITLES)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=300, help="comparisons per row")
    parser.add_argument("--simulations", type=int, default=400, help="of `judge`, per comparison")
    arguments = parser.parse_args()
    options, began = (arguments.repeats, arguments.simulations), time.process_time()
    print(
        f"{platform.machine()}, {os.cpu_count()} cores; Python {platform.python_version()}, numpy {np.__version__}, "
        f"scipy {scipy.__version__}, seed {SEED}, {options[0]} comparisons per row, {options[1]} simulations in each"
    )
    print("\nFalse positives, %: equal methods, the seed moves each method's mean (nominal 5).")
    header(["design", "methods", "seeds", "pictures"])
    for design, sizes in (("crossed", (60, 2000)), ("nested", (500,)), ("splits", (500,))):
        for methods in (2, 10):
            for seeds in (3, 5) if design == "splits" else (3, 5, 10):
                for pictures in sizes:
                    world = World(seeds, pictures, methods, design)
                    row([design, methods, seeds, pictures], world, *options)

    print("\nFalse positives, %, by what the variance of a mean consists of; crossed, 500 pictures.")
    header(["variance of a mean", "methods", "seeds"])
    plain = World(rest=0.0)
    for name, share in (("pictures alone", 0.0), ("half of it seeds", 0.5), ("nine tenths seeds", 0.9)):
        for methods in (2, 10):
            for seeds in (3, 5):
                by_pictures = plain.picture**2 / plain.pictures
                seed = (share / (1 - share) * by_pictures * seeds) ** 0.5
                rest = plain.picture if share == 0 else 0.0
                world = replace(plain, methods=methods, seeds=seeds, seed=seed, rest=rest)
                row([name, methods, seeds], world, *options)

    print("\nPower, %: all methods but one are worse by 0.2, four standard deviations of a method's seed effect.")
    header(["design", "methods", "seeds", "pictures"])
    for methods in (2, 10):
        for seeds in (3, 5, 10):
            row(["crossed", methods, seeds, 500], World(seeds, 500, methods, gap=0.2), *options)
    print(f"\n{time.process_time() - began:.0f} s of processor time.")


if __name__ == "__main__":
    main()
