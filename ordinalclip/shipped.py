"""The configurations that come with the package, by name.

A name is a path below `configs/` without its ending, such as `demo` or `methods/corn`; the folder may be left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

ENDING = ".yaml"
# Folders of `configs/` in the order in which a name is looked for.
RUNS = ("", "methods", "compare")
COMPARISONS = ("compare", "", "methods")


def folder() -> Path:
    """`configs/`: within the package where a wheel has put it, else beside it, in the repository."""
    package = Path(__file__).parent
    within = package / "configs"
    return within if within.is_dir() else package.parent / "configs"


def names(places: Sequence[str] = ("",)) -> list[str]:
    """What is to be had in these folders: paths from `configs/`, without ending."""
    files = [file for place in places for file in sorted((folder() / place).glob(f"*{ENDING}"))]
    return [file.relative_to(folder()).with_suffix("").as_posix() for file in files]


def short_names(*places: str) -> list[str]:
    """The same without their folders."""
    return [name.rpartition("/")[2] for name in names(places)]


def find(name: str, places: Sequence[str]) -> Path | None:
    """The file of a name, in the first folder that has it; None: there is none of this name."""
    if not all(part.replace("_", "").isalnum() for part in name.split("/")):  # no way out of the folder
        return None
    files = (folder() / place / f"{name}{ENDING}" for place in places)
    return next((file for file in files if file.is_file()), None)
