"""Encoders to the latent space of a StyleGAN2, e4e's and pSp's: pictures -> codes in W+."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from baselines.large.e4e import MIDDLE, Encoder, load_pair
from ordinalclip.backbones import TINY_FOLDER, Family
from ordinalclip.backbones.base import Backbone, Request
from ordinalclip.images import PixelSpec

TINY_GAN = TINY_FOLDER.parent / "tiny-gan" / "model.safetensors"


class LatentEncoder(nn.Module):
    """An encoder with the code that its codes are relative to: pictures (B, 3, S, S) -> (B, L * D), layer by layer.

    Args:
        encoder: pictures -> (B, L, D).
        offset: (L, D), added to what it gives.
    """

    offset: Tensor

    def __init__(self, encoder: Encoder, offset: Tensor):
        super().__init__()
        self.encoder = encoder
        self.register_buffer("offset", offset)

    def layer_features(self, pixel_values: Tensor) -> Tensor:
        """The codes as layers, (B, L, D): see `ordinalclip.backbones.layers.LayerFeatures`."""
        return self.encoder(pixel_values) + self.offset

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.layer_features(pixel_values).flatten(1)


def load(name: str, request: Request) -> Backbone:
    """`e4e`: the small encoder in the package's assets; `e4e:FILE`: a checkpoint of e4e or pSp."""
    spec = f"e4e:{name}" if name else "e4e"
    generator: nn.Module | None = None
    if request.architecture:
        encoder = Encoder(**request.architecture)
        offset = torch.zeros(encoder.num_rows, encoder.style_dim)
    else:
        encoder, offset, generator = load_pair(name or TINY_GAN)
        if not request.load_weights:
            encoder = Encoder(**encoder.options)
    encoder.latlayer2.requires_grad_(encoder.num_rows > MIDDLE)  # generators below 32 px have no row that reads it
    size = encoder.input_size
    if request.image_size not in (None, size):
        raise ValueError(
            f"backbone {spec}: its encoder takes pictures of {size} px alone, model.image_size is {request.image_size}"
        )
    return Backbone(
        LatentEncoder(encoder, offset),
        encoder.num_rows * encoder.style_dim,
        # The small one has learned from drawings that were made smaller by averaging; a saved model notes which it was.
        PixelSpec(size, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear" if name else "box", "squash"),
        architecture=encoder.options,
        generator=None if generator is None else generator.eval().requires_grad_(False),
    )


FAMILIES = {
    "e4e": Family(
        load,
        {
            "e4e": "codes of a small StyleGAN2 that comes with the package and draws calm tanks of 32 px",
            "e4e:FILE": "codes in W+ by an encoder of e4e or pSp in a public checkpoint, with its generator",
        },
        "none",
        "model.backbone=e4e:e4e_ffhq_encode.pt",
    ),
}
