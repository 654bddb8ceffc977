"""Rare ranks: sample weights, and an order of samples in which every rank comes equally often."""

from __future__ import annotations

from typing import Literal

import numpy as np

Weighting = Literal["none", "inverse", "sqrt_inverse"]


def sample_weights(
    ranks: np.ndarray, num_ranks: int, weighting: Weighting, lds_sigma: float | None = None
) -> np.ndarray | None:
    """Weights by the frequency of a sample's rank.

    With `lds_sigma` the frequencies are first smoothed over neighbouring ranks by a Gaussian kernel:
    label-distribution smoothing (Yang et al., ICML 2021), mirrored at the ends so that none of them lacks neighbours.

    Args:
        ranks: (N,) int64 ranks of the training part.
        num_ranks: R.
        weighting: "none", "inverse" or "sqrt_inverse" frequency.
        lds_sigma: width of the kernel in ranks; None: no smoothing.

    Returns:
        (N,) float64 weights with mean 1, or None for "none".

    Raises:
        ValueError: smoothing without weighting.

    >>> sample_weights(np.array([0, 0, 0, 1]), 2, "inverse").round(3).tolist()
    [0.667, 0.667, 0.667, 2.0]
    """
    if weighting == "none":
        if lds_sigma is not None:
            raise ValueError("train.lds_sigma smooths frequencies for train.weighting=inverse or sqrt_inverse")
        return None
    frequency = np.bincount(ranks, minlength=num_ranks).astype(np.float64)
    if lds_sigma is not None:
        distance = np.arange(num_ranks)
        mirrored = np.stack([distance, -1 - distance, 2 * num_ranks - 1 - distance])  # each rank and its two images
        kernel = np.exp(-0.5 * ((distance[:, None, None] - mirrored) / lds_sigma) ** 2).sum(axis=1)
        frequency = (kernel / kernel.sum(axis=1, keepdims=True)) @ frequency
    weights = 1 / frequency[ranks] ** (1.0 if weighting == "inverse" else 0.5)
    return weights / weights.mean()


def balanced_order(ranks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(N,) sample indices in which every rank that occurs comes equally often, give or take one.

    Samples of frequent ranks are left out at random, those of rare ranks repeated, none of them twice before all of
    its rank were taken.
    """
    present = rng.permutation(np.unique(ranks))
    quotas = np.full(len(present), len(ranks) // len(present))
    quotas[: len(ranks) % len(present)] += 1
    drawn = []
    for rank, quota in zip(present, quotas, strict=True):
        members = np.flatnonzero(ranks == rank)
        rounds = -(-quota // len(members))
        drawn.append(np.concatenate([rng.permutation(members) for _ in range(rounds)] or [members[:0]])[:quota])
    return rng.permutation(np.concatenate(drawn))
