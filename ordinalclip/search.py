"""What may be searched: ranges and choices of keys, checked against the configuration before anything runs.

    train.lr=1e-5..1e-3:log            a number from the one to the other, even in its logarithm
    model.drop_path=0..0.3             a number, even
    train.batch_size=16..64:step=16    16, 32, 48 or 64
    head.interpolation=linear|piecewise
    model.image_size=null|64           any values, as they are written

A range is of whole numbers where the key takes whole numbers. Every other `key=value` is an override, and so is one in
quotes, `data.root="a|b"`.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import product
from typing import Any

from scipy.stats import qmc

from ordinalclip.config import RunConfig, flat_keys, override_value
from ordinalclip.run_folder import EXECUTION
from ordinalclip.sections import brief
from ordinalclip.written import Written

Setting = dict[str, Any]  # dotted keys of a run

NUMBER = r"[-+]?(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
RANGE = re.compile(rf"({NUMBER})(\.{{2,}})({NUMBER})((?::.*)?)")
STEP = re.compile(rf"step=({NUMBER})")
MOST_COMBINATIONS = 256  # of ends and choices that are checked together, a millisecond each; of more a sample
MOST_CHOICES = 1000
# The pictures by which trials are judged are the same for all: of the data, only what is made of training pictures.
TRAINING_DATA = ("data.augment.", "data.shots", "data.train_share", "data.shift_ranks", "data.shift_keep")
NEVER = {  # keys of a run that nobody searches, and why
    "output_dir": "every run has a folder of its own",
    "overwrite": "it is for the whole search to say",
    "seed": "several seeds are averaged, not searched",
    "evaluation.test": "the test part is not read by a search",
    "evaluation.decoding": "all trials are judged by the same answers",
    "train.resume": "an interrupted search goes on by itself",
    "train.eval_every": "all trials are judged equally often, and pruning counts validations",
}


@dataclass(frozen=True)
class Range:
    """Numbers of a key from `low` to `high`, both included: ints where the key takes whole numbers, else floats.

    Attributes:
        text: as it was written.
        log: even in the logarithm.
        step: between neighbours, counted from `low`; None for a continuous one, or for every whole number.
    """

    text: str
    low: float
    high: float
    log: bool = False
    step: float | None = None

    @property
    def is_whole(self) -> bool:
        return isinstance(self.low, int)

    @property
    def ends(self) -> list[str]:
        return [repr(self.low), repr(self.high)]

    def value(self, text: str) -> float:
        """What a text stands for."""
        return int(text) if self.is_whole else float(text)

    def at(self, share: float) -> str:
        """The value that lies at a share in [0, 1) of the range; floats with three digits, which say enough.

        >>> Range("", 1e-5, 1e-3, log=True).at(0.5), Range("", 1, 4).at(0.99), Range("", 0.0, 0.3, step=0.1).at(0.5)
        ('0.0001', '4', '0.2')
        """
        step = self.step or (1 if self.is_whole else None)
        if step is not None and not self.log:
            number = int(share * (math.floor((self.high - self.low) / step + 1e-9) + 1))
            return str(Decimal(repr(self.low)) + number * Decimal(repr(step)))
        half = 0.5 if self.is_whole else 0.0  # so that both ends are as likely as the others
        low, high = self.low - half, self.high + half
        value = math.exp(math.log(low) + share * math.log(high / low)) if self.log else low + share * (high - low)
        rounded = round(value) if self.is_whole else float(f"{value:.3g}")
        return repr(min(max(rounded, self.low), self.high))


@dataclass(frozen=True)
class Choice:
    """Some values of a key, as they are written."""

    text: str
    choices: tuple[str, ...]

    @property
    def ends(self) -> list[str]:
        return list(self.choices)

    def value(self, text: str) -> str:
        """What a text stands for."""
        return text

    def at(self, share: float) -> str:
        """The value that lies at a share in [0, 1) of the choices, which are equally likely."""
        return self.choices[int(share * len(self.choices))]


Search = dict[str, Range | Choice]


def split(overrides: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """What is searched, by key, and the plain overrides of a command line.

    >>> split(["train.lr=1e-5..1e-3:log", "data.root=../data", "train.schedule=cosine|constant"])
    ({'train.lr': '1e-5..1e-3:log', 'train.schedule': 'cosine|constant'}, ['data.root=../data'])
    """
    searched: dict[str, str] = {}
    plain = []
    for override in overrides:
        key, _, text = (part.strip() for part in override.partition("="))
        if _is_searched(text):
            searched[key] = text
        else:
            plain.append(override)
    return searched, plain


def _is_searched(text: str) -> bool:
    if text[:1] in ("[", "{", '"', "'") and not isinstance(override_value(text), str):
        return False
    if text[:1] in ('"', "'") and override_value(text) != text:
        return False
    return RANGE.fullmatch(text) is not None or ("|" in text and text != "|")


def refuse_set(searched: Mapping[str, str], given: Mapping[str, Any]) -> None:
    """Raises:
    ValueError: a key that is searched has a value, too.

    Args:
        searched: texts by dotted key.
        given: values by dotted key.
    """
    if both := sorted(given.keys() & searched.keys()):
        raise ValueError(f"{both[0]} is searched, as {searched[both[0]]}, and set, to {given[both[0]]}")


def read_search(
    written: Mapping[str, str], check: Callable[[Setting, str], RunConfig], source: str = "search"
) -> Search:
    """Ranges and choices, each of whose ends the configuration takes.

    Args:
        written: texts by dotted key.
        check: a setting and how messages call it -> the configuration of a run with it.
        source: begins the messages.

    Raises:
        ValueError: no range and no choices, a key that cannot be searched, or an end or a choice, or some of them
            together, that the configuration refuses.
    """
    if not written:
        raise ValueError(f"{source}: nothing to search: give a range or choices, such as train.lr=1e-5..1e-3:log")
    for key in written:
        why = NEVER.get(key, "it changes no model" if key in EXECUTION or key.startswith("evaluation.") else "")
        if key.startswith("data.") and not key.startswith(TRAINING_DATA):
            why = "all trials are judged by the same pictures"
        if why:
            raise ValueError(f"{source}: {key} cannot be searched: {why}")
    texts = {key: _ends(key, text, source) for key, text in written.items()}
    first = {key: override_value(ends[0]) for key, ends in texts.items()}
    search: Search = {}
    for key, ends in texts.items():
        found = []
        for end in ends:
            run = check({**first, key: override_value(end)}, f"{source} {key}={brief(written[key])}")
            found.append(flat_keys(run.model_dump()).get(key))
        search[key] = (
            _range(key, written[key], found, source) if _is_range(written[key]) else Choice(written[key], tuple(ends))
        )
    for together in _together(list(texts.values())):
        setting = dict(zip(texts, map(override_value, together), strict=True))
        words = ", ".join(f"{key}={brief(text)}" for key, text in zip(texts, together, strict=True))
        check(setting, f"{source}, {words}")
    return search


def _together(texts: Sequence[Sequence[str]]) -> Iterable[Sequence[str]]:
    """Combinations of ends and choices: all, or a sample of so many that any two of few choices are in it together."""
    if math.prod(map(len, texts)) <= MOST_COMBINATIONS:
        return product(*texts)
    chosen = random.Random(0)
    return [[chosen.choice(ends) for ends in texts] for _ in range(MOST_COMBINATIONS)]


def _is_range(text: str) -> bool:
    return RANGE.fullmatch(text) is not None


def _ends(key: str, text: str, source: str) -> list[str]:
    """The two ends of a range, or the choices, as they are written."""
    what = f"{source}: {key}={brief(text)}"
    if found := RANGE.fullmatch(text):
        if len(found[2]) > 2:
            raise ValueError(f"{what}: a range has two dots, {found[1]}..{found[3]}; write .5 as 0.5")
        return [found[1], found[3]]
    ends = [part.strip() for part in text.split("|")]
    if len(ends) < 2:
        raise ValueError(f"{what}: write a range, low..high or low..high:log, or choices, a|b|c")
    if "" in ends:
        raise ValueError(f"{what}: an empty choice; write null for the key's nothing")
    if twice := [end for end in ends if ends.count(end) > 1]:
        raise ValueError(f"{what}: {twice[0]} is there twice")
    if len(ends) > MOST_CHOICES:
        raise ValueError(f"{what}: more than {MOST_CHOICES} choices")
    return ends


def _range(key: str, text: str, ends: Sequence[Any], source: str) -> Range:
    """A range by what the configuration makes of its ends."""
    what = f"{source}: {key}={brief(text)}"
    written = RANGE.fullmatch(text)
    assert written is not None
    if any(isinstance(end, Written) for end in ends):  # an option of any type takes them as they are
        ends = [end.value if isinstance(end, Written) else end for end in ends]
    if any(isinstance(end, bool) or not isinstance(end, int | float) for end in ends):
        raise ValueError(f"{what}: {key} is no number; write the value in quotes, or choices, a|b|c")
    if not all(isinstance(end, int) for end in ends):
        ends = [float(end) for end in ends]
    low, high = ends
    if low >= high:
        raise ValueError(f"{what}: the low end comes first, and is less than the high one")
    log, step = False, None
    for extra in written[4].split(":")[1:]:
        if extra == "log" and not log:
            log = True
        elif (found := STEP.fullmatch(extra)) and step is None:
            step = found[1]
        else:
            raise ValueError(f"{what}: after a range come :log or :step=NUMBER, got :{brief(extra)}")
    if log and low <= 0:
        raise ValueError(f"{what}: a logarithmic range begins above 0")
    if step is None:
        return Range(text, low, high, log)
    if log:
        raise ValueError(f"{what}: a range has either :log or :step, not both")
    exact, width = Decimal(step), Decimal(repr(high)) - Decimal(repr(low))
    if not 0 < exact <= width or (isinstance(low, int) and exact % 1):
        kind = "a whole number" if isinstance(low, int) else "a number"
        raise ValueError(f"{what}: the step is {kind} above 0 and at most {width}, got {step}")
    if width % exact:
        last = Decimal(repr(high)) - width % exact
        raise ValueError(f"{what}: steps of {step} from {low} do not lead to {high}; the last is {last}")
    return Range(text, low, high, step=int(exact) if isinstance(low, int) else float(exact))


def drawn(search: Search, number: int, seed: int = 0) -> list[dict[str, str]]:
    """That many settings, texts by key, which cover the search evenly.

    They are the first points of a scrambled Sobol sequence (Owen, 1998), better spread than random ones (Bergstra &
    Bengio, 2012, section 5). With more of them the first are the same.
    """
    points = qmc.Sobol(len(search), seed=seed).random_base2(max(0, number - 1).bit_length())[:number]
    return [
        {key: each.at(share) for (key, each), share in zip(search.items(), point, strict=True)}
        for point in points.tolist()
    ]
