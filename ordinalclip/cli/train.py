"""`ordinalclip train`."""

from __future__ import annotations

import argparse
import json

from ordinalclip import shipped
from ordinalclip.cli import add_configuration, is_main_process, print_metrics
from ordinalclip.config import RunConfig, load_config
from ordinalclip.quoting import printable
from ordinalclip.sections import describe

NEEDS = ("runs",)
NAMES = ("default", *shipped.short_names("", "methods"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_configuration(parser, "; default: the defaults below")
    parser.epilog = _documented_keys()


def run(arguments: argparse.Namespace) -> int:
    from ordinalclip.run_folder import RunFolder
    from ordinalclip.runs import train

    config = load_config(arguments.config, arguments.overrides, arguments.data)
    folder = RunFolder(train(config, quiet=arguments.quiet))
    if is_main_process():
        print_metrics(folder.read_metrics())
        print(f"run folder: {printable(folder.path)}")
    return 0


def _documented_keys() -> str:
    lines = ["configuration keys (default) and what they mean:"]
    for key, default, description in describe(RunConfig):
        lines.append(f"  {key} ({json.dumps(default, default=str)}): {description}")
    lines.append("options of a method (head.*) are listed by `ordinalclip methods NAME`")
    return "\n".join(lines)
