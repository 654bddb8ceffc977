"""How well an audit finds wrong labels: some are planted, and scores are asked to put them first.

    python benchmarks/label_errors.py gauges --out benchmarks/results/label_errors
    python benchmarks/label_errors.py faces --root FOLDER --out benchmarks/results/label_errors

Of all labels 5 % are replaced, either by any other rank with the same probability, or by one that is one to five ranks
away. A run is trained on what results, `ordinalclip audit` judges all labels out of fold, and every score sorts them:
the ranked probability score, the absolute error of the answer (the median), and one minus the probability of the given
label (self-confidence). Their average precision is what is compared; a random order has 0.05. FOLDER holds labels.csv
with the columns file and age, as for configs/compare/faces.yaml: of its real labels some are wrong, too, which nobody
knows of and which count as right here.

Rows are added to OUT/results.csv as they are done and not repeated; README.md there has means and spreads.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from itertools import groupby
from pathlib import Path

import numpy as np
from sklearn.metrics import average_precision_score

from ordinalclip import __version__
from ordinalclip.audit import audit
from ordinalclip.config import load_config
from ordinalclip.data.tables import plain_number
from ordinalclip.gauges import make_gauges
from ordinalclip.runs import train

SHARE = 0.05
FARTHEST = 5  # ranks, of errors that are near
SCORES = {"rps": "RPS", "error": "absolute error", "confidence": "1 - probability"}
KINDS = {"uniform": "any other rank", "near": "one to five ranks away"}
COLUMNS = ("data", "method", "kind", "seed", "labels", "planted", "mae", *SCORES, *(f"top_{name}" for name in SCORES))
NUM_GAUGES, GAUGE_RANKS, FACE_RANKS = 1000, (0, 100), (21, 60)
GAUGES = ["train.max_steps=150", "train.eval_every=50"]
FACES = [
    *(
        "data.label_column=age",
        "data.image_column=file",
        "data.views=1",
        "data.augment.crop_ratio=1",
        "data.shots=null",
    ),
    *("model.backbone=efficientnet_lite0", "model.features=cached", "train.max_steps=300", "train.eval_every=100"),
    *("train.lr=1e-2", "ranks.low=21", "ranks.high=60", "ranks.num=40", "ranks.unit=years"),
]


def planted(labels: np.ndarray, ends: tuple[int, int], kind: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(N,) whole labels of which `SHARE` are wrong, and (N,) which are.

    Args:
        labels: (N,) whole numbers.
        ends: the lowest and the highest rank, a whole number each.
        kind: one of `KINDS`.
    """
    rng = np.random.default_rng([seed, 17])
    wrong = np.zeros(len(labels), dtype=bool)
    wrong[rng.permutation(len(labels))[: round(SHARE * len(labels))]] = True
    ranks, changed = np.arange(ends[0], ends[1] + 1), labels.copy()
    for row in np.flatnonzero(wrong):
        away = np.abs(ranks - labels[row])
        others = ranks[(away > 0) & ((away <= FARTHEST) | (kind == "uniform"))]
        changed[row] = rng.choice(others)
    return changed, wrong


def gauges(folder: Path, seed: int) -> tuple[list[str], np.ndarray]:
    """Write thermometers; their file names and readings."""
    names, labels = [], []
    for number, row in enumerate(make_gauges(["thermometer"], NUM_GAUGES, seed=seed)):
        row["image"].save(folder / f"{number:04d}.png")
        names.append(f"{number:04d}.png")
        labels.append(round(row["value"]))
    return names, np.asarray(labels)


def faces(root: Path) -> tuple[list[str], np.ndarray]:
    """The file names and ages of labels.csv."""
    with (root / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [row["file"] for row in rows], np.asarray([int(plain_number(row["age"])) for row in rows])


def measure(data: str, root: Path | None, method: str, kind: str, seed: int) -> dict[str, object]:
    """Plant, train, audit, score: a row of results.csv."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if root is None:
            names, labels = gauges(folder, seed)
            ends, options = GAUGE_RANKS, [*GAUGES, f"data.root={folder}", "data.image_column=file", "data.shots=null"]
        else:
            names, labels = faces(root)
            ends, options = FACE_RANKS, [*FACES, f"data.root={root}"]
        given, wrong = planted(labels, ends, kind, seed)
        column = "age" if root is not None else "label"
        with (folder / "labels.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["file", column, "wrong"])
            writer.writerows(zip(names, given.tolist(), wrong.astype(int).tolist(), strict=True))
        where = ["data.source=table", f"data.table={folder / 'labels.csv'}", f"output_dir={folder / 'run'}"]
        where += [f"seed={seed}", "evaluation.report=false", "data.duplicates=allow", "data.workers=0"]
        config = load_config(f"methods/{method}", [*options, *where])
        run = train(config, quiet=True)
        found, _ = audit(run, quiet=True)
    truth = np.asarray([int(cell) for cell in found.pictures.rows["wrong"]]).astype(bool)
    probabilities = found.predictions.probabilities
    assert probabilities is not None
    scores = {
        "rps": found.scores,
        "error": np.abs(found.answers - found.pictures.values),
        "confidence": 1 - probabilities[np.arange(len(truth)), found.pictures.ranks],
    }
    first = {name: np.argsort(-score, kind="stable")[: truth.sum()] for name, score in scores.items()}
    return {
        "data": data,
        "method": method,
        "kind": kind,
        "seed": seed,
        "labels": len(truth),
        "planted": truth.sum(),
        "mae": f"{scores['error'].mean():.3f}",
        **{name: f"{average_precision_score(truth, score):.4f}" for name, score in scores.items()},
        **{f"top_{name}": f"{truth[rows].mean():.4f}" for name, rows in first.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=("gauges", "faces"))
    parser.add_argument("--root", type=Path, help="folder of faces with labels.csv")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--method", default="cross_entropy", help="a configuration of configs/methods")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    arguments = parser.parse_args()
    if (arguments.data == "faces") != (arguments.root is not None):
        parser.error("--root is for faces, and faces need it")
    path = arguments.out / "results.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    for seed in arguments.seeds:
        for kind in KINDS:
            place = arguments.data, arguments.method, kind, str(seed)
            if place in {tuple(row[name] for name in COLUMNS[:4]) for row in read(path)}:
                continue
            row = measure(arguments.data, arguments.root, arguments.method, kind, seed)
            with path.open("a", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                if not file.tell():
                    writer.writeheader()
                writer.writerow(row)
            print(row, flush=True)
    print(table(read(path)))


def read(path: Path) -> list[dict[str, str]]:
    """The rows of results.csv, none where there is none."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def table(rows: list[dict[str, str]]) -> str:
    """Means and standard deviations over the seeds, in Markdown."""
    lines = [
        "| data | method | planted label | seeds | MAE | "
        + " | ".join(f"AP, {title}" for title in SCORES.values())
        + " | "
        "RPS before both, seeds |",
        "|---|---|---|---:|---:|" + "---:|" * len(SCORES) + "---:|",
    ]

    def place(row: dict[str, str]) -> tuple[str, str, str]:
        return row["data"], row["method"], row["kind"]

    for (data, method, kind), group in groupby(sorted(rows, key=place, reverse=True), key=place):
        members = list(group)
        cells = []
        for name in ("mae", *SCORES):
            values = np.asarray([float(row[name]) for row in members])
            cells.append(f"{values.mean():.3f} ± {values.std(ddof=1) if len(values) > 1 else 0:.3f}")
        ahead = sum(float(row["rps"]) > max(float(row["error"]), float(row["confidence"])) for row in members)
        lines.append(
            f"| {data} | {method} | {KINDS[kind]} | {len(members)} | {' | '.join(cells)} | {ahead} of {len(members)} |"
        )
    return "\n".join(lines) + f"\n\nordinalclip {__version__}"


if __name__ == "__main__":
    main()
