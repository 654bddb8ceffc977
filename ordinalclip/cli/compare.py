"""`ordinalclip compare`."""

from __future__ import annotations

import argparse

from ordinalclip import compare
from ordinalclip.cli import add_configuration


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_configuration(parser, "YAML file")
    parser.epilog = (compare.__doc__ or "").partition("\n\n")[2]


def run(arguments: argparse.Namespace) -> int:
    print(compare.compare(arguments.config, arguments.overrides, arguments.quiet))
    return 0
