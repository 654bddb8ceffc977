"""`ordinalclip calibrate`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ordinalclip.cli import add_imports, add_overrides, import_given, is_main_process
from ordinalclip.quoting import printable

NEEDS = ("external", "files")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="run folder, model folder or hub name")
    add_overrides(parser, "keys of data by which rows are read, e.g. data.label_column=age")
    parser.add_argument(
        "--data",
        required=True,
        metavar="DATA",
        help="labelled pictures that the model has not seen: a table, a folder with a folder for every label, or a "
        "data set of the hub",
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the calibrated model is written there")
    parser.add_argument("--root", default="", help="folder that paths of pictures start from (default: the table's)")
    parser.add_argument(
        "--group",
        metavar="COLUMN",
        help="subject or patient, who has several rows; '' for none (default: as in the model's run, if that is here)",
    )
    parser.add_argument(
        "--share",
        type=float,
        default=0.5,
        help="of the rows, or groups, that thresholds come from; the others choose (default 0.5)",
    )
    parser.add_argument(
        "--kind",
        default="auto",
        choices=("auto", "rps", "aps", "shortest", "residual", "scaled"),
        help="scores that intervals are made of (default auto: those of the smallest mean width)",
    )
    parser.add_argument("--by-rank", action="store_true", help="keep the promise for every rank by itself")
    parser.add_argument("--seed", type=int, default=1, help="by which rows are divided (default 1)")
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is in --out")
    add_imports(parser)
    parser.epilog = (
        "The weights stay as they are. Where pictures of a patient are several, --group is needed for the promise to\n"
        "hold. data.calibration does the same at the end of a training."
    )


def run(arguments: argparse.Namespace) -> int:
    from ordinalclip.external import calibrate_external
    from ordinalclip.files import check_replaceable, whole
    from ordinalclip.model import FILES, WEIGHTS

    import_given(arguments)
    out = Path(arguments.out)
    check_replaceable(out, "model", WEIGHTS, FILES, arguments.overwrite)
    model, about = calibrate_external(
        arguments.model,
        arguments.data,
        arguments.root,
        arguments.group,
        arguments.share,
        arguments.kind,
        arguments.by_rank,
        arguments.overrides,
        arguments.seed,
        arguments.quiet,
    )
    if is_main_process():
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        with whole(out.absolute()) as aside:
            model.save_pretrained(aside)
        for line in told(about):
            print(printable(line))
        print(f"model: {printable(out)}")
    return 0


def told(about: dict[str, Any]) -> list[str]:
    """What a calibration came to, in lines."""
    from ordinalclip.calibration import highest_level

    groups = f" of {about['groups']} groups" if "groups" in about else ""
    lines = [f"calibrated on {about['num']} pictures{groups}"]
    if "before" in about:
        before, after = about["before"], about["after"]
        how = f"temperature {about['temperature']:.3g}" if "temperature" in about else about["scaling"]
        lines.append(
            f"scaling: {how}; expected calibration error {before['ece']:.3f} to {after['ece']:.3f}, "
            f"ranked probability score {before['rps']:.4g} to {after['rps']:.4g}"
        )
    widths = {kind: width for kind, width in about["widths"].items() if kind != "level"}
    others = ", ".join(f"{kind} {width:.3g}" for kind, width in widths.items())
    lines.append(f"intervals: {about['kind']} (mean width of {about['widths']['level']:.0%} intervals: {others})")
    highest = highest_level(about["least"])
    lines.append("no level has enough pictures" if highest is None else f"levels: 0.5 to {highest:g}")
    return lines
