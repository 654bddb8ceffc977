"""examples/browser: an exported model in a static page answers as `predict.py` does, and sends nothing anywhere."""

import base64
import contextlib
import csv
import functools
import http.server
import io
import json
import re
import shutil
import struct
import subprocess
import threading
from itertools import product
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from conftest import BROWSER
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from test_export import asked, calibrated, fitted, write_pictures

from ordinalclip.export import export
from ordinalclip.images import INTERPOLATION, RESIZE, BrokenImageError, PixelSpec, load_image, prepare

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

EXAMPLE = Path(__file__).parents[1] / "examples" / "browser"
NPM = shutil.which("npm")
UNREACHABLE = re.compile(r"ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ECONNRESET|ETIMEDOUT|ENETUNREACH|E40[13]|E5\d\d|network")
TOLERANCE = 1e-3  # of the range of the ranks


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *words):
        pass


@contextlib.contextmanager
def serving(folder):
    """The folder as `python -m http.server` serves it; its address, and what was asked for (method, path)."""
    seen = []

    class Noting(Quiet):
        def do_GET(self):
            seen.append((self.command, self.path))
            with contextlib.suppress(ConnectionError):  # of a page that was closed
                super().do_GET()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Noting, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A copy of the example after `npm install`, without a model."""
    if NPM is None:
        pytest.skip("npm is not installed")
    folder = tmp_path_factory.mktemp("example") / "browser"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("node_modules", "model"))
    words = [NPM, "install", "--no-audit", "--no-fund", "--fetch-retries=0", "--fetch-timeout=60000"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False, timeout=240)
    if done.returncode and UNREACHABLE.search(done.stderr):
        pytest.skip("npm cannot reach its registry")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Pictures of every kind, and more that only browsers and Pillow could see otherwise."""
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder)
    pixels = np.random.default_rng(1).integers(0, 256, (75, 101, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.save(folder / "noise.jpg", quality=80)
    image.save(folder / "noise.webp")
    image.save(folder / "progressive.jpg", progressive=True, quality=95, subsampling=0)
    image.save(folder / 'a "comma", and Ünicode.png')
    image.save(folder / "profile.png", icc_profile=swapping())
    image.resize((1500, 1100)).save(folder / "large.jpg")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def models(files, tmp_path_factory):
    """Exports of a model with intervals, and of one without and without probabilities."""
    folder = tmp_path_factory.mktemp("models")
    learnt = [file for file in files if file.name != "large.jpg"][:11]
    export(calibrated(fitted("cross_entropy", learnt, decoding="expectation"), learnt), folder / "intervals")
    export(fitted("l1", learnt), folder / "plain")
    return folder


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api").sync_playwright
    if BROWSER is None:
        pytest.skip("no Chromium is installed")
    with playwright() as started:
        opened = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


class Opened:
    """The page in a browser: what it said, complained of and asked for, and how it is used."""

    def __init__(self, browser, address, **how):
        self.page = browser.new_page(**how)
        self.page.set_default_timeout(60_000)
        self.complaints, self.requests = [], []
        self.page.on("console", lambda said: self.complaints.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda each: self.requests.append((each.method, each.url)))
        self.page.goto(f"{address}/index.html")
        self.page.locator("#state", has_text=re.compile("is ready|cannot be used")).wait_for()

    @property
    def state(self):
        return self.page.locator("#state").inner_text()

    def problems(self):
        return self.page.locator("#problems li").all_inner_texts()

    def choose(self, files):
        self.page.locator("#files").set_input_files([str(file) for file in files])
        return self

    def done(self):
        self.page.locator("#state", has_text=re.compile(r"answered")).wait_for()
        return self

    def table(self):
        """The CSV file that the page saves, as text."""
        with self.page.expect_download() as download:
            self.page.get_by_role("button", name="Save as CSV").click()
        assert download.value.suggested_filename == "answers.csv"
        return Path(download.value.path()).read_bytes().decode("utf-8")


@pytest.fixture
def opened(browser, installed, models):
    """A function (name of a model, how) -> the page with it; afterwards it has complained of nothing."""
    with contextlib.ExitStack() as stack:
        pages = []

        def open_page(name="intervals", **how):
            put(installed, models / name)
            address, _ = stack.enter_context(serving(installed))
            pages.append(Opened(browser, address, **how))
            assert "is ready" in pages[-1].state, pages[-1].state
            return pages[-1]

        yield open_page
        for each in pages:
            each.page.close()
        assert [each.complaints for each in pages] == [[] for _ in pages]


def put(installed, model):
    shutil.rmtree(installed / "model", ignore_errors=True)
    shutil.copytree(model, installed / "model")


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text, newline="")))


def check_rows(found, expected, wide):
    """The same files in the same order, with the same answers; the largest difference as a share of the range."""
    assert [row["file"] for row in found] == [Path(row["file"]).name for row in expected]
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        assert list(one) == list(other)
        assert one["unit"] == other["unit"]
        moved = {key: abs(float(one[key]) - float(other[key])) / wide for key in ("value", "low", "high") if key in one}
        assert max(moved.values()) <= TOLERANCE, (one, other)
        if one["probability"] or other["probability"]:
            assert float(one["probability"]) == pytest.approx(float(other["probability"]), abs=TOLERANCE)
        assert one["name"] == other["name"]
        worst = max(worst, *moved.values())
    return worst


@pytest.mark.parametrize("name", ["intervals", "plain"])
def test_answers_are_those_of_predict_py(name, opened, models, files):
    """TIFF, which Chromium does not decode, is refused by name; of all other kinds the answers are the same."""
    page = opened(name).choose(files).done()
    tiffs = [file for file in files if file.suffix == ".tif"]
    others = [file for file in files if file not in tiffs]
    assert [re.match(r'"(.*)": not a readable picture \(TIFF: ', line)[1] for line in page.problems()] == [
        file.name for file in tiffs
    ]
    text = page.table()
    assert text.partition("\n")[0] == "file,value,unit,name,probability" + ",low,high" * (name == "intervals")
    expected, _ = asked(models / name, *others)
    found = rows_of(text)
    assert check_rows(found, expected, wide=10) < 1e-5
    assert len({row["value"] for row in found}) > len(found) / 2  # or nothing were shown
    shown = [cell.split()[0] for cell in page.page.locator("td.value").all_inner_texts()]
    assert [float(cell) for cell in shown] == [pytest.approx(float(row["value"]), abs=0.0051) for row in found]
    assert page.page.locator("tbody th").all_inner_texts() == [file.name for file in others]
    assert page.page.locator("#level").is_visible() == (name == "intervals")
    if name == "plain":
        return
    page.page.locator("#level").fill("0.6")
    page.page.locator("#level").press("Tab")
    page.done()
    page.page.locator("#save:enabled").wait_for()
    again = rows_of(page.table())
    expected, _ = asked(models / name, "--level", "0.6", *others)
    check_rows(again, expected, wide=10)
    assert [row["low"] for row in again] != [row["low"] for row in found]
    page.page.locator("#level").fill("0.97")  # which takes more pictures than calibrated it
    page.page.locator("#level").press("Tab")
    assert page.page.evaluate("document.querySelector('#level').validity.rangeOverflow")
    assert rows_of(page.table()) == again


def test_a_level_chosen_while_pictures_are_read_holds_for_all_of_them(opened, models, files):
    some = [file for file in files if file.suffix == ".png"] * 6
    page = opened()
    page.choose(some)
    page.page.locator("#answers tbody tr").nth(2).wait_for()
    shown = page.page.evaluate(
        """() => {
      const level = document.querySelector("#level");
      level.value = "0.7";
      level.dispatchEvent(new Event("change"));
      return [...document.querySelectorAll("td.number")].map((cell) => cell.textContent);
    }"""
    )
    assert len(shown) > 2
    assert set(shown) == {"…"}  # nothing of the level before
    page.done()
    expected, _ = asked(models / "intervals", "--level", "0.7", *some)
    key = lambda row: Path(row["file"]).name  # noqa: E731
    check_rows(sorted(rows_of(page.table()), key=key), sorted(expected, key=key), wide=10)
    page.choose(some)
    page.page.get_by_role("button", name="Clear").click()
    assert page.page.locator("#answers tbody tr").count() == 0
    page.choose(some[:2]).done()
    assert len(rows_of(page.table())) == 2


def test_broken_files_are_named_in_a_line_each_and_the_others_are_answered(opened, files, tmp_path):
    by_name = {file.name: file for file in files}
    wrong = {
        "cut.jpg": by_name["rgb.png"].with_name("print.jpg").read_bytes()[:-200],
        "cut.png": by_name["rgb.png"].read_bytes()[:-2000],
        "cut.gif": by_name["palette.gif"].read_bytes()[:-2000],
        "cut.webp": by_name["noise.webp"].read_bytes()[:-20],
        "header.png": by_name["rgb.png"].read_bytes()[:19],
        "empty.png": b"",
        "text.png": b"no picture",
        "drawing.svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="90" height="70"/>',
        "drawing.png": b'<svg xmlns="http://www.w3.org/2000/svg" width="90" height="70"/>',
    }
    for name, content in wrong.items():
        (tmp_path / name).write_bytes(content)
    Image.new("RGB", (4, 900)).save(tmp_path / "long.png")
    Image.new("RGB", (32, 32)).save(tmp_path / "icon.ico")
    # A header alone: nothing of so many pixels is decoded.
    vast = bytearray(by_name["rgb.png"].read_bytes())
    vast[16:24] = struct.pack(">II", 60_000, 60_000)
    (tmp_path / "vast.png").write_bytes(vast)
    bad = sorted(tmp_path.iterdir())
    for file in bad:  # as Python does
        with pytest.raises(BrokenImageError):
            load_image(file)
    page = opened().choose([files[0], *bad, files[1]]).done()
    lines = page.problems()
    assert len(lines) == len(bad)
    for file, line in zip(bad, lines, strict=True):
        assert re.fullmatch(rf'"{re.escape(file.name)}": not a readable picture \(.+\)', line), line
    said = dict(zip([file.name for file in bad], lines, strict=True))
    assert "4 x 900 pixels" in said["long.png"]
    assert "60000 x 60000 pixels" in said["vast.png"]
    assert "an empty file" in said["empty.png"]
    assert "none of the formats JPEG, PNG" in said["drawing.svg"]
    assert [row["file"] for row in rows_of(page.table())] == [files[0].name, files[1].name]
    assert f"2 pictures answered, {len(bad)} not" in page.state
    page.page.get_by_role("button", name="Clear").click()
    assert page.problems() == []


def test_what_python_turns_and_browsers_do_not_is_refused(opened, tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>'
    image.save(tmp_path / "a.webp", exif=turned)
    image.save(tmp_path / "b.jpg", xmp=xmp % 6)
    image.save(tmp_path / "c.jpg", xmp=xmp % 6, exif=turned)  # EXIF says it, too
    image.save(tmp_path / "d.jpg", xmp=xmp % 1)
    about, packed = PngInfo(), PngInfo()
    about.add_text("Raw profile type exif", f"\nexif\n 8\n{turned.tobytes().hex()}", zip=True)  # as ImageMagick did
    packed.add_itxt("XML:com.adobe.xmp", (xmp % 6).decode(), zip=True)
    image.save(tmp_path / "e.png", pnginfo=about)
    image.save(tmp_path / "f.png", pnginfo=packed)
    image.save(tmp_path / "g.png", pnginfo=packed, exif=turned)
    files = sorted(tmp_path.iterdir())
    turns = [load_image(file).size == (40, 60) for file in files]
    assert turns == [True, True, True, False, True, True, True]
    page = opened().choose(files).done()
    assert [line.partition(":")[0] for line in page.problems()] == ['"a.webp"', '"b.jpg"', '"e.png"', '"f.png"']
    assert all(re.search("save it (turned|anew)", line) for line in page.problems())
    assert [row["file"] for row in rows_of(page.table())] == ["c.jpg", "d.jpg", "g.png"]


def test_no_request_leaves_the_origin_and_none_is_made_for_a_picture(browser, installed, models, files, tmp_path):
    put(installed, models / "intervals")
    with serving(installed) as (address, seen), serving(tmp_path) as (elsewhere, reached):
        page = Opened(browser, address)
        loaded = len(page.requests), len(seen)
        page.choose(files).done()
        page.table()
        page.page.locator("#level").fill("0.8")
        page.page.locator("#level").press("Tab")
        page.page.locator("#save:enabled").wait_for()
        assert (len(page.requests), len(seen)) == loaded
        assert {method for method, _ in page.requests + seen} == {"GET"}
        for _, url in page.requests:
            assert url.startswith((f"{address}/", f"blob:{address}/", "data:,")), url
        asked_for = {urlsplit(path).path for _, path in seen}
        assert {path for path in asked_for if "node_modules" in path} == {
            "/node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs",
            "/node_modules/onnxruntime-web/dist/ort-wasm-simd-threaded.wasm",
        }
        # And where somebody changes the scripts, the policy holds: of the page, and of the worker where pictures are.
        tries = """async (url) => {
          const ways = [() => fetch(url, { method: "POST", mode: "no-cors", body: "x" }), () => import(url)];
          return Promise.all(ways.map((way) => way().then(() => "sent", () => "refused")));
        }"""
        (worker,) = page.page.workers
        assert page.page.evaluate(tries, f"{elsewhere}/x.js") == ["refused", "refused"]
        assert worker.evaluate(tries, f"{elsewhere}/x.js") == ["refused", "refused"]
        picture = """(url) => new Promise((resolve) => {
          const image = new Image();
          [image.onload, image.onerror, image.src] = [() => resolve("sent"), () => resolve("refused"), url];
        })"""
        assert page.page.evaluate(picture, f"{elsewhere}/x.png") == "refused"
        assert reached == []
        page.page.close()


def test_numbers_are_written_as_python_writes_them(opened):
    rng = np.random.default_rng(0)
    numbers = (rng.normal(size=2000) * 10.0 ** rng.integers(-12, 12, 2000)).astype(np.float32)
    longer = np.array([float(f"{number:.7e}") != number for number in numbers])  # than 8 digits: no half of the seventh
    some = [0.0, 1.0, -0.5, 100.0, 9.9999999e-5, 1e-4, 9999999.6, 1234567.0, 12345678.0]
    numbers = [*map(float, numbers[longer]), *some]
    script = """async (numbers) => {
      const { digits } = await import("/numbers.js");
      return numbers.map((number) => [digits(number, 7), digits(number, 6)]);
    }"""
    assert opened().page.evaluate(script, numbers) == [[f"{number:.7g}", f"{number:.6g}"] for number in numbers]


SIZES = [(1, 1), (3, 2), (31, 17), (33, 32), (64, 47), (97, 251), (640, 427), (33, 33)]


def as_text(image):
    return base64.b64encode(np.asarray(image).tobytes()).decode()


def test_pixels_are_prepared_bit_for_bit(opened):
    """Every kernel and both rules, made smaller and larger, by whole and odd factors."""
    script = """async ([width, height, text, settings]) => {
      const { prepare } = await import("/preprocess.js");
      const data = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
      const found = new Uint8Array(prepare({ width, height, data }, settings).buffer);
      let binary = "";
      for (const byte of found) binary += String.fromCharCode(byte);
      return btoa(binary);
    }"""
    page = opened().page
    rng = np.random.default_rng(0)
    tried = 0
    for interpolation, rule, size in product(INTERPOLATION, RESIZE, (33, 32)):
        ratio = float(rng.choice([0.75, 1.0, 256 / 224]))
        spec = PixelSpec(
            size, (0.48, 0.4578275, 0.40821073), (0.2686, 0.26130258, 0.2757771), interpolation, rule, ratio
        )
        settings = {"size": size, "scaled_size": spec.scaled_size, "resize": rule, "interpolation": interpolation}
        settings |= {"mean": spec.mean, "std": spec.std}
        for width, height in SIZES:
            image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
            text = page.evaluate(script, [width, height, as_text(image), settings])
            found = np.frombuffer(base64.b64decode(text), np.float32).reshape(3, size, size)
            assert np.array_equal(found, prepare(image, spec).numpy()), (interpolation, rule, ratio, width, height)
            tried += 1
    assert tried == len(INTERPOLATION) * len(RESIZE) * 2 * len(SIZES)


def swapping():
    """A colour profile whose red is blue and whose curves are straight: who heeds it sees other colours."""

    def s15(*numbers):
        return b"".join(struct.pack(">i", round(number * 65536)) for number in numbers)

    def point(*numbers):
        return b"XYZ \0\0\0\0" + s15(*numbers)

    straight = b"curv\0\0\0\0" + struct.pack(">IH", 1, 256) + b"\0\0"
    tags = {
        b"rXYZ": point(0.1431, 0.0606, 0.7141),
        b"gXYZ": point(0.3851, 0.7169, 0.0971),
        b"bXYZ": point(0.4360, 0.2225, 0.0139),
        b"wtpt": point(0.9642, 1, 0.8249),
        **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), straight),
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"swap\0" + bytes(78),
        b"cprt": b"text\0\0\0\0none\0\0\0\0",
    }
    begin, table, data = 128 + 4 + 12 * len(tags), b"", b""
    for name, content in tags.items():
        table += name + struct.pack(">II", begin + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    body = struct.pack(">I", len(tags)) + table + data
    head = struct.pack(">I4sI4s4s4s", 128 + len(body), b"none", 0x02100000, b"mntr", b"RGB ", b"XYZ ") + bytes(12)
    return head + b"acsp" + bytes(28) + s15(0.9642, 1, 0.8249) + bytes(48) + body


def variants(folder):
    """Files of one picture in every way that browsers decode; their paths."""
    rng = np.random.default_rng(2)
    pixels = rng.integers(0, 256, (70, 90, 3), dtype=np.uint8)
    image, alpha = Image.fromarray(pixels), rng.integers(0, 256, (70, 90), dtype=np.uint8)
    clear, reduced = Image.fromarray(np.dstack([pixels, alpha])), image.convert("P", palette=Image.Palette.ADAPTIVE)
    for number in range(1, 9):
        turned = Image.Exif()
        turned[0x0112] = number
        image.save(folder / f"turned{number}.jpg", exif=turned)
    image.save(folder / "turned.png", exif=turned)
    for kind, words in {
        "png": {},
        "bmp": {},
        "webp": {"lossless": True},
        "avif": {"quality": 90},
        "jpg": {"subsampling": 1},
    }.items():
        image.save(folder / f"plain.{kind}", **words)
    image.save(folder / "lossy.webp")
    for kind, words in {"png": {}, "jpg": {"quality": 95}, "webp": {"lossless": True}}.items():
        image.save(folder / f"profile.{kind}", icc_profile=swapping(), **words)
    image.convert("CMYK").save(folder / "print.jpg")
    for kind, words in {"png": {}, "webp": {"lossless": True}}.items():
        clear.save(folder / f"clear.{kind}", **words)
    clear.convert("LA").save(folder / "grey-clear.png")
    reduced.save(folder / "palette-clear.png", transparency=7)
    reduced.save(folder / "palette-clear.gif", transparency=7)
    reduced.save(folder / "palette.gif", save_all=True, append_images=[reduced.rotate(90)])
    Image.fromarray(rng.integers(0, 65536, (70, 90)).astype(np.uint16)).save(folder / "deep.png")
    image.resize((2500, 2100)).save(folder / "tiles.png")  # more than are read from the canvas at once
    return sorted(folder.iterdir())


def test_pictures_are_decoded_as_in_python(opened, models, tmp_path):
    """Equal in every pixel; of 16-bit grey, which Chromium cuts to 8 bits and Python rounds, within one of 255."""
    script = """async ([text, settings]) => {
      const { decode } = await import("/preprocess.js");
      const file = new Blob([Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0))]);
      const { width, height, data } = await decode(file, settings);
      let binary = "";
      for (let at = 0; at < data.length; at += 8192) binary += String.fromCharCode(...data.subarray(at, at + 8192));
      return [width, height, btoa(binary)];
    }"""
    page = opened()
    settings = json.loads((models / "intervals" / "preprocessing.json").read_text())
    for file in variants(tmp_path):
        width, height, text = page.page.evaluate(script, [base64.b64encode(file.read_bytes()).decode(), settings])
        expected = np.asarray(load_image(file))
        found = np.frombuffer(base64.b64decode(text), np.uint8)
        assert (height, width, 3) == expected.shape, file.name
        off = np.abs(found.reshape(expected.shape).astype(int) - expected).max()
        assert off <= (file.name == "deep.png"), (file.name, off)
        if file.name == "deep.png":
            assert off == 1


def test_pixels_that_a_browser_changes_are_noticed(opened):
    """As browsers do that hide who their user is."""
    page = opened().page
    asked_of_it = "async () => (await import('/preprocess.js')).readsTruly()"
    assert page.evaluate(asked_of_it) is True
    page.evaluate(
        """() => {
      const { getImageData } = OffscreenCanvasRenderingContext2D.prototype;
      OffscreenCanvasRenderingContext2D.prototype.getImageData = function (...where) {
        const found = getImageData.apply(this, where);
        found.data[400] ^= 1;
        return found;
      };
    }"""
    )
    assert page.evaluate(asked_of_it) is False


def test_what_is_missing_is_said(browser, installed, models, tmp_path):
    site = tmp_path / "site"
    shutil.copytree(installed, site, ignore=shutil.ignore_patterns("node_modules", "model"))
    with serving(site) as (address, _):

        def said():
            page = Opened(browser, address)
            assert not page.page.locator("#controls").is_visible()
            state = page.state
            page.page.close()
            return state

        assert "model/preprocessing.json is not there: run `ordinalclip export RUN --out model`" in said()
        put(site, models / "plain")
        (site / "model" / "model.onnx").rename(site / "model" / "model.xml")
        assert "model/model.onnx is not there" in said()
        put(site, models / "intervals")
        assert "run `npm install`" in said()
        (site / "node_modules").symlink_to(installed / "node_modules")
        ranks = json.loads((site / "model" / "ranks.json").read_text())
        del ranks["levels"]
        (site / "model" / "ranks.json").write_text(json.dumps(ranks))
        assert "does not say the levels of the model's intervals: export it again" in said()


def test_pictures_are_dropped_anywhere_on_the_page(opened, files):
    page = opened()
    data = page.page.evaluate_handle(
        """async ([name, text]) => {
      const data = new DataTransfer();
      data.items.add(new File([Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0))], name));
      return data;
    }""",
        ["dropped.png", base64.b64encode(files[-1].read_bytes()).decode()],
    )
    for kind in ("dragover", "drop"):  # what is not prevented opens the picture in place of the page
        left = page.page.evaluate(
            """([kind, dataTransfer]) => document.querySelector("h1").dispatchEvent(
          new DragEvent(kind, { dataTransfer, bubbles: true, cancelable: true }))""",
            [kind, data],
        )
        assert left is False
    page.done()
    assert [row["file"] for row in rows_of(page.table())] == ["dropped.png"]


@pytest.mark.parametrize(("width", "scheme"), product((400, 1200), ("light", "dark")))
def test_the_page_is_readable_and_used_by_keyboard(opened, files, width, scheme):
    page = opened(viewport={"width": width, "height": 900}, color_scheme=scheme).choose(files).done().page
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    colours = page.evaluate(
        """() => Object.fromEntries(["back", "card", "text", "quiet", "accent", "on-accent", "problem"].map(
      (name) => [name, getComputedStyle(document.documentElement).getPropertyValue(`--${name}`)]))"""
    )
    for front, behind in [*product(("text", "quiet", "problem"), ("back", "card")), ("on-accent", "accent")]:
        assert contrast(colours[front], colours[behind]) >= 4.5, (front, behind)
    page.locator("body").click(position={"x": 1, "y": 1})
    reached = []
    for _ in range(4):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id"))
    assert reached == ["files", "level", "save", "clear"]
    assert page.get_by_label("Choose pictures").count() == 1
    assert page.get_by_label("How often intervals hold the truth").count() == 1
    assert page.get_by_role("row").count() == 1 + page.locator("tbody tr").count()
    assert page.get_by_role("status").inner_text()
    assert page.get_by_role("log").get_by_text("deep.tif").count() == 1


def contrast(one, other):
    """Of two colours, as WCAG 2 has it: 1 to 21."""

    def luminance(colour):
        shares = [int(colour.strip()[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)
