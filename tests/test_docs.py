"""docs/first-model.md does what it says: its commands are run, and their outputs compared with those on the page."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "first-model.md"
ASKED_FOR = "ordinalclip: before a training can start"  # by the one command that ends with 1


def blocks():
    """(language, text) of each block of code."""
    return re.findall(r"^```(console|python)\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def outputs(folder):
    """Run the page; the blocks as they should be on it."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONWARNINGS": "ignore",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    for language, text in blocks():
        if language == "python":
            done = subprocess.run(
                [sys.executable, "-c", text], cwd=folder, env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr
            yield language, text, done.stdout
            continue
        shown = []
        for command in re.findall(r"^\$ (.*)$", text, re.MULTILINE):
            done = subprocess.run(
                ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == (1 if ASKED_FOR in done.stderr else 0), done.stderr
            shown.append(f"$ {command}\n{done.stdout}{done.stderr}")
        yield language, "".join(shown), ""


def masked(text):
    """Without numbers, which differ from machine to machine in their last digits, and at the ends of lines."""
    return sorted(re.sub(r"[-+]?\d+(\.\d+)?(e-?\d+)?", "#", text).split())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_first_model_is_made_as_the_page_says(tmp_path):
    for (language, text), (_, shown, printed) in zip(blocks(), outputs(tmp_path), strict=True):
        if language == "console":
            assert masked(shown) == masked(text)
        elif "print(states" in text:
            assert re.fullmatch(r" +value +name\n(\d +\d\.\d +\w+\n){3}\[0\.\d+, [01]\.\d+\]\n", printed), printed
        elif "print(" in text:
            assert printed.startswith("{'value':")
    errors = dict(
        re.findall(
            r"^\$ ordinalclip train mine\.yaml --quiet(.*)\n(?:.*\n)*?test: .* mae ([\d.]+)", text_of_page(), re.M
        )
    )
    trained, constant = (float(errors[key]) for key in ("", " method=constant output_dir=runs/constant"))
    assert trained < 0.5 * constant


def text_of_page():
    return PAGE.read_text(encoding="utf-8")
