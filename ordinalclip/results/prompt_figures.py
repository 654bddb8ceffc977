"""Figures of prompts, in the style of `figures`: panels side by side, one for each of several prompts."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import Normalize

from ordinalclip.quoting import printable
from ordinalclip.ranks import Ranks
from ordinalclip.results.figures import (
    COLUMN,
    GRID,
    INK,
    MUTED,
    PAGE,
    VALUE_COLOURS,
    Figure,
    axis_label,
    bare,
    name_ticks,
    principal_components,
    short,
    some_ranks,
    styled,
)

Shown = tuple[str, np.ndarray, Ranks]  # title, (R, D) prototypes, ranks
LINE = 30  # characters of a title above a panel of a column's third


@styled
def similarities(prompts: Sequence[Shown]) -> Figure:
    """Cosine similarity of the prototypes of all pairs of ranks; one scale of colours for all panels."""
    figure, panels = _panels(len(prompts))
    matrices = [_unit(prototypes) @ _unit(prototypes).T for _, prototypes, _ in prompts]
    low = min(matrix.min() for matrix in matrices)
    for number, (axes, (title, _, ranks), matrix) in enumerate(zip(panels, prompts, matrices, strict=True)):
        picture = axes.imshow(matrix, cmap="viridis", interpolation="none", vmin=low, vmax=1)
        named = some_ranks(ranks)
        name_ticks(axes, named, [ranks.name(rank) for rank in named], room=26, sides="xy" if number == 0 else "x")
        if number:
            axes.set_yticks([])
        what = "rank" if ranks.worded else axis_label("rank", ranks.unit)
        axes.set(xlabel=what, ylabel=what if number == 0 else "")
        axes.set_title(_title(title))
        bare(axes)
    bar = figure.colorbar(picture, ax=list(panels), label="cosine similarity", shrink=0.7)
    bar.outline.set_visible(False)
    return figure


@styled
def paths(prompts: Sequence[Shown], by: str) -> Figure:
    """Prototypes in the plane, joined in the order of their ranks and coloured by value, on one scale.

    Args:
        by: "pca" or "mds", see `explore.prototype_path`.
    """
    figure, panels = _panels(len(prompts))
    scale = Normalize(min(ranks.values[0] for *_, ranks in prompts), max(ranks.values[-1] for *_, ranks in prompts))
    units = {ranks.unit for *_, ranks in prompts}
    for axes, (title, prototypes, ranks) in zip(panels, prompts, strict=True):
        unit = _unit(prototypes)
        points, names = _plane(unit, by)
        axes.plot(*points.T, color=MUTED, linewidth=0.6, zorder=1)
        dots = axes.scatter(*points.T, c=ranks.values, cmap=VALUE_COLOURS, norm=scale, s=14, linewidths=0, zorder=2)
        for rank in {0, len(ranks) - 1}:
            side = "right" if points[rank, 0] > points[:, 0].mean() else "left"  # inwards
            axes.annotate(short(ranks.name(rank)), points[rank], (0, 5), textcoords="offset points", color=INK, ha=side)
        axes.set(xlabel=names[0], ylabel=names[1], title=_title(title))
        axes.set_aspect("equal", "datalim")
        axes.tick_params(labelbottom=False, labelleft=False, length=0)
        axes.grid(color=GRID)
        axes.margins(0.14)
    label = axis_label("value", " or ".join(sorted(units - {""})))
    figure.colorbar(dots, ax=list(panels), label=label, shrink=0.7).outline.set_visible(False)
    return figure


def _plane(unit: np.ndarray, by: str) -> tuple[np.ndarray, tuple[str, str]]:
    """(R, 2) points, and what the axes are called."""
    if by == "pca":
        points, shares = principal_components(unit)
        return points, (f"{shares[0]:.0%} of the variance", f"{shares[1]:.0%}")
    from sklearn.manifold import MDS

    with warnings.catch_warnings():  # defaults that change between versions
        warnings.simplefilter("ignore", FutureWarning)
        return MDS(2, n_init=4, random_state=0).fit_transform(unit), ("distances, as a plane can keep them", "")


def _panels(count: int) -> tuple[Figure, Any]:
    """A row of square panels, as wide as a column for one, else as a page."""
    width = COLUMN if count == 1 else PAGE
    figure = Figure(figsize=(width, min(2.9, 0.9 + (width - 1) / count)))
    return figure, figure.subplots(1, count, squeeze=False)[0]


def _title(text: str) -> str:
    return "\n".join(textwrap.wrap(printable(text), LINE)[:3])


def _unit(prototypes: np.ndarray) -> np.ndarray:
    return prototypes / np.maximum(np.linalg.norm(prototypes, axis=1, keepdims=True), 1e-12)
