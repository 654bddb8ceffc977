"""The report of a run: one self-contained HTML file, with the figures of `figures` inlined.

ordinalclip report runs/demo                            # again, for a finished run
ordinalclip plot runs/demo --width page --out figures   # the same figures for a paper
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from matplotlib.figure import Figure

from ordinalclip.data import Part, Parts
from ordinalclip.files import write_text
from ordinalclip.metrics import METRICS, bootstrap_interval, decodings, shot_groups
from ordinalclip.model import OrdinalModel
from ordinalclip.predictions import Predictions
from ordinalclip.provenance import data_name
from ordinalclip.ranks import Decoding, Ranks
from ordinalclip.results import figures
from ordinalclip.results.calibration_figure import interval_coverage, reliability
from ordinalclip.results.card import write_card
from ordinalclip.results.pages import Figures, data_uri, inlined, never_fatal, outline, templates, thumbnail
from ordinalclip.results.record import RunRecord, points_of, read_run
from ordinalclip.run_folder import RunFolder, local

MAP_IMAGES = 300
EXTREMES = 6
DECODED = {  # how an answer comes about
    "median": "the median of its distribution over the ranks",
    "argmax": "the likeliest rank",
    "expectation": "the mean of its distribution over the ranks",
    None: "",
}
GROUPS = {
    "many": "more than 100",
    "medium": "20 to 100",
    "few": "less than 20",
    "unseen": "none (part of the few)",
}


def document_run(
    folder: RunFolder, parts: Parts | None = None, model: OrdinalModel | None = None, remark: str = ""
) -> None:
    """Write the report and the model card of a run that is finished and saved; a failure is a warning."""
    with never_fatal(folder.path):
        record = read_run(folder.path, parts, model)
        write_card(record, remark)
        write_report(record, remark)


def write_report(record: RunRecord, remark: str = "") -> Path:
    """Write `report.html` into a run folder.

    Args:
        remark: a sentence about the metrics that the run itself cannot know, e.g. their spread over seeds.
    """
    config = record.config
    content = (
        templates()
        .get_template("run.html")
        .render(
            record=record,
            config=config,
            ranks=record.ranks,
            data=local(data_name(config.data)),
            decodings=decodings(),
            remark=remark,
            figures=inlined(run_figures(record)),
            groups=_groups(record),
            extremes=_extremes(record),
            configuration=_configuration(record),
            metrics=json.dumps(record.metrics, indent=2),
        )
    )
    write_text(record.folder.report, content)
    return record.folder.report


def run_figures(record: RunRecord, width: float = figures.COLUMN) -> Figures:
    """Every figure that a run has, so many inches wide, with the sentence below it: agreement or confusion,
    error_by_value, feature_map, reliability, interval_coverage, similarity, learning_curves."""
    drawn: Figures = {}
    ranks, given = record.ranks, record.predictions
    if given is not None:
        drawn |= prediction_figures(given, ranks, record.decoding, record.metrics["train_counts"], width)
        if record.images is not None and len(record.images) > 1:
            drawn["feature_map"] = _feature_map(record, width)
    about = record.calibration or {}
    if "after" in about:
        drawn["reliability"] = reliability(about, width=width), _scaled(about)
    if "test" in about:
        drawn["interval_coverage"] = interval_coverage(about["test"], width=width), _intervals(about)
    if record.prototypes is not None:
        drawn["similarity"] = (
            figures.similarity(record.prototypes.double().cpu().numpy(), ranks, width=width),
            f"Similarity of the rank prototypes. Ordinality {record.metrics['ordinality']:.1%}: the share of "
            "similarities that fall with the distance in rank.",
        )
    if record.log:
        drawn["learning_curves"] = (
            figures.learning_curves(record.log, record.metrics["best_step"], ranks.unit, width=width),
            f"Learning curves; {record.metrics['train_seconds']:.0f} s of training.",
        )
    return drawn


def _scaled(about: Mapping[str, Any]) -> str:
    how = "not scaled, which had the best ranked probability score"
    if about["scaling"] != "none":
        numbers = f" {about['temperature']:.3g}" if "temperature" in about else ""
        change = f"{about['before']['rps']:.3g} to {about['after']['rps']:.3g}"
        how = f"scaled ({about['scaling']}{numbers}); the ranked probability score goes from {change}"
    return (
        f"Do probabilities mean what they say? On the {about['num']} pictures that calibrate the model; a point's size "
        f"tells its share of them. Probabilities are {how}."
    )


def _intervals(about: Mapping[str, Any]) -> str:
    groups = f" of {about['groups']} groups" if "groups" in about else ""
    widths = ", ".join(f"{kind} {width:.3g}" for kind, width in about["widths"].items() if kind != "level")
    return (
        f"Do intervals keep their promise? They come from {about['num']} pictures{groups} that were taken out of the "
        f"validation part, and are made of {about['kind']} scores (mean widths on the rest of it: {widths})."
    )


def prediction_figures(
    given: Predictions, ranks: Ranks, decoding: Decoding | None, counts: Sequence[int] | None, width: float
) -> Figures:
    """Figures of what a model has answered: confusion, or agreement where there are many ranks, and error_by_value.

    Args:
        decoding: by which it answers; None for a model without a distribution.
        counts: (R,) number of training labels of each rank, if that is known.
    """
    drawn: Figures = {}
    how, answers = f" ({DECODED[decoding]})" if decoding else "", given.decoded[decoding or "median"]
    if len(ranks) <= figures.FEW_RANKS:
        answered = ranks.nearest(torch.from_numpy(answers)).numpy()
        drawn["confusion"] = (
            figures.confusion(given.label_ranks, answered, ranks.names or (), width=width),
            f"True ranks and those of the model's answers{how}: numbers of images, shaded by their share of the "
            "true rank.",
        )
    else:
        drawn["agreement"] = (
            figures.agreement(given.labels, answers, ranks, width=width),
            f"The model's answers{how} against true values. On the dashed line both are equal.",
        )
    if counts is not None:
        drawn["error_by_value"] = (
            figures.error_by_value(given.labels, answers, ranks, counts, width=width),
            "Where the errors are: mean absolute error with its 95 % interval and bias (predicted minus true) by true "
            f"{'rank' if ranks.worded else 'value'}, above the number of training images.",
        )
    return drawn


def _configuration(record: RunRecord) -> str:
    """The configuration as YAML; of paths on this machine the last two parts."""
    return yaml.safe_dump(_shortened(record.config.model_dump(mode="json")), sort_keys=False)


def _shortened(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _shortened(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_shortened(each) for each in value]
    return local(value) if isinstance(value, str) else value


def _groups(record: RunRecord) -> list[dict[str, Any]]:
    """MAE by number of training labels, as in metrics.json, with intervals; groups without images are left out."""
    given = record.predictions
    if given is None:
        return []
    members = shot_groups(record.metrics["train_counts"])
    groups = []
    for name, group in record.scores["mae_by_shots"].items():
        chosen = members[name][given.label_ranks]
        if chosen.any():
            interval = bootstrap_interval(METRICS["mae"], given.values[chosen], given.labels[chosen])
            groups.append({**group, "name": name, "meaning": GROUPS[name], "interval": interval})
    return groups


def _feature_map(record: RunRecord, width: float) -> tuple[Figure, str]:
    """At most `MAP_IMAGES` images of the part, drawn by the run's seed."""
    assert record.images is not None
    total = len(record.images)
    rows = np.random.default_rng(record.config.seed).permutation(total)[:MAP_IMAGES]
    points = points_of(record.model, record.images, rows)
    thumbnails = [thumbnail(record.images.image(row), 60) for row in rows]
    figure = figures.feature_map(points, record.images.values[rows], thumbnails, record.ranks, width=width)
    some = f"{len(rows)} of {total} images" if total > len(rows) else f"{total} images"
    text = "The space that answers are read from, which D5 and the residual variance score: principal components"
    return figure, f"{text} of {some}, coloured by true value."


def _extremes(record: RunRecord) -> dict[str, list[dict[str, Any]]]:
    given = record.predictions
    return (
        {} if given is None or record.images is None else extremes(given, record.answers, record.images, record.ranks)
    )


def extremes(given: Predictions, answers: np.ndarray, images: Part, ranks: Ranks) -> dict[str, list[dict[str, Any]]]:
    """The images with the smallest and the largest errors of a model's answers, (N,) values, as templates take them.

    Ties are broken by the probability of the true rank.
    """
    probabilities, rows = given.probabilities, np.arange(len(given.labels))
    sure = probabilities[rows, given.label_ranks] if probabilities is not None else np.zeros(len(rows))
    order = np.lexsort((-sure, np.abs(answers - given.labels)))
    few = min(EXTREMES, len(order) // 2)

    def entry(row: int) -> dict[str, Any]:
        return {
            "name": given.names[row],
            "image": data_uri(thumbnail(images.image(row), 128)),
            "label": ranks.say(given.labels[row]),
            "answer": ranks.say(answers[row]),
            "outline": None if probabilities is None else outline(probabilities[row]),
            "label_place": (given.label_ranks[row] + 0.5) / len(ranks),
        }

    return {
        "Best": [entry(row) for row in order[:few]],
        "Worst": [entry(row) for row in order[::-1][:few]],
    }
