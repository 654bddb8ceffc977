"""A generated data set of instrument readings: eight kinds of gauges that show a value from 0 to 100.

Image i of a kind depends on (seed, kind, i) only, so a longer data set starts with the shorter one. Colours, size,
place, tilt, background, noise and bystanding shapes vary, hence two images with the same reading share few pixels,
while the marks of every scale keep the reading clear to a person at 64 x 64 pixels. In the style "calm" the gauge
stands alone, upright and in the middle, so that a small generative model can learn to draw it at 32 x 32 pixels.

    >>> from ordinalclip.gauges import make_gauges
    >>> make_gauges(["dial", "tank"], num_images=2, seed=0)["kind"][:]
    ['dial', 'dial', 'tank', 'tank']
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    import datasets

Colour = tuple[int, int, int] | int  # RGB, or a value of a canvas with one channel
Point = tuple[float, float]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (240, 130, 20),
    "yellow": (232, 196, 20),
    "green": (40, 165, 70),
    "cyan": (20, 175, 190),
    "blue": (45, 95, 225),
    "purple": (140, 60, 200),
    "pink": (235, 90, 165),
}

# For zero-shot prediction and as a start for learned contexts: {name} is a number from "0" to "100", at the tail.
TEMPLATES = (
    "a photo of a {kind} reading {name}.",
    "a {kind} showing {name}.",
    "the reading of the {kind} is {name}.",
    "an image of a {kind} at {name}.",
)

STYLES: tuple[str, ...] = ("varied", "calm")
MIN_SIZE, MAX_SIZE = 16, 2048  # drawn at `_SUPERSAMPLING` times that, 0.2 GB for the largest
MAX_IMAGES = 1_000_000
MAX_SEED = 2**63 - 1
_SUPERSAMPLING = 4


class _Pen:
    """Draws in gauge units: the gauge fills [-1, 1] x [-1, 1], x to the right and y down.

    Angles are turns, clockwise from the top. The pose (centre and radius in pixels, tilt in turns) is applied to every
    point, so that edges stay sharp, which they would not if a finished picture were rotated.
    """

    def __init__(self, image: Image.Image, centre: Point, radius: float, tilt: float) -> None:
        self._canvas = ImageDraw.Draw(image)
        self._centre, self._radius = centre, radius
        self._cos, self._sin = np.cos(2 * np.pi * tilt), np.sin(2 * np.pi * tilt)

    def _place(self, point: Point) -> Point:
        x, y = point
        return (
            self._centre[0] + self._radius * (x * self._cos - y * self._sin),
            self._centre[1] + self._radius * (x * self._sin + y * self._cos),
        )

    def polygon(self, points: Sequence[Point], colour: Colour) -> None:
        self._canvas.polygon([self._place(point) for point in points], fill=colour)

    def box(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], colour)

    def disc(self, centre: Point, radius: float, colour: Colour) -> None:
        x, y = self._place(centre)
        r = radius * self._radius
        self._canvas.ellipse((x - r, y - r, x + r, y + r), fill=colour)

    def band(self, start: float, end: float, inner: tuple[float, float], outer: float, colour: Colour) -> None:
        """Ring segment from one angle to another; its inner radius may change along the way."""
        turns = np.linspace(start, end, 2 + int(48 * abs(end - start)))
        inside = [_polar(t, r) for t, r in zip(turns, np.linspace(*inner, len(turns)), strict=True)]
        self.polygon([_polar(t, outer) for t in turns] + inside[::-1], colour)

    def spoke(self, turn: float, inner: float, outer: float, width: float, colour: Colour) -> None:
        """Straight bar that points away from the middle."""
        x, y = _polar(turn + 0.25, width / 2)
        (x0, y0), (x1, y1) = _polar(turn, inner), _polar(turn, outer)
        self.polygon([(x0 - x, y0 - y), (x1 - x, y1 - y), (x1 + x, y1 + y), (x0 + x, y0 + y)], colour)


def _polar(turn: float, radius: float) -> Point:
    return radius * np.sin(2 * np.pi * turn), -radius * np.cos(2 * np.pi * turn)


@dataclass(frozen=True)
class _Look:
    """Colours of one gauge: face and ink are a light and a dark grey, either way round; only the fill is coloured."""

    face: Colour
    ink: Colour
    fill: Colour


# One function per kind: (pen, share of the scale in [0, 1], look, rng).


def _draw_dial(pen: _Pen, share: float, look: _Look, rng: np.random.Generator) -> None:
    """A needle over an arc that grows from its beginning to its end."""
    half = rng.uniform(0.33, 0.4)
    pen.disc((0, 0), 1, look.ink)
    pen.disc((0, 0), 0.93, look.face)
    pen.band(-half, half, (0.83, 0.6), 0.86, look.ink)
    for tick in np.linspace(-half, half, 5):
        pen.spoke(tick, 0.7, 0.86, 0.07, look.ink)
    turn = -half + 2 * half * share
    pen.polygon([_polar(turn + 0.25, 0.11), _polar(turn, 0.8), _polar(turn - 0.25, 0.11)], look.fill)
    pen.disc((0, 0), 0.15, look.fill)


def _draw_tank(pen: _Pen, share: float, look: _Look, rng: np.random.Generator) -> None:
    """A vessel that is filled from below; only the liquid is coloured."""
    width = rng.uniform(0.3, 0.62)
    pen.box(-width - 0.08, -1, width + 0.34, 1, look.face)
    pen.box(-width, -0.92, width, 0.92, look.ink)
    pen.box(-width + 0.07, -0.85, width - 0.07, 0.85, look.face)
    pen.box(-width + 0.07, 0.85 - 1.7 * share, width - 0.07, 0.85, look.fill)
    for i, y in enumerate(np.linspace(0.85, -0.85, 5)):
        pen.box(width, y - 0.035, width + (0.15 if i % 2 else 0.25), y + 0.035, look.ink)


def _draw_bar(pen: _Pen, share: float, look: _Look, rng: np.random.Generator) -> None:
    """A horizontal bar that is filled from the left."""
    height = rng.uniform(0.18, 0.36)
    pen.box(-1, -height - 0.1, 1, height + 0.34, look.face)
    pen.box(-0.92, -height, 0.92, height, look.ink)
    pen.box(-0.85, -height + 0.07, 0.85, height - 0.07, look.face)
    pen.box(-0.85, -height + 0.07, -0.85 + 1.7 * share, height - 0.07, look.fill)
    for i, x in enumerate(np.linspace(-0.85, 0.85, 5)):
        pen.box(x - 0.035, height, x + 0.035, height + (0.15 if i % 2 else 0.25), look.ink)


def _draw_pie(pen: _Pen, share: float, look: _Look, rng: np.random.Generator) -> None:
    """A disc of which a sector is coloured, clockwise from the top."""
    rim = rng.uniform(0.65, 0.8)
    hole = rng.choice([0.0, rng.uniform(0.3, 0.7) * rim])
    pen.disc((0, 0), rim + 0.07, look.ink)
    pen.disc((0, 0), rim, look.face)
    pen.band(0, share, (hole, hole), rim, look.fill)
    pen.disc((0, 0), hole, look.ink)
    pen.disc((0, 0), hole * 0.85, look.face)
    for turn in (0, 0.25, 0.5, 0.75):
        pen.spoke(turn, rim, rim + 0.2, 0.07, look.ink)
    pen.spoke(0, hole, rim + 0.2, 0.07, look.ink)


def _draw_clock(pen: _Pen, share: float, look: _Look, rng: np.random.Generator) -> None:
    """One hand that leaves the block at the top on its right and comes back to it on its left."""
    gap = rng.uniform(0.05, 0.065)
    pen.disc((0, 0), 1, look.ink)
    pen.disc((0, 0), 0.93, look.face)
    for tick in np.linspace(gap, 1 - gap, 11):
        pen.spoke(tick, 0.78, 0.94, 0.07, look.ink)
    pen.band(-gap / 2, gap / 2, (0.55, 0.55), 0.94, look.ink)
    turn = gap + (1 - 2 * gap) * share
    pen.spoke(turn, -0.05, 0.72, 0.13, look.fill)
    pen.disc((0, 0), 0.13, look.fill)


def _draw_counter(pen: _Pen, share: float, look: _Look, rng: np.random.Generator) -> None:
    """Three digits of seven segments each."""
    slant, thick = rng.uniform(0, 0.12), rng.uniform(0.1, 0.13)
    pen.box(-1, -0.6, 1, 0.6, look.ink)
    pen.box(-0.94, -0.54, 0.94, 0.54, look.face)
    for digit, middle in zip(f"{round(100 * share):03d}", (-0.6, 0, 0.6), strict=True):
        for segment in _SEGMENTS[int(digit)]:
            x0, y0, x1, y1 = _SEGMENT_ENDS[segment]
            left, right, top, bottom = 0.19 * x0, 0.19 * x1, 0.36 * y0, 0.36 * y1
            half = thick / 2
            corners = [(left - half, top - half), (right + half, top - half)]
            corners += [(right + half, bottom + half), (left - half, bottom + half)]
            pen.polygon([(middle + x - slant * y, y) for x, y in corners], look.fill)


#  a        Which segments are lit; their ends on a grid of 3 x 3 points.
# f b
#  g
# e c
#  d
_SEGMENTS = ("abcdef", "bc", "abged", "abgcd", "fgbc", "afgcd", "afgedc", "abc", "abcdefg", "abcdfg")
_SEGMENT_ENDS = {
    "a": (-1, -1, 1, -1),
    "b": (1, -1, 1, 0),
    "c": (1, 0, 1, 1),
    "d": (-1, 1, 1, 1),
    "e": (-1, 0, -1, 1),
    "f": (-1, -1, -1, 0),
    "g": (-1, 0, 1, 0),
}


def _draw_thermometer(pen: _Pen, share: float, look: _Look, rng: np.random.Generator) -> None:
    """A column that rises from a bulb, which is always coloured."""
    width = rng.uniform(0.1, 0.15)
    pen.box(-0.42, -1, 0.5, 1, look.face)
    pen.disc((0, 0.7), 0.27, look.ink)
    pen.box(-width - 0.06, -0.9, width + 0.06, 0.7, look.ink)
    pen.box(-width, -0.84, width, 0.7, look.face)
    pen.disc((0, 0.7), 0.21, look.fill)
    pen.box(-width, 0.4 - 1.2 * share, width, 0.7, look.fill)
    for i, y in enumerate(np.linspace(0.4, -0.8, 5)):
        pen.box(width, y - 0.035, width + (0.17 if i % 2 else 0.27), y + 0.035, look.ink)


def _draw_slider(pen: _Pen, share: float, look: _Look, rng: np.random.Generator) -> None:
    """A knob on a track that thickens from the low end at the left to the high end at the right."""
    thick, knob = rng.uniform(0.15, 0.25), rng.uniform(0.07, 0.11)
    pen.box(-1, -0.45, 1, 0.6, look.face)
    pen.polygon([(-0.85, -0.02), (0.85, -thick), (0.85, thick), (-0.85, 0.02)], look.ink)
    for i, x in enumerate(np.linspace(-0.85, 0.85, 5)):
        pen.box(x - 0.035, 0.4, x + 0.035, 0.48 if i % 2 else 0.55, look.ink)
    x = -0.85 + 1.7 * share
    pen.box(x - knob, -0.36, x + knob, 0.33, look.fill)


_DRAW: dict[str, Callable[[_Pen, float, _Look, np.random.Generator], None]] = {
    "dial": _draw_dial,
    "tank": _draw_tank,
    "bar": _draw_bar,
    "pie": _draw_pie,
    "clock": _draw_clock,
    "counter": _draw_counter,
    "thermometer": _draw_thermometer,
    "slider": _draw_slider,
}
KINDS: tuple[str, ...] = tuple(_DRAW)
# The shipped CLIP never saw these two. Both are built from parts of kinds that it knows (tank, bar), not from the same.
UNSEEN: tuple[str, ...] = ("thermometer", "slider")


def draw(
    kind: str,
    value: float,
    rng: np.random.Generator,
    size: int = 64,
    colour: str | None = None,
    style: str = "varied",
) -> Image.Image:
    """Draw one gauge.

    Args:
        kind: one of `KINDS`.
        value: reading in [0, 100]; a counter shows it rounded.
        rng: chooses everything but the value.
        size: width and height in pixels, `MIN_SIZE` to `MAX_SIZE`.
        colour: name from `COLOURS` of the part that shows the value; None lets `rng` choose.
        style: "varied", or "calm": a dark gauge with a light face on plain grey, always upright, in the middle and as
            large, without noise; what `rng` still chooses is the colour, the grey and the proportions of the gauge.

    Returns:
        RGB image, `size` x `size`.

    Raises:
        ValueError: for an unknown kind, colour or style, a value outside [0, 100] or a size beyond its limits.
    """
    _check_gauge(kind, value, size, colour, style)
    scene, pen_on, look = _staged(size, colour, style, rng)
    _DRAW[kind](pen_on(scene), value / 100, look, rng)
    if style == "calm":
        return scene.reduce(_SUPERSAMPLING)
    pixels = np.asarray(scene.reduce(_SUPERSAMPLING), dtype=np.float32)
    pixels = 128 + (pixels - 128) * rng.uniform(0.75, 1.0) + rng.uniform(-20, 20)
    pixels += rng.standard_normal(pixels.shape, dtype=np.float32) * np.float32(rng.uniform(0, 10))
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def moving_part(
    kind: str,
    value: float,
    rng: np.random.Generator,
    size: int = 64,
    colour: str | None = None,
    style: str = "varied",
) -> np.ndarray:
    """Where in the picture of `draw`, given the same arguments, the coloured part is that moves with the value.

    It is a needle, a level, a sector, a knob, or the segments that are lit. What is coloured at every reading, as the
    hub of a needle and the bulb of a thermometer, is no part of it.

    Returns:
        (size, size) float64, the share of every pixel that it covers.

    Raises:
        ValueError: see `draw`.
    """
    _check_gauge(kind, value, size, colour, style)
    _, pen_on, _ = _staged(size, colour, style, rng)
    before = deepcopy(rng)

    def coloured(reading: float) -> np.ndarray:
        canvas = Image.new("L", (size * _SUPERSAMPLING,) * 2)
        _DRAW[kind](pen_on(canvas), reading / 100, _Look(face=0, ink=0, fill=1), deepcopy(before))
        return np.asarray(canvas)

    always = np.minimum.reduce([coloured(reading) for reading in _ALL_ALIKE_IN_NO_DIGIT])
    moving = np.where(always, 0, coloured(value)).astype(np.float64)
    return moving.reshape(size, _SUPERSAMPLING, size, _SUPERSAMPLING).mean(axis=(1, 3))


_ALL_ALIKE_IN_NO_DIGIT = (*range(0, 100, 9), 100)


def _check_gauge(kind: str, value: float, size: int, colour: str | None, style: str) -> None:
    _check_choice("kind", kind, KINDS)
    if not 0 <= value <= 100:
        raise ValueError(f"value is {value!r}; a gauge shows values from 0 to 100")
    _check_integer("size", size, MIN_SIZE, MAX_SIZE)
    if colour is not None:
        _check_choice("colour", colour, tuple(COLOURS))
    _check_choice("style", style, STYLES)


def _staged(
    size: int, colour: str | None, style: str, rng: np.random.Generator
) -> tuple[Image.Image, Callable[[Image.Image], _Pen], _Look]:
    """What is there before a gauge is drawn: the background, a pen for a canvas in its pose, and its colours."""
    colour = str(rng.choice(list(COLOURS))) if colour is None else colour
    width = size * _SUPERSAMPLING
    if style == "calm":
        scene = Image.new("RGB", (width, width), (int(rng.integers(120, 181)),) * 3)
        look = _Look((240,) * 3, (30,) * 3, _shade(COLOURS[colour], 0.85, rng))
        return scene, partial(_Pen, centre=(width / 2, width / 2), radius=0.46 * width, tilt=0), look
    scene = _draw_background(width, rng)
    radius = rng.uniform(0.35, 0.46) * width
    slack = width / 2 - radius
    centre = (width / 2 + slack * rng.uniform(-1, 1), width / 2 + slack * rng.uniform(-1, 1))
    pen_on = partial(_Pen, centre=centre, radius=radius, tilt=rng.uniform(-0.03, 0.03))
    return scene, pen_on, _choose_look(colour, rng)


def _choose_look(colour: str, rng: np.random.Generator) -> _Look:
    light, dark = (int(rng.integers(*span)) for span in ((215, 256), (10, 50)))
    face, ink = (light, dark) if rng.random() < 0.5 else (dark, light)
    # A bright colour on a light face and a deep one on a dark face would be hard to see.
    return _Look((face,) * 3, (ink,) * 3, _shade(COLOURS[colour], 0.85 if face == light else 1.1, rng))


def _shade(colour: tuple[int, int, int], strength: float, rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = (int(c) for c in np.clip(strength * np.array(colour) + rng.integers(-15, 16, 3), 0, 255))
    return red, green, blue


def _draw_background(width: int, rng: np.random.Generator) -> Image.Image:
    """Plain, gradient or texture: a random grid of 1, 2 or many colours a side, enlarged; then up to five shapes."""
    cells = int(rng.choice([1, 2, int(rng.integers(6, 20))]))
    grid = rng.uniform(0, 255, 3) + rng.uniform(-1, 1, (cells, cells, 3)) * (90 if cells == 2 else 35)
    tiles = Image.fromarray(grid.clip(0, 255).astype(np.uint8))
    scene = tiles.resize((width, width), Image.Resampling.BILINEAR if rng.random() < 0.7 else Image.Resampling.NEAREST)
    for _ in range(rng.integers(6)):
        x, y, radius, tilt = rng.uniform([0, 0, 0.03, 0], [1, 1, 0.2, 1])
        pen = _Pen(scene, (x * width, y * width), radius * width, tilt)
        red, green, blue = (int(channel) for channel in rng.integers(0, 256, 3))
        if rng.random() < 0.5:
            pen.disc((0, 0), 1, (red, green, blue))
        else:
            pen.box(-1, -rng.uniform(0.1, 1), 1, rng.uniform(0.1, 1), (red, green, blue))
    return scene


def drawn_gauges(
    kind: str, num_images: int, seed: int = 0, size: int = 64, style: str = "varied"
) -> Iterator[tuple[Image.Image, float]]:
    """The gauges of `make_gauges` of one kind, one after the other: picture and value.

    Raises:
        ValueError: before the first, for an unknown kind or style, or a number beyond its limits.
    """
    numbered = _numbered(kind, num_images, seed, size, style)
    return ((draw(kind, value, rng, size, style=style), value) for value, rng in numbered)


def moving_parts(
    kind: str, num_images: int, seed: int = 0, size: int = 64, style: str = "varied", shift: float = 0.0
) -> Iterator[np.ndarray]:
    """Where the moving part is in each picture of `drawn_gauges`, given the same arguments: see `moving_part`.

    Args:
        shift: where it would be in the same picture with a reading so much higher, at most 100 and at least 0.

    Raises:
        ValueError: see `drawn_gauges`.
    """
    numbered = _numbered(kind, num_images, seed, size, style)
    return (moving_part(kind, min(max(value + shift, 0), 100), rng, size, style=style) for value, rng in numbered)


def _numbered(
    kind: str, num_images: int, seed: int, size: int, style: str
) -> Iterator[tuple[float, np.random.Generator]]:
    """The value of each gauge, and what chooses the rest."""
    _check_choice("kind", kind, KINDS)
    _check_choice("style", style, STYLES)
    _check_integer("num_images", num_images, 1, MAX_IMAGES)
    _check_integer("seed", seed, 0, MAX_SEED)
    _check_integer("size", size, MIN_SIZE, MAX_SIZE)

    def drawn(index: int) -> tuple[float, np.random.Generator]:
        rng = np.random.default_rng([seed, zlib.crc32(kind.encode()), index])
        value = rng.uniform(0, 100)
        return float(round(value)) if kind == "counter" else value, rng

    return map(drawn, range(num_images))


def make_gauges(
    kinds: str | Sequence[str], num_images: int, seed: int = 0, size: int = 64, style: str = "varied"
) -> datasets.Dataset:
    """Generate a data set of gauges with readings spread evenly over [0, 100].

    Args:
        kinds: one kind or several of `KINDS`, in the order in which the rows will stand.
        num_images: images per kind, 1 to `MAX_IMAGES`.
        seed: 0 to `MAX_SEED`; image i of a kind depends on (seed, kind, i) only.
        size: width and height in pixels, `MIN_SIZE` to `MAX_SIZE`.
        style: one of `STYLES`, see `draw`; the readings of a seed are the same in all.

    Returns:
        Dataset with columns `image`, `value` (float64; whole numbers for a counter) and `kind`.

    Raises:
        ValueError: for an unknown kind or style, no kind, or a number that is not an integer or beyond its limits.
    """
    import datasets

    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    if not kinds:
        raise ValueError(f"kinds is empty; choose from {', '.join(KINDS)}")
    each = [drawn_gauges(kind, num_images, seed, size, style) for kind in kinds]
    images, values = zip(*chain.from_iterable(each), strict=True)
    features = {"image": datasets.Image(), "value": datasets.Value("float64"), "kind": datasets.Value("string")}
    columns = {
        "image": list(images),
        "value": list(values),
        "kind": [kind for kind in kinds for _ in range(num_images)],
    }
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def _check_choice(name: str, given: str, choices: tuple[str, ...]) -> None:
    if given not in choices:
        raise ValueError(f"unknown {name} {given!r}; choose from {', '.join(choices)}")


def _check_integer(name: str, given: int, low: int, high: int) -> None:
    if isinstance(given, bool) or not isinstance(given, int | np.integer) or not low <= given <= high:
        raise ValueError(f"{name} is {given!r}; it must be an integer from {low} to {high}")
