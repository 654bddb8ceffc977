"""What a mistyped name was probably meant to be, for error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def near_matches(given: str, choices: Iterable[str]) -> str:
    """The choices most like what was given, for an error message."""
    choices = list(choices)
    if not choices:
        return "there are none"
    near = difflib.get_close_matches(given, choices, n=5, cutoff=0.4)
    return ("nearest: " if near else "choices: ") + ", ".join(near or choices[:20])
