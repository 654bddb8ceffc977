"""Being told to stop, by SIGTERM or Ctrl-C: what is raised, with which status, and who listens.

What a command imports takes seconds, before it can be told anything by an exception. It ends in one line in that time,
too.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: try again later
INTERRUPTED = 128 + signal.SIGINT
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Preempted(SystemExit):
    """Told to stop by SIGTERM or Ctrl-C; raised once what can be saved is saved.

    It leaves the process with status 75 after SIGTERM, 130 after Ctrl-C, unless caught.

    Args:
        message: where it stopped and how to go on.
        number: of the signal.
    """

    def __init__(self, message: str, number: int = signal.SIGTERM):
        self.message, self.number = message, number
        self.status = INTERRUPTED if number == signal.SIGINT else PREEMPTED
        super().__init__(self.status)

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[type[Preempted], tuple[str, int]]:
        return Preempted, (self.message, self.number)


@contextmanager
def listening(take: Callable[[int], None]) -> Iterator[None]:
    """SIGTERM and Ctrl-C call `take` within a `with` block, each once; a second Ctrl-C ends the process at once.

    What ignores Ctrl-C already, as a job in the background does, goes on ignoring it.
    """
    if threading.current_thread() is not threading.main_thread():  # Python takes signal handlers nowhere else
        yield
        return

    def handle(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGINT else signal.SIG_IGN)
        take(number)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    if before[signal.SIGINT] == signal.SIG_IGN:
        del before[signal.SIGINT]
    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave(number: int) -> None:
    """What a signal does where there is nothing to save: the command ends by an exception that clears up behind it."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Preempted("told to stop", number)


def _end(number: int, frame: Any) -> None:
    if os.environ.get("RANK", "0") == "0":  # who speaks for all processes of a run
        os.write(2, b"ordinalclip: stopped by Ctrl-C\n" if number == signal.SIGINT else b"ordinalclip: told to stop\n")
    os._exit(INTERRUPTED if number == signal.SIGINT else PREEMPTED)


def is_command() -> bool:
    """Whether this program is the command line: the script `ordinalclip`, or `python -m ordinalclip`, which launchers
    start, too."""
    script = sys.argv[0] if sys.argv else ""
    return Path(script).stem == "ordinalclip" or (script == "-m" and "ordinalclip" in sys.orig_argv)


def end_while_starting() -> None:
    """SIGTERM and Ctrl-C end a command whose libraries are being imported; nothing is done where none is starting."""
    if is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not one of `compare`'s jobs
        for number in SIGNALS:
            signal.signal(number, _end)


end_while_starting()
