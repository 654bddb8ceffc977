"""Comparisons: what is run, chosen, tested and written."""

import csv
import json
import re

import numpy as np
import pytest
import yaml
from conftest import log_of
from scipy import stats

from ordinalclip.cli import main
from ordinalclip.compare import load_plan, run_plan
from ordinalclip.compare.outcome import _notes
from ordinalclip.metrics import best_residual_variance, d5
from ordinalclip.provenance import num_cores
from ordinalclip.results.record import points_of, read_run
from ordinalclip.run_folder import FolderOccupied, RunFolder
from ordinalclip.signals import Preempted

COMPARISON = {
    "seeds": [1, 2],
    "base": {
        "data": {"num_train": 16, "num_validation": 8, "num_test": 8},
        "ranks": {"low": 0, "high": 100, "num": 11, "unit": "%"},
        "train": {"max_steps": 2, "batch_size": 8},
        "evaluation": {"report": False},  # of the best runs, which take longer than the runs
    },
    "methods": {
        "OrdinalCLIP": {"base": {"method": "ordinalclip"}, "settings": [{"train.lr": 1e-3}, {"train.lr": 1e-5}]},
        "L1": {"base": {"method": "l1"}, "settings": [{"train.lr": 1e-3}, {"train.lr": 1e-4}]},
        "constant": {"base": {"method": "constant"}},
    },
}


@pytest.fixture
def comparison(tmp_path):
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump({**COMPARISON, "output_dir": str(tmp_path / "out")}))
    return path


def notes(path):
    return " ".join(_notes(load_plan(path), []))


def test_compare_is_resumable_and_reads_the_test_part_once(comparison, tmp_path, capsys):
    assert main(["compare", str(comparison), "--quiet"]) == 0
    table = capsys.readouterr().out
    for name in ("OrdinalCLIP", "L1", "constant"):
        assert f"| {name} |" in table
    folders = sorted((tmp_path / "out" / "runs").iterdir())
    assert len(folders) == 8  # two methods: two settings on the first seed, one on the second; the constant: two runs
    files = [folder / name for folder in folders for name in ("config.yaml", "metrics.json", "predictions.parquet")]
    times = {file: file.stat().st_mtime_ns for file in files}
    chosen = [folder for folder in folders if "test" in json.loads((folder / "metrics.json").read_text())]
    assert len(chosen) == 6  # three methods, one setting each, two seeds

    assert main(["compare", str(comparison), "--quiet"]) == 0
    again = capsys.readouterr().out
    assert again.splitlines()[:8] == table.splitlines()[:8]
    assert {file: file.stat().st_mtime_ns for file in files} == times


@pytest.mark.slow
def test_an_interrupted_comparison_goes_on_inside_the_run(comparison, tmp_path, monkeypatch):
    """It was stopped after the first checkpoint of its third run: what was done is not done again."""
    from ordinalclip.training.step import Learner

    content = yaml.safe_load(comparison.read_text())
    content["base"]["train"] |= {"eval_every": 1}
    comparison.write_text(yaml.safe_dump(content))
    whole = run_plan(load_plan(comparison, [f"output_dir={tmp_path}/whole"]), quiet=True).summaries
    steps, step = [], Learner.step

    def counted(self, number, *batch):
        if len(steps) == 5:
            raise KeyboardInterrupt
        steps.append(number)
        return step(self, number, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", counted)
        with pytest.raises(Preempted, match=r"out: told to stop; 2 of 8 runs are done, the same command goes on"):
            run_plan(load_plan(comparison), quiet=True)
    assert steps == [0, 1, 0, 1, 0]
    folder = RunFolder(tmp_path / "out/runs/ordinalclip-0-seed1")  # the file has the methods in order of name
    assert folder.state().kind == "interrupted"
    inode = RunFolder(tmp_path / "out/runs/l1-0-seed1").metrics.stat().st_ino
    again = run_plan(load_plan(comparison), quiet=True).summaries
    assert [row["mae"] for row in again] == [row["mae"] for row in whole]
    assert [row["step"] for row in folder.read_log()] == [1, 2]
    assert len(folder.read_provenance()["continued"]) == 1
    assert RunFolder(tmp_path / "out/runs/l1-0-seed1").metrics.stat().st_ino == inode  # not written again


def test_another_experiment_in_the_folder_is_refused_or_replaced(comparison, tmp_path, capsys):
    """One seed, and one setting for all, so that it is soon done."""
    content = yaml.safe_load(comparison.read_text()) | {"seeds": [1]}
    for method in content["methods"].values():
        method.pop("settings", None)
    comparison.write_text(yaml.safe_dump(content))
    run_plan(load_plan(comparison), quiet=True)
    before = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert main(["compare", str(comparison), "--quiet", "train.max_steps=3"]) == 2
    assert re.search(r"l1-0-seed1 holds a finished run.*train\.max_steps was 2, is 3", capsys.readouterr().err)
    assert {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()} == before
    run_plan(load_plan(comparison, ["train.max_steps=3", "overwrite=true"]), quiet=True)
    assert json.loads((tmp_path / "out/runs/ordinalclip-0-seed1/metrics.json").read_text())["steps"] == 3


@pytest.fixture
def grades(comparison, image_folder):
    """The comparison on a table of pictures."""
    content = yaml.safe_load(comparison.read_text()) | {"seeds": [1]}
    data = {"source": "table", "root": str(image_folder), "table": "labels.csv", "image_column": "file"}
    content["base"]["data"] = {**data, "label_column": "grade", "split": [0.34, 0.33, 0.33]}
    content["base"]["ranks"], content["base"]["train"]["batch_size"] = {"values": [0, 1, 2]}, 2
    content["methods"] = {"L1": {"base": {"method": "l1"}}, "constant": {"base": {"method": "constant"}}}
    comparison.write_text(yaml.safe_dump(content))
    return comparison


@pytest.mark.slow
def test_runs_on_other_data_are_not_taken_up(grades, image_folder, tmp_path):
    """A label was corrected between two calls: no table is made of both."""
    run_plan(load_plan(grades), quiet=True)
    labels = image_folder / "labels.csv"
    labels.write_text(labels.read_text().replace("cell0.png,0", "cell0.png,2"))
    with pytest.raises(FolderOccupied, match=r"holds a finished run.*another experiment \(the .* part has changed"):
        run_plan(load_plan(grades), quiet=True)
    before = RunFolder(tmp_path / "out/runs/l1-0-seed1").read_provenance()["data"]
    run_plan(load_plan(grades, ["overwrite=true"]), quiet=True)
    assert RunFolder(tmp_path / "out/runs/l1-0-seed1").read_provenance()["data"] != before
    run_plan(load_plan(grades), quiet=True)


def test_a_comparison_does_not_write_into_a_run(grades, tmp_path):
    run_plan(load_plan(grades), quiet=True)
    run = tmp_path / "out/runs/l1-0-seed1"
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    with pytest.raises(FolderOccupied, match=r"is the folder of a finished run.*give the comparison another one"):
        run_plan(load_plan(grades, [f"output_dir={run}"]), quiet=True)
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


LOST = """
import torch
from ordinalclip.heads import Head


class Lost(Head):
    \"\"\"Answers what is no number.\"\"\"

    learns = False

    def forward(self, features):
        return {"standardised": torch.full((len(features),), float("nan"))}

    def predict(self, outputs):
        return self.predict_value(outputs["standardised"])

    def loss(self, outputs, targets):
        return {"loss": outputs["standardised"].mean()}


class LostClasses(Head):
    \"\"\"A distribution of what is no number.\"\"\"

    learns = False

    def forward(self, features):
        return {"logits": torch.full((len(features), len(self.ranks)), float("nan"))}
"""


@pytest.mark.slow
def test_answers_that_are_no_numbers_leave_a_method_out(grades, tmp_path, monkeypatch):
    (tmp_path / "lost.py").write_text(LOST)
    monkeypatch.syspath_prepend(str(tmp_path))
    content = yaml.safe_load(grades.read_text())
    content["methods"]["lost"] = {"base": {"method": "lost:Lost"}}
    content["methods"]["lost classes"] = {"base": {"method": "lost:LostClasses"}}
    grades.write_text(yaml.safe_dump(content))
    for _ in range(2):  # the second time from what is in the folder
        outcome = run_plan(load_plan(grades), quiet=True)
        assert outcome.left_out == [
            "lost gives answers that are no numbers",
            "lost classes gives answers that are no numbers",
        ]
        assert {row["method"] for row in outcome.summaries} == {"L1", "constant"}


def test_several_processes_are_refused(grades, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="set jobs=N"):
        run_plan(load_plan(grades), quiet=True)


@pytest.mark.slow
def test_several_jobs_give_the_same_table(comparison, tmp_path, monkeypatch):
    from ordinalclip import executors

    started = []

    class Child(executors.Child):
        def __init__(self, task):
            started.append(task.threads)
            super().__init__(task)

    monkeypatch.setattr(executors, "Child", Child)
    rows = run_plan(load_plan(comparison), quiet=True).summaries
    assert started == []
    again = run_plan(load_plan(comparison, ["jobs=2", f"output_dir={tmp_path}/again"]), quiet=True).summaries
    assert started == [max(1, num_cores() // 2)] * 2
    for row, other in zip(rows, again, strict=True):
        assert other["mae"] == pytest.approx(row["mae"], rel=1e-3)


UNTAUGHT = """
import torch
from ordinalclip.heads import Head


class Middle(Head):
    \"\"\"Answers the middle rank; nothing learns.\"\"\"

    learns = False

    def forward(self, features):
        return {"logits": -(torch.arange(len(self.ranks)) - 5.0).abs().expand(len(features), -1)}

    def loss(self, outputs, targets):
        return {"loss": outputs["logits"].mean()}
"""


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_method_of_ones_own_that_learns_nothing_needs_no_settings(comparison, tmp_path, monkeypatch, jobs):
    """It is neither asked for as many settings as the others nor trained; several jobs find its module, too."""
    (tmp_path / "untaught.py").write_text(UNTAUGHT)
    monkeypatch.syspath_prepend(str(tmp_path))
    content = yaml.safe_load(comparison.read_text()) | {"jobs": jobs, "seeds": [1]}
    content["methods"] = {"middle": {"base": {"method": "untaught:Middle"}}, "L1": content["methods"]["L1"]}
    comparison.write_text(yaml.safe_dump(content))
    outcome = run_plan(load_plan(comparison), quiet=True)
    assert outcome.num_runs == 3
    rows = {row["method"]: row for row in outcome.summaries}
    predictions = RunFolder(tmp_path / "out/runs/middle-0-seed1").read_predictions("test")
    assert set(predictions.values) == {50.0}
    assert rows["middle"]["mae"] == pytest.approx(np.abs(predictions.labels - 50).mean())
    assert rows["middle"]["parameters"] == 0


def test_compare_chooses_by_validation_and_averages_over_seeds(comparison, tmp_path):
    rows = {row["method"]: row for row in run_plan(load_plan(comparison), quiet=True).summaries}
    for name, label in (("OrdinalCLIP", "ordinalclip"), ("L1", "l1")):
        figures = {
            (setting, seed): json.loads((tmp_path / f"out/runs/{label}-{setting}-seed{seed}/metrics.json").read_text())
            for setting in (0, 1)
            for seed in (1, 2)
            if (tmp_path / f"out/runs/{label}-{setting}-seed{seed}").is_dir()
        }
        tuning = [figures[setting, 1]["validation"]["mae"] for setting in (0, 1)]
        best = tuning.index(min(tuning))
        assert sorted(figures) == sorted([(0, 1), (1, 1), (best, 2)])
        (rate,) = COMPARISON["methods"][name]["settings"][best].values()
        assert rows[name]["setting"] == f"train.lr={rate}"
        maes = [figures[best, seed]["test"]["mae"] for seed in (1, 2)]
        assert rows[name]["mae"] == pytest.approx(sum(maes) / 2)
        assert rows[name]["mae_std"] == pytest.approx(abs(maes[0] - maes[1]) / 2**0.5)


def test_comparisons_that_are_not_fair_or_not_valid(comparison):
    content = yaml.safe_load(comparison.read_text())
    content["methods"]["L1"]["settings"] = [{}]
    comparison.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=r"same number of settings to try, got .*'OrdinalCLIP': 2"):
        load_plan(comparison)
    content["methods"]["l-1"] = content["methods"]["L.1"] = content["methods"].pop("L1")
    content["methods"]["l-1"]["settings"] = [{}, {}]
    comparison.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=r"too alike, runs would share .*l-1-0-seed1"):
        load_plan(comparison)
    content["methods"]["L1"] = content["methods"].pop("L.1")
    del content["methods"]["l-1"]
    content["methods"]["L1"]["settings"] = [{"train.lrr": 1}, {}]
    comparison.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=r"method 'L1', setting 0: train\.lrr is not a key; nearest: train\.lr"):
        load_plan(comparison)


@pytest.mark.slow
def test_variants_have_tables_of_their_own(comparison, tmp_path):
    content = yaml.safe_load(comparison.read_text())
    content["variants"] = {"all": {}, "half of it": {"data.train_share": 0.5, "train.max_steps": 1}}
    content["methods"]["OrdinalCLIP"]["settings"] = content["methods"]["L1"]["settings"] = [{}]
    comparison.write_text(yaml.safe_dump(content))
    rows = run_plan(load_plan(comparison), quiet=True).summaries
    assert [row["variant"] for row in rows] == ["all"] * 3 + ["half of it"] * 3
    figures = json.loads((tmp_path / "out/runs/half-of-it/l1-0-seed2/metrics.json").read_text())
    full = json.loads((tmp_path / "out/runs/all/l1-0-seed2/metrics.json").read_text())
    assert (figures["steps"], full["steps"]) == (1, 2)
    # half of every rank, one at least
    assert figures["train_counts"] == [max(1, round(count / 2)) if count else 0 for count in full["train_counts"]]
    table = (tmp_path / "out" / "table.md").read_text()
    assert table.index("### all") < table.index("### half of it")
    with (tmp_path / "out" / "results.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [float(row["mae"]) for row in read] == [row["mae"] for row in rows]
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count('id="mae_by_variant"') == page.count('id="mae_by_method-1"') == 1


@pytest.mark.slow
def test_finished_runs_leave_no_checkpoints_unless_asked(comparison, tmp_path):
    run_plan(load_plan(comparison), quiet=True)
    assert not list((tmp_path / "out" / "runs").glob("*/checkpoints"))
    assert not list((tmp_path / "out" / "runs").glob("*/model-last"))
    run_plan(load_plan(comparison, ["keep_checkpoints=true", f"output_dir={tmp_path}/kept"]), quiet=True)
    assert len(list((tmp_path / "kept" / "runs").glob("*/checkpoints"))) == 6  # the constant has none


def test_what_the_methods_do_not_share_is_said(comparison):
    assert "Not the same for all methods: train.lr." in notes(comparison)
    content = yaml.safe_load(comparison.read_text())
    content["methods"]["L1"]["settings"] = content["methods"]["OrdinalCLIP"]["settings"]
    comparison.write_text(yaml.safe_dump(content))
    assert "Not the same" not in notes(comparison)
    content["methods"]["L1"]["base"]["model"] = {"dropout": 0.1}
    comparison.write_text(yaml.safe_dump(content))
    assert "Not the same for all methods: model.dropout." in notes(comparison)


def test_settings_of_the_comparison_are_those_of_every_method_that_learns(comparison):
    content = yaml.safe_load(comparison.read_text())
    content["settings"] = [{"train.lr": 0.1}, {"train.lr": 0.2}]
    for method in content["methods"].values():
        method.pop("settings", None)
    comparison.write_text(yaml.safe_dump(content))
    loaded = load_plan(comparison)
    rates = {(name, number): run.train.lr for (_, name, number, seed), run in loaded.runs.items() if seed == 1}
    assert rates == {
        ("OrdinalCLIP", 0): 0.1,
        ("OrdinalCLIP", 1): 0.2,
        ("L1", 0): 0.1,
        ("L1", 1): 0.2,
        ("constant", 0): 1e-4,
    }
    assert "tried for every method: train.lr=0.1 | train.lr=0.2" in notes(comparison)


def searching(**changes):
    """The comparison with settings drawn for every method instead of said."""
    methods = {name: {"base": method["base"]} for name, method in COMPARISON["methods"].items()}
    search = {"train.lr": "1e-5..1e-2:log", "train.schedule": "cosine|constant"}
    return {**COMPARISON, "methods": methods, "search": search, "trials": 5, **changes}


def test_a_search_draws_the_same_settings_for_every_method_before_anything_runs(comparison):
    comparison.write_text(yaml.safe_dump(searching()))
    plan = load_plan(comparison)
    assert plan.settings["OrdinalCLIP"] == plan.settings["L1"]
    assert plan.settings["constant"] == [{}]
    assert len(plan.settings["L1"]) == 5
    assert len({setting["train.lr"] for setting in plan.settings["L1"]}) == 5
    assert {run.train.lr for place, run in plan.runs.items() if place.method == "L1"} == {
        setting["train.lr"] for setting in plan.settings["L1"]
    }
    comparison.write_text(yaml.safe_dump(searching(trials=7, seeds=[4, 5])))
    assert load_plan(comparison).settings["L1"][:5] == plan.settings["L1"]
    said = (
        "of 7 for each method, points of a Sobol sequence in train.lr=1e-5..1e-2:log, train.schedule=cosine|constant."
    )
    assert said in notes(comparison)


def test_a_method_may_search_elsewhere_but_not_more(comparison):
    content = searching()
    content["methods"]["L1"]["search"] = {"train.lr": "1e-4..1e-1:log"}
    comparison.write_text(yaml.safe_dump(content))
    plan = load_plan(comparison)
    assert [len(plan.settings[name]) for name in ("OrdinalCLIP", "L1")] == [5, 5]
    assert all(setting.keys() == {"train.lr"} for setting in plan.settings["L1"])
    assert "; train.lr=1e-4..1e-1:log (L1)." in notes(comparison) or "train.lr=1e-4..1e-1:log (L1);" in notes(
        comparison
    )
    content["methods"]["L1"] = {"base": {"method": "l1"}, "settings": [{"train.lr": 1e-3}]}
    comparison.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=r"the same number of settings to try, got .*'L1': 1"):
        load_plan(comparison)


def test_a_file_that_searches_replaces_the_settings_of_the_one_it_extends(comparison, tmp_path):
    comparison.write_text(yaml.safe_dump(searching()))
    (tmp_path / "says.yaml").write_text("extends: compare.yaml\nsettings: [{train.lr: 1.0e-3}]\n")
    assert load_plan(tmp_path / "says.yaml").settings["L1"] == [{"train.lr": 1e-3}]
    (tmp_path / "draws.yaml").write_text("extends: says.yaml\nsearch: {train.lr: 0.001..0.002}\ntrials: 2\n")
    assert len(load_plan(tmp_path / "draws.yaml").settings["L1"]) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trials": None}, r"search and trials belong together"),
        ({"search": None}, r"search and trials belong together"),
        ({"settings": [{"train.lr": 1e-3}]}, r"give either settings, to be tried as they are, or a search"),
        (
            {"search": {"train.lr": "0..1"}},
            r"method 'OrdinalCLIP', search train\.lr=0\.\.1: train\.lr: .*greater than 0",
        ),
        (
            {"search": {"head.interpolation": "linear|piecewise"}},
            r"method 'L1', search .*head\.interpolation is not a key",
        ),
        ({"search": {"train.lr": "1e-3"}}, r"train\.lr=1e-3: write a range, low\.\.high or"),
        ({"search": {"data.split_seed": "1|2"}}, r"data\.split_seed cannot be searched"),
    ],
)
def test_a_search_of_a_comparison_is_refused_by_name(comparison, changes, message):
    content = {key: value for key, value in searching(**changes).items() if value is not None}
    comparison.write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(ValueError, match=message):
        load_plan(comparison)


def test_a_key_that_a_comparison_searches_is_not_set_too(comparison):
    comparison.write_text(yaml.safe_dump(searching()))
    message = r"method 'L1': train\.lr is searched, as 1e-5\.\.1e-2:log, and set, to 1e-3$"
    with pytest.raises(ValueError, match=message):
        load_plan(comparison, ["train.lr=1e-3"])


@pytest.mark.slow
def test_the_table_against_what_the_runs_left(comparison, tmp_path):
    """Figures of the table, worked out again from predictions, logs and models."""
    rows = {row["method"]: row for row in run_plan(load_plan(comparison), quiet=True).summaries}
    maes = {}
    for name, label in (("OrdinalCLIP", "ordinalclip"), ("L1", "l1"), ("constant", "constant")):
        folders = [
            folder
            for folder in sorted((tmp_path / "out" / "runs").glob(f"{label}-*"))
            if "test" in json.loads((folder / "metrics.json").read_text())
        ]
        assert len(folders) == 2
        given = [RunFolder(folder).read_predictions("test") for folder in folders]
        row = rows[name]
        assert row["cs@5"] == pytest.approx(np.mean([(each.errors <= 5).mean() for each in given]))
        if name == "L1":  # the others may answer the same for every picture
            assert row["pearson"] == pytest.approx(np.mean([stats.pearsonr(g.values, g.labels)[0] for g in given]))
        if name != "constant":
            times = [step["processor_ms"] for folder in folders for step in log_of(folder)]
            assert row["processor_ms"] == pytest.approx(np.median(times))
        assert row["model_bytes"] == (folders[0] / "model" / "model.safetensors").stat().st_size
        maes[name] = np.mean([each.errors.mean() for each in given])
        record = read_run(folders[0])
        points = points_of(record.model, record.images, np.arange(8))
        both = [json.loads((folder / "metrics.json").read_text())["test"] for folder in folders]
        assert both[0]["d5"] == pytest.approx(d5(points, record.predictions.labels), rel=1e-4)
        assert row["d5"] == pytest.approx((both[0]["d5"] + both[1]["d5"]) / 2)
        again, _ = best_residual_variance(points, record.predictions.labels, [5])
        assert both[0]["residual_variance"] == pytest.approx(again, rel=1e-3)
    for name, row in rows.items():
        assert row["difference"] == pytest.approx(maes[name] - min(maes.values()))
        assert row["p"] is row["p_corrected"] is None  # of two seeds


@pytest.mark.slow
def test_a_run_that_diverges_is_the_worst_setting_and_a_method_that_does_is_left_out(comparison, tmp_path):
    content = yaml.safe_load(comparison.read_text())
    bad, good = {"train.lr": 100.0, "train.weight_decay": 100.0}, {"train.lr": 1e-3}
    content["base"]["train"]["max_steps"] = 4
    content["methods"]["L1"]["settings"] = [bad, good]
    content["methods"]["OrdinalCLIP"]["settings"] = [bad, bad | {"train.weight_decay": 99.0}]
    comparison.write_text(yaml.safe_dump(content))
    rows = {row["method"]: row for row in run_plan(load_plan(comparison), quiet=True).summaries}
    assert rows["L1"]["setting"] == "train.lr=0.001"
    assert set(rows) == {"L1", "constant"}
    table = (tmp_path / "out" / "table.md").read_text()
    assert re.search(r"OrdinalCLIP diverged: step \d: .*; learning rate \d+", table)
    again = run_plan(load_plan(comparison), quiet=True)  # nothing is tried once more
    assert again.left_out[0].startswith("OrdinalCLIP diverged: step ")
    assert next(row for row in again.summaries if row["method"] == "L1")["mae"] == rows["L1"]["mae"]
    with (tmp_path / "out" / "settings.csv").open() as file:
        tried = {(row["method"], row["number"], row["seed"]): row for row in csv.DictReader(file)}
    assert (
        len(tried) == 2 * 2 + 2 + 2
    )  # two settings on the first seed, the chosen ones on the other; the constant twice
    for (method, number, seed), row in tried.items():
        path = tmp_path / f"out/runs/{method.lower()}-{number}-seed{seed}"
        if row["train.lr"] == "100.0":
            assert row["failure"].startswith("diverged: step ")
            assert row["validation_mae"] == ""
        else:
            scores = json.loads((path / "metrics.json").read_text())["validation"]
            known = {name: value for name, value in scores.items() if not isinstance(value, dict)}
            assert {name: row[f"validation_{name}"] for name in known} == {
                name: "" if value is None else str(value) for name, value in known.items()
            }
    assert [(key[0], key[1]) for key, row in tried.items() if row["chosen"] == "True" and key[2] == "1"] == [
        ("L1", "1"),
        ("OrdinalCLIP", "0"),
        ("constant", "0"),
    ]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Every setting tried: 8 runs" in page
    assert page.count("diverged: step ") == 5  # below the tables and in the rows of the settings
    del content["methods"]["L1"], content["methods"]["constant"]
    comparison.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=r"nothing to compare: .*OrdinalCLIP diverged"):
        run_plan(load_plan(comparison), quiet=True)


@pytest.mark.slow
def test_new_evaluation_keys_do_not_train_again(comparison, tmp_path):
    run_plan(load_plan(comparison), quiet=True)
    model = tmp_path / "out/runs/l1-0-seed1/model/model.safetensors"
    written = model.stat().st_mtime_ns
    rows = run_plan(load_plan(comparison, ["evaluation.cs=[1, 30]"]), quiet=True).summaries
    assert {"cs@1", "cs@30"} < set(rows[0])
    assert "cs@5" not in rows[0]
    assert model.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [1, 1]}, r"seeds must be different, got \[1, 1\]"),
        ({"seeds": [-1]}, r"seeds\.0: .*greater than or equal to 0, got -1"),
        ({"jobs": "many"}, r"jobs.*'auto', got 'many'"),
        (
            {"methods": {"a": {"base": {"method": "l1", "data": {"split_seed": 7}}}}},
            r"methods\.a: data must be the same",
        ),
        (
            {"methods": {"a": {"base": {"method": "l1"}, "settings": [{"data.shots": 2}]}}},
            r"a: data\.shots must be the same",
        ),
        ({"variants": {"x": {"train.lr": 1e-5}}}, r"train\.lr is set by variants and by settings"),
        ({"variants": {"x": {"train.lrr": 1e-5}}}, r"variant 'x', method 'L1', setting 0: train\.lrr is not"),
    ],
)
def test_comparisons_that_make_no_sense(comparison, changes, message):
    content = yaml.safe_load(comparison.read_text())
    comparison.write_text(yaml.safe_dump(content | changes))
    with pytest.raises(ValueError, match=message):
        load_plan(comparison)


def test_overrides_reach_every_run_or_are_refused(comparison):
    content = yaml.safe_load(comparison.read_text())
    content["methods"]["L1"]["base"]["train"] = {"max_steps": 7}
    content["variants"] = {"x": {"data.shots": 1}, "y": {}}
    comparison.write_text(yaml.safe_dump(content))
    loaded = load_plan(comparison, ["train.max_steps=3", "title=words"])
    assert {run.train.max_steps for run in loaded.runs.values()} == {3}
    assert loaded.config.title == "words"
    with pytest.raises(ValueError, match=r"train\.lr is set on the command line and by settings"):
        load_plan(comparison, ["train.lr=1"])
    with pytest.raises(ValueError, match=r"data\.shots is set on the command line and by variants"):
        load_plan(comparison, ["data.shots=1"])


def test_validation_and_test_parts_are_asked_for_before_anything_is_trained(comparison, image_folder, tmp_path):
    content = yaml.safe_load(comparison.read_text())
    data = {"source": "table", "root": str(image_folder), "table": "labels.csv", "image_column": "file"}
    content["base"]["data"] = {**data, "label_column": "grade", "split": [0.5, 0, 0.5]}
    content["base"]["ranks"] = {"values": [0, 1, 2]}
    comparison.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match="needs a validation part of 1 images or more"):
        run_plan(load_plan(comparison), quiet=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_error_names_its_run(comparison, image_folder, tmp_path):
    content = yaml.safe_load(comparison.read_text())
    content["methods"] = {"all": {"base": {"method": "l1", "model": {"backbone": "timm:nothing"}}}}
    for jobs in (1, 2):
        comparison.write_text(yaml.safe_dump(content | {"jobs": jobs}))
        with pytest.raises(ValueError, match=r"out/runs/all-0-seed1: .*nothing"):
            run_plan(load_plan(comparison), quiet=True)


def test_one_seed_and_one_method(comparison, tmp_path):
    content = yaml.safe_load(comparison.read_text())
    content |= {"seeds": [4], "methods": {"a | b": {"base": {"method": "l1"}}}}
    comparison.write_text(yaml.safe_dump(content))
    (row,) = run_plan(load_plan(comparison), quiet=True).summaries
    assert row["mae_std"] is None
    assert row["p"] is None
    table = (tmp_path / "out" / "table.md").read_text()
    assert "There is nothing to compare with." in table
    assert "| a \\| b |" in table
    assert "Test part, seed 4;" in table
    assert "1 method compared" in (tmp_path / "out" / "report.html").read_text()
