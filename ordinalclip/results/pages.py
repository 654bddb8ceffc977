"""What HTML reports and model cards share: the templates, figures inside a page, and that none of it is ever fatal."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup
from matplotlib.figure import Figure

from ordinalclip.results import figures
from ordinalclip.results.record import shown
from ordinalclip.run_folder import local

logger = logging.getLogger(__name__)
Figures = dict[str, tuple[Figure, str]]  # by name, with the sentence below it


@cache
def templates() -> Environment:
    """Of assets/report; everything in a page is escaped, in a model card, which is Markdown, nothing."""
    environment = Environment(
        loader=PackageLoader("ordinalclip", "assets/report"),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(shown=shown, local=local)
    return environment


def inlined(drawn: Mapping[str, tuple[Figure, str]], suffix: str = "") -> dict[str, tuple[Markup, str]]:
    """Figures as SVG by their names, which with the suffix are unique on the page."""
    return {
        name + suffix: (Markup(figures.inline_svg(figure, name + suffix, text)), text)
        for name, (figure, text) in drawn.items()
    }


@contextmanager
def never_fatal(folder: Path) -> Iterator[None]:
    """Turn whatever goes wrong into a warning: documents must not cost the results that they are about."""
    try:
        yield
    except Exception:
        logger.warning("%s: report or model card not written", folder, exc_info=True)
