"""`ordinalclip make-gauges`."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="folder to write to")
    parser.add_argument("--kind", default="thermometer", help="kind of instrument (default thermometer)")
    parser.add_argument("--num", type=int, default=10, help="number of pictures (default 10)")
    parser.add_argument("--seed", type=int, default=0, help="seed (default 0)")
    parser.add_argument("--size", type=int, default=64, help="side in pixels (default 64)")


def run(arguments: argparse.Namespace) -> int:
    from ordinalclip.gauges import make_gauges
    from ordinalclip.progress import Progress

    folder = Path(arguments.folder)
    rows = make_gauges(arguments.kind, arguments.num, arguments.seed, arguments.size)
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["image,label"]
    for number, row in enumerate(Progress(rows, "writing", unit="images", quiet=arguments.quiet)):
        name = f"{arguments.kind}-{number:04d}.png"
        row["image"].save(folder / name)
        lines.append(f"{name},{row['value']:.2f}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{arguments.num} pictures and labels.csv in {folder}")
    return 0
