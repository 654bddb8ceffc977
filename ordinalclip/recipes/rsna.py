"""Bone age from hand radiographs (RSNA challenge 2017), labels in months.

The owners' archives hold boneage-training-dataset/ID.png with train.csv (id, boneage, male; on Kaggle
boneage-training-dataset.csv), Bone Age Validation Set with boneage-validation-dataset-1 and -2 and Validation
Dataset.csv (Image ID, male, Bone Age (months)), and Bone Age Test Set with Test Set Images and Bone age ground
truth.xlsx (Case ID, Sex, Ground truth bone age (months)). Kaggle's copy has neither labels of a test part nor the
validation part: then five folds of the training part are drawn here. Pictures of a part are those below a folder whose
name holds training, validation or test.
"""

from __future__ import annotations

from ordinalclip.recipes.base import (
    TEST,
    TRAIN,
    VALIDATION,
    Download,
    Protocol,
    Reading,
    Recipe,
    Row,
    number,
    once,
    stem,
)
from ordinalclip.recipes.parts import folds

TABLES = {  # names of the table, its columns of pictures and labels, and what the folder's name holds
    TRAIN: (("train.csv", "boneage-training-dataset.csv"), "id", "boneage", "training"),
    VALIDATION: (
        ("Validation Dataset.csv", "boneage-validation-dataset.csv"),
        "Image ID",
        "Bone Age (months)",
        "validation",
    ),
    TEST: (
        ("Bone age ground truth.xlsx", "Bone age ground truth.csv"),
        "Case ID",
        "Ground truth bone age (months)",
        "test",
    ),
}
FOLDS = tuple(f"fold_{fold}" for fold in range(5))


def _part_of(path: str) -> str | None:
    """The part whose pictures a folder holds, by the innermost that says so."""
    for folder in reversed(path.lower().split("/")[:-1]):
        for part, (_, _, _, word) in TABLES.items():
            if word in folder:
                return part
    return None


def read(download: Download) -> Reading:
    rows: list[Row] = []
    lacking = []
    for part, (names, picture, label, folder) in TABLES.items():
        if part != TRAIN and download.find(*names) is None:
            lacking.append(names[0])
            continue
        file = download.file(*names)
        there = download.named((path for path in download.pictures if _part_of(path) == part), stem)
        if not there:
            raise download.lacks(f"pictures of {file.name} in a folder with {folder!r} in its name")
        entries = download.table(file, [picture, label])
        download.all_there(once((place, cells[picture]) for place, cells in entries), there)
        for place, cells in entries:
            months = number(cells[label], place, label)
            male = cells.get("male", {"M": "True", "F": "False"}.get(cells.get("Sex", ""), ""))
            rows.append(Row(there[cells[picture]], months, "", {"male": male.title()}, {"challenge": part}))
    if not lacking:
        return Reading(rows, [Protocol("challenge", "the parts of the challenge", ("challenge",))])
    rows = [Row(row.path, row.label, "", row.more) for row in rows if row.parts["challenge"] == TRAIN]
    said = f"not the parts of the challenge: {' and '.join(lacking)} not there; its training part is divided"
    return Reading(rows, [Protocol("folds", "five folds of the training part", FOLDS, folds())], {}, (said,))


RECIPE = Recipe(
    name="rsna",
    title="RSNA bone age",
    homepage="https://www.rsna.org/rsnai/ai-image-challenge/rsna-pediatric-bone-age-challenge-2017",
    licence="RSNA's terms of the challenge; non-commercial research",
    citation="Halabi et al.: The RSNA Pediatric Bone Age Machine Learning Challenge, Radiology 290 (2019)",
    expects=(
        "train.csv (or boneage-training-dataset.csv), boneage-training-dataset/ID.png",
        "Validation Dataset.csv, boneage-validation-dataset-1/ and -2/",
        "Bone age ground truth.xlsx, Test Set Images/           without these two: folds of the training part",
    ),
    unit="months",
    ranks={"low": 1, "high": 228, "num": 228},
    read=read,
    parts={"challenge": (12_611, 1_425, 200)},
    counted_by="Halabi et al. 2019",
    caveats=("whether a child has several radiographs is not known from the files",),
)
