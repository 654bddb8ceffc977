"""`ordinalclip predict`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ordinalclip.cli import add_imports, import_given, whole_number
from ordinalclip.quoting import printable

if TYPE_CHECKING:
    from ordinalclip.answers import Answers
    from ordinalclip.bulk import Options
    from ordinalclip.data.pictures import PictureRows
    from ordinalclip.model import OrdinalModel
    from ordinalclip.ranks import Ranks

NEEDS = ("bulk", "run_folder")
REST = "images"  # where positional arguments go that stand behind an option
FILES = (".parquet", ".csv", ".jsonl")
OTHERS = (".json", ".tsv", ".txt", ".xls", ".xlsx", ".pq", ".ndjson", ".png", ".jpg", ".jpeg")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "images",
        nargs="*",
        metavar="IMAGE",
        help="image files; folders with all below them; beside --data: data.KEY=VALUE",
    )
    parser.add_argument("--model", required=True, help="model folder, run folder or hub name")
    parser.add_argument(
        "--data",
        help="instead of images: a table (CSV, Excel, Parquet, JSON lines), a folder of pictures with all below it, or "
        "a data set of the hub",
    )
    parser.add_argument("--image-column", help="the table's column of pictures or their paths (default image)")
    parser.add_argument("--root", help="folder that paths in the table start from; default: the table's")
    parser.add_argument(
        "--out",
        metavar="PLACE",
        help="folder for Parquet files, which the same command goes on filling after a kill; or one file, .csv, .jsonl "
        "or .parquet; default: a line per image on the terminal",
    )
    parser.add_argument(
        "--interval",
        type=float,
        metavar="LEVEL",
        help="give the interval, too, in which the truth lies so often: 0.50 to 0.99, of a model that is calibrated",
    )
    parser.add_argument(
        "--errors",
        choices=("keep", "stop"),
        default="keep",
        help="an image that cannot be read: a row with its error, or the end (default keep)",
    )
    parser.add_argument("--prefix", default="", metavar="TEXT", help="begins the names of the columns that are added")
    parser.add_argument(
        "--block", type=whole_number(1, 1_000_000), default=4096, help="rows in each Parquet file (default 4096)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace other predictions that are in PLACE")
    parser.add_argument(
        "--top",
        type=whole_number(1),
        default=3,
        help="on the terminal: how many of the likeliest ranks, and the answer's (default 3)",
    )
    parser.add_argument("--batch-size", type=whole_number(1, 4096), default=32, help="images at once (default 32)")
    add_imports(parser)
    parser.add_argument(
        "--extra-format",
        dest="extra_formats",
        action="append",
        default=[],
        metavar="FORMAT",
        help="a format of pictures, by Pillow's name, that is read beside the usual ones, e.g. JPEG2000",
    )
    parser.add_argument("--json", action="store_true", help="on the terminal: one JSON object per line")
    parser.epilog = (
        "Of an image that cannot be read the row holds the error instead; the others are answered, and the exit\n"
        "status is 1 (0 under torchrun and its kin, which would start again).\n"
        "On several GPUs or nodes: accelerate launch -m ordinalclip predict ... --out FOLDER\n"
        "data.KEY=VALUE beside --data: source, root, outside_root, separator, encoding, sheet, suffix, extra_formats,\n"
        "image_column, hub_config, hub_split, hub_revision, workers, prefetch; `ordinalclip train --help` has them."
    )


def run(arguments: argparse.Namespace) -> int:
    from ordinalclip.answers import load_model
    from ordinalclip.bulk import Options, predict_to_file, predict_to_folder
    from ordinalclip.run_folder import find_model
    from ordinalclip.training.distributed import make_accelerator

    out = Path(arguments.out) if arguments.out else None
    _check(arguments, out)
    rows = _rows(arguments)
    name, _ = find_model(arguments.model)
    import_given(arguments)
    accelerator = make_accelerator("no", timeout=WAITS)
    model = load_model(name).to(accelerator.device)
    options = Options(arguments.batch_size, arguments.errors, arguments.block, arguments.prefix, arguments.interval)
    warnings.filterwarnings("ignore", module=r"PIL\b")  # of what it reads all the same
    if out is None:
        return _to_terminal(model, rows, options, arguments)
    if out.suffix.lower() in FILES:
        done = predict_to_file(model, rows, out, options, arguments.overwrite, arguments.quiet)
    else:
        about = options, accelerator, arguments.overwrite, arguments.quiet
        done = predict_to_folder(model, name, rows, out, *about)
    if accelerator.is_main_process:
        print(printable(f"{done}"))
        print(printable(f"predictions: {out}"))
    launched = "RANK" in os.environ  # by torchrun, to which any status but 0 is a crash, after which it starts again
    return 1 if done.errors and not launched else 0


WAITS = 7 * 24 * 3600.0  # seconds that a process waits for others, whose share may take longer


def _check(arguments: argparse.Namespace, out: Path | None) -> None:
    """Raises:
    ValueError: arguments that contradict each other; before anything is read."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if arguments.data is None and not arguments.images:
        raise ValueError("which pictures? give files or folders, or --data TABLE")
    if arguments.data is None and (arguments.image_column or arguments.root):
        raise ValueError("--image-column and --root are of a table, which --data names")
    if out is None and (arguments.prefix or arguments.overwrite):
        raise ValueError("--prefix and --overwrite are of files, which --out names")
    if out is not None and arguments.json:
        raise ValueError("--json is of the terminal; --out FILE.jsonl writes JSON lines")
    if out is not None and out.suffix.lower() in OTHERS and not out.is_dir():
        raise ValueError(
            f"--out {out}: one file ends in {', '.join(FILES)}; anything else is a folder, not {out.suffix}"
        )
    if processes > 1 and (out is None or out.suffix.lower() in FILES):
        raise ValueError(f"{processes} processes write to a folder of Parquet files: --out FOLDER")


def _rows(arguments: argparse.Namespace) -> PictureRows:
    from ordinalclip.data.pictures import of_files, read_pictures

    if arguments.data is None:
        return of_files(arguments.images, arguments.extra_formats)
    if others := [word for word in arguments.images if "=" not in word]:
        raise ValueError(f"--data and images exclude each other: {others[0]} is no data.KEY=VALUE")
    overrides = list(arguments.images)
    for key, value in (("image_column", arguments.image_column), ("root", arguments.root)):
        if value is not None:
            overrides.append(f"data.{key}={json.dumps(value)}")
    if arguments.extra_formats:
        overrides.append(f"data.extra_formats={json.dumps(arguments.extra_formats)}")
    return read_pictures(arguments.data, overrides)


def _to_terminal(model: OrdinalModel, rows: PictureRows, options: Options, arguments: argparse.Namespace) -> int:
    """A line per picture, as it is answered."""
    from ordinalclip.bulk import Clock, Done, answers_to
    from ordinalclip.progress import Progress

    ranks, clock, number, errors = model.config.label_space, Clock(), 0, 0
    progress: Progress = Progress(None, "predicting", total=len(rows), unit="images", quiet=arguments.quiet)
    blocks = range(-(-len(rows) // options.block))
    for answers in answers_to(model, rows, options, blocks):
        for index, error in enumerate(answers.errors):
            path = rows.path(number)
            file = f"row {number + 1}" if path is None else path
            answer = {"error": error} if error else _answer(answers, index, ranks, arguments.top, not arguments.json)
            print(json.dumps({"file": file, **answer}) if arguments.json else _line(file, answer, ranks))
            errors += error is not None
            number += 1
        progress.advance(len(answers))
    progress.close()
    if not arguments.quiet:
        print(Done(number, errors, number, *clock.read()), file=sys.stderr)
    if errors:
        print(f"ordinalclip: {errors} of {number} images could not be read", file=sys.stderr)
    return 1 if errors else 0


def _answer(answers: Answers, index: int, ranks: Ranks, most: int, own: bool) -> dict[str, Any]:
    """One answer as the pipeline gives it, with the likeliest ranks; and with its own, if wanted: a median need not be
    likely."""
    rank, top = int(answers.ranks[index]), []
    if answers.probabilities is not None:
        likely = answers.probabilities[index]
        for place, each in enumerate((-likely).argsort(kind="stable").tolist()):
            if place < most or (own and each == rank):
                entry = {"name": ranks.name(each), "value": ranks.values[each], "probability": float(likely[each])}
                top.append(entry)
    answer = {"value": float(answers.values[index]), "rank": rank, "name": ranks.name(rank), "unit": ranks.unit}
    if answers.intervals is not None:
        low, high = answers.intervals[index].tolist()
        answer |= {"low": low, "high": high}
    return {**answer, "top": top}


def _line(file: str, answer: dict[str, Any], ranks: Ranks) -> str:
    """File, answer, interval and likeliest ranks, between tabs."""
    if "error" in answer:
        return f"{printable(file)}\terror: {printable(answer['error'])}"
    top = ", ".join(f"{printable(entry['name'])} {entry['probability']:.0%}" for entry in answer["top"])
    parts = [file, ranks.say(answer["value"])]
    if "low" in answer:
        parts.append(f"{ranks.say(answer['low'])} to {ranks.say(answer['high'])}")
    return "\t".join(map(printable, parts)) + (f"\t({top})" if top else "")
