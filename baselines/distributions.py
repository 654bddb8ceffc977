"""Linear classifiers that learn a distribution over the ranks' values, in the label's own unit."""

from __future__ import annotations

import torch
from torch import Tensor

from baselines.classification import CrossEntropy
from ordinalclip.heads import Factor, HeadContext, Outputs, Positive, Targets
from ordinalclip.losses import absolute_error, cross_entropy, weighted_mean


def soft_cross_entropy(logits: Tensor, distribution: Tensor, weights: Tensor | None = None) -> Tensor:
    """Weighted mean cross-entropy of (B, R) logits with (B, R) target distributions: a scalar."""
    return weighted_mean(-(distribution * torch.log_softmax(logits, dim=1)).sum(dim=1), weights)


class SORD(CrossEntropy):
    """Soft targets softmax(-sharpness |v_k - y|) over the rank values v_k.

    Paper: Diaz and Marathe, "Soft Labels for Ordinal Regression", CVPR 2019.

    Args:
        sharpness: of the targets, per unit of the label. Where ranks lie many units apart, 1 makes the targets one-hot.
    """

    def __init__(self, context: HeadContext, sharpness: Positive = 1.0):
        super().__init__(context)
        self.sharpness = sharpness

    def loss(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        values = self.ranks.tensor(targets.values.device).to(targets.values.dtype)
        soft = torch.softmax(-self.sharpness * (values - targets.values[:, None]).abs(), dim=1)
        return {"loss": soft_cross_entropy(outputs["logits"], soft, targets.weights)}


class DLDLv2(CrossEntropy):
    """Cross-entropy to a Gaussian around the label, plus |expectation - label|.

    Paper: Gao et al., "Age Estimation Using Expectation of Label Distribution Learning", IJCAI 2018.

    Args:
        std: standard deviation of the Gaussian, in the label's unit.
        expectation_weight: factor of the expectation's error, which is in the label's unit.
    """

    def __init__(self, context: HeadContext, std: Positive = 2.0, expectation_weight: Factor = 1.0):
        super().__init__(context)
        self.std, self.expectation_weight = std, expectation_weight

    def loss(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        logits, labels = outputs["logits"], targets.values
        values = self.ranks.tensor(labels.device).to(logits.dtype)
        gaussian = torch.softmax(-((values - labels[:, None]) / self.std).square() / 2, dim=1)
        divergence = soft_cross_entropy(logits, gaussian, targets.weights)
        expectation = absolute_error(torch.softmax(logits, dim=1) @ values, labels, targets.weights)
        return {
            "loss": divergence + self.expectation_weight * expectation,
            "cross_entropy": divergence,
            "expectation": expectation,
        }


class MeanVariance(CrossEntropy):
    """Cross-entropy, half the squared error of the expectation, and the variance.

    Paper: Pan et al., "Mean-Variance Loss for Deep Age Estimation from a Face", CVPR 2018.

    Args:
        mean_weight: factor of the expectation's error, which is in the label's unit squared.
        variance_weight: factor of the variance, which is in the label's unit squared.
    """

    def __init__(self, context: HeadContext, mean_weight: Factor = 0.2, variance_weight: Factor = 0.05):
        super().__init__(context)
        self.mean_weight, self.variance_weight = mean_weight, variance_weight

    def loss(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        logits, labels, weights = outputs["logits"], targets.values, targets.weights
        values = self.ranks.tensor(labels.device).to(logits.dtype)
        probabilities = torch.softmax(logits, dim=1)
        expectation = probabilities @ values
        spread = (probabilities * (values - expectation[:, None]).square()).sum(dim=1)
        entropy = cross_entropy(logits, targets.ranks, weights)
        mean = weighted_mean((expectation - labels).square() / 2, weights)
        variance = weighted_mean(spread, weights)
        return {
            "loss": entropy + self.mean_weight * mean + self.variance_weight * variance,
            "cross_entropy": entropy,
            "mean": mean,
            "variance": variance,
        }
