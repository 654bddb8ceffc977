"""The command line: train, evaluate, predict, check-data, compare, report, plot, make-gauges, convert."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ordinalclip.config import describe, head_section, load_config
from ordinalclip.progress import show_library_bars
from ordinalclip.training.interruption import PREEMPTED, Preempted


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status: 0, 1 for broken data, 2 for a wrong call, 75 when told to stop."""
    parser = _parser()
    arguments, more = parser.parse_known_args(argv)
    if more:  # argparse drops positional arguments that follow an option
        wrong = [
            word for word in more if word.startswith("-") or "=" not in word or not hasattr(arguments, "overrides")
        ]
        if wrong:
            parser.error(f"unrecognized arguments: {' '.join(wrong)}")
        arguments.overrides += more
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    show_library_bars(arguments.quiet)
    try:
        return arguments.command(arguments)
    except Preempted as stopped:
        if _is_main_process():
            print(f"ordinalclip: {stopped}", file=sys.stderr)
        return PREEMPTED
    except (ValueError, FileNotFoundError, OSError) as error:
        print(f"ordinalclip: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ordinalclip", description=__import__("ordinalclip").__doc__)
    commands = parser.add_subparsers(title="commands", required=True)

    def add(name: str, function: Any, summary: str, epilog: str = "") -> argparse.ArgumentParser:
        command = commands.add_parser(
            name, help=summary, description=summary, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.add_argument("--quiet", action="store_true", help="show no progress")
        command.set_defaults(command=function)
        return command

    overrides: dict[str, Any] = {"nargs": "*", "metavar": "key=value", "help": "overrides of the configuration"}
    keys = _documented_keys()
    command = add("train", _train, "Train one model as a configuration file says.", keys)
    command.add_argument("config", help="YAML file, or 'default' for the defaults below")
    command.add_argument("overrides", **overrides)
    command = add("evaluate", _evaluate, "Score a run's model on its test part and print the figures.")
    command.add_argument("run", help="run folder")
    command.add_argument(
        "overrides", nargs="*", metavar="key=value", help="data.* and evaluation.* to change, e.g. data.root=PATH"
    )
    command = add("predict", _predict, "Predict images with a saved model; one line per image.")
    command.add_argument("images", nargs="+", metavar="IMAGE", help="image files or folders")
    command.add_argument("--model", required=True, help="model folder, run folder or hub name")
    command.add_argument("--top", type=int, default=3, help="how many of the likeliest ranks to show (default 3)")
    command.add_argument("--batch-size", type=int, default=32, help="images at once (default 32)")
    command.add_argument("--json", action="store_true", help="one JSON object per line")
    command = add(
        "check-data", _check_data, "Read labels and decode every image of a configuration's data; list what is broken."
    )
    command.add_argument("config", help="YAML file")
    command.add_argument("overrides", **overrides)
    command = add("compare", _compare, "Run methods x settings x seeds and print one table.", _compare_help())
    command.add_argument("config", help="YAML file")
    command.add_argument("overrides", **overrides)
    command = add("report", _report, "Write report.html and the model card of finished runs again.")
    command.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    command = add("plot", _plot, "Write the figures of a finished run's report as files.")
    command.add_argument("run", help="run folder")
    command.add_argument("--format", choices=("pdf", "png"), default="pdf", help="pdf (default) or png")
    command.add_argument("--out", help="folder to write to (default: RUN/figures)")
    command = add("make-gauges", _make_gauges, "Write generated gauge pictures and their labels.csv to a folder.")
    command.add_argument("folder", help="folder to write to")
    command.add_argument("--kind", default="thermometer", help="kind of instrument (default thermometer)")
    command.add_argument("--num", type=int, default=10, help="number of pictures (default 10)")
    command.add_argument("--seed", type=int, default=0, help="seed (default 0)")
    command.add_argument("--size", type=int, default=64, help="side in pixels (default 64)")
    command = add(
        "convert", _convert, "Turn an original OrdinalCLIP or OpenAI CLIP checkpoint into a folder.", _convert_help()
    )
    command.add_argument("file", help="checkpoint (.ckpt, .pt, .safetensors); only tensors are read, no code is run")
    command.add_argument("out", help="folder to write")
    command.add_argument("overrides", **overrides)
    command.add_argument(
        "--form", default="deployed", choices=("deployed", "trainable"), help="of an OrdinalCLIP model"
    )
    return parser


def _documented_keys() -> str:
    lines = ["configuration keys (default) and what they mean:"]
    for key, default, description in describe():
        lines.append(f"  {key} ({json.dumps(default, default=str)}): {description}")
    lines.append("options of method ordinalclip (head.*); other methods have their own, see their docstrings:")
    for key, default, description in describe(head_section("ordinalclip"), "head."):
        lines.append(f"  {key} ({json.dumps(default)}): {description}")
    return "\n".join(lines)


def _compare_help() -> str:
    from ordinalclip import compare

    return (compare.__doc__ or "").partition("\n\n")[2]


def _convert_help() -> str:
    from ordinalclip import convert

    return (convert.__doc__ or "").partition("\n\n")[2]


def _train(arguments: argparse.Namespace) -> int:
    from ordinalclip.training import train

    config = load_config(None if arguments.config == "default" else arguments.config, arguments.overrides)
    folder = train(config, quiet=arguments.quiet)
    if _is_main_process():
        _print_figures(json.loads((folder / "metrics.json").read_text(encoding="utf-8")))
        print(f"run folder: {folder}")
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from ordinalclip.training import evaluate_run

    figures = evaluate_run(Path(arguments.run), overrides=arguments.overrides, quiet=arguments.quiet)
    if _is_main_process():
        _print_figures(figures)
    return 0


def _predict(arguments: argparse.Namespace) -> int:
    from transformers import pipeline

    from ordinalclip.images import find_images
    from ordinalclip.pipeline import TASK
    from ordinalclip.progress import Progress

    files = find_images(arguments.images)
    folder = Path(arguments.model)
    model = folder / "model" if (folder / "model" / "config.json").is_file() else arguments.model
    pipe = pipeline(TASK, model=str(model))
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


def _check_data(arguments: argparse.Namespace) -> int:
    from ordinalclip.data import PARTS, check_images, load_parts

    config = load_config(arguments.config, arguments.overrides)
    parts = load_parts(config.data, config.ranks, config.seed)
    broken = 0
    for name in PARTS:
        part = getattr(parts, name)
        if part is None:
            print(f"{name}: none")
            continue
        problems = check_images(part, arguments.quiet, f"checking {name}")
        for problem in problems:
            print(problem)
        broken += len(problems)
        low, high = part.values.min(), part.values.max()
        labels = f"labels {low:g} to {high:g} {parts.ranks.unit}".rstrip()
        print(f"{name}: {len(part)} images, {labels}, {len(problems)} broken")
    print(f"ranks: {len(parts.ranks)}, {parts.ranks.name(0)} to {parts.ranks.name(len(parts.ranks) - 1)}")
    return 1 if broken else 0


def _compare(arguments: argparse.Namespace) -> int:
    from ordinalclip.compare import compare

    print(compare(arguments.config, arguments.overrides, arguments.quiet))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from ordinalclip.card import write_card
    from ordinalclip.progress import Progress
    from ordinalclip.record import read_run
    from ordinalclip.report import write_report

    for run in Progress(arguments.runs, "reporting", unit="runs", quiet=arguments.quiet):
        record = read_run(run)
        print(write_report(record))
        print(write_card(record))
    return 0


def _plot(arguments: argparse.Namespace) -> int:
    from ordinalclip.plots import save_figure
    from ordinalclip.record import read_run
    from ordinalclip.report import run_figures

    folder = Path(arguments.out or Path(arguments.run) / "figures")
    figures = run_figures(read_run(arguments.run))
    folder.mkdir(parents=True, exist_ok=True)
    for name, (figure, _) in figures.items():
        path = folder / f"{name}.{arguments.format}"
        save_figure(figure, path)
        print(path)
    return 0


def _make_gauges(arguments: argparse.Namespace) -> int:
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


def _convert(arguments: argparse.Namespace) -> int:
    from ordinalclip.convert import convert

    config = load_config(None, arguments.overrides)
    print(convert(arguments.file, arguments.out, config, arguments.form))
    return 0


def _print_figures(figures: dict[str, Any]) -> None:
    for name in ("validation", "test"):
        if name in figures:
            shown = {k: v for k, v in figures[name].items() if not isinstance(v, dict)}
            print(f"{name}: " + ", ".join(f"{k} {v:.4g}" for k, v in shown.items() if v is not None))
    if figures.get("ordinality") is not None:
        print(f"ordinality of the prototypes: {figures['ordinality']:.1%}")


def _is_main_process() -> bool:
    from accelerate import PartialState

    return PartialState().is_main_process
