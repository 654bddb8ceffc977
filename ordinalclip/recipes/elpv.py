"""ELPV (Buerhop-Lutz et al., 2018): solar cells in electroluminescence pictures, with the probability of a defect.

The owners' labels.csv has no header: path, probability (0, 1/3, 2/3 or 1) and type of the module (mono, poly), between
spaces. The label is the probability as a level from 0 to 3. There is no published split: parts are drawn by seed, even
over levels and types.
"""

from __future__ import annotations

from ordinalclip.recipes.base import Download, LayoutError, Protocol, Reading, Recipe, Row, once, plain_number

LEVELS = 3


def read(download: Download) -> Reading:
    file = download.file("labels.csv")
    entries = []
    for line, text in enumerate(download.text(file).splitlines(), 1):
        cells, place = text.split(), f"{file}, line {line}"
        if not cells:
            continue
        level = plain_number(cells[1]) if len(cells) == 3 else None
        if level is None or abs(LEVELS * level - round(LEVELS * level)) > 1e-6:
            raise LayoutError(f"{place}: looked for `path probability type`, found {text.strip()[:60]!r}")
        if not 0 <= level <= 1:
            raise LayoutError(f"{place}: probability {level:g}; from 0 to 1")
        entries.append((place, cells, round(LEVELS * level)))
    base = file.parent.relative_to(download.root).as_posix()
    prefix = "" if base == "." else f"{base}/"
    download.all_there(once((place, prefix + cells[0]) for place, cells, _ in entries), download.pictures)
    rows = [Row(prefix + cells[0], level, "", {"module_type": cells[2]}) for _, cells, level in entries]
    options = {"split": [0.6, 0.15, 0.25], "stratify": ["label", "module_type"]}
    return Reading(rows, [Protocol("seeds", "60 / 15 / 25 by seed, even over levels and types", options=options)])


RECIPE = Recipe(
    name="elpv",
    title="ELPV, solar cells",
    homepage="https://github.com/zae-bayern/elpv-dataset",
    licence="CC BY-NC-SA 4.0",
    citation="Buerhop-Lutz et al.: A Benchmark for Visual Identification of Defective Solar Cells, EU PVSEC 2018",
    expects=("labels.csv, images/cellNNNN.png   of the repository",),
    unit="levels",
    ranks={"values": [0, 1, 2, 3]},
    read=read,
    pictures=2_624,
    counted_by="the README of its repository",
    caveats=("cells are from 44 modules, which are not told apart in labels.csv: cells of one may be in two parts",),
)
