"""Labels read out from the neighbours in feature space, for the methods that learn a metric."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from ordinalclip.heads import branchless, check_numbers
from ordinalclip.losses import at_least_float32

QUERY_BLOCK, BANK_BLOCK = 256, 8192  # one block of distances: 16 MB
PAIR_BLOCK = 8192  # pairs whose distance is recomputed at a time
COUNTS = range(2, 59, 2)  # of nearest neighbours, among which a validation part decides
KERNEL_NEIGHBORS = 10  # whose distance is the width of the kernel of `Neighbors.smooth`
PRECISION = 1e-10  # largest rounding error of d^2 that is let pass, as a share of the squared radius


class Neighbors(nn.Module):
    """Labelled features of the training part, the bank, and what they answer about others.

    What subclasses define: `known`, `_search` and `_answer`. The search is exact, see `_blocks`.

    Attributes:
        features, labels: (N, D) and (N,), the bank; empty before `fit`. Loading a state takes over the saved size.
    """

    features: Tensor
    labels: Tensor
    unknown: ClassVar[str]  # the error where `fit` is to keep a setting that was never given

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("features", torch.empty(0, 0))
        self.register_buffer("labels", torch.empty(0))

    def fit(
        self,
        features: ArrayLike | Tensor,
        labels: ArrayLike | Tensor,
        validation: tuple[ArrayLike | Tensor, ArrayLike | Tensor] | None = None,
        answered: Callable[[Tensor], Tensor] = lambda means: means,
    ) -> Self:
        """Keep the training part; with a validation part, find how far neighbours are asked on it: see the class.

        Args:
            features: (N, D), N >= 1.
            labels: (N,).
            validation: features (V, D) and labels (V,).
            answered: what is told people for mean labels (..., V), in their unit, e.g. rounded. The search counts the
                errors of that.

        Raises:
            ValueError: wrong shapes, an empty part, numbers that are not finite, or no way to know the setting.
        """
        if validation is None and not self.known:
            raise ValueError(self.unknown)
        features, labels = _labelled(features, labels, "training")
        if validation is not None:
            validation = _labelled(*validation, "validation")
            _check_width(validation[0], features.shape[1], "validation features")
        self.features, self.labels = features.clone(), labels.clone()
        if validation is not None:
            self._search(*validation, answered)
        return self

    def predict(self, queries: ArrayLike | Tensor) -> Tensor:
        """Label of each of (Q, D) features: (Q,), in the dtype and unit of the labels.

        Raises:
            RuntimeError: before `fit`. ValueError: a wrong shape, or numbers that are not finite.
        """
        if len(self.features) == 0:
            raise RuntimeError(f"{type(self).__name__}.predict needs a bank of training features: call fit first")
        if branchless():
            return self._answer_at_once(check_numbers(at_least_float32(torch.as_tensor(queries)))).to(self.labels)
        queries = _features(queries, "queries")
        _check_width(queries, self.features.shape[1], "queries")
        return self._answer(queries).to(self.labels)

    def smooth(self, queries: Tensor) -> Tensor:
        """A smooth function near `predict`, whose answer jumps wherever a neighbour comes or goes: (Q, D) -> (Q,).

        The kernel mean sum_i k_i y_i / sum_i k_i over the whole bank, k_i = exp(-d_i^2 / m), with m the mean squared
        distance to the ten nearest (Nadaraya 1964; Watson 1964): as wide as the bank is sparse where it is asked, so
        that its gradient does not vanish far from the bank. Differentiable in the queries.
        """
        bank, labels = self.features.double(), self.labels.double()
        center = bank.mean(dim=0)
        bank, moved = bank - center, queries.double() - center
        squared = torch.addmm(
            moved.square().sum(dim=1, keepdim=True) + bank.square().sum(dim=1), moved, bank.t(), alpha=-2
        )
        squared = squared.clamp(min=0)
        width = squared.topk(min(KERNEL_NEIGHBORS, len(bank)), largest=False).values.mean(dim=1, keepdim=True)
        weights = torch.softmax(-squared / width.clamp(min=torch.finfo(width.dtype).tiny), dim=1)
        return (weights @ labels).to(queries)

    @property
    def known(self) -> bool:
        """Whether it is known how far neighbours are asked."""
        raise NotImplementedError(f"{type(self).__name__} defines no known")

    def _search(self, features: Tensor, labels: Tensor, answered: Callable[[Tensor], Tensor]) -> None:
        """Find how far neighbours are asked on a validation part."""
        raise NotImplementedError(f"{type(self).__name__} defines no _search")

    def _answer(self, queries: Tensor) -> Tensor:
        """(Q,) labels in float64."""
        raise NotImplementedError(f"{type(self).__name__} defines no _answer")

    def _answer_at_once(self, queries: Tensor) -> Tensor:
        """`_answer` without branches on data, for graphs: in a table of all pairs, as exact as products in float64."""
        raise NotImplementedError(f"{type(self).__name__} defines no _answer_at_once")

    def _squared(self, queries: Tensor) -> Tensor:
        """(Q, D) queries -> (Q, N) squared distances in float64, around the mean of the bank."""
        center = self.features.mean(dim=0).double()
        bank, queries = self.features.double() - center, queries.double() - center
        norms = queries.square().sum(dim=1, keepdim=True) + bank.square().sum(dim=1)
        return (norms - 2 * queries @ bank.t()).clamp(min=0)

    def _blocks(self, queries: Tensor) -> Iterator[_Block]:
        """All pairs of (Q, D) float64 queries and the bank, block by block, the bank in order for every query.

        Distances come from float64 matrix products, |q|^2 + |f|^2 - 2 q.f around the mean of the bank, with a bound on
        their rounding error. Where that error could decide, they are to be computed again by `_exact`.
        """
        center = self.features.mean(dim=0).double()  # any point near the middle will do
        for start in range(0, len(self.features), BANK_BLOCK):
            bank = self.features[start : start + BANK_BLOCK].double()
            labels = self.labels[start : start + BANK_BLOCK].double()
            centered = bank - center
            norms = centered.square().sum(dim=1)
            for first in range(0, len(queries), QUERY_BLOCK):
                rows = slice(first, first + QUERY_BLOCK)
                query = queries[rows] - center
                query_norm = query.square().sum(dim=1)
                # Bound on the rounding error of sums of D products: Higham, Accuracy and Stability, section 3.1.
                rounding = (query.shape[1] + 4) * torch.finfo(torch.float64).eps
                slack = rounding * (query_norm.sqrt() + norms.max().sqrt()).square()
                shifted = torch.addmm(norms, query, centered.t(), alpha=-2)  # |q|^2 is added to those that count
                yield _Block(rows, queries[rows], query_norm, bank, labels, shifted, slack)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Make room for a saved bank of any size; names, and that its parts fit each other, are checked as always."""
        features, labels = (state_dict.get(prefix + name) for name in ("features", "labels"))
        if features is not None and labels is not None and features.shape[:1] == labels.shape:
            self.features = torch.empty_like(features, device=self.features.device)
            self.labels = torch.empty_like(labels, device=self.labels.device)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class _Block(NamedTuple):
    """Some queries and some of the bank.

    Attributes:
        rows: which queries; `queries` (Q, D) are they, `query_norm` (Q,) their squared distances from the centre.
        bank, labels: (N, D) and (N,).
        shifted: (Q, N) squared distances less `query_norm`, at most `slack` (Q,) from the truth.
    """

    rows: slice
    queries: Tensor
    query_norm: Tensor
    bank: Tensor
    labels: Tensor
    shifted: Tensor
    slack: Tensor


class RadiusNeighbors(Neighbors):
    """Weighted mean label of the training features around a query (Chao et al., MICCAI 2022).

    All training features within radius q of the query count, and always the single nearest (the first of equals),
    with weight exp(-(3 d / q)^2 / 2) + 1e-16 at Euclidean distance d.

    The search of the radius on a validation part is the authors': bisection of [0.001, 0.5] on the slope of the
    validation MAE, taken between the middle and 0.02 beyond it (or the width of the interval, when that is less), until
    the interval is at most 0.005 wide; then the best radius of a grid of +-0.03 in steps of 0.002 around its middle,
    the middle itself among equals.

    Args:
        radius: q > 0, in the unit of the features; None: `fit` finds it on the validation part.

    Attributes:
        radius: (), 0 as long as it is not known.

    >>> RadiusNeighbors(1.0).fit([[0.0], [1.0], [5.0]], [10.0, 20.0, 50.0]).predict([[0.5], [4.0], [9.0]])
    tensor([15., 50., 50.])
    """

    radius: Tensor
    unknown = "the radius is not known: pass RadiusNeighbors(radius) or fit(..., validation=)"

    def __init__(self, radius: float | None = None):
        super().__init__()
        if radius is not None and not 0 < radius < float("inf"):
            raise ValueError(f"radius must be a finite number above 0, got {radius}")
        self.register_buffer("radius", torch.tensor(0.0 if radius is None else float(radius)))

    @property
    def known(self) -> bool:
        return bool(self.radius > 0)

    def _search(self, features: Tensor, labels: Tensor, answered: Callable[[Tensor], Tensor]) -> None:
        def errors(*radii: float) -> list[float]:
            return (answered(self._answers(features, radii)) - labels.double()).abs().mean(dim=1).tolist()

        low, high = 0.001, 0.5
        while high - low > 0.005:
            middle = (low + high) / 2
            here, beyond = errors(middle, middle + min(0.02, high - low))
            low, high = (low, middle) if beyond >= here else (middle, high)
        middle = (low + high) / 2
        grid = [middle + 0.002 * step for step in sorted(range(-15, 16), key=abs)]
        grid = [radius for radius in grid if radius > 0]
        maes = errors(*grid)
        self.radius.fill_(grid[maes.index(min(maes))])

    def _answer(self, queries: Tensor) -> Tensor:
        return self._answers(queries, [self.radius.item()])[0]

    def _answer_at_once(self, queries: Tensor) -> Tensor:
        squared, labels, limit = self._squared(queries), self.labels.double(), self.radius.double().square()
        weights = torch.where(squared <= limit, torch.exp(squared * (-4.5 / limit)) + 1e-16, 0.0)
        total = weights.sum(dim=1)
        return torch.where(total > 0, weights @ labels / total, labels[squared.argmin(dim=1)])

    @torch.no_grad()
    def _answers(self, queries: Tensor, radii: Sequence[float]) -> Tensor:
        """(len(radii), Q) weighted mean labels, in one pass over the bank.

        Distances are computed again from the difference next to a radius, next to the smallest distance, and all of
        them when the features are so long, or the radius so small, that the weights would suffer.
        """
        queries, count = queries.double(), len(queries)
        limits = [radius**2 for radius in radii]
        total, weighted = queries.new_zeros(2, len(limits), count)
        nearest, nearest_label = queries.new_full((count,), torch.inf), queries.new_zeros(count)
        for rows, query, query_norm, bank, labels, shifted, slack in self._blocks(queries):
            closest = torch.minimum(nearest[rows], shifted.amin(dim=1) + query_norm) + 2 * slack
            reach = closest.clamp(min=max(limits)) + slack
            row, column = (shifted <= (reach - query_norm).unsqueeze(1)).nonzero(as_tuple=True)
            squared = shifted[row, column] + query_norm[row]

            contender = squared <= closest[row]
            doubtful = contender | (slack > PRECISION * min(limits))[row]
            for limit in limits:
                doubtful |= (squared - limit).abs() <= slack[row]
            squared[doubtful] = _exact(query, bank, row[doubtful], column[doubtful])

            for number, limit in enumerate(limits):
                weight = (squared * (-4.5 / limit)).exp_().add_(1e-16).masked_fill_(squared > limit, 0)
                total[number, rows].index_add_(0, row, weight)
                weighted[number, rows].index_add_(0, row, weight * labels[column])

            row, column, squared = row[contender], column[contender], squared[contender]
            best = nearest[rows].scatter_reduce(0, row, squared, "amin")
            hit = (squared == best[row]) & (squared < nearest[rows][row])
            chosen = torch.full_like(best, len(bank), dtype=torch.int64)
            chosen.scatter_reduce_(0, row[hit], column[hit], "amin")
            found = chosen < len(bank)
            nearest[rows] = best
            nearest_label[rows] = torch.where(found, labels[chosen.clamp(max=len(bank) - 1)], nearest_label[rows])
        return torch.where(total > 0, weighted / total, nearest_label)


class NearestNeighbors(Neighbors):
    """Mean label of the k training features nearest to a query; of equally far ones the first count.

    With a validation part `fit` chooses k among 2, 4, ..., 58, as many as the bank holds, by the validation MAE, the
    least among equals.

    Args:
        count: k >= 1; a smaller bank counts whole. None: `fit` finds it on the validation part.

    Attributes:
        count: (), k, 0 as long as it is not known.

    >>> NearestNeighbors(2).fit([[0.0], [1.0], [5.0]], [10.0, 20.0, 50.0]).predict([[0.5], [4.0], [9.0]])
    tensor([15., 35., 35.])
    """

    count: Tensor
    unknown = "the number of neighbours is not known: pass NearestNeighbors(count) or fit(..., validation=)"

    def __init__(self, count: int | None = None):
        super().__init__()
        if count is not None and count < 1:
            raise ValueError(f"count must be an integer of at least 1, got {count}")
        self.register_buffer("count", torch.tensor(0 if count is None else count))

    @property
    def known(self) -> bool:
        return bool(self.count > 0)

    def _search(self, features: Tensor, labels: Tensor, answered: Callable[[Tensor], Tensor]) -> None:
        counts = [count for count in COUNTS if count <= len(self.features)] or [len(self.features)]
        errors = (answered(self._answers(features, counts)) - labels.double()).abs().mean(dim=1).tolist()
        self.count.fill_(counts[errors.index(min(errors))])

    def _answer(self, queries: Tensor) -> Tensor:
        return self._answers(queries, [int(self.count)])[0]

    def _answer_at_once(self, queries: Tensor) -> Tensor:
        squared, count = self._squared(queries), self.count.clamp(max=len(self.labels))
        last = squared.sort(dim=1).values.index_select(1, (count - 1).reshape(1))
        nearer, level = squared < last, squared == last
        free = count - nearer.sum(dim=1, keepdim=True)  # places for the first of those as far as the last
        counted = (nearer | (level & (level.cumsum(dim=1) <= free))).double()
        return counted @ self.labels.double() / count

    @torch.no_grad()
    def _answers(self, queries: Tensor, counts: Sequence[int]) -> Tensor:
        """(len(counts), Q) mean labels, in one pass over the bank.

        Of every block those that could be among the nearest are taken, with exact distances, and merged with the
        nearest so far: both in the order of their distances, equals in that of the bank, which stable sorts keep.
        """
        queries = queries.double()
        counts = [min(count, len(self.features)) for count in counts]
        most = max(counts)
        nearest = queries.new_full((len(queries), most), torch.inf)
        labels_of_nearest = torch.zeros_like(nearest)
        for rows, query, query_norm, bank, labels, shifted, slack in self._blocks(queries):
            farthest = shifted.topk(min(most, len(bank)), largest=False).values[:, -1] + 2 * slack
            reach = torch.minimum(farthest, nearest[rows, -1] - query_norm + slack)
            row, column = (shifted <= reach.unsqueeze(1)).nonzero(as_tuple=True)
            squared = _exact(query, bank, row, column)
            order = squared.argsort(stable=True)
            order = order[row[order].argsort(stable=True)]
            row, column, squared = row[order], column[order], squared[order]
            place = torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)  # within its query
            row, column, squared, place = (each[place < most] for each in (row, column, squared, place))
            found, found_labels = torch.full_like(nearest[rows], torch.inf), torch.zeros_like(nearest[rows])
            found[row, place], found_labels[row, place] = squared, labels[column]
            merged, kept = torch.cat([nearest[rows], found], dim=1).sort(dim=1, stable=True)
            both = torch.cat([labels_of_nearest[rows], found_labels], dim=1)
            nearest[rows], labels_of_nearest[rows] = merged[:, :most], both.gather(1, kept[:, :most])
        sums = labels_of_nearest.cumsum(dim=1)
        return torch.stack([sums[:, count - 1] / count for count in counts])


def _exact(queries: Tensor, bank: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Squared distances of pairs (row, column) from the differences, a few thousand at a time."""
    pairs = zip(row.split(PAIR_BLOCK), column.split(PAIR_BLOCK), strict=True)
    return torch.cat([(queries[some] - bank[other]).square().sum(dim=1) for some, other in pairs])


def _features(features: ArrayLike | Tensor, name: str) -> Tensor:
    checked = at_least_float32(torch.as_tensor(features)).detach()
    if checked.ndim != 2 or checked.shape[1] == 0:
        raise ValueError(f"{name} must be (N, D) with D >= 1, got shape {tuple(checked.shape)}")
    if not checked.is_floating_point():
        checked = checked.float()
    low, high = checked.aminmax(dim=1)  # isfinite of the whole would need the memory of a second bank
    if not (finite := low.isfinite() & high.isfinite()).all():
        raise ValueError(f"{name} must be finite; row {int((~finite).nonzero()[0])} is not")
    return checked


def _labelled(features: ArrayLike | Tensor, labels: ArrayLike | Tensor, part: str) -> tuple[Tensor, Tensor]:
    checked = _features(features, f"{part} features")
    values = torch.as_tensor(labels).detach()
    if len(checked) == 0 or values.shape != checked.shape[:1]:
        raise ValueError(
            f"{part} labels must be (N,) for (N, D) features with N >= 1, got shapes {tuple(values.shape)} "
            f"and {tuple(checked.shape)}"
        )
    values = at_least_float32(values) if values.is_floating_point() else values.to(checked)
    if not (finite := values.isfinite()).all():
        raise ValueError(f"{part} labels must be finite; row {int((~finite).nonzero()[0])} is not")
    return checked, values


def _check_width(features: Tensor, width: int, name: str) -> None:
    if features.shape[1] != width:
        raise ValueError(f"{name} must have the {width} columns of the training features, got {features.shape[1]}")
