"""Diabetic retinopathy, APTOS 2019 (Kaggle): grades 0 to 4.

The competition's train.csv (id_code, diagnosis) and train_images/ID.png; of its test part no grades were published, so
there is no published split, and five folds are drawn here. The same photograph stands in it more than once, sometimes
with two grades.
"""

from __future__ import annotations

from ordinalclip.recipes.base import Download, Protocol, Reading, Recipe, Row, number, once, stem
from ordinalclip.recipes.parts import folds

GRADES = ("none", "mild", "moderate", "severe", "proliferative")
FOLDS = tuple(f"fold_{fold}" for fold in range(5))


def read(download: Download) -> Reading:
    file = download.file("train.csv")
    entries = download.table(file, ["id_code", "diagnosis"])
    there = download.named(download.below("train_images"), stem)
    if not there:
        raise download.lacks("pictures in train_images/")
    download.all_there(once((place, cells["id_code"]) for place, cells in entries), there)
    rows = [
        Row(there[cells["id_code"]], number(cells["diagnosis"], place, "diagnosis"), "") for place, cells in entries
    ]
    return Reading(rows, [Protocol("folds", "five folds", FOLDS, folds())])


RECIPE = Recipe(
    name="aptos",
    title="APTOS 2019, diabetic retinopathy",
    homepage="https://www.kaggle.com/competitions/aptos2019-blindness-detection",
    licence="the rules of the competition on Kaggle",
    citation="Asia Pacific Tele-Ophthalmology Society: APTOS 2019 Blindness Detection, Kaggle 2019",
    expects=("train.csv, train_images/ID.png   of the competition",),
    unit="grades",
    ranks={"values": [0, 1, 2, 3, 4], "names": list(GRADES)},
    read=read,
    pictures=3_662,
    counted_by="3,662 graded photographs, as users of the competition's data report",
    caveats=(
        "there is no published split with grades: papers divide the 3,662 pictures differently",
        "patients are not known, so both eyes of a patient may be in two parts",
    ),
)
