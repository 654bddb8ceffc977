"""What a recipe is, and how it looks through a download."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from ordinalclip.config import DataConfig
from ordinalclip.data.parts import PARTS
from ordinalclip.data.splits import UNUSED
from ordinalclip.data.tables import plain_number, read_table
from ordinalclip.images import IMAGE_ENDINGS

TRAIN, VALIDATION, TEST = PARTS
__all__ = [
    "TEST",
    "TRAIN",
    "UNUSED",
    "VALIDATION",
    "Copies",
    "Download",
    "LayoutError",
    "Protocol",
    "Published",
    "Reading",
    "Recipe",
    "Row",
    "number",
    "once",
    "plain_number",
    "stem",
]
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".7z", ".rar")
SHOWN = 6  # names in a message
LONGEST_CELL = 1 << 20  # characters


@dataclass
class Row:
    """A picture.

    Attributes:
        path: from the download folder, with slashes.
        label: in the label's unit.
        subject: whose picture it is; "": not known.
        more: cells of further columns.
        parts: by split column TRAIN, VALIDATION or TEST; a column that is missing means UNUSED.
    """

    path: str
    label: float
    subject: str = ""
    more: dict[str, str] = field(default_factory=dict)
    parts: dict[str, str] = field(default_factory=dict)


@dataclass
class Copies:
    """The pictures that are there more than once, byte by byte.

    Attributes:
        groups: paths of each, two or more.
        of: number of its group, by path.
    """

    groups: list[list[str]]
    of: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self.of = {path: number for number, group in enumerate(self.groups) for path in group}


class Protocol(NamedTuple):
    """A way to divide the pictures, written as NAME.yaml.

    Attributes:
        name: of the file.
        what: in some words.
        columns: split columns, one after the other the splits of a comparison; none: divided at random by seed.
        divide: (rows, columns, copies) fills in columns that are drawn here, with copies and people in one part; None:
            others report on these parts, which are in the rows and stay as they are.
        ranks: section of the configuration, where it is not the recipe's.
        options: keys of `data` beside the columns.
    """

    name: str
    what: str
    columns: tuple[str, ...] = ()
    divide: Callable[[Sequence[Row], Sequence[str], Copies], None] | None = None
    ranks: Mapping[str, Any] | None = None
    options: Mapping[str, Any] = {}

    @property
    def published(self) -> bool:
        return bool(self.columns) and self.divide is None


class Reading(NamedTuple):
    """What a recipe makes of a download.

    Attributes:
        rows: the pictures.
        protocols: the first is what runs without further thought.
        left_out: how many rows of the owners' tables are no rows here, by reason in words.
        said: sentences about what was found and what not.
    """

    rows: list[Row]
    protocols: list[Protocol]
    left_out: Mapping[str, int] = {}
    said: tuple[str, ...] = ()


Published = tuple[int | None, int | None, int | None]


@dataclass(frozen=True)
class Recipe:
    """How one data set is prepared.

    Attributes:
        name: on the command line, and of the comparison that is customary on it.
        title: what it is, in some words.
        homepage: where its owners distribute it.
        licence: of the pictures, in words.
        citation: how its owners want to be cited.
        expects: what is looked for in the download, a line each.
        unit: of the labels.
        ranks: section of the configuration.
        read: (download) -> Reading.
        pictures: how many there should be; None: no published count is known.
        parts: how many pictures train, validation and test should have, by split column. None: not published; without a
            validation part, train is what training and our validation part, which is taken from it, have together.
        counted_by: where these numbers are from.
        caveats: what whoever reports on it should know, a sentence each.
    """

    name: str
    title: str
    homepage: str
    licence: str
    citation: str
    expects: tuple[str, ...]
    unit: str
    ranks: Mapping[str, Any]
    read: Callable[[Download], Reading]
    pictures: int | None = None
    parts: Mapping[str, Published] = field(default_factory=dict)
    counted_by: str = ""
    caveats: tuple[str, ...] = ()


class LayoutError(ValueError):
    """A download of another layout: what was looked for, and what is there."""


class Download:
    """The files of a download, found by their names wherever they are below the folder that was given.

    Args:
        folder: of the unpacked download.
        name: of the recipe, for messages.

    Raises:
        LayoutError: an archive, another file or an empty folder; FileNotFoundError: nothing of this name.
    """

    def __init__(self, folder: Path, name: str):
        self.root, self.name = folder, name
        if not folder.exists():
            raise FileNotFoundError(f"{folder}: no such folder (--from)")
        if not folder.is_dir():
            what = "an archive: unpack it and give the folder" if _is_archive(folder.name) else "a file, not a folder"
            raise LayoutError(f"{folder} is {what} (--from)")
        self.files = sorted(_walk(folder))
        self.pictures = [name for name in self.files if name.lower().endswith(IMAGE_ENDINGS)]
        if not self.files:
            raise self.lacks("files")

    def lacks(self, what: str) -> LayoutError:
        """The error of a download in which something is not there, with what is, and what may not be unpacked."""
        here = sorted(os.listdir(self.root))
        shown = [f"{each}/" if (self.root / each).is_dir() else each for each in here if not each.startswith(".")]
        found = ", ".join(shown[:SHOWN]) + (f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else "")
        packed = [name for name in self.files if _is_archive(name)]
        hint = f"; {packed[0]} is not unpacked" if packed else ""
        return LayoutError(
            f"{self.root}: looked for {what}, found {found or 'nothing'}{hint} "
            f"(`ordinalclip prepare {self.name}` says what is expected)"
        )

    def find(self, *names: str) -> Path | None:
        """The file of one of these names, whatever its case; of several the one nearest to the root.

        Raises:
            LayoutError: two are as near.
        """
        wanted = {name.lower() for name in names}
        found = [name for name in self.files if name.rpartition("/")[2].lower() in wanted]
        if not found:
            return None
        nearest = min(name.count("/") for name in found)
        first, *others = [name for name in found if name.count("/") == nearest]
        if others:
            raise LayoutError(f"{self.root}: both {first} and {others[0]} are there; which is it? Give one alone")
        return self.root / first

    def file(self, *names: str) -> Path:
        """The file of one of these names.

        Raises:
            LayoutError: it is not there.
        """
        if (found := self.find(*names)) is None:
            raise self.lacks(" or ".join(names))
        return found

    def below(self, folder: str) -> list[str]:
        """Pictures below any folder of this name, whatever its case."""
        wanted = folder.lower()
        return [name for name in self.pictures if wanted in name.lower().split("/")[:-1]]

    def named(self, pictures: Iterable[str], name: Callable[[str], str]) -> dict[str, str]:
        """Paths of pictures by their names.

        Raises:
            LayoutError: two are called alike.
        """
        there: dict[str, str] = {}
        for path in pictures:
            if there.setdefault(name(path), path) != path:
                raise LayoutError(
                    f"{self.root}: both {there[name(path)]} and {path} are there; which is it? Give one alone"
                )
        return there

    def text(self, file: Path) -> str:
        """The content of a text file.

        Raises:
            ValueError: not UTF-8.
        """
        try:
            return file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise ValueError(f"{file}: not a text in UTF-8") from None

    def one_folder(self, pictures: Iterable[str], preferred: str = "") -> list[str]:
        """Of pictures those in one folder: the one that is called so, or the only one.

        Raises:
            LayoutError: several folders hold such pictures, and none or two are called so.
        """
        by_folder: dict[str, list[str]] = {}
        for name in pictures:
            by_folder.setdefault(name.rpartition("/")[0], []).append(name)
        named = [folder for folder in by_folder if folder.rpartition("/")[2].lower() == preferred.lower()]
        chosen = named or list(by_folder)
        if len(chosen) > 1:
            shown = ", ".join(f"{folder or '.'}/ ({len(by_folder[folder])})" for folder in chosen[:SHOWN])
            raise LayoutError(f"{self.root}: pictures are in {shown}; give one of these folders alone (--from)")
        return by_folder[chosen[0]] if chosen else []

    def table(self, file: Path, needs: Iterable[str], separator: str = ",") -> list[tuple[str, dict[str, str]]]:
        """Rows of a table with a header, each with its place for messages; names and cells without outer spaces.

        Args:
            needs: columns that it has, at least.
            separator: between cells; of Excel files it means nothing.

        Raises:
            LayoutError: a column is missing; ValueError: not a table in UTF-8, or a row that is longer than the header.
        """
        (_, header), *rows = list(_excel(file) if file.suffix.lower() == ".xlsx" else _records(file, separator)) or [
            (0, [])
        ]
        if missing := [name for name in needs if name not in header]:
            raise LayoutError(
                f"{file}: looked for a column {missing[0]!r}, found {', '.join(map(repr, header[:12])) or 'nothing'}"
            )
        found = []
        for line, cells in rows:
            if any(cells[len(header) :]):
                raise ValueError(f"{file}, line {line}: {len(cells)} cells, the header has {len(header)}")
            found.append((f"{file}, line {line}", dict(zip_longest(header, cells[: len(header)], fillvalue=""))))
        return found

    def all_there(self, listed: Mapping[str, str], there: Iterable[str]) -> None:
        """Every picture that a table lists is there.

        Args:
            listed: place in the table by name of a picture.
            there: names of pictures.

        Raises:
            LayoutError: with the first that is not, and how many.
        """
        if missing := sorted(listed.keys() - set(there)):
            raise LayoutError(
                f"{listed[missing[0]]}: {missing[0]} is not below {self.root}, as {len(missing):,} of the "
                f"{len(listed):,} pictures listed there are not; is everything unpacked?"
            )


def number(text: str, place: str, what: str) -> float:
    """A label.

    Raises:
        ValueError: no number, with its place.
    """
    if (found := plain_number(text)) is None:
        raise ValueError(f"{place}: {what} {text!r} is no number")
    return found


def once(rows: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Places by name, of rows (place, name).

    Raises:
        ValueError: a name stands in two rows.
    """
    places: dict[str, str] = {}
    for place, name in rows:
        if name in places:
            raise ValueError(f"{place}: {name} stands in the table twice, first in {places[name]}")
        places[name] = place
    return places


def stem(path: str) -> str:
    """The name of a file without folders and its last ending."""
    return path.rpartition("/")[2].rpartition(".")[0]


def _walk(folder: Path) -> Iterator[str]:
    """Files below a folder, from it, with slashes; without hidden ones and what macOS adds to archives.

    Links to folders are followed, unless they lead to where they come from.
    """
    for place, folders, names in os.walk(folder, followlinks=True):
        above = {os.path.realpath(place), *map(str, Path(os.path.realpath(place)).parents)}
        folders[:] = [
            name
            for name in folders
            if not name.startswith((".", "__MACOSX")) and os.path.realpath(os.path.join(place, name)) not in above
        ]
        inner = Path(place).relative_to(folder)
        yield from ((inner / name).as_posix() for name in names if not name.startswith("."))


def _records(file: Path, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Line and cells of every row of a text table, blank lines left out."""
    csv.field_size_limit(LONGEST_CELL)
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            reader = csv.reader(opened, delimiter=separator, strict=True)
            for cells in reader:
                if any(cells):
                    yield reader.line_num, [cell.strip() for cell in cells]
    except UnicodeDecodeError:
        raise ValueError(f"{file}: not a text in UTF-8") from None
    except csv.Error as error:
        raise ValueError(f"{file}: not a table of cells between {separator!r} ({error})") from None


def _excel(file: Path) -> Iterator[tuple[int, list[str]]]:
    """The same of the only sheet of an Excel file that holds something."""
    table = read_table(file, DataConfig(source="table", table=file.name))
    yield 1, table.rows.column_names
    for row, cells in enumerate(table.rows):
        line = int(table.lines[row]) if table.lines is not None else row + 2
        yield line, [str("" if cell is None else cell).strip() for cell in cells.values()]


def _is_archive(name: str) -> bool:
    return name.lower().endswith(ARCHIVES)
