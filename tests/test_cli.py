"""The command line as a person uses it."""

import json

import pytest
import yaml

from ordinalclip.cli import main
from ordinalclip.compare import load_comparison

COMPARISON = {
    "seeds": [1, 2],
    "base": {
        "data": {"num_train": 16, "num_validation": 8, "num_test": 8},
        "ranks": {"low": 0, "high": 100, "num": 11, "unit": "%"},
        "train": {"max_steps": 2, "batch_size": 8},
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


def test_train_evaluate_predict(tmp_path, capsys):
    run = tmp_path / "run"
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({**COMPARISON["base"], "output_dir": str(run)}))
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


def test_help_documents_every_key(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    printed = capsys.readouterr().out
    for key in ("train.micro_batch_size", "data.augment.flip", "head.num_base_ranks", "model.batch_norm"):
        assert key in printed


def test_compare_is_resumable_and_reads_the_test_part_once(comparison, tmp_path, capsys):
    assert main(["compare", str(comparison), "--quiet"]) == 0
    table = capsys.readouterr().out
    for name in ("OrdinalCLIP", "L1", "constant"):
        assert f"| {name} |" in table
    folders = sorted((tmp_path / "out" / "runs").iterdir())
    assert len(folders) == 8  # two methods: two settings on the first seed, one on the second; the constant: two runs
    times = {folder: (folder / "config.yaml").stat().st_mtime_ns for folder in folders}
    chosen = [folder for folder in folders if "test" in json.loads((folder / "metrics.json").read_text())]
    assert len(chosen) == 6  # three methods, one setting each, two seeds

    assert main(["compare", str(comparison), "--quiet"]) == 0
    again = capsys.readouterr().out
    assert again.splitlines()[:8] == table.splitlines()[:8]
    assert {folder: (folder / "config.yaml").stat().st_mtime_ns for folder in folders} == times
    assert main(["compare", str(comparison), "--quiet", "train.max_steps=3"]) == 0
    assert {folder: (folder / "config.yaml").stat().st_mtime_ns for folder in folders} != times


def test_an_interrupted_run_is_not_complete(comparison, tmp_path, monkeypatch):
    """A run that is started again with another configuration and dies must not pass for finished."""
    from ordinalclip import compare
    from ordinalclip.training import Trainer

    load_comparison(comparison).run(quiet=True)
    changed = load_comparison(comparison, ["train.max_steps=3"])

    def die(self, batch):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", die)
        with pytest.raises(KeyboardInterrupt):
            changed.run(quiet=True)
    started = changed.runs["OrdinalCLIP", 0, 1]
    assert not compare._is_complete(started)
    changed.run(quiet=True)
    assert json.loads((tmp_path / "out/runs/ordinalclip-0-seed1/metrics.json").read_text())["steps"] == 3


def test_several_jobs_give_the_same_table(comparison, tmp_path):
    rows = load_comparison(comparison).run(quiet=True)
    again = load_comparison(comparison, ["jobs=2", f"output_dir={tmp_path}/again"]).run(quiet=True)
    for row, other in zip(rows, again, strict=True):
        assert other["mae"] == pytest.approx(row["mae"], rel=1e-3)


def test_compare_chooses_by_validation_and_averages_over_seeds(comparison, tmp_path):
    rows = {row["method"]: row for row in load_comparison(comparison).run(quiet=True)}
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
        assert json.loads(rows[name]["setting"]) == COMPARISON["methods"][name]["settings"][best]
        maes = [figures[best, seed]["test"]["mae"] for seed in (1, 2)]
        assert rows[name]["mae"] == pytest.approx(sum(maes) / 2)
        assert rows[name]["mae_std"] == pytest.approx(abs(maes[0] - maes[1]) / 2**0.5)


def test_comparisons_that_are_not_fair_or_not_valid(comparison):
    content = yaml.safe_load(comparison.read_text())
    content["methods"]["L1"]["settings"] = [{}]
    comparison.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=r"same number of settings to try, got .*'OrdinalCLIP': 2"):
        load_comparison(comparison)
    content["methods"]["l-1"] = content["methods"]["L.1"] = content["methods"].pop("L1")
    content["methods"]["l-1"]["settings"] = [{}, {}]
    comparison.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=r"too alike, runs would share .*l-1-0-seed1"):
        load_comparison(comparison)
    content["methods"]["L1"] = content["methods"].pop("L.1")
    del content["methods"]["l-1"]
    content["methods"]["L1"]["settings"] = [{"train.lrr": 1}, {}]
    comparison.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=r"method 'L1', setting 0: train\.lrr is not a key; nearest: train\.lr"):
        load_comparison(comparison)
