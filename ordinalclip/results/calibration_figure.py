"""The figures of a calibration, in the style of `figures`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from ordinalclip.results.figures import BLUE, COLUMN, GRID, MUTED, ORANGE, Figure, styled


@styled
def reliability(about: Mapping[str, Any], *, width: float = COLUMN) -> Figure:
    """The likeliest rank's probability against how often that is right, before and after scaling.

    Args:
        about: see `calibrating.Calibrated`.
    """
    figure, axes = _square(width)
    curves = {name: about[name]["reliability"] for name in ("before", "after")}
    if about["scaling"] == "none":
        del curves["before"]
    every = [each[key] for curve in curves.values() for each in curve for key in ("confidence", "accuracy")]
    most = min(1.0, 1.15 * max(every))
    for name, colour, marker in (("before", MUTED, "s"), ("after", BLUE, "o")):
        if (curve := curves.get(name)) is None:
            continue
        points = [each["confidence"] for each in curve], [each["accuracy"] for each in curve]
        sizes = [4 + 60 * (each["num"] / about["num"]) ** 0.5 for each in curve]
        said = f"{name}, " * (len(curves) == 2)
        axes.plot(*points, color=colour, linewidth=1)
        axes.scatter(
            *points, s=sizes, color=colour, marker=marker, label=f"{said}ECE {about[name]['ece']:.3f}", zorder=3
        )
    axes.set(xlim=(0, most), ylim=(0, most), xlabel="probability of the likeliest rank", ylabel="share that is right")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False, ncols=2)
    return figure


@styled
def interval_coverage(tested: Sequence[Mapping[str, Any]], *, width: float = COLUMN) -> Figure:
    """How many intervals hold the truth, by their level.

    Args:
        tested: of every level, see `calibrating.coverage`.
    """
    figure, axes = _square(width)
    levels, covered = [each["level"] for each in tested], [each["coverage"] for each in tested]
    low, high = np.array([each["band"] for each in tested]).T
    axes.fill_between(levels, low, high, color=GRID, linewidth=0, label="by chance, where it is kept")
    axes.plot(levels, covered, "o-", color=ORANGE, markersize=4, linewidth=1, label="test part")
    least = max(0.0, min(0.45, min(covered) - 0.05))
    axes.set(xlim=(least, 1), ylim=(least, 1.01), xlabel="level of the interval", ylabel="share that holds the truth")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False, ncols=2)
    return figure


def _square(width: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, 0.82 * width))
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], "--", color=MUTED, linewidth=0.8)
    return figure, axes
