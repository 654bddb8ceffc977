"""The order of the modules: each imports only from modules above it, and training nothing that presents results."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def order():
    """Our modules and packages in the order of the first table of CONTRIBUTING.md, from the leaves up."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text[text.index("| in `ordinalclip/` | concern |") :].partition("\n\n")[0].splitlines()[2:]
    cells = [line.split("|")[1] for line in table]
    names = [name for cell in cells for name in re.findall(r"`(\w+)(?:\.py|/)`", cell)]
    # The package itself imports what it offers and lends its version to those above; __main__ starts the command line.
    names.insert(names.index("regressor") + 1, "")
    return [f"ordinalclip.{name}".rstrip(".") for name in [*names, "__main__"]]


FLOOR = {room: number for number, room in enumerate(order())}
RULES = [("ordinalclip.results", "ordinalclip.training"), ("ordinalclip.training", "ordinalclip.results")]


def modules():
    for package in ("ordinalclip", "baselines"):
        for file in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
            yield name.removesuffix(".__init__"), file


def imports(file):
    """Names of the modules of ours that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in KNOWN else node.module


KNOWN = {name for name, _ in modules()}


def room(name):
    """The module or package of ours that a name lies in: as fine as `FLOOR` is."""
    while name and name not in FLOOR:
        name = name.rpartition(".")[0]
    return name


def test_the_map_in_contributing_names_every_module():
    assert {room(name) for name in KNOWN if name.startswith("ordinalclip")} == set(FLOOR)
    assert len(FLOOR) > 25
    for name in KNOWN:
        if name.startswith("ordinalclip."):
            assert room(name) != "ordinalclip", f"{name} is not in the table of CONTRIBUTING.md"


@pytest.mark.parametrize(("name", "file"), list(modules()), ids=[name for name, _ in modules()])
def test_modules_import_only_from_above(name, file):
    for imported in imports(file):
        if name.startswith("baselines") or not imported.startswith(("ordinalclip", "baselines")):
            continue
        assert not imported.startswith("baselines"), f"{name} imports {imported}: baselines import us, not we them"
        own, other = room(name), room(imported)
        if own != other:
            assert FLOOR[other] < FLOOR[own], f"{name} imports {imported}, which lies below it"


@pytest.mark.parametrize(("wing", "other"), RULES)
def test_training_and_results_know_nothing_of_each_other(wing, other):
    for name, file in modules():
        if name.startswith(wing):
            assert not [found for found in imports(file) if found.startswith(other)], name
