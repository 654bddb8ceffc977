"""The one trainer: every method, one process or many, read from top to bottom in `run_training`.

ordinalclip train demo train.lr=1e-3
accelerate launch -m ordinalclip train demo
torchrun --nproc_per_node 2 -m ordinalclip train demo
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from typing import Any, NamedTuple

from accelerate import Accelerator

from ordinalclip.config import RunConfig
from ordinalclip.data import Parts, load_parts
from ordinalclip.model import OrdinalModel
from ordinalclip.progress import Progress, announced, say
from ordinalclip.provenance import job, provenance
from ordinalclip.run_folder import WAYS, RunFolder, changed_keys, described
from ordinalclip.signals import Preempted
from ordinalclip.training import checkpoint
from ordinalclip.training.distributed import average_running_statistics, from_main, start_trackers
from ordinalclip.training.evaluation import Evaluator, coverage_of, metrics_of, model_metrics, train_counts
from ordinalclip.training.interruption import Diverged, Interruption, Pruned, Watch, unwatched
from ordinalclip.training.optimization import lr_factor
from ordinalclip.training.preparation import build_model, merge_adapters, use_precision
from ordinalclip.training.step import Learner, StepClock, num_steps
from ordinalclip.weights import fault

logger = logging.getLogger(__name__)


class Finished(NamedTuple):
    """What a training leaves in memory: its metrics, the deployed model, and the data."""

    metrics: dict[str, Any]
    model: OrdinalModel
    parts: Parts


@dataclass
class Progression:
    """What moves from step to step beside the weights, saved in every checkpoint.

    Attributes:
        step: optimiser steps done.
        best_step, best_value: of the smallest validation MAE so far.
        stale: validations since then.
        train_seconds: of earlier starts of this run.
    """

    step: int = 0
    best_step: int | None = None
    best_value: float = math.inf
    stale: int = 0
    train_seconds: float = 0.0

    def validated(self, value: float) -> None:
        """Take up the validation MAE after this step."""
        if value < self.best_value:
            self.best_value, self.best_step, self.stale = value, self.step, 0
        else:
            self.stale += 1


def run_training(
    config: RunConfig,
    accelerator: Accelerator,
    folder: RunFolder,
    parts: Parts | None = None,
    quiet: bool = False,
    watch: Watch = unwatched,
) -> Finished:
    """Train, pick the model, evaluate, save: see `ordinalclip.runs.train`.

    Args:
        folder: held by this job.
        parts: data in memory instead of what `config.data` names.
        watch: told of every validation as it is done; after an interruption perhaps once more of the last one.
    """
    config = from_main(accelerator, lambda: _going_on(config, folder))
    options = config.train
    use_precision(options)
    if options.batch_size < accelerator.num_processes:
        raise ValueError(
            f"train.batch_size={options.batch_size} is less than the {accelerator.num_processes} processes"
        )
    with announced("reading the data", quiet), accelerator.main_process_first():
        parts = parts or load_parts(config.data, config.ranks, config.seed)
    if options.patience is not None and parts.validation is None:
        raise ValueError("train.patience needs a validation part")
    with announced(f"loading {config.model.backbone}", quiet), accelerator.main_process_first():
        model = build_model(config, parts.ranks, parts.train).to(accelerator.device)
    evaluator = Evaluator.of(config, model, accelerator, quiet)
    evaluator.start(model, parts)

    if model.head.learns and num_steps(config, parts) > 0:
        learner = Learner(model, parts, config, accelerator, evaluator.features)
        trainer = Trainer(learner, parts, evaluator, folder, watch)
        trainer.resume()
        trainer.train()
        trainer.select()
        return _finish(config, model, parts, evaluator, folder, trainer.summary())
    resumed = folder.is_finished and config.train.resume != "none"

    def begin() -> None:
        claim(folder, config, parts, accelerator, resumed)
        start_trackers(accelerator, config, folder)

    nothing = {"steps": 0, "best_step": None, "parameters": 0, "train_seconds": 0.0}
    return _finish(config, model, parts, evaluator, folder, nothing, begin)


def _going_on(config: RunConfig, folder: RunFolder) -> RunConfig:
    """The configuration, which resumes where torchrun has restarted this very job.

    Raises:
        FolderOccupied, ValueError: see `RunFolder.check_may_start`.
    """
    if job() and folder.read_provenance().get("job") == job():
        going_on = config.train.model_copy(update={"resume": "auto"})
        config = config.model_copy(update={"overwrite": False, "train": going_on})
    folder.check_may_start(config)
    return config


def claim(folder: RunFolder, config: RunConfig, parts: Parts, accelerator: Accelerator, resumed: bool) -> None:
    """Once nothing stands against this run: the folder holds no finished one until it is finished again.

    Raises:
        ValueError: the data is not that of the run that is resumed.
    """

    def write() -> None:
        now = provenance(config, parts, accelerator.num_processes)
        if resumed and (before := folder.read_provenance()):
            if changed := folder.data_difference(now["data"]):
                raise ValueError(f"{folder.path}: cannot resume with other data: {changed}; {WAYS}")
            now = {**before, "job": now["job"], "continued": [*before.get("continued", []), now]}
        if resumed:
            folder.reopen()
        else:
            folder.clear()
        folder.write_config(config)
        folder.write_provenance(now)
        folder.add_log([])

    from_main(accelerator, write)


class Trainer:
    """A learner on its way: validations, checkpoints, log.

    Args:
        learner: the prepared model with its optimiser.
        parts: the data.
        evaluator: of the validation part.
        folder: where everything is written.
        watch: told of every validation.
    """

    def __init__(
        self, learner: Learner, parts: Parts, evaluator: Evaluator, folder: RunFolder, watch: Watch = unwatched
    ):
        self.learner, self.parts, self.evaluator, self.folder, self.watch = learner, parts, evaluator, folder, watch
        self.config, self.accelerator = learner.config, learner.accelerator
        self.progression, self.resumed = Progression(), False

    def train(self) -> None:
        """The steps that are left.

        Raises:
            Preempted: SIGTERM or Ctrl-C came; the checkpoint is written.
            Pruned: by who watches, after a validation.
        """
        config, options, progression, total = self.config, self.config.train, self.progression, self.learner.total
        if self._is_stale():
            return
        every = options.eval_every or max(1, math.ceil(total / 10))
        images = (total - progression.step) * options.batch_size
        progress: Progress = Progress(None, f"training {config.method}", images, "images", self.evaluator.quiet)
        entries: list[dict[str, Any]] = []
        started, first = time.monotonic(), progression.step
        learner = self.learner
        with Interruption(self.accelerator.num_processes) as interruption, learner.batches(first) as batches:
            told, clock = 0, StepClock(self.accelerator.device)
            for pixels, positions in batches:
                try:
                    with clock:
                        logged = learner.step(progression.step, pixels, positions)
                    if progression.step == first:
                        self._begin()
                    progression.step += 1
                    cost = {clock.name: clock.spent, "seconds": time.monotonic() - started}
                    entries.append({"step": progression.step, **logged, **cost})
                    due = progression.step % every == 0 or progression.step == total
                    told = interruption.requested()
                    if told or due or progression.step % options.log_every == 0:
                        learner.settle()
                    if due:
                        self._check_weights()
                        entries[-1].update(self._validate())
                        told = told or interruption.requested()
                        if "validation_mae" in entries[-1]:
                            self._tell(math.ceil(progression.step / every), entries[-1]["validation_mae"])
                except (Diverged, Pruned):  # what led there is worth keeping
                    if progression.step == first:
                        self._begin()
                    self._write_log(list(takewhile(_is_finite, entries)) if learner.deferred else entries)
                    raise
                stop = told > 0 or self._is_stale()
                if progression.step % options.log_every == 0 or due or stop:
                    self._write_log(entries)
                    progress.note = f"loss {entries[-1]['loss']:.3f}"
                    entries = []
                if due or stop:
                    self._save_checkpoint(progression.train_seconds + time.monotonic() - started)
                progress.advance(options.batch_size)
                if stop:
                    break
                clock.restart()
            told = told or interruption.requested()  # while the last checkpoint was written
        progress.close()
        if told:
            raise Preempted(
                f"{self.folder.path}: told to stop after step {progression.step}; train.resume=auto goes on", told
            )
        progression.train_seconds += time.monotonic() - started
        if self._is_stale() and progression.step < total:
            say(
                f"stopped at {progression.step} of {total} steps: no better MAE in {progression.stale} validations",
                self.evaluator.quiet,
            )

    def _check_weights(self) -> None:
        """Before weights are judged or saved: the check of every step sees an update's effect only in the next one.

        Raises:
            Diverged: the last steps have spoilt them.
        """
        learner, step, options = self.learner, self.progression.step, self.config.train
        if why := fault(checkpoint.weights_of(learner.model, learner.average)):
            lr = options.lr * lr_factor(step - 1, learner.total, options)
            raise Diverged(f"step {step}: {why}; learning rate {lr:g}")

    def _begin(self) -> None:
        """After the first step: what could be wrong with data or model has shown, and an old run may be replaced."""
        if not self.resumed:
            claim(self.folder, self.config, self.parts, self.accelerator, resumed=False)
        start_trackers(self.accelerator, self.config, self.folder)

    def _tell(self, number: int, value: float) -> None:
        """Tell who watches; before the checkpoint, so that a run that is resumed tells rather twice than never."""
        from_main(self.accelerator, lambda: self.watch(number, value))

    def _is_stale(self) -> bool:
        patience = self.config.train.patience
        return patience is not None and self.progression.stale >= patience

    def _write_log(self, entries: list[dict[str, Any]]) -> None:
        """Append entries to log.jsonl and the trackers; this is where the device is waited for."""
        for entry in entries:
            entry.update((name, value.item()) for name, value in entry.items() if hasattr(value, "item"))
        from_main(self.accelerator, lambda: self.folder.add_log(entries))
        if self.config.train.trackers:
            for entry in entries:
                self.accelerator.log({k: v for k, v in entry.items() if k != "step"}, step=entry["step"])

    def _validate(self) -> dict[str, float]:
        """Validation MAE by the chosen decoding; remembers the best step."""
        if self.parts.validation is None:
            self.progression.best_step = self.progression.step
            return {}
        model, average = self.learner.model, self.learner.average
        if self.config.model.batch_norm == "local" and self.learner.features is None:
            average_running_statistics(model.encoder, self.accelerator.num_processes)
        with average.applied() if average else nullcontext():
            deployed = self.evaluator.deployed(model, self.parts)
            silent, metrics = replace(self.evaluator, quiet=True), metrics_of(self.config)
            scores, _ = silent.evaluate(deployed, {"validation": self.parts.validation}, metrics)
        value = scores["validation"][self.config.evaluation.decoding]["mae"]
        value = math.inf if value is None else value
        self.progression.validated(value)
        return {"validation_mae": value, "validation_accuracy": scores["validation"]["accuracy"]}

    def _save_checkpoint(self, train_seconds: float) -> None:
        self._check_weights()
        learner, progression, scaler = self.learner, self.progression, self.accelerator.scaler
        state = {
            **asdict(progression),
            "best_value": None if math.isinf(progression.best_value) else progression.best_value,
            "train_seconds": train_seconds,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "config": self.config.model_dump(mode="json"),
        }

        def save() -> None:
            weights = checkpoint.weights_of(learner.model, learner.average)
            optimizer = learner.optimizer.optimizer.state_dict()
            checkpoint.save_checkpoint(self.folder.checkpoints, progression.step, weights, optimizer, state)
            checkpoint.prune(self.folder.checkpoints, self.config.train.keep_checkpoints, progression.best_step)

        from_main(self.accelerator, save)

    def resume(self) -> None:
        """Go on after the checkpoint that `train.resume` names, or from the start.

        Raises:
            ValueError: damaged checkpoints, another configuration, other data, or a finished run without checkpoints.
        """
        learner, folder, config = self.learner, self.folder, self.config
        found = checkpoint.find_checkpoint(folder.checkpoints, config.train.resume)
        if found is None:
            if config.train.resume != "none" and folder.is_finished:
                raise ValueError(f"{folder.path} holds {folder.state().text}, and no checkpoint to go on from: {WAYS}")
            return
        self.resumed, state = True, found.state
        saved, now = state.pop("config"), config.model_dump(mode="json")
        if changed := changed_keys(saved, now):
            raise ValueError(f"{found.folder}: cannot resume under another configuration: {described(changed)}")
        checkpoint.load_weights(learner.model, learner.average, found.weights)
        checkpoint.load_optimizer(learner.optimizer.optimizer, found.optimizer)
        scaler = state.pop("scaler")
        if scaler is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(scaler)
        best = math.inf if state["best_value"] is None else state["best_value"]
        self.progression = Progression(**{**state, "best_value": best})
        self.accelerator.wait_for_everyone()  # nobody reads the old checkpoints any more
        claim(folder, config, self.parts, self.accelerator, resumed=True)
        step = self.progression.step

        def drop_later() -> None:
            if lost := step - folder.cut_log(step):
                logger.warning("%s: the entries of %d of %d steps are lost", folder.log, lost, step)
            checkpoint.remove_after(folder.checkpoints, step)

        from_main(self.accelerator, drop_later)

    def select(self) -> None:
        """The weights of the best step become the model, unless the last are asked for or there is no other.

        With a running average it is the average that becomes the model.
        """
        model, average, progression = self.learner.model, self.learner.average, self.progression
        if self.config.train.select == "best" and progression.best_step not in (None, progression.step):
            from_main(self.accelerator, self._keep_last)
            best = checkpoint.path_of(self.folder.checkpoints, progression.best_step)
            checkpoint.load_weights(model, average, checkpoint.load_checkpoint(best).weights)
        if average is not None:
            average.swap()
        merge_adapters(model.encoder.tower)

    def _keep_last(self) -> None:
        average = self.learner.average
        with average.applied() if average else nullcontext():
            last = deepcopy(self.learner.model)
        merge_adapters(last.encoder.tower)
        self.folder.write_model(last, self.folder.model_last)

    def summary(self) -> dict[str, Any]:
        """What metrics.json says of the training."""
        return {
            "steps": self.progression.step,
            "planned_steps": self.learner.total,
            "best_step": self.progression.best_step,
            "parameters": sum(parameter.numel() for parameter in self.learner.parameters),
            "train_seconds": self.progression.train_seconds,
        }


def _is_finite(entry: dict[str, Any]) -> bool:
    """Whether an entry of the log holds numbers: where checks are deferred, the last before a divergence may not. Of
    others a gradient may be infinite, whose step the scaler of fp16 has skipped."""
    return all(math.isfinite(float(entry[name])) for name in ("loss", "grad_norm"))


def _finish(
    config: RunConfig,
    model: OrdinalModel,
    parts: Parts,
    evaluator: Evaluator,
    folder: RunFolder,
    done: dict[str, Any],
    begin: Callable[[], None] = lambda: None,
) -> Finished:
    """Evaluate the chosen model; write predictions.parquet, model/ and, last, metrics.json.

    Args:
        begin: done before anything is written.

    Raises:
        Diverged: what was made of the weights in the end (their average, merged adapters, prototypes) is not finite.
    """
    deployed = evaluator.deployed(model, parts)
    if why := fault(deployed.state_dict()):
        raise Diverged(f"the model of step {done['best_step'] or done['steps']}: {why}")
    deployed, calibrated = evaluator.calibrated(deployed, parts, config.evaluation)
    wanted = {"validation": parts.validation, "test": parts.test if config.evaluation.test else None}
    present = {name: part for name, part in wanted.items() if part is not None}
    deployed.reference = evaluator.remembered(deployed, parts, config.seed)
    counts, wanted_metrics = train_counts(parts), metrics_of(config)
    space_of = "test" if config.evaluation.space else ""
    scores, predictions = evaluator.evaluate(deployed, present, wanted_metrics, counts, space_of)
    metrics = {
        **scores,
        "method": config.method,
        "seed": config.seed,
        **model_metrics(deployed, wanted_metrics),
        "num_train": len(parts.train),
        "train_counts": counts,
        **done,
    }
    if calibrated is not None:
        tested = coverage_of(deployed, predictions["test"]) if "test" in predictions else []
        metrics["calibration"] = {**calibrated, **({"test": tested} if tested else {})}

    def write() -> None:
        folder.predictions.unlink(missing_ok=True)
        if predictions:
            folder.write_predictions(predictions)
        if prompts := model.head.learned_prompts():
            folder.write_prompts(prompts)
            deployed.kept_prompts = model.prompts() if config.evaluation.prompts else None
        folder.write_model(deployed)
        folder.write_metrics(metrics)

    begin()
    from_main(evaluator.accelerator, write)
    return Finished(metrics, deployed, parts)
