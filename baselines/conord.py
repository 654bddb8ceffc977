"""ConOrd: a contrastive loss in which the distance of two labels weighs how much their pair attracts and repels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from baselines.embedding import EmbeddingHead, Readout
from baselines.pairs import mean_of, pairwise_distances, without_diagonal
from ordinalclip.heads import Factor, HeadContext, Positive, Targets
from ordinalclip.losses import at_least_float32

STABILITY = 1e-7  # the authors' guard of the attraction between equal labels, which therefore weighs 1e7
TIE = 1e-4  # of the gap between ranks: reference points whose distances differ by less do so by rounding


def conord_loss(
    features: Tensor, values: Tensor, temperature: float = 0.07, power: float = 2, weights: Tensor | None = None
) -> Tensor:
    """ConOrd's contrastive term: near labels attract, far labels repel, each by their distance.

    With s_ij = -||z_i - z_j|| / temperature between features of length 1 and w_ij = |y_i - y_j|^power, the mean over
    samples i of

        -log( sum_{j != i} e^s_ij / (w_ij + 1e-7)  /  sum_{j != i} w_ij e^s_ij ).

    Equal labels attract 1e7 times as much as labels 1 apart, so that a sample that has its equal in the batch is drawn
    to that alone, and the loss may be negative. Another unit of the labels adds a constant and leaves the gradient
    nearly as it is, unless different labels come so near each other that 1e-7 counts: the loss wants a unit in which
    neighbouring ranks are about 1 apart.

    Args:
        features: (B, D), of any length: they are normalised here.
        values: (B,) labels.
        temperature: > 0.
        power: of the distance between labels, > 0; the authors' l2 is 2, their l1 is 1.
        weights: (B,) or None. A sample of weight w counts as w copies, without the pairs of these copies with each
            other.

    Returns:
        a scalar, float32 at least; 0, with gradient 0, where all labels are equal: the denominator is empty then.

    >>> points, labels = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]), torch.tensor([0.0, 1.0, 2.0])
    >>> round(conord_loss(points, labels, temperature=0.5).item(), 4)
    0.4514
    """
    features = normalize(at_least_float32(features), dim=-1)
    similarity = without_diagonal(pairwise_distances(features)) / -temperature
    weights = torch.ones_like(features[:, 0]) if weights is None else weights.to(features)
    similarity = similarity + without_diagonal(weights.log().expand(len(features), -1))
    apart = without_diagonal((values[:, None] - values).abs()).to(similarity) ** power
    attraction = torch.logsumexp(similarity - (apart + STABILITY).log(), dim=1)
    ordered = (apart > 0).any(dim=1, keepdim=True)  # else the sum is over nothing, its log and gradient no numbers
    repulsion = torch.logsumexp(torch.where(ordered, similarity + apart.log(), 0), dim=1)
    ordered = ordered.squeeze(1)
    return mean_of(torch.where(ordered, repulsion - attraction, 0), ordered * weights)


class ConOrd(EmbeddingHead):
    """ConOrd: `conord_loss`, and every rank's reference point near its samples; read out by the k nearest neighbours.

    The embedding has length 1, and so have the reference points, one learnable for every rank. The centre term is the
    mean distance of a sample to the point whose rank value is nearest to its label; between two, both count. Labels are
    taken in gaps between ranks (the mean gap, where ranks are not evenly spaced): the authors' are integer ranks, and
    the guard of 1e-7 is in that unit. A batch whose labels are all equal leaves the centre term alone.

    Not as in the authors' code: k is chosen on the validation part, not on the test part, and the reference points
    learn at the rate of the head, not at ten times that of the encoder (`train.lr_head`).

    Paper: "ConOrd", ICML 2026, arXiv:2607.08109; from a description of the authors' code.

    Args:
        temperature: of the similarities.
        power: of the distance between labels.
        center_weight: of the distance to the reference points.
    """

    normalised = True

    def __init__(
        self,
        context: HeadContext,
        temperature: Positive = 0.07,
        power: Positive = 2.0,
        center_weight: Factor = 1.0,
        readout: Readout = "nearest",
        **shared: Any,
    ):
        super().__init__(context, readout=readout, **shared)
        self.temperature, self.power, self.center_weight = temperature, power, center_weight
        self.gap = (self.ranks.values[-1] - self.ranks.values[0]) / (len(self.ranks) - 1)
        points = torch.randn(len(self.ranks), self.embedding_dim)
        self.reference_points = nn.Parameter(normalize(points, dim=-1))

    def embedding_loss(self, embedding: Tensor, targets: Targets) -> dict[str, Tensor]:
        order = conord_loss(embedding, targets.values / self.gap, self.temperature, self.power, targets.weights)
        center = self.center_loss(embedding, targets)
        return {"loss": order + self.center_weight * center, "order_loss": order, "center_loss": center}

    def center_loss(self, embedding: Tensor, targets: Targets) -> Tensor:
        """Mean distance of (B, E) embeddings to the reference points nearest in rank: a scalar."""
        apart = (targets.values[:, None] - self.ranks.tensor(embedding.device)).abs() / self.gap
        nearest = (apart <= apart.amin(dim=1, keepdim=True) + TIE).to(embedding)
        points = normalize(self.reference_points.to(embedding), dim=-1)
        distance = torch.cdist(embedding, points, compute_mode="donot_use_mm_for_euclid_dist")
        return mean_of(distance, nearest if targets.weights is None else nearest * targets.weights[:, None])
