"""External validation: a model that is done, scored on data from elsewhere, every row of it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from ordinalclip.calibrating import calibrate
from ordinalclip.calibration import IntervalKind
from ordinalclip.config import DataConfig, EvaluationConfig, flat_keys, merge, parse_config, read_overrides
from ordinalclip.data import Part, load_parts, load_whole, make_whole
from ordinalclip.data.duplicates import MOST_HASHED, copies, repeated
from ordinalclip.data.labels import arrow_column
from ordinalclip.data.pictures import KEYS, kind_of
from ordinalclip.data.splits import kept_out
from ordinalclip.drift import feature_drift, label_drift
from ordinalclip.files import check_replaceable, content_digest
from ordinalclip.heads import head_class
from ordinalclip.metrics import against_constant, constant_answer, metrics_with
from ordinalclip.model import WEIGHTS, OrdinalModel
from ordinalclip.predictions import Predictions
from ordinalclip.progress import say
from ordinalclip.provenance import fingerprint, fingerprints, versions
from ordinalclip.ranks import Ranks
from ordinalclip.results.card import calibration_section, recalibrated
from ordinalclip.results.external_report import OURS, ExternalEvaluation, Score
from ordinalclip.run_folder import RunFolder, find_model
from ordinalclip.suggestions import near_matches
from ordinalclip.training.distributed import from_main, make_accelerator
from ordinalclip.training.evaluation import Evaluator, coverage_of, predictions_of

CARRIED = ("image_column", "label_column", "suffix", "extra_formats")  # keys of data that a run's new data shares
READ = (*KEYS, "label_column", "decimal", "missing", "cache_mb")  # keys of data by which other data is read
ALLOWED = (*(f"data.{key}" for key in READ), "evaluation.batch_size", "evaluation.cs")
MOST_GROUPS = 50  # values of a column by which it makes sense to group
MISSING = "(missing)"
UNGROUPED = "every row is taken for independent; say which are not: group names the column of the subject or patient"


def evaluate_external(
    model: str | Path | OrdinalModel,
    data: str | Path | pd.DataFrame | datasets.Dataset,
    root: str | Path = "",
    by: Sequence[str] = (),
    overrides: Sequence[str] | Mapping[str, Any] = (),
    out: str | Path | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> ExternalEvaluation:
    """Score a model on every row of data that it was not made from. Nothing of the model or its run is changed.

    Args:
        model: a run folder, a model folder, a name on the hub, or a model that is loaded.
        data: a table, a folder with a folder for every label, a data set of the hub, or rows in memory. Columns are
            called as in the model's run, if its folder is there, else `image` and `label`; overrides say others.
        root: folder that paths of pictures start from; default: that of the table.
        by: columns whose every value is a group with metrics of its own.
        overrides: keys of `data` by which rows are read (`READ`), `evaluation.batch_size` and `evaluation.cs`: dotted
            "key=value", or nested.
        out: folder to write evaluation.json, predictions.parquet, groups.csv and report.html to.
        overwrite: replace an evaluation that is there.

    Raises:
        FileNotFoundError: no such model, data or picture; FileExistsError: `out` holds something already;
        ValueError: what `data.load_whole` refuses, labels outside the model's ranks, columns that are not there.
    """
    folder = None if out is None else Path(out)
    by = [by] if isinstance(by, str) else by
    accelerator = _accelerator()
    if folder is not None:
        about = folder, "evaluation", "evaluation.json", OURS, overwrite
        from_main(accelerator, lambda: check_replaceable(*about))
    loaded, name, run = _in_memory(model) if isinstance(model, OrdinalModel) else served(model)
    config, options = _configured(data, root, overrides, run)
    ranks, part = loaded.head.ranks, _part(data, config, loaded.head.ranks)
    members = {column: _members(part, column) for column in dict.fromkeys(by)}  # refused before anything is computed

    loaded.to(accelerator.device)
    evaluator = Evaluator(accelerator, options.batch_size, config.workers, quiet or not accelerator.is_main_process)
    reference, points = loaded.reference, None
    predictions = predictions_of(loaded, part, evaluator.outputs(loaded, part, "evaluating"))
    if reference is not None and reference.num and len(part) > 1:
        points = evaluator.sampled(loaded, part)
    if len(wrong := np.flatnonzero(~np.isfinite(predictions.values))):
        raise ValueError(f"{part.place(int(wrong[0]))}: the model answers with a number that is not finite")
    counts = None if reference is None else reference.counts.tolist()
    if counts is None and run is not None:
        counts = run.read_metrics()["train_counts"]
    drift, notes = [], []
    if config.missing == "drop":
        notes.append("rows without a label are left out, where there are any (data.missing=drop)")
    if counts is not None:
        drift.append(label_drift(counts, part.ranks, ranks))
    else:
        notes.append("labels: not compared with those of the training, which the model does not remember")
    if reference is not None and points is not None:
        drift.append(feature_drift(reference, points))
    elif reference is not None and reference.num:
        notes.append("features: not compared, one picture is too few")
    else:
        why = "its run had no validation part" if reference is not None else "it was saved without"
        notes.append(f"features: not compared, the model does not remember those of its data ({why})")
    notes += [*_repeats(part), *from_main(accelerator, lambda: _leaks(run, part))]
    evaluation = replace(
        _scored(loaded, part, predictions, options, members, counts),
        name=name,
        drift=drift,
        notes=notes,
        record=_record(name, run, part),
    )
    if folder is not None:
        from_main(accelerator, lambda: evaluation.write(folder))
    return evaluation


def calibrate_external(
    model: str | Path | OrdinalModel,
    data: str | Path | pd.DataFrame | datasets.Dataset,
    root: str | Path = "",
    group: str | None = None,
    share: float = 0.5,
    kind: IntervalKind | Literal["auto"] = "auto",
    by_rank: bool = False,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    seed: int = 1,
    quiet: bool = False,
) -> tuple[OrdinalModel, dict[str, Any]]:
    """A model with a calibration from labelled pictures that it has not learnt from, such as those of another clinic.
    Its weights stay as they are, a calibration that it keeps is not used; nothing of the model given is changed.

    Args:
        model, data, root, overrides: see `evaluate_external`.
        group: column (subject, patient) whose equal rows are not independent; "": none. Default: that of the model's
            run, where its folder and that column are there.
        share: of the rows, or groups, that thresholds come from; by the others kind and scaling are chosen.
        kind, by_rank: see `calibrating.calibrate`.
        seed: by which rows are divided.

    Returns:
        the model as it is served, and `Calibrated.about`.

    Raises:
        FileNotFoundError: no such model, data or picture; ValueError: see `evaluate_external`, pictures that the model
            has learnt from, too few rows to divide, a kind that the method has no probabilities for.
    """
    if not 0 < share < 1:
        raise ValueError(f"share must lie between 0 and 1, got {share!r}")
    accelerator = _accelerator()
    loaded, _, run = _in_memory(model) if isinstance(model, OrdinalModel) else served(model)
    config, options = _configured(data, root, overrides, run)
    part = _part(data, config, loaded.head.ranks)
    quiet = quiet or not accelerator.is_main_process
    if group is None:
        group = "" if run is None else run.read_config().data.group
        group = group if group in part.rows.column_names else ""
        say(f"rows with the same {group!r} are one group, as in the model's run" if group else UNGROUPED, quiet)
    choosing, held_out, groups = kept_out(part, share, group, seed)
    for note in [*_repeats(part), *from_main(accelerator, lambda: _leaks(run, part))]:
        if note.startswith("WARNING"):
            raise ValueError(f"{note.removeprefix('WARNING: ')}: its errors on them promise too much")
        say(note, quiet)
    loaded.to(accelerator.device)
    evaluator = Evaluator(accelerator, options.batch_size, config.workers, quiet)
    answered = evaluator.answered(loaded, part)
    ranks, decoding = loaded.head.ranks, loaded.head.decoding
    halves = answered.select(choosing), answered.select(held_out)
    found = calibrate(ranks, decoding, *halves, groups, kind, by_rank)
    model = loaded.calibrated(found.calibration)
    if model.card is not None:
        model.card = recalibrated(model.card, calibration_section(found.about, ranks, part.source))
    return model, found.about


def _part(data: Any, config: DataConfig, ranks: Ranks) -> Part:
    """All rows."""
    in_memory = isinstance(data, pd.DataFrame | datasets.Dataset)
    return make_whole(data, config, ranks) if in_memory else load_whole(config, ranks)


def _accelerator() -> Accelerator:
    """As the processes are; a precision that a training on several of them has set stays."""
    started = torch.distributed.is_available() and torch.distributed.is_initialized()
    kept = AcceleratorState().mixed_precision if started and AcceleratorState._shared_state else "no"
    return make_accelerator(kept)


def _in_memory(model: OrdinalModel) -> tuple[OrdinalModel, str, RunFolder | None]:
    """A copy as it is served, so that the model itself stays where and as it is."""
    place = str(getattr(model, "name_or_path", ""))
    return deepcopy(model).deploy(), place or "a model in memory", find_model(place)[1] if place else None


def served(model: str | Path) -> tuple[OrdinalModel, str, RunFolder | None]:
    """The model of a run folder, a model folder or a name on the hub; its folder or name; its run, if it is here."""
    name, run = find_model(str(model))
    if run is not None:
        head_class(run.read_config().method)  # a method of one's own, which a model's files may not import
    return OrdinalModel.from_pretrained(name), name, run


def _configured(
    data: Any, root: str | Path, overrides: Sequence[str] | Mapping[str, Any], run: RunFolder | None
) -> tuple[DataConfig, EvaluationConfig]:
    """Where the rows are and how they are read: as the run's, where it says so, and as the overrides say."""
    said = dict(overrides) if isinstance(overrides, Mapping) else read_overrides(overrides)
    if idle := [key for key in flat_keys(said) if key not in ALLOWED]:
        raise ValueError(f"{idle[0]}: of no effect here; {near_matches(idle[0], ALLOWED)}")
    content: dict[str, Any] = {"data": {"root": str(root)} if root else {}}
    if run is not None:
        before = run.read_config()
        content["evaluation"] = {"batch_size": before.evaluation.batch_size, "cs": before.evaluation.cs}
        if before.data.source != "gauges":
            content["data"] |= {key: getattr(before.data, key) for key in CARRIED}
    found = _source(data, str(root), said.get("data", {}))
    if found["source"] == "folder":
        content["data"].pop("suffix", None)  # of a table that names files without
    content["data"] |= found
    config = parse_config(merge(content, said), "the evaluation")
    return config.data, config.evaluation


def _source(data: Any, root: str, said: Mapping[str, Any]) -> dict[str, str]:
    """Keys that say where rows are."""
    if isinstance(data, pd.DataFrame | datasets.Dataset):
        return {"source": "memory"}
    name = str(data)
    if os.path.isdir(name) and str(said.get("source", "folder")) == "folder":
        if root:
            raise ValueError(f"root is for tables; {name} is a folder with a folder for every label")
        return {"source": "folder", "root": name}
    if not os.path.isdir(name) and kind_of(name) == "table":
        return {"source": "table", "table": os.path.abspath(name)}
    return {"source": "hub", "hub": name}


def _members(part: Part, column: str) -> dict[str, np.ndarray]:
    """(N,) rows of each value of a column, in order of the values: numbers by size, other text as it sorts.

    Raises:
        ValueError: no such column, one of pictures, or one of too many values.
    """
    where = f"{part.source}: column {column!r} (by)"
    if column not in part.rows.column_names:
        raise ValueError(f"{where} is missing; it has {', '.join(map(repr, part.rows.column_names))}")
    cells = arrow_column(part.rows, column)
    kind = cells.type
    if not (pa.types.is_primitive(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ValueError(f"{where} holds {kind}; groups are numbers or text")
    feature = part.rows.features[column]
    if isinstance(feature, datasets.ClassLabel):
        texts = [None if cell is None or cell < 0 else feature.names[cell] for cell in cells.to_pylist()]
    else:
        if pa.types.is_floating(kind):
            cells = pc.if_else(pc.is_nan(cells), pa.scalar(None, kind), cells)
        texts = pc.utf8_trim_whitespace(cells.cast(pa.string())).to_pylist()
    named = np.asarray([text if text else MISSING for text in texts], dtype=object)
    values = sorted(set(named.tolist()), key=lambda text: (text == MISSING, _number(text), text))
    if len(values) > MOST_GROUPS:
        raise ValueError(
            f"{where} has {len(values)} values, at most {MOST_GROUPS} make groups; write a column of classes"
        )
    return {value: np.flatnonzero(named == value) for value in values}


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        return float("inf")
    return number if number == number else float("inf")


def _scored(
    model: OrdinalModel,
    part: Part,
    predictions: Predictions,
    options: EvaluationConfig,
    members: Mapping[str, Mapping[str, np.ndarray]],
    counts: Sequence[int] | None,
) -> ExternalEvaluation:
    """All rows and all groups, scored; what is to be said of the data is still missing."""
    ranks = model.head.ranks
    known = {
        name: metric
        for name, metric in metrics_with(options.cs).items()
        if not {"prototypes", "space"} & set(metric.of)
        and not ("probabilities" in metric.of and predictions.probabilities is None)
    }

    def scored(rows: np.ndarray) -> Score:
        chosen = predictions.select(rows)
        found = chosen.score(known, ranks)
        metrics = {name: found[name] for name in known}
        defined = {name: metric for name, metric in known.items() if metrics[name] is not None}
        return Score(rows, metrics, chosen.intervals(defined, ranks), coverage_of(model, chosen))

    constant = None
    if counts is not None:
        constant = against_constant(predictions.values, predictions.labels, constant_answer(counts, ranks.values))
    groups = {column: {value: scored(rows) for value, rows in each.items()} for column, each in members.items()}
    score = scored(np.arange(len(part)))
    return ExternalEvaluation(model, "", part, predictions, known, score, groups, counts, constant, (), (), {})


def _repeats(part: Part) -> list[str]:
    """Pictures that count more than once."""
    ids = copies([part])  # of more than `MOST_HASHED` by their paths
    if not (again := len(ids) - len(np.unique(ids))):
        return []
    two = sum(each.labels_differ for each in repeated([part], ids))
    text = f"{again} rows are of pictures that other rows have, too, and count as often"
    return [text + (f"; {two} pictures have two labels" if two else "")]


def _leaks(run: RunFolder | None, part: Part) -> list[str]:
    """Pictures that the model was trained on, or chosen by: they make it look better than it is."""
    if run is None:
        return ["whether the model has learnt from some of these pictures is not known: its run is not here"]
    config = run.read_config()
    if config.data.source == "gauges":
        return []
    if config.data.source == "memory":
        return ["whether the model has learnt from some of these pictures is not known: its run got them in memory"]
    try:
        parts = load_parts(config.data, config.ranks, config.seed)
        if changed := run.data_difference(fingerprints(parts)):
            return [f"whether the model has learnt from some of these pictures is not known: {changed}"]
        seen = [each for name, each in parts.named.items() if name != "test"]
        ids, begin = copies([*seen, part]), sum(map(len, seen))
    except (OSError, ValueError, ImportError) as error:
        return [f"whether the model has learnt from some of these pictures is not known: {error}"]
    known = int(np.isin(ids[begin:], ids[:begin]).sum())
    if not known:
        few = len(ids) <= MOST_HASHED
        return [] if few else ["pictures that the model has learnt from were looked for by their paths alone"]
    return [f"WARNING: {known} of these {len(part)} pictures are in the run's training, validation or calibration part"]


def _record(name: str, run: RunFolder | None, part: Part) -> dict[str, Any]:
    """Where the numbers come from."""
    weights = Path(name) / WEIGHTS
    return {
        "model": name,
        "model_sha256": content_digest([weights]) if weights.is_file() else None,
        "run": None if run is None else str(run.path),
        "data": {"source": part.source, **fingerprint(part)},
        "versions": versions(),
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
    }
