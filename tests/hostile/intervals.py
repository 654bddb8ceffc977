"""Intervals that cannot be promised: models that keep none, levels, too few pictures, pictures seen before."""

import json
import shutil
from functools import cache
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from hostile import case, lasting_folder
from hostile.audits import QUICK, pictures
from hostile.models import predict
from ordinalclip.cli import main


@cache
def trained():
    """A run of one step that keeps intervals from twelve pictures, and its pictures; to be copied."""
    folder = lasting_folder()
    pictures(folder, 60)
    keys = ["method=cross_entropy", "data.split=[0.4,0.4,0.2]", "data.calibration=0.5", f"output_dir={folder}/run"]
    assert main(["train", "default", *QUICK, *keys, f"data.root={folder}/set"]) == 0
    return folder


def asked(folder, level):
    """The words that ask the run for an interval."""
    shutil.copytree(trained() / "run", folder / "run")
    Image.linear_gradient("L").resize((70, 64)).save(folder / "a.png")
    return ["predict", "a.png", "--model", "run", "--quiet", "--interval", level]


def calibrated(folder, *more, number=40, first=100):
    """The words of a calibration of the run on other pictures."""
    shutil.copytree(trained() / "run", folder / "run")
    pictures(folder, number, first)
    return ["calibrate", "run", "--data", "set/labels.csv", "--out", "calibrated", "--quiet", *more]


def nothing_is_written(folder):
    assert not list(Path(folder).glob("calibrated*"))


@case(
    "an interval of a model that keeps none",
    r"interval=0\.9: this model keeps no intervals; train it with data\.calibration=0\.5, or calibrate it",
)
def _(folder):
    return [*predict(folder, "cross_entropy"), "--interval", "0.9"]


@case("an interval of more than certainty", r"interval must be a level of 0\.5 to 0\.99 in hundredths, got 90")
def _(folder):
    return asked(folder, "90")


@case("an interval of no number", r"interval must be a level of 0\.5 to 0\.99 in hundredths, got nan")
def _(folder):
    return asked(folder, "nan")


@case("an interval between two hundredths", r"interval must be a level of 0\.5 to 0\.99 in hundredths, got 0\.905")
def _(folder):
    return asked(folder, "0.905")


@case(
    "an interval that takes more calibration pictures than there were",
    r"an interval of 0\.99 takes at least 99 calibration groups, there are 12",
)
def _(folder):
    return asked(folder, "0.99")


@case(
    "an interval of a model whose thresholds are no numbers",
    r"model\.safetensors: calibration\.thresholds holds 50 numbers that are not finite, of 50",
)
def _(folder):
    words = asked(folder, "0.8")
    file = folder / "run/model/model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("calibration.thresholds"))
    save_file(weights | {name: torch.full_like(weights[name], torch.nan)}, file)
    return words


@case(
    "a model whose calibration is of another kind than its tensors",
    r"config\.json: calibration: .*kind 'guess' is unknown",
)
def _(folder):
    words = asked(folder, "0.8")
    file = folder / "run/model/config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"calibration": {**content["calibration"], "kind": "guess"}}))
    return words


@case("a validation part that only calibrates", r"data\.calibration: Input should be less than 1, got 1\.0")
def _(folder):
    return ["train", "default", *QUICK, "data.calibration=1.0", "output_dir=run"]


@case(
    "intervals of a kind that there is none of",
    r"evaluation\.intervals: Input should be 'auto', 'rps', .*, got 'bayes'",
)
def _(folder):
    return ["train", "default", *QUICK, "evaluation.intervals=bayes", "output_dir=run"]


@case(
    "a calibration on pictures that the run has learnt from",
    r"\d+ of these 40 pictures are in the run's training, validation or calibration part",
    after=nothing_is_written,
)
def _(folder):
    return calibrated(folder, number=40, first=0)


@case("a calibration on three pictures", r"levels: 0\.5 to 0\.5", status=0)
def _(folder):
    return calibrated(folder, number=3)


@case(
    "a calibration with labels beyond the ranks",
    r"row 1 \(line 2\), 100\.png: label 17 is outside the ranks 0 to 2",
    after=nothing_is_written,
)
def _(folder):
    words = calibrated(folder)
    table = folder / "set/labels.csv"
    table.write_text(table.read_text().replace("100.png,1", "100.png,17"))
    return words


@case("a calibration with a share of everything", r"share must lie between 0 and 1, got 1\.0", after=nothing_is_written)
def _(folder):
    return calibrated(folder, "--share", "1")


@case(
    "a calibration whose groups are in no column",
    r"column 'subjects' \(data\.group\) is missing; it has 'image', 'label', 'subject'",
    after=nothing_is_written,
)
def _(folder):
    return calibrated(folder, "--group", "subjects")


@case(
    "a calibrated model into a folder of others",
    r"calibrated: holds notes\.txt, which is of no model; choose another folder",
)
def _(folder):
    words = calibrated(folder)
    (folder / "calibrated").mkdir()
    (folder / "calibrated/notes.txt").write_text("mine")
    return words
