"""What every family of backbones takes and gives."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ordinalclip.images import PixelSpec
from ordinalclip.text import TextTower
from ordinalclip.weights import first_line


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
