"""`ordinalclip configs`."""

from __future__ import annotations

import argparse
import re
from itertools import takewhile
from pathlib import Path
from typing import Any

from ordinalclip import shipped
from ordinalclip.config import Layer, RunConfig, read_layers, stack
from ordinalclip.written import dump, values

RUN, COMPARISON, LAUNCHER = "train", "compare", "accelerate"
GROUPS = {  # folders of `configs/`, and what takes the files in them
    RUN: (("", "methods"), "ordinalclip train NAME"),
    COMPARISON: (("compare",), "ordinalclip compare NAME"),
    LAUNCHER: (("accelerate",), "accelerate launch --config_file FILE -m ordinalclip train NAME"),
}
EVERYWHERE = (*shipped.RUNS, "accelerate")
NAMES = shipped.names(EVERYWHERE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what", nargs="?", choices=("list", "show"), default="list", help="list (default), or show NAME"
    )
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="of the one to print, whole, as a file to make your own"
    )
    parser.epilog = (
        "ordinalclip configs show ordinalclip > mine.yaml\n\n"
        "The folder of a name may be left out. `extends: NAME` in a file of yours starts from one of these."
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.what == "show":
        if not arguments.name:
            raise ValueError("configs show: of which name? `ordinalclip configs` lists them")
        print(_whole(read_layers(arguments.name, EVERYWHERE)), end="")
        return 0
    for kind, (folders, command) in GROUPS.items():
        found = {name: read_layers(name, EVERYWHERE) for name in shipped.names(folders)}
        extended = {  # what is there for others to start from says no folder of its own
            layer.name for layers in found.values() for layer in layers[:-1] if "output_dir" not in layer.content
        }
        runnable = {name: layers for name, layers in found.items() if layers[-1].name not in extended}
        width = max(map(len, runnable), default=0)
        print(command)
        for name, layers in runnable.items():
            print(f"  {name:<{width}}  {_what(layers[-1])}{_data(kind, values(stack(layers)))}")
        print()
    print("In capitals: yours to say. `ordinalclip configs show NAME` prints one to copy.")
    return 0


def _comment(layer: Layer) -> list[str]:
    """The lines of the comment that a file begins with."""
    lines = Path(layer.name).read_text(encoding="utf-8").splitlines()
    return list(takewhile(lambda line: line.startswith("#"), lines))


def _what(layer: Layer) -> str:
    """The first sentence of a file."""
    first = takewhile(lambda line: line.strip("# "), _comment(layer))
    return re.split(r"(?<=\.)\s+(?=[A-Z(])", " ".join(line.strip("# ") for line in first), maxsplit=1)[0]


def _data(kind: str, content: dict[str, Any]) -> str:
    """The pictures that it needs, in brackets."""
    if kind == LAUNCHER:
        return ""
    if content.get("recipe"):
        return f" [pictures: --data FOLDER, ordinalclip prepare {content['recipe']}]"
    data = (content if kind == RUN else content["base"])["data"]
    if data["source"] == "gauges":
        return " [pictures: generated]"
    tables = [data[key] for key in ("table", "train_table", "validation_table", "test_table") if data.get(key)]
    return f" [pictures: data.root=FOLDER with {', '.join(tables)}]"


def _whole(layers: list[Layer]) -> str:
    """A file as it is, or with what it extends in it: either can be copied to anywhere."""
    if len(layers) == 1:
        return Path(layers[0].name).read_text(encoding="utf-8")
    content = values(stack(layers))
    ordered = {key: content[key] for key in [*(key for key in RunConfig.model_fields if key in content), *content]}
    return "\n".join([*_comment(layers[-1]), "", dump(ordered)])
