"""Explanations: maps against plain loops, true regions and shuffled weights; neighbours, base ranks, every method."""

import importlib.util
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import FEW, random_model
from conftest import QUICK as SHORT
from families import FAMILIES, make_family
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.stats import spearmanr

from ordinalclip import OrdinalModel, Ranks
from ordinalclip.cli import main
from ordinalclip.config import load_config
from ordinalclip.data import load_parts
from ordinalclip.explain import (
    GRADIENTS,
    OCCLUSION,
    Explainer,
    base_rank_contributions,
    central_interval,
    explain,
    integrated_gradients,
    occlusion,
)
from ordinalclip.gauges import drawn_gauges, moving_parts
from ordinalclip.heads import available_heads
from ordinalclip.images import prepare
from ordinalclip.pipeline import load_pipeline
from ordinalclip.results.record import points_of
from ordinalclip.training import train

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "attribution.py"
PER_CENT = Ranks.linear(0, 100, 101, unit="%")
METHODS = sorted(set(available_heads()) - {"prototypes"})
QUICK = {"ordinalclip", "conord", "l1", "constant", "large", "ranking_adapter"}  # a kind of head each


def gauge(kind="dial", seed=50):
    return next(drawn_gauges(kind, 1, seed))[0]


def zero_shot(kind="dial"):
    """The shipped CLIP reads dials without any training."""
    templates = [f"a photo of a {kind} reading {{name}}."]
    return OrdinalModel.build("tiny", PER_CENT, "zero_shot", {"templates": templates}).eval()


class Stub(SimpleNamespace):
    """What maps ask of a model, whose value is any function of the pixels."""

    def __init__(self, value_of):
        head = SimpleNamespace(smooth_value=value_of, expected_value=value_of, ranks=FEW, stand_in="")
        super().__init__(encoder=lambda pixels: pixels, head=Callable(head))


class Callable:
    """A head whose outputs are its features."""

    def __init__(self, attributes):
        vars(self).update(vars(attributes))

    def __call__(self, features):
        return features


def blurred(pixels, side):
    return np.stack([gaussian_filter(channel, side / 16) for channel in pixels[0].numpy()])


def test_integrated_gradients_of_a_linear_model_are_weight_times_difference():
    torch.manual_seed(0)
    pixels, weight = torch.rand(1, 3, 32, 32), torch.randn(3, 32, 32)
    found = integrated_gradients(Stub(lambda x: (x * weight).sum(dim=(1, 2, 3))), pixels)
    pieces = (weight.numpy() * (pixels[0].numpy() - blurred(pixels, 32))).sum(axis=0)
    np.testing.assert_allclose(found.map, gaussian_filter(pieces, 1), atol=1e-4)
    assert found.value - found.blurred == pytest.approx(found.map.sum(), abs=1e-2)


def test_occlusion_against_a_loop_over_patches():
    torch.manual_seed(0)
    pixels, weight = torch.rand(1, 3, 32, 32), torch.randn(3, 32, 32)

    def value_of(x):
        return (x * weight).sum(dim=(1, 2, 3)).square()

    found = occlusion(Stub(value_of), pixels)
    base, falls, counts = torch.from_numpy(blurred(pixels, 32)), np.zeros((32, 32)), np.zeros((32, 32))
    for top in range(0, 29, 2):
        for left in range(0, 29, 2):
            patch = slice(top, top + 4), slice(left, left + 4)
            covered = pixels.clone()
            covered[0, :, *patch] = base[:, *patch]
            falls[patch] += float(value_of(pixels) - value_of(covered))
            counts[patch] += 1
    np.testing.assert_allclose(found.map, gaussian_filter(falls / counts, 1), rtol=1e-3, atol=1e-3)


def test_steps_are_added_until_the_parts_sum_to_the_whole():
    """A value that jumps on the way: 64 steps miss it."""
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    start = torch.from_numpy(blurred(pixels, 32))

    def value_of(x):
        share = ((x - start) * (pixels - start)).sum(dim=(1, 2, 3)) / (pixels - start).square().sum()
        return 10 * torch.sigmoid(300 * (share - 0.4))

    found = integrated_gradients(Stub(value_of), pixels)
    assert found.value - found.blurred == pytest.approx(10, abs=0.1)
    assert abs(found.error) < 0.2
    assert found.map.sum() == pytest.approx(10, abs=0.3)


@pytest.mark.slow
def test_maps_point_at_what_moves_and_shuffled_weights_destroy_them():
    """Against the true place of the hand, and Adebayo et al. (NeurIPS 2018); a hardly changed model keeps its map."""
    script = load(SCRIPT)
    model, near, shuffled = zero_shot("clock"), zero_shot("clock"), script.shuffled(zero_shot("clock"))
    with torch.no_grad():
        for parameter in near.parameters():
            parameter.mul_(1.0001)
    gauges = list(zip(drawn_gauges("clock", 5, 50), moving_parts("clock", 5, 50), strict=True))
    for attribute, least in ((integrated_gradients, 3), (occlusion, 1.5)):
        ratios, same, other = [], [], []
        for (picture, _), part in gauges:
            pixels = prepare(picture, model.config.pixel_spec)[None]
            own = attribute(model, pixels)
            ratios.append(own.share(part) / part.mean())
            same.append(spearmanr(own.map.ravel(), attribute(near, pixels).map.ravel()).statistic)
            other.append(spearmanr(own.map.ravel(), attribute(shuffled, pixels).map.ravel()).statistic)
        assert np.mean(ratios) > least
        assert np.mean(same) > 0.95
        assert abs(np.mean(other)) < 0.25


def load(script):
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = sys.modules[script.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("method", [pytest.param(m, marks=[] if m in QUICK else pytest.mark.slow) for m in METHODS])
def test_every_method_is_explained_or_says_in_a_sentence_why_not(method):
    model = random_model(method)
    found = explain(model, gauge())
    for name in (GRADIENTS, OCCLUSION):
        assert (name in found.attributions) != (name in found.missing)
        if name in found.attributions:
            drawn = found.attributions[name].map
            assert drawn.shape == (64, 64)
            assert np.isfinite(drawn).all()
            assert np.abs(drawn).max() > 0
    if method == "constant":
        assert "has no gradient" in found.missing[GRADIENTS]
        assert "no patch" in found.missing[OCCLUSION]
    else:
        assert GRADIENTS in found.attributions, found.missing
    assert (found.distribution is None) == ("distribution" in found.missing)
    answer = model.predict(prepare(gauge(), model.config.pixel_spec)[None])
    assert found.value == pytest.approx(float(answer.value), abs=1e-4)
    assert "run folder" in found.missing["neighbors"]
    found.figure().savefig("/dev/null", format="png")


@pytest.mark.parametrize("readout", ["neighbors", "nearest", "l1"])
def test_the_stand_in_of_a_read_out_without_gradient_is_said_and_near_the_answer(readout):
    model = random_model("conord", readout=readout)
    found = explain(model, gauge())
    note = found.attributions[GRADIENTS].note
    assert ("linear read-out" if readout == "l1" else "kernel mean") in note
    pixels = prepare(gauge(), model.config.pixel_spec)[None]
    with torch.no_grad():
        outputs = model.head(model.encoder(pixels))
    if readout == "l1":
        assert found.attributions[GRADIENTS].value == pytest.approx(found.value, abs=1e-4)
        return
    bank, query = model.head.neighbors.features.double(), outputs["embedding"].double()[0]
    squared = [float((query - each).square().sum()) for each in bank]
    width = sum(sorted(squared)[:10]) / 10
    weights = [math.exp(-each / width) for each in squared]
    labels = model.head.neighbors.labels.tolist()
    mean = sum(w * y for w, y in zip(weights, labels, strict=True)) / sum(weights)
    assert found.attributions[GRADIENTS].value == pytest.approx(3 * mean + 5, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FAMILIES, "timm:test_resnet", "timm:test_vit"])
def test_every_family_of_backbones_is_explained(name, tmp_path):
    spec = name if name.startswith("timm") else make_family(name, tmp_path)
    found = explain(random_model("l1", spec), gauge())
    assert {GRADIENTS, OCCLUSION} <= found.attributions.keys(), found.missing


def test_the_central_interval_leaves_at_most_its_share_out_at_either_end():
    rng = np.random.default_rng(0)
    for level in (0.5, 0.8, 0.9):
        for _ in range(50):
            probabilities = rng.dirichlet(np.full(11, 0.3))
            low, high = central_interval(probabilities, FEW, level)[:2]
            inside = [p for p, value in zip(probabilities, FEW.values, strict=True) if low <= value <= high]
            below = sum(p for p, value in zip(probabilities, FEW.values, strict=True) if value < low)
            above = sum(p for p, value in zip(probabilities, FEW.values, strict=True) if value > high)
            tail = (1 - level) / 2 + 1e-12
            assert max(below, above) <= tail
            assert sum(inside) >= level - 1e-9
            ends = probabilities[FEW.values.index(low)], probabilities[FEW.values.index(high)]
            assert below + ends[0] > tail - 1e-9  # no narrower one does
            assert above + ends[1] > tail - 1e-9


@pytest.mark.parametrize("kind", ["linear", "piecewise"])
def test_base_rank_contributions_are_the_slopes_of_the_expected_value(kind):
    """Scaling what base k brings to the value of every rank by a_k: the slope at 1 is its contribution."""
    model = random_model("ordinalclip", num_base_ranks=3, interpolation=kind)
    found = explain(model, gauge())
    probabilities = torch.tensor(found.distribution["probability"].to_numpy())
    scales = torch.ones(3, dtype=torch.float64, requires_grad=True)
    expected = torch.zeros((), dtype=torch.float64)
    for rank, value in enumerate(FEW.values):
        distance = [abs(rank - base) for base in (0, 5, 10)]
        raw = [1 - d / 10 if kind == "linear" else max(0, 1 - d / 5) for d in distance]  # eq. 4, by hand
        for k in range(3):
            expected = expected + probabilities[rank] * raw[k] / sum(raw) * scales[k] * value
    expected.backward()
    table = found.base_ranks
    np.testing.assert_allclose(table["contribution"], scales.grad, rtol=1e-5, atol=1e-6)
    assert table["contribution"].sum() == pytest.approx(found.expected_value, rel=1e-5)
    assert table["share"].sum() == pytest.approx(1)
    assert table["place"].tolist() == [0, 5, 10]
    if kind == "piecewise":  # then shares are where the answer is, too
        assert (table["share"] * table["place"]).sum() == pytest.approx(found.expected_value, rel=1e-5)


def test_contributions_of_a_certain_answer_on_a_base_rank_are_all_its_own():
    weights = np.array([[1, 0], [0.5, 0.5], [0, 1]])
    table = base_rank_contributions(np.array([0, 0, 1.0]), Ranks((2, 4, 10)), weights)
    assert table["contribution"].tolist() == [0, 10]
    assert table["share_of_flat"].tolist() == [0.5, 0.5]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of a second on pictures in a folder: OrdinalCLIP, and ConOrd on cached features."""
    folder = tmp_path_factory.mktemp("runs")
    rows = ["file,label"]
    for number, (picture, value) in enumerate(drawn_gauges("dial", 40, seed=1)):
        picture.save(folder / f"{number}.png")
        rows.append(f"{number}.png,{value:.2f}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    data = [f"data.root={folder}", "data.source=table", "data.table=labels.csv", "data.image_column=file"]
    data += ["ranks.low=0", "ranks.high=100", "ranks.num=21", "train.max_steps=2", "evaluation.report=false"]
    cached = ["method=conord", "model.features=cached", "data.views=1"]
    own = ["method=ordinalclip", "head.num_base_ranks=5", "head.interpolation=piecewise"]
    for name, more in (("cached", cached), ("own", own)):
        train(load_config(None, [f"output_dir={folder}/{name}", *data, *more]), quiet=True)
    return folder


@pytest.mark.parametrize("name", ["own", "cached"])
def test_neighbours_are_the_nearest_training_pictures(runs, name):
    explainer = Explainer(runs / name, num_neighbors=4)
    config = load_config(runs / name / "config.yaml")
    part = load_parts(config.data, config.ranks, config.seed).train
    points = points_of(explainer.model, part, np.arange(len(part)))
    found = explainer(runs / part.names[3])
    distances = [math.dist(points[3], other) for other in points]
    assert found.neighbors["row"].tolist() == sorted(range(len(part)), key=distances.__getitem__)[:4]
    assert found.neighbors["row"][0] == 3  # itself
    np.testing.assert_allclose(found.neighbors["distance"], sorted(distances)[:4], atol=1e-4)
    assert found.neighbors["label"].tolist() == [part.values[row] for row in found.neighbors["row"]]
    assert np.array_equal(np.asarray(found.thumbnails[0]), np.asarray(Image.open(runs / part.names[3])))
    assert (found.base_ranks is None) == (name == "cached")
    if name == "own":
        assert found.base_ranks["contribution"].sum() == pytest.approx(found.expected_value, rel=1e-4)


def test_a_run_whose_data_is_gone_or_changed_is_explained_without_neighbours(runs, tmp_path):
    away = runs / "labels.csv"
    content = away.read_text()
    try:
        away.unlink()
        found = explain(runs / "own", gauge())
        assert "labels.csv" in found.missing["neighbors"]
        assert found.neighbors is None
        assert found.attributions
        away.write_text(content.replace(",", ",1", 1).replace("label,1", "label,"))
        lines = content.splitlines()
        away.write_text("\n".join([lines[0], *reversed(lines[1:])]) + "\n")
        assert "not that of the run any more" in explain(runs / "own", gauge()).missing["neighbors"]
    finally:
        away.write_text(content)
    saved = explain(runs / "own" / "model", gauge(), num_neighbors=3)
    assert "run folder" in saved.missing["neighbors"]
    assert "run folder" in saved.missing["base_ranks"]
    assert "nobody asked" in explain(runs / "own", gauge(), num_neighbors=0).missing["neighbors"]


def test_the_command_writes_a_figure_for_every_picture(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures = [str(runs / f"{number}.png") for number in (0, 1)]
    assert main(["explain", str(runs / "own"), pictures[0], "--out", "new/why.pdf", "--quiet"]) == 0
    assert (tmp_path / "new/why.pdf").read_bytes().startswith(b"%PDF")
    assert main(["explain", str(runs / "cached"), *pictures, "--neighbors", "2", "--quiet"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[2] for line in lines] == ["new/why.pdf", "why-1.png", "why-2.png"]
    assert "central 90 %, not calibrated" in lines[0]
    assert (tmp_path / "why-1.png").read_bytes() != (tmp_path / "why-2.png").read_bytes()


def test_without_captum_one_line_says_how_to_install_it(runs, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    assert main(["explain", str(runs / "own"), str(runs / "0.png")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install 'ordinalclip[explain]'" in line
    with pytest.raises(ImportError, match="ordinalclip\\[explain\\]"):
        explain(runs / "own", gauge())


@pytest.mark.parametrize("method", ["cross_entropy", "l1"])
def test_the_interval_of_a_model_that_keeps_some_is_its_own(method, tmp_path):
    keys = [*SHORT, f"method={method}", "data.num_validation=40", "data.calibration=0.5", f"output_dir={tmp_path}/run"]
    assert main(["train", "default", *keys, "--quiet"]) == 0
    pipe, picture = load_pipeline(tmp_path / "run/model"), gauge()
    for level in (0.9, 0.5):
        found = explain(tmp_path / "run", picture, level=level, num_neighbors=0)
        answer = pipe(picture, interval=level)
        assert found.interval == (answer["low"], answer["high"], level, True)
        legends = [each.get_legend() for each in found.figure().axes]
        shown = [text.get_text() for legend in legends if legend for text in legend.get_texts()]
        assert (f"{100 * level:g} % interval" in shown) == (method == "cross_entropy")  # l1 has no distribution
    assert found.interval.kind == "50 % interval"
    central = explain(tmp_path / "run", picture, level=0.99, num_neighbors=0).interval  # it takes more pictures
    assert (central is None) if method == "l1" else (not central.promised)


def test_a_level_that_is_none_is_refused(runs):
    with pytest.raises(ValueError, match="level of the interval must be above 0 and below 1, got 1"):
        Explainer(runs / "own", level=1)
