"""Pearson Linear Correlation and Spearman Ranking Correlation losses, reconstructed (Chen et al., MICCAI 2022).

No code was published for arXiv 2207.00347, and only its abstract was at hand: a global Pearson correlation made
robust against outliers, with the key factors of the distribution regularised, and a local Spearman ranking learned
coarse to fine, by turning the order of samples into relations of similarity. Everything beyond these words is a
choice made here, named in the docstrings.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from baselines.linear import FullPrecisionLinear
from baselines.pairs import mean_of, without_diagonal
from ordinalclip.heads import Head, HeadContext, Outputs, Positive, Prediction, Targets
from ordinalclip.losses import at_least_float32, weighted_mean

FLAT = 1e-6  # standard deviation below which predictions are constant but for rounding


def plc_loss(
    predictions: Tensor, labels: Tensor, weights: Tensor | None = None, outliers: float = 0.1
) -> dict[str, Tensor]:
    """Global correlation: 1 - Pearson + (difference of means)^2 + (difference of deviations)^2 + outliers' error.

    Choices: the outliers are the ceil(outliers * B) samples of largest error, whatever they weigh; they are chosen
    without gradient, take no part in the first three terms, and give their mean squared error. The "key distribution
    factors" are mean and standard deviation. The Pearson term does not change when predictions or labels of the
    samples that it sees are mapped by x -> a x + b with a > 0; it is 1 (no correlation, no gradient) where
    predictions or labels are constant. All terms are means over the whole batch, never over parts of it.

    Args:
        predictions, labels: (B,) in standardised units.
        weights: (B,) or None; a sample of weight w is w samples.
        outliers: share of the batch, in [0, 1].

    Returns:
        scalars `loss`, `pearson` (the term 1 - Pearson), `mean`, `deviation`, `outliers`; 0 for terms of no samples.
    """
    weights = torch.ones_like(predictions) if weights is None else weights.to(predictions.dtype)
    errors = (predictions - labels).square()
    num = math.ceil(outliers * len(labels))
    apart = errors.detach().argsort(descending=True, stable=True)[:num]
    far = torch.zeros_like(weights).index_fill_(0, apart, 1.0) * weights
    near = weights - far
    tiny = torch.finfo(weights.dtype).tiny
    far, near = (part / part.sum().clamp(min=tiny) for part in (far, near))

    mean_p, mean_y = (near * predictions).sum(), (near * labels).sum()
    centred_p, centred_y = predictions - mean_p, labels - mean_y
    std_p, std_y = _root((near * centred_p.square()).sum()), _root((near * centred_y.square()).sum())
    varies = (std_p > FLAT) & (std_y > FLAT)
    product = torch.where(varies, std_p * std_y, 1.0)
    pearson = torch.where(varies, (near * centred_p * centred_y).sum() / product, 0.0)
    terms = {
        "pearson": near.sum() * (1 - pearson),
        "mean": (mean_p - mean_y).square(),
        "deviation": (std_p - std_y).square(),
        "outliers": (far * errors).sum(),
    }
    return {"loss": torch.stack(list(terms.values())).sum(), **terms}


def _root(variance: Tensor) -> Tensor:
    """Square root that is 0 with gradient 0 where the variance is but rounding."""
    positive = variance > FLAT**2
    return torch.where(positive, torch.where(positive, variance, 1.0).sqrt(), 0.0)


def src_loss(
    features: Tensor,
    labels: Tensor,
    gap: float,
    fine: float = 1.0,
    margin: float = 0.1,
    weights: Tensor | None = None,
) -> dict[str, Tensor]:
    """Local ranking: for every anchor, the nearer by label shall be the more similar, first roughly, then finely.

    s_ij is the cosine of features, d_ij = |y_i - y_j|. Choices: of an anchor i and two other samples j, k with
    g = d_ik - d_ij > 0 the error is max(0, m - (s_ij - s_ik)).

    coarse: each j against the nearest k with g >= gap, found by a sorted search; m = margin.
    fine: j and k next to each other in the order of d_i, with g < gap; m = margin * g / gap.

    Ties make no pair; among equally far samples the one whose similarity violates the order most stands for all, so
    that the order of the batch does not matter. Both parts are means over their pairs; `loss` = coarse + fine * fine
    part. Two sorts per anchor: O(B^2 log B) time, O(B^2) memory.

    What the loss does not change under: a + labels, a - labels; labels and gap times the same number; features of
    any sample times a positive number. It is 0 once all the pairs' similarities keep the order by the margin. Other
    monotone maps of labels keep the order of a *sorted* list but not which gaps exceed `gap`: there it changes.

    Args:
        features: (B, D).
        labels: (B,), in a unit in which equal distances are equal numbers.
        gap: > 0, in that unit.
        fine: factor of the fine part.
        margin: of the cosines.
        weights: (B,) or None; a pair counts w_i w_j w_k.

    Returns:
        scalars `loss`, `coarse`, `fine`; 0 for a part without pairs.
    """
    unit = normalize(at_least_float32(features), dim=-1)
    similarity = without_diagonal(unit @ unit.t())
    distance = without_diagonal((labels[:, None] - labels).abs().to(unit.dtype))
    num = distance.shape[1]
    copies = torch.ones_like(unit[:, 0]) if weights is None else weights.to(unit.dtype)
    importance = without_diagonal(copies.expand(len(copies), -1))

    order = similarity.detach().argsort(dim=1, descending=True)  # first by similarity, then, keeping ties, by distance
    order = order.gather(1, distance.gather(1, order).argsort(dim=1, stable=True))
    similarity, distance, importance = (matrix.gather(1, order) for matrix in (similarity, distance, importance))
    pair_weights = copies[:, None] * importance

    farther = torch.searchsorted(distance.contiguous(), (distance + gap).contiguous())
    found, farther = (farther < num).to(unit.dtype), farther.clamp(max=num - 1)
    hinge = torch.relu(margin - (similarity - similarity.gather(1, farther)))
    coarse = mean_of(hinge, found * pair_weights * importance.gather(1, farther))

    step = distance.diff(dim=1)
    hinge = torch.relu(margin * step / gap + similarity.diff(dim=1))
    adjacent = ((step > 0) & (step < gap)).to(unit.dtype)
    finer = mean_of(hinge, adjacent * pair_weights[:, :-1] * importance[:, 1:])
    return {"loss": coarse + fine * finer, "coarse": coarse, "fine": finer}


class CorrelationHead(Head):
    """A linear regressor with squared error, to which subclasses add the losses above."""

    def __init__(self, context: HeadContext):
        super().__init__(context)
        self.linear = FullPrecisionLinear(context.input_dim, 1)

    def forward(self, features: Tensor) -> Outputs:
        return {"standardised": self.linear(features).squeeze(-1)}

    def loss(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        squared = (outputs["standardised"] - self.standardise(targets.values)).square()
        mean = weighted_mean(squared, targets.weights)
        return {"loss": mean, "mse": mean}

    def predict(self, outputs: Outputs) -> Prediction:
        return self.predict_value(outputs["standardised"])


class PLC(CorrelationHead):
    """Squared error + `plc_loss`, a reconstruction.

    Paper: Chen et al., "Fine-grained Correlation Loss for Regression", MICCAI 2022, arXiv:2207.00347; of which only
    the abstract was at hand.

    NOTE: the outliers' error is a mean over the outliers, so with a tenth of the batch each of them weighs ten times
    what the squared error lets a sample weigh, on top of it. Where labels are noisy that chases them: on frozen
    features of solar cells and faces errors were larger than those of MSE. outliers=0.5 is level with it.

    Args:
        outliers: share of the batch that counts as outliers, which take no part in the correlation.
    """

    def __init__(self, context: HeadContext, outliers: Annotated[float, Field(ge=0, le=1)] = 0.1, **shared: Any):
        super().__init__(context, **shared)
        self.outliers = outliers

    def loss(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        terms, labels = super().loss(outputs, targets), self.standardise(targets.values)
        plc = plc_loss(outputs["standardised"], labels, targets.weights, self.outliers)["loss"]
        return {**terms, "loss": terms["loss"] + plc, "plc": plc}


class SRC(CorrelationHead):
    """Squared error + `src_loss`, a reconstruction. The fine part's factor rises from 0 to 1 by half of the training.

    Paper: Chen et al., "Fine-grained Correlation Loss for Regression", MICCAI 2022, arXiv:2207.00347; of which only
    the abstract was at hand.

    Args:
        margin: by which cosines are to keep the order of the labels.
        gap: distance of labels between rough and fine, in standard deviations of the training labels.
    """

    def __init__(
        self,
        context: HeadContext,
        margin: Annotated[float, Field(ge=0, le=2)] = 0.1,
        gap: Positive = 0.25,
        **shared: Any,
    ):
        super().__init__(context, **shared)
        self.margin, self.gap = margin, gap

    def forward(self, features: Tensor) -> Outputs:
        return {**super().forward(features), "features": at_least_float32(features)}

    def loss(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        terms = super().loss(outputs, targets)
        gap, fine = self.gap * self.label_std, min(1.0, 2 * targets.progress)
        # on values as they are, since standardising would break ties by rounding
        src = src_loss(outputs["features"], targets.values, gap, fine, self.margin, targets.weights)["loss"]
        return {**terms, "loss": terms["loss"] + src, "src": src}


class PLCSRC(SRC, PLC):
    """Squared error + `plc_loss` + `src_loss`, reconstructions.

    Paper: Chen et al., "Fine-grained Correlation Loss for Regression", MICCAI 2022, arXiv:2207.00347; of which only
    the abstract was at hand.
    """
