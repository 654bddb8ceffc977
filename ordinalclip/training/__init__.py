"""Training: exact batches on any hardware, checkpoints, evaluation."""

from ordinalclip.training.evaluation import evaluate_run
from ordinalclip.training.trainer import Trainer, train

__all__ = ["Trainer", "evaluate_run", "train"]
