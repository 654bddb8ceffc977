"""Metrics against scipy and loops; the evaluate modules against the functions."""

import json

import numpy as np
import pytest
import torch
import yaml
from scipy import stats

from ordinalclip.cli import main
from ordinalclip.metrics import (
    METRICS,
    Metric,
    against_constant,
    bootstrap_interval,
    constant_answer,
    cumulative_score,
    doubt,
    load_metric,
    mae_by_shots,
    metrics_with,
    ordinality,
)
from ordinalclip.run_folder import RunFolder


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


def test_metrics_of_ranks_and_distributions_against_oracles():
    """scikit-learn's kappa, and the others as plain loops."""
    from sklearn.metrics import cohen_kappa_score

    rng = np.random.default_rng(4)
    for num, ranks in ((20, 2), (60, 5), (400, 40)):
        true, predicted = rng.integers(0, ranks, num), rng.integers(0, ranks, num)
        kappa = cohen_kappa_score(predicted, true, weights="quadratic", labels=range(ranks))
        assert METRICS["qwk"](predicted, true) == pytest.approx(kappa)
        near = sum(abs(int(p) - int(t)) <= 1 for p, t in zip(predicted, true, strict=True)) / num
        assert METRICS["off_by_one"](predicted, true) == pytest.approx(near)
        probabilities = rng.dirichlet(np.ones(ranks), num)
        total = 0.0
        for row, rank in zip(probabilities, true, strict=True):
            for k in range(ranks - 1):
                total += (sum(row[: k + 1]) - (rank <= k)) ** 2
        assert METRICS["rps"](probabilities, true) == pytest.approx(total / num)
        certain = np.eye(ranks)[predicted]  # the MAE in ranks of a distribution without doubt
        assert METRICS["rps"](certain, true) == pytest.approx(np.abs(predicted - true).mean())
        values = true + rng.normal(0, 1, num)
        means = [np.mean([abs(v - t) for v, t in zip(values, true, strict=True) if t == rank]) for rank in set(true)]
        assert METRICS["macro_mae"](values, true) == pytest.approx(np.mean(means))
    assert np.isnan(METRICS["qwk"]([2, 2], [2, 2]))
    # labels of one rank may differ: bins
    assert METRICS["macro_mae"]([0, 0, 0], [1, 3, 8], [0, 0, 1]) == pytest.approx((2 + 8) / 2)


def test_what_is_known_of_a_metric_is_true():
    """Which side is better, and that errors in the label's unit scale with it."""
    rng = np.random.default_rng(5)
    labels = rng.uniform(0, 9, 80)
    ranks = labels.round().astype(int)

    def columns(noise, scale=1.0):
        values = np.clip(labels + rng.normal(0, noise, 80), 0, 9)
        predicted = values.round().astype(int)
        probabilities = np.full((80, 10), 0.01) + 0.9 * np.eye(10)[predicted]
        points = np.stack([values, np.zeros(80)], axis=1)
        return {
            "values": scale * values,
            "labels": scale * labels,
            "ranks": predicted,
            "label_ranks": ranks,
            "probabilities": probabilities,
            "space": points,
        }

    for name, metric in metrics_with([1.0]).items():
        if "prototypes" in metric.of:
            continue
        good, bad = metric.score(columns(0.3)), metric.score(columns(3.0))
        assert (good < bad) == metric.falls, name
        state = rng.bit_generator.state
        plain = metric.score(columns(1.0))
        rng.bit_generator.state = state
        scaled = metric.score(columns(1.0, scale=7.0))
        if not name.startswith("cs@"):  # whose k is in the unit
            assert scaled == pytest.approx(plain * (7 if metric.in_unit else 1)), name
        assert metric.title
        assert metric.meaning
    assert METRICS["rps"].score({"probabilities": None, "label_ranks": ranks}) is None
    assert METRICS["d5"].score({"space": np.zeros((3, 2)), "labels": np.arange(3)}) is None


def test_a_new_metric_is_one_entry(quick, tmp_path, monkeypatch, capsys):
    """metrics.json, report, card, table and figures of a comparison take it up by themselves."""
    largest = Metric(
        lambda values, labels: float(np.abs(values - labels).max()), "worst", "largest error", in_unit=True
    )
    monkeypatch.setitem(METRICS, "worst", largest)
    extent = Metric(lambda points, labels: float(np.ptp(points)), "extent", "of the space", ("space", "labels"), None)
    monkeypatch.setitem(METRICS, "extent", extent)
    middle = Metric(lambda prototypes: float(prototypes.norm()), "middle", "of prototypes", ("prototypes",), None)
    monkeypatch.setitem(METRICS, "middle", middle)
    base = {"data": {"num_train": 16, "num_validation": 8, "num_test": 8}, "train": {"max_steps": 1, "batch_size": 8}}
    base |= {"ranks": {"low": 0, "high": 100, "num": 11}}
    methods = {"L1": {"base": {"method": "l1"}}, "zero": {"base": {"method": "zero_shot"}}}
    path = tmp_path / "c.yaml"
    path.write_text(
        yaml.safe_dump({"output_dir": str(tmp_path / "out"), "seeds": [1], "base": base, "methods": methods})
    )
    assert main(["compare", str(path), "--quiet"]) == 0
    header = capsys.readouterr().out
    assert all(f"| {title} |" in header for title in ("worst", "extent", "middle"))
    (run,) = (tmp_path / "out" / "runs").glob("l1-*")
    scores = json.loads((run / "metrics.json").read_text())["test"]
    assert scores["worst"] == scores["expectation"]["worst"] > scores["mae"]
    assert scores["extent"] > 0
    (zero,) = (tmp_path / "out" / "runs").glob("zero-*")
    assert json.loads((zero / "metrics.json").read_text())["middle"] > 0
    page = (tmp_path / "out" / "report.html").read_text()
    page = page.replace("\u00a0", " ")
    assert "worst ←" not in page  # larger is better, unless it says otherwise
    assert "worst →" in page
    best = RunFolder(next(path.parent for path in (tmp_path / "out" / "runs").glob("*/report.html")))
    for name in ("worst", "extent"):
        assert f'data-metric="{name}"' in best.report.read_text()
        assert f"| {name} | " in (best.model / "README.md").read_text()


def test_predictions_beside_the_constant():
    """Against loops: the median of the training labels, its errors, and the t statistic by its formula."""
    rng = np.random.default_rng(0)
    counts, ranks = [6, 0, 9, 1, 1], np.array([10.0, 20.0, 30.0, 40.0, 50.0])
    train = [value for value, count in zip(ranks, counts, strict=True) for _ in range(count)]
    best = min(ranks, key=lambda answer: sum(abs(answer - label) for label in train))
    assert constant_answer(counts, ranks) == best == 30
    labels = rng.choice(ranks, 40)
    values = labels + rng.normal(0, 5, 40)
    beside = against_constant(values, labels, best)
    gains = [abs(best - label) - abs(value - label) for value, label in zip(values, labels, strict=True)]
    t = np.mean(gains) / (np.std(gains, ddof=1) / np.sqrt(40))
    assert beside["mae"] == pytest.approx(np.mean([abs(best - label) for label in labels]))
    assert beside["p"] == pytest.approx(stats.t.sf(t, 39))
    assert beside["spread"] == pytest.approx(np.std(values) / np.std(labels))
    assert against_constant(labels, labels, best)["p"] < 1e-6
    assert against_constant([30.0], [20.0], best)["p"] is None
    assert against_constant([31.0, 31.0], [20.0, 20.0], best) == {"answer": 30, "mae": 10, "p": 1.0, "spread": None}


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ([30.0] * 40, "nearly the same answer for every picture"),
        (30 + 0.01 * np.arange(40), "nearly the same answer"),
        (10 * np.arange(40) % 50, "no better than one answer for every picture"),
        (None, "not shown to be better than one answer for every picture, with 40 images"),
        ("labels", ""),
        ("all but one", ""),  # which the labels' spread is due to, and no answer moves as far
    ],
)
def test_what_speaks_against_a_model(values, why):
    labels = np.repeat([10.0, 20.0, 30.0, 40.0, 50.0], 8)
    if isinstance(values, str) and values == "all but one":
        values, labels = labels + np.tile([-1.0, 1.0], 20), np.r_[labels[:-1], 10_000.0]
    if values is None:  # one picture a little better than the constant, all others like it but for two that move
        values = np.where(np.arange(40) == 0, 20.0, 30.0)
        values[[20, 21]] = [33.0, 28.0]
    values = labels if isinstance(values, str) else np.asarray(values, dtype=float)
    scores = {"num": 40, "mae": np.abs(values - labels).mean(), "constant": against_constant(values, labels, 30.0)}
    found = doubt(scores, "{:g} years".format)
    assert found.startswith(why) if why else not found
    if why:
        assert found.endswith(f"(MAE {scores['mae']:.4g}; always answering 30 years: 12)")
    assert not doubt({"num": 40, "mae": None, "constant": None})


def test_constant_predictions_have_no_correlation():
    assert np.isnan(METRICS["pearson"]([1, 1], [0, 1]))
    assert np.isnan(METRICS["spearman"]([1, 1], [0, 1]))
    assert np.isnan(METRICS["r2"]([0, 1], [3, 3]))


@pytest.mark.parametrize("name", [name for name, metric in METRICS.items() if metric.is_decoded])
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


def test_resamples_without_a_value_do_not_narrow_an_interval():
    """Of 30 answers k are another one: a resample has none of these (1 - k / 30)^30 of the time."""
    labels = np.arange(30.0)
    for k in (1, 2, 3):  # 36, 13 and 4 % of the resamples are undefined
        predicted = (labels >= 30 - k).astype(float)
        assert np.isnan(bootstrap_interval(METRICS["pearson"], predicted, labels)).all()
    predicted = (labels >= 26).astype(float)  # 1.4 %: the lower end lies below what the defined ones say
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 30, 30) for _ in range(1000)]
    values = np.asarray([METRICS["pearson"](predicted[row], labels[row]) for row in rows])
    unknown = np.isnan(values).sum()
    assert 0 < unknown < 25
    known = np.sort(values[~np.isnan(values)])
    low, high = bootstrap_interval(METRICS["pearson"], predicted, labels)
    assert low == pytest.approx(known[24 - unknown], abs=0.02)
    assert low < np.quantile(known, 0.025)
    assert high > np.quantile(known, 0.975)
