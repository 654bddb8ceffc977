"""What HTML reports and model cards share: the templates, figures inside a page, and that none of it is ever fatal."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from ordinalclip.quoting import code, markdown
from ordinalclip.results import figures
from ordinalclip.results.record import shown
from ordinalclip.run_folder import local

logger = logging.getLogger(__name__)
Figures = dict[str, tuple[Figure, str]]  # by name, with the sentence below it


@cache
def templates() -> Environment:
    """Of pages, in assets/report; everything in them is escaped."""
    return _environment(autoescape=True)


@cache
def markdown_templates() -> Environment:
    """Of model cards, in assets/report; everything in them is escaped, too."""
    return _environment(finalize=markdown)


def _environment(**options: Any) -> Environment:
    environment = Environment(
        loader=PackageLoader("ordinalclip", "assets/report"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **options,
    )
    environment.filters.update(shown=shown, local=local, code=code, setting=setting)
    return environment


def setting(value: float | str) -> str:
    """What a key is set to: numbers with four digits, paths by their last two parts."""
    return f"{value:.4g}" if isinstance(value, float) else local(str(value))


def inlined(drawn: Mapping[str, tuple[Figure, str]], suffix: str = "") -> dict[str, tuple[Markup, str]]:
    """Figures as SVG by their names, which with the suffix are unique on the page."""
    return {
        name + suffix: (Markup(figures.inline_svg(figure, name + suffix, text)), text)
        for name, (figure, text) in drawn.items()
    }


def thumbnail(image: Image.Image, size: int) -> Image.Image:
    """A small square copy, of whose longer side the middle is shown."""
    return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)


def data_uri(image: Image.Image) -> str:
    """A picture as the address of an image on a page."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def outline(probabilities: np.ndarray) -> str:
    """A distribution as the path of a step function in a box of 100 x 30."""
    heights = 30 - 29 * probabilities / probabilities.max()
    edges = np.linspace(0, 100, len(heights) + 1)
    steps = [f"V{height:.1f}H{right:.2f}" for height, (_, right) in zip(heights, pairwise(edges), strict=True)]
    return f"M0 30{''.join(steps)}V30Z"


@contextmanager
def never_fatal(folder: Path, what: str = "report or model card not written") -> Iterator[None]:
    """Turn whatever goes wrong into a warning: documents must not cost the results that they are about."""
    try:
        yield
    except Exception as error:
        logger.warning("%s: %s: %s: %s", folder, what, type(error).__name__, error)
        logger.debug("where:", exc_info=True)
