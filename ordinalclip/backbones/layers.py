"""What is read of an image tower beside its pooled features: those of each layer, and the tokens of the last one."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool1d

from ordinalclip.backbones.base import Pooling, check_map

SIDE = 7  # of the grid of tokens at most: what a convolutional tower ends with
_one_at_a_time = threading.RLock()  # hooks see whoever calls the tower, threads of a server that share it too


def encoder_layers(tower: nn.Module) -> list[nn.Module]:
    """The layers of an image tower, first to last.

    A layer is a part with parameters of one of the outermost `Sequential`s and `ModuleList`s: a block of a ViT or a
    ResNet, a stage of a Swin or ConvNeXt, a convolution or a BatchNorm of a VGG; where the stem is a `Sequential`, too
    (ConvNeXt), its convolutions and norms count as well.
    """
    layers: list[nn.Module] = []
    for child in tower.children():
        if isinstance(child, nn.Sequential | nn.ModuleList):
            layers += [part for part in child if next(part.parameters(), None) is not None]
        else:
            layers += encoder_layers(child)
    return layers


class LayerFeatures:
    """What each layer of a tower gives for a picture, pooled to one vector: (B, 3, H, W) -> (B, L, D).

    The first L - 1 layers are those of `encoder_layers` that give tokens or a map, in the order in which they are
    called, as they leave the layer, without the tower's last norm; the last one is what the tower itself gives, for a
    plain ResNet the same once more. Class tokens that are kept beside a map (PiT, CvT) are not read. Widths differ
    between the layers of convolutional towers: D is the largest, and narrower layers are filled up with zeros, so that
    features stay one tensor for gathering, micro-batches and mirrors, while products with vectors of a layer's own
    width, filled up alike, and norms and distances within a layer are what they are without.

    Of an encoder to a generator's latent space the layers are those of its codes: a tower that has a method
    `layer_features`, (B, 3, H, W) -> (B, L, D), is asked for no others.

    The layers are looked up anew for every call: adapters and other BatchNorms may have taken their places.

    Args:
        tower: an image encoder, (B, 3, H, W) -> (B, D).
        pooling: how it pools.
        size: of its input in pixels: one empty image is encoded to see what the layers give.

    Attributes:
        dims: width of each layer, L numbers, that of the tower's own features last.

    Raises:
        ValueError: no layer; one that is called more than once, or gives neither tokens nor a map in one piece; a map
            whose channels come last, which the tower does not say (SAM, VOLO); a class token that joins the others on
            their way (CaiT, XCiT), so that it cannot be told which layers have it.
    """

    def __init__(self, tower: nn.Module, pooling: Pooling, size: int):
        self.pooling = pooling
        self.dims: tuple[int, ...] = ()
        found = _of_an_empty_image(self._encode, tower, size)
        self.dims = tuple(features.shape[1] for features in found)
        if len(self.dims) == 1:
            raise ValueError(f"layer-wise features: the layers of {type(tower).__name__} are not known")

    def __call__(self, tower: nn.Module, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) pixels -> (B, L, D) features of `tower`, which is that of the constructor or became of it."""
        found = self._encode(tower, pixel_values)
        if (dims := tuple(features.shape[1] for features in found)) != self.dims:
            raise RuntimeError(f"layer-wise features have widths {dims}, were {self.dims} when the model was built")
        width = max(dims)
        return torch.stack([nn.functional.pad(features, (0, width - features.shape[1])) for features in found], dim=1)

    def _encode(self, tower: nn.Module, pixel_values: Tensor) -> list[Tensor]:
        """(B, D_l) for each layer, (B, D) of the whole last."""
        if (own := getattr(tower, "layer_features", None)) is not None:
            return list(own(pixel_values).unbind(dim=1))
        layers, features = _outputs(tower, pixel_values, self.pooling, self.pooling)
        return [*layers, features]


class TokenFeatures:
    """The tokens of a tower's last layer: (B, 3, H, W) -> (B, N, D).

    The last layer is the last of those that `LayerFeatures` reads, as it is called: its tokens, or the places of its
    map, row by row, as they leave the layer, without the tower's last norm, convolution or projection. A grid of more
    than 7 x 7 is averaged to that, so that tokens can be kept for all pictures of a data set; tokens that stand before
    those of the patches are kept as they are, since a tower that is read at its class token has trained no other.

    Of an encoder to a generator's latent space the tokens are the rows of its codes.

    Args:
        tower, pooling, size: see `LayerFeatures`.

    Attributes:
        num_tokens, dim: N and D.

    Raises:
        ValueError: see `LayerFeatures`, and a number of patches that is no square.
    """

    def __init__(self, tower: nn.Module, pooling: Pooling, size: int):
        self.pooling = pooling
        self.num_tokens, self.dim = _of_an_empty_image(self, tower, size).shape[1:]

    def __call__(self, tower: nn.Module, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) pixels -> (B, N, D) tokens of `tower`, which is that of the constructor or became of it."""
        if (own := getattr(tower, "layer_features", None)) is not None:
            return own(pixel_values)
        layers, _ = _outputs(tower, pixel_values, self.pooling, self._tokens)
        if not layers:
            raise ValueError(f"tokens: the layers of {type(tower).__name__} are not known")
        return layers[-1]

    def _tokens(self, output: Tensor) -> Tensor:
        """(B, N, D) tokens or a map of 4 axes -> (B, N', D), N' at most 49 beside those before the patches."""
        if output.ndim == 4:
            return _grid(output if self.pooling.channels_last else output.movedim(1, -1)).flatten(1, 2)
        first, patches = output.tensor_split([self.pooling.num_prefix_tokens], dim=1)
        if (side := math.isqrt(patches.shape[1])) ** 2 != patches.shape[1]:
            raise ValueError(f"tokens: {patches.shape[1]} patches, which is no square")
        return torch.cat([first, _grid(patches.unflatten(1, (side, side))).flatten(1, 2)], dim=1)


def _grid(places: Tensor) -> Tensor:
    """(B, S, S, D) -> the means over at most 7 x 7 fields of it. Products: pooling has no exact gradient on a GPU."""
    if (side := places.shape[1]) <= SIDE:
        return places
    share = adaptive_avg_pool1d(torch.eye(side, dtype=places.dtype, device=places.device), SIDE)  # of place in field
    return torch.einsum("hi,wj,bhwd->bijd", share, share, places)


def _of_an_empty_image(read: Callable[[nn.Module, Tensor], Any], tower: nn.Module, size: int) -> Any:
    """What is read of one empty image; the tower stays in the mode it is in."""
    like, training = next(tower.parameters()), [module for module in tower.modules() if module.training]
    with torch.no_grad():
        found = read(tower.eval(), torch.zeros(1, 3, size, size, dtype=like.dtype, device=like.device))
    for module in training:
        module.training = True
    return found


def _outputs(
    tower: nn.Module, pixel_values: Tensor, pooling: Pooling, read: Callable[[Tensor], Tensor]
) -> tuple[list[Tensor], Tensor]:
    """What `read` makes of the tokens or the map of each layer, in the order of their calls, and the tower's own
    features.

    Raises:
        ValueError: see `LayerFeatures`.
    """
    found: dict[nn.Module, Tensor] = {}
    counts: set[int] = set()

    def keep(layer: nn.Module, _inputs: Any, output: Any) -> None:
        where = f"features of layers: a {type(layer).__name__} of {type(tower).__name__}"
        if layer in found:
            raise ValueError(f"{where} is called more than once for a picture")
        output, *others = output if isinstance(output, tuple) else (output,)  # hidden states come first
        in_pieces = any(isinstance(other, Tensor) and other.ndim == 4 == output.ndim for other in others)
        whole = isinstance(output, Tensor) and output.shape[0] == pixel_values.shape[0] and not in_pieces
        if not whole or output.ndim not in (2, 3, 4):
            raise ValueError(f"{where} gives neither tokens (B, N, D) nor a map of 4 axes")
        if output.ndim == 3 and pooling.num_prefix_tokens:
            counts.add(output.shape[1])
            if len(counts) > 1:
                raise ValueError(f"{where} has another number of tokens than those before: which is whose?")
        if output.ndim == 4:
            check_map(output, where, pooling.channels_last)
        if output.ndim > 2:  # else it comes after pooling
            found[layer] = read(output)

    with _one_at_a_time:
        hooks = [layer.register_forward_hook(keep) for layer in _called(encoder_layers(tower))]
        try:
            features = tower(pixel_values)
        finally:
            for hook in hooks:
                hook.remove()
    return list(found.values()), features


def _called(layers: list[nn.Module]) -> Iterator[nn.Module]:
    """Layers that can be called: in place of a mere list its parts."""
    for layer in layers:
        if isinstance(layer, nn.ModuleList):
            yield from _called(list(layer))
        else:
            yield layer
