"""Training: exact batches on any hardware, checkpoints, evaluation. Nothing here presents results."""

import importlib
from typing import Any

from ordinalclip.training.interruption import Diverged

__all__ = ["Diverged", "evaluate_run", "train"]


def __getattr__(name: str) -> Any:
    """`train` and `evaluate_run` write reports too: they live in `ordinalclip.runs`, above both, and are found here."""
    if name in ("train", "evaluate_run"):
        return getattr(importlib.import_module("ordinalclip.runs"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
