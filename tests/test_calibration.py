"""Models that keep a calibration: learnt, kept, carried along, and the same numbers by every way to ask."""

import itertools
import json
import math

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ordinalclip import OrdinalModel, OrdinalRegressor, Ranks
from ordinalclip.calibrating import calibrate, coverage, quality
from ordinalclip.calibration import LEVELS, Answered, Calibration, highest_level
from ordinalclip.cli import main
from ordinalclip.config import load_config
from ordinalclip.external import calibrate_external, evaluate_external
from ordinalclip.heads import Prediction, decode
from ordinalclip.intervals import TooFewError
from ordinalclip.pipeline import load_pipeline
from ordinalclip.training import train

STEPS = ["method=cross_entropy", "train.max_steps=6", "train.batch_size=16", "train.lr=1e-3", "train.eval_every=3"]
RANKS = Ranks((10, 20, 30, 40, 50), unit="mm")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A calibrated run on drawn thermometers in a folder, two of a patient, and others that it has not seen."""
    folder = tmp_path_factory.mktemp("calibration")
    for name, seed, number in (("ours", 1, 120), ("theirs", 2, 60)):
        assert main(["make-gauges", str(folder / name), "--num", str(number), "--seed", str(seed), "-q"]) == 0
        table = folder / name / "labels.csv"
        frame = pd.read_csv(table)
        frame.assign(patient=[f"p{row // 2}" for row in range(len(frame))]).to_csv(table, index=False)
    data = [f"data.root={folder}/ours", "data.source=table", "data.table=labels.csv", "data.group=patient"]
    shares = ["data.split=[0.4,0.4,0.2]", "data.calibration=0.5", "data.duplicates=allow"]
    ranks = ["ranks.low=0", "ranks.high=100", "ranks.num=11", "ranks.unit=%"]
    train(load_config(None, [*data, *shares, *ranks, *STEPS, f"output_dir={folder}/run"]), quiet=True)
    return folder


def answered(number=300, seed=0, sharper=1.0, ranks=RANKS, shift=None):
    """Truths drawn from distributions, which are told `sharper` and with `shift` more of each rank."""
    rng = np.random.default_rng(seed)
    centre, reach = rng.uniform(0, len(ranks) - 1, (number, 1)), rng.uniform(0.4, 1.5, (number, 1))
    logits = -((np.arange(len(ranks)) - centre) ** 2) / (2 * reach**2)
    true = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    truth = torch.tensor([rng.choice(len(ranks), p=p) for p in true])
    told = torch.softmax(torch.tensor(logits * sharper + (0 if shift is None else np.asarray(shift))), dim=1)
    return Answered(decode(told, ranks, "median"), torch.tensor(ranks.values).double()[truth], truth)


def values_only(number=300, seed=0, ranks=RANKS):
    """Answers of a regressor whose errors grow with the value."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, len(ranks), number)
    values = np.asarray(ranks.values)[truth]
    answers = torch.tensor(values + rng.normal(size=number) * values / 10)
    return Answered(Prediction(answers, ranks.nearest(answers)), torch.tensor(values), torch.tensor(truth))


# ---- what is learnt


@pytest.mark.parametrize("sharper", [0.4, 3.0])
def test_the_temperature_undoes_what_made_probabilities_sharper(sharper):
    wide = Ranks.linear(0, 60, 13)
    about = calibrate(wide, "median", answered(600, 1, sharper, wide), answered(600, 2, sharper, wide)).about
    assert about["scaling"] == "temperature"
    assert about["temperature"] == pytest.approx(sharper, rel=0.15)
    for measure in ("ece", "rps", "nll"):
        assert about["after"][measure] < about["before"][measure]


def test_vector_scaling_undoes_what_favours_a_rank():
    shift = [0, 0, 4.0, 0, 0]
    found = calibrate(RANKS, "median", answered(600, 1, shift=shift), answered(600, 2, shift=shift))
    assert found.about["scaling"] == "vector"
    bias = found.calibration.bias - found.calibration.bias.mean()
    assert int(bias.argmin()) == 2
    assert found.about["after"]["nll"] < found.about["before"]["nll"] - 0.2


def test_what_is_right_already_is_left_alone():
    found = calibrate(RANKS, "median", answered(400, 1), answered(400, 2))
    probabilities = answered(20, 3).prediction.probabilities
    scaled = found.calibration.answer(answered(20, 3).prediction, "median").probabilities
    assert found.about["after"]["nll"] == pytest.approx(found.about["before"]["nll"], abs=0.02)
    assert (scaled - probabilities).abs().max() < 0.1


def test_few_pictures_scale_nothing():
    few = calibrate(RANKS, "median", answered(19, 1, 3.0), answered(19, 2, 3.0))
    assert few.about["scaling"] == "none"
    assert few.calibration.to_dict()["scaling"] == "none"


def test_the_expected_calibration_error_by_hand():
    told = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]])
    pair = Ranks((0, 1))
    truth = torch.tensor([0, 1, 0, 0])
    found = quality(Answered(decode(told, pair, "median"), truth.double(), truth))
    assert found["ece"] == pytest.approx(0.5 * (0.9 - 0.5) + 0.5 * (1 - 0.6))
    assert [each["num"] for each in found["reliability"]] == [2, 2]
    assert found["rps"] == pytest.approx((0.01 + 0.81 + 2 * 0.16) / 4)


@pytest.mark.parametrize("kind", ["rps", "aps", "shortest", "residual", "scaled"])
@pytest.mark.parametrize("by_rank", [False, True])
def test_intervals_keep_their_promise_on_others(kind, by_rank):
    found = calibrate(RANKS, "median", answered(300, 1, 2.0), answered(2000, 2, 2.0), kind=kind, by_rank=by_rank)
    others = answered(2000, 3, 2.0)
    others = Answered(found.calibration.answer(others.prediction, "median"), others.values, others.ranks)
    for level in (0.8, 0.9, 0.95):
        told = coverage(found.calibration, others, level)
        least = min(told["coverage"], *(each["coverage"] for each in told["by_rank"] if by_rank), 1)
        assert least > level - (0.1 if by_rank else 0.025)
        assert told["band"][0] < level < told["band"][1]
        low, high = found.calibration.interval(others.prediction, level)
        assert bool(((low <= others.prediction.value) & (others.prediction.value <= high)).all())


def test_intervals_grow_with_the_level():
    found = calibrate(RANKS, "median", answered(100, 1), answered(200, 2))
    prediction = answered(50, 3).prediction
    ends = [found.calibration.interval(prediction, level) for level in LEVELS]
    for (low, high), (lower, higher) in itertools.pairwise(ends):
        assert bool(((lower <= low) & (high <= higher)).all())


def test_errors_that_grow_with_the_answer_get_intervals_that_do():
    found = calibrate(RANKS, "median", values_only(400, 1), values_only(400, 2))
    assert found.about["kind"] == "scaled"
    assert found.about["widths"]["scaled"] < found.about["widths"]["residual"]
    few, many = torch.tensor([15.0]), torch.tensor([40.0])
    narrow, wide = (found.calibration.interval(Prediction(each, RANKS.nearest(each)), 0.8) for each in (few, many))
    assert float(narrow[1] - narrow[0]) < 0.7 * float(wide[1] - wide[0])
    assert coverage(found.calibration, values_only(2000, 3), 0.9)["coverage"] == pytest.approx(0.9, abs=0.04)


def test_groups_are_calibrated_as_groups():
    """All pictures of a group have the same error: fifty pictures of five groups are five."""
    one = values_only(5, 1)
    repeated = one.select(np.repeat(np.arange(5), 10))
    found = calibrate(RANKS, "median", values_only(60, 2), repeated, groups=np.repeat(list("abcde"), 10))
    assert found.about["groups"] == 5
    assert highest_level(found.about["least"]) == 0.83
    with pytest.raises(TooFewError, match=r"0\.9 takes at least 9 calibration groups, there are 5"):
        found.calibration.interval(one.prediction, 0.9)
    alone = calibrate(RANKS, "median", values_only(60, 2), one, kind=found.about["kind"])
    torch.testing.assert_close(found.calibration.thresholds, alone.calibration.thresholds)


def test_by_rank_it_takes_pictures_of_every_rank():
    some = answered(200, 2)
    without = some.select(np.flatnonzero(some.ranks.numpy() != 4))
    found = calibrate(RANKS, "median", answered(100, 1), without, by_rank=True)
    with pytest.raises(TooFewError, match="1 calibration pictures of every rank, there are 0"):
        found.calibration.interval(some.prediction, 0.5)


def test_bins_end_at_their_edges():
    binned = Ranks((5, 15, 30), edges=(0, 10, 20, 40), names=("few", "some", "many"))
    truth = torch.tensor([0, 1, 2] * 40)
    told = torch.eye(3)[truth]
    sure = Answered(decode(told, binned, "median"), torch.tensor(binned.values)[truth], truth)
    low, high = calibrate(binned, "median", sure, sure).calibration.interval(
        decode(torch.eye(3), binned, "median"), 0.9
    )
    assert low.tolist() == [0, 10, 20]
    assert high.tolist() == [10, 20, 40]


@pytest.mark.parametrize("level", [0.49, 0.999, 1, True, "0.9", math.nan, 0.905])
def test_other_levels_are_refused(level):
    found = calibrate(RANKS, "median", answered(100, 1), answered(200, 2)).calibration
    with pytest.raises(ValueError, match=r"a level of 0\.5 to 0\.99 in hundredths"):
        found.interval(answered(3).prediction, level)


def test_kinds_that_a_method_cannot_have_are_refused():
    with pytest.raises(ValueError, match="rps are made of probabilities, which this method has none of"):
        calibrate(RANKS, "median", values_only(30), values_only(30), kind="rps")
    with pytest.raises(ValueError, match="needs pictures"):
        calibrate(RANKS, "median", values_only(30), values_only(0))
    with pytest.raises(ValueError, match="calibration must have"):
        Calibration.of(RANKS, {"scaling": "none"})


def test_no_other_kind_is_taken_in_silence():
    wide = Ranks.linear(0, 300, 301)
    told = torch.full((30, 301), 1 / 301)
    many = Answered(decode(told, wide, "median"), torch.zeros(30), torch.zeros(30, dtype=torch.int64))
    with pytest.raises(ValueError, match="aps are of at most 256 ranks, there are 301"):
        calibrate(wide, "median", many, many, kind="aps")
    assert calibrate(wide, "median", many, many).about["kind"] == "rps"
    with pytest.raises(
        ValueError, match="scaled take at least 20 pictures to learn which errors to expect, there are 19"
    ):
        calibrate(RANKS, "median", values_only(19), values_only(30), kind="scaled")


def test_the_level_by_which_kinds_are_compared_is_told():
    assert calibrate(RANKS, "median", answered(30, 1), answered(30, 2)).about["widths"]["level"] == 0.9
    assert calibrate(RANKS, "median", answered(4, 1), answered(30, 2)).about["widths"]["level"] == 0.8


@pytest.mark.parametrize("kind", ["rps", "aps", "shortest", "residual"])
@pytest.mark.parametrize("by_rank", [False, True])
def test_an_answer_between_two_ranks_is_inside(kind, by_rank):
    choosing, held_out, asked = (answered(200, seed) for seed in (1, 2, 3))
    found = calibrate(RANKS, "expectation", choosing, held_out, kind=kind, by_rank=by_rank)
    prediction = found.calibration.answer(decode(asked.prediction.probabilities, RANKS, "expectation"), "expectation")
    low, high = found.calibration.interval(prediction, 0.5)
    assert bool((prediction.value % 10 != 0).all())
    assert bool(((low <= prediction.value) & (prediction.value <= high)).all())


def test_another_precision_leaves_thresholds_as_they_are():
    found = calibrate(RANKS, "median", answered(100, 1), answered(200, 2)).calibration
    before = found.thresholds.clone()
    found.to(torch.bfloat16)
    assert torch.equal(found.thresholds, before)


# ---- a run, and every way to ask its model


def test_the_run_tells_what_it_has_learnt_and_what_it_cost(here):
    metrics = json.loads((here / "run" / "metrics.json").read_text())
    told = metrics["calibration"]
    parts = json.loads((here / "run" / "provenance.json").read_text())["data"]
    assert parts["validation"]["rows"] == metrics["validation"]["num"] == 24
    assert (parts["calibration"]["rows"], told["num"], told["groups"]) == (24, 24, 12)
    assert [each["level"] for each in told["test"]] == [0.5, 0.8, 0.9]  # what twelve groups are enough for
    assert all(each["num"] == metrics["test"]["num"] for each in told["test"])
    card, page = (here / "run" / "model" / "README.md").read_text(), (here / "run" / "report.html").read_text()
    assert "24 pictures of 12 groups" in card
    assert "Levels: 0.5 to 0.92" in card
    assert "Do probabilities mean what they say?" in page
    assert "Do intervals keep their promise?" in page
    assert "calibration.thresholds" in load_file(here / "run" / "model" / "model.safetensors")


def test_no_patient_chooses_and_calibrates(here):
    from ordinalclip.data import load_parts

    config = load_config(here / "run" / "config.yaml")
    parts = load_parts(config.data, config.ranks, config.seed)
    people = {name: set(part.rows["patient"]) for name, part in parts.named.items()}
    assert list(people) == ["train", "validation", "calibration", "test"]
    assert sum(map(len, people.values())) == len(set.union(*people.values())) == 60
    assert set(parts.calibration_groups) == people["calibration"]
    whole = load_parts(config.data.model_copy(update={"calibration": 0.0}), config.ranks, config.seed)
    assert set(whole.validation.rows["patient"]) == people["validation"] | people["calibration"]


def test_every_way_to_ask_gives_the_same_interval(here, tmp_path, capsys):
    files = sorted((here / "theirs").glob("*.png"))[:9]
    model = OrdinalModel.from_pretrained(here / "run" / "model")
    pipe = load_pipeline(str(here / "run" / "model"))
    expected = [(each["low"], each["high"]) for each in pipe([str(file) for file in files], interval=0.8)]
    assert all(low <= high for low, high in expected)
    assert len({high - low for low, high in expected}) > 1

    from ordinalclip.images import load_image, prepare

    pixels = torch.stack([prepare(load_image(file), model.config.pixel_spec) for file in files])
    low, high = model.interval(model.predict(pixels), 0.8)
    assert list(zip(low.tolist(), high.tolist(), strict=True)) == expected

    frame = OrdinalRegressor.from_pretrained(here / "run").predict([Image.open(file) for file in files], interval=0.8)
    assert list(zip(frame["low"], frame["high"], strict=True)) == expected

    shared = ["predict", "--model", str(here / "run"), "--interval", "0.8", "-q"]
    assert main([*shared, "--json", *map(str, files)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["low"], line["high"]) for line in lines] == expected
    assert main([*shared, str(files[0])]) == 0
    low, high = expected[0]
    assert f"\t{low:g} % to {high:g} %\t" in capsys.readouterr().out

    pd.DataFrame({"image": [file.name for file in files]}).to_csv(here / "theirs" / "asked.csv", index=False)
    data = ["--data", str(here / "theirs" / "asked.csv"), "--out", str(tmp_path / "bulk"), "--block", "4"]
    assert main([*shared, *data]) == 0
    table = pq.read_table(tmp_path / "bulk", columns=["low", "high"]).to_pydict()
    assert list(zip(table["low"], table["high"], strict=True)) == expected
    assert main([*shared[:3], "--interval", "0.7", "-q", *data]) == 2  # other intervals are not mixed in
    assert "interval was 0.8, is 0.7" in capsys.readouterr().err


def test_a_broken_picture_has_no_interval(here, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    regressor = OrdinalRegressor.from_pretrained(here / "run")
    some = sorted((here / "theirs").glob("*.png"))[0]
    frame = regressor.predict([str(some), str(tmp_path / "broken.png")], errors="keep", interval=0.8)
    assert frame["low"].notna().tolist() == [True, False]


def test_saving_again_and_deploying_keep_it(here, tmp_path):
    model = OrdinalModel.from_pretrained(here / "run" / "model")
    model.save_pretrained(tmp_path / "again")
    again = OrdinalModel.from_pretrained(tmp_path / "again")
    pixels = torch.rand(3, 3, model.config.pixel_spec.size, model.config.pixel_spec.size)
    for mine, other in zip(
        model.interval(model.predict(pixels), 0.9), again.deploy().interval(again.predict(pixels), 0.9), strict=True
    ):
        assert torch.equal(mine, other)


def test_training_further_drops_what_no_longer_holds(here, tmp_path, caplog):
    model = OrdinalModel.from_pretrained(here / "run" / "model")
    pixels = torch.rand(2, 3, model.config.pixel_spec.size, model.config.pixel_spec.size)
    model(pixels).value  # noqa: B018 - asking is no training
    assert model.calibration is not None
    model.train()(pixels, labels=torch.tensor([10.0, 60.0])).loss.backward()
    assert "calibration no longer holds" in caplog.text
    model.save_pretrained(tmp_path / "trained")
    again = OrdinalModel.from_pretrained(tmp_path / "trained")
    with pytest.raises(ValueError, match="keeps no intervals"):
        again.interval(again.predict(pixels), 0.8)


def test_a_level_that_takes_more_is_refused_before_anything_is_read(here, capsys):
    arguments = ["predict", "nothing-here.png", "--model", str(here / "run")]
    assert main(["predict", str(here / "theirs"), *arguments[2:], "--interval", "0.95"]) == 2
    assert "0.95 takes at least 19 calibration groups, there are 12" in capsys.readouterr().err


def test_a_model_without_calibration_says_where_it_comes_from(tmp_path):
    model = OrdinalModel.from_prompts("tiny", Ranks.linear(0, 100, 5), "a gauge at {name} percent")
    pixels = torch.rand(1, 3, model.config.pixel_spec.size, model.config.pixel_spec.size)
    with pytest.raises(ValueError, match=r"keeps no intervals; train it with data\.calibration=0\.5, or calibrate"):
        model.interval(model.predict(pixels), 0.9)


def test_a_share_that_leaves_nothing_is_refused(here, tmp_path):
    few = ["data.num_train=4", "data.num_validation=1", "data.num_test=4", "data.calibration=0.5"]
    with pytest.raises(ValueError, match=r"1 rows are too few to keep a share of 0\.5 out"):
        train(load_config(None, [*few, *STEPS, f"output_dir={tmp_path}/run"]), quiet=True)
    none = ["data.source=table", f"data.table={here}/ours/labels.csv", "data.split=[0.6,0,0.4]", "data.calibration=0.5"]
    none += ["ranks.low=0", "ranks.high=100", "ranks.num=11"]
    with pytest.raises(ValueError, match="a share of the validation part: there is none"):
        train(load_config(None, [*none, *STEPS, f"output_dir={tmp_path}/run"]), quiet=True)


def test_a_run_whose_intervals_were_learnt_cannot_be_scored_with_others(here, capsys):
    assert main(["evaluate", str(here / "run"), "evaluation.intervals=residual", "-q"]) == 2
    assert "evaluation.intervals: of no effect on a run that is done" in capsys.readouterr().err
    before = json.loads((here / "run" / "metrics.json").read_text())["calibration"]["test"]
    assert main(["evaluate", str(here / "run"), "evaluation.cs=[3]", "-q"]) == 0
    assert json.loads((here / "run" / "metrics.json").read_text())["calibration"]["test"] == before


def test_a_kind_that_cannot_be_had_costs_no_training(tmp_path, caplog):
    few = ["data.num_train=16", "data.num_validation=24", "data.num_test=4", "data.calibration=0.5", *STEPS[1:]]
    folder = tmp_path / "run"
    train(load_config(None, [*few, "method=l1", "evaluation.intervals=rps", f"output_dir={folder}"]), quiet=True)
    assert "kind rps are made of probabilities" in caplog.text
    assert "evaluation.intervals=auto is done instead" in caplog.text
    assert json.loads((folder / "metrics.json").read_text())["calibration"]["kind"] == "residual"


# ---- pictures from elsewhere


def test_a_model_is_calibrated_on_pictures_from_elsewhere(here, tmp_path, capsys):
    table, out = here / "theirs" / "labels.csv", tmp_path / "there"
    arguments = ["calibrate", str(here / "run"), "--data", str(table), "--group", "patient", "--out", str(out), "-q"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "calibrated on 30 pictures of 15 groups" in said
    assert "levels: 0.5 to 0.93" in said
    before, after = (load_file(folder / "model.safetensors") for folder in (here / "run" / "model", out))
    assert all(torch.equal(after[name], before[name]) for name in before if not name.startswith("calibration"))
    card = (out / "README.md").read_text()
    assert "30 pictures of 15 groups of `theirs/labels.csv`" in card
    assert "24 pictures of 12 groups" not in card
    found = evaluate_external(out, table, quiet=True)
    assert found.score.covered["level"] == 0.9
    assert "90% intervals: " in "\n".join(found.lines())
    assert main(arguments) == 2
    assert "holds a model already; overwrite replaces it" in capsys.readouterr().err


def test_patients_are_groups_as_in_the_run_unless_said_otherwise(here, tmp_path, capsys):
    table, out = here / "theirs" / "labels.csv", tmp_path / "there"
    shared = ["calibrate", str(here / "run"), "--data", str(table), "--out", str(out)]
    assert main(shared) == 0
    said = capsys.readouterr()
    assert "rows with the same 'patient' are one group, as in the model's run" in said.err
    assert "of 15 groups" in said.out
    (out / "prompts.safetensors").write_bytes(b"of another model")
    assert main([*shared, "--overwrite", "--group", "", "-q"]) == 0
    assert " groups" not in capsys.readouterr().out
    assert not (out / "prompts.safetensors").exists()
    (out / "notes.txt").write_text("mine")
    assert main([*shared, "--overwrite"]) == 2
    assert "holds notes.txt, which is of no model" in capsys.readouterr().err
    pd.read_csv(table).drop(columns="patient").to_csv(here / "theirs" / "alone.csv", index=False)
    calibrate_external(here / "run", here / "theirs" / "alone.csv")
    assert "every row is taken for independent" in capsys.readouterr().err


def test_pictures_that_it_has_learnt_from_do_not_calibrate(here):
    with pytest.raises(ValueError, match="are in the run's training, validation or calibration part: its errors"):
        calibrate_external(here / "run", here / "ours" / "labels.csv", quiet=True)


def test_the_class_calibrates_and_leaves_its_run_alone(here):
    regressor = OrdinalRegressor.from_pretrained(here / "run")
    frame = pd.read_csv(here / "theirs" / "labels.csv")
    frame["image"] = [str(here / "theirs" / name) for name in frame["image"]]
    held = regressor.model_
    regressor.calibrate(frame, kind="residual", share=0.7)
    assert regressor.model_.calibration.kind == "residual"
    assert held.calibration.kind != "residual"
    assert OrdinalRegressor.from_pretrained(here / "run").model_.calibration.grouped
    assert set(regressor.evaluate(frame)["coverage"][0]) >= {"level", "coverage", "width", "band"}


def test_where_the_promise_is_broken_it_is_said(here, tmp_path):
    """Labels that are other than the pictures: no interval can hold them."""
    frame = pd.read_csv(here / "theirs" / "labels.csv")
    frame["image"] = [str(here / "theirs" / name) for name in frame["image"]]
    run = load_config(here / "run" / "config.yaml")
    told = np.array(OrdinalRegressor.from_pretrained(here / "run").predict(frame, image="image")["value"])
    wrong = frame.assign(label=np.where(told > 50, 0.0, 100.0))
    found = evaluate_external(here / "run", wrong, overrides={"data": {"label_column": "label"}}, quiet=True)
    assert found.score.covered["coverage"] < 0.6
    assert any("90% intervals" in text and "calibrate the model" in text for text in found.warnings)
    assert run.data.calibration == 0.5
