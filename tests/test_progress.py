"""What a person sees while it works: bars in a terminal, plain lines in a file, nothing when quiet."""

import functools
import http.server
import io
import os
import pty
import re
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest
from conftest import QUICK
from families import hf_vit

from ordinalclip import progress
from ordinalclip.cli import main

RATE_AND_ETA = r"\[\d\d:\d\d<(\d\d:\d\d|\?), +[\d.?]+( images| runs)?/s"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def commands(tmp_path):
    """Every command that takes long, on next to nothing."""
    config = tmp_path / "run.yaml"
    config.write_text("{}")
    comparison = tmp_path / "compare.yaml"
    comparison.write_text("seeds: [1]\nmethods: {L1: {base: {method: l1}}}\n")
    run = tmp_path / "run"
    return {
        "checking": ["check-data", str(config), *QUICK],
        "training": ["train", str(config), f"output_dir={run}", *QUICK],
        "evaluating": ["evaluate", str(run)],
        "comparing": ["compare", str(comparison), f"output_dir={tmp_path}/compare", *QUICK],
    }


def errors_of(monkeypatch, command, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    assert main(command) == 0
    monkeypatch.undo()
    return stream.getvalue()


def test_a_bar_with_rate_and_eta_in_a_terminal(commands, monkeypatch):
    for title, command in commands.items():
        shown = errors_of(monkeypatch, command, Terminal())
        assert re.search(rf"{title}[^\r]*\|[^\r]*{RATE_AND_ETA}", shown), (title, shown)


@pytest.mark.slow
def test_plain_lines_in_a_file(commands, monkeypatch):
    for title, command in commands.items():
        monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
        shown = errors_of(monkeypatch, command, io.StringIO())
        assert "\r" not in shown
        unit = "runs" if title == "comparing" else "images"
        assert re.search(rf"^{title}[^\n]*: \d+ of \d+, \d+ s left, [\d.]+ {unit}/s", shown, re.MULTILINE), (
            title,
            shown,
        )


@pytest.mark.slow
def test_nothing_when_quiet(commands, monkeypatch):
    for command in commands.values():
        monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
        assert errors_of(monkeypatch, [*command, "--quiet"], Terminal()) == ""


def test_saving_leaves_the_bars_of_the_libraries_as_they_were():
    """All off; those of the hub on, as on the command line in a terminal; all on. After an error too."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    def state():
        return logging.is_progress_bar_enabled(), not are_progress_bars_disabled()

    @progress.without_bars()
    def fail():
        assert state() == (False, False)
        raise OSError("disk full")

    progress.show_library_bars(quiet=True)
    for switch, expected in (
        (logging.disable_progress_bar, (False, False)),
        (enable_progress_bars, (False, True)),
        (logging.enable_progress_bar, (True, True)),
    ):
        switch()
        with pytest.raises(OSError, match="disk full"):
            fail()
        assert state() == expected


class Hub(http.server.SimpleHTTPRequestHandler):
    """As much of a model hub as a download needs: the files of a folder, with their etags."""

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        found = re.fullmatch(r"/tiny/vit/resolve/\w+/(.+)", self.path)
        file = Path(self.directory) / found[1] if found else None
        if file is None or not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = file.read_bytes()
        self.send_response(200)
        self.send_header("ETag", f'"{file.name}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("where", ["terminal", "file", "quiet"])
def test_downloads(tmp_path, where):
    """A real download by the real libraries, from a hub of our own on loopback."""
    hf_vit(tmp_path / "hub")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Hub, directory=str(tmp_path / "hub")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "ordinalclip", "train", "default", "model.backbone=hf:tiny/vit", "model.text=tiny"]
    quick = [word for word in QUICK if not word.startswith("train.max_steps")]
    command += [*quick, "train.max_steps=1", f"output_dir={tmp_path}/run", *(["--quiet"] if where == "quiet" else [])]
    theirs, ours = pty.openpty()
    termios.tcsetwinsize(ours, (40, 120))  # bars fit themselves to the window
    stderr = subprocess.PIPE if where == "file" else ours
    done = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=stderr)
    os.close(ours)
    shown = b""
    if where == "file":
        shown = done.stderr.read()
    else:
        try:
            while chunk := os.read(theirs, 4096):
                shown += chunk
        except OSError:  # the other end was closed
            pass
    assert done.wait(240) == 0, shown.decode()
    server.shutdown()
    text = shown.decode()
    if where == "terminal":
        assert re.search(r"model\.safetensors[^\r]*100%\|", text), text
        assert "B/s" in text
    elif where == "file":
        assert "loading hf:tiny/vit ..." in text
        assert re.search(r"loading hf:tiny/vit: [\d.]+ s", text)
        assert "%|" not in text
    else:
        assert text == ""
