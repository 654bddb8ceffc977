"""NumCLIP: coarse classes in words, told apart by FCRC, and a regressor from their probabilities to the value."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor, nn

from baselines.linear import FullPrecisionLinear
from ordinalclip.heads import Factor, Head, HeadContext, Outputs, Prediction, Targets, check_numbers, decode
from ordinalclip.language import CoOp, PrototypeHead, SimilarityHead, text_tower
from ordinalclip.losses import Alignment, absolute_error, alignment_loss, at_least_float32, cross_entropy
from ordinalclip.ranks import Ranks

Coarse = Annotated[Sequence[tuple[str, float]], Field(min_length=2)]
Share = Annotated[float, Field(ge=0, le=1)]
BinValues = Literal["start", "centre"]
Negatives = Literal["ranks", "batch"]
Norm = Literal["sum", "mean"]

FEW = 10  # ranks, so few that each of them is a class
PARTS = 5  # else, where nobody says which classes there are; as many as in all of the paper's tasks
SMALLEST_DIVISOR = 0.1  # of a value, where the published one may come near 0
CORRECTION_STD = 0.001  # of the regressor's initial weights


def fcrc_code(logits: Tensor, ranks: Tensor, weights: Tensor | None = None) -> Tensor:
    """FCRC (NumCLIP) as in the authors' code, its part over the ranks: cross-entropy of weighted LOGITS.

    The loss of a sample of rank y is the cross-entropy of l_j Lambda_j, with Lambda_j = (R - 1) |y - j| / sum over k of
    |y - k| for j != y, which averages 1 over the wrong ranks, and Lambda_y = 1. A logit below 0 becomes smaller still
    by a large factor, so a far rank is punished only where its logit is above 0.

    Args:
        logits: (B, R) cosines / temperature.
        ranks: (B,) int64 rank indices.
        weights: (B,) sample weights > 0, or None.

    Returns:
        a scalar.

    >>> logits = torch.tensor([[2.0, 1, 0, -1, -2], [0.5, 1.5, 1, -0.5, 0], [-1, 0, 0.5, 2, 1]])
    >>> round(fcrc_code(logits, torch.tensor([0, 2, 3])).item(), 6)
    0.663356
    """
    logits = at_least_float32(logits)
    distance = _rank_distances(logits, ranks)
    return cross_entropy(logits * _coded_factors(distance, distance.sum(dim=1, keepdim=True)), ranks, weights)


def fcrc_code_alignment(
    logits: Tensor, ranks: Tensor, weights: Tensor | None = None, alignment: Alignment = "official"
) -> Tensor:
    """FCRC as in the authors' code, its part over the batch; the paper has none.

    `alignment_loss`'s second term of weighted logits: for rank i and the image b of another rank the factor is
    (R - 1) |i - y_b| / sum over the batch of |i - y_b|. As published R - 1 stands where the number of images would, so
    the factors average about (R - 1) / B and the term depends on the size of the batch.

    Args: see `fcrc_code`; a sample of weight w counts as w copies of itself, in the sum of the factors too.
        alignment: the form of the labels' distribution over the batch, see `alignment_loss`.

    Returns:
        a scalar.
    """
    logits = at_least_float32(logits)
    distance = _rank_distances(logits, ranks)
    total = (distance * _copies(distance, weights)).sum(dim=0, keepdim=True)
    return alignment_loss(logits * _coded_factors(distance, total), ranks, weights, alignment)["alignment"]


def fcrc_paper(
    logits: Tensor,
    ranks: Tensor,
    beta: float = 1.0,
    weights: Tensor | None = None,
    negatives: Negatives = "ranks",
    norm: Norm = "sum",
) -> Tensor:
    """FCRC (NumCLIP, arXiv:2408.03574) as printed: cross-entropy in which the EXPONENTIALS of wrong ranks have weights.

    The mean over samples of -log f_iy / (f_iy + sum over j of lambda_ij f_ij), with f = exp(logits) and lambda_ij =
    Norm(beta |y_i - y_j|), over negatives j. This is a reconstruction from a later paper that quotes the equation
    (YearCLIP, arXiv:2512.21337, appendix, eqs. 12 and 13), and two things are ambiguous:

    * What a negative is. There, f_ij compares image i with the text of image j of the BATCH, so that a rank counts as
      often as it occurs and one that does not occur counts nothing (`negatives=batch`). Where the classes are few, as
      in the authors' code, every wrong rank is one negative (`negatives=ranks`).
    * Norm: the weights of a sample's negatives sum to 1 there (`norm=sum`), so all of them together weigh as much as
      one in plain cross-entropy; with `norm=mean` they average 1 over the negatives of other ranks.

    Args:
        logits, ranks, weights: see `fcrc_code`; a sample of weight w counts as w negatives.
        beta: > 0; the value is not published. It cancels in both norms, and in any that is linear.
        negatives, norm: as above.

    Returns:
        a scalar; 0, with gradient 0, where a batch has no negatives.

    Raises:
        ValueError: unknown `negatives` or `norm`, beta not above 0.

    >>> logits = torch.tensor([[2.0, 1, 0, -1, -2], [0.5, 1.5, 1, -0.5, 0], [-1, 0, 0.5, 2, 1]])
    >>> [round(fcrc_paper(logits, torch.tensor([0, 2, 3]), norm=norm).item(), 6) for norm in ("sum", "mean")]
    [0.23675, 0.672709]
    """
    if negatives not in get_args(Negatives) or norm not in get_args(Norm):
        raise ValueError(f"negatives is ranks or batch and norm sum or mean, got {negatives!r} and {norm!r}")
    if not beta > 0:
        raise ValueError(f"beta must be above 0, got {beta:g}")
    logits = at_least_float32(logits)
    distance = _rank_distances(logits, ranks)
    counts = torch.ones_like(logits[:1])
    if negatives == "batch":
        counts = ((distance == 0) * _copies(distance, weights)).sum(dim=0, keepdim=True)
    shares = beta * distance * counts
    total = shares.sum(dim=1, keepdim=True)
    scale = 1.0 if norm == "sum" else (counts * (distance > 0)).sum(dim=1, keepdim=True)
    shares = torch.where(total > 0, shares * scale / total, 0.0)
    shares = torch.where(distance == 0, 1.0, shares)
    return cross_entropy(logits + shares.log(), ranks, weights)  # a weight of 0 is a logit of -inf: softmax 0


def _rank_distances(logits: Tensor, ranks: Tensor) -> Tensor:
    """|y_b - j| in rank indices, (B, R) of the logits' type."""
    return (ranks[:, None] - torch.arange(logits.shape[1], device=logits.device)).abs().to(logits.dtype)


def _coded_factors(distance: Tensor, total: Tensor) -> Tensor:
    """(B, R) Lambda: R - 1 times the share of a distance in a total, and 1 where there is no distance."""
    return torch.where(distance == 0, 1.0, (distance.shape[1] - 1) * distance / total)


def _copies(like: Tensor, weights: Tensor | None) -> Tensor:
    """(B, 1): how often every sample counts."""
    return torch.ones_like(like[:, :1]) if weights is None else weights[:, None].to(like.dtype)


class Adapter(nn.Module):
    """share * A(x) + (1 - share) * x, with A a bottleneck of a quarter of the width: no biases, ReLU after both layers.

    From CLIP-Adapter (Gao et al., arXiv:2110.04544), with the shares of NumCLIP's code.
    """

    def __init__(self, width: int, share: float):
        super().__init__()
        self.width, self.share = width, share
        narrow = max(1, width // 4)
        self.layers = nn.Sequential(
            nn.Linear(width, narrow, bias=False), nn.ReLU(), nn.Linear(narrow, width, bias=False), nn.ReLU()
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.share * self.layers(features) + (1 - self.share) * features


class FineRegressor(nn.Module):
    """Logits of K classes (B, K) -> values (B,): sum over k of p_k b_k / (1 + delta_k), in the style of SSR-Net.

    p is the softmax of the logits, b the bin values, delta = tanh(W2 relu(W1 logits)), near 0 at the start. 1 + delta,
    which can come near 0 as published, is held above 0.1.
    """

    def __init__(self, bin_values: Sequence[float]):
        super().__init__()
        self.bin_values = tuple(bin_values)  # numbers: no cast rounds them
        num = len(self.bin_values)
        first, last = FullPrecisionLinear(num, 2 * num), FullPrecisionLinear(2 * num, num)
        for layer in (first, last):
            nn.init.normal_(layer.weight, std=CORRECTION_STD)
            nn.init.zeros_(layer.bias)
        self.layers = nn.Sequential(first, nn.ReLU(), last)

    def forward(self, logits: Tensor) -> Tensor:
        divisors = (1 + torch.tanh(self.layers(logits))).clamp(min=SMALLEST_DIVISOR)
        return (torch.softmax(logits, dim=1) * logits.new_tensor(self.bin_values) / divisors).sum(dim=1)


def coarse_ranks(ranks: Ranks, coarse: Coarse | None) -> Ranks:
    """The coarse classes of a label space: their starts as values, and their names.

    Args:
        coarse: names and starts, in ascending order. None: the ranks themselves where there are at most 10; else five
            groups of as many ranks, named by the first and the last one, e.g. "21 to 28".

    Raises:
        ValueError: what `Ranks` refuses, a first class that starts above the first rank, or one class with all ranks.
    """
    if coarse is None and len(ranks) <= FEW:
        return ranks
    if coarse is None:
        firsts = [len(ranks) * part // PARTS for part in range(PARTS + 1)]
        names = [f"{ranks.name(a)} to {ranks.name(b - 1)}" for a, b in pairwise(firsts)]
        return Ranks(tuple(ranks.values[first] for first in firsts[:-1]), tuple(names), ranks.unit)
    try:
        classes = Ranks(tuple(start for _, start in coarse), tuple(name for name, _ in coarse), ranks.unit)
    except ValueError as error:
        raise ValueError(f"head.coarse, names and starts of the classes: {error}") from error
    low, high = ranks.say(ranks.values[0]), ranks.say(ranks.values[-1])
    if classes.values[0] > ranks.values[0]:
        raise ValueError(
            f"head.coarse: the first class, {classes.name(0)!r}, starts at {classes.values[0]:g}; the ranks begin "
            f"below, with {low}"
        )
    if len(set(classes_of(ranks, classes))) == 1:
        raise ValueError(f"head.coarse: all ranks, {low} to {high}, are in one class; is it in the labels' unit?")
    return classes


def classes_of(ranks: Ranks, classes: Ranks) -> list[int]:
    """For every rank the index of the last class that starts at or below it."""
    return [bisect_right(classes.values, value) - 1 for value in ranks.values]


class CoarseToFine(Head):
    """What NumCLIP deploys: an adapter, prototypes of coarse classes, and a regressor from their logits to the value.

    Args:
        coarse: names and starts of the classes in ascending order, in the labels' unit, e.g. [[child, 0], [teenager,
            13], [young adult, 19]]; a rank belongs to the last class that starts at or below it. Default: the ranks
            where there are at most 10, else five groups of as many ranks, named by their numbers.
        bin_values: what a class stands for in the answer: its start, as in the authors' code, or the centre (mean) of
            its ranks. With starts, a class that starts at 0 contributes nothing, and above the last start only learned
            corrections reach.
        adapter_share: of the adapted features, the rest being the features as they are; 0: no adaptation.
        fcrc: form of the loss over classes: that of the authors' code, which weighs logits, or of the paper, which
            weighs exponentials. See `fcrc_code` and `fcrc_paper`. The second term (`alignment_weight`) is the code's in
            both: the paper prints none, and its authors say that it is needed.
        negatives: for fcrc=paper, what an image is told apart from: each other class once, or as often as it is in the
            batch.
        norm: for fcrc=paper, whether the weights of an image's negatives sum to 1 or have mean 1.
        regression_weight: factor of the absolute error of the value.

    Raises:
        ValueError: classes that `coarse_ranks` refuses.
    """

    learns: ClassVar[bool] = False
    inner: ClassVar[type[Head] | None] = PrototypeHead  # what compares; it is given the coarse classes as its ranks
    class_of_rank: Tensor

    def __init__(
        self,
        context: HeadContext,
        coarse: Coarse | None = None,
        bin_values: BinValues = "start",
        adapter_share: Share = 0.8,
        fcrc: Literal["code", "paper"] = "code",
        negatives: Negatives = "ranks",
        norm: Norm = "sum",
        regression_weight: Factor = 1.0,
        **shared: Any,
    ):
        super().__init__(context)
        assert self.inner is not None
        self.coarse, self.bin_values = coarse, bin_values
        self.fcrc, self.negatives, self.norm = fcrc, negatives, norm
        self.regression_weight = regression_weight
        classes = coarse_ranks(context.ranks, coarse)
        self.adapter = Adapter(context.input_dim, adapter_share)
        similarity = self.inner(replace(context, ranks=classes), **shared)
        assert isinstance(similarity, SimilarityHead)
        self.similarity: SimilarityHead = similarity
        members = classes_of(context.ranks, classes)
        self.register_buffer("class_of_rank", torch.tensor(members), persistent=False)
        self.fine: FineRegressor | None = None
        if members != list(range(len(classes))):
            values = list(classes.values)
            for k in set(members) if bin_values == "centre" else ():
                own = [value for value, member in zip(context.ranks.values, members, strict=True) if member == k]
                values[k] = sum(own) / len(own)
            self.fine = FineRegressor(values)

    def space(self, features: Tensor) -> Tensor:
        """The adapted features in the prototypes' space, of length 1."""
        return self.similarity.space(self.adapter(features))

    def forward(self, features: Tensor) -> Outputs:
        logits = self.similarity(self.adapter(features))["logits"]
        if self.fine is None:
            return {"logits": logits}
        with torch.autocast(features.device.type, enabled=False):
            return {"coarse_logits": logits, "value": self.fine(logits)}

    def loss(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        logits = outputs["logits" if self.fine is None else "coarse_logits"]
        ranks, weights = self.class_of_rank[targets.ranks], targets.weights
        if self.fcrc == "code":
            contrastive = fcrc_code(logits, ranks, weights)
        else:
            contrastive = fcrc_paper(logits, ranks, 1.0, weights, self.negatives, self.norm)
        alignment = fcrc_code_alignment(logits, ranks, weights, self.similarity.alignment)
        if self.fine is None:
            value = decode(torch.softmax(logits, dim=1), self.ranks, "expectation").value
        else:
            value = outputs["value"]
        error = absolute_error(value, targets.values, weights)
        loss = contrastive + self.similarity.alignment_weight * alignment + self.regression_weight * error
        return {"loss": loss, "contrastive": contrastive, "alignment": alignment, "error": error}

    def predict(self, outputs: Outputs) -> Prediction:
        if self.fine is None:
            return super().predict(outputs)
        value = check_numbers(at_least_float32(outputs["value"]))
        return Prediction(value, self.ranks.nearest(value))

    def rank_prototypes(self) -> Tensor | None:
        return self.similarity.rank_prototypes() if self.fine is None else None


class NumCLIP(CoarseToFine):
    """Coarse classes in words through the frozen text tower, FCRC, and a regressor from their logits to the value.

    Paper: Du et al., "Teach CLIP to Develop a Number Sense for Ordinal Regression", ECCV 2024, arXiv:2408.03574.

    Each class has a prompt of its own, a context and its name, without interpolation; images pass through an adapter
    before they are compared. The loss is FCRC over the images' classes, and the absolute error of the value in the
    labels' unit. Where every rank is a class (at most 10 ranks, or so given) there is no regressor: the answer is read
    from the distribution over ranks, as the authors do for HCI and aesthetics, and the error is that of its mean.

    The published training leaves the context as it is for ages (`train.freeze=[head.similarity.learner.context]`) and
    trains the encoder, which it found better than the adapter alone.

    Args: see `CoarseToFine`, and `CoOp` for the prompts.

    Raises:
        ValueError: no text tower, classes that `coarse_ranks` refuses; see `CoOp` for the rest.
    """

    learns: ClassVar[bool] = True
    inner: ClassVar[type[Head] | None] = CoOp
    rebuilt: ClassVar[tuple[str, ...]] = ("similarity.text",)

    def __init__(self, context: HeadContext, **shared: Any):
        text_tower(context, self)  # or the head inside would be the one that needs it
        super().__init__(context, **shared)

    def prompt_parameters(self) -> list[nn.Parameter]:
        return self.similarity.prompt_parameters()

    def deploy(self) -> tuple[str, dict[str, Any], Head]:
        deployed = self.similarity.deploy()
        assert deployed is not None
        _, shared, similarity = deployed
        assert isinstance(similarity, PrototypeHead)
        options = {
            "coarse": None if self.coarse is None else [list(each) for each in self.coarse],
            "bin_values": self.bin_values,
            "adapter_share": self.adapter.share,
            "fcrc": self.fcrc,
            "negatives": self.negatives,
            "norm": self.norm,
            "regression_weight": self.regression_weight,
            **shared,
        }
        head = CoarseToFine(HeadContext(self.ranks, self.adapter.width, decoding=self.decoding), **options)
        head.similarity, head.adapter, head.fine = similarity, self.adapter, self.fine
        return f"{__name__}:CoarseToFine", options, head
