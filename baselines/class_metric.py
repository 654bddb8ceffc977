"""Metric losses that know classes only, here the ranks; through pytorch-metric-learning where it has them."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from pytorch_metric_learning.distances import DotProductSimilarity
from pytorch_metric_learning.losses import (
    ArcFaceLoss,
    ContrastiveLoss,
    CosFaceLoss,
    NPairsLoss,
    TripletMarginLoss,
)
from pytorch_metric_learning.miners import BatchHardMiner
from pytorch_metric_learning.reducers import DoNothingReducer
from torch import Tensor

from baselines.embedding import EmbeddingHead
from baselines.linear import FullPrecisionLinear
from baselines.pairs import mean_of
from ordinalclip.heads import HeadContext, Positive, Targets
from ordinalclip.losses import cross_entropy

Sphere = Annotated[float, Field(ge=0, le=2)]  # a distance between two points of length 1


def weighted_reduction(terms: dict[str, dict[str, Any]], embedding: Tensor, weights: Tensor | None = None) -> Tensor:
    """What `DoNothingReducer` leaves of a loss, as the sum over its terms of the mean over elements above 0.

    This is the library's `AvgNonZeroReducer`, with sample weights: an element counts the product of the weights of
    the samples that it is made of. A batch without pairs or triplets gives 0, with a gradient.
    """
    total = embedding.sum() * 0
    for term in terms.values():
        losses, indices = term["losses"], term["indices"]
        if not torch.is_tensor(losses):  # the library's 0: nothing of this kind in the batch
            continue
        counted = (losses > 0).to(losses.dtype)
        if weights is not None:
            for index in indices if isinstance(indices, tuple) else (indices,):
                counted = counted * weights[index]
        total = total + mean_of(losses, counted)
    return total


class ClassMetricHead(EmbeddingHead):
    """An embedding shaped by one of the library's losses on ranks as classes, `criterion`."""

    criterion: torch.nn.Module

    def mined(self, embedding: Tensor, ranks: Tensor) -> tuple[Tensor, ...] | None:
        """Indices of pairs or triplets; None: all."""
        return None

    def embedding_loss(self, embedding: Tensor, targets: Targets) -> dict[str, Tensor]:
        terms = self.criterion(embedding, targets.ranks, self.mined(embedding, targets.ranks))
        return {"loss": weighted_reduction(terms, embedding, targets.weights)}


class Contrastive(ClassMetricHead):
    """Contrastive loss: equal ranks together, others at least `margin` apart.

    Paper: Hadsell et al., "Dimensionality Reduction by Learning an Invariant Mapping", CVPR 2006.

    Args:
        margin: least distance between different ranks, on the unit sphere.
    """

    normalised = True

    def __init__(
        self,
        context: HeadContext,
        margin: Sphere = 1.0,
        **shared: Any,
    ):
        super().__init__(context, **shared)
        self.criterion = ContrastiveLoss(neg_margin=margin, reducer=DoNothingReducer())


class Triplet(ClassMetricHead):
    """Triplet loss on the hardest positive and negative of every anchor.

    Hermans et al. (2017) name this "batch hard"; all triplets of a batch would be B^3. It knows equal and different
    ranks, not near and far ones, and is touchy: on gauges with 16 shots of each of 21 values, its MAE by neighbours
    after 100 steps was 8.3, 4.8 and 5.5 for seeds 1 to 3 where the L1 head's was 3.3, 4.9 and 4.5 (torch 2.14); with
    another build of torch the first was 5.9.

    Paper: Schroff et al., "FaceNet: A Unified Embedding for Face Recognition and Clustering", CVPR 2015,
    arXiv:1503.03832.

    Args:
        margin: by which the positive is to be nearer than the negative, in distance on the unit sphere.
    """

    normalised = True

    def __init__(
        self,
        context: HeadContext,
        margin: Sphere = 0.2,
        **shared: Any,
    ):
        super().__init__(context, **shared)
        self.criterion = TripletMarginLoss(margin=margin, reducer=DoNothingReducer())
        self.miner = BatchHardMiner()

    def mined(self, embedding: Tensor, ranks: Tensor) -> tuple[Tensor, ...]:
        return self.miner(embedding, ranks)


class NPair(ClassMetricHead):
    """N-pair loss: of each rank that the batch holds twice, one pair against all the others.

    Inner products of embeddings as they are; the paper's penalty on their norms is left to weight decay. A sample's
    weight counts where it is the anchor.

    Paper: Sohn, "Improved Deep Metric Learning with Multi-class N-pair Loss Objective", NeurIPS 2016.
    """

    def __init__(
        self,
        context: HeadContext,
        **shared: Any,
    ):
        super().__init__(context, **shared)
        self.criterion = NPairsLoss(
            distance=DotProductSimilarity(normalize_embeddings=False), reducer=DoNothingReducer()
        )


class CosFace(ClassMetricHead):
    """CosFace: a proxy per rank, margin on the cosine.

    Paper: Wang et al., "CosFace: Large Margin Cosine Loss for Deep Face Recognition", CVPR 2018, arXiv:1801.09414.

    Args:
        margin: taken off the cosine with the right proxy.
        scale: of the cosines.
    """

    normalised = True

    def __init__(
        self,
        context: HeadContext,
        margin: Annotated[float, Field(ge=0, le=2)] = 0.35,
        scale: Positive = 64.0,
        **shared: Any,
    ):
        super().__init__(context, **shared)
        options = {"margin": margin, "scale": scale, "reducer": DoNothingReducer()}
        self.criterion = CosFaceLoss(len(context.ranks), self.embedding_dim, **options)


class ArcFace(ClassMetricHead):
    """ArcFace: a proxy per rank, margin on the angle.

    Paper: Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", CVPR 2019,
    arXiv:1801.07698.

    Args:
        margin: added to the angle with the right proxy, in degrees.
        scale: of the cosines.
    """

    normalised = True

    def __init__(
        self,
        context: HeadContext,
        margin: Annotated[float, Field(ge=0, le=180)] = 28.6,
        scale: Positive = 64.0,
        **shared: Any,
    ):
        super().__init__(context, **shared)
        options = {"margin": margin, "scale": scale, "reducer": DoNothingReducer()}
        self.criterion = ArcFaceLoss(len(context.ranks), self.embedding_dim, **options)


class L2Softmax(EmbeddingHead):
    """L2-softmax: softmax cross-entropy on embeddings of fixed length.

    Paper: Ranjan et al., "L2-constrained Softmax Loss for Discriminative Face Verification", 2017, arXiv:1703.09507.

    Args:
        scale: length of the embeddings in the loss; they are read out at length 1.
    """

    normalised = True

    def __init__(
        self,
        context: HeadContext,
        scale: Positive = 16.0,
        **shared: Any,
    ):
        super().__init__(context, **shared)
        self.scale = scale
        self.classifier = FullPrecisionLinear(self.embedding_dim, len(context.ranks))

    def embedding_loss(self, embedding: Tensor, targets: Targets) -> dict[str, Tensor]:
        logits = self.classifier(self.scale * embedding)
        return {"loss": cross_entropy(logits, targets.ranks, targets.weights)}
