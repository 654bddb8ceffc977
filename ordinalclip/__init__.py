"""Vision-language ordinal regression: from a picture to an ordered number.

Importing the package registers its model with the Auto classes of transformers and its pipeline task.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ordinalclip import signals as signals  # first: what follows takes seconds

if TYPE_CHECKING:
    from ordinalclip.heads import Prediction
    from ordinalclip.learned import LearnedPrompts
    from ordinalclip.model import OrdinalConfig, OrdinalImageProcessor, OrdinalModel
    from ordinalclip.pipeline import OrdinalRegressionPipeline
    from ordinalclip.prompts import PromptLearner
    from ordinalclip.ranks import Ranks
    from ordinalclip.regressor import OrdinalRegressor
    from ordinalclip.text import Prompts, TextTower

__version__ = "0.1.0"  # pyproject.toml takes it from here
__all__ = [
    "LearnedPrompts",
    "OrdinalConfig",
    "OrdinalImageProcessor",
    "OrdinalModel",
    "OrdinalRegressionPipeline",
    "OrdinalRegressor",
    "Prediction",
    "PromptLearner",
    "Prompts",
    "Ranks",
    "TextTower",
]

_HOMES = {
    "LearnedPrompts": "learned",
    "OrdinalConfig": "model",
    "OrdinalImageProcessor": "processing",
    "OrdinalModel": "model",
    "OrdinalRegressionPipeline": "pipeline",
    "OrdinalRegressor": "regressor",
    "Prediction": "heads",
    "PromptLearner": "prompts",
    "Prompts": "text",
    "Ranks": "ranks",
    "TextTower": "text",
}


def __getattr__(name: str) -> Any:
    """What the package offers, imported when it is asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# Registering needs the classes, hence torch and transformers: whoever imports the package in a program is about to use
# these. The command line lies inside the package, so that starting it imports the package, too, and has no use for them
# until a command runs. A command imports the classes by itself; they register where they are defined. Waiting for the
# first import of transformers instead would take a hook in Python's import system, and rest on the order in which
# transformers imports its own modules.
if not signals.is_command():
    import_module(f"{__name__}.pipeline")
