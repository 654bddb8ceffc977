"""KonIQ-10k (Hosu, Lin, Sziranyi and Saupe, 2020): pictures with a mean opinion score from 0 to 100.

The owners' archives hold 1024x768/ or 512x384/ with the pictures; koniq10k_distributions_sets.csv (image_name, c1 to
c5, c_total, MOS, SD, set: training, validation, test), in metadata of github.com/subpic/koniq, has the scores on the
scale to 100 and the published parts. koniq10k_scores_and_distributions.csv, which is beside the pictures, has no parts
and another scale of MOS, so it does not do. How many pictures each part has was not found in a source that we could
read.
"""

from __future__ import annotations

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

TABLE = "koniq10k_distributions_sets.csv"
PARTS = {"training": TRAIN, "validation": VALIDATION, "test": TEST}
FOLDERS = ("1024x768", "512x384")


def read(download: Download) -> Reading:
    if download.find(TABLE) is None:
        raise download.lacks(f"{TABLE} (github.com/subpic/koniq, metadata), which has the parts,")
    entries = download.table(download.file(TABLE), ["image_name", "MOS", "set"])
    folder = next((name for name in FOLDERS if download.below(name)), None)
    if folder is None:
        raise download.lacks(f"pictures in {' or '.join(f'{name}/' for name in FOLDERS)}")
    there = {path.rpartition("/")[2]: path for path in download.one_folder(download.below(folder), folder)}
    download.all_there(once((place, cells["image_name"]) for place, cells in entries), there)
    rows = []
    for place, cells in entries:
        score = number(cells["MOS"], place, "MOS")
        if not 0 <= score <= 100:
            raise LayoutError(f"{place}: MOS {score:g}; scores are from 0 to 100")
        if cells["set"] not in PARTS:
            raise LayoutError(f"{place}: set {cells['set']!r}; allowed are {', '.join(PARTS)}")
        rows.append(Row(there[cells["image_name"]], score, "", {}, {"published": PARTS[cells["set"]]}))
    return Reading(
        rows, [Protocol("published", "the published parts", ("published",))], {}, (f"pictures of {folder}/",)
    )


RECIPE = Recipe(
    name="koniq",
    title="KonIQ-10k",
    homepage="https://database.mmsp-kn.de/koniq-10k-database.html",
    licence="not stated where we could read it; see the homepage",
    citation="Hosu, Lin, Sziranyi and Saupe: KonIQ-10k, IEEE Transactions on Image Processing 29 (2020)",
    expects=(
        "koniq10k_distributions_sets.csv   scores and parts (github.com/subpic/koniq, metadata)",
        "1024x768/ or 512x384/             the pictures",
    ),
    unit="points",
    ranks={"low": 0, "high": 100, "num": 101},
    read=read,
    pictures=10_073,
    counted_by="Hosu et al. 2020",
    caveats=("papers report correlations (PLCC, SRCC); random 80 / 20 splits are as common as the published parts",),
)
