"""Files and folders that are written whole or not at all, and locks that end with their owner."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)
ASIDE = ".partial-"  # begins the names of what is not written to its end
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class FolderInUse(OSError):
    """Another job writes to this folder; the message names its host, process and start."""


@contextmanager
def whole(target: Path, writer: str = "") -> Iterator[Path]:
    """A path beside `target` to write a file or folder to; it takes the target's place once it is on disk.

    After an error, or when the process dies, the target is as it was. A folder is replaced by two renamings; whoever
    dies between them leaves the old one aside, and the next write puts it back. What else a dead process left aside is
    deleted by it.

    Args:
        writer: where several may write the same file at once: who this is, so that none takes what another has not
            written to its end.

    Raises:
        OSError: it could not be written, e.g. for want of space; the message names the target and the reason.
    """
    aside, old = target.with_name(f"{ASIDE}{writer}{target.name}"), target.with_name(f"{ASIDE}old-{target.name}")
    try:
        delete(aside)
        _put_back(old, target)
        yield aside
        for path in sorted(aside.iterdir()) if aside.is_dir() else [aside]:
            _flush(path)
        if aside.is_dir() and target.exists():  # a folder cannot be replaced in one step
            target.rename(old)
        aside.replace(target)
        _flush(target.parent)
    except BaseException as error:
        from safetensors import SafetensorError  # which the command line's help does without

        with contextlib.suppress(OSError):
            _put_back(old, target)
            delete(aside)
        if isinstance(error, OSError | SafetensorError):
            raise unwritten(target, error) from error
        raise
    shutil.rmtree(old, ignore_errors=True)


def check_replaceable(folder: Path, what: str, mark: str, ours: Iterable[str], overwrite: bool) -> None:
    """Before a folder is written that is to hold nothing of others.

    Args:
        what: is written, e.g. "export".
        mark: the file by which one is known.
        ours: the names of all files of one.

    Raises:
        FileExistsError: it holds something else, or one already and `overwrite` is not asked for.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder}: a file, where a folder for the {what} is wanted")
    found = sorted(path.name for path in folder.iterdir() if not path.name.startswith((".", "__pycache__")))
    if found and (mark not in found or set(found) - set(ours)):
        other = min(set(found) - set(ours), default=found[0])
        raise FileExistsError(f"{folder}: holds {other}, which is of no {what}; choose another folder")
    if found and not overwrite:
        one = "an" if what[0] in "aeiou" else "a"
        raise FileExistsError(f"{folder}: holds {one} {what} already; overwrite replaces it, or choose another folder")


def unwritten(target: Path, error: Exception) -> OSError:
    """The error of a file or folder that could not be written, by name."""
    return OSError(f"{target}: could not be written ({_reason(error)})")


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def _put_back(old: Path, target: Path) -> None:
    """A folder that stands aside takes its place again, unless its successor has it already."""
    if old.exists() and not target.exists():
        old.rename(target)
    delete(old)


def write_text(path: Path, content: str) -> None:
    """Write a text file whole or not at all, in UTF-8; what that cannot hold (of a file's name) is escaped."""
    with whole(path) as aside:
        aside.write_text(content, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


LARGEST_JSON = 64 << 20  # bytes
CODE_KEYS = ("auto_map", "custom_pipelines")  # by which files of transformers name Python code beside them


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: not JSON, a key twice, or larger than `LARGEST_JSON`.
    """
    if path.stat().st_size > LARGEST_JSON:
        raise ValueError(f"{path}: larger than {LARGEST_JSON >> 20} MB, which no file of a model or a run is")
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once_each)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged, not valid JSON ({error})") from error


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for number, (key, _) in enumerate(pairs) if key in dict(pairs[:number]))
        raise ValueError(f"key {twice!r} stands in it twice")
    return found


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file, which names no code.

    Raises:
        FileNotFoundError: no such file; ValueError: not JSON, not an object, or one that names code of its own.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a JSON {type(content).__name__}, not an object with keys")
    if code := [key for key in CODE_KEYS if content.get(key)]:
        raise ValueError(f"{path}: {code[0]} names code of the folder's own, which is never run; delete that key")
    return content


def check_no_code(folder: Path) -> None:
    """The files by which transformers finds code beside a model name none; of what is no folder nothing is said.

    Raises:
        ValueError: a damaged file, or one that names code.
    """
    for path in sorted(folder.glob("*config.json")):
        if not isinstance(read_json(path), list):  # such as a list of training data, beside a sentence encoder
            read_json_object(path)


def content_digest(files: Iterable[Path]) -> str:
    """SHA-256 of the contents of files, with their names."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\n".encode("utf-8", "surrogateescape"))
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """Make sure that a file's content, or a folder's list of names, is on disk."""
    if os.name == "nt":  # which opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def delete(path: Path, through: str = "") -> None:
    """Delete a file, a folder or a link, if it is there; never what a link leads to.

    Args:
        through: of a link to a folder elsewhere, what has such names (a pattern) is deleted there, and the link stays.
    """
    if path.is_symlink() and path.is_dir() and through:
        for child in path.glob(through):
            delete(child)
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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
        OSError: the folder cannot be made or written to.
    """
    try:
        descriptor = _acquire(path)
    except FolderInUse:
        raise
    except OSError as error:
        raise OSError(f"{path.parent}: this folder cannot be written to ({_reason(error)})") from error
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
    for attempt in count():
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except FileNotFoundError:  # another job has just left the folder empty and deleted it
            if attempt == 100:  # or it is one that takes no files, as in /proc
                raise
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
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(record).encode())
    except BaseException:  # a full disk
        _held.discard(descriptor)
        os.close(descriptor)
        raise
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
