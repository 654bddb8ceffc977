"""The command line as a person uses it."""

import errno
import io
import json
import os
import re
import sys

import numpy as np
import pytest
import torch
import yaml
from torch.nn.functional import normalize

from ordinalclip.cli import main
from ordinalclip.config import RunConfig, flat_keys
from ordinalclip.gauges import draw
from ordinalclip.model import OrdinalModel
from ordinalclip.ranks import Ranks
from ordinalclip.sections import describe

BASE = {
    "data": {"num_train": 16, "num_validation": 8, "num_test": 8},
    "ranks": {"low": 0, "high": 100, "num": 11, "unit": "%"},
    "train": {"max_steps": 2, "batch_size": 8},
}


def test_train_evaluate_predict(tmp_path, capsys):
    run = tmp_path / "run"
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({**BASE, "output_dir": str(run)}))
    assert main(["train", str(config), "--quiet", "evaluation.test=false"]) == 0
    printed = capsys.readouterr().out
    assert "validation: num 8, mae" in printed
    assert f"run folder: {run}" in printed
    assert main(["evaluate", str(run), "--quiet"]) == 0
    assert "test: num 8, mae" in capsys.readouterr().out

    pictures = tmp_path / "pictures"
    assert main(["make-gauges", str(pictures), "--num", "3", "--quiet"]) == 0
    assert len((pictures / "labels.csv").read_text().splitlines()) == 4
    capsys.readouterr()
    images = [str(pictures / "thermometer-0000.png"), str(pictures)]
    assert main(["predict", *images, "--model", str(run), "--quiet"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0][-8:] for line in lines] == ["0000.png", "0000.png", "0001.png", "0002.png"]
    assert all(" %\t(" in line for line in lines)
    assert main(["predict", images[0], "--model", str(run), "--json", "--top", "2", "--quiet"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["file"] == images[0]
    assert len(answer["top"]) == 2


@pytest.mark.parametrize("decoding", ["median", "expectation"])
def test_predict_says_the_names_of_ranks_that_have_them(tmp_path, capsys, decoding):
    """Alone where the value is that of a rank; between ranks with the value."""
    torch.manual_seed(0)
    ranks = Ranks((0, 1, 5), ("whole", "cracked", "broken"), unit="grade")
    OrdinalModel.build("tiny", ranks, "prototypes", decoding=decoding).save_pretrained(tmp_path / "model")
    assert main(["make-gauges", str(tmp_path / "pictures"), "--num", "2", "--quiet"]) == 0
    call = ["predict", str(tmp_path / "pictures"), "--model", str(tmp_path / "model"), "--quiet"]
    assert main([*call, "--json"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()[1:]]
    assert main(call) == 0
    said = [line.split("\t")[1] for line in capsys.readouterr().out.splitlines()]
    between = " ({value:.4g} grade)" if decoding == "expectation" else ""
    assert said == [answer["name"] + between.format(**answer) for answer in answers]


def test_predict_shows_the_answer_among_the_likeliest_ranks(tmp_path, capsys):
    """The median of 40 % 0, 15 % 1 and 45 % 2 is 1, the least likely."""
    torch.manual_seed(0)
    model = OrdinalModel.build("tiny", Ranks((0, 1, 2)), "prototypes").eval()
    picture = tmp_path / "gauge.png"
    draw("dial", 50.0, np.random.default_rng(0)).save(picture)
    pixels = model.image_processor([str(picture)], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        seen, aside = normalize(model.encoder(pixels), dim=1)[0], torch.randn(model.head.prototypes.shape[1])
        aside = normalize(aside - (aside @ seen) * seen, dim=0)
        cosines = (torch.tensor([0.40, 0.15, 0.45]).log() / model.head.logit_scale.exp())[:, None]
        model.head.prototypes.copy_(cosines * seen + (1 - cosines.square()).sqrt() * aside)
    model.save_pretrained(tmp_path / "model")
    call = ["predict", str(picture), "--model", str(tmp_path / "model"), "--quiet", "--top"]
    for top, shown in (("1", "(2 45%, 1 15%)"), ("2", "(2 45%, 0 40%, 1 15%)"), ("3", "(2 45%, 0 40%, 1 15%)")):
        assert main([*call, top]) == 0
        assert capsys.readouterr().out.rstrip().split("\t")[1:] == ["1", shown]


def test_a_mistyped_folder_of_a_model_is_not_looked_for_elsewhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ordinalclip.processing.cached_file", lambda *_, **__: pytest.fail("the hub is asked"))
    (tmp_path / "runs" / "elpv").mkdir(parents=True)
    (tmp_path / "a.png").touch()
    assert main(["predict", "a.png", "--model", "runs/elvp"]) == 2
    assert capsys.readouterr().err == "ordinalclip: runs/elvp: no such folder in runs (nearest: elpv)\n"


def test_check_data(image_folder, tmp_path, capsys):
    config = tmp_path / "data.yaml"
    data = {"source": "table", "root": str(image_folder), "table": "labels.csv", "split": [1, 0, 0]}
    config.write_text(yaml.safe_dump({"data": {**data, "image_column": "file", "label_column": "grade"}}))
    assert main(["check-data", str(config), "--quiet"]) == 0
    assert "train: 6 images, labels 0 to 2, 0 broken" in capsys.readouterr().out
    (image_folder / "cell3.png").write_text("text")
    assert main(["check-data", str(config), "--quiet"]) == 1
    printed = capsys.readouterr().out
    assert "cell3.png: not a readable image" in printed
    assert "1 broken" in printed


def test_wrong_calls_exit_with_two_and_one_line(tmp_path, capsys):
    for arguments, message in (
        (["train", "default", "trian.lr=1"], "trian is not a key; nearest: train"),
        (["train", str(tmp_path / "none.yaml")], "no such configuration file"),
        (["evaluate", str(tmp_path)], "no finished run"),
        (["predict", str(tmp_path / "a.png"), "--model", str(tmp_path)], "no such image"),
        (["compare", str(tmp_path / "none.yaml")], "no such configuration file"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.startswith("ordinalclip: ")
        assert len(error.splitlines()) == 1


@pytest.mark.parametrize("buffering", [-1, 1])
def test_nobody_reading_the_output_is_no_failure(tmp_path, monkeypatch, capsys, buffering):
    """As in `ordinalclip make-gauges ... | true`, noticed by a line or at the end; another broken pipe is a failure."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", buffering) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(["make-gauges", str(tmp_path / "a"), "--num", "1", "--quiet"]) == 0
    assert (tmp_path / "a" / "labels.csv").is_file()
    assert capsys.readouterr().err == ""


def test_a_pipe_of_something_else_or_a_full_disk_is_a_failure(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise BrokenPipeError(errno.EPIPE, "worker")

    with monkeypatch.context() as patched:
        patched.setattr("ordinalclip.files.write_text", fail)
        assert main(["make-gauges", str(tmp_path / "a"), "--num", "1", "--quiet"]) == 2
    assert "worker" in capsys.readouterr().err
    if os.path.exists("/dev/full"):
        with open("/dev/full", "w") as stream:
            monkeypatch.setattr(sys, "stdout", stream)
            assert main(["make-gauges", str(tmp_path / "b"), "--num", "1", "--quiet"]) == 2
        assert "No space left" in capsys.readouterr().err


def test_help_documents_every_key(capsys):
    """A line `key (default): description` for every key of a run's config.yaml; `methods` has those of a method."""
    with pytest.raises(SystemExit) as left:
        main(["train", "--help"])
    assert left.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    documented = {}
    for line in lines:
        if found := re.fullmatch(r"  ([a-z_.0-9]+) \((.*?)\)(?:: (.*))?", line):
            assert found[1] not in documented
            documented[found[1]] = (json.loads(found[2]), found[3])

    config = RunConfig()
    keys = flat_keys(config.model_dump(mode="json")) | {"head": {}}
    assert documented.keys() == keys.keys()
    for key, default in keys.items():
        assert documented[key][0] == default, key
    for key, default, description in describe(RunConfig):
        assert description.strip(), key
        assert documented[key] == (json.loads(json.dumps(default)), description)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("row 3: bad"), "row 3: bad"),
        (OSError(13, "Permission denied", "a.csv"), "a.csv: Permission denied"),
        (ImportError("pip install peft"), "pip install peft"),
        (MemoryError(), "out of memory: less at once needs less of it"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"), "out of memory: CUDA out of memory. Tried 2 GiB"),
        (RuntimeError("size mismatch\nmore\nlines"), "size mismatch (--debug shows where)"),
        (TypeError("no len()"), "unexpected TypeError: no len() (--debug shows where)"),
        (KeyError("x"), "unexpected KeyError: 'x' (--debug shows where)"),
        (ValueError("a\nb \x1b[31m"), "a\\nb \\x1b[31m"),
    ],
)
def test_any_error_is_one_line_and_debug_shows_where(tmp_path, monkeypatch, capsys, error, said):
    def fail(*_):
        raise error

    monkeypatch.setattr("ordinalclip.gauges.drawn_gauges", fail)
    assert main(["make-gauges", str(tmp_path), "-q"]) == 2
    assert capsys.readouterr().err == f"ordinalclip: {said}\n"
    assert main(["make-gauges", str(tmp_path), "-q", "--debug"]) == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert shown.endswith(f"ordinalclip: {said}\n")


def test_a_terminal_of_few_characters_shows_the_others_escaped(tmp_path, monkeypatch):
    for encoding, name in (("ascii", "caf\\xe9"), ("utf-8", "café")):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding))
        assert main(["make-gauges", str(tmp_path / "café"), "--num", "1", "-q", "--overwrite"]) == 0
        assert raw.getvalue().decode(encoding) == f"1 pictures and labels.csv in {tmp_path}/{name}\n"
