"""L2RCLIP: attention between the rank prompts, and losses that order images and prompts by their distances."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from baselines.attention import Attention
from baselines.linear import FullPrecisionLinear, FullPrecisionNorm
from baselines.pairs import mean_of, without_diagonal
from ordinalclip.heads import Factor, HeadContext, Outputs, Targets
from ordinalclip.language import PromptHead, PrototypeHead, SimilarityHead
from ordinalclip.losses import Alignment, at_least_float32, weighted_mean
from ordinalclip.text import Prompts

LEAST_DISTANCE = 1e-6  # the authors' floor of 1e-12 under squared distances
INITIAL_BLEND = 0.01
HIDDEN = 2048


def feature_distances(features: Tensor, others: Tensor) -> Tensor:
    """Euclidean distances (B, R) of (B, D) and (R, D) features as they are given, at least 1e-6.

    Exact differences; where two vectors are nearer than that, the gradient is 0.
    """
    features, others = at_least_float32(features), at_least_float32(others)
    distances = torch.cdist(features, others, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.clamp(min=LEAST_DISTANCE)


def _label_weights(gaps: Tensor) -> Tensor:
    """(|dy| - min) / max of label distances; 0 where all labels are equal, and for no pair."""
    if not gaps.numel():
        return gaps
    largest = gaps.max()
    return (gaps - gaps.min()) / torch.where(largest > 0, largest, 1)


def ordinal_entropy(distances: Tensor, ranks: Tensor, values: Tensor, weights: Tensor | None = None) -> Tensor:
    """The authors' ordinal entropy of images and prompts (their ordinal_ce.py): near the own prompt, far from others.

    With d_ij the distance of image i and the prompt of rank j, y the label values and w_ij = (|y_i - y_j| - min) / max
    over all images and ranks, the mean over images of d_ii'^2, i' the image's own rank, less the mean of w_ij d_ij.

    Args:
        distances: (B, R) of images and prompts, see `feature_distances`.
        ranks: (B,) int64.
        values: (R,) label values of the ranks.
        weights: (B,) of the images, or None; one of weight w counts as w copies.

    Returns:
        a scalar, which may be negative.

    >>> ordinal_entropy(torch.tensor([[0.5, 1.0]]), torch.tensor([0]), torch.tensor([20.0, 30.0])).item()
    -0.25
    """
    far = _label_weights((values[ranks][:, None] - values).abs()).to(distances.dtype) * distances
    own = distances.gather(1, ranks[:, None])[:, 0]
    return weighted_mean(own.square() - far.mean(dim=1), weights)


def ordinal_entropy_stage1(
    distances: Tensor, text_distances: Tensor, ranks: Tensor, values: Tensor, weights: Tensor | None = None
) -> Tensor:
    """The authors' loss of their first stage (ordinal_ce_stage1.py), over the pairs of a batch.

    With d_ij the distance of image i and the prompt of image j's rank, t_ij that of the prompts of both ranks and
    w_ij = (|y_i - y_j| - min) / max over the pairs, it is -mean w_ij d_ij - 0.5 mean w_ij t_ij + 0.5 mean d_ii^2.

    The authors take each pair once, i < j, so that d_ij counts and d_ji does not, by the order of the batch. Here both
    count half: the mean of theirs over a batch and the same batch backwards.

    Args:
        distances: (B, R) of images and prompts, see `feature_distances`.
        text_distances: (R, R) of the prompts.
        ranks: (B,) int64.
        values: (R,) label values of the ranks.
        weights: (B,) of the images, or None; a pair counts w_i w_j.

    Returns:
        a scalar, which may be negative; a single image has no pair, and only its own distance counts.
    """
    labels = values[ranks]
    apart = _label_weights(without_diagonal((labels[:, None] - labels).abs())).to(distances.dtype)
    pairs = torch.ones_like(apart) if weights is None else without_diagonal(weights[:, None] * weights)
    crossed = mean_of(apart * without_diagonal(distances[:, ranks]), pairs)
    between = mean_of(apart * without_diagonal(text_distances[ranks][:, ranks]), pairs)
    own = distances.gather(1, ranks[:, None])[:, 0].square()
    return 0.5 * weighted_mean(own, weights) - crossed - 0.5 * between


def asymmetric_contrastive(logits: Tensor, ranks: Tensor, weights: Tensor | None = None) -> Tensor:
    """The authors' asymmetric contrastive loss (supcontrast.py): every prompt looks for its images in the batch.

    For a rank in the batch the mean over its images of -log softmax over the batch of its logits; then the mean over
    these ranks. A rank without an image, which would be 0 / 0, is left out. It is the second term of OrdinalCLIP in the
    form of its paper, but for the entropy of the targets, on which no gradient depends.

    Args:
        logits: (B, R) scaled similarities, exp(scale) x.t.
        ranks: (B,) int64.
        weights: (B,) of the images, or None; one of weight w counts as w copies.

    Returns:
        a scalar.
    """
    logits = at_least_float32(logits)
    copies = torch.ones_like(logits[:, 0]) if weights is None else weights
    present = ranks.unique()
    counted = (ranks == present[:, None]) * copies
    scores = logits.t()[present]
    losses = (scores + copies.log()).logsumexp(dim=1, keepdim=True) - scores
    return ((losses * counted).sum(dim=1) / counted.sum(dim=1)).mean()


class RankAttention(nn.Module):
    """Attention between the tokens of all ranks: R' = (1 - a) R + a FFN(MSA(LN(R))), with a learned a.

    What the published RankFormer is beyond "token-level attention on rank prompts with residual-style blending" is not
    known; this form is another reader's reconstruction.

    Args:
        width: W of the word embeddings.
    """

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.attention = FullPrecisionNorm(width), Attention(width)
        self.hidden, self.out = FullPrecisionLinear(width, HIDDEN), FullPrecisionLinear(HIDDEN, width)
        self.blend = nn.Parameter(torch.tensor(INITIAL_BLEND))

    def forward(self, ranks: Tensor, in_use: Tensor) -> Tensor:
        """(R, T, W) rank tokens -> the same, each with a share of all of them.

        Args:
            in_use: (R, T), which of them stand in a prompt; others are not seen.
        """
        tokens = self.norm(ranks.flatten(0, 1))[None]
        attended = self.attention(tokens, tokens, in_use.flatten())
        blend = at_least_float32(self.blend)
        mixed = self.out(nn.functional.gelu(self.hidden(attended)))[0].view_as(ranks)
        return (1 - blend) * at_least_float32(ranks) + blend * mixed


class OrderedHead(SimilarityHead):
    """L2RCLIP's losses on images and prototypes of length 1.

    Args:
        ordinal_weight: factor of `ordinal_entropy`.
        stage1_weight: factor of `ordinal_entropy_stage1`; above 0 prompts pass through the text tower twice a step.
        alignment: form of the contrastive term; see `alignment_loss`.
        alignment_weight: factor of the contrastive term.
    """

    def __init__(
        self,
        context: HeadContext,
        *given: Any,
        ordinal_weight: Factor = 1.0,
        stage1_weight: Factor = 0.0,
        alignment: Alignment = "paper",
        alignment_weight: Factor = 1.0,
        **shared: Any,
    ):
        shared |= {"alignment": alignment, "alignment_weight": alignment_weight}
        super().__init__(context, *given, **shared)
        self.ordinal_weight, self.stage1_weight = ordinal_weight, stage1_weight

    def forward(self, features: Tensor) -> Outputs:
        image, rank = self.compared(features)
        with torch.autocast(features.device.type, enabled=False):
            logits = self.logit_scale.exp() * image @ rank.t()
            return {"logits": logits, "distances": feature_distances(image, rank)}

    def loss_options(self) -> dict[str, Any]:
        weights = {"ordinal_weight": self.ordinal_weight, "stage1_weight": self.stage1_weight}
        return {**super().loss_options(), **weights}

    def loss(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        terms = super().loss(outputs, targets)
        distances, ranks, weights = outputs["distances"], targets.ranks, targets.weights
        values = self.ranks.tensor().to(distances)
        terms["ordinal"] = ordinal_entropy(distances, ranks, values, weights)
        terms["loss"] = terms["loss"] + self.ordinal_weight * terms["ordinal"]
        if self.stage1_weight:
            rank = normalize(at_least_float32(self.rank_prototypes()), dim=-1)
            between = feature_distances(rank, rank)
            terms["stage1"] = ordinal_entropy_stage1(distances, between, ranks, values, weights)
            terms["loss"] = terms["loss"] + self.stage1_weight * terms["stage1"]
        return terms


class OrderedPrototypes(OrderedHead, PrototypeHead):
    """What of L2RCLIP is deployed: a prototype per rank, and its losses."""


class L2RCLIP(OrderedHead, PromptHead):
    """Rank prompts that attend to each other, and losses that put images near their prompt and far from distant ones.

    Paper: Wang et al., "Learning-to-Rank Meets Language: Boosting Language-Driven Ordering Alignment for Ordinal
    Classification", NeurIPS 2023, arXiv:2306.13856.

    A reconstruction: the authors published their losses, and neither model nor training. Their losses are here as they
    have them, `ordinal_entropy` and `ordinal_entropy_stage1` on vectors of length 1, cross-entropy with weight 1, and
    the asymmetric contrastive loss as the term `alignment`, which in the form of the paper differs from it by what has
    no gradient. The attention between prompts is another reader's guess. Theirs is trained in two stages, prompts first
    and the image encoder after; here everything learns at once, as in their variant of one stage, whose image encoder
    has 0.005 of the learning rate (train.lr_encoder).
    """

    deployed: ClassVar[str] = "baselines.l2rclip:OrderedPrototypes"

    def __init__(self, context: HeadContext, init_from_names: bool = True, **shared: Any):
        super().__init__(context, None, "linear", init_from_names=init_from_names, **shared)
        self.attention = RankAttention(self.text.width)

    def prompts(self) -> Prompts:
        return self.learner(self.attention(self.learner.ranks_embedded(), self.learner.in_use))

    def learned_prompts(self) -> dict[str, Tensor]:
        return {}  # which attention changes before they are encoded

    def prompt_parameters(self) -> list[nn.Parameter]:
        return [*super().prompt_parameters(), *self.attention.parameters()]
