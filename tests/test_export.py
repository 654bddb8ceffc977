"""Models as graphs: `predict.py` answers as the model does, on pictures from files, without this package."""

import csv
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import pytest
import torch
from conftest import FEW as RANKS
from conftest import QUICK, random_model
from families import FAMILIES, make_family
from PIL import Image

from baselines.classification import CrossEntropy
from baselines.neighbors import NearestNeighbors, RadiusNeighbors
from ordinalclip import OrdinalModel, Ranks
from ordinalclip.calibrating import calibrate
from ordinalclip.calibration import Answered
from ordinalclip.cli import export as command
from ordinalclip.cli import main
from ordinalclip.export import BATCHES, TIE, TOLERANCE, Format, Served, _compared, agreement, export, on_a_tie
from ordinalclip.heads import Prediction, Targets, available_heads, without_branches
from ordinalclip.images import load_image, prepare

METHODS = sorted(set(available_heads()) - {"prototypes"})  # which zero_shot is exported as
READOUTS = [("conord", {"readout": "nearest"}), ("conord", {"readout": "l1"})]
SOME = ("ordinalclip", "ordreg", "rm_loss", "large", "ranking_adapter")  # of each kind of head one, in every format
REFUSES = """
import importlib.abc, runpy, sys
class Refuses(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "ordinalclip", "baselines", "transformers", "onnx", "onnxscript"):
            raise ImportError(f"{name} is imported")
sys.meta_path.insert(0, Refuses())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def write_pictures(folder):
    """Files of all kinds that are read, 11 as `BATCHES` take; their paths."""
    rng = np.random.default_rng(0)
    slope = np.linspace(0, 200, 90)[None, :, None] + np.linspace(0, 40, 70)[:, None, None]
    pixels = (slope + rng.integers(0, 15, (70, 90, 3))).astype(np.uint8)
    image, grey = Image.fromarray(pixels), pixels[..., 0]
    rotated = Image.Exif()
    rotated[0x0112] = 6
    alpha = np.dstack([pixels, np.linspace(0, 255, 90).astype(np.uint8)[None].repeat(70, 0)])
    image.save(folder / "rgb.png")
    image.save(folder / "turned.jpg", exif=rotated, quality=90)
    image.convert("L").save(folder / "grey.png")
    image.convert("P", palette=Image.Palette.ADAPTIVE).save(folder / "palette.gif")
    Image.fromarray(alpha).save(folder / "clear.png")
    image.convert("CMYK").save(folder / "print.jpg")
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "deep.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "deep.tif")
    Image.fromarray(grey).save(folder / "negative.tif", tiffinfo={262: 0})
    Image.fromarray((grey / 255).astype(np.float32)).save(folder / "float.tif")
    image.resize((61, 240)).convert("1").save(folder / "tall.bmp")
    return sorted(folder.iterdir())


def imported(folder):
    """The `predict.py` of an export."""
    spec = importlib.util.spec_from_file_location(f"predict_{folder.name}", folder / "predict.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def asked(folder, *words, status=0):
    """Run `predict.py` where this package and all that it stands on are refused: its rows, and what it says beside."""
    command = [sys.executable, "-I", "-c", REFUSES, str(folder / "predict.py"), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    return list(csv.DictReader(io.StringIO(done.stdout))), done.stderr


def fitted(method, files, backbone="tiny", **options):
    """A model of random weights that knows pictures like these: each in three brightnesses with labels of their own."""
    model = random_model(method, backbone, **options)
    if model.head.needs_fit and method != "constant":
        seen = torch.stack([prepare(load_image(file), model.config.pixel_spec) for file in files])
        values = torch.linspace(0, 10, 3 * len(files))[torch.randperm(3 * len(files))]
        with torch.no_grad():
            part = (
                model.head(model.encoder(torch.cat([seen, 0.97 * seen, 1.03 * seen]))),
                Targets(values, RANKS.rank_of(values)),
            )
            model.head.fit(part, part)
    return model


def check(model, folder, files):
    """Pixels as they are in the package; answers within the tolerance, in all batches. How many fell on a tie."""
    module, graph, ties = imported(folder), Served(model.deploy()), 0
    answer, spec = module.load(), model.config.pixel_spec

    def run(inputs):
        found = answer(*inputs.values())
        assert list(found) == graph.outputs
        assert {len(array) for array in found.values()} == {len(inputs["pixel_values"])}
        return found

    rest = list(files)
    for size, level in zip(BATCHES, graph.levels or (None,) * 3, strict=True):
        batch, rest = rest[:size], rest[size:]
        pixels = torch.stack([prepare(load_image(file), spec) for file in batch])
        assert np.array_equal(np.stack([module.read(file) for file in batch]), pixels.numpy())
        ties += agreement(graph, run, pixels, level).ties
    if model.config.method != "constant":  # else nothing were shown
        found = answer(np.stack([module.read(file) for file in files]))
        assert len(np.unique(found.get("probabilities", found["value"]).round(5), axis=0)) > 3
    return ties


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a second, from the command line as all that follows."""
    folder = tmp_path_factory.mktemp("run") / "mine"
    overrides = [*QUICK, "ranks.unit=%", f"output_dir={folder}", "method=cross_entropy"]
    assert main(["train", "default", *overrides, "--quiet"]) == 0
    return folder


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "plain"
    assert main(["export", str(run), "--out", str(folder), "--quiet"]) == 0
    return folder


@pytest.fixture(scope="module")
def with_torch(files, tmp_path_factory):
    """Of a model in memory whose answers are those of neighbours."""
    folder = tmp_path_factory.mktemp("export") / "neighbours"
    model = fitted("conord", files)
    return model, folder, export(model, folder, "torch-export")


def test_predict_py_answers_as_the_model_without_this_package(run, exported, files):
    model = OrdinalModel.from_pretrained(run / "model")
    assert check(model, exported, files) == 0
    rows, said = asked(exported, *files)
    assert said == ""
    expected = model.predict(torch.stack([prepare(load_image(file), model.config.pixel_spec) for file in files]))
    assert [row["file"] for row in rows] == [str(file) for file in files]
    assert [float(row["value"]) for row in rows] == expected.value.tolist()
    assert [row["name"] for row in rows] == [model.head.ranks.name(rank) for rank in expected.rank.tolist()]
    assert {row["unit"] for row in rows} == {"%"}
    likely = expected.probabilities.gather(1, expected.rank[:, None])[:, 0].tolist()
    assert [float(row["probability"]) for row in rows] == pytest.approx(likely, abs=TOLERANCE)


def test_a_broken_file_is_named_and_the_others_are_answered(exported, files, tmp_path):
    broken = tmp_path / "cut\n\x1b[31m.jpg"
    broken.write_bytes(next(file for file in files if file.name == "print.jpg").read_bytes()[:-200])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (4, 900)).save(tmp_path / "long.png")
    os.mkfifo(tmp_path / "pipe.png")
    rows, said = asked(exported, files[0], *sorted(tmp_path.iterdir()), files[1], "--batch", "2", status=1)
    assert [row["file"] for row in rows] == [str(files[0]), str(files[1])]
    lines = said.splitlines()
    assert len(lines) == 5
    assert all(re.search(r"not a readable picture \(.+\)$", line) for line in lines)
    assert repr(str(broken)) in lines[0]
    assert "\x1b" not in said
    assert "4 x 900 pixels" in "".join(lines)


def test_a_number_that_is_not_finite_is_refused_by_the_name_of_its_file(exported, files, monkeypatch, capsys):
    module = imported(exported)
    read = module.read
    monkeypatch.setattr(module, "read", lambda path: read(path) * (np.nan if path == str(files[1]) else 1))
    monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, files[:3])])
    assert module.main() == 1
    seen = capsys.readouterr()
    assert [line.partition(",")[0] for line in seen.out.splitlines()] == ["file", str(files[0]), str(files[2])]
    assert seen.err == f"{str(files[1])!r}: the model answers with a number that is not finite\n"


def test_what_is_written(run, exported, tmp_path):
    assert {path.name for path in exported.iterdir()} - {"__pycache__"} == {
        *("export.json", "model.onnx", "predict.py", "preprocessing.json", "ranks.json"),
    }
    ranks = json.loads((exported / "ranks.json").read_text())
    assert ranks["unit"] == "%"
    assert ranks["levels"] is None
    content = json.loads((exported / "export.json").read_text())
    assert content["model"] == {"folder": "model", "method": "cross_entropy", "backbone": "tiny"}
    assert content["agreement"]["pictures"] == sum(BATCHES)
    for path in (path for path in exported.iterdir() if path.is_file()):  # nothing says where it was made
        assert str(Path(__file__).parents[1]).encode() not in path.read_bytes()
        assert str(run).encode() not in path.read_bytes()
    graph = onnx.load(exported / "model.onnx").graph
    assert [each.name for each in graph.output] == ["value", "rank", "probabilities"]
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert len((exported / "predict.py").read_text().splitlines()) < 140


@pytest.mark.slow
def test_int8_is_calibrated_on_the_training_part_and_tells_its_price(run, tmp_path, files, capsys):
    assert main(["export", str(run), "--out", str(tmp_path / "small"), "--int8", "--calibration", "9", "--quiet"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"int8: MAE \d+\.?\d* before, \d+\.?\d* after; answers move by .* \(12 pictures of the val", said)
    model = onnx.load(tmp_path / "small" / "model.onnx")
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("QuantizeLinear") > 10
    quantised = {name for node in model.graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    heads = [node for node in model.graph.node if node.op_type in ("Gemm", "MatMul")]
    assert any(not quantised & set(node.input) for node in heads)  # the head is as it was
    rows, _ = asked(tmp_path / "small", *files)
    plain = OrdinalModel.from_pretrained(run / "model")
    expected = plain.predict(torch.stack([prepare(load_image(file), plain.config.pixel_spec) for file in files])).value
    assert np.abs(np.array([float(row["value"]) for row in rows]) - expected.numpy()).mean() < 10
    moved = json.loads((tmp_path / "small" / "export.json").read_text())["cost"]
    assert moved["pictures"] == 12
    assert abs(moved["after"] - moved["before"]) <= moved["difference"] + 1e-9


@pytest.mark.slow
def test_torch_export_is_loaded_without_this_package(with_torch, files):
    model, folder, done = with_torch
    assert done.agreement.pictures == sum(BATCHES)
    assert check(model, folder, files) == 0


def calibrated(model, files, kind="auto", by_rank=False):
    """With intervals, from as many pictures as a level of 0.95 takes."""
    pixels = torch.stack([prepare(load_image(file), model.config.pixel_spec) for file in files]).repeat(2, 1, 1, 1)
    with torch.no_grad():
        prediction = model.answer(model.head(model.encoder(pixels * torch.linspace(0.9, 1.1, 22)[:, None, None, None])))
    labels = RANKS.tensor()[torch.arange(22) % len(RANKS)]
    found = Answered(prediction, labels, RANKS.rank_of(labels))
    return model.calibrated(calibrate(RANKS, model.config.decoding, found, found, None, kind, by_rank).calibration)


@pytest.mark.slow
def test_intervals_of_any_level(files, tmp_path):
    model = calibrated(fitted("cross_entropy", files), files)
    export(model, tmp_path / "out", "torch-export")
    assert check(model, tmp_path / "out", files) == 0
    module = imported(tmp_path / "out")
    answer, pixels = module.load(), np.stack([module.read(file) for file in files])
    assert (module.LOWEST, module.LEVEL, module.HIGHEST) == (0.5, 0.9, 0.95)
    said = json.loads((tmp_path / "out" / "ranks.json").read_text())
    assert said["levels"] == {"lowest": 0.5, "usual": 0.9, "highest": 0.95}
    widths = []
    for level in (0.5, 0.73, 0.9, 0.95):
        found = answer(pixels, level)
        low, high = model.interval(model.predict(torch.from_numpy(pixels)), level)
        np.testing.assert_allclose(found["low"], low.numpy(), atol=1e-4)
        np.testing.assert_allclose(found["high"], high.numpy(), atol=1e-4)
        widths.append((found["high"] - found["low"]).mean())
    assert widths == sorted(widths)
    assert widths[0] < widths[-1]
    assert np.array_equal(answer(pixels)["low"], answer(pixels, 0.9)["low"])
    for level in (0.96, 0.4, 0.905, np.nan):
        with pytest.raises(ValueError, match=r"the level is 0\.5 to 0\.95 in hundredths, got"):
            answer(pixels, level)
    rows = subprocess.run(
        [sys.executable, tmp_path / "out" / "predict.py", "--level", "0.73", *files],
        capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    assert rows[0] == "file,value,unit,name,probability,low,high"
    expected = answer(pixels, 0.73)
    shown = [[float(cell) for cell in row.split(",")[-2:]] for row in rows[1:]]
    assert shown == np.stack([expected["low"], expected["high"]], axis=1).tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "kind", "by_rank", "format"),
    [
        *(("cross_entropy", kind, False, "onnx") for kind in ("rps", "aps", "shortest", "residual", "scaled")),
        *(("l1", kind, False, "onnx") for kind in ("residual", "scaled")),
        ("l1", "residual", True, "onnx"),
        ("cross_entropy", "shortest", False, "openvino"),
        ("l1", "scaled", False, "openvino"),
    ],
)
def test_every_kind_of_interval(method, kind, by_rank, format, files, tmp_path):
    model = calibrated(fitted(method, files), files, kind, by_rank)
    done = export(model, tmp_path / "out", format)
    assert done.agreement.interval is not None
    assert check(model, tmp_path / "out", files) == done.agreement.ties == 0


def test_the_page_says_what_is_there(exported, with_torch, tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "export.md").read_text(encoding="utf-8")
    listed = re.search(r"^\$ ls served\n(.*)$", page, re.M)[1].split()
    assert sorted({path.name for path in exported.iterdir()} - {"__pycache__"}) == listed
    (tmp_path / "served").symlink_to(with_torch[1])
    code = re.search(r"^```python\n(.*?)^```", page, re.M | re.S)[1] + "print(*answers, len(answers['value']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "value rank 5\n"


@pytest.mark.parametrize("neighbors", [NearestNeighbors(k) for k in (1, 2, 5, 71, 200)])
def test_counted_neighbours_in_one_piece(neighbors):
    """On a grid where every point is there twice, and many are as far as the last that counts."""
    grid = torch.cartesian_prod(torch.arange(6.0), torch.arange(6.0)) + 1000
    labels = torch.rand(72, generator=torch.Generator().manual_seed(1)) * 100
    queries = torch.cat([grid, grid + torch.tensor([0.5, 0.0])])
    neighbors.fit(torch.cat([grid, grid.flip(0)]), labels)
    with without_branches():
        found = neighbors.predict(queries)
    torch.testing.assert_close(found, neighbors.predict(queries), rtol=1e-6, atol=0)


@pytest.mark.parametrize("radius", [0.25, 1.0, 5.0])
def test_neighbours_within_a_radius_in_one_piece(radius):
    grid = torch.cartesian_prod(torch.arange(6.0), torch.arange(6.0)) + 1000
    labels = torch.rand(72, generator=torch.Generator().manual_seed(1)) * 100
    queries = torch.cat([grid, grid + torch.tensor([0.5, 0.0]), grid + 40])
    neighbors = RadiusNeighbors(radius).fit(torch.cat([grid, grid.flip(0)]), labels)
    with without_branches():
        found = neighbors.predict(queries)
    torch.testing.assert_close(found, neighbors.predict(queries), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("method", "head"), [("l1", {}), ("cross_entropy", {}), ("coral", {}), ("conord", {}), READOUTS[0]]
)
def test_what_is_no_number_stays_none_in_a_graph(method, head):
    """Even where the decoding would make a number of it; and only of that picture."""
    model = random_model(method, **head).deploy()
    size = model.config.pixel_spec.size
    pixels = torch.randn(3, 3, size, size)
    pixels[1, 0, 0, 0] = torch.nan
    with torch.no_grad():
        found = Served(model)(pixels)["value"]
    assert found.isfinite().tolist() == [True, False, True]
    torch.testing.assert_close(found[[0, 2]], model.predict(pixels[[0, 2]]).value)


class Undecided(CrossEntropy):
    """A branch on data."""

    def predict(self, outputs):
        return super().predict(outputs if outputs["logits"].sum() > 0 else {"logits": -outputs["logits"]})


def test_a_method_that_has_no_graph_is_named(tmp_path):
    model = OrdinalModel.build("tiny", RANKS, f"{__name__}:Undecided")
    with pytest.raises(
        ValueError, match=rf"method '{__name__}:Undecided' on backbone 'tiny' cannot be exported to onnx"
    ):
        export(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_graph_that_answers_otherwise_is_refused_and_ties_are_counted():
    model = random_model("cross_entropy").deploy()
    size = model.config.pixel_spec.size
    pixels = torch.randn(sum(BATCHES), 3, size, size)

    def run(change=lambda name, array: array):
        def asked(inputs):
            found = model.predict(torch.from_numpy(inputs["pixel_values"]))._asdict()
            return {name: change(name, tensor.numpy().copy()) for name, tensor in found.items()}

        return asked

    graph = Served(model)
    assert _compared(graph, run(), pixels, "here").value == 0
    for name, by in (("value", 0.002), ("probabilities", 2e-4), ("rank", 1), ("value", np.nan)):
        with pytest.raises(ValueError, match="here: the graph does not answer as the model does"):
            _compared(graph, run(lambda each, array, name=name, by=by: array + by * (each == name)), pixels, "here")
    with torch.no_grad():  # one half on either of two ranks, whatever the picture
        model.head.linear.weight.zero_()
        model.head.linear.bias.copy_(torch.tensor([0.0, 0.0, *[-100.0] * 9]))
    moved = _compared(graph, run(lambda name, array: array + (name in ("value", "rank"))), pixels, "here")
    assert moved.ties == sum(BATCHES)
    assert f"{moved.ties} of them on a tie" in str(moved)


def test_what_a_tie_is():
    def shares(*rows):
        probabilities = torch.tensor(rows)
        return Prediction(torch.zeros(len(rows)), torch.zeros(len(rows), dtype=torch.int64), probabilities)

    three = Ranks((0, 10, 20))
    assert on_a_tie(shares([0.5, 0.25, 0.25], [0.4, 0.4, 0.2]), three, "median").tolist() == [True, False]
    assert on_a_tie(shares([0.5, 0.25, 0.25], [0.4, 0.4, 0.2]), three, "argmax").tolist() == [False, True]
    values = Prediction(torch.tensor([5.0, 5 + 40 * TIE, 14.0]), torch.tensor([0, 1, 1]))
    assert on_a_tie(values, three, "median").tolist() == [True, False, False]
    assert on_a_tie(values, Ranks((0, 10, 20), edges=(4, 14)), "median").tolist() == [False, False, True]


def test_the_command_knows_the_formats():
    assert get_args(Format) == command.FORMATS


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--int8", "--format", "openvino"], "int8 is for format onnx, not openvino"),
        (["--root", "x"], "--image-column and --root are of a table, which --data names"),
        (["--data", "nowhere.csv", "--int8"], "nowhere.csv"),
    ],
)
def test_calls_that_mean_nothing(run, words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(run), "--out", "out", *words]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_int8_without_pictures(run, tmp_path):
    with pytest.raises(ValueError, match=r"the model is of no run that is here; name some \(--data\)"):
        export(OrdinalModel.from_pretrained(run / "model"), tmp_path / "out", int8=True)
    with pytest.raises(ValueError, match=r"format 'tensorrt' is unknown; choices: onnx"):
        export(run, tmp_path / "out", "tensorrt")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        export(tmp_path / "nothing", tmp_path / "out")


def test_what_is_in_the_place_stays(run, exported, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    (tmp_path / "file").touch()
    before = (exported / "export.json").read_bytes()
    for place, said in (
        (tmp_path / "mine", "holds notes.txt, which is of no export"),
        (tmp_path / "file", "a file, where a folder"),
        (exported, "holds an export already; overwrite replaces it"),
    ):
        assert main(["export", str(run), "--out", str(place)]) == 2
        assert said in capsys.readouterr().err
    assert (exported / "export.json").read_bytes() == before
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("format", "package", "extra"), [("onnx", "onnxscript", "export"), ("openvino", "openvino", "openvino")]
)
def test_a_missing_package_is_one_line(run, tmp_path, monkeypatch, capsys, format, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["export", str(run), "--out", str(tmp_path / "out"), "--format", format]) == 2
    assert f"needs {package}: pip install 'ordinalclip[{extra}]'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "head", "format"),
    [
        *((method, head, "onnx") for method, head in [*((method, {}) for method in METHODS), *READOUTS]),
        *((method, {}, format) for method in SOME for format in command.FORMATS if format != "onnx"),
    ],
)
def test_every_method(method, head, format, files, tmp_path):
    model = fitted(method, files, **head)
    done = export(model, tmp_path / "out", format)
    assert check(model, tmp_path / "out", files) == done.agreement.ties == 0


@pytest.mark.slow
@pytest.mark.parametrize("decoding", ["argmax", "expectation"])
@pytest.mark.parametrize("ranks", [RANKS, Ranks((0, 2, 9), edges=(1, 5))], ids=["values", "edges"])
def test_every_decoding(decoding, ranks, files, tmp_path):
    model = fitted("cross_entropy", files, ranks=ranks, decoding=decoding)
    export(model, tmp_path / "out")
    assert check(model, tmp_path / "out", files) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "format"),
    [
        *((name, "onnx") for name in FAMILIES),
        *((f"timm:{name}", "onnx") for name in ("test_resnet", "test_vit", "swin_tiny_patch4_window7_224")),
        *((name, "openvino") for name in ("hf:hf_clip", "hf:hf_convnext", "open_clip:open_clip_vit")),
    ],
)
def test_every_family(name, format, files, tmp_path):
    spec = name if name.startswith("timm") else make_family(name, tmp_path)
    model = fitted("l1", files, spec)
    export(model, tmp_path / "out", format)
    assert check(model, tmp_path / "out", files) == 0
