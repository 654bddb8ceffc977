"""Features of a frozen encoder, computed once for a picture and a view, and kept in files.

    CACHE/features/KEY/key.json          what they depend on beside the picture: weights, pixels, view, versions
    CACHE/features/KEY/*.safetensors     "pictures" (n, 32) digests, and "features" (n, D) or (n, N, D) of them

KEY is a hash of key.json. A picture is known by its bytes, so that other splits, draws, seeds, settings, methods and
tables find its features again. CACHE is `$ORDINALCLIP_CACHE`, or the user's folder for caches.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.numpy import save as as_safetensors
from torch import Tensor

from ordinalclip.config import RunConfig
from ordinalclip.data import Part
from ordinalclip.files import ASIDE, FolderInUse, delete, lock, read_json, whole, write_json
from ordinalclip.images import Augmentation
from ordinalclip.losses import at_least_float32
from ordinalclip.model import OrdinalModel
from ordinalclip.progress import Progress
from ordinalclip.training.distributed import from_main
from ordinalclip.training.sampling import ViewDataset, shares
from ordinalclip.workers import decoded

logger = logging.getLogger(__name__)
FORMAT = 1  # raised when pictures become pixels, or pixels features, in another way
LIBRARIES = ("torch", "pillow", "timm", "transformers", "open-clip-torch")
KEY_FILE, LOCK_FILE, ENDING = "key.json", "features.lock", ".safetensors"
DIGEST = 32  # bytes by which a picture is known
AT_ONCE = 64 << 20  # bytes of features in one file: what a process that is killed loses at most
PATIENCE = 20.0  # seconds for which processes wait for another job before they hear of each other again


def features_folder() -> Path:
    """Where features are kept: `$ORDINALCLIP_CACHE/features`, by default in `~/.cache/ordinalclip`."""
    cache = os.environ.get("ORDINALCLIP_CACHE")
    if not cache:
        cache = os.path.join(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "ordinalclip")
    return Path(cache) / "features"


class Rows(NamedTuple):
    """The features of a part's pictures, where they lie on the disk.

    Attributes:
        files: memory-mapped features, each (n, D), or (n, N, D) of layers or tokens.
        file, place: (N, m) which of them, and which of its rows, holds view m of picture N.
    """

    files: list[np.ndarray]
    file: np.ndarray
    place: np.ndarray

    def take(self, rows: Sequence[int], views: Sequence[int] | int = 0) -> Tensor:
        """(B, ...) features of pictures, each in the given view."""
        file, place = self.file[rows, views], self.place[rows, views]
        found = np.empty((len(rows), *self.files[0].shape[1:]), self.files[0].dtype)
        for number in np.unique(file):
            chosen = file == number
            found[chosen] = self.files[number][place[chosen]]
        return torch.from_numpy(found)


class FeatureCache:
    """The features that a run reads instead of encoding its pictures again.

    All methods are called by all processes of the run together.

    Args:
        model: whose encoder stays as it is from here on; in evaluation mode.
        config: of the run.
        quiet: show no progress.
    """

    def __init__(self, model: OrdinalModel, config: RunConfig, accelerator: Accelerator, quiet: bool = False):
        self.model, self.config, self.accelerator, self.quiet = model, config, accelerator, quiet
        self.augmentation = Augmentation(**config.data.augment.model_dump())
        self.weights = weights_digest(model)
        self._rows: dict[tuple[int, tuple[int | None, ...], bool], Rows] = {}
        self._digests: dict[int, tuple[Part, list[bytes]]] = {}

    def evaluated(self, part: Part) -> Rows:
        """The features of a part as it is evaluated, the mean over mirrors where `model.mirror` asks for it."""
        return self._of(part, [None], bool(self.model.config.mirror))

    def views(self, part: Part) -> Rows:
        """The features of a training part in its `data.views` views."""
        number = self.config.data.views or 1
        return self._of(part, [None] if number == 1 else list(range(number)), False)

    def _of(self, part: Part, views: Sequence[int | None], mirrored: bool) -> Rows:
        known = id(part), tuple(views), mirrored
        if known not in self._rows:
            digests = self._digests_of(part)
            stores = [self._filled(part, digests, view, mirrored) for view in views]
            self._rows[known] = _joined(stores, digests)
        return self._rows[known]

    def _digests_of(self, part: Part) -> list[bytes]:
        """(N,) by what each picture is known, found by the processes together. The part is kept, so that its id is."""
        if id(part) not in self._digests:
            sizes = shares(len(part), self.accelerator.num_processes)
            begin = sum(sizes[: self.accelerator.process_index])
            own = [part.digest(row) for row in range(begin, begin + sizes[self.accelerator.process_index])]
            self._digests[id(part)] = part, gather_object(own) if len(sizes) > 1 else own
        return self._digests[id(part)][1]

    def _filled(self, part: Part, digests: list[bytes], view: int | None, mirrored: bool) -> Store:
        """The store of a view, with all pictures of a part in it."""
        content = self._key(view, mirrored)
        store = Store(features_folder() / key_of(content))
        with suppress(OSError):  # when they were used last; in a folder of somebody else's it cannot be noted
            os.utime(store.folder / KEY_FILE)
        if from_main(self.accelerator, lambda: _first_of(digests, store.read(content))):
            with self._alone(store):
                lacking = from_main(self.accelerator, lambda: _first_of(digests, store.begin(content)))
                self._compute(store, part.select(lacking), [digests[row] for row in lacking], view, mirrored)
                self.accelerator.wait_for_everyone()
        if lost := len(_first_of(digests, store.read(content))):
            raise OSError(
                f"{store.folder}: the features of {lost} pictures are not there, which another process has written; "
                "all processes need one folder: set ORDINALCLIP_CACHE to one that they share"
            )
        return store

    def _key(self, view: int | None, mirrored: bool) -> dict[str, Any]:
        """All that features depend on beside the picture, as JSON data."""
        config, options, backends = self.model.config, self.config.train, torch.backends
        tf32 = [backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32]
        registered = [point.dist for point in entry_points(group="ordinalclip.backbones") if point.dist is not None]
        return {
            "format": FORMAT,
            "encoder": config.backbone,
            "weights": self.weights,
            "layers": config.layer_dims,
            **({} if config.num_tokens is None else {"tokens": config.num_tokens}),
            "pixels": json.loads(json.dumps(asdict(config.pixel_spec))),
            "view": None if view is None else {"number": view, **json.loads(json.dumps(asdict(self.augmentation)))},
            "mirror": list(config.mirror or []) if mirrored else [],
            "numbers": [options.precision, options.mixed_precision, *tf32, self.accelerator.device.type],
            "versions": {
                **{name: version(name) for name in LIBRARIES},
                **{package.name: package.version for package in registered},
            },
        }

    @contextmanager
    def _alone(self, store: Store) -> Iterator[None]:
        """While no other job computes the same features; who comes second waits, and finds them there."""
        with ExitStack() as held:
            said = False
            while (owner := from_main(self.accelerator, lambda: _entered(held, store.folder / LOCK_FILE))) is not None:
                if not said and self.accelerator.is_main_process:
                    logger.warning("waiting for features that another job computes: %s", owner)
                said = True
            yield

    @torch.no_grad()
    def _compute(self, store: Store, part: Part, digests: list[bytes], view: int | None, mirrored: bool) -> None:
        """This process's share of the pictures that lack."""
        evaluation, process = self.config.evaluation, self.accelerator.process_index
        sizes = shares(len(part), self.accelerator.num_processes)
        rows = list(range(sum(sizes[:process]), sum(sizes[: process + 1])))
        batches = [rows[begin : begin + evaluation.batch_size] for begin in range(0, len(rows), evaluation.batch_size)]
        pictures = ViewDataset(part, self.model.config.pixel_spec, self.augmentation, view)
        encoder, device = self.model.encoder.eval(), self.accelerator.device
        encode = encoder if mirrored else encoder.encode
        dtype = next(encoder.parameters()).dtype
        title = f"features of {self.model.config.backbone}"
        progress: Progress = Progress(None, title, total=len(rows), unit="images", quiet=self.quiet)
        found: list[np.ndarray] = []
        with decoded(pictures, batches, self.config.data.workers) as loaded:
            for batch, pixels in zip(batches, loaded, strict=True):
                with self.accelerator.autocast():
                    features = at_least_float32(encode(pixels.to(device, dtype)))
                found.append(features.cpu().numpy())
                progress.advance(len(pixels))
                if batch[-1] == rows[-1] or sum(piece.nbytes for piece in found) >= AT_ONCE:
                    last = batch[-1] + 1
                    joined = np.concatenate(found)
                    store.add(digests[last - len(joined) : last], joined)
                    found = []
        progress.close()


class Store:
    """The folder of one key: files of features, each written once and whole.

    Attributes:
        places: (file, row) of every picture, by its digest.
        files: by number.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.places: dict[bytes, tuple[int, int]] = {}
        self.files: list[Path] = []

    def begin(self, content: dict[str, Any]) -> dict[bytes, tuple[int, int]]:
        """The folder is there, with its key, without what a killed job did not finish. Gives the places of the rest."""
        for path in self.folder.glob(f"{ASIDE}*"):
            delete(path)
        if not (self.folder / KEY_FILE).is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / KEY_FILE, content)
        return self.read(content)

    def read(self, content: dict[str, Any]) -> dict[bytes, tuple[int, int]]:
        """The places of all pictures whose features are there.

        Raises:
            ValueError: a damaged file, or one of other features.
        """
        if not (self.folder / KEY_FILE).is_file():
            return self.places
        if read_json(self.folder / KEY_FILE) != content:
            raise ValueError(f"{self.folder / KEY_FILE}: these are features of something else; {_cure(self.folder)}")
        for path in sorted(self.folder.glob(f"*{ENDING}")):
            if path not in self.files and not path.name.startswith(ASIDE):  # which another process is writing
                pictures, _ = read_features(path, self.folder.name)
                number = len(self.files)
                self.files.append(path)
                for row, digest in enumerate(pictures):
                    self.places.setdefault(digest.tobytes(), (number, row))
        return self.places

    def add(self, digests: Sequence[bytes], features: np.ndarray) -> None:
        """Write the features of some pictures as a file of their own."""
        pictures = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, DIGEST)
        metadata = {"key": self.folder.name, "content": _checksum(pictures, features)}
        path = self.folder / f"{metadata['content'][:DIGEST]}{ENDING}"
        with whole(path) as aside:
            aside.write_bytes(as_safetensors({"features": features, "pictures": pictures}, metadata))


def read_features(path: Path, key: str) -> tuple[np.ndarray, np.ndarray]:
    """The pictures (n, 32) and the features, memory-mapped, of a file that `Store.add` wrote.

    Raises:
        ValueError: it is damaged, or of another key.
    """
    try:
        metadata, pictures, features = _mapped(path)
        if pictures.shape != (len(features), DIGEST) or pictures.dtype != np.uint8 or features.dtype.kind != "f":
            raise ValueError("its parts do not belong together")
        if metadata["content"] != _checksum(pictures, features):
            raise ValueError("its content is not what was written")
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"{path}: damaged features ({error}); {_cure(path.parent)}") from error
    if metadata.get("key") != key:
        raise ValueError(f"{path}: these are features of something else; {_cure(path.parent)}")
    return pictures, features


def _mapped(path: Path) -> tuple[dict[str, str], np.ndarray, np.ndarray]:
    """Metadata, pictures and features of a file, by its header."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 0 < size <= 1 << 20:
            raise ValueError("no header")
        header = json.loads(file.read(size))
    dtypes = {"F32": np.float32, "F64": np.float64, "U8": np.uint8}
    pictures, features = (
        np.memmap(path, dtypes[entry["dtype"]], "r", 8 + size + entry["data_offsets"][0], tuple(entry["shape"]))
        for entry in (header["pictures"], header["features"])
    )
    return header["__metadata__"], pictures, features


def _checksum(pictures: np.ndarray, features: np.ndarray) -> str:
    digest = hashlib.blake2b(f"{features.dtype} {features.shape}".encode())
    digest.update(np.ascontiguousarray(pictures).data)
    digest.update(np.ascontiguousarray(features).data)
    return digest.hexdigest()


def _cure(folder: Path) -> str:
    return f"`ordinalclip features clear {folder.name}` deletes them, and they are computed anew"


def _first_of(digests: Sequence[bytes], known: dict[bytes, Any]) -> list[int]:
    """The first row of each picture that is not known."""
    first: dict[bytes, int] = {}
    for row, digest in enumerate(digests):
        if digest not in known:
            first.setdefault(digest, row)
    return list(first.values())


def _joined(stores: Sequence[Store], digests: Sequence[bytes]) -> Rows:
    """Only files that hold a wanted picture are mapped, since each takes a descriptor."""
    files: list[np.ndarray] = []
    places = np.empty((len(digests), len(stores), 2), np.int64)
    for view, store in enumerate(stores):
        places[:, view] = [store.places[digest] for digest in digests]
        wanted, places[:, view, 0] = np.unique(places[:, view, 0], return_inverse=True)
        places[:, view, 0] += len(files)
        files += [_mapped(store.files[number])[2] for number in wanted]
    return Rows(files, places[..., 0], places[..., 1])


def _entered(stack: ExitStack, path: Path) -> str | None:
    """Who holds a lock after a while; None if this process does."""
    waited = time.monotonic() + PATIENCE
    while True:
        try:
            stack.enter_context(lock(path))
            return None
        except FolderInUse as error:
            if time.monotonic() > waited:
                return str(error)
            time.sleep(0.2)


def weights_digest(model: OrdinalModel) -> str:
    """A hash of an image encoder: its parts with their settings, and its weights."""
    tower = model.encoder.tower
    digest = hashlib.blake2b(repr(tower).encode())
    for name, module in tower.named_modules():  # what a module does not show: its number of heads
        settings = {key: value for key, value in vars(module).items() if isinstance(value, bool | int | float | str)}
        settings = {key: value for key, value in settings.items() if key != "training" and not key.startswith("_")}
        digest.update(f"{name} {sorted(settings.items())}".encode())
    for name, tensor in tower.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[: 2 * DIGEST]


def key_of(content: dict[str, Any]) -> str:
    """The name of the folder whose key.json has this content."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=8).hexdigest()


class Kept(NamedTuple):
    """A folder of features: its key.json, pictures, bytes on disk, and when it was used last (seconds since 1970).

    Attributes:
        fault: what is wrong with it, or "".
    """

    folder: Path
    content: dict[str, Any]
    pictures: int
    size: int
    used: float
    fault: str


def kept_features() -> list[Kept]:
    """All folders of features, the one used last first."""
    root = features_folder()
    return sorted((_kept(folder) for folder in root.glob("*") if folder.is_dir()), key=lambda kept: -kept.used)


def _kept(folder: Path) -> Kept:
    size, used = 0, 0.0
    for path in folder.glob("*"):
        with suppress(FileNotFoundError):  # another process has just finished or deleted it
            about = path.stat()
            size, used = size + about.st_size, max(used, about.st_mtime)
    store = Store(folder)
    content: dict[str, Any] = {}
    try:
        if not isinstance(content := read_json(folder / KEY_FILE), dict) or key_of(content) != folder.name:
            raise ValueError(f"{folder / KEY_FILE}: damaged, not that of {folder.name}")
        pictures, fault = len(store.read(content)), ""
    except (OSError, ValueError) as error:
        pictures, fault = len(store.places), str(error)
    return Kept(folder, content if isinstance(content, dict) else {}, pictures, size, used, fault)


def clear_features(folder: Path) -> None:
    """Delete a folder of features.

    Raises:
        FolderInUse: a job computes them right now.
    """
    with lock(folder / LOCK_FILE):
        for path in folder.glob("*"):
            if path.name != LOCK_FILE:
                delete(path)
    with suppress(OSError):  # a job that computes them anew has just begun
        folder.rmdir()
