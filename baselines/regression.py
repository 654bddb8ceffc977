"""Linear regressors of the label, standardised by the mean and standard deviation of the training labels."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import huber_loss

from baselines.linear import FullPrecisionLinear
from ordinalclip.heads import Head, HeadContext, Outputs, Positive, Prediction, Targets
from ordinalclip.losses import absolute_error, weighted_mean


class Regressor(Head):
    """A linear layer to one number; subclasses define `error`."""

    def __init__(self, context: HeadContext):
        super().__init__(context)
        self.linear = FullPrecisionLinear(context.input_dim, 1)

    def forward(self, features: Tensor) -> Outputs:
        return {"standardised": self.linear(features).squeeze(-1)}

    def error(self, standardised: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        """(B,) predictions, labels, both standardised, and weights -> scalar."""
        raise NotImplementedError(f"{type(self).__name__} defines no error")

    def loss(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        return {"loss": self.error(outputs["standardised"], self.standardise(targets.values), targets.weights)}

    def predict(self, outputs: Outputs) -> Prediction:
        return self.predict_value(outputs["standardised"])


class L1(Regressor):
    """Absolute error of standardised labels."""

    def error(self, standardised: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        return absolute_error(standardised, labels, weights)


class MSE(Regressor):
    """Squared error of standardised labels."""

    def error(self, standardised: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        return weighted_mean((standardised - labels).square(), weights)


class Huber(Regressor):
    """Huber's error of standardised labels: e^2 / 2 up to `delta`, delta (|e| - delta / 2) beyond.

    Paper: Huber, "Robust Estimation of a Location Parameter", Annals of Mathematical Statistics 1964.

    Args:
        delta: where the error turns from squared to absolute, in standard deviations of the training labels.
    """

    def __init__(self, context: HeadContext, delta: Positive = 1.0):
        super().__init__(context)
        self.delta = delta

    def error(self, standardised: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        return weighted_mean(huber_loss(standardised, labels, reduction="none", delta=self.delta), weights)
