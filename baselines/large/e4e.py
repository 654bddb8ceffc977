"""The encoders e4e (Tov et al., SIGGRAPH 2021) and pSp (Richardson et al., CVPR 2021): pictures -> codes in W+.

Both are a residual network with squeeze and excitation (IR-SE-50), a feature pyramid of three levels on it, and a
small convolutional head for every row of W+; the names are those of the public checkpoints, which `load_encoder` reads.
pSp's heads give the rows themselves. e4e's first head gives one code for all rows, the others what is added to theirs:
that keeps rows near each other, where the generator's editing directions hold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.large.stylegan2 import (
    EqualLinear,
    Generator,
    fill,
    generator_of,
    limited,
    mean_of,
    num_rows,
    part_of,
    read_checkpoint,
    tensors_of,
)

UNITS, WIDTHS = (3, 4, 14, 3), (64, 128, 256, 512)  # of IR-SE-50
COARSE, MIDDLE = 3, 7  # rows below the first read the coarsest level of the pyramid, rows from the second on the finest
TYPES = {"Encoder4Editing": True, "GradualStyleEncoder": False}  # whether rows are differences from the first


class SqueezeExcitation(nn.Module):
    """Scales channels by what a bottleneck sees in their means."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, max(1, channels // reduction), 1, bias=False)
        self.fc2 = nn.Conv2d(max(1, channels // reduction), channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(self.fc1(x.mean(dim=(2, 3), keepdim=True)).relu()).sigmoid()


class Unit(nn.Module):
    """Residual unit; the first of a stage halves the resolution."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.shortcut_layer: nn.Module
        if in_channels == out_channels:
            self.shortcut_layer = nn.MaxPool2d(1, stride)
        else:
            self.shortcut_layer = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(in_channels),
            nn.Conv2d(in_channels, out_channels, 3, 1, 1, bias=False),
            nn.PReLU(out_channels),
            nn.Conv2d(out_channels, out_channels, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out_channels),
            SqueezeExcitation(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.res_layer(x) + self.shortcut_layer(x)


class StyleHead(nn.Module):
    """Convolutions that halve a square of features until one vector is left, and a linear map."""

    def __init__(self, channels: int, out_features: int, num_convs: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(num_convs):
            layers += [nn.Conv2d(channels if i == 0 else out_features, out_features, 3, 2, 1), nn.LeakyReLU()]
        self.convs = nn.Sequential(*layers)
        self.linear = EqualLinear(out_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.convs(x).flatten(1))


class Encoder(nn.Module):
    """Pictures (B, 3, input_size, input_size) in [-1, 1] -> codes (B, rows, D) in W+, relative to the mean code.

    Args:
        size: of the generator's pictures, which says how many rows there are.
        style_dim: D.
        input_size: of the pictures that are encoded, 32 or more; the public encoders take 256 px whatever `size` is.
        units: residual units in each of the four stages.
        widths: their channels, in each stage other ones.
        differences: rows are the first row plus what their heads give, as in e4e; else pSp's, each by itself.

    Raises:
        ValueError: for sizes that are no powers of two or beyond the limits.
    """

    def __init__(
        self,
        size: int,
        style_dim: int = 512,
        input_size: int = 256,
        units: Sequence[int] = UNITS,
        widths: Sequence[int] = WIDTHS,
        differences: bool = True,
    ) -> None:
        super().__init__()
        rows = num_rows(size)
        if any(a == b for a, b in pairwise(widths)):  # a file would not say where one stage ends
            raise ValueError(f"widths are {tuple(widths)}; neighbouring stages must have different numbers of channels")
        if input_size < 32 or input_size & (input_size - 1):
            raise ValueError(f"input_size is {input_size!r}; it must be a power of two from 32 on")
        self.num_rows, self.style_dim = rows, style_dim
        self.options: dict[str, Any] = {  # JSON data: what builds such an encoder
            "size": size,
            "style_dim": style_dim,
            "input_size": input_size,
            "units": list(units),
            "widths": list(widths),
            "differences": differences,
        }
        self.input_size, self.differences = input_size, differences
        self.input_layer = nn.Sequential(
            nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.PReLU(widths[0])
        )
        body: list[nn.Module] = []
        before = widths[0]
        for number, width in zip(units, widths, strict=True):
            for i in range(number):
                body.append(Unit(before, width, stride=1 if i else 2))
                before = width
        self.body = nn.Sequential(*body)
        self.taps = (sum(units[:2]) - 1, sum(units[:3]) - 1, sum(units) - 1)  # last units of three stages
        halvings = int(math.log2(input_size)) - 4  # of the coarsest level until one vector is left
        self.styles = nn.ModuleList(
            StyleHead(widths[3], style_dim, halvings + (i >= COARSE) + (i >= MIDDLE)) for i in range(rows)
        )
        self.latlayer1 = nn.Conv2d(widths[2], widths[3], 1)
        self.latlayer2 = nn.Conv2d(widths[1], widths[3], 1)

    def forward(self, pictures: Tensor) -> Tensor:
        if pictures.shape[1:] != (3, self.input_size, self.input_size):
            given, side = tuple(pictures.shape), self.input_size
            raise ValueError(f"pictures have shape {given}; this encoder takes (B, 3, {side}, {side})")
        x, levels = self.input_layer(pictures), []
        for i, unit in enumerate(self.body):
            x = unit(x)
            if i in self.taps:
                levels.append(x)
        fine, middle, coarse = levels
        middle = _enlarged(coarse) + self.latlayer1(middle)
        fine = _enlarged(middle) + self.latlayer2(fine)
        rows = [head(coarse if i < COARSE else middle if i < MIDDLE else fine) for i, head in enumerate(self.styles)]
        if self.differences:
            rows = rows[:1] + [rows[0] + row for row in rows[1:]]
        return torch.stack(rows, dim=1)


def _enlarged(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)


def load_encoder(file: str | Path) -> tuple[Encoder, Tensor]:
    """Read an encoder of the public layout, in evaluation mode, and the code (rows, D) that its codes are relative to.

    Taken are the keys `encoder.` of `state_dict`; the sizes are found from the shapes, and whether it is e4e's or pSp's
    from `opts`. Every tensor must fit name by name. W+ codes are `encoder(pictures) + offset`; the offset is
    `latent_avg`, or 0 where `opts` say that training did not start from it.

    Raises:
        FileNotFoundError: no such file; ValueError: a damaged file, another type of encoder, or a key that is missing,
            foreign or of the wrong shape, by its name.
    """
    return _encoder_of(file, read_checkpoint(file))


def load_pair(file: str | Path) -> tuple[Encoder, Tensor, Generator | None]:
    """Read an encoder and its offset as `load_encoder` does, and from the same file its generator, if that is there.

    Raises:
        FileNotFoundError, ValueError: see there and `load_generator`; or the encoder of another generator.
    """
    content = read_checkpoint(file)
    encoder, offset = _encoder_of(file, content)
    if not part_of(content["state_dict"], "decoder."):
        return encoder, offset, None
    generator = generator_of(file, content)
    given, taken = (encoder.num_rows, encoder.style_dim), (generator.num_rows, generator.style_dim)
    if given != taken:
        raise ValueError(
            f"{file}: the encoder gives codes of {given[0]} rows of {given[1]}, the generator in the same file takes "
            f"{taken[0]} of {taken[1]}: it is the encoder of another generator"
        )
    return encoder, offset, generator


def _encoder_of(file: str | Path, content: Mapping[str, Any]) -> tuple[Encoder, Tensor]:
    given, options = tensors_of(file, content, "state_dict"), content.get("opts")
    if not isinstance(options, dict) or options.get("encoder_type") not in TYPES:
        kind = options.get("encoder_type") if isinstance(options, dict) else None
        raise ValueError(f"{file}: encoder_type in opts is {kind!r}; choose from {', '.join(TYPES)}")
    state = part_of(given, "encoder.")
    with limited(file, state):
        encoder = _fitting(file, state, differences=TYPES[options["encoder_type"]])
    fill(file, encoder, state)
    rows, style_dim = encoder.num_rows, encoder.style_dim
    offset = torch.zeros(rows, style_dim)
    if options.get("start_from_latent_avg", True):
        offset = offset + mean_of(file, content, rows, style_dim)
    return encoder.eval(), offset


def _fitting(file: str | Path, state: dict[str, Tensor], differences: bool) -> Encoder:
    """An encoder of the sizes of a state dict."""
    first = "input_layer.0.weight"
    needed = {first: 4, "styles.0.linear.weight": 2, "styles.0.convs.0.weight": 4}
    for name, ndim in needed.items():
        if name not in state or state[name].ndim != ndim:
            raise ValueError(f"{file}: encoder.{name} is missing, or has not {ndim} dimensions: no encoder to W+")
    rows = len({name.split(".")[1] for name in state if name.startswith("styles.")})
    halvings = sum(name.startswith("styles.0.convs.") and name.endswith("weight") for name in state)
    widths: list[int] = []
    units: list[int] = []
    for i in range(len({name.split(".")[1] for name in state if name.startswith("body.")})):
        weight = state.get(f"body.{i}.res_layer.1.weight")
        if weight is None or weight.ndim != 4:
            raise ValueError(f"{file}: encoder.body.{i}.res_layer.1.weight is missing, or has not 4 dimensions")
        if widths and widths[-1] == weight.shape[0]:
            units[-1] += 1
        else:
            widths.append(weight.shape[0])
            units.append(1)
    if rows % 2 or len(widths) != 4 or not 1 <= halvings <= 8:
        raise ValueError(f"{file}: {rows} styles on stages of {widths} channels are not those of an encoder to W+")
    size, style_dim = 2 ** (rows // 2 + 1), state["styles.0.linear.weight"].shape[0]
    return Encoder(size, style_dim, 2 ** (halvings + 4), units, widths, differences)
