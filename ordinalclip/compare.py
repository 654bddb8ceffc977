"""`ordinalclip compare`: methods x settings x seeds on the same data, encoder and budget, in one table.

A comparison is a YAML file:

    output_dir: runs/compare/demo
    seeds: [1, 2, 3]
    base: {data: ..., ranks: ..., model: ..., train: ...}   # keys of a run, shared by all methods
    methods:
      OrdinalCLIP:                                          # a row of the table
        base: {method: ordinalclip, head: {...}}            # keys of a run, for this method
        settings: [{train.lr: 1e-3}, {train.lr: 3e-3}]      # tried; validation chooses one for all seeds

Every setting runs on the first `tuning_seeds` seeds; the one with the best mean validation MAE runs on the others
too. Every method must bring the same number of settings, unless nothing of it learns. Runs that are complete are not
run again, so an interrupted comparison goes on where it was. The test part is predicted once, by the runs of the
chosen setting, after the choice. Written: table.md, results.csv, report.html, and model/: of the method with the best
mean validation MAE, the run of the first seed. That run gets a report of its own; evaluation.report=true writes one
for every run.
"""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field

from ordinalclip.config import DataConfig, RanksConfig, RunConfig, Section, apply_overrides, parse_config, read_yaml
from ordinalclip.data import Parts, load_parts
from ordinalclip.progress import Progress
from ordinalclip.record import shown
from ordinalclip.report import ComparedMethod, document_run, never_fatal, write_comparison_report
from ordinalclip.training import evaluate_run, train

FIXED = {"zero_shot", "constant"}  # nothing learns: one setting is all there is
COLUMNS = {"mae": "MAE", "rmse": "RMSE", "r2": "R2", "accuracy": "accuracy", "spearman": "Spearman"}
HEADS = (*COLUMNS.values(), "ordinality", "s / run", "setting chosen")


class MethodConfig(Section):
    base: dict[str, Any] = Field({}, description="keys of a run for this method")
    settings: list[dict[str, Any]] = Field([{}], min_length=1, description="dotted keys to try; validation chooses")


class CompareConfig(Section):
    output_dir: str = Field("runs/compare/default", description="folder of the table and of all runs")
    title: str = Field("", description="a sentence above the table")
    seeds: list[int] = Field([1, 2, 3], min_length=1, description="one run per method, setting and seed")
    tuning_seeds: int = Field(1, ge=1, description="how many of the seeds, the first ones, choose between settings")
    jobs: int = Field(1, ge=1, description="runs at a time, each in its own process with its share of the cores")
    base: dict[str, Any] = Field({}, description="keys of a run, shared by all methods")
    methods: dict[str, MethodConfig] = Field(description="a row of the table each")


class Comparison:
    """A comparison read from a file: its runs, and what becomes of them.

    Args:
        config: the comparison.
        source: its name in errors.

    Raises:
        ValueError: a run's configuration that is wrong, or methods with unequal numbers of settings.
    """

    def __init__(self, config: CompareConfig, source: str):
        self.config = config
        self.folder = Path(config.output_dir)
        self.seeds = config.seeds
        tried: dict[str, int] = {}
        self.runs: dict[tuple[str, int, int], RunConfig] = {}
        for name, method in config.methods.items():
            for number, setting in enumerate(method.settings):
                for seed in self.seeds:
                    run = self._run_config(name, method, number, setting, seed, source)
                    self.runs[name, number, seed] = run
                    if run.method not in FIXED:
                        tried[name] = len(method.settings)
        folders = Counter(run.output_dir for run in self.runs.values())
        if shared := [folder for folder, times in folders.items() if times > 1]:
            raise ValueError(f"{source}: method names (or seeds) are too alike, runs would share {', '.join(shared)}")
        if len(set(tried.values())) > 1:
            raise ValueError(f"{source}: every method needs the same number of settings to try, got {tried}")

    def _run_config(
        self, name: str, method: MethodConfig, number: int, setting: dict[str, Any], seed: int, source: str
    ) -> RunConfig:
        label = "".join(c if c.isalnum() else "-" for c in name.lower())
        content = _merged({"evaluation": {"report": False}}, _merged(self.config.base, method.base))
        overrides = [f"{key}={json.dumps(value)}" for key, value in setting.items()]
        content = apply_overrides(content, [*overrides, f"seed={seed}", "evaluation.test=false"])
        content["output_dir"] = str(self.folder / "runs" / f"{label}-{number}-seed{seed}")
        return parse_config(content, f"{source}, method {name!r}, setting {number}")

    def run(self, quiet: bool = False) -> list[dict[str, Any]]:
        """Train what is missing, choose settings by validation, read the test part, write the tables.

        Returns:
            a row per method: its figures with mean and standard deviation over seeds.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        methods = self.config.methods
        tuning, rest = self.seeds[: self.config.tuning_seeds], self.seeds[self.config.tuning_seeds :]
        tuned = [run for (_, _, seed), run in self.runs.items() if seed in tuning]
        self.num_runs = len(tuned) + len(methods) * len(rest)
        progress: Progress = Progress(None, "comparing", self.num_runs, "runs", quiet)
        self._train(tuned, progress)
        chosen = {}
        for name, method in methods.items():
            validation = [self._mean(name, k, tuning, "validation", "mae") for k in range(len(method.settings))]
            chosen[name] = validation.index(min(validation))
        self._train([self.runs[name, number, seed] for name, number in chosen.items() for seed in rest], progress)
        progress.close()
        for name, number in chosen.items():
            for seed in self.seeds:
                run = self.runs[name, number, seed]
                if "test" not in _metrics(run):
                    evaluate_run(Path(run.output_dir), _parts_of(run), quiet=True)
        rows = [self._row(name, number) for name, number in chosen.items()]
        self._write(rows)
        best = min(rows, key=lambda row: row["validation_mae"])
        winner = self.runs[best["method"], chosen[best["method"]], self.seeds[0]]
        spread = f"Over seeds {self._seeds}: MAE {shown(best['mae'], best['mae_std'])} {winner.ranks.unit}".rstrip()
        document_run(winner.output_dir, _parts_of(winner), remark=f"{spread} (mean ± standard deviation).")
        shutil.copytree(Path(winner.output_dir) / "model", self.folder / "model", dirs_exist_ok=True)
        with never_fatal(self.folder):
            self._report(rows, chosen, best["method"])
        return rows

    def _train(self, runs: list[RunConfig], progress: Progress) -> None:
        """Train the runs that are not complete, `jobs` at a time, each in a process of its own when several."""
        missing = [run for run in runs if not _is_complete(run)]
        progress.advance(len(runs) - len(missing))
        if self.config.jobs == 1:
            for run in missing:
                progress.advance(1, _train_run(run))
            return
        threads = max(1, (os.cpu_count() or 1) // self.config.jobs)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self.config.jobs, context, torch.set_num_threads, (threads,)) as pool:
            waiting = {pool.submit(_train_run, run): run for run in missing}
            for done in as_completed(waiting):
                if done.exception() is not None:
                    pool.shutdown(cancel_futures=True)
                    raise ValueError(f"{waiting[done].output_dir}: {done.exception()}") from done.exception()
                progress.advance(1, done.result())

    def _mean(self, name: str, number: int, seeds: Sequence[int], part: str, figure: str) -> float:
        """Mean over seeds of a figure of a setting's runs."""
        return float(np.mean([_metrics(self.runs[name, number, seed])[part][figure] for seed in seeds]))

    def _row(self, name: str, chosen: int) -> dict[str, Any]:
        results = [_metrics(self.runs[name, chosen, seed]) for seed in self.seeds]
        row: dict[str, Any] = {"method": name, "setting": json.dumps(self.config.methods[name].settings[chosen])}
        figures = {key: [result["test"][key] for result in results] for key in COLUMNS}
        figures["mae_expectation"] = [result["test"]["expectation"]["mae"] for result in results]
        figures["ordinality"] = [result["ordinality"] for result in results]
        figures["train_seconds"] = [result["train_seconds"] for result in results]
        for key, values in figures.items():
            known = [value for value in values if value is not None]
            row[key] = float(np.mean(known)) if known else None
            row[f"{key}_std"] = float(np.std(known, ddof=1)) if len(known) > 1 else None
        row["validation_mae"] = self._mean(name, chosen, self.seeds, "validation", "mae")
        row["settings_tried"] = len(self.config.methods[name].settings)
        return row

    def _write(self, rows: list[dict[str, Any]]) -> None:
        (self.folder / "table.md").write_text(self.table(rows), encoding="utf-8")
        with (self.folder / "results.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)

    def _report(self, rows: list[dict[str, Any]], chosen: dict[str, int], best: str) -> None:
        methods = [
            ComparedMethod(
                row["method"],
                [Path(self.runs[row["method"], chosen[row["method"]], seed].output_dir) for seed in self.seeds],
                _cells(row),
                ", ".join(f"{key}={value}" for key, value in json.loads(row["setting"]).items()) or "-",
            )
            for row in sorted(rows, key=lambda row: row["mae"])
        ]
        write_comparison_report(self.folder, self.config.title, HEADS, methods, self._note(), best)

    def table(self, rows: list[dict[str, Any]]) -> str:
        """The rows as Markdown: mean +- standard deviation over the seeds, best MAE first."""
        lines = [f"| method | {' | '.join(HEADS)} |", "|---|" + "---:|" * (len(HEADS) - 1) + "---|"]
        for row in sorted(rows, key=lambda row: row["mae"]):
            lines.append(f"| {row['method']} | {' | '.join(_cells(row))} | `{row['setting']}` |")
        title = f"{self.config.title}\n\n" if self.config.title else ""
        return title + "\n".join(lines) + f"\n\n{self._note()}\n"

    @property
    def _seeds(self) -> str:
        return ", ".join(map(str, self.seeds))

    def _note(self) -> str:
        """What the table's figures are."""
        unit = self.config.base.get("ranks", {}).get("unit", "")
        tuning = ", ".join(map(str, self.seeds[: self.config.tuning_seeds]))
        choice = "One setting per method, fixed beforehand."
        if any(len(method.settings) > 1 for method in self.config.methods.values()):
            choice = f"Settings chosen by the validation MAE on seed {tuning}."
        errors = f"; MAE and RMSE in {unit}" if unit else ""
        return (
            f"Test part, mean and standard deviation over seeds {self._seeds}{errors}. "
            f"MAE, RMSE, R2 and Spearman by median, accuracy by argmax. {choice}"
        )


def load_comparison(path: str | Path, overrides: Sequence[str] = ()) -> Comparison:
    """Read a comparison file.

    Args:
        overrides: dotted "key=value"; keys of a run (data.root, train.max_steps, ...) apply to all runs, keys of
            the comparison itself (seeds, output_dir, title) to it.

    Raises:
        ValueError: unknown keys or wrong values, with file, method and key.
    """
    own = set(CompareConfig.model_fields)
    shared = [
        f"base.{override}" if override.split(".")[0].split("=")[0] not in own else override for override in overrides
    ]
    return Comparison(parse_config(apply_overrides(read_yaml(path), shared), str(path), CompareConfig), str(path))


def compare(path: str | Path, overrides: Sequence[str] = (), quiet: bool = False) -> str:
    """Run a comparison file and return its table as Markdown."""
    started = time.monotonic()
    comparison = load_comparison(path, overrides)
    table = comparison.table(comparison.run(quiet))
    elapsed = time.monotonic() - started
    runs = f"{comparison.num_runs} runs in {comparison.folder}/runs, {elapsed:.0f} s this time."
    return f"{table}\n{runs}\nreport: {comparison.folder}/report.html\n"


def _train_run(run: RunConfig) -> str:
    """Train one run; returns the name of its folder."""
    return train(run, _parts_of(run), quiet=True).name


def _parts_of(run: RunConfig) -> Parts:
    return _load_parts_once(run.data.model_dump_json(), run.ranks.model_dump_json(), run.seed)


@lru_cache(maxsize=3)
def _load_parts_once(data: str, ranks: str, seed: int) -> Parts:
    """The data of all runs that share it, with one cache of decoded images."""
    return load_parts(DataConfig.model_validate_json(data), RanksConfig.model_validate_json(ranks), seed)


def _merged(base: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in more.items():
        merged[key] = (
            _merged(merged[key], value) if isinstance(value, dict) and isinstance(merged.get(key), dict) else value
        )
    return merged


def _metrics(run: RunConfig) -> dict[str, Any]:
    return json.loads((Path(run.output_dir) / "metrics.json").read_text(encoding="utf-8"))


def _is_complete(run: RunConfig) -> bool:
    """Whether a finished run of exactly this configuration is there."""
    folder = Path(run.output_dir)
    if not ((folder / "metrics.json").is_file() and (folder / "config.yaml").is_file()):
        return False
    return read_yaml(folder / "config.yaml") == run.model_dump(mode="json")


def _cells(row: dict[str, Any]) -> list[str]:
    """A row's cells below `HEADS`, without the setting."""
    seconds = f"{row['train_seconds']:.0f}" if row["train_seconds"] else "-"
    return [*(shown(row[key], row[f"{key}_std"]) for key in [*COLUMNS, "ordinality"]), seconds]
