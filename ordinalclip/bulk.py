"""Bulk prediction: any number of pictures, on any number of processes, into a folder of Parquet files.

The rows are cut into blocks of a fixed number, whatever the number of processes; a block becomes a file, which is there
whole or not at all. Whoever starts again does what is missing. Nothing of a block that is done stays in memory.

part-000012.parquet   the rows of block 12: the columns of the data, the answers, the row's number
_predictions.json     of what they are the answers: model, data, block, options; written first
.predict.lock         while somebody writes: who

Names that begin with _ or . are passed over by whatever reads the folder as one data set.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import Accelerator
from accelerate.utils import gather_object

from ordinalclip.answers import Answers, Errors, answer
from ordinalclip.data.pictures import PictureRows
from ordinalclip.files import ASIDE, content_digest, delete, lock, read_json_object, whole, write_json
from ordinalclip.model import WEIGHTS, OrdinalModel
from ordinalclip.processing import NAME, find_file
from ordinalclip.progress import Progress
from ordinalclip.quoting import FORMULA, HARMLESS
from ordinalclip.ranks import Ranks
from ordinalclip.signals import Preempted
from ordinalclip.training.distributed import from_main

MANIFEST, LOCK = "_predictions.json", ".predict.lock"
PART = re.compile(r"part-(\d{6,})\.parquet")
BLOCK = 4096  # rows
WAYS = "--overwrite replaces them, another --out leaves them alone"
KEY = b"ordinalclip"  # of a part's metadata: the fingerprint of what it belongs to


@dataclass(frozen=True)
class Options:
    """How pictures are answered.

    Attributes:
        batch_size: pictures at once in one process.
        errors: see `answer`.
        block: rows of a part.
        prefix: begins the names of the columns that are added.
        interval: level of the intervals that are given, too, see `OrdinalModel.interval`.
    """

    batch_size: int = 32
    errors: Errors = "keep"
    block: int = BLOCK
    prefix: str = ""
    interval: float | None = None


@dataclass(frozen=True)
class Done:
    """What was done.

    Attributes:
        rows, errors: pictures in all, and those that could not be read.
        now: pictures of this call; what others have done before is not among them.
        seconds: of this call; processor_seconds: of all its processes.
        processes: their number.
    """

    rows: int
    errors: int
    now: int
    seconds: float
    processor_seconds: float
    processes: int = 1

    def __str__(self) -> str:
        said = f"{self.rows:,} picture{'s' * (self.rows != 1)}, {self.errors:,} could not be read"
        if self.now < self.rows:
            said += f"; {self.rows - self.now:,} were there already"
        if not self.now:
            return said
        rates = (
            f"{self.now / self.seconds:,.1f} images/s, {self.now / self.processor_seconds:,.1f} per processor second"
        )
        return f"{said}; {rates}, {self.processes} process{'es' * (self.processes > 1)}"


class Clock:
    """Seconds of the wall and of the processor, decoding processes that have ended included, since it was made."""

    def __init__(self) -> None:
        self.began = time.monotonic(), _processor_seconds()

    def read(self) -> tuple[float, float]:
        return max(time.monotonic() - self.began[0], 1e-9), max(_processor_seconds() - self.began[1], 1e-9)


def _processor_seconds() -> float:
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def answers_to(
    model: OrdinalModel, rows: PictureRows, options: Options, blocks: Sequence[int]
) -> Generator[Answers, None, None]:
    """The answers to some blocks of rows, a batch at a time; no batch reaches from one block into another."""
    batches = (
        list(range(begin, min(begin + options.batch_size, end)))
        for block in blocks
        for first, end in [_bounds(rows, options, block)]
        for begin in range(first, end, options.batch_size)
    )
    about = rows.config.workers, rows.formats, options.errors, rows.places
    ahead, level = rows.config.prefetch, options.interval
    return answer(model, rows, options.batch_size, *about, batches=batches, prefetch=ahead, interval=level)


def table_of(rows: PictureRows, begin: int, answers: Answers, ranks: Ranks, prefix: str = "") -> pa.Table:
    """Columns of the data, answers, and the number of the row, from 1.

    Raises:
        ValueError: a column of the data has the name of one of the answers.
    """
    table = rows.columns(begin, begin + len(answers))
    added = answers.to_arrow(ranks).append_column(
        "row", pa.array(range(begin + 1, begin + 1 + len(answers)), pa.int64())
    )
    for name in added.column_names:
        if prefix + name in table.column_names:
            raise ValueError(
                f"{rows.name}: has a column {prefix + name!r} already; --prefix TEXT puts a text before the names "
                f"of what is added ({', '.join(added.column_names)})"
            )
        table = table.append_column(prefix + name, added[name])
    return table


def check_options(rows: PictureRows, model: OrdinalModel, options: Options) -> None:
    """Raises:
    ValueError: see `table_of` and `OrdinalModel.interval`; before anything is computed."""
    ranks, ends = model.config.label_space, None
    if options.interval is not None:
        model.check_interval(options.interval)
        ends = np.zeros((1, 2))
    one = Answers(np.zeros(1), np.zeros(1, np.int64), np.zeros((1, len(ranks)), np.float32), [None], ends)
    table_of(rows, 0, one, ranks, options.prefix)


def _bounds(rows: PictureRows, options: Options, block: int) -> tuple[int, int]:
    return block * options.block, min((block + 1) * options.block, len(rows))


# ---- a folder of parts


def predict_to_folder(
    model: OrdinalModel,
    name: str,
    rows: PictureRows,
    out: Path,
    options: Options,
    accelerator: Accelerator,
    overwrite: bool = False,
    quiet: bool = False,
) -> Done:
    """Answer all rows that are not answered yet, shared over the processes, into a folder.

    Args:
        model: on the accelerator's device.
        name: its folder or name on the hub.
        overwrite: what other rows or another model have left there is deleted.

    Returns:
        what was done, the same on every process.

    Raises:
        FolderInUse: another job writes there; ValueError: it holds answers of something else, or damaged ones, or see
            `table_of` and `answer`; OSError: it cannot be written to; Preempted: told to stop, with how far it came.
    """
    with ExitStack() as stack:

        def begin() -> tuple[str, list[int]]:
            check_options(rows, model, options)
            if out.exists() and not out.is_dir():
                raise ValueError(
                    f"{out}: is a file, and no folder for parts; one file is called .parquet, .csv or .jsonl"
                )
            stack.enter_context(lock(out / LOCK))
            fingerprint = _claim(out, manifest_of(name, model, rows, options), overwrite)
            return fingerprint, _missing(out, rows, options, fingerprint)

        fingerprint, missing = from_main(accelerator, begin)
        clock = Clock()
        try:
            mine = missing[accelerator.process_index :: accelerator.num_processes]
            _write_blocks(model, rows, out, options, mine, fingerprint, quiet or not accelerator.is_main_process)
            _seconds, processor = clock.read()
            spent = sum(gather_object([processor]))
        except (KeyboardInterrupt, Preempted) as stopped:
            number = stopped.number if isinstance(stopped, Preempted) else signal.SIGINT
            raise Preempted(_told(out, rows, options), number) from stopped
        seconds, _ = clock.read()

        def end() -> Done:
            if left := _missing(out, rows, options, fingerprint):
                raise ValueError(
                    f"{out}: {len(left)} parts are missing, {_name(left[0])} first; do all processes see it?"
                )
            now = sum(end - begin for begin, end in (_bounds(rows, options, block) for block in missing))
            broken = sum(_errors(out / _name(block), options) for block in range(_number(rows, options)))
            return Done(len(rows), broken, now, seconds, spent, accelerator.num_processes)

        return from_main(accelerator, end)


def _write_blocks(
    model: OrdinalModel,
    rows: PictureRows,
    out: Path,
    options: Options,
    blocks: Sequence[int],
    fingerprint: str,
    quiet: bool,
) -> None:
    found = answers_to(model, rows, options, blocks)
    total = sum(end - begin for begin, end in (_bounds(rows, options, block) for block in blocks))
    progress: Progress = Progress(None, "predicting", total=total, unit="images", quiet=quiet)
    writer = f"{socket.gethostname()}-{os.getpid()}-"  # who was left over by a launch that was killed may still write
    try:
        for block in blocks:
            begin, end = _bounds(rows, options, block)
            pieces: list[Answers] = []
            while sum(map(len, pieces)) < end - begin:
                pieces.append(next(found))
                progress.advance(len(pieces[-1]))
            table = table_of(rows, begin, Answers.joined(pieces), model.config.label_space, options.prefix)
            with whole(out / _name(block), writer) as aside:
                pq.write_table(table.replace_schema_metadata({KEY: fingerprint}), aside)
    finally:
        found.close()  # and with it the processes that decode
        progress.close()


def manifest_of(name: str, model: OrdinalModel, rows: PictureRows, options: Options) -> dict[str, Any]:
    """Of what a folder holds the answers: what a later call is compared with, and what its readers may want."""
    files = [find_file(name, file, {}) for file in ("config.json", WEIGHTS, NAME)]
    config = rows.config
    return {
        "model": {"name": name, "sha256": content_digest(files)},
        "data": {"name": rows.name, "rows": len(rows), "sha256": rows.digest()},
        "block": options.block,
        "options": {
            "prefix": options.prefix,
            **({} if options.interval is None else {"interval": options.interval}),
            "root": rows.root and os.path.realpath(rows.root),
            **{key: getattr(config, key) for key in ("suffix", "extra_formats", "outside_root")},
        },
        "decoding": model.config.decoding,
        "ranks": model.config.label_space.to_dict(),
    }


def _claim(out: Path, manifest: dict[str, Any], overwrite: bool) -> str:
    """Write what the folder is going to hold, or see that it is what it holds; returns its fingerprint."""
    manifest = json.loads(json.dumps(manifest))
    path = out / MANIFEST
    parts = [each for each in out.iterdir() if PART.fullmatch(each.name)]
    for each in out.glob(f"{ASIDE}*"):  # of a job that was killed
        delete(each)
    before = read_json_object(path) if path.is_file() and not overwrite else None
    if before is None and parts and not overwrite:
        raise ValueError(f"{out}: holds {parts[0].name}, but no {MANIFEST} that says of what; {WAYS}")
    if before is None:
        for each in parts:
            delete(each)
        write_json(path, manifest)
    elif differences := _differences(before, manifest):
        raise ValueError(f"{out}: holds predictions of something else: {'; '.join(differences)}; {WAYS}")
    compared = {key: value for key, value in _compared(manifest).items() if not key.endswith(".name")}
    return hashlib.sha256(json.dumps(compared, sort_keys=True).encode()).hexdigest()


def _compared(manifest: dict[str, Any]) -> dict[str, Any]:
    flat = {f"{key}.{name}": manifest[key].get(name) for key in ("model", "data") for name in ("name", "sha256")}
    return {**flat, "block": manifest["block"], **manifest["options"]}


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs, in words."""
    try:
        old, new = _compared(before), _compared(now)
    except (KeyError, TypeError, AttributeError):
        return [f"{MANIFEST} is damaged"]
    found = []
    for what in ("model", "data"):
        if old[f"{what}.sha256"] != new[f"{what}.sha256"]:
            other = old[f"{what}.name"]
            found.append(
                f"another {what}, {other}" if other != new[f"{what}.name"] else f"{what} {other} as it was before"
            )
    rest = [key for key in {**old, **new} if "." not in key and old.get(key) != new.get(key)]
    return found + [f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in rest]


def _number(rows: PictureRows, options: Options) -> int:
    return -(-len(rows) // options.block)


def _name(block: int) -> str:
    return f"part-{block:06d}.parquet"


def _missing(out: Path, rows: PictureRows, options: Options, fingerprint: str) -> list[int]:
    """Blocks without a part.

    Raises:
        ValueError: a part that is damaged, or of something else.
    """
    missing = []
    for block in range(_number(rows, options)):
        path = out / _name(block)
        if not path.is_file():
            missing.append(block)
            continue
        try:
            about = pq.read_metadata(path)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{path}: damaged ({str(error).splitlines()[0]}); delete it, and it is written anew"
            ) from error
        begin, end = _bounds(rows, options, block)
        if about.num_rows != end - begin or (about.metadata or {}).get(KEY) != fingerprint.encode():
            raise ValueError(f"{path}: is no part of these predictions; delete it, and it is written anew")
    return missing


def _errors(part: Path, options: Options) -> int:
    errors = pq.read_table(part, columns=[f"{options.prefix}error"])[0]
    return len(errors) - errors.null_count


def _told(out: Path, rows: PictureRows, options: Options) -> str:
    done = [block for block in range(_number(rows, options)) if (out / _name(block)).is_file()]
    count = sum(end - begin for begin, end in (_bounds(rows, options, block) for block in done))
    return f"told to stop; {count:,} of {len(rows):,} rows are done, the same command goes on"


# ---- one file, for small sets


def predict_to_file(
    model: OrdinalModel, rows: PictureRows, out: Path, options: Options, overwrite: bool = False, quiet: bool = False
) -> Done:
    """Answer all rows and write one file: .parquet, .csv or .jsonl. All of it is in memory until then.

    Cells of a CSV that a spreadsheet would run as a formula begin with an apostrophe; the others hold what they hold.

    Raises:
        ValueError: another ending, or see `table_of` and `answer`; FileExistsError: the file is there;
        OSError: it cannot be written.
    """
    write = WRITERS.get(out.suffix.lower())
    if write is None:
        raise ValueError(f"{out}: one file of predictions ends in {', '.join(WRITERS)}")
    if out.is_dir():
        raise ValueError(f"{out}: is a folder")
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out}: is there already; --overwrite replaces it")
    check_options(rows, model, options)
    clock = Clock()
    progress: Progress = Progress(None, "predicting", total=len(rows), unit="images", quiet=quiet)
    pieces: list[pa.Table] = []
    errors = begin = 0
    for found in answers_to(model, rows, options, range(_number(rows, options))):
        pieces.append(table_of(rows, begin, found, model.config.label_space, options.prefix))
        begin += len(found)
        errors += sum(error is not None for error in found.errors)
        progress.advance(len(found))
    progress.close()
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole(out) as aside:
        write(pa.concat_tables(pieces), aside)
    return Done(len(rows), errors, len(rows), *clock.read())


def _write_csv(table: pa.Table, path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([_cell(name) for name in table.column_names])
        writer.writerows([_cell(row[name]) for name in table.column_names] for row in _plain_rows(table))


def _cell(value: Any) -> Any:
    if isinstance(value, str):
        return f"'{value}" if value.startswith(FORMULA) and not HARMLESS.fullmatch(value) else value
    return json.dumps(value) if isinstance(value, list | dict) else value


def _write_json_lines(table: pa.Table, path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in _plain_rows(table))


def _plain_rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    for batch in table.to_batches(max_chunksize=1000):
        yield from (_plain(row) for row in batch.to_pylist())


def _plain(value: Any) -> Any:
    """What JSON has: nothing for what is no number, text for times and their kin."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


WRITERS: dict[str, Callable[[pa.Table, Path], None]] = {
    ".parquet": lambda table, path: pq.write_table(table, path),
    ".csv": _write_csv,
    ".jsonl": _write_json_lines,
}
