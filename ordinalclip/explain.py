"""Why a model answers what it answers: its distribution, where in the picture the value comes from, who is near.

ordinalclip explain runs/demo gauge.png --out why.png
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor

from ordinalclip.config import RunConfig
from ordinalclip.data import Part, Parts, load_parts
from ordinalclip.heads import Head, head_class, head_options
from ordinalclip.images import crop, load_image, normalise, resize
from ordinalclip.language import PromptHead
from ordinalclip.model import OrdinalModel
from ordinalclip.prompts import interpolation_weights
from ordinalclip.provenance import fingerprints
from ordinalclip.ranks import Ranks
from ordinalclip.results.explanation_figure import explanation
from ordinalclip.run_folder import RunFolder
from ordinalclip.training.distributed import make_accelerator
from ordinalclip.training.evaluation import Evaluator
from ordinalclip.training.preparation import use_precision

GRADIENTS, OCCLUSION = "integrated gradients", "occlusion"
PATCH, STRIDE, BLUR, SMOOTHING = 8, 16, 16, 32  # the side of the input is so many times as long
STEPS = (64, 128, 256, 512)  # of the path, as many as the sum needs
EXACT = 0.02  # error of the sum, as a share of the range of the ranks or of what is to be shared out, whichever is more
NOTHING = 1e-6  # of the range of the ranks: less is rounding
AT_ONCE = 32  # pictures in the encoder


class Interval(NamedTuple):
    """Ends in label units, and what is promised of them.

    Attributes:
        promised: the truth lies inside as often as `level` says: an interval that the model keeps. Otherwise the
            central one of the predicted distribution: what is below `low` and what is above `high` has at most
            (1 - level) / 2 each. That is what the model believes; how often it is right is not known.
    """

    low: float
    high: float
    level: float
    promised: bool = False

    @property
    def kind(self) -> str:
        """Of which kind it is, in words."""
        return (
            f"{100 * self.level:g} % interval" if self.promised else f"central {100 * self.level:g} %, not calibrated"
        )


@dataclass(frozen=True)
class Attribution:
    """Where in the picture a value comes from.

    Attributes:
        map: (S, S) float64, for every pixel of the encoder's input; above 0 it pushes the value up, below 0 down.
            Of integrated gradients in label units a pixel: the sum is that of the map before smoothing, which is
            `value` - `blurred` but for `error`. Of occlusion in label units: by how much the value falls, in the mean
            over the patches on this pixel, when the patch is blurred.
        value, blurred: what is attributed, of the picture and of the blurred picture, in label units.
        error: of the sum, in label units; of integrated gradients alone.
        note: what is to be known of this map, in a sentence; may be "".
    """

    map: np.ndarray
    value: float
    blurred: float
    error: float | None = None
    note: str = ""

    def share(self, region: np.ndarray) -> float:
        """Share of the map's absolute values inside a region, (S, S) in [0, 1]."""
        size = np.abs(self.map)
        return float((size * region).sum() / size.sum())


@dataclass(frozen=True)
class Explanation:
    """What can be said of one answer. What is not there is None, and `missing` says why.

    Attributes:
        name: of the picture.
        image: the picture as the encoder sees it, scaled and cropped, RGB.
        ranks: the label space.
        value: the model's answer, in label units.
        expected_value: the mean of the distribution, or `value` where there is none: what maps and base ranks explain.
        distribution: a row per rank: name, value, probability.
        interval: that of the model, if it keeps one of this level, else the central one of the distribution.
        attributions: maps by method, "integrated gradients" and "occlusion".
        neighbors: the nearest training pictures in the space that answers are read from (`Head.space`), nearest first:
            name, row of the training part, label, distance; `thumbnails` are they.
        base_ranks: of OrdinalCLIP, a row per base rank: see `base_rank_contributions`.
        missing: "distribution", a method's name, "neighbors" or "base_ranks" -> why it is not there, in a sentence.
    """

    name: str
    image: Image.Image
    ranks: Ranks
    value: float
    expected_value: float
    distribution: pd.DataFrame | None
    interval: Interval | None
    attributions: dict[str, Attribution]
    neighbors: pd.DataFrame | None
    thumbnails: list[Image.Image]
    base_ranks: pd.DataFrame | None
    missing: dict[str, str]

    def figure(self) -> Figure:
        """All of it, as wide as a column of a paper."""
        say, given, bases = self.ranks.say, self.distribution, self.base_ranks
        maps, notes, places = {}, [], None
        for method, found in self.attributions.items():
            if method == GRADIENTS:  # a pixel's part says little, and depends on how many there are
                maps[method] = found.map * (found.map.size / 100), "per 1 % of area"
            else:
                maps[method] = found.map, "for a patch"
        what = "the value" if given is None else "the mean of the distribution"
        if maps:
            notes.append(f"Colours: what pushes {what}, {say(self.expected_value)}, up (+) or down (\u2212).")
        if bases is not None:
            places = bases["place"].to_numpy(), bases["share"].to_numpy(), bases["share_of_flat"].to_numpy()
            notes.append("Base ranks: how much of the distribution rests on each; lines: if all ranks were as likely.")
        notes += [f"{method}: {found.note}." for method, found in self.attributions.items() if found.note]
        notes += [f"No {part}: {why}." for part, why in self.missing.items() if part != "base_ranks"]
        labels = [] if self.neighbors is None else self.neighbors["label"]
        return explanation(
            title=f"{Path(self.name).name}: {say(self.value)}",
            picture=self.image,
            maps=maps,
            ranks=self.ranks,
            answer=self.value,
            probabilities=None if given is None else given["probability"].to_numpy(),
            interval=self.interval and (*self.interval[:2], self.interval.kind),
            neighbors=list(zip(self.thumbnails, map(say, labels), strict=True)),
            bases=places,
            notes=notes,
        )


def explain(
    source: str | Path | OrdinalModel,
    picture: Any,
    parts: Parts | None = None,
    num_neighbors: int = 6,
    level: float = 0.9,
) -> Explanation:
    """Why a model answers what it answers about a picture.

    Args:
        source: a run folder, a saved model (folder or hub name), or a model, which is put into evaluation mode.
        picture: whatever `load_image` takes: a path, a PIL image, an array.
        parts: the run's data, if it was handed over in memory.
        num_neighbors: how many training pictures to show; 0: none, and the training part is not read.
        level: of the interval, above 0 and below 1.

    Raises:
        ImportError: captum is not installed; BrokenImageError: a picture that cannot be read; FileNotFoundError,
            ValueError: no such run or model, or one that diverged, is damaged or has lost its model.
    """
    return Explainer(source, parts, num_neighbors, level)(picture)


class Explainer:
    """`explain` for several pictures: model and training part are read once.

    Args: see `explain`, and
        quiet: show no progress.
    """

    def __init__(
        self,
        source: str | Path | OrdinalModel,
        parts: Parts | None = None,
        num_neighbors: int = 6,
        level: float = 0.9,
        quiet: bool = True,
    ):
        if not 0 < level < 1:
            raise ValueError(f"level of the interval must be above 0 and below 1, got {level:g}")
        if num_neighbors < 0:
            raise ValueError(f"num_neighbors must be 0 or more, got {num_neighbors}")
        _check_captum()
        self.parts, self.num_neighbors, self.level, self.quiet = parts, num_neighbors, level, quiet
        self.run: RunFolder | None = None
        self.config: RunConfig | None = None
        if isinstance(source, OrdinalModel):
            trained = source
        elif (Path(source) / "config.json").is_file() or not Path(source).is_dir():
            trained = OrdinalModel.from_pretrained(source)
        else:
            self.run = RunFolder(source)
            self.config = _finished(self.run)
            trained = self.run.read_model()
        self.base_ranks = _base_ranks(trained.head, self.config)
        self.model = trained.deploy()

    def __call__(self, picture: Any, name: str = "") -> Explanation:
        """Explain a picture.

        Raises:
            BrokenImageError: it cannot be read; NoNumber: the model's answer is not finite.
        """
        model, ranks, spec = self.model, self.model.head.ranks, self.model.config.pixel_spec
        name = name or (str(picture) if isinstance(picture, str | os.PathLike) else "picture")
        seen = crop(resize(load_image(picture, name), spec), spec.size)
        pixels = normalise(seen, spec)[None].to(next(model.encoder.parameters()))
        with torch.no_grad():
            features = model.encoder(pixels)
            outputs = model.head(features)
            prediction = model.answer(outputs)
            expected = float(model.head.expected_value(outputs))
            point = model.head.space(features).flatten(1).double().cpu().numpy()
        missing: dict[str, str] = {}
        distribution = interval = contributions = None
        if prediction.probabilities is None:
            missing["distribution"] = "this method gives one number, and no distribution over the ranks"
        else:
            probabilities = prediction.probabilities[0].double().cpu().numpy()
            columns = {"name": ranks.names, "value": ranks.values, "probability": probabilities}
            distribution = pd.DataFrame(columns)
            interval = central_interval(probabilities, ranks, self.level)
        if model.calibration is not None and model.calibration.keeps(self.level):
            low, high = model.interval(prediction, self.level)
            interval = Interval(float(low[0]), float(high[0]), self.level, promised=True)
        attributions = {}
        for method, attribute in ((GRADIENTS, integrated_gradients), (OCCLUSION, occlusion)):
            found = attribute(model, pixels)
            if isinstance(found, str):
                missing[method] = found
            else:
                attributions[method] = found
        neighbors: pd.DataFrame | None = None
        thumbnails: list[Image.Image] = []
        if isinstance(self.bank, str):
            missing["neighbors"] = self.bank
        else:
            neighbors, thumbnails = self._nearest(point, *self.bank)
        if isinstance(self.base_ranks, str):
            missing["base_ranks"] = self.base_ranks
        elif distribution is not None:
            contributions = base_rank_contributions(probabilities, ranks, self.base_ranks)
        return Explanation(
            name=name,
            image=seen,
            ranks=ranks,
            value=float(prediction.value[0]),
            expected_value=expected,
            distribution=distribution,
            interval=interval,
            attributions=attributions,
            neighbors=neighbors,
            thumbnails=thumbnails,
            base_ranks=contributions,
            missing=missing,
        )

    @cached_property
    def bank(self) -> tuple[Part, np.ndarray] | str:
        """The training part and its points in the space that answers are read from (N, E), or why it is not there."""
        if self.num_neighbors == 0:
            return "nobody asked for training pictures"
        if self.run is None or self.config is None:
            return "a saved model does not know the pictures that it was trained on; its run folder does"
        try:
            parts = self.parts or load_parts(self.config.data, self.config.ranks, self.config.seed)
            if changed := self.run.data_difference(fingerprints(parts)):
                return f"the data is not that of the run any more: {changed}"
            accelerator = make_accelerator(self.config.train.mixed_precision)
            use_precision(self.config.train)  # of cached features, too
            self.model.to(accelerator.device)
            evaluator = Evaluator.of(self.config, self.model, accelerator, self.quiet)
            title = "reading the training part"
            points = evaluator.outputs(self.model, parts.train, title, space=True)["space"]
        except (OSError, ValueError) as error:  # the rest of the explanation needs no data
            return f"the training pictures cannot be read: {error}"
        return parts.train, points.flatten(1).double().numpy()

    def _nearest(self, point: np.ndarray, train: Part, points: np.ndarray) -> tuple[pd.DataFrame, list[Image.Image]]:
        distances = np.sqrt(np.square(points - point).sum(axis=1))
        rows = np.argsort(distances, kind="stable")[: self.num_neighbors]
        columns = {
            "name": [train.names[row] for row in rows],
            "row": rows,
            "label": train.values[rows],
            "distance": distances[rows],
        }
        spec = self.model.config.pixel_spec
        return pd.DataFrame(columns), [crop(resize(train.image(row), spec), spec.size) for row in rows]


def central_interval(probabilities: np.ndarray, ranks: Ranks, level: float) -> Interval:
    """The central interval of (R,) probabilities: see `Interval`.

    >>> central_interval(np.array([0.04, 0.2, 0.5, 0.2, 0.06]), Ranks.of(5), 0.9)
    Interval(low=1.0, high=4.0, level=0.9, promised=False)
    """
    below, tail = np.cumsum(probabilities), (1 - level) / 2
    last = len(ranks) - 1
    low = int(np.searchsorted(below, tail, side="right"))  # the first rank with more than the tail up to it
    high = int(np.searchsorted(below, 1 - tail, side="left"))
    return Interval(ranks.values[min(low, last)], ranks.values[min(high, last)], level)


def base_rank_contributions(probabilities: np.ndarray, ranks: Ranks, weights: np.ndarray) -> pd.DataFrame:
    """How much of an expected value rests on each base rank of OrdinalCLIP.

    The embedding of rank r is sum_k w_rk b_k, a mixture of the K base embeddings with weights that sum to 1 (eq. 4 of
    the paper). The expected value sum_r p_r v_r is shared out in the same proportions:

        share_k = sum_r p_r w_rk,        contribution_k = sum_r p_r w_rk v_r.

    Shares sum to 1 and contributions to the expected value. This is bookkeeping, exact for given probabilities: what
    share of the answer is given through ranks that are made of base k. It is no counterfactual: the probabilities come
    from base embeddings through the text tower, which is not linear, and would change with them. Where weights are
    `piecewise`, bases far from the answer have no share; with the published `linear` ones all have, so that a share is
    to be read against that of a distribution that is flat.

    Args:
        probabilities: (R,).
        weights: (R, K), see `interpolation_weights`.

    Returns:
        a row per base rank: place (value at its place between the ranks), share, share_of_flat, contribution.
    """
    places = np.linspace(0, len(ranks) - 1, weights.shape[1])
    columns = {
        "place": np.interp(places, np.arange(len(ranks)), ranks.values),
        "share": probabilities @ weights,
        "share_of_flat": weights.mean(axis=0),
        "contribution": (probabilities * np.asarray(ranks.values)) @ weights,
    }
    return pd.DataFrame(columns)


def integrated_gradients(model: OrdinalModel, pixels: Tensor) -> Attribution | str:
    """Integrated gradients of the expected value along the straight line from the blurred picture to the picture.

    Sundararajan et al., "Axiomatic Attribution for Deep Networks", ICML 2017, by captum; the blurred picture as the
    start is one of those of Sturmfels et al., "Visualizing the Impact of Feature Attribution Baselines", Distill 2020.
    The sum over all pixels is the difference of the two values; steps are doubled until it is. The map is summed over
    channels and smoothed by a Gaussian, which keeps the sum.

    Args:
        pixels: (1, 3, S, S), as the encoder takes them.

    Returns:
        the map, or a sentence that says why there is none.
    """
    from captum.attr import IntegratedGradients

    head, blurred = model.head, _blurred(pixels)

    def value_of(pictures: Tensor) -> Tensor:
        return head.smooth_value(head(model.encoder(pictures)))

    with torch.enable_grad():
        if not value_of(pixels.clone().requires_grad_()).requires_grad:
            return "the value of this method has no gradient with respect to the picture"
    value, start = _values(value_of, pixels, blurred)
    allowed = EXACT * max(_range(head), abs(value - start))
    for steps in STEPS:
        found = IntegratedGradients(value_of).attribute(pixels, blurred, n_steps=steps, internal_batch_size=AT_ONCE)
        pieces = found[0].detach().sum(dim=0).double().cpu().numpy()
        error = value - start - pieces.sum()
        if abs(error) <= allowed:
            break
    if np.abs(pieces).sum() <= NOTHING * _range(head):
        return "the gradient is 0 all the way: no small change of the picture changes the value"
    notes = (
        [f"of {head.stand_in}: {value:.4g} where the answer is {_answer(model, pixels):.4g}"] if head.stand_in else []
    )
    if abs(error) > allowed:
        notes.append(f"the sum misses {error:.3g} of {value - start:.3g}, read it with care")
    return Attribution(_smoothed(pieces), value, start, error, "; ".join(notes))


def occlusion(model: OrdinalModel, pixels: Tensor) -> Attribution | str:
    """By how much the expected value falls when a patch of the picture is blurred, in the mean over patches.

    Zeiler, Fergus, "Visualizing and Understanding Convolutional Networks", ECCV 2014, by captum. Patches have an
    eighth of the side and are half a patch apart; the map is smoothed by a Gaussian. It asks for values only, and so
    holds for answers that have no gradient.

    Args, Returns: see `integrated_gradients`.
    """
    from captum.attr import Occlusion

    head, side = model.head, pixels.shape[-1]
    patch, stride = max(1, side // PATCH), max(1, side // STRIDE)

    def value_of(pictures: Tensor) -> Tensor:
        return head.expected_value(head(model.encoder(pictures)))

    blurred = _blurred(pixels)
    value, start = _values(value_of, pixels, blurred)
    found = Occlusion(value_of).attribute(
        pixels, (3, patch, patch), (3, stride, stride), baselines=blurred, perturbations_per_eval=AT_ONCE
    )
    falls = found[0].mean(dim=0).double().cpu().numpy()  # the same in all channels
    if np.abs(falls).max() <= NOTHING * _range(head):
        return "no patch that is blurred changes the value"
    return Attribution(_smoothed(falls), value, start)


def _values(value_of: Callable[[Tensor], Tensor], *pictures: Tensor) -> list[float]:
    with torch.no_grad():
        return [float(value_of(picture)) for picture in pictures]


def _answer(model: OrdinalModel, pixels: Tensor) -> float:
    return float(model.predict(pixels).value)


def _range(head: Head) -> float:
    return head.ranks.values[-1] - head.ranks.values[0]


def _blurred(pixels: Tensor) -> Tensor:
    """What the picture is without its details."""
    sigma = pixels.shape[-1] / BLUR
    return torch.from_numpy(gaussian_filter(pixels.cpu().numpy(), (0, 0, sigma, sigma))).to(pixels)


def _smoothed(pieces: np.ndarray) -> np.ndarray:
    """The sum stays: what would go beyond the border is mirrored."""
    return gaussian_filter(pieces, len(pieces) / SMOOTHING, mode="reflect")


def _finished(run: RunFolder) -> RunConfig:
    """The configuration of a finished run; a head of the user's own is imported, which its model may not do.

    Raises:
        FileNotFoundError, ValueError: no run that came to its end.
    """
    state = run.state()
    if state.kind in ("diverged", "pruned"):
        raise ValueError(f"{run.path}: {state.text}; it has no model to explain")
    config = run.read_config()
    head_class(config.method)
    return config


def _base_ranks(head: Head, config: RunConfig | None) -> np.ndarray | str:
    """(R, K) weights of the base ranks, or why there are none. A saved model holds prototypes alone, not what they are
    made of; the configuration of its run says that."""
    own = "every rank has an embedding of its own, there are no base ranks"
    if isinstance(head, PromptHead):
        weights = head.learner.weights
        return weights.double().cpu().numpy() if weights.numel() else own
    if config is None:
        return "the model holds its prototypes alone; if they were made of base ranks, the run folder says how"
    if not issubclass(head_class(config.method), PromptHead):
        return "this method has no prompts"
    given = {name: option.default for name, option in head_options(config.method).items()} | config.head
    if given.get("num_base_ranks") is None:
        return own
    return interpolation_weights(len(head.ranks), given["num_base_ranks"], given["interpolation"]).double().numpy()


def _check_captum() -> None:
    try:
        with contextlib.redirect_stderr(None):
            import captum.attr  # noqa: F401
    except ImportError as error:
        raise ImportError(f"explanations need captum: pip install 'ordinalclip[explain]' ({error})") from error
