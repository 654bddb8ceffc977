"""`ordinalclip tune`."""

from __future__ import annotations

import argparse
import sys
from typing import get_args

from ordinalclip import tuning
from ordinalclip.cli import add_configuration, whole_number
from ordinalclip.quoting import printable
from ordinalclip.tuning.plan import Pruner


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_configuration(parser, "YAML file, or 'default'")
    parser.add_argument(
        "--trials", type=whole_number(1, 100_000), default=20, help="how many there are to be in all (default: 20)"
    )
    parser.add_argument(
        "--seeds", type=whole_number(1, 100), default=1, help="runs of each trial, whose mean counts (default: 1)"
    )
    parser.add_argument(
        "--pruner", choices=get_args(Pruner), default="median", help="what ends trials early (default: median)"
    )
    parser.epilog = (tuning.__doc__ or "").partition("\n\n")[2]


def run(arguments: argparse.Namespace) -> int:
    text, errors = tuning.tune(
        None if arguments.config == "default" else arguments.config,
        arguments.overrides,
        arguments.trials,
        arguments.seeds,
        arguments.pruner,
        arguments.quiet,
    )
    print(text)
    for error in errors:
        print(f"ordinalclip: {printable(error)}", file=sys.stderr)
    return 1 if errors else 0
