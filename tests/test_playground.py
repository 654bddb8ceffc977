"""The page of `ordinalclip demo`: what it computes, and the page itself in a browser."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from conftest import BROWSER
from PIL import Image

from ordinalclip import Ranks, explore, playground
from ordinalclip.cli import main
from ordinalclip.config import RunConfig, load_config
from ordinalclip.explain import central_interval
from ordinalclip.gauges import draw
from ordinalclip.heads import head_options
from ordinalclip.images import BrokenImageError
from ordinalclip.pipeline import load_pipeline
from ordinalclip.playground import Playground, as_integer, drawn, escaped, serve
from ordinalclip.run_folder import RunFolder
from ordinalclip.runs import train

NAMES = "0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of OrdinalCLIP and one of L1, some steps each, on thermometers with eleven ranks."""
    made = {}
    for method in ("ordinalclip", "l1"):
        place = tmp_path_factory.mktemp(method) / method
        head = ["head.prompt=a photo of a gauge at", "head.init_from_names=true", "head.num_base_ranks=3"]
        keys = [*(head if method == "ordinalclip" else []), "ranks.low=0", "ranks.high=100", "ranks.num=11"]
        keys += ["data.kinds=[thermometer]", "data.num_train=64", "data.num_validation=16", "data.num_test=40"]
        keys += ["train.max_steps=30", "train.batch_size=16", "train.lr=1e-3", "evaluation.report=false"]
        keys += ["ranks.unit=%", f"method={method}", f"output_dir={place}"]
        made[method] = train(load_config(None, keys), quiet=True)
    return made


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "gauge.png"
    draw("thermometer", 40.0, np.random.default_rng(3)).save(path)
    return path


# ---- what the page shows


def test_a_picture_is_answered_as_by_the_pipeline(runs, picture):
    for method, run in runs.items():
        play = Playground(run)
        sentence, figure = play.why(picture)
        pipe, say = load_pipeline(str(run / "model")), play.record.ranks.say
        answer = pipe(str(picture), top_k=11)
        wanted = f"<b>{say(answer['value'])}</b>"
        if method == "ordinalclip":
            ranks = sorted(answer["top"], key=lambda entry: entry["value"])
            probabilities = np.asarray([entry["probability"] for entry in ranks])
            low, high = central_interval(probabilities, play.record.ranks, 0.9)[:2]
            wanted += f"<br>central 90 %, not calibrated: {say(low)} to {say(high)}"
        assert sentence == wanted
        assert figure.get_suptitle() == f"gauge.png: {say(answer['value'])}"
        error = RunFolder(run).read_metrics()["test"]["mae"]
        assert (
            play.about == f"{method}: 11 ranks from 0 % to 100 %, mean absolute error {error:.3g} % on the test part."
        )


def test_examples_are_spread_over_the_labels_of_the_part_that_is_shown(runs):
    play = Playground(runs["l1"])
    part = play.record.images
    labels = [label for _, label in play.examples]
    assert len(labels) == 8
    assert labels == sorted(labels)
    assert [labels[0], labels[-1]] == [part.values.min(), part.values.max()]
    for image, label in play.examples:
        assert image.tobytes() == part.image(int(np.flatnonzero(part.values == label)[0])).tobytes()


def test_the_fields_begin_with_the_prompts_of_the_run(runs):
    play = Playground(runs["ordinalclip"])
    assert play.first_prompts == ("a photo of a gauge at", NAMES, 3, "linear", "tail")
    assert play.clip == "tiny"
    other = {"head": {"prompt": "at", "init_from_names": True}, "model": {"text": "minilm"}}  # the others are defaults
    play.record = replace(play.record, config=RunConfig(**other))
    assert play.first_prompts == ("at", NAMES, head_options("ordinalclip")["num_base_ranks"].default, "linear", "tail")
    assert play.clip == "minilm"
    play.record = replace(play.record, config=RunConfig(method="coop", head={"prompt": "at"}))
    assert play.first_prompts[2] == 0
    play.record.model.head.ranks = Ranks((0, 1), ("few, some", "many"))
    assert play.first_prompts[1] == "few, some\nmany"
    assert Playground(runs["l1"]).first_prompts == ("the value of the picture is", NAMES, 3, "linear", "tail")


def test_typed_prompts_are_those_of_explore_and_are_read_by_the_run(runs):
    run, readings = runs["ordinalclip"], Ranks.linear(0, 100, 11, unit="%")
    play = Playground(run)
    prompts = play.prompts("the dial says", NAMES.replace(", ", "\n"), 4, "piecewise", "front")
    own = explore.interpolated("the dial says", readings, 4, "piecewise", "front", "tiny", title="typed")
    assert prompts.prototypes.equal(own.prototypes)
    table = play.ordinality(prompts)
    assert table["prompts"].tolist() == ["typed", "ordinalclip"]
    assert table["whole"].tolist() == explore.ordinality(own, run)["whole"].tolist()
    named = play.prompts("the dial says", "a, b, c, d, e, f, g, h, i, j, k", 0, "linear", "tail")
    images, say = [image for image, _ in play.examples], play.record.ranks.say
    wanted = zip(
        map(named.ranks.say, explore.read(images, named, by=run)["typed"]),
        map(say, explore.read(images, run, by=run).iloc[:, 0]),
        [say(label) for _, label in play.examples],
        strict=True,
    )
    keys = ("typed", "learned", "true")
    assert [lines for _, lines in play.read(named)] == [dict(zip(keys, row, strict=True)) for row in wanted]


@pytest.mark.parametrize("bases", [0, 2, 11])
def test_no_base_ranks_are_not_as_many_as_ranks(runs, bases):
    own = explore.interpolated("at", Ranks.linear(0, 100, 11, unit="%"), bases or None, "linear")
    typed = Playground(runs["ordinalclip"]).prompts("at", NAMES, bases, "linear", "tail")
    assert typed.prototypes.equal(own.prototypes)


def test_without_prototypes_the_clip_that_ships_reads_and_says_so(runs):
    play = Playground(runs["l1"])
    prompts = play.prompts("the gauge is at", NAMES, 0, "linear", "tail")
    assert prompts.prototypes.equal(explore.interpolated("the gauge is at", play.record.ranks, None).prototypes)
    values = explore.read([image for image, _ in play.examples], prompts)["typed"]
    assert [lines["typed"] for _, lines in play.read(prompts)] == [play.record.ranks.say(value) for value in values]
    assert all(set(lines) == {"typed", "true"} for _, lines in play.read(prompts))
    assert play.ordinality(prompts)["prompts"].tolist() == ["typed"]
    assert "l1 keeps no rank prototypes" in play.readers


def test_bad_input_is_refused(runs, tmp_path):
    play = Playground(runs["ordinalclip"])
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(BrokenImageError, match=r"^cut\.png: not a readable image"):
        play.why(tmp_path / "cut.png")
    for given, message in (
        (("the gauge is at", "low, high", 3), "^2 names, but the run has 11 ranks"),
        (("the gauge is at", NAMES, 12), r"^base ranks must be 0 \(every rank has its own\) to 11, got 12"),
        (("a {name}", NAMES, 3), "has braces"),
    ):
        with pytest.raises(ValueError, match=message):
            play.prompts(*given, "linear", "tail")
    for number in (None, 2.5, float("nan")):
        with pytest.raises(ValueError, match="must be a whole number"):
            as_integer(number)
    assert escaped("<img src=x onerror=alert(1)>\x1b") == "&lt;img src=x onerror=alert(1)&gt;\\x1b"


def test_the_command_says_what_is_wrong(runs, tmp_path, capsys, monkeypatch):
    pytest.importorskip("gradio")
    assert main(["demo", str(tmp_path)]) == 2
    assert "no finished run" in capsys.readouterr().err
    for host, message in (
        ("::1", "a name or an IPv4 address"),
        ("", "a name or"),
        ("no.such.invalid", "--host no.such"),
    ):
        assert main(["demo", str(runs["l1"]), "--host", host]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo", str(runs["l1"])]) == 2
    assert capsys.readouterr().err == "ordinalclip: ordinalclip demo needs gradio: pip install 'ordinalclip[demo]'\n"


@pytest.mark.slow
def test_a_port_that_is_taken_is_named_or_passed_over_and_nobody_asks_for_a_tunnel(runs, monkeypatch):
    networking = pytest.importorskip("gradio").networking
    monkeypatch.setenv("GRADIO_SHARE", "True")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # where nobody answers
    for name in ("NO_PROXY", "no_proxy", "GRADIO_TEMP_DIR"):  # set by `serve`, and as they were afterwards
        monkeypatch.setenv(name, "")
    said, tunnels = [], []
    monkeypatch.setattr(networking, "setup_tunnel", lambda **options: tunnels.append(options) or "https://elsewhere")

    def stop(address):
        said.append(address)
        raise KeyboardInterrupt

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"^127.0.0.1:{port} cannot be had"):
            serve(runs["l1"], port=port, say=stop)
        monkeypatch.setattr(playground, "PORT", port)
        with pytest.raises(KeyboardInterrupt):
            serve(runs["l1"], say=stop)
    assert tunnels == []
    (address,) = said
    assert re.fullmatch(r"http://127\.0\.0\.1:(\d+)  \(Ctrl-C ends it\)", address)
    assert port < int(address.split(":")[2].split()[0]) < port + playground.PORTS


# ---- the page in a browser


@pytest.fixture(scope="module")
def address(runs, tmp_path_factory):
    """The page of the run of OrdinalCLIP, served by the command until Ctrl-C ends it."""
    pytest.importorskip("gradio")
    command = [sys.executable, "-m", "ordinalclip", "demo", str(runs["ordinalclip"])]
    said, temporary = tmp_path_factory.mktemp("said") / "stderr", tmp_path_factory.mktemp("temporary")
    pipes = {"stdout": subprocess.PIPE, "text": True, "env": {**os.environ, "TMPDIR": str(temporary)}}
    with said.open("w") as errors, subprocess.Popen(command, stderr=errors, **pipes) as server:
        try:
            yield server.stdout.readline().split()[0]
        finally:
            server.send_signal(signal.SIGINT)
            assert server.wait(60) == 130
    assert said.read_text() == "ordinalclip: stopped by Ctrl-C\n"
    assert not list(temporary.rglob("*.png"))  # nobody's pictures stay


@pytest.fixture
def page(address, request):
    """The page in Chromium, as wide as a test says, which complains of nothing and asks nobody else."""
    playwright = pytest.importorskip("playwright.sync_api").sync_playwright
    if BROWSER is None:
        pytest.skip("no Chromium is installed")
    complaints = []
    with playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": getattr(request, "param", 1280), "height": 900})
        opened.set_default_timeout(60_000)
        opened.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        opened.on("pageerror", lambda error: complaints.append(str(error)))
        opened.on("dialog", lambda dialog: complaints.append(dialog.message))
        opened.on("request", lambda each: None if own(each.url) else complaints.append(each.url))

        def own(url):
            return url.startswith((address, "data:", "blob:"))

        opened.goto(address)
        yield opened
        browser.close()
    assert complaints == []


def wait_for(what, seconds=60):
    """Until it is true; then what it is."""
    for _ in range(10 * seconds):
        if found := what():
            return found
        time.sleep(0.1)
    raise AssertionError(f"waited for too long: {what()}")


@pytest.mark.slow
@pytest.mark.parametrize("page", [390, 1280], indirect=True)
def test_a_picture_is_uploaded_or_chosen_on_narrow_and_wide_pages(page, runs, picture):
    play = Playground(runs["ordinalclip"])

    def answers(given):
        """What the page shows in the end, which is the last that was asked for: the answer and the picture itself."""
        sentence, figure = play.why(given)
        said = re.sub("<[^>]*>", " ", sentence).split()
        seen = re.findall(r"data:image/png;base64,[^\"]*", drawn(figure, "why", ""))[0].split()

        def wanted():
            shown = page.locator("#reasons").inner_html()
            told = page.locator("#reasons .answer").all_inner_texts()
            found = re.findall(r"data:image/png;base64,[^\"]*", shown)
            return [each.split() for each in told] == [said] and [each.split() for each in found[:1]] == [seen]

        wait_for(wanted)
        page.wait_for_timeout(1500)
        assert wanted()

    page.locator("#picture input").set_input_files(str(picture))
    answers(picture)
    assert page.locator("#picture").get_by_text("gauge").count()
    page.locator("#examples button").nth(0).click()
    page.locator("#examples button").nth(7).click()  # while that is computed
    answers(play.examples[7][0])
    assert not page.locator("#picture").get_by_text("gauge").count()  # the answer is not its any more
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= page.viewport_size["width"]
    box = page.locator("#reasons .drawing svg").bounding_box()
    assert 0 < box["x"] < box["x"] + box["width"] <= width


@pytest.mark.slow
def test_a_picture_is_dropped_and_a_bad_file_is_named(page, picture, tmp_path):
    script = """async ([name, bytes]) => {
      const data = new DataTransfer();
      data.items.add(new File([new Uint8Array(bytes)], name));
      return data;
    }"""
    drop = page.locator("#picture button").first

    def dropped(name, content):
        data = page.evaluate_handle(script, [name, list(content)])
        drop.dispatch_event("drop", {"dataTransfer": data})

    dropped("gauge.png", picture.read_bytes())
    page.wait_for_selector("#reasons .drawing svg")
    page.locator("#picture button[aria-label='Clear']").click()
    wait_for(lambda: page.locator("#reasons .drawing").count() == 0)
    dropped("<img src=x onerror=alert(1)>.png", b"no picture")
    told = page.wait_for_selector("#reasons .problem")
    assert told.inner_text().startswith("img src=x onerror=alert(1).png: not a readable image")
    assert page.locator("#reasons img").count() == 0


@pytest.mark.slow
@pytest.mark.parametrize("page", [390, 1280], indirect=True)
def test_prompts_are_typed_and_dragged_and_the_rest_follows(page, runs):
    readings = Ranks.linear(0, 100, 11, unit="%")

    def shown():
        return page.locator("#ordinality tbody tr").first.inner_text().split()

    def follows(context, bases, interpolation="linear", ranks=readings):
        """The table is that of these prompts; then the drawing and the answers."""
        own = explore.interpolated(context, ranks, bases, interpolation)
        row = [f"{value:.3f}" for value in explore.ordinality(own).iloc[0]]
        wait_for(lambda: shown() == ["typed", *row])
        images = Playground(runs["ordinalclip"]).examples
        values = explore.read([image for image, _ in images], own, by=runs["ordinalclip"])
        learned = explore.read([image for image, _ in images], runs["ordinalclip"], by=runs["ordinalclip"])
        rows = zip(values.iloc[:, 0], learned.iloc[:, 0], images, strict=True)
        lines = [
            f"typed: {ranks.say(value)}\nlearned: {readings.say(other)}\ntrue: {readings.say(label)}"
            for value, other, (_, label) in rows
        ]
        wait_for(lambda: page.locator("#answers figcaption").all_inner_texts() == lines)
        return page.locator("#matrix .drawing").inner_html()

    page.get_by_role("tab", name="Prompts").click()
    drawings = {follows("a photo of a gauge at", 3)}
    page.locator("#context textarea, #context input").first.fill("the water stands at")
    drawings.add(follows("the water stands at", 3))
    handle = page.locator("#bases input[type=range]").bounding_box()
    middle = handle["y"] + handle["height"] / 2
    page.mouse.move(handle["x"] + 0.2 * handle["width"], middle)
    page.mouse.down()
    page.mouse.move(handle["x"] + 0.5 * handle["width"], middle, steps=4)
    page.mouse.up()
    bases = int(page.locator("#bases input[type=number]").input_value())
    assert 4 < bases < 8
    drawings.add(follows("the water stands at", bases))
    page.locator("#context textarea, #context input").first.fill("the water rises to")
    page.get_by_label("piecewise").check()  # at once
    drawings.add(follows("the water rises to", bases, "piecewise"))
    names = "nothing, one, two, three, four, five, six, seven, eight, nine, all"
    page.locator("#names textarea").fill(names)
    worded = Ranks(readings.values, tuple(names.split(", ")), "%")
    drawings.add(follows("the water rises to", bases, "piecewise", worded))
    assert len(drawings) == 5
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
    page.locator("#names textarea").fill("low, high")
    assert page.wait_for_selector("#ordinality .problem").inner_text().startswith("2 names, but the run has 11 ranks")
    assert page.locator("#matrix .drawing, #answers img").count() == 0


@pytest.mark.slow
def test_the_page_is_readable_in_the_dark(page, picture):
    """Ink on the page's own paper: as much contrast as WCAG asks of text."""
    page.goto(f"{page.url}?__theme=dark")
    page.locator("#picture input").set_input_files(str(picture))
    page.wait_for_selector("#reasons .drawing svg")
    page.screenshot(path=picture.parent / "dark.png")
    with Image.open(picture.parent / "dark.png") as shot:
        paper = shot.convert("RGB").getpixel((2, 400))
    inks = page.eval_on_selector_all(
        "#reasons .drawing svg text", "all => all.map(each => getComputedStyle(each).fill)"
    )
    for ink in {tuple(map(int, re.findall(r"\d+", ink)))[:3] for ink in inks}:
        brighter, darker = sorted(map(luminance, (ink, paper)), reverse=True)
        assert (brighter + 0.05) / (darker + 0.05) >= 4.5
    assert luminance(paper) < 0.05


def luminance(colour):
    """Of an sRGB colour from 0 to 255, relative to white (WCAG 2.2)."""
    value = np.asarray(colour) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))
