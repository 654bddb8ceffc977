"""A head on layer-wise features, in a module of its own: processes of torchrun and saved models import it by name."""

from baselines.regression import L1


class MeanOfLayers(L1):
    """L1 regression on the mean of all layers' features."""

    reads = "layers"

    def __init__(self, context):
        super().__init__(context)
        self.layer_dims = context.layer_dims

    def forward(self, features):
        return super().forward(features.mean(dim=1))
