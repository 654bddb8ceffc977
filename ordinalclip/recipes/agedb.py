"""AgeDB (Moschoglou et al., CVPRW 2017) and the split AgeDB-DIR (Yang et al., ICML 2021).

The owners' pictures, behind a password, are called NUMBER_Name_AGE_GENDER.jpg. AgeDB-DIR is agedb.csv (age, path,
split: train, val, test) in agedb-dir/data of github.com/YyzHarry/imbalanced-regression. Some names of people hold
letters that archivers spell differently, so pictures are found by number and age. Its split is by picture, balanced
over ages in validation and test, so most people in its test part are in its training part, too. What runs without
further thought is therefore five folds by person, drawn here; dir.yaml is AgeDB-DIR as published. No count of either
was found in a source that we could read.
"""

from __future__ import annotations

import re

from ordinalclip.recipes.base import (
    TEST,
    TRAIN,
    VALIDATION,
    Download,
    LayoutError,
    Protocol,
    Reading,
    Recipe,
    Row,
    number,
    once,
)
from ordinalclip.recipes.parts import folds

NAME = re.compile(r"(\d+)_(.+)_(\d{1,3})_([mf])\.jpg", re.IGNORECASE)
TABLE = "agedb.csv"
PARTS = {"train": TRAIN, "val": VALIDATION, "test": TEST}
FOLDS = tuple(f"people_{fold}" for fold in range(5))


def read(download: Download) -> Reading:
    rows: dict[str, Row] = {}
    nameless = 0
    for path in download.pictures:
        found = NAME.fullmatch(path.rpartition("/")[2])
        if found is None:
            nameless += 1
            continue
        if found[1] in rows:
            raise ValueError(f"{download.root / path}: {rows[found[1]].path} has the number {found[1]}, too")
        rows[found[1]] = Row(path, float(found[3]), found[2].strip().casefold())
    if not rows:
        raise download.lacks("pictures called NUMBER_Name_AGE_GENDER.jpg (AgeDB/)")
    protocols = [Protocol("people", "five folds by person", FOLDS, folds())]
    said = []
    if (file := download.find(TABLE)) is not None:
        _dir(download, rows, download.table(file, ["age", "path", "split"]))
        protocols.append(Protocol("dir", "AgeDB-DIR, by picture", ("dir",)))
    else:
        said.append(f"no AgeDB-DIR: {TABLE} is not there (github.com/YyzHarry/imbalanced-regression, agedb-dir/data)")
    left_out = {"pictures whose name is not NUMBER_Name_AGE_GENDER.jpg": nameless}
    return Reading(list(rows.values()), protocols, left_out, tuple(said))


def _dir(download: Download, rows: dict[str, Row], entries: list[tuple[str, dict[str, str]]]) -> None:
    """Fill in the column `dir`."""
    listed = []
    for place, cells in entries:
        found = NAME.fullmatch(cells["path"].rpartition("/")[2])
        if found is None:
            raise LayoutError(f"{place}: path {cells['path']!r} is not AgeDB/NUMBER_Name_AGE_GENDER.jpg")
        listed.append((place, found[1]))
    download.all_there(once(listed), rows)
    for (place, key), (_, cells) in zip(listed, entries, strict=True):
        if cells["split"] not in PARTS:
            raise LayoutError(f"{place}: split {cells['split']!r}; allowed are {', '.join(PARTS)}")
        if number(cells["age"], place, "age") != rows[key].label:
            raise LayoutError(f"{place}: age {cells['age']} for {rows[key].path}")
        rows[key].parts["dir"] = PARTS[cells["split"]]


RECIPE = Recipe(
    name="agedb",
    title="AgeDB",
    homepage="https://ibug.doc.ic.ac.uk/resources/agedb/",
    licence="password from its owners; see the homepage",
    citation=(
        "Moschoglou et al.: AgeDB: the First Manually Collected, In-the-Wild Age Database, CVPRW 2017; for AgeDB-DIR, "
        "Yang et al.: Delving into Deep Imbalanced Regression, ICML 2021"
    ),
    expects=(
        "AgeDB/NUMBER_Name_AGE_GENDER.jpg   the pictures",
        "agedb.csv                          the split AgeDB-DIR (imbalanced-regression on GitHub); without: by person",
    ),
    unit="years",
    ranks={"low": 0, "high": 101, "num": 102},
    read=read,
    caveats=("AgeDB-DIR is split by picture: its errors are those on people that were trained on",),
)
