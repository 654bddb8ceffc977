"""Where a run comes from: versions, source, command, device, licences, and a fingerprint of the data."""

from __future__ import annotations

import hashlib
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from ordinalclip.config import DataConfig, RunConfig
from ordinalclip.data import Part, Parts
from ordinalclip.data.duplicates import MOST_HASHED

LIBRARIES = (
    "ordinalclip",
    "torch",
    "torchvision",
    "open-clip-torch",
    "timm",
    "transformers",
    "accelerate",
    "datasets",
    "safetensors",
    "numpy",
    "pillow",
    "scipy",
    "pytorch-metric-learning",
)
MOST_READ = 1 << 30  # bytes of pictures: seconds
CHUNK = 100_000  # names of so many rows are in memory at a time


def provenance(config: RunConfig, parts: Parts, num_processes: int) -> dict[str, Any]:
    """All that a person needs to know where a run's numbers come from, as JSON data; see provenance.json.

    Args:
        num_processes: on how many the run is executed.
    """
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "host": socket.gethostname(),
        "job": job(),
        "python": platform.python_version(),
        "versions": versions(),
        "source": source(),
        "device": device(),
        "processes": num_processes,
        "data": fingerprints(parts),
        "licenses": {
            "data": data_license(config.data),
            "backbone": backbone_license(config.model.backbone),
            **({"text": backbone_license(config.model.text)} if config.model.text else {}),
        },
    }


def versions() -> dict[str, str]:
    """Of this package and the libraries that numbers depend on, as far as they are installed."""
    return {name: found for name in LIBRARIES if (found := _version(name)) is not None}


def fingerprints(parts: Parts) -> dict[str, Any]:
    """`fingerprint` of every part that there is."""
    return {name: fingerprint(part) for name, part in parts.named.items()}


def fingerprint(part: Part) -> dict[str, Any]:
    """What tells a part of the data from another: number of rows, columns, two hashes, first and last name.

    The first hash is the SHA-256 of the rows' names in order, a line each, and of their labels as float64. Names are
    paths as the table gives them, so that the folder above them may move. The second is of the pictures: see
    `_pictures`.
    """
    digest = hashlib.sha256()
    for begin in range(0, len(part), CHUNK):
        names = part.names[begin : begin + CHUNK]
        digest.update("".join(f"{name}\n" for name in names).encode("utf-8", "surrogateescape"))
    digest.update(part.values.astype("<f8").tobytes())
    return {
        "rows": len(part),
        "columns": part.rows.column_names,
        "sha256": digest.hexdigest(),
        "pictures": _pictures(part),
        "first": part.names[0],
        "last": part.names[len(part) - 1],
    }


def _pictures(part: Part) -> str:
    """A hash of the pictures: of their bytes, up to `MOST_HASHED` and `MOST_READ`; beyond that of file sizes."""
    digest, left = hashlib.sha256(), MOST_READ if len(part) <= MOST_HASHED else 0
    for picture in _stored(part):
        path = picture if isinstance(picture, str) and os.path.isfile(picture) else ""
        content = picture if isinstance(picture, bytes) else b"" if path else repr(picture).encode()
        size = os.stat(path).st_size if path else len(content)
        digest.update(f"{size}\n".encode())
        if size > left:
            continue
        left -= size
        if path:
            with open(path, "rb") as file:
                content = hashlib.file_digest(file, "sha256").digest()
        digest.update(content)
    return digest.hexdigest()


def _stored(part: Part) -> Iterator[Any]:
    """The paths of a part's pictures; or, of `MOST_HASHED` at most, their bytes, without `datasets`' mapping around."""
    if part.names.paths is not None:
        for begin in range(0, len(part), CHUNK):
            yield from (os.path.join(part.root, name) for name in part.names[begin : begin + CHUNK])
    elif len(part) <= MOST_HASHED:
        for batch in part.rows.select_columns(part.image_column).with_format("arrow").iter(1000):
            for picture in batch[part.image_column].to_pylist():
                if isinstance(picture, dict):
                    picture = picture["bytes"] if picture.get("bytes") is not None else picture.get("path")
                yield picture


def source() -> dict[str, Any] | None:
    """Commit of the package's source, and whether files differ from it; None for an installed package."""
    package = Path(__file__).parent
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None  # no checkout, or one of something else, around a virtual environment
    changes = _git(package, "status", "--porcelain", "--untracked-files=no")
    return {"commit": (_git(package, "rev-parse", "HEAD") or "").strip(), "modified": bool(changes and changes.strip())}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def device() -> str:
    """The device that is trained on, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {num_cores()} CPU cores"


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def job() -> str:
    """What a worker of torchrun has in common with those that its agent started before it; "" outside of a job."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ""
    agent = psutil.Process(os.getppid())
    return f"{os.environ['TORCHELASTIC_RUN_ID']} {socket.gethostname()} {agent.pid} {agent.create_time():.0f}"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def data_name(data: DataConfig) -> str:
    """What the pictures are, in words."""
    if data.source == "gauges":
        return f"generated gauges ({', '.join(data.kinds)})"
    if data.source == "memory":
        return "data handed over in memory"
    return data.hub or data.table or data.train_table or data.root


def data_license(data: DataConfig) -> str:
    """The licence of the pictures, as far as it is known."""
    if data.license:
        return data.license
    return "Apache-2.0, generated by ordinalclip" if data.source == "gauges" else "not recorded (`data.license`)"


def backbone_license(spec: str) -> str:
    """The licence of the backbone's weights, as far as it is known."""
    if spec == "tiny":
        return "Apache-2.0, shipped with ordinalclip"
    return "that of its weights; see where they were published"
