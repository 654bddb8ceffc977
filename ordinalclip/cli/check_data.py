"""`ordinalclip check-data`."""

from __future__ import annotations

import argparse

from ordinalclip.cli import add_configuration
from ordinalclip.config import load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_configuration(parser, "YAML file, or 'default' for the defaults of `train`")


def run(arguments: argparse.Namespace) -> int:
    from ordinalclip.data import PARTS, check_images, load_parts

    config = load_config(None if arguments.config == "default" else arguments.config, arguments.overrides)
    parts = load_parts(config.data, config.ranks, config.seed)
    broken = 0
    for name in PARTS:
        part = getattr(parts, name)
        if part is None:
            print(f"{name}: none")
            continue
        problems = check_images(part, arguments.quiet, f"checking {name}")
        for problem in problems:
            print(problem)
        broken += len(problems)
        low, high = part.values.min(), part.values.max()
        labels = f"labels {low:g} to {high:g} {parts.ranks.unit}".rstrip()
        print(f"{name}: {len(part)} images, {labels}, {len(problems)} broken")
    print(f"ranks: {len(parts.ranks)}, {parts.ranks.name(0)} to {parts.ranks.name(len(parts.ranks) - 1)}")
    return 1 if broken else 0
