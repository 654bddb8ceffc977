"""Parameter groups, the learning rate of every step, and the running average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ordinalclip.config import TrainConfig
from ordinalclip.model import OrdinalModel
from ordinalclip.training.layers import parameter_depths


def parameter_groups(model: OrdinalModel, options: TrainConfig) -> list[dict[str, Any]]:
    """Encoder, prompts and the rest of the head, each with its learning rate; no decay on biases and norms.

    With `train.layer_decay` the encoder's rate falls by that factor from each layer to the one before it.
    """
    prompts = {id(parameter) for parameter in model.head.prompt_parameters()}
    rates = {"encoder": options.lr_encoder, "prompts": options.lr_prompts, "head": options.lr_head}
    depths = parameter_depths(model.encoder.tower)
    deepest = max(depths.values(), default=0)
    groups: dict[tuple[str, float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = "encoder" if name.startswith("encoder.") else "prompts" if id(parameter) in prompts else "head"
            depth = depths.get(name.removeprefix("encoder.tower."), deepest) if kind == "encoder" else deepest
            factor = options.layer_decay ** (deepest - depth)
            groups.setdefault((kind, factor, parameter.ndim > 1), []).append(parameter)
    found = []
    for (kind, factor, decays), parameters in groups.items():
        rate = rates[kind]
        peak = (options.lr if rate is None else rate) * factor
        decay = options.weight_decay if decays else 0.0
        found.append({"params": parameters, "lr": peak, "peak_lr": peak, "weight_decay": decay, "name": kind})
    return found


def make_optimizer(model: OrdinalModel, options: TrainConfig) -> torch.optim.Optimizer:
    """AdamW or RAdam over `parameter_groups`, both with decoupled weight decay.

    Raises:
        ValueError: nothing of the model is trained.
    """
    groups = parameter_groups(model, options)
    if not groups:
        raise ValueError(
            f"nothing is trained: the image encoder is frozen (train.freeze, model.features=cached), and "
            f"method={model.config.method} has no parameters on it"
        )
    if options.optimizer == "radam":
        return torch.optim.RAdam(groups, lr=options.lr, decoupled_weight_decay=True)
    return torch.optim.AdamW(groups, lr=options.lr, fused=options.fused)


def lr_factor(step: int, total: int, options: TrainConfig) -> float:
    """Share of the peak learning rate in (0-based) step: linear warm-up, then cosine to 0 or constant."""
    if step < options.warmup_steps:
        return (step + 1) / options.warmup_steps
    if options.schedule == "constant":
        return 1.0
    done = (step - options.warmup_steps) / max(1, total - options.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))


class WeightAverage:
    """Exponential moving average of the trained weights and of the encoder's running statistics.

    The average is what is validated, kept as best and deployed; training goes on with the weights themselves. The
    decay rises as (1 + t) / (10 + t) over the first steps t, so that a short run does not keep its start.

    Args:
        model: the model that is trained.
        decay: weight of the past in every step, e.g. 0.999.
    """

    def __init__(self, model: OrdinalModel, decay: float):
        self.decay = decay
        self.live = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        self.live.update((name, b) for name, b in model.named_buffers() if "running_" in name)
        self.average = {name: tensor.clone() for name, tensor in self.live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take up the weights after a (0-based) step."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.average.values()), list(self.live.values()), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model with the averaged weights, within a `with` block."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the model's tensors and their averages."""
        for name, tensor in self.live.items():
            kept = tensor.clone()
            tensor.copy_(self.average[name])
            self.average[name] = kept
