"""Training: exact batches on any hardware, checkpoints, evaluation."""

from ordinalclip.training.evaluation import evaluate_run
from ordinalclip.training.interruption import Diverged
from ordinalclip.training.trainer import Trainer, train

__all__ = ["Diverged", "Trainer", "evaluate_run", "train"]
