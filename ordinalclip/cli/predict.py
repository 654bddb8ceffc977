"""`ordinalclip predict`."""

from __future__ import annotations

import argparse
import json

from ordinalclip.run_folder import RunFolder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files or folders")
    parser.add_argument("--model", required=True, help="model folder, run folder or hub name")
    parser.add_argument("--top", type=int, default=3, help="how many of the likeliest ranks to show (default 3)")
    parser.add_argument("--batch-size", type=int, default=32, help="images at once (default 32)")
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="import this module first: of a head of your own, which a model may not import by itself",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per line")


def run(arguments: argparse.Namespace) -> int:
    from ordinalclip.heads import import_by_name
    from ordinalclip.images import find_images
    from ordinalclip.pipeline import load_pipeline
    from ordinalclip.progress import Progress

    files = find_images(arguments.images)
    inside = RunFolder(arguments.model).model
    model = inside if (inside / "config.json").is_file() else arguments.model
    for module in arguments.imports:
        import_by_name(module, "--import")
    pipe = load_pipeline(str(model))
    answers = pipe((str(file) for file in files), batch_size=arguments.batch_size, top_k=arguments.top)
    for file, answer in zip(
        files, Progress(answers, "predicting", len(files), "images", arguments.quiet), strict=False
    ):
        if arguments.json:
            print(json.dumps({"file": str(file), **answer}))
            continue
        top = ", ".join(f"{entry['name']} {entry['probability']:.0%}" for entry in answer["top"])
        print(f"{file}\t{answer['value']:g} {answer['unit']}".rstrip() + (f"\t({top})" if top else ""))
    return 0
