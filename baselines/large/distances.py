"""Signed distances of codes from a hyperplane, layer by layer: the feature that LARGE regresses from."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from baselines.large.inputs import numbers


def signed_distances(codes: ArrayLike | Tensor, normals: ArrayLike | Tensor, intercept: float = 0.0) -> Tensor:
    """d_l = <w_l, n_l> + b of every layer l (Nitzan et al., CVPR 2022; as in the authors' code).

    Normals are taken as they are: distances are in units of their length. What the intercept moves, the offset of a
    calibration moves back, so that 0 serves.

    Args:
        codes: (N, L, D).
        normals: (L, D). Single layers may be zero, as those of text pairs are where no channel is relevant.
        intercept: b, of every layer.

    Returns:
        (N, L), in the dtype of the codes.

    Raises:
        ValueError: other shapes, numbers that are not finite, or normals that are all zero.

    >>> signed_distances([[[3.0, 1.0], [0.0, 2.0]]], [[1.0, 0.0], [0.0, -1.0]])
    tensor([[ 3., -2.]], dtype=torch.float64)
    """
    codes = numbers(codes, "codes", "N L D")
    normals = direction(normals, codes)
    return torch.einsum("nld,ld->nl", codes, normals) + float(numbers([intercept], "intercept", "1"))


def weighted_distance(distances: ArrayLike | Tensor, weights: ArrayLike | Tensor | None = None) -> Tensor:
    """x = sum_l lambda_l d_l, one number per code.

    Args:
        distances: (N, L).
        weights: (L,), none below 0, by their sum; None: all layers count the same, which is the distance of the whole
            code from the whole normal, divided by L.

    Returns:
        (N,).

    Raises:
        ValueError: other shapes, numbers that are not finite, a weight below 0, or none above.

    >>> weighted_distance([[3.0, -2.0]], [3.0, 1.0])
    tensor([1.7500], dtype=torch.float64)
    """
    distances = numbers(distances, "distances", "N L")
    if weights is None:
        return distances.mean(dim=1)
    weights = numbers(weights, "weights", "L").to(distances)
    if weights.shape != distances.shape[1:]:
        raise ValueError(f"weights must be one per layer, ({distances.shape[1]},), got shape {tuple(weights.shape)}")
    if weights.min() < 0 or weights.max() == 0:
        raise ValueError(f"weights must be 0 or above, and one of them above 0, got {weights.tolist()}")
    return distances @ (weights / weights.sum())


def sort_by_direction(
    codes: ArrayLike | Tensor,
    normals: ArrayLike | Tensor,
    weights: ArrayLike | Tensor | None = None,
    against: ArrayLike | Tensor | None = None,
) -> np.ndarray:
    """Codes in the order of their distance, ascending, without any label. Equal ones keep their order.

    Args:
        codes: (N, L, D).
        normals: (L, D).
        weights: (L,) of the layers; see `weighted_distance`.
        against: (L, D), normals of another direction, whose distance is taken off.

    Returns:
        (N,) rows of `codes`.

    Raises:
        ValueError: see `signed_distances` and `weighted_distance`.

    >>> sort_by_direction([[[3.0]], [[-1.0]], [[2.0]]], [[1.0]])
    array([1, 2, 0])
    """
    score = weighted_distance(signed_distances(codes, normals), weights)
    if against is not None:
        score = score - weighted_distance(signed_distances(codes, against), weights)
    return np.argsort(score.detach().cpu().numpy(), kind="stable")


def direction(normals: ArrayLike | Tensor, codes: Tensor) -> Tensor:
    """Normals (L, D) of codes (N, L, D), in their dtype and on their device.

    Raises:
        ValueError: another shape, numbers that are not finite, or all zero.
    """
    normals = numbers(normals, "normals", "L D")
    if normals.shape != codes.shape[1:]:
        raise ValueError(
            f"codes and normals must be of the same space: codes have shape {tuple(codes.shape[1:])} each, "
            f"normals {tuple(normals.shape)}"
        )
    if not normals.any():
        raise ValueError("the direction has length 0: all normals are zero")
    return normals.to(codes)
