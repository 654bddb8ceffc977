"""Vision-language ordinal regression: from a picture to an ordered number.

Importing the package registers its model with the Auto classes of transformers and its pipeline task.
"""

from ordinalclip import signals as signals  # first: what follows takes seconds
from ordinalclip.heads import Prediction
from ordinalclip.model import OrdinalConfig, OrdinalImageProcessor, OrdinalModel
from ordinalclip.pipeline import OrdinalRegressionPipeline
from ordinalclip.prompts import PromptLearner
from ordinalclip.ranks import Ranks
from ordinalclip.text import Prompts, TextTower

__version__ = "0.1.0"
__all__ = [
    "OrdinalConfig",
    "OrdinalImageProcessor",
    "OrdinalModel",
    "OrdinalRegressionPipeline",
    "Prediction",
    "PromptLearner",
    "Prompts",
    "Ranks",
    "TextTower",
]
