"""The trials of a search: drawn one by one, run where there is room, taken up again after an interruption."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ordinalclip import __version__
from ordinalclip.compare.execution import Result, ended, forget_data, other_data, parts_of, train_one
from ordinalclip.config import RunConfig
from ordinalclip.executors import Pool, num_jobs, open_pool
from ordinalclip.files import delete, write_text
from ordinalclip.progress import Progress
from ordinalclip.provenance import device, fingerprints
from ordinalclip.results.pages import never_fatal
from ordinalclip.results.run_report import document_run
from ordinalclip.results.search_report import SearchRecord, TrialRow, write_search_report, write_trials
from ordinalclip.run_folder import RunFolder
from ordinalclip.search import Range
from ordinalclip.signals import Preempted
from ordinalclip.training.interruption import Pruned, unwatched
from ordinalclip.tuning.plan import Outcome, TuningPlan
from ordinalclip.tuning.study import OPTUNA, STARTUP, FrozenTrial, Study, TrialState, repair, texts

SECONDS_BETWEEN_REPORTS = 60.0
ENDED = (TrialState.COMPLETE, TrialState.PRUNED)


class Trial(NamedTuple):
    """What a process is given to run: one run a seed."""

    number: int
    runs: list[RunConfig]


class Tried(NamedTuple):
    """What a trial came to.

    Attributes:
        value: mean validation MAE over its seeds, infinite where a run diverged; None for one that was pruned.
        error: what broke it off, or None.
    """

    value: float | None
    error: str | None = None


def search(plan: TuningPlan, quiet: bool = False) -> Outcome:
    """Run what is missing of a search in its folder, which this job holds: see `ordinalclip.tuning.run_plan`."""
    forget_data()
    parts = parts_of(plan.base)
    if parts.validation is None:
        raise ValueError(f"{plan.source}: a search needs a validation part, by which trials are judged")
    plan.claim(fingerprints(parts))
    repair(plan.files.journal)
    study = Study(plan.files.journal, plan.options.pruner, plan.base.seed)
    errors: list[str] = []
    work = partial(_run_trial, journal=plan.files.journal, pruner=plan.options.pruner)
    progress: Progress = Progress(None, "searching", plan.options.trials, "trials", quiet)
    progress.advance(len(_in_state(plan, study, *ENDED)))
    jobs = min(num_jobs(plan.options.jobs), plan.options.trials)
    written = time.monotonic()
    try:
        with open_pool(plan.options.execution, jobs, plan.folder) as pool:
            for trial, done in pool.run(work, _missing(plan, study, errors)):
                _take(study, trial, done, errors, pool)
                _keep_best_model(plan, study)
                write_trials(plan.files.table, _rows(plan, study))
                if time.monotonic() - written > SECONDS_BETWEEN_REPORTS:
                    _report(plan, study)
                    written = time.monotonic()
                best = _best(plan, study)
                progress.advance(1, f"best {best.value:.4g}, trial {best.number}" if best else "")
    except (Preempted, KeyboardInterrupt) as stopped:
        number = stopped.number if isinstance(stopped, Preempted) else signal.SIGINT
        ended = f"{len(_in_state(plan, study, *ENDED))} of {plan.options.trials} trials have ended"
        raise Preempted(f"{plan.folder}: told to stop; {ended}, the same command goes on", number) from None
    progress.close()
    best = _best(plan, study)
    write_trials(plan.files.table, _rows(plan, study))
    if best is None:
        why = errors[0] if errors else "all diverged"
        raise ValueError(f"{plan.folder}: none of the trials came to its end: {why}")
    write_text(plan.files.best, plan.best_config(texts(best)).to_yaml())
    num_trials = len(_in_state(plan, study, *ENDED))
    folder = RunFolder(plan.runs(best.number, texts(best))[0].output_dir)
    remark = f"The best of {num_trials} trials by validation, so its validation errors are optimistic."
    document_run(folder, remark=remark)
    _report(plan, study)
    assert best.value is not None
    return Outcome(num_trials, texts(best), best.value, folder.path, errors)


def _missing(plan: TuningPlan, study: Study, errors: list[str]) -> Iterator[Trial]:
    """What is to be run: interrupted trials first, then new ones, each drawn when there is room for it.

    Trials that broke off in an earlier call do not count, those of this one do.
    """
    before = len(_in_state(plan, study, TrialState.FAIL))
    for trial in _in_state(plan, study, TrialState.RUNNING):
        yield Trial(trial.number, plan.runs(trial.number, texts(trial)))
    while len(study.trials(plan.search)) - before < plan.options.trials:
        trial = study.draw(plan.search)
        try:
            yield Trial(trial.number, plan.runs(trial.number, texts(trial)))
        except ValueError as error:  # values that are not for one another
            study.fail(trial.number, str(error))
            errors.append(str(error))


def _run_trial(trial: Trial, journal: Path, pruner: str) -> Tried:
    """Run a trial, or go on with it, in whichever process this is."""
    values: list[float] = []
    for run in trial.runs:
        watch = unwatched if values else Study(journal, pruner).watch(trial.number)
        folder = RunFolder(run.output_dir)
        if folder.state().kind == "pruned":
            return Tried(None)
        result = None if folder.difference(run) else ended(folder)
        if result is None:
            try:
                result = train_one(run, keep_checkpoints=False, overwrite=False, watch=watch)
            except Pruned as pruned:
                write_text(folder.pruned, str(pruned))
                for path in (folder.checkpoints, folder.model_last):
                    delete(path)
                return Tried(None)
        if result.error is not None:
            return Tried(None, result.error)
        values.append(_value(run, result))
        if math.isinf(values[-1]):  # the mean is, whatever the other seeds give
            break
    return Tried(float(np.mean(values)))


def _value(run: RunConfig, result: Result) -> float:
    """The validation MAE by which the run has chosen its model; infinite where it has none."""
    mae = None if result.metrics is None else result.metrics["validation"][run.evaluation.decoding]["mae"]
    return math.inf if mae is None else mae


def _take(study: Study, trial: Trial, done: Future[Tried], errors: list[str], pool: Pool) -> None:
    """Write down what a trial came to."""
    try:
        tried = done.result()
    except Exception as error:  # its process was killed, time and again
        tried = Tried(None, f"{trial.runs[0].output_dir}: {error}")
    for run in trial.runs:
        if (foreign := other_data(pool, run)) is not None:
            tried = Tried(None, foreign)
    if tried.error is not None:
        study.fail(trial.number, tried.error)
        errors.append(tried.error)
    elif tried.value is None:
        study.prune(trial.number)
    else:
        study.finish(trial.number, tried.value)


def _in_state(plan: TuningPlan, study: Study, *states: TrialState) -> list[FrozenTrial]:
    return [trial for trial in study.trials(plan.search) if trial.state in states]


def _best(plan: TuningPlan, study: Study) -> FrozenTrial | None:
    """The trial of the smallest error; of equal ones the first."""
    done = [each for each in _in_state(plan, study, TrialState.COMPLETE) if each.value is not None]
    best = min(done, key=lambda trial: trial.value or 0.0, default=None)
    return best if best is not None and math.isfinite(best.value or 0.0) else None


def _keep_best_model(plan: TuningPlan, study: Study) -> None:
    """Models of the others would fill the disk; each can be trained again from its config.yaml. With the model of an
    earlier best goes its report, which calls it the best."""
    best = _best(plan, study)
    for trial in _in_state(plan, study, TrialState.COMPLETE, TrialState.FAIL):
        for folder in _folders(plan, trial):
            if (best is None or trial.number != best.number) and folder.model.exists():
                delete(folder.report)
                delete(folder.model)


def _folders(plan: TuningPlan, trial: FrozenTrial) -> list[RunFolder]:
    return [RunFolder(plan.files.run(trial.number, seed)) for seed in plan.seeds]


def _report(plan: TuningPlan, study: Study) -> None:
    """report.html of the trials so far."""
    rows, best = _rows(plan, study), _best(plan, study)
    options = plan.options
    several = f", each the mean of seeds {', '.join(map(str, plan.seeds))}" if options.seeds > 1 else ""
    conditions = [
        f"The first {STARTUP} trials are points of a Sobol sequence, the others drawn by Optuna's TPE sampler; seed "
        f"{plan.base.seed}{several}; pruner: {options.pruner}. The error is that by which a run chooses its model.",
        f"Written by ordinalclip {__version__} with Optuna {OPTUNA} and torch {torch.__version__} on {device()}.",
    ]
    with never_fatal(plan.folder):
        write_search_report(
            SearchRecord(
                folder=plan.folder,
                rows=rows,
                searched={key: each.text for key, each in plan.search.items()},
                logarithmic=[key for key, each in plan.search.items() if isinstance(each, Range) and each.log],
                best=next((row for row in rows if best is not None and row.number == best.number), None),
                importances=study.importances(),
                conditions=conditions,
                unit=plan.base.ranks.unit,
            )
        )


def _rows(plan: TuningPlan, study: Study) -> list[TrialRow]:
    return [_row(plan, trial) for trial in study.trials(plan.search)]


def _row(plan: TuningPlan, trial: FrozenTrial) -> TrialRow:
    """A trial as it is shown, with the metrics of its runs."""
    folders = [folder for folder in _folders(plan, trial) if folder.path.is_dir()]
    value, state, why = trial.value, trial.state.name.lower(), trial.user_attrs.get("error", "")
    finished = [
        folder.read_metrics() for folder in folders if trial.state == TrialState.COMPLETE and folder.is_finished
    ]
    if trial.state == TrialState.COMPLETE and not math.isfinite(value or 0.0):
        value, state = None, "diverged"
        told = [folder.diverged.read_text(encoding="utf-8") for folder in folders if folder.diverged.is_file()]
        why = told[0] if told else "gives answers that are no numbers"
    elif trial.state == TrialState.FAIL:
        state = "failed"
    elif trial.state == TrialState.PRUNED:
        value = min(trial.intermediate_values.values(), default=None)
    scores = [metrics["validation"] for metrics in finished]
    maes = [each[plan.base.evaluation.decoding]["mae"] for each in scores]
    return TrialRow(
        number=trial.number,
        state=state,
        setting=dict(trial.params),
        value=value,
        spread=float(np.std(maes, ddof=1)) if state == "complete" and len(maes) > 1 else None,
        curve=sorted(trial.intermediate_values.items()),
        metrics=_means(scores) if state == "complete" else {},
        why=why,
        folders=folders,
    )


def _means(scores: list[dict[str, Any]]) -> dict[str, float | None]:
    """Metrics of a part, averaged over runs; None for what one of them lacks."""
    if not scores:
        return {}
    names = [name for name, value in scores[0].items() if isinstance(value, int | float) and name != "num"]
    found: dict[str, float | None] = {}
    for name in names:
        values = [each.get(name) for each in scores]
        found[name] = None if None in values else float(np.mean([value for value in values if value is not None]))
    return found
