"""`ordinalclip make-gauges`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from tempfile import TemporaryDirectory

from ordinalclip.cli import whole_number

NEEDS = ("gauges",)
# What gauges.py knows, which takes NumPy and Pillow to import; a test compares them.
KINDS = ("dial", "tank", "bar", "pie", "clock", "counter", "thermometer", "slider")
STYLES = ("varied", "calm")
MAX_IMAGES, MAX_SEED, MIN_SIZE, MAX_SIZE = 1_000_000, 2**63 - 1, 16, 2048
TABLE = "labels.csv"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="folder to write to")
    parser.add_argument(
        "--kind", choices=KINDS, default="thermometer", help=f"{', '.join(KINDS)} (default thermometer)", metavar="KIND"
    )
    parser.add_argument("--num", type=whole_number(1, MAX_IMAGES), default=10, help="number of pictures (default 10)")
    parser.add_argument("--seed", type=whole_number(0, MAX_SEED), default=0, help="seed (default 0)")
    parser.add_argument("--size", type=whole_number(MIN_SIZE, MAX_SIZE), default=64, help="side in pixels (default 64)")
    parser.add_argument(
        "--style", choices=STYLES, default="varied", help="varied (default), or calm: the gauge alone on plain grey"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace labels.csv and pictures of the same names")


def run(arguments: argparse.Namespace) -> int:
    from ordinalclip.files import ASIDE, write_text
    from ordinalclip.gauges import drawn_gauges
    from ordinalclip.progress import Progress
    from ordinalclip.quoting import printable

    if not arguments.folder:
        raise ValueError("a folder without a name was given: is a variable of the shell empty?")
    folder = Path(arguments.folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; name a folder to write to")
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{arguments.kind}-{number:04d}.png" for number in range(arguments.num)]
    there = [name for name in (TABLE, *names) if os.path.lexists(folder / name)]
    if there and not arguments.overwrite:
        raise FileExistsError(
            f"{folder} holds {there[0]}{' and others' if there[1:] else ''} already; --overwrite replaces what has the "
            "names of files to be written, another folder leaves it alone"
        )
    if lasting := [name for name in there if not (folder / name).is_file()]:
        raise FileExistsError(f"{folder / lasting[0]}: not a file, so it is not replaced")
    lines = ["image,label"]
    gauges = drawn_gauges(arguments.kind, arguments.num, arguments.seed, arguments.size, arguments.style)
    bar = Progress(names, "drawing", unit="images", quiet=arguments.quiet)
    with TemporaryDirectory(prefix=ASIDE, dir=folder) as aside:  # what is there stays until all are drawn
        for name, (picture, value) in zip(bar, gauges, strict=True):
            picture.save(Path(aside, name))
            lines.append(f"{name},{value:.2f}")
        (folder / TABLE).unlink(missing_ok=True)  # written last: a folder that has it is whole
        for name in names:
            Path(aside, name).replace(folder / name)
    write_text(folder / TABLE, "\n".join(lines) + "\n")
    print(f"{arguments.num} pictures and {TABLE} in {printable(folder)}")
    return 0
