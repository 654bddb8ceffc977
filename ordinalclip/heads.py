"""Heads: every method is a head on image features, so the trainer knows nothing about methods."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, get_args, get_type_hints

import torch
from pydantic import Field, create_model
from torch import Tensor, nn

from ordinalclip.losses import at_least_float32
from ordinalclip.ranks import Decoding, Ranks
from ordinalclip.sections import Section, parse_section
from ordinalclip.suggestions import near_matches
from ordinalclip.text import TextTower
from ordinalclip.written import values

Outputs = dict[str, Tensor]
Reads = Literal["pooled", "layers", "tokens"]

# Ranges of options, as annotations of constructors: see `head_section`.
Positive = Annotated[float, Field(gt=0, le=1e6)]
Factor = Annotated[float, Field(ge=0, le=1e6)]  # of a term of a loss; 0 leaves it out
Width = Annotated[int, Field(ge=1, le=1 << 14)]  # of a layer: one between two of the largest weighs a gigabyte


class Targets(NamedTuple):
    """Labels of a batch: `values` (B,) in label units, `ranks` (B,) int64, `weights` (B,) or None.

    `progress` in [0, 1] says how much of the training is done.
    """

    values: Tensor
    ranks: Tensor
    weights: Tensor | None = None
    progress: float = 0.0


class Prediction(NamedTuple):
    """Answers: `value` (B,) in label units, `rank` (B,) int64, `probabilities` (B, R) or None."""

    value: Tensor
    rank: Tensor
    probabilities: Tensor | None = None


class NoNumber(ValueError):
    """A model answers what is no number: there is no rank for it."""


_unchecked: ContextVar[list[Tensor] | None] = ContextVar("_unchecked", default=None)


@contextmanager
def without_branches() -> Iterator[list[Tensor]]:
    """Within it answers are computed without branches on data, which graphs that are exported cannot have.

    Nothing is raised where a number is not finite: what `check_numbers` would have looked at is in the list that is
    given, for the graph to look at.
    """
    unchecked: list[Tensor] = []
    token = _unchecked.set(unchecked)
    try:
        yield unchecked
    finally:
        _unchecked.reset(token)


def branchless() -> bool:
    """Whether answers are computed `without_branches`."""
    return _unchecked.get() is not None


def check_numbers(answers: Tensor) -> Tensor:
    """Answers or probabilities as they are.

    Raises:
        NoNumber: one of them is not finite.
    """
    if (unchecked := _unchecked.get()) is not None:
        unchecked.append(answers)
        return answers
    if not (finite := answers.isfinite()).all():
        count = int((~finite).reshape(len(answers), -1).any(dim=1).sum())
        raise NoNumber(
            f"the model answers {count} of {len(answers)} pictures with numbers that are not finite: its weights are "
            "damaged, or the pictures are not what it was trained on"
        )
    return answers


@dataclass
class HeadContext:
    """What a head is built for.

    Attributes:
        ranks: the label space.
        input_dim: width D of the image features.
        text: the frozen text tower, or None when there is none (a deployed model).
        logit_scale: log of the CLIP's temperature factor.
        shared_space: whether the image features, or those of the last layer, already live in the text tower's output
            space.
        label_mean, label_std: of the training labels, for heads that regress standardised labels.
        decoding: how a distribution becomes one value.
        layer_dims: for heads on layer-wise features the width of each layer, of which D is the largest; else empty.
        generator: where layers are those of a generator's codes and it is at hand: codes (B, L, D) -> pictures
            (B, 3, H, W) in [-1, 1].
        see: such pictures -> (B, E) features of the text tower's own image encoder; where there is a generator.
    """

    ranks: Ranks
    input_dim: int
    text: TextTower | None = None
    logit_scale: float = 0.0
    shared_space: bool = True
    label_mean: float = 0.0
    label_std: float = 1.0
    decoding: Decoding = "median"
    layer_dims: tuple[int, ...] = ()
    generator: nn.Module | None = None
    see: Callable[[Tensor], Tensor] | None = None


def decode(probabilities: Tensor, ranks: Ranks, decoding: Decoding) -> Prediction:
    """One value per distribution over ranks.

    `median` (the choice that minimises the expected absolute error) is the first rank at which the cumulative
    probability reaches one half, `argmax` the likeliest rank, `expectation` the mean value.

    Args:
        probabilities: (B, R), rows summing to 1.

    Raises:
        NoNumber: probabilities that are not finite; ValueError: an unknown decoding.
    """
    check_numbers(probabilities)
    values = torch.tensor(ranks.values, dtype=probabilities.dtype, device=probabilities.device)
    if decoding == "expectation":
        value = probabilities @ values
        return Prediction(value, ranks.nearest(value), probabilities)
    if decoding == "median":
        below = probabilities.cumsum(dim=1) < 0.5
        rank = below.sum(dim=1).clamp(max=len(ranks) - 1)
    elif decoding == "argmax":
        rank = probabilities.argmax(dim=1)
    else:
        raise ValueError(f"decoding {decoding!r} is unknown; choices: {', '.join(get_args(Decoding))}")
    return Prediction(values[rank], rank, probabilities)


class Head(nn.Module):
    """A method: features -> outputs -> loss and predictions.

    Subclasses take a `HeadContext` first and their options as keyword arguments with defaults, and define
    `forward` and `loss`; heads that give no `logits` (B, R) also define `predict`. See `head_options` for options that
    are passed on to the base class as `**shared`.

    Attributes:
        learns: whether anything of the method is trained; a comparison asks no settings to try of one that does not.
        rebuilt: submodules that come back from the backbone's own weights, so that no checkpoint holds them.
        views: how many augmented views of every picture are in a training batch, as rows of their own.
        inner: class of a head inside this one that takes the options this one leaves, see `head_options`.
        reads: what of the image encoder the features are: its own `pooled` ones, (B, D); those of all its `layers`,
            (B, L, D), see `ordinalclip.backbones.layers.LayerFeatures`; or the `tokens` of its last layer, (B, N, D),
            see `TokenFeatures` there. What is deployed takes the same.
    """

    learns: ClassVar[bool] = True
    rebuilt: ClassVar[tuple[str, ...]] = ()
    views = 1
    inner: ClassVar[type[Head] | None] = None
    reads: ClassVar[Reads] = "pooled"

    def __init__(self, context: HeadContext):
        super().__init__()
        self.ranks = context.ranks
        self.decoding: Decoding = context.decoding
        self.label_mean, self.label_std = context.label_mean, context.label_std  # numbers: no cast rounds them

    def forward(self, features: Tensor) -> Outputs:
        """(B, D) features, or (B, L, D) or (B, N, D) as `reads` says -> named tensors whose first dimension is B."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward")

    def space(self, features: Tensor) -> Tensor:
        """Features -> (B, E), the space that answers are read from, for D5 and residual variance.
        Default: the features, those of all layers or tokens side by side."""
        return features.flatten(1)

    def loss(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        """Scalars on the WHOLE batch: "loss" is the total that is minimised, the rest is logged."""
        raise NotImplementedError(f"{type(self).__name__} defines no loss")

    def start(self, train: tuple[Outputs, Targets]) -> None:
        """Before the first step of a training, with the outputs and targets of the training part. Default: nothing."""

    def fit(self, train: tuple[Outputs, Targets], validation: tuple[Outputs, Targets] | None) -> None:
        """Before every evaluation, with the outputs and targets of both parts; those of the training part have the
        weights of training. Default: nothing."""

    @property
    def needs_start(self) -> bool:
        """Whether `start` does anything."""
        return type(self).start is not Head.start

    @property
    def needs_fit(self) -> bool:
        """Whether `fit` does anything, so that the outputs of the training part are worth computing."""
        return type(self).fit is not Head.fit

    def predict(self, outputs: Outputs) -> Prediction:
        """(B, ...) outputs -> `Prediction`. Default: softmax of `logits`, decoded."""
        return decode(torch.softmax(at_least_float32(outputs["logits"]), dim=1), self.ranks, self.decoding)

    def expected_value(self, outputs: Outputs) -> Tensor:
        """(B, ...) outputs -> (B,) in label units: the mean of the distribution over ranks, or the value itself for
        heads without one. What explanations explain, whatever the decoding."""
        value, _, probabilities = self.predict(outputs)
        return value if probabilities is None else decode(probabilities, self.ranks, "expectation").value

    def smooth_value(self, outputs: Outputs) -> Tensor:
        """`expected_value` with a gradient, for explanations by gradients. Heads whose answer has none, since it is
        constant in pieces or learned on detached features, give what stands for it and say so in `stand_in`."""
        return self.expected_value(outputs)

    @property
    def stand_in(self) -> str:
        """In words, what `smooth_value` gives in the place of an answer without a gradient; "" where it gives the
        expected value itself."""
        return ""

    def deploy(self) -> tuple[str, dict[str, Any], Head] | None:
        """What is served instead of this head, as (method name, options, head). Default None: the head itself."""
        return None

    def rank_prototypes(self) -> Tensor | None:
        """The (R, D) vectors that images are compared with, one per rank. Default None: the head has none."""
        return None

    def learned_prompts(self) -> dict[str, Tensor]:
        """What a run keeps of learned prompts, whose prototypes alone are deployed; nothing for other heads."""
        return {}

    def prompt_parameters(self) -> list[nn.Parameter]:
        """Parameters that take the prompts' learning rate; all others of the head take the head's."""
        return []

    def standardise(self, values: Tensor) -> Tensor:
        """For regressors: (B,) label values by the mean and standard deviation of the training labels."""
        return (values - self.label_mean) / self.label_std

    def predict_value(self, standardised: Tensor) -> Prediction:
        """For regressors: (B,) predictions in standardised label units as a `Prediction`.

        Raises:
            NoNumber: predictions that are not finite.
        """
        value = check_numbers(at_least_float32(standardised) * self.label_std + self.label_mean)
        return Prediction(value, self.ranks.nearest(value))


HEADS = {
    "ordinalclip": "ordinalclip.language:OrdinalCLIP",
    "coop": "ordinalclip.language:CoOp",
    "text_anchors": "ordinalclip.anchors:TextAnchors",
    "zero_shot": "ordinalclip.language:ZeroShot",
    "prototypes": "ordinalclip.language:PrototypeHead",
}
OURS = ("ordinalclip", "baselines")  # packages whose methods every installation has
LOSSES = ("torch.nn", "torch.nn.functional", "dlordinal.losses")  # modules of nothing but losses and layers


def available_heads() -> dict[str, str]:
    """Every known method and the class behind it: our own, and all of the entry-point group `ordinalclip.heads`."""
    heads = dict(HEADS)
    for point in _registered(tuple(sys.path)):
        heads.update(point.load())
    return heads


@cache
def _registered(path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """What installed packages register; all of them are looked through, which takes 20 ms.

    Args:
        path: `sys.path`, on which they are.
    """
    return tuple(entry_points(group="ordinalclip.heads"))


def head_class(method: str) -> type[Head]:
    """The class of a method, which is one of `available_heads` or a class of your own, "module:Class".

    Raises:
        ValueError: an unknown method (the message lists the choices), a module that cannot be imported, a name that it
            lacks, or something that is no subclass of `Head`.
    """
    found = import_object(class_path(method), f"method {method!r}")
    if not (isinstance(found, type) and issubclass(found, Head)):
        raise ValueError(f"method {method!r}: {found!r} is not a subclass of ordinalclip.heads.Head")
    return found


def class_path(method: str) -> str:
    """The "module:Class" of a method.

    Raises:
        ValueError: an unknown method.
    """
    if ":" in method:
        return method
    heads = available_heads()
    if method not in heads:
        raise ValueError(
            f"method {method!r} is unknown; {near_matches(method, sorted(heads))}; ordinalclip methods lists all, a "
            "head of your own is module:Class"
        )
    return heads[method]


def foreign_class(method: str) -> str:
    """The "module:Class" of a method that another package brings, which its saved models need; else ""."""
    path = class_path(method)
    return "" if path.partition(":")[0].partition(".")[0] in OURS else path


_by_user: ContextVar[bool] = ContextVar("_by_user", default=True)


@contextmanager
def names_from_a_file() -> Iterator[None]:
    """Within it, `import_object` gets names that the user has not written: they come with a model from anywhere.

    They may stand for our own methods and `LOSSES`, for what an installed package registers, and for what is in a
    module that this program has imported before, if that is none of Python's own. Nothing else is imported.
    """
    token = _by_user.set(False)
    try:
        yield
    finally:
        _by_user.reset(token)


def _check_known(path: str, module: str, what: str) -> None:
    root = module.partition(".")[0]
    if root in OURS or module in LOSSES or path in available_heads().values():
        return
    if module in sys.modules and root not in (*sys.stdlib_module_names, "torch"):
        return
    raise ValueError(
        f"{what} names code of the module {module!r}, which a model's files may not import by themselves; if you trust "
        f"it, import {module} first (ordinalclip predict --import {module}), or install the package that registers it"
    )


def import_object(path: str, what: str) -> Any:
    """What "module:name" stands for.

    Args:
        what: begins the message of errors.

    Raises:
        ValueError: not of this form, a module that cannot be imported, or a name that it lacks; or one that may not
            be imported, see `names_from_a_file`.
    """
    module, _, name = path.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), name)):
        raise ValueError(f"{what}: write module:name, e.g. my_package.my_module:MyName, got {path!r}")
    if not _by_user.get():
        _check_known(path, module, what)
    found = import_by_name(module, what)
    if not hasattr(found, name):
        public = [other for other in vars(found) if not other.startswith("_")]
        raise ValueError(f"{what}: module {module!r} has no {name!r}; {near_matches(name, public)}")
    return getattr(found, name)


def import_by_name(module: str, what: str) -> Any:
    """A module.

    Raises:
        ValueError: it cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:  # whatever the code of others raises
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{what}: module {module!r} cannot be imported ({reason}); installed packages and the folders on "
            "PYTHONPATH are searched"
        ) from error


class About(NamedTuple):
    """What a method's docstring says: one sentence, the rest before `Args:`, and the paper of its line `Paper:`."""

    summary: str
    details: str
    paper: str


def about(method: str) -> About:
    """A method in words.

    >>> about("ordreg").paper
    'Niu et al., "Ordinal Regression with Multiple Output CNN for Age Estimation", CVPR 2016.'

    Raises:
        ValueError: see `head_class`.
    """
    text, _, _ = inspect.cleandoc(vars(head_class(method)).get("__doc__") or "").partition("\nArgs:\n")
    summary, *others = (part.strip() for part in re.split(r"\n(?:Raises|Attributes):\n", text)[0].split("\n\n"))
    papers = [" ".join(part.removeprefix("Paper:").split()) for part in others if part.startswith("Paper:")]
    details = "\n\n".join(part for part in others if part and not part.startswith("Paper:"))
    return About(" ".join(summary.split()), details, "; ".join(papers))


class Option(NamedTuple):
    """An option of a method: `default` (`inspect.Parameter.empty`: it must be given), `annotation`, `description`."""

    default: Any
    annotation: Any
    description: str


def head_options(method: str) -> dict[str, Option]:
    """The options of a method, each declared once in the class that uses it.

    These are the keyword arguments of the class's constructor and, where it takes `**shared` to pass them on, those of
    the next class in its method resolution order that has a constructor, and so on; in the end those of its `inner`
    head, if it has one. A default in a subclass wins. The first parameter is the `HeadContext`; positional-only ones
    are what a base class wants from its subclasses. The description is that of the docstring's block `Args:`, in the
    declaring class or else in the next that has one.

    >>> head_options("huber")["delta"].default
    1.0
    """
    options: dict[str, Option] = {}
    for base in _declaring(head_class(method)):
        if "__init__" not in vars(base):
            continue
        _, _, *parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
        hints, described = get_type_hints(vars(base)["__init__"], include_extras=True), _described_arguments(base)
        for name, parameter in ((p.name, p) for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)):
            known, text = options.get(name), described.get(name, "")
            if known is None:
                options[name] = Option(parameter.default, hints.get(name, Any), text)
            elif not known.description:
                options[name] = known._replace(description=text)
        if not any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters):
            break
    return options


def _declaring(head: type[Head]) -> Iterator[type]:
    """The classes that may declare options of a head, in the order in which they are asked."""
    for base in head.__mro__:
        if base is Head and head.inner is not None:
            yield from _declaring(head.inner)
            return
        yield base


def _described_arguments(base: type) -> dict[str, str]:
    """Names and descriptions of the block `Args:` of a class's own docstring; "a, b: text" describes both."""
    _, _, block = inspect.cleandoc(vars(base).get("__doc__") or "").partition("\nArgs:\n")
    described: dict[str, str] = {}
    names: list[str] = []
    for line in block.splitlines():
        if line and not line.startswith(" "):
            break
        if entry := re.match(r" {4}(\w+(?:, \w+)*): *(.*)", line):
            names = entry[1].split(", ")
            described.update(dict.fromkeys(names, entry[2]))
        elif line:
            described.update({name: f"{described[name]} {line.strip()}".strip() for name in names})
    return {name: text.removesuffix(".") for name, text in described.items()}


def head_section(method: str) -> type[Section]:
    """The options of a method as a section: types and ranges from the annotations, and their descriptions."""
    # mypy takes the __hash__ of a head for that of its class
    return _section(method, head_class(method))  # type: ignore[arg-type]


@cache  # pydantic takes milliseconds for one, and a comparison of 900 runs asks 900 times
def _section(method: str, _head: type[Head]) -> type[Section]:
    fields: dict[str, Any] = {
        name: (
            option.annotation,
            Field(... if option.default is inspect.Parameter.empty else option.default, description=option.description),
        )
        for name, option in head_options(method).items()
    }
    return create_model(f"{method} options", __base__=Section, **fields)


def checked_options(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a method, those that are given, with their types and ranges checked.

    Raises:
        ValueError: an unknown method, options that it does not have (with the nearest that it has), wrong values.
    """
    checked = parse_section(given, head_section(method), f"options of method {method!r}", "head.")
    return values(checked.model_dump(exclude_unset=True))


def build_head(method: str, context: HeadContext, options: Mapping[str, Any]) -> Head:
    """Build a method's head.

    Raises:
        ValueError: an unknown method, or what `checked_options` and the head itself refuse.
    """
    return head_class(method)(context, **checked_options(method, options))
