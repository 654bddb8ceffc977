"""UTKFace (Zhang, Song and Qi, CVPR 2017): faces from 0 to 116 years.

The owners' aligned and cropped faces are called AGE_GENDER_RACE_DATE.jpg.chip.jpg. Three names lack the race; their age
is there and is used. The split that papers call CORAL's (Cao, Mirjalili and Raschka, 2020; ages 21 to 60) is two lists
of names, utk_train.csv and utk_test.csv in datasets/train-test-csv of github.com/Raschka-research-group/coral-cnn, with
ages that count from 21; MWR's copies of them, UTK_train_coral.csv and UTK_test_coral.csv, say the age itself. No rule
makes them again, so without the lists there is no such split. 13,146 and 3,287 names are the lengths of MWR's lists;
23,708 is what those who use the owners' archive report. Which UTKFace split other papers mean is often not said.
"""

from __future__ import annotations

import re

from ordinalclip.recipes.base import TEST, TRAIN, Download, LayoutError, Protocol, Reading, Recipe, Row, number, once
from ordinalclip.recipes.parts import folds

NAME = re.compile(r"(\d{1,3})_.+\.jpg\.chip\.jpg", re.IGNORECASE)
WHOLE = re.compile(r"\d{1,3}_[01]_[0-4]_\d+\.jpg\.chip\.jpg", re.IGNORECASE)
OLDEST, YOUNGEST_OF_CORAL = 116, 21
LISTS = {
    TRAIN: ("utk_train.csv", "utkface_train.csv", "UTK_train_coral.csv"),
    TEST: ("utk_test.csv", "utkface_test.csv", "UTK_test_coral.csv"),
}
FOLDS = tuple(f"all_{fold}" for fold in range(5))


def read(download: Download) -> Reading:
    faces = [name for name in download.pictures if name.lower().endswith(".jpg.chip.jpg")]
    if not faces:
        raise download.lacks("faces named AGE_GENDER_RACE_DATE.jpg.chip.jpg (UTKFace.tar.gz)")
    faces = download.one_folder(faces, "UTKFace")
    rows, nameless = [], 0
    for face in faces:
        found = NAME.fullmatch(face.rpartition("/")[2])
        if found is None or int(found[1]) > OLDEST:
            nameless += 1
            continue
        rows.append(Row(face, float(found[1])))
    raceless = sum(WHOLE.fullmatch(row.path.rpartition("/")[2]) is None for row in rows)
    said = [f"names that lack the gender or race: {raceless:,}; their age stands first and is used"] if raceless else []
    protocols = [Protocol("all", "all ages, five folds", FOLDS, folds(), {"low": 0, "high": OLDEST, "num": 117})]
    if _coral(download, rows):
        protocols.insert(0, Protocol("coral", "the CORAL split, ages 21 to 60", ("coral",)))
    else:
        said.append(
            f"no CORAL split: {LISTS[TRAIN][0]} and {LISTS[TEST][0]} are not there "
            "(github.com/Raschka-research-group/coral-cnn, datasets/train-test-csv)"
        )
    return Reading(rows, protocols, {"faces whose name does not begin with an age": nameless}, tuple(said))


def _coral(download: Download, rows: list[Row]) -> bool:
    """Fill in the column `coral` from the lists; whether they are there."""
    lists = {part: download.find(*names) for part, names in LISTS.items()}
    if not any(lists.values()):
        return False
    by_name = {_name(row.path): row for row in rows}
    listed: dict[str, str] = {}
    for part, file in lists.items():
        if file is None:
            raise download.lacks(f"{LISTS[part][0]} beside the other list of the CORAL split")
        column = "file" if "file" in download.text(file).partition("\n")[0].strip().split(",") else "filename"
        entries = download.table(file, [column, "age"])
        places = once((place, _name(cells[column])) for place, cells in entries)
        download.all_there(places, by_name)
        if both := sorted(places.keys() & listed.keys()):
            raise ValueError(f"{places[both[0]]}: {both[0]} is in both lists, in the other at {listed[both[0]]}")
        listed |= places
        for place, cells in entries:
            row, age = by_name[_name(cells[column])], number(cells["age"], place, "age")
            if age not in (row.label, row.label - YOUNGEST_OF_CORAL):
                raise LayoutError(
                    f"{place}: age {age:g} for {cells[column]}; the lists of CORAL say its age or the years from 21"
                )
            row.parts["coral"] = part
    return True


def _name(path: str) -> str:
    """A name without folders and endings, of which the lists give one or two."""
    return path.rpartition("/")[2].partition(".")[0]


RECIPE = Recipe(
    name="utkface",
    title="UTKFace",
    homepage="https://susanqq.github.io/UTKFace/",
    licence="non-commercial research only; the pictures belong to their owners",
    citation="Zhang, Song and Qi: Age Progression/Regression by Conditional Adversarial Autoencoder, CVPR 2017",
    expects=(
        "UTKFace/AGE_GENDER_RACE_DATE.jpg.chip.jpg   the aligned and cropped faces, unpacked",
        "utk_train.csv, utk_test.csv                 lists of the CORAL split (coral-cnn on GitHub); without: all ages",
    ),
    unit="years",
    ranks={"low": 21, "high": 60, "num": 40},
    read=read,
    pictures=23_708,
    parts={"coral": (13_146, None, 3_287)},
    counted_by="23,708 faces as users of the owners' archive report; CORAL's lists as shipped by MWR (CVPR 2022)",
    caveats=(
        "the same face may stand in it under two names, with two ages; some 375 groups of identical files are known",
        "errors on the CORAL split (21 to 60) and on all ages are not comparable",
        "no names of people are known, so the same person may be in two parts under different pictures",
    ),
)
