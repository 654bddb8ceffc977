"""Text anchors: rank prototypes that stay what the language says, an ordinal loss, and how common the ranks are."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize

from ordinalclip.heads import Factor, Head, HeadContext, Outputs, Targets
from ordinalclip.language import (
    INITIAL_LOGIT_SCALE,
    SimilarityHead,
    as_prototypes,
    centre,
    sentence_prototypes,
    text_tower,
)
from ordinalclip.losses import ranked_probability_score

logger = logging.getLogger(__name__)
Prior = Literal["validation", "training"]
Control = Literal["shuffled", "path", "random"]
SHARPNESS = tuple(2.0 ** (step / 4) for step in range(-20, 9))  # 1/32 to 4
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
KERNEL = 0.05  # standard deviation of the smoothing of frequencies, as a share of the ranks
PATH = 0.15  # length over which a random path forgets its direction, as a share of the ranks
ENOUGH = 10_000  # validation pictures that the correction is searched on
NOTABLE = 0.1  # share of pictures by which two frequencies of ranks differ when it is spoken of
MOST_SEEN = 2.0**23  # samples of a rank that are counted: float32 holds twice as many to the last one


class TextAnchors(SimilarityHead):
    """Fixed text features of the ranks' names, matched by images with an ordinal loss and the right prior.

    Prototypes are the text features of sentences with the ranks' names, computed once; nothing of them learns, and no
    step passes through the text tower. The loss is OrdinalCLIP's, cross-entropy and alignment, and the ranked
    probability score, which knows how far off an answer is.

    What learns from as many pictures of every rank takes all ranks for equally common, and a model that has seen few
    pictures is surer than it should be. So before every evaluation two numbers are chosen by the ranked probability
    score of the validation part: how sharp the distribution is (a temperature), and with what power the ranks'
    frequencies in the validation part, over those that the loss has seen, are put back. So the validation part has to
    be drawn like the pictures that will be asked about; where it differs from the training, a warning says so.

    Where image and text share no space the start is that of OrdinalCLIP here: a linear projection, prototypes less
    their mean, the first temperature of CLIP.

    Args:
        templates: sentences with {name} and, if wanted, {unit}, whose features are averaged.
        names: R words for the sentences, instead of the names of the ranks.
        control: what takes the place of the text features, to see what of them matters: the same ones shuffled over
            the ranks; a smooth random path, which has an order and no language; or random directions.
        prior: the frequencies that the answers assume: those of the validation part, or those of the training as it
            was. Without a validation part nothing is corrected.

    Raises:
        ValueError: no text tower; a template without {name} or with other braces; not one name per rank.
    """

    prototypes: Tensor
    sharpness: Tensor
    correction: Tensor
    seen: Tensor

    def __init__(
        self,
        context: HeadContext,
        templates: Annotated[Sequence[str], Field(min_length=1)] = ("{name} {unit}",),
        names: Sequence[str] | None = None,
        control: Control | None = None,
        prior: Prior = "validation",
        rps_weight: Factor = 1.0,
        **shared: Any,
    ):
        text = text_tower(context, self)
        width = None if context.shared_space else text.output_dim
        super().__init__(context, width, rps_weight=rps_weight, **shared)
        if names is not None and len(names) != len(context.ranks):
            raise ValueError(f"head.names: {len(names)} names for {len(context.ranks)} ranks")
        prototypes = sentence_prototypes(text, names or context.ranks.names or (), templates, context.ranks.unit)
        if control is not None:
            prototypes = _controls(prototypes, control)
        scale = context.logit_scale
        if not context.shared_space:
            prototypes, scale = centre(prototypes), INITIAL_LOGIT_SCALE
        self.register_buffer("prototypes", normalize(prototypes, dim=-1))
        self.logit_scale: nn.Parameter = nn.Parameter(torch.tensor(float(scale)), requires_grad=False)
        self.prior: Prior = prior
        self.told = False  # of ranks that are as common in the training as elsewhere
        ranks = len(context.ranks)
        self.register_buffer("seen", torch.zeros(ranks))
        self.register_buffer("sharpness", torch.ones(()))
        self.register_buffer("correction", torch.zeros(ranks))

    def rank_prototypes(self) -> Tensor:
        return self.prototypes

    def forward(self, features: Tensor) -> Outputs:
        learnt = super().forward(features)["logits"]
        return {"logits": self.sharpness * learnt + self.correction, "learnt": learnt}

    def loss(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        if not self.training:
            return super().loss(outputs, targets)
        copies = torch.ones_like(targets.values) if targets.weights is None else targets.weights
        self.seen.index_add_(0, targets.ranks, copies.to(self.seen))
        self.seen.mul_(torch.where(self.seen.amax() > MOST_SEEN, 0.5, 1.0))  # or one more would change nothing
        return super().loss({"logits": outputs["learnt"]}, targets)

    def fit(self, train: tuple[Outputs, Targets], validation: tuple[Outputs, Targets] | None) -> None:
        self.sharpness.fill_(1)
        self.correction.zero_()
        if validation is None:
            return
        outputs, targets = validation
        asked, learned = _smoothed(torch.bincount(targets.ranks, minlength=len(self.ranks))), _smoothed(self.seen)
        odds = (asked / learned).log() if self.prior == "validation" else torch.zeros_like(asked)
        step = -(-len(targets.ranks) // ENOUGH)
        learnt, ranks = outputs["learnt"][::step].cpu().double(), targets.ranks[::step].cpu()
        _, sharpness, strength = min(
            (ranked_probability_score(sharpness * learnt + strength * odds, ranks).item(), sharpness, strength)
            for strength in (STRENGTHS if odds.any() else STRENGTHS[:1])
            for sharpness in SHARPNESS
        )
        self.sharpness.fill_(sharpness)
        self.correction.copy_(strength * odds)
        if strength and not self.told and (apart := (asked - learned).abs().sum().item() / 2) > NOTABLE:
            self.told = True
            logger.warning(
                "text_anchors: ranks are not as common in the validation part as in training (%.0f %% of the pictures "
                "differ); answers assume that they are as common as in the validation part, see head.prior",
                100 * apart,
            )

    def deploy(self) -> tuple[str, dict[str, Any], Head]:
        return as_prototypes(self, sharpness=self.sharpness, correction=self.correction)


def _controls(prototypes: Tensor, control: Control) -> Tensor:
    """(R, D) vectors of length 1 in the place of prototypes, without what a control takes away."""
    count = len(prototypes)
    if control == "shuffled":
        return prototypes[torch.randperm(count)]
    drawn = torch.randn(prototypes.shape, dtype=torch.float64)
    if control == "path":  # a Gaussian process over the ranks
        place = torch.arange(count, dtype=torch.float64) / max(count * PATH, 1)
        drawn = torch.linalg.cholesky(_kernel(place) + 1e-6 * torch.eye(count)) @ drawn
    return normalize(drawn, dim=-1).to(prototypes)


def _kernel(place: Tensor) -> Tensor:
    """(R, R) Gaussian kernel of (R,) places, in standard deviations."""
    return torch.exp(-0.5 * (place[:, None] - place).square())


def _smoothed(counts: Tensor) -> Tensor:
    """(R,) float64 frequencies of (R,) counts, none of them 0, by a Gaussian kernel over neighbouring ranks."""
    counts = counts.cpu().double()
    place = torch.arange(len(counts), dtype=torch.float64)
    kernel = _kernel(place / (KERNEL * len(counts)))
    smooth = (kernel / kernel.sum(dim=0)) @ counts + 1
    return smooth / smooth.sum()
