"""LARGE as a method: a direction through the codes of all layers, and a line to the label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from baselines.large.calibration import Penalty, calibrate, calibrate_layers, spread_out
from baselines.large.directions import direction_from_extremes, text_direction
from baselines.large.distances import signed_distances, weighted_distance
from ordinalclip.heads import Head, HeadContext, Outputs, Positive, Prediction, Targets
from ordinalclip.losses import absolute_error, at_least_float32

Share = Annotated[float, Field(gt=0, le=0.5)]
Budget = Annotated[int, Field(ge=2)]


class LatentRegressor(Head):
    """Signed distance of the codes along a direction, and a line from there to the label.

    Paper: Nitzan, Gal, Brenner, Cohen-Or, "LARGE: Latent-Based Regression through GAN Semantics", CVPR 2022,
    arXiv:2107.11186.

    Codes are a generator's, or the features of every layer of an image encoder (ours). Nothing is trained by steps:
    `fit` finds the direction, chooses the samples that count as labelled, spread out in their distance, and calibrates.
    Before it every answer is the mean label.

    With `direction=extremes` the direction knows all training labels, of which it looks at the highest and lowest;
    `budget` says how many more the line has. With `direction=text` the labels of the budget are all there are.

    Args:
        direction: extremes, between the training samples of the highest and lowest labels; or text, between two texts
            in the space of a CLIP, for which the last layer counts alone.
        share: of the training samples, from either end, for extremes.
        source, target: for text, what stands in the templates at the lower and at the higher end.
        templates: for text, sentences with {name}.
        unit_length: make the code of every layer a unit vector first, as CLIP's similarities want it.
        layers: mean distance, or separate, a slope for every layer.
        budget: number of training samples whose labels the line is fitted to; null: all.
        penalty: what holds the slopes back: none, ridge, lasso or elastic_net, on standardised distances and labels.
        strength: of the penalty.
        seed: of the choice of the budget, and of what is held out of the extremes.

    Raises:
        ValueError: for text, no source or target, or an image encoder and text tower of different spaces.
    """

    learns: ClassVar[bool] = False
    layerwise: ClassVar[bool] = True
    normals: Tensor
    slopes: Tensor
    offset: Tensor
    text_normal: Tensor

    def __init__(
        self,
        context: HeadContext,
        direction: Literal["extremes", "text"] = "extremes",
        share: Share = 0.02,
        source: str = "",
        target: str = "",
        templates: Annotated[Sequence[str], Field(min_length=1)] = ("a photo of {name}.",),
        unit_length: bool = False,
        layers: Literal["mean", "separate"] = "mean",
        budget: Budget | None = None,
        penalty: Penalty = "none",
        strength: Positive = 1.0,
        seed: int = 0,
    ):
        super().__init__(context)
        self.direction, self.share, self.unit_length, self.layers = direction, share, unit_length, layers
        self.budget, self.penalty, self.strength, self.seed = budget, penalty, strength, seed
        self.register_buffer("normals", torch.empty(0, 0))  # (L, D)
        self.register_buffer("slopes", torch.empty(0))  # (L,), of standardised labels
        self.register_buffer("offset", torch.zeros(()))
        self.register_buffer("text_normal", torch.empty(0), persistent=False)
        if direction == "text":
            if not (source and target):
                raise ValueError("direction=text needs head.source and head.target, the two ends in words")
            if context.text is not None:  # a model that is served has its normals already, and no text tower
                if not context.shared_space:
                    raise ValueError("direction=text needs an image encoder and a text tower of the same CLIP")
                with torch.no_grad():
                    self.text_normal = text_direction(source, target, context.text, templates).float()

    def forward(self, features: Tensor) -> Outputs:
        codes = at_least_float32(features)
        return {"codes": normalize(codes, dim=-1) if self.unit_length else codes}

    def space(self, features: Tensor) -> Tensor:
        """The distances (B, L); before `fit` the codes."""
        codes = self(features)["codes"]
        return signed_distances(codes, self.normals) if len(self.normals) else codes.flatten(1)

    def loss(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        return {"loss": absolute_error(self._answers(outputs), self.standardise(targets.values), targets.weights)}

    def fit(self, train: tuple[Outputs, Targets], validation: tuple[Outputs, Targets] | None) -> None:
        outputs, targets = train
        codes, labels = outputs["codes"], self.standardise(targets.values)
        normals = self._direction(codes, targets.values)
        distances = signed_distances(codes, normals)
        single = weighted_distance(distances)
        if self.budget is not None:
            rows = torch.from_numpy(spread_out(single, self.budget, self.seed))
            distances, single, labels = distances[rows], single[rows], labels[rows]
        if self.layers == "separate":
            slopes, offset = calibrate_layers(distances, labels, self.penalty, self.strength)
        else:
            slope, offset = calibrate(single, labels, self.penalty, self.strength)
            slopes = torch.full((distances.shape[1],), slope / distances.shape[1])
        self.normals, self.slopes = normals.to(self.offset), slopes.to(self.offset)
        self.offset.fill_(offset)

    def predict(self, outputs: Outputs) -> Prediction:
        return self.predict_value(self._answers(outputs))

    def _answers(self, outputs: Outputs) -> Tensor:
        """(B,) standardised values."""
        codes = outputs["codes"]
        if not len(self.normals):
            return codes.new_zeros(len(codes))
        return signed_distances(codes, self.normals) @ self.slopes.to(codes) + self.offset.to(codes)

    def _direction(self, codes: Tensor, values: Tensor) -> Tensor:
        """Normals (L, D)."""
        if self.direction == "extremes":
            return direction_from_extremes(codes, values, self.share, seed=self.seed).normal
        if not len(self.text_normal):
            raise ValueError("direction=text needs a backbone with a text tower")
        normals = codes.new_zeros(codes.shape[1:])
        normals[-1, : len(self.text_normal)] = self.text_normal  # narrower than the widest layer, perhaps
        return normals

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Make room for a direction of any number of layers; that its parts fit each other is checked as always."""
        normals, slopes = (state_dict.get(prefix + name) for name in ("normals", "slopes"))
        if normals is not None and slopes is not None and normals.ndim == 2 and normals.shape[:1] == slopes.shape:
            self.normals = torch.empty_like(normals, device=self.normals.device)
            self.slopes = torch.empty_like(slopes, device=self.slopes.device)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
