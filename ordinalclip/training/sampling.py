"""Which sample is seen when, and in which view: pure functions of (seed, position), whatever the machine.

The samples form an endless stream of epoch permutations. Batch k is positions [k B, (k + 1) B) of that stream, so
there is no partial batch, small sets work, and resuming needs one integer.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ordinalclip.data import Part
from ordinalclip.images import Augmentation, PixelSpec, crop, normalise
from ordinalclip.training.imbalance import balanced_order

ORDER, VIEW, NOISE, FIXED = range(4)  # what a generator is for, so that equal numbers in other roles never coincide


class Stream:
    """The endless stream of sample indices: a pure function of (seed, epoch), position by position.

    Args:
        num_samples: N, the length of an epoch.
        seed: of the experiment.
        ranks: (N,) ranks, for epochs in which every rank comes equally often; None: every sample once an epoch.
        views: how many positions in a row hold the same sample.

    >>> stream = Stream(4, seed=7)
    >>> sorted(stream.at(position) for position in range(4, 8))
    [0, 1, 2, 3]
    """

    def __init__(self, num_samples: int, seed: int, ranks: np.ndarray | None = None, views: int = 1):
        self.num_samples, self.seed, self.ranks, self.views = num_samples, seed, ranks, views
        self.orders: dict[int, np.ndarray] = {}

    def order(self, epoch: int) -> np.ndarray:
        """The samples of an epoch, (N,) int64."""
        if epoch not in self.orders:
            rng = np.random.default_rng([self.seed, ORDER, epoch])
            order = rng.permutation(self.num_samples) if self.ranks is None else balanced_order(self.ranks, rng)
            self.orders = {**{old: self.orders[old] for old in self.orders if old == epoch - 1}, epoch: order}
        return self.orders[epoch]

    def at(self, position: int) -> int:
        """Index of the sample at a position."""
        epoch, offset = divmod(position // self.views, self.num_samples)
        return int(self.order(epoch)[offset])

    def visit(self, position: int) -> int:
        """How often the sample at a position has come before, where every sample comes once an epoch."""
        return position // self.views // self.num_samples * self.views + position % self.views


def shares(batch_size: int, num_processes: int) -> list[int]:
    """How many samples of the global batch each process takes: as equal as can be, the first ones one more.

    >>> shares(32, 3)
    [11, 11, 10]
    """
    return [batch_size // num_processes + (rank < batch_size % num_processes) for rank in range(num_processes)]


class StreamSampler:
    """The positions of one process's share of every batch, from a given step on."""

    def __init__(self, batch_size: int, first_step: int, last_step: int, rank: int = 0, num_processes: int = 1):
        sizes = shares(batch_size, num_processes)
        self.batch_size, self.first_step, self.last_step = batch_size, first_step, last_step
        self.start, self.size = sum(sizes[:rank]), sizes[rank]

    def __len__(self) -> int:
        return max(0, self.last_step - self.first_step)

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first_step, self.last_step):
            begin = step * self.batch_size + self.start
            yield list(range(begin, begin + self.size))


class ViewDataset(Dataset):
    """The pixels of a part's images, by row, all in the same view.

    Args:
        view: None: as it is evaluated; else number of an augmented view, a function of the picture's bytes alone.
    """

    def __init__(self, part: Part, spec: PixelSpec, augmentation: Augmentation, view: int | None = None):
        self.part, self.spec, self.augmentation, self.view = part, spec, augmentation, view

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: int) -> Tensor:
        if self.view is None:
            return normalise(crop(self.part.resized(index, self.spec), self.spec.size), self.spec)
        digest = np.frombuffer(self.part.digest(index), np.uint32).tolist()
        return augmented(self.part, index, self.spec, self.augmentation, [FIXED, self.view, *digest])


def augmented(part: Part, index: int, spec: PixelSpec, augmentation: Augmentation, seed: list[int]) -> Tensor:
    """A picture of a part, augmented as a seed says: (3, size, size)."""
    image = part.resized(index, spec, augmentation.input_size(spec))
    return augmentation(image, spec, np.random.default_rng(seed))


class StreamDataset(Dataset):
    """Training samples by position in the stream: (pixels, position); labels are looked up where they are needed.

    Args:
        views: number of fixed views of every picture, see `data.views`; None: a new one every time.
    """

    def __init__(
        self, part: Part, spec: PixelSpec, augmentation: Augmentation, stream: Stream, views: int | None = None
    ):
        self.part, self.spec, self.augmentation, self.stream = part, spec, augmentation, stream
        numbers = [None] if views == 1 else range(views or 0)
        self.views = [ViewDataset(part, spec, augmentation, number) for number in numbers]

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        index = self.stream.at(position)
        if self.views:
            return self.views[self.stream.visit(position) % len(self.views)][index], position
        seed = [self.stream.seed, VIEW, position]
        return augmented(self.part, index, self.spec, self.augmentation, seed), position


class SampleNoise(nn.Module):
    """Dropout or drop-path whose mask is a function of (seed, position in the stream, layer).

    Stock dropout draws from the global random state, so that a batch of 32 and 4 batches of 8 differ; here every
    sample takes its mask along, into any micro-batch on any process.

    Args:
        probability: share of elements (dropout) or of samples (drop-path) set to zero; the rest is scaled up.
        layer: number of the layer.
        whole_sample: drop-path.
    """

    def __init__(self, probability: float, layer: int, seed: int, whole_sample: bool):
        super().__init__()
        self.p, self.layer, self.seed, self.whole_sample = probability, layer, seed, whole_sample
        self.positions: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        if self.positions is None or len(self.positions) != len(x):
            raise RuntimeError("SampleNoise needs the stream position of every sample: set .positions before the call")
        elements = 1 if self.whole_sample else x[0].numel()
        keep = _uniform(self.positions, elements, self.seed * 1009 + self.layer) >= self.p
        keep = keep.view(len(x), *([1] * (x.ndim - 1) if self.whole_sample else x.shape[1:]))
        return x * keep.to(x.dtype) / (1 - self.p)


def _uniform(positions: Tensor, elements: int, stream: int) -> Tensor:
    """(B, elements) numbers in [0, 1), a hash of (stream, position, element): two rounds of SplitMix64."""
    element = torch.arange(elements, device=positions.device, dtype=torch.int64)
    state = _mix(_mix(positions.to(torch.int64) * 0x2545F491 + stream)[:, None] + element * 0x61C88647)
    return ((state >> 11) & ((1 << 53) - 1)).double() / (1 << 53)


def _mix(state: Tensor) -> Tensor:
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        state = (state ^ ((state >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return state ^ ((state >> 31) & ((1 << 33) - 1))


def use_sample_noise(module: nn.Module, seed: int, first_layer: int = 0) -> list[SampleNoise]:
    """Replace every dropout and drop-path below `module` by `SampleNoise`, in place, and return them.

    Args:
        first_layer: number of the first one found, so that no two layers of a model share their masks.
    """
    from timm.layers import DropPath

    noises: list[SampleNoise] = []
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Dropout | DropPath):
                whole = isinstance(child, DropPath)
                probability = float(getattr(child, "drop_prob" if whole else "p") or 0.0)
                noises.append(SampleNoise(probability, first_layer + len(noises), seed, whole))
                setattr(parent, name, noises[-1])
    return noises


def inexact_dropout(module: nn.Module) -> list[str]:
    """Names of layers with dropout that `SampleNoise` does not replace: inside fused attention, or of other kinds."""
    inside = []
    for name, child in module.named_modules():  # attention modules keep the rate of their fused kernel as a number
        rates = (getattr(child, attribute, 0.0) for attribute in ("dropout", "dropout_prob", "attention_dropout"))
        probability = max((rate for rate in rates if isinstance(rate, float)), default=0.0)
        if getattr(child, "fused_attn", False):
            probability = getattr(getattr(child, "attn_drop", None), "p", 0.0)
        if isinstance(child, nn.modules.dropout._DropoutNd) and not isinstance(child, nn.Dropout):
            probability = child.p
        if probability:
            inside.append(name)
    return inside
