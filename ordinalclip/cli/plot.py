"""`ordinalclip plot`."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from ordinalclip.quoting import printable

NEEDS = ("results.run_report",)
LETTER = 9.5  # inches of text on a page
logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="folder of a run or of a comparison")
    parser.add_argument("--format", choices=("pdf", "svg", "png"), default="pdf", help="pdf (default), svg or png")
    parser.add_argument(
        "--width",
        help="of every figure: column or page of a paper, or millimetres as in 85mm (default: as in the report, a page "
        "for the panels of all metrics, a column for the others)",
    )
    parser.add_argument("--out", help="folder to write to (default: FOLDER/figures)")


def run(arguments: argparse.Namespace) -> int:
    from ordinalclip.results.comparison import is_comparison, read_comparison
    from ordinalclip.results.comparison_report import comparison_figures
    from ordinalclip.results.figures import COLUMN, check_free, inches, save_figure
    from ordinalclip.results.record import read_run
    from ordinalclip.results.run_report import run_figures
    from ordinalclip.run_folder import RunFolder

    width = None if arguments.width is None else inches(arguments.width)
    source = RunFolder(arguments.folder)
    if is_comparison(source):
        figures = comparison_figures(read_comparison(source.path), width)
    else:
        figures = run_figures(read_run(source.path), width or COLUMN)
    folder = Path(arguments.out or source.figures)
    folder.mkdir(parents=True, exist_ok=True)
    files = {folder / f"{name}.{arguments.format}": figure for name, (figure, _) in figures.items()}
    for path in files:
        check_free(path)
    for path, figure in files.items():
        save_figure(figure, path)
        print(printable(path))
        if (height := figure.get_figheight()) > LETTER:
            logger.warning("%s is %.1f inches high, more than a page; --width page makes it lower", path.name, height)
    return 0
