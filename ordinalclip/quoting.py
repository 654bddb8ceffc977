"""Text of others, such as file names and units, on its way to a place where characters mean something."""

from __future__ import annotations

import re

# Marks of Markdown, its tables and GitHub's formulas; stars and underscores only where they could begin or end a word.
MARKS = re.compile(r"[\\`\[|~$]|<(?=[\w/!?])|&(?=#?\w+;)|(?<![\s*])\*|\*(?=[^\s*])|(?<!\w)_(?=\S)|(?<=\S)_(?!\w)")
FIRST = re.compile(r"^(\d+(?=[.)]\s)|(?=[#>]|[-+]\s|[-=]{2}))")  # marks at the beginning of a line
HARMLESS = re.compile(r"-|[+-]?\d+(\.\d+)?")  # no formula, though it begins like one
FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")  # begins one in a spreadsheet


class Markdown(str):
    """Text that is Markdown already."""


def printable(text: object) -> str:
    """Text for a terminal: what would move its cursor, ring, break the line or cannot be encoded is shown escaped.

    >>> printable("a\\x1b[31mb\\nc\\udcff")
    'a\\\\x1b[31mb\\\\nc\\\\udcff'
    """
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode("ascii") for each in str(text))


def markdown(text: object) -> Markdown:
    """Text for a line or a cell of Markdown, which shows it as it is; what is `Markdown` stays.

    >>> print(markdown("a|b [x](javascript:1) *c* <i> 5 * 3 < 16, rm_loss"))
    a\\|b \\[x](javascript:1) \\*c\\* \\<i> 5 * 3 < 16, rm_loss
    >>> print(markdown("# no heading"), markdown("1. no list"), markdown("-3"), sep=", ")
    \\# no heading, 1\\. no list, -3
    """
    if isinstance(text, Markdown):
        return text
    return Markdown(FIRST.sub(r"\1\\", MARKS.sub(r"\\\g<0>", printable(text))))


def code(text: object) -> Markdown:
    """Text as code in Markdown.

    >>> print(code("a*b"), code("a`b"), code("`"))
    `a*b` ``a`b`` `` ` ``
    """
    content = printable(text)
    ticks = "`" * (1 + max(map(len, re.findall("`+", content)), default=0))
    space = " " if content.startswith(("`", " ")) or content.endswith(("`", " ")) or not content else ""
    return Markdown(f"{ticks}{space}{content}{space}{ticks}")


def spreadsheet(text: str) -> str:
    """Text for a cell of a CSV; before what a spreadsheet would run as a formula, an apostrophe.

    >>> spreadsheet("=1+1"), spreadsheet("CoOp"), spreadsheet("-"), spreadsheet("-1.5")
    ("'=1+1", 'CoOp', '-', '-1.5')
    """
    shown = printable(text)
    return f"'{shown}" if shown.startswith(FORMULA) and not HARMLESS.fullmatch(shown) else shown
