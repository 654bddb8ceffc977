"""Adience (Eidinger, Enbar and Hassner, 2014): faces in eight age groups, five official folds.

The owners' files are fold_0_data.txt to fold_4_data.txt, cells between tabs with a header (user_id, original_image,
face_id, age, gender, ...), and the faces, aligned/USER/landmark_aligned_face.FACE.ORIGINAL or, not aligned in the
plane, faces/USER/coarse_tilt_aligned_face.FACE.ORIGINAL. Most ages are one of eight intervals; others are single ages,
such as 35, other intervals, such as (8, 23), or None. There is no published rule for them, and loaders differ: here an
age that lies wholly in one of the groups takes it, and the others are left out and counted. A fold is the test part, a
tenth of the other four the validation part. The lists of L2RCLIP have 17,470 faces; by which rule is not written.
A face_id is taken for a person within its user's album.
"""

from __future__ import annotations

import re

from ordinalclip.recipes.base import TEST, TRAIN, Download, Protocol, Reading, Recipe, Row, once

GROUPS = ((0, 2), (4, 6), (8, 13), (15, 20), (25, 32), (38, 43), (48, 53), (60, 100))
NAMES = ("0 to 2", "4 to 6", "8 to 13", "15 to 20", "25 to 32", "38 to 43", "48 to 53", "60 and older")
AGE = re.compile(r"\(?(\d+)(?:, ?(\d+)\))?")
FILES = tuple(f"fold_{fold}_data.txt" for fold in range(5))
FOLDS = tuple(f"fold_{fold}" for fold in range(5))
FACES = {"aligned": "landmark_aligned_face", "faces": "coarse_tilt_aligned_face"}
COLUMNS = ("user_id", "original_image", "face_id", "age")


def read(download: Download) -> Reading:
    tables = [download.file(name) for name in FILES]
    folder = next((name for name in FACES if download.below(name)), None)
    if folder is None:
        raise download.lacks("aligned/USER/landmark_aligned_face.*.jpg or faces/USER/coarse_tilt_aligned_face.*.jpg")
    there = download.named(download.below(folder), lambda path: "/".join(path.rsplit("/", 2)[-2:]))
    rows, listed, ageless, between = [], [], 0, 0
    for fold, table in enumerate(tables):
        for place, cells in download.table(table, COLUMNS, "\t"):
            user, face = cells["user_id"], cells["face_id"]
            name = f"{user}/{FACES[folder]}.{face}.{cells['original_image']}"
            listed.append((place, name))
            found = AGE.fullmatch(cells["age"])
            if found is None:
                if cells["age"] not in ("None", ""):
                    raise ValueError(f"{place}: age {cells['age']!r} is none; such as (25, 32), 35 or None")
                ageless += 1
                continue
            group = group_of(int(found[1]), int(found[2] or found[1]))
            if group is None:
                between += 1
                continue
            parts = {column: TEST if fold == number else TRAIN for number, column in enumerate(FOLDS)}
            rows.append(Row(there.get(name, name), group, f"{user}/{face}", {"fold": str(fold)}, parts))
    download.all_there(once(listed), there)
    protocols = [Protocol("folds", "the five official folds", FOLDS)]
    left_out = {"faces without an age": ageless, "faces whose age lies in none of the eight groups": between}
    return Reading(rows, protocols, left_out, (f"faces of {folder}/",))


def group_of(low: int, high: int) -> int | None:
    """The group in which all ages from low to high lie."""
    return next((place for place, (first, last) in enumerate(GROUPS) if first <= low and high <= last), None)


RECIPE = Recipe(
    name="adience",
    title="Adience",
    homepage="https://talhassner.github.io/home/projects/Adience/Adience-data.html",
    licence="given out by its owners on a form, for research; see the homepage",
    citation="Eidinger, Enbar and Hassner: Age and Gender Estimation of Unfiltered Faces, IEEE TIFS 2014",
    expects=(
        "fold_0_data.txt ... fold_4_data.txt                  the official folds",
        "aligned/USER/landmark_aligned_face.FACE.ORIGINAL     the aligned faces (aligned.tar.gz), or",
        "faces/USER/coarse_tilt_aligned_face.FACE.ORIGINAL    those of faces.tar.gz",
    ),
    unit="groups",
    ranks={"values": list(range(8)), "names": list(NAMES)},
    read=read,
    parts={column: (None, None, test) for column, test in zip(FOLDS, (4_377, 3_093, 3_285, 3_039, 3_676), strict=True)},
    counted_by="faces with a group in the lists of L2RCLIP (NeurIPS 2023), whose rule for odd ages is not known",
    caveats=(
        "ages outside the eight groups are treated differently by every loader: compare counts before errors",
        "papers train on four whole folds; here a tenth of their people is the validation part",
    ),
)
