"""Ridge regression and SVR on frozen features, against scikit-learn on plain arrays."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.model_selection import KFold
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVR

from baselines import frozen
from ordinalclip import OrdinalModel, Ranks
from ordinalclip.data import load_parts
from ordinalclip.heads import HeadContext, NoNumber, Targets, build_head
from ordinalclip.pipeline import load_pipeline
from ordinalclip.training import train

RANKS = Ranks.linear(0, 100, 21)
METHODS = ("ridge", "svr")
SMALL = {
    "ridge": {"alphas": (0.1, 10.0, 1000.0)},
    "svr": {"costs": (0.3, 3.0), "gammas": (0.1, 1.0), "epsilons": (0.1,)},
}
MEAN, STD = 40.0, 8.0


def samples(count, width=12, seed=0, weights=False):
    """Features of very different means and deviations, of which the labels depend on a few."""
    rng = np.random.default_rng(seed)
    plain = rng.normal(size=(count, width))
    labels = MEAN + STD * (np.tanh(plain[:, 0]) + 0.5 * plain[:, 1] * plain[:, 2] + 0.3 * rng.normal(size=count))
    features = plain * np.logspace(-1, 2, width) + np.logspace(2, -2, width)
    return features, labels, rng.integers(1, 4, count).astype(float) if weights else None


def given(features, labels, weights=None):
    """A part as `fit` is handed it."""
    values = torch.tensor(labels)
    weights = None if weights is None else torch.tensor(weights)
    return {"features": torch.tensor(features)}, Targets(values, RANKS.nearest(values), weights)


def fitted(method, learned, asked=None, dtype=torch.float64, **options):
    options = options or SMALL[method]
    head = build_head(method, HeadContext(RANKS, learned[0].shape[1], label_mean=MEAN, label_std=STD), options)
    head.to(dtype).fit(given(*learned), None if asked is None else given(*asked))
    return head.eval()


def answers(head, features):
    return head.predict(head(torch.tensor(features))).value.numpy()


def settings(method):
    if method == "ridge":
        return [Ridge(alpha) for alpha in SMALL["ridge"]["alphas"]]
    options = SMALL["svr"]
    return [
        SVR(C=cost, gamma=gamma / 12, epsilon=epsilon)
        for cost in options["costs"]
        for gamma in options["gammas"]
        for epsilon in options["epsilons"]
    ]


def solutions(method, learned, asked):
    """Of every setting the answers to `asked`, by scikit-learn."""
    features, labels, weights = learned
    scaler = StandardScaler().fit(features, sample_weight=weights)
    for machine in settings(method):
        machine.fit(scaler.transform(features), (labels - MEAN) / STD, weights)
        yield machine.predict(scaler.transform(asked)) * STD + MEAN


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("count", [8, 60])
@pytest.mark.parametrize("method", METHODS)
def test_answers_are_those_of_scikit_learn(method, count, weights):
    """Of the setting with the smallest error on the validation part; with fewer samples than features too."""
    learned, asked, other = samples(count, 12, 1, weights), samples(40, 12, 2, weights), samples(50, 12, 3)[0]
    errors = [np.average(np.abs(found - asked[1]), weights=asked[2]) for found in solutions(method, learned, asked[0])]
    expected = list(solutions(method, learned, other))[int(np.argmin(errors))]
    assert answers(fitted(method, learned, asked), other) == pytest.approx(expected, abs=1e-5)
    assert np.ptp(expected) > 1
    assert len(set(np.round(errors, 6))) == len(errors)


@pytest.mark.parametrize("method", METHODS)
def test_without_a_validation_part_the_training_part_chooses(method):
    """Ridge: every sample by all others; SVR: five folds. In loops."""
    features, labels, weights = samples(40, 12, 5, weights=True)
    standard = StandardScaler().fit(features, sample_weight=weights).transform(features)
    targets = (labels - MEAN) / STD
    folds = [(np.delete(np.arange(40), row), [row]) for row in range(40)]
    if method == "svr":
        folds = list(KFold(5, shuffle=True, random_state=0).split(standard))
    errors = []
    for machine in settings(method):
        found = np.empty(40)
        for rows, held in folds:
            found[held] = machine.fit(standard[rows], targets[rows], weights[rows]).predict(standard[held])
        errors.append(np.average(np.abs(found - targets), weights=weights))
    other = samples(50, 12, 6)[0]
    expected = list(solutions(method, (features, labels, weights), other))[int(np.argmin(errors))]
    assert answers(fitted(method, (features, labels, weights)), other) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_weights_are_copies_and_the_order_does_not_matter(method):
    features, labels, weights = samples(40, 12, 7, weights=True)
    asked, other = samples(30, 12, 8), samples(20, 12, 9)[0]
    rows = np.random.default_rng(0).permutation(np.repeat(np.arange(40), weights.astype(int)))
    weighted = answers(fitted(method, (features, labels, weights), asked), other)
    repeated = answers(fitted(method, (features[rows], labels[rows], None), asked), other)
    assert weighted == pytest.approx(repeated, abs=0.02 if method == "svr" else 1e-8)  # libsvm stops at 1e-3
    assert np.abs(weighted - answers(fitted(method, (features, labels, None), asked), other)).max() > 0.1


@pytest.mark.parametrize("validated", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "count, features, labels", [(1, 1, 1), (2, 1, 1), (3, 1, 0), (20, 0, 1), (20, 1, 0), (20, 0, 0)]
)
def test_little_to_learn_from(method, validated, count, features, labels):
    """One sample, features or labels that are all equal: the labels' mean where nothing is to be known, never NaN."""
    learned = samples(count)[0], samples(count)[1], None
    learned = learned[0] if features else np.ones_like(learned[0]), learned[1] if labels else np.full(count, 55.0), None
    head = fitted(method, learned, samples(10, seed=4) if validated else None)
    found = answers(head, samples(30, seed=3)[0])
    assert np.isfinite(found).all()
    if not labels or count == 1:
        assert found == pytest.approx(np.full(30, learned[1][0]), abs=1e-6 if method == "ridge" else 0.1 * STD + 1e-6)
    assert all(len(buffer.flatten()) for buffer in head.buffers())  # an empty one would not be saved


def test_features_without_spread_say_nothing():
    """What varies by rounding alone is not blown up to the size of the others."""
    features, labels, _ = samples(40)
    features = np.concatenate([features, 3 + 1e-12 * np.random.default_rng(1).normal(size=(40, 1))], axis=1)
    for method in METHODS:
        head = fitted(method, (features, labels), (features, labels))
        moved = features.copy()
        moved[:, -1] += 1e-9
        assert answers(head, moved) == pytest.approx(answers(head, features), abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_solution_comes_back_whatever_its_size(method):
    learned, other = samples(60), samples(20, seed=3)[0].astype(np.float32)
    head = fitted(method, learned, samples(40, seed=2), dtype=torch.float32)
    again = build_head(method, HeadContext(RANKS, 12, label_mean=MEAN, label_std=STD), SMALL[method])
    again.load_state_dict(head.state_dict())
    assert (answers(again, other) == answers(head, other)).all()
    double = answers(fitted(method, learned, samples(40, seed=2)), other.astype(float))
    assert answers(head, other) == pytest.approx(double, abs=1e-3)
    wide = build_head(method, HeadContext(RANKS, 13), {})
    with pytest.raises(RuntimeError, match="size mismatch"):
        wide.load_state_dict(head.state_dict())


@pytest.mark.parametrize("dtype, rounding", [(torch.bfloat16, 0.3), (torch.float16, 0.03)])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision(method, dtype, rounding):
    """Answers in float32 from rounded solutions; features as encoders give them, positive and near their deviation."""
    rng = np.random.default_rng(0)
    features = np.abs(rng.normal(size=(80, 12))).astype(np.float32)
    labels = MEAN + STD * (features[:, 0] - features[:, 1])
    head = fitted(method, (features, labels), (features, labels), dtype=torch.float32)
    full = answers(head, features)
    found = head.to(dtype).predict(head(torch.tensor(features))).value
    assert found.dtype == torch.float32
    assert np.abs(found.numpy() - full).mean() < rounding


def test_ends_of_a_grid_are_said(caplog):
    learned, asked = samples(60), samples(40, seed=2)
    with caplog.at_level(logging.WARNING):
        fitted("ridge", learned, asked, alphas=(1e-3, 1e-2))
    assert "head.alphas: the largest of the grid is the best, 0.01" in caplog.text
    caplog.clear()
    fitted("ridge", learned, asked, alphas=(1e-3, 1.0, 1e6))
    fitted("ridge", learned, asked, alphas=(1e-3,))  # not asked to choose
    assert not caplog.records


def test_too_many_samples_and_bad_numbers_are_refused(monkeypatch):
    learned = samples(20)
    monkeypatch.setattr(frozen, "LARGEST", 19)
    with pytest.raises(ValueError, match=r"method svr .* 19 at most; there are 20: draw fewer with data\.train_share"):
        fitted("svr", learned)
    fitted("ridge", learned)
    learned[0][3, 4] = np.nan
    with pytest.raises(NoNumber, match="1 of 20 pictures"):
        fitted("ridge", learned)
    for wrong in ({"alphas": ()}, {"alphas": (0.0,)}):
        with pytest.raises(ValueError, match=r"head\.alphas"):
            build_head("ridge", HeadContext(RANKS, 3), wrong)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_runs_read_features_learn_from_weights_and_are_served(quick, tmp_path, method):
    """With and without a cache, with and without a validation part; the folder's model answers as the run says."""
    few = ("data.num_train=60", "data.num_test=20", "data.kinds=[dial]")
    mae = {}
    for name, options in {
        "plain": (),
        "cached": ("model.features=cached", "data.views=1"),
        "weighted": ("train.weighting=inverse",),
        "alone": (),
        "constant": ("method=constant",),
    }.items():
        folder = tmp_path / name
        config = quick(*few, f"method={method}", *options, f"output_dir={folder}")
        parts = load_parts(config.data, config.ranks, config.seed)
        parts = replace(parts, validation=None) if name == "alone" else parts
        train(config, parts, quiet=True)
        mae[name] = json.loads((folder / "metrics.json").read_text())["test"]["mae"]
    assert mae["cached"] == pytest.approx(mae["plain"], abs=1e-3)
    assert abs(mae["weighted"] - mae["plain"]) > 0.01
    assert max(mae["plain"], mae["alone"]) < 0.5 * mae["constant"]
    part = parts.test
    pictures = [part.image(row) for row in range(len(part))]
    model = tmp_path / "plain" / "model"
    served = np.array([found["value"] for found in load_pipeline(str(model))(pictures)])
    assert np.abs(served - part.values).mean() == pytest.approx(mae["plain"], abs=1e-3)
    back = OrdinalModel.from_pretrained(model)
    back.save_pretrained(tmp_path / "again", form="trainable")
    pixels = back.image_processor(pictures)["pixel_values"]
    again = OrdinalModel.from_pretrained(tmp_path / "again").predict(pixels).value
    assert torch.equal(again, back.predict(pixels).value)
