"""`ordinalclip methods`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ordinalclip.quoting import printable

if TYPE_CHECKING:
    from ordinalclip.sections import Section

NEEDS = ("language",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="a method, or module:Class; default: all in short")


def run(arguments: argparse.Namespace) -> int:
    from ordinalclip.heads import available_heads, class_path, head_section
    from ordinalclip.suggestions import near_matches

    known = available_heads()
    name = arguments.name
    if name is None:
        for each in known:
            try:
                print("\n".join(_short(each, head_section(each))), end="\n\n")
            except ValueError as error:  # what an installed package registers need not work
                print(f"{each}: {printable(error)}", end="\n\n")
        print("Used as method=NAME head.OPTION=VALUE. `ordinalclip methods NAME` says what the options mean.")
        return 0
    if ":" not in name and name not in known:
        raise ValueError(
            f"method {name!r} is unknown; {near_matches(name, known)}, or a head of your own as module:Class"
        )
    print("\n".join(_long(name, class_path(name), head_section(name))))
    return 0


def _short(name: str, options: type[Section]) -> Iterable[str]:
    """What it is, where it is from, its options with their defaults."""
    from ordinalclip.heads import about

    said = about(name)
    yield f"{name}: {said.summary}"
    if said.paper:
        yield f"  paper: {said.paper}"
    fields = options.model_fields.items()
    if fields:
        yield "  head: " + ", ".join(f"{key}={_default(field)}" for key, field in fields)


def _long(name: str, path: str, options: type[Section]) -> Iterable[str]:
    """All of its docstring, and a line for every option."""
    from ordinalclip.heads import about
    from ordinalclip.sections import allowed

    said = about(name)
    yield f"{name} ({path}): {said.summary}"
    if said.details:
        yield f"\n{said.details}"
    if said.paper:
        yield f"\nPaper: {said.paper}"
    yield "\nOptions (default) [allowed]:" if options.model_fields else "\nIt has no options."
    for key, field in options.model_fields.items():
        meaning = f": {field.description}" if field.description else ""
        yield f"  head.{key} ({_default(field)}){meaning} [{allowed(field)}]"


def _default(field: Any) -> str:
    return "to be given" if field.is_required() else json.dumps(field.default, ensure_ascii=False)
