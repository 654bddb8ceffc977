"""What ends a run early: SIGTERM, after the step in hand, with a checkpoint and a status of its own; bad numbers."""

from __future__ import annotations

import signal
import threading
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: try again later


class Preempted(SystemExit):
    """Raised once the checkpoint is written; leaves the process with status 75 unless caught."""

    def __init__(self, message: str):
        super().__init__(PREEMPTED)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Diverged(ValueError):
    """A loss, a gradient or a weight that is not finite."""


class Interruption:
    """Listens for SIGTERM within a `with` block; all processes agree at which step to stop.

    A scheduler signals processes one by one, so that one may be a step ahead of another. Every step they exchange
    one number, over gloo on the CPU so that no GPU has to be waited for.
    """

    def __init__(self, num_processes: int):
        self.signalled = False
        self.group: Any = None
        self.several = num_processes > 1
        if self.several and dist.get_backend() != "gloo":
            self.group = dist.new_group(backend="gloo")

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # Python takes signal handlers nowhere else
            self.before = signal.signal(signal.SIGTERM, self._take)
        return self

    def __exit__(self, *exception: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.before)

    def _take(self, number: int, frame: Any) -> None:
        self.signalled = True

    def requested(self) -> bool:
        """Whether any process has been told to stop; to be asked by all of them once a step."""
        if not self.several:
            return self.signalled
        flag = torch.tensor([int(self.signalled)])
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group)
        return bool(flag.item())


def not_finite(terms: dict[str, Tensor], model: nn.Module) -> list[str]:
    """Which terms of a loss are not finite, or else the gradients of which parameters, three at most."""
    if wrong := [f"{name} is {term.item()}" for name, term in terms.items() if not torch.isfinite(term).all()]:
        return wrong
    spoilt = [name for name, p in model.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()]
    return [f"the gradient of {name} is not finite (loss {terms['loss'].item():g})" for name in spoilt[:3]]
