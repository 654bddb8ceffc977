"""`ordinalclip audit`: which labels of a run's data are wrong, as far as its method can tell.

    ordinalclip audit runs/mine
    ordinalclip audit runs/mine --out labels --folds 10 --jobs 2

All labelled pictures of the run, of all its parts, are divided in folds, even over the ranks; rows of a group
(data.group) and copies of a picture stay together. The run's configuration is trained on all folds but one, as often as
there are folds, and judges the pictures of that one, which it has not seen. A label is scored by the ranked probability
score of the predicted distribution, in ranks; by the absolute error where a method gives no distribution. Pictures that
are almost the same to the encoder are listed, too.

Written, to the folder audit/ of the run or to --out: audit.html, a page of thumbnails; labels.csv, all labels with
file, row, prediction, score and the other columns of the data; near_duplicates.csv; and folds/, a run folder a fold.
Nothing else of the run is touched. However it ends, the same command goes on with it.

A high score is a reason to look, not a verdict: a rare view or a hard picture scores high, too (docs/audit.md).
"""

from __future__ import annotations

import argparse

from ordinalclip.cli import add_overrides, whole_number
from ordinalclip.quoting import printable

NEEDS = ("audit",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="run folder of a finished run")
    add_overrides(parser, "how folds are executed, e.g. data.root=PATH of pictures that have moved, data.workers=4")
    parser.add_argument("--out", metavar="FOLDER", help="where to write (default: the run's folder audit/)")
    parser.add_argument("--folds", type=whole_number(2, 100), default=5, help="how many (default: 5)")
    parser.add_argument("--top", type=whole_number(1, 1000), default=60, help="labels on the page (default: 60)")
    parser.add_argument("--jobs", type=whole_number(1, 1024), default=1, help="folds at a time (default: 1)")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier audit has written there")
    parser.epilog = (__doc__ or "").partition("\n\n")[2]


def run(arguments: argparse.Namespace) -> int:
    from ordinalclip.audit import audit

    found, place = audit(
        arguments.folder,
        arguments.out,
        arguments.overrides,
        arguments.folds,
        arguments.top,
        arguments.jobs,
        arguments.overwrite,
        arguments.quiet,
    )
    print(f"{len(found.scores)} labels; those that fit least:")
    for row in found.order[:5].tolist():
        print(
            printable(
                f"  {found.measure} {found.scores[row]:.4g}  {found.pictures.names.place(row)}: "
                f"given {found.given(row)}, predicted {found.answered(row)}"
            )
        )
    if found.pairs is not None:
        across = sum(map(found.across, found.pairs))
        print(f"{len(found.pairs)} pairs of pictures are nearly the same to the encoder, {across} of them in two parts")
    print(printable(f"written: {place}/audit.html, labels.csv, near_duplicates.csv"))
    return 0
