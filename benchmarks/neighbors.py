"""The neighbour read-out on a large bank: seconds, peak memory, and its difference from brute force in float64.

    python benchmarks/neighbors.py                                       # 100,000 x 256, 1,000 queries: half a minute
    python benchmarks/neighbors.py --bank 1000000 --queries 10000        # 3 GB, minutes

Features lie along a noisy curve as long as the range of the labels, as a metric loss makes them. `OMP_NUM_THREADS`
says how many threads there are.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import time

import numpy as np
import torch

from baselines.neighbors import RadiusNeighbors

SEED = 0


def curve(rng: np.random.Generator, count: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """(count, width) float32 features and (count,) float32 standardised labels."""
    labels = rng.standard_normal(count, dtype=np.float32)
    features = 0.02 * rng.standard_normal((count, width), dtype=np.float32)
    features[:, 0] += labels
    features[:, 1] += np.sin(labels)
    return features, labels


def brute_force(features: np.ndarray, labels: np.ndarray, query: np.ndarray, radius: float) -> float:
    """The definition for one query, from differences in float64."""
    distance = np.sqrt(((features.astype(np.float64) - query) ** 2).sum(axis=1))
    inside = distance <= radius
    inside[distance.argmin()] = True
    weight = np.exp(-((3 * distance[inside] / radius) ** 2) / 2) + 1e-16
    return float((weight * labels[inside]).sum() / weight.sum())


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bank", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=1_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--radii", type=float, nargs="+", default=[0.001, 0.4, 0.6])
    parser.add_argument("--checked", type=int, default=5, help="queries compared with brute force")
    arguments = parser.parse_args()
    rng = np.random.default_rng(SEED)
    bank = curve(rng, arguments.bank, arguments.width)
    queries, _ = curve(rng, arguments.queries, arguments.width)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, load "
        f"{os.getloadavg()[0]:.1f}; torch {torch.__version__}, seed {SEED}; "
        f"bank {arguments.bank:,} x {arguments.width}, {arguments.queries:,} queries"
    )
    print("| radius | seconds | processor seconds | peak memory above the bank, GB | largest difference |")
    print("|---:|---:|---:|---:|---:|")
    for radius in arguments.radii:
        model = RadiusNeighbors(radius).fit(*bank)
        exact = model.radius.item()  # as rounded to float32
        before, wall, processor = peak_gb(), time.perf_counter(), time.process_time()
        answers = model.predict(queries).double().numpy()
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        checked = range(min(arguments.checked, arguments.queries))
        memory = peak_gb() - before
        difference = max(abs(answers[row] - brute_force(*bank, queries[row], exact)) for row in checked)
        print(f"| {radius:g} | {wall:.1f} | {processor:.1f} | {memory:.2f} | {difference:.1e} |", flush=True)


if __name__ == "__main__":
    main()
