"""`ordinalclip check-data`."""

from __future__ import annotations

import argparse

from ordinalclip import shipped
from ordinalclip.cli import add_configuration
from ordinalclip.quoting import printable

NEEDS = ("data.checks",)
NAMES = ("default", *shipped.short_names("", "methods"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_configuration(parser, "; default: the defaults of `train`")


def run(arguments: argparse.Namespace) -> int:
    from ordinalclip.config import load_config
    from ordinalclip.data import load_parts
    from ordinalclip.data.checks import check

    config = load_config(arguments.config, arguments.overrides, arguments.data)
    unchecked = config.data.model_copy(update={"duplicates": "allow"}) if config.data.duplicates == "refuse" else None
    report = check(load_parts(unchecked or config.data, config.ranks, config.seed), config, arguments.quiet)
    for line in report.lines:
        print(printable(line))
    return 1 if report.problems else 0
