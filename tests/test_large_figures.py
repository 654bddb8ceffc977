"""Grids of pictures: what is drawn where, and names that stand side by side."""

import itertools

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from baselines.large.figures import picture_grid


def rendered(figure):
    """The axes, after drawing, and what is seen in the middle of every picture: (R, C, 3)."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (axes,) = figure.axes
    seen = np.asarray(canvas.buffer_rgba())
    middles = {}
    for image in axes.images:
        left, right, bottom, top = image.get_extent()
        x, y = axes.transData.transform(((left + right) / 2, (top + bottom) / 2))
        middles[round(top, 3), round(left, 3)] = seen[len(seen) - 1 - round(y), round(x), :3]
    return axes, [colour for _, colour in sorted(middles.items())]


def test_every_picture_is_in_its_row_and_column():
    shades = torch.linspace(-1, 1, 18).view(2, 3, 3)
    pictures = shades[..., None, None].expand(-1, -1, -1, 4, 8).clone()  # twice as wide as high
    pictures[1, 2] = 7.0  # clipped, to white
    _, middles = rendered(picture_grid(pictures))
    expected = ((pictures[..., 0, 0].clamp(-1, 1) + 1) * 127.5).reshape(-1, 3).numpy()
    np.testing.assert_allclose(middles, expected, atol=1.0)
    _, listed = rendered(picture_grid([*pictures]))
    np.testing.assert_array_equal(middles, listed)


def test_a_picture_is_upright():
    picture = torch.full((1, 1, 3, 9, 9), -1.0)
    picture[:, :, :, :4] = 1.0  # the first rows are above
    (axes,) = picture_grid(picture).axes
    (image,) = axes.images
    _, _, bottom, top = image.get_extent()
    assert axes.transData.transform((0, top))[1] > axes.transData.transform((0, bottom))[1]
    assert image.origin == "upper"
    assert image.get_array()[0].min() == 1


@pytest.mark.parametrize("count", [1, 5, 10])
def test_names_stand_side_by_side_at_their_pictures(count):
    columns = [f"{'varied' if count < 10 else ''}\n{'thermometer' if count < 10 else '100 %'}"] * count
    rows = ["+4 deviations", "as it is"]
    axes, _ = rendered(picture_grid(torch.zeros(2, count, 3, 8, 8), rows, columns))
    assert [label.get_text() for label in axes.get_yticklabels()] == rows
    above = [label.get_window_extent() for label in axes.get_xticklabels() if label.get_visible()]
    assert len(above) == count
    assert not any(a.overlaps(b) for a, b in itertools.combinations(above, 2))
    for label, image in zip(above, axes.images, strict=False):
        place = image.get_window_extent()
        assert abs((label.x0 + label.x1) - (place.x0 + place.x1)) < 3
        assert label.y0 > place.y1
    bounds = axes.figure.bbox
    for box in (*above, *(label.get_window_extent() for label in axes.get_yticklabels())):
        assert bounds.x0 <= box.x0 < box.x1 <= bounds.x1
        assert bounds.y0 <= box.y0 < box.y1 <= bounds.y1


@pytest.mark.parametrize(
    ("pictures", "names", "message"),
    [
        (torch.zeros(2, 3, 8, 8), {}, r"pictures must be \(R, C, 3, H, W\)"),
        (torch.zeros(2, 1, 8, 8, 3), {}, r"pictures must have 3 channels"),
        ([torch.zeros(2, 8, 8)], {}, r"a row of pictures must be \(C, 3, H, W\)"),
        ([torch.zeros(2, 3, 8, 8), torch.zeros(3, 3, 8, 8)], {}, r"rows of pictures must be of one shape"),
        ([], {}, "no rows of pictures"),
        (torch.full((1, 1, 3, 8, 8), torch.nan), {}, "pictures must be finite; row 0"),
        (torch.zeros(2, 3, 3, 8, 8), {"rows": ["a"]}, "rows must be 2 names, one for each, or none; got 1"),
        (torch.zeros(2, 3, 3, 8, 8), {"columns": ["a"] * 2}, "columns must be 3 names"),
    ],
)
def test_bad_pictures(pictures, names, message):
    with pytest.raises(ValueError, match=message):
        picture_grid(pictures, **names)
