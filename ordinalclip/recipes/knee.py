"""Knee osteoarthritis severity (Chen, 2018, from the OAI): Kellgren-Lawrence grades 0 to 4.

KneeXrayData/ClsKLData/kneeKL224 has train, val and test (and auto_test, which is left alone), each with a folder for
every grade; a picture is called by seven digits of the patient and L or R, such as 9003175R.png. Kaggle's copy has the
same below its root.
"""

from __future__ import annotations

import re

from ordinalclip.recipes.base import TEST, TRAIN, VALIDATION, Download, LayoutError, Protocol, Reading, Recipe, Row

PLACE = re.compile(r"(|.*/)(train|val|test)/([0-4])/([^/]+)")
NAME = re.compile(r"(\d{7})([LR])(?:_\d+)?\.png", re.IGNORECASE)
PARTS = {"train": TRAIN, "val": VALIDATION, "test": TEST}
GRADES = ("none", "doubtful", "minimal", "moderate", "severe")
PREFERRED = "kneeKL224/"


def read(download: Download) -> Reading:
    by_root: dict[str, list[re.Match[str]]] = {}
    for path in download.pictures:
        if found := PLACE.fullmatch(path):
            by_root.setdefault(found[1], []).append(found)
    roots = [root for root in by_root if root.endswith(PREFERRED)] or list(by_root)
    if not roots:
        raise download.lacks("train/0/ ... test/4/, folders of the grades below those of the parts")
    if len(roots) > 1:
        raise LayoutError(f"{download.root}: parts are in {roots[0] or '.'} and {roots[1]}; give one of them (--from)")
    pictures = by_root[roots[0]]
    if lacking := [part for part in PARTS if part not in {each[2] for each in pictures}]:
        raise download.lacks(f"pictures in {roots[0]}{lacking[0]}/0/ to {lacking[0]}/4/")
    rows = []
    for each in pictures:
        name = NAME.fullmatch(each[4])
        patient = name[1] if name else ""
        rows.append(Row(each[0], float(each[3]), patient, {}, {"published": PARTS[each[2]]}))
    nameless = sum(not row.subject for row in rows)
    if nameless:
        raise LayoutError(
            f"{download.root / next(row.path for row in rows if not row.subject)}: not called by seven digits of the "
            f"patient with L or R, as 9003175R.png is; {nameless:,} are so"
        )
    return Reading(rows, [Protocol("published", "the published parts", ("published",))])


RECIPE = Recipe(
    name="knee",
    title="Knee osteoarthritis severity",
    homepage="https://data.mendeley.com/datasets/56rmx5bjcr/1",
    licence="CC BY 4.0",
    citation="Chen: Knee Osteoarthritis Severity Grading Dataset, Mendeley Data V1 (2018), doi 10.17632/56rmx5bjcr.1",
    expects=("ClsKLData/kneeKL224/{train,val,test}/{0,1,2,3,4}/9003175R.png   or the same below the root (Kaggle)",),
    unit="grades",
    ranks={"values": [0, 1, 2, 3, 4], "names": list(GRADES)},
    read=read,
    parts={"published": (5_778, 826, 1_656)},
    counted_by="the release on Mendeley Data, as its users count it",
    caveats=("auto_test, knees cut out by a program, is left alone",),
)
