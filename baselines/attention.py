"""Attention of many heads, in float32 at least, and what is built of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from baselines.linear import FullPrecisionLinear

MOST_HEADS = 8


def num_heads(width: int) -> int:
    """The largest number of heads up to 8 that a width can be split into."""
    return next(count for count in range(MOST_HEADS, 0, -1) if width % count == 0)


def split_heads(tokens: Tensor, heads: int) -> Tensor:
    """(..., N, W) -> (..., H, N, W / H)."""
    return tokens.unflatten(-1, (heads, -1)).transpose(-2, -3)


class Attention(nn.Module):
    """Scaled dot-product attention of queries (B, N, W) over keys and values from `others` (B, M, W).

    Written out, since the gradients of fused kernels are not the same twice on a GPU.

    Args:
        width: W.
    """

    def __init__(self, width: int):
        super().__init__()
        self.heads = num_heads(width)
        self.query, self.key, self.value, self.out = (FullPrecisionLinear(width, width) for _ in range(4))

    def forward(self, queries: Tensor, others: Tensor, visible: Tensor | None = None) -> Tensor:
        """(B, N, W).

        Args:
            visible: (M,), which of the others are seen; default: all.
        """
        with torch.autocast(queries.device.type, enabled=False):
            parts = (self.query(queries), self.key(others), self.value(others))
            query, key, value = (split_heads(part, self.heads) for part in parts)
            scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
            if visible is not None:
                scores = scores.masked_fill(~visible, -torch.inf)
            return self.out((scores.softmax(dim=-1) @ value).transpose(-2, -3).flatten(-2))
