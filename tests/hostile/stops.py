"""Folders in the way, files that something has cut off, disks that are full, folders that another job holds."""

import json
import resource
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from hostile import case, lasting_folder
from ordinalclip.cli import main
from ordinalclip.files import lock
from ordinalclip.run_folder import RunFolder
from ordinalclip.training.checkpoint import checkpoints

DATA = ["data.num_train=8", "data.num_validation=4", "data.num_test=4", "ranks.low=0", "ranks.high=100", "ranks.num=5"]
STEPS = ["train.max_steps=2", "train.eval_every=1", "train.batch_size=4", "method=l1", "evaluation.report=false"]
QUICK = ["--quiet", *DATA, *STEPS]
HELD = []


@cache
def _trained(*more):
    """A run that is done once, to be copied; `more` overrides."""
    folder = lasting_folder() / "run"
    assert main(["train", "default", f"output_dir={folder}", *QUICK, *more]) == 0
    return folder


def _run(folder, *more):
    """A finished run of two steps in `folder`/run."""
    shutil.copytree(_trained(*more), folder / "run")
    return RunFolder(folder / "run")


def _content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def _unchanged(folder):
    assert _content(folder / "run") == _content(_trained())


def _train(*more):
    return ["train", "default", "output_dir=run", *QUICK, *more]


def _zero(path):
    path.write_bytes(b"")


def _cut(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _nul(path):
    path.write_bytes(bytes(path.stat().st_size))


def _pictures(folder):
    """Twelve pictures, three grades, and their table."""
    rows = ["image,label"]
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        rows.append(f"{number}.png,{number % 3}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return ["data.source=table", f"data.root={folder}", "data.table=labels.csv", "data.split=[0.4,0.3,0.3]"]


# ---- where a run is to be


@case("a run folder that is a file", r"/?run: .*cannot be written to \(.*exists\)")
def _(folder):
    (folder / "run").write_text("mine")
    return _train()


@case("a run folder below a file", r"run/below: .*cannot be written to \(Not a directory\)")
def _(folder):
    (folder / "run").write_text("mine")
    return _train("output_dir=run/below")


@case("a run folder without a name", r"output_dir: String should have at least 1 character")
def _(folder):
    return _train("output_dir=''")


@case("the root of the file system as run folder", r"/ is the root of the file system, no place for a run")
def _(folder):
    return _train("output_dir=/")


@case("a run folder that takes no files", r"/proc/self: .*cannot be written to")
def _(folder):
    return _train("output_dir=/proc/self")


@case("a run folder on a file system that takes no folders", r"/proc/nowhere/run: .*cannot be written to")
def _(folder):
    return _train("output_dir=/proc/nowhere/run")


@case("a run folder that is a link to nothing", r"run: .*cannot be written to")
def _(folder):
    (folder / "run").symlink_to(folder / "nothing")
    return _train()


@case("a run folder whose name has a line break", r"a\\nb: .*cannot be written to")
def _(folder):
    (folder / "a\nb").write_text("")
    return _train('output_dir="a\\nb"')


MAY_BE_YOURS = r"holds files of the names of a run's, .* they may be yours; choose another output_dir"


def _still_mine(folder):
    assert list((folder / "run").rglob("mine"))


for name in ("log.jsonl", "ordinalclip", "figures", "model"):

    def _mine(folder, name=name):
        (folder / "run" / name).mkdir(parents=True)
        (folder / "run" / name / "mine").write_text("")
        return _train("overwrite=true")

    case(f"a folder {name} of one's own in the run folder", MAY_BE_YOURS, after=_still_mine)(_mine)


@case("a file checkpoints of one's own in the run folder", MAY_BE_YOURS)
def _(folder):
    (folder / "run").mkdir()
    (folder / "run/checkpoints").write_text("")
    return _train("overwrite=true")


@case("a comparison's folder that is a file", r"out: .*cannot be written to")
def _(folder):
    (folder / "out").write_text("mine")
    return _compare(folder)


@case("a comparison's folder without a name", r"output_dir: String should have at least 1 character")
def _(folder):
    return _compare(folder, "output_dir=''")


@case("a comparison in the folder of a run", r"run is the folder of a finished run")
def _(folder):
    _run(folder)
    return _compare(folder, "output_dir=run")


@case("figures to where a file is", r"figures: File exists")
def _(folder):
    _run(folder)
    (folder / "figures").write_text("mine")
    return ["plot", "run", "--out", "figures"]


# ---- what is there already


@case("the same run again", r"run holds a finished run.*train\.resume=auto .*overwrite=true", after=_unchanged)
def _(folder):
    _run(folder)
    return _train()


@case("the same run again, when it has been cut off", r"run holds a run that was interrupted at step 2")
def _(folder):
    _run(folder).metrics.unlink()
    return _train()


@case(
    "overwrite=true, and the first picture of the new run is broken: the old run stays",
    r"\.png: not a readable image",
    after=_unchanged,
)
def _(folder):
    _run(folder)
    data = _pictures(folder)
    for number in range(12):
        (folder / f"{number}.png").write_bytes(b"\x89PNG%d" % number)
    return _train(*data, "ranks.low=0", "ranks.high=2", "ranks.num=3", "overwrite=true")


@case("overwrite=true, and the backbone of the new run is not there", r"nothing", after=_unchanged)
def _(folder):
    _run(folder)
    return _train("model.backbone=timm:nothing", "overwrite=true")


@case("train.resume=auto under another configuration", r"train\.lr was .*, is 0\.5", after=_unchanged)
def _(folder):
    _run(folder)
    return _train("train.resume=auto", "train.lr=0.5")


def _held(*words, where="run"):
    def arrange(folder):
        if where == "run":
            _run(folder)
        holding = lock(folder / where / "run.lock")
        holding.__enter__()
        HELD.append(holding)
        return list(words) if words else _compare(folder)

    return arrange


def _let_go(folder):
    HELD.pop().__exit__(None, None, None)


IN_USE = r"is in use by process \d+ on \S+ since 20.*; one job at a time"
case("train in a folder that another job holds", IN_USE, after=_let_go)(_held(*_train("overwrite=true")))
case("evaluate in a folder that another job holds", IN_USE, after=_let_go)(_held("evaluate", "run", "--quiet"))
case("report in a folder that another job holds", IN_USE, after=_let_go)(_held("report", "run", "--quiet"))
case("compare in a folder that another job holds", IN_USE, after=_let_go)(_held(where="out"))


# ---- files that something has cut off


for how, damage in (("empty", _zero), ("cut in half", _cut), ("full of zeros", _nul)):
    for name, commands in (
        ("metrics.json", (["evaluate"], ["report"])),
        ("config.yaml", (["evaluate"], ["report"])),
        ("provenance.json", (["evaluate"],)),
        ("predictions.parquet", (["report"], ["plot"])),
    ):
        for command in commands:

            def _broken(folder, name=name, command=command, damage=damage):
                run = _run(folder)
                damage(run.path / name)
                return [*command, "run", "--quiet"]

            case(f"{name} {how}, {command[0]}", rf"run/{name}\b.*(damaged|not valid|YAML|holds nothing)")(_broken)


@case("log.jsonl full of zeros, report", r"report\.html", status=0)
def _(folder):
    _nul(_run(folder).log)
    return ["report", "run", "--quiet"]


def _whole_again(folder):
    run = RunFolder(folder / "run")
    assert run.is_finished
    assert [entry["step"] for entry in run.read_log()] == [2]


@case("log.jsonl with a step lost and another cut off, train.resume=auto", r"run folder: run", 0, after=_whole_again)
def _(folder):
    run = _run(folder)
    first, second = run.log.read_text().splitlines()
    run.log.write_text(f"{first[:20]}\n{second}\n" + "\0" * 30)
    return _train("train.resume=auto")


@case("metrics.json empty, train.resume=auto goes on from the checkpoint", r"run folder: run", status=0)
def _(folder):
    _zero(_run(folder).metrics)
    return _train("train.resume=auto")


@case("metrics.json empty and no checkpoints, train.resume=auto", r"damaged run \(.*metrics\.json.*no checkpoint")
def _(folder):
    run = _run(folder)
    _zero(run.metrics)
    shutil.rmtree(run.checkpoints)
    return _train("train.resume=auto")


@case("all checkpoints cut off", r"no intact checkpoint; overwrite=true starts anew\. .*damaged checkpoint, model\.saf")
def _(folder):
    run = _run(folder)
    for path in checkpoints(run.checkpoints):
        _cut(path / "model.safetensors")
    return _train("train.resume=auto")


@case("predictions.parquet of other columns", r"predictions\.parquet: damaged \(.*; once it is deleted")
def _(folder):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"a": [1]}), _run(folder).predictions)
    return ["report", "run", "--quiet"]


# ---- disks that are full


def _limited(num_bytes, words):
    """No file may grow larger than so many bytes: as a full disk, in the middle of a write."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))
    return words


def _unlimited(folder):
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert not list(folder.rglob(".partial-*"))


def _no_checkpoint(folder):
    _unlimited(folder)
    assert not checkpoints(folder / "run/checkpoints")
    assert not (folder / "run/metrics.json").exists()


@case(
    "no space for a checkpoint",
    r"run/checkpoints/step-00000001: could not be written \(.*File too large.*\); older checkpoints are as they were",
    after=_no_checkpoint,
)
def _(folder):
    return _limited(60_000, _train())


def _still_whole(folder):
    _unlimited(folder)
    _unchanged(folder)


@case("no space for predictions", r"run/predictions\.parquet: could not be written \(.*File too large", 2, _still_whole)
def _(folder):
    _run(folder)
    return _limited(1000, ["evaluate", "run", "--quiet"])


@case("no space for a report", r"run/report\.html: could not be written \(File too large\)", after=_still_whole)
def _(folder):
    _run(folder)
    return _limited(1000, ["report", "run", "--quiet"])


# ---- comparisons


def _compare(folder, *more, **content):
    base = {"method": "l1", "evaluation": {"report": False}}
    given = {"output_dir": "out", "seeds": [1], "base": base, "methods": {"L1": {}, "constant": CONSTANT}}
    (folder / "c.yaml").write_text(yaml.safe_dump({**given, **content}))
    return ["compare", "c.yaml", "--quiet", *DATA, "train.max_steps=1", "train.batch_size=4", *more]


CONSTANT = {"base": {"method": "constant"}}


def _one_is_left(folder):
    assert "| constant |" in (folder / "out/table.md").read_text()
    assert "L1 failed: " in (folder / "out/table.md").read_text()


@case(
    "a comparison of which one run cannot be trained",
    r"\| constant \|(.|\n)*L1 failed: out/runs/l1-0-seed1(.|\n)*ordinalclip: out/runs/l1-0-seed1: .*nothing",
    status=1,
    after=_one_is_left,
    slow=True,
)
def _(folder):
    return _compare(folder, methods={"L1": {"base": {"model": {"backbone": "timm:nothing"}}}, "constant": CONSTANT})


@case("a comparison of which no run can be trained", r"out: nothing to compare: L1 failed: out/runs/l1-0-seed1: .*noth")
def _(folder):
    return _compare(folder, methods={"L1": {"base": {"model": {"backbone": "timm:nothing"}}}})


@case(
    "a comparison of which all runs of a variant fail",
    r"### good(.|\n)*L1 \(bad\) failed: (.|\n)*ordinalclip: out/runs/bad/l1-0-seed1: .*batch_size|### good",
    status=1,
    slow=True,
)
def _(folder):
    return _compare(
        folder,
        methods={"L1": {}},
        variants={"good": {}, "bad": {"model.backbone": "timm:nothing"}},
    )


def _done_again(folder):
    assert json.loads((folder / "out/runs/constant-0-seed1/metrics.json").read_text())["test"]["num"] == 4


@case(
    "a comparison of which one run's metrics.json is empty: it is done again",
    r"\| constant \|",
    status=0,
    after=_done_again,
    slow=True,
)
def _(folder):
    words = _compare(folder, methods={"constant": CONSTANT})
    assert main(words) == 0
    _zero(folder / "out/runs/constant-0-seed1/metrics.json")
    return words


# ---- links, and folders of others


def _left(folder):
    assert (folder / "mine/thesis.tex").read_text() == "all of it"


@case("overwrite=true, and model/ is a link to a folder of one's own", r"run folder: run", status=0, after=_left)
def _(folder):
    _run(folder)
    (folder / "mine").mkdir()
    (folder / "mine/thesis.tex").write_text("all of it")
    shutil.rmtree(folder / "run/model")
    (folder / "run/model").symlink_to(folder / "mine")
    return _train("overwrite=true")


@case("a lock that is a link to a file of one's own", r"run: .*cannot be written to", after=_left)
def _(folder):
    _run(folder)
    (folder / "mine").mkdir()
    (folder / "mine/thesis.tex").write_text("all of it")
    (folder / "run/run.lock").symlink_to(folder / "mine/thesis.tex")
    return ["report", "run"]


@case(
    "a comparison in a folder with results of others",
    r"out holds results\.csv, and no runs of a comparison: it may be yours",
)
def _(folder):
    (folder / "out").mkdir()
    (folder / "out/results.csv").write_text("mine")
    (folder / "c.yaml").write_text("output_dir: out\nseeds: [1]\nmethods: {a: {base: {method: l1}}}\n")
    return ["compare", "c.yaml", "-q"]


@case("overwrite=true in a folder with a provenance.json of others", MAY_BE_YOURS)
def _(folder):
    (folder / "run/model").mkdir(parents=True)
    (folder / "run/provenance.json").write_text('{"tool": "dvc"}')
    return _train("overwrite=true")


def _kept(change):
    """Cached features of a run, one file of them changed, and a second run."""

    def arrange(folder):
        options = ["train", "default", *QUICK, "model.features=cached", "data.views=1"]
        assert main([*options, "output_dir=first"]) == 0
        change(sorted(folder.glob("cache/features/*/*.safetensors"))[0])
        return [*options, "output_dir=run"]

    return arrange


case("cached features with a bit turned", r"damaged features \(its content is not what was written\); .*clear")(
    _kept(lambda file: file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1])))
)
case("cached features cut off", r"damaged features \(.*\); `ordinalclip features clear \w+` deletes them")(
    _kept(lambda file: file.write_bytes(file.read_bytes()[:-9]))
)
case("cached features of no bytes", r"damaged features \(no header\)")(_kept(lambda file: file.write_bytes(b"")))
