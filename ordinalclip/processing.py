"""The image processor that is saved with a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.utils import cached_file

from ordinalclip.files import read_json_object
from ordinalclip.images import PixelSpec, load_image, prepare

NAME = "preprocessor_config.json"
FIELDS = {"size": "size", "image_mean": "mean", "image_std": "std"} | {
    name: name for name in ("interpolation", "resize", "crop_ratio")
}


class OrdinalImageProcessor(BaseImageProcessor):
    """The same decoding, resizing and normalising as in training (`ordinalclip.images.prepare`).

    Takes one image or a list of paths, PIL images, arrays or bytes; gives `pixel_values` (B, 3, size, size).

    Raises:
        ValueError: a size, statistics or rule that no encoder has, or another option.
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
        kind = kwargs.pop("image_processor_type", type(self).__name__)
        if kind != type(self).__name__ or kwargs:
            foreign = f"image_processor_type {kind!r}" if kind != type(self).__name__ else f"option {', '.join(kwargs)}"
            raise ValueError(f"OrdinalImageProcessor has no {foreign}; its options are {', '.join(FIELDS)}")
        super().__init__()
        self.size = size
        self.image_mean = [0.0, 0.0, 0.0] if image_mean is None else image_mean
        self.image_std = [1.0, 1.0, 1.0] if image_std is None else image_std
        self.interpolation = interpolation
        self.resize = resize
        self.crop_ratio = crop_ratio
        self.spec  # noqa: B018 - refuses what is no specification

    @property
    def spec(self) -> PixelSpec:
        """What the encoder expects of its pixels."""
        return PixelSpec.from_dict({name: getattr(self, key) for key, name in FIELDS.items()})

    @classmethod
    def from_spec(cls, spec: PixelSpec) -> OrdinalImageProcessor:
        return cls(spec.size, list(spec.mean), list(spec.std), spec.interpolation, spec.resize, spec.crop_ratio)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> OrdinalImageProcessor:
        """Load what `save_pretrained` wrote, from a folder or the hub.

        Raises:
            OSError: no such folder or file; ValueError: damaged, or other pixels than the config.json beside it says.
        """
        hub = {key: kwargs[key] for key in HUB_OPTIONS if kwargs.get(key) is not None}
        file = cached_file(str(pretrained_model_name_or_path), NAME, **hub)
        content = read_json_object(Path(str(file)))
        try:
            processor = cls(**content)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        beside = cached_file(
            str(pretrained_model_name_or_path), "config.json", _raise_exceptions_for_missing_entries=False, **hub
        )
        pixels = None if beside is None else read_json_object(Path(beside)).get("pixels")
        if pixels is not None and PixelSpec.from_dict(pixels) != processor.spec:
            wrong = [key for key, name in FIELDS.items() if getattr(processor, key) != pixels.get(name)]
            said = "; ".join(
                f"{key} is {getattr(processor, key)!r}, there {pixels.get(FIELDS[key])!r}" for key in wrong
            )
            raise ValueError(f"{file} contradicts the pixels of the config.json beside it: {said}")
        return processor

    def preprocess(self, images: Any, return_tensors: str | None = "pt", **kwargs: Any) -> BatchFeature:
        if kwargs:
            raise ValueError(f"OrdinalImageProcessor takes no option {', '.join(kwargs)} at call time")
        spec = self.spec
        given = list(images) if isinstance(images, list | tuple) else [images]
        pixels = torch.stack([prepare(load_image(image, f"image {i}"), spec) for i, image in enumerate(given)])
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)


HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
