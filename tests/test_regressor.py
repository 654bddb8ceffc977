"""`OrdinalRegressor`: from rows of any kind to a run folder, answers, and an evaluation."""

import csv
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from datasets import load_dataset
from PIL import Image
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.metrics import r2_score
from sklearn.model_selection import GridSearchCV
from sklearn.utils import estimator_checks

import ordinalclip.regressor
from ordinalclip import OrdinalModel, OrdinalRegressor, Ranks
from ordinalclip.cli import main
from ordinalclip.config import RanksConfig, TrainConfig
from ordinalclip.images import BrokenImageError
from ordinalclip.pipeline import load_pipeline
from ordinalclip.run_folder import FolderOccupied, RunFolder

SMALL = {
    "unit": "%",
    "lr": 1e-3,
    "max_steps": 4,
    "batch_size": 8,
    "ranks": {"low": 0, "high": 100, "num": 21},
    "evaluation": {"report": False},
    "quiet": True,
}


@pytest.fixture(scope="module")
def gauges(tmp_path_factory):
    """Forty drawn thermometers and their labels.csv; two pictures of each patient."""
    folder = tmp_path_factory.mktemp("gauges")
    assert main(["make-gauges", str(folder), "--num", "40", "--seed", "3", "-q"]) == 0
    rows = list(csv.DictReader((folder / "labels.csv").open()))
    with (folder / "labels.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "age", "patient"])
        writer.writerows([row["image"], row["label"], f"p{number // 2}"] for number, row in enumerate(rows))
    return folder


@pytest.fixture
def frame(gauges):
    rows = pd.read_csv(gauges / "labels.csv")
    return rows.assign(path=[str(gauges / name) for name in rows["path"]])


@pytest.fixture(scope="module")
def fitted(gauges, tmp_path_factory):
    rows = pd.read_csv(gauges / "labels.csv")
    rows["path"] = [str(gauges / name) for name in rows["path"]]
    regressor = OrdinalRegressor(prompt="it shows", output_dir=tmp_path_factory.mktemp("fitted") / "run", **SMALL)
    return regressor.fit(rows, image="path", label="age", group="patient", validation=0.2)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # run folders without a name are made here


def test_a_frame_becomes_a_run_folder_as_the_command_writes_it(fitted, frame):
    folder = RunFolder(fitted.run_folder_)
    config = folder.read_config()
    assert folder.is_finished
    assert (config.method, config.head["prompt"]) == ("ordinalclip", "it shows")
    assert (config.data.source, config.data.group, config.ranks.unit) == ("memory", "patient", "%")
    assert config.train.lr == 1e-3
    assert fitted.metrics_ == folder.read_metrics()
    assert fitted.metrics_["num_train"] == 32
    assert "test" not in fitted.metrics_
    judged = set(folder.read_predictions("validation").names)
    patients = frame.set_index("path")["patient"]
    assert not set(patients[list(judged)]) & set(patients.drop(list(judged)))


def test_answers_are_those_of_the_pipeline_and_keep_the_index(fitted, frame):
    some = frame.iloc[[7, 3, 20]]
    answers = fitted.predict(some)
    assert answers.index.tolist() == [7, 3, 20]
    pipe = load_pipeline(str(fitted.run_folder_ / "model"))
    for row, path in zip(answers.itertuples(), some["path"], strict=True):
        said = pipe(path, top_k=21)
        assert row.value == pytest.approx(said["value"], abs=1e-5)
        assert (row.rank, row.name) == (said["rank"], said["name"])
        by_value = sorted(said["top"], key=lambda entry: entry["value"])
        np.testing.assert_allclose(row.probabilities, [entry["probability"] for entry in by_value], atol=1e-5)


def test_every_kind_of_rows_gives_the_same_answers(fitted, gauges, frame, tmp_path):
    expected = fitted.predict(frame)["value"].to_numpy()
    pictures = [Image.open(path).convert("RGB") for path in frame["path"]]
    dataset = load_dataset("csv", data_files=str(gauges / "labels.csv"), split="train", cache_dir=str(tmp_path / "c"))
    dataset = dataset.map(lambda row: {"path": str(gauges / row["path"])})
    kinds = {
        "table": gauges / "labels.csv",
        "paths": list(frame["path"]),
        "pictures": pictures,
        "arrays": np.stack([np.asarray(each) for each in pictures]),
        "frame of pictures": pd.DataFrame({"path": pictures}),
        "data set": dataset,
        "bytes": [Path(path).read_bytes() for path in frame["path"]],
    }
    for kind, rows in kinds.items():
        np.testing.assert_allclose(fitted.predict(rows)["value"], expected, atol=1e-5, err_msg=kind)
    folder = fitted.predict(str(gauges))
    names = [Path(path).name for path in frame["path"]]
    np.testing.assert_allclose(folder["value"][names], expected, atol=1e-5)
    some = frame["path"][[9, 4]]
    assert fitted.predict(some).index.tolist() == [9, 4]


def test_all_ways_to_hand_over_training_rows_train_the_same_model(gauges, frame):
    dataset = load_dataset("csv", data_files=str(gauges / "labels.csv"), split="train")
    dataset = dataset.map(lambda row: {"path": str(gauges / row["path"])})
    columns = {"image": "path", "label": "age", "group": "patient"}
    losses = []
    for rows in (frame, dataset, str(gauges / "labels.csv")):
        run = OrdinalRegressor(**SMALL).fit(rows, **columns)
        losses.append([entry["loss"] for entry in RunFolder(run.run_folder_).read_log()])
    assert losses[0] == losses[1] == losses[2]
    alone = [OrdinalRegressor(**SMALL).fit(rows, frame["age"]) for rows in (list(frame["path"]), frame["path"])]
    logs = [[entry["loss"] for entry in RunFolder(run.run_folder_).read_log()] for run in alone]
    assert logs[0] == logs[1]


def test_parts_with_rows_of_their_own(frame):
    columns = {"image": "path", "label": "age"}
    run = OrdinalRegressor(**SMALL).fit(frame[:24], **columns, validation=frame[24:32], test=frame[32:])
    assert (run.metrics_["num_train"], run.metrics_["validation"]["num"], run.metrics_["test"]["num"]) == (24, 8, 8)
    with pytest.raises(ValueError, match="validation has rows of its own: test needs rows, too, or 0"):
        OrdinalRegressor(**SMALL).fit(frame[:24], **columns, validation=frame[24:32], test=0.2)
    with pytest.raises(ValueError, match="the same picture"):
        OrdinalRegressor(**SMALL).fit(frame[:24], **columns, validation=frame[20:32])
    assert OrdinalRegressor(**SMALL).fit(frame, **columns, validation=0).metrics_["num_train"] == 40


def test_words_are_labels_in_the_order_that_was_said(frame):
    words = frame.assign(age=np.where(frame["age"] < 40, "low", np.where(frame["age"] < 70, "middle", "high")))
    options = {key: value for key, value in SMALL.items() if key not in ("ranks", "unit")}
    with pytest.raises(ValueError, match=r"are words: .* Their order is yours to say"):
        OrdinalRegressor(**options).fit(words, image="path", label="age")
    named = OrdinalRegressor(names=["low", "middle", "high"], **options).fit(words, image="path", label="age")
    assert set(named.predict(words)["name"]) <= {"low", "middle", "high"}
    assert named.evaluate(words)["num"] == 40


def test_an_evaluation_is_a_mapping_with_intervals_and_groups(fitted, frame, gauges, tmp_path):
    found = fitted.evaluate(frame, by=["patient"], out=tmp_path / "out")
    low, high = found["intervals"]["mae"]
    assert low <= found["metrics"]["mae"] <= high
    assert len(found["groups"]["patient"]) == 20
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["metrics"] == found["metrics"]
    answers = fitted.predict(frame)["value"]
    assert found["metrics"]["mae"] == pytest.approx(np.abs(answers - frame["age"]).mean(), abs=1e-5)
    total = ((frame["age"] - frame["age"].mean()) ** 2).sum()
    assert fitted.score(frame) == pytest.approx(1 - ((answers - frame["age"]) ** 2).sum() / total, abs=1e-5)
    assert fitted.score(list(frame["path"]), frame["age"]) == fitted.score(frame)
    assert fitted.evaluate(gauges / "labels.csv")["metrics"] == found["metrics"]


def test_a_model_comes_back_by_its_run_its_folder_and_what_it_saves(fitted, frame, tmp_path):
    expected = fitted.predict(frame)
    fitted.save_pretrained(tmp_path / "saved")
    run = OrdinalRegressor.from_pretrained(fitted.run_folder_)
    assert (run.lr, run.max_steps, run.unit, run.train, run.data) == (1e-3, 4, "%", None, None)
    folder = OrdinalRegressor.from_pretrained(tmp_path / "saved", image="path")
    for again in (run, folder):
        pd.testing.assert_frame_equal(again.predict(frame), expected)
    once_more = clone(run).set_params(output_dir=tmp_path / "again")
    once_more.fit(frame, image="path", label="age", group="patient", validation=0.2)
    assert RunFolder(once_more.run_folder_).read_log()[0]["loss"] == RunFolder(fitted.run_folder_).read_log()[0]["loss"]
    with pytest.raises(FileNotFoundError, match="no such folder"):
        OrdinalRegressor.from_pretrained(tmp_path / "nothing")


def test_a_run_of_a_table_reads_other_tables_from_where_they_lie(gauges, tmp_path):
    keys = {"root": str(gauges), "missing": "drop"}
    run = OrdinalRegressor(**SMALL, data=keys).fit(gauges / "labels.csv", image="path", label="age")
    (tmp_path / "other").mkdir()
    rows = pd.read_csv(gauges / "labels.csv")[:6]
    for name, source in zip(rows["path"], rows["path"][::-1], strict=True):  # other pictures of the same names
        (tmp_path / "other" / name).write_bytes((gauges / source).read_bytes())
    rows.to_csv(tmp_path / "other" / "new.csv", index=False)
    again = OrdinalRegressor.from_pretrained(run.run_folder_)
    there = again.predict(tmp_path / "other" / "new.csv")["value"].to_numpy()
    here = again.predict(gauges / "labels.csv")["value"].to_numpy()[:6]
    np.testing.assert_allclose(there, here[::-1], atol=1e-5)
    assert again.evaluate(tmp_path / "other" / "new.csv")["metrics"]["mae"] == pytest.approx(
        np.abs(there - rows["age"]).mean(), abs=1e-5
    )


def test_score_is_of_what_predict_answers(frame):
    options = {**SMALL, "evaluation": {"report": False, "decoding": "expectation"}}
    run = OrdinalRegressor(**options).fit(frame, image="path", label="age")
    answers = run.predict(frame)["value"]
    assert run.score(frame) == pytest.approx(r2_score(frame["age"], answers), abs=1e-5)
    assert answers.nunique() > 3


def test_numbers_of_numpy_and_paths_are_taken(frame, gauges):
    options = {**SMALL, "max_steps": np.int64(2), "lr": np.float64(1e-3), "data": {"root": gauges}, "seed": np.int64(2)}
    run = OrdinalRegressor(**options).fit(frame, image="path", label="age", validation=np.float32(0.25))
    assert run.metrics_["num_train"] == 30


def test_runs_are_resumed_and_never_replaced_unasked(fitted, frame):
    columns = {"image": "path", "label": "age", "group": "patient", "validation": 0.2}
    again = clone(fitted)
    with pytest.raises(FolderOccupied):
        again.fit(frame, **columns)
    before = RunFolder(fitted.run_folder_).read_log()
    again.set_params(resume=True).fit(frame, **columns)
    assert RunFolder(fitted.run_folder_).read_log() == before  # nothing was left to do
    first, second = (OrdinalRegressor(**SMALL).fit(frame, image="path", label="age") for _ in range(2))
    assert first.run_folder_ != second.run_folder_


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bacth_size": 3}, TypeError, r"OrdinalRegressor has no argument 'bacth_size'; nearest: batch_size"),
        ({"method": "ordinalklip"}, ValueError, r"ordinalklip.*nearest: ordinalclip"),
        ({"train": {"lrr": 3}}, ValueError, r"train.lrr is not a key; nearest: train.lr"),
        ({"lr": -1.0}, ValueError, r"train.lr: .*greater than 0, got -1"),
        ({"lr": 1e-3, "train": {"lr": 3e-3}}, ValueError, r"train.lr is given twice, as 0.003 and as 0.001"),
        ({"epochs": 2, "max_steps": 3}, ValueError, r"train.max_steps and train.epochs are both given"),
        ({"epochs": 2, "train": {"max_steps": 3}}, ValueError, r"train.max_steps and train.epochs are both given"),
        ({"names": "low"}, ValueError, r"ranks.names: .*list, got 'low'"),
        ({"train": 3}, ValueError, r"train is a dict or a section of ordinalclip.config, got int"),
        ({"method": "l1", "prompt": "it shows"}, ValueError, r"prompt: method l1 has no prompts"),
        ({"head": {"promt": "it shows"}}, ValueError, r"head.promt.*nearest: .*prompt"),
        ({"backbone": "tinny"}, ValueError, r"tinny"),
    ],
)
def test_wrong_arguments_are_named_with_the_nearest(frame, options, error, message):
    with pytest.raises(error, match=message):
        OrdinalRegressor(**options).fit(frame, image="path", label="age")
    assert not Path("runs").exists() or not any(Path("runs").iterdir())


def test_wrong_rows_are_one_clear_error(fitted, frame, tmp_path):
    new = OrdinalRegressor(**SMALL)
    with pytest.raises(TypeError, match="fit has no argument 'lable'; nearest: label"):
        new.fit(frame, lable="age")
    with pytest.raises(ValueError, match=r"column 'label' \(data.label_column\) is missing; it has 'path', 'age'"):
        new.fit(frame, image="path")
    with pytest.raises(ValueError, match=r"40 pictures and labels of shape \(39,\)"):
        new.fit(list(frame["path"]), frame["age"][:39])
    with pytest.raises(ValueError, match="pictures and y have different indexes"):
        new.fit(frame["path"], frame["age"][::-1])
    with pytest.raises(ValueError, match="y is given, and a column 'age' is there, too"):
        new.fit(frame, frame["age"], image="path", label="age")
    with pytest.raises(ValueError, match=r"validation is a share from 0 to below 1, or rows, got 20"):
        new.fit(frame, image="path", label="age", validation=20)
    divided = OrdinalRegressor(**SMALL, data={"split": (0.5, 0.25, 0.25)})
    with pytest.raises(ValueError, match=r"validation is given, and data.split, which divides the rows, too"):
        divided.fit(frame, image="path", label="age", validation=0.4)
    for rows in ({"train": frame}, Image.new("RGB", (8, 8)), np.zeros((8, 8, 3), np.uint8), None):
        with pytest.raises(ValueError, match=r"rows are a pandas frame, a datasets.Dataset, .* got a"):
            new.fit(rows)
    with pytest.raises(NotFittedError):
        new.predict(frame)
    with pytest.raises(FileNotFoundError, match=r"nowhere.csv: no such table or folder"):
        new.fit("nowhere.csv")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    rows = pd.DataFrame({"path": [frame["path"][0], str(tmp_path / "broken.png")]})
    with pytest.raises(BrokenImageError, match=r"broken\.png"):
        fitted.predict(rows)
    kept = fitted.predict(rows, errors="keep")
    assert kept["error"].notna().tolist() == [False, True]
    assert np.isnan(kept["value"][1])
    assert pd.isna(kept["rank"][1])


def test_sections_may_be_objects_that_editors_complete(frame):
    options = {key: value for key, value in SMALL.items() if key not in ("ranks", "unit")}
    ranks, training = RanksConfig(low=0, high=100, num=21, unit="%"), TrainConfig(ema=0.9)
    run = OrdinalRegressor(**options, ranks=ranks, train=training).fit(frame, image="path", label="age")
    config = RunFolder(run.run_folder_).read_config()
    assert (config.train.ema, config.train.lr, config.ranks.unit) == (0.9, 1e-3, "%")


CHECKS = (
    "check_estimator_cloneable",
    "check_estimator_repr",
    "check_no_attributes_set_in_init",
    "check_parameters_default_constructible",
    "check_get_params_invariance",
    "check_set_params",
    "check_mixin_order",
    "check_estimator_tags_renamed",
    "check_valid_tag_types",
)


@pytest.mark.parametrize("name", CHECKS)
def test_estimator_checks_that_need_no_table_of_numbers(name):
    check = getattr(estimator_checks, name)
    given = OrdinalRegressor if name == "check_parameters_default_constructible" else OrdinalRegressor()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check("OrdinalRegressor", given if not isinstance(given, type) else given())


@pytest.mark.slow
def test_a_search_of_scikit_learn_tunes_it(frame):
    search = GridSearchCV(OrdinalRegressor(**SMALL), {"max_steps": [1, 3]}, cv=2, refit=True)
    search.fit(np.array(frame["path"]), np.array(frame["age"]))
    assert search.best_params_["max_steps"] in (1, 3)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert len(list(Path("runs").iterdir())) == 5  # two folds of two settings, and the best on all


SCRIPT = """
import sys
import pandas as pd
from ordinalclip import OrdinalRegressor
from ordinalclip.config import TrainConfig

def fit(table, folder):
    rows = pd.read_csv(table)
    rows["path"] = [f"{table.rpartition('/')[0]}/{name}" for name in rows["path"]]
    options = dict(lr=1e-3, max_steps=4, batch_size=8, ranks=dict(low=0, high=100, num=21), quiet=True)
    run = OrdinalRegressor(output_dir=folder or None, evaluation=dict(report=False), **options)
    run.fit(rows, image="path", label="age", group="patient")
    print("folder", run.run_folder_, len(run.predict(rows[:3])))

if __name__ == "__main__":
    if sys.argv[3] == "notebook":
        from accelerate import notebook_launcher
        notebook_launcher(fit, args=tuple(sys.argv[1:3]), num_processes=2)
    else:
        fit(*sys.argv[1:3])
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["notebook", "torchrun"])
def test_on_two_processes_it_is_the_run_of_one(gauges, frame, tmp_path, how):
    script, folder = tmp_path / "script.py", tmp_path / "two"
    script.write_text(SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2"] if how == "torchrun" else []
    given = "" if how == "torchrun" else str(folder)  # without a name: the same new folder on both
    call = [sys.executable, *launcher, str(script), str(gauges / "labels.csv"), given, how]
    done = subprocess.run(call, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=_environment())
    assert done.returncode == 0, done.stderr[-2000:]
    folders = {line.split()[1] for line in done.stdout.splitlines() if line.startswith("folder")}
    assert len(folders) == 1
    alone = OrdinalRegressor(**{**SMALL, "unit": None}).fit(frame, image="path", label="age", group="patient")
    two = RunFolder(tmp_path / folders.pop())
    assert two.read_provenance()["processes"] == 2
    expected = [entry["loss"] for entry in RunFolder(alone.run_folder_).read_log()]
    np.testing.assert_allclose([entry["loss"] for entry in two.read_log()], expected, rtol=1e-5)


def _environment():
    root = Path(ordinalclip.regressor.__file__).parents[1]
    return {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def test_the_trainer_of_transformers_trains_our_model(frame, tmp_path):
    ranks = Ranks.linear(0, 100, 21, unit="%")
    ages = frame["age"].to_numpy()
    model = OrdinalModel.build("tiny", ranks, "ordinalclip", label_mean=ages.mean(), label_std=ages.std())
    processor = model.image_processor

    def collate(rows):
        pixels = processor(images=[row["path"] for row in rows], return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": torch.tensor([row["age"] for row in rows])}

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "trainer"),
        max_steps=3,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        remove_unused_columns=False,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    trainer = transformers.Trainer(model, arguments, collate, frame.to_dict("records"))
    assert np.isfinite(trainer.train().training_loss)
    frozen = {name for name in before if name.startswith("head.text.")}
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert any(name.startswith("encoder") for name in changed)
    assert any(name.startswith("head") for name in changed)
    assert not changed & frozen
    model.save_pretrained(tmp_path / "model")
    answers = OrdinalRegressor.from_pretrained(tmp_path / "model", image="path").predict(frame[:5])
    pixels = processor(images=list(frame["path"][:5]), return_tensors="pt")["pixel_values"]
    np.testing.assert_allclose(answers["value"], model.deploy().predict(pixels).value.numpy(), atol=1e-4)
