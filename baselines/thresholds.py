"""Threshold methods: R - 1 binary questions "is the label above rank k?"."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from baselines.linear import FullPrecisionLinear
from baselines.pairs import mean_of
from ordinalclip.heads import Head, HeadContext, Outputs, Prediction, Targets, branchless, decode
from ordinalclip.losses import at_least_float32, weighted_mean


def threshold_loss(logits: Tensor, ranks: Tensor, weights: Tensor | None = None) -> Tensor:
    """Weighted mean over samples of the sum over k of binary cross-entropy with t_k = 1[r > k].

    Args:
        logits: (B, R - 1), of "the rank is above k".
        ranks: (B,) int64.
        weights: (B,) or None.

    Returns:
        a scalar.
    """
    return weighted_mean(_errors(logits, ranks).sum(dim=1), weights)


def corn_loss(logits: Tensor, ranks: Tensor, weights: Tensor | None = None) -> Tensor:
    """CORN (Shi et al., 2023): question k is put to the samples with r >= k only.

    The sum of their binary cross-entropies, divided by the number (weight) of all answers. A question that nobody
    is asked counts nothing, and an empty batch gives 0.

    Args:
        logits: (B, R - 1), of "the rank is above k" given that it is at least k.
        ranks: (B,) int64.
        weights: (B,) or None.
    """
    asked = (ranks[:, None] >= torch.arange(logits.shape[1], device=logits.device)).to(logits.dtype)
    if weights is not None:
        asked = asked * weights[:, None]
    return mean_of(_errors(logits, ranks), asked)


def _errors(logits: Tensor, ranks: Tensor) -> Tensor:
    above = ranks[:, None] > torch.arange(logits.shape[1], device=logits.device)
    return binary_cross_entropy_with_logits(logits, above.to(logits.dtype), reduction="none")


def rank_probabilities(exceedance: Tensor) -> Tensor:
    """(B, R - 1) probabilities that the rank is above k -> (B, R) probabilities of the ranks.

    Questions that are answered independently may contradict each other (a rank above 5 but not above 4). They are
    put in falling order, which keeps both the number of answers above one half, which is the rank that Niu et al.
    decode and the median here, and their sum, the expected rank.
    """
    falling = exceedance.sort(dim=1, descending=True).values
    return -torch.diff(falling, dim=1, prepend=torch.ones_like(falling[:, :1]), append=torch.zeros_like(falling[:, :1]))


class ThresholdHead(Head):
    """Logits `above` (B, R - 1) of "the rank is above k", answered independently of each other."""

    def loss(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        return {"loss": threshold_loss(outputs["above"], targets.ranks, targets.weights)}

    def exceedance(self, logits: Tensor) -> Tensor:
        """(B, R - 1) logits -> probabilities that the rank is above k."""
        return logits.sigmoid()

    def predict(self, outputs: Outputs) -> Prediction:
        exceedance = self.exceedance(at_least_float32(outputs["above"]))
        return decode(rank_probabilities(exceedance), self.ranks, self.decoding)


class OrdReg(ThresholdHead):
    """R - 1 binary classifiers of their own.

    Paper: Niu et al., "Ordinal Regression with Multiple Output CNN for Age Estimation", CVPR 2016.
    """

    def __init__(self, context: HeadContext):
        super().__init__(context)
        self.linear = FullPrecisionLinear(context.input_dim, len(context.ranks) - 1)

    def forward(self, features: Tensor) -> Outputs:
        return {"above": self.linear(features)}


class CORAL(ThresholdHead):
    """One weight vector for all questions, a bias for each: at the optimum no two contradict.

    The biases start at the log-odds of equally frequent ranks; from 0 they take hundreds of steps to part. Even so it
    is slow: on gauges with 16 shots of each of 21 values, its MAE after 100 steps is 2.2 times the L1 head's (7.5
    against 3.4). Its one direction has to grow until it spans the log-odds of all ranks; then answers are sharp.

    Paper: Cao et al., "Rank Consistent Ordinal Regression for Neural Networks with Application to Age Estimation",
    Pattern Recognition Letters 2020, arXiv:1901.07884.
    """

    def __init__(self, context: HeadContext):
        super().__init__(context)
        self.linear = FullPrecisionLinear(context.input_dim, 1, bias=False)
        below = torch.arange(1, len(context.ranks)) / len(context.ranks)
        self.biases = nn.Parameter(-torch.logit(below))

    def forward(self, features: Tensor) -> Outputs:
        return {"above": self.linear(features) + at_least_float32(self.biases)}


class CORN(OrdReg):
    """Conditional questions: P(r > k) is the product of the answers up to k.

    Paper: Shi et al., "Deep Neural Networks for Rank-Consistent Ordinal Regression Based on Conditional
    Probabilities", Pattern Analysis and Applications 2023, arXiv:2111.08851.
    """

    def loss(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        return {"loss": corn_loss(outputs["above"], targets.ranks, targets.weights)}

    def exceedance(self, logits: Tensor) -> Tensor:
        if branchless():  # graphs in ONNX have no cumulative product
            return logsigmoid(logits).cumsum(dim=1).exp()
        return logits.sigmoid().cumprod(dim=1)
