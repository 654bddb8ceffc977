"""`ordinalclip compare`: methods x settings x seeds on the same data, encoder and budget, in one table.

A comparison is a YAML file:

    output_dir: runs/compare/demo
    seeds: [1, 2, 3]
    base: {data: ..., ranks: ..., model: ..., train: ...}   # keys of a run, shared by all methods
    settings: [{train.lr: 1e-3}, {train.lr: 3e-3}]          # tried for every method; validation chooses one
    methods:
      OrdinalCLIP:                                          # a row of the table
        base: {method: ordinalclip, head: {...}}            # keys of a run, for this method
        settings: [...]                                     # its own instead of those above, as many
    variants:                                               # a table each; default: one without a name
      all the data: {}
      10 %: {data.train_share: 0.1, train.max_steps: 100}   # keys of a run that are different

Every setting runs on the first `tuning_seeds` seeds; the one with the best mean validation MAE runs on the others
too. Every method must bring the same number of settings, unless nothing of it learns. Runs that are complete are not
run again, so an interrupted comparison goes on where it was. The test part is predicted once, by the runs of the
chosen setting, after the choice. Written: table.md, results.csv, report.html, and model/: of the method with the best
mean validation MAE, the run of the first seed. That run gets a report of its own; evaluation.report=true writes one
for every run.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field

from ordinalclip import __version__
from ordinalclip.config import DataConfig, RanksConfig, RunConfig, Section, apply_overrides, parse_config, read_yaml
from ordinalclip.data import Parts, load_parts
from ordinalclip.leaderboard import Entry, Leaderboard, write_csv
from ordinalclip.progress import Progress
from ordinalclip.record import shown
from ordinalclip.report import document_run, never_fatal, write_comparison_report
from ordinalclip.training import evaluate_run, train

FIXED = {"zero_shot", "constant"}  # nothing learns: one setting is all there is
OWN_KEYS = {"output_dir", "method", "head", "seed"}  # in which the runs of a variant differ by nature
Setting = dict[str, Any]  # dotted keys of a run
Settings = Annotated[list[Setting], Field(min_length=1)]


class MethodConfig(Section):
    base: dict[str, Any] = Field({}, description="keys of a run for this method")
    settings: Settings | None = Field(None, description="tried instead of the comparison's; validation chooses")


class CompareConfig(Section):
    output_dir: str = Field("runs/compare/default", description="folder of the table and of all runs")
    title: str = Field("", description="a sentence above the table")
    seeds: list[int] = Field([1, 2, 3], min_length=1, description="one run per method, setting and seed")
    tuning_seeds: int = Field(1, ge=1, description="how many of the seeds, the first ones, choose between settings")
    jobs: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        1, description="runs at a time, each a process with its share of the cores; auto: a core each, on a GPU one"
    )
    keep_checkpoints: bool = Field(False, description="keep checkpoints/ and model-last/ of finished runs")
    base: dict[str, Any] = Field({}, description="keys of a run, shared by all methods")
    settings: Settings = Field([{}], description="dotted keys to try for every method that learns")
    methods: dict[str, MethodConfig] = Field(min_length=1, description="a row of the table each")
    variants: dict[str, Setting] = Field({"": {}}, min_length=1, description="a table each: dotted keys that differ")


class Comparison:
    """A comparison read from a file: its runs, and what becomes of them.

    Args:
        config: the comparison.
        source: its name in errors.

    Attributes:
        runs: configuration of every run that may be needed, by (variant, method, number of the setting, seed).

    Raises:
        ValueError: a run's configuration that is wrong, or methods with unequal numbers of settings.
    """

    def __init__(self, config: CompareConfig, source: str):
        self.config = config
        self.folder = Path(config.output_dir)
        self.seeds = config.seeds
        self.runs: dict[tuple[str, str, int, int], RunConfig] = {}
        self.settings = {name: self._settings_of(method) for name, method in config.methods.items()}
        for variant in config.variants:
            for seed in self.seeds:  # runs on the same data one after the other
                for name, settings in self.settings.items():
                    for number, setting in enumerate(settings):
                        run = self._run_config(variant, name, number, setting, seed, source)
                        self.runs[variant, name, number, seed] = run
        folders = Counter(run.output_dir for run in self.runs.values())
        if shared := [folder for folder, times in folders.items() if times > 1]:
            raise ValueError(
                f"{source}: names of methods or variants (or seeds) are too alike, runs would share {', '.join(shared)}"
            )
        tried = {name: len(self.settings[name]) for name, method in config.methods.items() if self._learns(method)}
        if len(set(tried.values())) > 1:
            raise ValueError(f"{source}: every method needs the same number of settings to try, got {tried}")

    def _learns(self, method: MethodConfig) -> bool:
        return method.base.get("method", self.config.base.get("method")) not in FIXED

    def _settings_of(self, method: MethodConfig) -> list[Setting]:
        return method.settings or (self.config.settings if self._learns(method) else [{}])

    def _run_config(self, variant: str, name: str, number: int, setting: Setting, seed: int, source: str) -> RunConfig:
        content = _merged({"evaluation": {"report": False, "space": True}}, self.config.base)
        content = _merged(content, self.config.methods[name].base)
        keys = {**self.config.variants[variant], **setting, "seed": seed, "evaluation.test": False}
        content = apply_overrides(content, [f"{key}={json.dumps(value)}" for key, value in keys.items()])
        folder = self.folder / "runs" / _label(variant) / f"{_label(name)}-{number}-seed{seed}"
        content["output_dir"] = str(folder)
        where = f"variant {variant!r}, method {name!r}" if variant else f"method {name!r}"
        return parse_config(content, f"{source}, {where}, setting {number}")

    def run(self, quiet: bool = False) -> list[dict[str, Any]]:
        """Train what is missing, choose settings by validation, read the test part, write the tables.

        Returns:
            a row per variant and method: its figures with mean and standard deviation over seeds.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        config, tuning = self.config, self.seeds[: self.config.tuning_seeds]
        tuned = [run for (_, _, _, seed), run in self.runs.items() if seed in tuning]
        kept = len(config.variants) * len(config.methods) * len(self.seeds)
        self.num_runs = len(tuned) + len(config.variants) * len(config.methods) * (len(self.seeds) - len(tuning))
        with self._workers() as call:
            progress: Progress = Progress(None, "comparing", self.num_runs, "runs", quiet)
            self._each(_train_run, tuned, _is_complete, call, progress)
            chosen = {
                (variant, name): self._choose(variant, name, tuning)
                for variant in config.variants
                for name in config.methods
            }
            final = [run for (v, m, number, _), run in self.runs.items() if number == chosen[v, m]]
            rest = [run for run in final if run.seed not in tuning]
            self._each(_train_run, rest, _is_complete, call, progress)
            progress.close()
            progress = Progress(None, "reading the test part", kept, "runs", quiet)
            self._each(_test_run, final, _is_tested, call, progress)
            progress.close()
        boards = [
            Leaderboard(variant, [self._entry(variant, name, chosen[variant, name]) for name in config.methods])
            for variant in config.variants
        ]
        rows = [row for board in boards for row in board.rows]
        (self.folder / "table.md").write_text(self.table(boards), encoding="utf-8")
        write_csv(self.folder / "results.csv", rows)
        self._keep_best(boards)
        return rows

    def _keep_best(self, boards: Sequence[Leaderboard]) -> None:
        """The report, and the model of the best method by validation with a report of its own."""
        board, entry = min(
            ((board, entry) for board in boards for entry in board.entries), key=lambda pair: pair[1].validation_mae
        )
        number = self.settings[entry.name].index(entry.setting)
        winner = self.runs[board.variant, entry.name, number, self.seeds[0]]
        row = next(row for row in board.rows if row["method"] == entry.name)
        spread = f"Over seeds {self._seeds}: MAE {shown(row['mae'], row['mae_std'])} {winner.ranks.unit}".rstrip()
        document_run(winner.output_dir, _parts_of(winner), remark=f"{spread} (mean ± standard deviation).")
        shutil.copytree(Path(winner.output_dir) / "model", self.folder / "model", dirs_exist_ok=True)
        with never_fatal(self.folder):
            best = entry.name + (f" ({board.variant})" if board.variant else "")
            write_comparison_report(self.folder, self.config.title, boards, self.note(), best)

    def _choose(self, variant: str, name: str, tuning: Sequence[int]) -> int:
        """The setting with the smallest mean validation MAE over the tuning seeds."""
        means = [
            float(np.mean([_metrics(self.runs[variant, name, k, seed])["validation"]["mae"] for seed in tuning]))
            for k in range(len(self.settings[name]))
        ]
        return means.index(min(means))

    def _entry(self, variant: str, name: str, number: int) -> Entry:
        folders = [Path(self.runs[variant, name, number, seed].output_dir) for seed in self.seeds]
        return Entry(name, folders, self.settings[name][number], len(self.settings[name]))

    @contextmanager
    def _workers(self) -> Iterator[ProcessPoolExecutor | None]:
        """Processes for several jobs, None for one."""
        jobs = self.config.jobs
        if jobs == "auto":
            jobs = 1 if torch.cuda.is_available() else _num_cores()
        if jobs == 1:
            yield None
            return
        threads = max(1, _num_cores() // jobs)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (threads,)) as pool:
            try:
                yield pool
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _each(
        self,
        work: Callable[[RunConfig], str],
        runs: Sequence[RunConfig],
        is_done: Callable[[RunConfig], bool],
        pool: ProcessPoolExecutor | None,
        progress: Progress,
    ) -> None:
        """Do the work for every run that it is not done for."""
        missing = [run for run in runs if not is_done(run)]
        progress.advance(len(runs) - len(missing))
        if pool is None:
            for run in missing:
                progress.advance(1, work(run))
                self._tidy(run)
            return
        waiting = {pool.submit(work, run): run for run in missing}
        for done in as_completed(waiting):
            if done.exception() is not None:
                raise ValueError(f"{waiting[done].output_dir}: {done.exception()}") from done.exception()
            progress.advance(1, done.result())
            self._tidy(waiting[done])

    def _tidy(self, run: RunConfig) -> None:
        """A finished run is never resumed: its checkpoints would fill the disk."""
        if not self.config.keep_checkpoints:
            for name in ("checkpoints", "model-last"):
                shutil.rmtree(Path(run.output_dir) / name, ignore_errors=True)

    def table(self, boards: Sequence[Leaderboard]) -> str:
        """All tables as Markdown: mean +- standard deviation over the seeds, best MAE first."""
        parts = [self.config.title] if self.config.title else []
        for board in boards:
            parts += [f"### {board.variant}"] if board.variant else []
            parts.append(board.markdown())
        return "\n\n".join([*parts, *self.note()]) + "\n"

    @property
    def _seeds(self) -> str:
        return ", ".join(map(str, self.seeds))

    def note(self) -> list[str]:
        """What the table's figures are, in paragraphs."""
        unit = self.config.base.get("ranks", {}).get("unit", "")
        errors = f"; MAE, RMSE and D5 in {unit}" if unit else ""
        figures = (
            f"Test part, mean and standard deviation over seeds {self._seeds}{errors}. Values by median, accuracy by "
            "argmax. PLC and SRC: Pearson's and Spearman's correlation; D5 and RV (residual variance): of the feature "
            "space, smaller is better. 95 %: bootstrap interval of the MAE over the test images. * larger errors than "
            "the first row's by the one-tailed paired t-test (p < 0.05, errors averaged by image), ** also after "
            "Holm's correction. ms / step: median; trained: parameters; MB: of the saved model."
        )
        return [figures, f"{self._choice()} {self._unequal()}".rstrip(), _environment()]

    def _choice(self) -> str:
        """How settings came about."""
        tried = {name: self.settings[name] for name, method in self.config.methods.items() if self._learns(method)}
        if all(len(settings) == 1 for settings in tried.values()):
            return "One setting per method, fixed beforehand."
        tuning = ", ".join(map(str, self.seeds[: self.config.tuning_seeds]))
        choice = f"Settings chosen by the validation MAE on seed {tuning}"
        if all(settings == self.config.settings for settings in tried.values()):
            listed = (", ".join(f"{key}={value}" for key, value in each.items()) for each in self.config.settings)
            return f"{choice}; tried for every method: {' | '.join(listed)}."
        return f"{choice}, of {len(next(iter(tried.values())))} for each method."

    def _unequal(self) -> str:
        """In which keys the methods differ beyond what they are and what was tried."""
        variant = next(iter(self.config.variants))
        tuned: set[str] = set()
        for settings in self.settings.values():
            tuned.update(key for setting in settings for key in setting)
        flat = [_flat(self.runs[variant, name, 0, self.seeds[0]].model_dump()) for name in self.config.methods]
        keys = [
            key
            for key in flat[0]
            if not {key, key.partition(".")[0]} & (OWN_KEYS | tuned) and len({str(each[key]) for each in flat}) > 1
        ]
        return f"Not the same for all methods: {', '.join(keys)}." if keys else ""


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
    """Run a comparison file and return its tables as Markdown."""
    started = time.monotonic()
    comparison = load_comparison(path, overrides)
    comparison.run(quiet)
    table = (comparison.folder / "table.md").read_text(encoding="utf-8")
    elapsed = time.monotonic() - started
    runs = f"{comparison.num_runs} runs in {comparison.folder}/runs, {elapsed:.0f} s this time."
    return f"{table}\n{runs}\nreport: {comparison.folder}/report.html\n"


def _train_run(run: RunConfig) -> str:
    """Train one run; returns the name of its folder."""
    return train(run, _parts_of(run), quiet=True).name


def _test_run(run: RunConfig) -> str:
    """Read the test part with one run; returns the name of its folder."""
    evaluate_run(Path(run.output_dir), _parts_of(run), quiet=True)
    return Path(run.output_dir).name


def _is_tested(run: RunConfig) -> bool:
    return "test" in _metrics(run)


def _num_cores() -> int:
    return os.cpu_count() or 1


def _environment() -> str:
    """Machine and versions."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()}"
    return f"{device}, {_num_cores()} CPU cores; ordinalclip {__version__}, torch {torch.__version__}."


def _label(name: str) -> str:
    """A name as part of a path."""
    return "".join(c if c.isalnum() else "-" for c in name.lower())


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value})
    return flat


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
