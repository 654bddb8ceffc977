"""Diabetic retinopathy, IDRiD (Porwal et al., 2018): grades 0 to 4.

"B. Disease Grading" has "1. Original Images" with "a. Training Set" and "b. Testing Set", and "2. Groundtruths" with
"a. IDRiD_Disease Grading_Training Labels.csv" and "b. IDRiD_Disease Grading_Testing Labels.csv" (Image name,
Retinopathy grade, ...). Others report six pairs of identical files, three of them with two grades, one of which is in
both parts (training 118, testing 064).
"""

from __future__ import annotations

from ordinalclip.recipes.base import TEST, TRAIN, Download, Protocol, Reading, Recipe, Row, number, once, stem

GRADES = ("none", "mild", "moderate", "severe", "proliferative")
TABLES = {
    TRAIN: ("a. IDRiD_Disease Grading_Training Labels.csv", "a. Training Set"),
    TEST: ("b. IDRiD_Disease Grading_Testing Labels.csv", "b. Testing Set"),
}
NAME, GRADE = "Image name", "Retinopathy grade"


def read(download: Download) -> Reading:
    rows = []
    for part, (table, folder) in TABLES.items():
        entries = download.table(download.file(table), [NAME, GRADE])
        # Of IDRiD's three tasks each has folders of these names: the grading task's are those of its pictures.
        wanted = {cells[NAME] for _, cells in entries}
        pictures = [path for path in download.below(folder) if stem(path) in wanted]
        grading = [path for path in pictures if "grading" in path.lower()] or pictures
        there = download.named(grading, stem)
        if not there:
            raise download.lacks(f"pictures in {folder}/")
        download.all_there(once((place, cells[NAME]) for place, cells in entries), there)
        rows += [
            Row(there[cells[NAME]], number(cells[GRADE], place, GRADE), "", {}, {"published": part})
            for place, cells in entries
        ]
    return Reading(rows, [Protocol("published", "the published parts", ("published",))])


RECIPE = Recipe(
    name="idrid",
    title="IDRiD, diabetic retinopathy",
    homepage="https://ieee-dataport.org/open-access/indian-diabetic-retinopathy-image-dataset-idrid",
    licence="CC BY 4.0",
    citation="Porwal et al.: Indian Diabetic Retinopathy Image Dataset (IDRiD), Data 3(3), 2018",
    expects=(
        "1. Original Images/a. Training Set/, b. Testing Set/                    of B. Disease Grading",
        "2. Groundtruths/a. IDRiD_Disease Grading_Training Labels.csv, b. ... Testing Labels.csv",
    ),
    unit="grades",
    ranks={"values": [0, 1, 2, 3, 4], "names": list(GRADES)},
    read=read,
    pictures=516,
    parts={"published": (413, None, 103)},
    counted_by="Porwal et al. 2018",
    caveats=("a validation part is taken from the training part, which has some 400 pictures: errors are rough",),
)
