"""Data in: gauges, tables of image paths or `datasets` -> three parts with images, labels and ranks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from PIL import Image

from ordinalclip.config import DataConfig, RanksConfig
from ordinalclip.gauges import make_gauges
from ordinalclip.images import BrokenImageError, PixelSpec, load_image, resize
from ordinalclip.progress import Progress
from ordinalclip.ranks import Ranks

PARTS = ("train", "validation", "test")


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
    """

    def __init__(self, numbers: np.ndarray, paths: pa.ChunkedArray | None = None):
        self.numbers, self.paths = numbers, paths

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            numbers = self.numbers[index]
            return [f"row {n + 1}" for n in numbers.tolist()] if self.paths is None else self._paths_of(numbers)
        number = int(self.numbers[index])
        return f"row {number + 1}" if self.paths is None else str(self.paths[number].as_py())

    def _paths_of(self, numbers: np.ndarray) -> list[str]:
        assert self.paths is not None
        return [str(path) for path in self.paths.take(pa.array(numbers)).to_pylist()]


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
        cache: decoded and resized images.
    """

    rows: datasets.Dataset
    image_column: str
    values: np.ndarray
    names: RowNames
    ranks: np.ndarray
    root: str = ""
    source: str = ""
    cache: ImageCache = field(default_factory=lambda: ImageCache(0, 0), compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    def row_names(self) -> Iterator[str]:
        """What to call each row in an error that leaves the part."""
        return (f"{self.source}, {name}" for name in self.names)

    def image(self, index: int) -> Image.Image:
        """The decoded RGB image of a row.

        Raises:
            BrokenImageError: naming the row.
        """
        source = self.rows[int(index)][self.image_column]
        if isinstance(source, str):
            source = os.path.join(self.root, source)
        return load_image(source, f"{self.source}, {self.names[index]}")

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
            names=RowNames(self.names.numbers[indices], self.names.paths),
            ranks=self.ranks[indices],
            cache=ImageCache(self.cache.budget, len(indices)),
        )


@dataclass(frozen=True)
class Parts:
    """Training, validation and test part and their label space; validation and test may be absent."""

    train: Part
    validation: Part | None
    test: Part | None
    ranks: Ranks


def load_parts(config: DataConfig, ranks: RanksConfig, seed: int) -> Parts:
    """Read, split and check the data of a run.

    Args:
        config: where the data is and how it is split.
        ranks: the label space; by default the distinct labels of the training part.
        seed: the run's seed, used for the split unless `config.split_seed` is set.

    Raises:
        FileNotFoundError: a table or images that do not exist.
        ValueError: missing columns, labels that are no numbers or outside the ranks, empty parts; the message names
            the file and row.
    """
    seed = seed if config.split_seed is None else config.split_seed
    if config.source == "gauges":
        raw = _gauges(config, seed)
    elif config.source == "hub":
        loaded = datasets.load_dataset(config.hub)
        alias = {"val": "validation", "valid": "validation", "dev": "validation"}
        raw = {alias.get(part, part): rows for part, rows in loaded.items()}
        if not set(raw) <= set(PARTS):
            raise ValueError(f"{config.hub}: splits {', '.join(loaded)}; allowed are {', '.join((*PARTS, *alias))}")
        raw = {"all": raw["train"]} if set(raw) == {"train"} else raw
    elif config.table:
        raw = {"all": _read_table(_under(config.root, config.table), config)}
    else:
        given = {"train": config.train_table, "validation": config.validation_table, "test": config.test_table}
        raw = {part: _read_table(_under(config.root, table), config) for part, table in given.items() if table}
    return make_parts(raw, config, ranks, seed)


def make_parts(raw: dict[str, datasets.Dataset], config: DataConfig, ranks: RanksConfig, seed: int) -> Parts:
    """`Parts` from datasets in memory: {"train": ..., "validation": ..., "test": ...}, or {"all": ...} to be split.

    Images may be of any kind that `load_image` takes; labels are numbers.
    """
    root = config.root or (str(Path(config.table or config.train_table).parent) if config.source == "table" else "")
    loose = {name: _part(rows, config, name, root) for name, rows in raw.items()}
    if "all" in loose:
        loose = {part: loose["all"].select(rows) for part, rows in split_rows(loose["all"], config, seed).items()}
    if "train" not in loose or len(loose["train"]) == 0:
        raise ValueError(f"no training rows; parts found: { {name: len(part) for name, part in loose.items()} }")
    label_space = ranks.build(loose["train"].values.tolist())
    named = {
        name: replace(part, ranks=label_space.rank_of(part.values, part.row_names()).numpy())
        for name, part in loose.items()
        if len(part)
    }
    draw = seed if config.draw_seed is None else config.draw_seed
    if config.shots is not None:
        named["train"] = few_shot(named["train"], config.shots, draw)
    if config.train_share < 1:
        named["train"] = thinned(named["train"], config.train_share, draw)
    if config.shift_ranks is not None:
        named["train"] = label_shift(named["train"], config.shift_ranks, config.shift_keep, draw)
    return Parts(named["train"], named.get("validation"), named.get("test"), label_space)


def few_shot(part: Part, shots: int, seed: int) -> Part:
    """At most `shots` random rows of every rank, drawn by their own generator."""
    rng = np.random.default_rng([seed, 1])
    chosen = [rng.permutation(np.flatnonzero(part.ranks == rank))[:shots] for rank in np.unique(part.ranks)]
    return part.select(np.sort(np.concatenate(chosen)))


def thinned(part: Part, share: float, seed: int) -> Part:
    """A share of the rows of every rank, at least one, drawn by their own generator.

    The same seed draws smaller shares from larger ones.
    """
    kept = _drawn(part, np.unique(part.ranks), share, np.random.default_rng([seed, 3]))
    return part.select(np.sort(np.concatenate(kept)))


def label_shift(part: Part, num_ranks: int, keep: float, seed: int) -> Part:
    """Of the `num_ranks` most populated ranks only a share `keep` of the rows, at least one, drawn at random.

    The distribution-shift protocol of OrdinalCLIP (section 4.4), with a generator of its own.
    """
    rng = np.random.default_rng([seed, 2])
    present, counts = np.unique(part.ranks, return_counts=True)
    reduced = present[np.argsort(-counts, kind="stable")[:num_ranks]]
    untouched = np.flatnonzero(~np.isin(part.ranks, reduced))
    return part.select(np.sort(np.concatenate([untouched, *_drawn(part, reduced, keep, rng)])))


def _drawn(part: Part, ranks: np.ndarray, share: float, rng: np.random.Generator) -> list[np.ndarray]:
    """Of each of some ranks a random share of its rows, at least one."""
    drawn = []
    for rank in ranks:
        members = rng.permutation(np.flatnonzero(part.ranks == rank))
        drawn.append(members[: max(1, round(share * len(members)))])
    return drawn


def split_rows(part: Part, config: DataConfig, seed: int) -> dict[str, np.ndarray]:
    """Row indices of train, validation and test.

    By `split_column` if given; else at random in the shares `split`, stratified by columns or keeping groups whole.
    """
    if config.split_column:
        given = np.asarray([str(value) for value in part.rows[_column(part.rows, config.split_column)]])
        unknown = sorted(set(given.tolist()) - set(PARTS))
        if unknown:
            raise ValueError(f"column {config.split_column!r} holds {unknown}; allowed are {', '.join(PARTS)}")
        return {name: np.flatnonzero(given == name) for name in PARTS}
    rng = np.random.default_rng([seed, 0])
    if config.group:
        _, group = np.unique(_as_strings(part, config.group), return_inverse=True)
        chunks = _cut(rng.permutation(group.max() + 1), config.split)
        return {name: np.flatnonzero(np.isin(group, chunk)) for name, chunk in zip(PARTS, chunks, strict=True)}
    strata = np.zeros(len(part), dtype=np.int64)
    for column in config.stratify:
        _, code = np.unique(_as_strings(part, column), return_inverse=True)
        strata = strata * (code.max() + 1) + code
    pieces = [_cut(rng.permutation(np.flatnonzero(strata == s)), config.split) for s in np.unique(strata)]
    return {name: np.sort(np.concatenate([p[i] for p in pieces])) for i, name in enumerate(PARTS)}


def check_images(part: Part, quiet: bool = False, title: str = "checking") -> list[str]:
    """Decode every image of a part and say which are broken: one line each, with file or row and reason."""
    broken = []
    for index in Progress(range(len(part)), title, unit="images", quiet=quiet):
        try:
            part.image(index)
        except BrokenImageError as error:
            broken.append(str(error))
    return broken


def _cut(rows: np.ndarray, shares: tuple[float, ...]) -> list[np.ndarray]:
    bounds = np.rint(np.cumsum(shares)[:-1] * len(rows)).astype(int)
    return np.split(rows, bounds)


def _as_strings(part: Part, column: str) -> np.ndarray:
    return np.asarray([str(value) for value in part.rows[_column(part.rows, column)]])


def _column(rows: datasets.Dataset, name: str) -> str:
    if name not in rows.column_names:
        raise ValueError(f"column {name!r} is missing; the data has {', '.join(rows.column_names)}")
    return name


def _under(root: str, name: str) -> Path:
    path = Path(root) / name
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such table (data.root {root!r})")
    return path


def _gauges(config: DataConfig, seed: int) -> dict[str, datasets.Dataset]:
    """Test images come first in the generator's order, so that the number of training images does not move them."""
    config_columns = (config.image_column, config.label_column)
    if config_columns != ("image", "label"):
        raise ValueError(f"gauges have the columns image and label, got {config_columns}")
    total = config.num_test + config.num_validation + config.num_train
    rows = make_gauges(config.kinds, -(-total // len(config.kinds)), seed=seed).rename_column("value", "label")
    rows = rows.select(_interleaved(len(rows), len(config.kinds))[:total])
    bounds = np.cumsum([0, config.num_test, config.num_validation, config.num_train])
    parts = ("test", "validation", "train")
    return {name: rows.select(range(bounds[i], bounds[i + 1])) for i, name in enumerate(parts)}


def _interleaved(total: int, kinds: int) -> np.ndarray:
    return np.arange(total).reshape(kinds, -1).T.flatten()


def _read_table(path: Path, config: DataConfig) -> datasets.Dataset:
    if path.suffix in (".parquet", ".pq"):
        return datasets.Dataset.from_parquet(str(path))
    if path.suffix in (".csv", ".tsv"):
        return datasets.Dataset.from_csv(str(path), sep="\t" if path.suffix == ".tsv" else ",")
    paths, labels = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        words = line.split()
        if not words:
            continue
        try:
            labels.append(float(np.median([float(word) for word in words[1:]])) if words[1:] else float("nan"))
        except ValueError:
            raise ValueError(f"{path}, line {number}: write `path label [label ...]`, got {line!r}") from None
        paths.append(words[0])
    return datasets.Dataset.from_dict({config.image_column: paths, config.label_column: labels})


def _part(rows: datasets.Dataset, config: DataConfig, name: str, root: str) -> Part:
    """Labels checked to be numbers and paths to exist; ranks are filled in once the label space is known."""
    where = {"all": config.table, "train": config.train_table, "validation": config.validation_table}.get(name)
    where = where or config.test_table or config.hub or f"{name} part"
    image_column, label_column = _column(rows, config.image_column), _column(rows, config.label_column)
    feature = rows.features[image_column]
    if isinstance(feature, datasets.Image):
        rows = rows.cast_column(image_column, datasets.Image(decode=False))
    values = _numbers(rows, label_column)
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        row = int(bad[0])
        label = rows[row][label_column]
        raise ValueError(f"{where}, row {row + 1}: label {label!r} in column {label_column!r} is not a number")
    names = RowNames(np.arange(len(rows)))
    if isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string"):
        names.paths = _arrow(rows, image_column)
        missing = _missing_files(root, names)
        if missing:
            shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise FileNotFoundError(
                f"{where}: {len(missing)} of {len(names)} images do not exist under {root!r}: {shown}"
            )
    cache = ImageCache(config.cache_mb << 20, len(rows))
    return Part(rows, image_column, values, names, np.zeros(len(rows), dtype=np.int64), root, where, cache)


def _arrow(rows: datasets.Dataset, column: str) -> pa.ChunkedArray:
    """A column as it lies in the memory-mapped table."""
    return rows.select_columns(column).with_format("arrow")[:][column]


def _numbers(rows: datasets.Dataset, column: str) -> np.ndarray:
    """A column as (N,) float64; NaN for what is no number. Text that spells a number is one."""
    try:
        return _arrow(rows, column).cast(pa.float64()).to_numpy().copy()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        values = np.full(len(rows), np.nan)
        for index, label in enumerate(rows[column]):
            with contextlib.suppress(TypeError, ValueError):
                values[index] = float(label)
        return values


def _missing_files(root: str, names: RowNames) -> list[str]:
    """Paths without a file; one process looks for all, since a million look-ups take seconds."""
    if int(os.environ.get("RANK", "0")):
        return []
    return [name for name in names if not os.path.isfile(os.path.join(root, name))]
