"""Conformal sets: published values, plain loops, an independent library, and the promise itself."""

import math

import numpy as np
import pytest
import torch
from mapie.regression import SplitConformalRegressor
from sklearn.linear_model import LinearRegression

from ordinalclip.intervals import (
    TooFewError,
    aps_scores,
    conformal_threshold,
    contiguous_set,
    least_number,
    rps_scores,
    shortest_scores,
)

PUBLISHED = (0.05, 0.10, 0.30, 0.05, 0.35, 0.10, 0.05)


def distributions(number, ranks, seed=0, coarse=False):
    rng = np.random.default_rng(seed)
    weights = rng.integers(0, 4, (number, ranks)) + 0.5 * rng.integers(0, 2, (number, 1)) if coarse else None
    weights = (
        rng.gamma(0.4, size=(number, ranks)) + 1e-9 if weights is None else weights + (weights.sum(1) == 0)[:, None]
    )
    return weights / weights.sum(axis=1, keepdims=True)


def test_scores_of_the_published_example():
    found = rps_scores(torch.tensor([PUBLISHED], dtype=torch.float64))[0]
    assert found.tolist() == pytest.approx([2.2025, 1.3025, 0.6025, 0.5025, 0.5025, 1.2025, 2.1025], abs=1e-9)


@pytest.mark.parametrize(
    ("kind", "mass", "ends"),
    [
        ("aps", 0.5, (3, 5)),
        ("shortest", 0.5, (2, 4)),
        ("aps", 0.6, (2, 5)),
        ("shortest", 0.6, (2, 4)),
        ("aps", 0.9, (1, 5)),
        ("shortest", 0.9, (1, 5)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sets_of_the_published_example(kind, mass, ends, dtype):
    low, high = contiguous_set(torch.tensor(PUBLISHED, dtype=dtype), mass, kind)
    assert (int(low), int(high)) == ends


def test_rps_scores_by_a_plain_loop():
    given = distributions(40, 6)
    expected = [[sum((p[: k + 1].sum() - (k >= y)) ** 2 for k in range(5)) for y in range(6)] for p in given]
    np.testing.assert_allclose(rps_scores(given), expected, atol=1e-12)


@pytest.mark.parametrize("coarse", [False, True])
def test_adaptive_sets_by_a_plain_loop(coarse):
    """One neighbour after the other, as the method is written down, ties to the left."""
    for p in distributions(400, 7, coarse=coarse):
        low = high = int(p.argmax())
        mass, before = p[low], np.zeros(7)
        while high - low < 6:
            left = p[low - 1] if low else -1.0
            right = p[high + 1] if high < 6 else -1.0
            low, high = (low - 1, high) if left >= right else (low, high + 1)
            before[low if left >= right else high] = mass
            mass += max(left, right)
        np.testing.assert_allclose(aps_scores(p[None])[0], before, atol=1e-12)


def test_shortest_sets_by_a_plain_loop_and_their_running_union():
    """The threshold sets of the scores are the unions of the shortest sets of all smaller masses."""
    for p in distributions(60, 6, seed=1):
        mode, union = int(p.argmax()), set()
        scores = shortest_scores(p[None])[0].numpy()
        runs = {(a, b): p[a : b + 1].sum() for a in range(mode + 1) for b in range(mode, 6)}
        steps = np.sort(list(runs.values()))
        gap = max(1e-5, np.diff(steps).min() / 2)
        for mass in steps - gap:  # a set for each: nothing changes between two of them
            enough = [(run, of_run) for run, of_run in runs.items() if of_run >= mass]
            length = min(b - a for (a, b), _ in enough)
            (a, b), _ = max((each for each in enough if each[0][1] - each[0][0] == length), key=lambda each: each[1])
            assert tuple(map(int, contiguous_set(p, mass, "shortest"))) == (a, b)
            union |= set(range(a, b + 1))
            assert union == set(np.flatnonzero(scores < mass).tolist())


@pytest.mark.parametrize("kind", ["rps", "aps"])
def test_sets_are_nested_and_without_gaps(kind):
    given = distributions(200, 9, seed=2)
    scores = rps_scores(given) if kind == "rps" else aps_scores(given)
    before = None
    for threshold in np.linspace(0.05, 1.5 if kind == "rps" else 0.99, 25):
        low, high = contiguous_set(given, threshold, kind)
        inside = (scores <= threshold if kind == "rps" else scores < threshold - 1e-6).sum(dim=1).clamp(min=1)
        assert torch.equal(high - low + 1, inside)
        assert before is None or bool(((low <= before[0]) & (high >= before[1])).all())
        before = low, high


def test_the_threshold_is_the_smallest_that_covers_enough():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=57)
    for level in (0.5, 0.81, 0.9, 0.95):
        place = math.ceil(58 * level)
        assert conformal_threshold(scores, level) == np.sort(scores)[place - 1]
    assert conformal_threshold(range(1, 10), 0.9) == 9  # 10 * 0.9 is 9, which rounding must not make 10


@pytest.mark.parametrize(("level", "needed"), [(0.5, 1), (0.9, 9), (0.95, 19), (0.99, 99)])
def test_too_few_pictures_are_refused_with_the_number_that_it_takes(level, needed):
    assert least_number(level) == needed
    with pytest.raises(
        TooFewError, match=f"{level:g} takes at least {needed} calibration pictures, there are {needed - 1}"
    ):
        conformal_threshold(np.zeros(needed - 1), level)
    assert conformal_threshold(np.zeros(needed), level) == 0


def test_groups_of_one_are_no_groups():
    scores = np.random.default_rng(3).normal(size=80)
    for level in (0.5, 0.77, 0.9, 0.95):
        assert conformal_threshold(scores, level, np.arange(80)) == conformal_threshold(scores, level)


def test_a_large_group_weighs_as_much_as_a_small_one():
    scores, groups = [1.0] * 90 + [5.0, 6.0, 7.0, 8.0], ["a"] * 90 + ["b", "c", "d", "e"]
    assert conformal_threshold(scores, 0.5, groups) == 6.0  # of six groups, a new one among them, half is reached
    assert conformal_threshold(scores, 0.5) == 1.0
    with pytest.raises(TooFewError, match="9 calibration groups, there are 5"):
        conformal_threshold(scores, 0.9, groups)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: conformal_threshold([0.1], 1.0), "between 0 and 1"),
        (lambda: conformal_threshold([0.1, math.nan], 0.5), "finite"),
        (lambda: conformal_threshold([0.1, 0.2], 0.5, ["a"]), "one each"),
        (lambda: contiguous_set([0.5, 0.5], 0.5, "hull"), "rps, aps or shortest"),
        (lambda: rps_scores([0.5, 0.5]), r"\(N, R\)"),
        (lambda: aps_scores(np.full((1, 300), 1 / 300)), "at most 256 ranks, got 300; use rps"),
    ],
)
def test_what_is_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()


@pytest.mark.parametrize("kind", ["rps", "aps", "shortest"])
def test_coverage_over_many_draws_is_what_is_promised(kind):
    """Truths are drawn from other distributions than those that are told, so that nothing but the calibration can keep
    the promise; the mean coverage over 300 calibrations of 40 pictures is at most 1 / 41 above it."""
    rng = np.random.default_rng(5)
    score = {"rps": rps_scores, "aps": aps_scores, "shortest": shortest_scores}[kind]
    told = distributions(4000, 8, seed=6)
    truth = np.array([rng.choice(8, p=p**0.4 / (p**0.4).sum()) for p in told])
    scores = score(told).numpy()
    own = scores[np.arange(4000), truth]
    for level in (0.8, 0.9):
        covered = []
        for _ in range(300):
            rows = rng.permutation(4000)
            covered.append((own[rows[40:]] <= conformal_threshold(own[rows[:40]], level)).mean())
        spread = np.std(covered) / len(covered) ** 0.5
        ties = 0.03 if kind != "rps" else 0.0  # the mode's score is 0 whatever it is
        assert level - 4 * spread < np.mean(covered) < level + 1 / 41 + 4 * spread + ties


def test_absolute_residuals_are_those_of_mapie():
    """MAPIE, which has no ordinal sets, agrees where it can: split conformal regression."""
    rng = np.random.default_rng(7)
    x = rng.normal(size=(90, 1))
    y = 3 * x[:, 0] + rng.standard_t(3, size=90)
    line = LinearRegression().fit(x[:30], y[:30])
    theirs = SplitConformalRegressor(line, confidence_level=[0.8, 0.9], prefit=True)
    theirs.conformalize(x[30:], y[30:])
    _, bounds = theirs.predict_interval(x)
    for place, level in enumerate((0.8, 0.9)):
        reach = conformal_threshold(abs(y[30:] - line.predict(x[30:])), level)
        np.testing.assert_allclose(bounds[:, 1, place] - bounds[:, 0, place], 2 * reach, rtol=1e-9)
