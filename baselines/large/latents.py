"""Codes of a StyleGAN2 generator: the spaces Z, W, W+ and S, conversions between them, and files of codes.

A code is (L, D): a row for every layer. Spaces of one vector, Z and W, have one row; in S the layers differ in width,
and narrower ones are filled up with zeros, which no distance notices.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from baselines.large.inputs import numbers
from baselines.large.stylegan2 import SIZES, num_channels, num_rows, style_layers
from ordinalclip.weights import FLOATS, read_safetensors

Space = Literal["z", "w", "w+", "s"]


@dataclass(frozen=True)
class Layout:
    """What a code consists of.

    Attributes:
        space: z (before the mapping network), w (after it), w+ (a vector for every layer that takes a style) or s
            (what the layers make of their style: a factor for every input channel of every convolution).
        widths: (L,) number of channels of each layer.

    Raises:
        ValueError: an unknown space, no layers or empty ones, layers of different width outside of s, or several in
            z and w.
    """

    space: Space
    widths: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.space not in get_args(Space):
            raise ValueError(f"latent space {self.space!r} is unknown; choices: {', '.join(get_args(Space))}")
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"widths must be one or more numbers above 0, got {self.widths}")
        if self.space != "s" and len(set(self.widths)) > 1:
            raise ValueError(f"the layers of {self.space} have the same width, got {self.widths}")
        if self.space in ("z", "w") and len(self.widths) > 1:
            raise ValueError(f"codes of {self.space} have one layer, got {len(self.widths)}")

    @property
    def shape(self) -> tuple[int, int]:
        """(L, D) of one code; D is the width of the widest layer."""
        return len(self.widths), max(self.widths)

    @property
    def total(self) -> int:
        """Number of channels of all layers."""
        return sum(self.widths)

    def channels(self) -> Tensor:
        """(L, D) bool: which entries are channels, and not zeros beside a narrow layer."""
        return torch.arange(max(self.widths)) < torch.tensor(self.widths)[:, None]

    def flatten(self, codes: ArrayLike | Tensor) -> Tensor:
        """Codes (N, L, D) as rows of channels, layer after layer: (N, total)."""
        codes = self.check(codes)
        return codes[:, self.channels().to(codes.device)]

    def unflatten(self, rows: ArrayLike | Tensor) -> Tensor:
        """(N, total) -> (N, L, D).

        Raises:
            ValueError: rows of another length.
        """
        rows = numbers(rows, "codes", "N total")
        if rows.shape[1] != self.total:
            raise ValueError(f"codes of {self} have {self.total} numbers, got {rows.shape[1]}")
        codes = rows.new_zeros(len(rows), *self.shape)
        codes[:, self.channels().to(rows.device)] = rows
        return codes

    def check(self, codes: ArrayLike | Tensor) -> Tensor:
        """Codes as they are, as a tensor (N, L, D).

        Raises:
            ValueError: codes of another space or number of layers, numbers that are not finite, or others than 0
                beside a narrow layer.
        """
        codes = numbers(codes, "codes", "N L D")
        if tuple(codes.shape[1:]) != self.shape:
            layers, width = codes.shape[1:]
            meant = _meant(layers)
            raise ValueError(
                f"codes must be of {self}, {_layers_of(*self.shape)}; got {_layers_of(layers, width)}"
                + (f", as many as {meant} has" if meant and layers != len(self.widths) else "")
            )
        if codes[:, ~self.channels().to(codes.device)].any():
            raise ValueError(f"codes of {self} must be 0 beyond the width of a layer: {self.widths}")
        return codes

    def __str__(self) -> str:
        return self.space.upper()


def layout(
    space: Space, size: int = 1024, style_dim: int = 512, channel_multiplier: int = 2, channels: int | None = None
) -> Layout:
    """The codes of a StyleGAN2 generator of pictures of `size` pixels.

    W+ has n = 2 log2(size) - 2 layers. S has 3 (log2(size) - 2) + 2, in the order of the layers in the network, the
    one to RGB last in every resolution, as in the authors' code.

    Args:
        size: a power of two from 8 to 1024.
        style_dim: width of z and w.
        channel_multiplier: of the channels from 64 px on; 2 in config-f.
        channels: at most so many in every layer of s, as of small generators.

    Raises:
        ValueError: another size or an unknown space.

    >>> [len(layout("w+", size).widths) for size in (256, 512, 1024)]
    [14, 16, 18]
    >>> s = layout("s", 1024)
    >>> len(s.widths), s.total, s.widths[-6:]
    (26, 9088, (128, 64, 64, 64, 32, 32))
    """
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(map(str, SIZES))}, got {size}")
    if space != "s":
        return Layout(space, (style_dim,) * (num_rows(size) if space == "w+" else 1))
    sides = [4, *(side for side in SIZES if side <= size)]
    outputs = [num_channels(side, channel_multiplier, channels) for side in sides]
    widths = [outputs[0], outputs[0]]
    for below, own in itertools.pairwise(outputs):
        widths += [below, own, own]  # of the convolution that upsamples, the next, and the one to RGB
    return Layout("s", tuple(widths))


def convert(codes: ArrayLike | Tensor, source: Layout, target: Layout, generator: nn.Module | None = None) -> Tensor:
    """Codes of one space in another, which comes later in z -> w -> w+ -> s, or from w+ back to w.

    z -> w is the mapping network, w -> w+ repeats the vector, w+ -> s applies each layer's own affine map to its row.
    Back to w come codes of w+ whose rows are equal, or change once from one vector to another, as truncation of the
    first layers makes them; then the first row is taken, as in the authors' code. Whoever has truncated codes truncates
    before: nothing is truncated here.

    Args:
        codes: (N, L, D) of the layout `source`.
        generator: for z and s: has the modules `style` and `style_layers`, as
            `baselines.large.stylegan2.Generator` has.

    Returns:
        (N, L', D') of the layout `target`.

    Raises:
        ValueError: codes of another layout, a way that does not exist or needs a generator, another generator than
            the layout's, or codes of w+ that are no w.

    >>> convert([[[1.0, 2.0]]], Layout("w", (2,)), Layout("w+", (2, 2, 2))).tolist()
    [[[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]]]
    """
    points = source.check(codes)
    if source == target:
        return points
    order = get_args(Space)
    back = (source.space, target.space) == ("w+", "w")
    if not back and order.index(source.space) >= order.index(target.space):
        raise ValueError(f"codes of {_said(source)} cannot be converted to {_said(target)}")
    if generator is None and (source.space == "z" or target.space == "s"):
        raise ValueError(f"{source} -> {target} goes through the generator: pass generator=")
    if generator is not None and (own := next(generator.parameters(), None)) is not None:
        points = points.to(own)
    if source.space == "z":
        points = _module(generator, "style")(points[:, 0])[:, None]
    elif back:
        points = _without_layers(points)
    if target.space == "w+":
        points = points.expand(-1, len(target.widths), -1).contiguous()
    elif target.space == "s":
        points = _to_styles(points, target, generator)
    return target.check(points)


def read_codes(file: str | Path, layout: Layout) -> Tensor:
    """Codes from a .npy or .safetensors file; nothing in it is run.

    What a file holds does not say of which space it is (fourteen codes of W are as large as one of W+ at 256 px), so
    the layout is asked for.

    Args:
        file: one code or N, with the channels of all layers in one row ((total,), (N, total)) or, but for s, in rows
            ((L, D), (N, L, D)). A safetensors file holds this under one name, or each layer, (D_l,) or (N, D_l), under
            a name of its own, S0, S1, ...

    Returns:
        (N, L, D), float32 or float64.

    Raises:
        FileNotFoundError: no such file. ValueError: another kind of file (pickles run what is in them and are not
            read), a damaged one, codes of another layout, or numbers that are not finite.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file of codes")
    if file.suffix == ".npy":
        held = _read_npy(file)
    elif file.suffix == ".safetensors":
        held = _read_safetensors(file, layout)
    else:
        raise ValueError(
            f"{file}: codes are read from .npy and .safetensors files; pickles (.pkl, .pt) run what is in them: load "
            "what you trust yourself, and write it with numpy.save"
        )
    given = tuple(held.shape)
    shapes = [(layout.total,), ("N", layout.total)]
    if len(set(layout.widths)) == 1:
        shapes += [layout.shape, ("N", *layout.shape)]
    if not any(given == shape or (shape[0] == "N" and given[1:] == shape[1:]) for shape in shapes):
        raise ValueError(
            f"{file}: holds shape {given}; codes of {_said(layout)} are "
            + " or ".join(f"({', '.join(map(str, shape))}{',' * (len(shape) == 1)})" for shape in shapes)
        )
    held = held.reshape(-1, layout.total)
    try:
        return layout.unflatten(held)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _layers_of(layers: int, width: int) -> str:
    return f"1 layer of {width}" if layers == 1 else f"{layers} layers of up to {width}"


def _said(layout: Layout) -> str:
    return f"{layout} ({_layers_of(*layout.shape)})"


def _meant(layers: int) -> str:
    """Which spaces have so many layers, in words."""
    if layers == 1:
        return "W or Z"
    of_all = [(size, layout(space, size)) for size in SIZES for space in ("w+", "s")]
    return " or ".join(f"{codes} at {size} px" for size, codes in of_all if len(codes.widths) == layers)


def _module(generator: nn.Module | None, name: str) -> nn.Module:
    assert generator is not None
    try:
        return generator.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"the generator has no module {name!r}, by which codes are converted") from error


def _without_layers(codes: Tensor) -> Tensor:
    switches = (codes[:, 1:] != codes[:, :-1]).any(dim=2).sum(dim=1)
    if (switches > 1).any():
        row = int((switches > 1).nonzero()[0])
        raise ValueError(
            f"code {row} of W+ changes {int(switches[row])} times from layer to layer: it is no vector of W, whose "
            "layers are equal, or equal up to one and from there on"
        )
    return codes[:, :1]


def _to_styles(codes: Tensor, target: Layout, generator: nn.Module | None) -> Tensor:
    """(N, 1 or n, D) -> (N, L, D')."""
    levels, beyond = divmod(len(target.widths) - 2, 3)
    rows = 2 * levels + 2
    if beyond or levels < 1:
        raise ValueError(f"S has 5, 8, 11, ... layers, got {len(target.widths)}")
    if codes.shape[1] not in (1, rows):
        raise ValueError(f"S of {len(target.widths)} layers comes from W+ of {rows} layers, got {codes.shape[1]}")
    codes = codes.expand(-1, rows, -1)
    styles = [_module(generator, name)(codes[:, row]) for name, row in style_layers(levels)]
    widths = tuple(style.shape[1] for style in styles)
    if widths != target.widths:
        raise ValueError(f"the generator's layers have widths {widths}, those of the layout are {target.widths}")
    return target.unflatten(torch.cat(styles, dim=1))


def _read_npy(file: Path) -> Tensor:
    try:
        # Mapped, so that a header that claims more than the file holds is refused before memory is taken.
        array: Any = np.load(file, allow_pickle=False, mmap_mode="r")
    except Exception as error:  # readers of damaged files raise whatever they like
        raise ValueError(f"{file}: damaged or no .npy file of numbers ({error})") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        kind = array.dtype if isinstance(array, np.ndarray) else "an archive"
        raise ValueError(f"{file}: holds {kind}, not an array of floating-point numbers")
    return torch.from_numpy(np.array(array, dtype="f8" if array.dtype.itemsize > 4 else "f4"))


def _read_safetensors(file: Path, layout: Layout) -> Tensor:
    tensors, _ = read_safetensors(file)
    layers = [f"S{number}" for number in range(len(layout.widths))]
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"{file}: {name} holds {dtype}, not an array of floating-point numbers")
    if set(tensors) == set(layers):
        found = [tuple(tensors[name].shape) for name in layers]
        if any(shape != (*found[0][:-1], width) for shape, width in zip(found, layout.widths, strict=True)):
            raise ValueError(
                f"{file}: {', '.join(layers)} have shapes {found}; of {layout} they have widths {layout.widths}"
            )
        return torch.cat([tensors[name].float() for name in layers], dim=-1)
    if len(tensors) != 1:
        raise ValueError(
            f"{file}: holds {len(tensors)} tensors; codes are one tensor, or a layer each, S0 to {layers[-1]}"
        )
    return next(iter(tensors.values()))
