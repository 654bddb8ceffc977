"""Attention of many heads, in float32 at least, and what is built of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

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

    By PyTorch's plain kernel: the gradients of fused ones are not the same twice on a GPU.

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
        with torch.autocast(queries.device.type, enabled=False), sdpa_kernel(SDPBackend.MATH):
            parts = (self.query(queries), self.key(others), self.value(others))
            query, key, value = (split_heads(part, self.heads) for part in parts)
            mask = None if visible is None else visible[None]
            return self.out(scaled_dot_product_attention(query, key, value, mask).transpose(-2, -3).flatten(-2))
