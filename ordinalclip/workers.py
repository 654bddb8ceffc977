"""Processes that decode pictures ahead of who needs them, and errors that are sent from one process to another."""

from __future__ import annotations

import pickle
import signal
import threading
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from ordinalclip.signals import SIGNALS


class _Carried(Dataset):
    """Whole batches of a dataset, or the exception in place of one: PyTorch would put a traceback into its message."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitems__(self, indices: list[int]) -> Any:
        try:
            return default_collate([self.dataset[index] for index in indices])
        except Exception as error:
            if get_worker_info() is None:
                raise
            return portable(error)


def _as_it_is(batch: Any) -> Any:
    return batch


@contextmanager
def decoded(dataset: Dataset, batches: Iterable[list[int]], workers: int, prefetch: int = 2) -> Iterator[Iterator[Any]]:
    """Batches of samples, decoded by `workers` processes, which end with the `with` block, however it ends.

    Args:
        dataset: by index.
        batches: the indices of each batch.
        workers: 0: this process decodes.
        prefetch: how many batches each process is ahead.

    Raises:
        ChildProcessError: a process that decodes was killed. An error of the dataset comes as it was raised there.
    """
    loader: DataLoader = DataLoader(
        _Carried(dataset),
        batch_sampler=batches,
        collate_fn=_as_it_is,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        worker_init_fn=_begin_worker,
        pin_memory=torch.cuda.is_available(),
    )
    running: Any = iter(loader)
    try:
        yield _raised(running)
    except RuntimeError as error:  # raised wherever this process happens to be
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        why = str(error).partition(") ")[2].strip(" .")
        raise ChildProcessError(
            f"one of the data.workers={workers} processes that decode images died ({why}), for want of memory perhaps: "
            "data.workers=0 does without them"
        ) from error
    finally:
        if workers:
            _end(running)


def _end(running: Any) -> None:
    """End the processes of a loader's iterator; PyTorch alone would wait for ever for what a killed one held."""
    if not running._shutdown and not all(worker.is_alive() for worker in running._workers):
        for worker in running._workers:
            worker.kill()
        running._workers_done_event = threading.Event()  # its lock may have died with the process that had it
    running._shutdown_workers()
    for worker in running._workers:  # they ignore the signals by which PyTorch ends them
        worker.kill()


def _raised(batches: Iterator[Any]) -> Iterator[Any]:
    for batch in batches:
        if isinstance(batch, Exception):
            raise batch
        yield batch


def portable(error: Exception) -> Exception:
    """The error, or its text where it cannot be sent to another process."""
    error.add_note(f"where it was raised:\n{''.join(traceback.format_exception(error))}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever the constructors of others want
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _begin_worker(_number: int) -> None:
    """A signal to the whole process group must not break the batch in hand; workers end with their parent."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
