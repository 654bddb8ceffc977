"""StyleGAN2 (Karras et al., CVPR 2020), generator and discriminator, with the names of the public PyTorch checkpoints.

A file that holds `g_ema` in the layout of rosinality/stylegan2-pytorch loads with `load_generator`. Latent codes:

    z  (B, D)       --style-->   w  (B, D)   --the same in every row-->   W+ (B, rows, D)   --styles-->   S, a list

A row of W+ goes through the affine map of its convolution (`modulation`), which gives the scales of that convolution's
input channels: the code in S. `generator(w)` takes W or W+, `generator.styles(w)` gives S, `generator.render(S)` the
pictures.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ordinalclip.weights import check_floats, fault, limited_memory, misfit, read_safetensors, read_weights

BLUR = (1.0, 3.0, 3.0, 1.0)
SIZES = tuple(2**power for power in range(3, 11))  # of pictures, published generators' and those of small ones
LR_MUL = 0.01  # of the mapping network
SLOPE, GAIN = 0.2, math.sqrt(2)
# Rewritten by every model from its size alone, except for the fixed noise, which changes details that no code holds.
ABSENT = (".kernel", "noises.noise_")  # parts of the names of buffers that a file may lack


def check_size(size: int) -> None:
    """Raises: ValueError: a size that is no power of two, or beyond the limits."""
    if not isinstance(size, int) or size not in SIZES:
        raise ValueError(f"size is {size!r}; it must be a power of two from {SIZES[0]} to {SIZES[-1]}")


def num_rows(size: int) -> int:
    """Rows of a W+ code of a generator of `size` x `size` pixels: 8 for 32, 18 for 1024."""
    check_size(size)
    return 2 * int(math.log2(size)) - 2


def num_channels(resolution: int, channel_multiplier: int = 2, channels: int | None = None) -> int:
    """Channels at a resolution: 512 up to 32 px, then half as many at every doubling; never more than `channels`."""
    width = 512 if resolution <= 32 else 16384 // resolution * channel_multiplier
    return width if channels is None else min(width, channels)


def style_layers(levels: int) -> list[tuple[str, int]]:
    """Where each layer of S comes from, in the names of the public PyTorch ports of StyleGAN2.

    A picture layer shares its row of W+ with the first convolution of the next resolution.

    Args:
        levels: number of resolutions above 4 px.

    Returns:
        for each layer the name of the affine module that makes it, and the row of W+ that this module takes.

    >>> style_layers(1)[1:]
    [('to_rgb1.conv.modulation', 1), ('convs.0.conv.modulation', 1), ('convs.1.conv.modulation', 2), \
('to_rgbs.0.conv.modulation', 3)]
    """
    layers = [("conv1", 0), ("to_rgb1", 1)]
    for i in range(levels):
        layers += [(f"convs.{2 * i}", 2 * i + 1), (f"convs.{2 * i + 1}", 2 * i + 2), (f"to_rgbs.{i}", 2 * i + 3)]
    return [(f"{name}.conv.modulation", row) for name, row in layers]


def blur_kernel(gain: float = 1.0) -> Tensor:
    """The 4 x 4 low-pass filter that goes with every change of resolution; its sum is `gain`."""
    taps = torch.tensor(BLUR)
    return torch.outer(taps, taps) * (gain / taps.sum() ** 2)


def resample(x: Tensor, kernel: Tensor, up: int = 1, padding: tuple[int, int] = (0, 0)) -> Tensor:
    """Insert `up` - 1 zeros after every pixel, pad, and filter each channel.

    Args:
        x: (B, C, H, W).
        kernel: (h, w), flipped for the convolution as in signal processing.
        padding: zeros before and after, the same for rows and columns.
    """
    batch, channels, height, width = x.shape
    if up > 1:
        x = F.pad(x[:, :, :, None, :, None], (0, up - 1, 0, 0, 0, up - 1))
        x = x.reshape(batch, channels, height * up, width * up)
    # A grouped convolution: six times as fast on a CPU as one channel at a time in a batch of B x C.
    weight = kernel.flip(0, 1).expand(channels, 1, *kernel.shape)
    return F.conv2d(F.pad(x, (*padding, *padding)), weight, groups=channels)


def scaled_leaky_relu(x: Tensor) -> Tensor:
    """Leaky ReLU times sqrt(2), which keeps the variance of normal numbers."""
    return F.leaky_relu(x, SLOPE) * GAIN


class PixelNorm(nn.Module):
    """x (B, D) -> x over its root mean square."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-8)


class EqualLinear(nn.Module):
    """Linear layer whose weights are N(0, 1) at the start and scaled when used, so that all learn equally fast."""

    def __init__(
        self, in_features: int, out_features: int, bias_init: float = 0.0, lr_mul: float = 1.0, activate: bool = False
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_mul)
        self.bias = nn.Parameter(torch.full((out_features,), float(bias_init)))
        self.scale, self.lr_mul, self.activate = lr_mul / math.sqrt(in_features), lr_mul, activate

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.weight * self.scale, self.bias * self.lr_mul)
        return scaled_leaky_relu(x) if self.activate else x


class EqualConv2d(nn.Module):
    """Convolution without bias, equalised as `EqualLinear`."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.scale = 1 / math.sqrt(in_channels * kernel_size**2)
        self.stride, self.padding = stride, padding

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.scale, stride=self.stride, padding=self.padding)


class BiasedLeakyReLU(nn.Module):
    """sqrt(2) * leaky ReLU of x + bias, a bias per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return scaled_leaky_relu(x + self.bias[:, None, None])


class Resample(nn.Module):
    """`resample` by the low-pass filter, which is a buffer as in the public files."""

    kernel: Tensor

    def __init__(self, up: int = 1, padding: tuple[int, int] = (0, 0), gain: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("kernel", blur_kernel(gain))
        self.up, self.padding = up, padding

    def forward(self, x: Tensor) -> Tensor:
        return resample(x, self.kernel, self.up, self.padding)


class ModulatedConv2d(nn.Module):
    """Convolution whose input channels are scaled by a style, for every picture of a batch by its own.

    The paper scales the weights, W'_oik = s_i W_oik, and divides every output channel by the norm of its scaled
    weights (demodulation). A convolution with weights of its own for every picture is a grouped one, which is slow on
    CPUs; the same comes from one convolution of all, with its input scaled by s and its output by the inverse norms:

        y_o = 1 / sqrt(sum_i s_i^2 sum_k W_oik^2 + 1e-8)  *  sum_i W_oi (conv) (s_i x_i)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        style_dim: int,
        demodulate: bool = True,
        upsample: bool = False,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, out_channels, in_channels, kernel_size, kernel_size))
        self.modulation = EqualLinear(style_dim, in_channels, bias_init=1)
        self.blur = Resample(padding=(1, 1), gain=4) if upsample else None
        self.scale = 1 / math.sqrt(in_channels * kernel_size**2)
        self.padding, self.demodulate = kernel_size // 2, demodulate

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """x (B, Cin, H, W) and style (B, Cin), the output of `modulation` -> (B, Cout, H or 2 H, W or 2 W)."""
        weight = self.weight[0] * self.scale
        x = x * style[:, :, None, None]
        if self.blur is None:
            x = F.conv2d(x, weight, padding=self.padding)
        else:
            x = self.blur(F.conv_transpose2d(x, weight.transpose(0, 1), stride=2))
        if self.demodulate:
            squares = style.square() @ weight.square().sum(dim=(2, 3)).T
            x = x * torch.rsqrt(squares + 1e-8)[:, :, None, None]
        return x


class NoiseInjection(nn.Module):
    """Adds a noise map, the same for all channels, with a learned strength."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, noise: Tensor | None) -> Tensor:
        noise = x.new_empty(len(x), 1, *x.shape[2:]).normal_() if noise is None else noise
        return x + self.weight * noise


class StyledConv(nn.Module):
    """Modulated convolution, noise, bias and leaky ReLU."""

    def __init__(self, in_channels: int, out_channels: int, style_dim: int, upsample: bool = False) -> None:
        super().__init__()
        self.conv = ModulatedConv2d(in_channels, out_channels, 3, style_dim, upsample=upsample)
        self.noise = NoiseInjection()
        self.activate = BiasedLeakyReLU(out_channels)

    def forward(self, x: Tensor, style: Tensor, noise: Tensor | None) -> Tensor:
        return self.activate(self.noise(self.conv(x, style), noise))


class ToRGB(nn.Module):
    """Features -> a picture, added to the enlarged one of the resolution before."""

    def __init__(self, in_channels: int, style_dim: int, upsample: bool = True) -> None:
        super().__init__()
        self.conv = ModulatedConv2d(in_channels, 3, 1, style_dim, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(1, 3, 1, 1))
        self.upsample = Resample(up=2, padding=(2, 1), gain=4) if upsample else None

    def forward(self, x: Tensor, style: Tensor, skip: Tensor | None = None) -> Tensor:
        x = self.conv(x, style) + self.bias
        return x if skip is None or self.upsample is None else x + self.upsample(skip)


class ConstantInput(nn.Module):
    """The learned 4 x 4 features that every picture begins with."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.input = nn.Parameter(torch.randn(1, channels, 4, 4))


class Generator(nn.Module):
    """StyleGAN2's generator: latent codes -> pictures (B, 3, size, size), nominally in [-1, 1] and not clipped.

    Args:
        size: width and height in pixels, a power of two from 8 to 1024.
        style_dim: D, the width of z and w.
        n_mlp: layers of the mapping network.
        channel_multiplier: 2 for the paper's "config F", 1 for half as many channels from 64 px on.
        channels: at most so many at every resolution, for small generators; None for the paper's numbers.

    Raises:
        ValueError: for a size that is no power of two or beyond the limits.
    """

    def __init__(
        self, size: int, style_dim: int = 512, n_mlp: int = 8, channel_multiplier: int = 2, channels: int | None = None
    ) -> None:
        super().__init__()
        self.num_rows = num_rows(size)
        self.size, self.style_dim = size, style_dim
        mapping = [EqualLinear(style_dim, style_dim, lr_mul=LR_MUL, activate=True) for _ in range(n_mlp)]
        self.style = nn.Sequential(PixelNorm(), *mapping)
        width = num_channels(4, channel_multiplier, channels)
        self.input = ConstantInput(width)
        self.conv1 = StyledConv(width, width, style_dim)
        self.to_rgb1 = ToRGB(width, style_dim, upsample=False)
        self.convs, self.to_rgbs, self.noises = nn.ModuleList(), nn.ModuleList(), nn.Module()
        for level in range(3, int(math.log2(size)) + 1):
            before, width = width, num_channels(2**level, channel_multiplier, channels)
            self.convs.append(StyledConv(before, width, style_dim, upsample=True))
            self.convs.append(StyledConv(width, width, style_dim))
            self.to_rgbs.append(ToRGB(width, style_dim))
        for k in range(self.num_rows - 1):
            side = 2 ** ((k + 5) // 2)
            self.noises.register_buffer(f"noise_{k}", torch.randn(1, 1, side, side))

    def modulations(self) -> list[tuple[Any, int]]:
        """The affine maps of the convolutions in the order of S, each with the row of W+ that it reads."""
        return [(self.get_submodule(name), row) for name, row in style_layers(len(self.to_rgbs))]

    def styles(self, codes: Tensor) -> list[Tensor]:
        """The S codes of codes in W (B, D) or W+ (B, rows, D): a tensor (B, channels) for every modulated layer.

        Raises:
            ValueError: for codes of another shape.
        """
        if codes.ndim == 2:
            codes = codes[:, None].expand(-1, self.num_rows, -1)
        if codes.ndim != 3 or codes.shape[1:] != (self.num_rows, self.style_dim):
            raise ValueError(
                f"codes have shape {tuple(codes.shape)}; this generator takes W (B, {self.style_dim}) or "
                f"W+ (B, {self.num_rows}, {self.style_dim})"
            )
        return [modulation(codes[:, row]) for modulation, row in self.modulations()]

    def render(self, styles: Sequence[Tensor], fresh_noise: bool = False) -> Tensor:
        """Pictures (B, 3, size, size) of S codes, as `styles` gives them.

        Args:
            fresh_noise: draw noise for every picture, as in training, not the generator's own, which is fixed.

        Raises:
            ValueError: for another number of layers or of channels in one.
        """
        widths = [len(modulation.bias) for modulation, _ in self.modulations()]
        given = [style.shape[-1] for style in styles]
        if given != widths:
            raise ValueError(f"styles have {given} channels; this generator takes {widths}")
        noises: list[Tensor | None] = list(self.noises.buffers())
        if fresh_noise:
            noises = [None] * len(noises)
        x = self.input.input.expand(len(styles[0]), -1, -1, -1)
        x = self.conv1(x, styles[0], noises[0])
        picture = self.to_rgb1(x, styles[1])
        for i, to_rgb in enumerate(self.to_rgbs):
            x = self.convs[2 * i](x, styles[3 * i + 2], noises[2 * i + 1])
            x = self.convs[2 * i + 1](x, styles[3 * i + 3], noises[2 * i + 2])
            picture = to_rgb(x, styles[3 * i + 4], picture)
        return picture

    def forward(self, codes: Tensor, fresh_noise: bool = False) -> Tensor:
        """Pictures (B, 3, size, size) of codes in W (B, D) or W+ (B, rows, D)."""
        return self.render(self.styles(codes), fresh_noise)

    @torch.no_grad()
    def mean_code(self, num_samples: int = 4096, seed: int = 0) -> Tensor:
        """The mean (D,) of mapped z: the centre that truncation, and an encoder's codes, are relative to."""
        z = torch.randn(num_samples, self.style_dim, generator=torch.Generator().manual_seed(seed))
        return self.style(z.to(self.input.input)).mean(dim=0)


class ConvLayer(nn.Sequential):
    """Blur where the resolution is halved, equalised convolution, bias and leaky ReLU where wanted."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, downsample: bool = False, activate: bool = True
    ) -> None:
        layers: list[nn.Module] = []
        if downsample:
            layers.append(Resample(padding=(2, 2) if kernel_size == 3 else (1, 1)))
        padding = 0 if downsample else kernel_size // 2
        layers.append(EqualConv2d(in_channels, out_channels, kernel_size, 2 if downsample else 1, padding))
        if activate:
            layers.append(BiasedLeakyReLU(out_channels))
        super().__init__(*layers)


class ResidualBlock(nn.Module):
    """Two convolutions of which the second halves the resolution, and a linear skip connection."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = ConvLayer(in_channels, in_channels, 3)
        self.conv2 = ConvLayer(in_channels, out_channels, 3, downsample=True)
        self.skip = ConvLayer(in_channels, out_channels, 1, downsample=True, activate=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv2(self.conv1(x)) + self.skip(x)) / GAIN


class Discriminator(nn.Module):
    """StyleGAN2's discriminator: pictures (B, 3, size, size) -> logits (B, 1), large for real ones.

    Args: as of `Generator`. The batch is a multiple of min(B, 4), over which one feature map compares pictures.
    """

    GROUP = 4

    def __init__(self, size: int, channel_multiplier: int = 2, channels: int | None = None) -> None:
        super().__init__()
        check_size(size)
        width = num_channels(size, channel_multiplier, channels)
        blocks: list[nn.Module] = [ConvLayer(3, width, 1)]
        for level in range(int(math.log2(size)), 2, -1):
            before, width = width, num_channels(2 ** (level - 1), channel_multiplier, channels)
            blocks.append(ResidualBlock(before, width))
        self.convs = nn.Sequential(*blocks)
        self.final_conv = ConvLayer(width + 1, width, 3)
        self.final_linear = nn.Sequential(EqualLinear(width * 16, width, activate=True), EqualLinear(width, 1))

    def forward(self, pictures: Tensor) -> Tensor:
        x = self.convs(pictures)
        x = self.final_conv(torch.cat([x, self.spread(x)], dim=1))
        return self.final_linear(x.flatten(1))

    def spread(self, x: Tensor) -> Tensor:
        """How much pictures of a group differ (B, 1, H, W): standard deviation within it, mean over all features.

        Raises:
            ValueError: for a batch that does not divide into groups.
        """
        batch, _, height, width = x.shape
        group = min(batch, self.GROUP)
        if batch % group:
            raise ValueError(f"a batch of {batch} pictures does not divide into groups of {group}")
        # Pictures i, i + B/4, ... are a group, as in the public code: (group, B/4, C, H, W).
        deviation = (x.reshape(group, -1, *x.shape[1:]).var(dim=0, unbiased=False) + 1e-8).sqrt().mean(dim=(1, 2, 3))
        return deviation.repeat(group)[:, None, None, None].expand(-1, 1, height, width)


def load_generator(file: str | Path) -> tuple[Generator, Tensor]:
    """Read a generator and its mean code (D,) from a checkpoint in the public layout.

    Taken are `g_ema` (files of rosinality/stylegan2-pytorch) or the keys `decoder.` of `state_dict` (files of pSp and
    e4e); sizes are found from the shapes. Filters and fixed noise may be absent (`ABSENT`); the model's own, which are
    drawn from seed 0, stand in. Everything else must fit name by name. A missing `latent_avg` is computed.

    Raises:
        FileNotFoundError: no such file; ValueError: a damaged file, or a key that is missing, foreign or of the wrong
            shape, by its name.
    """
    content = read_checkpoint(file)
    generator = generator_of(file, content)
    if content.get("latent_avg") is None:
        return generator, generator.mean_code()
    rows = mean_of(file, content, generator.num_rows, generator.style_dim)
    if not torch.equal(rows, rows[:1].expand_as(rows)):
        raise ValueError(f"{file}: the rows of latent_avg differ; a mean of W has the same in all")
    return generator, rows[0].clone()


def read_checkpoint(file: str | Path) -> dict[str, Any]:
    """The content of a PyTorch checkpoint, or of a safetensors file that has the keys of its `state_dict`, `latent_avg`
    and, as metadata, its `opts`.

    Raises:
        FileNotFoundError: no such file; ValueError: a damaged file, or more in it than data.
    """
    if Path(file).suffix != ".safetensors":
        return read_weights(file)
    tensors, options = read_safetensors(file)
    mean = tensors.pop("latent_avg", None)
    return {"state_dict": tensors, "opts": options, "latent_avg": mean}


def generator_of(file: str | Path, content: Mapping[str, Any]) -> Generator:
    """The generator alone: see `load_generator`; `content` is that of the file."""
    if "g_ema" in content:
        state = tensors_of(file, content, "g_ema")
    elif "state_dict" in content:
        state = part_of(tensors_of(file, content, "state_dict"), "decoder.")
    else:
        raise ValueError(f"{file}: holds {_listed(content)}; a generator is in g_ema, or in state_dict as decoder.*")
    with torch.random.fork_rng(devices=[]), limited(file, state):
        torch.manual_seed(0)
        generator = _fitting(file, state)
    fill(file, generator, state, absent=ABSENT)
    return generator


def _fitting(file: str | Path, state: Mapping[str, Tensor]) -> Generator:
    """A generator of the sizes of a state dict."""
    for name, ndim in {"style.1.weight": 2, "conv1.conv.weight": 5, "to_rgb1.conv.weight": 5}.items():
        if name not in state or state[name].ndim != ndim:
            raise ValueError(f"{file}: {name} is missing, or has not {ndim} dimensions: no generator of StyleGAN2")
    levels = len({name.split(".")[1] for name in state if name.startswith("to_rgbs.")})
    n_mlp = len({name.split(".")[1] for name in state if name.startswith("style.")})
    size, cap = 2 ** (levels + 2), state["conv1.conv.weight"].shape[1]
    last = state.get(f"convs.{2 * levels - 1}.conv.weight")
    if size not in SIZES or last is None or last.ndim != 5:
        raise ValueError(f"{file}: to_rgbs and convs are not those of a generator of {SIZES[0]} to {SIZES[-1]} px")
    # Above 32 px there are 16384 / size times the multiplier, unless that is more than the cap.
    multiplier = max(1, math.ceil(last.shape[1] * size / 16384)) if size > 32 else 2
    return Generator(size, state["style.1.weight"].shape[1], n_mlp, multiplier, cap)


def limited(file: str | Path, state: Mapping[str, Tensor]) -> AbstractContextManager[None]:
    """Within it, a model that is built of a file's shapes may not take much more memory than the file's tensors do."""
    held = sum(4 * tensor.numel() for tensor in state.values())
    return limited_memory(4 * held + 2**26, f"{file}: a model of these shapes")


def part_of(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def fill(file: str | Path, module: nn.Module, state: Mapping[str, Tensor], absent: Sequence[str] = ()) -> None:
    """Load a state dict strictly.

    Args:
        absent: tensors with one of these in their names may be missing, and stay as the module has them.

    Raises:
        ValueError: a tensor that is missing, foreign, quantised, not finite or of the wrong shape, by file and name.
    """
    own = module.state_dict()
    kept = {name: own[name] for name in own if name not in state and any(part in name for part in absent)}
    whole = {**state, **kept}
    check_floats(file, state)
    if bad := fault(state) or misfit(own, whole):
        raise ValueError(f"{file}: {bad}")
    for name, tensor in own.items():
        if whole[name].shape != tensor.shape:
            shapes = f"{tuple(whole[name].shape)}, the model's {tuple(tensor.shape)}"
            raise ValueError(f"{file}: {name} has shape {shapes}")
    module.load_state_dict(whole)


def tensors_of(file: str | Path, content: Mapping[str, Any], key: str) -> dict[str, Tensor]:
    """Raises:
    ValueError: there is no dictionary of tensors under that key."""
    state = content.get(key)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{file}: {key} is not a dictionary of tensors")
    return state


def mean_of(file: str | Path, content: Mapping[str, Any], rows: int, style_dim: int) -> Tensor:
    """The tensor `latent_avg` as (rows, D) or (1, D), float32.

    Raises:
        ValueError: none, one of another shape, or of numbers that are no weights.
    """
    mean = content.get("latent_avg")
    if not isinstance(mean, Tensor) or mean.shape not in ((style_dim,), (1, style_dim), (rows, style_dim)):
        raise ValueError(f"{file}: latent_avg is no tensor of {style_dim} numbers, or of {rows} x {style_dim}")
    check_floats(file, {"latent_avg": mean})
    if bad := fault({"latent_avg": mean}):
        raise ValueError(f"{file}: {bad}")
    return mean.float().reshape(-1, style_dim)


def _listed(names: Iterable[Any]) -> str:
    shown = sorted(map(str, names))
    return ", ".join(shown[:5]) + (", ..." if len(shown) > 5 else "") if shown else "nothing"
