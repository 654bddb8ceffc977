"""What the metric-space methods share: an embedding, and how a value is read out of it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, normalize

from baselines.linear import FullPrecisionLinear
from baselines.neighbors import RadiusNeighbors
from ordinalclip.heads import Head, HeadContext, Outputs, Positive, Prediction, Targets, Width
from ordinalclip.losses import absolute_error, at_least_float32

Readout = Literal["neighbors", "l1"]


class EmbeddingHead(Head):
    """Features -> embedding -> value. Subclasses define `embedding_loss`, which shapes the embedding.

    Features are standardised (layer norm without weights) before the layers, so that the embedding starts at a scale
    near that of standardised labels whatever the backbone's: losses that compare the two collapse otherwise.

    Read-outs:
        neighbors: mean label of the training embeddings near the query (`RadiusNeighbors`). `fit` takes the bank
            and searches its radius on the validation part. Labels are kept standardised, so that half precision
            does not round them. Before the first `fit` the bank is one point with the mean label.
        l1: a linear layer that learns the absolute error of standardised labels beside the embedding, on embeddings
            without gradient: what it learns never shapes the space.

    Args:
        embedding_dim: width of the embedding.
        hidden_dim: width of a hidden layer before the embedding; null: a linear layer.
        readout: how a value is read out of the embedding: by its neighbours in the training part, or linearly.
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
            self.neighbors = RadiusNeighbors(radius).fit(torch.zeros(1, self.embedding_dim), torch.zeros(1))

    def embed(self, features: Tensor) -> Tensor:
        """(B, D) features -> (B, E) embedding, float32 at least."""
        features = at_least_float32(features)
        embedding = self.layers(layer_norm(features, features.shape[-1:]))
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
        if self.readout == "neighbors":
            return terms
        error = absolute_error(outputs["standardised"], self.standardise(targets.values), targets.weights)
        return {**terms, "loss": terms["loss"] + error, "embedding_loss": terms["loss"], "readout_loss": error}

    @property
    def needs_fit(self) -> bool:
        return self.readout == "neighbors"

    def fit(self, train: tuple[Outputs, Targets], validation: tuple[Outputs, Targets] | None) -> None:
        if self.needs_fit:
            self.neighbors.fit(*self._labelled(train), None if validation is None else self._labelled(validation))

    def _labelled(self, part: tuple[Outputs, Targets]) -> tuple[Tensor, Tensor]:
        outputs, targets = part
        bank = self.neighbors.features
        return outputs["embedding"].to(bank), self.standardise(targets.values).to(bank)

    def predict(self, outputs: Outputs) -> Prediction:
        if self.readout == "l1":
            return self.predict_value(outputs["standardised"])
        return self.predict_value(self.neighbors.predict(outputs["embedding"]))


def embedding_layers(input_dim: int, hidden_dim: int | None, embedding_dim: int) -> nn.Module:
    if hidden_dim is None:
        return FullPrecisionLinear(input_dim, embedding_dim)
    hidden, last = FullPrecisionLinear(input_dim, hidden_dim), FullPrecisionLinear(hidden_dim, embedding_dim)
    return nn.Sequential(hidden, nn.ReLU(), last)
