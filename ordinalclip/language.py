"""Heads that compare images with a prototype per rank in the space of a CLIP: learned prompts, and what is deployed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize

from ordinalclip.heads import Factor, Head, HeadContext, Outputs, Targets, Width, build_head
from ordinalclip.losses import Alignment, alignment_loss, at_least_float32, ranked_probability_score
from ordinalclip.prompts import Interpolation, PromptLearner, RankPosition
from ordinalclip.text import Prompts, TextTower

PLACE = re.compile(r"\{(name|unit)\}")
ROUNDING = 1e-5  # of unit vectors in float32
INITIAL_LOGIT_SCALE = math.log(1 / 0.07)  # of CLIP's training (Radford et al., 2021, section 2.5)


class SimilarityHead(Head):
    """Logits are scaled cosines of images and prototypes; subclasses give `rank_prototypes` and `logit_scale`.

    Args:
        output_dim: width of the prototypes when the features are projected to it; None: the features are compared.
        alignment: form of the loss's second term, that of the authors' code or of the paper, see `alignment_loss`.
        alignment_weight: factor of the loss's second term.
        rps_weight: factor of a third term, the ranked probability score.

    Attributes:
        logit_scale: (), log of the temperature's inverse.
    """

    logit_scale: Tensor

    def __init__(
        self,
        context: HeadContext,
        output_dim: int | None,
        /,
        alignment: Alignment = "official",
        alignment_weight: Factor = 1.0,
        rps_weight: Factor = 0.0,
    ):
        super().__init__(context)
        self.projection = nn.Identity() if output_dim is None else nn.Linear(context.input_dim, output_dim)
        self.output_dim = output_dim
        self.alignment: Alignment = alignment
        self.alignment_weight = alignment_weight
        self.rps_weight = rps_weight

    def rank_prototypes(self) -> Tensor:
        """The (R, D) prototypes, of any length."""
        raise NotImplementedError(f"{type(self).__name__} defines no rank_prototypes")

    def space(self, features: Tensor) -> Tensor:
        """The projected features, of length 1."""
        return normalize(at_least_float32(self.projection(features)), dim=-1)

    def compared(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(B, D) features -> images (B, E) and prototypes (R, E), all of length 1."""
        prototypes, image = self.rank_prototypes(), self.space(features)
        with torch.autocast(features.device.type, enabled=False):
            return image, normalize(at_least_float32(prototypes), dim=-1)

    def forward(self, features: Tensor) -> Outputs:
        image, rank = self.compared(features)
        with torch.autocast(features.device.type, enabled=False):
            return {"logits": self.logit_scale.exp() * image @ rank.t()}

    def loss_options(self) -> dict[str, Any]:
        """The options of the loss, which a deployed head has, too."""
        weights = {"alignment_weight": self.alignment_weight, "rps_weight": self.rps_weight}
        return {"alignment": self.alignment, **weights}

    def loss(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        logits, ranks, weights = outputs["logits"], targets.ranks, targets.weights
        terms = alignment_loss(logits, ranks, weights, self.alignment, self.alignment_weight)
        if not self.rps_weight:
            return terms
        score = ranked_probability_score(logits, ranks, weights)
        return {**terms, "loss": terms["loss"] + self.rps_weight * score, "ranked_probability": score}


class PrototypeHead(SimilarityHead):
    """What is deployed: R prototype vectors, a temperature and, if the encoder needs it, the projection.

    Args:
        output_dim: width of the prototypes; default: that of the features, without a projection.
        corrected: whether logits are corrected for how common the ranks are: see `TextAnchors`.
    """

    learns = False
    prototypes: Tensor
    correction: Tensor

    def __init__(self, context: HeadContext, output_dim: Width | None = None, corrected: bool = False, **shared: Any):
        super().__init__(context, output_dim, **shared)
        self.register_buffer("prototypes", torch.zeros(len(context.ranks), output_dim or context.input_dim))
        self.register_buffer("logit_scale", torch.tensor(float(context.logit_scale)))
        if corrected:
            self.register_buffer("correction", torch.zeros(len(context.ranks)))
        self.corrected = corrected

    def rank_prototypes(self) -> Tensor:
        return self.prototypes

    def forward(self, features: Tensor) -> Outputs:
        logits = super().forward(features)["logits"]
        return {"logits": logits + self.correction if self.corrected else logits}


class ZeroShot(PrototypeHead):
    """Zero-shot CLIP: hand-written templates with the rank names, averaged after normalising. Nothing learns.

    Paper: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021,
    arXiv:2103.00020.

    Args:
        templates: sentences with {name} and, if wanted, {unit}.

    Raises:
        ValueError: no text tower in the features' space, or a template without {name} or with other braces.
    """

    def __init__(
        self,
        context: HeadContext,
        templates: Annotated[Sequence[str], Field(min_length=1)] = ("a photo of {name} {unit}.",),
    ):
        super().__init__(context)
        text = text_tower(context, self)
        if not context.shared_space:
            raise ValueError("zero_shot needs an image encoder and a text tower of the same CLIP")
        self.prototypes.copy_(sentence_prototypes(text, context.ranks.names or (), templates, context.ranks.unit))

    def deploy(self) -> tuple[str, dict[str, Any], Head]:
        return "prototypes", {}, self


class PromptHead(SimilarityHead):
    """Learned rank prompts through the frozen text tower; subclasses say how rank embeddings come about.

    Trained: context, rank embeddings and, when the image features live in another space than the text features, a
    linear projection.

    The texts of neighbouring ranks often say nearly the same: cosines of 0.9 to 0.9999. In a CLIP's own
    space images are where such cosines tell them apart. A projection that starts at random is not: distributions are
    flat, and the gradient is that of what all ranks share. There the mean over the ranks is taken from the prototypes,
    so that what differs between ranks is all that an image is compared with, and the temperature is the one that
    CLIP's own training starts from, not the one that it ended with (benchmarks/results/foreign_start).

    Args:
        num_base_ranks, interpolation: see `PromptLearner`.
        prompt: a sentence to start the context from, e.g. "the age of the person is"; default: random.
        num_context: number of context tokens, where no prompt is given.
        rank_position: place of the rank tokens: after, inside or before the context.
        tokens_per_rank: number of tokens of a rank embedding, where it does not start from a name.
        rank_specific_context: a context of its own for every rank instead of a shared one.
        init_from_names: start rank embeddings from the names of the ranks instead of at random.
        learn_logit_scale: whether the temperature learns too.
        centred: start as said above; default: where there is a projection. The published code never does.
        activation_checkpointing: compute the text tower's activations again in the backward pass: less memory.

    Raises:
        ValueError: no text tower; see `PromptLearner` for the rest.
    """

    rebuilt = ("text",)
    deployed: ClassVar[str] = "prototypes"  # method of a `PrototypeHead` with the same loss

    def __init__(
        self,
        context: HeadContext,
        num_base_ranks: int | None,
        interpolation: Interpolation,
        /,
        prompt: str | None = None,
        num_context: Annotated[int, Field(ge=0)] = 10,
        rank_position: RankPosition = "tail",
        tokens_per_rank: Annotated[int, Field(ge=1)] = 1,
        rank_specific_context: bool = False,
        init_from_names: bool = False,
        learn_logit_scale: bool = False,
        centred: bool | None = None,
        activation_checkpointing: bool = False,
        **shared: Any,
    ):
        text = text_tower(context, self)
        super().__init__(context, None if context.shared_space else text.output_dim, **shared)
        self.centred = not context.shared_space if centred is None else centred
        self.text = text
        self.text.activation_checkpointing = activation_checkpointing
        logit_scale = INITIAL_LOGIT_SCALE if self.centred else context.logit_scale
        scale = nn.Parameter(torch.tensor(float(logit_scale)), requires_grad=learn_logit_scale)
        self.logit_scale: nn.Parameter = scale
        self.learner = PromptLearner(
            text,
            context.ranks,
            num_context=num_context,
            context=prompt,
            num_base_ranks=num_base_ranks,
            interpolation=interpolation,
            rank_position=rank_position,
            tokens_per_rank=tokens_per_rank,
            rank_specific_context=rank_specific_context,
            init_from_names=init_from_names,
        )

    def prompts(self) -> Prompts:
        """The prompts of all ranks, as they go through the text tower."""
        return self.learner()

    def rank_prototypes(self) -> Tensor:
        prototypes = self.text(self.prompts())
        return centre(prototypes) if self.centred else prototypes

    def learned_prompts(self) -> dict[str, Tensor]:
        """`context` and `rank_embeddings` of the `PromptLearner`."""
        return {name: parameter.detach().clone() for name, parameter in self.learner.named_parameters()}

    def prompt_parameters(self) -> list[nn.Parameter]:
        return [*self.learner.parameters(), self.logit_scale]

    def deploy(self) -> tuple[str, dict[str, Any], Head]:
        return as_prototypes(self, self.deployed)


class OrdinalCLIP(PromptHead):
    """Rank embeddings interpolated between a few base embeddings.

    Paper: Li et al., "OrdinalCLIP: Learning Rank Prompts for Language-Guided Ordinal Regression", NeurIPS 2022,
    arXiv:2206.02338.

    Args:
        num_base_ranks: number of base embeddings; null: one free embedding per rank.
        interpolation: how base embeddings mix, by the distance in rank; see `interpolation_weights`.
    """

    def __init__(
        self,
        context: HeadContext,
        num_base_ranks: Annotated[int, Field(ge=1)] | None = 3,
        interpolation: Interpolation = "linear",
        **shared: Any,
    ):
        super().__init__(context, num_base_ranks, interpolation, **shared)


class CoOp(PromptHead):
    """One free embedding per rank, started from the rank's name; OrdinalCLIP's losses.

    Paper: Zhou et al., "Learning to Prompt for Vision-Language Models", IJCV 2022, arXiv:2109.01134.
    """

    def __init__(self, context: HeadContext, init_from_names: bool = True, **shared: Any):
        super().__init__(context, None, "linear", init_from_names=init_from_names, **shared)


def as_prototypes(
    head: SimilarityHead, method: str = "prototypes", sharpness: Tensor | None = None, correction: Tensor | None = None
) -> tuple[str, dict[str, Any], Head]:
    """What `Head.deploy` gives of a head with prototypes.

    Args:
        method: of the deployed head, a `PrototypeHead`.
        sharpness: (), factor of the logits; None: 1.
        correction: (R,), added to the logits after it; None: 0.
    """
    prototypes = head.rank_prototypes()
    options = {"output_dim": head.output_dim, **head.loss_options()}
    if correction is not None:
        options["corrected"] = True
    input_dim = head.projection.in_features if isinstance(head.projection, nn.Linear) else prototypes.shape[1]
    context = HeadContext(head.ranks, input_dim, decoding=head.decoding)
    deployed = cast(PrototypeHead, build_head(method, context, options)).to(head.logit_scale)
    with torch.no_grad():
        deployed.prototypes.copy_(normalize(prototypes, dim=-1))
        deployed.logit_scale.copy_(head.logit_scale if sharpness is None else head.logit_scale + sharpness.log())
        if correction is not None:
            deployed.correction.copy_(correction)
    deployed.projection.load_state_dict(head.projection.state_dict())
    return method, options, deployed


def centre(prototypes: Tensor) -> Tensor:
    """(R, D) prototypes of length 1, less their mean; see `PromptHead` for why."""
    prototypes = normalize(at_least_float32(prototypes), dim=-1)
    apart = prototypes - prototypes.mean(dim=0)
    return apart * (apart.norm(dim=-1, keepdim=True) > ROUNDING)  # or equal prompts would be told apart by it


@torch.no_grad()
def sentence_prototypes(text: TextTower, names: Sequence[str], templates: Sequence[str], unit: str) -> Tensor:
    """(R, D) text features of length 1: of sentences with R names, averaged over the templates.

    Raises:
        ValueError: a template without {name} or with other braces.
    """
    for template in templates:
        if "{name}" not in template:
            raise ValueError(f"head.templates: {template!r} lacks the place {{name}} for the rank's name")
        if re.search("[{}]", PLACE.sub("", template)):
            raise ValueError(f"head.templates: {template!r} has braces besides {{name}} and {{unit}}")
    total = sum(
        normalize(text([_filled(template, {"name": name, "unit": unit}) for name in names]), dim=-1)
        for template in templates
    )
    return normalize(torch.as_tensor(total), dim=-1)


def text_tower(context: HeadContext, head: Head) -> TextTower:
    """The text tower that a head is built with.

    Raises:
        ValueError: there is none.
    """
    if context.text is None:
        name = type(head).__name__
        raise ValueError(f"{name} needs a text tower: set model.text, e.g. to open_clip:RN50/openai")
    return context.text


def _filled(template: str, words: Mapping[str, str]) -> str:
    """A template with its places filled, and single spaces."""
    return " ".join(PLACE.sub(lambda place: words[place[1]], template).split())
