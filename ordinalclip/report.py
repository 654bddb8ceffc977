"""Reports: one self-contained HTML file per run and per comparison, with the figures of `plots` inlined.

ordinalclip report runs/demo                            # again, for a finished run
ordinalclip plot runs/demo --format pdf --out figures   # the same figures for a paper
"""

from __future__ import annotations

import base64
import io
import json
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from ordinalclip import plots
from ordinalclip.card import data_name, write_card
from ordinalclip.data import Parts
from ordinalclip.leaderboard import Leaderboard
from ordinalclip.metrics import METRICS, bootstrap_interval, shot_groups
from ordinalclip.model import OrdinalModel
from ordinalclip.record import HEADLINE, RunRecord, image_features, read_run, shown

logger = logging.getLogger(__name__)
MAP_IMAGES = 300
FEW_RANKS = 10  # up to so many a confusion matrix says more than a scatter plot
EXTREMES = 6
MEANING = {
    "mae": "mean absolute error",
    "rmse": "root mean squared error",
    "r2": "share of variance explained",
    "accuracy": "share of ranks hit exactly",
    "spearman": "rank correlation",
}
GROUPS = {
    "many": "more than 100",
    "medium": "20 to 100",
    "few": "less than 20",
    "unseen": "none (part of the few)",
}


def document_run(
    folder: str | Path, parts: Parts | None = None, model: OrdinalModel | None = None, remark: str = ""
) -> None:
    """Write the report and the model card of a run that is finished and saved; a failure is a warning."""
    with never_fatal(folder):
        record = read_run(folder, parts, model)
        write_card(record, remark)
        write_report(record, remark)


@contextmanager
def never_fatal(folder: str | Path) -> Iterator[None]:
    """Turn whatever goes wrong into a warning: documents must not cost the results that they are about."""
    try:
        yield
    except Exception:
        logger.warning("%s: report or model card not written", folder, exc_info=True)


def write_report(record: RunRecord, remark: str = "") -> Path:
    """Write `report.html` into a run folder.

    Args:
        remark: a sentence about the figures that the run itself cannot know, e.g. their spread over seeds.
    """
    config, ranks = record.config, record.ranks
    intervals = record.intervals
    tiles = [_tile(key, record.scores[key], interval, ranks.unit) for key, interval in intervals.items()]
    path = record.folder / "report.html"
    page = _environment().get_template("run.html")
    content = page.render(
        record=record,
        config=config,
        ranks=ranks,
        data=data_name(config.data),
        tiles=tiles,
        constant=record.constant_error(),
        remark=remark,
        figures=_inlined(run_figures(record)),
        groups=_groups(record),
        extremes=_extremes(record),
        configuration=yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False),
        metrics=json.dumps(record.figures, indent=2),
    )
    path.write_text(content, encoding="utf-8")
    return path


def run_figures(record: RunRecord) -> dict[str, tuple[Figure, str]]:
    """Every figure that a run has, with the sentence below it: agreement or confusion, error_by_value, feature_map,
    similarity, learning_curves."""
    figures: dict[str, tuple[Figure, str]] = {}
    ranks, given = record.ranks, record.predictions
    if given is not None:
        if len(ranks) <= FEW_RANKS:
            figures["confusion"] = (
                plots.confusion(
                    given.label_ranks, ranks.nearest(torch.from_numpy(given.values)).numpy(), ranks.names or ()
                ),
                "True and predicted ranks: numbers of images, shaded by their share of the true rank.",
            )
        else:
            figures["agreement"] = (
                plots.agreement(given.labels, given.values, ranks.unit),
                "Predicted against true values. On the dashed line both are equal.",
            )
        figures["error_by_value"] = (
            plots.error_by_value(given.labels, given.values, ranks, record.figures["train_counts"]),
            "Where the errors are: mean absolute error with its 95 % interval and bias (predicted minus true) by true "
            "value, above the number of training images.",
        )
        if record.images is not None and len(record.images) > 1:
            figures["feature_map"] = _feature_map(record)
    if record.prototypes is not None:
        figures["similarity"] = (
            plots.similarity(record.prototypes.double().cpu().numpy(), ranks),
            f"Similarity of the rank prototypes. Ordinality {record.figures['ordinality']:.1%}: the share of "
            "similarities that fall with the distance in rank.",
        )
    if record.log:
        figures["learning_curves"] = (
            plots.learning_curves(record.log, record.figures["best_step"], ranks.unit),
            f"Learning curves; {record.figures['train_seconds']:.0f} s of training.",
        )
    return figures


def write_comparison_report(
    folder: Path, title: str, boards: Sequence[Leaderboard], notes: Sequence[str], best: str
) -> Path:
    """Write `report.html` into a comparison's folder.

    Args:
        title: a sentence above the tables.
        boards: one per variant; their runs hold predictions of the test part.
        notes: what the figures are, in paragraphs below the tables.
        best: which method's model the comparison keeps.
    """
    page = _environment().get_template("comparison.html")
    content = page.render(
        title=title,
        folder=folder,
        boards=boards,
        notes=notes,
        best=best,
        link=lambda run: _link(folder, run),
        overview=_inlined(_overview(boards)),
        figures=[
            _inlined(comparison_figures(board), f"-{number}" if number else "") for number, board in enumerate(boards)
        ],
    )
    path = folder / "report.html"
    path.write_text(content, encoding="utf-8")
    return path


def comparison_figures(board: Leaderboard) -> dict[str, tuple[Figure, str]]:
    """mae_by_method, difference_to_best and error_by_method, each with the sentence below it."""
    ranks = board.ranks
    maes = {entry.name: entry.maes for entry in board.entries}
    answers = {
        entry.name: (
            np.concatenate([each.labels for each in entry.predictions]),
            np.concatenate([each.values for each in entry.predictions]),
        )
        for entry in board.entries
    }
    best, *others = board.entries
    figures = {
        "mae_by_method": (
            plots.mae_by_method(maes, ranks.unit),
            "Test MAE: mean and standard deviation over the seeds (blue), each seed (orange); an arrow: farther off.",
        )
    }
    if others:
        figures["difference_to_best"] = (
            plots.difference_to_best({other.name: board.verdicts[other.name] for other in others}, ranks.unit),
            f"How much larger the error is than that of {best.name}, on the same images, with 95 % bootstrap interval. "
            "Filled: larger by the paired test after Holm's correction (p < 0.05).",
        )
    figures["error_by_method"] = (
        plots.error_by_method(answers, ranks),
        "Where the errors are: test MAE by true value, over all seeds.",
    )
    return figures


def _overview(boards: Sequence[Leaderboard]) -> dict[str, tuple[Figure, str]]:
    """The variants side by side, where there are several."""
    if len(boards) == 1:
        return {}
    names = dict.fromkeys(entry.name for board in boards for entry in board.entries)
    found = [{entry.name: entry.maes for entry in board.entries} for board in boards]
    maes = {name: [each.get(name, [math.nan]) for each in found] for name in names}
    figure = plots.mae_by_variant(maes, [board.variant for board in boards], boards[0].ranks.unit)
    return {"mae_by_variant": (figure, "Test MAE in every variant: mean and standard deviation over the seeds.")}


@cache
def _environment() -> Environment:
    loader = PackageLoader("ordinalclip", "assets/report")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["shown"] = shown
    return environment


def _inlined(figures: dict[str, tuple[Figure, str]], suffix: str = "") -> dict[str, tuple[Markup, str]]:
    """Figures as SVG by their names, which with the suffix are unique on the page."""
    return {
        name + suffix: (Markup(plots.inline_svg(figure, name + suffix, text)), text)
        for name, (figure, text) in figures.items()
    }


def _tile(key: str, value: float | None, interval: tuple[float, float], unit: str) -> dict[str, str]:
    low, high = map(shown, interval)
    return {
        "key": key,
        "name": HEADLINE.get(key, key.upper()),
        "meaning": MEANING.get(key, "share of errors of at most this, in the label's unit"),
        "value": shown(value),
        "unit": unit if key in ("mae", "rmse") and value is not None else "",
        "interval": f"{low} to {high}" if low != "-" else "",
    }


def _groups(record: RunRecord) -> list[dict[str, Any]]:
    """MAE by number of training labels, as in metrics.json, with intervals; groups without images are left out."""
    given = record.predictions
    if given is None:
        return []
    members = shot_groups(record.figures["train_counts"])
    rows = []
    for name, row in record.scores["mae_by_shots"].items():
        chosen = members[name][given.label_ranks]
        if chosen.any():
            interval = bootstrap_interval(METRICS["mae"], given.values[chosen], given.labels[chosen])
            rows.append({**row, "name": name, "meaning": GROUPS[name], "interval": interval})
    return rows


def _feature_map(record: RunRecord) -> tuple[Figure, str]:
    """At most `MAP_IMAGES` images of the part, drawn by the run's seed."""
    assert record.images is not None
    total = len(record.images)
    rows = np.random.default_rng(record.config.seed).permutation(total)[:MAP_IMAGES]
    features = image_features(record.model, record.images, rows)
    thumbnails = [_thumbnail(record.images.image(row), 60) for row in rows]
    figure = plots.feature_map(features, record.images.values[rows], thumbnails, record.ranks)
    drawn = f"{len(rows)} of {total} images" if total > len(rows) else f"{total} images"
    return figure, f"Features of the image encoder, {drawn}: principal components, coloured by true value."


def _extremes(record: RunRecord) -> dict[str, list[dict[str, Any]]]:
    """The images with the smallest and the largest errors; ties by the probability of the true rank."""
    given = record.predictions
    if given is None or record.images is None:
        return {}
    probabilities, rows = given.probabilities, np.arange(len(given.labels))
    sure = probabilities[rows, given.label_ranks] if probabilities is not None else np.zeros(len(rows))
    order = np.lexsort((-sure, given.errors))
    few = min(EXTREMES, len(order) // 2)
    predicted_ranks = record.ranks.nearest(torch.from_numpy(given.values)).numpy()

    def entry(row: int) -> dict[str, Any]:
        assert record.images is not None
        return {
            "name": given.names[row],
            "image": _data_uri(_thumbnail(record.images.image(row), 128)),
            "label": given.labels[row],
            "value": given.values[row],
            "error": given.errors[row],
            "outline": None if probabilities is None else _outline(probabilities[row]),
            "label_place": (given.label_ranks[row] + 0.5) / len(record.ranks),
            "value_place": (predicted_ranks[row] + 0.5) / len(record.ranks),
        }

    return {
        "Best": [entry(row) for row in order[:few]],
        "Worst": [entry(row) for row in order[::-1][:few]],
    }


def _outline(probabilities: np.ndarray) -> str:
    """A distribution as the path of a step function in a box of 100 x 30."""
    heights = 30 - 29 * probabilities / probabilities.max()
    edges = np.linspace(0, 100, len(heights) + 1)
    steps = [f"V{height:.1f}H{right:.2f}" for height, (_, right) in zip(heights, pairwise(edges), strict=True)]
    return f"M0 30{''.join(steps)}V30Z"


def _thumbnail(image: Image.Image, size: int) -> Image.Image:
    return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _link(folder: Path, run: Path) -> dict[str, Any]:
    relative = Path(*run.parts[len(folder.parts) :]).as_posix()
    written = (run / "report.html").is_file()
    return {
        "name": run.name.rpartition("-")[2],
        "href": quote(relative) + ("/report.html" if written else "/"),
        "written": written,
    }
