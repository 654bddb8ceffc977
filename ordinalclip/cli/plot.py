"""`ordinalclip plot`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ordinalclip.quoting import printable

NEEDS = ("results.run_report",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="run folder")
    parser.add_argument("--format", choices=("pdf", "png"), default="pdf", help="pdf (default) or png")
    parser.add_argument("--out", help="folder to write to (default: RUN/figures)")


def run(arguments: argparse.Namespace) -> int:
    from ordinalclip.results.figures import save_figure
    from ordinalclip.results.record import read_run
    from ordinalclip.results.run_report import run_figures
    from ordinalclip.run_folder import RunFolder

    figures = run_figures(read_run(arguments.run))
    folder = Path(arguments.out or RunFolder(arguments.run).figures)
    folder.mkdir(parents=True, exist_ok=True)
    for name, (figure, _) in figures.items():
        path = folder / f"{name}.{arguments.format}"
        save_figure(figure, path)
        print(printable(path))
    return 0
