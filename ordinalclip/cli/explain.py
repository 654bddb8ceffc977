"""`ordinalclip explain`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ordinalclip.cli import add_imports, import_given, whole_number
from ordinalclip.quoting import printable

NEEDS = ("explain",)
ENDINGS = (".png", ".pdf", ".svg")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="run folder; or a model folder or hub name, without its training pictures")
    parser.add_argument("images", nargs="+", metavar="PICTURE", help="image files; folders with all below them")
    parser.add_argument(
        "--out",
        default="why.png",
        help="figure to write, .png, .pdf or .svg (default why.png); of several pictures why-1.png, why-2.png, ...",
    )
    parser.add_argument(
        "--neighbors",
        type=whole_number(0, 12),
        default=6,
        metavar="N",
        help="nearest training pictures to show (default 6); 0: the training part is not read",
    )
    add_imports(parser)


def run(arguments: argparse.Namespace) -> int:
    from ordinalclip.explain import Explainer
    from ordinalclip.images import find_images, load_image
    from ordinalclip.progress import Progress
    from ordinalclip.results.figures import check_free, save_figure

    out = Path(arguments.out)
    if out.suffix not in ENDINGS:
        raise ValueError(f"--out {arguments.out}: figures end in {', '.join(ENDINGS)}")
    files = find_images(arguments.images)
    targets = [out] if len(files) == 1 else [out.with_stem(f"{out.stem}-{k}") for k in range(1, len(files) + 1)]
    for target in targets:
        check_free(target)
    for file in files:  # before anything is computed
        load_image(file)
    import_given(arguments)
    explainer = Explainer(arguments.run, num_neighbors=arguments.neighbors, quiet=arguments.quiet)
    out.parent.mkdir(parents=True, exist_ok=True)
    progress: Progress = Progress(files, "explaining", unit="images", quiet=arguments.quiet or len(files) == 1)
    for file, target in zip(progress, targets, strict=True):
        found = explainer(file)
        save_figure(found.figure(), target)
        answer = found.ranks.say(found.value)
        if found.interval is not None:
            low, high = map(found.ranks.say, found.interval[:2])
            answer += f" ({found.interval.kind}: {low} to {high})"
        print(f"{printable(str(file))}\t{printable(answer)}\t{printable(target)}")
    return 0
