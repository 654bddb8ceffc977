"""CLOC: contrastive learning with a learnable margin between every two neighbouring ranks."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize, pad, softplus

from baselines.embedding import embedded, embedding_layers
from baselines.linear import FullPrecisionLinear
from ordinalclip.heads import Factor, Head, HeadContext, Outputs, Targets, Width
from ordinalclip.losses import at_least_float32, cross_entropy, weighted_mean


def cloc_loss(features: Tensor, ranks: Tensor, gaps: Tensor, weights: Tensor | None = None) -> Tensor:
    """CLOC's contrastive term: two samples of one rank are more alike than those of others, by a margin of the ranks.

    With margin m(y, y') = |sum of the gaps between ranks y and y'|, for every two samples i, j of one rank and every k
    of another

        max(0, cos(z_i, z_k) - cos(z_i, z_j) + m(y_i, y_k)),

    its mean over k, then over j, then over all samples i, where those that are alone with their rank count 0. The B^3
    triples are never built: of every i the k are sorted once and summed, which gives each j the sum over the k that
    reach it. That takes O(B^2 log B) time and O(B^2) memory.

    Args:
        features: (B, D), of any length: they are normalised here.
        ranks: (B,) int64 rank indices.
        gaps: (R - 1,) distances >= 0 between neighbouring ranks.
        weights: (B,) or None. A sample of weight w counts as w copies, without the pairs of these copies with each
            other.

    Returns:
        a scalar, float32 at least; 0, with gradient 0, without two samples of one rank and one of another.

    >>> points, ranks = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]), torch.tensor([0, 0, 1])
    >>> round(cloc_loss(points, ranks, gaps=torch.tensor([0.5])).item(), 4)  # (0 + 0.3) / 3: the third is alone
    0.1
    """
    features = normalize(at_least_float32(features), dim=-1)
    weights = torch.ones_like(features[:, 0]) if weights is None else weights.to(features)
    cosine = features @ features.t()
    places = pad(gaps.to(features).cumsum(0), (1, 0))[ranks]
    reach = cosine + (places[:, None] - places).abs()
    same = ranks[:, None] == ranks
    others = weights * ~same
    partners = weights * same.fill_diagonal_(False)

    order = reach.detach().masked_fill(others == 0, -torch.inf).argsort(dim=1, descending=True)
    reach, others = reach.gather(1, order), others.gather(1, order)
    ascending = reach.detach().masked_fill(others == 0, -torch.inf).flip(1).contiguous()
    number = len(ranks) - torch.searchsorted(ascending, cosine.detach().contiguous(), right=True)
    count, total = (pad(each.cumsum(1), (1, 0)).gather(1, number) for each in (others, others * reach))
    hinges = (total - count * cosine) / others.sum(dim=1, keepdim=True).clamp(min=torch.finfo(others.dtype).tiny)
    anchors = (partners * hinges).sum(dim=1) / partners.sum(dim=1).clamp(min=torch.finfo(others.dtype).tiny)
    return weighted_mean(anchors, weights)


class CLOC(Head):
    """CLOC: `cloc_loss` on an embedding and cross-entropy of a classifier on it; the margins are learned, then fixed.

    The gap between two neighbouring ranks is softplus of a parameter and starts between 0.5 and 1, drawn. In the first
    part of the training the gaps learn with everything else; in the second they stay what they were. The loss alone
    only makes them smaller: they say how hard each step is to tell apart. Cosines are at most 2 apart, so that a sum
    of gaps above 2 cannot be kept, and such triples count whatever the embedding.

    What is not known of the authors' code and reconstructed: the classifier is linear and on the embedding before it is
    normalised, and the two losses weigh the same.

    Paper: "CLOC", CVPR 2025, arXiv:2504.17813; from a description of the authors' code.

    Args:
        margin_share: of the training, in which the margins learn; 0: they stay as drawn, 1: they learn to the end.
        single_margin: whether all neighbouring ranks share one gap.
        contrast_weight: of `cloc_loss` beside the cross-entropy.
        embedding_dim: width of the embedding.
        hidden_dim: width of a hidden layer before the embedding; null: a linear layer.
    """

    gaps: Tensor

    def __init__(
        self,
        context: HeadContext,
        margin_share: Annotated[float, Field(ge=0, le=1)] = 0.5,
        single_margin: bool = False,
        contrast_weight: Factor = 1.0,
        embedding_dim: Width = 64,
        hidden_dim: Width | None = 256,
    ):
        super().__init__(context)
        self.margin_share, self.contrast_weight = margin_share, contrast_weight
        self.layers = embedding_layers(context.input_dim, hidden_dim, embedding_dim)
        self.classifier = FullPrecisionLinear(embedding_dim, len(context.ranks))
        drawn = 0.5 + torch.rand(1 if single_margin else len(context.ranks) - 1) / 2
        self.margins = nn.Parameter(drawn.expm1().log())  # the inverse of softplus
        self.register_buffer("gaps", drawn.expand(len(context.ranks) - 1).clone())  # (R - 1,), as they were last

    def embed(self, features: Tensor) -> Tensor:
        """(B, D) features -> (B, E) embedding, float32 at least."""
        return embedded(self.layers, features)

    def space(self, features: Tensor) -> Tensor:
        """The embedding at length 1, in which `cloc_loss` compares."""
        return normalize(self.embed(features), dim=-1)

    def forward(self, features: Tensor) -> Outputs:
        with torch.autocast(features.device.type, enabled=False):
            embedding = self.embed(features)
            return {"embedding": embedding, "logits": self.classifier(embedding)}

    def current_gaps(self, progress: float) -> Tensor:
        """(R - 1,) gaps at a progress of the training. While they are learned, every step in training mode keeps them
        in the buffer `gaps`, for the rest."""
        gaps = softplus(at_least_float32(self.margins)).expand(len(self.ranks) - 1)
        if progress >= self.margin_share:
            return at_least_float32(self.gaps) + 0 * gaps  # the parameter has a gradient, as DDP wants, but of 0
        if self.training:
            self.gaps.copy_(gaps.detach())
        return gaps

    def loss(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        gaps = self.current_gaps(targets.progress)
        contrast = cloc_loss(outputs["embedding"], targets.ranks, gaps, targets.weights)
        classification = cross_entropy(outputs["logits"], targets.ranks, targets.weights)
        terms = {"contrast_loss": contrast, "classification_loss": classification, "mean_gap": gaps.detach().mean()}
        return {"loss": classification + self.contrast_weight * contrast, **terms}
