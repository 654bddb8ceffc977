"""One progress display: a bar with rate and ETA in a terminal, a line now and then elsewhere, nothing when quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from tqdm import tqdm

from ordinalclip.quoting import printable

Item = TypeVar("Item")
SECONDS_BETWEEN_LINES = 20.0


class Progress(Generic[Item]):
    """Iterate, or count by hand with `advance`, while showing how far it is.

    Args:
        items: what to iterate over, or None to count by hand.
        title: what is being done.
        total: number of units; default: len(items).
        unit: what is counted, e.g. "images".
        quiet: show nothing.
    """

    def __init__(
        self,
        items: Iterable[Item] | None = None,
        title: str = "",
        total: int | None = None,
        unit: str = "it",
        quiet: bool = False,
    ):
        self.items, self.title, self.unit, self.quiet = items, title, unit, quiet
        self.total = len(items) if total is None and hasattr(items, "__len__") else total  # type: ignore[arg-type]
        self.in_terminal = sys.stderr.isatty()
        self.done, self.note = 0, ""
        self.started = self.spoke = time.monotonic()
        self.bar = tqdm(
            total=self.total, desc=title, unit=f" {unit}", disable=quiet or not self.in_terminal, leave=False
        )

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count `count` more units; `note` is shown beside the bar."""
        self.done += count
        self.note = note or self.note
        self.bar.set_postfix_str(self.note, refresh=False)
        self.bar.update(count)
        now = time.monotonic()
        if not self.in_terminal and now - self.spoke >= SECONDS_BETWEEN_LINES:
            self.spoke = now
            self._line(now)

    def _line(self, now: float) -> None:
        rate = self.done / max(now - self.started, 1e-9)
        left = f" of {self.total}, {(self.total - self.done) / max(rate, 1e-9):.0f} s left" if self.total else ""
        if not self.quiet:
            print(f"{self.title}: {self.done}{left}, {rate:.1f} {self.unit}/s {self.note}".rstrip(), file=sys.stderr)

    def close(self) -> None:
        self.bar.close()

    def __iter__(self) -> Iterator[Item]:
        for item in () if self.items is None else self.items:
            yield item
            self.advance()
        self.close()


def say(text: str, quiet: bool = False) -> None:
    """A line that stays, in a terminal and elsewhere."""
    if not quiet:
        print(printable(text), file=sys.stderr)


@contextmanager
def announced(title: str, quiet: bool = False) -> Iterator[None]:
    """For what a library does and shows its own bars for (loading, downloading): plain lines where no terminal is."""
    speaks = not quiet and not sys.stderr.isatty()
    title, started = printable(title), time.monotonic()
    if speaks:
        print(f"{title} ...", file=sys.stderr)
    yield
    if speaks:
        print(f"{title}: {time.monotonic() - started:.1f} s", file=sys.stderr)


def show_library_bars(quiet: bool) -> None:
    """Bars of downloads and data sets by the Hugging Face libraries: in a terminal, unless quiet."""
    import datasets
    import huggingface_hub.utils
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()  # one bar for every file that is written; switches off those of the hub, too
    if quiet or not sys.stderr.isatty():
        datasets.disable_progress_bars()
    else:
        huggingface_hub.utils.enable_progress_bars()
        datasets.enable_progress_bars()


@contextmanager
def without_bars() -> Iterator[None]:
    """No bars of transformers within a `with` block: it shows one for every file that it writes."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    shown, hub_shown = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    logging.disable_progress_bar()  # which takes the hub's along
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
        if hub_shown:
            enable_progress_bars()
