"""Regression Metric Loss: distances between embeddings become distances between labels (Chao et al., MICCAI 2022)."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from baselines.embedding import EmbeddingHead
from baselines.pairs import pairwise_distances
from ordinalclip.heads import Factor, HeadContext, Targets
from ordinalclip.losses import at_least_float32

STABILITY = 1e-9  # the paper's guard of the denominator


class RMLoss(nn.Module):
    """Pairs whose distances in embedding and label space differ most are mined and their differences averaged.

    With d_ij = ||y_i - y_j|| and w_ij = exp(-(d_ij / sigma)^2 / 2) + alpha, the error of a pair is
    m_ij = w_ij | ||f_i - f_j|| - d_ij |. A running threshold follows the mean over all B^2 pairs, t <- momentum t +
    (1 - momentum) mean(m), before it is used; the first batch sets it to its mean. The loss is the sum of the errors
    above t over the sum of their w_ij.

    The threshold is a buffer, saved with the weights, and moves in training mode only. It stays on its device: no
    step waits for a number. A pair of samples with weights counts w_i w_j times, in the mean too.

    Args:
        sigma: width of the neighbourhood that counts most, in label units as given; inf: all pairs alike.
        alpha: what far pairs still count.
        momentum: of the threshold.
        mining: False takes all pairs.

    >>> loss = RMLoss(sigma=0.5, alpha=0.1)
    >>> round(loss(torch.tensor([[0.0], [2.0]]), torch.tensor([0.0, 1.0])).item(), 4)
    1.0
    """

    threshold: Tensor

    def __init__(self, sigma: float = 0.5, alpha: float = 0.1, momentum: float = 0.9, mining: bool = True):
        super().__init__()
        if not sigma > 0:
            raise ValueError(f"sigma must be above 0 (inf is allowed), got {sigma:g}")
        if alpha < 0 or not 0 <= momentum < 1:
            raise ValueError(f"alpha must be at least 0 and momentum in [0, 1), got {alpha:g} and {momentum:g}")
        self.sigma, self.alpha, self.momentum, self.mining = sigma, alpha, momentum, mining
        self.register_buffer("threshold", torch.tensor(-1.0))  # no errors are below 0: nothing has been seen

    def forward(self, features: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """The loss of a whole batch.

        Args:
            features: (B, D).
            labels: (B,), or (B, L) for labels of several dimensions; standardised.
            weights: (B,) or None.

        Returns:
            a scalar; 0 where all errors are equal, so that none is above their mean.
        """
        features = at_least_float32(features)
        labels = labels.to(features.dtype).reshape(len(labels), -1)
        with torch.no_grad():
            targets = pairwise_distances(labels)
            importance = torch.exp(-(targets / self.sigma).square() / 2) + self.alpha
            copies = torch.ones_like(importance) if weights is None else weights[:, None] * weights
        errors = importance * (pairwise_distances(features) - targets).abs()
        counted = copies * self.mined(errors.detach(), copies) if self.mining else copies
        return (counted * errors).sum() / ((counted * importance).sum() + STABILITY)

    def mined(self, errors: Tensor, copies: Tensor) -> Tensor:
        """Which (B, B) errors are above the threshold, after it has seen them."""
        mean = (copies * errors).sum() / copies.sum()
        threshold = self.threshold.to(mean.dtype)
        if self.training:
            threshold = torch.where(threshold < 0, mean, self.momentum * threshold + (1 - self.momentum) * mean)
            self.threshold.copy_(threshold)
        return errors > torch.where(threshold < 0, mean, threshold)


class RMLossHead(EmbeddingHead):
    """RM-Loss on s * MLP(features), with one learnable scale s; read out by neighbours.

    NOTE: differences enter as they are, not squared, so what a space whose distances are noisy shrinks to is a
    weighted median of the label distances. Pairs of equal labels weigh (1 + alpha) / alpha times what far ones do, 11
    times by default: where labels are few levels with many ties, the loss without mining is smallest for one single
    point, and with mining the space stays well below the scale of the labels. alpha=1 or sigma=inf keeps it there.

    Paper: Chao et al., "Regression Metric Loss: Learning a Semantic Representation Space for Medical Images", MICCAI
    2022, arXiv:2207.05231.

    Args:
        sigma: width of the neighbourhood that counts most, in standard deviations of the training labels; inf: all
            pairs alike.
        alpha: what far pairs still count.
        momentum: of the running threshold above which pairs are mined.
        mining: false takes all pairs.
    """

    def __init__(
        self,
        context: HeadContext,
        sigma: Annotated[float, Field(gt=0, allow_inf_nan=True)] = 0.5,
        alpha: Factor = 0.1,
        momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9,
        mining: bool = True,
        **shared: Any,
    ):
        super().__init__(context, **shared)
        self.scale = nn.Parameter(torch.ones(()))
        self.criterion = RMLoss(sigma, alpha, momentum, mining)

    def embed(self, features: Tensor) -> Tensor:
        return at_least_float32(self.scale) * super().embed(features)

    def embedding_loss(self, embedding: Tensor, targets: Targets) -> dict[str, Tensor]:
        loss = self.criterion(embedding, self.standardise(targets.values), targets.weights)
        return {"loss": loss, "scale": self.scale.detach(), "threshold": self.criterion.threshold.clone()}
