"""A finished model on data from elsewhere: every row is scored, nothing of the run is changed."""

import csv
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset

from ordinalclip.cli import main
from ordinalclip.config import load_config
from ordinalclip.external import evaluate_external
from ordinalclip.metrics import bootstrap_interval, macro_mae, mean_absolute_error
from ordinalclip.model import OrdinalModel
from ordinalclip.pipeline import load_pipeline
from ordinalclip.run_folder import RunFolder
from ordinalclip.runs import train

STEPS = ("train.max_steps=6", "train.batch_size=8", "train.lr=1e-3", "evaluation.report=false")


def write_table(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A run on drawn thermometers in a folder, and pictures from elsewhere, with sites and patients."""
    folder = tmp_path_factory.mktemp("external")
    for name, seed, number in (("ours", 1, 60), ("theirs", 2, 30)):
        assert main(["make-gauges", str(folder / name), "--num", str(number), "--seed", str(seed), "-q"]) == 0
    data = [f"data.root={folder}/ours", "data.source=table", "data.table=labels.csv"]
    ranks = ["ranks.low=0", "ranks.high=100", "ranks.num=21", "ranks.unit=%"]
    train(load_config(None, [*data, *ranks, *STEPS, f"output_dir={folder}/run"]), quiet=True)
    rows = list(csv.DictReader((folder / "theirs" / "labels.csv").open()))
    rows = [
        {"patient": f"{number:04d}", "site": ["north", "south", ""][number % 3], **row}
        for number, row in enumerate(rows)
    ]
    write_table(folder / "theirs" / "new.csv", rows)
    return folder


def content_of(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_every_row_is_scored_as_the_pipeline_answers_and_the_run_stays_as_it_is(here, tmp_path):
    before = content_of(here / "run")
    found = evaluate_external(
        here / "run", here / "theirs" / "new.csv", by=["site"], out=tmp_path / "out", quiet=True
    ).to_dict()
    assert content_of(here / "run") == before
    rows = list(csv.DictReader((here / "theirs" / "new.csv").open()))
    pipe = load_pipeline(str(here / "run" / "model"))
    answers = np.array([pipe(str(here / "theirs" / row["image"]))["value"] for row in rows])
    labels = np.array([float(row["label"]) for row in rows])
    assert found["num"] == 30
    assert found["metrics"]["mae"] == pytest.approx(mean_absolute_error(answers, labels), abs=1e-4)
    expected = bootstrap_interval(mean_absolute_error, answers, labels)
    assert found["intervals"]["mae"] == pytest.approx(list(expected), abs=1e-3)
    assert list(found["groups"]["site"]) == ["north", "south", "(missing)"]
    north = np.array([row["site"] == "north" for row in rows])
    group = found["groups"]["site"]["north"]
    assert group["num"] == north.sum() == 10
    assert group["metrics"]["mae"] == pytest.approx(mean_absolute_error(answers[north], labels[north]), abs=1e-4)
    ranks = np.round(labels[north] / 5)
    assert group["metrics"]["macro_mae"] == pytest.approx(macro_mae(answers[north], labels[north], ranks), abs=1e-4)
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == json.loads(json.dumps(found))
    table = pq.read_table(tmp_path / "out" / "predictions.parquet").to_pandas()
    assert table["patient"].tolist() == [row["patient"] for row in rows]  # zeros stay
    assert table["given label"].tolist() == [row["label"] for row in rows]
    np.testing.assert_allclose(table["median"], answers, atol=1e-4)
    groups = pd.read_csv(tmp_path / "out" / "groups.csv")
    assert groups["num"].tolist() == [10, 10, 10]
    assert {"mae", "mae_low", "mae_high"} <= set(groups)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "By site" in page
    assert "30 images, every row that has a label" in page


def test_a_model_folder_alone_and_rows_in_memory_give_the_same(here, tmp_path):
    shutil.copytree(here / "run" / "model", tmp_path / "model")
    table = here / "theirs" / "new.csv"
    whole = evaluate_external(here / "run", table, quiet=True)
    alone = evaluate_external(tmp_path / "model", table, quiet=True)
    frame = pd.read_csv(table, dtype={"patient": str})
    frame["image"] = [str(here / "theirs" / name) for name in frame["image"]]
    held = evaluate_external(OrdinalModel.from_pretrained(tmp_path / "model"), frame, quiet=True)
    for other in (alone, held):
        assert other.score.metrics == whole.score.metrics
        assert [each.text for each in other.drift] == [each.text for each in whole.drift]
        assert any("is not known: its run is not here" in note for note in other.notes)
    assert {each.what for each in whole.drift} == {"labels", "features"}
    (tmp_path / "model" / "reference.safetensors").unlink()
    forgetful = evaluate_external(tmp_path / "model", table, quiet=True)
    assert not forgetful.drift
    assert forgetful.constant is None
    assert sum("does not remember" in note for note in forgetful.notes) == 2


def test_pictures_that_the_model_has_learnt_from_are_counted(here):
    found = evaluate_external(here / "run", here / "ours" / "labels.csv", quiet=True)
    assert len(found.images) == 60
    assert any(note.startswith("WARNING: 45 of these 60 pictures are in the run's") for note in found.notes)
    assert not any(
        "in the run's" in note for note in evaluate_external(here / "run", here / "theirs" / "new.csv").notes
    )


def test_a_picture_that_is_there_twice_with_two_labels_is_said(here, tmp_path):
    rows = list(csv.DictReader((here / "theirs" / "new.csv").open()))
    rows.append({**rows[0], "label": "99"})
    found = evaluate_external(here / "run", write_table(tmp_path / "t.csv", rows), here / "theirs", quiet=True)
    assert len(found.images) == 31
    assert any(
        "1 rows are of pictures that other rows have" in n and "1 pictures have two labels" in n for n in found.notes
    )


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"label": "140"}, (), r"new.csv, row 4 \(line 5\), .*: label 140 is outside the ranks 0 to 100"),
        (
            {"label": ""},
            (),
            r"row 4 \(line 5\): the label in column 'label' is missing, in 1 of 30 rows; data.missing=drop",
        ),
        ({"label": "much"}, (), r"row 4 \(line 5\): label 'much' in column 'label' is not a number"),
        ({"image": "gone.png"}, (), r"1 of 30 images do not exist"),
        ({}, ("data.label_column=age",), r"column 'age' \(data.label_column\) is missing; it has 'patient', 'site'"),
        (
            {},
            ("train.lr=1",),
            r"train.lr: of no effect here; choices: data.source",
        ),
        ({}, ("data.split_column=site",), r"data.split_column: of no effect here"),
        ({}, ("evaluation.decoding=argmax",), r"evaluation.decoding: of no effect here"),
        ({}, ("data.sufix=1",), r"data.sufix: of no effect here; nearest: data.suffix"),
    ],
)
def test_bad_rows_and_keys_are_one_clear_error(here, tmp_path, change, options, message):
    rows = list(csv.DictReader((here / "theirs" / "new.csv").open()))
    rows[3] |= change
    table = write_table(tmp_path / "new.csv", rows)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evaluate_external(here / "run", table, here / "theirs", overrides=options, out=tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


def test_groups(here, tmp_path):
    rows = list(csv.DictReader((here / "theirs" / "new.csv").open()))[:4]
    table = write_table(tmp_path / "few.csv", rows)
    arguments = here / "run", table, here / "theirs"
    found = evaluate_external(*arguments, by=["patient", "site"], out=tmp_path / "out", quiet=True)
    assert {column: list(each) for column, each in found.groups.items()} == {
        "patient": ["0000", "0001", "0002", "0003"],
        "site": ["north", "south", "(missing)"],
    }
    assert found.groups["patient"]["0000"].metrics["pearson"] is None  # of one picture
    assert not found.groups["patient"]["0000"].intervals
    assert "By patient" in (tmp_path / "out" / "report.html").read_text()


def test_columns_that_make_no_groups_are_refused(here, monkeypatch):
    arguments = here / "run", here / "theirs" / "new.csv"
    with pytest.raises(ValueError, match=r"column 'sex' \(by\) is missing; it has 'patient', 'site', 'image', 'label'"):
        evaluate_external(*arguments, by=["sex"], quiet=True)
    monkeypatch.setattr("ordinalclip.external.MOST_GROUPS", 29)
    with pytest.raises(ValueError, match=r"column 'patient' \(by\) has 30 values, at most 29 make groups"):
        evaluate_external(*arguments, by=["patient"], quiet=True)


def test_nothing_is_overwritten_but_an_evaluation_that_is_to_be(here, tmp_path, capsys):
    call = ["evaluate", str(here / "run"), "--data", str(here / "theirs" / "new.csv"), "-q", "--out"]
    assert main([*call, str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "30 images of" in said
    assert "MAE" in said
    assert "validation" not in said
    assert main([*call, str(tmp_path / "out")]) == 2
    assert "holds an evaluation already; overwrite replaces it" in capsys.readouterr().err
    assert main([*call, str(tmp_path / "out"), "--overwrite"]) == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    assert main([*call, str(tmp_path / "mine"), "--overwrite"]) == 2
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "all of it"
    assert main(["evaluate", str(here / "run"), "--by", "site"]) == 2
    assert "--by is of no effect without --data" in capsys.readouterr().err


def test_word_labels_folders_and_data_sets(tmp_path, image_folder):
    words = ["low", "middle", "high"]
    for number in range(6):
        target = tmp_path / "sorted" / words[number % 3]
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(image_folder / f"cell{number}.png", target)
    data = [f"data.root={image_folder}", "data.source=table", "data.table=labels.csv", "data.image_column=file"]
    names = ["data.label_column=grade", "ranks.values=[0, 1, 2]", f"ranks.names=[{', '.join(words)}]"]
    run = train(
        load_config(None, [*data, *names, *STEPS, "train.batch_size=2", f"output_dir={tmp_path}/run"]), quiet=True
    )
    folders = evaluate_external(
        run, tmp_path / "sorted", overrides=["data.image_column=image", "data.label_column=label"]
    )
    table = evaluate_external(run, image_folder / "labels.csv", quiet=True)
    assert folders.score.metrics["mae"] == pytest.approx(table.score.metrics["mae"])
    assert len(folders.images) == 6
    rows = load_dataset(
        "imagefolder", data_dir=str(tmp_path / "sorted"), split="train", cache_dir=str(tmp_path / "cache")
    )
    held = evaluate_external(run, rows, overrides=["data.image_column=image", "data.label_column=label"], quiet=True)
    assert held.score.metrics["mae"] == pytest.approx(table.score.metrics["mae"])
    keys = ["data.source=hub", "data.image_column=image", "data.label_column=label"]
    named = evaluate_external(run, tmp_path / "sorted", overrides=keys, quiet=True)
    assert named.score.metrics["mae"] == pytest.approx(table.score.metrics["mae"])
    wrong = tmp_path / "sorted" / "hihg"
    (tmp_path / "sorted" / "high").rename(wrong)
    with pytest.raises(ValueError, match=r"label 'hihg' is none of ranks.names; nearest: high"):
        evaluate_external(run, tmp_path / "sorted", overrides=["data.image_column=image", "data.label_column=label"])


@pytest.mark.slow
def test_two_processes_score_what_one_does(here, tmp_path):
    call = [
        "-m",
        "ordinalclip",
        "evaluate",
        str(here / "run"),
        "--data",
        str(here / "theirs" / "new.csv"),
        "-q",
        "--by",
    ]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launcher, *call, "site", "--out", str(tmp_path / "two")],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("30 images of") == 1
    two = json.loads((tmp_path / "two" / "evaluation.json").read_text())
    one = evaluate_external(here / "run", here / "theirs" / "new.csv", by=["site"], quiet=True).to_dict()
    for name, value in one["metrics"].items():
        assert two["metrics"][name] == pytest.approx(value, abs=1e-4)
    assert two["groups"]["site"]["north"]["num"] == 10
    assert two["drift"]["features"]["size"] == pytest.approx(one["drift"]["features"]["size"], abs=1e-4)


def test_an_evaluation_that_fails_loses_none_that_is_there(here, tmp_path):
    evaluate_external(here / "run", here / "theirs" / "new.csv", out=tmp_path / "out", quiet=True)
    before = content_of(tmp_path / "out")
    with pytest.raises(FileNotFoundError):
        evaluate_external(here / "run", here / "theirs" / "mew.csv", out=tmp_path / "out", overwrite=True, quiet=True)
    assert content_of(tmp_path / "out") == before


def test_paths_of_a_table_may_lead_anywhere_unless_a_root_is_given(here, tmp_path):
    rows = list(csv.DictReader((here / "theirs" / "new.csv").open()))
    table = write_table(tmp_path / "new.csv", [{**row, "image": str(here / "theirs" / row["image"])} for row in rows])
    whole = evaluate_external(here / "run", here / "theirs" / "new.csv", quiet=True)
    assert evaluate_external(here / "run", table, quiet=True).score.metrics == whole.score.metrics
    with pytest.raises(ValueError, match=r"leaves data.root="):
        evaluate_external(here / "run", table, tmp_path, quiet=True)


def test_a_model_in_memory_is_left_as_it_was(here):
    model = RunFolder(here / "run").read_model()
    model.train()
    modes = {name: module.training for name, module in model.named_modules()}
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    evaluate_external(model, here / "theirs" / "new.csv", quiet=True)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert any(modes.values())
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name])


def test_answers_that_are_no_numbers_are_an_error(here, monkeypatch):
    model = RunFolder(here / "run").read_model()
    with torch.no_grad():
        model.head.prototypes[0] = torch.nan
    with pytest.raises(ValueError, match=r"new.csv, row 1 .*: the model answers with a number that is not finite"):
        evaluate_external(model, here / "theirs" / "new.csv", quiet=True)


def test_other_data_than_the_run_had_is_not_compared_with(here, tmp_path):
    shutil.copytree(here / "ours", tmp_path / "ours")
    shutil.copytree(here / "run", tmp_path / "run")
    config = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(config.replace(f"{here}/ours", f"{tmp_path}/ours"))
    table = here / "ours" / "labels.csv"
    assert any("are in the run's" in note for note in evaluate_external(tmp_path / "run", table, quiet=True).notes)
    labels = tmp_path / "ours" / "labels.csv"
    labels.write_text("".join(labels.read_text().splitlines(keepends=True)[:40]))
    notes = evaluate_external(tmp_path / "run", table, quiet=True).notes
    assert any("is not known: the train part has changed" in note for note in notes)


def test_no_rows_and_words_that_the_ranks_do_not_have(here, tmp_path):
    frame = pd.read_csv(here / "theirs" / "new.csv")
    with pytest.raises(ValueError, match="data: has no rows"):
        evaluate_external(here / "run", frame[:0], quiet=True)
    frame["image"] = [str(here / "theirs" / name) for name in frame["image"]]
    with pytest.raises(ValueError, match=r"are words: .*; the model's ranks are numbers, 0 to 100"):
        evaluate_external(here / "run", frame.assign(label=["low", "high"] * 15), quiet=True)
