"""The command line. A command is a module beside this one and a line in `COMMANDS`; it is imported when it is called.

Such a module has `add_arguments(parser)` and `run(arguments) -> exit status`. It imports nothing that takes long: its
help is there at once. What `run` needs is named in `NEEDS`, modules that are imported before it; `NAMES` are those that
shells complete; `REST` is where positional arguments behind an option go, `overrides` by default.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from ordinalclip import __version__
from ordinalclip.quoting import printable
from ordinalclip.signals import INTERRUPTED, Preempted, leave, listening

COMMANDS = {
    "init": "Look at pictures and labels of yours and print a configuration that explains itself.",
    "train": "Train one model as a configuration file says.",
    "configs": "List the configurations that come with the package, or print one to copy.",
    "methods": "List the methods, or one with its options.",
    "backbones": "List the image encoders and text towers that can be named.",
    "evaluate": "Score a run on its test part, or any model on every row of other data.",
    "predict": "Predict images with a saved model: a line per image, or files for any number of them.",
    "calibrate": "Give a model calibrated probabilities and intervals, from labelled pictures that it has not seen.",
    "export": "Write a model as a graph that runs without this package: ONNX, OpenVINO, torch.export.",
    "explain": "Draw why a model answers what it answers about pictures: maps, distribution, training pictures.",
    "demo": "Open a page in the browser for a finished run: pictures and reasons, prompts to type and drag.",
    "check-data": "Read labels and decode every image of a configuration's data; list what is broken.",
    "audit": "Find labels that are likely to be wrong, by models that have not seen them, and near-duplicates.",
    "compare": "Run methods x settings x seeds and print one table.",
    "tune": "Search the values of some keys by validation; the test part stays unread.",
    "report": "Write report.html again, of finished runs (and their model cards) and comparisons.",
    "plot": "Write the figures of the report of a finished run or comparison as files.",
    "prepare": "Turn a data set as its owners distribute it into tables with the published splits.",
    "make-gauges": "Write generated gauge pictures and their labels.csv to a folder.",
    "features": "List the features of frozen encoders that are kept, or delete some.",
    "convert": "Turn an original OrdinalCLIP or OpenAI CLIP checkpoint into a folder.",
}
FILES = ("model", "out", "data", "source", "target")  # options that take files or folders


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status.

    0; 1 where what was asked for is there but not all of it (broken pictures, runs that failed); 2 after an error; 75
    when told to stop; 130 after Ctrl-C.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - for as long as we run
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal of few characters shows the others escaped
            stream.reconfigure(errors="backslashreplace")
    given = list(sys.argv[1:] if argv is None else argv)
    with _as_far_as_it_is_read():
        return _run(given)
    return 0


@contextmanager
def _as_far_as_it_is_read() -> Iterator[None]:
    """Whoever reads the output may have seen enough before its end: that is no failure."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        _write_nowhere()


def _write_nowhere() -> None:
    """What is left of the output cannot be written, and nothing tries to once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _ended(message: str, status: int) -> int:
    """Say once, for all processes of a run, why it ends."""
    if os.environ.get("RANK", "0") == "0":
        print(f"ordinalclip: {printable(message)}", file=sys.stderr)
    return status


def _run(given: list[str]) -> int:
    """Find the command, do it, and turn whatever goes wrong into one line."""
    called = next((word for word in given if not word.startswith("-")), "")
    parser, modules = _parser([called])
    if not given:
        parser.print_help()
        return 0
    arguments, more = parser.parse_known_args(given)
    command = modules[called]  # or argparse would have refused the call
    if more:  # argparse drops positional arguments that follow an option
        rest = getattr(command, "REST", "overrides")
        taken: list[str] | None = getattr(arguments, rest, None)
        wrong = [
            word for word in more if word.startswith("-") or taken is None or (rest == "overrides" and "=" not in word)
        ]
        if wrong or taken is None:
            parser.error(f"unrecognized arguments: {' '.join(wrong)}")
        setattr(arguments, rest, [*taken, *more])
    _show_what_is_ours(arguments.debug)
    try:
        _import(getattr(command, "NEEDS", ()), arguments.quiet)  # where `signals` ends a command that is starting
        with listening(leave):
            if getattr(arguments, "overrides", None) and os.environ.get("RANK", "0") == "0":
                from ordinalclip.config import say_repeated

                say_repeated(arguments.overrides)
            status = command.run(arguments)
            sys.stdout.flush()
            return status
    except Preempted as stopped:
        return _ended(str(stopped), stopped.status)
    except KeyboardInterrupt:
        return _ended("stopped by Ctrl-C", INTERRUPTED)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            raise
        if _is_of_output(error):
            _write_nowhere()
        if arguments.debug:
            traceback.print_exception(error)
        print(f"ordinalclip: {printable(_in_a_line(error))}", file=sys.stderr)
        return 2


def _import(modules: Sequence[str], quiet: bool) -> None:
    """What a command needs, and with it how the libraries show their progress."""
    for name in modules:
        importlib.import_module(f"ordinalclip.{name}")
    if sys.modules.keys() & {"datasets", "transformers"}:
        from ordinalclip.progress import show_library_bars

        show_library_bars(quiet)


def _reader_is_gone() -> bool:
    """Whether a broken pipe is that of the output: a buffer forgets what it could not write, so it is tried again."""
    try:
        print(flush=True)
    except BrokenPipeError:
        return True
    return False


def _is_of_output(error: Exception) -> bool:
    """Whether there is no space for what is printed; errors of files name them."""
    return isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None


def _in_a_line(error: Exception) -> str:
    """What went wrong: the message of an error that is meant for people, or of which kind it is."""
    torch = sys.modules.get("torch")
    text = str(error)
    if isinstance(error, RuntimeError) and torch and torch.distributed.is_initialized() and "gloo" in text:
        return "another process of this run has ended, see what it says"
    if _is_of_output(error):
        return f"standard output: could not be written ({os.strerror(errno.ENOSPC)})"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, ValueError | OSError | ImportError) and text:
        return text
    if isinstance(error, MemoryError) or (torch and isinstance(error, torch.OutOfMemoryError)):
        return f"out of memory: {text.partition(chr(10))[0] or 'less at once needs less of it'}"
    if type(error) is RuntimeError and text:
        return f"{text.partition(chr(10))[0]} (--debug shows where)"
    return f"unexpected {type(error).__name__}: {text} (--debug shows where)"


class _Lines(logging.Formatter):
    """A record is a line, unless everything is to be seen."""

    def __init__(self, debug: bool):
        super().__init__("%(levelname)s %(name)s: %(message)s")
        self.debug = debug

    def format(self, record: logging.LogRecord) -> str:
        if self.debug:
            return super().format(record)
        error = record.exc_info[1] if record.exc_info else None
        return printable(f"{record.levelname} {record.getMessage()}" + (f" ({error})" if error else ""))


class _Terminal(logging.Handler):
    """Standard error, as it is when something is said."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def _show_what_is_ours(debug: bool) -> None:
    """Warnings of this package are shown, those of the libraries only for debugging."""
    handler = _Terminal()
    handler.setFormatter(_Lines(debug))
    logging.basicConfig(level=logging.WARNING if debug else logging.ERROR, handlers=[handler])
    for name in ("ordinalclip", "baselines"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if not debug and not sys.warnoptions:
        warnings.simplefilter("ignore")


def _parser(called: Iterable[str]) -> tuple[argparse.ArgumentParser, dict[str, ModuleType]]:
    """The parser, with the arguments of the commands that are called, and the modules of these."""
    parser = argparse.ArgumentParser(
        prog="ordinalclip", description="Vision-language ordinal regression: from a picture to an ordered number."
    )
    parser.add_argument("--version", action="version", version=f"ordinalclip {__version__}")
    parser.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=("bash", "zsh"),
        help="print a script that completes commands, options and names of configurations in this shell",
    )
    _add_manners(parser, False)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    modules = {}
    for name, summary in COMMANDS.items():
        command = commands.add_parser(
            name, help=summary, description=summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        _add_manners(command, argparse.SUPPRESS)  # or it would take back what stands before the command
        if name in called:
            modules[name] = importlib.import_module(f"ordinalclip.cli.{name.replace('-', '_')}")
            modules[name].add_arguments(command)
    return parser, modules


def _add_manners(parser: argparse.ArgumentParser, default: Any) -> None:
    parser.add_argument("-q", "--quiet", action="store_true", default=default, help="show no progress")
    parser.add_argument(
        "--debug", action="store_true", default=default, help="show where an error comes from, and all warnings"
    )


class _PrintCompletion(argparse.Action):
    """Print what a shell needs to complete the whole command line: commands, options, configurations, files."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, shell: Any, option: str | None = None) -> None:
        import shtab

        whole, modules = _parser(COMMANDS)
        commands = next(action for action in whole._actions if isinstance(action, argparse._SubParsersAction))
        functions = {"bash": "", "zsh": ""}
        for command, subparser in commands.choices.items():
            words = " ".join(getattr(modules[command], "NAMES", ()))
            own = f"_ordinalclip_{command.replace('-', '_')}_files"  # shtab treats what is called so as giving files
            for action in subparser._actions:
                if action.dest in ("config", "name"):
                    complete: Any = {"bash": own, "zsh": own} if words else {}
                elif action.dest in FILES or not (action.option_strings or action.dest == "overrides"):
                    complete = shtab.FILE
                else:
                    continue
                action.complete = complete
            if words:
                functions["bash"] += f'{own}() {{ compgen -W "{words}" -- "$1"; _shtab_compgen_files "$1"; }}\n'
                functions["zsh"] += f"{own}() {{ compadd {words}; _files; }}\n"
        print(shtab.complete(whole, shell, preamble=functions[shell]))
        parser.exit()


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


def add_configuration(parser: argparse.ArgumentParser, more: str = "") -> None:
    """The arguments of commands that read a configuration."""
    parser.add_argument("config", help=f"YAML file, or a name that `ordinalclip configs` lists{more}")
    add_overrides(parser)
    parser.add_argument(
        "--data",
        metavar="FOLDER",
        help="prepared folder (ordinalclip prepare), or one of its YAML files: its data and ranks replace those of the "
        "configuration",
    )


def add_overrides(parser: argparse.ArgumentParser, what: str = "overrides of the configuration") -> None:
    """Any number of key=value."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=what)


def add_imports(parser: argparse.ArgumentParser) -> None:
    """Modules to import before a model is read, as `arguments.imports`."""
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="import this module first: of a head of your own, which a model may not import by itself",
    )


def import_given(arguments: argparse.Namespace) -> None:
    """Import what `--import` names.

    Raises:
        ValueError: a module that cannot be imported.
    """
    from ordinalclip.heads import import_by_name

    for module in arguments.imports:
        import_by_name(module, "--import")


def print_metrics(metrics: dict) -> None:
    """The metrics of a run, a line per part."""
    from ordinalclip.metrics import METRICS, doubt

    for name in ("validation", "test"):
        if name in metrics:
            shown = {k: v for k, v in metrics[name].items() if not isinstance(v, dict)}
            print(f"{name}: " + ", ".join(f"{k} {v:.4g}" for k, v in shown.items() if v is not None))
            if beside := metrics[name].get("constant"):
                print(f"{name}: MAE of always answering {beside['answer']:g}: {beside['mae']:.4g}")
            if why := doubt(metrics[name]):
                print(f"{name}: WARNING: {why}")
    for name, metric in METRICS.items():
        if "prototypes" in metric.of and metrics.get(name) is not None:
            print(f"{metric.title} of the prototypes: {metrics[name]:.1%}")


def is_main_process() -> bool:
    """Whether this process speaks for all of them."""
    from accelerate import PartialState

    return PartialState().is_main_process
