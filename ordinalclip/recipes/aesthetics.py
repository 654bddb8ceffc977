"""Image Aesthetics (Schifanella, Redi and Aiello, ICWSM 2015): pictures of Flickr with five grades of beauty.

The owners distribute beauty-icwsm15-dataset.tsv: #flickr_photo_id, category (people, animals, urban, nature) and
beauty_scores, the grades of five people between commas, 1 (unacceptable) to 5 (exceptional). The pictures are to be had
from Flickr, one by one, and ever fewer of them: Ord2Seq (ICCV 2023) had 13,706 of 15,687. They are looked for as ID.jpg
or another ending, in any folder. The label is the median grade; between two grades, as an even number of them has it,
the lower, as int() in public loaders. The customary protocol is 75 / 5 / 20 in five folds, category by category; the
folds were not published, so these are our own, even over grades.
"""

from __future__ import annotations

from statistics import median_low

from ordinalclip.recipes.base import Download, Protocol, Reading, Recipe, Row, number, once, stem
from ordinalclip.recipes.parts import folds

TABLE, IDENTITY = "beauty-icwsm15-dataset.tsv", "#flickr_photo_id"
GRADES = ("unacceptable", "flawed", "ordinary", "professional", "exceptional")
VALIDATED = 0.05


def read(download: Download) -> Reading:
    table = download.file(TABLE)
    there = download.named(download.pictures, stem)
    entries = download.table(table, [IDENTITY, "category", "beauty_scores"], "\t")
    once((place, cells[IDENTITY]) for place, cells in entries)
    rows, missing = [], 0
    for place, cells in entries:
        scores = [number(score, place, "beauty score") for score in cells["beauty_scores"].split(",")]
        if not all(1 <= score <= len(GRADES) for score in scores):
            raise ValueError(f"{place}: beauty_scores {cells['beauty_scores']!r}; grades are 1 to {len(GRADES)}")
        if not cells["category"].isalpha():
            raise ValueError(f"{place}: category {cells['category']!r} is no word")
        if cells[IDENTITY] not in there:
            missing += 1
            continue
        rows.append(Row(there[cells[IDENTITY]], median_low(scores), "", {"category": cells["category"]}))
    if not rows:
        raise download.lacks(f"pictures called as the photo ids of {TABLE}, such as {entries[0][1][IDENTITY]}.jpg")
    protocols = [Protocol("all", "all categories, five folds of 75 / 5 / 20", _columns("all"), folds(VALIDATED))]
    for category in sorted({row.more["category"] for row in rows}):
        columns, divide = _columns(category), folds(VALIDATED, ("category", category))
        protocols.append(Protocol(category, f"{category}, five folds of 75 / 5 / 20", columns, divide))
    return Reading(rows, protocols, {"listed photos that are not there": missing})


def _columns(name: str) -> tuple[str, ...]:
    return tuple(f"{name}_{fold}" for fold in range(5))


RECIPE = Recipe(
    name="aesthetics",
    title="Image Aesthetics",
    homepage="http://www.di.unito.it/~schifane/dataset/beauty-icwsm15/",
    licence="the photographers' own Creative Commons licences, photo by photo; see Flickr",
    citation="Schifanella, Redi and Aiello: An Image is Worth More than a Thousand Favorites, ICWSM 2015",
    expects=(
        "beauty-icwsm15-dataset.tsv   photo ids, categories and grades",
        "ID.jpg                       the photos that Flickr still has, in any folder",
    ),
    unit="levels",
    ranks={"values": [1, 2, 3, 4, 5], "names": list(GRADES)},
    read=read,
    pictures=13_706,
    counted_by="what Ord2Seq (ICCV 2023) could still get of 15,687 photos",
    caveats=(
        "photos disappear from Flickr, so no two papers have the same pictures",
        "the published folds were not distributed: these are others, of the same sizes",
    ),
)
