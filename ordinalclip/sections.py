"""Sections of a configuration: strict types, scalars taken as their field wants them, errors that name the key."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from ordinalclip.suggestions import near_matches
from ordinalclip.written import Written

MAX_PROBLEMS = 5  # that one message names
MEMBER = re.compile(r"constrained-\w+|literal\[.*\]")  # of a union, in pydantic's place of a problem
SectionType = TypeVar("SectionType", bound="Section")


class Section(BaseModel):
    """Keys with types, ranges and descriptions. No type is turned into another: true is no number, 1.0 no integer.

    Numbers are finite where a field does not say otherwise. A scalar of a file or of the command line is text, as it is
    written, where text is wanted, and a number, a truth value or nothing elsewhere.
    """

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        ser_json_inf_nan="constants",  # where a field takes them, as sigma of RM-Loss does: null is something else
        validate_default=True,
        protected_namespaces=(),
    )

    @field_validator("*", mode="before")
    @classmethod
    def _as_wanted(cls, value: Any, info: ValidationInfo) -> Any:
        return as_wanted(value, cls.model_fields[info.field_name or ""].annotation)


def as_wanted(value: Any, annotation: Any) -> Any:
    """A value with what is `Written` in it as the annotation wants it, and lists and tuples as one another.

    What it does not want comes back as text, for the type to be refused; where anything is wanted, as it is written.
    """
    if isinstance(value, str) and not isinstance(value, Written) and "\0" in value:
        raise ValueError("a text cannot hold the character NUL")
    if not isinstance(value, Written | list | tuple | dict):
        return value
    kinds = list(_alternatives(annotation))
    if isinstance(value, Written):
        return _scalar(value, kinds)
    for kind in kinds:
        origin, inner = typing.get_origin(kind), typing.get_args(kind)
        if isinstance(value, list | tuple) and origin in (list, Sequence):
            return [as_wanted(each, inner[0]) for each in value]
        if isinstance(value, list | tuple) and origin is tuple:
            every = inner[:1] * len(value) if inner[1:] == (...,) else inner
            return tuple(as_wanted(*pair) for pair in zip_longest(value, every, fillvalue=Any))[: len(value)]
        if isinstance(value, dict) and origin is dict:
            return {key: as_wanted(each, inner[1]) for key, each in value.items()}
    return value


def _alternatives(annotation: Any) -> Iterator[Any]:
    """The members of unions, without what `Annotated` adds."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        yield from _alternatives(inner[0])
    elif origin in (typing.Union, types.UnionType):
        for kind in inner:
            yield from _alternatives(kind)
    else:
        yield annotation


def _scalar(written: Written, kinds: list[Any]) -> Any:
    meant, nothing = written.value, written.value is None
    if nothing and type(None) in kinds:
        return None
    if nothing and any(_is_section(kind) or typing.get_origin(kind) is dict for kind in kinds):
        return {}
    if type(meant) in kinds or (type(meant) is int and float in kinds):
        return meant
    if any(str(written) in typing.get_args(kind) for kind in kinds if typing.get_origin(kind) is Literal):
        return str(written)
    if str in kinds:
        return None if nothing and written else str(written)  # null is no text, but an empty value is empty text
    return written if Any in kinds else str(written)


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def parse_section(content: Mapping[str, Any], section: type[SectionType], source: str, prefix: str = "") -> SectionType:
    """Check a mapping against a section; the first problems in one ValueError, each with its dotted key.

    Args:
        source: begins the message.
        prefix: of the keys in the message.
    """
    try:
        return section.model_validate(content)
    except ValidationError as error:
        problems = [_explain(problem, section, prefix) for problem in error.errors()]
    more = [f"and {len(problems) - MAX_PROBLEMS} more"] if len(problems) > MAX_PROBLEMS else []
    raise ValueError(f"{source}: " + "; ".join([*problems[:MAX_PROBLEMS], *more]))


def _explain(problem: Any, section: type[Section], prefix: str) -> str:
    key = ".".join(str(part) for part in problem["loc"] if not MEMBER.fullmatch(str(part)))
    if problem["type"] == "extra_forbidden":
        names = [prefix + name for name, _, _ in describe(section)]
        known = names if "." in key or prefix else dict.fromkeys([*names, *section.model_fields])
        return f"{prefix}{brief(key)} is not a key; {near_matches(prefix + key, known)}"
    key = prefix + key if key else ""
    message = re.sub(r"^Value error, | after validation, not \d+$", "", problem["msg"])
    given = problem["input"]
    if problem["type"] == "string_type" and given is None:
        message = "null is no text; leave the key out for its default, or write it in quotes"
    elif problem["type"] in ("model_type", "model_attributes_type"):
        message = f"a section of keys is wanted, such as {key}.KEY=VALUE, got {brief(repr(given))}"
    elif key and problem["type"] != "missing" and not isinstance(given, dict):
        message += f", got {brief(repr(given))}"
    return f"{key}: {message}" if key else message


def brief(text: str) -> str:
    """Text of any length as part of a message."""
    return text if len(text) <= 80 else f"{text[:60]} ... {text[-15:]}"


def describe(section: type[Section], prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Every dotted key with its default and description."""
    for name, info in section.model_fields.items():
        annotation = info.annotation
        if isinstance(annotation, type) and issubclass(annotation, Section):
            yield from describe(annotation, f"{prefix}{name}.")
        else:
            choices = typing.get_args(annotation) if typing.get_origin(annotation) is Literal else ()
            allowed = f" [{', '.join(map(str, choices))}]" if choices else ""
            yield f"{prefix}{name}", info.default, (info.description or "") + allowed


BOUNDS = {"gt": "above", "ge": "from", "lt": "below", "le": "to", "min_length": "at least", "max_length": "at most"}
KINDS = {int: "whole number", float: "number", str: "text", bool: "true or false", type(None): "null", Any: "anything"}


def allowed(info: FieldInfo) -> str:
    """What a field takes, in words.

    >>> from pydantic import Field, create_model
    >>> example = create_model("", share=Annotated[float, Field(gt=0, le=1)] | None, form=Literal["a", "b"])
    >>> [allowed(info) for info in example.model_fields.values()]
    ['number above 0 to 1, or null', 'a or b']
    """
    return _kind(info.annotation, info.metadata)


def _kind(annotation: Any, limits: Sequence[Any] = ()) -> str:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        found = [limit for each in inner[1:] for limit in getattr(each, "metadata", [each])]
        return _kind(inner[0], [*found, *limits])
    if origin in (typing.Union, types.UnionType):
        return ", or ".join(_kind(kind, () if kind is type(None) else limits) for kind in inner)
    if origin is Literal:
        return " or ".join(map(str, inner))
    if origin in (list, tuple, Sequence):
        kind = f"list of: {_kind(inner[0])}"
    elif origin is dict:
        kind = "mapping"
    else:
        kind = KINDS.get(annotation, getattr(annotation, "__name__", str(annotation)))
    bounds = [
        f"{word} {getattr(limit, key):g}" for limit in limits for key, word in BOUNDS.items() if hasattr(limit, key)
    ]
    return " ".join([kind, *bounds])
