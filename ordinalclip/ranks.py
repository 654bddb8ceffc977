"""Ranks: the ordered label space, in the label's own unit."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Decoding = Literal["median", "argmax", "expectation"]  # how a distribution over ranks becomes one value: heads.decode


@dataclass(frozen=True)
class Ranks:
    """The ordered values that a picture can be assigned to.

    A label is a *value*; its *rank* is the index of the nearest rank value (ties go down), or the index of
    its bin when `edges` are given. Everything that is reported to a person is in the label's unit.

    Args:
        values: strictly increasing rank values (R >= 2) in the label's unit.
        names: one word or phrase per rank, used in prompts and answers; default: the value, without ".0".
        unit: the unit of the values, e.g. "years"; only shown.
        edges: R - 1 inner bin edges, the outer bins being open, or R + 1 edges that bound them too. A value on an
            edge belongs to the bin above it, on the last outer edge to the last bin.
        tolerance: how far outside the outermost rank values (or outer edges) a label may lie, in the label's
            unit. Default: the widest gap between neighbouring ranks.

    Raises:
        ValueError: fewer than two values, values or edges not finite and strictly increasing, names that are
            not unique or not R of them, edges that do not separate the values.

    >>> ages = Ranks((16, 17, 18), unit="years")
    >>> ages.rank_of([16.2, 17.5, 18.9]).tolist()
    [0, 1, 2]
    >>> ages.names
    ('16', '17', '18')
    """

    values: tuple[float, ...]
    names: tuple[str, ...] | None = None
    unit: str = ""
    edges: tuple[float, ...] | None = None
    tolerance: float | None = None

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        put("values", tuple(float(v) for v in self.values))
        _check_increasing("rank values", self.values)
        if len(self.values) < 2:
            raise ValueError(f"an ordered label space needs at least 2 rank values, got {list(self.values)}")
        given = self.names if self.names is not None else [f"{v:g}" for v in self.values]
        put("names", tuple(str(name).strip() for name in given))
        if len(self.names or ()) != len(self.values):
            raise ValueError(f"{len(self.values)} rank values need as many names, got {list(self.names or ())}")
        repeated = [name for name, times in Counter(self.names).items() if times > 1 or not name]
        if repeated:
            raise ValueError(f"rank names must be unique and not empty, got {repeated}")
        if self.edges is not None:
            put("edges", tuple(float(e) for e in self.edges))
            self._check_edges()
        if self.tolerance is None:
            put("tolerance", max(b - a for a, b in itertools.pairwise(self.values)))
        elif not (math.isfinite(self.tolerance) and self.tolerance >= 0):
            raise ValueError(f"tolerance must be a finite number >= 0, got {self.tolerance}")

    def _check_edges(self) -> None:
        edges, count = self.edges or (), len(self.values)
        _check_increasing("bin edges", edges)
        if len(edges) not in (count - 1, count + 1):
            raise ValueError(f"{count} ranks need {count - 1} inner or {count + 1} bin edges, got {len(edges)}")
        bounds = edges if len(edges) == count + 1 else (-math.inf, *edges, math.inf)
        for value, low, high in zip(self.values, bounds[:-1], bounds[1:], strict=True):
            if not low <= value <= high:
                raise ValueError(f"rank value {value:g} lies outside its bin [{low:g}, {high:g})")

    @classmethod
    def linear(cls, low: float, high: float, num_ranks: int, unit: str = "") -> Ranks:
        """`num_ranks` evenly spaced ranks from `low` to `high`, both included."""
        if num_ranks < 2:
            raise ValueError(f"num_ranks must be at least 2, got {num_ranks}")
        step = (high - low) / (num_ranks - 1)
        return cls(tuple(round(low + step * k, 10) for k in range(num_ranks)), unit=unit)

    @classmethod
    def of(cls, ranks: Ranks | int) -> Ranks:
        """Ranks as they are, or 0 .. R - 1 for a number R."""
        return ranks if isinstance(ranks, Ranks) else cls(tuple(range(ranks)))

    def __len__(self) -> int:
        return len(self.values)

    def name(self, rank: int) -> str:
        """The name of a rank index."""
        assert self.names is not None
        return self.names[rank]

    def tensor(self, device: torch.device | str = "cpu") -> Tensor:
        """The rank values, (R,) float32."""
        return torch.tensor(self.values, dtype=torch.float32, device=device)

    def rank_of(self, values: Iterable[float] | Tensor, rows: Iterable[object] | None = None) -> Tensor:
        """The rank index of every label value.

        Args:
            values: (B,) labels in the label's unit.
            rows: what to call each label in an error (row numbers, file names); default: its position.

        Returns:
            (B,) int64 rank indices.

        Raises:
            ValueError: a label is not finite or lies further outside the range than `tolerance`; the message
                names the row and the allowed range.
        """
        labels = torch.as_tensor(values, dtype=torch.float64).flatten().cpu()
        low, high = self.values[0], self.values[-1]
        if self.edges is not None:
            outer = len(self.edges) == len(self) + 1
            low, high = (self.edges[0], self.edges[-1]) if outer else (-math.inf, math.inf)
        assert self.tolerance is not None
        inside = (labels >= low - self.tolerance) & (labels <= high + self.tolerance)
        bad = ~(inside & labels.isfinite())
        if bad.any():
            first = int(bad.nonzero()[0])
            row = list(rows)[first] if rows is not None else f"row {first}"
            allowed = f"{low:g} to {high:g} {self.unit}".rstrip()
            raise ValueError(
                f"{row}: label {labels[first].item():g} is outside the ranks {allowed} "
                f"(tolerance {self.tolerance:g}); {int(bad.sum())} of {len(labels)} labels are"
            )
        return self.nearest(labels)

    def nearest(self, values: Tensor) -> Tensor:
        """The rank index of any value, predictions beyond the ends included, (B,) int64."""
        if self.edges is not None:
            inner = self.edges[1:-1] if len(self.edges) == len(self) + 1 else self.edges
            return torch.bucketize(values.contiguous(), torch.tensor(inner, dtype=torch.float64).to(values), right=True)
        anchors = torch.tensor(self.values, dtype=torch.float64)
        middles = (anchors[1:] + anchors[:-1]) / 2
        return torch.bucketize(values.contiguous(), middles.to(values))  # a value exactly in the middle goes down

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `Ranks(**data)` restores it."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}


def _check_increasing(what: str, numbers: tuple[float, ...]) -> None:
    for before, after in itertools.pairwise(numbers):
        if not before < after:
            raise ValueError(f"{what} must be strictly increasing, got {before:g} before {after:g}")
    for number in numbers:
        if not math.isfinite(number):
            raise ValueError(f"{what} must be finite, got {number}")
