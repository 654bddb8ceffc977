"""The layers of all heads here: in float32 at least, under autocast and with half-precision weights too.

What a head answers is a number with three digits or more; bfloat16 has two and a half.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear

from ordinalclip.losses import at_least_float32


class FullPrecisionLinear(nn.Linear):
    """(..., in) -> (..., out)."""

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            bias = None if self.bias is None else at_least_float32(self.bias)
            return linear(at_least_float32(features), at_least_float32(self.weight), bias)


class FullPrecisionNorm(nn.LayerNorm):
    """Layer norm of (..., width)."""

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            weight, bias = at_least_float32(self.weight), at_least_float32(self.bias)
            return layer_norm(at_least_float32(features), self.normalized_shape, weight, bias, self.eps)
