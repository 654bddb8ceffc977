"""How well the distances in a feature space follow the labels (Chao et al., MICCAI 2022, section 3.2).

All functions take (N, D) features, and (N,) labels or (N, T) labels of T dimensions, whose distance is Euclidean.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.sparse import coo_array
from scipy.sparse.csgraph import dijkstra
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist
from torch import Tensor

MISSING_EDGE = 1e10  # length of an edge that the neighbour graph does not have
TREE_WIDTH = 8  # up to this many dimensions a k-d tree beats matrix products
QUERY_BLOCK, STRIPE = 256, 64
FEW_POINTS, SPARE = 3000, 11  # up to so many points float32 saves nothing; candidates beyond the k that are wanted


def d5(features: ArrayLike | Tensor, labels: ArrayLike | Tensor, max_points: int = 10_000, seed: int = 0) -> float:
    """Mean label distance of a point to its 5 nearest neighbours in feature space, in the label's unit.

    Of more than `max_points` points a random choice of that many is averaged over; their neighbours are still looked
    for among all points, so the expected value is the same.

    Raises:
        ValueError: fewer than 6 points, wrong shapes, or numbers that are not finite.

    >>> d5(np.arange(6.0)[:, None], np.arange(6.0))
    2.3333333333333335
    """
    points, values = _checked(features, labels, at_least=6)
    chosen = np.arange(len(points))
    if len(points) > max_points:
        chosen = np.random.default_rng(seed).choice(len(points), max_points, replace=False)
    neighbors = nearest_others(points, 5, chosen)
    return float(np.linalg.norm(values[neighbors] - values[chosen, None], axis=2).mean())


def residual_variance(features: ArrayLike | Tensor, labels: ArrayLike | Tensor, k: int = 10) -> float:
    """1 - Pearson correlation of geodesic feature distances and label distances, over all N^2 pairs.

    The geodesic distance is the length of the shortest path on the graph that joins each point with its k - 1 nearest
    others (k counts the point itself), in either direction; an edge that is missing has length 1e10, and so has the
    way between points that no path joins. Takes O(N^2) memory: see `best_residual_variance` for large sets.

    Returns:
        0 for distances that are proportional; NaN when all labels or all features are equal.

    Raises:
        ValueError: k outside 2 .. N, wrong shapes, or numbers that are not finite.

    >>> round(residual_variance([[0.0], [1.0], [2.0]], [5.0, 7.0, 9.0], k=2), 12)
    0.0
    """
    points, values = _checked(features, labels)
    if not 2 <= k <= len(points):
        raise ValueError(f"k must be between 2 and the number of points, {len(points)}, got {k}")
    neighbors = nearest_others(points, k - 1)
    return _unexplained(neighbors, _lengths(points, neighbors), cdist(values, values))


def best_residual_variance(
    features: ArrayLike | Tensor,
    labels: ArrayLike | Tensor,
    ks: Sequence[int] = range(5, 201, 5),
    subset_size: int = 1000,
    num_subsets: int = 10,
    seed: int = 0,
) -> tuple[float, int]:
    """Residual variance as published: the mean over random subsets, at the k that makes it smallest.

    With at most `subset_size` points there is one subset, all of them. Every k sees the same subsets; values of k above
    their size are left out. The defaults take some minutes: 400 times all shortest paths among 1,000 points.

    Returns:
        the residual variance and its k; NaN and the first k where it is not defined for any.

    Raises:
        ValueError: fewer points than the smallest k, wrong shapes, or numbers that are not finite.
    """
    points, values = _checked(features, labels)
    size = min(subset_size, len(points))
    usable = [k for k in ks if 2 <= k <= size]
    if not usable:
        raise ValueError(f"no k of {list(ks)} lies between 2 and the number of points, {size}")
    if size == len(points):
        subsets = [np.arange(size)]
    else:
        rng = np.random.default_rng(seed)
        subsets = [rng.choice(len(points), size, replace=False) for _ in range(num_subsets)]
    unexplained = np.zeros((len(subsets), len(usable)))
    for row, subset in enumerate(subsets):
        neighbors = nearest_others(points[subset], max(usable) - 1)
        lengths = _lengths(points[subset], neighbors)
        label_distances = cdist(values[subset], values[subset])
        for column, k in enumerate(usable):
            unexplained[row, column] = _unexplained(neighbors[:, : k - 1], lengths[:, : k - 1], label_distances)
    means = unexplained.mean(axis=0)
    best = 0 if np.isnan(means).all() else int(np.nanargmin(means))
    return float(means[best]), usable[best]


def nearest_others(points: np.ndarray, k: int, chosen: np.ndarray | None = None) -> np.ndarray:
    """The k nearest points of each chosen point, itself not among them, by exact search in float64.

    Above `TREE_WIDTH` dimensions, points nearer to each other than 1e-8 of the extent of all are not told apart.

    Args:
        points: (N, D) float64, N > k.
        chosen: (Q,) rows to look from; default: all.

    Returns:
        (Q, k) rows of points, nearest first.
    """
    chosen = np.arange(len(points)) if chosen is None else chosen
    search = _by_tree if points.shape[1] <= TREE_WIDTH else _by_products
    return search(points, k, chosen)


def _by_tree(points: np.ndarray, k: int, chosen: np.ndarray) -> np.ndarray:
    _, neighbors = cKDTree(points).query(points[chosen], k + 1, workers=torch.get_num_threads())
    other = neighbors != chosen[:, None]
    other[other.all(axis=1), -1] = False  # so many copies of the point that itself is not among them
    return neighbors[other].reshape(-1, k)


def _by_products(points: np.ndarray, k: int, chosen: np.ndarray) -> np.ndarray:
    """By blocked matrix products in float32, which take half the time, proven right or repeated in float64.

    Around the mean and scaled, |p|^2 - 2 q.p is the squared distance less |q|^2. Its float32 value is at most `bound`
    off. A few more candidates than k are taken by it and ranked by their exact distances; if the k-th is below the
    largest float32 value by more than the bound, no point outside them can be among the k nearest.
    """
    centered = points - points.mean(axis=0)
    centered /= max(np.abs(centered).max(), np.finfo(np.float64).tiny)
    if len(points) < FEW_POINTS:
        return _smallest_products(centered, k, chosen, np.float64)[0]
    taken = min(k + SPARE, len(points) - 1)
    candidates, values = _smallest_products(centered, taken, chosen, np.float32)
    neighbors, squared = _ranked(centered, candidates, chosen)
    norms = (centered**2).sum(axis=1)
    longest = norms.max() ** 0.5
    reach = np.finfo(np.float32).eps * (points.shape[1] + 4)  # of a dot product, per size of its terms
    bound = reach * longest * (2 * norms[chosen] ** 0.5 + longest)
    unproven = np.flatnonzero(squared[:, k - 1] - norms[chosen] >= values.max(axis=1) - bound)
    if len(unproven):
        again = chosen[unproven]
        neighbors[unproven], _ = _ranked(centered, _smallest_products(centered, taken, again, np.float64)[0], again)
    return neighbors[:, :k]


def _ranked(points: np.ndarray, candidates: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(Q, C) candidates in the order of their squared distances, and these, from differences: without cancellation."""
    ranked, distances = np.empty_like(candidates), np.empty(candidates.shape)
    for start in range(0, len(chosen), QUERY_BLOCK):
        block = slice(start, start + QUERY_BLOCK)
        gaps = points[candidates[block]]
        gaps -= points[chosen[block], None]
        squared = np.einsum("qcd,qcd->qc", gaps, gaps)
        order = np.argsort(squared, axis=1, kind="stable")
        ranked[block] = np.take_along_axis(candidates[block], order, axis=1)
        distances[block] = np.take_along_axis(squared, order, axis=1)
    return ranked, distances


def _smallest_products(
    centered: np.ndarray, k: int, chosen: np.ndarray, dtype: type[np.floating]
) -> tuple[np.ndarray, np.ndarray]:
    """The k other points with the smallest |p|^2 - 2 q.p for every chosen q: (Q, k) rows, nearest first, and values.

    Sorting N numbers costs more than computing them. So the N points are dealt into stripes of 64, and only the k
    stripes with the smallest minima are searched: they hold the k smallest. The products are NumPy's, whose OpenBLAS
    is a tenth faster in float64 than PyTorch's MKL on the processors tried.
    """
    count, width = len(centered), -(-len(centered) // STRIPE)  # stripe s holds the points s, s + width, ...
    bank = np.zeros((STRIPE * width, centered.shape[1] + 1), dtype)  # [-2 p, |p|^2]; infinitely far where no point is
    bank[:count, :-1] = -2 * centered
    bank[:count, -1] = (centered**2).sum(axis=1)
    bank[count:, -1] = np.inf
    queries = np.pad(centered[chosen].astype(dtype), ((0, 0), (0, 1)), constant_values=1.0)  # [q, 1]
    room = np.empty((QUERY_BLOCK, len(bank)), dtype)  # reused: fresh pages cost as much as a tenth of the product
    neighbors, values = [], []
    for start in range(0, len(chosen), QUERY_BLOCK):
        rows = chosen[start : start + QUERY_BLOCK]
        squared = np.matmul(queries[start : start + QUERY_BLOCK], bank.T, out=room[: len(rows)])
        squared[np.arange(len(rows)), rows] = np.inf
        stripes = torch.from_numpy(squared).view(len(rows), STRIPE, width)
        kept = stripes.amin(dim=1).topk(min(k, width), largest=False, sorted=False).indices.unsqueeze(1)
        found = stripes.gather(2, kept.expand(-1, STRIPE, -1)).flatten(1).topk(k, largest=False)
        depth, column = found.indices // kept.shape[2], found.indices % kept.shape[2]
        neighbors.append(depth * width + kept.squeeze(1).gather(1, column))
        values.append(found.values)
    return torch.cat(neighbors).numpy(), torch.cat(values).double().numpy()


def _lengths(points: np.ndarray, neighbors: np.ndarray) -> np.ndarray:
    """(N, k) distances to (N, k) neighbours, from the differences: exactly 0 between equal points."""
    return np.stack([np.linalg.norm(points[others] - points, axis=1) for others in neighbors.T], axis=1)


def _unexplained(neighbors: np.ndarray, lengths: np.ndarray, label_distances: np.ndarray) -> float:
    """1 - Pearson of the geodesics on the graph of (N, k) neighbours and the (N, N) label distances."""
    size = len(neighbors)
    start, end = np.repeat(np.arange(size), neighbors.shape[1]), neighbors.ravel()
    # Each edge once in each direction: coo_array would add up the edges that both ends name.
    _, once = np.unique(np.minimum(start, end) * size + np.maximum(start, end), return_index=True)
    start, end, length = start[once], end[once], lengths.ravel()[once]
    both = (np.concatenate([start, end]), np.concatenate([end, start]))
    graph = coo_array((np.concatenate([length, length]), both), shape=(size, size)).tocsr()
    geodesics = np.minimum(dijkstra(graph), MISSING_EDGE)
    return 1 - _correlation(geodesics, label_distances)


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson over all entries; NaN when either side is constant."""
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    first, second = first - first.mean(), second - second.mean()
    return float(np.vdot(first, second) / np.sqrt(np.vdot(first, first) * np.vdot(second, second)))


def _checked(
    features: ArrayLike | Tensor, labels: ArrayLike | Tensor, at_least: int = 2
) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, D) and labels (N, T) in float64."""
    points, values = (
        np.asarray(given.detach().cpu() if isinstance(given, Tensor) else given, dtype=np.float64)
        for given in (features, labels)
    )
    if points.ndim != 2 or points.shape[1] == 0 or values.ndim not in (1, 2) or len(values) != len(points):
        raise ValueError(
            f"features must be (N, D) and labels (N,) or (N, T), got shapes {points.shape} and {values.shape}"
        )
    if len(points) < at_least:
        raise ValueError(f"at least {at_least} points are needed, got {len(points)}")
    values = values.reshape(len(points), -1)
    for name, numbers in (("features", points), ("labels", values)):
        finite = np.isfinite(numbers).all(axis=1)
        if not finite.all():
            raise ValueError(f"{name} must be finite; row {int(np.argmin(finite))} is not")
    return points, values
