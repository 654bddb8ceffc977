"""Heads: every method is a head on image features, so the trainer knows nothing about methods."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ordinalclip.losses import Alignment, alignment_loss
from ordinalclip.prompts import Interpolation, PromptLearner, RankPosition
from ordinalclip.ranks import Decoding as Decoding
from ordinalclip.ranks import Ranks
from ordinalclip.suggestions import near_matches
from ordinalclip.text import TextTower

Outputs = dict[str, Tensor]


class Targets(NamedTuple):
    """Labels of a batch: `values` (B,) in label units, `ranks` (B,) int64, `weights` (B,) or None.

    `progress` in [0, 1] says how much of the training is done.
    """

    values: Tensor
    ranks: Tensor
    weights: Tensor | None = None
    progress: float = 0.0


class Prediction(NamedTuple):
    """Answers: `value` (B,) in label units, `rank` (B,) int64, `probabilities` (B, R) or None."""

    value: Tensor
    rank: Tensor
    probabilities: Tensor | None = None


@dataclass
class HeadContext:
    """What a head is built for.

    Attributes:
        ranks: the label space.
        input_dim: width D of the image features.
        text: the frozen text tower, or None when there is none (a deployed model).
        logit_scale: log of the CLIP's temperature factor.
        shared_space: whether the image features already live in the text tower's output space.
        label_mean, label_std: of the training labels, for heads that regress standardised labels.
        decoding: how a distribution becomes one value.
    """

    ranks: Ranks
    input_dim: int
    text: TextTower | None = None
    logit_scale: float = 0.0
    shared_space: bool = True
    label_mean: float = 0.0
    label_std: float = 1.0
    decoding: Decoding = "median"


def decode(probabilities: Tensor, ranks: Ranks, decoding: Decoding) -> Prediction:
    """One value per distribution over ranks.

    `median` (the choice that minimises the expected absolute error) is the first rank at which the cumulative
    probability reaches one half, `argmax` the likeliest rank, `expectation` the mean value.

    Args:
        probabilities: (B, R), rows summing to 1.
    """
    values = ranks.tensor(probabilities.device).to(probabilities.dtype)
    if decoding == "expectation":
        value = probabilities @ values
        return Prediction(value, ranks.nearest(value), probabilities)
    if decoding == "median":
        below = probabilities.cumsum(dim=1) < 0.5
        rank = below.sum(dim=1).clamp(max=len(ranks) - 1)
    elif decoding == "argmax":
        rank = probabilities.argmax(dim=1)
    else:
        raise ValueError(f"decoding {decoding!r} is unknown; choices: {', '.join(get_args(Decoding))}")
    return Prediction(values[rank], rank, probabilities)


def at_least_float32(features: Tensor) -> Tensor:
    """Half precision lifted to float32, so that normalising, scaling and softmax never run in bf16."""
    return features.float() if features.dtype in (torch.float16, torch.bfloat16) else features


class Head(nn.Module):
    """A method: features -> outputs -> loss and predictions.

    Subclasses take a `HeadContext` first and their options as keyword arguments with defaults, and define
    `forward` and `loss`; heads that give no `logits` (B, R) also define `predict`.

    Attributes:
        views: how many augmented views of every picture are in a training batch, as rows of their own.
    """

    views = 1
    learns = True
    rebuilt: tuple[str, ...] = ()

    def rank_prototypes(self) -> Tensor | None:
        return None

    def __init__(self, context: HeadContext):
        super().__init__()
        self.ranks = context.ranks
        self.decoding: Decoding = context.decoding
        self.label_mean, self.label_std = context.label_mean, context.label_std  # numbers: no cast rounds them

    def forward(self, features: Tensor) -> Outputs:
        """(B, D) features -> named tensors whose first dimension is B."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward")

    def space(self, features: Tensor) -> Tensor:
        """(B, D) features -> (B, E), the space that answers are read from, for D5 and residual variance.
        Default: the features."""
        return features

    def loss(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        """Scalars on the WHOLE batch: "loss" is the total that is minimised, the rest is logged."""
        raise NotImplementedError(f"{type(self).__name__} defines no loss")

    def fit(self, train: tuple[Outputs, Targets], validation: tuple[Outputs, Targets] | None) -> None:
        """Before every evaluation, with the outputs and targets of both parts. Default: nothing."""

    @property
    def needs_fit(self) -> bool:
        """Whether `fit` does anything, so that the outputs of the training part are worth computing."""
        return type(self).fit is not Head.fit

    def predict(self, outputs: Outputs) -> Prediction:
        """(B, ...) outputs -> `Prediction`. Default: softmax of `logits`, decoded."""
        return decode(torch.softmax(at_least_float32(outputs["logits"]), dim=1), self.ranks, self.decoding)

    def deploy(self) -> tuple[str, dict[str, Any], Head] | None:
        """What is served instead of this head, as (method name, options, head). Default None: the head itself."""
        return None

    def prompt_parameters(self) -> list[nn.Parameter]:
        """Parameters that take the prompts' learning rate; all others of the head take the head's."""
        return []

    def standardise(self, values: Tensor) -> Tensor:
        """For regressors: (B,) label values by the mean and standard deviation of the training labels."""
        return (values - self.label_mean) / self.label_std

    def predict_value(self, standardised: Tensor) -> Prediction:
        """For regressors: (B,) predictions in standardised label units as a `Prediction`."""
        value = at_least_float32(standardised) * self.label_std + self.label_mean
        return Prediction(value, self.ranks.nearest(value))


class PrototypeHead(Head):
    """What is deployed: R prototype vectors, a temperature and, if the encoder needs it, the projection.

    Args:
        output_dim: width of the prototypes; default: that of the features, without a projection.
        alignment, alignment_weight: see `alignment_loss`; only used when labels are given.
    """

    prototypes: Tensor
    logit_scale: Tensor
    projection: nn.Module

    def __init__(
        self,
        context: HeadContext,
        output_dim: int | None = None,
        alignment: Alignment = "official",
        alignment_weight: float = 1.0,
    ):
        super().__init__(context)
        self.projection = nn.Identity() if output_dim is None else nn.Linear(context.input_dim, output_dim)
        self.register_buffer("prototypes", torch.zeros(len(context.ranks), output_dim or context.input_dim))
        self.register_buffer("logit_scale", torch.tensor(float(context.logit_scale)))
        self.alignment: Alignment = alignment
        self.alignment_weight = alignment_weight

    def text_features(self) -> Tensor:
        """The R prototypes, (R, D)."""
        return self.prototypes

    def rank_prototypes(self) -> Tensor | None:
        return self.text_features()

    def space(self, features: Tensor) -> Tensor:
        """The projected features, of length 1."""
        return normalize(at_least_float32(self.projection(features)), dim=-1)

    def forward(self, features: Tensor) -> Outputs:
        prototypes, image = self.text_features(), self.space(features)
        with torch.autocast(features.device.type, enabled=False):
            rank = normalize(at_least_float32(prototypes), dim=-1)
            return {"logits": self.logit_scale.exp() * image @ rank.t()}

    def loss(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        return alignment_loss(outputs["logits"], targets.ranks, targets.weights, self.alignment, self.alignment_weight)


class ZeroShot(PrototypeHead):
    learns = False

    """Zero-shot CLIP: hand-written templates with the rank names, averaged after normalising. Nothing learns.

    Args:
        templates: sentences with {name} and, if wanted, {unit}.

    Raises:
        ValueError: no text tower in the features' space, or a template without {name}.
    """

    def __init__(self, context: HeadContext, templates: Sequence[str] = ("a photo of {name} {unit}.",)):
        super().__init__(context)
        text = _text_tower(context, "zero_shot")
        if not context.shared_space:
            raise ValueError("zero_shot needs an image encoder and a text tower of the same CLIP")
        for template in templates:
            if "{name}" not in template:
                raise ValueError(f"template {template!r} lacks the place {{name}} for the rank's name")
        names, unit = context.ranks.names or (), context.ranks.unit
        with torch.no_grad():
            total = sum(
                normalize(text([" ".join(template.format(name=name, unit=unit).split()) for name in names]), dim=-1)
                for template in templates
            )
            self.prototypes.copy_(normalize(torch.as_tensor(total), dim=-1))

    def deploy(self) -> tuple[str, dict[str, Any], Head]:
        return "prototypes", {}, self


class OrdinalCLIP(PrototypeHead):
    rebuilt = ("text",)
    """Learned rank prompts through the frozen text tower (Li et al., NeurIPS 2022).

    Trained: context, base rank embeddings and, when the image features live in another space than the text
    features, a linear projection. The options are those of `PromptLearner` and `alignment_loss`.

    Args:
        prompt: a sentence to start the context from; default: random.
        learn_logit_scale: whether the temperature learns too.
    """

    def __init__(
        self,
        context: HeadContext,
        prompt: str | None = None,
        num_context: int = 10,
        num_base_ranks: int | None = 3,
        interpolation: Interpolation = "linear",
        rank_position: RankPosition = "tail",
        tokens_per_rank: int = 1,
        rank_specific_context: bool = False,
        init_from_names: bool = False,
        alignment: Alignment = "official",
        alignment_weight: float = 1.0,
        learn_logit_scale: bool = False,
        activation_checkpointing: bool = False,
    ):
        text = _text_tower(context, "ordinalclip")
        output_dim = None if context.shared_space else text.output_dim
        super().__init__(context, output_dim, alignment, alignment_weight)
        del self.prototypes, self.logit_scale
        self.output_dim = output_dim
        self.text = text
        self.text.activation_checkpointing = activation_checkpointing
        self.logit_scale = nn.Parameter(torch.tensor(float(context.logit_scale)), requires_grad=learn_logit_scale)
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

    def text_features(self) -> Tensor:
        return self.text(self.learner())

    def prompt_parameters(self) -> list[nn.Parameter]:
        return [*self.learner.parameters(), cast(nn.Parameter, self.logit_scale)]

    def deploy(self) -> tuple[str, dict[str, Any], Head]:
        options: dict[str, Any] = {
            "output_dim": self.output_dim,
            "alignment": self.alignment,
            "alignment_weight": self.alignment_weight,
        }
        input_dim = self.projection.in_features if isinstance(self.projection, nn.Linear) else self.text.output_dim
        context = HeadContext(self.ranks, input_dim, decoding=self.decoding)
        head = PrototypeHead(context, **options).to(self.logit_scale)
        with torch.no_grad():
            head.prototypes.copy_(normalize(self.text_features(), dim=-1))
            head.logit_scale.copy_(self.logit_scale)
        head.projection.load_state_dict(self.projection.state_dict())
        return "prototypes", options, head


class CoOp(OrdinalCLIP):
    """One free embedding per rank, started from the rank's name (Zhou et al., 2022); OrdinalCLIP's losses."""

    def __init__(
        self,
        context: HeadContext,
        prompt: str | None = None,
        num_context: int = 10,
        rank_position: RankPosition = "tail",
        tokens_per_rank: int = 1,
        rank_specific_context: bool = False,
        init_from_names: bool = True,
        alignment: Alignment = "official",
        alignment_weight: float = 1.0,
        learn_logit_scale: bool = False,
        activation_checkpointing: bool = False,
    ):
        options = {key: value for key, value in locals().items() if key not in ("self", "context", "__class__")}
        super().__init__(context, num_base_ranks=None, **options)


def _text_tower(context: HeadContext, method: str) -> TextTower:
    if context.text is None:
        raise ValueError(f"method {method!r} needs a text tower: set model.text, e.g. to open_clip:RN50/openai")
    return context.text


HEADS = {
    "ordinalclip": "ordinalclip.heads:OrdinalCLIP",
    "coop": "ordinalclip.heads:CoOp",
    "zero_shot": "ordinalclip.heads:ZeroShot",
    "prototypes": "ordinalclip.heads:PrototypeHead",
}


def available_heads() -> dict[str, str]:
    """Every known method and the class behind it: our own, and all of the entry-point group `ordinalclip.heads`."""
    heads = dict(HEADS)
    for point in entry_points(group="ordinalclip.heads"):
        heads.update(point.load())
    return heads


def head_class(method: str) -> type[Head]:
    """The class of a method.

    Raises:
        ValueError: an unknown method; the message lists the choices.
    """
    heads = available_heads()
    if method not in heads:
        raise ValueError(f"method {method!r} is unknown; choices: {', '.join(sorted(heads))}")
    module, _, name = heads[method].partition(":")
    return getattr(importlib.import_module(module), name)


def head_options(method: str) -> dict[str, Any]:
    """The options of a method and their defaults."""
    parameters = list(inspect.signature(head_class(method)).parameters.values())[1:]
    return {parameter.name: parameter.default for parameter in parameters}


def build_head(method: str, context: HeadContext, options: Mapping[str, Any]) -> Head:
    """Build a method's head.

    Raises:
        ValueError: an unknown method, or an option that the method does not have (with the nearest one).
    """
    known = head_options(method)
    for key in options:
        if key not in known:
            raise ValueError(f"head.{key} is not an option of method {method!r}; {near_matches(key, known)}")
    return head_class(method)(context, **options)
