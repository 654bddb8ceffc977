"""Checkpoints: everything that resuming at the exact step needs, written whole or not at all, never unpickled."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

PREFIX = "step-"
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
}


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
    """
    target, partial = folder / f"{PREFIX}{step:08d}", folder / f".partial-{step:08d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, partial / "model.safetensors"
    )
    tensors, plain = {}, {}
    for index, entries in optimizer["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value.detach().cpu().contiguous()
            else:
                plain[f"{index}.{name}"] = value
    save_file(tensors, partial / "optimizer.safetensors")
    content = {"step": step, "optimizer": {"plain": plain, "param_groups": optimizer["param_groups"]}, **state}
    (partial / "state.json").write_text(json.dumps(content), encoding="utf-8")
    for file in partial.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    return target


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Read a checkpoint: (weights, optimiser state dict, state).

    Raises:
        FileNotFoundError: no checkpoint there; ValueError: damaged files, named.
    """
    if not (folder / "state.json").is_file():
        raise FileNotFoundError(f"{folder}: no checkpoint (state.json is missing)")
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        weights = load_file(folder / "model.safetensors")
        tensors = load_file(folder / "optimizer.safetensors")
    except Exception as error:
        raise ValueError(f"{folder}: damaged checkpoint ({error})") from error
    saved = state.pop("optimizer")
    entries: dict[int, dict[str, Any]] = {}
    for name, value in [*tensors.items(), *saved["plain"].items()]:
        index, _, key = name.partition(".")
        entries.setdefault(int(index), {})[key] = value
    return weights, {"state": entries, "param_groups": saved["param_groups"]}, state


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if (path / "state.json").is_file())


def prune(folder: Path, keep: int, best_step: int | None) -> None:
    """Delete all but the `keep` newest checkpoints and that of the best step, and what interrupted writes left."""
    spared = {path.name for path in checkpoints(folder)[-keep:]} | {f"{PREFIX}{best_step or 0:08d}"}
    for path in [*checkpoints(folder), *folder.glob(".partial-*")]:
        if path.name not in spared:
            shutil.rmtree(path)


def remove_after(folder: Path, step: int) -> None:
    """Delete the checkpoints of later steps, so that none of another past is taken for the newest."""
    for path in checkpoints(folder):
        if int(path.name.removeprefix(PREFIX)) > step:
            shutil.rmtree(path)


def find_checkpoint(folder: Path, resume: str) -> Path | None:
    """What `train.resume` names: nothing, the newest of the run folder, or a folder.

    Raises:
        FileNotFoundError: a named checkpoint that does not exist.
    """
    if resume == "none":
        return None
    if resume == "auto":
        found = checkpoints(folder)
        return found[-1] if found else None
    if not (Path(resume) / "state.json").is_file():
        raise FileNotFoundError(f"train.resume={resume}: no checkpoint there; write none, auto or a checkpoint folder")
    if Path(resume).resolve().parent != folder.resolve():
        raise ValueError(f"train.resume={resume} is not a checkpoint of {folder.parent}; copy that run instead")
    return Path(resume)


def check_same_experiment(folder: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to resume an experiment under another configuration.

    Args:
        saved, now: `RunConfig.model_dump(mode="json")` of the checkpoint and of this run.

    Raises:
        ValueError: naming the keys that differ, execution and evaluation aside.
    """
    before, after = _flat(saved), _flat(now)
    changed = [key for key in {**before, **after} if before.get(key) != after.get(key) and key not in EXECUTION]
    changed = [key for key in changed if not key.startswith("evaluation.")]
    if changed:
        shown = "; ".join(f"{key} was {before.get(key)!r}, is {after.get(key)!r}" for key in sorted(changed))
        raise ValueError(f"{folder}: cannot resume under another configuration: {shown}")


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def cut_log(path: Path, step: int) -> None:
    """Drop the rows of log.jsonl that come after a step, so that a resumed run writes each row once."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
