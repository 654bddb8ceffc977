"""benchmarks/large.py: its protocol, for many draws at once, against plain loops of the package's own functions."""

import csv
import importlib.util
import re
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.linear_model import Ridge, RidgeCV

from baselines import large
from ordinalclip import gauges

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "large.py"
TRAIN, DRAWS = 40, 3


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("large_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def settings(script):
    return script.Settings(train=TRAIN, draws=DRAWS)


@pytest.fixture(scope="module")
def domain(script):
    """Codes with more channels than there are training pictures; four values only, so that draws are often equal."""
    rng = np.random.default_rng(0)
    values = rng.choice([0.0, 1.0, 2.0, 7.0], 70, p=[0.5, 0.1, 0.2, 0.2])
    codes = rng.standard_normal((70, 3, 30)).astype(np.float32)
    codes[:, :, 0] += values[:, None].astype(np.float32) * np.array([0.2, 1.0, -0.5], dtype=np.float32)
    codes[:, 2, 5:] = 0  # a layer that is narrower
    text = torch.zeros(3, 30)
    text[:, 0] = torch.tensor([1.0, 0.5, -1.0])
    weights = torch.tensor([0.2, 0.7, 0.1])
    pooled = codes[:, -1, :5]
    return script.Domain(
        "numbers", "codes", "", [], values, codes, pooled, text, lambda normals: weights, {}, "tiny", {}
    )


def errors(answers, truth):
    return np.abs(answers - truth).mean(), 1 - np.square(answers - truth).sum() / np.square(truth - truth.mean()).sum()


def parts(domain, split):
    order = np.random.default_rng(split).permutation(len(domain.values))
    return order[:TRAIN], order[TRAIN:]


def line(features, labels, penalty="none", pool=None):
    """The package's calibration; where it refuses, since nothing differs, the mean label."""
    try:
        slopes, offset = large.calibrate_layers(features, labels, penalty, pool=pool)
    except ValueError:
        return np.zeros(features.shape[1]), labels.mean()
    return slopes.numpy(), offset


def rows_at_random(budget, split, draw):
    return np.random.default_rng(1_000_000 * split + draw).permutation(TRAIN)[:budget]


def plain_large(domain, split, direction, layers, budget, draw):
    train, test = parts(domain, split)
    values, codes = domain.values[train], domain.codes
    if direction == "text":
        normals = domain.text
    elif direction == "extremes, all":
        normals = large.direction_from_extremes(codes[train], values, 0.1, seed=split).normal
    else:
        rows = rows_at_random(budget, split, draw)
        labels = values[rows]
        if len(set(labels)) == 1:
            return errors(np.full(len(test), labels[0]), domain.values[test])
        try:
            normals = large.direction_from_extremes(codes[train][rows], labels, 0.3, seed=split).normal
        except ValueError:
            normals = large.direction_from_extremes(codes[train][rows], labels, 1 / budget, seed=split).normal
    distances = large.signed_distances(codes, normals)
    single = large.weighted_distance(distances, domain.weigh(normals) if layers == "generator" else None)
    if direction != "extremes, own":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows = large.spread_out(single[train], budget, 1_000_000 * split + draw)
    features = (distances if layers == "separate" else single[:, None]).double().numpy()
    penalty = "ridge" if layers == "separate" else "none"
    slopes, offset = line(features[train][rows], values[rows], penalty, features[train])
    return errors(features[test] @ slopes + offset, domain.values[test])


def test_every_number_of_large_against_a_plain_loop(script, settings, domain):
    seen = set()
    for split in (0, 1):
        for (method, direction, layers, cost, budget), found in script.large_scores(domain, settings, split):
            seen.add((direction, layers, cost, budget))
            draws = 1 if budget == TRAIN else DRAWS
            plain = [plain_large(domain, split, direction, layers, budget, draw) for draw in range(draws)]
            np.testing.assert_allclose(
                found, np.transpose(plain), rtol=2e-3, err_msg=f"{direction}, {layers}, {budget}"
            )
            assert method == "LARGE"
    budgets = (2, 5, 10, 20, TRAIN)
    known = {
        (direction, layers, cost, budget)
        for direction, cost in (("text", 0), ("extremes, all", TRAIN))
        for layers in ("equal", "generator", "separate")
        for budget in budgets
    }
    assert seen == known | {("extremes, own", "equal", budget, budget) for budget in budgets[:-1]}


def standardised(features, train):
    flat = features.reshape(len(features), -1)
    kept = flat[train].std(axis=0) > 0
    flat = flat[:, kept].astype(float)
    return (flat - flat[train].mean(axis=0)) / flat[train].std(axis=0) / kept.sum() ** 0.5


@pytest.mark.parametrize("layers", ["all layers", "pooled"])
def test_ridge_regression_is_that_of_scikit_learn(script, settings, domain, layers):
    train, test = parts(domain, 1)
    features = standardised(domain.codes if layers == "all layers" else domain.pooled, train)
    found = {key[2:5:2]: each for key, each in script.rival_scores(domain, settings, 1) if key[0] == "ridge"}
    chosen = set()
    for budget in (5, 10, 20, TRAIN):
        for draw in range(1 if budget == TRAIN else DRAWS):
            rows = rows_at_random(budget, 1, draw)
            model = RidgeCV(script.STRENGTHS).fit(features[train][rows], domain.values[train][rows])
            chosen.add(model.alpha_)
            plain = errors(model.predict(features[test]), domain.values[test])
            np.testing.assert_allclose(found[layers, budget][:, draw], plain, rtol=1e-3)
    assert len(chosen) > 1  # there was something to choose
    for draw in range(DRAWS):  # of two labels leaving one out says nothing: the smallest strength
        rows = rows_at_random(2, 1, draw)
        model = Ridge(min(script.STRENGTHS)).fit(features[train][rows], domain.values[train][rows])
        plain = errors(model.predict(features[test]), domain.values[test])
        np.testing.assert_allclose(found[layers, 2][:, draw], plain, rtol=1e-3)


def test_the_constant_is_the_median_of_the_same_labels(script, settings, domain):
    train, test = parts(domain, 0)
    found = {key[4]: each for key, each in script.rival_scores(domain, settings, 0) if key[0] == "constant"}
    for budget in (2, 10, TRAIN):
        for draw in range(1 if budget == TRAIN else DRAWS):
            median = np.median(domain.values[train][rows_at_random(budget, 0, draw)])
            assert found[budget][0, draw] == pytest.approx(np.abs(domain.values[test] - median).mean())


def test_lines_where_nothing_differs(script):
    features = np.array([[[1.0, 2.0], [1.0, 3.0]], [[1.0, 2.0], [4.0, 2.0]], [[3.0, 3.0], [3.0, 3.0]]])
    labels = np.array([[5.0, 5.0], [0.0, 6.0], [2.0, 4.0]])
    slopes, offsets = script.lines(features, labels)
    np.testing.assert_allclose(slopes, [[0, 0], [2, 0], [0, 0]], atol=1e-12)
    np.testing.assert_allclose(offsets, [5, -2, 3], atol=1e-12)


def test_the_table_says_what_the_draws_said(script, settings, domain):
    found = script.study(domain, settings)
    rows = {(row.method, row.direction, row.layers, row.line_labels): row for row in script.rows_of(domain, found)}
    row = rows["LARGE", "text", "equal", 5]
    plain = np.array(
        [plain_large(domain, split, "text", "equal", 5, draw) for split in (0, 1) for draw in range(DRAWS)]
    )
    maes = plain[:, 0]
    assert (row.mae, row.std, row.worst) == pytest.approx((maes.mean(), maes.std(), maes.max()), rel=1e-4)
    assert row.r2 == pytest.approx(np.median(plain[:, 1]), rel=1e-3)
    assert (row.direction_labels, row.draws, row.splits) == (0, DRAWS, 2)
    assert rows["LARGE", "extremes, own", "equal", 5].direction_labels == 5
    assert rows["LARGE", "extremes, all", "equal", 5].direction_labels == TRAIN

    gaps = {(*each[:2], each[3]): each[4] for each in script.layer_differences(found)}["text", "generator", 5]
    pairs = [
        [plain_large(domain, split, "text", layers, 5, draw)[0] for draw in range(DRAWS)]
        for layers in ("generator", "equal")
        for split in (0, 1)
    ]
    np.testing.assert_allclose(gaps, np.subtract(pairs[:2], pairs[2:]), atol=2e-3)


def test_linearity_is_measured_on_the_test(script, settings, domain):
    found = script.linearity(domain, settings)["text"]
    for split in (0, 1):
        train, test = parts(domain, split)
        x = large.weighted_distance(large.signed_distances(domain.codes, domain.text)).double().numpy()
        for column, degree in enumerate((1, 3)):
            answers = np.polyval(np.polyfit(x[train], domain.values[train], degree), x[test])
            assert found[split, column] == pytest.approx(errors(answers, domain.values[test])[1], rel=1e-3)
        assert found[split, 2] == pytest.approx(spearmanr(x[test], domain.values[test]).statistic)


def test_what_costs_more_labels_is_not_compared(script):
    def row(method, direction, cost, budget, mae):
        return script.Row("d", "l", method, direction, "equal", cost, budget, mae, 0.0, mae, 0.0, 1, 2)

    rows = [
        row("LARGE", "extremes, all", 3, 2, 1.0),
        row("LARGE", "text", 0, 2, 5.0),
        row("ridge", "", 0, 2, 4.0),
        row("constant", "", 0, 2, 3.0),
        row("LARGE", "extremes, all", 40, 40, 1.0),
        row("ridge", "", 0, 40, 2.0),
        row("constant", "", 0, 40, 3.0),
    ]
    said = script.best_sentence(rows)
    assert "with 2 LARGE (text, equal) has 5.00, NOT below the best rival's 4.00" in said
    assert "a constant is better than both; with 40" in said
    assert "with 40 LARGE (extremes, all, equal) has 1.00, below the best rival's 2.00" in said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"labels\.csv is missing: it is to say file,age"),
        ("file,years\na.png,3\n", r"labels\.csv lacks the column 'age'; it has file, years"),
        ("file,age\na.png,3\nb.png,old\n", r"labels\.csv, line 3: age is 'old', no number"),
    ],
)
def test_tables_that_are_refused(script, tmp_path, content, message):
    if content is not None:
        (tmp_path / "labels.csv").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        script.listed(tmp_path, "age")


def test_too_few_pictures_are_refused(script):
    with pytest.raises(ValueError, match=r"40 pictures are too few: 40 are for training"):
        script.divided(40, 40, 0)


def test_networks_are_trained_on_the_labels_drawn(script):
    pictures, values = zip(*gauges.drawn_gauges("tank", 8, seed=0, size=32, style="calm"), strict=True)
    domain = script.Domain(
        "tanks", "", "", pictures, np.array(values), None, None, None, None, {}, "tiny", script.GAUGE_RANKS
    )
    settings = script.Settings(train=2, trained=1, steps=2)
    found = dict(script.trained_scores(domain, settings, 0))
    assert [key[0] for key in found] == ["L1", "CNN", "OrdinalCLIP"]
    for each in found.values():
        assert each.shape == (2, 1)
        assert 0 < each[0, 0] < 100


@pytest.mark.slow
def test_the_script_from_end_to_end(script, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["large.py", "--out", str(tmp_path / "out"), "--quick"])
    script.main()
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "large.csv",
        "README.md",
        "linear.png",
        "budgets.png",
    }
    with open(tmp_path / "out" / "large.csv", newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["latents"] for row in rows} == {"GAN codes", "layers of tiny"}
    assert {row["line_labels"] for row in rows} == {"2", "5", "10", "20", "100", "200"}
    constant = [float(row["mae"]) for row in rows if (row["method"], row["line_labels"]) == ("constant", "200")]
    assert all(20 < mae < 30 for mae in constant)  # a quarter of the range, as for values spread evenly
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert not re.search(r"\bnan\b", text)
    for title in ("Few labels", "Is it a line?", "Sorting without labels", "Weights of layers", "What inversion loses"):
        assert f"## {title}" in text


@pytest.mark.slow
def test_heads_on_frozen_features_learn(script, settings, domain):
    """All of the labels are better than the constant, of which the same rows give the median."""
    ranks = {"ranks.low": -10, "ranks.high": 10, "ranks.num": 41}
    values = domain.values / np.abs(domain.values).max() * 9
    pooled = np.outer(values, [1.0, -0.5, 0.3, 0.0, 0.2]).astype(np.float32)
    learning = replace(domain, values=values, pooled=pooled, ranks=ranks, prompt="a photo of")
    found = dict(script.frozen_scores(learning, replace(settings, trained=1, steps=60), 0))
    train, test = parts(learning, 0)
    constant = np.abs(values[test] - np.median(values[train])).mean()
    assert {key[0] for key in found} == {f"{name}, frozen encoder" for name in script.NAMES.values()}
    for name in ("L1", "OrdinalCLIP"):
        assert found[f"{name}, frozen encoder", "", "", 0, TRAIN][0, 0] < 0.9 * constant
