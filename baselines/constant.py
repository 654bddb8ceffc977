"""The predictor that does not look: what every method has to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from ordinalclip.heads import Head, HeadContext, Outputs, Targets
from ordinalclip.losses import cross_entropy


class Constant(Head):
    """Answers every image with the distribution of ranks in the training part; nothing learns.

    Decoded by `median` it is the constant with the smallest MAE, by `argmax` the one with the highest accuracy.
    """

    learns = False
    frequencies: Tensor

    def __init__(self, context: HeadContext):
        super().__init__(context)
        self.register_buffer("frequencies", torch.full((len(context.ranks),), 1 / len(context.ranks)))

    def forward(self, features: Tensor) -> Outputs:
        return {"logits": self.frequencies.log().expand(features.shape[0], -1)}

    def loss(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        return {"loss": cross_entropy(outputs["logits"], targets.ranks, targets.weights)}

    def fit(self, train: tuple[Outputs, Targets], validation: tuple[Outputs, Targets] | None) -> None:
        counts = torch.bincount(train[1].ranks, minlength=len(self.ranks)).to(self.frequencies)
        self.frequencies.copy_(counts / counts.sum())
