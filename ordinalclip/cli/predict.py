"""`ordinalclip predict`."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ordinalclip.cli import add_imports, import_given, whole_number
from ordinalclip.quoting import printable

if TYPE_CHECKING:
    from PIL import Image

    from ordinalclip.ranks import Ranks

NEEDS = ("pipeline", "run_folder")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files; folders with all below them")
    parser.add_argument("--model", required=True, help="model folder, run folder or hub name")
    parser.add_argument(
        "--top",
        type=whole_number(1),
        default=3,
        help="how many of the likeliest ranks to show, and the answer's (default 3)",
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
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    parser.epilog = (
        "Of an image that cannot be read the line holds the error instead; the others are answered, and the exit "
        "status is 1."
    )


def run(arguments: argparse.Namespace) -> int:
    from ordinalclip.images import BrokenImageError, find_images, load_image, read_formats
    from ordinalclip.memory import keep_freed_memory
    from ordinalclip.pipeline import load_pipeline
    from ordinalclip.progress import Progress
    from ordinalclip.run_folder import RunFolder

    keep_freed_memory()
    formats = read_formats(arguments.extra_formats)
    files = find_images(arguments.images)
    inside = RunFolder(arguments.model).model
    model = inside if (inside / "config.json").is_file() else arguments.model
    import_given(arguments)
    pipe = load_pipeline(str(model))
    ranks = pipe.model.config.label_space
    errors: dict[int, str] = {}

    def readable() -> Iterator[Image.Image]:
        for number, file in enumerate(files):
            try:
                yield load_image(file, formats=formats)
            except BrokenImageError as error:
                errors[number] = error.reason

    warnings.filterwarnings("ignore", module=r"PIL\b")  # of what it reads all the same
    answers = iter(pipe(readable(), batch_size=arguments.batch_size, top_k=len(ranks)))
    ahead: Any = None
    for number, file in enumerate(Progress(files, "predicting", unit="images", quiet=arguments.quiet)):
        # An answer is asked for before one knows whose it is: `readable` passes over what is broken on its way there.
        ahead = next(answers, None) if ahead is None else ahead
        if number in errors:
            answer = {"error": errors[number]}
        else:
            answer, ahead = _shortened(ahead, arguments.top, not arguments.json), None
        print(json.dumps({"file": str(file), **answer}) if arguments.json else _line(str(file), answer, ranks))
    if errors:
        print(f"ordinalclip: {len(errors)} of {len(files)} images could not be read", file=sys.stderr)
    return 1 if errors else 0


def _shortened(answer: dict[str, Any], most: int, own: bool) -> dict[str, Any]:
    """The answer with the likeliest ranks alone; and with its own, if wanted: a median need not be likely."""
    kept = [
        entry for place, entry in enumerate(answer["top"]) if place < most or (own and entry["name"] == answer["name"])
    ]
    return {**answer, "top": kept}


def _line(file: str, answer: dict[str, Any], ranks: Ranks) -> str:
    """File, answer and likeliest ranks, between tabs."""
    if "error" in answer:
        return f"{printable(file)}\terror: {printable(answer['error'])}"
    top = ", ".join(f"{printable(entry['name'])} {entry['probability']:.0%}" for entry in answer["top"])
    return f"{printable(file)}\t{printable(ranks.say(answer['value']))}" + (f"\t({top})" if top else "")
