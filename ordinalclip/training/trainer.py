"""The one trainer: every method, one process or many, read from top to bottom in `Trainer.run`.

ordinalclip train configs/demo.yaml train.lr=1e-3
accelerate launch -m ordinalclip train configs/demo.yaml
torchrun --nproc_per_node 2 -m ordinalclip train configs/demo.yaml
"""

from __future__ import annotations

import json
import logging
import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor
from torch.utils.data import DataLoader

from ordinalclip.config import RunConfig
from ordinalclip.data import Parts, load_parts
from ordinalclip.heads import Targets, at_least_float32
from ordinalclip.images import Augmentation
from ordinalclip.model import OrdinalModel
from ordinalclip.progress import Progress
from ordinalclip.report import document_run
from ordinalclip.training import checkpoint
from ordinalclip.training.distributed import MicroBatches, check_batch_norm, gather, gather_outputs, make_accelerator
from ordinalclip.training.evaluation import (
    evaluate_parts,
    model_ordinality,
    outputs_of,
    predictions_of,
    score,
    targets_of,
    write_json,
)
from ordinalclip.training.optimization import WeightAverage, freeze, lr_factor, make_optimizer
from ordinalclip.training.sampling import (
    StreamDataset,
    StreamSampler,
    inexact_dropout,
    shares,
    use_sample_noise,
)

logger = logging.getLogger(__name__)


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
    """
    return Trainer(config, parts, quiet).run()


class Trainer:
    """State of one training run; `run` does the work."""

    def __init__(self, config: RunConfig, parts: Parts | None = None, quiet: bool = False):
        self.config, options = config, config.train
        self.folder = Path(config.output_dir)
        self.accelerator = make_accelerator(options.mixed_precision, options.trackers, config.output_dir)
        self.main = self.accelerator.is_main_process
        self.quiet = quiet or not self.main
        if options.batch_size < self.accelerator.num_processes:
            raise ValueError(
                f"train.batch_size={options.batch_size} is less than the {self.accelerator.num_processes} processes"
            )
        if self.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in ("metrics.json", "report.html"):  # no finished run here, until there is one again
                (self.folder / name).unlink(missing_ok=True)
            config.save(self.folder / "config.yaml")
        with self.accelerator.main_process_first():
            self.parts = parts or load_parts(config.data, config.ranks, config.seed)
        if options.patience is not None and self.parts.validation is None:
            raise ValueError("train.patience needs a validation part")
        self.model = self._build_model()
        self.learns = any(p.requires_grad for p in self.model.head.parameters()) and self._max_steps() > 0
        self.step, self.stale = 0, 0
        self.best_step: int | None = None
        self.best_value = math.inf
        self.train_seconds = 0.0
        if self.learns:
            self._prepare()

    def _max_steps(self) -> int:
        options = self.config.train
        if options.epochs is None:
            return options.max_steps
        return math.ceil(options.epochs * len(self.parts.train) / options.batch_size)

    def _build_model(self) -> OrdinalModel:
        config, labels = self.config, self.parts.train.values
        torch.manual_seed(config.seed)
        model = OrdinalModel.build(
            config.model.backbone,
            self.parts.ranks,
            config.method,
            config.head,
            text=config.model.text,
            load_weights=config.model.load_weights,
            label_mean=float(labels.mean()),
            label_std=float(labels.std()) or 1.0,
            decoding=config.evaluation.decoding,
            dropout=config.model.dropout,
            image_size=config.model.image_size,
        )
        return model.to(self.accelerator.device, getattr(torch, config.train.precision)).eval()

    def _prepare(self) -> None:
        """Frozen parts, exact BatchNorm and dropout, optimiser, DDP."""
        config, options, model = self.config, self.config.train, self.model
        freeze(model, options.freeze)
        self.shares = shares(options.batch_size, self.accelerator.num_processes)
        micro_batched = options.micro_batch_size is not None and options.micro_batch_size < max(self.shares)
        check_batch_norm(model.encoder, config.model.batch_norm, self.accelerator.num_processes, micro_batched)
        model.encoder.frozen_statistics = config.model.batch_norm == "frozen"
        if config.model.batch_norm == "sync" and self.accelerator.num_processes > 1:
            model.encoder.tower = convert_sync_batchnorm(model.encoder.tower)
        if options.channels_last:
            model.encoder.to(memory_format=torch.channels_last)
        noises = use_sample_noise(model.encoder, config.seed)
        self.head_noises = use_sample_noise(model.head, config.seed, len(noises))
        if inexact := inexact_dropout(model):
            logger.warning("dropout of these layers depends on processes and micro-batches: %s", ", ".join(inexact))

        self.average = WeightAverage(model, options.ema) if options.ema else None
        self.optimizer = self.accelerator.prepare(make_optimizer(model, options))
        self.encoder, self.head = (
            self.accelerator.prepare(module) if any(p.requires_grad for p in module.parameters()) else module
            for module in (model.encoder, model.head)
        )
        size = options.micro_batch_size if micro_batched else None
        self.micro_batches = MicroBatches(self.accelerator, self.encoder, noises, size)

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
        self.accelerator.end_training()
        return self.folder

    def _train(self) -> None:
        config, options = self.config, self.config.train
        total = self._max_steps()
        every = options.eval_every or max(1, math.ceil(total / 10))
        if options.trackers:
            self.accelerator.init_trackers("ordinalclip", {"method": config.method, "seed": config.seed})
        augmentation = Augmentation(**config.data.augment.model_dump())
        loader = DataLoader(
            StreamDataset(self.parts.train, self.model.config.pixel_spec, augmentation, config.seed),
            batch_sampler=StreamSampler(
                options.batch_size, self.step, total, self.accelerator.process_index, self.accelerator.num_processes
            ),
            num_workers=config.data.workers,
            pin_memory=self.accelerator.device.type == "cuda",
            persistent_workers=False,
        )
        title = f"training {config.method}"
        progress: Progress = Progress(None, title, (total - self.step) * options.batch_size, "images", self.quiet)
        rows: list[dict[str, Any]] = []
        self.started = started = time.monotonic()
        for batch in loader:
            row = self._step(batch, total)
            self.step += 1
            rows.append({"step": self.step, **row, "seconds": time.monotonic() - started})
            last = self.step == total
            stop = False
            if self.step % every == 0 or last:
                rows[-1].update(self._validate())
                stop = self._is_stale()
            if self.step % options.log_every == 0 or last or stop or "validation_mae" in rows[-1]:
                self._write_log(rows)
                progress.note = f"loss {rows[-1]['loss']:.3f}"
                rows = []
            if self.step % every == 0 or last or stop:
                self._save_checkpoint()
            progress.advance(options.batch_size)
            if stop:
                break
        progress.close()
        self.train_seconds += time.monotonic() - started

    def _is_stale(self) -> bool:
        return self.config.train.patience is not None and self.stale >= self.config.train.patience

    def _step(self, batch: list[Tensor], total: int) -> dict[str, Any]:
        """One optimiser step on the global batch; returns the logged terms as tensors, to be read later."""
        device, options = self.accelerator.device, self.config.train
        pixels, values, ranks, positions = (tensor.to(device, non_blocking=True) for tensor in batch)
        factor = lr_factor(self.step, total, options)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        self.encoder.train()
        self.head.train()

        order = torch.channels_last if options.channels_last else torch.contiguous_format
        pixels = pixels.to(getattr(torch, options.precision), memory_format=order)
        features = self.micro_batches.encode(pixels, positions)
        for noise in self.head_noises:
            noise.positions = positions
        with self.accelerator.autocast():
            outputs = {name: at_least_float32(tensor) for name, tensor in self.head(features).items()}
        outputs = gather_outputs(outputs, self.shares)
        values, ranks = gather(values, self.shares), gather(ranks, self.shares)
        values = values.to(next(iter(outputs.values())).dtype) if options.precision == "float64" else values.float()
        terms = self.model.head.loss(outputs, Targets(values, ranks, progress=self.step / total))
        self.micro_batches.backward(terms["loss"])
        if options.clip_grad_norm is not None:
            trained = [p for group in self.optimizer.param_groups for p in group["params"]]
            self.accelerator.clip_grad_norm_(trained, options.clip_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.step)
        return {**{name: term.detach() for name, term in terms.items()}, "lr": options.lr * factor}

    def _write_log(self, rows: list[dict[str, Any]]) -> None:
        """Append rows to log.jsonl and the trackers; this is where the device is waited for."""
        for row in rows:
            for name, value in row.items():
                row[name] = value.item() if isinstance(value, Tensor) else value
                if isinstance(value, Tensor) and not math.isfinite(row[name]):
                    raise ValueError(f"step {row['step']}: {name} is {row[name]}, at learning rate {row['lr']:g}")
        if self.main:
            with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        if self.config.train.trackers:
            for row in rows:
                self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def _deployed(self) -> OrdinalModel:
        """The model as it is served, its head fitted on training and validation outputs if it wants that."""
        self.model.eval()
        if self.model.head.needs_fit:
            train = self._outputs(self.model, self.parts.train), targets_of(self.parts.train)
            validation = None
            if self.parts.validation is not None:
                validation = self._outputs(self.model, self.parts.validation), targets_of(self.parts.validation)
            self.model.head.fit(train, validation)
        return self.model.deploy()

    def _outputs(self, model: OrdinalModel, part: Any, title: str = "") -> dict[str, Tensor]:
        options = self.config.evaluation
        return outputs_of(
            model, part, self.accelerator, options.batch_size, self.config.data.workers, title, self.quiet
        )

    def _validate(self) -> dict[str, float]:
        """Validation MAE by the chosen decoding; remembers the best step."""
        if self.parts.validation is None:
            self.best_step = self.step
            return {}
        with self.average.applied() if self.average else nullcontext():
            model = self._deployed()
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
            checkpoint.save_checkpoint(folder, self.step, self._weights(), self.optimizer.optimizer.state_dict(), state)
            checkpoint.prune(folder, self.config.train.keep_checkpoints, self.best_step)
        self.accelerator.wait_for_everyone()

    def _weights(self) -> dict[str, Tensor]:
        """All that training changes; the frozen text tower is rebuilt from its own weights."""
        weights = {name: t for name, t in self.model.state_dict().items() if not name.startswith("head.text.")}
        if self.average is not None:
            weights.update((f"average.{name}", tensor) for name, tensor in self.average.average.items())
        return weights

    def _load_weights(self, weights: dict[str, Tensor]) -> None:
        if self.average is not None:
            for name, tensor in self.average.average.items():
                tensor.copy_(weights.pop(f"average.{name}"))
        missing, unexpected = self.model.load_state_dict(weights, strict=False)
        missing = [name for name in missing if not name.startswith("head.text.")]
        if missing or unexpected:
            raise ValueError(f"checkpoint does not fit the model: missing {missing[:5]}, unexpected {unexpected[:5]}")

    def _resume(self) -> None:
        """Continue at the step after the checkpoint that `train.resume` names, or start with an empty log."""
        found = checkpoint.find_checkpoint(self.folder / "checkpoints", self.config.train.resume)
        if found is None:
            self._start_anew()
            return
        weights, optimizer, state = checkpoint.load_checkpoint(found)
        checkpoint.check_same_experiment(found, state["config"], self.config.model_dump(mode="json"))
        self._load_weights(weights)
        self.optimizer.optimizer.load_state_dict(optimizer)
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.best_step, self.stale = state["step"], state["best_step"], state["stale"]
        self.train_seconds = state["train_seconds"]
        self.best_value = math.inf if state["best_value"] is None else state["best_value"]
        if self.main:
            checkpoint.cut_log(self.folder / "log.jsonl", self.step)
            checkpoint.remove_after(self.folder / "checkpoints", self.step)
        self.accelerator.wait_for_everyone()

    def _start_anew(self) -> None:
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
                    self.model.save_pretrained(self.folder / "model-last")
            self._load_weights(checkpoint.load_checkpoint(best)[0])
        if self.average is not None:
            self.average.swap()

    def _finish(self) -> None:
        """Evaluate the chosen model, write metrics.json, predictions.parquet, model/ and its card, report.html."""
        model = self._deployed()
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
            parameters=sum(p.numel() for p in self.model.parameters() if p.requires_grad) if self.learns else 0,
            train_seconds=self.train_seconds,
        )
        if self.main:
            model.save_pretrained(self.folder / "model")
            write_json(self.folder / "metrics.json", figures)
            if self.config.evaluation.report:
                document_run(self.folder, self.parts, model)
        self.accelerator.wait_for_everyone()
