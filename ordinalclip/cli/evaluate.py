"""`ordinalclip evaluate`."""

from __future__ import annotations

import argparse

from ordinalclip.cli import add_overrides, is_main_process, print_metrics

NEEDS = ("runs",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="run folder")
    add_overrides(parser, "data.* and evaluation.* to change, e.g. data.root=PATH")


def run(arguments: argparse.Namespace) -> int:
    from ordinalclip.runs import evaluate_run

    metrics = evaluate_run(arguments.run, overrides=arguments.overrides, quiet=arguments.quiet)
    if is_main_process():
        print_metrics(metrics)
    return 0
