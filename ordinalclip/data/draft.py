"""A first configuration for a folder of pictures: what `ordinalclip init` writes, and why it says what it says."""

from __future__ import annotations

import math
import os
import re
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from ordinalclip.config import DataConfig, RanksConfig, parse_config, read_overrides
from ordinalclip.data.duplicates import RepeatedPictures
from ordinalclip.data.labels import MOST_WORDS, known_scale, label_columns, sentinel
from ordinalclip.data.loading import load_parts
from ordinalclip.data.parts import PARTS, part_called
from ordinalclip.data.sources import read_tables
from ordinalclip.data.splits import group_names
from ordinalclip.data.tables import TABLES, plain_number
from ordinalclip.images import IMAGE_ENDINGS
from ordinalclip.quoting import printable
from ordinalclip.ranks import MAX_VALUE
from ordinalclip.sections import brief
from ordinalclip.written import dump, read

LOOKED_AT = 50  # rows by which columns of paths are known
MOST_LISTED = 20  # labels that are ranks each, with their counts in a comment
FEWEST_RANKS, MOST_RANKS = 11, 101  # of a scale that is made
ENOUGH = 5  # pictures for each of its ranks


def _words(name: str) -> list[str]:
    """The words of a column's name, in small letters: of `PatientID` patient and id."""
    return [word.lower() for word in re.split(r"[\W_]+|(?<=[a-zà-ÿ])(?=[A-ZÀ-ß])", name) if word]


LABELS = _words(
    "label age grade score rating value level stage severity class target category decade year reading degree quality "
    "finding diagnosis state status result outcome condition annotation mos count bmi weight rank y "
    "alter note stufe grad wert befund niveau valeur"
)
GROUPS = _words("patient subject person participant proband identity individual animal donor family slide eye user")
NUMBERED = {*_words("id ids nr no num number code key uid hash pseudonym"), ""}  # what may stand beside such a word
CALIBRATING = 40  # pictures, or groups of them, from which a calibration is offered
NO_LABELS = {*GROUPS, *NUMBERED, *_words("index idx uuid file filename path name url date split fold part site")}
UNITS = {unit: unit for unit in (*_words("years months weeks days hours minutes kg g mg km m cm mm"), "°C", "%")}
UNITS |= {"percent": "%", "pct": "%", "percentage": "%", "celsius": "°C"}


class Draft(NamedTuple):
    """A configuration as text, and what has to be mended or said before it runs; "" if it runs as it is."""

    text: str
    problem: str


def draft(pictures: str, table: str = "", overrides: Sequence[str] = (), file: str = "mine.yaml") -> Draft:
    """Look at pictures and labels, and write the configuration of a first training.

    Args:
        pictures: folder with the pictures.
        table: file with the labels; default: the only table in the folder, else a folder for every label.
        overrides: "key=value" of data and ranks, taken as they are.
        file: what the configuration is going to be called.

    Raises:
        FileNotFoundError: no such folder or table; ValueError: nothing says the labels, no column names the pictures,
            another override, or what the reader of tables refuses.
    """
    said = read_overrides(overrides)
    if foreign := sorted(said.keys() - {"data", "ranks"}):
        raise ValueError(f"{foreign[0]}: init takes keys of data and ranks; change others in the file that it writes")
    folder = Path(pictures)
    if not folder.is_dir():
        raise FileNotFoundError(f"{pictures}: {'a file; name its folder' if folder.exists() else 'no such folder'}")
    found, why = _source(folder, table)
    content = {**said, "data": {**found, **said.get("data", {})}}
    given = parse_config(content, "the command line")
    survey = Survey(given.data, given.ranks, set(said.get("data", {})), why)
    template = _environment().get_template("config.yaml")
    text = template.render(file=printable(file), **survey.choices())
    try:
        return Draft(text, _problem(text, file))
    except RepeatedPictures as error:
        if error.labels_differ or survey.data.split_column or "all" not in survey.tables:
            return Draft(text, str(error))
        survey.keep_copies_together(error.number)
        text = template.render(file=printable(file), **survey.choices())
        return Draft(text, _problem(text, file))


def _source(folder: Path, table: str) -> tuple[dict[str, str], str]:
    """Keys of data by which labels are found, and why."""
    root = {"root": str(folder)}
    if table:
        path = Path(table) if Path(table).is_file() else folder / table
        if not path.is_file():
            raise FileNotFoundError(f"{table}: no such table, neither here nor in {folder}")
        return {
            "source": "table",
            "table": os.path.relpath(path, folder),
            **root,
        }, "Paths of pictures, and that of the table, start from root."
    tables = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in TABLES and path.is_file())
    if len(tables) > 1:
        raise ValueError(f"{folder}: holds {len(tables)} tables ({', '.join(tables[:5])}); name the one to take")
    if tables:
        return {"source": "table", "table": tables[0], **root}, f"The only table in the folder is {tables[0]}."
    if any(path.is_dir() for path in folder.iterdir()):
        return {"source": "folder", **root}, "A folder for every label, called by it."
    raise ValueError(
        f"{folder}: nothing says the labels; name a table, `ordinalclip init {folder} labels.csv`, or sort the "
        "pictures into a folder for every label"
    )


class Survey:
    """What is found out about the data, one thing after the other.

    Args:
        data, ranks: the source, and what the user has said.
        said: keys of data that the user has said.
        why: the source is what it is.
    """

    def __init__(self, data: DataConfig, ranks: RanksConfig, said: set[str], why: str):
        self.data, self.ranks, self.said = data, ranks, said
        self.why: dict[str, str] = dict.fromkeys([*DataConfig.model_fields, "ranks", "unit"], "")
        self.why["source"] = why
        if data.source == "table":
            self._find_pictures()
        self.tables = read_tables(self.data, 0)
        if data.source == "table":
            self._find_label()
            self._find_parts_and_groups()
        self._count()

    def _choose(self, why: str = "", **values: Any) -> None:
        """Set keys of data, with the reason for them, that the user has not set."""
        values = {key: value for key, value in values.items() if key not in self.said}
        self.data = self.data.model_copy(update=values)
        self.why.update(dict.fromkeys(values, why))

    def _find_pictures(self) -> None:
        """Which column names the pictures, from which folder on, and with which ending."""
        (table,) = read_tables(self.data, 0).values()
        held = [name for name, feature in table.rows.features.items() if isinstance(feature, datasets.Image | dict)]
        if held and "image_column" not in self.said:
            self._choose("The table holds the pictures.", image_column=held[0])
            return
        rows = np.unique(np.linspace(0, len(table.rows) - 1, LOOKED_AT).astype(int))
        names = [self.data.image_column] if "image_column" in self.said else table.rows.column_names
        texts = {name: [str(cell).strip() for cell in table.rows.select(rows)[name]] for name in names}
        roots = dict.fromkeys([self.data.root, os.path.dirname(table.source) or ".", "."])
        endings = ["", *IMAGE_ENDINGS, *(ending.upper() for ending in IMAGE_ENDINGS)]
        endings = [self.data.suffix] if "suffix" in self.said else endings

        def share(root: str, ending: str, name: str) -> float:
            return float(np.mean([os.path.isfile(os.path.join(root, text + ending)) for text in texts[name]]))

        ways = ((root, ending) for root in roots for ending in endings)
        found = next(((*way, every) for way in ways if (every := [n for n in names if share(*way, n) >= 0.5])), None)
        if found is None:
            first = ", ".join(f"{name} {brief(repr(cells[0]))}" for name, cells in texts.items())
            there = next(
                (path for path in Path(self.data.root).rglob("*") if path.suffix.lower() in IMAGE_ENDINGS), None
            )
            raise ValueError(
                f"{table.place(0)}: no column names a picture: {first}; "
                + (f"a picture is {there}" if there else f"there are no pictures in {self.data.root}")
            )
        root, ending, every = found
        if len(every) > 1:
            raise ValueError(
                f"{table.source}: several columns name pictures: {', '.join(every)}; data.image_column=NAME says which"
            )
        name = every[0]
        place = os.path.relpath(table.source, root)
        self._choose(root=root, table=place, image_column=name)
        self._choose("The table names the files without it.", suffix=ending)

    def _find_label(self) -> None:
        """The column that is most likely the label, by its name and by what is in it."""
        (table,) = self.tables.values()
        likely = []
        for place, name in enumerate(table.rows.column_names):
            words = _words(name)
            cells = Counter(str(cell).strip() for cell in table.rows[name] if cell is not None)
            numbers = float(np.mean([_is_number(cell) for cell in cells.elements()])) if cells else 0.0
            scale = numbers > 0.5 or len(cells) <= MOST_LISTED
            parts = {part_called(cell) for cell in cells} <= set(PARTS)
            if name == self.data.image_column or len(cells) < 2 or parts or not scale:
                continue
            unnamed = not (self.ranks.names and set(cells) <= {"", *self.ranks.names})
            rank = next((rank for rank, label in enumerate(LABELS) if label in words), len(LABELS))
            foreign = rank == len(LABELS) and bool(NO_LABELS & set(words))
            shown = ", ".join(printable(cell) for cell in list(cells)[:3])
            likely.append((unnamed, foreign, rank, numbers <= 0.5, place, name, f"{printable(name)} ({shown}, ...)"))
        if "label_column" in self.said:
            return
        likely.sort()
        if not likely:
            raise ValueError(
                f"{table.source}: no column beside {self.data.image_column!r} holds labels; it has "
                f"{', '.join(map(repr, table.rows.column_names))}, and data.label_column=NAME says which"
            )
        known = len(LABELS)  # of an entry's rank: by its name alone no label
        alike = [
            entry[-1] for entry in likely if entry[:2] == likely[0][:2] and (entry[2] < known) == (likely[0][2] < known)
        ]
        if len(alike) > 1 and likely[0][2] != 0:
            raise ValueError(
                f"{table.source}: several columns could be the label: {', '.join(alike)}; "
                "data.label_column=NAME says which"
            )
        names = [entry[-2] for entry in likely]
        others = f"Others that could be the label: {', '.join(map(printable, names[1:]))}." if names[1:] else ""
        self._choose(others, label_column=names[0])

    def _find_parts_and_groups(self) -> None:
        (table,) = self.tables.values()
        groups: list[tuple[int, str, str]] = []
        for name in table.rows.column_names:
            if name in (self.data.image_column, self.data.label_column):
                continue
            cells = Counter(str(cell).strip() for cell in table.rows[name])
            parts = {part_called(cell) for cell in cells}
            words = _words(name)
            if "train" in parts and parts <= set(PARTS) and not self.said & {"split", "folds"}:
                counted = ", ".join(f"{printable(cell)} ({times})" for cell, times in cells.items())
                self._choose(f"The column that says the part of every row: {counted}.", split_column=name)
            elif len(set(words) & set(GROUPS)) == 1 and set(words) <= {*GROUPS, *NUMBERED} and len(cells) > 2:
                (word,) = set(words) & set(GROUPS)
                if len(cells) < len(table.rows):
                    why = f"{len(cells)} of them in {len(table.rows)} rows: rows of one stay in one part."
                    groups.append((GROUPS.index(word), name, why))
        if groups:
            _, name, why = min(groups)
            others = [printable(other) for _, other, _ in sorted(groups)[1:]]
            self._choose(why + (f" Others that could be meant: {', '.join(others)}." if others else ""), group=name)

    def _count(self) -> None:
        """What labels there are, and how often."""
        columns = label_columns(self.tables, self.data, self.ranks)
        missing = sum(int(column.missing.sum()) for column in columns.values())
        if missing:
            self._choose(f"{missing} rows have no label.", missing="drop")
        self.worded = any(len(column.odd) for column in columns.values())
        self.counts: Counter[Any] = Counter()
        for column in columns.values():
            present = np.flatnonzero(~column.missing).tolist()
            self.counts.update([column.text(row) if self.worded else float(column.numbers[row]) for row in present])
        if not self.worded and max(map(abs, self.counts), default=0) > MAX_VALUE:
            raise ValueError(f"column {self.data.label_column!r} holds labels beyond {MAX_VALUE:g}")
        if len(self.counts) < 2:
            raise ValueError(
                f"{next(iter(self.tables.values())).source}: one label only, {next(iter(self.counts), None)}"
            )
        if self.worded and len(self.counts) > MOST_WORDS:
            raise ValueError(
                f"column {self.data.label_column!r} holds {len(self.counts)} different texts, which is no scale; "
                "data.label_column=NAME says another column"
            )
        divided = "all" in self.tables and not self.data.split_column
        if not self.worded and (odd := sentinel(np.asarray(list(self.counts.elements())))) is not None:
            self.why["label_column"] += f" {odd:g} lies far from the others, or below 0 alone: is it a label?"
        if divided and len(self.counts) <= MOST_LISTED:
            self._choose("Every part gets the same share of every label.", stratify=[self.data.label_column])

    def keep_copies_together(self, number: int) -> None:
        """After the pictures have been compared."""
        self._choose(f"{number} pictures are there more than once: copies stay in one part.", duplicates="together")

    # ---- for the template

    def choices(self) -> dict[str, Any]:
        """What the template is filled with."""
        data, columned = self.data, self.data.source == "table"
        label = data.label_column if columned else "label"
        ranks, num_ranks = self._ranks()
        num_rows = sum(len(table.rows) for table in self.tables.values())
        shown = {"source", "root", "table", "image_column", "label_column", "split", "license", "augment"}
        unit, self.why["unit"] = _unit(label, self.ranks.unit)
        name = re.sub(r"\W+", "-", Path(data.root).resolve().name).strip("-") or "mine"
        known = known_scale(list(self.counts)) if self.worded else None
        first = (self.ranks.names or known or sorted(self.counts))[0]
        return {
            "title": f"{num_rows} pictures with {len(self.counts)} different labels in {printable(data.root)}.",
            "output_dir": f"runs/{name}",
            "prompt": f"the {' '.join(_words(label))} is",
            "example": printable(first if isinstance(first, str) else f"{first:g}"),
            "num_base_ranks": min(num_ranks, max(3, round(num_ranks / 10) + 1)),
            "num_ranks": num_ranks,
            "data": data,
            "more": {
                key: value
                for key, value in data.model_dump().items()
                if key not in shown and value != DataConfig.model_fields[key].default
            },
            "divided": "all" in self.tables and not data.split_column,
            "calibrates": self._independent() * data.split[1] / 2 >= CALIBRATING,
            "ranks": ranks,
            "unit": unit,
            "open_order": self.worded and self.ranks.names is None and known_scale(list(self.counts)) is None,
            "max_steps": int(np.clip(100 * round(10 * num_rows / 32 / 100), 200, 1000)),
            "num_rows": num_rows,
            "cs": self._tolerable(),
            "why": self.why,
        }

    def _independent(self) -> int:
        """Rows, or groups of them."""
        tables = list(self.tables.values())
        if not self.data.group:
            return sum(len(table.rows) for table in tables)
        return len({name for table in tables for name in group_names(table, self.data).tolist()})

    def _tolerable(self) -> float | int:
        """An error that is small: a rank where they are few, else about a tenth of the labels' range."""
        labels = self.ranks.given_values() or ([0.0, 1.0] if self.worded else sorted(self.counts))
        if len(labels) <= MOST_LISTED:
            return _plain(float(np.diff(labels).min()))
        return _plain(_nice_step((labels[-1] - labels[0]) / 10, whole=False))

    def _ranks(self) -> tuple[dict[str, Any], int]:
        """Keys of ranks, and how many ranks they make."""
        said = self.ranks.model_dump(exclude_unset=True, exclude={"unit"})
        values = self.ranks.given_values()
        if self.worded:
            known = known_scale(list(self.counts))
            names = self.ranks.names or known or sorted(self.counts)
            counted = ", ".join(f"{printable(name)} ({self.counts[name]})" for name in names)
            order = "as you said." if self.ranks.names else "the usual one of these words: is it yours?"
            if not (self.ranks.names or known):
                order = "yours to say: write them into names in that order, and take the # away."
            self.why["ranks"] = f"The labels, with their pictures: {counted}. Their order, lowest first, is {order}"
            return {**said, "names": names if self.ranks.names or known else ["LOWEST", "...", "HIGHEST"]}, len(names)
        labels = sorted(self.counts)
        if values is not None:
            self.why["ranks"] = f"As you said; the labels go from {labels[0]:g} to {labels[-1]:g}."
            return said, len(values)
        whole = all(label.is_integer() for label in labels)
        if len(labels) <= MOST_LISTED:
            counted = ", ".join(f"{label:g} ({self.counts[label]})" for label in labels)
            self.why["ranks"] = f"The labels, with their pictures: {counted}."
            return {**said, "values": [_plain(label) for label in labels]}, len(labels)
        most = int(np.clip(self.counts.total() // ENOUGH, FEWEST_RANKS, MOST_RANKS))
        step = _nice_step((labels[-1] - labels[0]) / (most - 1), whole)
        low, high = math.floor(labels[0] / step + 1e-9) * step, math.ceil(labels[-1] / step - 1e-9) * step
        number = round((high - low) / step) + 1
        counts, edges = np.histogram(list(self.counts.elements()), 5)
        spread = ", ".join(
            f"{low:.4g} to {high:.4g} ({n})" for low, high, n in zip(edges, edges[1:], counts, strict=False)
        )
        self.why["ranks"] = (
            f"The labels, with their pictures: {spread}. A rank every {step:g}; a label takes the nearest one. Where "
            "pictures are few, fewer ranks are learnt better."
        )
        return {**said, "low": _plain(low), "high": _plain(high), "num": number}, number


def _problem(text: str, file: str) -> str:
    """Why a training by this configuration would not start; "" if it would."""
    try:
        config = parse_config(read(text), file)
        load_parts(config.data, config.ranks, config.seed)
    except RepeatedPictures:
        raise
    except (ValueError, OSError) as error:
        return str(error)
    return ""


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("ordinalclip", "assets/init"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(yaml=lambda value: dump(value, inline=True), comment=_comment)
    return environment


def _comment(text: str, indent: int = 0) -> str:
    """Lines of a comment; nothing where there is no text."""
    begin = " " * indent + "# "
    lines = textwrap.wrap(printable(text.strip()), 100, break_long_words=False)
    return "".join(f"{begin}{line}\n" for line in lines)


def _is_number(text: str) -> bool:
    return plain_number(text.replace(",", ".", 1)) is not None


def _unit(label: str, said: str) -> tuple[str, str]:
    """The unit of the label, and why: the one that the column's name says, years for an age alone."""
    if said:
        return said, ""
    parts = [*re.split(r"[\s_()\[\]]+", label), *_words(label)]
    named = {UNITS[part] for part in parts if part in UNITS}
    if not named and "age" in _words(label) and set(_words(label)) <= {"age", "patient", "in", "at", "exam", "person"}:
        named = {"years"}
    if len(named) != 1:
        return "", "Such as years, kg or points: shown with every answer."
    return named.pop(), f"As the column is called {printable(label)}: right?"


def _plain(value: float) -> float | int:
    value = float(f"{value:.10g}")
    return int(value) if value.is_integer() else value


def _nice_step(least: float, whole: bool) -> float:
    """The smallest of 1, 2, 5, 10, 20, ... (and 0.5, 0.2, ... unless labels are whole) that is no smaller."""
    power = 10.0 ** math.floor(math.log10(least))
    step = next(digit * power for digit in (1, 2, 5, 10) if digit * power >= least * (1 - 1e-9))
    return max(step, 1.0) if whole else step
