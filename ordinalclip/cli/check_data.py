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
    parser.add_argument(
        "--report", metavar="FILE.html", help="also write a page: labels by rank, pictures of each, sizes, duplicates"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the page that is there")


def run(arguments: argparse.Namespace) -> int:
    from ordinalclip.config import load_config
    from ordinalclip.data import load_parts
    from ordinalclip.data.checks import check
    from ordinalclip.results.data_report import check_place, write_data_report

    config = load_config(arguments.config, arguments.overrides, arguments.data)
    if arguments.report:
        check_place(arguments.report, arguments.overwrite)
    unchecked = config.data.model_copy(update={"duplicates": "allow"}) if config.data.duplicates == "refuse" else None
    parts = load_parts(unchecked or config.data, config.ranks, config.seed)
    found = check(parts, config, arguments.quiet)
    for line in found.lines:
        print(printable(line))
    if arguments.report:
        print(printable(f"report: {write_data_report(parts, config, found, arguments.report)}"))
    return 1 if found.problems else 0
