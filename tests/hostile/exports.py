"""Exports that cannot be: no model, folders in the way, formats, pictures to calibrate on."""

import json
import shutil
from pathlib import Path

from hostile import case
from hostile.models import saved


def export(folder, *more, out="served"):
    """A saved model, and the words of its export."""
    shutil.copytree(saved("cross_entropy"), folder / "model")
    return ["export", "model", "--out", out, "--quiet", *more]


def nothing_is_written(folder):
    assert not list(Path(folder).glob("served*"))


@case("an export of nothing", r"none/at/all: no such folder", after=nothing_is_written)
def _(folder):
    return ["export", "none/at/all", "--out", "served"]


@case(
    "an export to a format that there is none of",
    r"--format: invalid choice: 'tflite' \(choose from 'onnx', 'torch-export', 'openvino'\)",
    after=nothing_is_written,
)
def _(folder):
    return export(folder, "--format", "tflite")


@case("an export into a folder of others", r"served: holds notes\.txt, which is of no export; choose another folder")
def _(folder):
    (folder / "served").mkdir()
    (folder / "served/notes.txt").write_text("mine")
    return export(folder)


@case(
    "an export over another, without being told to",
    r"served: holds an export already; overwrite replaces it, or choose another folder",
)
def _(folder):
    (folder / "served").mkdir()
    (folder / "served/export.json").write_text("{}")
    return export(folder)


@case(
    "an export into the model's own folder", r"model: holds config\.json, which is of no export; choose another folder"
)
def _(folder):
    return export(folder, "--overwrite", out="model")


@case("an export in 8 bits to OpenVINO", r"int8 is for format onnx, not openvino", after=nothing_is_written)
def _(folder):
    return export(folder, "--int8", "--format", "openvino")


@case(
    "an export in 8 bits of a model folder, without pictures",
    r"int8 needs pictures to calibrate on: the model is of no run that is here; name some \(--data\)",
    after=nothing_is_written,
)
def _(folder):
    return export(folder, "--int8")


@case(
    "an export that is calibrated on no picture",
    r"--calibration: '0' is not a whole number from 1 to 100000",
    after=nothing_is_written,
)
def _(folder):
    return export(folder, "--int8", "--calibration", "0")


@case(
    "an export with a column of no table",
    r"--image-column and --root are of a table, which --data names",
    after=nothing_is_written,
)
def _(folder):
    return export(folder, "--image-column", "file")


@case(
    "an export tried on an empty folder",
    r"pictures: no images in this folder; endings searched: ",
    after=nothing_is_written,
)
def _(folder):
    (folder / "pictures").mkdir()
    return export(folder, "--data", "pictures")


@case("an export tried on broken pictures", r"pictures/a\.png: not a readable image", after=nothing_is_written)
def _(folder):
    (folder / "pictures").mkdir()
    (folder / "pictures/a.png").write_text("no picture")
    return export(folder, "--data", "pictures")


@case(
    "an export of a model whose weights are cut off",
    r"model\.safetensors: damaged or no safetensors file",
    after=nothing_is_written,
)
def _(folder):
    words = export(folder)
    file = folder / "model/model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return words


@case(
    "an export of a model of a method that is not known",
    r"config\.json: method is 'crossentropy', was 'cross_entropy' when the weights were saved",
    after=nothing_is_written,
)
def _(folder):
    words = export(folder)
    file = folder / "model/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"method": "crossentropy"}))
    return words
