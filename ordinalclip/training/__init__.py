"""Training: exact batches on any hardware, checkpoints, evaluation."""

from ordinalclip.training.trainer import Trainer, train

__all__ = ["Trainer", "train"]
