"""Reports, figures and model cards of real runs: what they say, that they need nothing else, that nothing escapes."""

import csv
import json
import logging
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import BROWSER
from huggingface_hub import ModelCard
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex, to_rgb
from matplotlib.lines import Line2D
from matplotlib.text import Text
from PIL import Image

from ordinalclip.audit import audit
from ordinalclip.cli import main
from ordinalclip.compare import load_plan, run_plan
from ordinalclip.config import load_config, parse_config
from ordinalclip.data import PARTS, Parts
from ordinalclip.heads import available_heads
from ordinalclip.metrics import METRICS
from ordinalclip.pipeline import load_pipeline
from ordinalclip.ranks import Ranks
from ordinalclip.results import figures, run_report
from ordinalclip.results.explanation_figure import explanation
from ordinalclip.results.record import read_run, shown
from ordinalclip.results.search_report import SearchRecord, TrialRow, write_search_report, write_trials
from ordinalclip.results.significance import Verdict
from ordinalclip.training import evaluate_run, train

TINY = {
    "data": {"num_train": 24, "num_validation": 12, "num_test": 12},
    "ranks": {"low": 0, "high": 100, "num": 21, "unit": "%"},
    "train": {"max_steps": 4, "batch_size": 8, "lr": 1e-3},
}
HOSTILE = "=<b>zero</b> $shot$ | *a* [x](javascript:alert(1)) `c"
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """The tags, texts by `data-*` attribute and ids of a page; a tag that is not closed in order fails."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.texts, self.ids = [], [], {}, []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.open.append((tag, dict(attributes)))

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag):
        assert self.open[-1][0] == tag, f"</{tag}> closes <{self.open[-1][0]}> at {self.getpos()}"
        self.open.pop()

    def handle_data(self, text):
        tag, attributes = self.open[-1] if self.open else ("", {})
        for name, value in [("tag", tag), *attributes.items()]:
            if name in ("tag", "data-metric", "data-group", "class"):
                self.texts.setdefault(value, []).append(text)


def page_of(folder):
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An OrdinalCLIP run with all parts."""
    folder = tmp_path_factory.mktemp("report") / "run"
    return train(parse_config({**TINY, "output_dir": str(folder)}, "tiny"), quiet=True)


@pytest.fixture
def reported(quick):
    """A function (overrides) -> configuration of a quick run that writes its report."""
    return lambda *overrides: quick("evaluation.report=true", *overrides)


@pytest.fixture
def table(tmp_path):
    """A function (overrides) -> configuration of a run on ten PNG files in three grades."""
    rows = ["image,label"]
    for number in range(10):
        pixels = np.random.default_rng(number).integers(0, 60, (40, 48, 3)) + 80 * (number % 3)
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"cell{number}.png")
        rows.append(f"cell{number}.png,{number % 3}")
    (tmp_path / "labels.csv").write_text("\n".join(rows) + "\n")
    base = [f"output_dir={tmp_path}/run", "train.max_steps=2", "train.batch_size=4", "data.source=table"]
    return lambda *more: load_config(None, [*base, f"data.root={tmp_path}", "data.table=labels.csv", *more])


def test_a_report_is_one_well_formed_file(run):
    text = (run / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert len(text) < 3e6
    assert len(set(page.ids)) == len(page.ids)
    assert {"agreement", "error_by_value", "feature_map", "similarity", "learning_curves"} <= set(page.ids)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            assert attributes.get(name, "#").startswith(("#", "data:image/")), (tag, name)
    assert not re.search(r"url\((?!#)|@import", text)
    for target in re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', text):
        assert target in page.ids
    assert sum(tag == "img" for tag, _ in page.tags) == 12


def test_the_numbers_are_those_of_metrics_json(run):
    page, metrics = page_of(run), metrics_of(run)
    for name in ("mae", "rmse", "r2", "accuracy", "spearman", "cs@5"):
        assert page.texts[name][0] == shown(metrics["test"][name])
    assert page.texts["ordinality"][0] == shown(metrics["ordinality"])
    assert page.texts["few"] == [shown(metrics["test"]["mae_by_shots"]["few"]["mae"])]
    assert "many" not in page.texts  # no rank has as many as that
    assert sum(metrics["train_counts"]) == metrics["num_train"] == 24
    intervals = [re.fullmatch(r"([-\d.]+) to ([-\d.]+)", text) for text in page.texts["interval"]]
    low, high = (float(group) for group in intervals[0].groups())
    assert low <= metrics["test"]["mae"] <= high
    record = read_run(run)
    always = record.ranks.values[int(np.searchsorted(np.cumsum(metrics["train_counts"]), 24 / 2))]
    assert record.constant["mae"] == pytest.approx(np.abs(record.predictions.labels - always).mean())


def test_figures_follow_the_theme_of_the_page(run):
    text = (run / "report.html").read_text(encoding="utf-8")
    drawings = re.findall(r"<svg role=.*?</svg>", text, re.DOTALL)
    assert len(drawings) == 5
    for drawing in drawings:
        assert "var(--ink)" in drawing
        assert not any(colour in drawing for colour in figures.THEME)
    for variable in figures.THEME.values():
        assert text.count(f"{variable}: #") == 2  # light and dark


KINDS = {"ordinalclip", "l1", "rm_loss", "ordreg", "constant"}  # prototypes, a value, neighbours, thresholds, nothing


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(name, marks=[] if name in KINDS else pytest.mark.slow)
        for name in sorted(set(available_heads()) - {"prototypes"})
    ],
)
def test_every_method_has_a_report_and_a_card(reported, method):
    run = train(reported(f"method={method}", "train.max_steps=2"), quiet=True)
    page, metrics = page_of(run), metrics_of(run)
    assert ("similarity" in page.ids) == (metrics["ordinality"] is not None)
    assert ("learning_curves" in page.ids) == (metrics["steps"] > 0)
    has_distribution = read_run(run).predictions.probabilities is not None
    assert ("axis" in (attributes.get("class") for _, attributes in page.tags)) == has_distribution
    assert shown(metrics["test"]["mae"]) in (run / "model" / "README.md").read_text(encoding="utf-8")


def test_a_constant_answer_has_no_correlation(reported):
    run = train(reported("method=constant"), quiet=True)
    page = page_of(run)
    assert metrics_of(run)["test"]["spearman"] is None
    assert page.texts["spearman"] == ["-"]
    assert "not defined" in page.texts["interval"]
    card = (run / "model" / "README.md").read_text(encoding="utf-8")
    assert "| Spearman |" not in card
    for text in (run.joinpath("report.html").read_text(encoding="utf-8"), card):
        assert "nearly the same answer for every picture" in text


@pytest.mark.parametrize(
    "split, shown_part",
    [("[0.5,0,0.5]", "test"), ("[0.5,0.5,0]", "validation"), ("[1,0,0]", ""), ("[0.8,0,0.2]", "test")],
)
def test_parts_may_be_missing(table, split, shown_part):
    run = train(table(f"data.split={split}"), quiet=True)
    page, record = page_of(run), read_run(run)
    assert record.part == shown_part
    assert ("confusion" in page.ids) == bool(shown_part)
    assert ("mae" in page.texts) == bool(shown_part)
    card = (run / "model" / "README.md").read_text(encoding="utf-8")
    assert ("nothing is known about its error" in card) == (not shown_part)
    assert ("optimistic" in card) == (shown_part == "validation")


def test_evaluating_later_brings_the_test_part_into_the_report(reported):
    run = train(reported("evaluation.test=false"), quiet=True)
    assert read_run(run).part == "validation"
    metrics = evaluate_run(run, quiet=True)
    assert page_of(run).texts["mae"][0] == shown(metrics["test"]["mae"])
    assert len(metrics["test"]["mae_by_shots"]) == 4


def test_hostile_names_are_text(table, tmp_path):
    name = "\"><img src=x onerror='alert(1)'>&amp;$x^$.png"
    (tmp_path / "cell0.png").rename(tmp_path / name)
    csv = (tmp_path / "labels.csv").read_text().replace("cell0.png", '"' + name.replace('"', '""') + '"')
    (tmp_path / "labels.csv").write_text(csv)
    folder = tmp_path / "<b>run"
    names = "['<script>a', '$\\frac$', '\"c\"']"
    ranks = ["ranks.values=[0,1,2]", f"ranks.names={names}", "ranks.unit='<i>$ & %'"]
    data = ["data.table=''", "data.train_table=labels.csv", "data.test_table=labels.csv", "data.duplicates=allow"]
    run = train(table(*data, f"output_dir={json.dumps(str(folder))}", *ranks), quiet=True)
    page = page_of(run)
    assert not {"script", "b", "i"} & {tag for tag, _ in page.tags}
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert all(attributes["src"].startswith("data:image/jpeg;base64,") for attributes in images)
    assert all("onerror" not in attributes for _, attributes in page.tags)
    assert name in page.texts["name"]  # all ten images are among the best or the worst
    assert "<script>a" in page.texts["text"]  # the ranks' names in a figure
    assert ModelCard.load(run / "model" / "README.md").data.library_name == "ordinalclip"


def test_without_the_data_pictures_are_left_out(table, tmp_path, caplog, capsys):
    run = train(table("data.split=[0.6,0,0.4]"), quiet=True)
    for file in tmp_path.glob("cell*.png"):
        file.unlink()
    with caplog.at_level(logging.WARNING):
        assert main(["report", str(run), "--quiet"]) == 0
    assert "the data cannot be read" in caplog.text
    assert capsys.readouterr().out.splitlines() == [str(run / "report.html"), str(run / "model" / "README.md")]
    page = page_of(run)
    assert "feature_map" not in page.ids
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert "confusion" in page.ids


def test_other_data_than_was_predicted_is_not_shown(run, caplog):
    """A run on data in memory leaves a configuration that may name other data."""
    record = read_run(run)
    shifted = replace(record.images, values=record.images.values[::-1])
    parts = Parts(train=shifted, validation=None, test=shifted, ranks=record.ranks)
    assert read_run(run, parts).images is None
    assert "not that of the predictions" in caplog.text


@pytest.mark.parametrize("ending, start", [("pdf", b"%PDF"), ("svg", b"<?xml"), ("png", b"\x89PNG")])
def test_plot_writes_files(run, tmp_path, capsys, ending, start):
    assert main(["plot", str(run), "--format", ending, "--out", str(tmp_path / "figures"), "--quiet"]) == 0
    files = sorted((tmp_path / "figures").iterdir())
    assert [file.stem for file in files] == [
        "agreement",
        "error_by_value",
        "feature_map",
        "learning_curves",
        "similarity",
    ]
    assert all(file.read_bytes().startswith(start) for file in files)
    assert sorted(capsys.readouterr().out.splitlines()) == [str(file) for file in files]


@pytest.mark.slow
def test_plots_are_as_wide_as_was_asked_with_fonts_that_printers_take(run, compared, tmp_path, capsys):
    for source, width, points in ((run, "page", 496.8), (compared, None, 237.6), (compared, "85mm", 85 / 25.4 * 72)):
        out = tmp_path / f"{source.name}-{width}"
        asked = ["--width", width] if width else []
        assert main(["plot", str(source), *asked, "--out", str(out), "--quiet"]) == 0
        for file in out.iterdir():
            content = file.read_bytes()
            (box,) = re.findall(rb"/MediaBox \[ 0 0 ([\d.]+) [\d.]+ \]", content)
            panels = width is None and file.stem == "metrics_by_method"
            assert float(box) == pytest.approx(496.8 if panels else points, abs=0.01), file
            assert b"/FontFile2" in content, file  # TrueType, as it is
            assert b"/Type3" not in content, file
    capsys.readouterr()
    for wrong in ("wide", "79mm", "301", "-85mm", "8.5cm", ""):
        out = tmp_path / "refused"
        assert main(["plot", str(run), f"--width={wrong}", "--out", str(out), "--quiet"]) == 2
        allowed = "must be column (3.3 inches), page (6.9) or millimetres from 80 to 300, as in 85mm"
        assert capsys.readouterr().err == f"ordinalclip: the width of figures {allowed}; got {wrong!r}\n"
        assert not out.exists()


def test_plot_replaces_its_own_files_and_no_others(run, tmp_path, capsys):
    call = ["plot", str(run), "--format", "svg", "--out", str(tmp_path), "--quiet"]
    mine = tmp_path / "feature_map.svg"
    mine.write_text("<svg>of mine</svg>")
    assert main(call) == 2
    assert f"{mine} is there and no figure of ours: it may be yours" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [mine.name]
    assert mine.read_text() == "<svg>of mine</svg>"
    mine.unlink()
    assert main(call) == 0
    written = mine.read_bytes()
    mine.write_bytes(written + b"<!-- changed -->")
    assert main(call) == 0
    assert mine.read_bytes() == written


@pytest.mark.parametrize("command", ["report", "plot"])
def test_what_is_neither_a_run_nor_a_comparison_is_refused_by_name(tmp_path, capsys, command):
    assert main([command, str(tmp_path)]) == 2
    said = "no finished run (metrics.json is missing), and no finished comparison (comparison.json is missing)"
    assert capsys.readouterr().err == f"ordinalclip: {tmp_path}: {said}\n"
    (tmp_path / "runs").mkdir()
    assert main([command, str(tmp_path)]) == 2
    assert "a comparison that is not finished (comparison.json is missing)" in capsys.readouterr().err
    for damaged in (
        "{}",
        '{"title": "", "notes": [], "best": "", "boards": [{"variant": "", "entries": [{"folders": []}]}]}',
    ):
        (tmp_path / "comparison.json").write_text(damaged)
        assert main([command, str(tmp_path)]) == 2
        assert f"{tmp_path}/comparison.json: damaged, or of another version" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["comparison.json", "runs"]


GRADES = "ranks.names=[whole, hardly cracked, cracked, broken]"


@pytest.mark.parametrize("decoding", ["expectation", "argmax"])
def test_a_report_shows_what_the_model_answers(table, tmp_path, decoding):
    """Counts, pictures and caption are those of the pipeline; ranks are called by their names."""
    run = train(
        table("data.split=[0.5,0,0.5]", GRADES, "ranks.values=[0,1,2,3]", f"evaluation.decoding={decoding}"), quiet=True
    )
    record = read_run(run)
    pipe = load_pipeline(str(run / "model"))
    answers = pipe([record.images.image(row) for row in range(len(record.images))])
    assert record.answers == pytest.approx([answer["value"] for answer in answers], abs=1e-4)
    figure, caption = run_report.run_figures(record)["confusion"]
    counts = np.zeros((4, 4), dtype=int)
    for rank, answer in zip(record.predictions.label_ranks, answers, strict=True):
        counts[rank, answer["rank"]] += 1
    assert [int(text.get_text()) for text in figure.axes[0].texts] == counts.ravel().tolist()
    assert {"expectation": "the mean of its distribution", "argmax": "the likeliest rank"}[decoding] in caption
    page = page_of(run)
    said = {record.ranks.say(value) for value in record.answers}
    shown_ones = set(page.texts["predicted"]) - {"the model's answer"}
    assert shown_ones
    assert shown_ones <= said
    assert all(name.startswith(record.ranks.names) for name in said)
    assert set(page.texts["true"]) <= {"True value", *record.ranks.names}


def test_a_confusion_matrix_has_no_colours_but_the_page_s():
    """A colour of its own, or a picture, would be white in the dark."""
    drawn = figures.inline_svg(figures.confusion(np.asarray([0, 1, 1]), np.asarray([0, 1, 0]), ["a", "b"]), "c", "c")
    assert "<image" not in drawn
    assert not re.findall(r"#[0-9a-f]{6}\b", drawn)
    assert "var(--blue)" in drawn
    assert "var(--ink)" in drawn


def test_the_card_is_a_hub_card(run, reported):
    card, metrics = ModelCard.load(run / "model" / "README.md"), metrics_of(run)["test"]
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert {"mae", "qwk", "macro_mae", "off_by_one", "rps", "cs@5"} < set(results)
    assert results == {name: metrics[name] for name in results}
    assert card.data.license == "apache-2.0"
    assert "image-ordinal-regression" in card.data.tags
    assert "A label can be sensitive" in card.text
    assert "Fairness" not in card.text
    people = train(reported("ranks.unit=years", "data.license=CC BY 4.0", "train.max_steps=1"), quiet=True)
    text = ModelCard.load(people / "model" / "README.md").text
    assert "**Fairness.**" in text
    assert "* Data: CC BY 4.0." in text


def test_a_failing_report_does_not_lose_the_run(reported, monkeypatch, caplog):
    def fail(*_, **__):
        raise RuntimeError("no space left")

    monkeypatch.setattr(run_report, "write_report", fail)
    run = train(reported("train.max_steps=1"), quiet=True)
    assert metrics_of(run)["test"]["num"] == 12
    assert (run / "model" / "model.safetensors").is_file()
    assert not (run / "report.html").exists()
    assert "report or model card not written" in caplog.text
    assert "no space left" in caplog.text


def test_no_report_where_none_is_wanted(quick):
    config = quick("evaluation.report=false", "train.max_steps=1")
    run = train(config, quiet=True)
    assert not (run / "report.html").exists()
    (run / "report.html").write_text("of an earlier run")
    again = config.model_copy(update={"overwrite": True})
    assert not (train(again, quiet=True) / "report.html").exists()
    assert not (run / "model" / "README.md").exists()


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    rates = [{"train.lr": 1e-3}, {"train.lr": 1e-5}]
    methods = {
        "OrdinalCLIP": {"base": {"method": "ordinalclip"}, "settings": rates},
        "L1": {"base": {"method": "l1"}, "settings": rates},
        "constant": {"base": {"method": "constant"}},
        HOSTILE: {"base": {"method": "zero_shot"}},
    }
    content = {"output_dir": f"{folder}/out", "seeds": [1, 2], "base": TINY, "methods": methods}
    (folder / "c.yaml").write_text(yaml.safe_dump(content))
    run_plan(load_plan(folder / "c.yaml"), quiet=True)
    return folder / "out"


def test_a_comparison_has_a_report_with_links_and_its_winner_one_of_its_own(compared):
    page = page_of(compared)
    lines = (compared / "table.md").read_text(encoding="utf-8").splitlines()
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if line.startswith("| ")][1:]
    rows = [[re.sub(r"\\(?=\W)", "", cell).strip(" `") for cell in line] for line in cells]
    texts = page.texts["td"] + page.texts["code"]
    assert len(rows) == 4
    assert {cell for row in rows for cell in row} - {"-"} <= {text.replace("\u00a0", " ") for text in texts}
    assert "train.lr=0.001" in page.texts["setting"] or "train.lr=1e-05" in page.texts["setting"]
    assert "b" not in {tag for tag, _ in page.tags}
    assert HOSTILE in texts
    assert any(r"=\<b>zero\</b> \$shot\$ \| \*a\* \[x](javascript:alert(1)) \`c |" in line for line in lines)
    with (compared / "results.csv").open(encoding="utf-8", newline="") as file:
        methods = {row["method"]: float(row["mae"]) for row in csv.DictReader(file)}
    assert methods.keys() == {"OrdinalCLIP", "L1", "constant", f"'{HOSTILE}"}  # no formula
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert len(links) == 8
    assert all((compared / link).exists() for link in links)
    (own,) = [link for link in links if link.endswith("report.html")]
    card = (compared / "model" / "README.md").read_text(encoding="utf-8")
    assert card == ((compared / own).parent / "model" / "README.md").read_text(encoding="utf-8")
    assert "Over seeds 1, 2: MAE " in card
    assert "Over seeds 1, 2: MAE " in (compared / own).read_text(encoding="utf-8")


def test_a_comparison_is_reported_and_plotted_again_from_its_folder(compared, tmp_path, capsys):
    written = (compared / "report.html").read_text(encoding="utf-8")
    assert str(compared) not in (compared / "comparison.json").read_text(encoding="utf-8")
    moved = shutil.copytree(compared, tmp_path / "elsewhere" / "out")
    (moved / "report.html").unlink()
    assert main(["report", str(moved), "--quiet"]) == 0
    assert capsys.readouterr().out == f"{moved}/report.html\n"
    here, there = (str(folder.parent.name) for folder in (compared, moved))
    assert (moved / "report.html").read_text(encoding="utf-8").replace(f"{there}/out", f"{here}/out") == written
    assert main(["plot", str(moved), "--format", "svg", "--quiet"]) == 0
    files = [Path(line) for line in capsys.readouterr().out.splitlines()]
    drawn = ["mae_by_method", "difference_to_best", "error_by_method", "metrics_by_method"]
    assert files == [moved / "figures" / f"{name}.svg" for name in drawn]
    assert all("OrdinalCLIP" in file.read_text(encoding="utf-8") for file in files)
    shutil.rmtree(next((moved / "runs").iterdir()))
    assert main(["report", str(moved), "--quiet"]) == 2
    assert re.search(r"(metrics\.json: No such file|predictions\.parquet is missing)", capsys.readouterr().err)


@pytest.fixture(scope="module")
def search_folder(tmp_path_factory):
    """A page of a search whose trials ended in every way there is."""
    folder = tmp_path_factory.mktemp("search")
    settings = [{"train.lr": 10.0**-k, "head.f": "<b>", "model.drop_path": k / 20} for k in range(1, 6)]
    states = ["complete", "pruned", "complete", "diverged", "failed"]
    rows = [
        TrialRow(
            number=k,
            state=state,
            setting=setting,
            value={"complete": 9.5 - k, "pruned": 30.0}.get(state),
            curve=[(1, 12.0), (2, 9.5 - k)],
            metrics={"mae": 9.5 - k, "rmse": 11.0} if state == "complete" else {},
            why="<script>alert(1)</script> a file name that is long" if state == "failed" else "",
        )
        for k, (state, setting) in enumerate(zip(states, settings, strict=True))
    ]
    searched = {"train.lr": "1e-5..0.1:log", "head.f": "<b>|c", "model.drop_path": "0..0.3"}
    shares = {"train.lr": 0.8, "model.drop_path": 0.2, "head.f": 0.0}
    write_search_report(SearchRecord(folder, rows, searched, ["train.lr"], rows[2], shares, ["<i>conditions"], "cm"))
    write_trials(folder / "trials.csv", rows)
    return folder


def test_the_page_of_a_search_escapes_and_shows_every_trial(search_folder):
    text = (search_folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "b", "i"} & {tag for tag, _ in page.tags}
    assert "optimistic" in text
    assert {"best_so_far", "importances", "validations_by_trial", "by_key_0", "by_key_1", "by_key_2"} <= set(page.ids)
    numbers = re.findall(r"<tr><td>(\d)</td>", text)
    assert numbers == ["2", "0", "1", "3", "4"]  # best first, then what came to nothing
    assert "7.50" in text
    with (search_folder / "trials.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["state"] for row in rows] == ["complete", "pruned", "complete", "diverged", "failed"]
    assert [row["validation_mae"] for row in rows] == ["9.5", "30.0", "7.5", "", ""]
    assert rows[0]["validation_rmse"] == "11.0"


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize("kind", ["run", "comparison", "search", "data", "audit"])
def test_in_a_browser_nothing_overflows_and_nothing_complains(kind, run, compared, search_folder, tmp_path):
    """The report in a frame as wide as a phone; the page says how wide its content is."""
    folders = {"run": run, "comparison": compared, "search": search_folder}
    path = folders[kind] / "report.html" if kind in folders else tmp_path / "report.html"
    if kind == "data":
        main(["check-data", str(run / "config.yaml"), "--report", str(path), "-q"])
    elif kind == "audit":
        _, place = audit(run, tmp_path / "audit", folds=2, quiet=True)
        path = place / "audit.html"
    html = path.read_text(encoding="utf-8")
    (tmp_path / "phone.html").write_text(
        """<body><iframe width=390 height=800 style="border:0"></iframe><script>
        const frame = document.querySelector("iframe");
        frame.onload = () => {
          const page = frame.contentDocument;
          const drawing = page.querySelector("figure svg, .pictures img").getBoundingClientRect();
          document.body.dataset.found = [page.documentElement.scrollWidth, page.querySelectorAll("figure").length,
            Math.round(drawing.width)].join(" ");
        };
        frame.srcdoc = """
        + json.dumps(html).replace("</", "<\\/")
        + "</script></body>",
        encoding="utf-8",
    )
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--virtual-time-budget=5000",
    ]
    done = subprocess.run(
        [BROWSER, *options, f"--user-data-dir={tmp_path}/profile", "--dump-dom", f"file://{tmp_path}/phone.html"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.search(r'data-found="(\d+) (\d+) (\d+)"', done.stdout)
    assert found, done.stderr[-2000:]
    width, drawings, drawing = map(int, found.groups())
    assert width <= 390
    assert drawings == {"run": 5, "comparison": 4, "search": 6, "data": 1, "audit": 0}[kind]
    assert (120 if kind == "audit" else 250) < drawing <= 390
    assert "CONSOLE" not in done.stderr


def test_principal_components_against_the_covariance():
    features = np.random.default_rng(0).normal(size=(40, 5)) * [5, 1, 3, 1, 1]
    points, shares = figures.principal_components(features)
    variances = np.sort(np.linalg.eigvalsh(np.cov(features.T)))[::-1]
    assert points.var(axis=0, ddof=1) == pytest.approx(variances[:2])
    assert shares == pytest.approx(variances[:2] / variances.sum())
    for degenerate in (np.ones((3, 4)), np.ones((1, 4)), np.arange(4.0)[:, None]):
        points, shares = figures.principal_components(degenerate)
        assert points.shape == (len(degenerate), 2)
        assert np.isfinite(points).all()
        assert np.isfinite(shares).all()


def test_bins_are_ranks_where_they_are_few_else_of_equal_width():
    few = figures.Bins(Ranks((0, 1, 4), edges=(0.2, 1.2)))
    assert few.places.tolist() == [0, 1, 2]
    assert [mask.tolist() for mask in few.members(np.asarray([-1.0, 0.2, 1.3]))] == np.eye(3, dtype=bool).tolist()
    many = figures.Bins(Ranks.linear(0, 120, 121))
    assert many.places.tolist() == pytest.approx(np.arange(5, 120, 10))
    values = np.asarray([-7.0, 0, 9.9, 10, 119.9, 120, 130])
    assert [np.flatnonzero(mask).tolist() for mask in many.members(values)] == [[0, 1, 2], [3], *[[]] * 9, [4, 5, 6]]


def test_a_confusion_matrix_counts_and_many_points_become_hexagons():
    figure = figures.confusion(np.asarray([0, 0, 1, 2]), np.asarray([0, 1, 1, 0]), ["a", "b", "c"])
    (axes,) = figure.axes
    assert [int(text.get_text()) for text in axes.texts] == [1, 1, 0, 0, 1, 0, 1, 0, 0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]
    labels = np.random.default_rng(0).uniform(0, 9, 4000)
    ages = Ranks.linear(0, 9, 91, unit="years")
    hexagons = figures.agreement(labels, labels, ages)
    assert hexagons.axes[0].get_xlabel() == "true value (years)"
    assert hexagons.axes[0].collections[0].get_array().sum() == 4000
    assert len(figures.agreement(np.asarray([3.0]), np.asarray([3.0]), ages).axes) == 1


def test_methods_far_off_do_not_squeeze_the_others():
    """Their figures become text at the end of the axis; without them the axis holds all."""
    errors = {f"m{k}": [1 + 0.1 * k, 1.2 + 0.1 * k] for k in range(5)}
    (plain,) = figures.mae_by_method(errors).axes
    (axes,) = figures.mae_by_method({**errors, "constant": [25.0, 25.0]}).axes
    assert not plain.texts
    assert [text.get_text() for text in axes.texts] == ["25 →"]
    assert 1.6 < axes.get_xlim()[1] < 5
    (lines,) = figures.mae_by_variant(
        {**{n: [v, v] for n, v in errors.items()}, "constant": [[25.0], [25.0]]}, "ab"
    ).axes
    assert "constant: 25, off the scale" in [text.get_text() for text in lines.get_legend().get_texts()]
    verdicts = {n: Verdict(v[0], (0, 9), v[0] - 1, (v[0] - 1.1, v[0] - 0.9)) for n, v in errors.items()}
    verdicts["constant"] = Verdict(25, (24, 26), 24, (23, 25))
    (difference,) = figures.difference_to_best(verdicts).axes
    assert [text.get_text() for text in difference.texts] == ["24 →"]


LONG = "a method whose name is rather longer than anybody would like it to be"


def every_figure(width):
    """Each kind of figure, so wide, of names, units and outliers that ask for room, by name."""
    sized = {"width": width}
    rng = np.random.default_rng(0)
    names = ["whole", "hardly cracked", "cracked", "broken", "gone altogether, nobody knows where"]
    spaces = {
        "few": Ranks(range(5), names, unit="points of the association"),
        "twelve": Ranks(range(12), [f"decade {k}" for k in range(12)]),
        "named": Ranks(range(40), [f"grade number {k}" for k in range(40)]),
        "many": Ranks.linear(0, 1e6, 101, unit="km"),
    }
    errors = {**{f"{k} {LONG}": [1 + 0.1 * k, 1.2 + 0.1 * k] for k in range(8)}, "constant": [250.0, 260.0]}
    interval = {
        name: Verdict(v[0], (0, 9), v[0] - 1, (v[0] - 1.1, v[0] - 0.9), 0.01, 0.02) for name, v in errors.items()
    }
    yield "mae_by_method", figures.mae_by_method(errors, "points of the association", **sized)
    yield "difference_to_best", figures.difference_to_best(interval, "km", **sized)
    yield (
        "metrics_by_method",
        figures.metrics_by_method({n: (m, errors) for n, m in METRICS.items()}, [*errors], "km", **sized),
    )
    variants = ["all of the data", LONG, "a tenth"]
    yield "mae_by_variant", figures.mae_by_variant({n: [v] * 3 for n, v in errors.items()}, variants, "km", **sized)
    log = [{"step": k, "loss": 1 / k, **({} if k % 9 else {"validation_mae": 9 / k})} for k in range(1, 100)]
    yield "learning_curves", figures.learning_curves(log, 90, "points of the association", **sized)
    maes, ended = [9e5, *rng.uniform(1, 2, 29)], [False, True] * 15
    yield "best_so_far", figures.best_so_far(range(30), maes, ended, "points of the association", **sized)
    yield "importances", figures.importances({f"head.key_{k}_{LONG}": 0.1 * k for k in range(6)}, **sized)
    for count in (2, 3, 12):
        choices = [f"a choice, number {k % count}" for k in range(30)]
        yield f"mae_by_setting, {count}", figures.mae_by_setting(f"head.{LONG}", choices, maes, ended, "km", **sized)
    rates = np.geomspace(1e-6, 0.1, 30).tolist()
    yield "mae_by_setting, rates", figures.mae_by_setting("train.lr", rates, maes, ended, log=True, **sized)
    curves = [[(k, mae + k) for k in range(1, 1000, 100)] for mae in maes]
    yield "validations_by_trial", figures.validations_by_trial(curves, ended, 2, "points of the association", **sized)
    maps = {name: (rng.normal(size=(16, 16)), "per 1 % of area") for name in ("integrated gradients", "occlusion")}
    for kind, ranks in spaces.items():
        ends = np.asarray(ranks.values)[[0, -1]]
        yield (
            f"explanation, {kind}",
            explanation(
                f"{LONG}: {ranks.say(ends[1])}",
                Image.new("RGB", (16, 16)),
                maps,
                ranks,
                ends[1],
                probabilities=rng.dirichlet(np.full(len(ranks), 0.1)),
                interval=(*ends, 0.9),
                neighbors=[(Image.new("RGB", (16, 16)), ranks.say(rng.choice(ranks.values))) for _ in range(6)],
                bases=(ends, np.asarray([0.1, 0.9]), np.asarray([0.5, 0.5])),
                notes=[LONG, f"{LONG}, {LONG}, {LONG}"],
                **sized,
            ),
        )
    picture, label = Image.new("RGB", (16, 16)), spaces["few"].names[-1]
    yield (
        "explanation, little",
        explanation(LONG, picture, {}, spaces["few"], 4, neighbors=[(picture, label)] * 2, **sized),
    )
    for kind, ranks in spaces.items():
        labels = rng.choice(ranks.values, 90)
        values = rng.choice(ranks.values, 90)
        pictures = [Image.new("RGB", (8, 8))] * 90
        yield f"error_by_value, {kind}", figures.error_by_value(labels, values, ranks, [3000] * len(ranks), **sized)
        yield f"feature_map, {kind}", figures.feature_map(rng.normal(size=(90, 4)), labels, pictures, ranks, **sized)
        yield f"label_counts, {kind}", figures.label_counts(dict.fromkeys(PARTS, [90_000] * len(ranks)), ranks, **sized)
        yield f"similarity, {kind}", figures.similarity(rng.normal(size=(len(ranks), 4)), ranks, **sized)
        answers = {**{f"{k} {LONG}": (labels, values) for k in range(8)}, "far": (labels, values + 1e7)}
        yield f"error_by_method, {kind}", figures.error_by_method(answers, ranks, **sized)
        if len(ranks) <= figures.FEW_RANKS:
            pair = rng.integers(0, len(ranks), (2, 90_000))
            yield f"confusion, {kind}", figures.confusion(*pair, ranks.names, **sized)
        else:
            yield f"agreement, {kind}", figures.agreement(labels, values, ranks, **sized)


@pytest.mark.slow
@pytest.mark.parametrize("width", [figures.NARROWEST / 25.4, figures.COLUMN, 5.5, figures.PAGE])
def test_nothing_in_a_figure_is_cut_off_or_touches(width):
    """All that is drawn lies within the figure, texts within an axes within it; no two texts touch, and none is small;
    legends hide nothing."""
    for name, figure in every_figure(width):
        figure.canvas = FigureCanvasAgg(figure)
        figure.canvas.draw()
        drawn = figure.get_tightbbox()
        height = figure.get_figheight()
        assert figure.get_figwidth() == width, name
        assert min(drawn.x0, drawn.y0, width - drawn.x1, height - drawn.y1) > 0, f"{name}: {drawn}"
        for axes in figure.axes:
            inside = axes.get_window_extent()
            for text in axes.texts:
                box = text.get_window_extent()
                assert inside.x0 - 1 <= box.x0 <= box.x1 <= inside.x1 + 1, f"{name}: {text.get_text()}"
                assert inside.y0 - 1 <= box.y0 <= box.y1 <= inside.y1 + 1, f"{name}: {text.get_text()}"
            for legend in [axes.get_legend()] if axes.get_legend() else []:
                assert not any(legend.get_window_extent().overlaps(each.get_window_extent()) for each in figure.axes)
        shown = texts_of(figure)
        assert min(text.get_fontsize() for text in shown) >= 6, name
        for one, other in combinations([text for text in shown if text.get_rotation() in (0, 90)], 2):
            pair = f"{name}: {one.get_text()!r}, {other.get_text()!r}"
            assert not one.get_window_extent().overlaps(other.get_window_extent()), pair


DICHROMACIES = {  # Machado, Oliveira & Fernandes, IEEE TVCG 15(6), 2009, severity 1: linear RGB -> linear RGB
    "none": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def seen(colour, matrix):
    """A colour of matplotlib as CIE L*a*b* (D65), after a dichromacy."""
    rgb = np.asarray(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.asarray(matrix) @ linear, 0, 1)
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    xyz = to_xyz @ linear / (0.95047, 1, 1.08883)
    x, y, z = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    return np.asarray([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_series_stay_apart_for_colour_blind_readers():
    """Of every figure, as drawn: those of one axes differ by 12 and more (2 is just noticed), and colours that stand
    for values grow lighter with them."""
    pairs = set()
    for _, figure in every_figure(figures.COLUMN):
        for axes in figure.axes:
            handles, _ = axes.get_legend_handles_labels()
            pairs |= {*combinations(sorted({colour for handle in handles for colour in colours_of(handle)}), 2)}
    assert len(pairs) == 21  # of all seven
    for dichromacy, matrix in DICHROMACIES.items():
        for one, other in pairs:
            distance = np.linalg.norm(seen(one, matrix) - seen(other, matrix))
            assert distance > 12, f"{dichromacy}: {one} and {other} are {distance:.1f} apart"
        lightness = [seen(figures.VALUE_COLOURS(x), matrix)[0] for x in np.linspace(0, 1, 64)]
        assert (np.diff(lightness) > 0).all(), dichromacy


def colours_of(handle):
    """Of the line, the dots or the bars that an entry of a legend stands for."""
    if isinstance(handle, Line2D):
        return {to_hex(handle.get_color())} - {"#000000"}  # that of nothing
    if isinstance(handle, PathCollection):
        return {to_hex(colour) for colour in handle.get_facecolor()}
    return {to_hex(patch.get_facecolor()) for patch in getattr(handle, "patches", ())}  # not of a shade


def texts_of(figure):
    """What is written in a drawn figure, without names of ticks beyond their axis."""
    beyond = {
        label
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]
        for label in (tick.label1, tick.label2)
        if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
    }
    return [text for text in figure.findobj(Text) if text.get_visible() and text.get_text() and text not in beyond]


def test_axes_tick_at_the_ranks_by_their_names():
    names = ("whole", "hardly cracked", "cracked", "broken")
    ranks = Ranks((0, 1, 5, 100), names)
    labels = np.asarray([0.0, 1, 5, 100, 100])
    by_value = figures.error_by_value(labels, labels + 1, ranks, [1, 2, 3, 4])
    by_method = figures.error_by_method({"a": (labels, labels)}, ranks)
    pictures = [Image.new("RGB", (8, 8))] * 5
    space = figures.feature_map(np.random.default_rng(0).normal(size=(5, 4)), labels, pictures, ranks)
    for axes in (by_value.axes[1], by_method.axes[0], space.axes[1]):
        assert [text.get_text().replace("\n", " ") for text in axes.get_xticklabels()] == list(names)
        assert axes.get_xticks().tolist() == [0, 1, 2, 3]
        assert axes.get_xlabel() == "true rank"
    assert [bar.get_x() + bar.get_width() / 2 for bar in by_value.axes[1].patches] == [0, 1, 2, 3]
    assert [bar.get_height() for bar in by_value.axes[1].patches] == [1, 2, 3, 4]
    plain = figures.error_by_value(labels, labels, Ranks((0, 1, 5, 100), unit="kg"), [1] * 4).axes[1]
    assert [text.get_text() for text in plain.get_xticklabels()] == ["0", "1", "5", "100"]
    assert plain.get_xlabel() == "true value (kg)"


@pytest.fixture
def data_page(table, tmp_path, capsys):
    """A function (overrides, exit status) -> text of the page of `table`, and what was printed."""

    def check(*more, status=0):
        words = ["check-data", "default", "-q", "--report", str(tmp_path / "data.html"), "--overwrite"]
        where = ["data.source=table", f"data.root={tmp_path}", "data.table=labels.csv", *more]
        table()
        assert main([*words, *where]) == status
        return (tmp_path / "data.html").read_text(encoding="utf-8"), capsys.readouterr().out

    return check


def test_the_page_of_a_data_set_counts_and_shows(data_page, tmp_path):
    """Numbers of labels, sizes and modes as stored, near copies, groups in two parts, and names that are text."""
    table_file = tmp_path / "labels.csv"
    lines = [
        line + f",{HOSTILE.replace(',', '')} {number // 2}"
        for number, line in enumerate(table_file.read_text().splitlines())
    ]
    table_file.write_text("\n".join([lines[0].rpartition(",")[0] + ",<i>who", *lines[1:]]) + "\n")
    Image.linear_gradient("L").save(tmp_path / "cell4.png")
    Image.linear_gradient("L").resize((128, 128)).convert("RGBA").save(tmp_path / "cell7.png")
    text, printed = data_page("data.split=[0.5,0.2,0.3]", "data.group=<i>who")
    page = Page(text)
    assert not {"script", "b", "i"} & {tag for tag, _ in page.tags}
    assert all(
        value.startswith("data:image/jpeg;base64,") for tag, a in page.tags if tag == "img" for value in [a["src"]]
    )
    rows = re.findall(r"<tr><td>(\d)</td><td>(\d+)</td><td>(\d+)</td><td>(\d+)</td><td>(\d+)</td></tr>", text)
    assert [row[-1] for row in rows] == ["4", "3", "3"]
    assert all(int(row[-1]) == sum(map(int, row[1:-1])) for row in rows)
    for kind, number in (("48 × 40", 8), ("256 × 256", 1), ("128 × 128", 1), ("RGB", 8), ("L", 1), ("RGBA", 1)):
        assert f"<td>{kind}</td><td>{number}</td>" in text
    assert "1 pairs of pictures are nearly the same" in printed
    assert re.search(r"&lt;i&gt;who</td><td>6</td><td>0</td><td class=\"text\">data.group", text)
    assert len(page.ids) == len(set(page.ids))


def test_a_column_of_people_in_two_parts_is_pointed_out(data_page, tmp_path):
    rows = ["image,label,person,camera"]
    for number in range(40):
        pixels = np.random.default_rng(number).integers(0, 255, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"p{number}.png")
        rows.append(f"p{number}.png,{number % 4},q{number // 2},{'ab'[number % 2]}")
    (tmp_path / "labels.csv").write_text("\n".join(rows) + "\n")
    text, _ = data_page("data.split=[0.5,0.2,0.3]")
    (found,) = re.findall(r"<tr><td>person</td><td>20</td><td>(\d+)</td>", text)
    assert int(found) > 3
    assert "<td>camera</td>" not in text
