"""What is done to an image encoder layer by layer: depths, freezing, drop-path, checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ordinalclip.backbones.layers import encoder_layers

# Blocks without a place for drop-path: the modules that end their residual branches.
BRANCH_ENDS = {
    "Bottleneck": ("bn3",),
    "ResidualAttentionBlock": ("ls_1", "ls_2"),
    "CLIPEncoderLayer": ("self_attn.out_proj", "mlp"),
    "SiglipEncoderLayer": ("self_attn.out_proj", "mlp"),
}
BRANCH_PLACES = ("drop_path", "drop_path1", "drop_path2")  # of timm's and transformers' blocks


def parameter_depths(tower: nn.Module) -> dict[str, int]:
    """How deep each parameter lies: 0 for the stem, 1 to L for the layers, L + 1 for what comes after them."""
    layers = encoder_layers(tower)
    layer_of = {id(p): depth for depth, layer in enumerate(layers, 1) for p in layer.parameters()}
    depths, passed = {}, False
    for name, parameter in tower.named_parameters():
        passed = passed or id(parameter) in layer_of
        after = passed or name.rpartition(".")[2] == "proj"  # open_clip's ViT lists its output projection first
        depths[name] = layer_of.get(id(parameter), len(layers) + 1 if after else 0)
    return depths


def freeze_layers(tower: nn.Module, count: int) -> None:
    """Take the gradient from the stem and the first `count` layers.

    Raises:
        ValueError: the tower has fewer layers.
    """
    available = len(encoder_layers(tower))
    if count > available:
        raise ValueError(f"train.freeze_layers={count}: this image encoder has {available} layers")
    depths = parameter_depths(tower)
    for name, parameter in tower.named_parameters():
        if depths[name] <= count:
            parameter.requires_grad_(False)


def checkpoint_activations(tower: nn.Module) -> None:
    """Keep only the inputs of each layer for the backward pass and compute the rest again: less memory, more time."""

    def recomputed(forward: Callable[..., Any], layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if layer.training and torch.is_grad_enabled():
            return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        return forward(*args, **kwargs)

    for layer in encoder_layers(tower):
        layer.forward = partial(recomputed, layer.forward, layer)


def add_drop_path(tower: nn.Module, rate: float) -> None:
    """Stochastic depth: residual branches are left out for single samples, more often the deeper they lie.

    The rate rises linearly from 0 in the first block to `rate` in the last (Huang et al., 2016).

    Raises:
        ValueError: a tower whose residual branches are not known.
    """
    blocks = [(module, places) for module in tower.modules() if (places := _places(module))]
    if not blocks:
        raise ValueError(
            f"model.drop_path: the residual branches of {type(tower).__name__} are not known; known are those of timm "
            f"and transformers with a drop_path, and of {', '.join(BRANCH_ENDS)}"
        )
    for number, (block, places) in enumerate(blocks):
        probability = rate * number / max(1, len(blocks) - 1)
        for place in places:
            if place in BRANCH_PLACES:
                setattr(block, place, DropPath(probability))
            else:
                name = f"drop_path_{place.replace('.', '_')}"
                block.add_module(name, DropPath(probability))
                block.get_submodule(place).register_forward_hook(partial(_apply, block, name))


def _apply(block: nn.Module, name: str, _module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return block.get_submodule(name)(output)


def _places(module: nn.Module) -> list[str]:
    """Where a block's residual branches end: names of its own places for drop-path, or of their last modules."""
    own = [name for name in BRANCH_PLACES if hasattr(module, name)]
    known = BRANCH_ENDS.get(type(module).__name__, ())
    return own or [name for name in known if hasattr(module, name.partition(".")[0])]
