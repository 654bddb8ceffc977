"""`ordinalclip export`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from ordinalclip.cli import add_imports, import_given, whole_number
from ordinalclip.quoting import printable

NEEDS = ("export",)
FORMATS = ("onnx", "torch-export", "openvino")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="run folder, model folder or hub name")
    parser.add_argument("--format", choices=FORMATS, default="onnx", help="what to write (default onnx)")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an export that is in --out")
    parser.add_argument(
        "--int8",
        action="store_true",
        help="of onnx: the image encoder in 8 bits, calibrated on the run's training part, or on --data",
    )
    parser.add_argument(
        "--calibration",
        type=whole_number(1, 100_000),
        default=200,
        metavar="N",
        help="pictures that --int8 is calibrated on, at most (default 200)",
    )
    parser.add_argument(
        "--data",
        help="pictures to calibrate on and to try the graph with, in place of the run's and of drawn ones: a table, a "
        "folder of pictures with all below it, or a data set of the hub",
    )
    parser.add_argument("--image-column", help="the table's column of pictures or their paths (default image)")
    parser.add_argument("--root", help="folder that paths in the table start from; default: the table's")
    add_imports(parser)
    parser.epilog = "predict.py, which is written beside the graph, answers pictures without this package."


def run(arguments: argparse.Namespace) -> int:
    from ordinalclip.export import export

    pictures = _pictures(arguments)
    import_given(arguments)
    done = export(
        arguments.model,
        arguments.out,
        arguments.format,
        arguments.int8,
        pictures,
        arguments.calibration,
        arguments.overwrite,
        arguments.quiet,
    )
    print(printable(f"{done.agreement}"))
    if done.cost is not None:
        print(printable(f"{done.cost}"))
    print(printable(f"python {done.folder / 'predict.py'} PICTURE"))
    return 0


def _pictures(arguments: argparse.Namespace) -> Sequence[Any] | None:
    import json

    from ordinalclip.data.pictures import read_pictures

    named = (("image_column", arguments.image_column), ("root", arguments.root))
    overrides = [f"data.{key}={json.dumps(value)}" for key, value in named if value is not None]
    if arguments.data is None:
        if overrides:
            raise ValueError("--image-column and --root are of a table, which --data names")
        return None
    return read_pictures(arguments.data, overrides)
