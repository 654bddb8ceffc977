"""`ordinalclip init`."""

from __future__ import annotations

import argparse
import sys

from ordinalclip.cli import add_overrides
from ordinalclip.quoting import printable

NEEDS = ("data.draft",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pictures", help="folder with the pictures")
    parser.add_argument(
        "table",
        nargs="?",
        default="",
        help="file with their labels; default: the only table in the folder, else folders",
    )
    add_overrides(parser, "keys of data and ranks that you know better, e.g. data.label_column=age")
    parser.epilog = (
        "ordinalclip init PICTURES labels.csv > mine.yaml\n\nThe exit status is 1 where something is yours to say "
        "before a training can start; the file holds the place for it."
    )


def run(arguments: argparse.Namespace) -> int:
    from ordinalclip.data.draft import draft

    table, overrides = arguments.table, arguments.overrides
    if "=" in table and table.partition("=")[0].partition(".")[0] in ("data", "ranks"):
        table, overrides = "", [table, *overrides]
    found = draft(arguments.pictures, table, overrides)
    print(found.text, end="")
    if found.problem:
        print(f"ordinalclip: before a training can start: {printable(found.problem)}", file=sys.stderr)
    return 1 if found.problem else 0
