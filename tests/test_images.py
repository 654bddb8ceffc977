"""Real files of every kind become the right RGB picture, or an error that names them."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from ordinalclip.images import (
    FORMATS,
    Augmentation,
    BrokenImageError,
    PixelSpec,
    crop,
    find_images,
    load_image,
    normalise,
    prepare,
    resize,
)

SPEC = PixelSpec(16, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


def picture(size=(40, 30)):
    image = Image.new("RGB", size, (200, 40, 90))
    ImageDraw.Draw(image).rectangle((0, 0, size[0] // 4, size[1] // 4), (10, 240, 30))
    return image


@pytest.mark.parametrize(
    ("mode", "name"),
    [("RGB", "a.png"), ("RGB", "a.jpg"), ("P", "a.png"), ("RGBA", "a.png"), ("CMYK", "a.jpg"), ("CMYK", "a.tif")],
)
def test_colour_files(tmp_path, mode, name):
    picture().convert(mode, palette=Image.Palette.ADAPTIVE).save(tmp_path / name, quality=95)
    pixels = np.asarray(load_image(tmp_path / name)).astype(int)
    assert pixels.shape == (30, 40, 3)
    assert abs(pixels[25, 35] - (200, 40, 90)).max() < 8
    assert abs(pixels[2, 2] - (10, 240, 30)).max() < 12


def test_grey_and_sixteen_bit_files(tmp_path):
    grey = np.linspace(0, 255, 64).reshape(8, 8)
    Image.fromarray(grey.astype(np.uint8)).save(tmp_path / "8.png")
    Image.fromarray((grey * 257).astype(np.uint16)).save(tmp_path / "16.png")
    Image.fromarray((grey * 257).astype(np.uint16)).save(tmp_path / "16.tif")
    Image.fromarray((grey > 127).astype(np.uint8) * 255).convert("1").save(tmp_path / "1.png")
    eight = np.asarray(load_image(tmp_path / "8.png")).astype(int)
    for name in ("16.png", "16.tif"):
        assert abs(np.asarray(load_image(tmp_path / name)).astype(int) - eight).max() <= 1
    assert (np.asarray(load_image(tmp_path / "1.png"))[..., 0] == (grey > 127) * 255).all()


def test_transparent_pixels_lie_on_white(tmp_path):
    image = picture().convert("RGBA")
    image.putpixel((39, 29), (0, 0, 0, 0))
    image.save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png").getpixel((39, 29)) == (255, 255, 255)
    palette = picture().convert("P")
    palette.save(tmp_path / "p.png", transparency=palette.getpixel((39, 29)))
    assert load_image(tmp_path / "p.png").getpixel((39, 29)) == (255, 255, 255)


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show rotated by 90 degrees clockwise
    picture().save(tmp_path / "a.jpg", exif=exif, quality=95)
    image = load_image(tmp_path / "a.jpg")
    assert image.size == (30, 40)
    assert abs(np.array(image.getpixel((28, 2))).astype(int) - (10, 240, 30)).max() < 20


def test_arrays_bytes_and_images(tmp_path):
    picture().save(tmp_path / "a.png")
    expected = np.asarray(picture())
    for source in (
        (tmp_path / "a.png").read_bytes(),
        {"bytes": (tmp_path / "a.png").read_bytes(), "path": None},
        {"bytes": None, "path": str(tmp_path / "a.png")},
        picture(),
        expected,
        expected / 255,
        expected.astype(np.uint16) * 257,
    ):
        assert (np.asarray(load_image(source)) == expected).all()
    assert load_image(expected[..., :1]).mode == "RGB"


def test_broken_images_are_named(tmp_path):
    picture().save(tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    (tmp_path / "text.png").write_text("hello")
    for name in ("cut.png", "text.png", "none.png"):
        with pytest.raises(BrokenImageError, match=name):
            load_image(tmp_path / name)
    with pytest.raises(BrokenImageError, match=r"row 7: .*\(2, 3, 4, 5\)"):
        load_image(np.zeros((2, 3, 4, 5)), "row 7")
    with pytest.raises(BrokenImageError, match="int64"):
        load_image(np.zeros((4, 4), dtype=np.int64))


def test_prepare_is_resize_centre_crop_normalise():
    pixels = prepare(picture((60, 30)), SPEC)
    expected = np.asarray(crop(picture((60, 30)).resize((32, 16), Image.Resampling.BICUBIC), 16)) / 255
    expected = (expected - np.array(SPEC.mean)) / np.array(SPEC.std)
    assert np.allclose(pixels.numpy(), expected.transpose(2, 0, 1), atol=1e-6)
    assert resize(picture(), PixelSpec(16, SPEC.mean, SPEC.std, resize="squash")).size == (16, 16)


def test_the_centre_of_a_larger_picture():
    """`crop_ratio`: scaled to 20 pixels, of which 16 in the middle remain."""
    spec = replace(SPEC, crop_ratio=20 / 16)
    scaled = picture((60, 30)).resize((40, 20), Image.Resampling.BICUBIC)
    assert torch.equal(prepare(picture((60, 30)), spec), normalise(scaled.crop((12, 2, 28, 18)), spec))
    squashed = picture((60, 30)).resize((20, 20), Image.Resampling.BICUBIC)
    spec = replace(spec, resize="squash")
    assert torch.equal(prepare(picture((60, 30)), spec), normalise(squashed.crop((2, 2, 18, 18)), spec))


def test_augmentation_is_a_function_of_its_generator():
    every = Augmentation(1.2, True, True, True, 20, 0.1, (0.8, 1.2), 0.5, 0.5)
    image = resize(picture(), SPEC, every.input_size(SPEC))
    views = [every(image, SPEC, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert (views[0] == views[1]).all()
    assert (views[0] != views[2]).any()
    plain = Augmentation(crop_ratio=1.0)
    square = picture((16, 16))
    assert (plain(square, SPEC, np.random.default_rng(0)) == prepare(square, SPEC)).all()


def test_rotation_and_zoom_move_what_they_should():
    dot = Image.new("RGB", (33, 33))
    dot.putpixel((26, 16), (255, 255, 255))  # ten pixels right of the centre
    spec = PixelSpec(33, (0, 0, 0), (1, 1, 1))
    from ordinalclip.images import _affine

    turned = np.asarray(_affine(dot, 90, 1.0, (0, 0), Image.Resampling.NEAREST))[..., 0]
    assert np.argwhere(turned == 255).tolist() in ([[6, 16]], [[26, 16]])
    closer = np.asarray(_affine(dot, 0, 0.5, (0, 0), Image.Resampling.BICUBIC))[..., 0]
    assert abs(np.argwhere(closer > 60).mean(axis=0) - (16, 21)).max() <= 1
    shifted = np.asarray(_affine(dot, 0, 1.0, (0, 5 / 33), Image.Resampling.NEAREST))[..., 0]
    assert np.argwhere(shifted == 255).tolist() == [[21, 26]]
    assert spec.size == 33


def test_limits_come_before_decoding(tmp_path, monkeypatch):
    """Within them everything is decoded; beyond them nothing, of files, images and arrays."""
    picture((200, 1)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png").size == (200, 1)
    picture((201, 1)).save(tmp_path / "b.png")
    with pytest.raises(BrokenImageError, match=r"b\.png: .*201 x 1 pixels; one side may be 200 times"):
        load_image(tmp_path / "b.png")
    with pytest.raises(BrokenImageError, match="1 x 201 pixels"):
        load_image(np.zeros((201, 1), dtype=np.uint8))
    image = picture()
    monkeypatch.setattr("ordinalclip.images.MAX_PIXELS", 1000)
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(BrokenImageError, match=r"row 7: .*40 x 30 pixels; allowed are 1000 pixels in all"):
        load_image(image, "row 7")


def test_other_formats_by_name(tmp_path):
    picture().save(tmp_path / "a.ppm")
    with pytest.raises(BrokenImageError, match=r"in none of the formats JPEG, PNG, .*AVIF"):
        load_image(tmp_path / "a.ppm")
    assert load_image(tmp_path / "a.ppm", formats=[*FORMATS, "PPM"]).getpixel((39, 29)) == (200, 40, 90)


@pytest.mark.parametrize("ending", ["png", "jpg", "bmp", "gif", "tiff", "webp", "avif"])
def test_every_format_that_is_allowed(tmp_path, ending):
    picture().save(tmp_path / f"a.{ending}")
    content = (tmp_path / f"a.{ending}").read_bytes()
    assert load_image(content).size == (40, 30)
    for share in (0.2, 0.5):
        with pytest.raises(BrokenImageError):
            load_image(content[: int(share * len(content))])


def test_a_picture_of_two_cameras_is_its_first(tmp_path):
    picture().save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.format == "MPO"
    assert load_image(tmp_path / "a.jpg").size == (40, 30)


@pytest.mark.parametrize(
    "source, message",
    [
        (np.zeros((0, 5), dtype=np.uint8), "5 x 0: no pixels"),
        (np.zeros((5, 0, 3)), "0 x 5: no pixels"),
        (np.ones((4, 4), dtype=bool), "an array of bool; allowed are uint8"),
        (np.full((4, 4), np.nan), r"must lie in \[0, 1\]"),
        (np.full((4, 4), np.inf), r"must lie in \[0, 1\]"),
        (Image.new("RGB", (0, 0)), "0 x 0: no pixels"),
        (Image.new("F", (4, 4), float("nan")), r"must lie in \[0, 1\]"),
        (Image.new("I", (4, 4), -1), "pixels of -1 to -1; allowed are 0 to 65535"),
        (b"", "empty, 0 bytes"),
        (None, "NoneType given; allowed are a path"),
        ({"bytes": None, "path": None}, "NoneType given"),
        ("a\0b", "null"),
    ],
)
def test_what_is_no_picture(source, message):
    with pytest.raises(BrokenImageError, match=message):
        load_image(source)


def test_a_broken_image_keeps_its_words_between_processes():
    error = pickle.loads(pickle.dumps(BrokenImageError("a.png", "not readable")))
    assert (str(error), error.reason) == ("a.png: not readable", "not readable")


def test_find_images(tmp_path):
    picture().save(tmp_path / "b.png")
    picture().save(tmp_path / "a.JPG")
    assert [p.name for p in find_images([str(tmp_path), str(tmp_path / "b.png")])] == ["a.JPG", "b.png", "b.png"]
    with pytest.raises(FileNotFoundError, match="none"):
        find_images([str(tmp_path / "none")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images in this folder"):
        find_images([str(tmp_path / "empty")])


def test_crop_places_a_square_left_to_right_and_top_to_bottom():
    pixels = np.arange(6 * 10, dtype=np.uint8).reshape(6, 10)
    image = Image.fromarray(np.stack([pixels] * 3, axis=-1))
    for x, y, left, top in ((0, 0, 0, 0), (1, 0, 6, 0), (0, 1, 0, 2), (0.5, 1, 3, 2), (0.25, 0.5, 2, 1)):
        cut = np.asarray(crop(image, 4, x, y))[..., 0]
        assert (cut == pixels[top : top + 4, left : left + 4]).all(), (x, y)


def views_of(augmentation, image, count=64):
    return [augmentation(image, SPEC, np.random.default_rng(seed)) for seed in range(count)]


@pytest.mark.parametrize(
    ("option", "turns"),
    [
        ("flip", [lambda p: p, lambda p: p.flip(-1)]),
        ("flip_vertical", [lambda p: p, lambda p: p.flip(-2)]),
        ("quarter_turns", [lambda p, k=k: torch.rot90(p, k, (-2, -1)) for k in range(4)]),
    ],
)
def test_every_turn_comes_about_equally_often(option, turns):
    image = picture((16, 16))
    plain = prepare(image, SPEC)
    expected = [turn(plain) for turn in turns]
    views = views_of(Augmentation(crop_ratio=1.0, **{option: True}), image)
    counts = [sum(torch.equal(view, other) for view in views) for other in expected]
    assert sum(counts) == 64
    assert min(counts) > 32 / len(turns)


def test_an_option_leaves_the_draws_of_the_others_alone():
    """With a second option the first still does the same to each view: on a picture of one colour, mirrored or not."""
    grey = Image.new("RGB", (20, 20), (120, 120, 120))
    brighter = Augmentation(brightness=0.5)
    expected = views_of(brighter, grey, 8)
    assert len({view.mean().item() for view in expected}) == 8
    for option in ({"flip": True}, {"flip_vertical": True}, {"quarter_turns": True}, {"shift": 0.2}):
        views = views_of(replace(brighter, **option), grey, 8)
        assert all(torch.equal(one, other) for one, other in zip(views, expected, strict=True)), option


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_a_tiff_whose_white_is_0_is_no_negative(tmp_path, dtype):
    """As X-rays are exported; Pillow heeds the tag in 8 bits alone."""
    ramp = np.linspace(0, 1, 32).repeat(8).reshape(32, 8).T
    largest = 1 if dtype == np.float32 else np.iinfo(dtype).max
    picture = Image.fromarray((ramp * largest).astype(dtype))
    picture.save(tmp_path / "a.tif", tiffinfo={262: 0})
    shown = np.asarray(load_image(tmp_path / "a.tif"))[..., 0].astype(int)
    assert shown[0, 0] > 250
    assert shown[0, -1] < 5


def test_transparent_black_is_white_in_rgb_too(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", transparency=(0, 0, 0))
    assert load_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)
