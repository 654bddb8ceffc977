"""What cached features save: every method of a comparison on a frozen encoder, with features computed and cached.

    python benchmarks/features.py data.root=FOLDER [KEY=VALUE ...] --out benchmarks/results/features

Runs of `ordinalclip compare faces` on one seed and its first setting, `model.text=tiny` where nothing else is said. For
every method, in processor seconds of one thread: the whole run on cached features, which are there already; the steps
of a run that computes them (the median of `--short` steps); and the whole run that computes them,

    the cached run + steps x (step computed - step cached) + pictures evaluated x encoding one picture,

which is held against runs that were measured from end to end (`--whole`). Pictures evaluated are counted: methods that
answer by neighbours encode the training part at every validation. Neither way has the report or metrics of the space.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import os
import platform
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from ordinalclip.compare.plan import load_plan
from ordinalclip.config import RunConfig
from ordinalclip.data import load_parts
from ordinalclip.runs import train
from ordinalclip.training import trainer
from ordinalclip.training.evaluation import Evaluator
from ordinalclip.training.features import kept_features


class Counted(Evaluator):
    """Counts the pictures that are evaluated."""

    pictures = 0

    def outputs(self, model: Any, part: Any, *rest: Any, **options: Any) -> Any:
        Counted.pictures += len(part)
        return super().outputs(model, part, *rest, **options)


def measured(config: RunConfig, folder: Path, **changes: Any) -> tuple[float, list[float]]:
    """Processor seconds of a run, and milliseconds of each of its steps."""
    content = config.model_dump()
    content |= {"output_dir": str(folder), "overwrite": True}
    content["train"]["resume"] = "none"
    content["evaluation"] |= {"report": False, "test": True, "space": False}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        content[section][name] = value
    Counted.pictures = 0
    begun = time.process_time()
    train(RunConfig.model_validate(content), quiet=True)
    spent = time.process_time() - begun
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return spent, [entry["processor_ms"] for entry in log]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--comparison", default="faces")
    parser.add_argument("--short", type=int, default=5, help="steps that are measured with features computed")
    parser.add_argument("--whole", nargs="*", default=["L1"], help="methods measured from end to end, too")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    trainer.Evaluator = Counted  # type: ignore[misc]
    text = [] if any(word.startswith("model.text=") for word in options.overrides) else ["model.text=tiny"]
    plan = load_plan(options.comparison, ["seeds=[1]", *text, *options.overrides])
    configs = {place.method: config for place, config in plan.runs.items() if place.number == 0}
    some = next(iter(configs.values()))
    parts = load_parts(some.data, some.ranks, some.seed)
    sizes = {name: len(part) for name in ("train", "validation", "test") if (part := getattr(parts, name)) is not None}
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        os.environ["ORDINALCLIP_CACHE"] = str(folder / "cache")
        first, _ = measured(configs["L1"], folder / "run")
        again, _ = measured(configs["L1"], folder / "run")
        encoding = (first - again) / sum(sizes.values())
        print(f"{sizes}; encoding {1000 * encoding:.1f} ms a picture, {kept_features()[0].size / 1e6:.0f} MB kept")
        for method, config in configs.items():
            measured(config, folder / "run")  # layer-wise features, where they are wanted
            cached, steps = measured(config, folder / "run")
            row: dict[str, Any] = {"method": method, "cached_s": cached}
            row["computed_s"] = cached + Counted.pictures * encoding
            if steps:
                frozen = {"train__freeze": [*config.train.freeze, "encoder.*"], "model__features": "computed"}
                short = {
                    "train__max_steps": options.short,
                    "data__split": (0.05, 0.005, 0.945),
                    "evaluation__test": False,
                }
                _, computed = measured(config, folder / "short", **frozen, **short)
                row |= {"step_cached_ms": median(steps), "step_computed_ms": median(computed)}
                row["computed_s"] += len(steps) * (row["step_computed_ms"] - row["step_cached_ms"]) / 1000
                if method in options.whole:
                    row["computed_whole_s"], _ = measured(config, folder / "whole", **frozen)
            row["ratio"] = row["computed_s"] / cached
            rows.append(row)
            print(
                {key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()}, flush=True
            )
    options.out.mkdir(parents=True, exist_ok=True)
    names = ["method", "step_computed_ms", "step_cached_ms", "computed_s", "cached_s", "ratio", "computed_whole_s"]
    with (options.out / "features.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for row in rows:
            shown = {k: f"{v:.3f}" if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow(shown)
    total = {key: sum(row[key] for row in rows) for key in ("computed_s", "cached_s")}
    print(f"all {len(rows)}: {total}, ratio {total['computed_s'] / total['cached_s']:.1f}")
    print(f"torch {torch.__version__}, {platform.machine()}, one thread; {some.train.max_steps} steps")


if __name__ == "__main__":
    main()
