"""Adaptive triplet loss: of two samples the one with the nearer label shall be nearer, by a margin from the labels."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from baselines.embedding import EmbeddingHead
from baselines.pairs import mean_of
from ordinalclip.heads import HeadContext, Targets

TIE = 1e-5  # squared standardised labels that differ by less do so by rounding


def draw_triples(batch_size: int, num: int, seed: int) -> Tensor:
    """Random triples of three different samples, (3, num) int64, a function of the seed alone; none for B < 3."""
    if batch_size < 3:
        return torch.empty(3, 0, dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    anchor = torch.randint(batch_size, (num,), generator=generator)
    first = torch.randint(1, batch_size, (num,), generator=generator)  # steps from the anchor around the batch
    second = torch.randint(1, batch_size - 1, (num,), generator=generator)
    second += second >= first
    return torch.stack([anchor, (anchor + first) % batch_size, (anchor + second) % batch_size])


def adaptive_triplet_loss(features: Tensor, labels: Tensor, triples: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean over triples of max(0, ||f_a - f_n||^2 - ||f_a - f_g||^2 + m), m = |y_a - y_g|^2 - |y_a - y_n|^2.

    n is the one of the two others that is nearer to the anchor a by label, g the farther one; where they are equally
    far there is no triple. From memory of Zheng et al. (2021): their code was not at hand.

    Args:
        features: (B, D).
        labels: (B,) standardised.
        triples: (3, N) indices: anchors and two others, in any order.
        weights: (B,) or None; a triple counts w_a w_n w_g.

    Returns:
        a scalar; 0 without triples.
    """
    anchor, first, second = triples
    gap = (labels[anchor] - labels[second]).square() - (labels[anchor] - labels[first]).square()
    to_first = (features[anchor] - features[first]).square().sum(dim=1)
    to_second = (features[anchor] - features[second]).square().sum(dim=1)
    hinge = torch.relu((to_first - to_second) * gap.sign() + gap.abs())  # the sign swaps near and far
    counted = (gap.abs() > TIE).to(hinge.dtype)
    if weights is not None:
        counted = counted * weights[triples].prod(dim=0)
    return mean_of(hinge, counted)


class AdaptiveTriplet(EmbeddingHead):
    """ATrip: `adaptive_triplet_loss` on random triples; `readout` makes it ATrip+NN or ATrip+L1.

    The triples are a function of the batch's size and the progress of the training, that is of the step, so that a
    run repeats and resumes exactly; which samples meet is up to the order that the run's seed gives them.

    Paper: Zheng et al., "Semi-supervised Learning for Bone Mineral Density Estimation in Hip X-ray Images", MICCAI
    2021; from memory.

    Args:
        triples_per_sample: of a batch of B this many times B triples are drawn, instead of taking all B^3.
    """

    def __init__(
        self,
        context: HeadContext,
        triples_per_sample: Annotated[int, Field(ge=1, le=4096)] = 16,
        **shared: Any,
    ):
        super().__init__(context, **shared)
        self.triples_per_sample = triples_per_sample

    def embedding_loss(self, embedding: Tensor, targets: Targets) -> dict[str, Tensor]:
        size = len(embedding)
        triples = draw_triples(size, self.triples_per_sample * size, round(targets.progress * 2**52))
        labels = self.standardise(targets.values)
        return {"loss": adaptive_triplet_loss(embedding, labels, triples.to(embedding.device), targets.weights)}
