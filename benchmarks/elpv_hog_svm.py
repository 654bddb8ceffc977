"""The classical reference on ELPV, solar cells in electroluminescence images with defect levels 0 to 3.

    python benchmarks/elpv_hog_svm.py --root FOLDER    # FOLDER holds labels.csv and images/

Features at 64 px, an RBF support-vector machine, four settings of which the validation part of the first seed chooses,
the splits of configs/compare/elpv_long.yaml. 143 s on a CPU core (scikit-learn 1.9, scikit-image 0.26), seeds 1 to 3:

    HOG + SVM   MAE 0.589 +- 0.031   accuracy 0.728 +- 0.009   Spearman 0.539 +- 0.020
    constant    MAE 1.008            accuracy 0.576
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import time

import numpy as np
import skimage
import sklearn
import torch
from skimage.feature import hog
from sklearn.calibration import CalibratedClassifierCV
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from ordinalclip.config import DataConfig, RanksConfig
from ordinalclip.data import Part, Parts, load_parts
from ordinalclip.heads import decode
from ordinalclip.metrics import accuracy, mean_absolute_error, spearman
from ordinalclip.ranks import Ranks

SIZE = 64  # pixels
SETTINGS = ((1.0, 1.0), (10.0, 1.0), (1.0, 0.25), (10.0, 0.25))  # C, and gamma as a multiple of 1 / number of features
FOLDS = 5  # of the training part, for the probabilities


def load(root: str, seed: int) -> Parts:
    """The parts that a comparison with the same `data` and `ranks` sections trains and tests on."""
    config = DataConfig(
        source="table",
        root=root,
        table="labels.csv",
        image_column="file",
        label_column="label",
        stratify=["label", "module_type"],
        split=(0.6, 0.15, 0.25),
    )
    return load_parts(config, RanksConfig(values=[0, 1, 2, 3]), seed)


def describe(part: Part, known: dict[str, np.ndarray]) -> np.ndarray:
    """HOG features (N, 1764) of the grey images at 64 px; `known` keeps those of every file over the seeds."""
    for index, name in enumerate(part.names):
        if name not in known:
            grey = part.image(index).convert("L").resize((SIZE, SIZE))
            known[name] = hog(np.asarray(grey), orientations=9, pixels_per_cell=(8, 8), cells_per_block=(2, 2))
    return np.stack([known[name] for name in part.names])


def fit(features: np.ndarray, ranks: np.ndarray, setting: tuple[float, float], seed: int) -> CalibratedClassifierCV:
    """An RBF support-vector machine whose decision values become probabilities by Platt's sigmoid, one per rank."""
    cost, scale = setting
    machine = make_pipeline(StandardScaler(), SVC(C=cost, gamma=scale / features.shape[1]))
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    return CalibratedClassifierCV(machine, method="sigmoid", cv=folds, ensemble=False).fit(features, ranks)


def score(probabilities: np.ndarray, part: Part, ranks: Ranks) -> dict[str, float]:
    """MAE and Spearman of the median, accuracy of the likeliest rank."""
    median, likeliest = (decode(torch.from_numpy(probabilities), ranks, how) for how in ("median", "argmax"))
    return {
        "MAE": mean_absolute_error(median.value, part.values),
        "accuracy": accuracy(likeliest.rank, part.ranks),
        "Spearman": spearman(median.value, part.values),
    }


def constant(parts: Parts, part: Part) -> np.ndarray:
    """Probabilities (N, R) that put everything on the median of the training labels."""
    one_hot = np.eye(len(parts.ranks))[int(np.median(parts.train.ranks))]
    return np.tile(one_hot, (len(part), 1))


def cell(values: list[float]) -> str:
    """Mean and standard deviation over the seeds; a dash where the metric is not defined."""
    if np.isnan(values).any():
        return "-"
    return f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="folder with labels.csv and images/")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the split; the first one chooses")
    parser.add_argument("--out", help="CSV file with a row for every method and seed")
    arguments = parser.parse_args()

    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()},")
    print(f"scikit-learn {sklearn.__version__}, scikit-image {skimage.__version__}, numpy {np.__version__}")
    start = time.perf_counter()
    known: dict[str, np.ndarray] = {}
    chosen: tuple[float, float] | None = None
    scores: dict[str, list[dict[str, float]]] = {"HOG + SVM": [], "constant": []}
    for seed in arguments.seeds:
        parts = load(arguments.root, seed)
        train, validation, test = (describe(part, known) for part in (parts.train, parts.validation, parts.test))
        if chosen is None:
            errors = {}
            for setting in SETTINGS:
                probabilities = fit(train, parts.train.ranks, setting, seed).predict_proba(validation)
                errors[setting] = score(probabilities, parts.validation, parts.ranks)["MAE"]
                print(f"seed {seed}, C {setting[0]:g}, gamma {setting[1]:g} / D: validation MAE {errors[setting]:.3f}")
            chosen = min(errors, key=errors.__getitem__)
        model = fit(train, parts.train.ranks, chosen, seed)
        answers = {"HOG + SVM": model.predict_proba(test), "constant": constant(parts, parts.test)}
        for name, probabilities in answers.items():
            scores[name].append(score(probabilities, parts.test, parts.ranks))
        print(f"seed {seed}: " + ", ".join(f"{key} {value:.3f}" for key, value in scores["HOG + SVM"][-1].items()))
    if arguments.out:
        with open(arguments.out, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["method", "seed", *scores["constant"][0]])
            for name, found in scores.items():
                writer.writerows([name, seed, *row.values()] for seed, row in zip(arguments.seeds, found, strict=True))
    print(f"chosen: C {chosen[0]:g}, gamma {chosen[1]:g} / D; {time.perf_counter() - start:.0f} s\n")
    print("| method | " + " | ".join(scores["constant"][0]) + " |\n|---|---|---|---|")
    for name, rows in scores.items():
        print(f"| {name} | " + " | ".join(cell([row[key] for row in rows]) for key in rows[0]) + " |")


if __name__ == "__main__":
    main()
