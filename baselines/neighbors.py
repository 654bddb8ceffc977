"""Radius neighbours: the read-out of metric spaces."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ordinalclip.heads import at_least_float32


class RadiusNeighbors(nn.Module):
    """Weighted mean label of the training features within a radius of the query, and always of the nearest one.

    Weights are exp(-(3 d / q)^2 / 2) + 1e-16 (Chao et al., MICCAI 2022).

    Args:
        radius: q, until `fit` chooses another on a validation part.
    """

    features: Tensor
    labels: Tensor
    radius: Tensor

    def __init__(self, radius: float = 0.1):
        super().__init__()
        self.register_buffer("features", torch.zeros(0, 0))
        self.register_buffer("labels", torch.zeros(0))
        self.register_buffer("radius", torch.tensor(float(radius)))

    def fit(self, features: Tensor, labels: Tensor, validation: tuple[Tensor, Tensor] | None = None) -> RadiusNeighbors:
        """Take (N, D) features with their (N,) labels as the bank, and the radius best on (features, labels)."""
        self.features, self.labels = features, labels
        if validation is not None:
            queries, truth = validation
            radii = torch.linspace(0.02, 0.5, 25).to(features)
            errors = []
            for radius in radii:
                self.radius = radius
                errors.append((self.predict(queries) - truth).abs().mean())
            self.radius = radii[torch.stack(errors).argmin()]
        return self

    def predict(self, queries: Tensor) -> Tensor:
        """(Q, D) features -> (Q,) values."""
        bank, labels, radius = (at_least_float32(t) for t in (self.features, self.labels, self.radius))
        distances = torch.cdist(queries.to(bank.dtype), bank, compute_mode="donot_use_mm_for_euclid_dist")
        near = distances <= radius.clamp(min=distances.min(dim=1, keepdim=True).values)
        weights = (torch.exp(-(3 * distances / radius).square() / 2) + 1e-16) * near
        return weights @ labels / weights.sum(dim=1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Make room for a saved bank of any size."""
        for name in ("features", "labels"):
            if f"{prefix}{name}" in state_dict:
                setattr(self, name, getattr(self, name).new_empty(state_dict[f"{prefix}{name}"].shape))
        super()._load_from_state_dict(state_dict, prefix, *args)
