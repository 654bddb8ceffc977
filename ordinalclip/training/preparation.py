"""From a configuration to a model that is ready to be trained: what learns, what is exact, what is fast."""

from __future__ import annotations

import fnmatch
import logging
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from torch import nn

from ordinalclip.config import ModelConfig, RunConfig, TrainConfig
from ordinalclip.data import Part
from ordinalclip.model import Encoder, OrdinalModel
from ordinalclip.ranks import Ranks
from ordinalclip.training.distributed import check_batch_norm
from ordinalclip.training.layers import add_drop_path, checkpoint_activations, freeze_layers
from ordinalclip.training.sampling import SampleNoise, inexact_dropout, use_sample_noise

logger = logging.getLogger(__name__)


def build_model(config: RunConfig, ranks: Ranks, train: Part) -> OrdinalModel:
    """The untrained model of a run, in its precision, with the encoder's pretrained weights."""
    torch.manual_seed(config.seed)
    model = OrdinalModel.build(
        config.model.backbone,
        ranks,
        config.method,
        config.head,
        text=config.model.text,
        load_weights=config.model.load_weights,
        label_mean=float(train.values.mean()),
        label_std=float(train.values.std()) or 1.0,
        decoding=config.evaluation.decoding,
        dropout=config.model.dropout,
        image_size=config.model.image_size,
        mirror=config.model.mirror,
        text_pooling=config.model.text_pooling,
    )
    return model.to(getattr(torch, config.train.precision)).eval()


def use_precision(options: TrainConfig) -> None:
    """TensorFloat-32 on or off, in convolutions too, where PyTorch's default is on."""
    torch.backends.cuda.matmul.allow_tf32 = options.tf32
    torch.backends.cudnn.allow_tf32 = options.tf32


def prepare_model(
    model: OrdinalModel, config: RunConfig, num_processes: int, micro_batched: bool
) -> tuple[list[SampleNoise], list[SampleNoise]]:
    """Adapters, frozen parts, exact BatchNorm and dropout, memory and speed, in place.

    Args:
        micro_batched: whether any process's share is larger than the micro-batch.

    Returns:
        the dropout layers of the encoder and of the head, which want to be told the samples' positions.

    Raises:
        ValueError: what the encoder does not have or what would not be exact, with the key.
    """
    options, encoder = config.train, model.encoder
    if config.model.lora_rank is not None:
        add_adapters(encoder.tower, config.model, model.config.pixel_spec.size)
    if options.freeze_layers is not None:
        freeze_layers(encoder.tower, options.freeze_layers)
    cached = config.model.features == "cached"
    freeze(model, [*options.freeze, *(["encoder.*"] if cached else [])])
    if model.head.reads == "tokens":
        freeze_unread(encoder, model.config.pixel_spec.size)

    mode = "frozen" if cached else config.model.batch_norm
    check_batch_norm(encoder, mode, num_processes, micro_batched, options.activation_checkpointing, options.exact)
    encoder.frozen_statistics = mode == "frozen"
    if mode == "sync" and num_processes > 1:
        encoder.tower = convert_sync_batchnorm(encoder.tower)

    if config.model.drop_path:
        add_drop_path(encoder.tower, config.model.drop_path)
    noises = use_sample_noise(encoder, config.seed)
    if cached and (silent := [noise for noise in noises if noise.p and noise is not encoder.dropout]):
        logger.warning("model.features=cached: %d dropout layers of the encoder do nothing in training", len(silent))
    idle = config.data.augment.model_dump(exclude={"crop_ratio"}, exclude_defaults=True)
    if config.data.views == 1 and idle:
        logger.warning("data.views=1: pictures are as evaluated, without data.augment (%s)", ", ".join(idle))
    if model.head.views > 1 and config.data.views == 1:
        logger.warning("method %s compares views of a picture, which are all the same with data.views=1", config.method)
    head_noises = use_sample_noise(model.head, config.seed, len(noises))
    if inexact := inexact_dropout(model):
        logger.warning("dropout of these layers depends on processes and micro-batches: %s", ", ".join(inexact))

    if options.activation_checkpointing:
        checkpoint_activations(encoder.tower)
    if options.compile and not cached:
        encoder.tower.compile()
    return noises, head_noises


def freeze(model: nn.Module, patterns: list[str]) -> None:
    """Take the gradient from parameters whose name matches a pattern.

    Raises:
        ValueError: a pattern that matches nothing; the message shows the first names there are.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"train.freeze: {pattern!r} matches no parameter; there are {', '.join(names[:10])}, ...")
    for name, parameter in model.named_parameters():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)


def freeze_unread(encoder: Encoder, image_size: int) -> None:
    """Take the gradient from what a tower's tokens do not depend on: its last norm, projection, or attention layer.

    Processes would wait for their gradients, and decay would shrink them.
    """
    if trained := [parameter for parameter in encoder.parameters() if parameter.requires_grad]:
        tokens = encoder.eval().encode(trained[0].new_zeros(1, 3, image_size, image_size))
        gradients = torch.autograd.grad(tokens.sum(), trained, allow_unused=True)
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)


def add_adapters(tower: nn.Module, options: ModelConfig, image_size: int) -> None:
    """Low-rank adapters (LoRA, Hu et al., 2022) in an image tower, through `peft`; only they learn.

    Fused attention reads the weights of its layers without calling them, so that an adapter there would never act:
    those layers are left out.

    Raises:
        ImportError: peft is not installed; ValueError: a pattern that matches no linear layer or convolution.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError("model.lora_rank needs peft: pip install 'ordinalclip[lora]'") from error
    called = _called_modules(tower, image_size)
    able = {
        name: module
        for name, module in tower.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and getattr(module, "groups", 1) == 1 and module in called
    }
    for pattern in options.lora_targets:
        if not fnmatch.filter(able, pattern):
            raise ValueError(
                f"model.lora_targets: {pattern!r} matches no linear layer or convolution; "
                f"there are {', '.join(list(able)[:10])}, ..."
            )
    linear = [name for name, module in able.items() if isinstance(module, nn.Linear)]
    chosen = [name for name in able if any(fnmatch.fnmatchcase(name, p) for p in options.lora_targets)]
    targets = chosen or linear or list(able)
    if not targets:
        raise ValueError("model.lora_rank: the image encoder has neither linear layers nor convolutions")
    rank = options.lora_rank or 0
    adapters: Any = peft.LoraConfig(r=rank, lora_alpha=options.lora_alpha, target_modules=targets, bias="none")
    tower.requires_grad_(False)
    peft.inject_adapter_in_model(adapters, tower)


@torch.no_grad()
def _called_modules(tower: nn.Module, image_size: int) -> set[nn.Module]:
    """The parts of a tower that are called, found by encoding one empty image."""
    called: set[nn.Module] = set()
    hooks = [module.register_forward_hook(lambda part, *_: called.add(part)) for module in tower.modules()]
    like = next(tower.parameters())
    tower.eval()(torch.zeros(1, 3, image_size, image_size, dtype=like.dtype, device=like.device))
    for hook in hooks:
        hook.remove()
    return called


def merge_adapters(tower: nn.Module) -> None:
    """Add trained adapters to the weights that they adapt and remove them, in place."""
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:
        return
    for parent in list(tower.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BaseTunerLayer):
                child.merge()
                setattr(parent, name, child.get_base_layer())
