"""Predict a part once, score it whole."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from ordinalclip.calibrating import calibrate, coverage
from ordinalclip.calibration import Answered
from ordinalclip.config import EvaluationConfig, RunConfig
from ordinalclip.data import Part, Parts
from ordinalclip.drift import SAMPLE, Reference
from ordinalclip.heads import NoNumber, Outputs, Prediction, Targets, decode
from ordinalclip.images import Augmentation
from ordinalclip.losses import at_least_float32
from ordinalclip.metrics import Metric, metrics_with
from ordinalclip.model import OrdinalModel
from ordinalclip.predictions import DECODINGS, Predictions
from ordinalclip.progress import Progress
from ordinalclip.training.distributed import gather_outputs
from ordinalclip.training.features import FeatureCache
from ordinalclip.training.imbalance import Weighting, sample_weights
from ordinalclip.training.sampling import ViewDataset, shares
from ordinalclip.workers import decoded

logger = logging.getLogger(__name__)
TOLD = (0.5, 0.8, 0.9, 0.95, 0.99)  # levels whose coverage is told


@dataclass(frozen=True)
class Evaluator:
    """Predicts and scores whole parts, shared over the processes.

    Attributes:
        accelerator: the run's.
        batch_size: images at once in one process.
        workers: processes that decode images.
        quiet: show no progress.
        features: of the model's encoder, which are read; None: pictures are encoded.
        weighting, lds_sigma: of the training samples, for heads that are fitted: see `sample_weights`.
    """

    accelerator: Accelerator
    batch_size: int = 256
    workers: int = 0
    quiet: bool = False
    features: FeatureCache | None = None
    weighting: Weighting = "none"
    lds_sigma: float | None = None

    @classmethod
    def of(cls, config: RunConfig, model: OrdinalModel, accelerator: Accelerator, quiet: bool) -> Evaluator:
        """As a run's configuration says, of a model that is not prepared yet."""
        cached = config.model.features == "cached"
        features = FeatureCache(model, config, accelerator, quiet) if cached else None
        options = config.evaluation.batch_size, config.data.workers, quiet, features
        return cls(accelerator, *options, config.train.weighting, config.train.lds_sigma)

    @torch.no_grad()
    def outputs(self, model: OrdinalModel, part: Part, title: str = "", space: bool = False) -> Outputs:
        """The head's outputs on a whole part, in order, on the CPU and the same on every process.

        Args:
            model: a model in evaluation mode, on the accelerator's device.
            title: of the progress; "" shows none.
            space: also give `Head.space` of the features, as "space".
        """
        sizes = shares(len(part), self.accelerator.num_processes)
        place = self.accelerator.process_index
        start, size = sum(sizes[:place]), sizes[place]
        rows = list(range(start, start + size)) or [0]  # a process without rows computes one and gives none
        batches = [rows[begin : begin + self.batch_size] for begin in range(0, len(rows), self.batch_size)]
        collected: list[Outputs] = []
        progress: Progress = Progress(None, title, total=len(rows), unit="images", quiet=self.quiet or not title)
        with self._inputs(model, part, batches) as inputs:
            for batch in inputs:
                with self.accelerator.autocast():
                    features = batch if self.features else model.encoder(batch)
                    outputs = model.head(features)
                    if space:
                        outputs = {**outputs, "space": model.head.space(features)}
                collected.append({name: at_least_float32(tensor) for name, tensor in outputs.items()})
                progress.advance(len(batch))
        progress.close()
        joined = {name: torch.cat([outputs[name] for outputs in collected])[:size] for name in collected[0]}
        return {name: tensor.cpu() for name, tensor in gather_outputs(joined, sizes).items()}

    @contextmanager
    def _inputs(self, model: OrdinalModel, part: Part, batches: list[list[int]]) -> Iterator[Iterator[Tensor]]:
        """Pixels, or features where they are cached, of batches of rows, on the accelerator's device."""
        device, dtype = self.accelerator.device, next(model.encoder.parameters()).dtype
        if self.features is not None:
            features = self.features.evaluated(part)
            yield (features.take(rows).to(device) for rows in batches)
            return
        images = ViewDataset(part, model.config.pixel_spec, Augmentation())
        with decoded(images, batches, self.workers) as loaded:
            yield (pixels.to(device, dtype) for pixels in loaded)

    def remembered(self, model: OrdinalModel, parts: Parts, seed: int) -> Reference:
        """What a model is to remember of its data: labels of the training part, and features of at most `SAMPLE`
        pictures of the validation part, if there is one; every process computes them."""
        held_out = parts.validation
        return Reference.of(train_counts(parts), None if held_out is None else self.sampled(model, held_out, seed))

    @torch.no_grad()
    def sampled(self, model: OrdinalModel, part: Part, seed: int = 0) -> Tensor:
        """(N, E) points, in the space that answers are read from, of at most `SAMPLE` random pictures of a part.
        Without autocast: they are compared with those of other jobs."""
        rows = np.sort(np.random.default_rng(seed).permutation(len(part))[:SAMPLE]).tolist()
        batches = [rows[begin : begin + self.batch_size] for begin in range(0, len(rows), self.batch_size)]
        points = []
        with self._inputs(model, part, batches) as inputs:
            for batch in inputs:
                points.append(model.head.space(batch if self.features else model.encoder(batch)).cpu())
        return torch.cat(points)

    def start(self, model: OrdinalModel, parts: Parts) -> None:
        """What the head takes from the training part before the first step, if anything."""
        if model.head.needs_start:
            model.head.start(self._training(model, parts))

    def deployed(self, model: OrdinalModel, parts: Parts) -> OrdinalModel:
        """The model as it is served, its head first fitted on training and validation outputs if it wants that."""
        model.eval()
        if model.head.needs_fit:
            train, part = self._training(model, parts), parts.validation
            model.head.fit(train, None if part is None else (self.outputs(model, part), targets_of(part)))
        return model.deploy()

    def _training(self, model: OrdinalModel, parts: Parts) -> tuple[Outputs, Targets]:
        """Outputs and targets of the training part, with the weights that its samples have in training."""
        train = parts.train
        weights = sample_weights(train.ranks, len(parts.ranks), self.weighting, self.lds_sigma)
        targets = targets_of(train)._replace(weights=None if weights is None else torch.from_numpy(weights))
        return self.outputs(model, train), targets

    def calibrated(
        self, model: OrdinalModel, parts: Parts, options: EvaluationConfig
    ) -> tuple[OrdinalModel, dict[str, Any] | None]:
        """A deployed model with a calibration, and what is to be told of it; None where no pictures are kept for it,
        or the model answers them with what is no number. Of a kind of intervals that cannot be had it is said."""
        if parts.calibration is None or parts.validation is None:
            return model, None
        try:
            choosing, held_out = (self.answered(model, part) for part in (parts.validation, parts.calibration))
        except NoNumber as error:
            logger.warning("not calibrated: %s", error)
            return model, None
        about = model.head.ranks, model.head.decoding, choosing, held_out, parts.calibration_groups
        try:
            found = calibrate(*about, options.intervals, options.intervals_by_rank)
        except ValueError as error:  # too late to refuse: the training is done
            logger.warning("%s; evaluation.intervals=auto is done instead", error)
            found = calibrate(*about, "auto", options.intervals_by_rank)
        return model.calibrated(found.calibration), found.about

    @torch.no_grad()
    def answered(self, model: OrdinalModel, part: Part) -> Answered:
        """What the head of a deployed model answers to a part, not calibrated.

        Raises:
            NoNumber: answers that are not finite.
        """
        outputs = {name: tensor.to(model.device) for name, tensor in self.outputs(model, part).items()}
        value, rank, probabilities = model.head.predict(outputs)
        likely = None if probabilities is None else probabilities.cpu()
        targets = targets_of(part)
        return Answered(Prediction(value.cpu(), rank.cpu(), likely), targets.values, targets.ranks)

    def evaluate(
        self,
        model: OrdinalModel,
        parts: Mapping[str, Part],
        metrics: Mapping[str, Metric],
        train_counts: Sequence[int] | None = None,
        space_of: str = "",
    ) -> tuple[dict[str, Any], dict[str, Predictions]]:
        """Predict and score parts.

        Args:
            model: a deployed model.
            parts: by name.
            metrics: see `metrics_with`.
            train_counts: number of training labels of each rank.
            space_of: the part whose feature space is scored, too.

        Returns:
            metrics and predictions by part's name: see `Predictions.score`.
        """
        scores, predictions = {}, {}
        for name, part in parts.items():
            outputs = self.outputs(model, part, f"evaluating {name}", space=name == space_of)
            points = outputs.pop("space", None)
            predictions[name] = predictions_of(model, part, outputs)
            scores[name] = predictions[name].score(metrics, model.head.ranks, train_counts, points)
        return scores, predictions


def targets_of(part: Part) -> Targets:
    """All labels of a part."""
    return Targets(torch.from_numpy(part.values), torch.from_numpy(part.ranks))


@torch.no_grad()
def predictions_of(model: OrdinalModel, part: Part, outputs: Outputs) -> Predictions:
    """What a head answers to its outputs on a part, under every decoding; NaN throughout where one is no number."""
    head = model.head
    try:
        prediction = model.answer({name: tensor.to(model.device) for name, tensor in outputs.items()})
    except NoNumber:
        lost = torch.full((len(part),), torch.nan)
        prediction = Prediction(lost, head.ranks.nearest(lost))
    if prediction.probabilities is None:
        value = prediction.value.double().cpu().numpy()
        ranks = prediction.rank.cpu().numpy()
        return Predictions(part.names, part.values, part.ranks, dict.fromkeys(DECODINGS, value), ranks)
    probabilities = prediction.probabilities.double().cpu()
    decoded = {how: decode(probabilities, head.ranks, how) for how in DECODINGS}
    values = {how: each.value.numpy() for how, each in decoded.items()}
    ranks = decoded["argmax"].rank.numpy()
    return Predictions(part.names, part.values, part.ranks, values, ranks, probabilities.numpy())


def coverage_of(model: OrdinalModel, predictions: Predictions) -> list[dict[str, Any]]:
    """`calibrating.coverage` of the model's intervals at those levels of `TOLD` that it has; nothing of a model without
    a calibration, or whose answers are no numbers."""
    kept = model.calibration
    if kept is None or not np.isfinite(predictions.values).all():
        return []
    likely = predictions.probabilities
    value = torch.from_numpy(predictions.decoded[model.head.decoding].astype(np.float32))
    prediction = Prediction(
        value, model.head.ranks.nearest(value), None if likely is None else torch.from_numpy(likely).float()
    )
    answered = Answered(prediction, torch.from_numpy(predictions.labels), torch.from_numpy(predictions.label_ranks))
    kept = deepcopy(kept).cpu()
    return [coverage(kept, answered, level) for level in TOLD if level in kept.levels]


def metrics_of(config: RunConfig) -> dict[str, Metric]:
    """All metrics, with the options of a run."""
    return metrics_with(config.evaluation.cs, config.evaluation.space_ks)


def model_metrics(model: OrdinalModel, metrics: Mapping[str, Metric]) -> dict[str, float | None]:
    """Those metrics that are of a deployed model's rank prototypes; None for heads without."""
    columns = {"prototypes": model.head.rank_prototypes()}
    return {name: metric.score(columns) for name, metric in metrics.items() if "prototypes" in metric.of}


def train_counts(parts: Parts) -> list[int]:
    """Number of training labels of each rank."""
    return np.bincount(parts.train.ranks, minlength=len(parts.ranks)).tolist()
