"""The image processor that is saved with a model."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

from ordinalclip.images import PixelSpec, load_image, prepare


class OrdinalImageProcessor(BaseImageProcessor):
    """The same decoding, resizing and normalising as in training (`ordinalclip.images.prepare`).

    Takes one image or a list of paths, PIL images, arrays or bytes; gives `pixel_values` (B, 3, size, size).
    """

    model_input_names: ClassVar[list[str]] = ["pixel_values"]

    def __init__(
        self,
        size: int = 224,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        interpolation: str = "bicubic",
        resize: str = "shortest",
        crop_ratio: float = 1.0,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.size = size
        self.image_mean = list(image_mean or (0.0, 0.0, 0.0))
        self.image_std = list(image_std or (1.0, 1.0, 1.0))
        self.interpolation = interpolation
        self.resize = resize
        self.crop_ratio = crop_ratio

    @classmethod
    def from_spec(cls, spec: PixelSpec) -> OrdinalImageProcessor:
        return cls(spec.size, list(spec.mean), list(spec.std), spec.interpolation, spec.resize, spec.crop_ratio)

    def preprocess(self, images: Any, return_tensors: str | None = "pt", **kwargs: Any) -> BatchFeature:
        if kwargs:
            raise ValueError(f"OrdinalImageProcessor takes no option {', '.join(kwargs)} at call time")
        (r, g, b), (r_std, g_std, b_std) = self.image_mean, self.image_std
        mean, std = (r, g, b), (r_std, g_std, b_std)
        spec = PixelSpec(self.size, mean, std, self.interpolation, self.resize, self.crop_ratio)
        given = list(images) if isinstance(images, list | tuple) else [images]
        pixels = torch.stack([prepare(load_image(image, f"image {i}"), spec) for i, image in enumerate(given)])
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)
