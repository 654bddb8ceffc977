"""Exact gradients of the whole batch, on any number of processes and with any micro-batch.

    images --encoder (DDP, micro-batched)--> features --head (DDP)--> outputs --gather with gradient--> loss

Every process computes the same loss on the outputs of all. Its gradient with respect to this process's slice,
summed over processes and averaged by DDP, is exactly the gradient of the single-process full batch.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, broadcast_object_list
from torch import Tensor, nn

from ordinalclip.config import RunConfig, flat_keys
from ordinalclip.heads import Outputs
from ordinalclip.losses import at_least_float32
from ordinalclip.memory import keep_freed_memory
from ordinalclip.run_folder import HASHES, RunFolder
from ordinalclip.training.sampling import SampleNoise
from ordinalclip.workers import portable

logger = logging.getLogger(__name__)
PACKAGES = {"comet_ml": "comet-ml"}  # of trackers that are named otherwise
PROJECT = "ordinalclip"  # what trackers call it; `RunFolder.trackers` is the folder of that name
RUN_NAME = {"wandb": "name", "trackio": "name", "mlflow": "run_name", "swanlab": "experiment_name"}  # options of theirs
BatchNorm = nn.modules.batchnorm._BatchNorm
Result = TypeVar("Result")


def make_accelerator(
    mixed_precision: str, log_with: list[str] | None = None, folder: str = ".", timeout: float = 600.0
) -> Accelerator:
    """An Accelerator; a single process may make several, one after the other, with different settings.

    On a CPU this process keeps the memory that it frees: see `keep_freed_memory`. The process group, once there, serves
    all of them and is left when the process ends.

    Args:
        timeout: seconds after which processes give up waiting for one that is lost.

    Raises:
        ValueError: fp16 without a GPU, or a tracker that is not installed.
    """
    if not torch.cuda.is_available():
        keep_freed_memory()
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")  # so that torchrun's CPU processes find each other
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        AcceleratorState._reset_state(reset_partial_state=True)
    if mixed_precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("train.mixed_precision=fp16 needs a GPU; on a CPU use bf16 or no")
    for name in log_with or []:  # Accelerate itself would leave out what is not there without a word
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(f"train.trackers: {name} is unknown; choices: {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}")
        if name not in map(str, get_available_trackers()):
            package = PACKAGES.get(name, name)
            raise ValueError(f"train.trackers: {name} is not installed; pip install {package}")
    # Its successor in PyTorch, forward_sync_buffers, is not to be had through Accelerate yet.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        log_with=log_with or None,
        project_dir=folder,
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=timedelta(seconds=timeout)),
        ],
    )
    atexit.unregister(_leave_process_group)
    atexit.register(_leave_process_group)
    if accelerator.num_processes != int(os.environ.get("WORLD_SIZE", "1")):
        raise RuntimeError(
            f"launched as one of {os.environ['WORLD_SIZE']} processes, but Accelerate runs {accelerator.num_processes}"
        )
    return accelerator


def from_main(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """Do something on the main process only, while the others wait; all get its result, or its error."""
    outcome: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            outcome[0] = work()
        except Exception as error:
            if accelerator.num_processes == 1:
                raise
            outcome[0] = portable(error)
    broadcast_object_list(outcome)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def start_trackers(accelerator: Accelerator, config: RunConfig, folder: RunFolder) -> None:
    """Begin to track a run that is claimed, under the name of its folder: the whole configuration by dotted keys, the
    versions, and the fingerprints of the data."""
    if not config.train.trackers:
        return
    about = {"run": folder.path.resolve().name, **flat_keys(config.model_dump(mode="json"))}
    origin = folder.read_provenance()
    about |= {f"versions.{name}": version for name, version in origin.get("versions", {}).items()}
    for part, marks in origin.get("data", {}).items():
        about |= {f"fingerprint.{part}.{name}": marks[name] for name in ("rows", *HASHES) if name in marks}
    plain = {
        key: value if isinstance(value, bool | int | float | str) else json.dumps(value) for key, value in about.items()
    }
    names = {tracker: {RUN_NAME[tracker]: about["run"]} for tracker in config.train.trackers if tracker in RUN_NAME}
    accelerator.init_trackers(PROJECT, plain, names)


@contextmanager
def tracked(accelerator: Accelerator) -> Iterator[None]:
    """Trackers that are started within a `with` block end with it, whatever happens."""
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()


@contextmanager
def held(folder: RunFolder, accelerator: Accelerator) -> Iterator[None]:
    """The main process holds a run folder within a `with` block.

    Raises:
        FolderInUse: on every process, if another job holds it.
    """
    with ExitStack() as stack:
        from_main(accelerator, lambda: stack.enter_context(folder.locked()))
        yield


def _leave_process_group() -> None:
    """Without this gloo aborts at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()


class _GatherWithGradient(torch.autograd.Function):
    """All-gather forward; backward sums the gradients of all processes and keeps this process's slice."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, sizes: list[int]) -> Tensor:
        ctx.begin, ctx.size = sum(sizes[: dist.get_rank()]), sizes[dist.get_rank()]
        padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        gathered = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(gathered, padded)
        return torch.cat([piece[:size] for piece, size in zip(gathered, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient[ctx.begin : ctx.begin + ctx.size], None


def gather(tensor: Tensor, sizes: list[int]) -> Tensor:
    """Rows of all processes in order of rank, with a gradient back to every one of them.

    Args:
        tensor: (n, ...) this process's rows.
        sizes: rows of every process; they may differ. One entry means a single process.

    Returns:
        (sum(sizes), ...), the same on every process.
    """
    return tensor if len(sizes) == 1 else _GatherWithGradient.apply(tensor, sizes)


def gather_outputs(outputs: Outputs, sizes: list[int]) -> Outputs:
    """`gather` for every tensor of a head's outputs."""
    return {name: gather(tensor.contiguous(), sizes) for name, tensor in outputs.items()}


class MicroBatches:
    """Encode a share of the batch, whole or in micro-batches, and bring the loss's gradient back to the encoder.

    With micro-batches: encode each without a graph, let head and loss run once on all features, keep
    d loss / d features, then encode each again with a graph and feed it its slice of that gradient. Only the last
    one synchronises. One extra forward of the encoder buys the memory of a single micro-batch.

    Args:
        encoder: the prepared encoder.
        noises: its dropout layers, to be told which samples come.
        size: largest micro-batch, or None for whole shares. All processes must get the same answer to "is anybody's
            share larger?", since DDP talks to the others inside forward: whoever took the other path would wait
            for ever. So pass None unless the largest share exceeds the micro-batch.
    """

    def __init__(self, accelerator: Accelerator, encoder: nn.Module, noises: list[SampleNoise], size: int | None):
        self.accelerator, self.encoder, self.noises, self.size = accelerator, encoder, noises, size
        self.trains = any(parameter.requires_grad for parameter in encoder.parameters())

    def encode(self, pixels: Tensor, positions: Tensor) -> Tensor:
        """(b, 3, H, W) pixels and their (b,) stream positions -> (b, D) features to run the head on."""
        if self.size is None:
            self.pieces: list[tuple[Tensor, Tensor]] = []
            with nullcontext() if self.trains else torch.no_grad():
                return self._forward(pixels, positions)
        self.pieces = list(zip(pixels.split(self.size), positions.split(self.size), strict=True))
        with torch.no_grad(), frozen_running_statistics(self.encoder):
            features = torch.cat([self._forward(*piece) for piece in self.pieces])
        self.features = features.requires_grad_(self.trains)
        return self.features

    def backward(self, loss: Tensor) -> None:
        """Backward through loss and head, then through the encoder's micro-batches."""
        self.accelerator.backward(loss)
        if not self.pieces or not self.trains:
            return
        assert self.features.grad is not None
        gradients = self.features.grad.split(self.size or 1)
        for number, (piece, gradient) in enumerate(zip(self.pieces, gradients, strict=True)):
            last = number == len(self.pieces) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.encoder):
                self._forward(*piece).backward(gradient)

    def _forward(self, pixels: Tensor, positions: Tensor) -> Tensor:
        for noise in self.noises:
            noise.positions = positions
        with self.accelerator.autocast():  # a frozen encoder is not prepared, so Accelerate does not do it
            return at_least_float32(self.encoder(pixels))


@contextmanager
def frozen_running_statistics(module: nn.Module) -> Iterator[None]:
    """BatchNorm layers leave their running statistics alone, within a `with` block."""
    norms = [child for child in module.modules() if isinstance(child, BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def average_running_statistics(module: nn.Module, num_processes: int) -> None:
    """BatchNorm's running statistics become their mean over processes, where each took those of its own images."""
    for child in module.modules():
        if num_processes > 1 and isinstance(child, BatchNorm):
            for buffer in (child.running_mean, child.running_var):
                if buffer is not None:
                    dist.all_reduce(buffer)
                    buffer /= num_processes


def check_batch_norm(
    encoder: nn.Module, mode: str, num_processes: int, micro_batched: bool, recomputed: bool = False, exact: bool = True
) -> None:
    """Refuse what would not be exact: see `Encoder.train` for `frozen`, which always is.

    `sync` is exact over processes, without micro-batches. `local` takes the statistics of what one process encodes
    at once, which is exact for a single process without micro-batches. Both update their running statistics twice
    where activations are computed again.

    Args:
        recomputed: whether activations are checkpointed.
        exact: False only warns, except where there is no way at all.

    Raises:
        ValueError: `sync` or `local` with micro-batches or activation checkpointing, `local` with several processes,
            `sync` over processes without GPUs.
    """
    if mode == "frozen" or not any(isinstance(child, BatchNorm) for child in encoder.modules()):
        return
    if num_processes > 1 and mode == "sync" and not torch.cuda.is_available():
        raise ValueError("model.batch_norm=sync needs GPUs; use model.batch_norm=frozen on CPU processes")
    problems = []
    if micro_batched:
        problems.append("its statistics depend on train.micro_batch_size")
    if recomputed:
        problems.append("train.activation_checkpointing updates its running statistics twice")
    if num_processes > 1 and mode == "local":
        problems.append("its statistics depend on the number of processes")
    if problems:
        message = f"model.batch_norm={mode} is not exact: " + "; ".join(problems)
        if exact:
            raise ValueError(f"{message}. Use model.batch_norm=frozen, or accept it with train.exact=false")
        logger.warning("%s", message)
