"""Checkpoints: everything that resuming at the exact step needs, written whole or not at all, never unpickled."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ordinalclip.config import flat_keys
from ordinalclip.training.optimization import WeightAverage

logger = logging.getLogger(__name__)
PREFIX = "step-"
FROZEN = "head.text."
MANIFEST = "sha256.json"
EXECUTION = {  # how a run is executed, not what it computes
    "output_dir",
    "data.root",
    "data.workers",
    "data.cache_mb",
    "train.micro_batch_size",
    "train.resume",
    "train.log_every",
    "train.keep_checkpoints",
    "train.trackers",
    "train.process_group_timeout",
    "data.prefetch",
}


class Checkpoint(NamedTuple):
    """What `load_checkpoint` gives: where it came from, weights by name, the optimiser's state dict, and the rest."""

    folder: Path
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    state: dict[str, Any]


def save_checkpoint(
    folder: Path, step: int, weights: dict[str, Tensor], optimizer: dict[str, Any], state: dict[str, Any]
) -> Path:
    """Write `folder/step-NNNNNNNN`: into a temporary folder first, flushed to disk, then renamed.

    Args:
        weights: the tensors to save, parameters and buffers.
        optimizer: `optimizer.state_dict()`; tensors go to safetensors, the rest to JSON.
        state: JSON data: counters, best value, scaler, configuration.

    Returns:
        the checkpoint's folder.

    Raises:
        OSError: it could not be written, e.g. for want of space; older checkpoints are as they were.
    """
    target, partial = folder / f"{PREFIX}{step:08d}", folder / f".partial-{step:08d}"
    tensors, plain = {}, {}
    for index, entries in optimizer["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                plain[f"{index}.{name}"] = value
    content = {"step": step, "optimizer": {"plain": plain, "param_groups": optimizer["param_groups"]}, **state}
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _save_tensors(weights, partial / "model.safetensors")
        _save_tensors(tensors, partial / "optimizer.safetensors")
        (partial / "state.json").write_text(json.dumps(content), encoding="utf-8")
        digests = {file.name: _digest(file) for file in sorted(partial.iterdir())}
        (partial / MANIFEST).write_text(json.dumps(digests), encoding="utf-8")
        for file in partial.iterdir():
            _flush(file)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"{target}: could not be written ({error}); older checkpoints are as they were") from error
    return target


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Make sure that a file's content, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint whose files are exactly as they were written.

    Raises:
        FileNotFoundError: no checkpoint there; ValueError: a damaged, truncated or missing file, named.
    """
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(f"{folder}: no checkpoint ({MANIFEST} is missing)")
    file = folder / MANIFEST
    try:
        for name, digest in json.loads(file.read_text(encoding="utf-8")).items():
            file = folder / name
            if _digest(file) != digest:
                raise ValueError(f"its content is not what {MANIFEST} says")
        file = folder / "state.json"
        state = json.loads(file.read_text(encoding="utf-8"))
        weights, tensors = load_file(folder / "model.safetensors"), load_file(folder / "optimizer.safetensors")
    except Exception as error:
        raise ValueError(f"{folder}: damaged checkpoint, {file.name}: {error}") from error
    saved = state.pop("optimizer")
    entries: dict[int, dict[str, Any]] = {}
    for name, value in [*tensors.items(), *saved["plain"].items()]:
        index, _, key = name.partition(".")
        entries.setdefault(int(index), {})[key] = value
    return Checkpoint(folder, weights, {"state": entries, "param_groups": saved["param_groups"]}, state)


def weights_of(model: nn.Module, average: WeightAverage | None) -> dict[str, Tensor]:
    """All that training changes, running average included; the frozen text tower is rebuilt from its own weights."""
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(FROZEN)}
    if average is not None:
        weights.update((f"average.{name}", tensor) for name, tensor in average.average.items())
    return weights


def load_weights(model: nn.Module, average: WeightAverage | None, weights: dict[str, Tensor]) -> None:
    """Take up what `weights_of` gave.

    Raises:
        ValueError: weights of another model.
    """
    own = {name for name in model.state_dict() if not name.startswith(FROZEN)}
    own |= {f"average.{name}" for name in (average.average if average else ())}
    if own != weights.keys():
        missing, unexpected = sorted(own - weights.keys())[:5], sorted(weights.keys() - own)[:5]
        raise ValueError(f"checkpoint does not fit the model: missing {missing}, unexpected {unexpected}")
    if average is not None:
        for name, tensor in average.average.items():
            tensor.copy_(weights[f"average.{name}"])
    model.load_state_dict({n: tensor for n, tensor in weights.items() if not n.startswith("average.")}, strict=False)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if path.is_dir())


def prune(folder: Path, keep: int, best_step: int | None) -> None:
    """Delete all but the `keep` newest checkpoints and that of the best step, and what interrupted writes left."""
    spared = {path.name for path in checkpoints(folder)[-keep:]} | {f"{PREFIX}{best_step or 0:08d}"}
    for path in [*checkpoints(folder), *folder.glob(".partial-*")]:
        if path.name not in spared:
            _remove(path)


def remove_after(folder: Path, step: int) -> None:
    """Delete the checkpoints of later steps, so that none of another past is taken for the newest."""
    for path in checkpoints(folder):
        if int(path.name.removeprefix(PREFIX)) > step:
            _remove(path)


def _remove(path: Path) -> None:
    """Delete a checkpoint; one that is half deleted no longer looks like one."""
    doomed = path if path.name.startswith(".") else path.rename(path.with_name(f".partial-{path.name}"))
    shutil.rmtree(doomed)


def find_checkpoint(folder: Path, resume: str) -> Checkpoint | None:
    """What `train.resume` names: nothing, the newest intact one of the run folder, or a given one.

    With "auto", damaged checkpoints are named in a warning and passed over.

    Raises:
        FileNotFoundError: a named checkpoint that does not exist; ValueError: one that is damaged or of another run,
            or, with "auto", that there are some and all are damaged.
    """
    if resume == "none":
        return None
    if resume != "auto":
        if not (Path(resume) / MANIFEST).is_file():
            raise FileNotFoundError(
                f"train.resume={resume}: no checkpoint there; write none, auto or a checkpoint folder"
            )
        if Path(resume).resolve().parent != folder.resolve():
            raise ValueError(f"train.resume={resume} is not a checkpoint of {folder.parent}; copy that run instead")
        return load_checkpoint(Path(resume))
    problems = []
    for path in reversed(checkpoints(folder)):
        try:
            return load_checkpoint(path)
        except (FileNotFoundError, ValueError) as error:
            problems.append(str(error))
            logger.warning("%s; trying the one before it", error)
    if problems:
        raise ValueError(f"{folder}: no intact checkpoint; train.resume=none starts anew. " + "; ".join(problems))
    return None


def changed_keys(saved: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys in which two configurations are different experiments, with both values.

    Keys of execution, and of evaluation, which can be done again, are left out.
    """
    before, after = flat_keys(saved), flat_keys(now)
    return {
        key: (before.get(key), after.get(key))
        for key in {**before, **after}
        if before.get(key) != after.get(key) and key not in EXECUTION and not key.startswith("evaluation.")
    }


def check_same_experiment(folder: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to resume an experiment under another configuration.

    Args:
        saved, now: `RunConfig.model_dump(mode="json")` of the checkpoint and of this run.

    Raises:
        ValueError: naming the keys that differ, execution and evaluation aside.
    """
    if changed := changed_keys(saved, now):
        shown = "; ".join(f"{key} was {before!r}, is {after!r}" for key, (before, after) in sorted(changed.items()))
        raise ValueError(f"{folder}: cannot resume under another configuration: {shown}")


def cut_log(path: Path, step: int) -> None:
    """Drop the rows of log.jsonl that come after a step, so that a resumed run writes each row once."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        partial.replace(path)
