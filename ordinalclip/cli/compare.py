"""`ordinalclip compare`."""

from __future__ import annotations

import argparse
import sys

from ordinalclip import compare
from ordinalclip.cli import add_configuration
from ordinalclip.quoting import printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_configuration(parser, "YAML file")
    parser.epilog = (compare.__doc__ or "").partition("\n\n")[2]


def run(arguments: argparse.Namespace) -> int:
    tables, errors = compare.compare(arguments.config, arguments.overrides, arguments.quiet)
    print(tables)
    for error in errors:
        print(f"ordinalclip: {printable(error)}", file=sys.stderr)
    return 1 if errors else 0
