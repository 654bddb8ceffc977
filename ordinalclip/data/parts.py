"""A part of the data: rows with images, labels and ranks."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from PIL import Image

from ordinalclip.images import FORMATS, PixelSpec, load_image, resize
from ordinalclip.ranks import Ranks

PARTS = ("train", "validation", "test")
ALIASES = {"val": "validation", "valid": "validation", "dev": "validation", "training": "train", "testing": "test"}


def part_called(name: str) -> str:
    """The part that a word stands for; a word that stands for none as it is.

    >>> part_called("Train"), part_called("val"), part_called("holdout")
    ('train', 'validation', 'holdout')
    """
    plain = name.strip().lower()
    return ALIASES.get(plain, plain if plain in PARTS else name.strip())


def leaves(path: str, root: str, real: Callable[[str], str] = os.path.realpath) -> bool:
    """Whether a file lies outside a folder, links followed.

    Args:
        root: a real path.
        real: gives the real path of a folder; one that remembers them saves look-ups.
    """
    folder, last = os.path.split(path)
    target = os.path.realpath(path) if os.path.islink(path) else os.path.join(real(folder), last)
    return os.path.commonpath([root, os.path.normpath(target)]) != root


class ImageCache:
    """Decoded images of a set in memory, if all of them are likely to fit; otherwise none, and memory stays flat.

    Args:
        budget: bytes, for each process that decodes.
        num_images: size of the set.
    """

    def __init__(self, budget: int, num_images: int):
        self.budget, self.free, self.num_images = budget, budget, num_images
        self.images: dict[Hashable, Image.Image] = {}

    def get(self, key: Hashable, decode: Callable[[], Image.Image]) -> Image.Image:
        """The cached image of a key, or the decoded one."""
        if key in self.images:
            return self.images[key]
        image = decode()
        cost = image.width * image.height * 3
        if cost <= self.free and cost * self.num_images <= self.budget:
            self.free -= cost
            self.images[key] = image
        return image


class RowNames(Sequence[str]):
    """What the rows of a part are called: their paths, read from the table when asked for, or "row N".

    Args:
        numbers: (N,) row of the original table, from 0.
        paths: the table's column of paths, or None.
        suffix: added to paths that do not end with it.
        lines: line of every row of the original table in its file, or None.
        places: row of every row of the original table in its file, from 0, where some were left out.
    """

    def __init__(
        self,
        numbers: np.ndarray,
        paths: pa.ChunkedArray | None = None,
        suffix: str = "",
        lines: np.ndarray | None = None,
        places: np.ndarray | None = None,
    ):
        self.numbers, self.paths, self.suffix, self.lines, self.places = numbers, paths, suffix, lines, places

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            numbers = self.numbers[index]
            if self.paths is None:
                return [self._row(n) for n in numbers.tolist()]
            return [self._path(str(path)) for path in self.paths.take(pa.array(numbers)).to_pylist()]
        number = int(self.numbers[index])
        return self._row(number) if self.paths is None else self._path(str(self.paths[number].as_py()))

    def _row(self, number: int) -> str:
        return f"row {(number if self.places is None else self.places[number]) + 1}"

    def _path(self, path: str) -> str:
        return path if path.endswith(self.suffix) else path + self.suffix

    @property
    def rows(self) -> np.ndarray:
        """(N,) row of each in its file, from 0."""
        return self.numbers if self.places is None else self.places[self.numbers]

    def place(self, index: int) -> str:
        """Row, line and path of a row, for errors."""
        number = int(self.numbers[index])
        line = "" if self.lines is None else f" (line {self.lines[number]})"
        return f"{self._row(number)}{line}" + ("" if self.paths is None else f", {self[index]}")

    def select(self, indices: np.ndarray) -> RowNames:
        """The names of the given rows."""
        return RowNames(self.numbers[indices], self.paths, self.suffix, self.lines, self.places)


@dataclass(frozen=True)
class Part:
    """One part of the data.

    Attributes:
        rows: a `datasets.Dataset` whose image column is not decoded.
        image_column: its name.
        values: (N,) float64 labels in the label's unit.
        names: what a row is called in errors and prediction files: its path, or "row N".
        ranks: (N,) int64 rank of each label.
        root: folder that relative paths start from.
        source: the table or data set, for errors.
        formats: of pictures that are read.
        cache: decoded and resized images.
    """

    rows: datasets.Dataset
    image_column: str
    values: np.ndarray
    names: RowNames
    ranks: np.ndarray
    root: str = ""
    source: str = ""
    formats: tuple[str, ...] = FORMATS
    cache: ImageCache = field(default_factory=lambda: ImageCache(0, 0), compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    def row_names(self) -> Iterator[str]:
        """What to call each row in an error that leaves the part."""
        return (self.place(index) for index in range(len(self)))

    def place(self, index: int) -> str:
        """Table, row, line and path of a row, for errors."""
        return f"{self.source}, {self.names.place(index)}"

    def image(self, index: int) -> Image.Image:
        """The decoded RGB image of a row.

        Raises:
            BrokenImageError: naming the row.
        """
        return load_image(self.picture(index), self.place(index), self.formats)

    def picture(self, index: int) -> Any:
        """What a row has for a picture: the path of its file, or what `load_image` takes."""
        if self.names.paths is not None:
            return os.path.join(self.root, self.names[index])
        return self.rows[int(index)][self.image_column]

    def content(self, index: int) -> bytes | None:
        """The bytes of a row's picture, as they are stored; None where it is no file or what was read of one."""
        picture = self.picture(index)
        if isinstance(picture, Mapping):
            picture = picture["bytes"] if picture.get("bytes") is not None else picture.get("path")
        if isinstance(picture, bytes):
            return picture
        if isinstance(picture, str) and os.path.isfile(picture):
            with open(picture, "rb") as file:
                return file.read()
        return None

    def digest(self, index: int) -> bytes:
        """32 bytes by which a row's picture is known: a hash of its bytes, or of its pixels where none are stored."""
        content = self.content(index)
        if content is None:
            image = self.image(index)
            content = f"{image.size}\n".encode() + image.tobytes()
        return hashlib.blake2b(content, digest_size=32).digest()

    def resized(self, index: int, spec: PixelSpec, size: int | None = None) -> Image.Image:
        """The decoded image, resized to `size` (default: the encoder's) and kept in the cache while there is room."""
        key = (index, size or spec.scaled_size, spec.resize, spec.interpolation)
        return self.cache.get(key, lambda: resize(self.image(index), spec, size))

    def select(self, indices: Sequence[int] | np.ndarray) -> Part:
        """The given rows, in the given order."""
        indices = np.asarray(indices, dtype=np.int64)
        return replace(
            self,
            rows=self.rows.select(indices),
            values=self.values[indices],
            names=self.names.select(indices),
            ranks=self.ranks[indices],
            cache=ImageCache(self.cache.budget, len(indices)),
        )


def joined(parts: Sequence[Part]) -> Part:
    """The rows of some parts as one, in order; of columns that only some of them have, the other cells are None."""
    with_paths = all(part.names.paths is not None for part in parts)
    lines = [part.names.lines[part.names.numbers] for part in parts if part.names.lines is not None]
    names = RowNames(
        np.arange(sum(map(len, parts))),
        pa.chunked_array([[name for part in parts for name in part.names[:]]], pa.string()) if with_paths else None,
        lines=np.concatenate(lines) if len(lines) == len(parts) else None,
        places=np.concatenate([part.names.rows for part in parts]),
    )
    return replace(
        parts[0],
        rows=datasets.concatenate_datasets([part.rows for part in parts]),
        values=np.concatenate([part.values for part in parts]),
        names=names,
        ranks=np.concatenate([part.ranks for part in parts]),
        source=" or ".join(dict.fromkeys(part.source for part in parts)),
        cache=ImageCache(parts[0].cache.budget, len(names)),
    )


@dataclass(frozen=True)
class Parts:
    """Training, validation and test part and their label space; validation and test may be absent.

    Attributes:
        calibration: pictures that were taken out of the validation part, to calibrate the model; None: there are none.
        calibration_groups: (N,) what of them belongs to the same group, if rows are grouped.
        in_memory: whether they were handed over in Python, so that no configuration finds them again.
    """

    train: Part
    validation: Part | None
    test: Part | None
    ranks: Ranks
    in_memory: bool = False
    calibration: Part | None = None
    calibration_groups: np.ndarray | None = None

    @property
    def named(self) -> dict[str, Part]:
        """The parts that there are, by name."""
        every = {
            "train": self.train,
            "validation": self.validation,
            "calibration": self.calibration,
            "test": self.test,
        }
        return {name: part for name, part in every.items() if part is not None}
