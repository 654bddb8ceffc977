"""Arrays of others as tensors, checked."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ordinalclip.losses import at_least_float32


def numbers(given: ArrayLike | Tensor, name: str, axes: str) -> Tensor:
    """Numbers as a floating-point tensor, float32 at least; those of lists, and whole ones, in float64.

    Args:
        name: what errors call it.
        axes: the axes that are wanted, e.g. "N L D"; none of them may be empty.

    Raises:
        ValueError: other axes, an empty one, no real numbers, or one that is not finite.
    """
    if not isinstance(given, Tensor):
        try:
            array = np.array(given)
        except (ValueError, TypeError) as error:  # rows of different length, tensors on a GPU
            raise ValueError(f"{name} must be one array of numbers ({error})") from error
        if array.dtype.kind not in "fiub":
            raise ValueError(f"{name} must be real numbers, got {array.dtype}")
        given = torch.from_numpy(array.astype(_native(array.dtype), copy=False))
    if given.is_complex():
        raise ValueError(f"{name} must be real numbers, got {given.dtype}")
    wanted = axes.split()
    if given.ndim != len(wanted) or 0 in given.shape:
        shape = ", ".join(wanted) + ("," if len(wanted) == 1 else "")
        raise ValueError(f"{name} must be ({shape}) and not empty, got shape {tuple(given.shape)}")
    tensor = at_least_float32(given) if given.is_floating_point() else given.double()
    finite = tensor.detach().isfinite().reshape(len(tensor), -1).all(dim=1)
    if not finite.all():
        raise ValueError(f"{name} must be finite; row {int((~finite).nonzero()[0])} is not")
    return tensor


def check_pairs(first: Tensor, second: Tensor, names: str) -> None:
    """Raises:
    ValueError: different numbers of rows."""
    if len(first) != len(second):
        raise ValueError(f"{names} must be as many, got {len(first)} and {len(second)}")


def _native(dtype: np.dtype) -> np.dtype:
    """A type of this machine's byte order that torch has, too."""
    return np.dtype("f4" if dtype.kind == "f" and dtype.itemsize <= 4 else "f8")
