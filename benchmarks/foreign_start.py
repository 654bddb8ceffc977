"""How heads that compare with text should start where the image encoder has never seen the text tower.

    python benchmarks/foreign_start.py --elpv FOLDER --faces FOLDER --out FOLDER

FOLDER holds pictures and labels.csv (file, label; file, age). EfficientNet-Lite0 with its ImageNet weights encodes them
once; the heads of the package learn on these features, with its losses and learning rates, and are scored on pictures
kept out. Compared are starts of the same method, on the same pictures, batches and random numbers:

* published: cosines with the prototypes as they are, at the temperature of the text tower;
* centred: what `PromptHead` does where there is a projection;
* own scale: the same at the temperature of the text tower;
* ridge: centred, the projection being the ridge regression of the training prototypes on the training features;
* class names: centred, the projection being the ridge regression of the text features of ImageNet's class names on the
  rows of the ImageNet classifier: no picture is needed, and the same map is tried on the photographs that scikit-image
  and scikit-learn ship (--photographs).

Scores are added to start.csv one by one, and what is there is not computed again. README.md is made of it.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import importlib.resources
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES  # MIT licence; OpenAI's names for CLIP, also MIT
from scipy.stats import ttest_rel, wilcoxon
from torch import Tensor
from torch.nn.functional import normalize

from ordinalclip.backbones import Backbone, load_backbone
from ordinalclip.backbones.pretrained import EFFICIENTNET_LITE0, packaged
from ordinalclip.heads import Head, HeadContext, Targets, build_head
from ordinalclip.images import load_image, prepare
from ordinalclip.language import SimilarityHead
from ordinalclip.ranks import Ranks
from ordinalclip.weights import read_weights

ENCODER = "efficientnet_lite0"
SIZES = {"elpv": 224, "faces": 112}  # pixels; the faces are no larger
MOST = 4000  # pictures of a data set
RATE, BATCH, DECAY = 1e-3, 32, 5e-4
FIRST_SEED = 10  # what is the default was chosen with seeds 0 to 4, on other faces
DIGITS = ("", " one", " two", " three", " four", " five", " six", " seven", " eight", " nine")
AGES = tuple(f"{tens}{digit}" for tens in ("twenty", "thirty", "forty", "fifty") for digit in DIGITS)
NAMES: dict[str, dict[str, tuple[str, ...] | None]] = {
    "elpv": {
        "digits": None,
        "functional": ("functional", "nearly functional", "slightly defective", "defective"),
        "whole": ("whole", "hardly cracked", "cracked", "broken"),
    },
    "faces": {
        "digits": None,
        "words": (*AGES[1:], "sixty"),
    },
}
VALUES = {"elpv": tuple(range(4)), "faces": tuple(range(21, 61))}
PROMPTS = {"elpv": "a photo of a solar cell that is", "faces": "the age of the person is"}
BASES = {"elpv": 3, "faces": 8}
# What ImageNet calls what is to be seen, fixed before anything was tried.
PHOTOGRAPHS = {
    "coffee": ("espresso", "coffee mug", "cup"),
    "chelsea": ("tabby cat", "tiger cat", "Egyptian Mau"),
    "rocket": ("missile", "projectile"),
    "clock": ("analog clock", "wall clock"),
    "horse": ("common sorrel horse",),
    "brick": ("stone wall", "tile roof"),
    "china.jpg": ("palace", "stupa"),
    "flower.jpg": ("daisy",),
}


class Run(NamedTuple):
    """What is trained and scored once."""

    data: str
    text: str
    names: str
    method: str
    shots: int  # pictures of each rank; 0: all
    steps: int
    start: str
    seed: int
    lr: float = RATE


Score = tuple[float, float, float, float]  # MAE before and after training, entropy before, NLL after


def plan(seeds: int) -> Iterator[Run]:
    """All runs, those that matter most first."""
    two, starts = ("coop", "ordinalclip"), ("published", "centred")

    def grid(data: str, texts: str, names: str, shots: Any, steps: int, starts: Any, lr: float = RATE) -> Iterator[Run]:
        settings = product(texts.split(), names.split(), shots, two, starts, range(FIRST_SEED, FIRST_SEED + seeds))
        for text, each, number, method, start, seed in settings:
            yield Run(data, text, each, method, number, steps, start, seed, lr)

    yield from grid("elpv", "tiny", "functional whole digits", (0, 16), 60, starts)
    yield from grid("faces", "tiny", "digits", (0, 4), 60, starts)
    yield from grid("elpv", "tiny", "functional", (0,), 60, starts, 1e-4)
    yield from grid("elpv", "tiny", "functional", (0, 16), 60, ("own scale", "ridge", "class names"))
    yield from grid("elpv", "minilm", "functional", (0, 16), 60, starts)
    yield from grid("elpv", "tiny", "functional", (0,), 150, starts)
    yield from grid("elpv", "minilm", "functional", (0, 16), 60, ("ridge", "class names"))
    yield from grid("elpv", "tiny", "functional", (0,), 600, starts)
    yield from grid("faces", "minilm", "digits", (0,), 60, (*starts, "class names"))
    yield from grid("elpv", "tiny minilm", "functional", (4, 1), 60, (*starts, "class names"))


def encode(folder: Path, data: str, into: Path) -> None:
    """Features and labels of a data set, kept in a file."""
    if into.exists():
        return
    backbone = load_backbone(ENCODER, image_size=SIZES[data])
    with open(folder / "labels.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    rows = np.sort(np.random.default_rng(0).permutation(len(table))[-MOST:])
    features = []
    with torch.no_grad():
        for begin in range(0, len(rows), 64):
            files = [str(folder / table[row]["file"]) for row in rows[begin : begin + 64]]
            features.append(see(backbone, files))
    values = [float(table[row]["label" if data == "elpv" else "age"]) for row in rows]
    np.savez(into, features=torch.cat(features).numpy(), values=np.array(values))


@torch.no_grad()
def see(backbone: Backbone, pictures: list[Any]) -> Tensor:
    """(N, D) features of pictures."""
    return backbone.encoder.eval()(torch.stack([prepare(load_image(each), backbone.pixels) for each in pictures]))


@cache
def features_of(file: Path) -> tuple[Tensor, Tensor]:
    kept = np.load(file)
    return torch.from_numpy(kept["features"]).float(), torch.from_numpy(kept["values"]).float()


text_backbone = cache(load_backbone)


def parts(file: Path, seed: int, shots: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Three quarters of the pictures to train, or some of each rank of these, and a quarter to score."""
    features, values = features_of(file)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(values))
    train, test = np.split(order, [3 * len(order) // 4])
    if shots:
        labels = values.numpy()
        train = np.concatenate([rng.permutation(train[labels[train] == rank])[:shots] for rank in np.unique(labels)])
    return (features[train], values[train]), (features[test], values[test])


def ridge(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, float]:
    """Ridge regression of (N, E) targets on (N, D) inputs: weight (E, D), bias (E,), and the share of the targets'
    variance explained in rows left out. The penalty is the best of 25 by leaving one row out, in closed form."""
    inputs, targets = inputs.double(), targets.double()
    centre, middle = inputs.mean(dim=0), targets.mean(dim=0)
    left, singular, right = torch.linalg.svd(inputs - centre, full_matrices=False)
    known = singular > 1e-7 * singular[0]
    left, singular, right = left[:, known], singular[known], right[known]
    wanted, energy = targets - middle, singular.square()
    best: tuple[float, Tensor] = (np.inf, energy)
    for penalty in energy.mean() * torch.logspace(-4, 4, 25, dtype=torch.float64):
        kept = energy / (energy + penalty)
        leverage = (left.square() * kept).sum(dim=1) + 1 / len(inputs)
        residual = (wanted - left * kept @ (left.t() @ wanted)) / (1 - leverage).clamp_min(1e-6)[:, None]
        best = min(best, (residual.square().sum().item(), penalty), key=lambda pair: pair[0])
    error, penalty = best
    weight = ((right.t() * (singular / (energy + penalty))) @ (left.t() @ wanted)).t()
    return weight.float(), (middle - weight @ centre).float(), 1 - error / wanted.square().sum().item()


@cache
def class_map(text: str) -> tuple[Tensor, Tensor, float]:
    """The map from images to texts by the ImageNet classifier's rows: weight, class prototypes, variance explained."""
    rows = read_weights(packaged(ENCODER, *EFFICIENTNET_LITE0))["_fc.weight"].float()
    tower = text_backbone(text).text
    assert tower is not None
    with torch.no_grad():
        names = [f"a photo of a {name}." for name in IMAGENET_CLASSNAMES]
        prototypes = normalize(torch.cat([tower(names[begin : begin + 50]) for begin in range(0, 1000, 50)]), dim=1)
    prototypes = normalize(prototypes - prototypes.mean(dim=0), dim=1)
    weight, _, explained = ridge(normalize(rows - rows.mean(dim=0), dim=1), prototypes)
    return weight, prototypes, explained


def started(run: Run, train: tuple[Tensor, Tensor], ranks: Ranks) -> SimilarityHead:
    """A head before its first step."""
    features, values = train
    backbone = text_backbone(run.text)
    torch.manual_seed(run.seed)
    context = HeadContext(
        ranks, features.shape[1], text=backbone.text, logit_scale=backbone.logit_scale, shared_space=False
    )
    options: dict[str, Any] = {"prompt": PROMPTS[run.data]}
    if run.method == "ordinalclip":
        options |= {"init_from_names": True, "num_base_ranks": BASES[run.data], "interpolation": "piecewise"}
    if run.start == "published":
        options["centred"] = False
    head: Any = build_head(run.method, context, options)
    with torch.no_grad():
        if run.start == "own scale":
            head.logit_scale.fill_(backbone.logit_scale)
        if run.start == "ridge":
            weight, bias, _ = ridge(features, normalize(head.rank_prototypes(), dim=1)[ranks.rank_of(values)])
        if run.start == "class names":
            weight = class_map(run.text)[0]
            bias = -weight @ features.mean(dim=0)  # what all pictures of the task share says nothing of their ranks
        if run.start in ("ridge", "class names"):
            head.projection.weight.copy_(weight)
            head.projection.bias.copy_(bias)
    return head


def learn(head: Head, train: tuple[Tensor, Tensor], run: Run) -> None:
    """Steps as the package's trainer takes them: AdamW, no decay on vectors, cosine to 0."""
    features, values = train
    learning = [parameter for parameter in head.parameters() if parameter.requires_grad]
    groups = [{"params": [each], "weight_decay": DECAY if each.ndim > 1 else 0.0} for each in learning]
    optimizer = torch.optim.AdamW(groups, run.lr, fused=True)
    rng, order = np.random.default_rng(run.seed), np.empty(0, dtype=int)
    head.train()
    for step in range(run.steps):
        while len(order) < BATCH:
            order = np.concatenate([order, rng.permutation(len(values))])
        batch, order = torch.from_numpy(order[:BATCH]), order[BATCH:]
        for group in optimizer.param_groups:
            group["lr"] = run.lr * 0.5 * (1 + np.cos(np.pi * step / run.steps))
        optimizer.zero_grad()
        head.loss(head(features[batch]), Targets(values[batch], head.ranks.rank_of(values[batch])))["loss"].backward()
        optimizer.step()
    head.eval()


@torch.no_grad()
def scored(head: Head, test: tuple[Tensor, Tensor]) -> tuple[float, float, float]:
    """MAE, the entropy of the distributions as a share of the uniform one's, negative log-likelihood."""
    features, values = test
    outputs = head(features)
    answers = head.predict(outputs)
    log = outputs["logits"].double().log_softmax(dim=1)
    entropy = -(log.exp() * log).sum(dim=1).mean() / np.log(log.shape[1])
    truth = head.ranks.rank_of(values)
    return (
        (answers.value - values).abs().mean().item(),
        entropy.item(),
        -log[torch.arange(len(log)), truth].mean().item(),
    )


def trained(run: Run, file: Path) -> Score:
    """The scores of a run."""
    ranks = Ranks(VALUES[run.data], NAMES[run.data][run.names])
    train, test = parts(file, run.seed, run.shots)
    head = started(run, train, ranks).eval()
    before, entropy, _ = scored(head, test)
    learn(head, train, run)
    after, _, likelihood = scored(head, test)
    return before, after, entropy, likelihood


def photographs(text: str) -> list[tuple[str, str, str]]:
    """What is seen in each photograph: by the ImageNet classifier itself, and by the map to the text tower's space."""
    backbone = load_backbone(ENCODER)
    state = read_weights(packaged(ENCODER, *EFFICIENTNET_LITE0))
    weight, prototypes, _ = class_map(text)
    features = see(backbone, [photograph(name) for name in PHOTOGRAPHS])
    own = (features @ state["_fc.weight"].t() + state["_fc.bias"]).argmax(dim=1).tolist()
    mapped = (features @ weight.t() @ prototypes.t()).argmax(dim=1).tolist()
    names = [IMAGENET_CLASSNAMES[number] for number in own], [IMAGENET_CLASSNAMES[number] for number in mapped]
    return list(zip(PHOTOGRAPHS, *names, strict=True))


def photograph(name: str) -> Any:
    """Path of a photograph in an installed package."""
    if name.endswith(".jpg"):
        return str(importlib.resources.files("sklearn.datasets.images") / name)
    stem = {"clock": "clock_motion.png", "rocket": "rocket.jpg"}.get(name, f"{name}.png")
    return str(importlib.resources.files("skimage.data") / stem)


def row_key(run: Run) -> str:
    return ",".join(map(str, run))


def known(file: Path) -> dict[str, Score]:
    """What start.csv holds."""
    if not file.exists():
        return {}
    with open(file, encoding="utf-8", newline="") as lines:
        _, *rows = csv.reader(lines)
    return {",".join(row[: len(Run._fields)]): tuple(map(float, row[len(Run._fields) :])) for row in rows}  # type: ignore[misc]


def timed(work: tuple[Run, Path]) -> tuple[Score, float]:
    """`trained` on one thread, and the processor seconds it took."""
    torch.set_num_threads(1)
    begun = time.process_time()
    return trained(*work), time.process_time() - begun


Cell = tuple[Any, ...]  # a run but for its start and seed


def cells(found: dict[str, Score], runs: list[Run]) -> dict[Cell, dict[str, np.ndarray]]:
    """By setting and start the (seeds, 4) scores, where all seeds are there."""
    table: dict[Cell, dict[str, dict[int, Score]]] = {}
    for run in runs:
        if (score := found.get(row_key(run))) is not None:
            cell = run.data, run.text, run.names, run.method, run.shots, run.steps, run.lr
            table.setdefault(cell, {}).setdefault(run.start, {})[run.seed] = score
    seeds = len({run.seed for run in runs})
    whole = {cell: {s: each for s, each in starts.items() if len(each) == seeds} for cell, starts in table.items()}
    return {
        cell: {start: np.array([each[seed] for seed in sorted(each)]) for start, each in starts.items()}
        for cell, starts in whole.items()
        if starts
    }


def constant_error(cell: Cell, file: Path, seeds: int) -> float:
    """MAE of always answering the training part's median."""
    errors = []
    for seed in range(FIRST_SEED, FIRST_SEED + seeds):
        (_, train), (_, test) = parts(file, seed, cell[4])
        errors.append((test - train.median()).abs().mean().item())
    return float(np.mean(errors))


def against(table: dict[Cell, dict[str, np.ndarray]], start: str, other: str) -> list[str]:
    """A start against another: lines of settings with the paired t-test over seeds, and a sentence over settings."""
    lines, differences = [], []
    for cell, starts in table.items():
        if start in starts and other in starts:
            one, two = starts[start][:, 1], starts[other][:, 1]
            p_value = ttest_rel(one, two).pvalue
            entropies = f"{starts[other][:, 2].mean():.2f} | {starts[start][:, 2].mean():.2f}"
            likelihoods = f"{starts[other][:, 3].mean():.2f} | {starts[start][:, 3].mean():.2f}"
            data, text, names, method, shots, steps, rate = cell
            lines.append(
                f"| {data}, {names} | {text} | {method} | {shots or 'all'} | {steps} | {rate:g} | "
                f"{two.mean():.3f} ± {two.std(ddof=1):.3f} | {one.mean():.3f} ± {one.std(ddof=1):.3f} | "
                f"{p_value:.2g} | {entropies} | {likelihoods} |"
            )
            differences.append((one.mean() - two.mean()) / two.mean())
    if not lines:
        return []
    better = sum(difference < 0 for difference in differences)
    tested = f" (Wilcoxon over settings: p = {wilcoxon(differences).pvalue:.2g})" if len(differences) > 5 else ""
    said = (
        f"{start} against {other}: smaller MAE in {better} of {len(differences)} settings, "
        f"{100 * float(np.mean(differences)):+.1f} % on average{tested}."
    )
    head = (
        f"| data, names | text | method | shots | steps | rate | MAE, {other} | MAE, {start} | p | entropy, {other} | "
        f"entropy, {start} | NLL, {other} | NLL, {start} |"
    )
    return [said, "", head, "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|", *lines, ""]


def page(
    found: dict[str, Score], runs: list[Run], files: dict[str, Path], seen: list[str], cost: tuple[int, float]
) -> str:
    """README.md of the results."""
    table = cells(found, runs)
    seeds = len({run.seed for run in runs})
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "open_clip_torch", "timm"))
    lines = [
        "# How heads start where image encoder and text tower are strangers",
        "",
        "`python benchmarks/foreign_start.py --elpv FOLDER --faces FOLDER --out benchmarks/results/foreign_start`; "
        f"{versions}; {len(runs)} runs of one thread each, the last {cost[0]} in {cost[1]:.0f} processor seconds.",
        "",
        f"MAE on a quarter of the pictures, mean ± standard deviation over {seeds} seeds (split, weights, batches); "
        "p of the paired t-test over these seeds, not corrected for the number of settings. Splits overlap, so p is "
        "too small rather than too large: read the settings together. Entropy is of the distributions before training, "
        "as a share of the uniform one's; NLL is after it. The script says at its top what the starts are.",
        "",
    ]
    for start, other in (
        ("centred", "published"),
        ("centred", "own scale"),
        ("ridge", "centred"),
        ("class names", "centred"),
    ):
        if made := against(table, start, other):
            lines += [f"## {start} against {other}", "", *made]
    shots = {cell[:1] + cell[4:5]: cell for cell in table}
    constants = [
        f"{cell[0]}, {cell[4] or 'all'} shots: {constant_error(cell, files[cell[0]], seeds):.3f}"
        for cell in shots.values()
    ]
    lines += ["Always answering the training median has an MAE of: " + "; ".join(constants) + ".", ""]
    before = [
        f"{cell[0]} ({cell[2]}) with {cell[1]}, {cell[3]}: {starts['class names'][:, 0].mean():.3f}"
        for cell, starts in table.items()
        if "class names" in starts and not cell[4]
    ]
    if before:
        lines += ["MAE through the map of class names before any training: " + "; ".join(before) + ".", ""]
    return "\n".join([*lines, *seen])


def photograph_lines(texts: list[str]) -> list[str]:
    """What the photographs are taken for."""
    lines = ["## The map of class names, without a picture", ""]
    for text in texts:
        seen = photographs(text)
        own = sum(each in PHOTOGRAPHS[name] for name, each, _ in seen)
        mapped = sum(each in PHOTOGRAPHS[name] for name, _, each in seen)
        lines += [
            f"{text}: {100 * class_map(text)[2]:.1f} % of the variance of the class texts is explained in classes left "
            f"out; first of 1,000 names right for {mapped} of {len(seen)} photographs, the classifier itself {own}.",
            "",
            "| photograph | classifier | through the map |",
            "|---|---|---|",
            *(f"| {name} | {own} | {mapped} |" for name, own, mapped in seen),
            "",
        ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elpv", type=Path, required=True)
    parser.add_argument("--faces", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="folder for the features; default: --out")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--most", type=int, help="runs to add; default: all")
    arguments = parser.parse_args()
    work = arguments.work or arguments.out
    for folder in (work, arguments.out):
        folder.mkdir(parents=True, exist_ok=True)
    files = {data: work / f"{data}.npz" for data in NAMES}
    for data, file in files.items():
        encode(getattr(arguments, data), data, file)
    runs = list(dict.fromkeys(plan(arguments.seeds)))
    table, spent = arguments.out / "start.csv", 0.0
    found = known(table)
    if not found:
        columns = [*Run._fields, "mae_before", "mae", "entropy_before", "nll"]
        table.write_text(",".join(columns) + "\n", encoding="utf-8")
    missing = [run for run in runs if row_key(run) not in found][: arguments.most]
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        for run, (score, seconds) in zip(
            missing, pool.map(timed, [(run, files[run.data]) for run in missing]), strict=True
        ):
            found[row_key(run)], spent = score, spent + seconds
            with open(table, "a", encoding="utf-8") as lines:
                lines.write(",".join([row_key(run), *(f"{number:.6g}" for number in score)]) + "\n")
    text = page(found, runs, files, photograph_lines(["minilm", "tiny"]), (len(missing), spent))
    (arguments.out / "README.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
