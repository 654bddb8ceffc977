"""Figures: pure functions from arrays to matplotlib figures in one style, for reports, PDF, SVG and PNG.

They are as wide as a column of a paper unless told otherwise, in 8 pt, never under 6. Colours are safe for colour-blind
readers (Okabe & Ito) and readable on white and on black. `inline_svg` turns a figure into SVG whose ink follows the
page's light or dark theme through the CSS variables in `THEME`.
"""

from __future__ import annotations

import html
import io
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure as AnyFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from PIL import Image

from ordinalclip.files import whole
from ordinalclip.metrics import Metric
from ordinalclip.quoting import printable
from ordinalclip.ranks import Ranks
from ordinalclip.results.significance import Verdict

INK, MUTED, GRID, BLUE, ORANGE = "#1b1f24", "#66707c", "#dfe3e8", "#0072b2", "#e69f00"
PALETTE = (BLUE, ORANGE, "#009e73", "#cc79a7", "#d55e00", "#56b4e9")
WRITER = "ordinalclip plot"  # in the metadata of a figure's file
MARKERS = "osD^vX"  # with the colours: two blues are one in the dark
THEME = {INK: "--ink", MUTED: "--muted", GRID: "--grid", BLUE: "--blue"}
VALUE_COLOURS = LinearSegmentedColormap.from_list("values", matplotlib.colormaps["viridis"](np.linspace(0.2, 0.92, 64)))
# From lower to higher through the grey of paper: blue and vermilion are told apart whatever one's eyes lack.
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 8,
    "axes.titlesize": 8,
    "text.color": INK,
    "text.parse_math": False,  # names and units are text, whatever dollars they hold
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.limits": (-4, 8),
    "axes.formatter.useoffset": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "figure.facecolor": "none",
    "figure.constrained_layout.use": True,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "svg.fonttype": "none",
    "svg.hashsalt": "ordinalclip",
    "pdf.fonttype": 42,  # text that editors and search find
}
COLUMN, PAGE = 3.3, 6.9  # inches: one column of a paper and two
NARROWEST, WIDEST = 80, 300  # millimetres of any figure
SMALLEST = 6  # pt, of any text
FEW_RANKS = 12  # up to so many, each has a place of its own on an axis and in a confusion matrix
TICKS = 6  # as many ranks are named on an axis of more
styled = matplotlib.rc_context(STYLE)


class Figure(AnyFigure):
    """A figure that notebooks draw where it is a cell's answer, without `%matplotlib inline` before."""

    def _repr_png_(self) -> tuple[bytes, dict[str, float]]:
        """What IPython asks for: PNG on white, and its size in pixels of a screen, half as fine."""
        buffer = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            self.savefig(buffer, facecolor="white", dpi=192, format="png")
        wide, high = self.get_size_inches() * 96
        return buffer.getvalue(), {"width": round(wide), "height": round(high)}


@styled
def agreement(labels: np.ndarray, values: np.ndarray, ranks: Ranks, *, width: float = COLUMN) -> Figure:
    """Predicted against true values, (N,) each, with the identity line; hexagons when there are many points."""
    figure, axes = _square(width, 3.1)
    low, high = min(labels.min(), values.min()), max(labels.max(), values.max())
    margin = 0.04 * (high - low or 1)
    bounds = (low - margin, high + margin)
    axes.plot(bounds, bounds, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    if len(labels) > 3000:
        cells = axes.hexbin(labels, values, gridsize=36, bins="log", mincnt=1, cmap=VALUE_COLOURS, extent=bounds * 2)
        figure.colorbar(cells, ax=axes, label="images", shrink=0.8).outline.set_visible(False)
    else:
        axes.scatter(labels, values, s=11, color=BLUE, alpha=0.55, linewidths=0, zorder=2)
    axes.set(xlim=bounds, ylim=bounds, aspect="equal")
    axes.set(xlabel=axis_label("true value", ranks.unit), ylabel=axis_label("predicted value", ranks.unit))
    if ranks.worded:
        named = some_ranks(ranks)
        name_ticks(
            axes, [ranks.values[rank] for rank in named], [ranks.name(rank) for rank in named], room=24 * _growth(width)
        )
    else:
        axes.xaxis.set_major_locator(even_ticks(most_ticks(ranks)))
        axes.yaxis.set_major_locator(even_ticks(most_ticks(ranks)))
    return figure


@styled
def confusion(label_ranks: np.ndarray, ranks: np.ndarray, names: Sequence[str], *, width: float = COLUMN) -> Figure:
    """Confusion matrix of ranks, (N,) each: numbers of images, shaded by their share of the true rank."""
    figure, axes = _square(width, 3.1)
    counts = np.zeros((len(names), len(names)), dtype=int)
    np.add.at(counts, (label_ranks, ranks), 1)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    cell = 52 * figure.get_figheight() / len(names)  # points
    digits = len(str(counts.max()))
    size = max(SMALLEST, min(8, cell / (0.4 + 0.6 * digits)))  # of a digit, which is 0.6 as wide as high
    thousands = SMALLEST * 0.64 * digits > cell  # of wider numbers
    for (row, column), count in np.ndenumerate(counts):
        # A veil, not a colour of its own: ink is readable on it on light and on dark pages.
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, color=BLUE, alpha=0.55 * share[row, column], lw=0))
        ink, number = INK if count else MUTED, f"{count / 1000:.0f}k" if thousands and count > 999 else str(count)
        axes.text(column, row, number, ha="center", va="center", color=ink, fontsize=size)
    lines = np.arange(len(names) + 1) - 0.5
    axes.hlines(lines, -0.5, len(names) - 0.5, color=GRID, linewidth=0.6)
    axes.vlines(lines, -0.5, len(names) - 0.5, color=GRID, linewidth=0.6)
    name_ticks(axes, range(len(names)), names, room=32 * _growth(width))
    axes.set(xlabel="predicted rank", ylabel="true rank", aspect="equal")
    axes.set(xlim=(-0.52, len(names) - 0.48), ylim=(len(names) - 0.48, -0.52))
    bare(axes)
    return figure


@styled
def error_by_value(
    labels: np.ndarray, values: np.ndarray, ranks: Ranks, train_counts: Sequence[int], *, width: float = COLUMN
) -> Figure:
    """Mean absolute error and bias by true value, above the number of training labels.

    Args:
        labels, values: (N,) true and predicted values.
        train_counts: (R,) number of training labels of each rank.
    """
    figure, (top, bottom) = _figure(width, 3.1, panels=2, height_ratios=(3, 1), sharex=True)
    bins = Bins(ranks)
    errors, half, bias = (np.full(len(bins.places), np.nan) for _ in range(3))
    for k, chosen in enumerate(bins.members(labels)):
        if chosen.any():
            error = np.abs(values[chosen] - labels[chosen])
            errors[k], bias[k] = error.mean(), (values[chosen] - labels[chosen]).mean()
            half[k] = 1.96 * error.std(ddof=1) / len(error) ** 0.5 if len(error) > 1 else np.nan
    top.bar(bins.places, errors, 0.86 * bins.width, color=BLUE, alpha=0.8, label="mean absolute error")
    around = [np.minimum(half, errors), half]  # no error is below 0
    top.errorbar(bins.places, errors, around, fmt="none", ecolor=INK, elinewidth=0.8)
    top.plot(bins.places, bias, color=ORANGE, marker="o", markersize=3, linewidth=1.2, label="bias")
    top.axhline(0, color=MUTED, linewidth=0.6)
    top.set_ylabel(axis_label("error", ranks.unit))
    _legend(top)
    per_bin = [np.asarray(train_counts)[chosen].sum() for chosen in bins.members(np.asarray(ranks.values))]
    bottom.bar(bins.places, per_bin, 0.86 * bins.width, color=MUTED, alpha=0.6)
    bottom.yaxis.set_major_locator(even_ticks(3, integer=True))
    bottom.set_ylabel("training\nimages")
    bins.label(bottom)
    figure.align_ylabels()
    return figure


@styled
def label_counts(counts: Mapping[str, Sequence[int]], ranks: Ranks, *, width: float = COLUMN) -> Figure:
    """Number of labels by value, the parts of the data on top of each other.

    Args:
        counts: (R,) number of labels of each rank, by part.
    """
    figure, axes = _figure(width, 2.4)
    bins, below = Bins(ranks), np.zeros(1)
    members = bins.members(np.asarray(ranks.values))
    for (part, of_rank), colour in zip(counts.items(), PALETTE, strict=False):
        heights = np.asarray([np.asarray(of_rank)[chosen].sum() for chosen in members])
        axes.bar(bins.places, heights, 0.86 * bins.width, below, color=colour, alpha=0.85, label=part)
        below = below + heights
    axes.yaxis.set_major_locator(even_ticks(5, integer=True))
    axes.set_ylabel("labels")
    bins.label(axes)
    axes.set_xlabel("rank" if ranks.worded else axis_label("label", ranks.unit))
    _legend(axes)
    return figure


@styled
def similarity(prototypes: np.ndarray, ranks: Ranks, *, width: float = COLUMN) -> Figure:
    """Cosine similarity of the rank prototypes, (R, D), as a matrix."""
    figure, axes = _square(width, 3.1)
    unit = prototypes / np.linalg.norm(prototypes, axis=1, keepdims=True)
    picture = axes.imshow(unit @ unit.T, cmap="viridis", interpolation="none")
    named = some_ranks(ranks)
    name_ticks(axes, named, [ranks.name(rank) for rank in named], room=24 * _growth(width))
    what = "rank" if ranks.worded else axis_label("rank", ranks.unit)
    axes.set(xlabel=what, ylabel=what)
    bare(axes)
    bar = figure.colorbar(picture, ax=axes, location="top", label="cosine similarity", aspect=30)
    bar.outline.set_visible(False)
    bar.ax.xaxis.set_major_locator(even_ticks(4))
    return figure


@styled
def feature_map(
    features: np.ndarray,
    values: np.ndarray,
    images: Sequence[Image.Image],
    ranks: Ranks,
    thumbnail: float = 0.065,
    *,
    width: float = COLUMN,
) -> Figure:
    """Features in their two principal components, with thumbnails framed in the colour of their value.

    Args:
        features: (N, D) image features.
        values: (N,) values that colour them.
        images: N square thumbnails; as many are drawn as fit without overlap, dots for the rest.
        thumbnail: side of a thumbnail as a share of the height.
    """
    figure, (axes, bar) = _figure(width, 5.3, panels=2, height_ratios=(36, 1))
    points, explained = principal_components(features)
    first, second = explained
    axes.set(xlabel=f"first component, {first:.0%} of the variance", ylabel=f"second component, {second:.0%}")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    bins = Bins(ranks)
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(*bins.ends), VALUE_COLOURS)
    figure.colorbar(scale, cax=bar, orientation="horizontal")
    bins.label(bar)
    bar.spines[:].set_visible(False)
    figure.draw_without_rendering()  # from here on the axes have their final size
    box = axes.get_window_extent()
    side = np.asarray([thumbnail * box.height / box.width, thumbnail])  # a square, in units of the axes

    low, high = points.min(axis=0), points.max(axis=0)
    places = (points - low) / np.where(high > low, high - low, 1)
    colours = scale.to_rgba(bins.positions(values))
    axes.scatter(*places.T, s=6, c=colours, linewidths=0, alpha=0.9)
    drawn: list[np.ndarray] = []
    for place, image, colour in zip(places, images, colours, strict=True):
        if all((np.abs(place - other) / side).max() > 1.25 for other in drawn):
            drawn.append(place)
            left, bottom = place - 0.6 * side
            axes.add_patch(Rectangle((left, bottom), *(1.2 * side), color=colour, linewidth=0, zorder=2))
            (left, bottom), (right, top) = place - side / 2, place + side / 2
            axes.imshow(
                np.asarray(image), extent=(left, right, bottom, top), zorder=3, aspect="auto", interpolation="none"
            )
    axes.set(xlim=(-side[0], 1 + side[0]), ylim=(-side[1], 1 + side[1]))
    return figure


@styled
def learning_curves(
    log: Sequence[Mapping[str, float]], best_step: int | None, unit: str = "", *, width: float = COLUMN
) -> Figure:
    """Training loss and validation MAE of the entries of log.jsonl; the best step is marked."""
    validated = [entry for entry in log if "validation_mae" in entry]
    figure, axes = _figure(width, 3, panels=2 if validated else 1, sharex=True)
    top = axes[0] if validated else axes
    steps, loss = np.asarray([entry["step"] for entry in log]), np.asarray([entry["loss"] for entry in log])
    window = max(1, len(loss) // 40)
    top.plot(steps, loss, color=BLUE, alpha=0.35 if window > 1 else 1, linewidth=1)
    if window > 1:
        smooth = np.convolve(loss, np.ones(window) / window, mode="valid")
        top.plot(steps[window - 1 :], smooth, color=BLUE, linewidth=1.4, label=f"mean of {window} steps")
        _legend(top)
    top.set_ylabel("training loss")
    if validated:
        evaluated, errors = [entry["step"] for entry in validated], [entry["validation_mae"] for entry in validated]
        axes[1].plot(evaluated, errors, color=ORANGE, marker="o", markersize=3, linewidth=1.2)
        if best_step in evaluated:
            chosen = {"linestyle": (0, (4, 3)), "label": f"model: step {best_step}"}
            axes[1].axvline(best_step, color=MUTED, linewidth=1, **chosen)
            _legend(axes[1])
        axes[1].set_ylabel(axis_label("validation\nMAE", unit))
        axes[1].set_ylim(0, 1.1 * max(filter(math.isfinite, errors), default=1) or 1)
        figure.align_ylabels()
    below = axes[1] if validated else axes
    below.set_xlabel("step")
    below.xaxis.set_major_locator(even_ticks(6, integer=True))
    for panel in {top, below}:
        panel.yaxis.set_major_locator(even_ticks(5))
    return figure


@styled
def best_so_far(
    numbers: Sequence[int], maes: Sequence[float], pruned: Sequence[bool], unit: str = "", *, width: float = COLUMN
) -> Figure:
    """Validation MAE of the trials of a search, and the smallest so far of those that were not pruned."""
    figure, axes = _figure(width, 3.4)
    values = _trial_points(axes, np.asarray(numbers), np.asarray(maes), np.asarray(pruned, dtype=bool))
    known = np.minimum.accumulate(np.where(pruned, np.inf, values))
    axes.step(
        numbers, np.where(np.isinf(known), np.nan, known), where="post", color=ORANGE, linewidth=1.6, label="best"
    )
    axes.set(xlabel="trial", ylabel=axis_label("validation MAE", unit))
    axes.xaxis.set_major_locator(even_ticks(6, integer=True))
    _legend(axes)
    return figure


@styled
def importances(shares: Mapping[str, float], *, width: float = COLUMN) -> Figure:
    """How much of what separates good trials from bad ones is due to each key; largest on top."""
    order = sorted(shares, key=lambda key: shares[key])
    figure, axes = _figure(width, _height_of(order))
    axes.barh(range(len(order)), [shares[key] for key in order], 0.6, color=BLUE, alpha=0.8)
    axes.set_yticks(range(len(order)), _beside(order, width))
    axes.set(xlabel="importance", xlim=(0, 1), ylim=(-0.6, len(order) - 0.4))
    axes.grid(axis="y", visible=False)
    return figure


@styled
def mae_by_setting(
    key: str,
    values: Sequence[float | str],
    maes: Sequence[float],
    pruned: Sequence[bool],
    unit: str = "",
    log: bool = False,
    *,
    width: float = COLUMN,
) -> Figure:
    """Validation MAE of the trials of a search by what they set a key to, numbers or choices.

    Args:
        log: a logarithmic axis of numbers.
    """
    figure, axes = _figure(width, 3.0)
    names = [] if any(not isinstance(value, str) for value in values) else list(dict.fromkeys(sorted(map(str, values))))
    places = [names.index(str(value)) if names else float(value) for value in values]
    if names:
        name_ticks(axes, range(len(names)), names, sides="x")
        axes.set_xlim(-0.6, len(names) - 0.4)
    elif log:
        axes.set_xscale("log")
        few = max(map(float, values)) < 100 * min(map(float, values))  # decades alone would be a tick or two
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    _trial_points(axes, np.asarray(places), np.asarray(maes), np.asarray(pruned, dtype=bool))
    axes.set(xlabel=short(key, 34), ylabel=axis_label("validation MAE", unit))
    return figure


@styled
def validations_by_trial(
    curves: Sequence[Sequence[tuple[int, float]]],
    pruned: Sequence[bool],
    best: int,
    unit: str = "",
    *,
    width: float = COLUMN,
) -> Figure:
    """Validation MAE on the way of every trial of a search.

    Args:
        curves: of every trial, pairs (number of the validation, MAE).
        pruned: whether it was ended early, at its last point.
        best: place of the best one, -1 for none.
    """
    figure, axes = _figure(width, 3.4)
    limit = _limit([mae for curve in curves for _, mae in curve] or [0.0])
    for place, (curve, ended) in enumerate(zip(curves, pruned, strict=True)):
        shown = [(step, min(mae, limit)) for step, mae in curve]
        if not shown:
            continue
        bright = {"color": ORANGE, "linewidth": 2.0, "zorder": 3, "label": "best"}
        line = bright if place == best else {"color": BLUE, "alpha": 0.4, "linewidth": 1.0}
        axes.plot(*zip(*shown, strict=True), **line)
        if ended:
            axes.plot(*shown[-1], marker="x", color=MUTED, markersize=6, linestyle="none")
    axes.plot([], [], marker="x", color=MUTED, linestyle="none", label="pruned")
    axes.set(xlabel="validation", ylabel=axis_label("validation MAE", unit))
    axes.xaxis.set_major_locator(even_ticks(6, integer=True))
    _legend(axes)
    return figure


def _trial_points(axes: Axes, places: np.ndarray, maes: np.ndarray, pruned: np.ndarray) -> np.ndarray:
    """Trials as dots, pruned ones as crosses, at the top of the axis what is far beyond; returns what was drawn."""
    limit = _limit(maes[np.isfinite(maes)].tolist() or [0.0])
    drawn = np.minimum(maes, limit if np.isfinite(limit) else np.nanmax(maes[np.isfinite(maes)], initial=0.0) * 1.05)
    far = drawn < maes
    axes.scatter(places[~pruned & ~far], drawn[~pruned & ~far], s=26, color=BLUE, linewidths=0, label="trial", zorder=3)
    if pruned.any():
        axes.scatter(
            places[pruned], drawn[pruned], s=26, color=MUTED, marker="x", linewidths=1.3, label="pruned", zorder=2
        )
    if (far & ~pruned).any():
        beyond = far & ~pruned
        axes.scatter(
            places[beyond], drawn[beyond], s=30, color=BLUE, marker="^", linewidths=0, label="beyond", zorder=3
        )
    return drawn


@styled
def mae_by_method(errors: Mapping[str, Sequence[float]], unit: str = "", *, width: float = COLUMN) -> Figure:
    """MAE of every method: a dot per seed, their mean and standard deviation; best on top."""
    order = sorted(errors, key=lambda name: float(np.mean(errors[name])), reverse=True)
    figure, axes = _figure(width, _height_of(order))
    limit = _limit([float(np.mean(errors[name])) for name in order])
    for place, name in enumerate(order):
        maes = np.asarray(errors[name])
        if maes.mean() > limit:
            _beyond(axes, place, maes.mean())
            continue
        spread = maes.std(ddof=1) if len(maes) > 1 else 0
        axes.errorbar(maes.mean(), place, xerr=spread, fmt="o", color=BLUE, markersize=4.5, capsize=2, linewidth=1.2)
        axes.scatter(maes, np.full(len(maes), place + 0.27), s=8, color=ORANGE, linewidths=0, zorder=3)
    axes.set_yticks(range(len(order)), _beside(order, width))
    axes.set(
        xlabel=axis_label("test MAE", unit, 7 * width),
        xlim=_ends(axes.get_xlim(), limit),
        ylim=(-0.6, len(order) - 0.4),
    )
    axes.grid(axis="y", visible=False)
    return figure


@styled
def mae_by_group(
    groups: Mapping[str, tuple[float | None, tuple[float, float]]],
    overall: float,
    unit: str = "",
    *,
    width: float = COLUMN,
) -> Figure:
    """MAE of every group with its interval, in the order given from the top; a line at that of all.

    Args:
        groups: by name, MAE and the ends of its interval, which may be NaN.
    """
    figure, axes = _figure(width, _height_of(list(groups)))
    axes.axvline(overall, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    for place, (mae, (low, high)) in enumerate(groups.values()):
        if mae is not None:
            around = None if np.isnan(low + high) else [[max(0.0, mae - low)], [max(0.0, high - mae)]]
            axes.errorbar(mae, place, xerr=around, fmt="o", color=BLUE, markersize=4.5, capsize=2, linewidth=1.2)
    axes.set_yticks(range(len(groups)), _beside(list(groups), width))
    axes.set(
        xlabel=axis_label("MAE", unit, 7 * width),
        xlim=_ends(axes.get_xlim(), np.inf),
        ylim=(len(groups) - 0.4, -0.6),
    )
    axes.grid(axis="y", visible=False)
    return figure


@styled
def difference_to_best(verdicts: Mapping[str, Verdict], unit: str = "", *, width: float = COLUMN) -> Figure:
    """How much larger the mean error of every method is than that of the best, with interval; filled where it is
    larger beyond chance. Smallest difference on top."""
    order = sorted(verdicts, key=lambda name: verdicts[name].difference, reverse=True)
    figure, axes = _figure(width, _height_of(order))
    limit = _limit([verdict.difference for verdict in verdicts.values()])
    for place, name in enumerate(order):
        verdict = verdicts[name]
        if verdict.difference > limit:
            _beyond(axes, place, verdict.difference)
            continue
        low, high = verdict.difference_interval
        around = [[max(0.0, verdict.difference - low)], [max(0.0, high - verdict.difference)]]
        face = {"markerfacecolor": BLUE if verdict.is_worse else "none", "markeredgewidth": 1.2}
        axes.errorbar(
            verdict.difference,
            place,
            xerr=around,
            fmt="o",
            color=BLUE,
            markersize=4.5,
            capsize=2,
            linewidth=1.2,
            **face,
        )
    axes.axvline(0, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_yticks(range(len(order)), _beside(order, width))
    axes.set(xlabel=axis_label("MAE above the best", unit, 7 * width), ylim=(-0.6, len(order) - 0.4))
    axes.set_xlim(right=min(limit, axes.get_xlim()[1]))
    axes.grid(axis="y", visible=False)
    return figure


@styled
def mae_by_variant(
    errors: Mapping[str, Sequence[Sequence[float]]], variants: Sequence[str], unit: str = "", *, width: float = COLUMN
) -> Figure:
    """MAE in every variant, a line per method with its standard deviation over seeds; the best on average in colours.

    Args:
        errors: by method, for every variant the MAE of each seed.
    """
    figure, axes = _figure(width, 2.5)
    means = {name: np.asarray([np.mean(maes) for maes in each]) for name, each in errors.items()}
    order = sorted(errors, key=lambda name: float(np.nanmean(means[name])))
    places = np.arange(len(variants))
    limit = _limit([float(np.nanmean(means[name])) for name in order])
    for number, name in enumerate(order):
        above = 3 - number / len(order)
        if np.nanmin(means[name]) > limit:
            axes.plot([], [], color="none", label=f"{short(name, 20)}: {np.nanmean(means[name]):.3g}, off the scale")
            continue
        if number < len(PALETTE):
            spread = [np.std(maes, ddof=1) if len(maes) > 1 else 0 for maes in errors[name]]
            bright = {"color": PALETTE[number], "marker": MARKERS[number], "markersize": 3.5, "linewidth": 1.2}
            shifted = places + 0.05 * (number - (min(len(order), len(PALETTE)) - 1) / 2)  # bars beside each other
            axes.plot(shifted, means[name], label=_beside_a_key(name, width), zorder=above, **bright)
            axes.errorbar(shifted, means[name], spread, fmt="none", ecolor=PALETTE[number], capsize=1.5, zorder=above)
        else:
            label = "others" if number == len(PALETTE) else None
            axes.plot(places, means[name], label=label, zorder=above, color=MUTED, alpha=0.7, linewidth=1)
    name_ticks(axes, places, variants, sides="x", room=10.5 * width)
    axes.set(ylabel=axis_label("test MAE", unit), ylim=_ends(axes.get_ylim(), limit))
    _legend(axes)
    return figure


@styled
def error_by_method(
    answers: Mapping[str, tuple[np.ndarray, np.ndarray]],
    ranks: Ranks,
    coloured: int = len(PALETTE),
    *,
    width: float = COLUMN,
) -> Figure:
    """MAE by true value, a line per method; the best `coloured` methods in colours, the others in grey.

    Args:
        answers: by method, best first: (N,) true and (N,) predicted values, those of all seeds one after the other.
    """
    figure, axes = _figure(width, 2.5)
    bins = Bins(ranks)
    limit = _limit([float(np.abs(values - labels).mean()) for labels, values in answers.values()])
    for number, (name, (labels, values)) in enumerate(answers.items()):
        error = np.abs(values - labels)
        means = [error[chosen].mean() if chosen.any() else np.nan for chosen in bins.members(labels)]
        above = 3 - number / len(answers)  # the better, the higher up
        if number < coloured:
            bright = {"color": PALETTE[number], "marker": MARKERS[number], "markersize": 3.5, "linewidth": 1.2}
            label = _beside_a_key(name, width) if np.nanmin(means) <= limit else f"{short(name, 20)}, off the scale"
            axes.plot(bins.places, means, label=label, zorder=above, **bright)
        else:
            others = (
                (_beside_a_key(name, width) if len(answers) == coloured + 1 else "others")
                if number == coloured
                else None
            )
            axes.plot(bins.places, means, label=others, zorder=above, color=MUTED, alpha=0.7, linewidth=0.8)
    axes.set(ylabel=axis_label("test MAE", ranks.unit), ylim=(0, min(limit, axes.get_ylim()[1])))
    bins.label(axes)
    _legend(axes)
    return figure


@styled
def metrics_by_method(
    values: Mapping[str, tuple[Metric, Mapping[str, Sequence[float]]]],
    methods: Sequence[str],
    unit: str = "",
    *,
    width: float = PAGE,
) -> Figure:
    """A panel per metric: mean and standard deviation of every method over its seeds, best MAE on top.

    Args:
        values: by name of the metric, itself and the values of each method, one per seed; a method may lack them.
        methods: from top to bottom.
    """
    panels = [(metric, each) for metric, each in values.values() if each]
    named = [short(name, 26 if width > 2 * COLUMN else 18) for name in methods]
    left = min(0.3 + 0.065 * max(map(len, named)), width / 2)  # inches of the names
    across = min(max(1, int((width - left) / 0.85)), 4, len(panels))
    down = -(-len(panels) // across)
    height = down * (0.75 + 0.16 * len(methods))
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(h_pad=0.07))
    grid = figure.subplots(down, across, squeeze=False, sharey=True)
    for place, axes in enumerate(grid.flat):
        if place >= len(panels):
            axes.set_visible(False)
            continue
        metric, each = panels[place]
        for line, name in enumerate(methods):
            if name in each:
                known = np.asarray(each[name])
                spread = known.std(ddof=1) if len(known) > 1 else 0
                axes.errorbar(
                    known.mean(), line, xerr=spread, fmt="o", color=BLUE, markersize=3, capsize=1.5, linewidth=1
                )
        arrow = "\u2190" if metric.falls else "\u2192"
        title = f"{axis_label(metric.title, unit if metric.in_unit else '')}\u00a0{arrow}"
        axes.set_title("\n".join(textwrap.wrap(title, int(13 * (width - left) / across))))
        axes.set_yticks(range(len(methods)), named)
        axes.xaxis.set_major_locator(even_ticks(3))
        axes.grid(axis="y", visible=False)
    grid.flat[0].set_ylim(len(methods) - 0.4, -0.6)
    return figure


def principal_components(features: np.ndarray) -> tuple[np.ndarray, tuple[float, float]]:
    """The two directions of largest variance.

    Args:
        features: (N, D).

    Returns:
        (N, 2) coordinates, the sign fixed so that equal features give equal maps, and their shares of the variance.
    """
    centred = features - features.mean(axis=0)
    left, scale, right = np.linalg.svd(centred, full_matrices=False)
    points = np.zeros((len(features), 2))
    kept = min(2, len(scale))
    points[:, :kept] = left[:, :kept] * scale[:kept] * np.sign(right[:kept].sum(axis=1) + 1e-12)
    shares = np.zeros(2)
    shares[:kept] = scale[:kept] ** 2 / max((scale**2).sum(), 1e-12)
    return points, (float(shares[0]), float(shares[1]))


class Bins:
    """Bins of true values along an axis: a rank each, evenly spaced, where there are at most `FEW_RANKS`; else that
    many of equal width.

    Attributes:
        places: (K,) the middle of every bin on the axis; width: of each.
        ends: of the axis, without a margin.
    """

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self.few = len(ranks) <= FEW_RANKS
        self.ends: tuple[float, float] = (0, len(ranks) - 1) if self.few else (ranks.values[0], ranks.values[-1])
        edges = np.linspace(self.ends[0], self.ends[1], FEW_RANKS + 1)
        self.places = np.arange(len(ranks)) if self.few else (edges[1:] + edges[:-1]) / 2
        self.width = 1.0 if self.few else edges[1] - edges[0]

    def positions(self, values: np.ndarray) -> np.ndarray:
        """(N,) values -> their places on the axis."""
        return self.ranks.nearest(torch.from_numpy(values)).numpy() if self.few else values

    def members(self, values: np.ndarray) -> list[np.ndarray]:
        """(N,) masks of the values in each bin; those beyond the ends belong to the outer bins."""
        bins = np.floor((self.positions(values) - self.places[0]) / self.width + 0.5)
        bins = np.clip(bins, 0, len(self.places) - 1)
        return [bins == k for k in range(len(self.places))]

    def label(self, axes: Axes) -> None:
        """What the horizontal axis shows: names of ranks where they are few or have names, else values."""
        ranks = self.ranks
        axes.set_xlabel("true rank" if ranks.worded else axis_label("true value", ranks.unit))
        if self.few or ranks.worded:
            named = some_ranks(ranks)
            places = named if self.few else [ranks.values[rank] for rank in named]
            name_ticks(axes, places, [ranks.name(rank) for rank in named], sides="x")
        else:
            axes.xaxis.set_major_locator(even_ticks(most_ticks(ranks)))


def inline_svg(figure: AnyFigure, name: str, title: str) -> str:
    """A figure as an SVG element for an HTML page.

    Args:
        name: prefix of its ids, unique on the page.
        title: what a screen reader says.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    opening, rest = svg.split(">", 1)
    view = re.search(r'viewBox="[^"]*"', opening)
    assert view is not None
    rest = re.sub(r'\b(id=")', rf"\1{name}-", rest)
    rest = re.sub(r'((?:xlink:)?href="#|url\(#)', rf"\1{name}-", rest)
    for colour, variable in THEME.items():
        rest = rest.replace(colour, f"var({variable})")
    return f'<svg role="img" aria-label="{html.escape(title, quote=True)}" {view.group()}>{rest}'


def inches(width: str) -> float:
    """`column`, `page` or millimetres -> the width of a figure.

    >>> inches("column"), round(inches("84 mm"), 2)
    (3.3, 3.31)

    Raises:
        ValueError: another word, or a width that figures are not drawn for.
    """
    named = {"column": COLUMN, "page": PAGE}
    number = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:mm)?", width)
    if width in named:
        return named[width]
    if number is None or not NARROWEST <= float(number[1]) <= WIDEST:
        raise ValueError(
            f"the width of figures must be column ({COLUMN} inches), page ({PAGE}) or millimetres from {NARROWEST} to "
            f"{WIDEST}, as in 85mm; got {printable(width)!r}"
        )
    return float(number[1]) / 25.4


def save_figure(figure: AnyFigure, path: Path) -> None:
    """Write a figure on white, as PDF, SVG or PNG by the ending of `path`.

    Raises:
        FileExistsError: there is a file that is none of ours: see `check_free`.
    """
    check_free(path)
    ending = path.suffix[1:]
    marks = {"Software": WRITER} if ending == "png" else {"Creator": WRITER}
    undated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {}}[ending]
    with matplotlib.rc_context(STYLE), whole(path) as aside:
        figure.savefig(aside, facecolor="white", dpi=300, format=ending, metadata={**marks, **undated})


def check_free(path: Path) -> None:
    """Raises:
    FileExistsError: what is there was not written by `save_figure`, which marks its files."""
    if path.exists() and not (path.is_file() and WRITER.encode() in path.read_bytes()):
        raise FileExistsError(f"{path} is there and no figure of ours: it may be yours; choose another folder")


def _figure(width: float, height: float, panels: int = 1, **options: Any) -> tuple[Figure, Any]:
    ratios = options.pop("height_ratios", None)
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(panels, 1, height_ratios=ratios, **options)


def _square(width: float, height: float) -> tuple[Figure, Any]:
    """A figure of one axes whose sides are to be equal, so high in a column."""
    figure = Figure(figsize=(width, height * _growth(width)), layout="compressed")
    return figure, figure.subplots()


def _growth(width: float) -> float:
    """How much higher than in a column a square is: half as high again at most."""
    return min(1.5, width / COLUMN)


def _limit(errors: Sequence[float]) -> float:
    """Where an axis ends when some methods are so far off that the others could not be told apart."""
    far = 3 * float(np.median(errors))
    return far if len(errors) > 4 and max(errors) > far > 0 else np.inf


def _ends(around: tuple[float, float], limit: float) -> tuple[float, float]:
    """Of an axis of errors: from 0, unless all of them are far from it and would be one there."""
    low, high = around[0], min(limit, around[1])
    return (low if low > high / 2 else 0), high


def _beyond(axes: Axes, place: int, value: float) -> None:
    """A value that lies beyond the end of the axis, as text at its end, wherever that will be."""
    end = axes.get_yaxis_transform()
    axes.text(0.99, place, f"{value:.3g} \u2192", ha="right", va="center", color=MUTED, transform=end)


def _height_of(lines: Sequence[str]) -> float:
    """Inches for a line of text each."""
    return max(1.6, 0.65 + 0.26 * min(len(lines), 8) + 0.17 * max(0, len(lines) - 8))


def _legend(axes: Axes) -> None:
    """A legend above the axes, where it hides nothing; in as many columns as the texts leave room for."""
    texts = axes.get_legend_handles_labels()[1]
    figure = axes.get_figure(root=True)
    assert isinstance(figure, Figure)
    columns = int((figure.get_figwidth() - 0.5) / (0.4 + 0.055 * max(map(len, texts))))
    lines = -(-len(texts) // max(1, columns))
    figure.set_figheight(figure.get_figheight() + 0.14 * (lines - 1))  # not at the axes' expense
    above: Any = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2}
    axes.legend(ncols=-(-len(texts) // lines), columnspacing=1.2, labelspacing=0.3, **above)


def bare(axes: Axes) -> None:
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _beside(names: Sequence[str], width: float) -> list[str]:
    """Names beside the axes of a figure so wide, which take half of it at most."""
    return [short(name, min(40, int(8 * width))) for name in names]


def _beside_a_key(name: str, width: float) -> str:
    """A name in the legend of a figure so wide."""
    return short(name, min(40, int(9.5 * width)))


def some_ranks(ranks: Ranks) -> list[int]:
    """The ranks that an axis names, evenly spaced: all where they are few."""
    return list(range(0, len(ranks), 1 if len(ranks) <= FEW_RANKS else -(-(len(ranks) - 1) // (TICKS - 1))))


def even_ticks(most: int, integer: bool = False) -> MaxNLocator:
    """Ticks at round numbers, which people count in."""
    return MaxNLocator(most, steps=[1, 2, 2.5, 5, 10], integer=integer)


def most_ticks(ranks: Ranks) -> int:
    """How many ticks at values fit below an axes: fewer of long numbers, which would touch."""
    return 5 if max(map(abs, ranks.values)) < 1e5 else 4


def name_ticks(
    axes: Axes, ticks: Sequence[float] | np.ndarray, names: Sequence[str], sides: str = "xy", room: float | None = None
) -> None:
    """Names along one side or both; below the axes in several lines, or slanted, when they would touch.

    Args:
        room: characters that fit below the axes side by side; None: below axes as wide as the figure.
    """
    figure = axes.get_figure(root=True)
    assert isinstance(figure, Figure)
    room = room or 9.2 * figure.get_figwidth()
    shortened = [short(name) for name in names]
    lines = [textwrap.wrap(name, max(1, int(room / len(names))), break_long_words=False) for name in shortened]
    slanted = len(names) * max(len(line) for each in lines for line in each) > room
    below = shortened if slanted else ["\n".join(each) for each in lines]
    turned: Any = {
        "rotation": 40 if len(names) <= 8 else 60,
        "ha": "right",
        "rotation_mode": "anchor",
    }  # ends at the tick
    axes.set_xticks(ticks, below, **(turned if slanted else {}))
    if "y" in sides:
        axes.set_yticks(ticks, shortened)


def axis_label(what: str, unit: str, room: float = math.inf) -> str:
    """What an axis shows and its unit, in two lines where it has more characters than there is room for."""
    if not unit:
        return what
    unit = f"({short(unit)})"
    return f"{what} {unit}" if len(what) + 1 + len(unit) <= room else f"{what}\n{unit}"


def short(name: str, longest: int = 16) -> str:
    name = printable(name)
    return name if len(name) <= longest else name[: longest - 1] + "…"
