"""YAML as it is written: scalars keep their text, so that `007` and `no` can be names and `1e-3` a number."""

from __future__ import annotations

import re
from typing import Any, cast

import yaml

MAX_BYTES = 1 << 20  # ten thousand ranks with names take a fifth of it
MAX_NODES, MAX_DEPTH = 200_000, 40  # of what aliases stand for, too
INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,99})")
FLOAT = re.compile(r"[-+]?(0|[1-9][0-9]{0,99})?(\.[0-9]{0,99})?([eE][-+]?[0-9]{1,5})?")
INFINITE = {".inf": "inf", "+.inf": "inf", "-.inf": "-inf", ".nan": "nan", "inf": "inf", "-inf": "-inf", "nan": "nan"}
TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
NOTHING = {"", "~", "null", "Null", "NULL"}
PLAIN, TEXT = "plain", "tag:yaml.org,2002:str"
MERGE = "tag:yaml.org,2002:merge"


class Written(str):
    """An unquoted scalar that is a number, a truth value or nothing: its text, and as `value` what it is."""

    value: bool | int | float | None


def scalar(text: str) -> str:
    """An unquoted scalar: `Written` if it is more than text, else the text.

    What readers of YAML disagree on, `010`, `0x10`, `1_000` and `1:30`, is text; so is a number that no float holds.
    """
    if text in NOTHING:
        value: bool | int | float | None = None
    elif text in (text.lower(), text.title(), text.upper()) and text.lower() in TRUTH:
        value = TRUTH[text.lower()]
    elif text.lower() in INFINITE:
        value = float(INFINITE[text.lower()])
    elif INTEGER.fullmatch(text):
        value = int(text)
    elif FLOAT.fullmatch(text) and re.match(r"[-+]?\.?[0-9]", text):
        value = float(text)
        if abs(value) == float("inf") or (value == 0 and re.match(r"[-+]?[0.]*[1-9]", text)):
            return text
    else:
        return text
    written = Written(text)
    written.value = value
    return written


def values(content: Any) -> Any:
    """Nested lists and mappings with every `Written` replaced by its value."""
    if isinstance(content, Written):
        return content.value
    if isinstance(content, dict):
        return {key: values(value) for key, value in content.items()}
    return [values(value) for value in content] if isinstance(content, list) else content


def read(data: bytes | str) -> Any:
    """Nested mappings, lists and scalars; keys are text.

    Raises:
        ValueError: no YAML in UTF-8, or what nobody means to write: a key twice, tags, deep nesting, aliases that stand
            for more than `MAX_NODES` nodes. One line, with the place.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES >> 20} MB: is it a configuration?")
    if isinstance(data, bytes):
        try:
            data = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"no text in UTF-8: byte {error.start} is 0x{data[error.start]:02x}") from None
    try:
        return yaml.load(data, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(place + ", ".join(part for part in (error.context, error.problem) if part)) from None
    except yaml.reader.ReaderError as error:
        raise ValueError(f"character {error.position} is {chr(error.character)!r}, which is no text") from None


def dump(content: Any, inline: bool = False) -> str:
    """YAML that `read` gives back as it was, keys in their order.

    Args:
        inline: in a line, without its end, for the value of a key.
    """
    if not inline:
        return yaml.dump(content, Dumper=_Dumper, sort_keys=False)
    listed = yaml.dump([content], Dumper=_Dumper, sort_keys=False, default_flow_style=True, width=float("inf"))
    return listed.strip()[1:-1]


class _Loader(yaml.SafeLoader):
    yaml_constructors = {}  # noqa: RUF012  of SafeLoader, not its own: what is missing is refused

    def __init__(self, stream: str):
        super().__init__(stream)
        self.depth = self.nodes = 0
        self.sizes: dict[int, int] = {}  # nodes that a node stands for, by identity

    def resolve(self, kind: type, value: Any, implicit: Any) -> str:
        if kind is yaml.ScalarNode:
            return TEXT if not implicit[0] else MERGE if value == "<<" else PLAIN
        return super().resolve(kind, value, implicit)

    def compose_node(self, parent: Any, index: Any) -> Any:
        mark, before = self.peek_event().start_mark, self.nodes
        alias = self.check_event(yaml.AliasEvent)
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"nested more than {MAX_DEPTH} levels deep", problem_mark=mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        if alias and id(node) not in self.sizes:
            raise yaml.MarkedYAMLError(problem="an alias that stands inside of what it means", problem_mark=mark)
        self.nodes += self.sizes[id(node)] if alias else 1
        self.sizes.setdefault(id(node), self.nodes - before)
        if self.nodes > MAX_NODES:
            raise yaml.MarkedYAMLError(problem=f"more than {MAX_NODES} values, aliases included", problem_mark=mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key that is no text", problem_mark=key.start_mark)
            if key.value in lines:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key.value!r} is here and in line {lines[key.value]}", problem_mark=key.start_mark
                )
            lines[key.value] = key.start_mark.line + 1
            key.tag = MERGE if key.tag == MERGE else TEXT
        return node

    def refused(self, node: yaml.Node) -> Any:
        raise yaml.MarkedYAMLError(problem=f"the tag {node.tag} means nothing here", problem_mark=node.start_mark)


_Loader.add_constructor(PLAIN, lambda loader, node: scalar(node.value))
_Loader.add_constructor(TEXT, lambda loader, node: node.value)
for kind, construct in (("seq", yaml.SafeLoader.construct_yaml_seq), ("map", yaml.SafeLoader.construct_yaml_map)):
    _Loader.add_constructor(f"tag:yaml.org,2002:{kind}", cast(Any, construct))
_Loader.add_constructor(None, _Loader.refused)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(TEXT, text, "'" if isinstance(scalar(text), Written) else None),
)
