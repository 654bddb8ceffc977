"""What `ordinalclip check-data` says: every picture decoded, copies and near copies found, ranks counted."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ordinalclip.config import RunConfig
from ordinalclip.data.duplicates import MOST_COMPARED, THUMBNAIL, Repeated, copies, near_duplicates, repeated, thumbnail
from ordinalclip.data.labels import sentinel
from ordinalclip.data.parts import PARTS, Part, Parts
from ordinalclip.images import BrokenImageError, Header, read_header
from ordinalclip.progress import Progress
from ordinalclip.ranks import Ranks

SHOWN = 5  # of each kind of trouble


Place = tuple[str, int]  # name of a part, and row in it


class Check(NamedTuple):
    """What was found.

    Attributes:
        lines: to print.
        problems: how many stand in the way of a training.
        headers: of the pictures of each part that can be read, by row.
        broken: what is wrong with the others, a line each.
        repeated: pictures that are in two parts or have two labels.
        near: pairs that are nearly the same; None: not looked for.
    """

    lines: list[str]
    problems: int
    headers: dict[str, dict[int, Header]]
    broken: list[str]
    repeated: list[Repeated]
    near: list[tuple[Place, Place]] | None


def check(parts: Parts, config: RunConfig, quiet: bool = False) -> Check:
    """Decode and compare all pictures of a run's data."""
    given = parts.named
    lines: list[str] = []
    problems = 0
    thumbnails, headers, all_broken = [], {}, []
    found: list[Repeated] = []
    near: list[tuple[Place, Place]] | None = None
    for name in dict.fromkeys([*PARTS, *given]):
        if name not in given:
            lines.append(f"{name}: none")
            continue
        broken, small, headers[name] = _decoded(given[name], quiet, f"checking {name}")
        all_broken += broken
        thumbnails.append(small)
        problems += len(broken)
        labels = f"labels {_range(given[name], parts.ranks)}"
        lines += [*broken, f"{name}: {len(given[name])} images, {labels}, {len(broken)} broken"]
    if config.data.source != "gauges":
        ids = copies(list(given.values()), read_all=True)
        found = repeated(list(given.values()), ids)
        problems += _say_copies(lines, found, config)
        if len(ids) <= MOST_COMPARED:
            places = [(name, index) for name, part in given.items() for index in range(len(part))]
            near = [(places[a], places[b]) for a, b in near_duplicates(np.concatenate(thumbnails), ids)]
            _say_near_copies(lines, given, near)
    _say_ranks(lines, parts)
    every = np.concatenate([part.values for part in given.values()])
    if (odd := sentinel(every)) is not None:
        lines.append(f"{int((every == odd).sum())} labels are {odd:g}, apart from the others: are they labels?")
    return Check(lines, problems, headers, all_broken, found, near)


def _range(part: Part, ranks: Ranks) -> str:
    """The lowest and the highest label; of words, not of the values that they stand for."""
    low, high = int(part.ranks.min()), int(part.ranks.max())
    if ranks.worded:
        return f"{ranks.name(low)} to {ranks.name(high)}"
    return f"{part.values.min():g} to {part.values.max():g} {ranks.unit}".rstrip()


def _decoded(part: Part, quiet: bool, title: str) -> tuple[list[str], np.ndarray, dict[int, Header]]:
    """What is broken, a line each, the thumbnails of all pictures, zeros for broken ones, and the others' headers."""
    broken, small = [], np.zeros((len(part), THUMBNAIL**2), dtype=np.float32)
    headers = {}
    for index in Progress(range(len(part)), title, unit="images", quiet=quiet):
        try:
            small[index] = thumbnail(part.image(index))
            headers[index] = read_header(part.picture(index), part.formats)
        except BrokenImageError as error:
            broken.append(str(error))
    return broken, small, headers


def _say_copies(lines: list[str], found: list[Repeated], config: RunConfig) -> int:
    for each in found[:SHOWN]:
        what = "with two labels" if each.labels_differ else "in two parts"
        lines.append(f"the same picture {what}: {each}")
    if not found:
        return 0
    hint = {
        "refuse": ": an error in training; data.duplicates=together or allow",
        "together": "",
        "allow": " (allowed)",
    }
    lines.append(f"{len(found)} pictures are in two parts or have two labels{hint[config.data.duplicates]}")
    return len(found) if config.data.duplicates == "refuse" else 0


def _say_near_copies(lines: list[str], parts: dict[str, Part], pairs: list[tuple[Place, Place]]) -> None:
    across = [pair for pair in pairs if pair[0][0] != pair[1][0]]
    for pair in across[:SHOWN]:
        first, second = (f"{parts[name].place(row)} (label {parts[name].values[row]:g})" for name, row in pair)
        lines.append(f"nearly the same picture in two parts: {first} = {second}")
    if pairs:
        lines.append(
            f"{len(pairs)} pairs of pictures are nearly the same by their pixels, {len(across)} of them in two parts"
        )


def _say_ranks(lines: list[str], parts: Parts) -> None:
    ranks, counts = parts.ranks, np.bincount(parts.train.ranks, minlength=len(parts.ranks))
    first, last = (f"{ranks.name(r)} = {ranks.values[r]:g}" if ranks.worded else ranks.name(r) for r in (0, -1))
    lines.append(f"ranks: {len(ranks)}, {first} to {last}")
    if len(ranks) <= 20:
        lines.append("training images: " + ", ".join(f"{ranks.name(r)} ({n})" for r, n in enumerate(counts.tolist())))
    elif empty := int((counts == 0).sum()):
        lines.append(f"{empty} ranks have no training image")
