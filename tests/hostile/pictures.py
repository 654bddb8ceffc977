"""Pictures that are none, files that start programs or eat the machine, folders that hold something else."""

import os
import socket
import struct
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hostile import case, lasting_folder
from ordinalclip.model import OrdinalModel
from ordinalclip.ranks import Ranks

FORMATS = "JPEG, PNG, WEBP, TIFF, BMP, GIF, AVIF"


@cache
def model():
    """A saved model of random weights, that answers 0 to 4 %."""
    folder = str(lasting_folder())
    torch.manual_seed(0)
    OrdinalModel.build("tiny", Ranks(range(5), unit="%"), "prototypes").save_pretrained(folder)
    return folder


def picture(path, seed=0, size=(40, 32), **options):
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3))
    Image.fromarray(pixels.astype(np.uint8)).save(path, **options)


def predict(*words):
    return ["predict", *map(str, words), "--model", model(), "--quiet"]


def png_header(path, width, height):
    """A PNG that claims a size, with one row of nothing in it."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


def holds(folder, **expected):
    for name, content in expected.items():
        assert (folder / name.replace("_", ".")).read_bytes() == content


# ---- one broken picture among others

VALUE = r"\t\d(\.\d+)? %\t\(.*%\)\n"


@case(
    "a broken picture among good ones",
    rf"(?s)^a\.png{VALUE}b\.jpg\terror: not a readable image \(.*truncated.*\)\nc\.png{VALUE}"
    r".*ordinalclip: 1 of 3 images could not be read",
    status=1,
)
def _(folder):
    picture("a.png"), picture("b.jpg"), picture("c.png")
    Path("b.jpg").write_bytes(Path("b.jpg").read_bytes()[:-300])
    return predict("a.png", "b.jpg", "c.png")


@case(
    "broken pictures at the edges of batches, as JSON lines",
    r'(?s)^\{"file": "0.png", "error".*?\n\{"file": "1.png", "value".*?\n\{"file": "2.png", "value".*?\n'
    r'\{"file": "3.png", "error".*?\n\{"file": "4.png", "error".*?\n\{"file": "5.png", "value".*?\n'
    r'\{"file": "6.png", "error".*?\n.*4 of 7 images',
    status=1,
)
def _(folder):
    for number in range(7):
        picture(f"{number}.png") if number in (1, 2, 5) else Path(f"{number}.png").write_bytes(b"x")
    return predict(*(f"{number}.png" for number in range(7)), "--batch-size", 2, "--json")


@case("nothing but broken pictures", r"(?s)a\.png\terror: .*b\.png\terror: .*2 of 2 images", status=1)
def _(folder):
    Path("a.png").write_bytes(b"x"), Path("b.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return predict(".")


@case("a picture of zero bytes", r"a\.png\terror: not a readable image \(empty, 0 bytes\)", status=1)
def _(folder):
    Path("a.png").touch()
    return predict("a.png")


@case("a page named .jpg", rf"a\.jpg\terror: not a readable image \(cut off, or in none of .*{FORMATS}\)", status=1)
def _(folder):
    Path("a.jpg").write_text("<html>404</html>")
    return predict("a.jpg")


@case(
    "pictures of other formats in a folder",
    r"(?s)a\.svg\terror: .*b\.HEIC\terror: .*c\.png\t\d.*3 of 4 images",
    status=1,
)
def _(folder):
    Path("a.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    Path("b.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    Path("d.ppm").write_bytes(b"P6 1 1 255 abc")
    Path("notes.txt").write_text("not looked at")
    picture("c.png")
    return predict(".")


# ---- what starts programs, hangs, or eats memory


@case("PostScript named .png", r"a\.png\terror: .*in none of the formats", status=1)
def _(folder):
    Path("a.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(gone) (w) file\n%%EOF\n")
    return predict("a.png")


@case("a picture of 20,000,000 x 1 pixels", r"20000000 x 1 pixels; one side may be 200 times", status=1)
def _(folder):
    png_header(Path("a.png"), 20_000_000, 1)
    return predict("a.png")


@case("a picture of 50,000 x 50,000 pixels", r"a\.png\terror: .*2500000000 pixels.*178956970", status=1)
def _(folder):
    png_header(Path("a.png"), 50_000, 50_000)
    return predict("a.png")


@case("a named pipe", r"a\.png\terror: .*a pipe, socket or device, not a file", status=1)
def _(folder):
    os.mkfifo("a.png")
    return predict(".")


@case("a device", r"/dev/zero\terror: .*a pipe, socket or device, not a file", status=1)
def _(folder):
    return predict("/dev/zero")


@case("a socket", r"a\.png\terror: .*a pipe, socket or device, not a file", status=1)
def _(folder):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("a.png")
    return predict("a.png")


@case("a link to nowhere in a folder", r"a\.png\terror: not a readable image \(No such file", status=1)
def _(folder):
    Path("a.png").symlink_to("gone.png")
    return predict(".")


@case("folders that link to each other", rf"^a/2\.png{VALUE}a/b/1\.png{VALUE}$", status=0)
def _(folder):
    Path("a/b").mkdir(parents=True)
    Path("a/b/up").symlink_to("../../a")
    picture("a/b/1.png"), picture("a/2.png")
    return predict("a")


@case("folders in folders", rf"^a/b/c\.png{VALUE}a/c\.png{VALUE}a\.png{VALUE}$", status=0)
def _(folder):
    Path("in/a/b").mkdir(parents=True)
    picture("in/a.png"), picture("in/a/c.png"), picture("in/a/b/c.png")
    os.chdir("in")
    return predict(".")


@case("a folder without pictures", r"docs: no images in this folder; endings searched: \.png, ")
def _(folder):
    Path("docs").mkdir()
    Path("docs/a.csv").write_text("a,b")
    return predict("docs")


@case("a picture that does not exist", r"gone\.png: no such image")
def _(folder):
    return predict("gone.png")


@case("an address instead of a file", r"http:/example\.invalid/a\.png: no such image")
def _(folder):
    return predict("http://example.invalid/a.png")


# ---- pixels that mean something else


@case("whole numbers beyond 16 bits", r"pixels of 0 to 99999; allowed are 0 to 65535", status=1)
def _(folder):
    Image.fromarray(np.linspace(0, 99_999, 64).reshape(8, 8).astype(np.int32)).save("a.tif")
    return predict("a.tif")


@case("pixels that are not a number", r"float pixels must lie in \[0, 1\]", status=1)
def _(folder):
    Image.fromarray(np.full((8, 8), np.nan, dtype=np.float32)).save("a.tif")
    return predict("a.tif")


@case("a picture of several frames", rf"^a\.gif{VALUE}$", status=0)
def _(folder):
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")]
    frames[0].save("a.gif", save_all=True, append_images=frames[1:])
    return predict("a.gif")


# ---- arguments

for words, says in (
    (["--top", "0"], r"argument --top: '0' is not a whole number of 1 or more"),
    (["--top", "-1"], r"argument --top: '-1' is not"),
    (["--top", "two"], r"argument --top: 'two' is not"),
    (["--batch-size", "0"], r"argument --batch-size: '0' is not a whole number from 1 to 4096"),
    (["--batch-size", "-5"], r"argument --batch-size: '-5' is not"),
    (["--batch-size", "1000000000"], r"argument --batch-size: '1000000000' is not"),
):

    @case(f"predict with {' '.join(words)}", says)
    def _(folder, words=words):
        return predict("a.png", *words)


for words, says in (
    (["--num", "0"], r"argument --num: '0' is not a whole number from 1 to 1000000"),
    (["--num", "-5"], r"argument --num: '-5' is not"),
    (["--num", "1000000000"], r"argument --num: '1000000000' is not"),
    (["--size", "0"], r"argument --size: '0' is not a whole number from 16 to 2048"),
    (["--size", "100000"], r"argument --size: '100000' is not"),
    (["--seed", "-1"], r"argument --seed: '-1' is not a whole number from 0"),
    (["--kind", "sundial"], r"argument --kind: invalid choice: 'sundial' \(choose from .*dial.*thermometer"),
):

    @case(
        f"make-gauges with {' '.join(words)}", says, after=lambda folder: None if not any(folder.iterdir()) else 1 / 0
    )
    def _(folder, words=words):
        return ["make-gauges", "out", *words, "--quiet"]


# ---- make-gauges and what is there already


@case(
    "make-gauges over a table of somebody's own",
    r"mine holds labels\.csv already; --overwrite replaces",
    after=lambda folder: holds(folder / "mine", labels_csv=b"mine"),
)
def _(folder):
    Path("mine").mkdir()
    Path("mine/labels.csv").write_text("mine")
    return ["make-gauges", "mine", "--quiet"]


@case(
    "make-gauges over a picture of the same name",
    r"mine holds thermometer-0003\.png already",
    after=lambda folder: holds(folder / "mine", **{"thermometer-0003_png": b"mine"}),
)
def _(folder):
    Path("mine").mkdir()
    Path("mine/thermometer-0003.png").write_text("mine")
    return ["make-gauges", "mine", "--quiet"]


def _gauges_are_whole(folder):
    names = sorted(path.name for path in (folder / "mine").iterdir())
    assert names == ["labels.csv", "other.txt", "thermometer-0000.png", "thermometer-0001.png"]
    assert len((folder / "mine/labels.csv").read_text().splitlines()) == 3
    assert Image.open(folder / "mine/thermometer-0001.png").size == (64, 64)


@case("make-gauges twice with --overwrite", r"2 pictures and labels\.csv in mine", status=0, after=_gauges_are_whole)
def _(folder):
    Path("mine").mkdir()
    for name in ("labels.csv", "thermometer-0001.png", "other.txt"):
        Path("mine", name).write_text("of before")
    return ["make-gauges", "mine", "--num", "2", "--overwrite", "--quiet"]


@case("make-gauges to a file", r"mine is a file; name a folder", after=lambda folder: holds(folder, mine=b"mine"))
def _(folder):
    Path("mine").write_text("mine")
    return ["make-gauges", "mine", "--quiet"]


@case("make-gauges below a file", r"mine/below: Not a directory")
def _(folder):
    Path("mine").write_text("mine")
    return ["make-gauges", "mine/below", "--quiet"]


if os.geteuid():  # whoever may do everything is refused nothing

    @case("make-gauges to a folder that may not be written to", r"Permission denied: '.*mine")
    def _(folder):
        Path("mine").mkdir(mode=0o500)
        return ["make-gauges", "mine", "--quiet"]


@case("a path of nothing, as of an empty variable", r"a path without a name was given")
def _(folder):
    return ["predict", "", "--model", "model"]
