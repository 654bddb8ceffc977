"""`ordinalclip evaluate`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ordinalclip.cli import add_imports, add_overrides, import_given, is_main_process, print_metrics
from ordinalclip.quoting import printable

NEEDS = ("runs", "external")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="run folder; with --data also a model folder or hub name")
    add_overrides(parser, "keys of data and evaluation, e.g. data.label_column=age")
    parser.add_argument(
        "--data",
        metavar="DATA",
        help="score every row of this instead of the run's own test part: a table, a folder with a folder for every "
        "label, or a data set of the hub",
    )
    parser.add_argument("--root", default="", help="folder that paths of pictures start from (default: the table's)")
    parser.add_argument("--by", default="", metavar="COLUMNS", help="groups to score by themselves, e.g. site,sex")
    parser.add_argument("--out", metavar="FOLDER", help="write numbers, answers and a report there")
    parser.add_argument("--overwrite", action="store_true", help="replace an evaluation that is in --out")
    add_imports(parser)
    parser.epilog = (
        "Without --data the test part of a run is scored again, and its metrics and report are written anew. With it "
        "nothing of the run or the model is changed."
    )


def run(arguments: argparse.Namespace) -> int:
    import_given(arguments)
    if arguments.data is None:
        return _own_test_part(arguments)
    from ordinalclip.external import evaluate_external

    evaluation = evaluate_external(
        arguments.model,
        arguments.data,
        arguments.root,
        [column.strip() for column in arguments.by.split(",") if column.strip()],
        arguments.overrides,
        arguments.out,
        arguments.overwrite,
        arguments.quiet,
    )
    if is_main_process():
        for line in evaluation.lines():
            print(printable(line))
        if arguments.out:
            print(f"report: {printable(Path(arguments.out) / 'report.html')}")
    return 0


def _own_test_part(arguments: argparse.Namespace) -> int:
    from ordinalclip.runs import evaluate_run

    if idle := [f"--{name}" for name in ("root", "by", "out", "overwrite") if getattr(arguments, name)]:
        raise ValueError(f"{idle[0]} is of no effect without --data, which names the data to score")
    metrics = evaluate_run(arguments.model, overrides=arguments.overrides, quiet=arguments.quiet)
    if is_main_process():
        print_metrics({name: value for name, value in metrics.items() if name != "validation"})
    return 0
