"""Names of files, units and ranks that a terminal, a spreadsheet or a page would take for something else."""

import json
import os
import shutil
from functools import cache
from pathlib import Path

import torch
import yaml

from hostile import case, lasting_folder
from hostile.pictures import picture, predict
from ordinalclip.config import parse_config
from ordinalclip.model import OrdinalModel
from ordinalclip.ranks import Ranks
from ordinalclip.run_folder import RunFolder
from ordinalclip.training import train

UNIT = "$ | *kg* <b>"
NAMES = ("<script>a</script>", "[x](javascript:alert(1))", "`|` 'q' \"q\"", "=1+1", "$x_1$ \U0001f600")
NOT_UTF8 = os.fsdecode(b"\xff.png")


def hostile_model(unit, names):
    torch.manual_seed(0)
    OrdinalModel.build("tiny", Ranks(range(5), names, unit), "prototypes").save_pretrained("model")
    picture("a.png")
    return ["predict", "a.png", "--model", "model", "--top", "5", "--quiet"]


@cache
def finished():
    """A finished run of five ranks, of which nothing was learnt."""
    folder = lasting_folder() / "run"
    content = {
        "output_dir": str(folder),
        "method": "constant",
        "data": {"num_train": 8, "num_validation": 4, "num_test": 6},
        "ranks": {"values": [0, 25, 50, 75, 100], "names": list(NAMES), "unit": UNIT},
        "train": {"max_steps": 1, "batch_size": 8},
        "evaluation": {"report": False},
    }
    train(parse_config(content, "hostile"), quiet=True)
    return folder


def run_in(folder):
    """A copy of the run, to be damaged."""
    shutil.copytree(finished(), folder / "run")
    return folder / "run"


# ---- terminals


@case("a file name with colours and a line break", r"^a\\x1b\[31m\\nb\.png\t\d", status=0)
def _(folder):
    picture("a\x1b[31m\nb.png")
    return predict(".")


@case("a broken file with colours in its name", r"a\\x1b\[31m\.png\terror: not a readable", status=1)
def _(folder):
    Path("a\x1b[31m.png").write_bytes(b"x")
    return predict(".")


@case("a file name that is not UTF-8", r"^\\udcff\.png\t\d", status=0)
def _(folder):
    picture(NOT_UTF8)
    return predict(NOT_UTF8)


@case("a file name that is not UTF-8, as JSON", r'^\{"file": "\\udcff\.png", "value"', status=0)
def _(folder):
    picture(NOT_UTF8)
    return predict(".", "--json")


@case("a file that does not exist, with colours in its name", r"a\\x1b\[31m\.png: no such image")
def _(folder):
    return predict("a\x1b[31m.png")


@case("names and a unit of marks", r"^a\.png\t`\|` 'q' \"q\"\t\(.*<script>a</script> \d+%", status=0)
def _(folder):
    return hostile_model(UNIT, NAMES)


@case("a unit with colours in a saved model", r"config\.json: .*no line breaks or control characters among them")
def _(folder):
    words = hostile_model("kg", None)
    path = Path("model/config.json")
    content = json.loads(path.read_text())
    content["ranks"]["unit"] = "\x1b[31m\n\ud800"
    path.write_text(json.dumps(content))
    return words


@case("a folder for gauges with colours in its name", r"2 pictures and labels\.csv in a\\x1b\[31mb", status=0)
def _(folder):
    return ["make-gauges", "a\x1b[31mb", "--num", "2", "--quiet"]


# ---- pages and cards


def _is_text(folder):
    page = (folder / "run/report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "<b>" not in page
    assert "&lt;script&gt;a" in page
    card = (folder / "run/model/README.md").read_text(encoding="utf-8")
    front, _, text = card.removeprefix("---\n").partition("\n---\n")
    assert yaml.safe_load(front)["library_name"] == "ordinalclip"
    assert r"\$ \| \*kg\* \<b>" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert all(row.replace(r"\|", "").count("|") == 5 for row in rows), rows


@case("a report and card of names and a unit of marks", r"run/report\.html\n.*README\.md", 0, after=_is_text, slow=True)
def _(folder):
    run_in(folder)
    return ["report", "run", "--quiet"]


@case("figures of names and a unit of marks", r"confusion\.png", status=0, slow=True)
def _(folder):
    run_in(folder)
    return ["plot", "run", "--format", "png", "--quiet"]


@case("figures for a folder whose name is not UTF-8", r"\\udcff/confusion\.pdf\n", status=0, slow=True)
def _(folder):
    run_in(folder)
    return ["plot", "run", "--out", os.fsdecode(b"\xff"), "--quiet"]


# ---- what is no run, or a damaged one


for command in ("report", "plot"):

    @case(f"{command} of a comparison", r"out: a comparison that is not finished \(comparison\.json is missing\)")
    def _(folder, command=command):
        Path("out/runs").mkdir(parents=True)
        Path("out/results.csv").touch()
        return [command, "out"]

    @case(f"{command} of nothing", r"none/at/all: no finished run", after=lambda folder: _is_empty(folder))
    def _(folder, command=command):
        return [command, "none/at/all"]

    @case(f"{command} of a file", r"run: no finished run")
    def _(folder, command=command):
        Path("run").write_text("text")
        return [command, "run"]

    @case(f"{command} of a run with half of metrics.json", r"run/metrics\.json: damaged, not valid JSON")
    def _(folder, command=command):
        metrics = run_in(folder) / "metrics.json"
        metrics.write_text(metrics.read_text()[:200])
        return [command, "run"]

    @case(f"{command} of a run without predictions", r"run/predictions\.parquet is missing; .*evaluate run")
    def _(folder, command=command):
        (run_in(folder) / "predictions.parquet").unlink()
        return [command, "run"]

    @case(f"{command} of a run with half of its predictions", r"run/predictions\.parquet: damaged")
    def _(folder, command=command):
        predictions = run_in(folder) / "predictions.parquet"
        predictions.write_bytes(predictions.read_bytes()[:2000])
        return [command, "run"]


def _is_empty(folder):
    assert not any(folder.iterdir())


@case("a run whose metrics.json is a list", r"run/metrics\.json: damaged, no JSON object")
def _(folder):
    (run_in(folder) / "metrics.json").write_text("[1]")
    return ["report", "run"]


@case(
    "a run whose metrics.json lacks what it needs", r"run/metrics\.json: damaged, num_train, train_counts, .* missing"
)
def _(folder):
    (run_in(folder) / "metrics.json").write_text("{}")
    return ["report", "run"]


@case("a run with a damaged line in its log", r"report\.html", status=0)
def _(folder):
    (run_in(folder) / "log.jsonl").write_text('{"step": 1, "loss": 1}\n\x00\x00}\n{"step": 2, "loss": 1}\n')
    return ["report", "run"]


@case("a run with the predictions of another", r"predictions\.parquet: damaged, 0 rows of the test part, 6 in")
def _(folder):
    run = run_in(folder)
    metrics = json.loads((run / "metrics.json").read_text())
    predictions = RunFolder(run).read_predictions("validation")
    (run / "predictions.parquet").unlink()
    RunFolder(run).write_predictions({"validation": predictions})
    assert metrics["test"]["num"] == 6
    return ["report", "run"]
