"""The figure of an explanation, in the style of `figures`."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from PIL import Image

from ordinalclip.quoting import printable
from ordinalclip.ranks import Ranks
from ordinalclip.results.figures import (
    BLUE,
    COLUMN,
    FEW_RANKS,
    INK,
    MUTED,
    ORANGE,
    Figure,
    axis_label,
    even_ticks,
    most_ticks,
    name_ticks,
    short,
    some_ranks,
    styled,
)

SIGNED_COLOURS = LinearSegmentedColormap.from_list("signed", [BLUE, "#f2f2f2", "#d55e00"])


@styled
def explanation(
    title: str,
    picture: Image.Image,
    maps: Mapping[str, tuple[np.ndarray, str]],
    ranks: Ranks,
    answer: float,
    probabilities: np.ndarray | None = None,
    interval: tuple[float, float, str] | None = None,
    neighbors: Sequence[tuple[Image.Image, str]] = (),
    bases: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
    notes: Sequence[str] = (),
    *,
    width: float = COLUMN,
) -> Figure:
    """Why a model answers what it answers: maps over the picture, the distribution, training pictures, base ranks.

    Args:
        maps: by name a signed map (S, S) over the picture, and of what its colours are the label's unit.
        answer: in label units.
        probabilities: (R,).
        interval: low and high in label units, and what it is, in words.
        neighbors: pictures with what they are.
        bases: of the base ranks, (K,) each: places in label units, shares of the distribution and of a flat one.
        notes: sentences below.
    """
    lines = [line for note in notes for line in textwrap.wrap(printable(note), int(58 * width / COLUMN))]
    rows = {"maps": 1.72}
    if probabilities is not None:
        rows["distribution"] = (1.25 if bases is None else 2.0) + 0.45 * ranks.worded  # for long names
    if neighbors:
        rows["neighbors"] = 0.92 if len(neighbors) > 3 else 1.35
    if lines:
        rows["notes"] = 0.08 + 0.125 * len(lines)
    figure = Figure(figsize=(width, 0.25 + sum(rows.values())))
    figure.suptitle(short(title, int(40 * width / COLUMN)), x=0.02, ha="left", fontsize=9)
    found = figure.subfigures(len(rows), 1, height_ratios=list(rows.values()), squeeze=False)[:, 0]
    panels = dict(zip(rows, found, strict=True))
    _maps(panels["maps"], picture, maps, ranks.unit)
    if probabilities is not None:
        _distribution(panels["distribution"], ranks, answer, probabilities, interval, bases)
    if neighbors:
        shown = panels["neighbors"].subplots(1, max(6 if len(neighbors) > 3 else 3, len(neighbors)))
        panels["neighbors"].suptitle("nearest training pictures, nearest first", x=0.02, ha="left", fontsize=7.5)
        for axes in shown:
            _hidden(axes)
        for axes, (image, label) in zip(shown, neighbors, strict=False):
            axes.imshow(np.asarray(image), interpolation="none")
            axes.set_title(short(label, int(9 * width / COLUMN)), fontsize=6.5, pad=2)
    if lines:
        panels["notes"].text(0.02, 1, "\n".join(lines), fontsize=6.5, color=MUTED, va="top", ha="left")
    return figure


def _maps(panel: Any, picture: Image.Image, maps: Mapping[str, tuple[np.ndarray, str]], unit: str) -> None:
    """The picture, and each map over it in grey: the stronger, the less of the picture is seen through it."""
    shown, bars = panel.subplots(2, 3, height_ratios=(18, 1))
    for axes in (*shown, *bars):
        _hidden(axes)
    shown[0].imshow(np.asarray(picture), interpolation="none")
    shown[0].set_title("as it is seen", fontsize=6.5, pad=3)
    grey = np.asarray(picture.convert("L"), dtype=np.float64)[..., None] / 255
    for axes, bar, (name, (signed, of)) in zip(shown[1:], bars[1:], maps.items(), strict=False):
        most = float(np.abs(signed).max()) or 1.0
        strength = (np.abs(signed) / most)[..., None] ** 0.7
        colours = SIGNED_COLOURS(np.where(signed > 0, 1.0, 0.0))[..., :3]
        axes.imshow((1 - strength) * (0.35 + 0.5 * grey) + strength * colours, interpolation="none", vmin=0, vmax=1)
        axes.set_title(name, fontsize=6.5, pad=3)
        bar.set_axis_on()
        scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(-most, most), SIGNED_COLOURS)
        drawn = panel.colorbar(scale, cax=bar, orientation="horizontal")
        drawn.outline.set_visible(False)
        drawn.set_ticks([-most, 0, most], labels=[f"\u2212{most:.2g}", "0", f"+{most:.2g}"])
        bar.tick_params(length=0, labelsize=7, pad=1)
        bar.get_xticklabels()[0].set_ha("left")
        bar.get_xticklabels()[2].set_ha("right")
        bar.set_xlabel(f"{short(unit)}\n{of}".strip(), fontsize=6.5, labelpad=1)


def _distribution(
    panel: Any,
    ranks: Ranks,
    answer: float,
    probabilities: np.ndarray,
    interval: tuple[float, float, str] | None,
    bases: tuple[np.ndarray, np.ndarray, np.ndarray] | None,
) -> None:
    """The distribution, and below it on the same axis what the base ranks contribute, if there are any."""
    few = len(ranks) <= FEW_RANKS
    values = np.asarray(ranks.values)
    places = np.arange(len(ranks)) if few else values
    gap = 1.0 if few else float(np.diff(values).min())
    top, *below = np.atleast_1d(panel.subplots(1 if bases is None else 2, 1, sharex=True))

    def place(value: Any) -> Any:
        return np.interp(value, values, places)

    top.bar(places, probabilities, 0.86 * gap, color=BLUE, linewidth=0)
    handles = [top.axvline(place(answer), color=ORANGE, linewidth=1.4, label="answer")]
    if interval is not None:
        low, high, label = interval
        # An end that is a rank takes its bar along, and so does the edge of a bin beyond the last one.
        low_bar, high_bar = (
            gap / 2 if end in ranks.values or not values[0] <= end <= values[-1] else 0.0 for end in (low, high)
        )
        ends = place(low) - low_bar, place(high) + high_bar
        handles.append(top.axvspan(*ends, color=MUTED, alpha=0.18, linewidth=0, zorder=0, label=label))
    above: Any = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2, "ncols": 2, "handlelength": 1.2}
    top.legend(handles=handles, fontsize=6.5, **above)
    top.set_ylabel("probability", fontsize=7)
    if bases is not None:
        where, shares, flat = bases
        apart = np.diff(place(where)).min() if len(where) > 1 else gap
        half = min(0.3 * apart, 0.03 * np.ptp(places))
        below[0].bar(place(where), shares, 2 * half, color=MUTED, linewidth=0)
        below[0].hlines(flat, place(where) - half, place(where) + half, color=INK, linewidth=0.8)
        below[0].set_ylabel("base\nranks", fontsize=7)
        below[0].set_ylim(0, None)
        panel.align_ylabels()
    for axes in (top, *below):
        axes.yaxis.set_major_locator(even_ticks(3))
    last = below[0] if below else top
    margin = 0.6 * gap + 0.01 * np.ptp(places)
    last.set_xlim(places[0] - margin, places[-1] + margin)
    last.set_xlabel("rank" if ranks.worded else axis_label("value", ranks.unit))
    if few or ranks.worded:
        named = some_ranks(ranks)
        name_ticks(last, [places[rank] for rank in named], [ranks.name(rank) for rank in named], sides="x")
    else:
        last.xaxis.set_major_locator(even_ticks(most_ticks(ranks)))


def _hidden(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[])
    axes.set_axis_off()
