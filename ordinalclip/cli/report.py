"""`ordinalclip report`."""

from __future__ import annotations

import argparse

NEEDS = ("results.run_report",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")


def run(arguments: argparse.Namespace) -> int:
    from ordinalclip.progress import Progress
    from ordinalclip.quoting import printable
    from ordinalclip.results.card import write_card
    from ordinalclip.results.record import read_run
    from ordinalclip.results.run_report import write_report
    from ordinalclip.run_folder import RunFolder

    for folder in Progress(arguments.runs, "reporting", unit="runs", quiet=arguments.quiet):
        RunFolder(folder).require_finished()
        with RunFolder(folder).locked():
            record = read_run(folder)
            print(printable(write_report(record)))
            print(printable(write_card(record)))
    return 0
