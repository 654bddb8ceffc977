"""From a configuration to the tables of its parts: gauges, tables of paths, a folder for every label, the hub."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import datasets
import datasets.packaged_modules
import numpy as np

from ordinalclip.config import DataConfig
from ordinalclip.data.parts import ALIASES, PARTS, part_called
from ordinalclip.data.tables import Table, read_table
from ordinalclip.files import content_digest
from ordinalclip.gauges import make_gauges
from ordinalclip.images import FOREIGN_ENDINGS, IMAGE_ENDINGS


def read_tables(config: DataConfig, seed: int) -> dict[str, Table]:
    """The tables of train, validation and test, or of "all", which is to be split.

    Raises:
        FileNotFoundError: what is named is not there; ValueError: it cannot be read, or was in memory.
    """
    if config.source == "memory":
        raise ValueError(
            "the data was handed over in memory (data.source=memory): hand it over again, in Python, as parts="
        )
    if config.source == "gauges":
        return _gauges(config, seed)
    if config.source == "folder":
        return _folders(config)
    if config.source == "hub":
        return _hub(config)
    if config.table:
        return {"all": read_table(_under(config.root, config.table), config)}
    given = {"train": config.train_table, "validation": config.validation_table, "test": config.test_table}
    return {part: read_table(_under(config.root, table), config) for part, table in given.items() if table}


def root_of(config: DataConfig) -> str:
    """The folder that image paths start from: `data.root`, else that of the table."""
    return config.root or (str(Path(config.table or config.train_table).parent) if config.source == "table" else "")


def _under(root: str, name: str) -> Path:
    if root and not Path(root).is_dir():
        raise FileNotFoundError(f"data.root={root!r}: no such folder")
    path = Path(root) / name
    if root and not path.is_file() and Path(name).is_file():
        raise FileNotFoundError(
            f"{path}: no such table; tables are looked for under data.root, write {Path(name).resolve()} for that here"
        )
    plain = Path(os.path.normpath(path))
    return plain if plain.is_file() and path.is_file() and plain.samefile(path) else path


def _gauges(config: DataConfig, seed: int) -> dict[str, Table]:
    """Test images come first in the generator's order, so that the number of training images does not move them."""
    config_columns = (config.image_column, config.label_column)
    if config_columns != ("image", "label"):
        raise ValueError(f"gauges have the columns image and label, got {config_columns}")
    total = config.num_test + config.num_validation + config.num_train
    rows = make_gauges(config.kinds, -(-total // len(config.kinds)), seed=seed, style=config.style)
    rows = rows.rename_column("value", "label")
    rows = rows.select(_interleaved(len(rows), len(config.kinds))[:total])
    bounds = np.cumsum([0, config.num_test, config.num_validation, config.num_train])
    parts = ("test", "validation", "train")
    return {name: Table(rows.select(range(bounds[i], bounds[i + 1])), f"{name} part") for i, name in enumerate(parts)}


def _interleaved(total: int, kinds: int) -> np.ndarray:
    return np.arange(total).reshape(kinds, -1).T.flatten()


def _folders(config: DataConfig) -> dict[str, Table]:
    """A folder for every label, below folders for the parts where there are some."""
    root = Path(config.root)
    if not root.is_dir():
        raise FileNotFoundError(f"data.root={config.root!r}: no such folder")
    inside = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    parts = {part_called(path.name): path for path in inside}
    if len(parts) < len(inside):
        raise ValueError(f"{root}: two folders are the same part: {', '.join(path.name for path in inside)}")
    if not (set(parts) <= set(PARTS) and "train" in parts):
        parts = {"all": root}
    return {name: _labelled_folders(root, folder, config) for name, folder in parts.items()}


def _labelled_folders(root: Path, folder: Path, config: DataConfig) -> Table:
    labels = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if loose := [path.name for path in folder.iterdir() if path.suffix.lower() in IMAGE_ENDINGS]:
        raise ValueError(
            f"{folder}: pictures lie beside the folders for the labels, {loose[0]} for one; "
            "a table that names them is data.source=table"
        )
    rows: dict[str, list[str]] = {config.image_column: [], config.label_column: []}
    for label in labels:
        below = [path for path in label.iterdir() if path.is_dir() and part_called(path.name) in PARTS]
        if below:
            raise ValueError(f"{below[0]}: a part below a label; folders of the parts hold those of the labels")
        files = sorted(path for path in label.rglob("*") if path.suffix.lower() in IMAGE_ENDINGS + FOREIGN_ENDINGS)
        for path in files:
            if not str(path).isprintable() or any("\ud800" <= each <= "\udfff" for each in str(path)):
                raise ValueError(f"{str(path)!r}: a name with characters that are no text; rename it")
        if not files:
            raise ValueError(f"{label}: no pictures in this folder; endings searched: {', '.join(IMAGE_ENDINGS)}")
        rows[config.image_column] += [path.relative_to(root).as_posix() for path in files]
        rows[config.label_column] += [label.name] * len(files)
    if not labels:
        raise ValueError(f"{folder}: has no folders, one for every label")
    return Table(datasets.Dataset.from_dict(rows), str(folder))


def _hub(config: DataConfig) -> dict[str, Table]:
    """What `datasets` loads; of a local folder by its content, and never by running a script in it."""
    options: dict[str, str] = {}
    folder = Path(config.hub)
    if config.hub in datasets.packaged_modules._PACKAGED_DATASETS_MODULES and not folder.is_dir():
        raise ValueError(f"data.hub={config.hub} is a kind of file, and no data set; data.source=table reads tables")
    if folder.is_dir():
        if scripts := sorted(path.name for path in folder.glob("*.py")):
            raise ValueError(f"{folder}: holds {scripts[0]}; scripts of data sets are not run: write a table instead")
        described = sorted(
            path for path in folder.rglob("*") if path.suffix.lower() not in IMAGE_ENDINGS and path.is_file()
        )
        names = "\n".join(sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")))
        digest = content_digest(described) + names
        options["cache_dir"] = str(Path(datasets.config.HF_DATASETS_CACHE) / "ordinalclip" / hash_text(digest))
    if config.hub_revision:
        options["revision"] = config.hub_revision
    try:
        loaded = datasets.load_dataset(config.hub, config.hub_config or None, **options)
    except Exception as error:  # of datasets, huggingface_hub, requests, pyarrow
        cause: BaseException = error.__cause__ or error  # datasets says what it was doing, its cause what went wrong
        reason = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        raise ValueError(f"data.hub={config.hub}: cannot be loaded ({reason})") from error
    splits = {part_called(part): rows for part, rows in loaded.items()}
    if config.hub_split:
        if config.hub_split not in loaded:
            raise ValueError(f"data.hub_split={config.hub_split!r}: {config.hub} has {', '.join(loaded)}")
        splits = {"train": loaded[config.hub_split]}
    elif len(splits) < len(loaded) or not set(splits) <= set(PARTS):
        raise ValueError(
            f"{config.hub}: splits {', '.join(loaded)}; allowed are {', '.join((*PARTS, *ALIASES))}, each once; "
            "data.hub_split takes one of them"
        )
    whole = set(splits) == {"train"}
    return {"all" if whole else name: Table(rows, config.hub) for name, rows in splits.items()}


def hash_text(text: str) -> str:
    """A short name for a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]
