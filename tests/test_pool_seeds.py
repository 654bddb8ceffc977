"""Seeds of which only the table is kept, and others with all their errors, against the test on the errors of all."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ordinalclip.results.significance import judge

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
METHODS = {"good": 0.0, "middling": 0.05, "bad": 0.15}


@pytest.fixture(scope="module")
def script():
    """It imports its neighbour."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import pool_seeds

        yield pool_seeds
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def errors():
    """Five seeds that test 300 of 600 pictures each; what a picture and what a seed does differs between methods."""
    rng = np.random.default_rng(0)
    pictures = rng.normal(0, 0.3, (600, 3))
    frames = []
    for seed in range(1, 6):
        images = rng.choice(600, 300, replace=False)
        noise = rng.normal(0, 0.2, (300, 3)) + rng.normal(0, 0.03, 3)
        values = 1 + np.asarray([*METHODS.values()]) + pictures[images] + noise
        rows = {"variant": "", "seed": seed, "image": images.astype(str), "label": 1.0}
        frames.append(pd.DataFrame({**rows, **dict(zip(METHODS, values.T, strict=True))}))
    return pd.concat(frames, ignore_index=True)


def verdicts_of(errors, methods=tuple(METHODS)):
    seeds = [rows for _, rows in errors.groupby("seed")]
    return judge(
        {name: [rows[name].to_numpy() for rows in seeds] for name in methods}, [rows["image"] for rows in seeds]
    )


@pytest.fixture(scope="module")
def table(errors):
    """Of seeds 1 to 3, as results.csv has it."""
    rows = {
        name: {
            "seeds": 3,
            "mae": found.mae,
            "difference_se_seeds": found.spread and found.spread.seeds,
            "difference_se_images": found.spread and found.spread.images,
            "df_images": found.spread and found.spread.df_images,
        }
        for name, found in verdicts_of(errors[errors["seed"] <= 3]).items()
    }
    return pd.DataFrame(rows).T


@pytest.mark.parametrize("pair", [("good", "middling"), ("good", "bad"), ("bad", "good")])
def test_a_pair_with_the_first_row_is_exact_over_seeds(script, errors, table, pair):
    assert table.index[0] == "good"
    found = script.pair_of(table, errors[errors["seed"] > 3], *pair)
    other = next(name for name in pair if name != "good")
    exact = verdicts_of(errors, ("good", other))[other]
    assert abs(found.mean) == pytest.approx(exact.difference)
    assert np.sign(found.mean) == (1 if pair[0] == "good" else -1)
    assert found.spread.seeds == pytest.approx(exact.spread.seeds)
    assert found.spread.df_seeds == exact.spread.df_seeds == 4
    assert found.spread.images == pytest.approx(exact.spread.images, rel=0.5)  # both estimate it, of 3 and of 5 seeds
    assert not found.bounded


def test_of_two_others_no_smaller_spread_is_claimed(script, errors, table):
    found = script.pair_of(table, errors[errors["seed"] > 3], "middling", "bad")
    exact = verdicts_of(errors, ("middling", "bad"))["bad"]
    assert found.mean == pytest.approx(exact.difference)
    assert found.spread.seeds >= exact.spread.seeds
    assert found.spread.images >= exact.spread.images
    assert found.bounded


def test_what_it_cannot_tell_apart_is_refused(script, errors, table):
    late = errors[errors["seed"] > 3]
    for wrong, given in (
        (table.assign(seeds=2), late),
        (pd.concat([table, table]), late),
        (table, pd.concat([late, late.assign(variant="10 %")])),
    ):
        with pytest.raises(ValueError, match="a table without variants"):
            script.pair_of(wrong, given, "good", "bad")
