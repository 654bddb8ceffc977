"""Whether pictures that a model is evaluated on are like those it has learnt from, by their labels and features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ordinalclip.ranks import Ranks
from ordinalclip.weights import read_safetensors, write_safetensors

SAMPLE = 500  # pictures whose features are remembered: their means are known to 0.045 standard deviations
STILL = 1e-8  # share of the mean variance, below which a dimension moves by rounding alone
LEVEL = 0.001  # of the tests: among thousands of pictures everything differs a little


@dataclass(frozen=True)
class Reference:
    """What a model remembers of the data it has learnt from: counts, and moments over all pictures together.

    Attributes:
        counts: (R,) number of training labels of each rank.
        num: N >= 2, pictures that the features are of, held out from training; 0: of none.
        mean, variance: (E,) of each dimension of the space that answers are read from (`Head.space`), over them.
    """

    counts: Tensor
    num: int
    mean: Tensor
    variance: Tensor

    @classmethod
    def of(cls, counts: Sequence[int], points: Tensor | None) -> Reference:
        """Of label counts, and (N, ...) points of the feature space, if there are at least two."""
        counted = torch.tensor(counts, dtype=torch.int64)
        if points is None or len(points) < 2:
            return cls(counted, 0, torch.zeros(0), torch.zeros(0))
        flat = points.detach().flatten(1).double()
        return cls(counted, len(flat), flat.mean(dim=0), flat.var(dim=0))

    def save(self, path: Path) -> None:
        """Write it as safetensors."""
        tensors = {"counts": self.counts, "num": torch.tensor(self.num), "mean": self.mean, "variance": self.variance}
        write_safetensors(path, tensors)

    @classmethod
    def load(cls, path: Path, num_ranks: int) -> Reference:
        """Read what `save` wrote.

        Raises:
            ValueError: a damaged file, or one of another model.
        """
        tensors, _ = read_safetensors(path)
        if tensors.keys() != {"counts", "num", "mean", "variance"} or tensors["num"].ndim:
            raise ValueError(f"{path}: not what a model remembers of its training data")
        if tensors["counts"].shape != (num_ranks,) or tensors["mean"].shape != tensors["variance"].shape:
            raise ValueError(f"{path}: of another model, it counts {tuple(tensors['counts'].shape)} ranks")
        return cls(tensors["counts"], int(tensors["num"]), tensors["mean"], tensors["variance"])


@dataclass(frozen=True)
class Drift:
    """A difference between training data and other data.

    Attributes:
        what: "labels" or "features".
        size: labels: the earth mover's distance of both distributions, in the label's unit. Features: the root mean
            square, over dimensions, of the difference of means in standard deviations of the reference.
        by_chance: features: what `size` would be about without a difference; None for labels.
        p: that a difference so large is chance.
        text: all this in a sentence.
    """

    what: str
    size: float
    by_chance: float | None
    p: float
    text: str

    @property
    def found(self) -> bool:
        """Whether it is more than chance, at `LEVEL`."""
        return self.p < LEVEL

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return {"size": self.size, "by_chance": self.by_chance, "p": self.p, "found": self.found, "text": self.text}


def label_drift(counts: ArrayLike, label_ranks: ArrayLike, ranks: Ranks) -> Drift:
    """Whether labels are distributed as the training labels were: a Kolmogorov-Smirnov test, which with ties as here
    rather overlooks a difference than makes one up.

    Args:
        counts: (R,) number of training labels of each rank.
        label_ranks: (N,) ranks of the other labels.
    """
    from scipy import stats  # here, or who loads a model would wait for it

    values, trained = np.asarray(ranks.values), np.asarray(counts)
    before, now = np.repeat(np.arange(len(values)), trained), np.asarray(label_ranks)
    p = float(stats.ks_2samp(before, now, method="asymp").pvalue)
    size = float(stats.wasserstein_distance(values, values, trained, np.bincount(now, minlength=len(values))))
    unit = f" {ranks.unit}" if ranks.unit else ""
    text = (
        f"labels: mean rank {values[now].mean():.4g}{unit} here, {values[before].mean():.4g} in training; "
        f"earth mover's distance {size:.3g}{unit} (Kolmogorov-Smirnov {_in_words(p)})"
    )
    if unseen := sorted(set(now.tolist()) - set(np.flatnonzero(trained).tolist())):
        rows = int(np.isin(now, unseen).sum())
        text += f"; {rows} labels are of {len(unseen)} ranks that no training label had"
    return Drift("labels", size, None, p, text)


def feature_drift(reference: Reference, points: Tensor) -> Drift:
    """Whether pictures look to the model like those it remembers: Student's t-test of the mean of every dimension, the
    smallest p of all corrected by their number (Rabanser et al., "Failing Loudly", NeurIPS 2019, test dimensions one
    by one and correct so, too). Pictures of the same kind have the same variance, so it is pooled: Welch's test, with
    degrees of freedom that are estimated, finds differences among five pictures where there are none.

    Args:
        points: (N, ...) points of the other pictures in the space that answers are read from, N >= 2.

    Raises:
        ValueError: fewer points, or of another space.
    """
    from scipy import stats

    flat = points.detach().flatten(1).double().cpu()
    if len(flat) < 2 or reference.num < 2 or flat.shape[1:] != reference.mean.shape:
        raise ValueError(f"points must be (N >= 2, {len(reference.mean)}), got {tuple(flat.shape)}")
    mean, variance = reference.mean.double().numpy(), reference.variance.double().numpy()
    now, spread = flat.mean(dim=0).numpy(), flat.var(dim=0).numpy()
    rounding = STILL * float(variance.mean()) + 1e-30  # a dimension that never moves
    variance, spread = variance.clip(min=rounding), spread.clip(min=rounding)
    freedom = reference.num + len(flat) - 2
    pooled = ((reference.num - 1) * variance + (len(flat) - 1) * spread) / freedom
    t = np.abs(now - mean) / (pooled * (1 / reference.num + 1 / len(flat))) ** 0.5
    p = np.asarray(2 * stats.t.sf(t, freedom))
    size, smallest = float(np.sqrt(((now - mean) ** 2 / variance).mean())), float(min(1.0, p.min() * len(p)))
    by_chance = float(np.sqrt(1 / reference.num + 1 / len(flat)))
    text = (
        f"features: means of {len(flat)} pictures differ by {size:.2g} standard deviations (root mean square over "
        f"{len(p)} dimensions; by chance about {by_chance:.2g}), {int((p * len(p) < LEVEL).sum())} dimensions by more "
        f"than chance ({_in_words(smallest)} for the first)"
    )
    return Drift("features", size, by_chance, smallest, text)


def _in_words(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"
