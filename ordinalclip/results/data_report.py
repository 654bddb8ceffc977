"""The page of a data set: what there is of each rank, what the pictures are, which are there twice.

ordinalclip check-data CONFIG --report data.html
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np

from ordinalclip.config import RunConfig
from ordinalclip.data import Part, Parts
from ordinalclip.data.checks import Check, Place
from ordinalclip.files import write_text
from ordinalclip.images import BrokenImageError
from ordinalclip.provenance import data_name
from ordinalclip.results import figures
from ordinalclip.results.pages import data_uri, inlined, templates, thumbnail
from ordinalclip.run_folder import FolderOccupied, local

SIDE = 96  # of thumbnails, in pixels
ACROSS = 8  # of a rank
MOST_RANKS = 60  # with pictures
MOST_LISTED = 40  # pairs, copies and broken pictures
MOST_KINDS = 12  # of sizes, modes and formats
FEWEST_GROUPS, MOST_GROUPS = 10, 0.5  # distinct values of a column that may name groups: at least; at most, of the rows


class Group(NamedTuple):
    """A column whose equal rows may belong together.

    Attributes:
        values: how many different ones.
        across: how many of them are in two parts or more.
        kept: whether `data.group` keeps them together.
    """

    column: str
    values: int
    across: int
    kept: bool


def check_place(path: str | Path, overwrite: bool) -> None:
    """Before all pictures are read: the page can be written.

    Raises:
        ValueError: no name of a page; FolderOccupied: a file is there that is not to be replaced; FileNotFoundError: no
            folder to write it to.
    """
    page = Path(path)
    if page.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--report {page}: a page ends in .html")
    if not page.parent.is_dir():
        raise FileNotFoundError(f"--report {page}: there is no folder {page.parent}")
    if page.is_dir():
        raise IsADirectoryError(f"--report {page}: a folder")
    if page.exists() and not overwrite:
        raise FolderOccupied(f"--report {page}: is there already; --overwrite replaces it")


def write_data_report(parts: Parts, config: RunConfig, found: Check, path: str | Path) -> Path:
    """Write the page of what `check-data` has found."""
    given = parts.named
    ranks = parts.ranks
    counts = {name: np.bincount(part.ranks, minlength=len(ranks)).tolist() for name, part in given.items()}
    total = np.sum(list(counts.values()), axis=0)
    headers = [header for of_part in found.headers.values() for header in of_part.values()]
    pairs = sorted(found.near or (), key=lambda pair: (pair[0][0] == pair[1][0], not _differ(given, pair)))
    figure = figures.label_counts(counts, ranks), "Labels by value, the parts on top of each other."
    content = (
        templates()
        .get_template("data.html")
        .render(
            data=local(data_name(config.data)),
            ranks=ranks,
            counts=counts,
            sizes={name: len(part) for name, part in given.items()},
            empty=[ranks.name(rank) for rank in np.flatnonzero(np.asarray(counts["train"]) == 0).tolist()],
            broken=found.broken,
            repeated=found.repeated,
            near=found.near,
            across=sum(pair[0][0] != pair[1][0] for pair in found.near or ()),
            kinds={
                "size in pixels": _most(f"{each.width} × {each.height}" for each in headers),
                "mode": _most(each.mode for each in headers),
                "format": _most(each.format or "in memory" for each in headers),
            },
            sides=_sides([(each.width, each.height) for each in headers]),
            montage=_montage(given, found, total, config.seed, ranks.name),
            num_filled=int((total > 0).sum()),
            pairs=[[_seen(given, place, ranks.say) for place in pair] for pair in pairs[:MOST_LISTED]],
            groups=_groups(given, config),
            figures=inlined({"label_counts": figure}),
            listed=MOST_LISTED,
        )
    )
    write_text(Path(path), content)
    return Path(path)


def _differ(parts: Mapping[str, Part], pair: tuple[Place, Place]) -> bool:
    first, second = (parts[name].values[row] for name, row in pair)
    return bool(first != second)


def _most(kinds: Any) -> tuple[list[tuple[str, int]], int]:
    """The commonest kinds with their numbers, and how many kinds are left out."""
    counted = Counter(kinds)
    return counted.most_common(MOST_KINDS), max(0, len(counted) - MOST_KINDS)


def _sides(sizes: Sequence[tuple[int, int]]) -> str:
    """The smallest and the largest picture, in words."""
    if not sizes:
        return ""
    small, large = min(sizes, key=min), max(sizes, key=max)
    return f"The shortest side is {min(small)} pixels, the longest {max(large)}."


def _montage(
    parts: Mapping[str, Part], found: Check, total: np.ndarray, seed: int, name_of: Any
) -> list[dict[str, Any]]:
    """Pictures of every rank that has some, drawn at random; of very many ranks, those evenly spaced."""
    filled = np.flatnonzero(total)
    if len(filled) > MOST_RANKS:
        filled = filled[np.linspace(0, len(filled) - 1, MOST_RANKS).round().astype(int)]
    rng = np.random.default_rng([seed, 4])
    rows = []
    for rank in filled.tolist():
        places = [(name, int(row)) for name, part in parts.items() for row in np.flatnonzero(part.ranks == rank)]
        sound = [place for place in places if place[1] in found.headers[place[0]]]
        chosen = [sound[number] for number in sorted(rng.permutation(len(sound))[:ACROSS].tolist())]
        shown = [_seen(parts, place, str) for place in chosen]
        rows.append({"name": name_of(rank), "number": int(total[rank]), "pictures": shown})
    return rows


def _seen(parts: Mapping[str, Part], place: Place, say: Any) -> dict[str, Any]:
    """What the page shows of a picture."""
    name, row = place
    part = parts[name]
    try:
        image = data_uri(thumbnail(part.image(row), SIDE))
    except BrokenImageError:  # which has just been read
        image = ""
    label = say(part.values[row])
    return {"image": image, "name": part.names[row], "label": label, "part": name, "row": int(part.names.rows[row]) + 1}


def _groups(parts: Mapping[str, Part], config: RunConfig) -> list[Group]:
    """Columns of names or whole numbers that repeat, as those of people and patients do."""
    found = []
    rows = sum(map(len, parts.values()))
    columns = [column for part in parts.values() for column in part.rows.column_names]
    for column in dict.fromkeys(columns):
        kept = column == config.data.group
        if column in (config.data.image_column, config.data.label_column, config.data.split_column):
            continue
        if not all(_names_things(part, column) for part in parts.values()):
            continue
        owners: dict[str, set[str]] = {}
        for name, part in parts.items():
            for cell in part.rows[column]:
                owners.setdefault(str(cell).strip(), set()).add(name)
        if kept or FEWEST_GROUPS <= len(owners) <= MOST_GROUPS * rows:
            found.append(Group(column, len(owners), sum(len(names) > 1 for names in owners.values()), kept))
    return found


def _names_things(part: Part, column: str) -> bool:
    feature = part.rows.features.get(column)
    return isinstance(feature, datasets.Value) and not feature.dtype.startswith(("float", "double", "bool"))
