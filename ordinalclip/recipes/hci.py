"""Historical Colour Images (Palermo, Hays and Efros, ECCV 2012): photographs of five decades.

HistoricalColor-ECCV2012/data/imgs/decade_database has a folder for every decade, 1930s to 1970s, of 265 pictures each.
The customary protocol draws 210 training, 5 validation and 50 test pictures of every decade, ten times (CNNPOR, POE,
OrdinalCLIP). The draws themselves were never published (an open question at OrdinalCLIP's repository), so these are our
own: in the order of a digest of number of draw and name, the same for everybody. A few papers use 80 / 20 instead.
"""

from __future__ import annotations

from collections.abc import Sequence

from ordinalclip.recipes.base import TEST, TRAIN, VALIDATION, Copies, Download, Protocol, Reading, Recipe, Row
from ordinalclip.recipes.parts import digest, inner_names, two_labels

DECADES = ("1930s", "1940s", "1950s", "1960s", "1970s")
DRAWS = tuple(f"draw_{draw}" for draw in range(10))
TESTED, VALIDATED, EACH = 50, 5, 265


def read(download: Download) -> Reading:
    if lacking := [decade for decade in DECADES if not download.below(decade)]:
        raise download.lacks(f"pictures in decade_database/{lacking[0]}/")
    rows = [
        Row(path, label, "", {"decade": decade})
        for label, decade in enumerate(DECADES)
        for path in download.one_folder(download.below(decade), decade)
    ]
    return Reading(rows, [Protocol("draws", "ten draws of 210 / 5 / 50 a decade", DRAWS, draw)])


def draw(rows: Sequence[Row], columns: Sequence[str], copies: Copies) -> None:
    """Of every decade 50 of 265 for test and 5 for validation; where there are other numbers, the same shares.

    Of copies one picture takes part; pictures of two decades do not.
    """
    odd = two_labels(rows, copies)
    first = {copies.of[path]: path for group in copies.groups for path in [min(group)]}
    mine = [row for row in rows if row.path not in odd and first.get(copies.of.get(row.path, -1), row.path) == row.path]
    names = {row.path: name for row, name in zip(mine, inner_names(mine), strict=True)}
    for column in columns:
        for label in sorted({row.label for row in mine}):
            members = [row for row in mine if row.label == label]
            members.sort(key=lambda row: digest(column + names[row.path]))
            tested = max(1, round(TESTED * len(members) / EACH))
            validated = max(1, round(VALIDATED * len(members) / EACH))
            for place, row in enumerate(members):
                row.parts[column] = TEST if place < tested else VALIDATION if place < tested + validated else TRAIN


RECIPE = Recipe(
    name="hci",
    title="Historical Colour Images",
    homepage="http://graphics.cs.cmu.edu/projects/historicalColor/",
    licence="not stated where we could read it; see the homepage",
    citation="Palermo, Hays and Efros: Dating Historical Color Images, ECCV 2012",
    expects=("decade_database/1930s/ ... decade_database/1970s/   a folder of pictures for every decade",),
    unit="decades",
    ranks={"values": [0, 1, 2, 3, 4], "names": list(DECADES)},
    read=read,
    pictures=5 * EACH,
    counted_by="265 pictures a decade",
    caveats=("the draws of published papers were not published: these are others, of the same sizes",),
)
