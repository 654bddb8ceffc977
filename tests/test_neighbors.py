"""The neighbour read-outs against published figures, plain loops, and themselves after saving."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from baselines import neighbors
from baselines.neighbors import NearestNeighbors, RadiusNeighbors

GOLDEN = json.loads((Path(__file__).parent / "golden" / "baselines_open.json").read_text())["nn"]


def loop(features, labels, queries, radius):
    """The definition, one query at a time, in float64."""
    features, labels, queries = (np.asarray(given, dtype=np.float64) for given in (features, labels, queries))
    answers = []
    for query in queries:
        distance = np.sqrt(((features - query) ** 2).sum(axis=1))
        chosen = sorted(set(np.flatnonzero(distance <= radius)) | {int(np.argmin(distance))})
        weight = np.exp(-((3 * distance[chosen] / radius) ** 2) / 2) + 1e-16
        answers.append((weight * labels[chosen]).sum() / weight.sum())
    return np.array(answers)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(neighbors, "QUERY_BLOCK", 7)
    monkeypatch.setattr(neighbors, "BANK_BLOCK", 11)
    monkeypatch.setattr(neighbors, "PAIR_BLOCK", 5)


def rows(count, width=6, seed=0, offset=0.0, scale=1.0):
    rng = np.random.default_rng(seed)
    return rng.normal(offset, scale, (count, width)), rng.uniform(0, 100, count)


@pytest.mark.parametrize("radius", GOLDEN["predictions_by_radius"])
def test_golden(radius):
    bank, labels = np.array(GOLDEN["bank"], np.float32), np.array(GOLDEN["bank_labels"], np.float32)
    answers = RadiusNeighbors(float(radius)).fit(bank, labels).predict(np.array(GOLDEN["queries"], np.float32))
    assert answers.dtype == torch.float32
    assert answers.numpy() == pytest.approx(GOLDEN["predictions_by_radius"][radius], abs=1e-5)


@pytest.mark.parametrize("radius", [2**-9, 0.5, 2.0, 64.0])  # exact in float32, as the buffer is
@pytest.mark.parametrize("offset, scale", [(0, 1), (1000, 1), (-5, 1e-3)])
def test_against_a_loop(small_blocks, radius, offset, scale):
    """Radii that hold none, some and all of the bank; features far from the origin, where products cancel."""
    features, labels = rows(60, offset=offset, scale=scale)
    queries = np.concatenate([rows(20, seed=1, offset=offset, scale=scale)[0], features[:3]])
    answers = RadiusNeighbors(radius).fit(features, labels).predict(queries)
    assert answers.numpy() == pytest.approx(loop(features, labels, queries, radius), rel=1e-8)


def test_clusters_far_from_the_middle(small_blocks):
    """Norms of 1e5 and distances of 1e-3: the products alone would be wrong in the first digit."""
    features, labels = rows(60, scale=1e-3)
    features[::2] += 1e5
    features[1::2] -= 1e5
    for radius in (2**-12, 2**-9, 2**-8):
        answers = RadiusNeighbors(radius).fit(features, labels).predict(features + 1e-4)
        assert answers.numpy() == pytest.approx(loop(features, labels, features + 1e-4, radius), rel=1e-8)


def test_ties_and_distances_equal_to_the_radius(small_blocks):
    grid = np.stack(np.meshgrid(np.arange(6.0), np.arange(6.0)), axis=-1).reshape(-1, 2) + 1000
    features = np.concatenate([grid, grid[::-1]])  # every point twice, with labels that no symmetry averages out
    labels = np.random.default_rng(5).uniform(0, 100, 72)
    for radius in (0.25, 1.0, 5.0):  # 0.25: the first of two equals; 1 and 5: points exactly on the circle
        queries = np.concatenate([grid, grid + np.array([0.5, 0.0])])
        answers = RadiusNeighbors(radius).fit(features, labels).predict(queries)
        assert answers.numpy() == pytest.approx(loop(features, labels, queries, radius), rel=1e-9)


def test_the_nearest_of_nearly_equal_distances(small_blocks):
    """Two points at distance 1 of each query, one of them by 1e-11 nearer: less than the products can tell."""
    rng = np.random.default_rng(8)
    queries = rng.normal(0, 300, (40, 6))
    directions = rng.normal(size=(2, 40, 6))
    directions /= np.linalg.norm(directions, axis=2, keepdims=True)
    nearer = rng.integers(0, 2, 40)
    features = np.concatenate([queries + directions[k] * (1 + 1e-11 * (nearer != k))[:, None] for k in (0, 1)])
    labels = np.arange(80.0)
    answers = RadiusNeighbors(2**-7).fit(features, labels).predict(queries)
    assert answers.numpy() == pytest.approx(loop(features, labels, queries, 2**-7), rel=1e-12)
    assert answers.tolist() == (np.arange(40) + 40 * nearer).tolist()


def test_answers_do_not_depend_on_blocks_and_order(monkeypatch):
    features, labels = rows(50)
    queries = rows(30, seed=2)[0]
    whole = RadiusNeighbors(1.5).fit(features, labels).predict(queries)
    order = np.random.default_rng(3).permutation(50)
    torch.testing.assert_close(RadiusNeighbors(1.5).fit(features[order], labels[order]).predict(queries), whole)
    monkeypatch.setattr(neighbors, "BANK_BLOCK", 3)
    monkeypatch.setattr(neighbors, "QUERY_BLOCK", 1)
    torch.testing.assert_close(RadiusNeighbors(1.5).fit(features, labels).predict(queries), whole)


def search(mae):
    """The radius search as a loop over a function of the radius."""
    low, high = 0.001, 0.5
    while high - low > 0.005:
        middle = (low + high) / 2
        if mae(middle + min(0.02, high - low)) >= mae(middle):
            high = middle
        else:
            low = middle
    best = (low + high) / 2
    least, start = mae(best), best
    for step in range(1, 16):
        for radius in (start - 0.002 * step, start + 0.002 * step):
            if radius > 0 and mae(radius) < least:
                best, least = radius, mae(radius)
    return best


@pytest.mark.parametrize("noise", [0.0, 0.1, 1.0])
def test_radius_search(noise):
    """Noisy labels want many neighbours, clean ones few."""
    rng = np.random.default_rng(4)
    place = rng.uniform(0, 1, (90, 1))
    features, labels = np.hstack([place, place**2]), 3 * place[:, 0] + noise * rng.normal(size=90)
    train, validation = (features[:60], labels[:60]), (features[60:], labels[60:])
    fitted = RadiusNeighbors().fit(*train, validation=validation)
    expected = search(lambda radius: np.abs(loop(*train, validation[0], radius) - validation[1]).mean())
    assert fitted.radius.item() == pytest.approx(expected, rel=1e-6)
    if noise != 0.1:
        assert (expected > 0.2) == (noise == 1.0)


@pytest.mark.parametrize("steps", [40, 100, 400])
def test_radius_search_on_errors_of_any_shape(monkeypatch, steps):
    """Steps at random heights, so that slopes are flat, equal and misleading, as a function of the radius alone."""
    radii = []
    for seed in range(30):
        heights = np.random.default_rng(seed).integers(1, 6, steps + 1)

        def mae(radius, heights=heights):
            return float(heights[min(steps, int(radius / 0.56 * steps))])

        monkeypatch.setattr(
            RadiusNeighbors,
            "_answers",
            lambda self, queries, given, mae=mae: torch.tensor([[mae(radius)] * len(queries) for radius in given]),
        )
        fitted = RadiusNeighbors().fit([[0.0]], [0.0], validation=([[0.0]] * 3, [0.0] * 3))
        assert fitted.radius.item() == pytest.approx(search(mae), rel=1e-6)
        radii.append(fitted.radius.item())
    assert len(set(radii)) > 3


def test_saved_bank_is_restored_strictly():
    features, labels = rows(20)
    fitted = RadiusNeighbors(0.7).fit(torch.tensor(features).float(), torch.tensor(labels).float())
    restored = torch.nn.Sequential(RadiusNeighbors())  # inside another module, as in a head
    restored.load_state_dict(torch.nn.Sequential(fitted).state_dict(), strict=True)
    queries = torch.tensor(rows(5, seed=1)[0])
    assert torch.equal(restored[0].predict(queries), fitted.predict(queries))
    state = fitted.state_dict()
    assert set(state) == {"features", "labels", "radius"}
    with pytest.raises(RuntimeError, match="Missing key"):
        RadiusNeighbors().load_state_dict({"features": state["features"], "radius": state["radius"]})
    with pytest.raises(RuntimeError, match="size mismatch"):
        RadiusNeighbors().load_state_dict({**state, "labels": state["labels"][:4]})


def test_the_bank_is_a_copy_and_may_be_replaced():
    features, labels = (torch.tensor(array) for array in rows(20))
    model = RadiusNeighbors(0.5).fit(features, labels)
    before = model.predict(features)
    labels += 100
    assert torch.equal(model.predict(features), before)
    model.fit(features[:4], labels[:4])
    assert model.features.shape == (4, 6)
    assert model.predict(features[:0]).shape == (0,)


def loop_nearest(features, labels, queries, count):
    """The definition, one query at a time, in float64: of equally far ones the first."""
    features, labels, queries = (np.asarray(given, dtype=np.float64) for given in (features, labels, queries))
    squared = [((features - query) ** 2).sum(axis=1) for query in queries]
    return np.array([labels[np.argsort(each, kind="stable")[:count]].mean() for each in squared])


@pytest.mark.parametrize("count", [1, 2, 10, 25, 60, 200])
@pytest.mark.parametrize("offset, scale", [(0, 1), (1000, 1), (-5, 1e-3)])
def test_nearest_against_a_loop(small_blocks, count, offset, scale):
    """More than a block of the bank, more than all of it; features far from the origin."""
    features, labels = rows(60, offset=offset, scale=scale)
    queries = np.concatenate([rows(20, seed=1, offset=offset, scale=scale)[0], features[:3]])
    answers = NearestNeighbors(count).fit(features, labels).predict(queries)
    assert answers.numpy() == pytest.approx(loop_nearest(features, labels, queries, count), rel=1e-12)


def test_nearest_clusters_far_from_the_middle(small_blocks):
    """Norms of 1e5 and distances of 1e-3, which the products alone cannot order."""
    features, labels = rows(60, scale=1e-3)
    features[::2] += 1e5
    features[1::2] -= 1e5
    for count in (1, 4, 31):
        answers = NearestNeighbors(count).fit(features, labels).predict(features + 1e-4)
        assert answers.numpy() == pytest.approx(loop_nearest(features, labels, features + 1e-4, count), rel=1e-12)


@pytest.mark.parametrize("block", [3, 11, 8192])
def test_of_equally_far_the_first_count(monkeypatch, block):
    """On a grid, every point twice: ties at the last place within a block and across blocks."""
    monkeypatch.setattr(neighbors, "BANK_BLOCK", block)
    grid = np.stack(np.meshgrid(np.arange(6.0), np.arange(6.0)), axis=-1).reshape(-1, 2) + 1000
    features = np.concatenate([grid, grid[::-1]])
    labels = np.random.default_rng(5).uniform(0, 100, 72)
    queries = np.concatenate([grid, grid + np.array([0.5, 0.0])])
    for count in (1, 3, 6, 40):
        answers = NearestNeighbors(count).fit(features, labels).predict(queries)
        assert answers.numpy() == pytest.approx(loop_nearest(features, labels, queries, count), rel=1e-12)
    same = NearestNeighbors(3).fit(np.ones((72, 2)), labels).predict(np.ones((1, 2)))
    assert same.item() == pytest.approx(labels[:3].mean())


@pytest.mark.parametrize(
    ("bank", "seed", "expected"), [(1, 0, [1, 1]), (5, 4, [2, 4]), (40, 0, [2, 8]), (90, 0, [4, 6])]
)
def test_the_number_of_nearest_is_that_of_the_least_validation_error(bank, seed, expected):
    """Of answers as they are given: rounded means may want more neighbours. The bank may hold fewer than are tried."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 5, bank).astype(float)
    features = rng.normal(size=(bank, 2)) + labels[:, None]
    queries, truth = features[:30] + 0.3, labels[:30]
    counts = [count for count in range(2, 59, 2) if count <= bank] or [1]
    for answered, best in zip((lambda means: means, torch.round), expected, strict=True):
        means = [torch.tensor(loop_nearest(features, labels, queries, count)) for count in counts]
        errors = [np.abs(answered(each).numpy() - truth).mean() for each in means]
        assert counts[int(np.argmin(np.round(errors, 9)))] == best
        assert NearestNeighbors().fit(features, labels, (queries, truth), answered).count == best


def test_a_saved_number_of_nearest_is_restored():
    features, labels = rows(20)
    fitted = NearestNeighbors(3).fit(torch.tensor(features).float(), torch.tensor(labels).float())
    restored = NearestNeighbors()
    restored.load_state_dict(fitted.state_dict(), strict=True)
    assert set(fitted.state_dict()) == {"features", "labels", "count"}
    assert torch.equal(restored.predict(features), fitted.predict(features))
    assert restored.half().count == 3  # a cast leaves it an integer


@pytest.mark.parametrize("count", [0, -2])
def test_bad_number_of_nearest(count):
    with pytest.raises(ValueError, match=f"integer of at least 1, got {count}"):
        NearestNeighbors(count)
    with pytest.raises(ValueError, match=r"NearestNeighbors\(count\) or fit\(..., validation=\)"):
        NearestNeighbors().fit([[0.0]], [0.0])
    with pytest.raises(RuntimeError, match=r"NearestNeighbors.predict needs a bank.*call fit first"):
        NearestNeighbors(2).predict([[0.0]])


@pytest.mark.parametrize("radius", [0, -0.1, float("nan"), float("inf")])
def test_bad_radius(radius):
    with pytest.raises(ValueError, match="finite number above 0"):
        RadiusNeighbors(radius)


def test_bad_input():
    features, labels = rows(8)
    broken = features.copy()
    broken[5, 2] = np.nan
    model = RadiusNeighbors(0.5)
    with pytest.raises(RuntimeError, match="call fit first"):
        model.predict(features)
    with pytest.raises(ValueError, match=r"RadiusNeighbors\(radius\) or fit\(..., validation=\)"):
        RadiusNeighbors().fit(features, labels)
    for arguments, message in (
        ((features[0], labels), r"training features must be \(N, D\).*\(6,\)"),
        ((features[:0], labels[:0]), "N >= 1"),
        ((features, labels[:5]), r"got shapes \(5,\) and \(8, 6\)"),
        ((features, labels[:, None]), r"got shapes \(8, 1\)"),
        ((broken, labels), "training features must be finite; row 5"),
        ((features, broken[:, 2]), "training labels must be finite; row 5"),
        ((features, labels, (features[:, :2], labels)), "validation features must have the 6 columns.* got 2"),
        ((features, labels, (features[:0], labels[:0])), "validation labels"),
    ):
        with pytest.raises(ValueError, match=message):
            model.fit(*arguments)
        assert len(model.features) == 0  # a refused part changes nothing
    model.fit(features, labels)
    with pytest.raises(ValueError, match=r"queries must have the 6 columns.* got 3"):
        model.predict(features[:, :3])
    with pytest.raises(ValueError, match="queries must be finite; row 5"):
        model.predict(broken)
