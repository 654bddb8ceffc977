"""Text of others, such as file names and units, on its way to a place where characters mean something."""

from __future__ import annotations


def printable(text: object) -> str:
    """Text for a terminal: what would move its cursor, ring, break the line or cannot be encoded is shown escaped.

    >>> printable("a\\x1b[31mb\\nc\\udcff")
    'a\\\\x1b[31mb\\\\nc\\\\udcff'
    """
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode("ascii") for each in str(text))
