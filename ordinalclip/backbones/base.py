"""What every family of backbones takes and gives."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import interpolate

from ordinalclip.images import PixelSpec
from ordinalclip.text import TextTower
from ordinalclip.tokenization import TextPooling
from ordinalclip.weights import first_line


@dataclass(frozen=True)
class Pooling:
    """How an image tower makes one vector of the tokens or the map of a layer: the way it does so at its end.

    Towers that end in an attention layer of their own (SigLIP, CLIP's ResNets) have trained it for their last layer
    alone: of the others the mean is taken.

    Attributes:
        class_token: the first token stands for the picture; else it is the mean over tokens.
        num_prefix_tokens: tokens before those of the patches, which the mean leaves out.
        channels_last: maps are (B, H, W, D), not (B, D, H, W).
    """

    class_token: bool = False
    num_prefix_tokens: int = 0
    channels_last: bool = False

    def __call__(self, output: Tensor) -> Tensor:
        """(B, N, D) tokens or a map of 4 axes -> (B, D)."""
        if output.ndim == 4:
            return output.mean(dim=(1, 2) if self.channels_last else (2, 3))
        if self.class_token:
            return output[:, 0].clone()  # no view: what comes after may work in place
        return output[:, self.num_prefix_tokens :].mean(dim=1)


def check_map(output: Tensor, where: str, channels_last: bool = False) -> None:
    """Pictures are square, and so is a map of one, unless its channels are on one of the axes that would be averaged.

    Args:
        output: (B, D, S, S), or (B, S, S, D) if `channels_last`.
        where: begins the message of the error.

    Raises:
        ValueError: the two axes differ.
    """
    height, width = output.shape[1:3] if channels_last else output.shape[2:]
    if height != width:
        raise ValueError(f"{where} gives a map {tuple(output.shape)}: which axis are its channels?")


@dataclass
class Backbone:
    """An image encoder with what belongs to it.

    Attributes:
        encoder: (B, 3, size, size) -> (B, output_dim) features.
        output_dim: width D of the features.
        pixels: input size and statistics.
        text: the frozen text tower of the same CLIP, or None.
        logit_scale: log of the CLIP's temperature factor.
        pooling: how a layer's tokens or map become one vector.
        generator: for encoders to the latent space of a generator that is at hand: codes (B, L, D) -> pictures.
        spec: the spec that it was built from.
        architecture: what rebuilds the same architecture without its weights, as JSON data.
    """

    encoder: nn.Module
    output_dim: int
    pixels: PixelSpec
    text: TextTower | None = None
    logit_scale: float = math.log(1 / 0.07)
    pooling: Pooling = Pooling()
    generator: nn.Module | None = None
    spec: str = ""
    architecture: dict[str, Any] = field(default_factory=dict)

    def see(self, pictures: Tensor) -> Tensor:
        """Features (B, D) of a generator's pictures (B, 3, H, W) in [-1, 1], scaled to the encoder's input size.

        Differentiable, in evaluation mode. Pictures from files go through `ordinalclip.images.prepare`.
        """
        side, encoder = self.pixels.size, self.encoder.to(pictures.device).eval()
        pixels = interpolate((pictures + 1) / 2, (side, side), mode="bilinear", align_corners=False, antialias=True)
        mean, std = (pixels.new_tensor(numbers)[:, None, None] for numbers in (self.pixels.mean, self.pixels.std))
        return encoder((pixels - mean) / std)


@dataclass(frozen=True)
class Request:
    """How a family is to build what a spec names.

    Attributes:
        load_weights: False: random weights.
        architecture: a `Backbone.architecture` to rebuild; empty: look the name up.
        image_size: another input size than the encoder's own, or None.
        with_text: False: the text tower is not wanted.
        text_pooling: of a text encoder whose files do not say it.
        tokenizer: folder to restore the text tower's tokenizer from, when `architecture` says "files".
    """

    load_weights: bool = True
    architecture: dict[str, Any] = field(default_factory=dict)
    image_size: int | None = None
    with_text: bool = True
    text_pooling: TextPooling | None = None
    tokenizer: Path | None = None


@contextmanager
def fetching(spec: str) -> Iterator[None]:
    """While a library fetches weights from a hub: whatever goes wrong is one error that names the spec.

    Raises:
        ValueError: they cannot be had.
    """
    logger = logging.getLogger()
    before = logger.level
    try:
        logger.setLevel(logging.CRITICAL)  # open_clip logs the error that it raises
        yield
    except Exception as error:  # no network, no such name, no access, no space: libraries agree on no type
        raise ValueError(
            f"backbone {spec}: its weights can be had neither from the hub nor from what was fetched before "
            f"({first_line(error)})"
        ) from error
    finally:
        logger.setLevel(before)
