"""Losses of other packages: any `loss(logits, ranks)` on a linear classifier of the ranks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn

from baselines.classification import CrossEntropy
from ordinalclip.heads import Head, HeadContext, Outputs, Targets, import_object
from ordinalclip.losses import weighted_mean
from ordinalclip.suggestions import near_matches

Input = Literal["logits", "probabilities"]
Criterion = Callable[[Tensor, Tensor], Any]


class ImportedLossHead(CrossEntropy):
    """A linear classifier of the ranks, trained by a loss that is imported by its name.

    The loss is a function (logits (B, R), ranks (B,) int64) -> scalar, or a class of `nn.Module` whose instances are
    such functions. It is tried on made-up logits when the head is built, so that one which wants something else
    is refused before it trains anything. Sample weights need the losses of single samples: where the loss, or the one
    inside it, has an option `reduction`, it is asked for "none".

    What is deployed is the classifier, as method `cross_entropy`: serving imports no loss. Everything else, loading the
    trainable form too, runs the code that `loss` names.

    Args:
        loss: module:Name of a function or class, e.g. dlordinal.losses:EMDLoss.
        options: of the loss, e.g. {alpha: 1.0}; a loss inside the loss as module:Name, such as {base_loss:
            torch.nn:CrossEntropyLoss}. num_classes and use_logits are set by themselves.
        input: what the loss is given: logits, or their softmax. Default: logits, if it is seen to want them.

    Raises:
        ValueError: what `loss` names cannot be imported, built or called, wants other options or input, or gives no
            finite scalar with a gradient.
    """

    def __init__(
        self,
        context: HeadContext,
        loss: str = "torch.nn:CrossEntropyLoss",
        options: dict[str, Any] | None = None,
        input: Input | None = None,
    ):
        super().__init__(context)
        self.name, self.input = loss, input
        build = partial(_build, loss, "head.loss", options or {}, len(context.ranks), input != "probabilities")
        whole = build(unreduced=False)
        value = self._try(whole)
        self.per_sample = False  # whether the criterion gives the losses of single samples
        try:
            single = build(unreduced=True)
            self.per_sample = self._gives_samples(single, value)
        except Exception:  # no "none" among its reductions
            single = whole
        self.criterion: Criterion = single if self.per_sample else whole

    def _given(self, logits: Tensor) -> Tensor:
        return torch.softmax(logits, dim=1) if self.input == "probabilities" else logits

    def _gives_samples(self, criterion: Criterion, value: Tensor) -> bool:
        """Whether it gives (B,) losses whose mean is the loss; with weights of classes, say, it is another one."""
        logits, ranks = _trial(len(self.ranks))
        losses = deepcopy(criterion)(self._given(logits), ranks)
        return losses.shape == ranks.shape and bool(torch.isclose(losses.mean(), value, rtol=1e-4))

    def _try(self, criterion: Criterion) -> Tensor:
        """The loss of made-up logits, after making sure that it is one of logits (or probabilities) of R ranks.

        Copies are tried: losses may take notes of their first batch.
        """
        logits, ranks = _trial(len(self.ranks))
        given = self._given(logits).requires_grad_()
        wants = f"head.loss {self.name}, called with {self.input or 'logits'} {tuple(given.shape)} and ranks of int64"
        try:
            value = deepcopy(criterion)(given, ranks)
        except Exception as error:  # whatever the code of others raises
            raise ValueError(f"{wants}, fails: {type(error).__name__}: {error}") from error
        if not (torch.is_tensor(value) and value.ndim == 0 and value.is_floating_point() and value.requires_grad):
            found = f"a tensor of shape {tuple(value.shape)}" if torch.is_tensor(value) else type(value).__name__
            raise ValueError(f"{wants}, must give a scalar with a gradient, got {found}")
        (gradient,) = torch.autograd.grad(value, given)
        if not (value.isfinite() and gradient.isfinite().all()):
            raise ValueError(f"{wants}, gives {value.item():g} or a gradient that is not finite")
        if (unread := (gradient == 0).all(dim=0)).any():
            raise ValueError(
                f"{wants}, never looks at column {int(unread.nonzero()[0])}: it is made for other outputs than one for "
                "each rank; for R - 1 thresholds there are the methods ordreg, coral and corn"
            )
        self._check_input(criterion, given.detach(), ranks, value.detach())
        return value.detach()

    def _check_input(self, criterion: Criterion, given: Tensor, ranks: Tensor, value: Tensor) -> None:
        """A loss with a softmax of its own does not change when a number is added to a row; others do."""
        if self.input == "logits":  # said so
            return
        try:
            shifted = deepcopy(criterion)(given + 0.1 + ranks[:, None] / len(self.ranks), ranks)
            softmax = bool(torch.isclose(shifted, value, rtol=1e-4))
        except Exception:  # no probabilities any more
            softmax = False
        if softmax and self.input == "probabilities":
            raise ValueError(f"head.loss {self.name} takes the softmax itself: leave out head.input=probabilities")
        if not softmax and self.input is None:
            raise ValueError(
                f"head.loss {self.name} changes when a number is added to all logits of a picture, so it takes no "
                "softmax of them; set head.input=probabilities, or head.input=logits if logits are what it wants"
            )

    def loss(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        if targets.weights is not None and not self.per_sample:
            raise ValueError(
                f"head.loss {self.name} gives no losses of single samples whose mean it is, so samples cannot have "
                "weights; set train.weighting=none"
            )
        loss = self.criterion(self._given(outputs["logits"]), targets.ranks)
        return {"loss": weighted_mean(loss, targets.weights) if self.per_sample else loss}

    def deploy(self) -> tuple[str, dict[str, Any], Head]:
        head = CrossEntropy(HeadContext(self.ranks, self.linear.in_features, decoding=self.decoding))
        head.linear = self.linear
        return "cross_entropy", {}, head


def _trial(num_ranks: int) -> tuple[Tensor, Tensor]:
    """Made-up logits (B, R) and ranks (B,), in which every rank appears; B is not R, to tell samples from ranks."""
    size = 2 * num_ranks + 1
    logits = torch.randn(size, num_ranks, generator=torch.Generator().manual_seed(0))
    return logits, torch.arange(size) % num_ranks


def _build(
    path: str, what: str, options: Mapping[str, Any], num_ranks: int, use_logits: bool, unreduced: bool
) -> Criterion:
    """The loss that "module:Name" stands for, with its options.

    Args:
        what: the key that names it, for errors.
        use_logits, unreduced: for losses with an option use_logits or reduction.
    """
    try:
        found = import_object(path, what)
    except ValueError as error:
        if path.startswith("dlordinal") and find_spec("dlordinal") is None:
            raise ValueError(f"{error}; pip install 'ordinalclip[losses]'") from error
        raise
    if not callable(found) or (isinstance(found, type) and not issubclass(found, nn.Module)):
        raise ValueError(f"{what} {path} is neither a function nor a class of torch.nn.Module")
    known, takes_any = _parameters(found)
    values: dict[str, Any] = {"num_classes": num_ranks} if "num_classes" in known else {}
    for key, value in options.items():
        if key not in known and not takes_any:
            raise ValueError(f"head.options.{key} is not an option of {path}; {near_matches(key, known)}")
        if key == "use_logits" and value != use_logits:
            raise ValueError(f"head.options.use_logits={value} contradicts head.input")
        annotation = str(known[key].annotation) if key in known else ""
        if isinstance(value, str) and ":" in value:
            value = _build(value, f"head.options.{key}", {}, num_ranks, use_logits, unreduced)
        elif isinstance(value, list) and ("Tensor" in annotation or key in ("weight", "weights")):
            value = torch.tensor(value, dtype=torch.float32)
        values[key] = value
    if "use_logits" in known:
        values["use_logits"] = use_logits
    if "reduction" in known and unreduced:
        values.setdefault("reduction", "none")
    lacking = [key for key, parameter in known.items() if parameter.default is parameter.empty and key not in values]
    if lacking:
        raise ValueError(f"{what} {path} needs head.options with {', '.join(lacking)}")
    if not isinstance(found, type):
        return _Function(found, values)
    try:
        return found(**values)
    except Exception as error:  # whatever the code of others raises
        raise ValueError(
            f"{what} {path} cannot be built with {dict(options)}: {type(error).__name__}: {error}"
        ) from error


class _Function(nn.Module):
    """A function with its options; those that are tensors move and change their type with the module."""

    def __init__(self, function: Criterion, options: dict[str, Any]):
        super().__init__()
        self.function = function
        self.options = {name: value for name, value in options.items() if not torch.is_tensor(value)}
        self.tensors = [name for name in options if name not in self.options]
        for name in self.tensors:
            self.register_buffer(f"option_{name}", options[name], persistent=False)

    def forward(self, logits: Tensor, ranks: Tensor) -> Any:
        return self.function(logits, ranks, **self.options, **{n: getattr(self, f"option_{n}") for n in self.tensors})


def _parameters(found: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], bool]:
    """The options of a function after (logits, ranks), or of a class, by name; and whether it takes any other too."""
    constructor: Any = found
    try:  # of `__init__`, since what marks a class as deprecated hides its signature
        signature = inspect.signature(constructor.__init__ if isinstance(found, type) else found)
    except ValueError:  # written in C
        return {}, True
    parameters = list(signature.parameters.values())
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    own = parameters[1:] if isinstance(found, type) else parameters[2:]
    takes_any = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters)
    return {parameter.name: parameter for parameter in own if parameter.kind in named}, takes_any
