"""Do maps point at what moves? Attributions on gauges against the true place of needle and column.

    python benchmarks/attribution.py --out benchmarks/results/attribution

Every method is trained as in its file in configs/methods, on each kind of gauge, with each seed, and explained on new
pictures of a seed that nothing is trained on. Of every map: the share of its absolute values inside the part of the
picture that moves with the reading (`gauges.moving_part`), and that part's share of the area. Then the same of the
model with all its weights shuffled, and the rank correlation of the two maps, signed and absolute (Adebayo et al.,
"Sanity Checks for Saliency Maps", NeurIPS 2018): a map that does not change with the weights shows the picture, not the
model.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import tempfile
import time
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
COLUMNS = ("share", "area", "ratio", "shuffled_ratio", "correlation", "absolute_correlation", "maps")


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


def compared(folder: Path, kind: str, number: int) -> dict[str, dict[str, float]]:
    """What `COLUMNS` says, of each kind of map of the run in a folder, in the mean over pictures."""
    model, random = RunFolder(folder).read_model(), shuffled(RunFolder(folder).read_model())
    spec, found = model.config.pixel_spec, {}
    pictures = list(
        zip(drawn_gauges(kind, number, PICTURES_SEED), moving_parts(kind, number, PICTURES_SEED), strict=True)
    )
    for name, attribute in MAPS.items():
        rows = []
        for (picture, _), part in pictures:
            pixels = prepare(picture, spec)[None]
            own, other = attribute(model, pixels), attribute(random, pixels)
            if isinstance(own, str) or isinstance(other, str):  # a shuffled model may answer always the same
                continue
            signed = spearmanr(own.map.ravel(), other.map.ravel()).statistic
            absolute = spearmanr(np.abs(own.map).ravel(), np.abs(other.map).ravel()).statistic
            rows.append((own.share(part), part.mean(), other.share(part), signed, absolute))
        share, area, of_shuffled, signed, absolute = np.mean(rows, axis=0)
        numbers = (share, area, share / area, of_shuffled / area, signed, absolute, len(rows))
        found[name] = dict(zip(COLUMNS, map(float, numbers), strict=True))
    return found


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
                    for name, numbers in compared(folder, kind, options.pictures).items():
                        row = {
                            "gauge": kind,
                            "method": method,
                            "seed": seed,
                            "map": name,
                            "mae": metrics["test"]["mae"],
                        }
                        rows.append(row | numbers)
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
        minutes=round((time.process_time() - begun) / 60),
    )
    (options.out / "README.md").write_text(text + "\n".join(table(rows)) + "\n", encoding="utf-8")


HEAD = """# Do maps point at what moves?

`{command}`: {pictures} new pictures a gauge (seed {seed}), models of `configs/methods` on 4 shots of each of 101
readings, tiny CLIP at 64 px, seeds {seeds}; {machine}, one thread, {versions}; {minutes} minutes of processor time. All
numbers of all seeds are in [attribution.csv](attribution.csv).

*Times the area*: share of the map's absolute values inside the part that moves with the reading, over that part's share
of the picture; 1 is what a map gets that knows nothing. *Shuffled*: the same, of the model with all weights shuffled.
*Correlation*: Spearman's, of the maps of the model and of the shuffled model, signed and absolute. Mean ± standard
deviation over seeds.

"""


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A line of Markdown for every gauge, method and map."""
    lines = [
        "| gauge | method | MAE | map | area | share inside | times the area | shuffled | correlation | absolute |",
        "|---|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]

    def cell(own: list[dict[str, Any]], column: str, digits: int = 2) -> str:
        values = [row[column] for row in own]
        return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"

    for kind in KINDS:
        for method in METHODS:
            for name in MAPS:
                own = [row for row in rows if (row["gauge"], row["method"], row["map"]) == (kind, method, name)]
                cells = [kind, method, cell(own, "mae"), name, f"{own[0]['area']:.3f}"]
                names = ("share", "ratio", "shuffled_ratio", "correlation", "absolute_correlation")
                lines.append("| " + " | ".join([*cells, *(cell(own, column) for column in names)]) + " |")
    return lines


if __name__ == "__main__":
    main()
