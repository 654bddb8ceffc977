"""Pictures of a generator in a grid: samples, reconstructions, edits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from baselines.large.inputs import numbers
from ordinalclip.results.figures import PAGE, Figure, styled

GAP = 0.06  # between pictures, as a share of their width
LETTER = 0.08  # inches that a letter of a name takes, at most on average


@styled
def picture_grid(pictures: Tensor | Sequence[Tensor], rows: Sequence[str] = (), columns: Sequence[str] = ()) -> Figure:
    """Pictures in rows and columns, which may have names: a figure at most as wide as two columns of a paper.

    Args:
        pictures: (R, C, 3, H, W) in [-1, 1], as generators give them, or a list of R rows (C, 3, H, W); what is beyond
            is clipped.
        rows: R names, left of the rows; none: no names.
        columns: C names, above the columns, which grow with them up to the width of the figure.

    Raises:
        ValueError: pictures of other shapes, numbers that are not finite, or another number of names.
    """
    if not isinstance(pictures, Tensor):
        listed = [numbers(row, "a row of pictures", "C 3 H W") for row in pictures]
        if not listed:
            raise ValueError("no rows of pictures to draw")
        if len({row.shape for row in listed}) > 1:
            raise ValueError(f"rows of pictures must be of one shape, got {[tuple(row.shape) for row in listed]}")
        pictures = torch.stack(listed)
    grid = numbers(pictures, "pictures", "R C 3 H W").detach().cpu()
    if grid.shape[2] != 3:
        raise ValueError(f"pictures must have 3 channels, (R, C, 3, H, W), got shape {tuple(grid.shape)}")
    for kind, names, count in (("rows", rows, len(grid)), ("columns", columns, grid.shape[1])):
        if len(names) not in (0, count):
            raise ValueError(f"{kind} must be {count} names, one for each, or none; got {len(names)}")
    shape, (height, width) = grid.shape[:2], grid.shape[3:]
    room = 0.2 + LETTER * _longest(rows)  # inches, left of the pictures
    side = min(max(0.7, LETTER * _longest(columns)), (PAGE - room) / shape[1])  # inches of a column
    tall = height / width  # of a picture, in columns
    figure = Figure(figsize=(shape[1] * side + room, shape[0] * tall * side + 0.4))
    axes = figure.add_subplot()
    pixels = ((grid.clamp(-1, 1) + 1) / 2).permute(0, 1, 3, 4, 2).numpy()
    for row, column in ((row, column) for row in range(shape[0]) for column in range(shape[1])):
        left, top = column, row * tall
        place = (left, left + 1 - GAP, top + tall - GAP, top)
        axes.imshow(pixels[row, column], extent=place, interpolation="nearest")
    axes.set(xlim=(0, shape[1] - GAP), ylim=(shape[0] * tall - GAP, 0), aspect="equal")
    for place_names, names, step in ((axes.set_xticks, columns, 1.0), (axes.set_yticks, rows, tall)):
        place_names([(place + 0.5) * step - GAP / 2 for place in range(len(names))], [*names])
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    return figure


def _longest(names: Sequence[str]) -> int:
    """Letters of the longest line."""
    return max((len(line) for name in names for line in name.split("\n")), default=0)
