"""Pairs of a comparison: the sign of a difference, p-values that hold for all pairs, and seeds that ran apart."""

import importlib.util
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from ordinalclip.compare import load_plan, run_plan

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "contrasts.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("contrasts", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def errors(seeds=5, **excess):
    """Seeds of 200 pictures each, and methods whose errors are larger by `excess` on average."""
    rng = np.random.default_rng(0)
    frames = []
    for seed in range(seeds):
        common = rng.gamma(2, 1, 200)
        rows = {"variant": "", "seed": seed, "image": [f"{seed}-{number}" for number in range(200)], "label": 1.0}
        methods = {name: common + more + rng.normal(0, 0.1, 200) for name, more in excess.items()}
        frames.append(pd.DataFrame({**rows, **methods}))
    return pd.concat(frames, ignore_index=True)


def test_the_second_is_compared_with_the_first(script):
    given = errors(good=0.0, bad=0.5)
    mae, excess, low, high, p = script.difference(given, "good", "bad")
    assert mae == pytest.approx(given["good"].mean())
    assert low < excess < high
    assert low > 0.4
    assert high < 0.6
    assert p < 0.001
    other = script.difference(given, "bad", "good")
    assert other[0] == pytest.approx(mae + excess)
    assert other[1:] == pytest.approx((-excess, -high, -low, p))


def test_two_seeds_are_too_few(script):
    with pytest.raises(ValueError, match="2 seeds, and it takes three"):
        script.difference(errors(seeds=2, good=0.0, bad=0.5), "good", "bad")


def test_a_method_that_a_variant_lacks_is_named(script, tmp_path):
    """Also of a file, where it is an empty cell; a picture may be called NA."""
    given = errors(good=0.0, bad=0.5).assign(image="NA")
    other = given.assign(variant="10 %").drop(columns="bad")
    pd.concat([given, other]).to_csv(tmp_path / "errors.csv.gz", index=False)
    read = script.errors_of(tmp_path / "errors.csv.gz")
    assert set(read["image"]) == {"NA"}
    assert script.difference(read[read["variant"] == ""], "good", "bad")[1] > 0.4
    with pytest.raises(KeyError, match="bad: not a method"):
        script.table(read, [("good", "bad")])


def test_p_values_hold_for_all_pairs(script):
    """Holm's: the smallest times all, the next times one less, none below one before it, none above 1."""
    assert script.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert script.holm([0.02, 0.021, 0.9]) == pytest.approx([0.06, 0.06, 0.9])
    assert script.holm([0.6, 0.7]) == [1, 1]


def test_seeds_that_ran_apart_are_put_together(script, tmp_path, monkeypatch):
    """Error files of seeds 1, 2 and of 3, 4 say what the comparison of all four says."""
    plan = {
        "base": {
            "data": {"num_train": 16, "num_validation": 8, "num_test": 8},
            "ranks": {"low": 0, "high": 100, "num": 11, "unit": "%"},
            "train": {"max_steps": 2, "batch_size": 8},
            "evaluation": {"report": False, "space": False},
        },
        "settings": [{"train.lr": 1e-3}],
        "methods": {"L1": {"base": {"method": "l1"}}, "constant": {"base": {"method": "constant"}}},
    }
    file = tmp_path / "compare.yaml"
    for name, seeds in {"all": [1, 2, 3, 4], "early": [1, 2], "late": [3, 4]}.items():
        file.write_text(yaml.safe_dump({**plan, "seeds": seeds, "output_dir": str(tmp_path / name)}))
        run_plan(load_plan(file), quiet=True)
    parts = [tmp_path / f"{name}.csv.gz" for name in ("early", "late")]
    for part, name in zip(parts, ("early", "late"), strict=True):
        monkeypatch.setattr("sys.argv", ["contrasts.py", str(tmp_path / name), "--errors", str(part)])
        script.main()

    whole, joined = script.together([tmp_path / "all"]), script.together(parts)
    assert sorted(whole["seed"].unique()) == sorted(joined["seed"].unique()) == [1, 2, 3, 4]
    pd.testing.assert_frame_equal(whole, joined, rtol=1e-5, check_dtype=False)
    assert script.difference(joined, "L1", "constant") == pytest.approx(
        script.difference(whole, "L1", "constant"), rel=1e-3
    )
    mixed = script.together([parts[0], tmp_path / "late"])
    pd.testing.assert_frame_equal(mixed[script.KEYS], whole[script.KEYS], check_exact=True)
    assert whole["image"].nunique() == 4 * 8  # gauges are drawn anew for every seed
    with pytest.raises(ValueError, match=r"seed 3 is in .*late.csv.gz and in .*all"):
        script.together([parts[1], tmp_path / "all"])
