"""Images in, pixel tensors out: one decoding, resizing and normalising for training and serving."""

from __future__ import annotations

import base64
import io
import math
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps, UnidentifiedImageError
from torch import Tensor

INTERPOLATION = {kind.name.lower(): kind for kind in Image.Resampling}
RESIZE = ("shortest", "squash")
LARGEST_INPUT = 4096  # pixels on a side
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF")
# Of files in FORMATS, and of other pictures, which are found in folders too: refused by name, not passed over.
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".avif")
# fmt: off
FOREIGN_ENDINGS = (
    ".heic", ".heif", ".jp2", ".j2k", ".jxl", ".jxr", ".svg", ".eps", ".ps", ".psd", ".ico", ".ppm",
    ".pgm", ".pbm", ".pnm", ".dib", ".tga", ".exr", ".hdr", ".qoi", ".dcm", ".dng", ".cr2", ".cr3",
    ".nef", ".arw", ".orf", ".rw2", ".raw",
)
# fmt: on
BITS, PHOTOMETRIC = 258, 262  # tags of TIFF: bits per sample; 0 where white is 0
MAX_PIXELS = 178_956_970
MAX_RATIO = 200
SHORTEST_BASE64 = 40  # characters: no picture is smaller than 30 bytes
LONGEST_NAME = 80  # characters of a text that is shown in an error
ALLOWED = "a path, bytes, base64, a PIL image, an array and a tensor"


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
    """An image that cannot be read.

    Args:
        name: of the image.
        reason: why, in words.
    """

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def read_formats(extra: Sequence[str] = ()) -> tuple[str, ...]:
    """`FORMATS` and more of Pillow's.

    Raises:
        ValueError: a name that Pillow does not know.
    """
    Image.init()
    if unknown := [name for name in extra if name not in Image.OPEN]:
        raise ValueError(f"format {unknown[0]!r} is unknown to Pillow; it reads {', '.join(sorted(Image.OPEN))}")
    return tuple(dict.fromkeys([*FORMATS, *extra]))


def load_image(source: Any, name: str = "image", formats: Sequence[str] = FORMATS) -> Image.Image:
    """Decode anything that holds a picture to RGB.

    Files are recognised by their content, whatever they are called, and only `formats` are tried: other decoders of
    Pillow start programs (EPS: Ghostscript) or are little tested. Of several frames the first is taken. What a picture
    would need in memory is known from its header, and refused before it is decoded:

    * more than `MAX_PIXELS` pixels (what Pillow refuses by itself): half a gigabyte as RGB, for every worker;
    * a side more than `MAX_RATIO` times the other: scaled until its shorter side fits an encoder of 224 pixels, such a
      picture has 10 million pixels, of which 99.5 % are cut off again; at 20,000,000 x 1 it would have 10^12.

    Args:
        source: a path of a regular file or a link to one; encoded bytes; these in base64, as a "data:" URL or, where
            no file has that name, bare; a PIL image; an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), or a tensor
            (H, W), (1, H, W), (3, H, W) or (4, H, W), of uint8, uint16 or floats in [0, 1]; a `datasets` image dict
            with "bytes" / "path".
        name: what to call it in an error when it is no path.
        formats: names of Pillow's formats, e.g. `read_formats(["JPEG2000"])`; "JPEG" covers the MPO of cameras.

    Raises:
        BrokenImageError: a missing, truncated or foreign file, a folder, pipe or device, a picture beyond the limits,
            an array or a tensor of another shape, type or range.
    """
    if isinstance(source, dict) and {"bytes", "path"} & source.keys():
        name = source.get("path") or name
        source = source["bytes"] if source.get("bytes") is not None else source["path"]
    if isinstance(source, str | os.PathLike):
        name = _said(str(source))
    try:
        plain = _plain(source)
        if isinstance(plain, Image.Image):
            _check_size(*plain.size)
            return to_rgb(plain)
        with Image.open(_stream(plain), formats=tuple(formats)) as image:
            _check_size(*image.size)
            image.load()
            return to_rgb(image)
    except UnidentifiedImageError:
        bare = isinstance(source, str) and isinstance(plain, bytes) and not source.startswith("data:")
        missing = "no such file, and if it is base64 " if bare else ""
        reason = f"{missing}cut off, or in none of the formats {', '.join(formats)}"
    except Exception as error:  # decoders of damaged files raise whatever they like; all of it is reported by name
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    raise BrokenImageError(name, f"not a readable image ({reason})")


class Header(NamedTuple):
    """What a picture's file says of it before it is decoded: size in pixels as stored, and Pillow's mode and format."""

    width: int
    height: int
    mode: str
    format: str


def read_header(source: Any, formats: Sequence[str] = FORMATS) -> Header:
    """The header of what `load_image` has read before; of arrays and PIL images "" for the format."""
    if isinstance(source, Mapping):
        source = source["bytes"] if source.get("bytes") is not None else source["path"]
    source = _plain(source)
    if isinstance(source, Image.Image):
        return Header(*source.size, source.mode, source.format or "")
    with Image.open(_stream(source), formats=tuple(formats)) as image:
        return Header(*image.size, image.mode, image.format or "")


def _said(text: str) -> str:
    """A path, or the beginning of what is as long as a picture in base64."""
    return text if len(text) <= LONGEST_NAME or os.path.lexists(text) else f"{text[:40]}... ({len(text)} characters)"


def _plain(source: Any) -> Any:
    """Arrays and tensors as PIL images, base64 as bytes; any other source as it is."""
    if isinstance(source, str):
        return _from_base64(source)
    if isinstance(source, Tensor):
        return _tensor_to_pil(source)
    return _array_to_pil(source) if isinstance(source, np.ndarray) else source


def _from_base64(text: str) -> str | bytes:
    """The bytes of a "data:" URL, or of a text that is base64 and no file's name; any other text as it is.

    Raises:
        ValueError: a "data:" URL that is not base64.
    """
    if os.path.lexists(text):
        return text
    if text.startswith("data:"):
        about, _, content = text.partition(",")
        if not about.lower().endswith(";base64"):
            raise ValueError("a data: URL; allowed is data:image/KIND;base64,CONTENT")
        try:
            return _decoded(content)
        except ValueError as error:
            raise ValueError(f"a data: URL whose base64 is damaged: {error}") from error
    try:
        return _decoded(text) if len(text) >= SHORTEST_BASE64 else text
    except ValueError:
        return text


def _decoded(text: str) -> bytes:
    return base64.b64decode("".join(text.split()), validate=True)


def _stream(source: Any) -> Any:
    """What `Image.open` may be given: a regular file that is not empty, or bytes."""
    content: Any
    if isinstance(source, bytes):
        content, size = io.BytesIO(source), len(source)
    elif isinstance(source, str | os.PathLike):
        about = os.stat(source)
        if not stat.S_ISREG(about.st_mode):
            kind = "a folder" if stat.S_ISDIR(about.st_mode) else "a pipe, socket or device"
            raise ValueError(f"{kind}, not a file")
        content, size = source, about.st_size
    elif isinstance(source, Mapping):
        raise ValueError(f"a row with {', '.join(map(str, source))} given; give the picture in it")
    else:
        raise ValueError(f"{type(source).__name__} given; allowed are {ALLOWED}")
    if not size:
        raise ValueError("empty, 0 bytes")
    return content


def _check_size(width: int, height: int) -> None:
    if not width * height:
        raise ValueError(f"{width} x {height}: no pixels")
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels; allowed are {MAX_PIXELS} pixels in all")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ValueError(f"{width} x {height} pixels; one side may be {MAX_RATIO} times as long as the other")


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB from any mode: EXIF rotation applied, 16 bits scaled to 8, transparent pixels laid on white."""
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    bits, negative = tags.get(BITS, (16,))[0], tags.get(PHOTOMETRIC) == 0  # which Pillow heeds in 8 bits alone
    image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # "I;16" and its relatives, or "I" holding 16-bit values
        pixels = np.asarray(image).astype(np.float64)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError(f"whole-number pixels of {pixels.min():.0f} to {pixels.max():.0f}; allowed are 0 to 65535")
        if 8 < bits < 16 and pixels.max() < 1 << bits:
            pixels = pixels * (65535 / ((1 << bits) - 1))
        pixels = pixels / 257 if pixels.max() > 255 or image.mode != "I" else pixels
        pixels = 255 - pixels if negative else pixels
        return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        pixels = np.asarray(image)
        if not (pixels.min() >= 0 and pixels.max() <= 1):  # so written, NaN fails, too
            raise ValueError("float pixels must lie in [0, 1]")
        pixels = 1 - pixels if negative else pixels
        return Image.fromarray((pixels * 255).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(canvas, image).convert("RGB")
    return image.convert("RGB")


def _tensor_to_pil(tensor: Tensor) -> Image.Image:
    """Channels first, as torchvision has them: arrays have them last, so a tensor's shape is never guessed at."""
    if tensor.ndim not in (2, 3) or (tensor.ndim == 3 and tensor.shape[0] not in (1, 3, 4)):
        raise ValueError(
            f"a tensor of shape {tuple(tensor.shape)}; allowed are (H, W), (1, H, W), (3, H, W) and (4, H, W); of a "
            "batch give a list of its pictures"
        )
    if tensor.is_floating_point():
        tensor = tensor.float()  # NumPy knows no bfloat16
    array = tensor.detach().cpu().numpy()
    return _array_to_pil(array if array.ndim == 2 else np.moveaxis(array, 0, -1), "a tensor")


def _array_to_pil(array: np.ndarray, kind: str = "an array") -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ValueError(f"an array of shape {array.shape}; allowed are (H, W), (H, W, 1), (H, W, 3) and (H, W, 4)")
    _check_size(array.shape[1], array.shape[0])
    if array.dtype == np.uint16:
        array = (array / 257).round().astype(np.uint8)
    elif np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= 0 and array.max() <= 1):  # so written, NaN fails, too
            raise ValueError(f"{kind} of floats must lie in [0, 1]")
        array = (array * 255).round().astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ValueError(f"{kind} of {array.dtype}; allowed are uint8, uint16 and floats in [0, 1]")
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
    mean, std = _statistics(spec)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    return pixels.div_(255).sub_(mean).div_(std)


@lru_cache(maxsize=16)
def _statistics(spec: PixelSpec) -> tuple[Tensor, Tensor]:
    return torch.tensor(spec.mean)[:, None, None], torch.tensor(spec.std)[:, None, None]


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


def find_images(paths: Sequence[str]) -> list[Path]:
    """Picture files of the given files and folders: folders with all that is below them, in order of name.

    Files in folders are known by their endings, `IMAGE_ENDINGS` and `FOREIGN_ENDINGS`; no other is looked at.

    Raises:
        FileNotFoundError: a path that does not exist; ValueError: a folder without images; OSError: one that may not be
            read.
    """
    found: list[Path] = []
    if "" in paths:
        raise ValueError("a path without a name was given: is a variable of the shell empty?")
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(_files_below(path))
            if not inside:
                raise ValueError(f"{path}: no images in this folder; endings searched: {', '.join(IMAGE_ENDINGS)}")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise FileNotFoundError(f"{path}: no such image")
    return found


def _files_below(folder: Path) -> Iterator[Path]:
    """Those that look like pictures; links to folders are followed, each folder is entered once."""

    def fail(error: OSError) -> None:  # or os.walk would pass it over
        raise error

    entered: set[str] = set()
    for inside, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        place = os.path.realpath(inside)
        if place in entered:
            folders.clear()
            continue
        entered.add(place)
        folders.sort()
        yield from (Path(inside, file) for file in files if file.lower().endswith(IMAGE_ENDINGS + FOREIGN_ENDINGS))
