"""What trackers get at the end of a run: its metrics, the figures of its report, its card, and the report."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from accelerate.tracking import GeneralTracker
from matplotlib.figure import Figure

from ordinalclip.data import Parts
from ordinalclip.images import load_image
from ordinalclip.model import OrdinalModel
from ordinalclip.results.card import model_card
from ordinalclip.results.pages import never_fatal
from ordinalclip.results.record import RunRecord, read_run
from ordinalclip.results.run_report import run_figures
from ordinalclip.run_folder import RunFolder

DOTS_PER_INCH = 150
TEXT = "card"  # what trackers call the model card


def track(
    trackers: Sequence[GeneralTracker], folder: RunFolder, parts: Parts | None = None, model: OrdinalModel | None = None
) -> None:
    """Log a finished run at its last step; a failure is a warning.

    Metrics and the card as Accelerate's `log` takes them; figures where a tracker has `log_images`, the report where it
    has `log_artifact`, and in W&B, which shows pages. The last three only where there is one (`evaluation.report`).
    """
    if not trackers:  # no step was left to do
        return
    with never_fatal(folder.path, "the end of the run not tracked"):
        metrics = folder.read_metrics()
        step, values = metrics.get("steps", 0), tracked_metrics(metrics)
        record = read_run(folder.path, parts, model) if folder.report.is_file() else None
        figures = {} if record is None else run_figures(record)
        images = {f"figures/{name}": _pixels(figure)[None] for name, (figure, _) in figures.items()}
        text = {} if record is None else {TEXT: _card(record)}
        for tracker in trackers:
            tracker.log({**values, **text}, step=step)
            if images and hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images(images, step=step, **layout)
            if record is not None and hasattr(tracker, "log_artifact"):
                tracker.log_artifact(str(folder.report))
            elif record is not None and tracker.name == "wandb":
                import wandb

                tracker.log({"report": wandb.Html(str(folder.report))}, step=step)


def tracked_metrics(metrics: dict[str, Any]) -> dict[str, float]:
    """The numbers of metrics.json that are defined: "test/mae" and its kin, and those of the model and the training."""
    found = {name: value for name, value in metrics.items() if _is_defined(value)}
    for part in ("validation", "test"):
        scores = metrics.get(part, {})
        found |= {f"{part}/{name}": value for name, value in scores.items() if _is_defined(value)}
    return found


def _is_defined(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _card(record: RunRecord) -> str:
    """The model card without its front matter."""
    return model_card(record).split("\n---\n", 1)[1]


def _pixels(figure: Figure) -> np.ndarray:
    """A figure as (H, W, 3) uint8."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DOTS_PER_INCH)
    return np.asarray(load_image(stream.getvalue()))
