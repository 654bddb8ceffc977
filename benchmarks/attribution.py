"""Do maps point at what moves? Attributions on gauges against the true place of needle and column.

    python benchmarks/attribution.py --out benchmarks/results/attribution

Every method is trained as in its file in configs/methods, on each kind of gauge, with each seed, and explained on new
pictures of a seed that nothing is trained on. Of every map: the share of its absolute values inside a region, and the
region's share of the area. The regions are the part of the picture that moves with the reading (`gauges.moving_part`),
and of a thermometer also the end of its column: where a reading that is 5 higher differs from one that is 5 lower. Then
the same of the model with all its weights shuffled, and the rank correlation of the two maps, signed and absolute
(Adebayo et al., "Sanity Checks for Saliency Maps", NeurIPS 2018): a map that does not change with the weights shows the
picture, not the model.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from scipy.stats import spearmanr

from ordinalclip.config import load_config
from ordinalclip.explain import GRADIENTS, OCCLUSION, integrated_gradients, occlusion
from ordinalclip.gauges import drawn_gauges, moving_parts
from ordinalclip.images import prepare
from ordinalclip.model import OrdinalModel
from ordinalclip.run_folder import RunFolder
from ordinalclip.runs import train_run

METHODS = ("ordinalclip", "coop", "l1", "ordreg", "conord")
KINDS = ("dial", "thermometer")
SEEDS = (1, 2, 3)
PICTURES_SEED = 1000
MAPS = {GRADIENTS: integrated_gradients, OCCLUSION: occlusion}
NEAR = 5  # per cent, on either side of the end of a column


@torch.no_grad()
def shuffled(model: OrdinalModel, seed: int = 0) -> OrdinalModel:
    """The model, in place, with the entries of every weight and of its prototypes in random order.

    Running statistics and the neighbours that some heads ask stay: without them there would be no answer to explain.
    """
    generator = torch.Generator().manual_seed(seed)
    prototypes = [buffer for name, buffer in model.named_buffers() if name.endswith("prototypes")]
    for tensor in (*model.parameters(), *prototypes):
        order = torch.randperm(tensor.numel(), generator=generator)
        tensor.copy_(tensor.flatten()[order].view_as(tensor))
    return model


def regions(kind: str, number: int) -> dict[str, list[np.ndarray]]:
    """By name, where in each picture the reading is to be seen, (64, 64) in [0, 1]."""
    parts = list(moving_parts(kind, number, PICTURES_SEED))
    if kind == "dial":
        return {"needle": parts}
    higher, lower = (moving_parts(kind, number, PICTURES_SEED, shift=shift) for shift in (NEAR, -NEAR))
    return {"column": parts, "its end": [np.abs(one - other) for one, other in zip(higher, lower, strict=True)]}


def compared(folder: Path, kind: str, number: int) -> Iterator[dict[str, Any]]:
    """A row for each map and region of the run in a folder, in the mean over pictures.

    Pictures without a map, as a shuffled model that always answers the same gives none, are left out of what needs that
    map; `maps` and `shuffled_maps` are how many there are.
    """
    model, random = RunFolder(folder).read_model(), shuffled(RunFolder(folder).read_model())
    pictures = [
        prepare(picture, model.config.pixel_spec)[None] for picture, _ in drawn_gauges(kind, number, PICTURES_SEED)
    ]
    for name, attribute in MAPS.items():
        own, other = ([attribute(each, pixels) for pixels in pictures] for each in (model, random))
        pairs = [pair for pair in zip(own, other, strict=True) if not any(isinstance(each, str) for each in pair)]
        ranks = [spearmanr(one.map.ravel(), two.map.ravel()).statistic for one, two in pairs]
        sizes = [spearmanr(np.abs(one.map).ravel(), np.abs(two.map).ravel()).statistic for one, two in pairs]
        for region, places in regions(kind, number).items():
            share, area = _inside(own, places)
            shuffled_share, shuffled_area = _inside(other, places)
            yield {
                "map": name,
                "region": region,
                "area": area,
                "share": share,
                "ratio": share / area,
                "shuffled_ratio": shuffled_share / shuffled_area,
                "correlation": float(np.mean(ranks)) if ranks else math.nan,
                "absolute_correlation": float(np.mean(sizes)) if sizes else math.nan,
                "maps": sum(not isinstance(each, str) for each in own),
                "shuffled_maps": sum(not isinstance(each, str) for each in other),
            }


def _inside(maps: list[Any], places: list[np.ndarray]) -> tuple[float, float]:
    """Shares of maps and of the area, in the mean over the pictures that have a map; NaN where none has."""
    known = [
        (found.share(place), place.mean())
        for found, place in zip(maps, places, strict=True)
        if not isinstance(found, str)
    ]
    share, area = np.mean(known, axis=0) if known else (math.nan, math.nan)
    return float(share), float(area)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.process_time()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for kind in KINDS:
            for method in METHODS:
                for seed in SEEDS:
                    folder = Path(scratch) / f"{kind}-{method}-{seed}"
                    changes = [f"data.kinds=[{kind}]", f"seed={seed}", f"output_dir={folder}"]
                    if method in ("ordinalclip", "coop"):
                        changes.append(f"head.prompt=a photo of a {kind} reading")
                    changes += ["evaluation.report=false", "evaluation.space=false"]
                    metrics = train_run(load_config(method, changes), quiet=True)
                    own = {"gauge": kind, "method": method, "seed": seed, "mae": metrics["test"]["mae"]}
                    for row in compared(folder, kind, options.pictures):
                        rows.append(own | row)
                        print(rows[-1], flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "attribution.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{value:.4f}" if isinstance(value, float) else value for key, value in row.items()})
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "captum", "scipy", "pillow"))
    text = HEAD.format(
        command="python benchmarks/attribution.py --out benchmarks/results/attribution",
        pictures=options.pictures,
        seed=PICTURES_SEED,
        seeds=", ".join(map(str, SEEDS)),
        machine=platform.machine(),
        versions=versions,
        near=NEAR,
        minutes=round((time.process_time() - begun) / 60),
    )
    (options.out / "README.md").write_text(text + "\n".join(table(rows)) + "\n", encoding="utf-8")


HEAD = """# Do maps point at what moves?

    {command}

{pictures} new pictures a gauge (seed {seed}); models of `configs/methods`, 4 shots of each of 101 readings,
tiny CLIP at 64 px, seeds {seeds}; {machine}, one thread, {versions}; {minutes} minutes of processor time. All
numbers of all seeds are in [attribution.csv](attribution.csv).

*Inside*: share of the map's absolute values inside the region. *Times the area*: that over the region's share
of the picture; 1 is what a map gets that knows nothing. Regions are the needle; the column of a thermometer
without its bulb; and the end of the column, where readings {near} higher and lower differ. *Shuffled*: the
same, of the model with all weights shuffled. *Correlation*: Spearman's, of the maps of the model and of the
shuffled model, signed and absolute. Mean ± standard deviation over seeds. A shuffled model may always answer
the same, and then has no map (`shuffled_maps` in the table of all numbers); "-" is where none has.

"""


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A line of Markdown for every gauge, map, region and method."""
    lines = [
        "| gauge | map | region, area | method | MAE | inside | times the area | shuffled | correlation | absolute |",
        "|---|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]

    def cell(own: list[dict[str, Any]], column: str) -> str:
        values = [row[column] for row in own if not math.isnan(row[column])]
        if column == "share":
            return f"{100 * mean(values):.1f} ± {100 * stdev(values):.1f} %"
        return f"{mean(values):.2f} ± {stdev(values):.2f}" if len(values) > 1 else "-"

    keys = ("gauge", "map", "region", "method")
    for key in dict.fromkeys(tuple(row[name] for name in keys) for row in sorted(rows, key=_order)):
        own = [row for row in rows if tuple(row[name] for name in keys) == key]
        gauge, name, region, method = key
        cells = [gauge, name, f"{region}, {100 * own[0]['area']:.1f} %", method, cell(own, "mae")]
        cells += [
            cell(own, column) for column in ("share", "ratio", "shuffled_ratio", "correlation", "absolute_correlation")
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _order(row: dict[str, Any]) -> tuple[Any, ...]:
    return KINDS.index(row["gauge"]), list(MAPS).index(row["map"]), row["region"] == "its end"


if __name__ == "__main__":
    main()
