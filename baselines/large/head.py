"""LARGE as a method: a direction through the codes of all layers, and a line to the label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize

from baselines.large.calibration import Penalty, calibrate, calibrate_layers, spread_out
from baselines.large.directions import direction_from_extremes, strongest_channels, text_direction, text_gradient
from baselines.large.distances import signed_distances, weighted_distance
from baselines.large.importance import edit_pairs, layer_importance, path_gradients
from ordinalclip.heads import Head, HeadContext, Outputs, Positive, Prediction, Reads, Targets
from ordinalclip.losses import absolute_error, at_least_float32

Share = Annotated[float, Field(gt=0, le=0.5)]
Budget = Annotated[int, Field(ge=2)]
SAMPLES = 100  # codes, or pairs of them, that a generator is asked about, as in the authors' code
EDIT = (0.5, 1.0)  # how far pairs are from the hyperplane, in standard deviations of the distance


class LatentRegressor(Head):
    """Signed distance of the codes along a direction, and a line from there to the label.

    Paper: Nitzan, Gal, Brenner, Cohen-Or, "LARGE: Latent-Based Regression through GAN Semantics", CVPR 2022,
    arXiv:2107.11186.

    Codes are those of a generator (`model.backbone=e4e`), or the features of every layer of any other image encoder
    (ours). Nothing is trained by steps: `fit` finds the direction, chooses the samples that count as labelled, spread
    out in their distance, and calibrates. Before it every answer is the mean label.

    With `direction=extremes` the direction knows all training labels, of which it looks at the highest and lowest;
    `budget` says how many more the line has. With `direction=text` the labels of the budget are all there are.

    Args:
        direction: extremes, between the training samples of the highest and lowest labels; or text, between two texts
            in the space of a CLIP: of a generator's codes the channels that move its pictures from one to the other,
            of a CLIP's own layers the last one alone.
        share: of the training samples, from either end, for extremes.
        source, target: for text, what stands in the templates at the lower and at the higher end.
        templates: for text, sentences with {name}.
        unit_length: make the code of every layer a unit vector first, as CLIP's similarities want it.
        layers: mean distance; separate, a slope for every layer; or generator, weights by the gradients of its
            pictures.
        budget: number of training samples whose labels the line is fitted to; null: all.
        penalty: what holds the slopes back: none, ridge, lasso or elastic_net, on standardised distances and labels.
        strength: of the penalty.
        seed: of the choice of the budget, of what is held out of the extremes, and of the codes that a generator is
            asked about.

    Raises:
        ValueError: a head on features that are not layer-wise; for text, no source or target, no text tower, or one of
            another space than an image encoder's that is no generator's; layers=generator without one.
    """

    learns: ClassVar[bool] = False
    reads: ClassVar[Reads] = "layers"
    normals: Tensor
    slopes: Tensor
    offset: Tensor

    def __init__(
        self,
        context: HeadContext,
        direction: Literal["extremes", "text"] = "extremes",
        share: Share = 0.02,
        source: str = "",
        target: str = "",
        templates: Annotated[Sequence[str], Field(min_length=1)] = ("a photo of {name}.",),
        unit_length: bool = False,
        layers: Literal["mean", "separate", "generator"] = "mean",
        budget: Budget | None = None,
        penalty: Penalty = "none",
        strength: Positive = 1.0,
        seed: Annotated[int, Field(ge=0, lt=2**63)] = 0,
    ):
        super().__init__(context)
        self.direction, self.share, self.unit_length, self.layers = direction, share, unit_length, layers
        self.budget, self.penalty, self.strength, self.seed = budget, penalty, strength, seed
        if not context.layer_dims:
            raise ValueError("large reads the features of layers; the model gives it none")
        if self.learns and budget is not None:
            raise ValueError("head.budget: training reads all labels; draw fewer samples with data.shots or num_train")
        self._hold("normals", torch.zeros(len(context.layer_dims), context.input_dim))
        self._hold("slopes", torch.zeros(len(context.layer_dims)))
        self._hold("offset", torch.zeros(()))
        # In a tuple, so that they are no part of the model that is saved.
        self._generator: tuple[Any] = (context.generator,)
        self._see = context.see
        self._shared = context.shared_space
        self._text: Tensor | None = None
        if direction == "text":
            self._text = self._between(context, source, target, templates)

    def _hold(self, name: str, tensor: Tensor) -> None:
        """Make a tensor part of what is fitted."""
        self.register_buffer(name, tensor)

    @staticmethod
    def _between(context: HeadContext, source: str, target: str, templates: Sequence[str]) -> Tensor | None:
        """The direction of the two texts (E,); None in a model that is served: it has its normals already."""
        if not (source and target):
            raise ValueError("direction=text needs head.source and head.target, the two ends in words")
        if context.text is None:
            return None
        with torch.no_grad():
            return text_direction(source, target, context.text, templates).float()

    def forward(self, features: Tensor) -> Outputs:
        codes = at_least_float32(features)
        return {"codes": normalize(codes, dim=-1) if self.unit_length else codes}

    def space(self, features: Tensor) -> Tensor:
        """The distances (B, L)."""
        return self._distances(self(features)["codes"])

    def loss(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        return {"loss": absolute_error(self._answers(outputs), self.standardise(targets.values), targets.weights)}

    def fit(self, train: tuple[Outputs, Targets], validation: tuple[Outputs, Targets] | None) -> None:
        outputs, targets = train
        codes, labels = outputs["codes"].cpu(), self.standardise(targets.values).cpu()
        normals = self._direction(codes, targets.values)
        pool = distances = signed_distances(codes, normals)
        weights = self._layer_weights(normals) if self.layers == "generator" else None
        single = weighted_distance(distances, weights)
        if self.budget is not None:
            rows = torch.from_numpy(spread_out(single, self.budget, self.seed))
            distances, single, labels = distances[rows], single[rows], labels[rows]
        if self.layers == "separate":
            slopes, offset = calibrate_layers(distances, labels, self.penalty, self.strength, pool)
        else:
            slope, offset = calibrate(single, labels, self.penalty, self.strength)
            count = distances.shape[1]
            slopes = slope * (torch.full((count,), 1 / count) if weights is None else weights)
        # The normals are as long as the label is steep, and what is left of the slopes weighs the layers.
        scale = slopes.abs().sum()
        if scale > 0:
            normals, slopes = normals * scale.to(normals), slopes / scale
        with torch.no_grad():
            self.normals.copy_(normals)
            self.slopes.copy_(slopes)
            self.offset.fill_(offset)

    def predict(self, outputs: Outputs) -> Prediction:
        return self.predict_value(self._answers(outputs))

    def _distances(self, codes: Tensor) -> Tensor:
        return torch.einsum("bld,ld->bl", codes, self.normals.to(codes))

    def _answers(self, outputs: Outputs) -> Tensor:
        """(B,) standardised values."""
        codes = outputs["codes"]
        return self._distances(codes) @ self.slopes.to(codes) + self.offset.to(codes)

    def _direction(self, codes: Tensor, values: Tensor) -> Tensor:
        """Normals (L, D)."""
        if self.direction == "extremes":
            return direction_from_extremes(codes, values, self.share, seed=self.seed).normal
        if self._text is None:
            raise ValueError("direction=text needs a text tower: of the backbone, or of model.text")
        if self._see is not None:
            generator, sampled = self._sampled(SAMPLES)
            see: Any = self._see
            beta = text_gradient(sampled, generator, lambda pictures: normalize(see(pictures), dim=1), self._text)
            return strongest_channels(beta).to(codes)
        if not self._shared:
            raise ValueError(
                "direction=text needs an image encoder and a text tower of the same CLIP, or a generator's encoder "
                "with its generator"
            )
        normals = codes.new_zeros(codes.shape[1:])
        normals[-1, : len(self._text)] = self._text.to(codes)  # narrower than the widest layer, perhaps
        return normals

    def _sampled(self, count: int) -> tuple[Any, Tensor]:
        """The generator, and codes (count, L, D) of its own in W, repeated in every layer."""
        generator: Any = self._generator[0]
        if generator is None:
            raise ValueError("layers=generator needs the encoder of a generator with its generator: model.backbone=e4e")
        generator = generator.to(self.normals.device)
        z = torch.randn(count, generator.style_dim, generator=torch.Generator().manual_seed(self.seed))
        with torch.no_grad():
            w = generator.style(z.to(generator.input.input))
        return generator, w[:, None].expand(-1, len(self.slopes), -1).contiguous()

    def _layer_weights(self, normals: Tensor) -> Tensor:
        """(L,): see `layer_importance`."""
        generator, sampled = self._sampled(3 * SAMPLES)
        normals = normals.to(sampled)
        deviation = float(signed_distances(sampled, normals / normals.norm()).sum(dim=1).std())
        begun, one, other = sampled.split(SAMPLES)
        sources, destinations = edit_pairs(begun, normals, self.seed, steps=(EDIT[0] * deviation, EDIT[1] * deviation))
        edits, usual = (path_gradients(generator, *pair) for pair in ((sources, destinations), (one, other)))
        return layer_importance(edits, usual).cpu()


class TunedLatentRegressor(LatentRegressor):
    """LARGE as a start: from its direction and line on encoder, normals, layer weights and offset learn by steps.

    Paper: Nitzan, Gal, Brenner, Cohen-Or, "LARGE: Latent-Based Regression through GAN Semantics", CVPR 2022,
    arXiv:2107.11186; the training is ours.

    The encoder stays as it is with `train.freeze=[encoder.*]`. Training reads all labels, so there is no budget but to
    draw fewer samples (`data.shots`).

    Args: see `LatentRegressor`.

    Raises:
        ValueError: see `LatentRegressor`.
    """

    learns: ClassVar[bool] = True
    fit = Head.fit

    def start(self, train: tuple[Outputs, Targets]) -> None:
        super().fit(train, None)

    def _hold(self, name: str, tensor: Tensor) -> None:
        if name == "normals":
            tensor = torch.randn_like(tensor) / tensor.numel() ** 0.5
        elif name == "slopes":
            tensor = torch.full_like(tensor, 1 / len(tensor))
        self.register_parameter(name, nn.Parameter(tensor))
