"""What the runs of a comparison do, and in which order: train, choose, test."""

from __future__ import annotations

import logging
import math
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np

from ordinalclip.compare.plan import Place, Plan
from ordinalclip.config import DataConfig, RanksConfig, RunConfig
from ordinalclip.data import Parts, load_parts
from ordinalclip.executors import Pool, WorkerDied, num_jobs, open_pool, when_free
from ordinalclip.files import delete, write_text
from ordinalclip.progress import Progress
from ordinalclip.provenance import fingerprints
from ordinalclip.run_folder import FolderOccupied, RunFolder
from ordinalclip.runs import evaluate_run, train_run
from ordinalclip.signals import Preempted
from ordinalclip.training.checkpoint import NoIntactCheckpoint
from ordinalclip.training.interruption import Diverged, Pruned, Watch, unwatched

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        metrics: its metrics.json; None for one that diverged or broke off.
        divergence: how it diverged, or None.
        error: what broke it off, or None: a broken picture, too little memory. The next call tries again.
    """

    metrics: dict[str, Any] | None
    divergence: str | None = None
    error: str | None = None

    @property
    def validation_mae(self) -> float:
        """Infinite for a run that diverged or whose answers are no numbers."""
        mae = None if self.metrics is None else self.metrics["validation"]["mae"]
        return math.inf if mae is None else mae

    @property
    def failure(self) -> str:
        """Why there is nothing to compare; "" where there is."""
        if self.metrics is None:
            return f"failed: {self.error}" if self.error is not None else f"diverged: {self.divergence}"
        read = [self.metrics[part]["mae"] for part in ("validation", "test") if part in self.metrics]
        return "gives answers that are no numbers" if None in read else ""


@dataclass(frozen=True)
class Execution:
    """What was run.

    Attributes:
        num_runs: runs that the comparison consists of.
        chosen: number of the setting that validation chose, by variant and method; none for a method that could not be
            tried as it should have been.
        results: of every run of the comparison, test part included for those of the chosen settings.
        at_once: how many runs at a time, in words.
    """

    num_runs: int
    chosen: dict[tuple[str, str], int]
    results: dict[Place, Result]
    at_once: str

    @property
    def errors(self) -> dict[Place, str]:
        """What broke runs off."""
        return {place: result.error for place, result in self.results.items() if result.error is not None}


def execute(plan: Plan, quiet: bool = False, executor: Executor | None = None) -> Execution:
    """Train what is missing, choose settings by validation, read the test part with the chosen ones.

    A run that breaks off does not keep the others from being done.

    Args:
        executor: instead of what `execution` and `jobs` say, see `executors.open_pool`.

    Raises:
        ValueError: no validation or test part; FolderOccupied: see `run_plan`; Preempted: told to stop by SIGTERM or
            Ctrl-C, after a checkpoint of what was running.
    """
    forget_data()
    _check_parts(plan)
    results = _found(plan)
    tuned = [place for place in plan.runs if place.seed in plan.tuning_seeds]
    methods = [(variant, name) for variant in plan.config.variants for name in plan.config.methods]
    num_runs = len(tuned) + len(methods) * (len(plan.seeds) - len(plan.tuning_seeds))
    train = partial(train_one, keep_checkpoints=plan.config.keep_checkpoints, overwrite=plan.config.overwrite)
    try:
        jobs = num_runs if executor is not None else min(num_jobs(plan.config.jobs), num_runs)
        with open_pool(plan.config.execution, jobs, plan.folder, executor) as pool:
            at_once = _at_once(plan, jobs, executor)
            progress: Progress = Progress(None, "comparing", num_runs, "runs", quiet)
            _each(train, plan, tuned, results, pool, progress)
            broken = {(place.variant, place.method) for place in tuned if results[place].error is not None}
            chosen = {method: _choose(plan, results, *method) for method in methods if method not in broken}
            final = [place for place in plan.runs if place.number == chosen.get((place.variant, place.method))]
            _each(train, plan, [p for p in final if p.seed not in plan.tuning_seeds], results, pool, progress)
            progress.close()
            sound = [place for place in final if not results[place].failure]
            progress = Progress(None, "reading the test part", len(sound), "runs", quiet)
            tested = {place: results[place] for place in sound if _is_tested(plan.runs[place], results[place])}
            _each(_test, plan, sound, tested, pool, progress)
            progress.close()
    except (Preempted, KeyboardInterrupt) as stopped:
        number = stopped.number if isinstance(stopped, Preempted) else signal.SIGINT
        done = f"{len(results)} of {num_runs} runs are done" if len(results) < num_runs else "all runs are trained"
        raise Preempted(f"{plan.folder}: told to stop; {done}, the same command goes on", number) from None
    return Execution(num_runs, chosen, {place: tested.get(place, results[place]) for place in results}, at_once)


def _at_once(plan: Plan, jobs: int, executor: Executor | None) -> str:
    if executor is not None:
        return f"by {type(executor).__name__}"
    if plan.config.execution != "local":
        return "on a Dask cluster"
    return f"{jobs} runs at a time" if jobs > 1 else "one run at a time"


def _check_parts(plan: Plan) -> None:
    """Before hours are spent: the first run's data has what choosing and testing need."""
    parts = parts_of(next(iter(plan.runs.values())))
    for name, least in (("validation", 1), ("test", 2)):
        part = getattr(parts, name)
        if part is None or len(part) < least:
            raise ValueError(f"{plan.folder}: a comparison needs a {name} part of {least} images or more")


def _found(plan: Plan) -> dict[Place, Result]:
    """The results of runs that came to their end in an earlier call.

    Raises:
        FolderOccupied: a run of another experiment stands where one of these belongs, and is not to be replaced.
    """
    results = {}
    for place, run in plan.runs.items():
        folder = RunFolder(run.output_dir)
        state = folder.state()
        if state.kind == "empty":
            continue
        if state.kind == "damaged":
            logger.warning("%s holds %s: it is done again", folder.path, state.text)
            continue
        other = folder.difference(run, _fingerprints_of(run))
        if not other and (result := ended(folder)) is not None:
            results[place] = result
        elif other and not plan.config.overwrite:
            raise FolderOccupied(
                f"{folder.path} holds {state.text}, which is another experiment ({other}): overwrite=true replaces "
                "such runs, another output_dir leaves them alone"
            )
    return results


def ended(folder: RunFolder) -> Result | None:
    """What a run came to that has finished or diverged in an earlier call; None for every other."""
    kind = folder.state().kind
    if kind == "finished":
        return Result(folder.read_metrics())
    return Result(None, folder.diverged.read_text(encoding="utf-8")) if kind == "diverged" else None


def _choose(plan: Plan, results: dict[Place, Result], variant: str, name: str) -> int:
    """The setting with the smallest mean validation MAE over the tuning seeds."""
    means = [
        float(np.mean([results[Place(variant, name, k, seed)].validation_mae for seed in plan.tuning_seeds]))
        for k in range(len(plan.settings[name]))
    ]
    return means.index(min(means))


def _each(
    work: Callable[[RunConfig], Result],
    plan: Plan,
    places: Sequence[Place],
    results: dict[Place, Result],
    pool: Pool,
    progress: Progress,
) -> None:
    """Do the work for every run without a result."""
    missing = {plan.runs[place].output_dir: place for place in places if place not in results}
    progress.advance(len(places) - len(missing))
    for run, done in pool.run(work, [plan.runs[place] for place in missing.values()]):
        try:
            result = done.result()
        except WorkerDied as died:
            result = _broken_off(run, died)
        if (error := other_data(pool, run)) is not None:
            result = Result(None, error=error)
        results[missing[run.output_dir]] = result
        progress.advance(1, _folder_name(run))


def other_data(pool: Pool, run: RunConfig) -> str | None:
    """The error of a run whose worker, on another machine perhaps, has read other data than there is here, or None."""
    if pool.shares_files and (changed := RunFolder(run.output_dir).data_difference(_fingerprints_of(run))):
        return f"{run.output_dir}: its worker has other data than this machine: {changed}"
    return None


def train_one(
    run: RunConfig,
    keep_checkpoints: bool,
    overwrite: bool,
    watch: Watch = unwatched,
    load: Callable[[RunConfig], Parts] | None = None,
) -> Result:
    """Train one run, or go on with it. That it diverged or broke off is a result, too.

    Args:
        load: gives its data instead of what its configuration names.

    Raises:
        Pruned: by who watches.
    """
    folder, load = RunFolder(run.output_dir), load or parts_of
    anew = run.model_copy(update={"overwrite": True, "train": run.train.model_copy(update={"resume": "none"})})
    try:
        kind = folder.state().kind
        replaced = kind == "damaged" or (
            overwrite and kind != "empty" and folder.difference(run, _fingerprints_of(run))
        )
        try:
            try:
                config = anew if replaced else run
                result = Result(when_free(lambda: train_run(config, load(run), quiet=True, watch=watch)))
            except NoIntactCheckpoint:
                if not overwrite:
                    raise
                result = Result(train_run(anew, load(run), quiet=True, watch=watch))
        except Diverged as error:
            divergence = str(error).partition("; rows of the batch")[0]
            write_text(folder.diverged, divergence)
            result = Result(None, divergence)
    except Pruned:
        raise
    except Exception as error:
        return _broken_off(run, error)
    if not keep_checkpoints:  # a finished run is never resumed: they would fill the disk
        for path in (folder.checkpoints, folder.model_last):
            delete(path)
    return result


def _test(run: RunConfig) -> Result:
    """Read the test part with one run."""
    try:
        return Result(when_free(lambda: evaluate_run(run.output_dir, parts_of(run), quiet=True, config=run)))
    except Exception as error:
        return _broken_off(run, error)


def _broken_off(run: RunConfig, error: Exception) -> Result:
    """The result of a run that an error ended; the errors of people say what is wrong, of others their kind helps."""
    logger.debug("%s", run.output_dir, exc_info=error)
    text = str(error).partition("\n")[0]
    kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
    return Result(None, error=f"{run.output_dir}: {kind}{text}".rstrip(": "))


def _is_tested(run: RunConfig, result: Result) -> bool:
    """Whether the test part was read as the configuration says."""
    if result.metrics is None or "test" not in result.metrics:
        return False
    return RunFolder(run.output_dir).read_config().evaluation == run.evaluation


def _folder_name(run: RunConfig) -> str:
    return RunFolder(run.output_dir).path.name


def forget_data() -> None:
    """Before a comparison or a search: the data may have changed since an earlier call of this process."""
    _load_parts_once.cache_clear()
    _fingerprints_once.cache_clear()


def parts_of(run: RunConfig) -> Parts:
    """The data of a run."""
    return _load_parts_once(run.data.model_dump_json(), run.ranks.model_dump_json(), run.seed)


def _fingerprints_of(run: RunConfig) -> dict[str, Any]:
    return _fingerprints_once(run.data.model_dump_json(), run.ranks.model_dump_json(), run.seed)


@lru_cache(maxsize=256)
def _fingerprints_once(data: str, ranks: str, seed: int) -> dict[str, Any]:
    return fingerprints(_load_parts_once(data, ranks, seed))


@lru_cache(maxsize=3)
def _load_parts_once(data: str, ranks: str, seed: int) -> Parts:
    """The data of all runs that share it, with one cache of decoded images."""
    return load_parts(DataConfig.model_validate_json(data), RanksConfig.model_validate_json(ranks), seed)
