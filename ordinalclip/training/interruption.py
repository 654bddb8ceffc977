"""What ends a run early: SIGTERM or Ctrl-C, after the step in hand and with a checkpoint; numbers that go wrong; who
watches its validations."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ordinalclip.signals import listening


class Diverged(ValueError):
    """A loss, a gradient or a weight that is not finite."""


class Pruned(Exception):
    """Raised by who watches a run to end it: going on is not worth it."""


Watch = Callable[[int, float], None]  # told the number of a validation, from 1, and its MAE; may raise `Pruned`


def unwatched(number: int, validation_mae: float) -> None:
    """Nobody watches."""


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

    def __exit__(self, kind: type[BaseException] | None, *exception: Any) -> None:
        """What an exception has overtaken, numbers that went wrong or a run that was pruned, is not forgotten."""
        self.listening.__exit__(kind, *exception)
        if kind is not None and self.signalled and not self.several:
            signal.raise_signal(self.signalled)

    def _take(self, number: int) -> None:
        self.signalled = number

    def requested(self) -> int:
        """The signal that any process has been told to stop by, 0 without; to be asked by all of them once a step."""
        if not self.several:
            return self.signalled
        flag = torch.tensor([self.signalled])
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group)
        return int(flag.item())


def not_finite(terms: dict[str, Tensor], model: nn.Module | None = None) -> list[str]:
    """Which terms of a loss are not finite, or else the gradients of which parameters of a model, three at most."""
    if wrong := [f"{name} is {term.item()}" for name, term in terms.items() if not torch.isfinite(term).all()]:
        return wrong
    spoilt = [
        name
        for name, p in (model.named_parameters() if model is not None else ())
        if p.grad is not None and not torch.isfinite(p.grad).all()
    ]
    return [f"the gradient of {name} is not finite (loss {terms['loss'].item():g})" for name in spoilt[:3]]
