"""Audits of labels: out of fold, even over ranks, groups and copies together, and going on after an interruption."""

import csv
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from ordinalclip import audit as audits
from ordinalclip.audit import audit
from ordinalclip.cli import main
from ordinalclip.config import load_config
from ordinalclip.data import load_parts
from ordinalclip.data.duplicates import similar, thumbnail
from ordinalclip.data.parts import joined
from ordinalclip.data.splits import cross_validated
from ordinalclip.files import lock
from ordinalclip.metrics import ranked_probability_score
from ordinalclip.run_folder import FolderOccupied, RunFolder
from ordinalclip.training import train
from ordinalclip.training.step import Learner

HOSTILE = "=<b>zero</b>"
OPTIONS = [
    *("data.source=table", "data.table=labels.csv", "data.image_column=file", "data.label_column=grade"),
    *("train.max_steps=4", "train.batch_size=4", "train.eval_every=2", "train.lr=1e-2", "evaluation.report=false"),
    *("method=cross_entropy", "data.group=subject", "model.image_size=32", "evaluation.batch_size=16"),
]


def write_pictures(folder, number=24, seed=0):
    """Pictures as bright as their grade 0, 1, 2, noise apart, two of a subject."""
    rng, rows = np.random.default_rng(seed), ["file,grade,subject,note,score"]
    for index in range(number):
        pixels = rng.integers(0, 70, (36, 36, 3)) + 80 * (index % 3)
        name = f"p{index}.png"
        Image.fromarray(pixels.astype(np.uint8)).save(folder / name)
        rows.append(f"{name},{index % 3},s{index // 6},{HOSTILE},-{index}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")


def run_in(folder, *more):
    """A finished run of four steps on `write_pictures`."""
    return train(load_config(None, [f"output_dir={folder}/run", f"data.root={folder}", *OPTIONS, *more]), quiet=True)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A run with its data, to be looked at only, and its audit in another folder."""
    folder = tmp_path_factory.mktemp("audit")
    write_pictures(folder)
    run = run_in(folder)
    before = content(run)
    found, place = audit(run, folder / "found", folds=3, quiet=True)
    return run, place, found, before


def content(folder):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def table(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# ---- folds


def test_every_row_is_judged_once_and_ranks_are_even():
    rng = np.random.default_rng(0)
    ranks = rng.choice(40, 600, p=rng.dirichlet(np.ones(40)))
    rows = cross_validated(ranks, None, np.arange(600), 5, (600, 100, 0), 3)
    assert sorted(np.concatenate([each["test"] for each in rows])) == list(range(600))
    for each in rows:
        assert sorted(np.concatenate(list(each.values()))) == list(range(600))
        assert len(each["validation"]) == pytest.approx(480 / 7, abs=20)
        for rank in np.flatnonzero(np.bincount(ranks) >= 5):  # those of fewer rows share a stratum with others
            assert (ranks[each["test"]] == rank).sum() == pytest.approx((ranks == rank).sum() / 5, abs=2.5)
    means = [ranks[each["test"]].mean() for each in rows]
    assert np.std(means) < 0.15 * ranks.std()  # of 120 rows drawn without regard to ranks it is 0.08 to 0.1 on average


def test_groups_and_copies_stay_together():
    ranks = np.arange(120) % 4
    groups = np.asarray([f"s{row // 5}" for row in range(120)])
    together = np.arange(120)
    together[100] = together[3]  # a copy makes groups s20 and s0 one
    rows = cross_validated(ranks, groups, together, 4, (8, 2, 0), 0)
    for each in rows:
        for one, other in (("train", "test"), ("validation", "test"), ("train", "validation")):
            assert not set(groups[each[one]]) & set(groups[each[other]])
        assert {0, 100} <= set(each["test"]) or not {0, 100} & set(each["test"])


@pytest.mark.parametrize(
    ("groups", "says"),
    [(None, "12 rows are too few for 13 folds"), (["a", "b", "c"] * 4, "3 groups are too few for 13 folds")],
)
def test_too_few_for_the_folds(groups, says):
    with pytest.raises(ValueError, match=says):
        cross_validated(np.arange(12), groups and np.asarray(groups), np.arange(12), 13, (1, 0, 0), 0)


def test_parts_are_joined_row_by_row(tmp_path):
    """Parts of three tables: names, places, labels and other columns are those of their rows."""
    write_pictures(tmp_path, 12)
    head, *rows = (tmp_path / "labels.csv").read_text().splitlines()
    for name, some in (("a", rows[:6]), ("b", rows[6:8]), ("c", rows[8:])):
        (tmp_path / f"{name}.csv").write_text("\n".join([head, *some]) + "\n")
    tables = ["data.train_table=a.csv", "data.validation_table=b.csv", "data.test_table=c.csv"]
    options = [option for option in OPTIONS if "data.table" not in option and "group" not in option]
    config = load_config(None, [f"data.root={tmp_path}", *options, *tables])
    parts = load_parts(config.data, config.ranks, 1)
    whole = joined([parts.train, parts.validation, parts.test])
    assert list(whole.names) == [f"p{number}.png" for number in range(12)]
    assert [whole.names.place(row) for row in (0, 6, 8)] == [
        "row 1 (line 2), p0.png",
        "row 1 (line 2), p6.png",
        "row 1 (line 2), p8.png",
    ]
    assert whole.values.tolist() == [number % 3 for number in range(12)]
    assert list(whole.rows["score"]) == [f"-{number}" for number in range(12)]
    assert whole.select([11, 6]).image(1).tobytes() == Image.open(tmp_path / "p6.png").tobytes()


# ---- what is found


def test_predictions_are_out_of_fold(kept):
    """Each fold's, against a run of its own on a table whose column says the parts."""
    run, place, found, _ = kept
    config = RunFolder(run).read_config()
    names = np.asarray(found.pictures.names[:])
    parts = load_parts(config.data, config.ranks, config.seed)
    assert len(names) == len(parts.train) + len(parts.validation) + len(parts.test) == 24
    groups = np.asarray(found.pictures.rows["subject"])
    fold, root = 1, Path(config.data.root)
    part = np.where(found.folds == fold, "test", "")
    assert not set(groups[found.folds == fold]) & set(groups[found.folds != fold])
    saved = RunFolder(place / "folds" / str(fold))
    assert sorted(saved.read_predictions("test").names) == sorted(names[part == "test"])
    assert not saved.model.exists()

    validation = set(saved.read_predictions("validation").names)
    lines = ["file,grade,part"]
    for name, label, of in zip(names, found.pictures.values, part, strict=True):
        lines.append(f"{name},{label:g},{of or ('validation' if name in validation else 'train')}")
    (root / "by_hand.csv").write_text("\n".join(lines) + "\n")
    own = [option for option in OPTIONS if "group" not in option and "data.table" not in option]
    by_hand = ["data.table=by_hand.csv", "data.split_column=part", f"output_dir={root}/by_hand"]
    train(load_config(None, [f"data.root={root}", *own, *by_hand]), quiet=True)
    expected = RunFolder(root / "by_hand").read_predictions("test")
    order = {name: row for row, name in enumerate(names)}
    rows = [order[name] for name in expected.names]
    np.testing.assert_array_equal(found.predictions.labels[rows], expected.labels)
    np.testing.assert_allclose(found.predictions.probabilities[rows], expected.probabilities, atol=1e-6)


def test_scores_are_of_each_label_and_sorted(kept):
    _, place, found, _ = kept
    for row in range(len(found.scores)):
        alone = ranked_probability_score(found.predictions.probabilities[[row]], found.pictures.ranks[[row]])
        assert found.scores[row] == pytest.approx(alone, abs=1e-12)
    rows = table(place / "labels.csv")
    others = ["subject", "note", "score of the data"]
    assert [*rows[0]] == ["file", "row", "part", "given", "predicted", "score", "fold", *others]
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert len({row["file"] for row in rows}) == 24
    for row in rows:
        number = int(row["file"][1:-4])
        assert row["row"] == str(number + 1)
        assert row["given"] == str(number % 3)
        assert row["subject"] == f"s{number // 6}"
        assert row["note"] == "'" + HOSTILE
        assert row["score of the data"] == f"-{number}"
        assert row["fold"] == str(found.folds[list(found.pictures.names).index(row["file"])])


def test_the_page_is_one_file_and_escapes(kept):
    _, place, found, _ = kept
    text = (place / "audit.html").read_text(encoding="utf-8")
    assert not re.search(r"<script|<b>|src=\"(?!data:image/jpeg;base64,)|href=", text)
    assert text.count("<img ") >= 24
    worst = found.order[0]
    assert text.index(found.pictures.names[int(worst)]) < text.index(found.pictures.names[int(found.order[5])])


def test_the_run_folder_stays_as_it_is(kept):
    run, place, _, before = kept
    assert content(run) == before
    assert sorted(path.name for path in place.iterdir()) == [
        "audit.html",
        "audit.json",
        "folds",
        "labels.csv",
        "near_duplicates.csv",
    ]


def test_a_wrong_label_comes_first(tmp_path):
    """One of 48 pictures whose brightness is their grade has another label."""
    write_pictures(tmp_path, 48)
    text = (tmp_path / "labels.csv").read_text().replace("p30.png,0,", "p30.png,2,")
    (tmp_path / "labels.csv").write_text(text)
    run = run_in(tmp_path, "train.max_steps=40", "train.eval_every=20", "method=cross_entropy", "data.group=''")
    found, place = audit(run, folds=2, quiet=True)
    assert place == run / "audit"
    assert table(place / "labels.csv")[0]["file"] == "p30.png"
    assert found.scores[found.order[0]] > 1.5 * found.scores[found.order[1]]
    assert "hardly know the pictures" not in (place / "audit.html").read_text()


def test_without_a_distribution_errors_sort_and_the_page_says_so(tmp_path):
    write_pictures(tmp_path, 12)
    run = run_in(tmp_path, "method=l1", "data.group=''")
    found, place = audit(run, folds=2, quiet=True)
    np.testing.assert_array_equal(found.scores, np.abs(found.answers - found.pictures.values))
    text, labels = (place / "audit.html").read_text(), found.pictures.values
    assert "gives no distribution" in text
    error, constant = np.abs(found.answers - labels).mean(), np.abs(labels - np.median(labels)).mean()
    assert error > 0.8 * constant  # after so few steps
    assert f"err by {error:.3g}, always answering the median label by {constant:.3g}: they hardly know" in text


@pytest.mark.slow
def test_draws_leave_no_label_out(tmp_path):
    write_pictures(tmp_path, 24)
    run = run_in(tmp_path, "data.shots=2", "data.group=''")
    found, _ = audit(run, folds=2, quiet=True)
    assert len(found.scores) == 24


# ---- interruptions, folders


def test_an_interrupted_audit_goes_on(kept, tmp_path, monkeypatch):
    """Stopped in the second fold, between two steps; finished folds are not trained again."""
    run, place, found, _ = kept

    class Stopped(KeyboardInterrupt):
        pass

    steps, step = [], Learner.step

    def stopping(self, now, *batch):
        if len(steps) == 7:
            raise Stopped
        steps.append((self.config.output_dir, now))
        return step(self, now, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", stopping)
        with pytest.raises(SystemExit, match="told to stop; 1 of 3 folds are done, the same command goes on"):
            audit(run, tmp_path / "out", folds=3, quiet=True)
    assert not (tmp_path / "out/labels.csv").exists()

    def counting(self, now, *batch):
        steps.append((self.config.output_dir, now))
        return step(self, now, *batch)

    monkeypatch.setattr(Learner, "step", counting)
    again, other = audit(run, tmp_path / "out", folds=3, quiet=True)
    assert (other / "labels.csv").read_bytes() == (place / "labels.csv").read_bytes()
    assert (other / "near_duplicates.csv").read_bytes() == (place / "near_duplicates.csv").read_bytes()
    assert len([each for each in steps if each[0].endswith("folds/0")]) == 4
    np.testing.assert_array_equal(again.scores, found.scores)


@pytest.mark.slow
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_killed_audit_goes_on(kept, tmp_path, jobs):
    """A real process is killed once its first fold is done, and the same command comes to the same labels."""
    run, place, _, _ = kept
    words = ["audit", str(run), "--out", str(tmp_path / "out"), "--folds", "3", "--jobs", jobs, "-q"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen([sys.executable, "-m", "ordinalclip", *words], env=environment)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out").glob("folds/*/metrics.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list((tmp_path / "out").glob("folds/*/metrics.json"))
    assert not (tmp_path / "out/labels.csv").exists()
    assert subprocess.run([sys.executable, "-m", "ordinalclip", *words], env=environment, check=False).returncode == 0
    assert (tmp_path / "out/labels.csv").read_bytes() == (place / "labels.csv").read_bytes()


def test_what_is_there_is_not_replaced_without_being_told(kept, tmp_path, monkeypatch):
    run, place, _, _ = kept
    before = content(place)
    with pytest.raises(FolderOccupied, match="holds this audit, finished; --overwrite"):
        audit(run, place, folds=3, quiet=True)
    with pytest.raises(FolderOccupied, match="another audit: it has 3 folds, not 2; --overwrite replaces it"):
        audit(run, place, folds=2, quiet=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("all of it")
    for overwrite in (False, True):
        with pytest.raises(FolderOccupied, match=r"mine holds thesis\.tex, and no audit"):
            audit(run, tmp_path / "mine", folds=3, overwrite=overwrite, quiet=True)
    assert (tmp_path / "mine/thesis.tex").read_text() == "all of it"
    with lock(place / "run.lock"), pytest.raises(OSError, match="is in use by process"):
        audit(run, place, folds=3, quiet=True)
    assert content(place) == before
    monkeypatch.setattr(audits, "train_one", None)  # the same audit is written again without training
    audit(run, place, folds=3, top=3, overwrite=True, quiet=True)
    assert (place / "audit.html").read_text().count("<img ") < 24
    assert content(place)[place / "labels.csv"] == before[place / "labels.csv"]


@pytest.mark.slow
def test_a_fold_that_diverges_or_breaks_off_is_an_error(tmp_path):
    write_pictures(tmp_path, 12)
    run = run_in(tmp_path, "data.group=''")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(re.sub(r"( lr: ).*", r"\g<1>100.0", text, count=1))
    with pytest.raises(ValueError, match=r"folds/0: diverged: step"):
        audit(run, folds=2, quiet=True)
    assert not (run / "audit/labels.csv").exists()


def test_the_command(kept, tmp_path, capsys):
    run, _, found, _ = kept
    assert main(["audit", str(run), "--out", str(tmp_path / "out"), "--folds", "3", "--top", "5", "-q"]) == 0
    printed = capsys.readouterr().out
    worst = int(found.order[0])
    assert f"{found.pictures.names[worst]}: given {found.given(worst)}, predicted" in printed
    assert main(["audit", str(run), "--out", str(tmp_path / "out"), "train.lr=1", "-q"]) == 2
    assert "train.lr: the run says what is trained; allowed are data.cache_mb" in capsys.readouterr().err


# ---- near-duplicates


def test_mirrors_and_recompressed_copies_are_found_and_others_are_not():
    """Features that hardly move under a mirror, among others in random directions."""
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8)).resize((64, 64)) for _ in range(60)]
    pictures += [ImageOps.mirror(pictures[3]), pictures[7].resize((40, 40)), pictures[9]]
    features = rng.normal(size=(63, 24)) + 5
    features[60] = features[3] + 0.2 * rng.normal(size=24)
    features[62] = features[9]
    features[20] = features[30] + 0.01  # similar to the encoder alone
    ids = np.asarray([*range(62), 9])
    thumbnails = np.stack([thumbnail(picture) for picture in pictures])
    found, expected = similar(features, ids, thumbnails), {(3, 60), (7, 61), (9, 62)}
    assert {(pair.first, pair.second) for pair in found} == expected
    assert [pair.cosine for pair in found] == sorted((pair.cosine for pair in found), reverse=True)
    assert {(pair.first, pair.second) for pair in similar(features, ids, thumbnails, chunk=7)} == expected


def test_pairs_are_similar_as_seen_from_both():
    """On a circle, in degrees: from 0 the picture at 10 is much nearer than the tenth, at 27; from 10 that is at 17."""
    degrees = np.asarray([0, 10, *np.linspace(22, 27, 9)])
    rng = np.random.default_rng(0)
    thumbnails = 50 * rng.normal(size=1024) + 20 * rng.normal(size=(22, 1024))

    def pairs(degrees):
        angles = np.deg2rad([*degrees, *(degrees + 180)])  # so that their mean is 0
        features = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        return {(pair.first, pair.second) for pair in similar(features, np.arange(22), thumbnails)}

    assert (0, 1) not in pairs(degrees)
    assert (0, 1) in pairs(np.asarray([0, 8, *degrees[2:]]))


def test_pairs_of_the_page_name_parts_and_labels(tmp_path, monkeypatch):
    write_pictures(tmp_path, 24)
    gradient = Image.linear_gradient("L").convert("RGB")
    gradient.save(tmp_path / "p0.png")
    gradient.resize((200, 200)).save(tmp_path / "p1.png")
    run = run_in(tmp_path, "data.group=''")
    _, place = audit(run, folds=2, quiet=True)
    rows = table(place / "near_duplicates.csv")
    (pair,) = [row for row in rows if {row["file 1"], row["file 2"]} == {"p0.png", "p1.png"}]
    assert pair["labels differ"] == "yes"
    assert pair["in two parts"] == ("yes" if pair["part 1"] != pair["part 2"] else "no")
    assert {pair["given 1"], pair["given 2"]} == {"0", "1"}
    assert json.loads((place / "audit.json").read_text())["folds"] == 2
    assert "there may be more" not in (place / "audit.html").read_text()
    monkeypatch.setattr("ordinalclip.audit.MOST_SIMILAR", len(rows))
    audit(run, folds=2, overwrite=True, quiet=True)
    assert f"the {len(rows):,} most similar pairs are listed; there may be more" in (place / "audit.html").read_text()
