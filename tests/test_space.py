"""Quality of a feature space against published figures, plain loops and its invariances."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from scipy.stats import pearsonr

from ordinalclip import space
from ordinalclip.metrics import best_residual_variance, d5, residual_variance

GOLDEN = json.loads((Path(__file__).parent / "golden" / "baselines_open.json").read_text())["nn"]


@pytest.fixture(params=[3, 12], ids=["tree", "products"])
def curve(request):
    """A noisy curve in few dimensions (searched by a tree) or in many (by matrix products), and the place on it."""
    rng = np.random.default_rng(0)
    place = rng.uniform(0, 3, 40)
    turn = np.stack([np.cos(place), np.sin(place), place], axis=1) @ rng.normal(size=(3, request.param))
    return turn + rng.normal(0, 0.1, turn.shape), place


def distance(first, second):
    return sum((a - b) ** 2 for a, b in zip(first, second, strict=True)) ** 0.5


def others(features, i, k):
    return sorted((j for j in range(len(features)) if j != i), key=lambda j: distance(features[i], features[j]))[:k]


def d5_loop(features, labels):
    labels = np.reshape(labels, (len(features), -1))
    gaps = [distance(labels[i], labels[j]) for i in range(len(features)) for j in others(features, i, 5)]
    return sum(gaps) / len(gaps)


def residual_variance_loop(features, labels, k):
    """Floyd and Warshall's algorithm on the dense matrix."""
    size, labels = len(features), np.reshape(labels, (len(features), -1))
    length = [[0.0 if i == j else 1e10 for j in range(size)] for i in range(size)]
    for i in range(size):
        for j in others(features, i, k - 1):
            length[i][j] = length[j][i] = distance(features[i], features[j])
    for via in range(size):
        for i in range(size):
            for j in range(size):
                length[i][j] = min(length[i][j], length[i][via] + length[via][j])
    label_length = [[distance(labels[i], labels[j]) for j in range(size)] for i in range(size)]
    return 1 - pearsonr(np.ravel(length), np.ravel(label_length)).statistic


@pytest.mark.parametrize("width", [0, 8])
def test_golden(width, monkeypatch):
    monkeypatch.setattr(space, "TREE_WIDTH", width)  # the four dimensions by matrix products, and by the tree
    bank, labels = np.array(GOLDEN["bank"]), np.array(GOLDEN["bank_labels"])
    assert d5(bank, labels) == pytest.approx(GOLDEN["d5"], rel=1e-9)
    for k, figure in GOLDEN["residual_variance_by_k"].items():
        assert residual_variance(torch.tensor(bank), torch.tensor(labels), k=int(k)) == pytest.approx(figure, rel=1e-9)


def test_against_loops(curve):
    features, labels = curve
    assert d5(features, labels) == pytest.approx(d5_loop(features, labels))
    for k in (2, 3, 7, 40):  # from many pieces, a missing edge apart, to all edges
        figure = residual_variance(features, labels, k=k)
        assert figure == pytest.approx(residual_variance_loop(features, labels, k), abs=1e-12)


def test_labels_of_several_dimensions(curve):
    features, labels = curve
    plane = np.stack([np.cos(labels), labels], axis=1)
    assert d5(features, plane) == pytest.approx(d5_loop(features, plane))
    assert residual_variance(features, plane, k=6) == pytest.approx(residual_variance_loop(features, plane, 6))
    assert d5(features, labels[:, None]) == d5(features, labels)


def test_invariances(curve):
    features, labels = curve
    turn, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(features.shape[1],) * 2))
    order = np.random.default_rng(2).permutation(len(labels))
    figure, gap = residual_variance(features, labels, k=8), d5(features, labels)
    assert 0 < figure < 1
    for changed, values in (
        (features * 1e-3, labels), (features, labels * 50 + 3), (features @ turn + 100, labels),
        (features[order], labels[order]),
    ):  # fmt: skip
        assert residual_variance(changed, values, k=8) == pytest.approx(figure)
        assert d5(changed, values) == pytest.approx(gap * np.ptp(values) / np.ptp(labels))


def test_line_is_perfect():
    place = np.random.default_rng(0).uniform(0, 1, 30)
    for width in (1, 10):
        line = place[:, None] * np.ones(width)
        assert residual_variance(line, 20 - 7 * place, k=30) == pytest.approx(0, abs=1e-12)


def test_two_pieces_are_a_missing_edge_apart():
    features, labels = np.array([[0.0], [1.0], [100.0], [102.0]]), np.array([0.0, 1.0, 5.0, 6.0])
    far = 1e10
    geodesic = [[0, 1, far, far], [1, 0, far, far], [far, far, 0, 2], [far, far, 2, 0]]
    expected = 1 - pearsonr(np.ravel(geodesic), np.abs(labels[:, None] - labels).ravel()).statistic
    assert residual_variance(features, labels, k=2) == pytest.approx(expected)


@pytest.mark.parametrize("width", [2, 10])
def test_duplicates_are_edges_of_length_zero(width):
    """Every point three times; more copies of the first than it has neighbours."""
    rng = np.random.default_rng(3)
    features = np.repeat(rng.normal(size=(6, width)), 3, axis=0)
    features = np.concatenate([features, np.repeat(features[:1], 9, axis=0)])
    labels = rng.uniform(size=len(features))
    figure = residual_variance(features, labels, k=16)  # all copies are among the neighbours, so ties do not matter
    assert figure == pytest.approx(residual_variance_loop(features, labels, 16), abs=1e-12)
    neighbors = space.nearest_others(features, 4)
    assert (neighbors != np.arange(len(features))[:, None]).all()
    assert (features[neighbors[18:]] == features[0]).all()
    assert d5(np.zeros((8, width)), np.full(8, 3.0)) == 0
    assert np.isnan(residual_variance(np.zeros((8, width)), np.arange(8.0), k=4))


def test_constant_labels_have_no_residual_variance(curve):
    features, _ = curve
    assert np.isnan(residual_variance(features, np.ones(40), k=5))
    figure, k = best_residual_variance(features, np.ones(40))
    assert np.isnan(figure)
    assert k == 5
    assert d5(features, np.ones(40)) == 0


def test_search_over_many_stripes():
    """More points than fit a stripe, and a number that leaves the last one short."""
    points = np.random.default_rng(5).normal(size=(331, 9))
    gaps = np.sqrt(((points[:, None] - points) ** 2).sum(axis=2))
    np.fill_diagonal(gaps, np.inf)
    for k in (1, 4, 50, 330):
        assert np.array_equal(space.nearest_others(points, k), np.argsort(gaps, axis=1)[:, :k])


def test_search_where_float32_cannot_tell_points_apart():
    """Two far clusters with inner distances below float32's resolution, and points that coincide."""
    rng = np.random.default_rng(3)
    points = 1e-5 * rng.standard_normal((3200, 12))
    points[:1600] += 1
    points[100:120] = points[100]
    rough = torch.cdist(torch.tensor(points, dtype=torch.float32), torch.tensor(points, dtype=torch.float32))
    exact = cdist(points, points)
    np.fill_diagonal(exact, np.inf)
    rough.fill_diagonal_(torch.inf)
    right = np.sort(exact, axis=1)[:, :5]
    assert not np.allclose(np.take_along_axis(exact, rough.topk(5, largest=False).indices.numpy(), 1), right)
    found = np.take_along_axis(exact, space.nearest_others(points, 5), axis=1)
    np.testing.assert_allclose(np.sort(found, axis=1), right, rtol=1e-4, atol=1e-9)


def test_d5_of_a_sample_looks_among_all_points():
    rng = np.random.default_rng(6)
    features = rng.normal(size=(600, 2))
    labels = features[:, 0]
    every, some = d5(features, labels), d5(features, labels, max_points=200)
    assert some == pytest.approx(every, rel=0.15)  # among 200 points only, neighbours would be 1.7 times as far
    assert some == d5(features, labels, max_points=200)
    assert some != d5(features, labels, max_points=200, seed=1)


def test_best_residual_variance(curve):
    features, labels = curve
    figures = {k: residual_variance(features, labels, k=k) for k in (5, 10, 40)}
    best = min(figures, key=figures.get)
    # one subset, all points; 45 neighbours are more than there are points
    assert best_residual_variance(features, labels, ks=(5, 10, 40, 45)) == (pytest.approx(figures[best]), best)

    rng = np.random.default_rng(7)
    subsets = [rng.choice(40, 30, replace=False) for _ in range(3)]
    means = {k: np.mean([residual_variance(features[s], labels[s], k=k) for s in subsets]) for k in (5, 10)}
    figure, k = best_residual_variance(features, labels, ks=(5, 10), subset_size=30, num_subsets=3, seed=7)
    assert figure == pytest.approx(means[k])
    assert k == min(means, key=means.get)


def test_bad_input(curve):
    features, labels = curve
    broken = features.copy()
    broken[4, 1] = np.inf
    for call, message in (
        (lambda: d5(features[:5], labels[:5]), "at least 6 points are needed, got 5"),
        (lambda: d5(features, labels[:5]), r"\(N,\) or \(N, T\), got shapes .* and \(5,\)"),
        (lambda: d5(labels, labels), r"features must be \(N, D\)"),
        (lambda: d5(broken, labels), "features must be finite; row 4"),
        (lambda: residual_variance(features, broken, k=5), "labels must be finite; row 4"),
        (lambda: residual_variance(features, labels, k=41), "between 2 and the number of points, 40, got 41"),
        (lambda: residual_variance(features, labels, k=1), "got 1"),
        (lambda: best_residual_variance(features[:4], labels[:4]), "number of points, 4"),
        (lambda: residual_variance([], [], k=2), "features must be"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
