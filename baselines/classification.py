"""Plain classification of ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from baselines.linear import FullPrecisionLinear
from ordinalclip.heads import Head, HeadContext, Outputs, Positive, Targets
from ordinalclip.losses import at_least_float32, cross_entropy


class CrossEntropy(Head):
    """A linear classifier of the ranks, as if they had nothing to do with each other."""

    def __init__(self, context: HeadContext):
        super().__init__(context)
        self.linear = FullPrecisionLinear(context.input_dim, len(context.ranks))

    def forward(self, features: Tensor) -> Outputs:
        return {"logits": self.linear(features)}

    def loss(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        return {"loss": cross_entropy(outputs["logits"], targets.ranks, targets.weights)}


class CNNHead(Head):
    """The "CNN head" of the OrdinalCLIP paper: cosine classifier, cross-entropy, no text.

    Normalised features times a bias-free linear layer with normalised rows.

    Paper: Li et al., "OrdinalCLIP: Learning Rank Prompts for Language-Guided Ordinal Regression", NeurIPS 2022,
    table 1.

    Args:
        scale: factor of the cosine.
    """

    def __init__(self, context: HeadContext, scale: Positive = 100.0):
        super().__init__(context)
        self.scale = scale
        self.weight = nn.Parameter(nn.Linear(context.input_dim, len(context.ranks), bias=False).weight.detach().clone())

    def forward(self, features: Tensor) -> Outputs:
        with torch.autocast(features.device.type, enabled=False):
            features = normalize(at_least_float32(features), dim=-1)
            return {"logits": self.scale * features @ normalize(at_least_float32(self.weight), dim=-1).t()}

    def loss(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        return {"loss": cross_entropy(outputs["logits"], targets.ranks, targets.weights)}
