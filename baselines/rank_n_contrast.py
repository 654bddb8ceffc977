"""Rank-N-Contrast: a contrastive loss that ranks samples by the distances of their labels."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from baselines.embedding import EmbeddingHead, Readout
from baselines.pairs import mean_of, pairwise_distances, without_diagonal
from ordinalclip.heads import HeadContext, Positive, Targets
from ordinalclip.losses import at_least_float32


def rank_n_contrast_loss(
    features: Tensor, labels: Tensor, temperature: float = 2.0, weights: Tensor | None = None
) -> Tensor:
    """Rank-N-Contrast (Zha et al., NeurIPS 2023, eq. 2) of n samples, or of n augmented views of fewer.

    With s_ij = -||f_i - f_j|| / temperature and d_ij = |y_i - y_j|, the mean over pairs i != j of
    -log(e^s_ij / sum of e^s_ik over all k != i with d_ik >= d_ij). A sorted search and one cumulative sum per row give
    all denominators in O(n^2 log n) time and O(n^2) memory. Augmented views are rows of their own,
    with their image's label.

    Args:
        features: (n, D).
        labels: (n,), in a unit in which equal distances are equal numbers: only their order counts.
        temperature: > 0.
        weights: (n,) or None; a pair counts w_i w_j.

    Returns:
        a scalar; 0 for fewer than two samples.
    """
    features = at_least_float32(features)
    similarity = without_diagonal(pairwise_distances(features)) / -temperature
    distance = without_diagonal((labels[:, None] - labels).abs())
    nearest_last = distance.argsort(dim=1, descending=True)
    sums = similarity.gather(1, nearest_last).logcumsumexp(dim=1)
    ascending = distance.gather(1, nearest_last).flip(1).contiguous()
    at_least_as_far = distance.shape[1] - torch.searchsorted(ascending, distance.contiguous())
    losses = sums.gather(1, at_least_as_far - 1) - similarity
    pairs = torch.ones_like(losses) if weights is None else without_diagonal(weights[:, None] * weights)
    return mean_of(losses, pairs)


class RankNContrast(EmbeddingHead):
    """Rank-N-Contrast on two augmented views of every picture, read out by a linear L1 probe.

    Paper: Zha et al., "Rank-N-Contrast: Learning Continuous Representations for Regression", NeurIPS 2023,
    arXiv:2210.01189.

    Args:
        temperature: of the similarities.
        views: augmented views of every picture, each a row of the batch: B pictures are encoded `views` times.
    """

    def __init__(
        self,
        context: HeadContext,
        temperature: Positive = 2.0,
        views: Annotated[int, Field(ge=1, le=64)] = 2,
        readout: Readout = "l1",
        **shared: Any,
    ):
        super().__init__(context, readout=readout, **shared)
        self.temperature, self.views = temperature, views

    def embedding_loss(self, embedding: Tensor, targets: Targets) -> dict[str, Tensor]:
        return {"loss": rank_n_contrast_loss(embedding, targets.values, self.temperature, targets.weights)}
