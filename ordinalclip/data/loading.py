"""Read, check, split: the way of the data from a configuration to `Parts`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from ordinalclip.config import DataConfig, RanksConfig
from ordinalclip.data.duplicates import copies, refuse_repeated
from ordinalclip.data.labels import arrow_column, read_labels, say
from ordinalclip.data.parts import PARTS, ImageCache, Part, Parts, RowNames, leaves
from ordinalclip.data.sources import read_tables, root_of
from ordinalclip.data.splits import check_groups, few_shot, group_names, kept_out, label_shift, split_rows, thinned
from ordinalclip.data.tables import Table
from ordinalclip.images import IMAGE_ENDINGS, load_image, read_formats
from ordinalclip.ranks import Ranks

NARROWEST = 0.2  # share of the ranks' range that training labels cover
ENOUGH = 20  # training labels by which that can be told


def load_parts(config: DataConfig, ranks: RanksConfig, seed: int) -> Parts:
    """Read, split and check the data of a run.

    Args:
        config: where the data is and how it is split.
        ranks: the label space; by default the distinct labels of the training part.
        seed: the run's seed, used for the split unless `config.split_seed` is set.

    Raises:
        FileNotFoundError: a table or images that do not exist.
        ValueError: missing columns, labels that are missing, no numbers, words in no order or outside the ranks, the
            same picture in two parts, empty parts; the message names the file and row.
    """
    seed = seed if config.split_seed is None else config.split_seed
    return _assemble(read_tables(config, seed), config, ranks, seed)


def make_parts(
    raw: Mapping[str, datasets.Dataset | pd.DataFrame], config: DataConfig, ranks: RanksConfig, seed: int
) -> Parts:
    """`Parts` from data in memory: {"train": ..., "validation": ..., "test": ...}, or {"all": ...} to be split.

    Args:
        raw: `datasets` or pandas frames; images of any kind that `load_image` takes, labels numbers, or words in the
            order of `ranks.names`.

    Raises:
        ValueError: other parts, or what `load_parts` refuses.
    """
    if wrong := sorted(set(raw) - {*PARTS, "all"}):
        raise ValueError(f"part {wrong[0]!r} is unknown; allowed are {', '.join(PARTS)}, or all")
    if "all" in raw and len(raw) > 1:
        raise ValueError("give either all, to be split, or train, validation and test")
    config = config.model_copy(update={"source": "memory"})
    seed = seed if config.split_seed is None else config.split_seed
    tables = {name: Table(rows_of(rows, config, f"{name} part"), f"{name} part") for name, rows in raw.items()}
    return replace(_assemble(tables, config, ranks, seed), in_memory=True)


def load_whole(config: DataConfig, ranks: Ranks) -> Part:
    """All rows of a source as one part, to evaluate a model on that knows these ranks.

    Raises:
        FileNotFoundError, ValueError: what `load_parts` refuses, labels outside the ranks, or several
            parts.
    """
    tables = read_tables(config, 0)
    if len(tables) > 1:
        cure = f"data.hub_split={next(iter(tables))}" if config.source == "hub" else "the folder of one of them"
        raise ValueError(
            f"{config.hub or config.root}: has the parts {', '.join(tables)}; name the one to evaluate: {cure}"
        )
    (table,) = tables.values()
    return _whole(table, config, ranks)


def make_whole(rows: datasets.Dataset | pd.DataFrame, config: DataConfig, ranks: Ranks) -> Part:
    """`load_whole` of data in memory: see `make_parts`."""
    config = config.model_copy(update={"source": "memory"})
    return _whole(Table(rows_of(rows, config, "data"), "data"), config, ranks)


def _whole(table: Table, config: DataConfig, ranks: Ranks) -> Part:
    if not len(table.rows):
        raise ValueError(f"{table.source}: has no rows")
    space = RanksConfig(values=list(ranks.values), names=list(ranks.names or ()) if ranks.worded else None)
    try:
        tables, values, _ = read_labels({"all": table}, config, space)
    except ValueError as error:
        if ranks.worded or "ranks.names" not in str(error):
            raise
        raise ValueError(
            f"{str(error).partition('. Their order')[0]}; the model's ranks are numbers, {ranks.values[0]:g} to "
            f"{ranks.values[-1]:g}"
        ) from None
    part = _part(tables["all"], values["all"], config, root_of(config))
    return replace(part, ranks=ranks.rank_of(part.values, part.row_names()).numpy())


def rows_of(rows: datasets.Dataset | pd.DataFrame, config: DataConfig, name: str) -> datasets.Dataset:
    """A data set as it is stored, or one of a frame, with its PIL pictures or arrays encoded.

    Raises:
        ValueError: neither of them, or columns that are no table, with the part's name.
    """
    if isinstance(rows, datasets.Dataset):
        return rows.with_format(None)
    if not isinstance(rows, pd.DataFrame):
        raise ValueError(f"{name}: a {type(rows).__name__}; allowed are datasets.Dataset and pandas.DataFrame")
    if not rows.columns.is_unique:
        raise ValueError(f"{name}: a column stands in it twice: {rows.columns[rows.columns.duplicated()][0]!r}")
    try:
        return _of_frame(rows, config)
    except (pa.ArrowException, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{name}: the frame cannot be read as a table ({str(error).splitlines()[0]})") from error


def _of_frame(rows: pd.DataFrame, config: DataConfig) -> datasets.Dataset:
    columns: dict[str, Any] = {
        str(name): rows[name].astype(object).where(rows[name].notna(), None).tolist()
        if name != config.image_column
        else rows[name].tolist()
        for name in rows.columns
    }
    columns = {
        name: [str(each) if isinstance(each, os.PathLike) else each for each in cells]
        for name, cells in columns.items()
    }
    pictures = columns.get(config.image_column, [])
    if pictures and isinstance(pictures[0], Image.Image | np.ndarray):
        decoded = [load_image(picture, f"row {number}") for number, picture in enumerate(pictures, 1)]
        encoded = datasets.Dataset.from_dict(
            {config.image_column: decoded}, datasets.Features({config.image_column: datasets.Image()})
        )
        rest = {name: cells for name, cells in columns.items() if name != config.image_column}
        others = datasets.Dataset.from_dict(rest)
        return datasets.concatenate_datasets([encoded, others], axis=1)
    return datasets.Dataset.from_dict(columns)


def _assemble(tables: dict[str, Table], config: DataConfig, ranks: RanksConfig, seed: int) -> Parts:
    root = root_of(config)
    tables, values, ranks = read_labels(tables, config, ranks)
    loose = {name: _part(table, values[name], config, root) for name, table in tables.items()}
    if config.group and "all" not in tables:
        check_groups({name: group_names(table, config) for name, table in tables.items()}, config.group)
    loose = _divided(loose, tables, config, seed)
    _say_empty(loose, config)
    if "train" not in loose or len(loose["train"]) == 0:
        raise ValueError(f"no training rows; parts found: { {name: len(part) for name, part in loose.items()} }")
    if config.source == "gauges" and ranks.given_values() is None:
        ranks = ranks.with_values(list(range(101)))  # per cent, as gauges show
    label_space = _label_space(loose["train"], ranks)
    named = {
        name: replace(part, ranks=_ranks_of(part, label_space, ranks)) for name, part in loose.items() if len(part)
    }
    draw = seed if config.draw_seed is None else config.draw_seed
    if config.shots is not None:
        named["train"] = few_shot(named["train"], config.shots, draw)
    if config.train_share < 1:
        named["train"] = thinned(named["train"], config.train_share, draw)
    if config.shift_ranks is not None:
        named["train"] = label_shift(named["train"], config.shift_ranks, config.shift_keep, draw)
    parts = Parts(named["train"], named.get("validation"), named.get("test"), label_space)
    if not config.calibration:
        return parts
    if parts.validation is None:
        raise ValueError(f"data.calibration={config.calibration:g} is a share of the validation part: there is none")
    choosing, held_out, groups = kept_out(parts.validation, config.calibration, config.group, seed)
    return replace(
        parts,
        validation=parts.validation.select(choosing),
        calibration=parts.validation.select(held_out),
        calibration_groups=groups,
    )


def _divided(loose: dict[str, Part], tables: dict[str, Table], config: DataConfig, seed: int) -> dict[str, Part]:
    """The parts, the same picture being in one of them only, and with one label."""
    first = int(os.environ.get("RANK", "0")) == 0  # the process that speaks for all, unless all need to know
    watched = config.source != "gauges" and (
        config.duplicates == "together" or (config.duplicates == "refuse" and first)
    )
    ids = copies(list(loose.values())) if watched else np.zeros(0)
    together = config.duplicates == "together"
    if "all" in loose:
        whole = loose["all"]
        rows = split_rows(tables["all"], config, seed, ids if watched and together else None)
        loose = {part: whole.select(indices) for part, indices in rows.items()}
        ids = ids[np.concatenate(list(rows.values()))] if watched else ids
        cure = "" if config.split_column else ", keep them in one part with data.duplicates=together"
    else:
        together, cure = False, ""
    if watched and not (together and not config.split_column):
        refuse_repeated(list(loose.values()), ids, cure)
    return loose


def _say_empty(parts: Mapping[str, Part], config: DataConfig) -> None:
    """A part that was to be drawn and got no row."""
    if config.split_column or not set(parts) >= set(PARTS):
        return
    for name, share in zip(PARTS, config.split, strict=True):
        if share and not len(parts[name]):
            say(
                f"{parts['train'].source}: the {name} part is empty, too few rows or groups for "
                f"data.split={list(config.split)}"
            )


def _label_space(train: Part, ranks: RanksConfig) -> Ranks:
    """The ranks, which the training labels make use of.

    Raises:
        ValueError: given ranks of which the labels cover a small part, with ranks that would fit.
    """
    space = ranks.build(train.values.tolist())
    low, high = float(train.values.min()), float(train.values.max())
    share = (high - low) / (space.values[-1] - space.values[0])
    if share < NARROWEST and len(train) >= ENOUGH and not ranks.unused:
        distinct = np.unique(train.values)
        cure = "leave ranks.values, low, high and num out"
        if 2 <= len(distinct) <= 30:
            cure = f"ranks.values=[{', '.join(f'{value:g}' for value in distinct)}]"
        raise ValueError(
            f"{train.source}: the training labels go from {low:g} to {high:g}, the {len(space)} ranks from "
            f"{space.values[0]:g} to {space.values[-1]:g}: they are of something else. {cure} fits these labels; "
            "ranks.unused=true keeps the ranks"
        )
    return space


def _ranks_of(part: Part, space: Ranks, ranks: RanksConfig) -> np.ndarray:
    try:
        found = space.rank_of(part.values, part.row_names()).numpy()
    except ValueError as error:
        if ranks.given_values() is not None:
            raise
        every = np.union1d(part.values, space.values)
        cure = f"ranks.low, high and num, such as from {every[0]:g} to {every[-1]:g},"
        if len(every) <= 30:
            cure = f"ranks.values=[{', '.join(f'{value:g}' for value in every)}]"
        raise ValueError(f"{error}; the ranks are the distinct training labels, {cure} says others") from None
    moved = np.flatnonzero(~np.isin(part.values, space.values))
    if ranks.given_values() is None and len(moved):
        first = moved[0]
        say(
            f"{part.place(int(first))}: label {part.values[first]:g} is none of the training labels and takes the "
            f"nearest, {space.name(int(found[first]))}, as {len(moved)} of {len(part)} do; ranks.values says others"
        )
    return found


def _part(table: Table, values: np.ndarray, config: DataConfig, root: str) -> Part:
    """Paths checked to be files under the root; ranks are filled in once the label space is known."""
    rows, column = table.rows, table.column(config.image_column, "data.image_column")
    feature = rows.features[column]
    if isinstance(feature, datasets.Image):
        rows = rows.cast_column(column, datasets.Image(decode=False))
    names = RowNames(np.arange(len(rows)), lines=table.lines, places=table.places)
    if (
        isinstance(feature, datasets.Image | dict)
        and config.source == "table"
        and (paths := _stored_paths(table, rows, column))
    ):
        names = RowNames(names.numbers, paths, config.suffix, table.lines, table.places)
    if isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string"):
        names = RowNames(names.numbers, arrow_column(rows, column), config.suffix, table.lines, table.places)
    cache = ImageCache(config.cache_mb << 20, len(rows))
    ranks = np.zeros(len(rows), dtype=np.int64)
    formats = read_formats(config.extra_formats)
    part = Part(rows, column, values, names, ranks, root, table.source, formats, cache)
    if names.paths is not None and int(os.environ.get("RANK", "0")) == 0:  # a million look-ups take seconds
        _check_paths(part, config)
    return part


def _stored_paths(table: Table, rows: datasets.Dataset, column: str) -> pa.ChunkedArray | None:
    """The paths of a column of pictures that holds no bytes; None where it holds them.

    Raises:
        ValueError: some rows have bytes, and some none.
    """
    cells = arrow_column(rows, column)
    if not (pa.types.is_struct(cells.type) and {"bytes", "path"} <= {field.name for field in cells.type}):
        return None
    lacking = pc.is_null(pc.struct_field(cells, "bytes")).to_numpy(zero_copy_only=False).astype(bool)
    if lacking.any() and not lacking.all():
        row = int(np.flatnonzero(lacking)[0])
        raise ValueError(f"{table.place(row)}: column {column!r} holds no picture, only its path, unlike others")
    return pc.struct_field(cells, "path") if lacking.any() else None


def _check_paths(part: Part, config: DataConfig) -> None:
    """Every path names a file, under `data.root` where one is given.

    Raises:
        ValueError: an empty path, or one that leaves the root; FileNotFoundError: no such files.
    """
    root = os.path.realpath(config.root) if config.root and not config.outside_root else ""
    real = lru_cache(maxsize=4096)(os.path.realpath)
    missing = 0
    first: list[int] = []
    for index, name in enumerate(part.names):
        if not name or name == "None" or "\n" in name or "\0" in name:
            raise ValueError(f"{part.place(index)}: {name!r} in column {part.image_column!r} is no path of a picture")
        path = os.path.join(part.root, name)
        if root and leaves(path, root, real):
            raise ValueError(f"{part.place(index)}: leaves data.root={config.root}; data.outside_root=true allows that")
        if not os.path.isfile(path):
            missing += 1
            first = [*first, index][:3]
    if missing:
        shown = "; ".join(part.names.place(index) for index in first)
        raise FileNotFoundError(
            f"{part.source}: {missing} of {len(part)} images do not exist under {part.root!r}: "
            f"{shown}{_near(part, first)}"
        )


def _near(part: Part, missing: list[int]) -> str:
    """A hint where the files are there with an ending that the table leaves out."""
    path = os.path.join(part.root, part.names[missing[0]])
    endings = [*IMAGE_ENDINGS, *(ending.upper() for ending in IMAGE_ENDINGS)]
    found = [ending for ending in endings if os.path.isfile(path + ending)]
    return f"; data.suffix={found[0]} would find them" if found else ""
