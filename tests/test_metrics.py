"""Metrics against scipy and loops; the evaluate modules against the functions."""

import numpy as np
import pytest
import torch
from scipy import stats

from ordinalclip.metrics import (
    METRICS,
    bootstrap_interval,
    cumulative_score,
    load_metric,
    mae_by_shots,
    ordinality,
)


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    true = rng.integers(0, 10, 50).astype(float)
    return true + rng.normal(0, 2, 50).round(), true


def test_against_oracles(pair):
    predicted, true = pair
    assert METRICS["mae"](*pair) == pytest.approx(sum(abs(p - t) for p, t in zip(*pair, strict=True)) / 50)
    assert METRICS["rmse"](*pair) == pytest.approx((sum((p - t) ** 2 for p, t in zip(*pair, strict=True)) / 50) ** 0.5)
    unexplained, total = sum((true - predicted) ** 2), sum((true - true.mean()) ** 2)
    assert METRICS["r2"](*pair) == pytest.approx(1 - unexplained / total)
    assert METRICS["pearson"](*pair) == pytest.approx(stats.pearsonr(*pair).statistic)
    assert METRICS["spearman"](*pair) == pytest.approx(stats.spearmanr(*pair).statistic)
    assert METRICS["accuracy"](*pair) == pytest.approx(sum(p == t for p, t in zip(*pair, strict=True)) / 50)
    assert cumulative_score(*pair, k=2) == pytest.approx(sum(abs(p - t) <= 2 for p, t in zip(*pair, strict=True)) / 50)


def test_constant_predictions_have_no_correlation():
    assert np.isnan(METRICS["pearson"]([1, 1], [0, 1]))
    assert np.isnan(METRICS["spearman"]([1, 1], [0, 1]))
    assert np.isnan(METRICS["r2"]([0, 1], [3, 3]))


@pytest.mark.parametrize("name", list(METRICS))
def test_evaluate_modules_score_the_whole_not_the_mean_of_batches(pair, name):
    predicted, true = pair
    metric = load_metric(name)
    for begin, end in ((0, 7), (7, 50)):
        metric.add_batch(predictions=predicted[begin:end], references=true[begin:end])
    assert metric.compute() == {name: pytest.approx(METRICS[name](predicted, true))}


def test_bad_input():
    with pytest.raises(ValueError, match="nothing was added"):
        load_metric("mae").compute()
    with pytest.raises(ValueError, match="unknown; choices: mae"):
        load_metric("mse")
    with pytest.raises(ValueError, match="part is empty"):
        METRICS["mae"]([], [])
    with pytest.raises(ValueError, match=r"\(N,\), got \(2,\) and \(3,\)"):
        METRICS["mae"]([1, 2], [1, 2, 3])


def test_ordinality_against_loops():
    prototypes = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    unit = prototypes / prototypes.norm(dim=1, keepdim=True)
    hits = [unit[i] @ unit[j] > unit[i] @ unit[j + 1] for i in range(7) for j in range(i, 7)]
    assert ordinality(prototypes) == pytest.approx(sum(hits).item() / len(hits))
    angles = torch.linspace(0, 1.5, 8)
    assert ordinality(torch.stack([angles.cos(), angles.sin()], dim=1)) == 1.0
    with pytest.raises(ValueError, match="R >= 2"):
        ordinality(torch.zeros(1, 3))


def test_equal_prototypes_have_no_order():
    """Similarity has to fall: where it stays the same nothing is counted."""
    assert ordinality(torch.tensor([[1.0, 0.0]] * 4)) == 0
    assert ordinality(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])) == pytest.approx(2 / 3)


def test_mae_by_shots_against_a_loop(pair):
    predicted, true = pair
    counts = [0, 101, 100, 20, 19, 1, 300, 0, 50, 5]
    ranks = true.astype(int)
    table = mae_by_shots(predicted, true, ranks, counts)
    for name, chosen in (
        ("many", {1, 6}), ("medium", {2, 3, 8}), ("few", {0, 4, 5, 7, 9}), ("unseen", {0, 7}),
    ):  # fmt: skip
        errors = [abs(p - t) for p, t, r in zip(predicted, true, ranks, strict=True) if r in chosen]
        assert table[name] == {
            "ranks": len(chosen),
            "num": len(errors),
            "mae": pytest.approx(sum(errors) / len(errors)),
        }
    assert mae_by_shots([1.0], [0.0], [0], [5, 200])["many"] == {"ranks": 1, "num": 0, "mae": None}


def test_bootstrap_interval_against_scipy(pair):
    ours = bootstrap_interval(METRICS["mae"], *pair, resamples=4000)
    theirs = stats.bootstrap(
        pair, METRICS["mae"], paired=True, vectorized=False, method="percentile", n_resamples=4000, random_state=1
    ).confidence_interval
    assert ours == pytest.approx(tuple(theirs), abs=0.05)
    assert ours == bootstrap_interval(METRICS["mae"], *pair, resamples=4000)  # drawn by its own generator
    assert bootstrap_interval(METRICS["mae"], [3.0], [1.0]) == (2.0, 2.0)
    assert np.isnan(bootstrap_interval(METRICS["spearman"], [1, 1, 1], [0, 1, 2])).all()
