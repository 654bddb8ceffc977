"""The claims of LARGE, tested: a line through a latent space that few labels fix, on gauges and on pictures of yours.

    python benchmarks/large.py --out benchmarks/results/large             # tanks and thermometers
    python benchmarks/large.py --out FOLDER --faces FACES --elpv CELLS    # real pictures, too: see --encoder
    python benchmarks/large.py --out FOLDER --trained                     # and what training does with as many labels
    python benchmarks/large.py --out FOLDER --quick                       # a first look

Protocol (as in the authors' code): 1,000 pictures at random are for training, the rest is the test, twice; of the
training pictures 2, 5, 10, 20, 100 or 1,000 are labelled, 1,000 times over; they are spread out in their distance from
the hyperplane, which needs no label; least squares. What costs labels beside the line stands apart:

* text: the direction is of two sentences and costs none;
* extremes, all: it lies between the extremes of all training labels; those of the line come on top;
* extremes, own: direction and line are of the same few labels, which are drawn at random.

Layers weigh the same (equal), as the generator's gradients say (generator), or have a slope each, by ridge regression
(separate). Rivals have the same numbers of labels, drawn at random: ridge regression on the features, its strength by
leave-one-out on these labels alone; the median of the labels; with --trained networks, which for real pictures learn on
frozen features.

FACES has labels.csv with columns file and age, CELLS one with file and label, four levels 0 to 3 that become 0 to 1.
FOLDER gets large.csv, README.md, linear.png and budgets.png.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import scipy
import sklearn
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn import functional as F

from baselines import large
from ordinalclip import OrdinalModel, Ranks, gauges
from ordinalclip.backbones import load_backbone
from ordinalclip.config import load_config
from ordinalclip.data.loading import make_parts
from ordinalclip.files import whole
from ordinalclip.heads import HeadContext, Targets, build_head
from ordinalclip.images import load_image, prepare
from ordinalclip.results.figures import BLUE, MARKERS, MUTED, ORANGE, PAGE, PALETTE, save_figure, styled
from ordinalclip.runs import train_run

TRAIN, BUDGETS = 1000, (2, 5, 10, 20, 100)  # the last budget is the whole training part
SPLITS = (0, 1)
DRAWS = 1000
SHARE = 0.1  # of the training labels, from either end, that a direction lies between
OWN_SHARE = 0.3  # likewise of few labels; of 0.1, 0.3 and 0.5 the best for gauges, which favours LARGE
STRENGTHS = tuple(10.0**power for power in range(-4, 4))  # of ridge regression, beside features of mean square 1
TRAINED = ("l1", "cnn", "ordinalclip")
NAMES = {"l1": "L1", "cnn": "CNN", "ordinalclip": "OrdinalCLIP"}
FACES = 3000  # of them, at random
FROZEN_STEPS = 200


@dataclass(frozen=True)
class Settings:
    """How much is done."""

    pictures: int = 3000  # gauges a domain
    train: int = TRAIN
    draws: int = DRAWS
    trained: int = 0  # draws for networks
    steps: int = 60  # of their training

    @property
    def budgets(self) -> tuple[int, ...]:
        return (*(budget for budget in BUDGETS if budget < self.train), self.train)

    def draws_of(self, budget: int, draws: int | None = None) -> int:
        """All labels can be drawn in one way only."""
        return 1 if budget == self.train else self.draws if draws is None else draws


@dataclass
class Domain:
    """Pictures with values, and what an encoder says of them.

    Attributes:
        codes: (N, L, D), float32.
        pooled: (N, P), the encoder's own features; None where they are the codes.
        text: (L, D), the direction of two sentences; None: there is none.
        weigh: normals (L, D) -> (L,), by the generator's gradients; None: there is no generator.
        orders: by their names, (N,) scores that pictures are sorted by without labels.
        encoder, ranks: for networks, a spec and keys of a configuration.
        text_tower, prompt: for heads on frozen features, in place of networks; no prompt: networks.
    """

    name: str
    latents: str
    unit: str
    pictures: Sequence[Any]
    values: np.ndarray
    codes: np.ndarray
    pooled: np.ndarray | None
    text: Tensor | None
    weigh: Callable[[Tensor], Tensor] | None
    orders: dict[str, np.ndarray]
    encoder: str
    ranks: dict[str, Any]
    text_tower: str = "tiny"
    prompt: str = ""

    @property
    def title(self) -> str:
        return f"{self.name}, {self.latents}"


@dataclass(frozen=True)
class Row:
    """A line of large.csv: the MAE over draws and splits. `r2` is the median over them: of two labels it has no mean
    worth the name."""

    domain: str
    latents: str
    method: str
    direction: str
    layers: str
    direction_labels: int
    line_labels: int
    mae: float
    std: float
    worst: float
    r2: float
    draws: int
    splits: int


# The protocol


def divided(count: int, train: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the training and of the test part.

    Raises:
        ValueError: no picture is left for the test.
    """
    if count <= train:
        raise ValueError(f"{count} pictures are too few: {train} are for training, and the test needs others")
    order = np.random.default_rng(seed).permutation(count)
    return order[:train], order[train:]


def draw_seed(split: int, draw: int) -> int:
    return 1_000_000 * split + draw


def random_rows(count: int, budget: int, split: int, draws: int) -> np.ndarray:
    """(draws, budget) rows of `count`, each draw without repetition."""
    return np.stack(
        [np.random.default_rng(draw_seed(split, draw)).permutation(count)[:budget] for draw in range(draws)]
    )


def spread_rows(distances: np.ndarray, budget: int, split: int, draws: int) -> np.ndarray:
    """(draws, budget) rows that are spread out in their distance (N,)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"only \d+ of \d+ codes differ")
        return np.stack([large.spread_out(distances, budget, draw_seed(split, draw)) for draw in range(draws)])


def lines(
    features: np.ndarray, labels: np.ndarray, strength: float = 0.0, pool: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Of many draws at once, `large.calibrate` (L = 1) and with a strength `large.calibrate_layers`, by ridge.

    Where features or labels are all equal, the slope is 0: nothing else can be said with such labels.

    Args:
        features: (R, n, L); labels: (R, n).
        pool: (N, L), whose deviations are the scale.

    Returns:
        slopes (R, L) and offsets (R,).
    """
    center, scale = features.mean(axis=1, keepdims=True), features.std(axis=1, keepdims=True)
    equal = scale <= 1e-6 * np.abs(features).max(axis=1, keepdims=True)  # rounding of float32
    if pool is not None:
        scale = np.broadcast_to(pool.std(axis=0), scale.shape)
    standard = np.where(equal, 0, (features - center) / np.where(equal, 1, scale))
    mean = labels.mean(axis=1)
    products = standard.transpose(0, 2, 1) @ standard
    # Where a feature is zero throughout, 1 stands for its product with itself.
    products += np.eye(features.shape[2]) * (strength + equal.transpose(0, 2, 1))
    slopes = np.linalg.solve(products, standard.transpose(0, 2, 1) @ (labels - mean[:, None])[:, :, None])[:, :, 0]
    slopes = slopes / np.where(equal, 1, scale)[:, 0]
    return slopes, mean - (slopes * center[:, 0]).sum(axis=1)


def ridge(gram: np.ndarray, test_gram: np.ndarray, values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Ridge regression with an offset, its strength by the leave-one-out error of each draw's labels.

    The same as scikit-learn's RidgeCV, for many draws at once and with products of features alone, which may be wide.
    Of equally good strengths the smallest is taken: of two labels the error says nothing, and the answer is then the
    shortest slope through both.

    Args:
        gram: (N, N) products of the training features; test_gram: (T, N) of those of the test.
        values: (N,); rows: (R, n) that are labelled.

    Returns:
        (R, T) answers.
    """
    answers = []
    for part in np.array_split(rows, -(-len(rows) * rows.shape[1] ** 2 // 4_000_000)):
        count = part.shape[1]
        labels = values[part]
        products = gram[part[:, :, None], part[:, None, :]]
        middles = products.mean(axis=2)
        centred = products - middles[:, :, None] - middles[:, None, :] + middles.mean(axis=1)[:, None, None]
        sizes, vectors = np.linalg.eigh(centred)
        sizes = sizes.clip(min=0)
        mean = labels.mean(axis=1)
        turned = np.einsum("rnk,rn->rk", vectors, labels - mean[:, None])
        duals, errors = [], []
        for strength in STRENGTHS:
            dual = np.einsum("rnk,rk->rn", vectors, turned / (sizes + strength))
            leverage = 1 / count + np.einsum("rnk,rk->rn", vectors**2, sizes / (sizes + strength))
            duals.append(dual)
            errors.append(np.square(strength * dual / (1 - leverage)).mean(axis=1))
        best = np.argmax(np.asarray(errors) <= np.min(errors, axis=0) * (1 + 1e-6) + 1e-12, axis=0)
        dual = np.asarray(duals)[best, np.arange(len(part))]
        spread = np.zeros((len(part), len(gram)))
        np.put_along_axis(spread, part, dual, axis=1)
        answers.append(spread @ test_gram.T + (mean - (dual * middles).sum(axis=1))[:, None])
    return np.concatenate(answers)


def grams(features: np.ndarray, train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Products (N, N) and (T, N) of features (all, ...), each standardised over the training pictures, not labels."""
    flat = features.reshape(len(features), -1)
    center, scale = flat[train].mean(axis=0), flat[train].std(axis=0)
    kept = scale > 1e-6 * np.abs(flat[train]).max(axis=0)
    standard = (flat[:, kept] - center[kept]) / (scale[kept] * np.float32(kept.sum() ** 0.5))
    return tuple((standard[part] @ standard[train].T).astype(np.float64) for part in (train, test))  # type: ignore[return-value]


def own_lines(codes: np.ndarray, values: np.ndarray, rows: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Direction and line of the same labels, for many draws: normals as long as the line is steep, and offsets.

    Where too many labels are equal for so many at either end, one of each end serves; where all are, the answer is
    that label.

    Args:
        codes: (N, K); values: (N,); rows: (R, n).

    Returns:
        (R, K) and (R,).
    """
    normals = np.zeros((len(rows), codes.shape[1]))
    for number, row in enumerate(rows):
        points, labels = codes[row][:, None], values[row]
        if np.ptp(labels) > 0:
            try:
                found = large.direction_from_extremes(points, labels, OWN_SHARE, seed=seed)
            except ValueError:
                found = large.direction_from_extremes(points, labels, 1 / len(row), seed=seed)
            normals[number] = found.normal[0].double().numpy()
    distances = np.einsum("rnk,rk->rn", codes[rows], normals)
    slopes, offsets = lines(distances[:, :, None], values[rows])
    return normals * slopes, offsets


def scores(answers: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(R, T) answers -> (2, R): MAE and R2."""
    errors = answers - values
    r2 = 1 - np.square(errors).mean(axis=1) / np.square(values - values.mean()).mean()
    return np.stack([np.abs(errors).mean(axis=1), r2])


Key = tuple[str, str, str, int, int]  # method, direction, layers, labels of the direction, labels of the line


def large_scores(domain: Domain, settings: Settings, split: int) -> Iterator[tuple[Key, np.ndarray]]:
    """(2, R) scores of LARGE in one split, by direction, layer weights and budget."""
    train, test = divided(len(domain.values), settings.train, split)
    values = domain.values[train]
    for direction, normals in directions(domain, train, split).items():
        cost = 0 if direction == "text" else settings.train
        distances = large.signed_distances(domain.codes, normals).double().numpy()
        several = np.count_nonzero(distances.std(axis=0)) > 1  # a text direction in a CLIP has one layer
        ways: dict[str, tuple[np.ndarray, np.ndarray, float]] = {}
        equal = distances.mean(axis=1)
        ways["equal"] = equal, equal[:, None], 0.0
        if domain.weigh is not None:
            weighted = large.weighted_distance(distances, domain.weigh(normals)).numpy()
            ways["generator"] = weighted, weighted[:, None], 0.0
        if several:
            ways["separate"] = equal, distances, 1.0
        for budget in settings.budgets:
            drawn: dict[int, np.ndarray] = {}
            for layers, (single, features, strength) in ways.items():
                if id(single) not in drawn:
                    drawn[id(single)] = spread_rows(single[train], budget, split, settings.draws_of(budget))
                rows = drawn[id(single)]
                slopes, offsets = lines(features[train][rows], values[rows], strength, features[train])
                answers = slopes @ features[test].T + offsets[:, None]
                yield ("LARGE", direction, layers, cost, budget), scores(answers, domain.values[test])

    flat = domain.codes.reshape(len(domain.codes), -1)
    # Any normal is a sum of training codes, so that coordinates in their span are all there is to know.
    basis = scipy.linalg.qr(flat[train].T, mode="economic")[0] if flat.shape[1] > settings.train else None
    short = flat if basis is None else flat @ basis
    for budget in settings.budgets[:-1]:
        rows = random_rows(settings.train, budget, split, settings.draws_of(budget))
        normals, offsets = own_lines(short[train], values, rows, split)
        answers = normals @ short[test].T + offsets[:, None]
        yield ("LARGE", "extremes, own", "equal", budget, budget), scores(answers, domain.values[test])


def directions(domain: Domain, train: np.ndarray, split: int) -> dict[str, Tensor]:
    """Normals (L, D) that are known before the line's labels are."""
    codes, values = torch.from_numpy(domain.codes[train]), domain.values[train]
    found = {} if domain.text is None else {"text": domain.text}
    return {**found, "extremes, all": large.direction_from_extremes(codes, values, SHARE, seed=split).normal}


def rival_scores(domain: Domain, settings: Settings, split: int) -> Iterator[tuple[Key, np.ndarray]]:
    """(2, R) scores of rivals on the same random draws."""
    train, test = divided(len(domain.values), settings.train, split)
    values, truth = domain.values[train], domain.values[test]
    products = {"all layers": grams(domain.codes, train, test)}
    if domain.pooled is not None:
        products["pooled"] = grams(domain.pooled, train, test)
    for budget in settings.budgets:
        rows = random_rows(settings.train, budget, split, settings.draws_of(budget))
        for layers, pair in products.items():
            yield ("ridge", "", layers, 0, budget), scores(ridge(*pair, values, rows), truth)
        constant = np.repeat(np.median(values[rows], axis=1)[:, None], len(test), axis=1)
        yield ("constant", "", "", 0, budget), scores(constant, truth)


def trained_scores(domain: Domain, settings: Settings, split: int) -> Iterator[tuple[Key, np.ndarray]]:
    """(2, R) scores of networks that are trained on the first of the same random draws."""
    train, test = divided(len(domain.values), settings.train, split)

    def frame(rows: np.ndarray) -> pd.DataFrame:
        return pd.DataFrame({"image": [domain.pictures[row] for row in rows], "label": domain.values[rows]})

    for budget in settings.budgets:
        drawn = random_rows(settings.train, budget, split, settings.draws_of(budget, settings.trained))
        for method in TRAINED:
            found = []
            for rows in drawn:
                options = {
                    "seed": split,
                    "model.backbone": domain.encoder,
                    "model.text": "tiny" if method == "ordinalclip" and domain.encoder != "tiny" else "",
                    "data.duplicates": "allow",
                    "ranks.unused": "true",
                    **domain.ranks,
                    "train.max_steps": settings.steps,
                    "train.batch_size": min(32, budget),
                    "evaluation.report": "false",
                }
                # The learning rates of the method's own configuration, which is for few labels.
                with tempfile.TemporaryDirectory() as folder:
                    options["output_dir"] = f"{folder}/run"
                    config = load_config(method, [f"{key}={value}" for key, value in options.items()])
                    data = config.data.model_copy(update={"source": "memory", "shots": None})
                    config = config.model_copy(update={"data": data})
                    raw = {"train": frame(train[rows]), "test": frame(test)}
                    parts = make_parts(raw, config.data, config.ranks, config.seed)
                    metrics = train_run(config, parts, quiet=True)["test"][config.evaluation.decoding]
                found.append((metrics["mae"], metrics["r2"]))
            yield (NAMES[method], "", "", 0, budget), np.array(found).T


def frozen_scores(domain: Domain, settings: Settings, split: int) -> Iterator[tuple[Key, np.ndarray]]:
    """(2, R) scores of the same methods on frozen features, for encoders that take too long to train on a CPU.

    One setting for all, not tuned: AdamW, 1e-3, `FROZEN_STEPS` steps, features centred and scaled by the training part.
    """
    assert domain.pooled is not None
    train, test = divided(len(domain.values), settings.train, split)
    pooled = torch.from_numpy(domain.pooled).float()
    centred = pooled - pooled[train].mean(dim=0)
    features = centred / centred[train].square().mean().sqrt()  # as ridge regression has them
    values = torch.from_numpy(domain.values).float()
    ranks = Ranks.linear(*(domain.ranks[f"ranks.{key}"] for key in ("low", "high", "num")))
    text = load_backbone(domain.text_tower).text
    prompts = {"prompt": domain.prompt, "init_from_names": True}
    for budget in settings.budgets:
        drawn = random_rows(settings.train, budget, split, settings.draws_of(budget, settings.trained))
        for method in TRAINED:
            found = []
            for rows in drawn:
                chosen = torch.from_numpy(train[rows])
                mean, std = values[chosen].mean().item(), values[chosen].std().item() or 1.0
                torch.manual_seed(split)
                context = HeadContext(
                    ranks, features.shape[1], text=text, shared_space=False, label_mean=mean, label_std=std
                )
                head = build_head(method, context, prompts if method == "ordinalclip" else {}).train()
                learning = [parameter for parameter in head.parameters() if parameter.requires_grad]
                optimizer = torch.optim.AdamW(learning, 1e-3, weight_decay=5e-4)
                for _ in range(FROZEN_STEPS if settings.steps > 10 else settings.steps):
                    batch = chosen[torch.randperm(budget)[:32]]
                    targets = Targets(values[batch], ranks.rank_of(values[batch]))
                    optimizer.zero_grad()
                    head.loss(head(features[batch]), targets)["loss"].backward()
                    optimizer.step()
                with torch.no_grad():
                    answers = head.eval().predict(head(features[torch.from_numpy(test)])).value
                found.append(scores(answers[None].double().numpy(), domain.values[test])[:, 0])
            yield (f"{NAMES[method]}, frozen encoder", "", "", 0, budget), np.array(found).T


Found = dict[Key, list[np.ndarray]]  # by split (2, R)


def study(domain: Domain, settings: Settings, networks: dict[Any, Any] | None = None) -> Found:
    """All scores of a domain. `networks` keeps those of networks: latents of the same pictures share them."""
    found: Found = {}
    networks = {} if networks is None else networks
    for split in SPLITS:
        each = [*large_scores(domain, settings, split), *rival_scores(domain, settings, split)]
        if settings.trained:
            known = domain.name, domain.encoder, split
            if known not in networks:
                scored = frozen_scores if domain.prompt else trained_scores
                networks[known] = list(scored(domain, settings, split))
            each += networks[known]
        for key, one in each:
            found.setdefault(key, []).append(one)
    return found


def rows_of(domain: Domain, found: Found) -> list[Row]:
    """Lines of large.csv."""
    rows = []
    for key, each in found.items():
        mae, r2 = np.concatenate(each, axis=1)
        numbers = float(mae.mean()), float(mae.std()), float(mae.max()), float(np.median(r2))
        rows.append(Row(domain.name, domain.latents, *key, *numbers, each[0].shape[1], len(each)))
    return rows


# What is asked beside the budgets


def linearity(domain: Domain, settings: Settings) -> dict[str, np.ndarray]:
    """By direction, (splits, 3): R2 on the test of a line and of a cubic in the distance, Spearman's correlation."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for split in SPLITS:
        train, test = divided(len(domain.values), settings.train, split)
        for name, normals in directions(domain, train, split).items():
            x = large.weighted_distance(large.signed_distances(domain.codes, normals)).double().numpy()
            x = (x - x[train].mean()) / x[train].std()
            fits = [np.polynomial.Polynomial.fit(x[train], domain.values[train], degree) for degree in (1, 3)]
            r2 = [float(scores(fit(x[test])[None], domain.values[test])[1, 0]) for fit in fits]
            found.setdefault(name, []).append((*r2, float(spearmanr(x[test], domain.values[test]).statistic)))
    return {name: np.array(each) for name, each in found.items()}


def layer_differences(found: Found) -> list[tuple[str, str, int, int, np.ndarray]]:
    """MAE with layers weighed less that of equal weights: direction, layers, labels, and (splits, R) pairs.

    Pairs have the same split and visit the training pictures in the same order.
    """
    pairs = []
    for key, each in found.items():
        method, direction, layers, cost, budget = key
        if method == "LARGE" and layers != "equal":
            equal = found[(method, direction, "equal", cost, budget)]
            gaps = np.array([one[0] - other[0] for one, other in zip(each, equal, strict=True)])
            pairs.append((direction, layers, cost, budget, gaps))
    return pairs


@torch.no_grad()
def inversion(domain: Domain, generator: torch.nn.Module, settings: Settings, spec: Any) -> dict[str, np.ndarray]:
    """What is lost on the way through the code: by split, errors of a reader of real pictures.

    The reader is ridge regression on all layers of the small CLIP, of real training pictures at the generator's size.
    """
    clip = OrdinalModel.build("tiny", Ranks.linear(0, 100, 101), "large", {"unit_length": True}).eval()
    real = torch.stack([prepare(picture, spec) for picture in domain.pictures])
    again = torch.cat([generator(part) for part in torch.from_numpy(domain.codes).split(64)])
    size, seen = clip.config.pixel_spec.size, []
    mean, std = (
        torch.tensor(each)[:, None, None] for each in (clip.config.pixel_spec.mean, clip.config.pixel_spec.std)
    )
    for pictures in (real, again.clamp(-1, 1)):
        larger = [F.interpolate((each + 1) / 2, size=(size, size), mode="bilinear") for each in pictures.split(64)]
        seen.append(torch.cat([clip.head(clip.encoder((each - mean) / std))["codes"] for each in larger]).numpy())
    found: dict[str, list[float]] = {}
    for split in SPLITS:
        train, test = divided(len(domain.values), settings.train, split)
        both = np.concatenate([seen[0], seen[1][test]])
        gram, products = grams(both, train, np.concatenate([test, np.arange(len(real), len(both))]))
        answers = ridge(gram, products, domain.values[train], np.arange(settings.train)[None])[0]
        one, other, truth = answers[: len(test)], answers[len(test) :], domain.values[test]
        errors = {
            "MAE of real pictures": np.abs(one - truth).mean(),
            "MAE of their reconstructions": np.abs(other - truth).mean(),
            "mean absolute difference of the two": np.abs(one - other).mean(),
            "mean difference (reconstruction less real)": (other - one).mean(),
            "MAE of the training median": np.abs(truth - np.median(domain.values[train])).mean(),
            "pixel RMSE of 255": 127.5 * float((again[test] - real[test]).square().mean().sqrt()),
        }
        for name, error in errors.items():
            found.setdefault(name, []).append(float(error))
    return {name: np.array(each) for name, each in found.items()}


# Domains


def encoded(model: OrdinalModel, pictures: Sequence[Any], cache: Path | None) -> np.ndarray:
    """(N, L, D) codes of pictures, PIL images or files, kept in `cache` under a digest of encoder and pictures."""
    digest = hashlib.sha256(repr(model.config.pixels).encode())
    for name, tensor in model.encoder.state_dict().items():
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    for picture in pictures:
        digest.update(picture.read_bytes() if isinstance(picture, Path) else picture.tobytes())
    file = None if cache is None else cache / f"{digest.hexdigest()[:24]}.npz"
    if file is not None and file.is_file():
        return np.load(file)["codes"]
    parts = []
    with torch.no_grad():
        for start in range(0, len(pictures), 64):
            batch = [prepare(load_image(picture), model.config.pixel_spec) for picture in pictures[start : start + 64]]
            parts.append(model.encoder(torch.stack(batch)).numpy())
    codes = np.concatenate(parts)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole(file) as aside, open(aside, "wb") as stream:
            np.savez(stream, codes=codes)
    return codes


def domain_of(
    name: str,
    spec: str,
    pictures: Sequence[Any],
    values: np.ndarray,
    ends: tuple[str, str],
    ranks: dict[str, Any],
    settings: Settings,
    unit: str = "",
    cache: Path | None = None,
) -> tuple[Domain, OrdinalModel]:
    """A domain in the latents of an encoder, and the model whose head says what text and generator mean there.

    Codes of a generator are as they are. Those of other encoders are made unit vectors, layer by layer: their lengths
    differ from layer to layer, and similarities in a CLIP do without.
    """
    generated = spec.split(":")[0] == "e4e"
    options = {"direction": "text", "source": ends[0], "target": ends[1], "unit_length": not generated}
    text = "tiny" if generated else ""
    model = OrdinalModel.build(spec, Ranks.linear(0, 1, 2), "large", options, text=text).eval()
    raw = encoded(model, pictures, cache)
    with torch.no_grad():
        codes = torch.cat([model.head(part)["codes"] for part in torch.from_numpy(raw).split(256)])
    head: Any = model.head
    # What the method itself finds: the head's own steps, which its `fit` goes through.
    normals = None if head._text is None else head._direction(codes[:2], torch.zeros(2))
    assert model.config.layer_dims is not None
    domain = Domain(
        name,
        "GAN codes" if generated else f"layers of {spec}",
        unit,
        pictures,
        values,
        codes.numpy(),
        None if generated else raw[:, -1, : model.config.layer_dims[-1]],
        normals,
        head._layer_weights if generated else None,
        {},
        "tiny" if generated else spec,
        ranks,
    )
    if normals is not None:
        domain.orders["text"] = large.weighted_distance(large.signed_distances(codes, normals)).numpy()
    if generated:
        (generator,) = head._generator
        found = large.sefa_directions(large.modulation_weights(generator.state_dict()), 5)
        for number, direction in enumerate(found, 1):
            spread = direction.expand(codes.shape[1:]).contiguous()
            domain.orders[f"SeFa {number}"] = large.weighted_distance(large.signed_distances(codes, spread)).numpy()
        seen = torch.cat([head._see(part) for part in _pixels(pictures, model).split(64)]).detach()
        domain.orders["CLIP directly"] = (F.normalize(seen, dim=1) @ head._text).numpy()
    return domain, model


def _pixels(pictures: Sequence[Any], model: OrdinalModel) -> Tensor:
    return torch.stack([prepare(picture, model.config.pixel_spec) for picture in pictures])


GAUGE_RANKS = {"ranks.low": 0, "ranks.high": 100, "ranks.num": 101}


def gauge_domain(
    kind: str, style: str, spec: str, settings: Settings, cache: Path | None
) -> tuple[Domain, OrdinalModel]:
    """Gauges of one kind."""
    pictures, values = zip(*gauges.drawn_gauges(kind, settings.pictures, seed=7, style=style), strict=True)
    name = f"{style} {kind}s"
    return domain_of(name, spec, pictures, np.array(values), ("0", "100"), GAUGE_RANKS, settings, "of 100", cache)


def listed(folder: Path, column: str, most: int | None = None) -> tuple[list[Path], np.ndarray]:
    """Files of a folder's labels.csv and their labels; at most `most` of them, at random.

    Raises:
        ValueError: no such table or columns, or a label that is no number.
    """
    table = folder / "labels.csv"
    if not table.is_file():
        raise ValueError(f"{table} is missing: it is to say file,{column} of every picture")
    rows = pd.read_csv(table)
    if lacking := {"file", column} - set(rows):
        raise ValueError(f"{table} lacks the column {sorted(lacking)[0]!r}; it has {', '.join(rows)}")
    values = pd.to_numeric(rows[column], errors="coerce").to_numpy(dtype=float)
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ValueError(f"{table}, line {row + 2}: {column} is {rows[column][row]!r}, no number")
    order = np.random.default_rng(0).permutation(len(rows))[:most]
    return [folder / rows["file"][row] for row in order], values[order]


def real_domains(arguments: argparse.Namespace, settings: Settings) -> Iterator[Domain]:
    """Faces and solar cells, where their folders are given."""
    if arguments.faces is not None:
        files, ages = listed(arguments.faces, "age", FACES)
        low, high = int(ages.min()), int(ages.max())
        ranks = {"ranks.low": low, "ranks.high": high, "ranks.num": high - low + 1}
        ends = ("a young person", "an old person")
        faces = domain_of("faces", arguments.encoder, files, ages, ends, ranks, settings, "years", arguments.cache)[0]
        yield replace(faces, text_tower=arguments.text, prompt="the age of the person is")
    if arguments.elpv is not None:
        files, levels = listed(arguments.elpv, "label")
        if not set(levels) <= {0, 1, 2, 3}:
            raise ValueError(f"{arguments.elpv / 'labels.csv'}: labels must be 0, 1, 2 or 3, got {sorted(set(levels))}")
        ranks = {"ranks.low": 0, "ranks.high": 1, "ranks.num": 4}
        ends = ("an intact solar cell", "a defective solar cell")
        cells = domain_of(
            "solar cells", arguments.encoder, files, levels / 3, ends, ranks, settings, "", arguments.cache
        )[0]
        yield replace(cells, text_tower=arguments.text, prompt="the defect of the solar cell is")


# Figures


@styled
def linear_figure(domains: Sequence[Domain], settings: Settings) -> Figure:
    """Value against distance in the first split's test, with the line of all training labels: a panel a direction."""
    panels = []
    for domain in domains:
        train, test = divided(len(domain.values), settings.train, SPLITS[0])
        for name, normals in directions(domain, train, SPLITS[0]).items():
            x = large.weighted_distance(large.signed_distances(domain.codes, normals)).double().numpy()
            panels.append((domain, name, (x - x[train].mean()) / x[train].std(), train, test))
    figure, grid = _grid(len(panels), 4, 1.75)
    for axes, (domain, name, x, train, test) in zip(grid, panels, strict=True):
        slopes, offsets = lines(x[train][None, :, None], domain.values[train][None])
        shown = np.random.default_rng(0).permutation(test)[:600]
        jitter = np.random.default_rng(1).uniform(-0.02, 0.02, len(shown)) * (len(np.unique(domain.values)) < 12)
        axes.scatter(x[shown], domain.values[shown] + jitter, s=4, color=BLUE, alpha=0.4, linewidths=0)
        low, high = domain.values.min(), domain.values.max()
        ends = np.array([x[shown].min(), x[shown].max()])
        axes.plot(ends, slopes[0, 0] * ends + offsets[0], color=ORANGE, linewidth=1.4)
        axes.set_ylim(low - 0.08 * (high - low), high + 0.08 * (high - low))
        axes.set_title(f"{domain.name}\n{domain.latents}\n{name}", loc="left", fontsize=7)
        axes.set_ylabel(f"value ({domain.unit})" if domain.unit else "value")
        axes.set_xlabel("distance (SD)")
    return figure


SHOWN = {  # method, direction, layers: how a line is called
    ("LARGE", "text", "equal"): "LARGE, text",
    ("LARGE", "extremes, all", "equal"): "LARGE, extremes of all",
    ("LARGE", "extremes, all", "separate"): "the same, slope per layer",
    ("LARGE", "extremes, own", "equal"): "LARGE, extremes of these labels",
    ("ridge", "", "all layers"): "ridge, all layers",
    ("constant", "", ""): "constant",
    **{(name, "", ""): name for name in NAMES.values()},
    **{(f"{name}, frozen encoder", "", ""): name for name in NAMES.values()},
}


@styled
def budgets_figure(domains: Sequence[Domain], rows: Sequence[Row]) -> Figure:
    """MAE against the number of the line's labels, with the standard deviation over draws: a panel a domain."""
    figure, grid = _grid(len(domains), 3, 2.1)
    handles: dict[str, Any] = {}
    for axes, domain in zip(grid, domains, strict=True):
        means, highest = [], 0.0
        names = list(dict.fromkeys(SHOWN.values()))
        for key, label in SHOWN.items():
            number = names.index(label)
            own = [row for row in rows if (row.domain, row.latents) == (domain.name, domain.latents)]
            own = [row for row in own if (row.method, row.direction, row.layers) == key]
            if not own:
                continue
            budgets, mae, std = (
                np.array([getattr(row, name) for row in own]) for name in ("line_labels", "mae", "std")
            )
            means += mae.tolist()
            if label == "constant":
                highest = mae.max()  # what is worse than this leaves the panel
                (handles[label],) = axes.plot(budgets, mae, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
                continue
            colour, rival = PALETTE[number % len(PALETTE)], key[0] != "LARGE"
            dash: Any = (0, (2, 1)) if label in NAMES.values() else "-"
            inside = "white" if label in NAMES.values() else colour
            style = {
                "color": colour,
                "marker": MARKERS[number % len(MARKERS)],
                "markersize": 3,
                "linestyle": dash,
                "mfc": inside,
            }
            shifted = budgets * 1.03 ** (number - 3)
            bars = np.where(std < mae, std, np.nan)  # a few draws that are far off, where it is larger: see the table
            handles[label] = axes.errorbar(shifted, mae, bars, linewidth=1.1, elinewidth=0.5, zorder=3 - rival, **style)
        axes.set(xscale="log", yscale="log", ylim=(0.8 * min(means), 1.5 * highest))
        places = sorted({row.line_labels for row in rows})
        axes.xaxis.set_major_locator(FixedLocator(places))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:,.0f}"))
        narrow = highest < 10 * min(means)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7) if narrow else (1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_title(f"{domain.name}\n{domain.latents}", loc="left")
        axes.set(xlabel="labels", ylabel=f"test MAE ({domain.unit})" if domain.unit else "test MAE")
    figure.legend(list(handles.values()), list(handles), loc="outside upper left", ncols=3)
    return figure


def _grid(panels: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    """A wide figure of so many panels, so many in a row."""
    columns = min(panels, columns)
    lines_of = -(-panels // columns)
    figure = Figure(figsize=(PAGE, height * lines_of + 0.5))
    grid = np.atleast_1d(figure.subplots(lines_of, columns)).ravel()
    for axes in grid[panels:]:
        axes.set_visible(False)
    return figure, list(grid[:panels])


# The page


def table(head: Sequence[str], rows: Iterable[Sequence[str]], text: int = 1) -> str:
    """Markdown; the first `text` columns are text, the others numbers."""
    align = "|".join(["---"] * text + ["---:"] * (len(head) - text))
    return "\n".join([f"| {' | '.join(head)} |", f"|{align}|", *(f"| {' | '.join(row)} |" for row in rows)])


def number(value: float) -> str:
    """Three digits that count."""
    return f"{value:#.3g}".rstrip(".") if abs(value) < 999.5 else f"{value:,.0f}"


def ranged(values: np.ndarray) -> str:
    """The mean over splits, and the smallest and largest."""
    return f"{values.mean():.3f} ({values.min():.3f} to {values.max():.3f})"


def budget_table(rows: Sequence[Row]) -> str:
    """A table of one domain: a line a method, a column a budget."""
    budgets = sorted({row.line_labels for row in rows})
    found: dict[tuple[str, str, str, str], dict[int, str]] = {}
    for row in rows:
        cost = {0: "0", row.line_labels: "the same"}.get(row.direction_labels, f"{row.direction_labels:,}")
        if row.direction == "extremes, all":
            cost = f"{row.direction_labels:,}"
        key = row.method, row.direction, row.layers, cost if row.method == "LARGE" else ""
        found.setdefault(key, {})[row.line_labels] = f"{number(row.mae)} ± {number(row.std)} ({number(row.worst)})"
    head = ["method", "direction", "layers", "labels of the direction", *(f"{budget:,}" for budget in budgets)]
    return table(head, ([*key, *(cells.get(budget, "") for budget in budgets)] for key, cells in found.items()), 4)


def best_sentence(rows: Sequence[Row]) -> str:
    """Which line of a table is the smallest, by what it costs, in words."""
    said = []
    for budget in sorted({row.line_labels for row in rows}):
        at = [row for row in rows if row.line_labels == budget]
        ours = [row for row in at if row.method == "LARGE" and row.direction_labels <= budget]
        rivals = [row for row in at if row.method not in ("LARGE", "constant")]
        if not ours or not rivals:
            continue
        one, other = min(ours, key=lambda row: row.mae), min(rivals, key=lambda row: row.mae)
        verdict = "below" if one.mae < other.mae else "NOT below"
        constant = next(row for row in at if row.method == "constant")
        worse = "; a constant is better than both" if constant.mae < min(one.mae, other.mae) else ""
        said.append(
            f"with {budget:,} LARGE ({one.direction}, {one.layers}) has {number(one.mae)}, {verdict} the best rival's "
            f"{number(other.mae)} ({' '.join(filter(None, (other.method, other.layers)))}){worse}"
        )
    return f"Of what costs no more labels in all than that: {'; '.join(said)}."


def page(
    results: Sequence[tuple[Domain, Found]],
    rows: Sequence[Row],
    lost: dict[str, np.ndarray],
    settings: Settings,
    note: str,
) -> str:
    """README.md."""
    parts = [
        "# LARGE: its claims, tested",
        note,
        f"{settings.train:,} pictures at random are for training, the rest is the test; splits {SPLITS[0]} and "
        f"{SPLITS[-1]}, {settings.draws:,} draws of labels in each (1 of all {settings.train:,}). Numbers are MAE on "
        "the test: mean ± standard deviation (worst) over draws and splits. What the directions cost and what rivals "
        "are is said in `benchmarks/large.py`; `large.csv` has all rows, with R2.",
        "![MAE by labels](budgets.png)",
        "Bars are the standard deviation over draws; what is far worse than a constant leaves the panel.",
        "## Few labels",
    ]
    for domain, _ in results:
        own = [row for row in rows if (row.domain, row.latents) == (domain.name, domain.latents)]
        unit = f", {domain.unit}" if domain.unit else ""
        parts += [f"### {domain.title}{unit}; {len(domain.values):,} pictures", budget_table(own), best_sentence(own)]
    parts += ["## Is it a line?", "![value against distance](linear.png)"]
    cells = []
    for domain, _ in results:
        for name, each in linearity(domain, settings).items():
            cells.append([domain.title, name, *(ranged(column) for column in each.T)])
    parts += [
        table(["domain", "direction", "R2 of a line", "R2 of a cubic", "Spearman"], cells, 2),
        "Fitted to all training labels, measured on the test: mean over splits, smallest and largest.",
        "## Sorting without labels",
    ]
    cells = []
    for domain, _ in results:
        for name, order in domain.orders.items():
            cells.append([domain.title, name, f"{spearmanr(order, domain.values).statistic:.3f}"])
    parts += [
        table(["domain", "order", "Spearman"], cells, 2),
        "Over all pictures; no label is used. Which way a SeFa direction points is arbitrary. In the layers of a CLIP "
        "the text direction is its own similarity to the two texts.",
        "## Weights of layers",
    ]
    cells = []
    for domain, found in results:
        for direction, layers, _, budget, gaps in layer_differences(found):
            each = gaps.mean(axis=1)
            spread = f"{each.mean():+.3f} ({each.min():+.3f} to {each.max():+.3f})"
            cells.append([domain.title, direction, layers, f"{budget:,}", spread, f"{100 * (gaps < 0).mean():.0f} %"])
    parts += [
        table(["domain", "direction", "layers", "labels", "MAE less that of equal weights", "smaller in"], cells, 3),
        "Pairs of the same split and the same order of the training pictures: mean, in brackets the two splits'; and "
        "in how many draws the weights have the smaller error.",
    ]
    if lost:
        parts += [
            "## What inversion loses",
            table(["", "mean (splits)"], ([name, ranged(each)] for name, each in lost.items())),
            "The reader is ridge regression on all layers of the small CLIP, of real training pictures at the "
            "generator's size; it reads unseen real pictures and what the generator makes of their codes.",
        ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for tables and figures")
    parser.add_argument("--faces", type=Path, help="folder with labels.csv: file,age")
    parser.add_argument("--elpv", type=Path, help="folder with labels.csv: file,label (0 to 3)")
    parser.add_argument("--encoder", default="tiny", help="backbone spec for real pictures")
    parser.add_argument("--text", default="tiny", help="text tower for real pictures")
    parser.add_argument("--trained", action="store_true", help="also L1, CNN and OrdinalCLIP, 3 draws of each budget")
    parser.add_argument("--cache", type=Path, help="folder to keep features in")
    parser.add_argument("--quick", action="store_true", help="400 gauges a domain, 20 draws, 10 steps of training")
    arguments = parser.parse_args()
    began, processor = time.perf_counter(), time.process_time()
    settings = Settings(trained=3 if arguments.trained else 0)
    if arguments.quick:
        settings = Settings(400, 200, 20, 1 if arguments.trained else 0, 10)
    arguments.out.mkdir(parents=True, exist_ok=True)

    tanks, gan = gauge_domain("tank", "calm", "e4e", settings, arguments.cache)
    domains = [tanks]
    for kind, style in (("tank", "calm"), ("thermometer", "varied")):
        domains.append(gauge_domain(kind, style, "tiny", settings, arguments.cache)[0])
    domains += real_domains(arguments, settings)
    results, networks = [], {}
    for domain in domains:
        print(f"{time.perf_counter() - began:6.0f} s: {domain.title}, {len(domain.values)} pictures", flush=True)
        results.append((domain, study(domain, settings, networks)))
    rows = [row for domain, found in results for row in rows_of(domain, found)]
    head: Any = gan.head
    (generator,) = head._generator
    lost = inversion(tanks, generator, settings, gan.config.pixel_spec)

    with whole(arguments.out / "large.csv") as aside, open(aside, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow([field.name for field in fields(Row)])
        writer.writerows([f"{cell:.6g}" if isinstance(cell, float) else cell for cell in astuple(row)] for row in rows)
    save_figure(linear_figure(domains, settings), arguments.out / "linear.png")
    save_figure(budgets_figure(domains, rows), arguments.out / "budgets.png")
    seconds = time.process_time() - processor
    words = ["FOLDER" if Path(word).is_dir() else word for word in sys.argv[1:]]
    note = (
        f"`python benchmarks/large.py {' '.join(words)}`: {platform.machine()}, {torch.get_num_threads()} "
        f"threads of {os.cpu_count()} cores; Python {platform.python_version()}, torch {torch.__version__}, numpy "
        f"{np.__version__}, scipy {scipy.__version__}, scikit-learn {sklearn.__version__}, matplotlib "
        f"{matplotlib.__version__}; {seconds:.0f} s of processor time."
    )
    with whole(arguments.out / "README.md") as aside:
        aside.write_text(page(results, rows, lost, settings, note), encoding="utf-8")
    print(f"{time.perf_counter() - began:6.0f} s: {arguments.out}")


if __name__ == "__main__":
    main()
