"""Files of weights read as tensors and nothing else: no pickled code runs, no TorchScript is executed."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def is_torchscript(file: Path) -> bool:
    """Whether a file is a TorchScript archive, as OpenAI's CLIP files are."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_weights(file: str | Path) -> dict[str, Any]:
    """The content of a safetensors file, a PyTorch checkpoint or a TorchScript archive, on the CPU.

    Everything pickled goes through `torch.load(weights_only=True)`. A TorchScript archive is the same zip of a
    pickle and raw tensors with classes of its own in the pickle; those are read as inert records, and the modules'
    code in the archive is left out.

    Returns:
        what the file holds; for TorchScript the flat state dict, including tensors that were plain attributes.

    Raises:
        FileNotFoundError: no such file; ValueError: a damaged file, or one that holds more than data.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file of weights")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        if is_torchscript(file):
            return _read_torchscript(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile, KeyError) as error:
        why = str(error).strip().partition("\n")[0]
        raise ValueError(f"{file}: not readable as plain tensors ({why})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: holds a {type(content).__name__}, not a dictionary of tensors")
    return content


class _Record:
    """Stands for an object of any TorchScript class; holds its attributes."""


def _as_list(values: Any, *_: Any) -> Any:
    return values


def _read_torchscript(file: Path) -> dict[str, Tensor]:
    kept = io.BytesIO()
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(kept, "w") as copy:
        for name in archive.namelist():
            if "/code/" not in name and not name.endswith("/constants.pkl"):
                copy.writestr(name, archive.read(name))
    kept.seek(0)
    allowed: list[Any] = []
    for name in torch.serialization.get_unsafe_globals_in_checkpoint(kept):
        if name.startswith("__torch__."):
            allowed.append((_Record, name))
        elif name.startswith("torch.jit._pickle."):  # typed lists
            allowed.append((_as_list, name))
    kept.seek(0)
    with torch.serialization.safe_globals(allowed):
        root = torch.load(kept, map_location="cpu", weights_only=True)
    return dict(_tensors(root, ""))


def _tensors(record: Any, prefix: str) -> Any:
    for name, value in vars(record).items():
        if isinstance(value, Tensor):
            yield prefix + name, value.detach()
        elif isinstance(value, _Record):
            yield from _tensors(value, f"{prefix}{name}.")
