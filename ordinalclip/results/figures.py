"""Figures: pure functions from arrays to matplotlib figures in one style, for reports, PDF and PNG.

Colours are safe for colour-blind readers (Okabe & Ito) and readable on white and on black. `inline_svg` turns a
figure into SVG whose ink follows the page's light or dark theme through the CSS variables in `THEME`.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from PIL import Image

from ordinalclip.files import whole
from ordinalclip.metrics import Metric
from ordinalclip.quoting import printable
from ordinalclip.ranks import Ranks
from ordinalclip.results.significance import LEVEL, Verdict

INK, MUTED, GRID, BLUE, ORANGE = "#1b1f24", "#66707c", "#dfe3e8", "#0072b2", "#e69f00"
PALETTE = (BLUE, ORANGE, "#009e73", "#cc79a7", "#d55e00", "#56b4e9")
MARKERS = "osD^vX"  # with the colours: two blues are one in the dark
THEME = {INK: "--ink", MUTED: "--muted", GRID: "--grid", BLUE: "--blue"}
VALUE_COLOURS = LinearSegmentedColormap.from_list("values", matplotlib.colormaps["viridis"](np.linspace(0.2, 0.92, 64)))
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.labelsize": 10,
    "text.color": INK,
    "text.parse_math": False,  # names and units are text, whatever dollars they hold
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "figure.facecolor": "none",
    "figure.constrained_layout.use": True,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "ordinalclip",
    "pdf.fonttype": 42,
}
WIDTH = 5.0  # inches: at this width a figure reads well on a phone and in half a page
styled = matplotlib.rc_context(STYLE)


@styled
def agreement(labels: np.ndarray, values: np.ndarray, unit: str = "") -> Figure:
    """Predicted against true values, (N,) each, with the identity line; hexagons when there are many points."""
    figure, axes = _figure(4.4)
    low, high = min(labels.min(), values.min()), max(labels.max(), values.max())
    margin = 0.04 * (high - low or 1)
    bounds = (low - margin, high + margin)
    axes.plot(bounds, bounds, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    if len(labels) > 3000:
        cells = axes.hexbin(labels, values, gridsize=36, bins="log", mincnt=1, cmap=VALUE_COLOURS, extent=bounds * 2)
        figure.colorbar(cells, ax=axes, label="images", shrink=0.8).outline.set_visible(False)
    else:
        axes.scatter(labels, values, s=16, color=BLUE, alpha=0.55, linewidths=0, zorder=2)
    axes.set(xlim=bounds, ylim=bounds, aspect="equal")
    axes.set(xlabel=_label("true value", unit), ylabel=_label("predicted value", unit))
    return figure


@styled
def confusion(label_ranks: np.ndarray, ranks: np.ndarray, names: Sequence[str]) -> Figure:
    """Confusion matrix of ranks, (N,) each: numbers of images, shaded by their share of the true rank."""
    figure, axes = _figure(4.4)
    counts = np.zeros((len(names), len(names)), dtype=int)
    np.add.at(counts, (label_ranks, ranks), 1)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1, interpolation="none")
    for (row, column), count in np.ndenumerate(counts):
        dark = share[row, column] > 0.55
        axes.text(column, row, str(count), ha="center", va="center", color="#ffffff" if dark else "#16191d")
    _name_ticks(axes, range(len(names)), names)
    axes.set(xlabel="predicted rank", ylabel="true rank")
    _bare(axes)
    return figure


@styled
def error_by_value(labels: np.ndarray, values: np.ndarray, ranks: Ranks, train_counts: Sequence[int]) -> Figure:
    """Mean absolute error and bias by true value, above the number of training labels.

    Args:
        labels, values: (N,) true and predicted values.
        train_counts: (R,) number of training labels of each rank.
    """
    figure, (top, bottom) = _figure(4.4, panels=2, height_ratios=(3, 1), sharex=True)
    edges = value_bins(ranks)
    middles, widths = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
    errors, half, bias = (np.full(len(middles), np.nan) for _ in range(3))
    for k, chosen in enumerate(_members(labels, edges)):
        if chosen.any():
            error = np.abs(values[chosen] - labels[chosen])
            errors[k], bias[k] = error.mean(), (values[chosen] - labels[chosen]).mean()
            half[k] = 1.96 * error.std(ddof=1) / len(error) ** 0.5 if len(error) > 1 else np.nan
    top.bar(middles, errors, 0.86 * widths, color=BLUE, alpha=0.8, label="mean absolute error")
    top.errorbar(middles, errors, half, fmt="none", ecolor=INK, elinewidth=1)
    top.plot(middles, bias, color=ORANGE, marker="o", markersize=4, linewidth=1.4, label="bias")
    top.axhline(0, color=MUTED, linewidth=0.8)
    top.set_ylabel(_label("error", ranks.unit))
    top.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2, columnspacing=1.2)
    per_bin = [np.asarray(train_counts)[chosen].sum() for chosen in _members(np.asarray(ranks.values), edges)]
    bottom.bar(middles, per_bin, 0.86 * widths, color=MUTED, alpha=0.6)
    bottom.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    bottom.set(xlabel=_label("true value", ranks.unit), ylabel="training\nimages")
    figure.align_ylabels()
    return figure


@styled
def similarity(prototypes: np.ndarray, ranks: Ranks) -> Figure:
    """Cosine similarity of the rank prototypes, (R, D), as a matrix."""
    figure, axes = _figure(4.4)
    unit = prototypes / np.linalg.norm(prototypes, axis=1, keepdims=True)
    picture = axes.imshow(unit @ unit.T, cmap="viridis", interpolation="none")
    ticks = np.unique(np.linspace(0, len(ranks) - 1, min(len(ranks), 6)).round().astype(int))
    _name_ticks(axes, ticks.tolist(), [ranks.name(rank) for rank in ticks])
    axes.set(xlabel=_label("rank", ranks.unit), ylabel=_label("rank", ranks.unit))
    _bare(axes)
    figure.colorbar(picture, ax=axes, label="cosine similarity", shrink=0.8).outline.set_visible(False)
    return figure


@styled
def feature_map(
    features: np.ndarray, values: np.ndarray, images: Sequence[Image.Image], ranks: Ranks, thumbnail: float = 0.07
) -> Figure:
    """Features in their two principal components, with thumbnails framed in the colour of their value.

    Args:
        features: (N, D) image features.
        values: (N,) values that colour them.
        images: N square thumbnails; as many are drawn as fit without overlap, dots for the rest.
        thumbnail: side of a thumbnail as a share of the height.
    """
    figure, (axes, bar) = _figure(4.9, panels=2, height_ratios=(28, 1))
    points, explained = principal_components(features)
    first, second = explained
    axes.set(xlabel=f"first component, {first:.0%} of the variance", ylabel=f"second component, {second:.0%}")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(ranks.values[0], ranks.values[-1]), VALUE_COLOURS)
    figure.colorbar(scale, cax=bar, orientation="horizontal", label=_label("true value", ranks.unit))
    bar.spines[:].set_visible(False)
    figure.draw_without_rendering()  # from here on the axes have their final size
    box = axes.get_window_extent()
    side = np.asarray([thumbnail * box.height / box.width, thumbnail])  # a square, in units of the axes

    low, high = points.min(axis=0), points.max(axis=0)
    places = (points - low) / np.where(high > low, high - low, 1)
    colours = VALUE_COLOURS(_share(values, ranks))
    axes.scatter(*places.T, s=9, c=colours, linewidths=0, alpha=0.9)
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
def learning_curves(log: Sequence[Mapping[str, float]], best_step: int | None, unit: str = "") -> Figure:
    """Training loss and validation MAE of the entries of log.jsonl; the best step is marked."""
    validated = [entry for entry in log if "validation_mae" in entry]
    figure, axes = _figure(4.4, panels=2 if validated else 1, sharex=True)
    top = axes[0] if validated else axes
    steps, loss = np.asarray([entry["step"] for entry in log]), np.asarray([entry["loss"] for entry in log])
    window = max(1, len(loss) // 40)
    top.plot(steps, loss, color=BLUE, alpha=0.35 if window > 1 else 1, linewidth=1)
    if window > 1:
        smooth = np.convolve(loss, np.ones(window) / window, mode="valid")
        top.plot(steps[window - 1 :], smooth, color=BLUE, linewidth=1.8, label=f"mean of {window} steps")
        top.legend(loc="upper right")
    top.set_ylabel("training loss")
    if validated:
        evaluated, errors = [entry["step"] for entry in validated], [entry["validation_mae"] for entry in validated]
        axes[1].plot(evaluated, errors, color=ORANGE, marker="o", markersize=4, linewidth=1.6)
        if best_step in evaluated:
            chosen = {"linestyle": (0, (4, 3)), "label": f"model: step {best_step}"}
            axes[1].axvline(best_step, color=MUTED, linewidth=1, **chosen)
            axes[1].legend(loc="best")
        axes[1].set_ylabel(_label("validation MAE", unit))
        axes[1].set_ylim(bottom=0)
        figure.align_ylabels()
    below = axes[1] if validated else axes
    below.set_xlabel("step")
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


@styled
def best_so_far(numbers: Sequence[int], maes: Sequence[float], pruned: Sequence[bool], unit: str = "") -> Figure:
    """Validation MAE of the trials of a search, and the smallest so far of those that were not pruned."""
    figure, axes = _figure(3.4)
    values = _trial_points(axes, np.asarray(numbers), np.asarray(maes), np.asarray(pruned, dtype=bool))
    known = np.minimum.accumulate(np.where(pruned, np.inf, values))
    axes.step(
        numbers, np.where(np.isinf(known), np.nan, known), where="post", color=ORANGE, linewidth=1.6, label="best"
    )
    axes.set(xlabel="trial", ylabel=_label("validation MAE", unit))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2, columnspacing=1.2)
    return figure


@styled
def importances(shares: Mapping[str, float]) -> Figure:
    """How much of what separates good trials from bad ones is due to each key; largest on top."""
    order = sorted(shares, key=lambda key: shares[key])
    figure, axes = _figure(_height_of(order))
    axes.barh(range(len(order)), [shares[key] for key in order], 0.6, color=BLUE, alpha=0.8)
    axes.set_yticks(range(len(order)), [_short(key, 34) for key in order])
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
) -> Figure:
    """Validation MAE of the trials of a search by what they set a key to, numbers or choices.

    Args:
        log: a logarithmic axis of numbers.
    """
    figure, axes = _figure(3.0)
    names = [] if any(not isinstance(value, str) for value in values) else list(dict.fromkeys(sorted(map(str, values))))
    places = [names.index(str(value)) if names else float(value) for value in values]
    if names:
        axes.set_xticks(range(len(names)), [_short(name) for name in names])
        axes.set_xlim(-0.6, len(names) - 0.4)
    elif log:
        axes.set_xscale("log")
        few = max(map(float, values)) < 100 * min(map(float, values))  # decades alone would be a tick or two
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    _trial_points(axes, np.asarray(places), np.asarray(maes), np.asarray(pruned, dtype=bool))
    axes.set(xlabel=printable(key), ylabel=_label("validation MAE", unit))
    return figure


@styled
def validations_by_trial(
    curves: Sequence[Sequence[tuple[int, float]]], pruned: Sequence[bool], best: int, unit: str = ""
) -> Figure:
    """Validation MAE on the way of every trial of a search.

    Args:
        curves: of every trial, pairs (number of the validation, MAE).
        pruned: whether it was ended early, at its last point.
        best: place of the best one, -1 for none.
    """
    figure, axes = _figure(3.4)
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
    axes.set(xlabel="validation", ylabel=_label("validation MAE", unit))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2, columnspacing=1.2)
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
def mae_by_method(errors: Mapping[str, Sequence[float]], unit: str = "") -> Figure:
    """MAE of every method: a dot per seed, their mean and standard deviation; best on top."""
    order = sorted(errors, key=lambda name: float(np.mean(errors[name])), reverse=True)
    figure, axes = _figure(_height_of(order))
    limit = _limit([float(np.mean(errors[name])) for name in order])
    for place, name in enumerate(order):
        maes = np.asarray(errors[name])
        if maes.mean() > limit:
            _beyond(axes, limit, place, maes.mean())
            continue
        spread = maes.std(ddof=1) if len(maes) > 1 else 0
        axes.errorbar(maes.mean(), place, xerr=spread, fmt="o", color=BLUE, markersize=6, capsize=3, linewidth=1.6)
        axes.scatter(maes, np.full(len(maes), place + 0.24), s=11, color=ORANGE, linewidths=0, zorder=3)
    axes.set_yticks(range(len(order)), [_short(name, 34) for name in order])
    axes.set(xlabel=_label("test MAE", unit), xlim=(0, min(limit, axes.get_xlim()[1])), ylim=(-0.6, len(order) - 0.4))
    axes.grid(axis="y", visible=False)
    return figure


@styled
def difference_to_best(verdicts: Mapping[str, Verdict], unit: str = "") -> Figure:
    """How much larger the mean error of every method is than that of the best, with interval; filled where it is
    larger beyond chance. Smallest difference on top."""
    order = sorted(verdicts, key=lambda name: verdicts[name].difference, reverse=True)
    figure, axes = _figure(_height_of(order))
    limit = _limit([verdict.difference for verdict in verdicts.values()])
    for place, name in enumerate(order):
        verdict = verdicts[name]
        if verdict.difference > limit:
            _beyond(axes, limit, place, verdict.difference)
            continue
        low, high = verdict.difference_interval
        sure = verdict.p_holm is not None and verdict.p_holm < LEVEL
        around = [[max(0.0, verdict.difference - low)], [max(0.0, high - verdict.difference)]]
        face = {"markerfacecolor": BLUE if sure else "none", "markeredgewidth": 1.6}
        axes.errorbar(
            verdict.difference, place, xerr=around, fmt="o", color=BLUE, markersize=6, capsize=3, linewidth=1.6, **face
        )
    axes.axvline(0, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_yticks(range(len(order)), [_short(name, 34) for name in order])
    axes.set(xlabel=_label("MAE above the best", unit), ylim=(-0.6, len(order) - 0.4))
    axes.set_xlim(right=min(limit, axes.get_xlim()[1]))
    axes.grid(axis="y", visible=False)
    return figure


@styled
def mae_by_variant(errors: Mapping[str, Sequence[Sequence[float]]], variants: Sequence[str], unit: str = "") -> Figure:
    """MAE in every variant, a line per method with its standard deviation over seeds; the best on average in colours.

    Args:
        errors: by method, for every variant the MAE of each seed.
    """
    figure, axes = _figure(3.6)
    means = {name: np.asarray([np.mean(maes) for maes in each]) for name, each in errors.items()}
    order = sorted(errors, key=lambda name: float(np.nanmean(means[name])))
    places = np.arange(len(variants))
    limit = _limit([float(np.nanmean(means[name])) for name in order])
    for number, name in enumerate(order):
        above = 3 - number / len(order)
        if np.nanmin(means[name]) > limit:
            axes.plot([], [], " ", label=f"{_short(name, 20)}: {np.nanmean(means[name]):.3g}, off the scale")
            continue
        if number < len(PALETTE):
            spread = [np.std(maes, ddof=1) if len(maes) > 1 else 0 for maes in errors[name]]
            bright = {"color": PALETTE[number], "marker": MARKERS[number], "markersize": 4.5, "linewidth": 1.6}
            shifted = places + 0.02 * (number - (min(len(order), len(PALETTE)) - 1) / 2)  # bars beside each other
            axes.errorbar(shifted, means[name], spread, label=_short(name, 34), zorder=above, capsize=2, **bright)
        else:
            label = "others" if number == len(PALETTE) else None
            axes.plot(places, means[name], label=label, zorder=above, color=MUTED, alpha=0.7, linewidth=1)
    axes.set_xticks(places, [_short(name) for name in variants])
    axes.set(ylabel=_label("test MAE", unit), ylim=(0, min(limit, axes.get_ylim()[1])))
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2, columnspacing=1.2)
    return figure


@styled
def error_by_method(
    answers: Mapping[str, tuple[np.ndarray, np.ndarray]], ranks: Ranks, coloured: int = len(PALETTE)
) -> Figure:
    """MAE by true value, a line per method; the best `coloured` methods in colours, the others in grey.

    Args:
        answers: by method, best first: (N,) true and (N,) predicted values, those of all seeds one after the other.
    """
    figure, axes = _figure(3.6)
    edges = value_bins(ranks)
    middles = (edges[1:] + edges[:-1]) / 2
    for number, (name, (labels, values)) in enumerate(answers.items()):
        error = np.abs(values - labels)
        means = [error[chosen].mean() if chosen.any() else np.nan for chosen in _members(labels, edges)]
        above = 3 - number / len(answers)  # the better, the higher up
        if number < coloured:
            bright = {"color": PALETTE[number], "marker": MARKERS[number], "markersize": 4.5, "linewidth": 1.6}
            axes.plot(middles, means, label=_short(name, 34), zorder=above, **bright)
        else:
            label = (_short(name, 34) if len(answers) == coloured + 1 else "others") if number == coloured else None
            axes.plot(middles, means, label=label, zorder=above, color=MUTED, alpha=0.7, linewidth=1)
    limit = _limit([float(np.abs(values - labels).mean()) for labels, values in answers.values()])
    top = min(limit, axes.get_ylim()[1])
    axes.set(xlabel=_label("true value", ranks.unit), ylabel=_label("test MAE", ranks.unit), ylim=(0, top))
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2, columnspacing=1.2)
    return figure


@styled
def metrics_by_method(
    values: Mapping[str, tuple[Metric, Mapping[str, Sequence[float]]]], methods: Sequence[str], unit: str = ""
) -> Figure:
    """A panel per metric: mean and standard deviation of every method over its seeds, best MAE on top.

    Args:
        values: by name of the metric, itself and the values of each method, one per seed; a method may lack them.
        methods: from top to bottom.
    """
    panels = [(metric, each) for metric, each in values.values() if each]
    across = min(4, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(2 * WIDTH, down * (0.9 + 0.2 * len(methods))), layout=ConstrainedLayoutEngine(h_pad=0.1))
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
                    known.mean(), line, xerr=spread, fmt="o", color=BLUE, markersize=4, capsize=2, linewidth=1.2
                )
        arrow = "\u2190" if metric.falls else "\u2192"
        axes.set_title(f"{_label(metric.title, unit if metric.in_unit else '')} {arrow}", fontsize=10)
        axes.set_yticks(range(len(methods)), [_short(name, 26) for name in methods])
        axes.xaxis.set_major_locator(MaxNLocator(3))
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


def value_bins(ranks: Ranks, most: int = 12) -> np.ndarray:
    """Edges of bins of true values: one per rank when there are few, else `most` of equal width."""
    values = np.asarray(ranks.values)
    if len(values) <= most:
        middles = (values[1:] + values[:-1]) / 2
        return np.concatenate([[2 * values[0] - middles[0]], middles, [2 * values[-1] - middles[-1]]])
    return np.linspace(values[0], values[-1], most + 1)


def inline_svg(figure: Figure, name: str, title: str) -> str:
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


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure on white, as PDF or PNG by the ending of `path`."""
    with matplotlib.rc_context(STYLE), whole(path) as aside:
        figure.savefig(aside, facecolor="white", dpi=200, format=path.suffix[1:])


def _figure(height: float, panels: int = 1, **options: Any) -> tuple[Figure, Any]:
    ratios = options.pop("height_ratios", None)
    figure = Figure(figsize=(WIDTH, height))
    return figure, figure.subplots(panels, 1, height_ratios=ratios, **options)


def _limit(errors: Sequence[float]) -> float:
    """Where an axis ends when some methods are so far off that the others could not be told apart."""
    far = 3 * float(np.median(errors))
    return far if len(errors) > 4 and max(errors) > far > 0 else np.inf


def _beyond(axes: Axes, limit: float, place: int, value: float) -> None:
    """A value that lies beyond the end of the axis, as text."""
    axes.text(0.98 * limit, place, f"{value:.3g} \u2192", ha="right", va="center", color=MUTED)


def _height_of(lines: Sequence[str]) -> float:
    """Inches for a line of text each."""
    return max(2.2, 0.9 + 0.34 * min(len(lines), 8) + 0.22 * max(0, len(lines) - 8))


def _bare(axes: Axes) -> None:
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _name_ticks(axes: Axes, ticks: Sequence[int], names: Sequence[str]) -> None:
    """Rank names along both sides of a matrix, slanted below it when they would touch."""
    shortened = [_short(name) for name in names]
    slanted = len(names) * max(map(len, shortened)) > 36
    axes.set_xticks(ticks, shortened, rotation=40 if slanted else 0, ha="right" if slanted else "center")
    axes.set_yticks(ticks, shortened)


def _label(what: str, unit: str) -> str:
    return f"{what} ({printable(unit)})" if unit else what


def _short(name: str, longest: int = 16) -> str:
    name = printable(name)
    return name if len(name) <= longest else name[: longest - 1] + "…"


def _members(values: np.ndarray, edges: np.ndarray) -> list[np.ndarray]:
    """(N,) masks of the values in each bin; those beyond the ends belong to the outer bins."""
    places = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
    return [places == k for k in range(len(edges) - 1)]


def _share(values: np.ndarray, ranks: Ranks) -> np.ndarray:
    return (values - ranks.values[0]) / (ranks.values[-1] - ranks.values[0])
