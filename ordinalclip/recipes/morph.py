"""MORPH II (Ricanek and Tesafaye, 2006): mugshots with ages, and the settings A to D.

The owners' pictures are called PERSON_NUMBERsexAGE.JPG, such as 071011_11M44.JPG, in Album2. The settings are lists, in
datalist/morph of github.com/nhshin-mcl/MWR (from Order Learning, Lim et al. 2020):

    A   Setting_1_fold{0..4}_train.txt and _test.txt    5,492 pictures, 4,394 and 1,098; by picture, so that 77 to 79 %
                                                        of the test pictures show somebody of the training part
    B   Setting_2_fold{0,1,2}.txt                       7,000 each: trained on the first, tested on both others, and
                                                        trained on the second, tested on the first and the third
    C   Setting_3.txt                                   a column `fold` of five; by picture: 96 %
    D   Setting_4.txt                                   a column `fold` of five; by person, but for 1.5 %

What runs without further thought is D without what its folds share, or, without that list, five folds by person drawn
here. How B takes its three lists is said differently by different papers; this is the reading of the original one as
quoted by others, not verified.
"""

from __future__ import annotations

import re
from pathlib import Path

from ordinalclip.recipes.base import TEST, TRAIN, Download, LayoutError, Protocol, Reading, Recipe, Row, number, once
from ordinalclip.recipes.parts import folds

NAME = re.compile(r"(\d+)_\d+([MF])(\d{2,3})\.jpe?g", re.IGNORECASE)
HOW = {"A": "setting A, by picture", "B": "setting B", "C": "setting C, by picture", "D": "setting D, by person"}


def read(download: Download) -> Reading:
    rows: dict[str, Row] = {}
    nameless = 0
    for path in download.pictures:
        name = path.rpartition("/")[2].upper()
        found = NAME.fullmatch(name)
        if found is None:
            nameless += 1
            continue
        if name in rows:
            raise ValueError(f"{download.root / path}: {rows[name].path} is called so, too; give one folder of them")
        rows[name] = Row(path, float(found[3]), found[1], {"gender": found[2].upper()})
    if not rows:
        raise download.lacks("pictures called PERSON_NUMBERsexAGE.JPG, such as 071011_11M44.JPG (Album2/)")
    settings = {"D": _folds(download, rows, "D", "Setting_4.txt")}
    settings |= {"A": _a(download, rows), "B": _b(download, rows), "C": _folds(download, rows, "C", "Setting_3.txt")}
    protocols = [Protocol(name, HOW[name], columns) for name, columns in settings.items() if columns]
    said = []
    if lacking := [name for name in sorted(settings) if not settings[name]]:
        said.append(
            f"no lists of setting {', '.join(lacking)} (Setting_*.txt, github.com/nhshin-mcl/MWR, datalist/morph)"
        )
    if not settings["D"]:
        own = Protocol("people", "five folds by person", tuple(f"people_{fold}" for fold in range(5)), folds())
        protocols.insert(0, own)
    left_out = {"pictures whose name is not PERSON_NUMBERsexAGE.JPG": nameless}
    return Reading(list(rows.values()), protocols, left_out, tuple(said))


def _entries(download: Download, rows: dict[str, Row], file: Path) -> list[tuple[str, dict[str, str]]]:
    """Rows of a list, whose cells are between tabs or single spaces, with the names of pictures in capitals.

    Raises:
        LayoutError: a picture that is not there, or has another age.
    """
    with file.open(encoding="utf-8-sig", errors="replace") as opened:
        separator = "\t" if "\t" in opened.readline() else " "
    entries = download.table(file, ["filename", "age"], separator)
    for place, cells in entries:
        cells["filename"] = cells["filename"].rpartition("/")[2].upper()
        row = rows.get(cells["filename"])
        if row is not None and number(cells["age"], place, "age") != row.label:
            raise LayoutError(f"{place}: age {cells['age']} for {row.path}")
    download.all_there({cells["filename"]: place for place, cells in entries}, rows)
    return entries


def _a(download: Download, rows: dict[str, Row]) -> tuple[str, ...]:
    names = {(fold, part): f"Setting_1_fold{fold}_{part}.txt" for fold in range(5) for part in (TRAIN, TEST)}
    if not any(download.find(name) for name in names.values()):
        return ()
    for (fold, part), name in names.items():
        for place, cells in _entries(download, rows, download.file(name)):
            parts = rows[cells["filename"]].parts
            if parts.setdefault(f"A_{fold}", part) != part:
                raise LayoutError(f"{place}: {cells['filename']} is in the other list of this fold, too")
    return tuple(f"A_{fold}" for fold in range(5))


def _b(download: Download, rows: dict[str, Row]) -> tuple[str, ...]:
    names = [f"Setting_2_fold{number}.txt" for number in range(3)]
    if not any(download.find(name) for name in names):
        return ()
    lists = [{cells["filename"] for _, cells in _entries(download, rows, download.file(name))} for name in names]
    for trained in (0, 1):
        for place, members in enumerate(lists):
            for name in members:
                if place == trained or f"B_{trained}" not in rows[name].parts:
                    rows[name].parts[f"B_{trained}"] = TRAIN if place == trained else TEST
    return ("B_0", "B_1")


def _folds(download: Download, rows: dict[str, Row], setting: str, name: str) -> tuple[str, ...]:
    if (file := download.find(name)) is None:
        return ()
    entries = _entries(download, rows, file)
    once((place, cells["filename"]) for place, cells in entries)
    for place, cells in entries:
        if cells.get("fold") not in ("0", "1", "2", "3", "4"):
            raise LayoutError(f"{place}: looked for a fold from 0 to 4, found {cells.get('fold')!r}")
        for fold in range(5):
            part = TEST if cells["fold"] == str(fold) else TRAIN
            rows[cells["filename"]].parts[f"{setting}_{fold}"] = part
    return tuple(f"{setting}_{fold}" for fold in range(5))


RECIPE = Recipe(
    name="morph",
    title="MORPH II",
    homepage="Face Aging Group, University of North Carolina Wilmington",
    licence="for sale or on request from its owners, under their terms; not free",
    citation="Ricanek and Tesafaye: MORPH: a Longitudinal Image Database of Normal Adult Age-Progression, FG 2006",
    expects=(
        "Album2/PERSON_NUMBERsexAGE.JPG            the pictures",
        "Setting_1_fold0_train.txt ... Setting_4.txt   lists of settings A to D (MWR on GitHub); without: by person",
    ),
    unit="years",
    ranks={"low": 16, "high": 77, "num": 62},
    read=read,
    pictures=55_134,
    parts={f"A_{fold}": (4_394, None, 1_098) for fold in range(5)},
    counted_by="55,134 pictures (arXiv 1811.06446); setting A: 4,394 and 1,098 in the lists of MWR",
    caveats=(
        "in settings A and C most test pictures show somebody who was trained on; D is by person",
        "errors of different settings are not comparable",
    ),
)
