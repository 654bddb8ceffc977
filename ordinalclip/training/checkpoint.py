"""Checkpoints: everything that resuming at the exact step needs, written whole or not at all, never unpickled."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ordinalclip.files import whole
from ordinalclip.model import OrdinalModel
from ordinalclip.training.optimization import WeightAverage

logger = logging.getLogger(__name__)
PREFIX = "step-"
MANIFEST = "sha256.json"


class NoIntactCheckpoint(ValueError):
    """All checkpoints of a run are damaged."""


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
    target = path_of(folder, step)
    tensors, plain = {}, {}
    for index, entries in optimizer["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                plain[f"{index}.{name}"] = value
    content = {"optimizer": {"plain": plain, "param_groups": optimizer["param_groups"]}, **state, "step": step}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with whole(target) as aside:
            aside.mkdir()
            _save_tensors(weights, aside / "model.safetensors")
            _save_tensors(tensors, aside / "optimizer.safetensors")
            (aside / "state.json").write_text(json.dumps(content), encoding="utf-8")
            digests = {file.name: _digest(file) for file in sorted(aside.iterdir())}
            (aside / MANIFEST).write_text(json.dumps(digests), encoding="utf-8")
    except OSError as error:
        raise OSError(f"{error}; older checkpoints are as they were") from error
    return target


def path_of(folder: Path, step: int) -> Path:
    """The checkpoint of a step."""
    return folder / f"{PREFIX}{step:08d}"


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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


def weights_of(model: OrdinalModel, average: WeightAverage | None) -> dict[str, Tensor]:
    """All that training changes, running average included; what is rebuilt from the backbone's weights is left out."""
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(_rebuilt(model))}
    if average is not None:
        weights.update((f"average.{name}", tensor) for name, tensor in average.average.items())
    return weights


def load_weights(model: OrdinalModel, average: WeightAverage | None, weights: dict[str, Tensor]) -> None:
    """Take up what `weights_of` gave.

    Raises:
        ValueError: weights of another model.
    """
    own = {name for name in model.state_dict() if not name.startswith(_rebuilt(model))}
    own |= {f"average.{name}" for name in (average.average if average else ())}
    if own != weights.keys():
        missing, unexpected = sorted(own - weights.keys())[:5], sorted(weights.keys() - own)[:5]
        raise ValueError(f"checkpoint does not fit the model: missing {missing}, unexpected {unexpected}")
    if average is not None:
        for name, tensor in average.average.items():
            tensor.copy_(weights[f"average.{name}"])
    model.load_state_dict({n: tensor for n, tensor in weights.items() if not n.startswith("average.")}, strict=False)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take up the state of an optimiser, each tensor in its weight's memory order.

    Files hold none of it, and the fused updates pair the elements of weight and moments as they lie in memory.
    """
    optimizer.load_state_dict(state)
    for parameter, kept in optimizer.state.items():
        for name, value in kept.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                kept[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _rebuilt(model: OrdinalModel) -> tuple[str, ...]:
    """Beginnings of the names of weights that come back with the backbone."""
    return tuple(f"head.{name}." for name in model.head.rebuilt)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if path.is_dir())


def prune(folder: Path, keep: int, best_step: int | None) -> None:
    """Delete all but the `keep` newest checkpoints and that of the best step, and what interrupted writes left."""
    spared = {path.name for path in checkpoints(folder)[-keep:]} | {path_of(folder, best_step or 0).name}
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
        raise NoIntactCheckpoint(f"{folder}: no intact checkpoint; overwrite=true starts anew. " + "; ".join(problems))
    return None
