"""Rows of pictures that are to be predicted, without labels: tables, folders with all below them, data sets of the hub.

Everything beside the pictures' bytes is kept as it is, in Arrow; a picture is looked for when its turn comes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from ordinalclip.config import DataConfig, flat_keys, read_overrides
from ordinalclip.data.labels import say
from ordinalclip.data.loading import rows_of
from ordinalclip.data.parts import leaves
from ordinalclip.data.sources import read_tables
from ordinalclip.data.tables import LISTS, TABLES, Table, read_table
from ordinalclip.files import ASIDE
from ordinalclip.images import FOREIGN_ENDINGS, IMAGE_ENDINGS, BrokenImageError, find_images, read_formats
from ordinalclip.sections import parse_section
from ordinalclip.suggestions import near_matches

# fmt: off
KEYS = (
    "source", "root", "outside_root", "separator", "encoding", "sheet", "suffix", "extra_formats", "image_column",
    "hub_config", "hub_split", "hub_revision", "workers", "prefetch",
)
# fmt: on
FILE = "file"  # column of pictures that were found in folders
LOOKED_AT = 100  # cells by which a column of paths is known
DIGESTED = 10_000  # rows at a time


class PictureRows(Sequence[Any]):
    """Pictures by row, and the columns beside them. `rows[i]` is what `load_image` takes.

    Args:
        name: of the table, folder or data set, for messages.
        table: the rows; None: files alone.
        column: the one that holds pictures.
        files: paths of the pictures, where there is no table.
        root: folder that relative paths start from.
        config: of it `root`, `outside_root`, `suffix`, `extra_formats`, `workers`, `prefetch`.

    Attributes:
        formats: of pictures that are read.
    """

    def __init__(
        self,
        name: str,
        config: DataConfig,
        table: Table | None = None,
        column: str = FILE,
        files: Sequence[str] = (),
        root: str = "",
    ):
        self.name, self.config, self.column, self.files, self.root = name, config, column, files, root
        self.table = table
        self.bound = os.path.realpath(config.root) if config.root and not config.outside_root else ""
        self.formats = read_formats(config.extra_formats)
        self.beside: pa.Table | None = None
        if table is not None:
            every = table.rows.with_format("arrow")[:].replace_schema_metadata(None)
            self.cells = every[column]
            self.beside = _without_bytes(every, column)

    def __len__(self) -> int:
        return len(self.files) if self.table is None else len(self.cells)

    def __getitem__(self, row: Any) -> Any:
        """The picture of a row: its path, its bytes, or both as `datasets` has them.

        Raises:
            BrokenImageError: the row has none, or a path that leaves `data.root`.
        """
        cell = self.files[row] if self.table is None else self.cells[row].as_py()
        if isinstance(cell, dict):
            if cell.get("bytes") is not None:
                return cell
            cell = cell.get("path")
        if isinstance(cell, bytes):
            return cell
        if not isinstance(cell, str) or not cell or "\0" in cell:
            raise BrokenImageError(self.place(row), f"not a readable image (no picture: {cell!r})")
        path = os.path.join(self.root, cell if cell.endswith(self.config.suffix) else cell + self.config.suffix)
        if self.bound and leaves(path, self.bound, _real):
            raise BrokenImageError(
                self.place(row), f"leaves data.root={self.config.root}; data.outside_root=true allows that"
            )
        return path

    def path(self, row: int) -> str | None:
        """What a row says of its picture's file; None for bytes without a name."""
        cell = self.files[row] if self.table is None else self.cells[row].as_py()
        cell = cell.get("path") if isinstance(cell, dict) else cell
        return cell if isinstance(cell, str) else None

    def place(self, row: int) -> str:
        """What to call a row in an error: table, row, line, file."""
        if self.table is None:
            return f"{self.name}, row {row + 1}, {self.files[row]}" if self.name else self.files[row]
        path = self.path(row)
        return self.table.place(row) + (f", {path}" if path else "")

    @property
    def places(self) -> Sequence[str]:
        """`place` of every row."""
        return _Places(self)

    def columns(self, begin: int, end: int) -> pa.Table:
        """The columns beside the pictures' bytes, of some rows."""
        if self.beside is not None:
            return self.beside.slice(begin, end - begin)
        names = [name.encode("utf-8", "backslashreplace").decode() for name in self.files[begin:end]]
        return pa.table({FILE: pa.array(names, pa.string())})

    def digest(self) -> str:
        """SHA-256 of the rows: cells, names and order of the columns, and sizes of pictures that are stored in them.

        What lies in files is not looked at.
        """
        digest = hashlib.sha256(json.dumps([self.column, self.columns(0, 1).column_names]).encode())
        for begin in range(0, len(self), DIGESTED):
            end = min(begin + DIGESTED, len(self))
            cells = [self.columns(begin, end).to_pydict(), self._sizes(begin, end)]
            digest.update(json.dumps(cells, default=repr).encode())
        return digest.hexdigest()

    def _sizes(self, begin: int, end: int) -> list[int | None]:
        if self.table is None:
            return []
        cells = self.cells.slice(begin, end - begin)
        if pa.types.is_struct(cells.type):
            cells = pc.struct_field(cells, "bytes")
        return pc.binary_length(cells).to_pylist() if _is_binary(cells.type) else []


class _Places(Sequence[str]):
    def __init__(self, rows: PictureRows):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: Any) -> Any:
        return self.rows.place(row)


_real = lru_cache(maxsize=4096)(os.path.realpath)


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_picture(kind: pa.DataType) -> bool:
    """Whether a column is one of pictures as `datasets` stores them."""
    return pa.types.is_struct(kind) and {"bytes", "path"} == {field.name for field in kind}


def _without_bytes(table: pa.Table, column: str) -> pa.Table:
    """The table with the paths alone of columns that hold pictures."""
    for place, field in reversed(list(enumerate(table.schema))):
        if _is_picture(field.type):
            table = table.set_column(place, field.name, pc.struct_field(table[field.name], "path"))
        elif field.name == column and _is_binary(field.type):
            table = table.remove_column(place)
    return table


# ---- where they come from


def of_files(paths: Sequence[str], extra_formats: Sequence[str] = ()) -> PictureRows:
    """Files, and folders with all below them; see `find_images`."""
    files = [str(path) for path in find_images(paths)]
    return PictureRows("", DataConfig(source="memory", extra_formats=list(extra_formats)), files=files)


def of_rows(rows: datasets.Dataset | pd.DataFrame, config: DataConfig) -> PictureRows:
    """Rows in memory: paths, PIL pictures, arrays or bytes in the column `config.image_column`.

    Raises:
        ValueError: no such column, or what `loading.rows_of` refuses.
    """
    table = Table(rows_of(rows, config, "data"), "data")
    return PictureRows("data", config, table, table.column(config.image_column, "image"), root=config.root)


def read_pictures(data: str, overrides: Sequence[str] | Mapping[str, Any] = ()) -> PictureRows:
    """The rows of a table, a folder or a data set.

    Args:
        data: a table; a folder of pictures with all below it, or one that `datasets` reads; or a name on the hub.
        overrides: `data.KEY=VALUE` of `KEYS`, or nested; `data.source` says what it is where it may be several.

    Raises:
        FileNotFoundError: it is not there; ValueError: another key, no column of pictures or several, or what
            `read_table` and `read_tables` refuse.
    """
    given = _given(overrides)
    kind = str(given.pop("source", "") or kind_of(data))
    chosen = bool(given.get("image_column"))
    if kind == "folder":
        config = _config({**given, "source": "memory"})
        found = [os.path.relpath(path, data) for path in find_images([data])]
        _say_unread(data)
        return PictureRows(data, config, files=found, root=data)
    if kind == "table":
        config = _config({**given, "source": "table", "table": data})
        table = read_table(Path(data), config)
        root = config.root or str(Path(data).parent)
        if not os.path.isdir(root):
            raise FileNotFoundError(f"data.root={root!r}: no such folder")
    elif kind == "hub":
        config = _config({**given, "source": "hub", "hub": data})
        parts = read_tables(config, seed=0)
        if len(parts) > 1:
            raise ValueError(f"{data}: has the splits {', '.join(parts)}; data.hub_split says which")
        (table,), root = parts.values(), config.root
    else:
        raise ValueError(f"data.source={kind}: of pictures to predict it is table, folder or hub")
    return PictureRows(data, config, table, _column(table, config.image_column, chosen), root=root)


def _given(overrides: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    """What overrides say of the data.

    Raises:
        ValueError: other keys.
    """
    given = flat_keys(dict(overrides) if isinstance(overrides, Mapping) else read_overrides(overrides))
    known = [f"data.{key}" for key in KEYS]
    if wrong := [key for key in given if key not in known]:
        raise ValueError(f"{wrong[0]} says nothing of pictures to predict; {near_matches(wrong[0], known)}")
    return {key.removeprefix("data."): value for key, value in given.items()}


def _config(given: dict[str, Any]) -> DataConfig:
    return parse_section(given, DataConfig, "pictures to predict", "data.")


def kind_of(data: str) -> str:
    """What is named: a file is a table, a folder one of pictures, or of a data set where it holds none."""
    if not data:
        raise ValueError("data without a name was given: is a variable of the shell empty?")
    path = Path(data)
    if path.is_dir():
        for _folder, _folders, files in os.walk(path, followlinks=False):
            if any(file.lower().endswith(IMAGE_ENDINGS + FOREIGN_ENDINGS) for file in files):
                return "folder"
        described = [each.name for each in path.rglob("*") if each.is_file() and not each.name.startswith(".")]
        return "hub" if described else "folder"
    is_file = path.exists() or path.suffix.lower() in (*TABLES, *LISTS[1:])
    is_path = path.is_absolute() or len(path.parts) > 2 or (len(path.parts) == 2 and path.parent.is_dir())
    return "table" if is_file or is_path else "hub"


def _say_unread(folder: str) -> None:
    """Tables beside pictures are not read; that is said."""
    tables = sorted(each.name for each in Path(folder).iterdir() if each.suffix.lower() in TABLES and each.is_file())
    tables = [name for name in tables if not name.startswith(ASIDE)]
    if tables:
        other = Path(folder, tables[0])
        say(f"{folder}: its pictures are taken, {tables[0]} beside them is not read; --data {other} does")


def _column(table: Table, wanted: str, chosen: bool) -> str:
    """The column that holds pictures: the one that is said, else the only one that looks like it.

    Raises:
        ValueError: it is not there, or none or several look like it.
    """
    names = table.rows.column_names
    if chosen or wanted in names:
        return table.column(wanted, "data.image_column")
    likely = [name for name in names if _looks_like_pictures(table.rows, name)]
    if len(likely) == 1:
        say(f"{table.source}: column {likely[0]!r} is taken for the pictures; data.image_column says another")
        return likely[0]
    found = f"{', '.join(map(repr, likely))} all look like it" if likely else "none looks like it"
    raise ValueError(
        f"{table.source}: which column holds the pictures? {found}; data.image_column says it, of "
        f"{', '.join(map(repr, names))}"
    )


def _looks_like_pictures(rows: datasets.Dataset, name: str) -> bool:
    cells = rows.select_columns(name).with_format("arrow")[:LOOKED_AT][name]
    if pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type):
        words = [cell for cell in cells.to_pylist() if cell]
        return bool(words) and all(word.lower().endswith(IMAGE_ENDINGS + FOREIGN_ENDINGS) for word in words)
    return _is_picture(cells.type) or _is_binary(cells.type)
