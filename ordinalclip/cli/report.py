"""`ordinalclip report`."""

from __future__ import annotations

import argparse
from pathlib import Path

NEEDS = ("results.run_report",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="folders of runs and of comparisons")


def run(arguments: argparse.Namespace) -> int:
    from ordinalclip.progress import Progress
    from ordinalclip.quoting import printable
    from ordinalclip.results.card import write_card
    from ordinalclip.results.comparison import is_comparison, read_comparison
    from ordinalclip.results.comparison_report import write_comparison_report
    from ordinalclip.results.record import read_run
    from ordinalclip.results.run_report import write_report
    from ordinalclip.run_folder import RunFolder

    for folder in Progress(arguments.folders, "reporting", unit="folders", quiet=arguments.quiet):
        compared = is_comparison(RunFolder(folder))
        with RunFolder(folder).locked():
            if compared:
                print(printable(write_comparison_report(read_comparison(Path(folder)))))
            else:
                record = read_run(folder)
                print(printable(write_report(record)))
                print(printable(write_card(record)))
    return 0
