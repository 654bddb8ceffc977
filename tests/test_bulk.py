"""Bulk prediction: rows of any source into files, whole however often it is killed, on any number of processes."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from test_elastic import ENVIRONMENT, wait_for

from ordinalclip import bulk
from ordinalclip.cli import main
from ordinalclip.config import load_config
from ordinalclip.data import load_parts
from ordinalclip.data.pictures import of_files, read_pictures
from ordinalclip.files import lock
from ordinalclip.gauges import drawn_gauges
from ordinalclip.model import OrdinalModel
from ordinalclip.pipeline import load_pipeline
from ordinalclip.predictions import Predictions
from ordinalclip.ranks import Ranks
from ordinalclip.training.distributed import make_accelerator
from ordinalclip.training.evaluation import Evaluator, predictions_of

ADDED = ["value", "rank", "name", "probabilities", "error", "row"]
ROWS = 7
BROKEN = 3  # row of the broken picture, from 0


def save_model(folder, seed=0):
    """A model with random prototypes: its answers differ from picture to picture."""
    torch.manual_seed(seed)
    ranks = Ranks((0, 25, 50, 100), ("empty", "low", "half", "full"), unit="%")
    model = OrdinalModel.build("tiny", ranks, "prototypes", decoding="expectation")
    with torch.no_grad():
        model.head.prototypes.normal_()
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def table(tmp_path):
    """Seven pictures, the fourth broken, and a CSV of them."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = ["id,image,note"]
    for number, (picture, _) in enumerate(drawn_gauges("dial", ROWS, 3, 64)):
        picture.save(folder / f"{number}.png")
        lines.append(f'{number:04d},{number}.png,"a, ""{number}"""')
    (folder / f"{BROKEN}.png").write_bytes((folder / f"{BROKEN}.png").read_bytes()[:200])
    (folder / "rows.csv").write_text("\n".join(lines) + "\n")
    return folder / "rows.csv"


def predict(model, *words, status=1):
    assert main(["predict", *map(str, words), "--model", model, "-q"]) == status


def refused(capsys, model, *words):
    capsys.readouterr()
    predict(model, *words, status=2)
    (line,) = capsys.readouterr().err.splitlines()
    return line


def read(out):
    return pq.read_table(out)


# ---- rows of any source


def test_all_columns_of_a_table_are_kept_and_answers_stand_beside_them(model, table, tmp_path, capsys):
    predict(model, "--data", table, "--out", tmp_path / "out", "--block", 3)
    said = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r"7 pictures, 1 could not be read; [\d.]+ images/s, [\d.]+ per processor second, 1 process", said[0]
    )
    assert said[1] == f"predictions: {tmp_path}/out"
    parts = sorted(path.name for path in (tmp_path / "out").glob("*"))
    assert parts == ["_predictions.json", *(f"part-{number:06d}.parquet" for number in range(3))]
    assert [len(read(tmp_path / "out" / part)) for part in parts[1:]] == [3, 3, 1]
    found = read(tmp_path / "out")
    assert found.column_names == ["id", "image", "note", *ADDED]
    assert found["id"].to_pylist() == [f"{number:04d}" for number in range(ROWS)]
    assert found["note"].to_pylist() == [f'a, "{number}"' for number in range(ROWS)]
    assert found["row"].to_pylist() == list(range(1, ROWS + 1))
    assert [row for row, error in enumerate(found["error"].to_pylist()) if error] == [BROKEN]
    assert "image file is truncated" in found["error"][BROKEN].as_py()
    for name in ("value", "rank", "name", "probabilities"):
        assert [row for row, cell in enumerate(found[name].to_pylist()) if cell is None] == [BROKEN], name
    assert found["probabilities"].type == pa.list_(pa.float32())
    assert len(set(found["value"].to_pylist())) == ROWS
    about = json.loads((tmp_path / "out" / "_predictions.json").read_text())
    assert about["ranks"]["unit"] == "%"
    assert about["data"]["rows"] == ROWS


def stored(table, kind):
    """The rows of the table in another form; their pictures as bytes where the form takes them."""
    rows = pd.read_csv(table, dtype=str)
    folder = table.parent
    contents = [(folder / name).read_bytes() for name in rows["image"]]
    place = folder.parent / "stored"
    place.mkdir()
    if kind == "parquet of paths":
        rows.to_parquet(folder / "rows.parquet")
        return folder / "rows.parquet"
    if kind == "parquet of bytes":
        rows.assign(image=contents).to_parquet(place / "rows.parquet")
        return place / "rows.parquet"
    if kind == "jsonl":
        rows.to_json(folder / "rows.jsonl", orient="records", lines=True)
        return folder / "rows.jsonl"
    pictures = [{"bytes": content, "path": name} for content, name in zip(contents, rows["image"], strict=True)]
    features = datasets.Features({**{name: datasets.Value("string") for name in rows}, "image": datasets.Image()})
    made = datasets.Dataset.from_dict({**rows.to_dict("list"), "image": pictures}, features)
    made.to_parquet(place / "train.parquet")
    return place if kind == "datasets folder" else place / "train.parquet"


KINDS = ("parquet of paths", "parquet of bytes", "jsonl", "parquet of pictures", "datasets folder")


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_in_any_form_is_answered_the_same(model, table, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    predict(model, "--data", table, "--out", tmp_path / "csv.parquet", "--block", 4)
    predict(model, "--data", stored(table, kind), "--out", tmp_path / "out", "--block", 4)
    plain, found = read(tmp_path / "csv.parquet"), read(tmp_path / "out")
    if kind == "parquet of bytes":
        plain = plain.drop_columns("image")  # it has no names
    assert set(found.column_names) == set(plain.column_names)
    assert not any(pa.types.is_struct(kind) or pa.types.is_binary(kind) for kind in found.schema.types)
    for name in plain.column_names:
        assert found[name].to_pylist() == plain[name].to_pylist(), name


HOSTILE = ["=1+1.png", "a,b.png", 'q"uote.png', "line\nbreak.png", "-x.png", os.fsdecode(b"\xff.png"), "ä.png"]


def test_a_folder_is_taken_with_all_below_it_whatever_its_files_are_called(model, tmp_path, capsys):
    folder = tmp_path / "pictures"
    places = [folder / f"{number % 2}" / name for number, name in enumerate(HOSTILE)]
    for place, (picture, _) in zip(places, drawn_gauges("dial", len(places), 3, 64), strict=True):
        place.parent.mkdir(parents=True, exist_ok=True)
        picture.save(place, format="PNG")
    (folder / "notes.txt").write_text("no picture")
    predict(model, "--data", folder, "--out", tmp_path / "out", status=0)
    found = read(tmp_path / "out")
    assert found.column_names == ["file", *ADDED]
    names = [os.fsencode(os.path.relpath(place, folder)).decode("utf-8", "backslashreplace") for place in places]
    names = [name.replace("\\xff", "\\udcff") for name in names]
    assert sorted(found["file"].to_pylist()) == sorted(names)
    answers = dict(zip(found["file"].to_pylist(), found["value"].to_pylist(), strict=True))
    pipe = load_pipeline(model)
    for place, name in zip(places, names, strict=True):
        assert answers[name] == pytest.approx(pipe(str(place))["value"], abs=1e-4), name

    predict(model, "--data", folder, "--out", tmp_path / "out.csv", status=0)
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    shown = [row["file"] for row in rows]
    assert sorted(shown) == sorted(names)  # 0/=1+1.png is no formula
    predict(model, *places, "--out", tmp_path / "some.jsonl", status=0)
    lines = [json.loads(line) for line in (tmp_path / "some.jsonl").read_text().splitlines()]
    assert len(lines) == len(places)
    assert [line["value"] for line in lines] == pytest.approx([answers[name] for name in names], abs=1e-4)


def test_one_file_of_any_kind_holds_the_same_rows(model, table, tmp_path, capsys):
    table.write_text(table.read_text().replace("0002,", "=2+3,"))
    for ending in (".parquet", ".csv", ".jsonl"):
        predict(model, "--data", table, "--out", tmp_path / f"out{ending}")
    rows = read(tmp_path / "out.parquet").to_pylist()
    assert rows[2]["id"] == "=2+3"
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == rows
    with (tmp_path / "out.csv").open(newline="") as file:
        cells = list(csv.DictReader(file))
    assert [row["id"] for row in cells] == ["0000", "0001", "'=2+3", "0003", "0004", "0005", "0006"]
    for row, cell in zip(rows, cells, strict=True):
        assert cell["note"] == row["note"]
        assert cell["value"] == ("" if row["value"] is None else str(row["value"]))
        assert json.loads(cell["probabilities"] or "null") == row["probabilities"]
    assert f"{tmp_path}/out.csv: is there already; --overwrite replaces it" in refused(
        capsys, model, "--data", table, "--out", tmp_path / "out.csv"
    )
    predict(model, "--data", table, "--out", tmp_path / "out.csv", "--overwrite")


def test_a_column_of_the_datas_own_is_never_overwritten(model, table, tmp_path, capsys):
    table.write_text(table.read_text().replace("id,image,note", "name,image,note"))
    said = refused(capsys, model, "--data", table, "--out", tmp_path / "out")
    assert "has a column 'name' already; --prefix TEXT" in said
    predict(model, "--data", table, "--out", tmp_path / "out", "--prefix", "predicted_")
    found = read(tmp_path / "out")
    assert found.column_names == ["name", "image", "note", *(f"predicted_{name}" for name in ADDED)]
    assert found["name"].to_pylist()[1] == "0001"


def test_which_column_holds_the_pictures_is_said_or_asked(model, table, tmp_path, capsys, caplog):
    table.write_text(table.read_text().replace("id,image,note", "id,photo,note"))
    predict(model, "--data", table, "--out", tmp_path / "out.parquet")
    assert "column 'photo' is taken for the pictures" in caplog.text
    predict(model, "--data", table, "--out", tmp_path / "same.parquet", "--image-column", "photo")
    assert read(tmp_path / "out.parquet").equals(read(tmp_path / "same.parquet"))
    said = refused(capsys, model, "--data", table, "--image-column", "phto")
    assert "column 'phto' (data.image_column) is missing; it has 'id', 'photo', 'note'" in said
    lines = table.read_text().splitlines()
    table.write_text("\n".join(["id,photo,note,mask", *(f"{line},m.png" for line in lines[1:])]))
    said = refused(capsys, model, "--data", table)
    assert "'photo', 'mask' all look like it; data.image_column says it, of 'id', 'photo', 'note', 'mask'" in said
    table.write_text("id,note\n1,2\n")
    assert "none looks like it" in refused(capsys, model, "--data", table)


def test_paths_start_from_the_root_and_do_not_leave_it(model, table, tmp_path):
    rows = table.read_text().replace("5.png", "../6.png").replace("6.png,", "6,").replace("\n0004,4.png", "\n0004,")
    inner = table.parent / "inner"
    inner.mkdir()
    for number in range(ROWS - 1):
        (table.parent / f"{number}.png").rename(inner / f"{number}.png")
    other = tmp_path / "rows.csv"
    other.write_text(rows)
    predict(model, "--data", other, "--root", inner, "--out", tmp_path / "a.parquet", "data.suffix=.png")
    errors = read(tmp_path / "a.parquet")["error"].to_pylist()
    assert errors[:BROKEN] == [None] * BROKEN
    assert errors[4] == "not a readable image (no picture: '')"
    assert errors[5].startswith("leaves data.root=")
    assert "No such file" in errors[6]  # inner/6.png
    words = ["--data", other, "--root", inner, "data.outside_root=true", "data.suffix=.png"]
    predict(model, *words, "--out", tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet")["error"].to_pylist()[5] is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "which pictures? give files or folders, or --data TABLE"),
        (["--data", "TABLE", "a.png"], "--data and images exclude each other: a.png is no data.KEY=VALUE"),
        (["--data", "TABLE", "data.shots=3"], "data.shots says nothing of pictures to predict; nearest: data.sheet"),
        (["--data", "TABLE", "train.lr=3"], "train.lr says nothing of pictures"),
        (["--data", "TABLE", "data.workers=x"], "data.workers: Input should be a valid integer, got 'x'"),
        (["--data", "TABLE", "data.source=gauges"], "of pictures to predict it is table, folder or hub"),
        (["--data", "TABLE", "--out", "a.xlsx"], "one file ends in .parquet, .csv, .jsonl"),
        (["--data", "TABLE", "--out", "a.csv", "--json"], "--out FILE.jsonl writes JSON lines"),
        (["--data", "TABLE", "--overwrite"], "--prefix and --overwrite are of files"),
        (["--data", "TABLE", "--out", "TABLE"], "is there already; --overwrite replaces it"),
        (["--data", "TABLE", "--root", "nowhere"], "data.root='nowhere': no such folder"),
        (["--data", "no/such/rows.csv"], "no/such/rows.csv: no such table"),
        (["--data", ""], "data without a name was given"),
        (["--root", "x", "a.png"], "--image-column and --root are of a table"),
    ],
)
def test_calls_that_mean_nothing_are_refused(model, table, capsys, words, said):
    assert said in refused(capsys, model, *(str(table) if word == "TABLE" else word for word in words))


def test_several_processes_write_a_folder(model, table, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = refused(capsys, model, "--data", table, "--out", "a.csv")
    assert "2 processes write to a folder of Parquet files: --out FOLDER" in said


# ---- the same answers everywhere


def test_class_pipeline_command_and_bulk_answer_the_same(model, table, tmp_path, capsys):
    """Class: what evaluation computes with the model. Two batch sizes, with and without processes that decode."""
    pipe = load_pipeline(model)
    good = [table.parent / f"{number}.png" for number in range(ROWS) if number != BROKEN]
    said = [pipe(str(path), top_k=4) for path in good]
    values = [answer["value"] for answer in said]
    assert np.ptp(values) > 1

    rows = [f"{path.name},50" for path in good]
    (table.parent / "labelled.csv").write_text("\n".join(["image,label", *rows]))
    keys = [f"data.table={table.parent}/labelled.csv", "data.source=table", "data.split=[1,0,0]", "ranks.low=0"]
    config = load_config(None, [*keys, "ranks.high=100", "ranks.num=5", "ranks.unused=true", "data.duplicates=allow"])
    part = load_parts(config.data, config.ranks, 1).train
    outputs = Evaluator(make_accelerator("no"), 4, quiet=True).outputs(pipe.model, part)
    order = np.argsort([str(name) for name in part.names])
    evaluated: Predictions = predictions_of(pipe.model, part, outputs)
    np.testing.assert_allclose(evaluated.decoded["expectation"][order], values, rtol=1e-5)

    predict(model, *good, "--json", "--top", "4", status=0)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.pop("file") for line in lines] == [str(path) for path in good]
    for line, answer in zip(lines, said, strict=True):
        assert {**line, "value": 0, "top": 0} == {**answer, "value": 0, "top": 0}
        assert [entry["name"] for entry in line["top"]] == [entry["name"] for entry in answer["top"]]
        for entry, other in zip(line["top"], answer["top"], strict=True):
            assert entry["probability"] == pytest.approx(other["probability"], abs=1e-5)
    np.testing.assert_allclose([line["value"] for line in lines], values, rtol=1e-5)

    for number, words in enumerate((["--batch-size", 1], ["--batch-size", 4, "data.workers=2"])):
        predict(model, "--data", table, "--out", tmp_path / f"{number}", "--block", 5, *words)
        found = read(tmp_path / f"{number}").filter(pa.compute.field("error").is_null())
        np.testing.assert_allclose(found["value"].to_numpy(), values, rtol=1e-5)
        assert found["rank"].to_pylist() == [answer["rank"] for answer in said]
        assert found["name"].to_pylist() == [answer["name"] for answer in said]


def test_the_terminal_shows_rows_of_a_table(model, table, capsys):
    predict(model, "--data", table, "--top", "1")
    out, err = capsys.readouterr()
    lines = [line.split("\t") for line in out.splitlines()]
    assert [line[0] for line in lines] == [f"{number}.png" for number in range(ROWS)]
    assert lines[BROKEN][1].startswith("error: not a readable image")
    assert err == "ordinalclip: 1 of 7 images could not be read\n"


# ---- nothing is lost, nothing is done twice


def test_what_was_stopped_goes_on_and_what_is_there_stays(model, table, tmp_path, monkeypatch, capsys):
    words = ["--data", table, "--block", 2, "--batch-size", 2]
    predict(model, *words, "--out", tmp_path / "whole")
    write, written = pq.write_table, []

    def failing(content, path, *arguments):
        written.append(path)
        write(content, path, *arguments)
        if len(written) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(bulk.pq, "write_table", failing)
    said = refused(capsys, model, *words, "--out", tmp_path / "out")
    assert said.endswith("part-000002.parquet: could not be written (No space left on device)")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "_predictions.json",
        "part-000000.parquet",
        "part-000001.parquet",
    ]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("part-*")}
    monkeypatch.setattr(bulk.pq, "write_table", write)
    predict(model, *words, "--out", tmp_path / "out")
    assert "7 pictures, 1 could not be read; 4 were there already; " in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert read(tmp_path / "out").equals(read(tmp_path / "whole"))
    predict(model, *words, "--out", tmp_path / "out")
    assert capsys.readouterr().out.splitlines()[0] == "7 pictures, 1 could not be read; 7 were there already"


def test_stop_ends_at_a_broken_picture_and_keeps_what_is_done(model, table, tmp_path, capsys):
    words = ["--data", table, "--block", 2, "--batch-size", 2, "--out", tmp_path / "out"]
    said = refused(capsys, model, *words, "--errors", "stop")
    assert said.startswith(f"ordinalclip: {table}, row 4 (line 5), 3.png: not a readable image (")
    assert [path.name for path in (tmp_path / "out").glob("part-*")] == ["part-000000.parquet"]
    predict(model, *words)
    assert len(read(tmp_path / "out")) == ROWS


def test_other_models_data_and_options_are_refused_by_name(model, table, tmp_path, capsys):
    words = ["--data", table, "--out", tmp_path / "out", "--block", 4]
    predict(model, *words)
    ways = "; --overwrite replaces them, another --out leaves them alone"
    other = save_model(tmp_path / "other", seed=1)
    said = refused(capsys, other, *words)
    assert f"{tmp_path}/out: holds predictions of something else: another model, {model}{ways}" in said
    said = refused(capsys, model, *words[:-1], 5)
    assert f"something else: block was 4, is 5{ways}" in said
    said = refused(capsys, model, *words, "--prefix", "p_")
    assert f"something else: prefix was '', is 'p_'{ways}" in said
    content = table.read_text()
    table.write_text(content.replace("0005", "0055"))
    assert f"something else: data {table} as it was before{ways}" in refused(capsys, model, *words)
    table.write_text(content)
    predict(model, *words)
    predict(other, *words, "--overwrite")
    values = read(tmp_path / "out")["value"]
    predict(other, *words[:2], *words[4:], "--out", tmp_path / "fresh")
    assert values.to_pylist() == read(tmp_path / "fresh")["value"].to_pylist()


def test_the_digest_of_rows_tells_cells_names_and_sizes_apart(table, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    digests = [read_pictures(str(table)).digest(), read_pictures(str(table), ["data.image_column=note"]).digest()]
    rows = pd.read_csv(table, dtype=str)
    for number, made in enumerate(
        (rows, rows.rename(columns={"note": "other"}), rows[::-1], rows[["image", "id", "note"]])
    ):
        made.to_csv(tmp_path / f"{number}.csv", index=False)
        digests.append(read_pictures(str(tmp_path / f"{number}.csv")).digest())
    for number, contents in enumerate(([b"aa", b"b"], [b"a", b"bb"])):
        pd.DataFrame({"image": contents}).to_parquet(tmp_path / f"{number}.parquet")
        digests.append(read_pictures(str(tmp_path / f"{number}.parquet")).digest())
    assert digests[0] == digests[2]  # of the same rows in another file
    assert len(set(digests)) == len(digests) - 1
    assert of_files([str(table.parent / "0.png")]).digest() != of_files([str(table.parent / "1.png")]).digest()


def test_parts_that_are_damaged_or_of_something_else_are_refused(model, table, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--data", table, "--out", out, "--block", 4]
    predict(model, *words)
    part, content = out / "part-000001.parquet", (out / "part-000001.parquet").read_bytes()
    part.write_bytes(content[:-100])
    assert f"{part}: damaged (" in refused(capsys, model, *words)
    part.write_bytes((out / "part-000000.parquet").read_bytes())
    assert f"{part}: is no part of these predictions; delete it, and it is written anew" in refused(
        capsys, model, *words
    )
    part.unlink()
    predict(model, *words)
    assert part.read_bytes() == content
    (out / "_predictions.json").unlink()
    assert "but no _predictions.json that says of what" in refused(capsys, model, *words)
    (out / "_predictions.json").write_text('{"model": 3}')
    assert "_predictions.json is damaged" in refused(capsys, model, *words)


def test_one_job_at_a_time_writes_to_a_folder(model, table, tmp_path, capsys):
    with lock(tmp_path / "out" / bulk.LOCK):
        said = refused(capsys, model, "--data", table, "--out", tmp_path / "out")
        assert f"{tmp_path}/out is in use by process {os.getpid()}" in said
    predict(model, "--data", table, "--out", tmp_path / "out")


# ---- real processes


def many(table, rows):
    """A table that names the pictures again and again."""
    lines = [f"{row:06d},{row * 5 % ROWS}.png,{row}" for row in range(rows)]
    (table.parent / "many.csv").write_text("\n".join(["id,image,note", *lines]) + "\n")
    return table.parent / "many.csv"


def start(model, *words, launcher=()):
    command = [sys.executable, "-m", *launcher, "ordinalclip", "predict", "--model", model, *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=ENVIRONMENT, start_new_session=True, **pipes)


def number_of_parts(out):
    return len(list(Path(out).glob("part-*.parquet")))


@pytest.mark.slow
def test_a_job_that_is_killed_loses_and_repeats_no_row(model, table, tmp_path):
    words = ["--data", many(table, 2500), "--block", 50, "-q"]
    predict(model, *words[:-1], "--out", tmp_path / "whole")
    out, there = tmp_path / "out", 0
    for _ in range(3):
        job = start(model, *words, "--out", out)
        wait_for(lambda: number_of_parts(out) >= there + 3, 60)  # noqa: B023
        os.killpg(job.pid, signal.SIGKILL)
        job.communicate()
        there = number_of_parts(out)
        assert there < 50
    predict(model, *words[:-1], "--out", out)
    whole, found = read(tmp_path / "whole"), read(out)
    assert found["id"].to_pylist() == [f"{row:06d}" for row in range(2500)]
    assert found.equals(whole)
    assert not list(out.glob(".*"))  # nothing that the killed left aside


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_two_processes_write_what_one_does(model, table, tmp_path, launcher):
    words = ["--data", many(table, 120), "--block", 16, "-q"]
    predict(model, *words[:-1], "--out", tmp_path / "one")
    config = Path(__file__).parents[1] / "configs" / "accelerate" / "cpu.yaml"
    how = {
        "torchrun": ("torch.distributed.run", "--nproc-per-node", "2", "-m"),
        "accelerate": ("accelerate.commands.launch", "--config_file", str(config), "--num_processes", "2", "-m"),
    }
    job = start(model, *words, "--out", tmp_path / "two", launcher=how[launcher])
    out, err = job.communicate(timeout=120)
    assert job.returncode == 0, err
    assert out.splitlines()[0].startswith("120 pictures, 17 could not be read; ")
    assert out.splitlines()[0].endswith("per processor second, 2 processes")
    assert len(out.splitlines()) == 2  # one of them speaks
    assert read(tmp_path / "two").equals(read(tmp_path / "one"))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_being_told_to_stop_says_how_far_it_came(model, table, tmp_path, number, status):
    out = tmp_path / "out"
    words = ["--data", many(table, 50_000), "--block", 50, "--out", out, "-q", "data.workers=1"]
    job = start(model, *words)
    wait_for(lambda: number_of_parts(out) >= 2, 60)
    os.killpg(job.pid, number)
    _, err = job.communicate(timeout=60)
    assert job.returncode == status, err
    done = number_of_parts(out) * 50
    assert err == f"ordinalclip: told to stop; {done:,} of 50,000 rows are done, the same command goes on\n"
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(model, table, tmp_path):
    """The private memory that a process has held at most, over ten times as many rows, but for the table's text."""
    program = (
        "import resource, sys; from ordinalclip.cli import main; main(sys.argv[1:]); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    )
    peaks = []
    for rows in (2000, 20_000):
        words = ["predict", "--model", model, "--data", str(many(table, rows)), "--out", str(tmp_path / f"{rows}")]
        command = [sys.executable, "-c", program, *words, "--block", "500", "-q"]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split()[-1]))
        assert number_of_parts(tmp_path / f"{rows}") == rows // 500
    assert peaks[1] - peaks[0] < 40, peaks
