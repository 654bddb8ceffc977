"""Linear regressors of the label, standardised by the mean and standard deviation of the training labels."""

from __future__ import annotations

from torch import Tensor, nn

from ordinalclip.heads import Head, HeadContext, Outputs, Prediction, Targets
from ordinalclip.losses import absolute_error


class L1(Head):
    """A linear layer trained on the absolute error of standardised labels."""

    def __init__(self, context: HeadContext):
        super().__init__(context)
        self.linear = nn.Linear(context.input_dim, 1)

    def forward(self, features: Tensor) -> Outputs:
        return {"standardised": self.linear(features).squeeze(-1)}

    def loss(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        standardised = (targets.values - self.label_mean) / self.label_std
        return {"loss": absolute_error(outputs["standardised"], standardised, targets.weights)}

    def predict(self, outputs: Outputs) -> Prediction:
        return self.predict_value(outputs["standardised"])
