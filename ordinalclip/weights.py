"""Files of weights read as tensors and nothing else: no pickled code runs, no TorchScript is executed."""

from __future__ import annotations

import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ordinalclip.files import whole

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SMALL = (torch.int8, torch.uint8, torch.int16, torch.float8_e4m3fn, torch.float8_e5m2)
LARGEST_LOGIT_SCALE = 10.0  # log of a temperature's inverse; CLIP's is cut off at log(100) = 4.6
EXPANSION = 8  # tensors are not compressible: an archive that claims to hold this many times its size is none of them
MOST_TENSORS = 100_000  # in a model that is built
FACTORIES: tuple[Any, ...] = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.randint)
FACTORIES += (torch.randperm, torch.arange, torch.linspace, torch.eye)


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
        FileNotFoundError: no such file; ValueError: a damaged file, one that holds more than data, or one that claims
            to hold `EXPANSION` times its size.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file of weights")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        _check_sizes(file)
        if is_torchscript(file):
            content: Any = _read_torchscript(file)
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # readers of damaged files raise whatever they like
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"{file}: not readable as plain tensors ({why})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: holds a {type(content).__name__}, not a dictionary of tensors")
    total = sum(tensor.numel() * tensor.element_size() for tensor in _all_tensors(content))
    if total > EXPANSION * _size(file):  # views of one number, repeated: they take no memory before they are copied
        raise ValueError(f"{file}: its tensors claim {total:,} bytes, {EXPANSION} times the file's size and more")
    return content


def read_safetensors(file: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file and its metadata.

    Raises:
        FileNotFoundError: no such file; ValueError: a damaged file.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file}: no such file of weights")
    try:
        with safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError) as error:
        why = str(error).strip().partition("\n")[0]
        raise ValueError(f"{file}: damaged or no safetensors file ({why})") from error


def write_safetensors(file: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file of a few tensors, whole or not at all.

    Raises:
        OSError: it could not be written.
    """
    with whole(file) as aside:
        aside.write_bytes(save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, metadata))


def add_metadata(file: Path, metadata: Mapping[str, str]) -> None:
    """Add to the metadata of a safetensors file; the tensors are copied byte by byte."""
    aside = file.with_name(f".{file.name}")
    with file.open("rb") as source, aside.open("wb") as target:
        header = json.loads(source.read(int.from_bytes(source.read(8), "little")))
        header["__metadata__"] = {**header.get("__metadata__", {}), **metadata}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8 bytes
        target.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(source, target, 1 << 20)
    aside.replace(file)


def fault(tensors: Mapping[str, Tensor], masks: bool = False) -> str:
    """What makes tensors useless as the weights of a model, in words; "" if nothing does.

    Numbers that are not finite, floating-point types that no model is saved in, a temperature that means nothing.

    Args:
        masks: they may hold attention masks, which published files keep among the weights.
    """
    for name, tensor in tensors.items():
        last = name.rpartition(".")[2]
        if tensor.is_complex() or tensor.layout != torch.strided or tensor.is_meta:
            return f"{name} holds complex numbers, or is stored in a way that no model is"
        if not tensor.is_floating_point() or (masks and last == "attn_mask"):
            continue
        if tensor.dtype not in FLOATS:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
            return f"{name} is of {str(tensor.dtype).removeprefix('torch.')}; allowed are {allowed}"
        whole = tensor.detach().sum().isfinite()  # faster than looking at each number; but finite ones may overflow
        if not whole and (bad := int((~tensor.detach().isfinite()).sum())):
            return f"{name} holds {bad} numbers that are not finite, of {tensor.numel()}"
        if last == "logit_scale" and tensor.abs().max() > LARGEST_LOGIT_SCALE:
            return f"{name} is {tensor.abs().max().item():g}; {LARGEST_LOGIT_SCALE:g} is the largest that is allowed"
    return ""


def check_floats(file: str | Path, state: Mapping[str, Any]) -> None:
    """Raises:
    ValueError: numbers that are no weights: whole ones of a quantised model, which torch would take for others."""
    for name, tensor in state.items():
        if isinstance(tensor, Tensor) and (tensor.dtype in SMALL or tensor.is_quantized):
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"{file}: {name} is of {dtype}: quantised weights are not read; save them in float32")


def first_line(error: BaseException) -> str:
    """What an error of a library says, in one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def misfit(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """In what tensors do not fit a model's own, in words; "" if they do."""
    for name, tensor in own.items():
        if name not in given:
            return f"{name} is missing"
        if given[name].is_floating_point() != tensor.is_floating_point():
            dtype = str(given[name].dtype).removeprefix("torch.")
            return f"{name} is of {dtype}, the model's is of {str(tensor.dtype).removeprefix('torch.')}"
    if foreign := sorted(given.keys() - own.keys()):
        return f"{foreign[0]} is not of this model"
    return ""


@contextmanager
def limited_memory(limit: int, what: str) -> Iterator[None]:
    """Within it, modules that are built may take `limit` bytes of tensors together.

    Args:
        what: begins the message of the error.

    Raises:
        ValueError: before more is taken.
    """
    with _Limit(limit, what):
        yield


class _Limit(TorchFunctionMode):
    """Looks at what factory functions would give, on the device "meta", before they give it."""

    def __init__(self, limit: int, what: str):
        super().__init__()
        self.left, self.what, self.limit, self.number = limit, what, limit, 0

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in FACTORIES:
            shape = func(*args, **{**_without_pinning(kwargs), "device": "meta"})
            self.left -= shape.numel() * shape.element_size()
            self.number += 1
            if self.left < 0 or self.number > MOST_TENSORS:
                raise ValueError(f"{self.what} asks for more than {self.limit:,} bytes of memory")
        return func(*args, **kwargs)


def _without_pinning(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key not in ("pin_memory", "generator", "out")}


def _size(file: Path) -> int:
    return os.stat(file).st_size + (1 << 20)  # small files may hold more headers than numbers


def _check_sizes(file: Path) -> None:
    """Refuse an archive by the sizes that it declares, before anything is unpacked."""
    if not zipfile.is_zipfile(file):
        return
    with zipfile.ZipFile(file) as archive:
        total = sum(entry.file_size for entry in archive.infolist())
    if total > EXPANSION * _size(file):
        raise ValueError(f"it would unpack to {total:,} bytes, {EXPANSION} times the file's size and more")


def _all_tensors(content: Any, depth: int = 0) -> Iterator[Tensor]:
    """The tensors in nested dictionaries and lists."""
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, dict | list | tuple) and depth < 20:
        for value in content.values() if isinstance(content, dict) else content:
            yield from _all_tensors(value, depth + 1)


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
