"""The generated gauges, and the small CLIP that is pre-trained on them."""

import importlib.util
import json
import sys
import zlib
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file

import ordinalclip
from ordinalclip.gauges import (
    COLOURS,
    KINDS,
    STYLES,
    TEMPLATES,
    UNSEEN,
    draw,
    drawn_gauges,
    make_gauges,
    moving_part,
    moving_parts,
)

ASSET = Path(ordinalclip.__file__).parent / "assets" / "tiny-clip"
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "tiny_clip.py"
SEEN = [kind for kind in KINDS if kind not in UNSEEN]


def pixels(image):
    return np.asarray(image, dtype=np.float32).ravel()


def draw_alike(kind, value, seed=5):
    """The same scene with another reading: a fresh generator with the same seed."""
    return pixels(draw(kind, value, np.random.default_rng(seed)))


def test_same_seed_gives_equal_bytes_and_another_seed_does_not():
    first, again, other = (make_gauges(["dial", "counter"], 3, seed=seed) for seed in (4, 4, 5))
    assert [image.tobytes() for image in first["image"]] == [image.tobytes() for image in again["image"]]
    assert first["value"][:] == again["value"][:]
    assert all(a.tobytes() != b.tobytes() for a, b in zip(first["image"], other["image"], strict=True))


def test_an_image_depends_neither_on_how_many_nor_on_which_kinds_are_asked_for():
    short, long = make_gauges("bar", 2, seed=1), make_gauges(["tank", "bar"], 5, seed=1)[5:]
    assert [image.tobytes() for image in short["image"]] == [image.tobytes() for image in long["image"]][:2]
    assert short["value"][:] == long["value"][:2]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_changes_with_the_value_is_the_moving_part(kind, style):
    """Of two readings of one scene the pictures differ where a moving part is, now or then, and nowhere else."""
    for seed, (value, other) in enumerate([(83.0, 27.0), (4.0, 96.0), (50.0, 61.0)]):
        first, second = (draw(kind, v, np.random.default_rng(seed), style=style) for v in (value, other))
        parts = [moving_part(kind, v, np.random.default_rng(seed), style=style) for v in (value, other)]
        changed = np.abs(np.asarray(first, int) - np.asarray(second, int)).max(axis=2) > 2
        either, both = np.maximum(*parts), np.minimum(*parts)
        assert changed.any()
        assert not changed[either == 0].any()
        assert not changed[both == 1].any()
        assert changed[(either == 1) & (both == 0)].mean() > 0.95


def test_moving_parts_are_those_of_the_drawn_gauges():
    """A needle is where the colour is, but for the hub."""
    for (picture, _), part in zip(
        drawn_gauges("dial", 4, 5, style="calm"), moving_parts("dial", 4, 5, style="calm"), strict=True
    ):
        pixels = np.asarray(picture, int)
        coloured = pixels.max(axis=2) - pixels.min(axis=2) > 40
        assert part.max() == 1
        assert coloured[part > 0.8].all()
        assert 0 < (coloured & (part == 0)).mean() < 0.06
    first, higher, beyond = (next(moving_parts("tank", 1, 5, shift=shift)) for shift in (0, 5, 200))
    assert 0 < first.sum() < higher.sum() < beyond.sum()
    with pytest.raises(ValueError, match="unknown kind 'sundial'"):
        moving_parts("sundial", 1)
    with pytest.raises(ValueError, match="shows values from 0 to 100"):
        moving_part("dial", 101, np.random.default_rng(0))


def test_the_varied_style_is_drawn_as_ever():
    """Of the pictures that the shipped CLIP and all results are from; another Pillow may round edges differently."""
    known = {
        "dial": 2624422333,
        "tank": 3268927672,
        "bar": 627296591,
        "pie": 3504927491,
        "clock": 1289430390,
        "counter": 1049345091,
        "thermometer": 2992343371,
        "slider": 156770125,
    }
    assert {k: zlib.crc32(b"".join(p.tobytes() for p, _ in drawn_gauges(k, 3, seed=7))) for k in KINDS} == known


@pytest.mark.parametrize("kind", KINDS)
def test_a_calm_gauge_stands_alone_and_always_in_the_same_place(kind):
    varied, calm = (list(drawn_gauges(kind, 30, 2, 32, style)) for style in STYLES)
    assert [value for _, value in varied] == [value for _, value in calm]
    pictures = np.stack([np.asarray(picture, dtype=int) for picture, _ in calm])
    corners = pictures[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners == corners[:, :1, :1]).all()  # one grey
    assert len(np.unique(corners[:, 0, 0])) > 5
    box = {
        "dial": (1, 31, 1, 31),
        "clock": (1, 31, 1, 31),
        "counter": (7, 25, 1, 31),
        "slider": (8, 25, 1, 31),
        "thermometer": (1, 31, 9, 24),
        "tank": (1, 31, 4, 31),
        "bar": (8, 27, 1, 31),
        "pie": (1, 31, 1, 31),
    }[kind]
    inside = np.zeros((32, 32), dtype=bool)
    inside[box[0] : box[1], box[2] : box[3]] = True
    assert (pictures[:, ~inside] == corners[:, :1]).all()
    assert (pictures[:, inside].std(axis=1) > 20).all()


@pytest.mark.parametrize("kind", KINDS)
def test_what_varies_in_calm_pictures_is_mostly_the_reading(kind):
    """Neighbours in pixels are neighbours in value more often than in the varied style, where they are not by far."""
    errors = []
    for style in STYLES:
        pictures, values = zip(*drawn_gauges(kind, 300, 3, 32, style), strict=True)
        x, values = np.stack([pixels(picture) for picture in pictures]), np.array(values)
        squares = np.square(x).sum(axis=1)
        distances = squares[:, None] + squares[None] - 2 * x @ x.T
        np.fill_diagonal(distances, np.inf)
        errors.append(np.abs(values[distances.argmin(axis=1)] - values).mean())
    assert errors[1] < 0.8 * errors[0]


def test_columns():
    dataset = make_gauges(KINDS, 40, size=32)
    assert dataset.features["value"].dtype == "float64"
    assert {(image.size, image.mode) for image in dataset["image"]} == {((32, 32), "RGB")}
    assert dataset["kind"][:] == [kind for kind in KINDS for _ in range(40)]
    values = np.array(dataset["value"]).reshape(len(KINDS), 40)
    assert values.min() >= 0
    assert values.max() <= 100
    whole = (values == values.round()).all(axis=1)
    assert [kind for kind, is_whole in zip(KINDS, whole, strict=True) if is_whole] == ["counter"]
    assert np.all(values.std(axis=1) > 20)  # a uniform distribution over [0, 100] has 28.9


@pytest.mark.parametrize("kind", KINDS)
def test_ends_and_middle_differ(kind):
    shown = {value: draw_alike(kind, value) for value in (0, 50, 100)}
    for a, b in ((0, 50), (50, 100), (0, 100)):
        # The noise is the same in both: what differs is the reading, and it covers more than a few pixels.
        assert (np.abs(shown[a] - shown[b]) > 30).sum() > 60


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "counter"])
def test_all_else_equal_the_nearest_picture_has_the_nearest_reading(kind):
    bank = np.arange(0, 101, 4)
    pictures = np.stack([draw_alike(kind, value) for value in bank])
    for value in range(1, 100, 3):
        distances = np.square(pictures - draw_alike(kind, value)).sum(axis=1)
        assert abs(bank[distances.argmin()] - value) <= 4


def test_all_readings_of_a_counter_differ():
    pictures = {tuple(draw_alike("counter", value)) for value in range(101)}
    assert len(pictures) == 101
    assert np.array_equal(draw_alike("counter", 41.6), draw_alike("counter", 42))


@pytest.mark.parametrize("kind", ["tank", "bar", "pie", "thermometer"])
def test_the_filled_area_is_proportional_to_the_value(kind):
    empty, full = draw_alike(kind, 0), draw_alike(kind, 100)
    whole = np.abs(full - empty).sum()
    for value in range(0, 101, 10):
        share = np.abs(draw_alike(kind, value) - empty).sum() / whole
        assert share == pytest.approx(value / 100, abs=0.02)


@pytest.mark.parametrize("colour", COLOURS)
def test_the_reading_has_the_colour_that_was_asked_for(colour):
    shown, empty = (draw("tank", value, np.random.default_rng(2), colour=colour) for value in (100, 0))
    shown, empty = (np.asarray(image, dtype=np.float32).reshape(-1, 3) for image in (shown, empty))
    difference = np.abs(shown - empty).sum(axis=1)
    liquid = shown[difference > 0.5 * difference.max()].mean(axis=0)
    distances = {name: np.linalg.norm(liquid - np.array(rgb)) for name, rgb in COLOURS.items()}
    assert min(distances, key=distances.get) == colour


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_pixels_do_not_give_the_reading_away(kind):
    """The nearest of 999 other pictures has a reading that is off by 15 or more on average (at random: 33)."""
    dataset = make_gauges(kind, 1_000, seed=3)
    images, values = np.stack([pixels(image) for image in dataset["image"]]), np.array(dataset["value"])
    squares = np.square(images).sum(axis=1)
    distances = squares[:, None] + squares[None] - 2 * images @ images.T
    np.fill_diagonal(distances, np.inf)
    assert np.abs(values[distances.argmin(axis=1)] - values).mean() >= 15


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("sundial", 3), r"unknown kind 'sundial'; choose from dial, tank"),
        ((["dial", "sundial"], 3), r"unknown kind 'sundial'"),
        (([], 3), r"kinds is empty"),
        (("dial", 0), r"num_images is 0; it must be an integer from 1 to 1000000"),
        (("dial", 2.5), r"num_images is 2\.5"),
        (("dial", True), r"num_images is True"),
        (("dial", 10**9), r"num_images is 1000000000"),
        (("dial", 3, -1), r"seed is -1"),
        (("dial", 3, 0, 8), r"size is 8; it must be an integer from 16 to 2048"),
        (("dial", 3, 0, 64, "quiet"), r"unknown style 'quiet'; choose from varied, calm"),
    ],
)
def test_bad_requests_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_gauges(*arguments)


@pytest.mark.parametrize("value", [-0.1, 100.5, float("nan")])
def test_a_value_off_the_scale_is_refused(value):
    with pytest.raises(ValueError, match="shows values from 0 to 100"):
        draw("dial", value, np.random.default_rng(0))


def test_an_unknown_style_is_refused():
    with pytest.raises(ValueError, match="unknown style 'quiet'; choose from varied, calm"):
        draw("dial", 5, np.random.default_rng(0), style="quiet")


def test_an_unknown_colour_is_refused():
    with pytest.raises(ValueError, match="unknown colour 'beige'; choose from red"):
        draw("dial", 5, np.random.default_rng(0), colour="beige")


@pytest.fixture(scope="module")
def clip():
    """The shipped model, built and filled by hand so that nothing is forgiven."""
    config = json.loads((ASSET / "open_clip_config.json").read_text())
    model = open_clip.CLIP(**config["model_cfg"])
    model.load_state_dict(load_file(ASSET / "model.safetensors"), strict=True)
    return model.eval()


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("tiny_clip", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_asset_is_small_half_precision_and_finite():
    assert sum(path.stat().st_size for path in ASSET.iterdir()) <= 16_000_000
    for name, tensor in load_file(ASSET / "model.safetensors").items():
        assert tensor.dtype == (torch.int64 if name.endswith("num_batches_tracked") else torch.float16), name
        assert tensor.isfinite().all(), name


def test_open_clip_loads_the_folder(clip):
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{ASSET}")
    image = preprocess(draw("dial", 30, np.random.default_rng(0)))[None]
    assert image.shape == (1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model.eval().encode_image(image), clip.encode_image(image))


@pytest.mark.slow
@torch.no_grad()
def test_zero_shot_reads_every_kind_of_the_pre_training(clip, script):
    _, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{ASSET}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{ASSET}")
    errors = {}
    for kind in SEEN:
        dataset = make_gauges(kind, 100, seed=77)
        prototypes = sum(
            script.encode_text(clip, tokenizer([template.format(kind=kind, name=name) for name in range(101)]))
            for template in TEMPLATES
        )
        images = clip.encode_image(torch.stack([preprocess(image) for image in dataset["image"]]), normalize=True)
        logits = clip.logit_scale.exp() * images @ torch.nn.functional.normalize(prototypes, dim=-1).T
        median = (logits.softmax(dim=-1).cumsum(dim=-1) < 0.5).sum(dim=-1)
        errors[kind] = float((median - torch.tensor(dataset["value"][:])).abs().mean())
    assert max(errors.values()) <= 2.5, errors
    assert sum(errors.values()) / len(errors) <= 1.5, errors


@torch.no_grad()
def test_short_sequences_give_the_features_of_full_ones(clip, script):
    tokens = open_clip.get_tokenizer(f"local-dir:{ASSET}")(
        ["a dial showing 7.", "the reading of the tank is 100.", "bar"]
    )
    torch.testing.assert_close(
        script.encode_text(clip, tokens), clip.encode_text(tokens, normalize=True), rtol=0, atol=1e-5
    )


def test_numbers_in_words(script):
    words = {0: "zero", 9: "nine", 13: "thirteen", 20: "twenty", 42: "forty-two", 99: "ninety-nine", 100: "one hundred"}
    assert {number: script.number_in_words(number) for number in words} == words
    assert len({script.number_in_words(number) for number in range(101)}) == 101


def test_captions_never_mention_another_reading(script):
    rng = np.random.default_rng(0)
    captions = [script.caption("tank", 42.2, "orange", rng) for _ in range(300)]
    assert any("an orange tank" in text for text in captions)
    assert {int(word.strip("., ")) for text in captions for word in text.split() if word.strip("., ").isdigit()} == {42}
    assert {"forty-two", "below half"} <= {
        word for word in ("forty-two", "below half") if any(word in t for t in captions)
    }


def test_contrastive_loss_against_loops(script):
    rng = np.random.default_rng(0)
    logits, values, kinds = rng.normal(size=(5, 5)), np.array([40.0, 40.0, 41.5, 90.0, 40.0]), [0, 0, 0, 0, 1]
    expected = 0.0
    for scores in (logits, logits.T):
        for i in range(5):
            weights = [np.exp(-abs(values[i] - values[j])) if kinds[i] == kinds[j] else 0.0 for j in range(5)]
            for j in range(5):
                log_probability = scores[i, j] - np.log(np.exp(scores[i]).sum())
                expected -= weights[j] / sum(weights) * log_probability / 5 / 2
    loss = script.contrastive_loss(torch.tensor(logits), torch.tensor(values), torch.tensor(kinds))
    assert float(loss) == pytest.approx(expected)
