"""What a run folder is: the names in it, who may write, writing whole or not at all, and reading back.

config.yaml           the whole configuration, defaults included
provenance.json       versions, source, command, device, data: where the run comes from
log.jsonl             an entry per optimiser step
checkpoints/          what resuming needs
predictions.parquet   every prediction
model/, model-last/   the chosen step's model, and the last step's when that is another
metrics.json          written last of what counts: a run that has it is finished
diverged.txt          in its place, how a run of a comparison diverged
report.html           and figures/, made of all this
run.lock              while somebody writes: who
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ordinalclip.config import RunConfig, flat_keys, load_config
from ordinalclip.model import OrdinalModel
from ordinalclip.predictions import Predictions

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)
EXECUTION = {  # how a run is executed, not what it computes
    "output_dir",
    "overwrite",
    "data.root",
    "data.workers",
    "data.cache_mb",
    "data.prefetch",
    "train.micro_batch_size",
    "train.resume",
    "train.log_every",
    "train.keep_checkpoints",
    "train.trackers",
    "train.process_group_timeout",
}
SPEC = re.compile(r"((?:open_clip|hf|timm):(?:(?!\.\.)[^/~][^/]*/)?)?(.*)", re.DOTALL)  # family and name, then a path
ASIDE = ".partial-"  # begins the names of what is not written to its end
CHOOSING = "evaluation.decoding"  # by which the best step is chosen; the rest of evaluation can be done again
WAYS = "overwrite=true replaces it, another output_dir leaves it alone"
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class FolderInUse(OSError):
    """Another job writes to this folder; the message names its host, process and start."""


class FolderOccupied(OSError):
    """The folder holds a run that starting anew would delete; the message says which, and both ways on."""


@dataclass(frozen=True)
class State:
    """How far the run in a folder has come.

    Attributes:
        kind: "empty", "interrupted", "diverged" or "finished".
        text: the same in words, for a message.
    """

    kind: str
    text: str = ""


class RunFolder:
    """The folder of one run. Nothing is read or written before it is asked for.

    Args:
        path: the folder; it need not exist.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.provenance = self.path / "provenance.json"
        self.log = self.path / "log.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.predictions = self.path / "predictions.parquet"
        self.model = self.path / "model"
        self.model_last = self.path / "model-last"
        self.metrics = self.path / "metrics.json"
        self.diverged = self.path / "diverged.txt"
        self.report = self.path / "report.html"
        self.figures = self.path / "figures"
        self.trackers = self.path / "ordinalclip"  # what TensorBoard and its kin write, under the project's name
        self.lock = self.path / "run.lock"

    # ---- how far it has come

    @property
    def is_finished(self) -> bool:
        """Whether the run came to its end: metrics.json is written after everything that counts."""
        return self.metrics.is_file() and self.config.is_file()

    def state(self) -> State:
        """What the folder holds."""
        if self.is_finished:
            return State("finished", f"a finished run, written {_when(self.metrics)}")
        if self.diverged.is_file():
            return State("diverged", f"a run that diverged, {_when(self.diverged)}")
        held = (self.config, self.metrics, self.log, self.model, self.model_last, self.predictions)
        saved = self.checkpoints.is_dir() and any(self.checkpoints.iterdir())
        if not saved and not any(path.exists() for path in held):
            return State("empty")
        entries = self.read_log()
        step = f"at step {entries[-1]['step']}" if entries else "before its first step was logged"
        started = f", started {_when(self.config)}" if self.config.is_file() else ""
        return State("interrupted", f"a run that was interrupted {step}{started}")

    def difference(self, config: RunConfig, data: dict[str, Any] | None = None) -> str:
        """In what the run in the folder is another experiment, in words; "" if it is the same.

        Args:
            config: to compare with.
            data: fingerprints of the data to compare with (`provenance.fingerprints`); None: not compared.
        """
        if not self.config.is_file():
            return f"it has no {self.config.name}"
        try:
            saved = load_config(self.config)
        except ValueError as error:
            return str(error)
        if changed := changed_keys(saved.model_dump(mode="json"), config.model_dump(mode="json")):
            return described(changed)
        return "" if data is None else self.data_difference(data)

    def data_difference(self, data: dict[str, Any]) -> str:
        """In what the data is not that of the run, in words; "" if it is the same or not on record."""
        before = self.read_provenance().get("data")
        return "" if before is None else changed_data(before, data)

    def check_may_start(self, config: RunConfig) -> None:
        """Nothing that is there is lost by this run.

        Raises:
            FolderOccupied: the folder holds a run, and the configuration neither resumes nor overwrites it.
            ValueError: it resumes a run that was another experiment, or whose checkpoints are gone.
        """
        state = self.state()
        if state.kind == "empty" or config.overwrite:
            return
        if config.train.resume == "none":
            raise FolderOccupied(f"{self.path} holds {state.text}: train.resume=auto goes on with it, {WAYS}")
        if difference := self.difference(config):
            raise ValueError(f"{self.path}: cannot resume under another configuration: {difference}; {WAYS}")

    def clear(self) -> None:
        """Delete the run, what makes it look whole first; files of other names stay."""
        files = (self.metrics, self.diverged, self.config, self.report, self.provenance, self.log, self.predictions)
        folders = (self.model, self.model_last, self.checkpoints, self.figures, self.trackers)
        for path in (*files, *folders, *self.path.glob(f"{ASIDE}*")):
            delete(path)

    def reopen(self) -> None:
        """The run goes on: it is not finished until it is finished again."""
        for file in (self.metrics, self.diverged, self.report):
            file.unlink(missing_ok=True)

    # ---- who may write

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder within a `with` block; one that is empty in the end is deleted.

        Raises:
            FolderInUse: another job holds it.
        """
        try:
            with lock(self.lock):
                yield
        finally:
            with contextlib.suppress(OSError):
                self.path.rmdir()

    # ---- reading back

    def read_config(self, overrides: Sequence[str] = ()) -> RunConfig:
        """The run's configuration.

        Raises:
            FileNotFoundError: no finished run there.
        """
        self.require_finished()
        return load_config(self.config, overrides)

    def require_finished(self) -> None:
        """Raises:
        FileNotFoundError: no finished run there."""
        if not self.is_finished:
            missing = self.metrics if not self.metrics.is_file() else self.config
            raise FileNotFoundError(f"{self.path}: no finished run ({missing.name} is missing)")

    def read_metrics(self) -> dict[str, Any]:
        """metrics.json."""
        return _read_json(self.metrics)

    def read_provenance(self) -> dict[str, Any]:
        """provenance.json; empty for runs that have none."""
        return _read_json(self.provenance) if self.provenance.is_file() else {}

    def read_log(self) -> list[dict[str, Any]]:
        """The entries of log.jsonl, one per step; one that a crash cut off is left out."""
        lines = self.log.read_text(encoding="utf-8").splitlines() if self.log.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def read_predictions(self, part: str) -> Predictions:
        """The predictions of a part."""
        return Predictions.from_table(pq.read_table(self.predictions), part)

    def read_model(self) -> OrdinalModel:
        """The chosen step's model, deployed, on the CPU."""
        return OrdinalModel.from_pretrained(self.model)

    # ---- writing

    def write_config(self, config: RunConfig) -> None:
        """config.yaml."""
        write_text(self.config, config.to_yaml())

    def write_provenance(self, content: dict[str, Any]) -> None:
        """provenance.json."""
        write_json(self.provenance, content)

    def write_model(self, model: OrdinalModel, target: Path | None = None) -> None:
        """A model folder, deployed: model/, or another."""
        with whole(target or self.model) as aside:
            model.save_pretrained(aside)

    def write_metrics(self, metrics: dict[str, Any]) -> None:
        """metrics.json, whole or not at all."""
        write_json(self.metrics, metrics)

    def add_log(self, entries: list[dict[str, Any]]) -> None:
        """Append entries to log.jsonl."""
        with self.log.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in entries)

    def cut_log(self, step: int) -> None:
        """Drop the entries of later steps, so that a resumed run writes each once."""
        if self.log.is_file():
            write_text(self.log, "".join(json.dumps(each) + "\n" for each in self.read_log() if each["step"] <= step))

    def write_predictions(self, predictions: dict[str, Predictions]) -> None:
        """Keep the predictions of some parts; those of the other parts in the file stay."""
        tables = [each.table(part) for part, each in predictions.items()]
        if self.predictions.is_file():
            earlier = pq.read_table(self.predictions)
            tables.insert(0, earlier.filter(pc.invert(pc.is_in(earlier["part"], pa.array(list(predictions))))))
        with whole(self.predictions) as aside:
            pq.write_table(pa.concat_tables(tables), aside)


def changed_keys(saved: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys in which two configurations are different experiments, with both values.

    Keys of execution are left out, and those of evaluation, which can be done again; but not the decoding, by which
    the best step is chosen.

    Args:
        saved, now: `RunConfig.model_dump(mode="json")`.
    """
    before, after = flat_keys(saved), flat_keys(now)
    return {
        key: (before.get(key), after.get(key))
        for key in {**before, **after}
        if before.get(key) != after.get(key)
        and key not in EXECUTION
        and (key == CHOOSING or not key.startswith("evaluation."))
    }


def described(changed: dict[str, tuple[Any, Any]]) -> str:
    """What `changed_keys` gives, in words."""
    return "; ".join(f"{key} was {before!r}, is {after!r}" for key, (before, after) in sorted(changed.items()))


def changed_data(before: dict[str, Any], now: dict[str, Any]) -> str:
    """In which part two sets of fingerprints (`provenance.fingerprints`) differ, in words; "" where they do not."""
    for name in dict.fromkeys([*before, *now]):
        was, is_now = before.get(name), now.get(name)
        if was == is_now:
            continue
        if was is None or is_now is None:
            return f"the {name} part was {'not ' * (was is None)}there, now it is{' not' * (is_now is None)}"
        keys = [key for key in was if key != "sha256" and was[key] != is_now.get(key)]
        what = "; ".join(f"{key} was {was[key]!r}, is {is_now[key]!r}" for key in keys) or "names or labels differ"
        return f"the {name} part has changed: {what}"
    return ""


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """A path beside `target` to write a file or folder to; it takes the target's place once it is on disk.

    After an error, or when the process dies, the target is as it was. A folder is replaced by two renamings; whoever
    dies between them leaves the old one aside, and the next write puts it back. What else a dead process left aside is
    deleted by it.
    """
    aside, old = target.with_name(f"{ASIDE}{target.name}"), target.with_name(f"{ASIDE}old-{target.name}")
    delete(aside)
    _put_back(old, target)
    try:
        yield aside
        for path in sorted(aside.iterdir()) if aside.is_dir() else [aside]:
            _flush(path)
        if aside.is_dir() and target.exists():  # a folder cannot be replaced in one step
            target.rename(old)
        aside.replace(target)
        _flush(target.parent)
    except BaseException:
        _put_back(old, target)
        delete(aside)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _put_back(old: Path, target: Path) -> None:
    """A folder that stands aside takes its place again, unless its successor has it already."""
    if old.exists() and not target.exists():
        old.rename(target)
    delete(old)


def write_text(path: Path, content: str) -> None:
    """Write a text file whole or not at all."""
    with whole(path) as aside:
        aside.write_text(content, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def local(text: str | Path) -> str:
    """A path, or a backbone's spec with one, as cards and reports show it: on this machine only its last two parts.

    >>> local("/home/ann/study/runs/mine"), local("runs/mine"), local("../data/labels.csv"), local("hub/name")
    ('runs/mine', 'runs/mine', 'data/labels.csv', 'hub/name')
    >>> local("open_clip:/home/ann/clip"), local("open_clip:RN50//home/ann/w/rn50.pt"), local("timm:vgg16/pretrained")
    ('open_clip:ann/clip', 'open_clip:RN50/w/rn50.pt', 'timm:vgg16/pretrained')
    >>> local("~5 kg"), local("/m"), local("km//h"), local("hint: look at the hands")  # words stay
    ('~5 kg', '/m', 'km//h', 'hint: look at the hands')
    """
    found = SPEC.fullmatch(str(text))
    assert found is not None  # the pattern takes anything
    spec, path = found[1] or "", Path(found[2])
    here = path.is_absolute() or ".." in path.parts or found[2].startswith("~/")
    return spec + Path(*path.parts[-2:]).as_posix() if here and len(path.parts) > 2 else str(text)


# ---- the lock

_held: set[int] = set()


def _close_in_child() -> None:
    """A forked worker must not keep its parent's lock alive."""
    while _held:
        with contextlib.suppress(OSError):
            os.close(_held.pop())


if fcntl is not None:
    os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold the advisory lock (flock) on a file within a `with` block; the file says who does.

    The operating system releases it when its owner ends, however it ends: nothing has to be cleared away after a
    kill, and a restarted job takes the lock at once. Between machines on a shared file system it holds as far as that
    system passes locks on (NFSv4, Lustre mounted with flock, GPFS); where there are no locks at all, a warning says
    so and nothing is guarded.

    Raises:
        FolderInUse: somebody holds it; the message names host, process and start.
    """
    descriptor = _acquire(path)
    try:
        yield
    finally:
        if descriptor is not None:
            path.unlink(missing_ok=True)  # while it is held: who waits for this file sees that it is another's
            _held.discard(descriptor)
            os.close(descriptor)


def _acquire(path: Path) -> int | None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        logger.warning("%s: no locks on this system; nothing guards the folder", path.parent)
        return None
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # another job has just left the folder empty and deleted it
            path.parent.mkdir(parents=True, exist_ok=True)
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 4096).decode("utf-8", "replace")
            os.close(descriptor)
            raise FolderInUse(f"{path.parent} is in use {_owner(owner)}; one job at a time writes to it") from None
        except OSError as error:
            os.close(descriptor)
            if error.errno not in NO_LOCKS:
                raise
            logger.warning("%s: this file system has no locks (%s); nothing guards the folder", path.parent, error)
            return None
        if _is_current(descriptor, path):
            break
        os.close(descriptor)  # its owner has just deleted it
    _held.add(descriptor)
    record = {"host": socket.gethostname(), "process": os.getpid(), "start": _now()}
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps(record).encode())
    return descriptor


def _is_current(descriptor: int, path: Path) -> bool:
    try:
        return os.fstat(descriptor).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False


def _owner(text: str) -> str:
    try:
        owner = json.loads(text)
        return f"by process {owner['process']} on {owner['host']} since {owner['start']}"
    except (ValueError, KeyError, TypeError):  # not written yet
        return "by a job that has just started"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _when(path: Path) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: damaged, not valid JSON ({error})") from error


def _flush(path: Path) -> None:
    """Make sure that a file's content, or a folder's list of names, is on disk."""
    if os.name == "nt":  # which opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def delete(path: Path) -> None:
    """Delete a file or folder, if it is there; of a link to a folder elsewhere, what is in that folder."""
    if path.is_symlink() and path.is_dir():
        for child in path.iterdir():
            delete(child)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
