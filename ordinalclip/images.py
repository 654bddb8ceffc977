"""Images in, pixel tensors out: one decoding, resizing and normalising for training and serving."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

INTERPOLATION = {kind.name.lower(): kind for kind in Image.Resampling}
RESIZE = ("shortest", "squash")
LARGEST_INPUT = 4096  # pixels on a side
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class PixelSpec:
    """What an image encoder expects of its pixels.

    Attributes:
        size: side of the square input in pixels.
        mean, std: per channel, of pixels in [0, 1].
        interpolation: "nearest", "bilinear", "bicubic", "lanczos", "box" or "hamming".
        resize: "shortest" scales the shorter side, "squash" both sides.
        crop_ratio: they are scaled to this many times `size`; the centre of `size` pixels is then cut out.

    Raises:
        ValueError: a size, statistics or rule that no encoder has.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    resize: str = "shortest"
    crop_ratio: float = 1.0

    def __post_init__(self) -> None:
        if not (_is_number(self.size) and isinstance(self.size, int) and 1 <= self.size <= LARGEST_INPUT):
            raise ValueError(f"size must be a whole number of pixels from 1 to {LARGEST_INPUT}, got {self.size!r}")
        for name, numbers in (("mean", self.mean), ("std", self.std)):
            if not (isinstance(numbers, tuple) and len(numbers) == 3 and all(map(_is_number, numbers))):
                raise ValueError(f"{name} must be three finite numbers, got {numbers!r}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be above 0, got {self.std!r}")
        for name, rule, known in (
            ("interpolation", self.interpolation, INTERPOLATION),
            ("resize", self.resize, RESIZE),
        ):
            if not isinstance(rule, str) or rule not in known:
                raise ValueError(f"{name} {rule!r} is unknown; choices: {', '.join(known)}")
        if not (_is_number(self.crop_ratio) and 0.5 <= self.crop_ratio <= 4):
            raise ValueError(f"crop_ratio must be a number from 0.5 to 4, got {self.crop_ratio!r}")

    @property
    def scaled_size(self) -> int:
        """The side that pictures are scaled to before the centre is cut out."""
        return round(self.size * self.crop_ratio)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> PixelSpec:
        """From what `dataclasses.asdict` and JSON made of one."""
        if not isinstance(fields, Mapping) or fields.keys() - {field.name for field in dataclass_fields(cls)}:
            known = ", ".join(field.name for field in dataclass_fields(cls))
            raise ValueError(f"fields of an image encoder's pixels are {known}, got {fields!r}")
        if lacking := [name for name in ("size", "mean", "std") if name not in fields]:
            raise ValueError(f"pixels lack {', '.join(lacking)}")
        typed: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}
        return cls(**typed)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class BrokenImageError(ValueError):
    """An image that cannot be read; the message names it and says why."""


def load_image(source: Any, name: str = "image") -> Image.Image:
    """Decode anything that holds a picture to RGB.

    Args:
        source: a path, encoded bytes, a PIL image, an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of uint8,
            uint16 or floats in [0, 1], or a `datasets` image dict with "bytes" / "path".
        name: what to call it in an error when it is no path.

    Raises:
        BrokenImageError: a missing, truncated or foreign file, an array of another shape or type.
    """
    if isinstance(source, dict) and {"bytes", "path"} & source.keys():
        name = source.get("path") or name
        source = source["bytes"] if source.get("bytes") is not None else source["path"]
    if isinstance(source, str | os.PathLike):
        name = str(source)
    try:
        if isinstance(source, np.ndarray):
            return to_rgb(_array_to_pil(source))
        if isinstance(source, bytes):
            source = io.BytesIO(source)
        image = source if isinstance(source, Image.Image) else Image.open(source)
        image.load()
        return to_rgb(image)
    except Exception as error:  # decoders of damaged files raise whatever they like; all of it is reported by name
        raise BrokenImageError(f"{name}: not a readable image ({error})") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB from any mode: EXIF rotation applied, 16 bits scaled to 8, transparent pixels laid on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # "I;16" and its relatives, or "I" holding 16-bit values
        pixels = np.asarray(image).astype(np.float64)
        pixels = pixels / 257 if pixels.max(initial=0) > 255 or image.mode != "I" else pixels
        return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        pixels = np.asarray(image)
        if pixels.min(initial=0) < 0 or pixels.max(initial=0) > 1:
            raise ValueError("float pixels must lie in [0, 1]")
        return Image.fromarray((pixels * 255).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(canvas, image).convert("RGB")
    return image.convert("RGB")


def _array_to_pil(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ValueError(f"an array of shape {array.shape}; allowed are (H, W), (H, W, 1), (H, W, 3) and (H, W, 4)")
    if array.dtype == np.uint16:
        array = (array / 257).round().astype(np.uint8)
    elif np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min(initial=0) >= 0 and array.max(initial=0) <= 1):
            raise ValueError("a float array must lie in [0, 1]")
        array = (array * 255).round().astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ValueError(f"an array of {array.dtype}; allowed are uint8, uint16 and floats in [0, 1]")
    return Image.fromarray(array)


def resize(image: Image.Image, spec: PixelSpec, size: int | None = None) -> Image.Image:
    """Scale an RGB image so that its shorter side ("shortest") or both sides ("squash") have `size` pixels.

    Default: the encoder's own `scaled_size`, from which the centre is then cut out.
    """
    size = size or spec.scaled_size
    width, height = image.size
    if spec.resize == "squash":
        target = (size, size)
    else:
        scale = size / min(width, height)
        target = (max(size, round(width * scale)), max(size, round(height * scale)))
    return image if image.size == target else image.resize(target, INTERPOLATION[spec.interpolation])


def crop(image: Image.Image, size: int, x: float = 0.5, y: float = 0.5) -> Image.Image:
    """A square cut-out; x and y in [0, 1] place it, 0.5 being the centre."""
    left, top = round((image.width - size) * x), round((image.height - size) * y)
    return image.crop((left, top, left + size, top + size))


def normalise(image: Image.Image, spec: PixelSpec) -> Tensor:
    """RGB image -> (3, H, W) float32, standardised by the encoder's pixel statistics."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(spec.mean)[:, None, None]) / torch.tensor(spec.std)[:, None, None]


def prepare(image: Image.Image, spec: PixelSpec) -> Tensor:
    """The whole path at evaluation and serving: resize, centre crop, normalise: (3, size, size) float32."""
    return normalise(crop(resize(image, spec), spec.size), spec)


@dataclass(frozen=True)
class Augmentation:
    """Random views for training, a pure function of the generator given.

    Attributes:
        crop_ratio: the image is first resized to this many times the input size, then cropped at random.
        flip, flip_vertical: mirror with probability 1/2.
        quarter_turns: rotate by a random multiple of 90 degrees.
        rotate: largest rotation in degrees; shift: largest shift as a share of the size; scale: (low, high).
        contrast, brightness: largest relative change.
    """

    crop_ratio: float = 256 / 224
    flip: bool = False
    flip_vertical: bool = False
    quarter_turns: bool = False
    rotate: float = 0.0
    shift: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    contrast: float = 0.0
    brightness: float = 0.0

    def input_size(self, spec: PixelSpec) -> int:
        """The size to `resize` an image to before it comes here."""
        return round(spec.size * self.crop_ratio)

    def __call__(self, image: Image.Image, spec: PixelSpec, rng: np.random.Generator) -> Tensor:
        """A resized RGB image -> (3, size, size) float32."""
        draws = rng.random(10)  # always as many draws, so that switching one option on leaves the others' alone
        image = crop(image, spec.size, draws[0], draws[1])
        if self.flip and draws[2] < 0.5:
            image = ImageOps.mirror(image)
        if self.flip_vertical and draws[3] < 0.5:
            image = ImageOps.flip(image)
        if self.quarter_turns:
            turns = (None, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
            turn = turns[int(draws[4] * 4)]
            image = image if turn is None else image.transpose(turn)
        if self.rotate or self.shift or self.scale != (1.0, 1.0):
            angle, scale = _between(-self.rotate, self.rotate, draws[5]), _between(*self.scale, draws[6])
            shift = (_between(-self.shift, self.shift, draws[7]), _between(-self.shift, self.shift, draws[8]))
            image = _affine(image, angle, scale, shift, INTERPOLATION["bilinear"])
        if self.contrast:
            image = ImageEnhance.Contrast(image).enhance(_between(1 - self.contrast, 1 + self.contrast, draws[9]))
        if self.brightness:
            image = ImageEnhance.Brightness(image).enhance(
                _between(1 - self.brightness, 1 + self.brightness, rng.random())
            )
        return normalise(image, spec)


def _between(low: float, high: float, share: float) -> float:
    return low + (high - low) * share


def _affine(image: Image.Image, angle: float, scale: float, shift: tuple[float, float], resample: Any) -> Image.Image:
    """Rotate by degrees and scale about the centre, then shift by a share of the size; borders take the mean colour."""
    width, height = image.size
    cos, sin = math.cos(math.radians(angle)) / scale, math.sin(math.radians(angle)) / scale
    x, y = width * (0.5 + shift[0]), height * (0.5 + shift[1])
    matrix = (cos, sin, width / 2 - cos * x - sin * y, -sin, cos, height / 2 + sin * x - cos * y)
    fill = tuple(int(c) for c in np.asarray(image).reshape(-1, 3).mean(axis=0))
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample, fillcolor=fill)


def find_images(paths: list[str]) -> list[Path]:
    """Image files of the given files and folders, folders searched one level deep, in order of name.

    Raises:
        FileNotFoundError: a path that does not exist; ValueError: a folder without images.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_ENDINGS)
            if not inside:
                raise ValueError(f"{path}: no images in this folder; endings searched: {', '.join(IMAGE_ENDINGS)}")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise FileNotFoundError(f"{path}: no such image")
    return found
