"""Data sets as their owners distribute them -> tables with the published splits, for `ordinalclip prepare`.

base.py       what a recipe is; a download looked through; reading its tables
parts.py      pictures as parts: dealt out without chance, copies and people in two parts, the same split without them
prepare.py    a download checked, counted and written as a prepared folder
the others    a data set each: `RECIPE`
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ordinalclip.suggestions import near_matches

if TYPE_CHECKING:  # the command line lists the names before anything is loaded
    from ordinalclip.recipes.base import Recipe

NAMES = (  # a module each
    "adience",
    "aesthetics",
    "agedb",
    "aptos",
    "elpv",
    "hci",
    "idrid",
    "knee",
    "koniq",
    "morph",
    "rsna",
    "utkface",
)


def recipe(name: str) -> Recipe:
    """The recipe of a data set.

    Raises:
        ValueError: there is none of this name, with those there are.
    """
    if name not in NAMES:
        raise ValueError(f"there is no recipe {name!r}; {near_matches(name, NAMES)} (ordinalclip prepare lists them)")
    found: Recipe = importlib.import_module(f"{__name__}.{name}").RECIPE
    return found
