"""The one trainer: every method, one process or many, read from top to bottom in `Trainer.run`.

ordinalclip train configs/demo.yaml train.lr=1e-3
accelerate launch -m ordinalclip train configs/demo.yaml
torchrun --nproc_per_node 2 -m ordinalclip train configs/demo.yaml
"""

from __future__ import annotations

import json
import math
import time
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.data import DataLoader

from ordinalclip.config import RunConfig
from ordinalclip.data import Part, Parts, load_parts
from ordinalclip.heads import Outputs, Targets
from ordinalclip.images import Augmentation
from ordinalclip.losses import at_least_float32
from ordinalclip.model import OrdinalModel
from ordinalclip.progress import Progress, announced
from ordinalclip.report import document_run
from ordinalclip.training import checkpoint
from ordinalclip.training.distributed import (
    MicroBatches,
    average_running_statistics,
    gather,
    gather_outputs,
    make_accelerator,
)
from ordinalclip.training.evaluation import (
    deployed,
    evaluate_parts,
    model_ordinality,
    outputs_of,
    predictions_of,
    score,
    write_json,
)
from ordinalclip.training.imbalance import sample_weights
from ordinalclip.training.interruption import Diverged, Interruption, Preempted, not_finite
from ordinalclip.training.optimization import WeightAverage, lr_factor, make_optimizer
from ordinalclip.training.preparation import build_model, merge_adapters, prepare_model, use_precision
from ordinalclip.training.sampling import Stream, StreamDataset, StreamSampler, shares, stream_loader


def train(config: RunConfig, parts: Parts | None = None, quiet: bool = False) -> Path:
    """Train and evaluate as a configuration says.

    Args:
        config: from `load_config`.
        parts: data in memory instead of what `config.data` names.
        quiet: show no progress.

    Returns:
        the run folder: config.yaml, log.jsonl, metrics.json, predictions.parquet, report.html, model/, checkpoints/.

    Raises:
        ValueError: bad configuration or data; the message names the key or row.
        Diverged: a loss or gradient that is not finite; the message names step, term, learning rate and rows.
        OSError: a checkpoint that could not be written.
        Preempted: SIGTERM came; the checkpoint is written and `train.resume=auto` goes on from it.
    """
    return Trainer(config, parts, quiet).run()


class Trainer:
    """State of one training run; `run` does the work."""

    def __init__(self, config: RunConfig, parts: Parts | None = None, quiet: bool = False):
        self.config, options = config, config.train
        self.folder = Path(config.output_dir)
        use_precision(options)
        self.accelerator = make_accelerator(
            options.mixed_precision, options.trackers, config.output_dir, options.process_group_timeout
        )
        self.main = self.accelerator.is_main_process
        self.place = self.accelerator.process_index, self.accelerator.num_processes
        self.quiet = quiet or not self.main
        if options.batch_size < self.accelerator.num_processes:
            raise ValueError(
                f"train.batch_size={options.batch_size} is less than the {self.accelerator.num_processes} processes"
            )
        if self.main:
            self.folder.mkdir(parents=True, exist_ok=True)
        with announced("reading the data", self.quiet), self.accelerator.main_process_first():
            self.parts = parts or load_parts(config.data, config.ranks, config.seed)
        if options.patience is not None and self.parts.validation is None:
            raise ValueError("train.patience needs a validation part")
        with announced(f"loading {config.model.backbone}", self.quiet), self.accelerator.main_process_first():
            self.model = build_model(config, self.parts.ranks, self.parts.train).to(self.accelerator.device)
        self.total = options.max_steps
        if options.epochs is not None:
            self.total = math.ceil(options.epochs * len(self.parts.train) / options.batch_size)
        self.learns = any(p.requires_grad for p in self.model.head.parameters()) and self.total > 0
        self.step, self.stale = 0, 0
        self.best_step: int | None = None
        self.best_value = math.inf
        self.train_seconds = 0.0
        self.num_trained = 0
        if self.learns:
            self._prepare()

    def _prepare(self) -> None:
        """Model, order of samples, optimiser, DDP."""
        config, options, model, train = self.config, self.config.train, self.model, self.parts.train
        self.rows = options.batch_size * model.head.views  # of a batch
        self.shares = shares(self.rows, self.accelerator.num_processes)
        micro_batched = options.micro_batch_size is not None and options.micro_batch_size < max(self.shares)
        noises, self.head_noises = prepare_model(model, config, self.accelerator.num_processes, micro_batched)
        balanced = train.ranks if options.sampling == "balanced" else None
        self.stream = Stream(len(train), config.seed, balanced, model.head.views)
        self.weights = sample_weights(train.ranks, len(self.parts.ranks), options.weighting, options.lds_sigma)
        self.average = WeightAverage(model, options.ema) if options.ema else None
        self.optimizer = self.accelerator.prepare(make_optimizer(model, options))
        self.trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.num_trained = sum(parameter.numel() for parameter in self.trained)
        encoder, self.head = (
            self.accelerator.prepare(module) if any(p.requires_grad for p in module.parameters()) else module
            for module in (model.encoder, model.head)
        )
        self.micro_batches = MicroBatches(
            self.accelerator, encoder, noises, options.micro_batch_size if micro_batched else None
        )

    def run(self) -> Path:
        """Train, pick the model, evaluate, save."""
        if self.learns:
            self._resume()
            if not self._is_stale():
                self._train()
            self._load_selected()
        else:
            self._start_anew()
        self._finish()
        for tracker in self.accelerator.trackers:
            tracker.finish()
        return self.folder

    def _train(self) -> None:
        config, options, total = self.config, self.config.train, self.total
        every = options.eval_every or max(1, math.ceil(total / 10))
        if options.trackers:
            self.accelerator.init_trackers("ordinalclip", {"method": config.method, "seed": config.seed})
        title = f"training {config.method}"
        progress: Progress = Progress(None, title, (total - self.step) * options.batch_size, "images", self.quiet)
        rows: list[dict[str, Any]] = []
        self.started = started = time.monotonic()
        with Interruption(self.accelerator.num_processes) as interruption:
            for batch in self._loader():
                try:
                    row = self._step(batch)
                except Diverged:  # numbers that went wrong: what led there is worth keeping
                    self._write_log(rows)
                    raise
                self.step += 1
                rows.append({"step": self.step, **row, "seconds": time.monotonic() - started})
                due = self.step % every == 0 or self.step == total
                if due:
                    rows[-1].update(self._validate())
                interrupted = interruption.requested()
                stop = interrupted or self._is_stale()
                if self.step % options.log_every == 0 or due or stop:
                    self._write_log(rows)
                    progress.note = f"loss {rows[-1]['loss']:.3f}"
                    rows = []
                if due or stop:
                    self._save_checkpoint()
                progress.advance(options.batch_size)
                if interrupted and self.step < total:
                    progress.close()
                    raise Preempted(f"{self.folder}: told to stop after step {self.step}; train.resume=auto goes on")
                if stop:
                    break
        progress.close()
        self.train_seconds += time.monotonic() - started

    def _loader(self) -> DataLoader:
        """The batches that are left, this process's share of each."""
        return stream_loader(
            StreamSampler(self.rows, self.step, self.total, *self.place),
            StreamDataset(
                self.parts.train,
                self.model.config.pixel_spec,
                Augmentation(**self.config.data.augment.model_dump()),
                self.stream,
            ),
            self.config.data.workers,
            self.config.data.prefetch,
        )

    def _is_stale(self) -> bool:
        return self.config.train.patience is not None and self.stale >= self.config.train.patience

    def _step(self, batch: list[Tensor]) -> dict[str, Any]:
        """One optimiser step on the global batch; returns the logged terms as tensors, to be read later."""
        device, options = self.accelerator.device, self.config.train
        pixels, values, ranks, positions = (tensor.to(device, non_blocking=True) for tensor in batch)
        factor = lr_factor(self.step, self.total, options)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        self.model.encoder.train()
        self.model.head.train()

        order = torch.channels_last if options.channels_last else torch.contiguous_format
        pixels = pixels.to(getattr(torch, options.precision), memory_format=order)
        features = self.micro_batches.encode(pixels, positions)
        for noise in self.head_noises:
            noise.positions = positions
        with self.accelerator.autocast():
            outputs = {name: at_least_float32(tensor) for name, tensor in self.head(features).items()}
        outputs = gather_outputs(outputs, self.shares)
        dtype = next(iter(outputs.values())).dtype
        values, ranks = gather(values, self.shares).to(dtype), gather(ranks, self.shares)
        weights = None
        if self.weights is not None:
            weights = torch.from_numpy(self.weights[self._batch_rows()]).to(device, dtype)
        terms = self.model.head.loss(outputs, Targets(values, ranks, weights, self.step / self.total))
        self.micro_batches.backward(terms["loss"])
        if self.accelerator.scaler is not None:
            self.accelerator.unscale_gradients(self.optimizer)
        norm = get_total_norm([p.grad for p in self.trained if p.grad is not None])
        self._check_finite(terms, norm, options.lr * factor)
        if options.clip_grad_norm is not None:
            clip_grads_with_norm_(self.trained, options.clip_grad_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.step)
        logged = {name: term.detach() for name, term in terms.items()}
        return {**logged, "grad_norm": norm, "lr": options.lr * factor}

    def _batch_rows(self) -> list[int]:
        """Rows of the training part in the global batch of this step."""
        return [self.stream.at(position) for position in range(self.step * self.rows, (self.step + 1) * self.rows)]

    def _check_finite(self, terms: dict[str, Tensor], norm: Tensor, lr: float) -> None:
        """Stop before the update that would spoil the weights. With fp16 the scaler skips steps of infinite gradients.

        Raises:
            Diverged: with step, what is not finite, learning rate and the rows of the batch.
        """
        checked = [*terms.values(), *([norm] if self.accelerator.scaler is None else [])]
        if bool(torch.isfinite(torch.stack([value.detach().to(norm) for value in checked])).all()):
            return
        rows = ", ".join(self.parts.train.names[row] for row in self._batch_rows())
        what = "; ".join(not_finite(terms, self.model))
        raise Diverged(f"step {self.step + 1}: {what}; learning rate {lr:g}; rows of the batch: {rows}")

    def _write_log(self, rows: list[dict[str, Any]]) -> None:
        """Append rows to log.jsonl and the trackers; this is where the device is waited for."""
        for row in rows:
            row.update((name, value.item()) for name, value in row.items() if isinstance(value, Tensor))
        if self.main:
            with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        if self.config.train.trackers:
            for row in rows:
                self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def _outputs(self, model: OrdinalModel, part: Part) -> Outputs:
        batch_size, workers = self.config.evaluation.batch_size, self.config.data.workers
        return outputs_of(model, part, self.accelerator, batch_size, workers, quiet=self.quiet)

    def _validate(self) -> dict[str, float]:
        """Validation MAE by the chosen decoding; remembers the best step."""
        if self.parts.validation is None:
            self.best_step = self.step
            return {}
        if self.config.model.batch_norm == "local":
            average_running_statistics(self.model.encoder, self.accelerator.num_processes)
        with self.average.applied() if self.average else nullcontext():
            model = deployed(self.model, self.parts, self._outputs)
            predictions = predictions_of(model, self._outputs(model, self.parts.validation))
        figures = score(predictions, self.parts.validation, self.parts.ranks, self.config.evaluation.cs)
        value = figures[self.config.evaluation.decoding]["mae"]
        value = math.inf if value is None else value
        if value < self.best_value:
            self.best_value, self.best_step, self.stale = value, self.step, 0
        else:
            self.stale += 1
        return {"validation_mae": value, "validation_accuracy": figures["accuracy"]}

    def _save_checkpoint(self) -> None:
        if self.main:
            scaler = self.accelerator.scaler
            state = {
                "best_step": self.best_step,
                "best_value": None if math.isinf(self.best_value) else self.best_value,
                "stale": self.stale,
                "train_seconds": self.train_seconds + time.monotonic() - self.started,
                "scaler": scaler.state_dict() if scaler is not None else None,
                "config": self.config.model_dump(mode="json"),
            }
            folder = self.folder / "checkpoints"
            checkpoint.save_checkpoint(
                folder,
                self.step,
                checkpoint.weights_of(self.model, self.average),
                self.optimizer.optimizer.state_dict(),
                state,
            )
            checkpoint.prune(folder, self.config.train.keep_checkpoints, self.best_step)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        """Continue at the step after the checkpoint that `train.resume` names, or start with an empty log."""
        found = checkpoint.find_checkpoint(self.folder / "checkpoints", self.config.train.resume)
        if found is None:
            self._start_anew()
            return
        state = found.state
        checkpoint.check_same_experiment(found.folder, state["config"], self.config.model_dump(mode="json"))
        checkpoint.load_weights(self.model, self.average, found.weights)
        self.optimizer.optimizer.load_state_dict(found.optimizer)
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.best_step, self.stale = state["step"], state["best_step"], state["stale"]
        self.train_seconds = state["train_seconds"]
        self.best_value = math.inf if state["best_value"] is None else state["best_value"]
        self._claim_folder()
        if self.main:
            checkpoint.cut_log(self.folder / "log.jsonl", self.step)
            checkpoint.remove_after(self.folder / "checkpoints", self.step)
        self.accelerator.wait_for_everyone()

    def _claim_folder(self) -> None:
        """Once nothing stands against this run: the folder holds no finished one until it is finished again."""
        self.accelerator.wait_for_everyone()  # nobody reads the old checkpoints any more
        if self.main:
            for result in ("metrics.json", "report.html"):
                (self.folder / result).unlink(missing_ok=True)
            self.config.save(self.folder / "config.yaml")

    def _start_anew(self) -> None:
        self._claim_folder()
        if self.main:
            (self.folder / "log.jsonl").write_text("", encoding="utf-8")
            checkpoint.remove_after(self.folder / "checkpoints", -1)
        self.accelerator.wait_for_everyone()

    def _load_selected(self) -> None:
        """The weights of the best step become the model, unless the last are asked for or there is no other.

        With a running average it is the average that becomes the model.
        """
        best = self.folder / "checkpoints" / f"{checkpoint.PREFIX}{self.best_step or self.step:08d}"
        if self.config.train.select == "best" and self.best_step not in (None, self.step):
            if self.main:
                with self.average.applied() if self.average else nullcontext():
                    last = deepcopy(self.model)
                merge_adapters(last.encoder.tower)
                last.save_pretrained(self.folder / "model-last")
            checkpoint.load_weights(self.model, self.average, checkpoint.load_checkpoint(best).weights)
        if self.average is not None:
            self.average.swap()
        merge_adapters(self.model.encoder.tower)

    def _finish(self) -> None:
        """Evaluate the chosen model, write metrics.json, predictions.parquet, model/ and its card, report.html."""
        model = deployed(self.model, self.parts, self._outputs)
        (self.folder / "predictions.parquet").unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        wanted = {"validation": self.parts.validation, "test": self.parts.test if self.config.evaluation.test else None}
        present = {name: part for name, part in wanted.items() if part is not None}
        counts = torch.bincount(torch.from_numpy(self.parts.train.ranks), minlength=len(self.parts.ranks)).tolist()
        figures = evaluate_parts(model, present, self.accelerator, self.config, self.folder, self.quiet, counts)
        figures.update(
            method=self.config.method,
            seed=self.config.seed,
            ordinality=model_ordinality(model),
            steps=self.step,
            best_step=self.best_step,
            num_train=len(self.parts.train),
            train_counts=counts,
            parameters=self.num_trained,
            train_seconds=self.train_seconds,
        )
        if self.main:
            model.save_pretrained(self.folder / "model")
            write_json(self.folder / "metrics.json", figures)
            if self.config.evaluation.report:
                document_run(self.folder, self.parts, model)
        self.accelerator.wait_for_everyone()
