"""A run from its configuration to its report: training below, results beside it, both called from here."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from ordinalclip.config import RunConfig, flat_keys, read_overrides
from ordinalclip.data import Parts, load_parts
from ordinalclip.heads import head_class
from ordinalclip.provenance import fingerprints
from ordinalclip.results.run_report import document_run
from ordinalclip.results.tracking import track
from ordinalclip.run_folder import RunFolder
from ordinalclip.training.distributed import from_main, held, make_accelerator, tracked
from ordinalclip.training.evaluation import Evaluator, coverage_of, metrics_of
from ordinalclip.training.interruption import Watch, unwatched
from ordinalclip.training.preparation import use_precision
from ordinalclip.training.trainer import run_training

# Keys that change how the test part of a run that is done is scored, or where it lies.
PLACES = ("data.root", "data.outside_root", "data.workers", "data.cache_mb", "data.prefetch")
EVALUATED = (*PLACES, "evaluation.", "train.mixed_precision")


def train(config: RunConfig, parts: Parts | None = None, quiet: bool = False) -> Path:
    """Train and evaluate as a configuration says.

    Args:
        config: from `load_config`.
        parts: data in memory instead of what `config.data` names; made by `make_parts`, it is on record as
            data.source=memory, and has to be handed over again to resume the run or to evaluate it.
        quiet: show no progress.

    Returns:
        the run folder, see `ordinalclip.run_folder`.

    Raises:
        ValueError: bad configuration or data; the message names the key or row.
        FolderOccupied: the folder holds a run and neither `train.resume` nor `overwrite` says what to do with it.
        FolderInUse: another job writes to it.
        Diverged: a loss, gradient or weight that is not finite; the message names step, what it is and learning rate.
        OSError: a checkpoint that could not be written.
        Preempted: SIGTERM came; the checkpoint is written and `train.resume=auto` goes on from it.
    """
    train_run(config, parts, quiet)
    return Path(config.output_dir)


def train_run(
    config: RunConfig, parts: Parts | None = None, quiet: bool = False, watch: Watch = unwatched
) -> dict[str, Any]:
    """`train`, returning the run's metrics.

    Args:
        watch: told of every validation; what it raises to end the run (`Pruned`) is passed on.
    """
    if parts is not None and parts.in_memory:
        config = config.model_copy(update={"data": config.data.model_copy(update={"source": "memory"})})
    options, folder = config.train, RunFolder(config.output_dir)
    accelerator = make_accelerator(
        options.mixed_precision, options.trackers, config.output_dir, options.process_group_timeout
    )
    with held(folder, accelerator), tracked(accelerator):
        finished = run_training(config, accelerator, folder, parts, quiet or not accelerator.is_main_process, watch)
        if config.evaluation.report:
            from_main(accelerator, lambda: document_run(folder, finished.parts, finished.model))
        if options.trackers:  # of which the main process alone has any
            from_main(accelerator, lambda: track(accelerator.trackers, folder, finished.parts, finished.model))
    return finished.metrics


def evaluate_run(
    folder: str | Path,
    parts: Parts | None = None,
    overrides: Sequence[str] = (),
    quiet: bool = False,
    config: RunConfig | None = None,
) -> dict[str, Any]:
    """Score a run's saved model on its test part.

    Args:
        folder: the run folder; its metrics.json and predictions.parquet take up the test part.
        parts: the run's data, if it is in memory already.
        overrides: dotted "key=value" for another place of the same data, or another way to score; then nothing is
            written.
        config: evaluate as this configuration of the same experiment says, which becomes the run's.

    Returns:
        the run's metrics with those of the test part.

    Raises:
        FileNotFoundError: no finished run there; ValueError: no test part, an override without effect, or other data
            than that of the run, which is `external.evaluate_external`'s; FolderInUse: another job writes to it.
    """
    run, kept = RunFolder(folder), not overrides
    run.require_finished()
    given = flat_keys(read_overrides(overrides))
    if idle := [key for key in given if not key.startswith(EVALUATED) or key.startswith("evaluation.intervals")]:
        other = "; --data scores other data" if idle[0].startswith("data.") else ""
        allowed = ", ".join(key + "*" * key.endswith(".") for key in EVALUATED)
        raise ValueError(f"{idle[0]}: of no effect on a run that is done; allowed are {allowed}{other}")
    config = config or run.read_config(overrides)
    head_class(config.method)  # a method of one's own, which a model's files may not import by themselves
    accelerator = make_accelerator(config.train.mixed_precision)
    use_precision(config.train)
    with held(run, accelerator) if kept else nullcontext():
        parts = parts or load_parts(config.data, config.ranks, config.seed)
        if changed := from_main(accelerator, partial(_changed, run, parts)):
            raise ValueError(
                f"{folder}: this is not the data of the run: {changed}. `ordinalclip evaluate {folder} --data DATA` "
                "scores other data, every row of it"
            )
        if parts.test is None:
            raise ValueError(f"{folder}: the configuration has no test part")
        model = run.read_model().to(accelerator.device)
        metrics = run.read_metrics()
        evaluator = Evaluator.of(config, model, accelerator, quiet or not accelerator.is_main_process)
        space_of, counts = "test" if config.evaluation.space else "", metrics["train_counts"]
        scores, predictions = evaluator.evaluate(model, {"test": parts.test}, metrics_of(config), counts, space_of)
        metrics |= scores
        if covered := coverage_of(model, predictions["test"]):
            metrics["calibration"] = {**metrics.get("calibration", {}), "test": covered}

        def write() -> None:
            run.write_predictions(predictions)
            run.write_metrics(metrics)
            run.write_config(config)
            if config.evaluation.report:
                document_run(run, parts, model)

        if kept:
            from_main(accelerator, write)
    return metrics


def _changed(run: RunFolder, parts: Parts) -> str:
    return run.data_difference(fingerprints(parts))
