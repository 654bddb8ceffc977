"""`ordinalclip backbones`."""

from __future__ import annotations

import argparse

NEEDS = ("backbones",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "A spec is the value of model.backbone, the image encoder, and of model.text, the text tower."


def run(arguments: argparse.Namespace) -> int:
    from ordinalclip.backbones import available_families

    families = available_families().values()
    width = max(len(spec) for family in families for spec in family.specs)
    for family in families:
        for spec, what in family.specs.items():
            print(f"{spec:<{width}}  {what}")
        print(f"  text tower: {family.text}")
        print(f"  example: {family.example}")
        print()
    print("An encoder without a text tower takes that of model.text, such as model.text=open_clip:RN50/openai.")
    return 0
