"""Regressors with the layers that metric-space methods have, to which their space can be compared.

A linear regressor on a frozen encoder shapes no space: its D5 and residual variance are those of the encoder, whatever
it learns. Here the same losses learn the layers of `EmbeddingHead`, and the space is what the linear layer reads from.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from baselines.embedding import embedded, embedding_layers
from baselines.regression import L1, MSE
from baselines.thresholds import OrdReg
from ordinalclip.heads import Head, HeadContext, Outputs, Width


class Embedded(Head):
    """Lays an embedding under another head, its neighbour to the right among the bases: `class A(Embedded, B)`.

    Args:
        embedding_dim: width of the embedding.
        hidden_dim: width of a hidden layer before the embedding; null: a linear layer.
    """

    def __init__(self, context: HeadContext, embedding_dim: Width = 64, hidden_dim: Width | None = 256, **shared: Any):
        super().__init__(replace(context, input_dim=embedding_dim), **shared)
        self.layers = embedding_layers(context.input_dim, hidden_dim, embedding_dim)

    def space(self, features: Tensor) -> Tensor:
        """The embedding."""
        return embedded(self.layers, features)

    def forward(self, features: Tensor) -> Outputs:
        return super().forward(self.space(features))


class EmbeddedMSE(Embedded, MSE):
    """Squared error of standardised labels, of a linear layer on an embedding."""


class EmbeddedL1(Embedded, L1):
    """Absolute error of standardised labels, of a linear layer on an embedding."""


class EmbeddedOrdReg(Embedded, OrdReg):
    """R - 1 binary classifiers on an embedding.

    Paper: Niu et al., "Ordinal Regression with Multiple Output CNN for Age Estimation", CVPR 2016.
    """
