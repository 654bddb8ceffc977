"""What the metric-space methods share: an embedding, and how a value is read out of it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, normalize

from baselines.linear import FullPrecisionLinear
from baselines.neighbors import KERNEL_NEIGHBORS, NearestNeighbors, Neighbors, RadiusNeighbors
from ordinalclip.heads import Head, HeadContext, Outputs, Positive, Prediction, Targets, Width
from ordinalclip.losses import absolute_error, at_least_float32

Readout = Literal["neighbors", "nearest", "l1"]
NUM_NEAREST = 10  # neighbours that are asked without a validation part to choose their number
TIE = 1e-3  # of the gap between ranks: means that are so near to a boundary are on it, but for rounding


class EmbeddingHead(Head):
    """Features -> embedding -> value. Subclasses define `embedding_loss`, which shapes the embedding.

    Features are standardised (layer norm without weights) before the layers, so that the embedding starts at a scale
    near that of standardised labels whatever the backbone's: losses that compare the two collapse otherwise.

    Read-outs:
        neighbors: mean label of the training embeddings near the query (`RadiusNeighbors`). `fit` takes the bank
            and searches its radius on the validation part. Labels are kept standardised, so that half precision
            does not round them. Before the first `fit` the bank is one point with the mean label.
        nearest: the rank value nearest to the mean label of the k nearest training embeddings (`NearestNeighbors`).
            `fit` chooses k by the MAE of such answers on the validation part; without one it is 10. Otherwise as above.
        l1: a linear layer that learns the absolute error of standardised labels beside the embedding, on embeddings
            without gradient: what it learns never shapes the space.

    Args:
        embedding_dim: width of the embedding.
        hidden_dim: width of a hidden layer before the embedding; null: a linear layer.
        readout: how a value is read out of the embedding: by its neighbours in the training part, those within a radius
            or a number of nearest ones, or linearly.
        radius: of the neighbours, where there is no validation part to choose it.
    """

    normalised = False  # whether embeddings have length 1, for losses on cosines

    def __init__(
        self,
        context: HeadContext,
        embedding_dim: Width = 64,
        hidden_dim: Width | None = 256,
        readout: Readout = "neighbors",
        radius: Positive = 0.1,
    ):
        super().__init__(context)
        self.readout = readout
        self.embedding_dim = embedding_dim
        self.layers = embedding_layers(context.input_dim, hidden_dim, embedding_dim)
        if readout == "l1":
            self.probe = FullPrecisionLinear(self.embedding_dim, 1)
        else:
            neighbors: Neighbors = NearestNeighbors(NUM_NEAREST) if readout == "nearest" else RadiusNeighbors(radius)
            self.neighbors = neighbors.fit(torch.zeros(1, self.embedding_dim), torch.zeros(1))

    def embed(self, features: Tensor) -> Tensor:
        """(B, D) features -> (B, E) embedding, float32 at least."""
        embedding = embedded(self.layers, features)
        return normalize(embedding, dim=-1) if self.normalised else embedding

    def space(self, features: Tensor) -> Tensor:
        """The embedding."""
        return self.embed(features)

    def forward(self, features: Tensor) -> Outputs:
        with torch.autocast(features.device.type, enabled=False):
            outputs = {"embedding": self.embed(features)}
            if self.readout == "l1":
                outputs["standardised"] = self.probe(outputs["embedding"].detach()).squeeze(-1)
            return outputs

    def embedding_loss(self, embedding: Tensor, targets: Targets) -> dict[str, Tensor]:
        """The method's own loss of (B, E) embeddings: "loss", and what else is to be logged."""
        raise NotImplementedError(f"{type(self).__name__} defines no embedding_loss")

    def loss(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        terms = self.embedding_loss(outputs["embedding"], targets)
        if self.readout != "l1":
            return terms
        error = absolute_error(outputs["standardised"], self.standardise(targets.values), targets.weights)
        return {**terms, "loss": terms["loss"] + error, "embedding_loss": terms["loss"], "readout_loss": error}

    @property
    def needs_fit(self) -> bool:
        return self.readout != "l1"

    def fit(self, train: tuple[Outputs, Targets], validation: tuple[Outputs, Targets] | None) -> None:
        if self.needs_fit:
            checked = None if validation is None else self._labelled(validation)
            self.neighbors.fit(*self._labelled(train), checked, self._answered)

    def _answered(self, standardised: Tensor) -> Tensor:
        """What is answered for mean labels, both standardised."""
        if self.readout == "neighbors":
            return standardised
        return self.standardise(self.predict_value(standardised).value)

    def _labelled(self, part: tuple[Outputs, Targets]) -> tuple[Tensor, Tensor]:
        outputs, targets = part
        bank = self.neighbors.features
        return outputs["embedding"].to(bank), self.standardise(targets.values).to(bank)

    def predict(self, outputs: Outputs) -> Prediction:
        if self.readout == "l1":
            return self.predict_value(outputs["standardised"])
        return self.predict_value(self.neighbors.predict(outputs["embedding"]))

    @property
    def stand_in(self) -> str:
        if self.readout == "l1":
            return "the linear read-out with the gradient through the embedding that training cuts"
        return f"a kernel mean of the labels of the training part, as wide as its {KERNEL_NEIGHBORS} nearest neighbours"

    def smooth_value(self, outputs: Outputs) -> Tensor:
        embedding = outputs["embedding"]
        read = self.probe(embedding).squeeze(-1) if self.readout == "l1" else self.neighbors.smooth(embedding)
        return at_least_float32(read) * self.label_std + self.label_mean

    def predict_value(self, standardised: Tensor) -> Prediction:
        prediction = super().predict_value(standardised)
        if self.readout != "nearest":
            return prediction
        values = self.ranks.tensor(standardised.device)
        tie = TIE * values.diff().amin(dim=0)  # as in Ranks.nearest a value in the middle goes down, one on an edge up
        rank = self.ranks.nearest(prediction.value + (-tie if self.ranks.edges is None else tie))
        return Prediction(values[rank], rank)


def embedded(layers: nn.Module, features: Tensor) -> Tensor:
    """(B, D) features, each standardised, through the layers: (B, E), float32 at least."""
    features = at_least_float32(features)
    return layers(layer_norm(features, features.shape[-1:]))


def embedding_layers(input_dim: int, hidden_dim: int | None, embedding_dim: int) -> nn.Module:
    """(B, input) -> (B, embedding), with a hidden layer in between, or linear without `hidden_dim`."""
    if hidden_dim is None:
        return FullPrecisionLinear(input_dim, embedding_dim)
    hidden, last = FullPrecisionLinear(input_dim, hidden_dim), FullPrecisionLinear(hidden_dim, embedding_dim)
    return nn.Sequential(hidden, nn.ReLU(), last)
