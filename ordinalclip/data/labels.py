"""From a column of labels to values in the label's unit: numbers are values, words need an order that somebody said."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ordinalclip.config import DataConfig, RanksConfig
from ordinalclip.data.tables import NUMBER, Table, plain_number
from ordinalclip.suggestions import near_matches

logger = logging.getLogger(__name__)

MISSING = ["", "NA", "N/A", "#N/A", "NaN", "nan", "null", "NULL"]  # unless a rank is named so
SCALES = (  # orders that are the same everywhere; suggested, never assumed
    ("none", "mild", "moderate", "severe"),
    ("none", "minimal", "mild", "moderate", "severe"),
    ("none", "doubtful", "minimal", "moderate", "severe"),
    ("no dr", "mild", "moderate", "severe", "proliferative dr"),
    ("no", "mild", "moderate", "severe", "proliferative"),
    ("normal", "mild", "moderate", "severe"),
    ("absent", "mild", "moderate", "severe"),
    ("absent", "present"),
    ("very low", "low", "medium", "high", "very high"),
    ("small", "medium", "large"),
    ("terrible", "bad", "poor", "fair", "good", "very good", "excellent"),
    ("never", "rarely", "sometimes", "often", "always"),
    ("young", "adult", "old"),
    ("no", "yes"),
    ("false", "true"),
)
MOST_WORDS = 200
LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Column:
    """A part's labels as they stand in its table.

    Attributes:
        table: where they stand.
        name: of the column.
        numbers: (N,) float64; NaN where there is no number.
        texts: (N,) the cells as text, None where the column holds numbers only.
        missing: (N,) whether there is no label.
    """

    table: Table
    name: str
    numbers: np.ndarray
    texts: pa.ChunkedArray | None
    missing: np.ndarray

    def text(self, row: int) -> str:
        """A cell, as it stands there."""
        assert self.texts is not None
        return str(self.texts[row].as_py()).strip()

    @property
    def odd(self) -> np.ndarray:
        """Rows whose label is there and no number."""
        return np.flatnonzero(np.isnan(self.numbers) & ~self.missing)


def read_labels(
    tables: Mapping[str, Table], config: DataConfig, ranks: RanksConfig
) -> tuple[dict[str, Table], dict[str, np.ndarray], RanksConfig]:
    """The labels of all parts, as values.

    Args:
        tables: by part.
        config: which column, and how missing labels and decimals are to be taken.
        ranks: its `names` give words their order.

    Returns:
        the tables without the rows that `data.missing=drop` leaves out; (N,) float64 values by part; the ranks, with
        the values that the names stand for.

    Raises:
        ValueError: a label that is missing, no number, infinite, or a word without a place in an order: with table,
            row and what was allowed.
    """
    columns = label_columns(tables, config, ranks)
    columns = {part: _without_missing(column, config) for part, column in columns.items()}
    worded = any(len(column.odd) for column in columns.values())
    if worded and ranks.names is not None:
        ranks, values = _by_names(columns, ranks)
    else:
        if worded:
            _refuse_words(columns)
        values = {part: column.numbers for part, column in columns.items()}
    for part, column in columns.items():
        if len(large := np.flatnonzero(~(np.abs(values[part]) <= LARGEST))):
            raise ValueError(f"{column.table.place(large[0])}: label {values[part][large[0]]:g} is beyond float32")
    return {part: column.table for part, column in columns.items()}, values, ranks


def label_columns(tables: Mapping[str, Table], config: DataConfig, ranks: RanksConfig) -> dict[str, Column]:
    """The labels of all parts, as they stand there.

    Raises:
        ValueError: no such column, one of lists or pictures, or an infinite number.
    """
    decimal = config.decimal or _decimal(tables, config)
    return {part: _column(table, config, decimal, ranks) for part, table in tables.items()}


def _column(table: Table, config: DataConfig, decimal: str, ranks: RanksConfig) -> Column:
    name = table.column(config.label_column, "data.label_column")
    feature = table.rows.features[name]
    cells = arrow_column(table.rows, name)
    if isinstance(feature, datasets.ClassLabel):  # numbers of names in alphabetical order: the names are the labels
        known = pc.if_else(pc.greater_equal(cells, 0), cells, pa.scalar(None, cells.type))  # -1: no label
        cells = pa.array(feature.names).take(known)
    kind = cells.type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        numbers = cells.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False).copy()
        missing = np.isnan(numbers)
        if len(infinite := np.flatnonzero(np.isinf(numbers))):
            raise ValueError(f"{table.place(infinite[0])}: label {numbers[infinite[0]]} in column {name!r} is no value")
        return Column(table, name, numbers, None, missing)
    if pa.types.is_dictionary(kind) or pa.types.is_boolean(kind):
        cells = cells.cast(pa.string())
    elif not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
        raise ValueError(f"{table.source}: column {name!r} holds {kind}; labels are numbers, or words with ranks.names")
    texts = pc.utf8_trim_whitespace(cells.cast(pa.string()))
    tokens = [token for token in MISSING if token not in (ranks.names or ())]
    missing = pc.or_(pc.is_null(texts), pc.is_in(texts, pa.array(tokens)))
    missing = pc.fill_null(missing, True).to_numpy(zero_copy_only=False).astype(bool)
    spelled = texts if decimal == "." else _with_points(texts, decimal)
    plain = pc.match_substring_regex(spelled, f"^{NUMBER.pattern}$")
    numbers = pc.if_else(plain, spelled, pa.scalar(None, pa.string())).cast(pa.float64())
    return Column(table, name, numbers.to_numpy(zero_copy_only=False).copy(), texts, missing)


def _with_points(texts: pa.ChunkedArray, decimal: str) -> pa.ChunkedArray:
    """Decimal commas as points; a text that has points already is no number then."""
    pointed = pc.replace_substring(texts, decimal, ".", max_replacements=1)
    return pc.if_else(pc.match_substring(texts, "."), pa.scalar("a point where commas are", pa.string()), pointed)


def _decimal(tables: Mapping[str, Table], config: DataConfig) -> str:
    """A comma where some label has one, none has a point, and all are numbers by it; that is said aloud."""
    seen = False
    for table in tables.values():
        cells = arrow_column(table.rows, table.column(config.label_column, "data.label_column"))
        if not (pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type)):
            return "."
        texts = pc.utf8_trim_whitespace(cells)
        texts = texts.filter(pc.invert(pc.is_in(texts, pa.array(MISSING))))
        _say_thousands(table, config, texts)
        if not pc.all(pc.match_substring_regex(texts, r"^[+-]?\d+(,\d+)?$")).as_py():
            return "."
        broken = texts.filter(pc.match_substring(texts, ","))
        seen = seen or len(broken) > 0
        if len(broken) and pc.all(pc.match_substring_regex(broken, r"^[+-]?\d{1,3},\d{3}$")).as_py():
            return "."  # 1,234 may be a thousand
    if seen:
        sources = ", ".join(table.source for table in tables.values())
        say(f"{sources}: labels in column {config.label_column!r} are read with a decimal comma (data.decimal=',')")
    return "," if seen else "."


def _say_thousands(table: Table, config: DataConfig, texts: pa.ChunkedArray) -> None:
    """A point before three digits, beside whole numbers, may part thousands; it is read as a decimal point."""
    pointed = texts.filter(pc.match_substring(texts, "."))
    whole = pc.any(pc.match_substring_regex(texts, r"^[+-]?\d+$")).as_py()
    if len(pointed) and whole and pc.all(pc.match_substring_regex(pointed, r"^[+-]?[1-9]\d{0,2}\.\d{3}$")).as_py():
        say(
            f"{table.source}: {pointed[0]} in column {config.label_column!r} is read as {float(pointed[0].as_py()):g}; "
            "write it without the point if that parts thousands"
        )


def _without_missing(column: Column, config: DataConfig) -> Column:
    rows = np.flatnonzero(column.missing)
    if not len(rows):
        return column
    table, count = column.table, f"{len(rows)} of {len(column.missing)} rows"
    if config.missing != "drop":
        raise ValueError(
            f"{table.place(rows[0])}: the label in column {column.name!r} is missing, in {count}; "
            "data.missing=drop leaves such rows out"
        )
    say(f"{table.source}: {count} have no label in column {column.name!r} and are left out (data.missing=drop)")
    kept = np.flatnonzero(~column.missing)
    if not len(kept):
        raise ValueError(
            f"{table.source}: no row has a label in column {column.name!r}; formulas have to be calculated"
        )
    texts = None if column.texts is None else column.texts.take(pa.array(kept))
    return Column(table.select(kept), column.name, column.numbers[kept], texts, column.missing[kept])


def _by_names(columns: Mapping[str, Column], ranks: RanksConfig) -> tuple[RanksConfig, dict[str, np.ndarray]]:
    """Words by the order that `ranks.names` gives them."""
    names = [str(name).strip() for name in ranks.names or ()]
    given = ranks.given_values()
    if given is None:
        given = [float(rank) for rank in range(len(names))]
        if odd := [name for rank, name in enumerate(names) if plain_number(name) not in (None, float(rank))]:
            raise ValueError(
                f"ranks.names has {odd[0]!r}, which is a number, for the value {names.index(odd[0])}; "
                "ranks.values=[...] says the values of the names"
            )
    if len(given) != len(names):
        raise ValueError(f"ranks.names has {len(names)} names for {len(given)} rank values")
    values = {}
    for part, column in columns.items():
        if column.texts is None:
            raise ValueError(f"{column.table.source}: labels are numbers, those of another part are words")
        place = pc.index_in(column.texts, pa.array(names))
        if place.null_count:
            row = int(np.flatnonzero(pc.is_null(place).to_numpy(zero_copy_only=False))[0])
            raise ValueError(
                f"{column.table.place(row)}: label {column.text(row)!r} is none of ranks.names; "
                f"{near_matches(column.text(row), names)}"
            )
        values[part] = np.asarray(given)[place.to_numpy(zero_copy_only=False).astype(np.int64)]
    return ranks.with_values(given), values


def _refuse_words(columns: Mapping[str, Column]) -> None:
    """Words in no order, or a few labels among numbers that are none."""
    words = Counter(column.text(row) for column in columns.values() for row in column.odd)
    present = sum(int((~column.missing).sum()) for column in columns.values())
    first = next(column for column in columns.values() if len(column.odd))
    row = int(first.odd[0])
    where, label = f"{first.table.place(row)}: label {first.text(row)!r} in column {first.name!r}", first.text(row)
    if "\n" in label:
        raise ValueError(f"{where} goes over several lines: a quote that was never closed?")
    if words.total() * 2 <= present:
        cure = "; data.decimal=',' reads decimal commas" if "," in label else ""
        raise ValueError(f"{where} is not a number, as {words.total()} of {present} are not{cure}")
    if len(words) > MOST_WORDS:
        raise ValueError(f"{where} is not a number, and {len(words)} different texts are no scale: is it the column?")
    counted = ", ".join(f"{word} ({times})" for word, times in sorted(words.items()))
    raise ValueError(
        f"{first.table.source}: labels in column {first.name!r} are words: {counted}. Their order is yours to say, "
        f"lowest first: {suggested_names(words)}"
    )


def suggested_names(words: Mapping[str, int] | list[str]) -> str:
    """`ranks.names=[...]` for some words: in the order of a known scale, to be confirmed, else a place for them."""
    if known := known_scale(list(words)):
        names = ", ".join(_quoted(word) for word in known)
        return f"ranks.names='[{names}]' (the usual order of these words; is it yours?)"
    return f"ranks.names='[LOWEST, ..., HIGHEST]' of {', '.join(_quoted(word) for word in sorted(words))}"


def known_scale(words: list[str]) -> list[str] | None:
    """Words in the order of the first known scale that has them all; None if there is none."""
    plain = {" ".join(word.lower().replace("_", " ").replace("-", " ").split()): word for word in words}
    for scale in SCALES:
        if len(plain) == len(words) > 1 and set(plain) <= set(scale):
            return [plain[name] for name in scale if name in plain]
    return None


def _quoted(word: str) -> str:
    """A word as YAML takes it for text in a list."""
    plain = word.replace(" ", "").replace("_", "").isalpha() and word.lower() not in (
        ["y", "n", "yes", "no", "on", "off", "true", "false", "null"]
    )
    return word if plain else '"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"'


def sentinel(values: np.ndarray) -> float | None:
    """A label that may stand for "not known": -1, -9, 99, 999 and their like, alone on their side of the others."""
    distinct = np.unique(values)
    if len(distinct) < 3:
        return None
    low, second, before, high = distinct[0], distinct[1], distinct[-2], distinct[-1]
    if low in (-1, -9, -99, -999, -9999) and second >= 0:
        return float(low)
    return float(high) if high in (99, 999, 9999) and high - before > before - low else None


def arrow_column(rows: datasets.Dataset, column: str) -> pa.ChunkedArray:
    """A column as it lies in the table."""
    return rows.select_columns(column).with_format("arrow")[:][column]


def say(text: str) -> None:
    """Something that was decided about the data: a warning, once a job."""
    if int(os.environ.get("RANK", "0")) == 0:
        logger.warning(text)
