"""LARGE: latent spaces, directions, layer weights, distances and calibration against plain loops, with small generators
whose answers are known."""

import math
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from safetensors.torch import save_file
from sklearn.linear_model import ElasticNet, Ridge
from torch import nn

from baselines import large
from baselines.large import Layout, layout
from baselines.large.head import LatentRegressor
from baselines.large.stylegan2 import Generator
from ordinalclip.heads import HeadContext, Targets, build_head
from ordinalclip.ranks import Ranks


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


class Styles(nn.Module):
    """What `convert` needs of a StyleGAN2 of 8 px: a mapping network, and an affine map for every layer of S."""

    WIDTHS = (5, 5, 5, 4, 4)

    def __init__(self, style_dim=3):
        super().__init__()
        torch.manual_seed(0)
        self.style = nn.Sequential(nn.Linear(style_dim, style_dim), nn.LeakyReLU())
        first, to_rgb1, up, second, to_rgb = (self.block(style_dim, width) for width in self.WIDTHS)
        self.conv1, self.to_rgb1 = first, to_rgb1
        self.convs, self.to_rgbs = nn.ModuleList([up, second]), nn.ModuleList([to_rgb])
        self.double()

    @staticmethod
    def block(style_dim, width):
        return nn.ModuleDict({"conv": nn.ModuleDict({"modulation": nn.Linear(style_dim, width)})})


Z, W, W_PLUS, S = Layout("z", (3,)), Layout("w", (3,)), Layout("w+", (3,) * 4), Layout("s", Styles.WIDTHS)


# Latent spaces


@pytest.mark.parametrize(
    ("size", "rows", "layers", "total"),
    [(64, 10, 14, 7168), (128, 12, 17, 8192), (256, 14, 20, 8704), (512, 16, 23, 8960), (1024, 18, 26, 9088)],
)
def test_layouts_of_published_sizes(size, rows, layers, total):
    assert layout("w+", size).shape == (rows, 512)
    s = layout("s", size)
    assert (len(s.widths), s.total, s.shape) == (layers, total, (layers, 512))
    assert layout("w", size).shape == layout("z", size).shape == (1, 512)


def test_channels_of_the_largest_generator():
    assert layout("s", 1024).widths == (512,) * 15 + (256,) * 3 + (128,) * 3 + (64,) * 3 + (32,) * 2
    assert layout("s", 64, channel_multiplier=1).widths[-3:] == (512, 256, 256)


def test_every_layer_of_s_takes_the_row_of_its_module():
    names = dict(large.style_layers(8))
    assert len(names) == 26
    assert names["convs.0.conv.modulation"] == names["to_rgb1.conv.modulation"] == 1
    assert names["convs.15.conv.modulation"] == 16
    assert names["to_rgbs.7.conv.modulation"] == 17
    assert list(names)[23:] == ["convs.14.conv.modulation", "convs.15.conv.modulation", "to_rgbs.7.conv.modulation"]


@pytest.mark.parametrize("size", [8, 32, 128])
def test_layouts_of_narrow_generators_and_what_has_so_many_layers(size):
    generator = Generator(size, 64, 4, channels=48)
    w = torch.randn(2, 1, 64)
    with torch.no_grad():
        styles = large.convert(w, layout("w", size, 64), layout("s", size, 64, channels=48), generator)
        assert torch.equal(styles, torch.stack(generator.styles(w[:, 0]), dim=1))
    s = layout("s", size)
    with pytest.raises(ValueError, match=f"got {len(s.widths)} layers of up to 512, as many as .*S at {size} px"):
        layout("w+", 512).check(np.zeros((1, *s.shape)))


def test_flattened_codes_come_back():
    rows = torch.tensor(normal(2, S.total))
    codes = S.unflatten(rows)
    assert codes.shape == (2, 5, 5)
    start = 0
    for layer, width in enumerate(S.widths):
        assert torch.equal(codes[:, layer, :width], rows[:, start : start + width])
        assert not codes[:, layer, width:].any()
        start += width
    assert torch.equal(S.flatten(codes), rows)


def test_conversions_follow_the_generator():
    generator = Styles()
    z = torch.tensor(normal(2, 1, 3))
    with torch.no_grad():
        w = large.convert(z, Z, W, generator)
        rows = large.convert(z, Z, W_PLUS, generator)
        styles = large.convert(z, Z, S, generator)
        assert_allclose(w[:, 0], generator.style(z[:, 0]))
        assert torch.equal(rows, torch.stack([w[:, 0]] * 4, dim=1))
        different = torch.tensor(normal(2, 4, 3, seed=1))
        assert torch.equal(large.convert(rows, W_PLUS, S, generator), styles)
        own = large.convert(different, W_PLUS, S, generator)
        modules = [(generator.conv1, 0), (generator.to_rgb1, 1), (generator.convs[0], 1), (generator.convs[1], 2)]
        for layer, (block, row) in enumerate([*modules, (generator.to_rgbs[0], 3)]):
            assert_allclose(own[:, layer, : S.widths[layer]], block["conv"]["modulation"](different[:, row]))
    assert torch.equal(large.convert(rows, W_PLUS, W), w)


def test_codes_truncated_in_their_first_layers_are_still_of_w():
    first, later = normal(1, 3), normal(1, 3, seed=1)
    codes = np.stack([np.concatenate([first] * 2 + [later] * 2)])
    assert_allclose(large.convert(codes, W_PLUS, W), [first])
    with pytest.raises(ValueError, match="code 0 of W\\+ changes 2 times"):
        large.convert(codes[:, [0, 2, 0, 0]], W_PLUS, W)


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (S, W, r"S \(5 layers of up to 5\) cannot be converted to W"),
        (W, Z, "cannot be converted to Z"),
        (W_PLUS, Layout("w+", (3,) * 6), r"cannot be converted to W\+ \(6 layers"),
        (Z, W, "Z -> W goes through the generator"),
        (W, S, "W -> S goes through the generator"),
    ],
)
def test_ways_that_do_not_exist(source, target, message):
    with pytest.raises(ValueError, match=message):
        large.convert(np.zeros((1, *source.shape)), source, target)


def test_codes_of_another_generator_are_refused():
    with pytest.raises(ValueError, match=r"widths \(5, 5, 5, 4, 4\), those of the layout are \(5, 5, 5, 5, 4\)"):
        large.convert(np.zeros((1, 1, 3)), W, Layout("s", (5, 5, 5, 5, 4)), Styles())
    with pytest.raises(ValueError, match=r"S of 8 layers comes from W\+ of 6 layers, got 4"):
        large.convert(np.zeros((1, 4, 3)), W_PLUS, Layout("s", (5,) * 8), Styles())
    with pytest.raises(ValueError, match="no module 'style'"):
        large.convert(np.zeros((1, 1, 3)), Z, W, nn.Linear(3, 3))


def test_codes_of_another_space_are_refused():
    with pytest.raises(
        ValueError, match=r"must be of W\+, 18 layers .*; got 14 layers .*, as many as S at 64 px or W\+ at 256 px has"
    ):
        layout("w+", 1024).check(np.zeros((2, 14, 512)))
    with pytest.raises(ValueError, match=r"of W, 1 layer of 512; got 1 layer of 256"):
        layout("w").check(np.zeros((2, 1, 256)))
    with pytest.raises(ValueError, match="must be 0 beyond the width of a layer"):
        S.check(np.ones((1, 5, 5)))
    with pytest.raises(ValueError, match=r"codes must be \(N, L, D\) and not empty, got shape \(2, 512\)"):
        layout("w").check(np.zeros((2, 512)))
    with pytest.raises(ValueError, match="codes must be finite; row 1 is not"):
        W.check([[[0.0, 0.0, 0.0]], [[0.0, math.nan, 0.0]]])
    with pytest.raises(ValueError, match=r"codes of S have 23 numbers, got 22"):
        S.unflatten(np.zeros((1, 22)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: layout("w+", 100), "size must be one of 8, 16, 32, .*1024, got 100"),
        (lambda: layout("v"), "latent space 'v' is unknown; choices: z, w, w\\+, s"),
        (lambda: Layout("w", (3, 3)), "codes of w have one layer, got 2"),
        (lambda: Layout("w+", (3, 4)), "the layers of w\\+ have the same width"),
        (lambda: Layout("s", ()), "widths must be one or more numbers above 0"),
    ],
)
def test_layouts_that_do_not_exist(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Files of codes


@pytest.mark.parametrize("shape", [(12,), (1, 12), (4, 3), (1, 4, 3)])
@pytest.mark.parametrize("kind", ["<f4", ">f8"])
def test_one_code_in_any_form(tmp_path, shape, kind):
    code = normal(4, 3).astype(kind)
    np.save(tmp_path / "code.npy", code.reshape(shape))
    read = large.read_codes(tmp_path / "code.npy", W_PLUS)
    assert_allclose(read, [code])
    assert read.dtype == (torch.float32 if kind == "<f4" else torch.float64)


def test_what_a_file_holds_depends_on_the_layout_that_is_asked_for(tmp_path):
    codes = normal(4, 3)
    np.save(tmp_path / "codes.npy", codes)
    assert large.read_codes(tmp_path / "codes.npy", W_PLUS).shape == (1, 4, 3)
    assert_allclose(large.read_codes(tmp_path / "codes.npy", W), codes[:, None])


def test_codes_in_safetensors(tmp_path):
    rows = torch.tensor(normal(2, S.total)).float()
    save_file({"codes": rows}, tmp_path / "whole.safetensors")
    parts = {f"S{number}": part.contiguous() for number, part in enumerate(rows.split(S.widths, dim=1))}
    save_file(parts, tmp_path / "layers.safetensors")
    save_file({name: part[0].contiguous() for name, part in parts.items()}, tmp_path / "one.safetensors")
    codes = S.unflatten(rows)
    assert torch.equal(large.read_codes(tmp_path / "whole.safetensors", S), codes)
    assert torch.equal(large.read_codes(tmp_path / "layers.safetensors", S), codes)
    assert torch.equal(large.read_codes(tmp_path / "one.safetensors", S), codes[:1])
    with pytest.raises(ValueError, match=r"S4 have shapes .*\(2, 4\)\]; of S they have widths \(5, 5, 5, 5, 4\)"):
        large.read_codes(tmp_path / "layers.safetensors", Layout("s", (5, 5, 5, 5, 4)))


class Harmful:
    ran = False

    def __reduce__(self):
        return (setattr, (Harmful, "ran", True))


def test_files_that_are_no_codes(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([Harmful()], dtype=object), allow_pickle=True)
    np.save(tmp_path / "whole.npy", np.arange(12))
    np.save(tmp_path / "short.npy", np.zeros(11))
    np.save(tmp_path / "broken.npy", np.array([[0.0] * 12, [math.inf] * 12]))
    np.save(tmp_path / "cut.npy", np.zeros(12))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:-8])
    np.savez(tmp_path / "archive.npz", codes=np.zeros(12))
    (tmp_path / "archive.npz").rename(tmp_path / "archive.npy")
    (tmp_path / "codes.pkl").write_bytes(b"")
    (tmp_path / "text.safetensors").write_text("no tensors")
    save_file({"a": torch.zeros(12), "b": torch.zeros(12)}, tmp_path / "two.safetensors")
    save_file({"a": torch.zeros(12, dtype=torch.int8)}, tmp_path / "quantised.safetensors")
    for name, message in {
        "objects.npy": "damaged or no .npy file of numbers",
        "whole.npy": "holds int64, not an array of floating-point numbers",
        "short.npy": r"holds shape \(11,\); codes of W\+ .* are \(12,\) or \(N, 12\) or \(4, 3\) or \(N, 4, 3\)",
        "broken.npy": "codes must be finite; row 1 is not",
        "cut.npy": "damaged or no .npy file of numbers",
        "archive.npy": "holds an archive",
        "codes.pkl": "codes are read from .npy and .safetensors files; pickles .* run what is in them",
        "text.safetensors": "damaged or no safetensors file",
        "two.safetensors": "holds 2 tensors; codes are one tensor, or a layer each, S0 to S3",
        "quantised.safetensors": "a holds int8, not an array of floating-point numbers",
    }.items():
        with pytest.raises(ValueError, match=rf"{name}: {message}"):
            large.read_codes(tmp_path / name, W_PLUS)
    assert not Harmful.ran
    with pytest.raises(FileNotFoundError, match="no such file of codes"):
        large.read_codes(tmp_path / "none.npy", W_PLUS)


# Distances


def test_distances_against_loops():
    codes, normals = normal(5, 4, 3), normal(4, 3, seed=1)
    looped = [
        [sum(codes[n, l, d] * normals[l, d] for d in range(3)) + 0.5 for l in range(4)]  # noqa: E741
        for n in range(5)
    ]
    assert_allclose(large.signed_distances(codes, normals, intercept=0.5), looped)
    as_tensors = large.signed_distances(torch.tensor(codes).float(), torch.tensor(normals).float(), 0.5)
    assert as_tensors.dtype == torch.float32
    assert_allclose(as_tensors, looped, rtol=1e-5)
    weights = [1.0, 0.0, 2.0, 5.0]
    one = [sum(weight * d for weight, d in zip(weights, row, strict=True)) / 8 for row in looped]
    assert_allclose(large.weighted_distance(looped, weights), one)
    assert_allclose(large.weighted_distance(looped), np.mean(looped, axis=1))


def test_distances_have_gradients_and_keep_the_codes_device():
    codes = torch.tensor(normal(5, 4, 3), requires_grad=True)
    normals = torch.tensor(normal(4, 3, seed=1))
    large.signed_distances(codes, normals).sum().backward()
    assert torch.equal(codes.grad, normals.expand(5, -1, -1))


def test_zeros_beside_narrow_layers_change_no_distance():
    rows, normals = torch.tensor(normal(3, S.total)), torch.tensor(normal(1, S.total, seed=1))
    distances = large.signed_distances(S.unflatten(rows), S.unflatten(normals)[0])
    assert_allclose(distances.sum(dim=1), rows @ normals[0])


def test_sorting_needs_no_labels():
    codes, normals, against = normal(20, 4, 3), normal(4, 3, seed=1), normal(4, 3, seed=2)
    flat = codes.reshape(20, -1)
    assert large.sort_by_direction(codes, normals).tolist() == np.argsort(flat @ normals.ravel()).tolist()
    difference = flat @ (normals - against).ravel()
    assert large.sort_by_direction(codes, normals, against=against).tolist() == np.argsort(difference).tolist()
    weights = np.array([0.0, 1.0, 0.0, 3.0])
    weighted = (codes * normals).sum(axis=2) @ weights
    assert large.sort_by_direction(codes, normals, weights).tolist() == np.argsort(weighted).tolist()
    assert large.sort_by_direction(codes, -normals).tolist() == large.sort_by_direction(codes, normals)[::-1].tolist()
    assert large.sort_by_direction(codes[[3] * 4], normals).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: large.signed_distances(np.ones((2, 4, 3)), np.ones((3, 3))),
            r"have shape \(4, 3\) each, normals \(3, 3\)",
        ),
        (lambda: large.signed_distances(np.ones((2, 12)), np.ones((4, 3))), r"codes must be \(N, L, D\)"),
        (lambda: large.signed_distances(np.ones((2, 4, 3)), np.zeros((4, 3))), "direction has length 0"),
        (lambda: large.signed_distances(np.ones((2, 1, 1)), [[math.nan]]), "normals must be finite; row 0"),
        (lambda: large.signed_distances(np.ones((2, 1, 1)), [[1.0]], math.inf), "intercept must be finite"),
        (lambda: large.signed_distances([[[1.0], [1.0, 2.0]]], [[1.0]]), "codes must be one array of numbers"),
        (lambda: large.signed_distances([[["a"]]], [[1.0]]), "codes must be real numbers"),
        (lambda: large.signed_distances(np.ones((2, 1, 1)) * 1j, [[1.0]]), "codes must be real numbers"),
        (lambda: large.signed_distances(np.ones((0, 1, 1)), [[1.0]]), "not empty"),
        (lambda: large.weighted_distance([[1.0, 2.0]], [1.0]), r"weights must be one per layer, \(2,\)"),
        (lambda: large.weighted_distance([[1.0, 2.0]], [1.0, -1.0]), "weights must be 0 or above"),
        (lambda: large.weighted_distance([[1.0, 2.0]], [0.0, 0.0]), "one of them above 0"),
    ],
)
def test_bad_distances(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Calibration


@pytest.mark.parametrize("seed", range(5))
def test_two_labels_determine_the_line(seed):
    distances, labels = normal(2, seed=seed), 40 * normal(2, seed=seed + 10)
    slope, offset = large.calibrate(distances, labels)
    assert_allclose(slope * distances + offset, labels, rtol=1e-12)


def test_calibration_is_least_squares_and_undoes_an_intercept():
    distances, labels = normal(9), normal(9, seed=1)
    slope, offset = large.calibrate(torch.tensor(distances), torch.tensor(labels))
    assert_allclose((slope, offset), np.polyfit(distances, labels, 1))
    moved, other = large.calibrate(distances + 7, labels)
    assert_allclose((moved, other), (slope, offset - 7 * slope))
    several = normal(9, 3)
    slopes, offset = large.calibrate_layers(several, labels, "none")
    solved = np.linalg.lstsq(np.column_stack([several, np.ones(9)]), labels, rcond=None)[0]
    assert_allclose([*slopes, offset], solved)


def soft_thresholded(covariance, count, penalty, strength):
    """Slope of a standardised feature, worked out from the objectives by hand."""
    if penalty == "ridge":
        return count * covariance / (count + strength)
    share = 1.0 if penalty == "lasso" else 0.5
    shrunk = math.copysign(max(0.0, abs(covariance) - strength * share), covariance)
    return shrunk / (1 + strength * (1 - share))


@pytest.mark.parametrize("penalty", ["ridge", "lasso", "elastic_net"])
@pytest.mark.parametrize("strength", [1.0, 0.2])
def test_penalties_hold_back_the_slope_of_the_standardised_distance(penalty, strength):
    distances = normal(30)
    labels = 8 * distances + 50 + normal(30, seed=1)
    standard = (distances - distances.mean()) / distances.std()
    expected = soft_thresholded(np.mean(standard * (labels - labels.mean())), 30, penalty, strength)
    slope, offset = large.calibrate(distances, labels, penalty, strength)
    assert slope * distances.std() == pytest.approx(expected, rel=1e-6)
    assert slope * distances.mean() + offset == pytest.approx(labels.mean())
    # The scale of a distance is arbitrary, so that answers must not depend on it.
    scaled, again = large.calibrate(distances / 512, labels, penalty, strength)
    assert_allclose(scaled * distances / 512 + again, slope * distances + offset, rtol=1e-6)


def test_an_elastic_net_of_the_raw_distance_answers_one_value():
    """As published, with layer weights that sum to 1 / 512."""
    distances = normal(100) / 512
    labels = 30 + 10 * 512 * distances
    assert ElasticNet(max_iter=1_000_000).fit(distances[:, None], labels).coef_ == 0
    slope, offset = large.calibrate(distances, labels, "elastic_net")
    answers = slope * distances + offset
    assert np.corrcoef(answers, labels)[0, 1] == pytest.approx(1)
    assert 0.5 < answers.std() / labels.std() < 0.7


def test_slopes_of_few_labels_are_scaled_by_the_pool():
    """Two labels that hardly differ in a layer say nothing about its slope, however it is standardised."""
    pool = normal(50, 3)
    few, labels = pool[:2].copy(), np.array([20.0, 60.0])
    few[1, 2] = few[0, 2] + 1e-5
    slopes, offset = large.calibrate_layers(few, labels, "ridge", 2.0, pool)
    scaled, scale = few / pool.std(axis=0), pool.std(axis=0)
    expected = Ridge(alpha=2.0).fit(scaled, labels)
    assert_allclose(slopes, expected.coef_ / scale, rtol=1e-9)
    assert_allclose(offset, expected.intercept_, rtol=1e-9)
    assert np.ptp(pool @ slopes.numpy()) < 200
    assert np.ptp(pool @ large.calibrate_layers(few, labels, "ridge", 2.0)[0].numpy()) > 1e5
    with pytest.raises(ValueError, match="pool must have as many layers as distances, 3, got 2"):
        large.calibrate_layers(few, labels, "ridge", 2.0, pool[:, :2])


def test_a_layer_without_differences_gets_slope_0():
    several = normal(9, 3)
    several[:, 1] = 0
    for penalty in ("none", "ridge", "elastic_net"):
        slopes, offset = large.calibrate_layers(several, 5 * several[:, 0] + 2, penalty, 0.01)
        assert slopes[1] == 0
        assert slopes[0] == pytest.approx(5, abs=0.1)
        assert offset == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize(
    ("distances", "labels", "options", "message"),
    [
        ([1.0], [2.0], {}, "two labelled distances or more, got 1"),
        ([1.0, 2.0], [5.0, 5.0], {}, r"labels are all equal \(5\)"),
        ([3.0, 3.0], [1.0, 2.0], {}, "distances are all equal"),
        (torch.tensor([1.0, 1.0 + 2e-7]), [1.0, 2.0], {}, "distances are all equal"),
        ([1.0, 2.0, 3.0], [1.0, 2.0], {}, "distances and labels must be as many, got 3 and 2"),
        ([1.0, math.nan], [1.0, 2.0], {}, "distances must be finite; row 1"),
        ([1.0, 2.0], [math.inf, 2.0], {}, "labels must be finite; row 0"),
        ([[1.0, 2.0]], [1.0, 2.0], {}, r"distances must be \(n,\)"),
        (
            [1.0, 2.0],
            [1.0, 2.0],
            {"penalty": "l2"},
            "penalty 'l2' is unknown; choices: none, ridge, lasso, elastic_net",
        ),
        (
            [1.0, 2.0],
            [1.0, 2.0],
            {"penalty": "ridge", "strength": 0},
            "strength must be a finite number above 0, got 0",
        ),
    ],
)
def test_bad_calibrations(distances, labels, options, message):
    with pytest.raises(ValueError, match=message):
        large.calibrate(distances, labels, **options)


# Which codes to label


def picked(distances, budget, seed, minimum):
    """The rule as a loop."""
    taken = []
    for place in np.random.default_rng(seed).permutation(len(distances)):
        if len(taken) < budget and all(abs(distances[place] - distances[other]) > minimum for other in taken):
            taken.append(place)
    return taken


@pytest.mark.parametrize("budget", [2, 5, 10, 20])
@pytest.mark.parametrize("seed", range(5))
def test_picks_are_apart(budget, seed):
    distances = normal(500, seed=seed)
    minimum = np.ptp(distances) / budget**1.3
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = large.spread_out(distances, budget, seed)
    expected = picked(distances, budget, seed, minimum)
    assert rows[: len(expected)].tolist() == expected
    assert len(set(rows.tolist())) == budget
    assert len(caught) == (len(expected) < budget)
    if not caught:
        assert np.diff(np.sort(distances[rows])).min() > minimum


def test_too_few_that_are_apart_are_filled_up_with_a_warning():
    distances = torch.tensor([0.0, 0.01, 0.02, 10.0, 10.01, 10.03])
    with pytest.warns(UserWarning, match="only 2 of 4 codes differ by more than 1.65"):
        rows = large.spread_out(distances, 4, seed=1)
    assert len(set(rows.tolist())) == 4
    first, second, third, fourth = distances[rows].double().tolist()
    assert abs(first - second) > 9
    rest = [d for d in distances.double().tolist() if d not in (first, second)]
    farthest = max(rest, key=lambda d: min(abs(d - first), abs(d - second)))
    assert third == farthest
    assert fourth in rest
    with pytest.warns(UserWarning, match="only 1 of 3"):
        assert len(set(large.spread_out([5.0] * 4, 3, seed=0).tolist())) == 3


def test_picks_are_a_function_of_the_seed_and_of_no_scale():
    distances = normal(100)
    rows = large.spread_out(distances, 5, seed=3)
    assert rows.tolist() == large.spread_out(distances, 5, seed=3).tolist()
    assert rows.tolist() == large.spread_out(-1000 * distances + 7, 5, seed=3).tolist()
    assert rows.tolist() != large.spread_out(distances, 5, seed=4).tolist()


def test_the_whole_pool_no_minimum_and_its_center():
    distances = normal(50)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sorted(large.spread_out(distances, 50, seed=0).tolist()) == list(range(50))
        assert large.spread_out(distances, 9, 0, minimum=-1).tolist() == picked(distances, 9, 0, -1)
        assert len(large.spread_out([5.0] * 4, 3, seed=0, minimum=-1)) == 3
        central = large.spread_out(distances, 24, 0, minimum=-1, central=0.5)
    low, high = np.quantile(distances, [0.25, 0.75])
    assert sorted(central.tolist()) == np.flatnonzero((low < distances) & (distances < high)).tolist()


@pytest.mark.parametrize(
    ("distances", "budget", "options", "message"),
    [
        ([1.0, 2.0], 3, {}, "budget must be between 1 and the size of the pool, 2; got 3"),
        ([1.0, 2.0], 0, {}, "got 0"),
        (np.arange(20.0), 19, {"central": 0.5}, "size of the pool, 10, the central 0.5 of 20; got 19"),
        (np.arange(20.0), 2, {"central": 0.0}, "central must be a share above 0"),
        ([1.0, math.nan], 1, {}, "distances must be finite; row 1"),
        ([[1.0, 2.0]], 1, {}, r"distances must be \(N,\)"),
    ],
)
def test_bad_budgets(distances, budget, options, message):
    with pytest.raises(ValueError, match=message):
        large.spread_out(distances, budget, 0, **options)


# Directions


@pytest.mark.parametrize("classifier", ["svm", "logistic"])
def test_extremes_show_the_direction_of_a_score(classifier):
    direction = normal(2, 3, seed=5)
    codes = normal(3000, 2, 3)
    scores = (codes * direction).sum(axis=(1, 2))
    found = large.direction_from_extremes(torch.tensor(codes), scores, share=0.1, classifier=classifier)
    assert found.normal.norm() == pytest.approx(1)
    assert (found.normal.numpy() * direction).sum() / np.linalg.norm(direction) > 0.97
    assert found.accuracy == 1.0


def test_two_codes_are_apart_along_their_difference():
    codes = np.array([[[3.0, 0.0]], [[0.0, 4.0]]])
    found = large.direction_from_extremes(codes, [1.0, 9.0])
    assert_allclose(found.normal, [[-0.6, 0.8]], atol=1e-6)
    assert found.accuracy is None


def test_accuracy_is_that_of_codes_held_out():
    noise = large.direction_from_extremes(normal(400, 1, 50), normal(400, seed=1), share=0.5)
    assert 0.35 < noise.accuracy < 0.65
    again = large.direction_from_extremes(normal(400, 1, 50), normal(400, seed=1), share=0.5)
    other = large.direction_from_extremes(normal(400, 1, 50), normal(400, seed=1), share=0.5, seed=1)
    assert torch.equal(again.normal, noise.normal)
    assert not torch.equal(other.normal, noise.normal)


@pytest.mark.parametrize(
    ("codes", "scores", "options", "message"),
    [
        (normal(4, 1, 2), [1, 1, 1, 1], {}, "two ends apart: the 1 lowest of 4 go up to 1, the 1 highest down to 1"),
        (normal(10, 1, 2), [0] * 8 + [1] * 2, {"share": 0.3}, "the 3 lowest of 10 go up to 0, the 3 highest down to 0"),
        (np.ones((4, 1, 2)), [1, 2, 3, 4], {}, "codes at the two ends are the same"),
        (normal(1, 1, 2), [1], {}, "codes at two ends, got 1 code"),
        (normal(4, 1, 2), [1, 2, 3], {}, "codes and scores must be as many, got 4 and 3"),
        (normal(4, 1, 2), [1, 2, 3, math.nan], {}, "scores must be finite; row 3"),
        (normal(4, 1, 2), [1, 2, 3, 4], {"share": 0.6}, "share must be above 0, at most 0.5, got 0.6"),
        (normal(4, 1, 2), [1, 2, 3, 4], {"classifier": "tree"}, "classifier 'tree' is unknown; choices: svm, logistic"),
        (normal(4, 2), [1, 2, 3, 4], {}, r"codes must be \(N, L, D\)"),
    ],
)
def test_extremes_that_show_nothing(codes, scores, options, message):
    with pytest.raises(ValueError, match=message):
        large.direction_from_extremes(codes, scores, **options)


def encode(texts):
    """Features of 3 numbers: words counted, each with a weight of its own, so that no two have the same length."""
    words = {"young": 5.0, "old": 1.0, "photo": 2.0}
    counts = [[weight * text.split().count(word) + 0.5 for word, weight in words.items()] for text in texts]
    return torch.tensor(counts).double()


def test_text_direction_against_loops():
    templates = ("a photo of a {name} person", "{name} and {name}", "the photo of a photo: {name}")
    ends = []
    for text in ("young", "old"):
        rows = [encode([template.replace("{name}", text)])[0].numpy() for template in templates]
        mean = sum(row / np.linalg.norm(row) for row in rows) / 3
        ends.append(mean / np.linalg.norm(mean))
    expected = (ends[1] - ends[0]) / np.linalg.norm(ends[1] - ends[0])
    assert_allclose(large.text_direction("young", "old", encode, templates), expected)
    assert_allclose(large.text_direction("old", "young", encode, templates), -expected)


def test_bad_texts():
    with pytest.raises(ValueError, match=r"template 'a photo of \{\}' lacks the place \{name\}"):
        large.text_direction("young", "old", encode, ["a photo of {}"])
    with pytest.raises(ValueError, match="templates must be one or more"):
        large.text_direction("young", "old", encode, [])
    with pytest.raises(ValueError, match="'blue' and 'green' have the same features"):
        large.text_direction("blue", "green", encode)
    with pytest.raises(ValueError, match="text features must be finite"):
        large.text_direction("young", "old", lambda texts: encode(texts) * math.nan)


MIX = torch.tensor(normal(5, 5, 2, seed=7))


def render(codes):
    """Pictures of 2 pixels: a smooth function of the code that is not linear."""
    return torch.sin(torch.einsum("nld,ldp->np", codes.double(), MIX[: codes.shape[1], : codes.shape[2]]))


def seen(images):
    return torch.stack([images[:, 0], images[:, 1], images[:, 0] * images[:, 1]], dim=1)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_relevance_against_loops(batch_size):
    codes = normal(4, 2, 3)
    looped = np.zeros((2, 3, 3))
    for layer in range(2):
        for channel in range(3):
            for code in torch.tensor(codes):
                up, down = code.clone(), code.clone()
                up[layer, channel] += 0.7
                down[layer, channel] -= 0.7
                looped[layer, channel] += (seen(render(up[None])) - seen(render(down[None])))[0].numpy() / 4
    table = large.channel_relevance(codes, render, seen, step=0.7, batch_size=batch_size)
    assert_allclose(table, looped)


def test_relevance_moves_channels_alone():
    codes = S.unflatten(normal(2, S.total))
    moved = []

    def watched(given):
        moved.append(S.check(given))
        return render(given)

    table = large.channel_relevance(codes, watched, seen, step=0.1, layout=S)
    assert len(moved) == S.total
    assert not table[~S.channels()].any()
    assert table[S.channels()].any(dim=1).all()


def test_weak_channels_are_left_out_of_a_text_direction():
    relevance, text = normal(5, 4, 3), normal(3, seed=1)
    beta = relevance @ text
    least = sorted(np.abs(beta).ravel())[int(0.8 * 20)]  # of 20, the 80th percentile lies between the 16th and 17th
    kept = large.direction_from_relevance(relevance, text)
    assert_allclose(kept, np.where(np.abs(beta) >= least, beta, 0))
    assert int((kept != 0).sum()) == 4
    assert_allclose(large.direction_from_relevance(relevance, text, quantile=0), beta)


def test_zeros_beside_narrow_layers_are_no_weak_channels():
    relevance = torch.zeros(5, 5, 1)
    relevance[S.channels()] = torch.arange(1.0, 24.0)[:, None]
    kept = large.direction_from_relevance(relevance, [1.0], quantile=0.5, layout=S)
    assert int((kept != 0).sum()) == 12


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_text_gradient_against_differences(batch_size):
    codes, text, step = normal(4, 2, 3), normal(3, seed=1), 1e-6
    looped = np.zeros((2, 3))
    for layer in range(2):
        for channel in range(3):
            for code in torch.tensor(codes):
                up, down = code.clone(), code.clone()
                up[layer, channel] += step
                down[layer, channel] -= step
                moved = (seen(render(up[None])) - seen(render(down[None])))[0].numpy()
                looped[layer, channel] += moved @ text / (2 * step) / 4
    with torch.no_grad():  # as in an evaluation
        beta = large.text_gradient(codes, render, seen, text, batch_size)
    assert_allclose(beta, looped, rtol=1e-6, atol=1e-9)
    relevance = large.channel_relevance(codes, render, seen, step=1e-4)
    assert_allclose(relevance @ torch.tensor(text) / 2e-4, beta, rtol=1e-5, atol=1e-8)


def test_bad_text_gradients():
    codes = normal(2, 1, 3)
    with pytest.raises(ValueError, match=r"features must be \(2, 2\), as the text, got \(2, 3\)"):
        large.text_gradient(codes, render, seen, [1.0, 0.0])
    with pytest.raises(ValueError, match="gradients must be finite; row 0"):
        large.text_gradient(codes, render, lambda images: seen(images) / 0, [1.0, 0.0, 0.0])
    with pytest.raises(ValueError, match=r"codes must be \(N, L, D\)"):
        large.text_gradient(codes[0], render, seen, [1.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="text must be finite; row 1"):
        large.text_gradient(codes, render, seen, [1.0, math.nan, 0.0])


def test_the_strongest_channels():
    """Of 20 sizes, in whichever way they act, the four above the quantile; of narrow layers the channels alone."""
    beta = torch.arange(1.0, 21.0).reshape(4, 5) * torch.tensor([1.0, -1, 1, -1, 1])
    assert torch.equal(large.strongest_channels(beta), torch.where(beta.abs() > 16, beta, 0))
    assert torch.equal(large.strongest_channels(beta, quantile=0), beta)
    narrow = torch.zeros(5, 5)
    narrow[S.channels()] = torch.arange(1.0, 24.0)
    assert torch.equal(large.strongest_channels(narrow, 0.5, S), torch.where(narrow >= 12, narrow, 0))
    for wrong, options, message in (
        (torch.zeros(2, 2), {}, "direction has length 0"),
        (beta, {"quantile": -0.1}, "quantile must be 0 or above and below 1"),
        (beta[0], {}, r"channels must be \(L, D\)"),
        (beta * math.inf, {}, "channels must be finite; row 0"),
    ):
        with pytest.raises(ValueError, match=message):
            large.strongest_channels(wrong, **options)


@pytest.mark.parametrize(
    ("relevance", "text", "options", "message"),
    [
        (np.zeros((2, 2, 3)), np.ones(3), {}, "direction has length 0"),
        (np.ones((2, 2, 3)), np.ones(2), {}, "relevance has 3 features and text 2"),
        (np.ones((2, 2, 3)), np.ones(3), {"quantile": 1.0}, "quantile must be 0 or above and below 1"),
        (np.ones((2, 2, 3)), np.ones(3), {"layout": S}, r"channels must be of S, shape \(5, 5\), got \(2, 2\)"),
        (np.ones((2, 2, 3)), [1.0, 1.0, math.nan], {}, "text must be finite; row 2"),
    ],
)
def test_bad_relevance(relevance, text, options, message):
    with pytest.raises(ValueError, match=message):
        large.direction_from_relevance(relevance, text, **options)


def test_bad_edits():
    codes = normal(2, 1, 3)
    with pytest.raises(ValueError, match="step must be a finite number above 0, got 0"):
        large.channel_relevance(codes, render, seen, step=0)
    with pytest.raises(ValueError, match="a row per code, got 1 for 4 codes"):
        large.channel_relevance(codes, render, lambda images: seen(images)[:1], step=1)
    with pytest.raises(ValueError, match="features must be finite"):
        large.channel_relevance(codes, render, lambda images: seen(images) / 0, step=1)


def test_both_forms_of_sefa():
    weights = [normal(6, 4), 3 * normal(5, 4, seed=1)]
    stacked = np.concatenate(weights)
    raw = large.sefa_directions(weights, 4, normalise_channels=False).numpy()
    rows = stacked / np.linalg.norm(stacked, axis=1, keepdims=True)
    scaled = large.sefa_directions([torch.tensor(weight) for weight in weights], 4).numpy()
    for matrix, found in ((stacked, raw), (rows, scaled)):
        right = np.linalg.svd(matrix)[2]
        assert_allclose(np.abs((found * right).sum(axis=1)), 1)
        assert (found[np.arange(4), np.abs(found).argmax(axis=1)] > 0).all()
    assert np.abs((raw[0] * scaled[0]).sum()) < 0.999
    assert_allclose(large.sefa_directions([*weights, np.zeros((2, 4))], 4).numpy(), scaled, atol=1e-12)


def test_sefa_reads_the_layers_of_a_generator():
    generator = Styles()
    weights = large.modulation_weights(generator.state_dict())
    assert [len(weight) for weight in weights] == [5, 5, 5, 4]  # all but that of to_rgbs
    assert torch.equal(
        large.modulation_weights(generator.state_dict(), [2])[0], generator.convs[0]["conv"]["modulation"].weight
    )
    assert large.sefa_directions(weights, 3).shape == (3, 3)
    with pytest.raises(ValueError, match=r"layers must be between 0 and 3, got \[4\]"):
        large.modulation_weights(generator.state_dict(), [0, 4])
    with pytest.raises(ValueError, match="is of no StyleGAN2 generator"):
        large.modulation_weights(nn.Linear(2, 2).state_dict())
    with pytest.raises(ValueError, match="count must be between 1 and the width of a style, 3, got 4"):
        large.sefa_directions(weights, 4)
    with pytest.raises(ValueError, match="matrices of the same D"):
        large.sefa_directions([np.ones((2, 3)), np.ones((2, 4))])
    with pytest.raises(ValueError, match="weight 1 must be finite; row 0"):
        large.sefa_directions([np.ones((2, 3)), [[math.nan] * 3]])


# Layer weights


def test_edit_pairs_stand_on_either_side_and_differ_along_the_direction_alone():
    codes, normals = normal(50, 2, 3), normal(2, 3, seed=1)
    length = np.linalg.norm(normals)
    source, destination = (pair.numpy() for pair in large.edit_pairs(codes, normals, seed=8, intercept=0.4))
    above, below = (((pair * normals).sum(axis=(1, 2)) + 0.4) / length for pair in (source, destination))
    assert (above > 2.5).all()
    assert (above < 5).all()
    assert (below < -2.5).all()
    assert (below > -5).all()
    assert abs(np.corrcoef(above, below)[0, 1]) < 0.4
    assert np.ptp(above) > 2
    gap = source - destination
    assert_allclose(gap, (above - below)[:, None, None] * normals / length)
    along = ((codes - source) * normals).sum(axis=(1, 2), keepdims=True) / length**2
    assert_allclose(codes - source, along * normals, atol=1e-12)


def gradients_looped(source, destination, steps, rate):
    """Adam by hand, one pair at a time, the gradient by hand, too."""
    total, code = np.zeros_like(source), source.copy()
    first, second = np.zeros_like(source), np.zeros_like(source)
    mix = MIX[: source.shape[0], : source.shape[1]].numpy()
    wanted = np.sin(np.einsum("ld,ldp->p", destination, mix))
    for step in range(1, steps + 1):
        inner = np.einsum("ld,ldp->p", code, mix)
        gradient = mix @ (np.sign(np.sin(inner) - wanted) * np.cos(inner) / 2)
        total += gradient
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        code -= rate * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    return total


@pytest.mark.parametrize("steps", [1, 6])
@pytest.mark.parametrize("batch_size", [1, 2, 9])
def test_gradients_against_a_loop(steps, batch_size):
    sources, destinations = normal(5, 2, 3), normal(5, 2, 3, seed=1)
    sums = large.path_gradients(render, sources, destinations, steps, rate=0.05, batch_size=batch_size)
    pairs = zip(sources, destinations, strict=True)
    assert_allclose(sums, [gradients_looped(*pair, steps, 0.05) for pair in pairs])


def test_importance_against_loops():
    edit, random = normal(6, 3, 4), normal(7, 3, 4, seed=1)
    layers = []
    for layer in range(3):
        shares = []
        for channel in range(4):
            used = sum(abs(edit[pair, layer, channel]) for pair in range(6)) / 6
            usual = sum(abs(random[pair, layer, channel]) for pair in range(7)) / 7
            shares.append(used / usual)
        layers.append(sum(shares) / 4)
    expected = [mean / sum(layers) for mean in layers]
    assert_allclose(large.layer_importance(edit, random), expected)
    assert_allclose(large.layer_importance(torch.tensor(1000 * edit), -random), expected)


def test_channels_that_divide_by_zero_are_left_out():
    edit, random = np.abs(normal(6, 3, 4)), np.abs(normal(6, 3, 4, seed=1))
    random[:, 0, 1], random[:, 2, :], random[:, 1, 3] = 0, 0, 1e-30
    weights = large.layer_importance(edit, random)
    assert weights.isfinite().all()
    assert weights.sum() == pytest.approx(1)
    share = edit.mean(axis=0) / np.where(random.mean(axis=0) > 1e-20, random.mean(axis=0), np.inf)
    means = np.array([share[0, [0, 2, 3]].mean(), share[1, :3].mean(), 0])
    assert_allclose(weights, means / means.sum())


def test_rounding_is_that_of_the_gradients_as_they_came():
    """What float32 cannot tell from zero beside the largest is a gradient in float64."""
    edit, random = np.ones((2, 2, 2)), np.ones((2, 2, 2))
    random[:, 0, 0] = 1e-9
    assert_allclose(large.layer_importance(edit, torch.tensor(random, dtype=torch.float32)), [0.5, 0.5])
    assert large.layer_importance(edit, random)[0] > 0.99


def test_importance_counts_the_channels_of_narrow_layers_alone():
    edit, random = (S.unflatten(1 + np.abs(normal(6, S.total, seed=seed))) for seed in (0, 1))
    share = (edit.mean(dim=0) / random.mean(dim=0)).numpy()
    means = np.array([share[layer, :width].mean() for layer, width in enumerate(S.widths)])
    assert_allclose(large.layer_importance(edit, random, S), means / means.sum())


def test_an_edit_weighs_the_layers_that_it_uses():
    """Two layers draw a pixel each; the direction lies in the second one alone."""
    normals = [[0.0, 0.0], [1.0, 0.0]]
    draw = torch.tensor([[[1.0, 0.0], [0.5, 0.0]], [[0.0, 2.0], [0.0, 1.0]]]).double()

    def linear(codes):
        return torch.einsum("nld,ldp->np", codes, draw)

    edit = large.path_gradients(linear, *large.edit_pairs(normal(20, 2, 2), normals, seed=0))
    random = large.path_gradients(linear, normal(20, 2, 2, seed=1), normal(20, 2, 2, seed=2))
    assert_allclose(large.layer_importance(edit, random), [0, 1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: large.layer_importance(np.zeros((1, 2, 2)), np.ones((1, 2, 2))), "no layer can be weighed"),
        (lambda: large.layer_importance(np.ones((1, 2, 2)), np.zeros((1, 2, 2))), "no layer can be weighed"),
        (
            lambda: large.layer_importance(np.ones((1, 2, 2)), np.ones((1, 3, 2))),
            r"random gradients must be \(M, 2, 2\)",
        ),
        (
            lambda: large.layer_importance(np.ones((1, 2, 2)), np.ones((1, 2, 2)), S),
            r"edit gradients must be \(M, 5, 5\)",
        ),
        (lambda: large.layer_importance([[[math.nan]]], [[[1.0]]]), "edit gradients must be finite; row 0"),
        (lambda: large.edit_pairs(np.ones((2, 1, 2)), [[0.0, 0.0]], 0), "direction has length 0"),
        (lambda: large.edit_pairs(np.ones((2, 1, 2)), [[0.0, 1.0]], 0, steps=(5, 2)), "0 <= smallest <= largest"),
        (lambda: large.path_gradients(render, np.ones((2, 1, 2)), np.ones((1, 1, 2))), "must be of one shape"),
        (
            lambda: large.path_gradients(render, np.ones((2, 1, 2)), np.ones((2, 1, 2)), 0),
            "steps must be .* above 0, got 0",
        ),
        (
            lambda: large.path_gradients(lambda codes: render(codes)[:1], np.ones((2, 1, 2)), np.ones((2, 1, 2))),
            "a picture per code, got 1 for 2 codes",
        ),
    ],
)
def test_layers_that_cannot_be_weighed(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Together


def test_two_labels_suffice_where_the_direction_is_known():
    """Codes whose value is a line along a direction, but for noise: the way of the paper, from extremes to a value."""
    truth = normal(4, 8, seed=3)
    truth /= np.linalg.norm(truth)
    codes = normal(2000, 4, 8)
    values = 40 + 12 * (codes * truth).sum(axis=(1, 2)) + normal(2000, seed=4)
    found = large.direction_from_extremes(codes[:1000], values[:1000], share=0.1)
    distances = large.weighted_distance(large.signed_distances(codes, found.normal))
    few = large.spread_out(distances[1000:1500], budget=2, seed=0) + 1000
    slope, offset = large.calibrate(distances[few], values[few])
    errors = np.abs(slope * distances[1500:].numpy() + offset - values[1500:])
    assert errors.mean() < 0.5 * np.abs(values[1500:] - np.median(values[1500:])).mean()


def test_the_example_of_the_documentation(tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "docs" / "large.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    codes, normals = normal(30, 18, 512), normal(18, 512, seed=1)
    np.save(tmp_path / "codes.npy", codes.reshape(30, -1).astype("f4"))
    np.save(tmp_path / "age.npy", normals)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(example, names)
    assert_allclose(names["ages"][names["rows"]], [23, 61], rtol=1e-4)
    order = np.argsort(np.einsum("nld,ld->n", codes, normals))
    assert np.argsort(names["ages"].numpy()).tolist() in (order.tolist(), order[::-1].tolist())


# The head, on layer-wise features


def part(num, seed, num_layers=4, width=8):
    """Outputs and targets whose label is a line along a direction of all layers, but for noise of 1."""
    truth = normal(num_layers, width, seed=3)
    codes = normal(num, num_layers, width, seed=seed)
    values = 40 + 12 * (codes * truth).sum(axis=(1, 2)) / np.linalg.norm(truth) + normal(num, seed=seed + 1)
    values = torch.tensor(np.clip(values, 0, 100)).float()
    return torch.tensor(codes).float(), Targets(values, Ranks(range(101)).nearest(values))


def context(**options):
    given = {"label_mean": 40.0, "label_std": 12.0, "layer_dims": (8,) * 4, **options}
    return HeadContext(Ranks(range(101)), max(given["layer_dims"], default=8), **given)


def regressor(method="large", **options):
    return build_head(method, context(), options)


def fitted(features, targets, **options):
    head = regressor(**options)
    head.fit((head(features), targets), None)
    return head


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"budget": 2},
        {"layers": "separate"},
        {"layers": "separate", "penalty": "ridge", "budget": 20},
        {"penalty": "elastic_net", "strength": 0.01},
    ],
)
def test_the_head_reads_values_off_the_distance(options):
    train, targets = part(1500, seed=10)
    test, wanted = part(300, seed=20)
    head = fitted(train, targets, share=0.1, **options)
    errors = (head.predict(head(test)).value - wanted.values).abs()
    constant = (wanted.values - targets.values.median()).abs().mean()
    assert errors.mean() < 0.4 * constant
    assert head.loss(head(test), wanted)["loss"] == pytest.approx(errors.mean().item() / 12, rel=1e-4)
    assert head.slopes.abs().sum() == pytest.approx(1)  # they weigh the layers; the normals are as long as it is steep


def test_the_head_is_its_parts():
    train, targets = part(400, seed=10)
    head = fitted(train, targets, share=0.1, budget=5, seed=3, unit_length=True)
    codes = train / train.norm(dim=2, keepdim=True)
    found = large.direction_from_extremes(codes, targets.values, share=0.1, seed=3).normal
    distances = large.weighted_distance(large.signed_distances(codes, found))
    rows = large.spread_out(distances, 5, seed=3)
    slope, offset = large.calibrate(distances[rows], targets.values[rows])
    assert_allclose(head.predict(head(train)).value, slope * distances + offset, rtol=1e-4)
    assert_allclose(head.normals, abs(slope) / 12 * found, rtol=1e-4, atol=1e-7)
    assert_allclose(head.slopes, [math.copysign(0.25, slope)] * 4)
    assert_allclose(head.space(train).mean(dim=1), abs(slope) / 12 * distances, atol=1e-5)


def test_before_fit_the_answer_is_the_mean_and_after_loading_the_same():
    train, targets = part(400, seed=10)
    head = fitted(train, targets, share=0.1)
    fresh = regressor(share=0.1)
    assert fresh.needs_fit
    assert not list(fresh.parameters())
    assert fresh.predict(fresh(train[:3])).value.tolist() == [40.0] * 3
    assert fresh.space(train[:3]).shape == (3, 4)
    fresh.load_state_dict(head.state_dict())
    assert torch.equal(fresh.predict(fresh(train)).value, head.predict(head(train)).value)
    with pytest.raises(RuntimeError, match="size mismatch"):
        fresh.load_state_dict({**head.state_dict(), "slopes": torch.zeros(3)})


def texts(sentences):
    return torch.tensor([[float("old" in text), float("young" in text), 1.0] for text in sentences])


def test_a_text_direction_counts_in_the_last_layer_alone():
    options = {"direction": "text", "source": "a young face", "target": "an old face"}
    head = LatentRegressor(context(text=texts, shared_space=True), **options)
    train, targets = part(50, seed=1)
    train[:, -1, 3:] = 0  # the last layer is narrower than the others
    head.fit((head(train), targets), None)
    assert not head.normals[:-1].any()
    assert_allclose(head.normals[-1] / head.normals.norm(), [2**-0.5, -(2**-0.5), 0, 0, 0, 0, 0, 0], rtol=1e-6)
    served = LatentRegressor(context(), **options)
    served.load_state_dict(head.state_dict())
    assert torch.equal(served.predict(served(train)).value, head.predict(head(train)).value)
    with pytest.raises(ValueError, match=r"needs a text tower: of the backbone, or of model\.text"):
        LatentRegressor(context(), **options).fit((head(train), targets), None)
    with pytest.raises(ValueError, match="of the same CLIP, or a generator's encoder with its generator"):
        LatentRegressor(context(text=texts, shared_space=False), **options).fit((head(train), targets), None)
    with pytest.raises(ValueError, match=r"needs head\.source and head\.target"):
        LatentRegressor(context(), direction="text", source="young")


def test_bad_options_of_the_head():
    for options, message in (
        ({"budget": 1}, "budget"),
        ({"share": 0.7}, "share"),
        ({"penalty": "l2"}, "penalty"),
        ({"direction": "sefa"}, "direction"),
    ):
        with pytest.raises(ValueError, match=message):
            regressor(**options)
    train, targets = part(20, seed=1)
    with pytest.raises(ValueError, match="budget must be between 1 and the size of the pool, 20; got 21"):
        fitted(train, targets, share=0.1, budget=21)
    with pytest.raises(ValueError, match=r"do not tell two ends apart: .* all are on one side"):
        fitted(train, Targets(torch.full((20,), 5.0), torch.full((20,), 5)))
    one_side = torch.tensor([5.0] * 19 + [6.0])
    with pytest.raises(ValueError, match="the 4 lowest of 20 go up to 5, the 4 highest down to 5; all are on one side"):
        fitted(train, Targets(one_side, one_side.long()), share=0.2)
    known = torch.tensor([0.0, 9.0] + [5.0] * 18)  # the two that are spread out most are not those at the ends
    wide = torch.cat([train[:2], 10 * train[2:]])
    with pytest.raises(ValueError, match=r"the labels are all equal \(.*\): label codes of two values or more"):
        fitted(wide, Targets(known, known.long()), share=0.05, budget=2)
    with pytest.raises(ValueError, match="large reads the features of layers; the model gives it none"):
        build_head("large", context(layer_dims=()), {})
    with pytest.raises(ValueError, match=r"head\.budget: training reads all labels; .*data\.shots or num_train"):
        regressor("large_tuned", budget=5)
    with pytest.raises(ValueError, match=r"layers=generator needs .* with its generator: model\.backbone=e4e"):
        fitted(train, targets, share=0.1, layers="generator")


# The head, with a generator


class Drawn(nn.Module):
    """A made-up generator of 4 rows of 8: pictures of 2 px whose brightness is what channel 5 of row 2 says."""

    style_dim = 8

    def __init__(self, used=(2, 5)):
        super().__init__()
        self.style, self.used = nn.Identity(), used
        self.input = nn.Module()
        self.input.input = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.asked = []

    def forward(self, codes):
        self.asked.append(codes.detach())
        row, channel = self.used
        bright = codes[:, row, channel].tanh() + 1e-3 * codes.sum(dim=(1, 2))
        return bright[:, None, None, None].expand(-1, 3, 2, 2)


class Coupled(Drawn):
    """Draws two pixels with a channel of row 2, and one of them each with channels of rows 0 and 1."""

    def forward(self, codes):
        both = codes[:, 2, 5] + 1e-3 * codes.sum(dim=(1, 2))
        return torch.stack([both + codes[:, 0, 0], both + codes[:, 1, 1]], dim=1)


def seen_pictures(pictures):
    """Their brightness in two numbers, in a space where "old" is bright."""
    bright = pictures.mean(dim=(1, 2, 3))
    return torch.stack([1 + bright, 1 - bright], dim=1)


def in_brightness(sentences):
    return torch.tensor([[1.0, 0.1] if "old" in text else [0.1, 1.0] for text in sentences])


WORDS = {"direction": "text", "source": "a young face", "target": "an old face"}


@pytest.mark.parametrize("method", ["large", "large_tuned"])
def test_a_text_direction_through_a_generator_is_the_channel_that_it_draws_with(method):
    drawn = Drawn()
    given = context(text=in_brightness, shared_space=False, generator=drawn, see=seen_pictures)
    head = build_head(method, given, WORDS)
    train, _ = part(100, seed=1)
    values = 50 + 10 * train[:, 2, 5]
    targets = Targets(values, values.round().long())
    (head.start if method == "large_tuned" else lambda train: head.fit(train, None))((head(train), targets))
    beta = head.normals.detach() / head.normals.detach().norm()
    assert beta.abs().argmax() == 2 * 8 + 5
    assert beta[2, 5] > 0.99  # from young to old
    codes = torch.cat(drawn.asked)
    assert codes.shape == (100, 4, 8)  # codes of its own in W, the same in all layers
    assert torch.equal(codes, codes[:, :1].expand_as(codes))
    assert_allclose(head.predict(head(train)).value.detach(), values, atol=0.5)


def test_weights_of_layers_by_the_generator_are_its_parts():
    """The weights of `layer_importance` for pairs along the direction, and the line on the distance that they make."""
    drawn = Coupled()
    given = context(generator=drawn, see=seen_pictures)
    head = build_head("large", given, {"layers": "generator", "share": 0.1, "seed": 3})
    train, targets = part(200, seed=10)
    head.fit((head(train), targets), None)

    found = large.direction_from_extremes(train, targets.values, share=0.1, seed=3).normal
    codes = torch.randn(300, 8, generator=torch.Generator().manual_seed(3))[:, None].expand(-1, 4, -1)
    along = torch.einsum("nld,ld->n", codes, found)
    pairs = large.edit_pairs(codes[:100], found, 3, steps=(0.5 * along.std().item(), along.std().item()))
    edit, usual = large.path_gradients(drawn, *pairs), large.path_gradients(drawn, codes[100:200], codes[200:])
    weights = large.layer_importance(edit, usual)
    distances = large.weighted_distance(large.signed_distances(train, found), weights)
    slope, offset = large.calibrate(distances, targets.values)
    assert_allclose(head.slopes, weights * math.copysign(1, slope), rtol=1e-4)
    assert weights.std() > 5e-3  # not all the same
    assert_allclose(head.predict(head(train)).value, (slope * distances + offset).clamp(0, 100), rtol=1e-3)


# The start of a training


def test_the_start_is_the_fit_of_the_method_that_does_not_learn():
    train, targets = part(400, seed=10)
    fixed, tuned = fitted(train, targets, share=0.1), regressor("large_tuned", share=0.1)
    assert (tuned.needs_start, tuned.needs_fit) == (True, False)
    assert (fixed.needs_start, fixed.needs_fit) == (False, True)
    assert {name for name, _ in tuned.named_parameters()} == {"normals", "slopes", "offset"}
    tuned.start((tuned(train), targets))
    assert torch.equal(tuned.predict(tuned(train)).value, fixed.predict(fixed(train)).value)
    tuned.loss(tuned(train), targets)["loss"].backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in tuned.parameters())
