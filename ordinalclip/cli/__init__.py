"""The command line. A command is a module beside this one and a line in `COMMANDS`; it is imported when it is called.

Such a module has `add_arguments(parser)` and `run(arguments) -> exit status`; its docstring is its help.
"""

from __future__ import annotations

import argparse
import importlib
import io
import logging
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

from ordinalclip.quoting import printable

COMMANDS = {
    "train": "Train one model as a configuration file says.",
    "evaluate": "Score a run's model on its test part and print the metrics.",
    "predict": "Predict images with a saved model; one line per image.",
    "check-data": "Read labels and decode every image of a configuration's data; list what is broken.",
    "compare": "Run methods x settings x seeds and print one table.",
    "report": "Write report.html and the model card of finished runs again.",
    "plot": "Write the figures of a finished run's report as files.",
    "make-gauges": "Write generated gauge pictures and their labels.csv to a folder.",
    "convert": "Turn an original OrdinalCLIP or OpenAI CLIP checkpoint into a folder.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status: 0, 1 for broken data, 2 for a wrong call, 75 when told to stop.

    Nobody reading the output any more (`| head`), or a terminal that cannot show a letter, is no failure.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return _main(argv)
    finally:
        _reader_is_gone()


def _main(argv: Sequence[str] | None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    parser, command = _parser(given)
    arguments, more = parser.parse_known_args(given)
    if more:  # argparse drops positional arguments that follow an option
        wrong = [
            word for word in more if word.startswith("-") or "=" not in word or not hasattr(arguments, "overrides")
        ]
        if wrong:
            parser.error(f"unrecognized arguments: {' '.join(wrong)}")
        arguments.overrides += more
    assert command is not None  # or argparse would have refused the call

    from ordinalclip.progress import show_library_bars
    from ordinalclip.training.interruption import PREEMPTED, Preempted

    handler = logging.StreamHandler()
    handler.setFormatter(_Printable("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    show_library_bars(arguments.quiet)
    status = 0
    try:
        if getattr(arguments, "overrides", None):
            from ordinalclip.config import refuse_repeated

            refuse_repeated(arguments.overrides)
        status = command.run(arguments)
        print(end="", flush=True)
        return status
    except Preempted as stopped:
        if is_main_process():
            print(f"ordinalclip: {stopped}", file=sys.stderr)
        return PREEMPTED
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone("\n"):  # buffers forget what failed
            return status
        print(f"ordinalclip: {printable(error)}", file=sys.stderr)
        return 2


class _Printable(logging.Formatter):
    """Names of files in warnings reach the terminal as text."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))


def _reader_is_gone(more: str = "") -> bool:
    """Whether nobody reads the output any more; what could not be written is then dropped, here and at exit."""
    try:
        print(end=more, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return isinstance(error, BrokenPipeError)
    return False


def _parser(argv: Sequence[str]) -> tuple[argparse.ArgumentParser, ModuleType | None]:
    """The parser, with the arguments of the command that is called, and that command's module."""
    parser = argparse.ArgumentParser(
        prog="ordinalclip", description="Vision-language ordinal regression: from a picture to an ordered number."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    called = next((word for word in argv if not word.startswith("-")), None)
    module = None
    for name, summary in COMMANDS.items():
        command = commands.add_parser(
            name, help=summary, description=summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.add_argument("--quiet", action="store_true", help="show no progress")
        if name == called:
            module = importlib.import_module(f"ordinalclip.cli.{name.replace('-', '_')}")
            module.add_arguments(command)
    return parser, module


def whole_number(low: int, high: int | None = None) -> Callable[[str], int]:
    """The type of an argument that is a whole number from `low` to `high`."""
    allowed = f"a whole number of {low} or more" if high is None else f"a whole number from {low} to {high}"

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = low - 1
        if number < low or (high is not None and number > high):
            raise argparse.ArgumentTypeError(f"{text!r} is not {allowed}")
        return number

    return parse


def add_configuration(parser: argparse.ArgumentParser, what: str) -> None:
    """The arguments of commands that read a configuration."""
    parser.add_argument("config", help=what)
    add_overrides(parser)


def add_overrides(parser: argparse.ArgumentParser, what: str = "overrides of the configuration") -> None:
    """Any number of key=value."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=what)


def print_metrics(metrics: dict) -> None:
    """The metrics of a run, a line per part."""
    from ordinalclip.metrics import METRICS

    for name in ("validation", "test"):
        if name in metrics:
            shown = {k: v for k, v in metrics[name].items() if not isinstance(v, dict)}
            print(f"{name}: " + ", ".join(f"{k} {v:.4g}" for k, v in shown.items() if v is not None))
    for name, metric in METRICS.items():
        if "prototypes" in metric.of and metrics.get(name) is not None:
            print(f"{metric.title} of the prototypes: {metrics[name]:.1%}")


def is_main_process() -> bool:
    """Whether this process speaks for all of them."""
    from accelerate import PartialState

    return PartialState().is_main_process
