"""Prompts to play with: what a language knows of an order, what learning makes of it, what moves when it is changed.

    from ordinalclip import Ranks, explore

    ages = Ranks.linear(16, 77, 62, unit="years")
    written = explore.written("the age of the person is {name}", ages, clip="minilm")
    built = explore.interpolated("the age of the person is", ages, num_base_ranks=3, clip="minilm")
    explore.compare_prompts([written, built])       # a pandas frame
    explore.similarity_matrix(written, built)       # a matplotlib figure

Wherever prompts are asked for, the folder of a finished run may be given too: its learned prompts are read from it.
`clip` is any spec of `ordinalclip.backbones` with a text tower; it is loaded once and kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import normalize

from ordinalclip import metrics
from ordinalclip.backbones import Backbone, available_families, load_backbone
from ordinalclip.data import load_parts
from ordinalclip.explain import explain as explain
from ordinalclip.heads import Decoding, Head, HeadContext, decode
from ordinalclip.images import PixelSpec, find_images, load_image, prepare
from ordinalclip.language import OrdinalCLIP, PromptHead, PrototypeHead, centre, sentence_prototypes
from ordinalclip.learned import LearnedPrompts
from ordinalclip.model import OrdinalModel
from ordinalclip.progress import Progress
from ordinalclip.prompts import Interpolation, RankPosition, weights_at
from ordinalclip.provenance import fingerprints
from ordinalclip.ranks import Ranks
from ordinalclip.results import prompt_figures
from ordinalclip.run_folder import RunFolder
from ordinalclip.text import TextTower
from ordinalclip.tokenization import TextPooling
from ordinalclip.weights import first_line

DECADE = 10  # ranks
PICTURES = 500  # of a run that are looked at, evenly from its part
BATCH = 64
SAME = 0.1  # distance of a prototype of length 1, computed again; rounding is far less
CAVEAT = (
    "The nearest word of the vocabulary is rarely near: compare `cosine` with `of a random vector`, the cosine that a "
    "random vector of as many dimensions reaches with its nearest word. A context works through all its tokens, and "
    "through the layers above; a word that happens to lie near one of them explains nothing by itself."
)


@dataclass(frozen=True)
class RankPrompts:
    """The prompts of all ranks and what the text encoder makes of them.

    Attributes:
        title: what tables and figures call them.
        ranks: the label space.
        prototypes: (R, D) text features of length 1.
        head: with the context and the rank embeddings that they are made of; None for written sentences, and for
            methods whose prompts cannot be taken apart.
    """

    title: str
    ranks: Ranks
    prototypes: Tensor
    head: PromptHead | None = None


Given = RankPrompts | str | Path
Some = Any  # a value, or a list of values


# ---- prompts


def written(
    templates: str | Sequence[str], ranks: Ranks | Sequence[Any], clip: str = "tiny", title: str = ""
) -> RankPrompts:
    """Sentences with the ranks' names, written by hand.

    Args:
        templates: a sentence with {name} and, if wanted, {unit}; of several the text features are averaged.
        ranks: the label space; or its values, or its names in their order.
        clip: spec of a backbone with a text tower.

    Raises:
        ValueError: a template without {name}, a backbone without a text tower.
    """
    templates, ranks = _listed(templates), _ranks(ranks)
    prototypes = sentence_prototypes(_tower(clip), ranks.names or (), templates, ranks.unit)
    return RankPrompts(title or " + ".join(templates), ranks, prototypes)


def interpolated(
    context: str,
    ranks: Ranks | Sequence[Any],
    num_base_ranks: int | None = 3,
    interpolation: Interpolation = "linear",
    rank_position: RankPosition = "tail",
    clip: str = "tiny",
    title: str = "",
    text_pooling: TextPooling | None = None,
) -> RankPrompts:
    """OrdinalCLIP's prompts before anything is learned: a context, and names of a few base ranks, interpolated.

    Args:
        context: a sentence, e.g. "the age of the person is".
        ranks: the label space; or its values, or its names in their order.
        num_base_ranks: number of base ranks; None: every rank has its own name (CoOp's start).
        interpolation, rank_position: see `PromptLearner`.
        clip: spec of a backbone with a text tower.
        text_pooling: as the key `model.text_pooling`; None: as the tower's files say.

    Raises:
        ValueError: see `PromptLearner`.
    """
    options = {"prompt": context, "num_base_ranks": num_base_ranks, "interpolation": interpolation}
    tower = _tower(clip, text_pooling)
    head = _head(tower, _ranks(ranks), {**options, "rank_position": rank_position, "init_from_names": True})
    count = "a base for every rank" if num_base_ranks is None else f"{num_base_ranks} base ranks"
    return _of_head(title or f"{context} + {count}", head)


def learned(run: str | Path, title: str = "") -> RankPrompts:
    """The prompts of a finished run: what the text encoder makes of those that it learned.

    Of a run that keeps no prompts (another method, an older version) these are the prototypes of its model.

    Raises:
        FileNotFoundError: no finished run there; ValueError: a method without rank prototypes, or prompts that are not
            those of the run's model.
    """
    opened = _opened(run)
    if opened.has_prompts:
        return _of_head(title or opened.method, opened.head)
    if opened.model.head.rank_prototypes() is None:
        raise ValueError(f"{run}: {opened.method} has no rank prototypes; a method with prompts is needed")
    return RankPrompts(title or opened.method, opened.ranks, opened.prototypes())


def in_words(ranks: Ranks | Sequence[Any]) -> Ranks:
    """The same ranks, named by their numbers in English words: 37 is "thirty-seven".

    Raises:
        ImportError: num2words is not installed.
    """
    try:
        from num2words import num2words
    except ImportError as error:
        raise ImportError("in_words needs num2words: pip install 'ordinalclip[explore]'") from error
    ranks = _ranks(ranks)
    names = tuple(num2words(int(value) if value.is_integer() else value) for value in ranks.values)
    return replace(ranks, names=names)


# ---- looking at them


def ordinality(*prompts: Given, step: int = DECADE) -> pd.DataFrame:
    """How often similarity falls with the distance in rank, whole and by span; a row for each of the prompts.

    Columns, shares in [0, 1] of comparisons cosine(i, j) > cosine(i, j + s) with i <= j:

    * `whole`: all of them for s = 1 (OrdinalCLIP, table 6, `metrics.ordinality`; j = i included, as published).
    * `neighbours`: j = i + 1, s = 1: is the next rank more similar than the one after it?
    * `steps of S`: s = `step` ranks, all j >= i: is the order right on the large scale? Only where R > `step`.
    """
    rows = []
    for each in map(_prompts, prompts):
        similarity = _similarity(each.prototypes)
        found = {
            "whole": metrics.ordinality(each.prototypes),
            "neighbours": _falls(similarity, 1, lambda i, j: j == i + 1),
        }
        if len(each.ranks) > step:
            found[f"steps of {step}"] = _falls(similarity, step, lambda i, j: j >= i)
        rows.append(found)
    return pd.DataFrame(rows, index=_titles(prompts))


def compare_prompts(prompts: Sequence[Given], step: int = DECADE) -> pd.DataFrame:
    """One table of several prompts: their ordinality, cosines, and, of runs, the error of their model.

    Columns: those of `ordinality`; `cosine of neighbours`, the mean, and `cosine of the ends`, of the first and the
    last rank; `MAE` and `accuracy` of the part that a run was scored on, in the label's unit.
    """
    table = ordinality(*prompts, step=step)
    for given, title in zip(prompts, table.index, strict=True):
        similarity = _similarity(_prompts(given).prototypes)
        table.loc[title, "cosine of neighbours"] = similarity.diagonal(1).mean().item()
        table.loc[title, "cosine of the ends"] = similarity[0, -1].item()
        if not isinstance(given, RankPrompts):
            scores = _opened(given).scores
            table.loc[title, ["MAE", "accuracy"]] = [scores.get("mae", np.nan), scores.get("accuracy", np.nan)]
    return table


def similarity_matrix(*prompts: Given) -> Figure:
    """Cosine similarity of the prototypes of all pairs of ranks, a panel for each of the prompts."""
    return prompt_figures.similarities(
        [(each.title, each.prototypes.numpy(), each.ranks) for each in map(_prompts, prompts)]
    )


def prototype_path(*prompts: Given, by: str = "pca") -> Figure:
    """The prototypes in the plane, coloured by value and joined in the order of their ranks; a panel for each.

    Args:
        by: "pca", the two directions of largest variance; or "mds", distances kept as well as a plane can
            (metric multidimensional scaling, scikit-learn).

    Raises:
        ValueError: another way.
    """
    if by not in ("pca", "mds"):
        raise ValueError(f"by {by!r} is unknown; choices: pca, mds")
    return prompt_figures.paths(
        [(each.title, each.prototypes.numpy(), each.ranks) for each in map(_prompts, prompts)], by
    )


def nearest_words(prompts: Given, num: int = 5) -> pd.DataFrame:
    """The words of the vocabulary nearest to every learned token, by cosine; a row for each.

    The tokens are those of the context, and of the base ranks, which are called by the rank each stands nearest to.

    Columns: `words`, the `num` nearest; `cosine` of the first; `of a random vector`, what a random vector reaches. Read
    `frame.attrs["caveat"]`: few learned tokens are near a word.

    Raises:
        ValueError: written sentences, or a run whose prompts are not kept.
    """
    found = LearnedPrompts.of(_taken_apart(_prompts(prompts)), num)
    frame = pd.DataFrame(
        {
            "token": list(found.words),
            "words": [", ".join(word.text for word in words) for words in found.words.values()],
            "cosine": np.array([words[0].cosine for words in found.words.values()], dtype=np.float32),
        }
    )
    frame["of a random vector"] = found.chance
    frame.attrs["caveat"] = CAVEAT
    return frame.set_index("token")


# ---- pictures


def zero_shot(
    images: Any,
    ranks: Ranks | Sequence[Any],
    templates: str | Sequence[str] = "a photo of {name} {unit}.",
    clip: str = "tiny",
    decoding: Decoding = "median",
) -> pd.DataFrame:
    """What a CLIP answers that has learned nothing for it: a column for each template, and `all` for their ensemble.

    Digits are compared with words by two calls, the second with `in_words(ranks)`.

    Args:
        images: paths, a folder, PIL pictures or arrays; one or a list.
        ranks: the label space; or its values, or its names in their order.
        templates: sentences with {name} and, if wanted, {unit}.
        clip: spec of a CLIP: image and text have to share a space.
        decoding: how a distribution over ranks becomes a value.

    Returns:
        a row for each picture, values in the label's unit.

    Raises:
        ValueError: a text encoder without an image encoder; a template without {name}.
        BrokenImageError: a picture that cannot be read.
    """
    templates, ranks = _listed(templates), _ranks(ranks)
    prompts = [written(template, ranks, clip) for template in templates]
    if len(templates) > 1:
        prompts.append(written(templates, ranks, clip, title="all"))
    return read(images, *prompts, by=clip, decoding=decoding)


def read(images: Any, *prompts: Given, by: str | Path = "tiny", decoding: Decoding | None = None) -> pd.DataFrame:
    """What pictures are read as when they are compared with prompts: a column for each of the prompts.

    Args:
        images: paths, a folder, PIL pictures or arrays; one or a list.
        by: whose image encoder sees the pictures: spec of a CLIP, whose text encoder made the prompts; or the folder of
            a run with rank prototypes, in whose place the prompts are put, with nothing trained again.
        decoding: how a distribution over ranks becomes a value; None: as the run does it, "median" for a CLIP.

    Returns:
        a row for each picture, values in the label's unit.

    Raises:
        ValueError: a text encoder without an image encoder; prompts of another number of ranks than the run's, or of
            another text encoder.
        BrokenImageError: a picture that cannot be read.
    """
    names, pictures = _pictures(images)
    is_run = str(by) not in available_families() and RunFolder(by).is_finished  # a folder may be called tiny, too
    opened = _opened(by) if is_run else None
    encoder, pixels, compare = _reader_of(opened) if opened else _clip_reader(str(by))
    features = _encode(encoder, [prepare(picture, pixels) for picture in pictures])
    how = decoding or (opened.model.head.decoding if opened else "median")
    answers = []
    for each in map(_prompts, prompts):
        probabilities = compare(features, each).detach().softmax(dim=1)
        answers.append(decode(probabilities, each.ranks, how).value.numpy())
    return pd.DataFrame(dict(zip(_titles(prompts), answers, strict=True)), index=pd.Index(names, name="picture"))


def interpolate(run: str | Path, values: Sequence[float], quiet: bool = False) -> pd.DataFrame:
    """Prototypes for values between the trained ranks and beyond them, and how predictions behave there.

    A value's rank embedding is the mixture of base embeddings at its place among the ranks, by the run's interpolation;
    free embeddings are interpolated between the two neighbours.

    Columns, a row for each value:

    * `like`, `cosine`: the trained rank whose prototype is most similar, and how similar.
    * `chosen`: the share of pictures that are nearer to this value's prototype than to those of all other values given.
    * `label of these`: the mean label of those pictures; close to the value if the prototype means what it says.

    The trained ranks themselves may be among the values. Pictures are those of `what_if`.

    Raises:
        ValueError: a run without kept prompts; a value between two ranks of free embeddings with different numbers of
            tokens (9 and 10), or too far beyond the ranks for "linear" weights.
    """
    opened = _opened(run)
    head = _taken_apart(learned(run))
    places = _places(opened.ranks, values)
    new = _texts_at(head, places, _mixed(head, places, opened.config.head.get("interpolation", "linear")))
    trained = opened.prototypes()
    if head.centred:  # by the mean of the trained ranks, as the trained ones are
        new = normalize(new - _of_head("", head).prototypes.mean(dim=0), dim=-1)
    similarity = new @ trained.T
    best = similarity.max(dim=1)
    points, labels = opened.pictures(quiet)
    choice = (points @ new.T).argmax(dim=1).numpy()
    rows = []
    for place in range(len(values)):
        mine = choice == place
        like = opened.ranks.say(opened.ranks.values[best.indices[place]])
        label = labels[mine].mean() if mine.any() else np.nan
        rows.append({"like": like, "cosine": best.values[place].item(), "chosen": mine.mean(), "label of these": label})
    return pd.DataFrame(rows, index=pd.Index(list(values), name="value"))


def what_if(
    run: str | Path,
    context: Some = None,
    num_base_ranks: Some = None,
    interpolation: Some = None,
    rank_position: Some = None,
    quiet: bool = False,
) -> pd.DataFrame:
    """What moves when learned prompts are changed and nothing is trained again.

    A list tries several values, one change at a time. Another context replaces the learned one. With another number of
    base ranks the new bases are taken from the learned embeddings at their places (CoOp's are then interpolated, too,
    by the "linear" weights of the paper, which blend all bases); another interpolation mixes the same bases.

    Columns: those of `ordinality`, `MAE` on the validation part (the test part of a run without), at most 500 pictures
    spread evenly over it, in the label's unit, and `cosine to learned`: of the prototypes with those that were learned,
    the mean. The first row is the run as it is.

    Raises:
        ValueError: a run without kept prompts; values that `PromptLearner` refuses.
    """
    opened, as_is = _opened(run), learned(run)
    head = _taken_apart(as_is)
    changes = {
        "prompt": context,
        "num_base_ranks": num_base_ranks,
        "interpolation": interpolation,
        "rank_position": rank_position,
    }
    variants = {"as it is": as_is}
    for option, tried in changes.items():
        for value in _listed(tried) if tried is not None else ():
            title = f"{option.replace('prompt', 'context')} = {value}"
            variants[title] = _of_head(title, _changed(opened, head, {option: value}))
    table = ordinality(*variants.values())
    table.index = pd.Index(list(variants), name="prompts")
    for title, prompts in variants.items():
        table.loc[title, "MAE"] = opened.error(prompts, quiet)
        table.loc[title, "cosine to learned"] = (prompts.prototypes * as_is.prototypes).sum(dim=1).mean().item()
    return table


# ---- a run, opened once


class _Run:
    """A finished run whose pictures are encoded at most once."""

    def __init__(self, folder: RunFolder):
        self.folder = folder
        folder.require_finished()
        self.config = folder.read_config()
        self.scores: Mapping[str, Any] = next(
            (found for part in ("test", "validation") if (found := folder.read_metrics().get(part))), {}
        )
        self.model: OrdinalModel = folder.read_model()
        self.ranks = self.model.head.ranks
        self.method = self.config.method
        self._features: tuple[Tensor, np.ndarray] | None = None

    @property
    def has_prompts(self) -> bool:
        """Whether the run keeps prompts, of a method that is known here: another may make other prompts of them."""
        return self.method in ("ordinalclip", "coop") and self.folder.prompts.is_file()

    @property
    def prompt_options(self) -> dict[str, Any]:
        """The options of `OrdinalCLIP` that give the run's prompts."""
        options = {name: value for name, value in self.config.head.items() if name in PROMPT_OPTIONS}
        return {"init_from_names": True, **options, "num_base_ranks": None} if self.method == "coop" else options

    @cached_property
    def head(self) -> PromptHead:
        """Its prompts, with the learned context and rank embeddings.

        Raises:
            ValueError: those that are kept are not those of its model.
        """
        own, model = self.model.head, self.config.model
        strangers = isinstance(own, PrototypeHead) and own.output_dim is not None
        tower = _tower(model.text or model.backbone, model.text_pooling)
        head = _head(tower, self.ranks, self.prompt_options, strangers)
        try:
            head.learner.load_state_dict({**head.learner.state_dict(), **self.folder.read_prompts()})
        except RuntimeError as error:
            raise ValueError(f"{self.folder.prompts}: damaged, or of another run ({first_line(error)})") from error
        with torch.no_grad():
            again = normalize(head.rank_prototypes().float(), dim=-1)
        if (again - self.prototypes()).norm(dim=1).max() > SAME:
            raise ValueError(
                f"{self.folder.prompts}: not the prompts of the model beside it, or of another text encoder"
            )
        return head

    def features(self, quiet: bool) -> tuple[Tensor, np.ndarray]:
        """Features (N, D) and labels (N,) of the validation part, or the test part of a run without."""
        if self._features is None:
            parts = load_parts(self.config.data, self.config.ranks, self.config.seed)
            if changed := self.folder.data_difference(fingerprints(parts)):
                raise ValueError(f"{self.folder.path}: this is not the data of the run any more: {changed}")
            part = parts.validation or parts.test
            if part is None:
                raise ValueError(f"{self.folder.path}: the run has neither a validation nor a test part to look at")
            rows = np.unique(np.linspace(0, len(part) - 1, min(PICTURES, len(part))).round().astype(int))
            spec = self.model.config.pixel_spec
            bar: Progress = Progress(None, "encoding pictures", total=len(rows), unit="images", quiet=quiet)
            found = []
            for batch in np.array_split(rows, -(-len(rows) // BATCH)):
                found.append(_encode(self.model.encoder, [prepare(part.image(int(row)), spec) for row in batch]))
                bar.advance(len(batch))
            bar.close()
            self._features = torch.cat(found), part.values[rows]
        return self._features

    @torch.no_grad()
    def pictures(self, quiet: bool) -> tuple[Tensor, np.ndarray]:
        """Points (N, E) of length 1 in the space of the prototypes, and labels (N,)."""
        features, labels = self.features(quiet)
        return normalize(self.model.head.space(features).float(), dim=-1), labels

    def prototypes(self) -> Tensor:
        """Those that the model has, (R, E) of length 1."""
        prototypes = self.model.head.rank_prototypes()
        assert prototypes is not None
        return normalize(prototypes.detach().float(), dim=-1)

    @torch.no_grad()
    def head_with(self, prompts: RankPrompts) -> Head:
        """The model's head, other text features in the place of its own."""
        head = deepcopy(self.model.head)
        if not isinstance(head, PrototypeHead):
            raise ValueError(
                f"{self.folder.path}: {self.method} has no rank prototypes; a method with prompts is needed"
            )
        if prompts.prototypes.shape != head.prototypes.shape:
            raise ValueError(
                f"{prompts.title}: {len(prompts.ranks)} ranks, text features of width {prompts.prototypes.shape[1]}; "
                f"{self.folder.path} has {len(self.ranks)} of width {head.prototypes.shape[1]}"
            )
        centred = self.config.head.get("centred")
        centred = head.output_dim is not None if centred is None else centred
        head.prototypes.copy_(normalize(centre(prompts.prototypes) if centred else prompts.prototypes, dim=-1))
        return head

    @torch.no_grad()
    def error(self, prompts: RankPrompts, quiet: bool) -> float:
        """MAE with other prompts in the place of the learned ones."""
        head, (features, labels) = self.head_with(prompts), self.features(quiet)
        return float(np.abs(head.predict(head(features)).value.numpy() - labels).mean())


PROMPT_OPTIONS = (
    "num_base_ranks", "interpolation", "prompt", "num_context", "rank_position", "tokens_per_rank",
    "rank_specific_context", "init_from_names", "centred",
)  # fmt: skip


def _opened(run: str | Path) -> _Run:
    folder = RunFolder(run)
    stamp = folder.metrics.stat().st_mtime_ns if folder.metrics.is_file() else 0
    return _cached(str(folder.path.resolve()), stamp)


@lru_cache(maxsize=4)
def _cached(path: str, stamp: int) -> _Run:
    return _Run(RunFolder(path))


@lru_cache(maxsize=4)
def _backbone(clip: str, pooling: TextPooling | None = None) -> Backbone:
    backbone = load_backbone(clip, text_pooling=pooling)
    if backbone.text is None:
        raise ValueError(f"{clip} has no text tower; use tiny, minilm, or an open_clip or hf spec with one")
    return backbone


def _tower(clip: str, pooling: TextPooling | None = None) -> TextTower:
    tower = _backbone(clip, pooling).text
    assert tower is not None
    return tower


Compare = Callable[[Tensor, RankPrompts], Tensor]  # features (N, D) and prompts -> logits (N, R)


def _reader_of(opened: _Run) -> tuple[torch.nn.Module, PixelSpec, Compare]:
    def compare(features: Tensor, prompts: RankPrompts) -> Tensor:
        return opened.head_with(prompts)(features)["logits"]

    return opened.model.encoder, opened.model.config.pixel_spec, compare


def _clip_reader(clip: str) -> tuple[torch.nn.Module, PixelSpec, Compare]:
    backbone = _backbone(clip)
    if not backbone.output_dim:
        raise ValueError(
            f"{clip} is a text encoder; to read pictures it takes a CLIP, whose image and text share a space"
        )

    def compare(features: Tensor, prompts: RankPrompts) -> Tensor:
        if prompts.prototypes.shape[1] != features.shape[1]:
            raise ValueError(f"{prompts.title}: prompts of another text encoder than that of {clip}")
        return float(np.exp(backbone.logit_scale)) * normalize(features, dim=-1) @ prompts.prototypes.T

    return backbone.encoder, backbone.pixels, compare


# ---- prompts, taken apart


def _head(tower: TextTower, ranks: Ranks, options: Mapping[str, Any], strangers: bool = False) -> PromptHead:
    """The prompts of OrdinalCLIP or CoOp alone: text features, whatever the width of the image's."""
    context = HeadContext(ranks, tower.output_dim, text=tower, shared_space=True)
    with torch.random.fork_rng(
        devices=[]
    ):  # tokens that a shorter name lacks start at random, and are mixed into others
        torch.manual_seed(0)
        return OrdinalCLIP(context, **{"centred": strangers, **options}).eval()


@torch.no_grad()
def _of_head(title: str, head: PromptHead) -> RankPrompts:
    return RankPrompts(title, head.ranks, normalize(head.text(head.learner()).float(), dim=-1), head)


def _prompts(given: Given) -> RankPrompts:
    return given if isinstance(given, RankPrompts) else learned(given)


def _taken_apart(prompts: RankPrompts) -> PromptHead:
    if prompts.head is None:
        raise ValueError(
            f"{prompts.title}: no context and rank embeddings to look at; they are in explore.interpolated, and in "
            "runs of ordinalclip and coop that have prompts.safetensors, which older versions did not write"
        )
    return prompts.head


def _changed(opened: _Run, head: PromptHead, change: Mapping[str, Any]) -> PromptHead:
    """The learned prompts with one option changed, and everything else as it was learned."""
    (option, value), learner = next(iter(change.items())), head.learner
    if option == "interpolation" and learner.weights.numel() == 0:
        raise ValueError(
            f"{opened.folder.path}: every rank has an embedding of its own; no interpolation to be changed"
        )
    changed = _head(head.text, head.ranks, {**opened.prompt_options, option: value}, head.centred)
    with torch.no_grad():
        if option != "prompt":
            changed.learner.context.copy_(learner.context)
        if option != "num_base_ranks":
            changed.learner.rank_embeddings.copy_(learner.rank_embeddings)
        else:
            count = len(changed.learner.rank_embeddings)
            bases = torch.linspace(0, len(head.ranks) - 1, count, dtype=torch.float64)
            weights = weights_at(bases, len(head.ranks), len(head.ranks), "piecewise")
            changed.learner.rank_embeddings.copy_(torch.einsum("kr,rtw->ktw", weights, learner.ranks_embedded()))
    return changed


def _mixed(head: PromptHead, places: Tensor, kind: Interpolation) -> Tensor:
    """Rank embeddings (V, T, W) at places among the ranks."""
    learner = head.learner
    if learner.weights.numel():
        weights = weights_at(places, len(head.ranks), len(learner.rank_embeddings), kind)
        return torch.einsum("vk,ktw->vtw", weights, learner.rank_embeddings.detach())
    weights = weights_at(places, len(head.ranks), len(head.ranks), "piecewise")
    used = learner.in_use.sum(dim=1).float()
    for row in weights:
        if used[row != 0].unique().numel() > 1:
            names = " and ".join(head.ranks.name(rank) for rank in row.nonzero()[:, 0].tolist())
            raise ValueError(f"{names} have embeddings of different numbers of tokens: nothing lies between them")
    return torch.einsum("vr,rtw->vtw", weights, learner.rank_embeddings.detach())


@torch.no_grad()
def _texts_at(head: PromptHead, places: Tensor, embedded: Tensor) -> Tensor:
    """Text features (V, E) of length 1 of rank embeddings (V, T, W), each in the prompt of the rank that is nearest."""
    slots = places.round().clamp(0, len(head.ranks) - 1).long().tolist()
    found = torch.empty(len(slots), head.text.output_dim)
    left = list(range(len(slots)))
    while left:  # as many values at once as there are ranks nearest to them
        now = list({slots[index]: index for index in reversed(left)}.values())
        ranks = head.learner.ranks_embedded().clone()
        ranks[[slots[index] for index in now]] = embedded[now]
        texts = head.text(head.learner(ranks)).float()
        found[now] = texts[[slots[index] for index in now]]
        left = [index for index in left if index not in now]
    return normalize(found, dim=-1)


def _places(ranks: Ranks, values: Sequence[float]) -> Tensor:
    """Where values lie among the ranks, (V,) in rank indices; beyond them by the gap at that end."""
    known, asked = np.array(ranks.values), np.asarray(values, dtype=float)
    if asked.ndim != 1 or not np.isfinite(asked).all() or not len(asked):
        raise ValueError(f"values must be a list of numbers, got {values!r}")
    places = np.interp(asked, known, np.arange(len(known)))
    places += np.minimum(asked - known[0], 0) / (known[1] - known[0])
    places += np.maximum(asked - known[-1], 0) / (known[-1] - known[-2])
    return torch.from_numpy(places)


# ---- small things


def _ranks(given: Ranks | Sequence[Any]) -> Ranks:
    """Raises:
    ValueError: names that are numbers, of which the values might be meant."""
    if isinstance(given, Ranks):
        return given
    listed = list(given)
    if not all(isinstance(each, str) for each in listed):
        return Ranks(tuple(listed))
    if all(map(_is_number, listed)):
        raise ValueError(
            f"ranks named {', '.join(listed[:3])}, ...: if these are the values give numbers, else Ranks(values, names)"
        )
    return Ranks(tuple(range(len(listed))), tuple(listed))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _titles(prompts: Sequence[Given]) -> list[str]:
    """What each of the prompts is called; the second of one title has its number behind it."""
    titles = [_prompts(each).title for each in prompts]
    before = [titles[:place].count(title) for place, title in enumerate(titles)]
    return [f"{title} ({count + 1})" if count else title for title, count in zip(titles, before, strict=True)]


def _listed(given: Any) -> list[Any]:
    return [given] if isinstance(given, str) or not isinstance(given, Sequence) else list(given)


def _similarity(prototypes: Tensor) -> Tensor:
    unit = normalize(prototypes.double(), dim=-1)
    return unit @ unit.T


def _falls(similarity: Tensor, step: int, which: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Share of the pairs i <= j of `which` for which cosine(i, j) > cosine(i, j + step)."""
    count = len(similarity) - step
    row, column = torch.triu_indices(len(similarity), count)
    kept = which(row, column) & (column < count)
    row, column = row[kept], column[kept]
    return (similarity[row, column] > similarity[row, column + step]).double().mean().item() if len(row) else np.nan


def _pictures(images: Any) -> tuple[list[str], list[Any]]:
    """Names and decoded pictures."""
    listed = list(images) if isinstance(images, Sequence) and not isinstance(images, str) else [images]
    names, pictures = [], []
    for number, each in enumerate(listed):
        if isinstance(each, str | Path):
            for file in find_images([str(each)]):
                names.append(str(file))
                pictures.append(load_image(file))
        else:
            names.append(str(number))
            pictures.append(load_image(each, f"picture {number}"))
    if not pictures:
        raise ValueError("no pictures were given")
    return names, pictures


@torch.no_grad()
def _encode(encoder: torch.nn.Module, pixels: Sequence[Tensor]) -> Tensor:
    """(N, D) features of prepared pictures."""
    weights = next(encoder.parameters())
    encoder.eval()
    batches = [torch.stack(list(pixels[begin : begin + BATCH])).to(weights) for begin in range(0, len(pixels), BATCH)]
    return torch.cat([encoder(batch).float().cpu() for batch in batches])
