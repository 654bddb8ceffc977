"""LARGE: regression from the latent space of a generator, with few labels or none.

Paper: Nitzan, Gal, Brenner, Cohen-Or, "LARGE: Latent-Based Regression through GAN Semantics", CVPR 2022,
arXiv:2107.11186.

`stylegan2.py` and `e4e.py` are generator and encoder, `latents.py` has the spaces of codes, `directions.py` and
`importance.py` what is found out about them, `distances.py` the feature, `calibration.py` the way to a value.
docs/large.md says what follows the paper, what the authors' code, and what is ours.
"""

from baselines.large.calibration import calibrate, calibrate_layers, spread_out
from baselines.large.directions import (
    Separation,
    channel_relevance,
    direction_from_extremes,
    direction_from_relevance,
    modulation_weights,
    sefa_directions,
    strongest_channels,
    text_direction,
    text_gradient,
)
from baselines.large.distances import signed_distances, sort_by_direction, weighted_distance
from baselines.large.importance import edit_pairs, layer_importance, path_gradients
from baselines.large.latents import Layout, convert, layout, read_codes
from baselines.large.stylegan2 import style_layers

__all__ = [
    "Layout",
    "Separation",
    "calibrate",
    "calibrate_layers",
    "channel_relevance",
    "convert",
    "direction_from_extremes",
    "direction_from_relevance",
    "edit_pairs",
    "layer_importance",
    "layout",
    "modulation_weights",
    "path_gradients",
    "read_codes",
    "sefa_directions",
    "signed_distances",
    "sort_by_direction",
    "spread_out",
    "strongest_channels",
    "style_layers",
    "text_direction",
    "text_gradient",
    "weighted_distance",
]
