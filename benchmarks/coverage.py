"""Whether intervals keep their promise: coverage over 200 re-splits of pictures that trained and chose nothing.

    python benchmarks/coverage.py --elpv FOLDER --faces FOLDER --runs FOLDER --out FOLDER

FOLDER holds pictures and labels.csv (file, label, module_type; file, age). Heads learn on frozen features; the
validation part chooses step, scaling and kind of scores; the test part is divided 200 times into a half that calibrates
and a half that is covered. Expected is ceil((n + 1) level) / (n + 1), for scores without ties; ties cover more. Runs
that are there are not trained again.

* `coverage.csv`: of every data set, head and level: mean coverage, its spread, that of the beta-binomial, mean width;
* `ranks.csv`: mean coverage of 90 % intervals by rank (tenth of the ranks), and by module type, with one threshold and,
  where there are 30 pictures of every rank, with one a rank;
* `shift.csv`: the same where four fifths of the lower half of the ranks are missing from the half that is covered;
* `cost.csv`: test MAE where half of the validation part is kept out of the choice of the step, against all of it.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from scipy import stats

from ordinalclip.calibrating import calibrate
from ordinalclip.calibration import OF_VALUES, Answered, Calibration, bounds
from ordinalclip.config import load_config
from ordinalclip.data import load_parts
from ordinalclip.intervals import TIE, conformal_threshold, ends
from ordinalclip.run_folder import RunFolder
from ordinalclip.training import train
from ordinalclip.training.evaluation import Evaluator

NAMES = "head.init_from_names=true"
HEADS = {
    "OrdinalCLIP": ["method=ordinalclip", NAMES, "head.num_base_ranks=3"],
    "CORN": ["method=corn"],
    "cross-entropy": ["method=cross_entropy"],
    "DLDL-v2": ["method=dldl_v2"],
    "OrdReg": ["method=ordreg"],
    "L1": ["method=l1"],
    "RM-Loss": ["method=rm_loss"],
    "SVR": ["method=svr"],
}
FROZEN = ["model.features=cached", "data.views=1", "train.lr=1e-2", "train.max_steps=300", "train.eval_every=50"]
LITE = ["model.backbone=efficientnet_lite0", "model.text=minilm"]
TABLE = ["data.source=table", "data.table=labels.csv", "data.image_column=file", "data.split=[0.5,0.15,0.35]"]
DATA = {
    "gauges": [
        *("data.num_train=1000", "data.num_validation=300", "data.num_test=1200"),
        *("ranks.low=0", "ranks.high=100", "ranks.num=101"),
    ],
    "cells": [
        *(*LITE, *TABLE, "data.stratify=[module_type]"),
        *("ranks.values=[0,1,2,3]", "ranks.names=[whole, hardly cracked, cracked, broken]"),
    ],
    "faces": [*LITE, *TABLE, "data.label_column=age", "ranks.low=21", "ranks.high=60", "ranks.num=40"],
}
SUBGROUP = {"cells": "module_type"}
LEVELS = (0.5, 0.8, 0.9, 0.95)
RESPLITS = 200
LEAST = 30  # pictures of a rank, for a threshold of its own
COSTED = ("OrdinalCLIP", "cross-entropy", "L1")


class Asked(NamedTuple):
    """A trained head on a data set: answers to the pictures that choose, and to those that are divided again and again;
    and the subgroup of each of the latter, if there are any."""

    model: Any
    choosing: Answered
    pool: Answered
    members: np.ndarray | None


def run_of(data: str, head: str, roots: dict[str, str], runs: Path, seed: int = 1, share: float = 0.0) -> RunFolder:
    """The run of a head on a data set, trained if need be."""
    where = [f"data.root={roots[data]}"] if data in roots else []
    folder = runs / f"{data}-{head.replace(' ', '-')}-{seed}-{share:g}"
    about = [f"seed={seed}", f"data.calibration={share}", "evaluation.report=false", f"output_dir={folder}"]
    config = load_config(None, [*DATA[data], *where, *FROZEN, *HEADS[head], *about])
    run = RunFolder(folder)
    if not run.is_finished:
        train(config, quiet=True)
    return run


def asked(run: RunFolder, data: str) -> Asked:
    config, model = run.read_config(), run.read_model()
    parts = load_parts(config.data, config.ranks, config.seed)
    evaluator = Evaluator.of(config, model, Accelerator(cpu=True), True)
    column = SUBGROUP.get(data)
    members = None if column is None else np.asarray(parts.test.rows[column])
    return Asked(model, evaluator.answered(model, parts.validation), evaluator.answered(model, parts.test), members)


def halves(number: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for seed in range(RESPLITS):
        rows = np.random.default_rng([seed, number]).permutation(number)
        yield rows[: number // 2], rows[number // 2 :]


def answered_from(calibration: Calibration, pool: Answered) -> Any:
    """What `Calibration.set_thresholds` and `interval` do for some rows and others, with scores that are computed once.

    Returns:
        (calibrating, others, level) -> which of the others are covered, and the mean width.
    """
    scores, own = calibration.scores(pool.prediction), calibration.true_scores(pool).double()
    pool_ranks = calibration.ranks
    low_of, high_of = (torch.tensor(edge) for edge in bounds(pool_ranks))
    errors = calibration._expected_errors(pool.prediction)

    def answer(calibrating: np.ndarray, others: np.ndarray, level: float) -> tuple[np.ndarray, float]:
        places = pool.ranks[calibrating].numpy()
        groups = range(len(pool_ranks)) if calibration.by_rank else [None]
        found = [
            conformal_threshold(own[calibrating] if rank is None else own[calibrating][places == rank], level)
            for rank in groups
        ]
        reach = pool_ranks.values[-1] - pool_ranks.values[0] if calibration.kind == "residual" else 1.0
        threshold = torch.tensor([each + TIE * (reach + abs(each)) for each in found]).float()
        value = pool.prediction.value[others]
        if calibration.kind in OF_VALUES and not calibration.by_rank:
            first, last = pool_ranks.values[0], pool_ranks.values[-1]
            low = torch.maximum(value - threshold * errors[others], value.clamp(max=first))
            high = torch.minimum(value + threshold * errors[others], value.clamp(min=last))
        else:
            begin, end = ends(scores[others] <= threshold, pool.prediction.rank[others])
            low, high = torch.minimum(low_of[begin], value), torch.maximum(high_of[end], value)
        inside = calibration.covered(pool.select(others), low, high)
        return inside.numpy(), float((high - low).double().mean())

    return answer


def check(
    fresh: Calibration,
    pool: Answered,
    calibrating: np.ndarray,
    others: np.ndarray,
    level: float,
    inside: np.ndarray,
    width: float,
) -> None:
    """The same by the model's own way."""
    calibration, rest = deepcopy(fresh), pool.select(others)
    calibration.set_thresholds(pool.select(calibrating))
    low, high = calibration.interval(rest.prediction, level)
    assert np.array_equal(calibration.covered(rest, low, high).numpy(), inside)
    assert math.isclose(float((high - low).double().mean()), width, rel_tol=1e-6)


def study(data: str, head: str, found: Asked) -> dict[str, list[dict[str, Any]]]:
    """Rows of the tables."""
    ranks, decoding = found.model.head.ranks, found.model.head.decoding
    rows: dict[str, list[dict[str, Any]]] = {"coverage": [], "ranks": [], "shift": []}
    half = len(found.pool) // 2
    counts = np.bincount(found.pool.ranks.numpy(), minlength=len(ranks))
    for by_rank in (False, True)[: 1 + (counts.min() >= LEAST)]:
        levels = (0.9,) if by_rank else LEVELS
        learnt = calibrate(ranks, decoding, found.choosing, found.pool, by_rank=by_rank)
        fresh, about = learnt.calibration, learnt.about
        pool = Answered(fresh.answer(found.pool.prediction, decoding), found.pool.values, found.pool.ranks)
        shares: dict[float, list[float]] = {level: [] for level in levels}
        widths: dict[float, list[float]] = {level: [] for level in levels}
        shifted, by_member = [], []
        answer = answered_from(fresh, pool)
        for number, (calibrating, others) in enumerate(halves(len(pool))):
            for level in levels:
                inside, width = answer(calibrating, others, level)
                shares[level].append(inside.mean())
                widths[level].append(width)
                if not number:
                    check(fresh, pool, calibrating, others, level, inside, width)
                if level == 0.9:
                    by_member.append(_by_member(inside, pool.ranks.numpy()[others], found.members, others))
                    kept = pool.ranks.numpy()[others] >= len(ranks) / 2
                    kept |= np.random.default_rng(0).random(len(kept)) < 0.2
                    shifted.append(inside[kept].mean())
        same = {"data": data, "head": head, "kind": about["kind"], "by_rank": by_rank}
        for level in levels:
            place = math.ceil((half + 1) * level - 1e-9)
            rows["coverage"].append(
                {
                    **same,
                    "scaling": about["scaling"],
                    "level": level,
                    "calibrating": half,
                    "covering": len(pool) - half,
                    "expected": round(place / (half + 1), 4),
                    "coverage": round(float(np.mean(shares[level])), 4),
                    "spread": round(float(np.std(shares[level])), 4),
                    "beta_binomial": round(
                        stats.betabinom(len(pool) - half, place, half + 1 - place).std() / (len(pool) - half), 4
                    ),
                    "width": round(float(np.mean(widths[level])), 3),
                    **{
                        f"{name}_{m}": round(about[name][m], 4)
                        for name in ("before", "after")
                        if name in about
                        for m in ("ece", "rps", "mae")
                    },
                }
            )
        names = list(by_member[0])
        for name in names:
            values = [each[name] for each in by_member if name in each]
            rows["ranks"].append({**same, "of": name, "coverage": round(float(np.mean(values)), 4)})
        rows["shift"].append({**same, "level": 0.9, "coverage": round(float(np.mean(shifted)), 4)})
    return rows


def _by_member(
    inside: np.ndarray, places: np.ndarray, members: np.ndarray | None, others: np.ndarray
) -> dict[str, float]:
    """Mean coverage of every rank, or tenth of the ranks where they are many, and of every subgroup."""
    most = int(places.max()) + 1
    bins = places if most <= 10 else places * 10 // most
    found = {
        f"rank {number}" if most <= 10 else f"tenth {number}": inside[bins == number].mean()
        for number in np.unique(bins)
    }
    if members is not None:
        found |= {str(name): inside[members[others] == name].mean() for name in np.unique(members)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--elpv", help="folder of solar cells; without it they are left out")
    parser.add_argument("--faces", help="folder of faces; without it they are left out")
    parser.add_argument("--runs", type=Path, required=True, help="folder for trained heads")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tables")
    parser.add_argument("--only", choices=list(DATA), help="this data set alone")
    parser.add_argument("--seeds", type=int, default=5, help="of the cost (default 5)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    roots = {"cells": arguments.elpv, "faces": arguments.faces}
    roots = {name: folder for name, folder in roots.items() if folder}
    tables: dict[str, list[dict[str, Any]]] = {"coverage": [], "ranks": [], "shift": [], "cost": []}
    arguments.out.mkdir(parents=True, exist_ok=True)
    for data in [name for name in DATA if (name == "gauges" or name in roots) and arguments.only in (None, name)]:
        for head in HEADS:
            found = study(data, head, asked(run_of(data, head, roots, arguments.runs), data))
            for name, rows in found.items():
                tables[name] += rows
            told = next(row for row in found["coverage"] if row["level"] == 0.9)
            print(
                f"{data}, {head}: {told['coverage']:.3f} of {told['expected']:.3f}, width {told['width']:g}", flush=True
            )
        for head, seed in [(head, seed) for head in COSTED for seed in range(1, arguments.seeds + 1)]:
            maes = {}
            for share in (0.0, 0.5):
                run = run_of(data, head, roots, arguments.runs, seed, share)
                maes[share] = run.read_metrics()["test"]["mae"]
            tables["cost"].append(
                {"data": data, "head": head, "seed": seed, "all_choose": maes[0.0], "half_chooses": maes[0.5]}
            )
        for name, rows in tables.items():
            with (arguments.out / f"{name}.csv").open("w", newline="") as file:
                fields = list(dict.fromkeys(key for row in rows for key in row))
                writer = csv.DictWriter(file, fields, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)


if __name__ == "__main__":
    main()
