"""Tables as people have them: CSV of any separator, Excel, Parquet, JSON lines and `path label` lists -> rows.

Cells of text files stay text as they are written: "007" keeps its zeros and "1_000" is not a number. Content decides
what is read, never a time stamp.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from ordinalclip.config import DataConfig
from ordinalclip.files import content_digest
from ordinalclip.suggestions import near_matches

logger = logging.getLogger(__name__)

SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
EXCEL, DELIMITED, PARQUET, JSON_LINES = (".xlsx", ".xlsm"), (".csv", ".tsv"), (".parquet", ".pq"), (".jsonl", ".ndjson")
TABLES = (*DELIMITED, *EXCEL, *PARQUET, *JSON_LINES)
LISTS = ("", ".txt", ".lst", ".list")
CHUNK = 50_000  # rows that are Python objects at a time
SEPARATOR_LINE = re.compile(r"sep=(.)\r?\n")
LONGEST_CELL = 1 << 20  # characters; more is a quote that was never closed

Record = tuple[int, list[str | None]]  # line of the file, and its cells


@dataclass(frozen=True)
class Table:
    """Rows as they were read.

    Attributes:
        rows: a `datasets.Dataset`; columns of text files are text.
        source: the file or data set, for errors.
        lines: (N,) line of each row in the file, header included; None where there are none.
        places: (N,) row of each in the file, counted from 0; None where all are there.
    """

    rows: datasets.Dataset
    source: str
    lines: np.ndarray | None = None
    places: np.ndarray | None = None

    def place(self, row: int) -> str:
        """What to call a row, counted from 0, in an error."""
        line = "" if self.lines is None else f" (line {self.lines[row]})"
        return f"{self.source}, row {(row if self.places is None else self.places[row]) + 1}{line}"

    def column(self, name: str, option: str) -> str:
        """The name of a column that there is.

        Args:
            option: the key that says it.

        Raises:
            ValueError: there is none of that name, with those there are.
        """
        if name not in self.rows.column_names:
            raise ValueError(
                f"{self.source}: column {name!r} ({option}) is missing; it has "
                f"{', '.join(map(repr, self.rows.column_names))}"
            )
        return name

    def select(self, rows: np.ndarray) -> Table:
        """The given rows."""
        places = rows if self.places is None else self.places[rows]
        return Table(self.rows.select(rows), self.source, None if self.lines is None else self.lines[rows], places)


def read_table(path: Path, config: DataConfig) -> Table:
    """Read a table of any known kind; see `ordinalclip.data.tables`.

    Raises:
        FileNotFoundError: no such file; ImportError: Excel without openpyxl; ValueError: an unknown ending, another
            encoding, unbalanced quotes, rows of another length, repeated columns, no rows: with file and line.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such table"
        near = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise FileNotFoundError(f"{path}: {what}" + (f"; {near_matches(path.name, sorted(near))}" if near else ""))
    ending = path.suffix.lower()
    if config.sheet and ending not in EXCEL:
        raise ValueError(f"{path}: data.sheet={config.sheet!r} is for tables of Excel")
    if ending in PARQUET:
        return Table(_read_parquet(path), str(path))
    if ending in JSON_LINES:
        return _of_records(path, *_json_records(path, config))
    if ending in EXCEL:
        return _of_records(path, *_excel_records(path, config))
    if ending in DELIMITED:
        return _of_records(path, *_delimited_records(path, config))
    if ending in LISTS:
        return _of_records(path, [config.image_column, config.label_column], _list_records(path, config))
    known = ", ".join([*TABLES, *LISTS[1:]])
    raise ValueError(f"{path}: tables end in {known}; this ends in {ending!r}")


def _of_records(path: Path, names: Sequence[str | None], records: Iterable[Record]) -> Table:
    """Records as an Arrow table, a chunk of rows at a time."""
    columns = _column_names(path, names)
    lines: list[int] = []
    batches: list[pa.RecordBatch] = []
    pending: list[list[str | None]] = []

    def close() -> None:
        arrays = [pa.array(cells, pa.string()) for cells in zip(*pending, strict=True)]
        batches.append(pa.RecordBatch.from_arrays(arrays, names=columns))
        pending.clear()

    for line, cells in records:
        if len(cells) != len(columns):
            raise ValueError(
                f"{path}, line {line}: {len(cells)} cells, the header has {len(columns)} ({', '.join(columns)}); "
                "is data.separator right, are there quotes around text that holds it?"
            )
        lines.append(line)
        pending.append(cells)
        if len(pending) == CHUNK:
            close()
    if pending:
        close()
    if not batches:
        raise ValueError(f"{path}: has no rows below its header")
    return Table(datasets.Dataset(pa.Table.from_batches(batches)), str(path), np.asarray(lines))


def _column_names(path: Path, names: Sequence[str | None]) -> list[str]:
    """The header's cells; one without a name is called by its place."""
    columns = [(name or "").strip() or f"column {number}" for number, name in enumerate(names, 1)]
    if repeated := [name for name, times in Counter(columns).items() if times > 1]:
        raise ValueError(f"{path}: column {repeated[0]!r} stands in the header more than once")
    return columns


# ---- text


def _text(path: Path, encoding: str) -> str:
    """The text of a file, in the encoding given or said by its byte-order mark, else UTF-8."""
    content = path.read_bytes()
    marked = next((name for mark, name in MARKS.items() if content.startswith(mark)), None)
    chosen = encoding or marked or "utf-8"
    try:
        text = content.decode(chosen)
    except LookupError:
        raise ValueError(f"data.encoding={encoding!r} is unknown; such as utf-8, utf-16, latin-1, cp1252") from None
    except UnicodeDecodeError as error:
        if error.encoding == "undefined":
            raise ValueError("data.encoding=undefined means nothing") from None
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: not {chosen} (byte 0x{content[error.start]:02x}); "
            "data.encoding=cp1252, latin-1 or utf-16 says another encoding"
        ) from None
    except UnicodeError as error:
        raise ValueError(f"{path}: not {chosen} ({error}), as data.encoding says") from None
    if not text.strip("\ufeff \t\r\n\xa0"):
        raise ValueError(f"{path}: the file is empty")
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"{path}, line {line}: holds NUL characters; is it text? data.encoding=utf-16 may be missing")
    return text.removeprefix("\ufeff")


def _delimited_records(path: Path, config: DataConfig) -> tuple[list[str], Iterator[Record]]:
    text = _text(path, config.encoding)
    lines = io.StringIO(text, newline="")
    said = SEPARATOR_LINE.match(text)  # of Excel
    separator = config.separator or (said[1] if said else _separator(path, text, config))
    reader = csv.reader(lines, delimiter=separator, strict=True, skipinitialspace=True)
    if said:
        next(reader)
    records = _checked(path, reader)
    header = next(records, None)
    if header is None:
        raise ValueError(f"{path}: the file is empty")
    return [name or "" for name in header[1]], records


def _separator(path: Path, text: str, config: DataConfig) -> str:
    """The one that makes the columns that are asked for out of the header, else most columns."""
    if path.suffix.lower() == ".tsv":
        return "\t"
    header = next(line for line in text.splitlines() if line.strip())
    wanted = {config.image_column, config.label_column}
    split = {mark: {cell.strip().strip('"') for cell in header.split(mark)} for mark in SEPARATORS}
    fitting = [mark for mark, cells in split.items() if wanted <= cells]
    return fitting[0] if fitting else max(SEPARATORS, key=lambda mark: len(split[mark]))


def _checked(path: Path, reader: Any) -> Iterator[Record]:
    """Records without blank lines; errors of the reader say the line."""
    csv.field_size_limit(LONGEST_CELL)
    begin = reader.line_num + 1
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(
                f"{path}, line {begin}: quotes are not balanced in the row that begins here ({error})"
            ) from None
        if cells and (len(cells) > 1 or cells[0].strip()):
            yield begin, cells
        begin = reader.line_num + 1


def _list_records(path: Path, config: DataConfig) -> Iterator[Record]:
    """`path label [label ...]`: the median of the labels counts."""
    several = 0
    for number, line in enumerate(_text(path, config.encoding).splitlines(), 1):
        words = line.split()
        if not words:
            continue
        labels = [plain_number(word) for word in words[1:]]
        if len(labels) == 1:
            yield number, [words[0], words[1]]
        elif not labels or None in labels:
            raise ValueError(f"{path}, line {number}: write `path label [label ...]`, got {line!r}")
        else:
            several += 1
            yield number, [words[0], repr(float(np.median(np.asarray(labels, dtype=float))))]
    if several:
        logger.warning("%s: %d lines have several labels, of which the median counts", path, several)


NUMBER = re.compile(r"\s*[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,3})?\s*", re.ASCII)


def plain_number(text: str) -> float | None:
    """A number as data writes it, with a decimal point; None for anything else, "1_000", "0x1F" and "inf" among them.

    >>> plain_number(" 2.50 "), plain_number("1_000"), plain_number("2,5")
    (2.5, None, None)
    """
    return float(text) if NUMBER.fullmatch(text) else None


# ---- others


def _json_records(path: Path, config: DataConfig) -> tuple[list[str], Iterator[Record]]:
    """An object a line; the first one's keys are the columns, and every other has the same."""
    objects: list[tuple[int, dict[str, Any]]] = []
    for number, line in enumerate(_text(path, config.encoding).split("\n"), 1):  # JSON allows other line ends in text
        if not line.strip():
            continue
        try:
            found = json.loads(line, object_pairs_hook=_without_repeats, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not a JSON object ({error})") from None
        if not isinstance(found, dict):
            raise ValueError(f"{path}, line {number}: not a JSON object, got {type(found).__name__}")
        objects.append((number, found))
    columns = list(objects[0][1])
    for number, each in objects:
        if other := sorted(set(columns) ^ set(each)):
            raise ValueError(f"{path}, line {number}: key {other[0]!r} is not in every row; write null where it is not")
    return columns, ((number, [_cell(each[name]) for name in columns]) for number, each in objects)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands in it twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _cell(value: Any) -> str | None:
    """A value of a spreadsheet or of JSON as text."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return str(value) if isinstance(value, int | float) else json.dumps(value, default=str)


def _excel_records(path: Path, config: DataConfig) -> tuple[list[str | None], Iterator[Record]]:
    """The sheet `data.sheet`, or the only one that holds something."""
    try:
        import openpyxl  # noqa: F401  pandas would say it in its own words
        import pandas as pd
    except ImportError as error:
        raise ImportError(f"{path}: Excel needs openpyxl: pip install 'ordinalclip[excel]'") from error
    try:
        options: dict[str, Any] = {"header": None, "dtype": object, "keep_default_na": False, "engine": "openpyxl"}
        sheets = pd.read_excel(path, sheet_name=None, **options)
    except Exception as error:  # what openpyxl and zipfile raise at damaged files
        raise ValueError(f"{path}: not a readable Excel file ({error})") from error
    filled = [name for name, cells in sheets.items() if not cells.empty]
    if config.sheet and config.sheet not in sheets:
        raise ValueError(f"{path}: no sheet {config.sheet!r} (data.sheet); it has {', '.join(map(repr, sheets))}")
    if not config.sheet and len(filled) != 1:
        raise ValueError(f"{path}: {len(filled)} sheets hold something ({', '.join(filled)}); data.sheet says which")
    cells = sheets[config.sheet or filled[0]]
    rows = [
        (number, [None if pd.isna(value) or value == "" else _cell(value) for value in row])
        for number, row in enumerate(cells.itertuples(index=False), 1)
    ]
    rows = [(number, row) for number, row in rows if any(cell is not None for cell in row)]
    if not rows:
        raise ValueError(f"{path}: sheet {config.sheet!r} is empty")
    return rows[0][1], iter(rows[1:])


def _read_parquet(path: Path) -> datasets.Dataset:
    """Memory-mapped; the copy that `datasets` keeps is called by the content of the file."""
    digest = content_digest([path])
    kept = Path(datasets.config.HF_DATASETS_CACHE) / "ordinalclip" / digest
    try:
        rows = datasets.Dataset.from_parquet(str(path), cache_dir=str(kept))
    except Exception as error:  # what Arrow raises at damaged files
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ValueError(f"{path}: not a readable Parquet file ({reason})") from error
    assert isinstance(rows, datasets.Dataset)
    if not len(rows):
        raise ValueError(f"{path}: has no rows")
    return rows
