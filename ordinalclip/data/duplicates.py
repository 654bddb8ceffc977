"""The same picture more than once: in two parts it tells the test part, with two labels it teaches nothing."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from PIL import Image

from ordinalclip.data.parts import Part

MOST_HASHED = 20_000  # pictures whose bytes are compared without being asked
MOST_COMPARED = 20_000  # pictures among which near-duplicates are looked for
THUMBNAIL = 32  # side of what near-duplicates are compared by
# Root mean squared difference of two thumbnails, in grey levels of 255. Resized and recompressed copies of solar cells
# and faces differ by 0.3 to 1.7, the nearest others by 3.2 and 25.
NEAR = 1.75
# Two pictures are similar whose features differ by at most this share of what each differs from its tenth neighbour.
# No bound on the cosine itself serves two data sets: 0.95 finds a third of mirrored faces, and lists 2,394 pairs of
# 2,624 solar cells (docs/audit.md has what each bound finds).
SIMILAR, NEIGHBOUR = 0.3, 10
ALIKE = 0.6  # correlation of their thumbnails, either way round: an encoder of gauges finds all of one reading similar
MOST_SIMILAR = 1000  # pairs


def copies(parts: Sequence[Part], read_all: bool = False) -> np.ndarray:
    """(N,) ids of the pictures in all rows of some parts, one after the other: the same id, the same picture.

    By path always; by bytes where there are at most 20,000 rows, or when told so. Files are read where their sizes are
    equal.
    """
    ids: dict[object, int] = {}
    keys: list[object] = []
    few = read_all or sum(map(len, parts)) <= MOST_HASHED
    if not few and all(part.names.paths is None for part in parts):
        return np.arange(sum(map(len, parts)))
    for part in parts:
        if part.names.paths is None:
            keys += [(id(part), index) for index in range(len(part))]
        else:
            keys += [os.path.normpath(os.path.join(part.root, name)) for name in part.names[:]]
    if few:
        keys = _by_bytes(parts, keys)
    return np.asarray([ids.setdefault(key, len(ids)) for key in keys], dtype=np.int64)


def _by_bytes(parts: Sequence[Part], keys: list[object]) -> list[object]:
    """The keys, one and the same for equal bytes."""
    places = [(part, index) for part in parts for index in range(len(part))]
    sized: dict[object, list[int]] = defaultdict(list)
    for number, ((part, index), key) in enumerate(zip(places, keys, strict=True)):
        size = _size(part, index, key)
        if size is not None:
            sized[size].append(number)
    joined = list(keys)
    for numbers in sized.values():
        if len({keys[number] for number in numbers}) > 1:
            for number in numbers:
                part, index = places[number]
                joined[number] = part.digest(index)
    return joined


def _size(part: Part, index: int, key: object) -> int | None:
    if isinstance(key, str):
        return os.stat(key).st_size if os.path.isfile(key) else None
    content = part.content(index)
    return None if content is None else len(content)


class Repeated(NamedTuple):
    """A picture that is there more than once: (part, row) of each place, whether labels and parts differ."""

    places: list[tuple[Part, int]]
    labels_differ: bool
    parts_differ: bool

    def __str__(self) -> str:
        shown, source = [], ""
        for part, index in self.places[:3]:
            place = part.names.place(index) if part.source == source else part.place(index)
            shown.append(f"{place} (label {part.values[index]:g})")
            source = part.source
        return " = ".join(shown) + (" = ..." if len(self.places) > 3 else "")


def repeated(parts: Sequence[Part], ids: np.ndarray) -> list[Repeated]:
    """The pictures that are in two parts, or there with two labels.

    Args:
        ids: what `copies` gives for these parts.
    """
    if len(np.unique(ids)) == len(ids):
        return []
    places = [(part, index) for part in parts for index in range(len(part))]
    order = np.argsort(ids, kind="stable")
    runs = np.split(order, np.flatnonzero(np.diff(ids[order])) + 1) if len(order) else []
    found = []
    for run in (run for run in runs if len(run) > 1):
        members = [places[number] for number in run]
        labels = {float(part.values[index]) for part, index in members}
        owners = {id(part) for part, _ in members}
        if len(labels) > 1 or len(owners) > 1:
            found.append(Repeated(members, len(labels) > 1, len(owners) > 1))
    return found


class RepeatedPictures(ValueError):
    """The same picture in two parts or with two labels.

    Attributes:
        number: of such pictures.
        labels_differ: whether one of them has two labels.
    """

    def __init__(self, found: Sequence[Repeated], cure: str):
        first = next((each for each in found if each.labels_differ), found[0])
        self.number, self.labels_differ = len(found), first.labels_differ
        super().__init__(
            f"the same picture {'with two labels' if first.labels_differ else 'in two parts'}: {first}; {len(found)} "
            f"pictures are. Take copies out{cure}, or let them be with data.duplicates=allow"
        )


def refuse_repeated(parts: Sequence[Part], ids: np.ndarray, cure: str) -> None:
    """Raises:
    RepeatedPictures: with the first of them by name."""
    if found := repeated(parts, ids):
        raise RepeatedPictures(found, cure)


def thumbnail(image: Image.Image) -> np.ndarray:
    """What near-duplicates are compared by: (1024,) float32 grey levels of a small copy, without their mean."""
    grey = np.asarray(image.convert("L").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC), dtype=np.float32)
    return (grey - grey.mean()).ravel()


def near_duplicates(thumbnails: np.ndarray, ids: np.ndarray, chunk: int = 512) -> list[tuple[int, int]]:
    """Pairs of rows, of different ids, whose thumbnails differ by at most `NEAR` grey levels; flat pictures left out.

    Args:
        thumbnails: (N, 1024).
        ids: (N,) what `copies` gives.
    """
    told = np.flatnonzero(thumbnails.std(axis=1) > 4 * NEAR)
    points = thumbnails[told]
    squares = (points**2).sum(axis=1)
    limit = NEAR**2 * THUMBNAIL**2
    pairs = []
    for begin in range(0, len(points), chunk):
        end = begin + chunk
        squared = squares[begin:end, None] + squares[None, begin:] - 2 * points[begin:end] @ points[begin:].T
        for row, column in zip(*np.nonzero(squared <= limit), strict=True):
            first, second = told[begin + row], told[begin + column]
            if row < column and ids[first] != ids[second]:
                pairs.append((int(first), int(second)))
    return pairs


class Similar(NamedTuple):
    """A pair of near-duplicates: their rows, and the cosine of their features."""

    first: int
    second: int
    cosine: float


def similar(features: np.ndarray, ids: np.ndarray, thumbnails: np.ndarray, chunk: int = 512) -> list[Similar]:
    """Near-duplicates by the features of an encoder or by `near_duplicates`, the most similar pairs first.

    Features tell mirrors, crops and the same object twice: 1 - cosine is at most `SIMILAR` times that of either picture
    and its `NEIGHBOUR`-th nearest, and the thumbnails are `ALIKE`. Thumbnails alone tell copies that were compressed
    again, which can move the features of a large encoder far. Copies of equal bytes are pairs, too.

    Args:
        features: (N, D); their mean is taken off before cosines.
        ids: (N,) what `copies` gives.
        thumbnails: (N, 1024).

    Returns:
        at most `MOST_SIMILAR` pairs.
    """
    points = (features - features.mean(axis=0, dtype=np.float64)).astype(np.float32)
    points /= np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
    nearest: set[tuple[int, int]] = set()  # (row, one that is similar as seen from it)
    place = min(NEIGHBOUR, len(points) - 1)
    for begin in range(0, len(points) if place else 0, chunk):
        distances = 1 - points[begin : begin + chunk] @ points.T
        own = np.arange(len(distances))
        distances[own, begin + own] = np.inf
        limits = SIMILAR * np.partition(distances, place - 1, axis=1)[:, place - 1 : place]
        rows, columns = np.nonzero(distances <= limits)
        nearest.update(zip((rows + begin).tolist(), columns.tolist(), strict=True))
    small = thumbnails / np.maximum(np.linalg.norm(thumbnails, axis=1, keepdims=True), 1e-12)
    mirrored = small.reshape(-1, THUMBNAIL, THUMBNAIL)[:, :, ::-1].reshape(small.shape)
    found = {
        (a, b)
        for a, b in nearest
        if a < b and (b, a) in nearest and max(small[a] @ small[b], small[a] @ mirrored[b]) >= ALIKE
    }
    found |= set(near_duplicates(thumbnails, ids))
    order = np.argsort(ids, kind="stable").tolist()
    found |= {(a, b) for a, b in pairwise(order) if ids[a] == ids[b]}
    pairs = [Similar(a, b, min(1.0, float(points[a] @ points[b]))) for a, b in sorted(found)]
    return sorted(pairs, key=lambda pair: -pair.cosine)[:MOST_SIMILAR]
