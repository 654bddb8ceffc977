"""One optimiser step on the global batch, whatever the method and however it is executed."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ordinalclip.config import RunConfig
from ordinalclip.data import Parts
from ordinalclip.heads import Targets
from ordinalclip.images import Augmentation
from ordinalclip.losses import at_least_float32
from ordinalclip.model import OrdinalModel
from ordinalclip.training.distributed import MicroBatches, gather_outputs
from ordinalclip.training.features import FeatureCache
from ordinalclip.training.imbalance import sample_weights
from ordinalclip.training.interruption import Diverged, not_finite
from ordinalclip.training.optimization import WeightAverage, lr_factor, make_optimizer
from ordinalclip.training.preparation import prepare_model
from ordinalclip.training.sampling import Stream, StreamDataset, StreamSampler, shares
from ordinalclip.workers import decoded


class Learner:
    """A model that learns: prepared, with its optimiser and the order of its samples.

    Args:
        model: the untrained model, on the accelerator's device; it is prepared in place.
        features: of its encoder, which stays as it is; None: pictures are encoded in every step.

    Attributes:
        total: number of optimiser steps of the whole run.
        average: the running average of the weights, or None.
        deferred: whether numbers that went wrong in a step are noticed in the next one: see `_check_finite`.
    """

    def __init__(
        self,
        model: OrdinalModel,
        parts: Parts,
        config: RunConfig,
        accelerator: Accelerator,
        features: FeatureCache | None = None,
    ):
        options, train = config.train, parts.train
        self.features = None if features is None else features.views(train)
        self.config, self.accelerator, self.model, self.train = config, accelerator, model, train
        self.total = num_steps(config, parts)
        self.positions_per_step = options.batch_size * model.head.views
        self.shares = shares(self.positions_per_step, accelerator.num_processes)
        micro_batched = options.micro_batch_size is not None and options.micro_batch_size < max(self.shares)
        noises, self.head_noises = prepare_model(model, config, accelerator.num_processes, micro_batched)
        balanced = train.ranks if options.sampling == "balanced" else None
        self.stream = Stream(len(train), config.seed, balanced, model.head.views)
        self.weights = sample_weights(train.ranks, len(parts.ranks), options.weighting, options.lds_sigma)
        self.average = WeightAverage(model, options.ema) if options.ema else None
        self.optimizer = accelerator.prepare(make_optimizer(model, options))
        fused = options.optimizer == "adamw" and options.fused
        self.deferred = fused and accelerator.device.type == "cuda" and accelerator.scaler is None
        self.unchecked: _Unchecked | None = None
        encoder, self.head = (
            accelerator.prepare(module) if any(p.requires_grad for p in module.parameters()) else module
            for module in (model.encoder, model.head)
        )
        if self.features is not None:  # what is left of the encoder
            encoder, micro_batched = model.encoder.dropout, False
        self.micro_batches = MicroBatches(
            accelerator, encoder, noises, options.micro_batch_size if micro_batched else None
        )

    @property
    def parameters(self) -> list[Tensor]:
        """All that is trained."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def batches(self, first_step: int) -> AbstractContextManager[Iterator[tuple[Tensor, Tensor]]]:
        """The batches from a step on, this process's share of each: pixels, or cached features, and positions in the
        stream.

        They are read within a `with` block: see `decoded`.
        """
        place = self.accelerator.process_index, self.accelerator.num_processes
        sampler = StreamSampler(self.positions_per_step, first_step, self.total, *place)
        if self.features is not None:
            return nullcontext(map(self._features_at, sampler))
        data, spec = self.config.data, self.model.config.pixel_spec
        augmentation = Augmentation(**data.augment.model_dump())
        pictures = StreamDataset(self.train, spec, augmentation, self.stream, data.views)
        return decoded(pictures, sampler, data.workers, data.prefetch)

    def _features_at(self, positions: list[int]) -> tuple[Tensor, Tensor]:
        assert self.features is not None
        rows = [self.stream.at(position) for position in positions]
        views = [self.stream.visit(position) % self.features.place.shape[1] for position in positions]
        return self.features.take(rows, views), torch.tensor(positions)

    def rows_of(self, step: int) -> list[int]:
        """Rows of the training part in the global batch of a (0-based) step, in order of position."""
        begin = step * self.positions_per_step
        return [self.stream.at(position) for position in range(begin, begin + self.positions_per_step)]

    def step(self, number: int, inputs: Tensor, positions: Tensor) -> dict[str, Any]:
        """One optimiser step on the global batch.

        Args:
            number: of the step, from 0.
            inputs, positions: this process's share of the batch, as `batches` gives it.

        Returns:
            what is logged; loss terms and norm as tensors, to be read later.
        """
        device, options = self.accelerator.device, self.config.train
        inputs, positions = inputs.to(device, non_blocking=True), positions.to(device, non_blocking=True)
        factor = lr_factor(number, self.total, options)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        (self.model.encoder if self.features is None else self.model.encoder.dropout).train()
        self.model.head.train()

        features = self.micro_batches.encode(inputs.to(getattr(torch, options.precision)), positions)
        for noise in self.head_noises:
            noise.positions = positions
        with self.accelerator.autocast():
            outputs = {name: at_least_float32(tensor) for name, tensor in self.head(features).items()}
        outputs = gather_outputs(outputs, self.shares)
        dtype = next(iter(outputs.values())).dtype
        terms = self.model.head.loss(outputs, self._targets(number, device, dtype))
        self.micro_batches.backward(terms["loss"])
        if self.accelerator.scaler is not None:
            self.accelerator.unscale_gradients(self.optimizer)
        trained = self.parameters
        norm = get_total_norm([p.grad for p in trained if p.grad is not None])
        self._check_finite(number, terms, norm, options.lr * factor)
        if options.clip_grad_norm is not None:
            clip_grads_with_norm_(trained, options.clip_grad_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(number)
        logged = {name: term.detach() for name, term in terms.items()}
        return {**logged, "grad_norm": norm, "lr": options.lr * factor}

    def _targets(self, number: int, device: torch.device, dtype: torch.dtype) -> Targets:
        """Labels of the global batch, looked up on every process: nobody has to send them."""
        rows = self.rows_of(number)
        values, ranks = torch.from_numpy(self.train.values[rows]), torch.from_numpy(self.train.ranks[rows])
        weights = None if self.weights is None else torch.from_numpy(self.weights[rows]).to(device, dtype)
        return Targets(values.to(device, dtype), ranks.to(device), weights, number / self.total)

    def _check_finite(self, number: int, terms: dict[str, Tensor], norm: Tensor, lr: float) -> None:
        """Stop before the update that would spoil the weights. With fp16 the scaler skips steps of infinite gradients.

        To ask a GPU whether its numbers are finite is to wait for it. There the update itself is told, on the device,
        to leave the weights alone, and the answer is read before the next update, when that step is on its way.

        Raises:
            Diverged: with step, what is not finite, learning rate and the rows of the batch.
        """
        checked = [*terms.values(), *([norm] if self.accelerator.scaler is None else [])]
        finite = torch.isfinite(torch.stack([value.detach().to(norm) for value in checked])).all()
        if not self.deferred:
            if not finite:
                raise self._diverged(number, terms, norm, lr, self.model)
            return
        self.optimizer.optimizer.found_inf = spoilt = (~finite).float()
        self.settle()
        self.unchecked = _Unchecked(number, {name: term.detach() for name, term in terms.items()}, norm, lr, spoilt)

    def settle(self) -> None:
        """What is deferred is read now, before there is another update, weights are judged or numbers written.

        Raises:
            Diverged: see `step`.
        """
        last = self.unchecked
        if last is not None and last.spoilt.item():
            raise self._diverged(last.number, last.terms, last.norm, last.lr)

    def _diverged(
        self, number: int, terms: dict[str, Tensor], norm: Tensor, lr: float, model: nn.Module | None = None
    ) -> Diverged:
        what = not_finite(terms, model) or [f"the norm of the gradient is {norm.item()}"]
        rows = ", ".join(self.train.names[row] for row in dict.fromkeys(self.rows_of(number)))
        return Diverged(f"step {number + 1}: {'; '.join(what)}; learning rate {lr:g}; rows of the batch: {rows}")


class _Unchecked(NamedTuple):
    """Numbers of a step that are still on their device.

    Attributes:
        spoilt: 1 where any of them is not finite.
    """

    number: int
    terms: dict[str, Tensor]
    norm: Tensor
    lr: float
    spoilt: Tensor


class StepClock:
    """What a step costs: processor time on a CPU, decoding in this process included; the device's time on a GPU.

    Unlike the time on the wall both stay what they are while the machine does other things.

    Attributes:
        name: of the entry in log.jsonl, in milliseconds.
    """

    def __init__(self, device: torch.device):
        self.on_device = device.type == "cuda"
        self.name = "device_ms" if self.on_device else "processor_ms"
        self.restart()

    def restart(self) -> None:
        """What was done since the last step belongs to none."""
        self.begun = time.process_time()

    def __enter__(self) -> StepClock:
        if self.on_device:
            self.first, self.last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.first.record()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.on_device:
            self.last.record()
        self.ended = time.process_time()

    @property
    def spent(self) -> float | _DeviceTime:
        """Milliseconds of the step within the last `with` block, to be read later."""
        return _DeviceTime(self.first, self.last) if self.on_device else 1000 * (self.ended - self.begun)


class _DeviceTime(NamedTuple):
    """Between two events on a GPU; waits for them when it is asked for."""

    first: Any
    last: Any

    def item(self) -> float:
        self.last.synchronize()
        return self.first.elapsed_time(self.last)


def num_steps(config: RunConfig, parts: Parts) -> int:
    """Optimiser steps of a run."""
    if config.train.epochs is not None:
        return math.ceil(config.train.epochs * len(parts.train) / config.train.batch_size)
    return config.train.max_steps
