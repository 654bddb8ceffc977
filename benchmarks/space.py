"""D5 and residual variance against scikit-learn's neighbours and dense shortest paths, as ratios in one run.

    python benchmarks/space.py                   # half a minute
    python benchmarks/space.py --large           # also D5 of 100,000 points

Needs scikit-learn (`pip install -e '.[bench]'`). Both sides take turns; shown are medians of processor seconds and the
ratio of the medians. Set OMP_NUM_THREADS=1 where others compute too: both sides then have one thread.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import scipy
import sklearn
import torch
from scipy.sparse.csgraph import floyd_warshall
from scipy.stats import pearsonr
from sklearn.neighbors import NearestNeighbors

from ordinalclip.metrics import d5, residual_variance

SEED = 0


def plain_d5(features: np.ndarray, labels: np.ndarray) -> float:
    neighbors = NearestNeighbors(n_neighbors=5).fit(features).kneighbors(return_distance=False)
    return float(np.abs(labels[neighbors] - labels[:, None]).mean())


def dense_residual_variance(features: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Floyd and Warshall's algorithm on the matrix of all edges, missing ones 1e10 long."""
    graph = NearestNeighbors(n_neighbors=k - 1).fit(features).kneighbors_graph(mode="distance").toarray()
    graph = np.maximum(graph, graph.T)
    graph[graph == 0] = 1e10
    np.fill_diagonal(graph, 0)
    distances = np.abs(labels[:, None] - labels)
    return float(1 - pearsonr(floyd_warshall(graph).ravel(), distances.ravel()).statistic)


def compare(title: str, ours: Callable[[], float], other: Callable[[], float], repeats: int) -> None:
    """Time both in turn and print a row."""
    seconds: tuple[list[float], list[float]] = ([], [])
    figures = [0.0, 0.0]
    ours(), other()  # the first calls load code and allocate
    for _ in range(repeats):
        for side, call in enumerate((ours, other)):
            start = time.process_time()
            figures[side] = call()
            seconds[side].append(time.process_time() - start)
    mine, theirs = median(seconds[0]), median(seconds[1])
    difference = abs(figures[0] - figures[1])
    print(f"| {title} | {mine:.3f} | {theirs:.3f} | {theirs / mine:.2f} | {difference:.1e} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--large", action="store_true", help="also D5 of 100,000 points")
    arguments = parser.parse_args()
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, load "
        f"{os.getloadavg()[0]:.1f}; torch {torch.__version__}, numpy {np.__version__}, scipy {scipy.__version__}, "
        f"scikit-learn {sklearn.__version__}, seed {SEED}"
    )
    print("| | here, s | other, s | other / here | difference |\n|---|---:|---:|---:|---:|")
    rng = np.random.default_rng(SEED)

    def data(count: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        labels = rng.standard_normal(count)
        features = 0.3 * rng.standard_normal((count, width))
        features[:, 0] += labels
        return features, labels

    given = data(2000, 64)
    compare(
        "residual variance, 2,000 x 64, k = 10; Floyd-Warshall",
        lambda: residual_variance(*given, k=10),
        lambda: dense_residual_variance(*given, k=10),
        min(arguments.repeats, 2),
    )
    sizes = [(2000, 4), (2000, 64), (5000, 12), (5000, 256)] + ([(100_000, 64)] if arguments.large else [])
    for count, width in sizes:
        given = data(count, width)
        title = f"D5, {count:,} x {width}; NearestNeighbors"
        compare(title, lambda given=given: d5(*given), lambda given=given: plain_d5(*given), arguments.repeats)


if __name__ == "__main__":
    main()
