"""Audits of labels that cannot be: no run, no data, other data, too few pictures, folders in the way."""

import shutil
from functools import cache

import numpy as np
from PIL import Image

from hostile import case, lasting_folder
from hostile.stops import STEPS
from hostile.stops import _run as run_of_gauges
from ordinalclip.cli import main

QUICK = ["--quiet", *STEPS, "data.source=table", "data.table=labels.csv", "data.group=subject", "train.max_steps=1"]


def pictures(folder, number=12, first=0):
    """Pictures of three grades, of as many subjects, and their table, in `folder`/set."""
    (folder / "set").mkdir()
    rows = ["image,label,subject"]
    for index in range(first, first + number):
        pixels = np.random.default_rng(index).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"set/{index}.png")
        rows.append(f"{index}.png,{index % 3},s{index}")
    (folder / "set/labels.csv").write_text("\n".join(rows) + "\n")


@cache
def trained():
    """A run of one step and its pictures, to be copied."""
    folder = lasting_folder()
    pictures(folder)
    assert main(["train", "default", *QUICK, f"data.root={folder}/set", f"output_dir={folder}/run"]) == 0
    return folder


def run(folder, *more):
    """A finished run and its pictures in `folder`, and the words of an audit."""
    shutil.copytree(trained() / "set", folder / "set")
    shutil.copytree(trained() / "run", folder / "run")
    return ["audit", "run", "-q", f"data.root={folder}/set", "--folds", "2", *more]


def nothing_is_written(folder):
    assert not list(folder.glob("run/audit/*.csv"))
    assert not list(folder.glob("run/audit/*.html"))


def bad(what, says, after=nothing_is_written):
    return case(what, says, after=after)


@bad("an audit of a folder without a run", r"none: no finished run \(metrics\.json is missing\)")
def _(folder):
    return ["audit", "none"]


@bad("an audit of a run whose data was in memory", r"handed over in memory .* hand it over again, in Python")
def _(folder):
    run_of_gauges(folder)
    config = folder / "run/config.yaml"
    config.write_text(config.read_text().replace("source: gauges", "source: memory"))
    return ["audit", "run", "-q"]


@bad("an audit of a run whose pictures are gone", r"set/labels\.csv: no such table|no such folder")
def _(folder):
    words = run(folder)
    shutil.rmtree(folder / "set")
    return words


@bad(
    "an audit after a label of the table has changed",
    r"run: this is not the data of the run any more: the \w+ part has changed: names or labels differ; .*train run/",
)
def _(folder):
    words = run(folder)
    table = folder / "set/labels.csv"
    table.write_text(table.read_text().replace("0.png,0", "0.png,1", 1))
    return words


@bad("an audit after a row of the table is gone", r"not the data of the run any more: the \w+ part has changed: ")
def _(folder):
    words = run(folder)
    table = folder / "set/labels.csv"
    table.write_text(table.read_text().replace("3.png,0,s3\n", ""))
    return words


@bad(
    "an audit after a picture has changed", r"not the data of the run any more: the \w+ part has changed: pictures diff"
)
def _(folder):
    words = run(folder)
    Image.new("RGB", (40, 40)).save(folder / "set/2.png")
    return words


@bad("an audit with more folds than pictures", r"12 groups are too few for 13 folds")
def _(folder):
    return run(folder, "--folds", "13")


@bad("an audit of pictures that are all of one group", r"1 group is too few for 2 folds")
def _(folder):
    pictures(folder)
    table = folder / "set/labels.csv"
    rows = [line.rpartition(",")[0] + ",s0" for line in table.read_text().splitlines()[1:]]
    table.write_text("\n".join(["image,label,subject", *rows]) + "\n")
    where = [f"data.root={folder}/set", f"output_dir={folder}/run", "data.split=[1,0,0]"]
    assert main(["train", "default", *QUICK, *where]) == 0
    return ["audit", "run", "-q", "--folds", "2"]


@bad("an audit of one fold", r"--folds: '1' is not a whole number from 2 to 100")
def _(folder):
    return ["audit", "run", "--folds", "1"]


@bad(
    "an audit of another training", r"train\.lr: the run says what is trained; allowed are data\.cache_mb, .*data\.root"
)
def _(folder):
    return run(folder, "train.lr=1")


@bad("an audit with a picture that cannot be read", r"set/7\.png: not a readable image")
def _(folder):
    pictures(folder)
    (folder / "set/7.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    where = [f"data.root={folder}/set", f"output_dir={folder}/run", "data.split=[1,0,0]"]
    assert main(["train", "default", *QUICK, *where, "train.max_steps=0"]) == 0  # which reads no picture
    return ["audit", "run", "-q", "--folds", "2"]


def _still_mine(folder):
    assert (folder / "mine/thesis.tex").read_text() == "all of it"


@bad(
    "an audit to a folder of one's own",
    r"mine holds thesis\.tex, and no audit; --out names another folder",
    _still_mine,
)
def _(folder):
    words = run(folder, "--out", "mine", "--overwrite")
    (folder / "mine").mkdir()
    (folder / "mine/thesis.tex").write_text("all of it")
    return words


@bad("an audit to the run folder itself", r"run holds \S+, and no audit; --out names another folder")
def _(folder):
    return run(folder, "--out", "run")


@bad("an audit to where a file is", r"mine: this folder cannot be written to \(File exists\)")
def _(folder):
    (folder / "mine").write_text("mine")
    return run(folder, "--out", "mine")


@bad("an audit to a folder with an audit.json of others", r"mine/audit\.json: damaged \(.*\), or not of an audit")
def _(folder):
    (folder / "mine").mkdir()
    (folder / "mine/audit.json").write_text('{"vulnerabilities": 3}')
    return run(folder, "--out", "mine", "--overwrite")


def _as_it_was(folder):
    assert "annotated by hand" in (folder / "run/audit/labels.csv").read_text()


@case("an audit that is done, again", r"run/audit holds this audit, finished; --overwrite writes", after=_as_it_was)
def _(folder):
    words = run(folder)
    assert main(words) == 0
    with (folder / "run/audit/labels.csv").open("a") as file:
        file.write("annotated by hand\n")
    return words


@case(
    "an audit of ranks with fewer pictures than folds: neighbours share a stratum, and the page says so",
    r"12 labels; those that fit least:",
    status=0,
    after=lambda folder: _says_unseen(folder),
)
def _(folder):
    pictures(folder)
    table = folder / "set/labels.csv"
    table.write_text(table.read_text().replace("11.png,2", "11.png,9"))
    where = [f"data.root={folder}/set", f"output_dir={folder}/run", "ranks.values=[0,1,2,9]", "data.split=[1,0,0]"]
    assert main(["train", "default", *QUICK, *where]) == 0
    return ["audit", "run", "-q", "--folds", "3"]


def _says_unseen(folder):
    text = (folder / "run/audit/audit.html").read_text()
    assert "1 labels are of ranks of which the model that judges them has seen no label" in text


# ---- the page of a data set


def page(folder, *more):
    pictures(folder)
    return [
        "check-data",
        "default",
        "-q",
        "data.source=table",
        f"data.root={folder}/set",
        "data.table=labels.csv",
        *more,
    ]


@case("a page of data that is no page", r"--report data\.csv: a page ends in \.html")
def _(folder):
    return page(folder, "--report", "data.csv")


@case("a page of data in a folder that is not there", r"--report pages/data\.html: there is no folder pages")
def _(folder):
    return page(folder, "--report", "pages/data.html")


def _my_page(folder):
    assert (folder / "data.html").read_text() == "mine"


@case(
    "a page of data where a file is", r"--report data\.html: is there already; --overwrite replaces it", after=_my_page
)
def _(folder):
    (folder / "data.html").write_text("mine")
    return page(folder, "--report", "data.html")


def _lists_it(folder):
    text = (folder / "data.html").read_text()
    assert "7.png: not a readable image" in text
    assert "<td>40 × 40</td><td>11</td>" in text


@case("a page of data with a broken picture", r"7\.png: not a readable image", status=1, after=_lists_it)
def _(folder):
    words = page(folder, "--report", "data.html")
    (folder / "set/7.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    return words
