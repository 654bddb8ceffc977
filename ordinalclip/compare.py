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
too. Every method must bring the same number of settings, unless nothing of it learns. A run that diverges counts as
infinitely bad. Runs that are complete are not run again, so an interrupted comparison goes on with those that are
missing. The test part is predicted once, by the runs of the chosen setting, after the choice. Written: table.md,
results.csv, report.html, and model/: of the method with the best mean validation MAE, the run of the first seed. That
run gets a report of its own; evaluation.report=true writes one for every run.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from ordinalclip import __version__
from ordinalclip.config import (
    DataConfig,
    RanksConfig,
    RunConfig,
    Section,
    apply_overrides,
    flat_keys,
    parse_config,
    read_yaml,
)
from ordinalclip.data import Parts, load_parts
from ordinalclip.leaderboard import Entry, Leaderboard, write_csv
from ordinalclip.progress import Progress
from ordinalclip.record import shown
from ordinalclip.report import document_run, never_fatal, write_comparison_report
from ordinalclip.significance import LEVEL
from ordinalclip.training import Diverged, evaluate_run, train
from ordinalclip.training.checkpoint import changed_keys
from ordinalclip.training.evaluation import write_json

FIXED = {"zero_shot", "constant"}  # nothing learns: one setting is all there is
OWN_KEYS = {"output_dir", "method", "head", "seed"}  # in which the runs of a variant differ by nature
SHARED = {"data", "ranks"}  # or errors could not be compared image by image
DIVERGED = "diverged.txt"
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
Setting = dict[str, Any]  # dotted keys of a run
Settings = Annotated[list[Setting], Field(min_length=1)]


class MethodConfig(Section):
    base: dict[str, Any] = Field({}, description="keys of a run for this method")
    settings: Settings | None = Field(None, description="tried instead of the comparison's; validation chooses")


class CompareConfig(Section):
    output_dir: str = Field("runs/compare/default", description="folder of the table and of all runs")
    title: str = Field("", description="a sentence above the table")
    seeds: list[Annotated[int, Field(ge=0)]] = Field(
        [1, 2, 3], min_length=1, description="one run per method, setting and seed"
    )
    tuning_seeds: int = Field(1, ge=1, description="how many of the seeds, the first ones, choose between settings")
    jobs: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        1, description="runs at a time, each a process with its share of the cores; auto: a core each, on a GPU one"
    )
    keep_checkpoints: bool = Field(False, description="keep checkpoints/ and model-last/ of finished runs")
    base: dict[str, Any] = Field({}, description="keys of a run, shared by all methods")
    settings: Settings = Field([{}], description="dotted keys to try for every method that learns")
    methods: dict[str, MethodConfig] = Field(min_length=1, description="a row of the table each")
    variants: dict[str, Setting] = Field({"": {}}, min_length=1, description="a table each: dotted keys that differ")

    @model_validator(mode="after")
    def _fair(self) -> CompareConfig:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be different, got {self.seeds}")
        for name, method in self.methods.items():
            keys = [*method.base, *(key for setting in method.settings or [] for key in setting)]
            if own := [key for key in keys if key.partition(".")[0] in SHARED]:
                raise ValueError(
                    f"methods.{name}: {own[0]} must be the same for all methods; set it in base or variants"
                )
        return self


class Comparison:
    """A comparison read from a file: its runs, and what becomes of them.

    Args:
        config: the comparison.
        source: its name in errors.
        overrides: dotted "key=value" that all runs get, whatever the comparison says.

    Attributes:
        runs: configuration of every run that may be needed, by (variant, method, number of the setting, seed).

    Raises:
        ValueError: a run's configuration that is wrong, methods with unequal numbers of settings, or a key that is
            set twice.
    """

    def __init__(self, config: CompareConfig, source: str, overrides: Sequence[str] = ()):
        self.config = config
        self.folder = Path(config.output_dir)
        self.seeds = config.seeds
        self.left_out: list[str] = []  # methods that diverged, and how
        self.settings = {name: self._settings_of(method) for name, method in config.methods.items()}
        self._check(source, overrides)
        self.runs: dict[tuple[str, str, int, int], RunConfig] = {}
        for variant in config.variants:
            for seed in self.seeds:  # runs on the same data one after the other
                for name, settings in self.settings.items():
                    for number in range(len(settings)):
                        run = self._run_config(variant, name, number, seed, source, overrides)
                        self.runs[variant, name, number, seed] = run
        folders = Counter(run.output_dir for run in self.runs.values())
        if shared := [folder for folder, times in folders.items() if times > 1]:
            raise ValueError(
                f"{source}: names of methods or variants are too alike, runs would share {', '.join(shared)}"
            )

    def _learns(self, method: MethodConfig) -> bool:
        return method.base.get("method", self.config.base.get("method")) not in FIXED

    def _settings_of(self, method: MethodConfig) -> list[Setting]:
        return method.settings or (self.config.settings if self._learns(method) else [{}])

    def _tried(self) -> dict[str, list[Setting]]:
        """Settings of the methods that learn."""
        return {name: self.settings[name] for name, method in self.config.methods.items() if self._learns(method)}

    def _check(self, source: str, overrides: Sequence[str]) -> None:
        """As many settings for every method, and no key that would be set twice, where one would go unheard."""
        numbers = {name: len(settings) for name, settings in self._tried().items()}
        if len(set(numbers.values())) > 1:
            raise ValueError(f"{source}: every method needs the same number of settings to try, got {numbers}")
        tuned = {key for settings in self.settings.values() for setting in settings for key in setting}
        varied = {key for keys in self.config.variants.values() for key in keys}
        given = {override.partition("=")[0].strip() for override in overrides}
        for first, second, what in (
            (varied, tuned, "by variants and by settings"),
            (given, tuned, "on the command line and by settings"),
            (given, varied, "on the command line and by variants"),
        ):
            if both := sorted(first & second):
                raise ValueError(f"{source}: {both[0]} is set {what}")

    def _run_config(
        self, variant: str, name: str, number: int, seed: int, source: str, overrides: Sequence[str]
    ) -> RunConfig:
        content = _merged({"evaluation": {"report": False, "space": True}}, self.config.base)
        content = _merged(content, self.config.methods[name].base)
        keys = {**self.config.variants[variant], **self.settings[name][number]}
        content = apply_overrides(content, [*_as_overrides(keys), *overrides])
        content = apply_overrides(content, _as_overrides({"seed": seed, "evaluation.test": False}))
        folder = self.folder / "runs" / _label(variant) / f"{_label(name)}-{number}-seed{seed}"
        content["output_dir"] = str(folder)
        where = f"variant {variant!r}, method {name!r}" if variant else f"method {name!r}"
        return parse_config(content, f"{source}, {where}, setting {number}")

    def run(self, quiet: bool = False) -> list[dict[str, Any]]:
        """Train what is missing, choose settings by validation, read the test part, write the tables.

        Returns:
            a row per variant and method: its figures with mean and standard deviation over seeds.

        Raises:
            ValueError: no validation or test part, a run that cannot be trained, or all of them diverged.
        """
        self._check_parts()
        self.folder.mkdir(parents=True, exist_ok=True)
        config, tuning = self.config, self.seeds[: self.config.tuning_seeds]
        tuned = [run for (_, _, _, seed), run in self.runs.items() if seed in tuning]
        places = [(variant, name) for variant in config.variants for name in config.methods]
        self.num_runs = len(tuned) + len(places) * (len(self.seeds) - len(tuning))
        with self._workers(self.num_runs) as pool:
            progress: Progress = Progress(None, "comparing", self.num_runs, "runs", quiet)
            train_one = partial(_train_run, keep_checkpoints=config.keep_checkpoints)
            self._each(train_one, tuned, _is_complete, pool, progress)
            chosen = {place: self._choose(*place, tuning) for place in places}
            final = [run for (v, m, number, _), run in self.runs.items() if number == chosen[v, m]]
            self._each(train_one, [run for run in final if run.seed not in tuning], _is_complete, pool, progress)
            progress.close()
            sound = [run for run in final if _divergence(run) is None]
            progress = Progress(None, "reading the test part", len(sound), "runs", quiet)
            self._each(_test_run, sound, _is_tested, pool, progress)
            progress.close()
        boards = self._boards(chosen)
        rows = [row for board in boards for row in board.rows]
        (self.folder / "table.md").write_text(self.table(boards), encoding="utf-8")
        write_csv(self.folder / "results.csv", rows)
        self._keep_best(boards)
        return rows

    def _check_parts(self) -> None:
        """Before hours are spent: the first run's data has what choosing and testing need."""
        parts = _parts_of(next(iter(self.runs.values())))
        for name, least in (("validation", 1), ("test", 2)):
            part = getattr(parts, name)
            if part is None or len(part) < least:
                raise ValueError(f"{self.folder}: a comparison needs a {name} part of {least} images or more")

    def _boards(self, chosen: dict[tuple[str, str], int]) -> list[Leaderboard]:
        """A table per variant, without the methods of which a run diverged; those are in `left_out`."""
        self.left_out = []
        entries: dict[str, list[Entry]] = {variant: [] for variant in self.config.variants}
        for (variant, name), number in chosen.items():
            runs = [self.runs[variant, name, number, seed] for seed in self.seeds]
            if reasons := [reason for reason in map(_divergence, runs) if reason]:
                self.left_out.append(f"{name}{f' ({variant})' if variant else ''} diverged: {reasons[0]}")
                continue
            data = runs[0].data
            entry = Entry(
                name,
                [Path(run.output_dir) for run in runs],
                self.settings[name][number],
                number,
                len(self.settings[name]),
                images_recur=data.source != "gauges" or data.split_seed is not None,
            )
            entries[variant].append(entry)
        if empty := [variant for variant, found in entries.items() if not found]:
            raise ValueError(
                f"{self.folder}: every method diverged{f' in {empty[0]}' if empty[0] else ''}: {self.left_out}"
            )
        return [Leaderboard(variant, found) for variant, found in entries.items()]

    def _keep_best(self, boards: Sequence[Leaderboard]) -> None:
        """The report, and the model of the best method by validation with a report of its own."""
        board, entry = min(
            ((board, entry) for board in boards for entry in board.entries), key=lambda pair: pair[1].validation_mae
        )
        winner = self.runs[board.variant, entry.name, entry.number, self.seeds[0]]
        remark = ""
        if len(self.seeds) > 1:
            row = next(row for row in board.rows if row["method"] == entry.name)
            spread = f"Over seeds {self._seeds}: MAE {shown(row['mae'], row['mae_std'])} {winner.ranks.unit}".rstrip()
            remark = f"{spread} (mean ± standard deviation)."
        document_run(winner.output_dir, _parts_of(winner), remark=remark)
        shutil.rmtree(self.folder / "model", ignore_errors=True)
        shutil.copytree(Path(winner.output_dir) / "model", self.folder / "model")
        with never_fatal(self.folder):
            best = entry.name + (f" ({board.variant})" if board.variant else "")
            write_comparison_report(self.folder, self.config.title, boards, self.note(), best)

    def _choose(self, variant: str, name: str, tuning: Sequence[int]) -> int:
        """The setting with the smallest mean validation MAE over the tuning seeds."""
        means = [
            float(np.mean([_validation_mae(self.runs[variant, name, k, seed]) for seed in tuning]))
            for k in range(len(self.settings[name]))
        ]
        return means.index(min(means))

    @property
    def _jobs(self) -> int:
        jobs = self.config.jobs
        return jobs if jobs != "auto" else 1 if torch.cuda.is_available() else _num_cores()

    @contextmanager
    def _workers(self, num_runs: int) -> Iterator[ProcessPoolExecutor | None]:
        """Processes for several jobs, None for one."""
        jobs = min(self._jobs, num_runs)
        if jobs == 1:
            yield None
            return
        threads = str(max(1, _num_cores() // jobs))
        kept = {name: os.environ.get(name) for name in THREADS}
        os.environ.update(dict.fromkeys(THREADS, threads))  # for PyTorch and NumPy in the new processes
        try:
            with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
                yield pool
        finally:
            for name, value in kept.items():
                os.environ.pop(name)
                os.environ.update({name: value} if value is not None else {})

    def _each(
        self,
        work: Callable[[RunConfig], str],
        runs: Sequence[RunConfig],
        is_done: Callable[[RunConfig], bool],
        pool: ProcessPoolExecutor | None,
        progress: Progress,
    ) -> None:
        """Do the work for every run that it is not done for, in order, no more at a time than there are jobs."""
        missing = [run for run in runs if not is_done(run)]
        progress.advance(len(runs) - len(missing))
        if pool is None:
            for run in missing:
                progress.advance(1, work(run))
            return
        left = iter(missing)
        running = {pool.submit(work, run) for run in islice(left, self._jobs)}
        while running:
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for done in finished:
                progress.advance(1, done.result())
                running.update(pool.submit(work, run) for run in islice(left, 1))

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
        unit = next(iter(self.runs.values())).ranks.unit
        errors = f"; MAE, RMSE and D5 in {unit}" if unit else ""
        spread = (
            f"mean and standard deviation over seeds {self._seeds}" if len(self.seeds) > 1 else f"seed {self._seeds}"
        )
        figures = (
            f"Test part, {spread}{errors}. Values by median, accuracy by argmax. PLC and SRC: Pearson's and Spearman's "
            "correlation; D5 and RV (residual variance): of the feature space, smaller is better. 95 %: bootstrap "
            f"interval of the MAE over the test images. * larger errors than the first row's by the one-tailed paired "
            f"t-test (p < {LEVEL}, paired by image), ** also after Holm's correction. ms / step: median; trained: "
            "parameters; MB: of the saved model."
        )
        choice = " ".join(part for part in (self._choice(), self._unequal(), *self.left_out) if part)
        return [figures, choice, self._environment()]

    def _choice(self) -> str:
        """How settings came about."""
        tried = list(self._tried().values())
        if all(len(settings) == 1 for settings in tried):
            return "One setting per method, fixed beforehand."
        tuning = ", ".join(map(str, self.seeds[: self.config.tuning_seeds]))
        choice = f"Settings chosen by the validation MAE on seed {tuning}"
        if all(settings == tried[0] for settings in tried):
            listed = (", ".join(f"{key}={value}" for key, value in each.items()) for each in tried[0])
            return f"{choice}; tried for every method: {' | '.join(listed)}."
        return f"{choice}, of {len(tried[0])} for each method."

    def _unequal(self) -> str:
        """In which keys the methods differ beyond what they are and what was tried for all of them."""
        variant, seed, flat = next(iter(self.config.variants)), self.seeds[0], []
        for name, settings in self._tried().items():
            runs = [flat_keys(self.runs[variant, name, k, seed].model_dump()) for k in range(len(settings))]
            flat.append({key: [run[key] for run in runs] for key in runs[0] if key.partition(".")[0] not in OWN_KEYS})
        keys = [
            key
            for key in dict.fromkeys(key for each in flat for key in each)
            if len({str(e.get(key)) for e in flat}) > 1
        ]
        return f"Not the same for all methods: {', '.join(keys)}." if keys else ""

    def _environment(self) -> str:
        """Machine, versions, and what else was running."""
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
        at_once = f"{self._jobs} runs at a time" if self._jobs > 1 else "one run at a time"
        return (
            f"Written by ordinalclip {__version__} with torch {torch.__version__} on {device}, {_num_cores()} CPU "
            f"cores, {at_once}."
        )


def load_comparison(path: str | Path, overrides: Sequence[str] = ()) -> Comparison:
    """Read a comparison file.

    Args:
        overrides: dotted "key=value"; keys of a run (data.root, train.max_steps, ...) apply to all runs, keys of
            the comparison itself (seeds, output_dir, title) to it.

    Raises:
        ValueError: unknown keys or wrong values, with file, method and key.
    """
    own = [override for override in overrides if re.split("[.=]", override)[0].strip() in CompareConfig.model_fields]
    shared = [override for override in overrides if override not in own]
    config = parse_config(apply_overrides(read_yaml(path), own), str(path), CompareConfig)
    return Comparison(config, str(path), shared)


def compare(path: str | Path, overrides: Sequence[str] = (), quiet: bool = False) -> str:
    """Run a comparison file and return its tables as Markdown."""
    started = time.monotonic()
    comparison = load_comparison(path, overrides)
    comparison.run(quiet)
    table = (comparison.folder / "table.md").read_text(encoding="utf-8")
    elapsed = time.monotonic() - started
    runs = f"{comparison.num_runs} runs in {comparison.folder}/runs, {elapsed:.0f} s this time."
    return f"{table}\n{runs}\nreport: {comparison.folder}/report.html\n"


def _train_run(run: RunConfig, keep_checkpoints: bool) -> str:
    """Train one run; returns the name of its folder. That it diverged is a result, too."""
    folder = Path(run.output_dir)
    (folder / DIVERGED).unlink(missing_ok=True)
    with _named(run):
        try:
            train(run, _parts_of(run), quiet=True)
        except Diverged as error:
            (folder / DIVERGED).write_text(str(error), encoding="utf-8")
    for name in ("checkpoints", "model-last"):  # a finished run is never resumed: they would fill the disk
        if not keep_checkpoints:
            shutil.rmtree(folder / name, ignore_errors=True)
    return folder.name


def _test_run(run: RunConfig) -> str:
    """Read the test part with one run; returns the name of its folder."""
    folder = Path(run.output_dir)
    with _named(run):
        figures = _metrics(run)
        figures.pop("test", None)  # read under other keys of evaluation
        write_json(folder / "metrics.json", figures)
        run.save(folder / "config.yaml")
        evaluate_run(folder, _parts_of(run), quiet=True)
    return folder.name


@contextmanager
def _named(run: RunConfig) -> Iterator[None]:
    """Errors say whose they are."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{run.output_dir}: {error}") from error


def _is_complete(run: RunConfig) -> bool:
    """Whether a run of this experiment has come to its end, with figures or diverged."""
    folder = Path(run.output_dir)
    ended = (folder / "metrics.json").is_file() or (folder / DIVERGED).is_file()
    if not ended or not (folder / "config.yaml").is_file():
        return False
    saved, now = read_yaml(folder / "config.yaml"), run.model_dump(mode="json")
    decoding = saved["evaluation"].get("decoding") == run.evaluation.decoding
    return decoding and not changed_keys(saved, now)


def _is_tested(run: RunConfig) -> bool:
    """Whether the test part was read as the configuration says."""
    saved = read_yaml(Path(run.output_dir) / "config.yaml")["evaluation"]
    return "test" in _metrics(run) and saved == run.evaluation.model_dump(mode="json")


def _divergence(run: RunConfig) -> str | None:
    """How a run diverged, None if it did not."""
    path = Path(run.output_dir) / DIVERGED
    return path.read_text(encoding="utf-8").partition("; rows of the batch")[0] if path.is_file() else None


def _validation_mae(run: RunConfig) -> float:
    """Infinite for a run that diverged or whose answers are no numbers."""
    mae = None if _divergence(run) else _metrics(run)["validation"]["mae"]
    return math.inf if mae is None else mae


def _num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _as_overrides(keys: Setting) -> list[str]:
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in keys.items()]


def _label(name: str) -> str:
    """A name as part of a path."""
    return "".join(c if c.isalnum() else "-" for c in name.lower())


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
