"""The model card: README.md beside a saved model, with the front matter that the Hugging Face hub reads."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ordinalclip.backbones import hub_name
from ordinalclip.calibration import highest_level
from ordinalclip.config import RunConfig
from ordinalclip.files import write_text
from ordinalclip.metrics import decodings
from ordinalclip.provenance import backbone_license, data_license, data_name
from ordinalclip.quoting import Markdown, printable
from ordinalclip.ranks import Ranks
from ordinalclip.results.pages import markdown_templates
from ordinalclip.results.record import RunRecord
from ordinalclip.run_folder import local

NEAREST_TASK = "image-classification"  # the hub's list of tasks has no ordinal regression
PEOPLE = re.compile(r"\b(age|aged|face|facial|person|people|portrait|beauty|attractive\w*)\b", re.IGNORECASE)


def write_card(record: RunRecord, remark: str = "") -> Path:
    """Write the model card of a run into its model folder.

    Args:
        remark: a sentence about the metrics that the run itself cannot know, e.g. their spread over seeds.
    """
    path = record.folder.model / "README.md"
    write_text(path, model_card(record, remark))
    return path


def model_card(record: RunRecord, remark: str = "") -> str:
    """The text of a run's model card."""
    config, ranks = record.config, record.ranks
    return (
        markdown_templates()
        .get_template("card.md")
        .render(
            front_matter=Markdown(front_matter(record)),
            record=record,
            config=config,
            ranks=ranks,
            unit_literal=Markdown(ascii(ranks.unit)),
            data=local(data_name(config.data)),
            backbone=local(config.model.backbone),
            data_license=config.data.license or Markdown(data_license(config.data)),
            backbone_license=backbone_license(config.model.backbone),
            metrics=[each for each in record.shown_metrics if each.value is not None],
            decodings=decodings(),
            versions=record.versions,
            remark=remark,
            people=about_people(config, ranks.unit),
            calibration=Markdown(calibration_section(about, ranks)) if (about := record.calibration) else "",
        )
    )


def calibration_section(about: dict[str, Any], ranks: Ranks, source: str = "") -> str:
    """What a card says of a calibration.

    Args:
        about: see `calibrating.Calibrated`, with the coverage of the test part under "test", if there is one.
        source: where its pictures are from; "": from the run's own data.
    """
    highest = highest_level(about["least"])
    template = markdown_templates().get_template("calibration.md")
    return template.render(about=about, ranks=ranks, source=local(source), highest=highest)


def recalibrated(card: bytes, section: str) -> bytes:
    """A card with another section on its calibration, at the end."""
    text = card.decode("utf-8", "replace")
    title = re.escape(section.partition("\n")[0])
    return (re.sub(rf"^{title}$.*?(?=^## |\Z)", "", text, flags=re.M | re.S).rstrip() + f"\n\n{section}\n").encode()


def front_matter(record: RunRecord) -> str:
    """YAML for the hub: licence, task, tags, base models, data set, versions, and the metrics as a model index.

    The hub knows no intervals: that of a metric is among its `args`.
    """
    config, data = record.config, record.config.data
    names = [name for name in record.scored if record.scores[name] is not None]
    published = data.hub if data.source == "hub" and not Path(data.hub).exists() else ""
    results = [
        EvalResult(
            task_type=NEAREST_TASK,
            task_name="image-ordinal-regression",
            dataset_type=published or "ordinalclip",
            dataset_name=printable(local(data_name(data))),
            dataset_config=data.hub_config or None,
            dataset_split=record.part,
            dataset_revision=data.hub_revision or None,
            metric_type=name,
            metric_name=record.scored[name].title,
            metric_value=record.scores[name],
            metric_args=_interval(record, name),
        )
        for name in names
    ]
    generated = data.source == "gauges" and config.model.backbone == "tiny"
    content: dict[str, Any] = {
        "license": "apache-2.0" if generated else "other",
        "license_name": None if generated else "that-of-data-and-backbone",
        "library_name": "ordinalclip",
        "pipeline_tag": NEAREST_TASK,
        "tags": ["image-ordinal-regression", "ordinal-regression", "ordinalclip", config.method],
        "base_model": [name for spec in (config.model.backbone, config.model.text) if (name := hub_name(spec))] or None,
        "datasets": [published] if published else None,
        "metrics": names,
        "versions": record.versions or None,
    }
    if results:
        content.update(model_name=printable(f"{config.method}-{local(config.model.backbone)}"), eval_results=results)
    return ModelCardData(**content).to_yaml()


def _interval(record: RunRecord, name: str) -> dict[str, Any] | None:
    """The 95 % interval of a metric, as data; None where there is none."""
    low, high = map(float, record.intervals[name])
    known = math.isfinite(low) and math.isfinite(high)
    return {"interval": [low, high], "level": 0.95, "method": "bootstrap over the images"} if known else None


def about_people(config: RunConfig, unit: str) -> bool:
    """Whether unit, prompts or data look as if pictures of people were judged."""
    words = " ".join(map(str, [data_name(config.data), *config.head.values()]))
    return unit.lower().startswith("year") or PEOPLE.search(words) is not None
