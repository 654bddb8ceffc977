"""Hostile and unlucky inputs to the command line: what is given, and what the user sees.

A case is a function that lays out files in an empty folder, which is also the working directory, and returns the
command's words; the decorator says what it is and what must come of it. `tests/test_hostile.py` runs them all in one
process, `benchmarks/hostile.py` prints them as the table in docs/bad-input.md. A module here is a class of trouble.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pkgutil
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

from ordinalclip.cli import main


class Case(NamedTuple):
    """One input.

    Attributes:
        area: the module it stands in.
        what: the input, in words; unique.
        arrange: (empty folder) -> words of the command.
        says: regular expression that the output must match: for a refusal the error, else what is printed.
        status: of the command.
        after: (folder) -> None: asserts what is left on the disk; None: nothing to look at.
        slow: takes more than some two seconds.
    """

    area: str
    what: str
    arrange: Callable[[Path], list[str]]
    says: str
    status: int
    after: Callable[[Path], None] | None
    slow: bool


CASES: list[Case] = []
_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []


def lasting_folder() -> Path:
    """An empty folder that lasts as long as the process: for what several cases share."""
    _FOLDERS.append(tempfile.TemporaryDirectory(prefix="ordinalclip-hostile-"))
    return Path(_FOLDERS[-1].name)


def case(
    what: str, says: str, status: int = 2, after: Callable[[Path], None] | None = None, slow: bool = False
) -> Callable[[Callable[[Path], list[str]]], Callable[[Path], list[str]]]:
    """Register a case: see `Case`."""

    def register(arrange: Callable[[Path], list[str]]) -> Callable[[Path], list[str]]:
        area = arrange.__module__.rpartition(".")[2].replace("_", " ")
        CASES.append(Case(area, what, arrange, says, status, after, slow))
        return arrange

    return register


def load_cases() -> list[Case]:
    """All cases, in the order of modules and lines."""
    for module in sorted(found.name for found in pkgutil.iter_modules(__path__)):
        importlib.import_module(f"{__name__}.{module}")
    return CASES


class Seen(NamedTuple):
    """What the user sees of a case."""

    status: int
    out: str
    err: str


def play(case: Case, folder: Path) -> Seen:
    """Lay out a case's files in an empty folder, and run its command there."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(folder))
        stack.enter_context(patch.dict(os.environ, ORDINALCLIP_CACHE=str(folder / "cache")))
        out, err = (stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2))
        # a case that lets no file grow, and then fails, must not do so to those after it
        stack.callback(resource.setrlimit, resource.RLIMIT_FSIZE, resource.getrlimit(resource.RLIMIT_FSIZE))
        words = case.arrange(folder)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = main(words)
            except SystemExit as stopped:  # argparse
                status = int(stopped.code or 0)
        for stream in (out, err):
            stream.seek(0)
        return Seen(status, out.read(), err.read())
