"""`ordinalclip prepare`."""

from __future__ import annotations

import argparse

from ordinalclip.recipes import NAMES, recipe

NEEDS = ("recipes.prepare",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="of the recipe; without it they are listed")
    parser.add_argument("--from", dest="source", metavar="DOWNLOAD", help="folder of the unpacked download")
    parser.add_argument("--to", dest="target", metavar="FOLDER", help="folder to write: tables, no pictures")
    parser.add_argument("--overwrite", action="store_true", help="replace what another preparation left in the folder")
    parser.epilog = (
        "ordinalclip prepare                                        the recipes\n"
        "ordinalclip prepare adience                                what it expects, licence, citation\n"
        "ordinalclip prepare adience --from DOWNLOAD --to FOLDER\n"
        "ordinalclip compare adience --data FOLDER\n\n"
        "Pictures are neither copied nor changed. FOLDER/data.yaml has no picture, and nobody who is known, in two\n"
        "parts; splits as published, with what leaks in them, are in files of their own there. See docs/recipes.md."
    )


def run(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from ordinalclip.quoting import printable
    from ordinalclip.recipes.prepare import prepare

    given = [arguments.source, arguments.target]
    if arguments.name is None:
        if any(given):
            raise ValueError(f"prepare: of which data set? One of {', '.join(NAMES)} comes before --from and --to")
        width = max(map(len, NAMES))
        for name in NAMES:
            print(f"{name:<{width}}  {recipe(name).title}  [{recipe(name).licence}]")
        print("\n`ordinalclip prepare NAME` says what is expected; nothing is downloaded.")
        return 0
    if not any(given):
        print(described(arguments.name))
        return 0
    if not all(given):
        raise ValueError(f"prepare {arguments.name}: --from DOWNLOAD and --to FOLDER belong together, both not empty")
    source, target = Path(arguments.source), Path(arguments.target)
    for line in prepare(arguments.name, source, target, arguments.overwrite, arguments.quiet):
        print(printable(line))
    return 0


def described(name: str) -> str:
    """A recipe, for people."""
    made = recipe(name)
    lines = [made.title, "", "expected below DOWNLOAD, in any folder:"]
    lines += [f"  {line}" for line in made.expects]
    lines += ["", f"from: {made.homepage}", f"licence: {made.licence}", f"cite: {made.citation}"]
    lines += [f"note: {caveat}" for caveat in made.caveats]
    lines += ["", f"ordinalclip prepare {name} --from DOWNLOAD --to FOLDER"]
    return "\n".join(lines)
