"""What ends a run early: SIGTERM or Ctrl-C, after the step in hand, with a checkpoint and a status; bad numbers."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: try again later
INTERRUPTED = 128 + signal.SIGINT
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Preempted(SystemExit):
    """Told to stop by SIGTERM or Ctrl-C; raised once what can be saved is saved.

    It leaves the process with status 75 after SIGTERM, 130 after Ctrl-C, unless caught.

    Args:
        message: where it stopped and how to go on.
        number: of the signal.
    """

    def __init__(self, message: str, number: int = signal.SIGTERM):
        self.message, self.number = message, number
        self.status = INTERRUPTED if number == signal.SIGINT else PREEMPTED
        super().__init__(self.status)

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[type[Preempted], tuple[str, int]]:
        return Preempted, (self.message, self.number)


class Diverged(ValueError):
    """A loss or gradient that is not finite."""


@contextmanager
def listening(take: Callable[[int], None]) -> Iterator[None]:
    """SIGTERM and Ctrl-C call `take` within a `with` block, each once; a second Ctrl-C ends the process at once.

    What ignores Ctrl-C already, as a job in the background does, goes on ignoring it.
    """
    if threading.current_thread() is not threading.main_thread():  # Python takes signal handlers nowhere else
        yield
        return

    def handle(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGINT else signal.SIG_IGN)
        take(number)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    if before[signal.SIGINT] == signal.SIG_IGN:
        del before[signal.SIGINT]
    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave(number: int) -> None:
    """What a signal does where there is nothing to save: the command ends by an exception that clears up behind it."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Preempted("told to stop", number)


@contextmanager
def deaf_to_interrupts() -> Iterator[None]:
    """Ctrl-C is ignored within a `with` block, and for ever by processes that are started there."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Interruption:
    """Listens for SIGTERM and Ctrl-C within a `with` block; all processes agree at which step to stop.

    A scheduler signals processes one by one, so that one may be a step ahead of another. Every step they exchange
    one number, over gloo on the CPU so that no GPU has to be waited for.
    """

    def __init__(self, num_processes: int = 1):
        self.signalled = 0
        self.group: Any = None
        self.several = num_processes > 1
        if self.several and dist.get_backend() != "gloo":
            self.group = dist.new_group(backend="gloo")

    def __enter__(self) -> Interruption:
        self.listening = listening(self._take)
        self.listening.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.listening.__exit__(*exception)

    def _take(self, number: int) -> None:
        self.signalled = number

    def requested(self) -> int:
        """The signal that any process has been told to stop by, 0 without; to be asked by all of them once a step."""
        if not self.several:
            return self.signalled
        flag = torch.tensor([self.signalled])
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group)
        return int(flag.item())


def not_finite(terms: dict[str, Tensor], model: nn.Module) -> list[str]:
    """Which terms of a loss are not finite, or else the gradients of which parameters, three at most."""
    if wrong := [f"{name} is {term.item()}" for name, term in terms.items() if not torch.isfinite(term).all()]:
        return wrong
    spoilt = [name for name, p in model.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()]
    return [f"the gradient of {name} is not finite (loss {terms['loss'].item():g})" for name in spoilt[:3]]
