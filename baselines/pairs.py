"""Matrices over the pairs of a batch."""

from __future__ import annotations

import torch
from torch import Tensor


def pairwise_distances(points: Tensor) -> Tensor:
    """Euclidean distances (B, B) of (B, D) points, in O(B^2) memory.

    Exact differences instead of the expanded square, which loses all digits of near pairs. Where points coincide the
    gradient is 0, not that of a root at 0.
    """
    return torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")


def without_diagonal(square: Tensor) -> Tensor:
    """(B, B) -> (B, B - 1): every sample and its others."""
    size = len(square)
    return square.flatten()[1:].view(size - 1, size + 1)[:, :-1].reshape(size, size - 1)


def mean_of(losses: Tensor, counted: Tensor) -> Tensor:
    """Mean of losses that count as often as `counted` says; 0, with gradient 0, where none does."""
    return (losses * counted).sum() / counted.sum().clamp(min=torch.finfo(losses.dtype).tiny)
