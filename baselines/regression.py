"""Linear regressors of the label, standardised by the mean and standard deviation of the training labels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ordinalclip.heads import Head, HeadContext, Outputs, Prediction, Targets, at_least_float32
from ordinalclip.losses import absolute_error


class L1(Head):
    """A linear layer trained on the absolute error of standardised labels."""

    def __init__(self, context: HeadContext):
        super().__init__(context)
        self.linear = nn.Linear(context.input_dim, 1)

    def forward(self, features: Tensor) -> Outputs:
        with torch.autocast(features.device.type, enabled=False):
            weight, bias = at_least_float32(self.linear.weight), at_least_float32(self.linear.bias)
            return {"standardised": linear(at_least_float32(features), weight, bias).squeeze(-1)}

    def loss(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        standardised = (targets.values - self.label_mean) / self.label_std
        return {"loss": absolute_error(outputs["standardised"], standardised, targets.weights)}

    def predict(self, outputs: Outputs) -> Prediction:
        return self.predict_value(outputs["standardised"])
