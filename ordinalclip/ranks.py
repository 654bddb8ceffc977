"""Ranks: the ordered label space, in the label's own unit."""

from __future__ import annotations

import itertools
import math
import struct
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # the command line reads this module before it needs torch
    import torch
    from torch import Tensor

MAX_RANKS = 10_000  # a prompt each in every step, and as many squared similarities of prototypes: 400 MB
MAX_VALUE = 1e18  # the squares of larger ones are beyond float32, in which models compute
MAX_NAME = 1000  # characters; no text tower takes as many tokens
UNWRITTEN = {"Cc", "Cs", "Zl", "Zp"}  # Unicode's control characters, surrogates, separators of lines and paragraphs
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
        ValueError: fewer than two values or more than `MAX_RANKS`, values or edges that are not finite and strictly
            increasing in float32, names that are not unique or not R of them, edges that do not separate the values.

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

        _check_number(len(self.values))
        put("values", tuple(float(v) for v in self.values))
        _check_increasing("rank values", self.values)
        given = self.names if self.names is not None else _names_of(self.values)
        put("names", tuple(str(name).strip() for name in given))
        self._check_names(self.names or ())
        if self.edges is not None:
            put("edges", tuple(float(e) for e in self.edges))
            self._check_edges()
        if self.tolerance is None:
            put("tolerance", max(b - a for a, b in itertools.pairwise(self.values)))
        elif not (math.isfinite(self.tolerance) and self.tolerance >= 0):
            raise ValueError(f"tolerance must be a finite number >= 0, got {self.tolerance}")

    def _check_names(self, names: tuple[str, ...]) -> None:
        if len(names) != len(self.values):
            raise ValueError(f"{len(self.values)} rank values need as many names, got {len(names)}: {names[:10]}")
        if repeated := [name for name, times in Counter(names).items() if times > 1 or not name]:
            raise ValueError(f"rank names must be unique and not empty, got {repeated[:10]}")
        for text in (*names, self.unit):
            if len(text) > MAX_NAME or any(unicodedata.category(each) in UNWRITTEN for each in text):
                raise ValueError(
                    f"rank names and the unit have at most {MAX_NAME} characters, no line breaks or control characters "
                    f"among them, got {text[:40]!r}"
                )

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
        _check_number(num_ranks)
        if not -MAX_VALUE <= low < high <= MAX_VALUE:
            raise ValueError(f"low must be below high, both between -1e18 and 1e18, got {low:g} and {high:g}")
        step = (high - low) / (num_ranks - 1)
        digits = max(10, 4 - math.floor(math.log10(step)))
        return cls(tuple(round(low + step * k, digits) for k in range(num_ranks)), unit=unit)

    @classmethod
    def of(cls, ranks: Ranks | int) -> Ranks:
        """Ranks as they are, or 0 .. R - 1 for a number R."""
        if isinstance(ranks, Ranks):
            return ranks
        _check_number(ranks)
        return cls(tuple(range(ranks)))

    def __len__(self) -> int:
        return len(self.values)

    @property
    def worded(self) -> bool:
        """Whether the names are other than the values.

        >>> Ranks((0, 1), ("no", "yes")).worded, Ranks((0, 1)).worded
        (True, False)
        """
        return self.names != tuple(_names_of(self.values))

    def name(self, rank: int) -> str:
        """The name of a rank index."""
        assert self.names is not None
        return self.names[rank]

    def say(self, value: float) -> str:
        """A value as people are told it: by name where ranks have names, else as a number with its unit.

        Between ranks the nearest one's name, and the number.

        >>> Ranks((16, 17), unit="years").say(16.2517), Ranks((0, 1), ("no", "yes")).say(1)
        ('16.25 years', 'yes')
        >>> Ranks((0, 1), ("no", "yes")).say(0.7)
        'yes (0.7)'
        """
        import torch

        rank = int(self.nearest(torch.tensor([value], dtype=torch.float64)))
        exact = _as_float32(value) == _as_float32(self.values[rank])  # as models compute
        if exact and self.worded:
            return self.name(rank)
        digits = 4 if abs(value) < 1000 else 7
        number = self.name(rank) if exact else f"{value:.{digits}g}"
        number += f" {self.unit}" if self.unit else ""
        return f"{self.name(rank)} ({number})" if self.worded else number

    def tensor(self, device: torch.device | str = "cpu") -> Tensor:
        """The rank values, (R,) float32."""
        import torch

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
        import torch

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
        import torch

        if self.edges is not None:
            inner = self.edges[1:-1] if len(self.edges) == len(self) + 1 else self.edges
            return torch.bucketize(values.contiguous(), torch.tensor(inner, dtype=torch.float64).to(values), right=True)
        anchors = torch.tensor(self.values, dtype=torch.float64)
        middles = (anchors[1:] + anchors[:-1]) / 2
        return torch.bucketize(values.contiguous(), middles.to(values))  # a value exactly in the middle goes down

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `Ranks(**data)` restores it."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}


def _names_of(values: tuple[float, ...]) -> list[str]:
    """Values in six digits, or in as many as tell them apart."""
    for digits in range(6, 17):
        names = [f"{value:.{digits}g}" for value in values]
        if len(set(names)) == len(names):
            return names
    return [repr(value) for value in values]


def _check_number(num_ranks: int) -> None:
    if not 2 <= num_ranks <= MAX_RANKS:
        raise ValueError(
            f"a label space has at least 2 ranks and at most {MAX_RANKS}, got {num_ranks}; of more values give some, "
            "such as evenly spaced ones: every label takes the nearest"
        )


def _check_increasing(what: str, numbers: tuple[float, ...]) -> None:
    for before, after in itertools.pairwise(numbers):
        if not before < after:
            raise ValueError(f"{what} must be strictly increasing, got {before:g} before {after:g}")
    for number in numbers:
        if not abs(number) <= MAX_VALUE:
            raise ValueError(f"{what} must be finite and between -{MAX_VALUE:g} and {MAX_VALUE:g}, got {number:g}")
    for (before, low), (after, high) in itertools.pairwise((each, _as_float32(each)) for each in numbers):
        if low == high:
            raise ValueError(
                f"{what} {before!r} and {after!r} are the same number in float32, in which models compute; count from "
                "another zero or in another unit"
            )


def _as_float32(number: float) -> float:
    return struct.unpack("f", struct.pack("f", number))[0]
