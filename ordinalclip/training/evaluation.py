"""Predict a part once, score it whole, and keep every prediction."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ordinalclip.backbones import PixelSpec
from ordinalclip.config import RunConfig, apply_overrides, parse_config, read_yaml
from ordinalclip.data import Part, Parts, load_parts
from ordinalclip.heads import Decoding, Outputs, Targets, decode
from ordinalclip.images import crop, normalise
from ordinalclip.language import PrototypeHead
from ordinalclip.losses import at_least_float32
from ordinalclip.metrics import METRICS, best_residual_variance, cumulative_score, d5, mae_by_shots, ordinality
from ordinalclip.model import OrdinalModel
from ordinalclip.progress import Progress
from ordinalclip.ranks import Ranks
from ordinalclip.report import document_run
from ordinalclip.training.distributed import gather_outputs, make_accelerator
from ordinalclip.training.sampling import shares


class EvaluationDataset(Dataset):
    """The pixels of a part's images, by row."""

    def __init__(self, part: Part, spec: PixelSpec):
        self.part, self.spec = part, spec

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: int) -> Tensor:
        return normalise(crop(self.part.resized(index, self.spec), self.spec.size), self.spec)


@torch.no_grad()
def outputs_of(
    model: OrdinalModel,
    part: Part,
    accelerator: Accelerator,
    batch_size: int = 256,
    workers: int = 0,
    title: str = "",
    quiet: bool = False,
    space: bool = False,
) -> Outputs:
    """The head's outputs on a whole part, in order, on the CPU and the same on every process.

    Args:
        model: a model in evaluation mode, on the accelerator's device.
        batch_size: images at once in one process.
        space: also give `Head.space` of the features, as "space".
    """
    sizes = shares(len(part), accelerator.num_processes)
    start, size = sum(sizes[: accelerator.process_index]), sizes[accelerator.process_index]
    rows = list(range(start, start + size)) or [0]  # a process without rows computes one and gives none
    images = torch.utils.data.Subset(EvaluationDataset(part, model.config.pixel_spec), rows)
    loader = DataLoader(images, batch_size=batch_size, num_workers=workers)
    dtype = next(model.encoder.parameters()).dtype
    collected: list[Outputs] = []
    progress: Progress = Progress(None, title, total=len(rows), unit="images", quiet=quiet or not title)
    for pixels in loader:
        with accelerator.autocast():
            features = model.encoder(pixels.to(accelerator.device, dtype))
            outputs = model.head(features)
            if space:
                outputs = {**outputs, "space": model.head.space(features)}
        collected.append({name: at_least_float32(tensor) for name, tensor in outputs.items()})
        progress.advance(len(pixels))
    progress.close()
    joined = {name: torch.cat([outputs[name] for outputs in collected])[:size] for name in collected[0]}
    return {name: tensor.cpu() for name, tensor in gather_outputs(joined, sizes).items()}


def targets_of(part: Part) -> Targets:
    """All labels of a part."""
    return Targets(torch.from_numpy(part.values), torch.from_numpy(part.ranks))


def deployed(model: OrdinalModel, parts: Parts, outputs: Callable[[OrdinalModel, Part], Outputs]) -> OrdinalModel:
    """The model as it is served, its head first fitted on training and validation outputs if it wants that."""
    model.eval()
    if model.head.needs_fit:
        train = outputs(model, parts.train), targets_of(parts.train)
        part = parts.validation
        model.head.fit(train, None if part is None else (outputs(model, part), targets_of(part)))
    return model.deploy()


def predictions_of(model: OrdinalModel, outputs: Outputs) -> dict[str, np.ndarray]:
    """What a head answers, under every decoding.

    Returns:
        "median", "argmax" and "expectation": (N,) float64 values in the label's unit (all the same for heads without
        a distribution), "rank": (N,) likeliest or nearest rank, and "probabilities": (N, R) where there are some.
    """
    head = model.head
    with torch.no_grad():
        prediction = head.predict({name: tensor.to(model.device) for name, tensor in outputs.items()})
    if prediction.probabilities is None:
        value = prediction.value.double().cpu().numpy()
        return {**dict.fromkeys(get_args(Decoding), value), "rank": prediction.rank.cpu().numpy()}
    probabilities = prediction.probabilities.double().cpu()
    decoded = {how: decode(probabilities, head.ranks, how) for how in get_args(Decoding)}
    values = {how: each.value.numpy() for how, each in decoded.items()}
    return {**values, "rank": decoded["argmax"].rank.numpy(), "probabilities": probabilities.numpy()}


def score(
    predictions: dict[str, np.ndarray],
    part: Part,
    ranks: Ranks,
    cs: list[float],
    train_counts: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Figures of a part: headline ones, and all of them under each decoding.

    The headline is fixed in advance: everything by `median`, accuracy by `argmax`. With `train_counts`, the number of
    training labels of each rank, also the MAE by `metrics.shot_groups`.
    """
    table: dict[str, Any] = {}
    for how in get_args(Decoding):
        values = predictions[how]
        nearest = ranks.nearest(torch.from_numpy(values)).numpy()
        figures = {name: METRICS[name](values, part.values) for name in METRICS if name not in ("accuracy", "cs")}
        figures["accuracy"] = METRICS["accuracy"](nearest, part.ranks)
        figures.update({f"cs@{k:g}": cumulative_score(values, part.values, k) for k in cs})
        table[how] = {name: None if math.isnan(value) else value for name, value in figures.items()}
    if train_counts is not None:
        table["mae_by_shots"] = mae_by_shots(predictions["median"], part.values, part.ranks, train_counts)
    return {"num": len(part), **table["median"], "accuracy": table["argmax"]["accuracy"], **table}


def space_quality(points: Tensor, part: Part, ks: Sequence[int]) -> dict[str, float | None]:
    """D5 and residual variance of (N, E) points; None where a part is too small for them or they are not defined.

    The residual variance is that of the best k of `ks`, on all images or 10 random subsets of 1,000.
    """
    figures = {"d5": math.nan, "residual_variance": math.nan}
    if len(part) >= 6:
        figures["d5"] = d5(points, part.values)
    if len(part) >= min(ks):
        figures["residual_variance"], _ = best_residual_variance(points, part.values, ks)
    return {name: None if math.isnan(value) else value for name, value in figures.items()}


def model_ordinality(model: OrdinalModel) -> float | None:
    """Ordinality of the prototypes of a deployed model; None for heads without prototypes."""
    return ordinality(model.head.prototypes) if isinstance(model.head, PrototypeHead) else None


def evaluate_parts(
    model: OrdinalModel,
    parts: dict[str, Part],
    accelerator: Accelerator,
    config: RunConfig,
    folder: Path,
    quiet: bool,
    train_counts: Sequence[int],
) -> dict[str, Any]:
    """Predict and score parts, and keep every prediction in `folder/predictions.parquet`.

    Args:
        model: a deployed model.
        parts: by name; predictions of parts that are in the file already are replaced.
        train_counts: number of training labels of each rank.

    Returns:
        figures by part's name, see `score`.
    """
    figures, tables = {}, []
    for name, part in parts.items():
        options = config.evaluation
        title = f"evaluating {name}"
        space = options.space and name == "test"
        outputs = outputs_of(model, part, accelerator, options.batch_size, config.data.workers, title, quiet, space)
        points = outputs.pop("space", None)
        predictions = predictions_of(model, outputs)
        figures[name] = score(predictions, part, model.head.ranks, options.cs, train_counts)
        if points is not None:
            figures[name].update(space_quality(points, part, options.space_ks))
        tables.append(predictions_table(name, part, predictions))
    if accelerator.is_main_process and tables:
        path, temporary = folder / "predictions.parquet", folder / "predictions.partial"
        if path.is_file():
            earlier = pq.read_table(path)
            tables.insert(0, earlier.filter(pc.invert(pc.is_in(earlier["part"], pa.array(list(parts))))))
        pq.write_table(pa.concat_tables(tables), temporary)
        temporary.replace(path)
    return figures


def predictions_table(name: str, part: Part, predictions: dict[str, np.ndarray]) -> pa.Table:
    """One row per image: part, row, label, label_rank, rank, median, argmax, expectation, probabilities (or null)."""
    probabilities = predictions.get("probabilities")
    columns = {
        "part": pa.array([name] * len(part)),
        "row": pa.array(list(part.names)),
        "label": pa.array(part.values),
        "label_rank": pa.array(part.ranks),
        "rank": pa.array(predictions["rank"].astype(np.int64)),
        **{how: pa.array(predictions[how].astype(np.float64)) for how in get_args(Decoding)},
        "probabilities": pa.array(
            [None] * len(part) if probabilities is None else list(probabilities.astype(np.float32)),
            type=pa.list_(pa.float32()),
        ),
    }
    return pa.table(columns)


def evaluate_run(
    folder: Path, parts: Parts | None = None, overrides: Sequence[str] = (), quiet: bool = False
) -> dict[str, Any]:
    """Score a run's saved model on its test part.

    Args:
        folder: the run folder; its metrics.json and predictions.parquet take up the test part.
        parts: the run's data, if it is in memory already.
        overrides: dotted "key=value" for another place or kind of data; then nothing is written.

    Returns:
        the run's figures with those of the test part.

    Raises:
        FileNotFoundError: no finished run there; ValueError: no test part.
    """
    metrics = folder / "metrics.json"
    if not metrics.is_file():
        raise FileNotFoundError(f"{folder}: no finished run (metrics.json is missing)")
    config = parse_config(apply_overrides(read_yaml(folder / "config.yaml"), overrides), str(folder / "config.yaml"))
    accelerator = make_accelerator(config.train.mixed_precision)
    parts = parts or load_parts(config.data, config.ranks, config.seed)
    if parts.test is None:
        raise ValueError(f"{folder}: the configuration has no test part")
    model = OrdinalModel.from_pretrained(folder / "model").to(accelerator.device)
    ranks = model.head.ranks.rank_of(parts.test.values, parts.test.row_names())
    test = replace(parts.test, ranks=ranks.numpy())  # other data may hold other distinct labels
    figures = json.loads(metrics.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as elsewhere:
        target, counts = Path(elsewhere) if overrides else folder, figures["train_counts"]
        figures |= evaluate_parts(model, {"test": test}, accelerator, config, target, quiet, counts)
    if accelerator.is_main_process and not overrides:
        write_json(metrics, figures)
        if config.evaluation.report:
            document_run(folder, parts, model)
    return figures


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
