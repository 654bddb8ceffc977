"""`ordinalclip plot`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ordinalclip.quoting import printable

NEEDS = ("results.run_report",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="folder of a run or of a comparison")
    parser.add_argument("--format", choices=("pdf", "svg", "png"), default="pdf", help="pdf (default), svg or png")
    parser.add_argument("--out", help="folder to write to (default: FOLDER/figures)")


def run(arguments: argparse.Namespace) -> int:
    from ordinalclip.results.comparison import is_comparison, read_comparison
    from ordinalclip.results.comparison_report import comparison_figures
    from ordinalclip.results.figures import check_free, save_figure
    from ordinalclip.results.record import read_run
    from ordinalclip.results.run_report import run_figures
    from ordinalclip.run_folder import RunFolder

    source = RunFolder(arguments.folder)
    if is_comparison(source):
        figures = comparison_figures(read_comparison(source.path))
    else:
        figures = run_figures(read_run(source.path))
    folder = Path(arguments.out or source.figures)
    folder.mkdir(parents=True, exist_ok=True)
    files = {folder / f"{name}.{arguments.format}": figure for name, (figure, _) in figures.items()}
    for path in files:
        check_free(path)
    for path, figure in files.items():
        save_figure(figure, path)
        print(printable(path))
    return 0
