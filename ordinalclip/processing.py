"""The image processor that is saved with a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub import is_offline_mode
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.utils import cached_file

from ordinalclip.files import read_json_object
from ordinalclip.images import PixelSpec, load_image, prepare
from ordinalclip.suggestions import near_matches
from ordinalclip.weights import first_line

NAME = "preprocessor_config.json"
FIELDS = {"size": "size", "image_mean": "mean", "image_std": "std"} | {
    name: name for name in ("interpolation", "resize", "crop_ratio")
}

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def find_file(name: str, file: str, hub: dict[str, Any]) -> Path:
    """A file of a model, which is a folder or a name on the hub.

    Raises:
        FileNotFoundError: it is not there, in one line.
    """
    folder = Path(name)
    if folder.is_dir():
        path = folder / (hub.get("subfolder") or "") / file
        if path.is_file():
            return path
        others = sorted(
            other.name for other in path.parent.glob("*") if other.suffix in (".bin", ".pt", ".pth", ".pkl")
        )
        pickled = f" ({', '.join(others)} is not read: pickled files may hold code)" if others else ""
        raise FileNotFoundError(f"{path}: no such file, so {name} is no saved model{pickled}")
    why = "" if not folder.exists() else "a file, and not a folder with a model"
    if not why and len(folder.parts) > 1 and folder.parent.is_dir():  # a typing error, and no reason to ask the network
        near = near_matches(folder.name, (other.name for other in folder.parent.iterdir() if other.is_dir()))
        why = f"no such folder in {folder.parent} ({near})"
    if not why:
        try:
            validate_repo_id(name)
        except HFValidationError:
            why = "no such folder"
    if not why:
        try:
            return Path(str(cached_file(name, file, **hub)))
        except OSError as error:
            where = "HF_HUB_OFFLINE is set, so the hub is not asked" if is_offline_mode() else first_line(error)
            why = f"no such folder, and no model of that name at hand ({where})"
    raise FileNotFoundError(f"{name}: {why}")


class OrdinalImageProcessor(BaseImageProcessor):
    """The same decoding, resizing and normalising as in training (`ordinalclip.images.prepare`).

    Takes one image or a list of whatever `load_image` reads; gives `pixel_values` (B, 3, size, size).

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
        file = find_file(str(pretrained_model_name_or_path), NAME, hub)
        content = read_json_object(file)
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
