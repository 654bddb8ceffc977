"""What every family of backbones takes and gives."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ordinalclip.text import TextTower


@dataclass(frozen=True)
class PixelSpec:
    """What an image encoder expects of its pixels.

    Attributes:
        size: side of the square input in pixels.
        mean, std: per channel, of pixels in [0, 1].
        interpolation: "nearest", "bilinear", "bicubic", "lanczos", "box" or "hamming".
        resize: "shortest" scales the shorter side, "squash" both sides.
        crop_ratio: they are scaled to this many times `size`; the centre of `size` pixels is then cut out.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    resize: str = "shortest"
    crop_ratio: float = 1.0

    @property
    def scaled_size(self) -> int:
        """The side that pictures are scaled to before the centre is cut out."""
        return round(self.size * self.crop_ratio)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> PixelSpec:
        """From what `dataclasses.asdict` and JSON made of one."""
        typed: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}
        return cls(**typed)


@dataclass
class Backbone:
    """An image encoder with what belongs to it.

    Attributes:
        encoder: (B, 3, size, size) -> (B, output_dim) features.
        output_dim: width D of the features.
        pixels: input size and statistics.
        text: the frozen text tower of the same CLIP, or None.
        logit_scale: log of the CLIP's temperature factor.
        spec: the spec that it was built from.
        architecture: what rebuilds the same architecture without its weights, as JSON data.
    """

    encoder: nn.Module
    output_dim: int
    pixels: PixelSpec
    text: TextTower | None = None
    logit_scale: float = math.log(1 / 0.07)
    spec: str = ""
    architecture: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """How a family is to build what a spec names.

    Attributes:
        load_weights: False: random weights.
        architecture: a `Backbone.architecture` to rebuild; empty: look the name up.
        image_size: another input size than the encoder's own, or None.
        with_text: False: the text tower is not wanted.
        tokenizer: folder to restore the text tower's tokenizer from, when `architecture` says "files".
    """

    load_weights: bool = True
    architecture: dict[str, Any] = field(default_factory=dict)
    image_size: int | None = None
    with_text: bool = True
    tokenizer: Path | None = None


def near_matches(given: str, choices: Iterable[str]) -> str:
    """The choices most like what was given, for an error message."""
    choices = list(choices)
    near = difflib.get_close_matches(given, choices, n=5, cutoff=0.4)
    return ("nearest: " if near else "choices: ") + ", ".join(near or choices[:20])
