"""Data sets as their owners distribute them -> tables with the published splits."""

import csv
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import downloads
import numpy as np
import pandas as pd
import pytest
from downloads import MAKERS, Pictures

from ordinalclip.cli import main
from ordinalclip.compare import load_plan
from ordinalclip.config import load_config, read_prepared
from ordinalclip.data import load_parts
from ordinalclip.data.duplicates import RepeatedPictures
from ordinalclip.recipes import NAMES, recipe
from ordinalclip.recipes.adience import group_of
from ordinalclip.recipes.base import TEST, TRAIN, UNUSED, VALIDATION, Copies, LayoutError, Row
from ordinalclip.recipes.parts import between, deal, without
from ordinalclip.recipes.prepare import prepare


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Prepared folders of made-up downloads, by name of the recipe; and what was said."""
    root = tmp_path_factory.mktemp("recipes")
    said = {}
    for name, make in MAKERS.items():
        make(root / f"{name}-download")
        said[name] = prepare(name, root / f"{name}-download", root / name, quiet=True)
    return root, said


def table(folder):
    with (folder / "table.csv").open(newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def parts_of(folder, data="data.yaml", *overrides):
    config = load_config(None, ["method=l1", *overrides], folder / data)
    return load_parts(config.data, config.ranks, config.seed)


def names(part):
    return set(part.names[:])


def test_every_recipe_has_a_made_up_download_and_is_listed(capsys):
    assert set(NAMES) == set(MAKERS)
    assert main(["prepare"]) == 0
    listed = capsys.readouterr().out
    for name in NAMES:
        made = recipe(name)
        assert made.name == name
        assert f"{name} " in listed
        assert made.licence in listed
        assert made.citation
        assert made.parts == {} or made.counted_by
    assert main(["prepare", "morph"]) == 0
    assert "Album2/PERSON_NUMBERsexAGE.JPG" in capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_what_runs_by_default_has_no_picture_and_nobody_in_two_parts(made, name):
    """Every split of data.yaml is read as a run reads it, which refuses copies, two labels and groups in two parts."""
    root, _ = made
    prepared = read_prepared(root / name)
    assert prepared.recipe == name
    data = prepared.layer.content["data"]
    assert data["duplicates"] == "refuse"
    columns = [split["data.split_column"] for split in prepared.splits] or [str(data["split_column"])]
    rows = {row["image"]: row for row in table(root / name)}
    for column in columns:
        parts = parts_of(root / name, "data.yaml", f"data.split_column={column}")
        assert len(parts.train) > len(parts.test) > 0
        assert len(parts.validation) > 0
        if "subject" in next(iter(rows.values())):
            assert data["group"] == "subject"
            people = [
                {rows[path]["subject"] for path in names(part)} for part in (parts.train, parts.validation, parts.test)
            ]
            assert not people[0] & people[1]
            assert not people[0] & people[2]
            assert not people[1] & people[2]


@pytest.mark.parametrize("name", NAMES)
def test_a_comparison_of_its_name_runs_on_the_prepared_folder(made, name):
    root, _ = made
    given = ["model.backbone=tiny", "model.text="]
    plan = load_plan(name, given, root / name)
    splits = read_prepared(root / name).splits
    if name != "elpv":
        assert plan.config.recipe == name
        with pytest.raises(ValueError, match=f"ordinalclip prepare {name} --from DOWNLOAD --to FOLDER"):
            load_plan(name, given)
    for place, run in plan.runs.items():
        assert run.data.root == str((root / f"{name}-download").resolve())
        if splits:
            number = plan.seeds.index(place.seed) % len(splits)
            assert run.data.split_column == splits[number]["data.split_column"]
    assert len({run.method for run in plan.runs.values()}) >= 12


def test_how_the_parts_are_made_stands_above_the_table(made):
    root, _ = made
    given = ["model.backbone=tiny", "model.text="]

    def title(name, data="data.yaml"):
        return load_plan(name, given, root / name / data).config.title

    assert title("adience") == "Adience, eight age groups. Parts: the five official folds, as published."
    assert title("morph") == "MORPH II, ages 16 to 77. Parts: setting D, by person, without what they share."
    published = title("morph", "A.yaml")
    assert re.search(
        r"A, by picture, as published: \d+% of the test pictures show somebody of the training part\.", published
    )
    assert title("utkface", "coral.yaml").endswith("as published: 2 files are copies across parts.")
    assert title("hci").endswith("Parts: ten draws of 210 / 5 / 50 a decade, drawn here.")


def test_a_run_takes_a_prepared_folder_over_its_configuration(made):
    root, _ = made
    config = load_config("adience", ["data.workers=0"], root / "adience")
    assert (config.data.train_table, config.data.split_column, config.data.workers) == ("", "fold_0", 0)
    assert config.ranks.names is not None
    assert config.ranks.names[-1] == "60 and older"
    assert load_config("bone_age", [], root / "rsna").ranks.high == 228
    assert load_config("hci", ["data.split_column=draw_7"], root / "hci").data.split_column == "draw_7"


def test_a_comparison_refuses_the_folder_of_another_data_set(made):
    with pytest.raises(ValueError, match="compares on adience; the folder of --data holds utkface"):
        load_plan("adience", [], made[0] / "utkface")


# ---- what is said and counted


def test_counts_stand_beside_the_published_ones(made):
    said = made[1]
    assert "UTKFace: 61 pictures (published 23,708: 23,647 fewer), labels 20 to 64 years" in said["utkface"]
    assert any("no published count known" in line for line in said["agedb"])
    assert "left out, faces whose name does not begin with an age: 1" in said["utkface"]
    assert any(line.startswith("names that lack the gender or race: 1") for line in said["utkface"])
    assert "left out, faces without an age: 1" in said["adience"]
    assert "left out, faces whose age lies in none of the eight groups: 2" in said["adience"]
    assert "left out, listed photos that are not there: 3" in said["aesthetics"]
    assert any(
        line.startswith("byte-identical pictures: 2 groups, 4 files, 1 groups with two labels")
        for line in said["aptos"]
    )
    for name, lines in said.items():
        assert f"licence: {recipe(name).licence}" in lines
        assert f"cite: {recipe(name).citation}" in lines
        assert any(line.startswith(f"next: ordinalclip compare {name} --data ") for line in lines)


def test_the_coral_split_is_kept_exactly_and_is_not_the_default(made):
    root, said = made
    rows = {row["image"].rpartition("/")[2]: row for row in table(root / "utkface")}
    for part, file in (("train", "utk_train.csv"), ("test", "utk_test.csv")):
        with (root / "utkface-download" / file).open() as opened:
            listed = {row["file"] for row in csv.DictReader(opened)}
        wanted = {part, "validation"} if part == "train" else {part}
        assert {name for name, row in rows.items() if row["coral"] in wanted} == listed
    assert any("2 files are copies across parts; 2 files have two labels" in line for line in said["utkface"])
    lost = [row for row in rows.values() if row["coral"] != row["coral_clean"]]
    assert {row["coral_clean"] for row in lost} == {UNUSED}
    assert Counter(int(row["label"]) for row in lost) == {
        25: 1,
        26: 1,
        40: 1,
    }  # of the copies across parts the test one stays
    published = parts_of(root / "utkface", "coral.yaml")
    assert sum(map(len, (published.train, published.validation, published.test))) == sum(
        row["coral"] != UNUSED for row in rows.values()
    )
    with pytest.raises(RepeatedPictures):
        parts_of(root / "utkface", "coral.yaml", "data.duplicates=refuse")
    found = list(csv.DictReader((root / "utkface" / "duplicates.csv").open()))
    assert Counter(row["what"] for row in found) == {"same picture": 2, "same picture, two labels": 2}
    assert {row["parts"].partition(" ")[0] for row in found} >= {"coral=test"}


def test_without_the_lists_utkface_has_all_ages(tmp_path):
    downloads.utkface(tmp_path / "from", coral=False)
    said = prepare("utkface", tmp_path / "from", tmp_path / "to", quiet=True)
    assert any(line.startswith("no CORAL split: utk_train.csv") for line in said)
    assert not (tmp_path / "to" / "coral.yaml").exists()
    assert len(read_prepared(tmp_path / "to").splits) == 5


def test_ages_of_adience():
    assert [group_of(*ages) for ages in ((0, 2), (8, 12), (27, 32), (38, 42), (13, 13), (60, 100))] == [
        0,
        2,
        4,
        5,
        2,
        7,
    ]
    assert [group_of(*ages) for ages in ((8, 23), (38, 48), (35, 35), (3, 3), (46, 46))] == [None] * 5


def test_folds_of_adience_are_the_official_ones(made):
    rows = table(made[0] / "adience")
    for row in rows:
        assert [row[f"fold_{fold}"] == "test" for fold in range(5)] == [str(fold) == row["fold"] for fold in range(5)]
        assert all(row[f"fold_{fold}"] != UNUSED for fold in range(5))


def test_morph_a_is_as_published_with_everybody_who_leaks(made):
    root, said = made
    parts = parts_of(root / "morph", "A.yaml")
    assert (len(parts.train) + len(parts.validation), len(parts.test)) == (40, 10)
    assert any("of the test pictures show somebody of the training part" in line for line in said["morph"])
    with pytest.raises(ValueError, match=r"subject '\d+' \(data.group\) is in two of the given parts"):
        parts_of(root / "morph", "A.yaml", "data.group=subject")
    assert any(line.startswith("D_0_clean: D_0 without what its parts share: ") for line in said["morph"])
    people = [row for row in csv.DictReader((root / "morph" / "duplicates.csv").open()) if row["what"] == "same person"]
    assert any("D_0=" in row["parts"] for row in people if row["subject"] == "100000")
    b = parts_of(root / "morph", "B.yaml")
    assert (len(b.train) + len(b.validation), len(b.test)) == (20, 40)


def test_without_setting_d_morph_is_divided_by_person(tmp_path):
    downloads.morph(tmp_path / "from", "A")
    said = prepare("morph", tmp_path / "from", tmp_path / "to", quiet=True)
    assert any(line.startswith("no lists of setting B, C, D") for line in said)
    assert read_prepared(tmp_path / "to").layer.content["data"]["split_column"] == "people_0"


def test_hci_draws_have_the_customary_shares(made):
    rows = table(made[0] / "hci")
    for draw in range(10):
        found = Counter((row["label"], row[f"draw_{draw}"]) for row in rows)
        assert {found[label, "test"] for label in "01234"} == {5}
        assert {found[label, "validation"] for label in "01234"} == {1}
    assert len({tuple(row[f"draw_{draw}"] for row in rows) for draw in range(10)}) == 10


def test_agedb_dir_is_published_and_by_person_is_the_default(made):
    root, _ = made
    rows = table(root / "agedb")
    with (root / "agedb-download" / "agedb.csv").open() as opened:
        listed = {row["path"]: {"val": "validation"}.get(row["split"], row["split"]) for row in csv.DictReader(opened)}
    assert {row["image"]: row["dir"] for row in rows} == listed
    assert read_prepared(root / "agedb").layer.content["data"]["split_column"] == "people_0"


def test_rsna_without_its_other_parts_is_divided(made, tmp_path):
    parts = parts_of(made[0] / "rsna")
    assert [len(part) for part in (parts.train, parts.validation, parts.test)] == [40, 10, 6]
    assert parts.test.values.tolist() == [30.5 + 20 * number for number in range(6)]
    downloads.rsna(tmp_path / "from", whole=False)
    said = prepare("rsna", tmp_path / "from", tmp_path / "to", quiet=True)
    assert any("Validation Dataset.csv and Bone age ground truth.xlsx not there" in line for line in said)


def test_an_excel_table_of_rsna_is_read(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    downloads.rsna(tmp_path / "from")
    truth = tmp_path / "from/Bone Age Test Set/Bone age ground truth.csv"
    book = openpyxl.Workbook()
    for line in truth.read_text().splitlines():
        book.active.append([float(cell) if cell.replace(".", "").isdigit() else cell for cell in line.split(",")])
    book.save(truth.with_suffix(".xlsx"))
    truth.unlink()
    prepare("rsna", tmp_path / "from", tmp_path / "to", quiet=True)
    assert parts_of(tmp_path / "to").test.values.tolist() == [30.5 + 20 * number for number in range(6)]


def test_labels_are_the_owners(made):
    root, _ = made
    assert Counter(row["label"] for row in table(root / "elpv")) == dict.fromkeys("0123", 10)
    assert {row["module_type"] for row in table(root / "elpv")} == {"mono", "poly"}
    photo = next(row for row in table(root / "aesthetics") if row["image"].endswith("/1008.jpg"))
    assert (photo["label"], photo["category"]) == ("3", "people")
    assert next(row for row in table(root / "koniq") if row["image"].endswith("10001.jpg"))["label"] == "21.25"
    grades = {row["image"].rpartition("/")[2]: row["label"] for row in table(root / "knee")}
    assert (grades["9000003L.png"], "9000099L.png" in grades) == ("3", False)
    assert {row["label"] for row in table(root / "idrid")} == set("01234")


def test_a_category_of_aesthetics_by_itself(made):
    root, _ = made
    parts = parts_of(root / "aesthetics", "nature.yaml")
    categories = {row["image"]: row["category"] for row in table(root / "aesthetics")}
    assert {categories[name] for part in (parts.train, parts.validation, parts.test) for name in names(part)} == {
        "nature"
    }


# ---- parts


def random_rows(rng, number=60):
    """Rows with few people and few pictures, so that much leaks."""
    rows = [
        Row(
            f"{place}.png",
            float(rng.integers(3)),
            f"p{rng.integers(25)}",
            {},
            {"split": str(rng.choice([TRAIN, VALIDATION, TEST]))},
        )
        for place in range(number)
    ]
    groups = [[rows[place].path for place in chunk] for chunk in rng.permutation(number)[:20].reshape(10, 2)]
    return rows, Copies(groups)


@pytest.mark.parametrize("seed", range(10))
def test_what_is_cleaned_shares_nothing_and_keeps_the_test_part(seed):
    rows, copies = random_rows(np.random.default_rng(seed))
    cleaned = without(rows, "split", copies)
    twice = set(between(rows, "split", copies).labels)
    for row in rows:
        assert cleaned[row.path] in (row.parts["split"], UNUSED)
        if row.parts["split"] == TEST:
            assert (cleaned[row.path] == TEST) == (row.path not in twice)
        row.parts["clean"] = cleaned[row.path]
    found = between(rows, "clean", copies)
    assert not found.copies
    assert not found.labels
    assert not found.people
    assert not found.seen
    assert between(rows, "split", copies).people


@pytest.mark.parametrize("seed", range(5))
def test_dealing_keeps_people_and_copies_together_whatever_the_order(seed):
    rng = np.random.default_rng(seed)
    rows, copies = random_rows(rng)
    piles = dict(zip((row.path for row in rows), deal(rows, copies, [0.5, 0.3, 0.2]), strict=True))
    for row in rows:
        assert {piles[other.path] for other in rows if other.subject == row.subject} == {piles[row.path]}
    for group in copies.groups:
        assert len({piles[path] for path in group}) == 1
    shuffled = [rows[place] for place in rng.permutation(len(rows))]
    assert piles == dict(zip((row.path for row in shuffled), deal(shuffled, copies, [0.5, 0.3, 0.2]), strict=True))


def test_dealing_is_even_over_labels():
    rows = [Row(f"{place}.png", float(place % 4)) for place in range(80)]
    piles = deal(rows, Copies([]), [0.2] * 5)
    assert set(Counter((row.label, pile) for row, pile in zip(rows, piles, strict=True)).values()) == {4}


# ---- refusals


@pytest.mark.parametrize("name", NAMES)
def test_another_layout_is_refused_with_what_was_looked_for_and_found(name, tmp_path):
    other = "koniq" if name == "hci" else "hci"
    MAKERS[other](tmp_path / "from")
    top = {"hci": "HistoricalColor-ECCV2012/", "koniq": "1024x768/"}[other]
    with pytest.raises(LayoutError, match=rf"looked for .*, found {top}.*`ordinalclip prepare {name}` says"):
        prepare(name, tmp_path / "from", tmp_path / "to", quiet=True)
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"aesthetics", "hci", "knee", "utkface"}))
def test_pictures_that_a_table_lists_have_to_be_there(name, tmp_path):
    MAKERS[name](tmp_path / "from")
    pictures = sorted(path for path in (tmp_path / "from").rglob("*") if path.suffix.lower() in (".jpg", ".png"))
    pictures[3].unlink()
    with pytest.raises(LayoutError, match=r"(is not below .*, as 1 of the \d+ pictures listed there are not)"):
        prepare(name, tmp_path / "from", tmp_path / "to", quiet=True)


def test_nothing_is_replaced_silently(tmp_path):
    downloads.elpv(tmp_path / "from")
    source, target = tmp_path / "from", tmp_path / "to"
    prepare("elpv", source, target, quiet=True)
    before = {path: path.stat().st_mtime_ns for path in target.iterdir()}
    prepare("elpv", source, target, quiet=True)  # the same
    assert {path: path.stat().st_mtime_ns for path in target.iterdir()} == before
    labels = source / "labels.csv"
    labels.write_text(labels.read_text().replace("0.0 ", "1.0 ", 1))
    with pytest.raises(FileExistsError, match="holds elpv prepared from other files or in another way; --overwrite"):
        prepare("elpv", source, target, quiet=True)
    prepare("elpv", source, target, overwrite=True, quiet=True)
    assert table(target)[0]["label"] == "3"
    (target / "notes.txt").write_text("mine")
    labels.write_text(labels.read_text().replace("1.0 ", "0.0 ", 1))
    with pytest.raises(FileExistsError, match=r"notes\.txt is not of a prepared folder"):
        prepare("elpv", source, target, overwrite=True, quiet=True)
    shutil.rmtree(target)
    target.mkdir()
    (target / "other.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds other\.txt already"):
        prepare("elpv", source, target, overwrite=True, quiet=True)


def test_links_to_folders_are_followed_but_in_no_circle(tmp_path):
    downloads.hci(tmp_path / "store")
    (tmp_path / "from").mkdir()
    (tmp_path / "from/decade_database").symlink_to(
        tmp_path / "store/HistoricalColor-ECCV2012/data/imgs/decade_database", target_is_directory=True
    )
    (tmp_path / "from/again").symlink_to(tmp_path / "from", target_is_directory=True)
    assert prepare("hci", tmp_path / "from", tmp_path / "to", quiet=True)[0].startswith(
        "Historical Colour Images: 130 pictures"
    )


def test_links_that_lead_out_are_said_and_allowed(tmp_path):
    downloads.elpv(tmp_path / "store")
    (tmp_path / "from").mkdir()
    (tmp_path / "from/labels.csv").write_text((tmp_path / "store/labels.csv").read_text())
    (tmp_path / "from/images").mkdir()
    for path in (tmp_path / "store/images").iterdir():
        (tmp_path / "from/images" / path.name).symlink_to(path)
    said = prepare("elpv", tmp_path / "from", tmp_path / "to", quiet=True)
    assert any("links that lead out" in line for line in said)
    assert len(parts_of(tmp_path / "to").train) == 24


def test_the_record_says_where_it_comes_from(made):
    root, said = made
    record = json.loads((root / "idrid" / "prepared.json").read_text())
    assert record["recipe"] == "idrid"
    assert Path(record["from"]) == (root / "idrid-download").resolve()
    assert record["citation"] == recipe("idrid").citation
    assert record["counted"][0] in said["idrid"]
    assert "CC BY 4.0" in (root / "idrid" / "README.md").read_text()


def test_seeds_and_splits(made, caplog):
    """A comparison goes over splits with its seeds, round and round, and nothing else may divide the data."""
    root, _ = made
    given = ["model.backbone=tiny", "model.text="]
    plan = load_plan("adience", [*given, "seeds=[1, 2, 3, 4, 5, 6, 7]"], root / "adience")
    columns = {place.seed: run.data.split_column for place, run in plan.runs.items()}
    assert columns == {seed: f"fold_{(seed - 1) % 5}" for seed in range(1, 8)}
    load_plan("adience", [*given, "seeds=[1, 2]"], root / "adience")
    assert "2 seeds take 2 of 5 splits" in caplog.text
    for override, what in (
        ("data.split_column=fold_0", "data.split_column is set on the command line and by splits"),
        ("variants={a: {}, b: {data.split_column: fold_1}}", "data.split_column is set by variants and by splits"),
        ("splits=[{train.lr: 1}]", "splits say how the data is divided, in keys that begin with data., got train.lr"),
    ):
        with pytest.raises(ValueError, match=what):
            load_plan("adience", [*given, override], root / "adience")


@pytest.mark.slow
def test_a_comparison_over_published_folds_tests_every_picture_once(made, tmp_path, capsys):
    root, _ = made
    (tmp_path / "mine.yaml").write_text(
        f"recipe: adience\noutput_dir: {tmp_path}/out\nseeds: [1, 2, 3, 4, 5]\njobs: 2\n"
        "base:\n  model: {backbone: tiny}\n  train: {max_steps: 2, batch_size: 8}\n"
        "methods:\n  L1: {base: {method: l1}}\n  constant: {base: {method: constant}}\n"
    )
    assert main(["compare", str(tmp_path / "mine.yaml"), "--data", str(root / "adience"), "-q"]) == 0
    assert "| constant |" in capsys.readouterr().out
    tested = []
    for fold in range(5):
        [run] = (tmp_path / "out/runs").rglob(f"constant-0-seed{fold + 1}")
        rows = pd.read_parquet(run / "predictions.parquet")
        of_fold = rows.row[rows.part == "test"].tolist()
        assert {row["fold"] for row in table(root / "adience") if row["image"] in of_fold} == {str(fold)}
        tested += of_fold
    assert sorted(tested) == sorted(row["image"] for row in table(root / "adience"))


def test_pictures_written_by_the_helper_differ(tmp_path):
    picture = Pictures(tmp_path)
    picture("a.png"), picture("b.png"), picture("c.png", 1), picture("d.png", 1)
    content = {name: (tmp_path / f"{name}.png").read_bytes() for name in "abcd"}
    assert content["a"] != content["b"]
    assert content["c"] == content["d"]


def test_the_page_has_every_recipe_with_its_licence():
    page = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text(encoding="utf-8")
    for name in NAMES:
        assert page.count(f"| `{name}` |") == 2  # in the table of splits and in that of licences
        for number in {recipe(name).pictures, *(number for part in recipe(name).parts.values() for number in part)} - {
            None
        }:
            assert f"{number:,}" in page or name == "hci" or name == "idrid", (name, number)


@pytest.mark.parametrize("name", NAMES)
def test_any_folder_above_the_download_gives_the_same_split(name, made, tmp_path):
    """What is drawn hangs on names below the download's own folders alone."""
    root, _ = made
    MAKERS[name](tmp_path / "somewhere" / "else" / "download")
    prepare(name, tmp_path / "somewhere", tmp_path / "deep", quiet=True)
    shallow, deep = (
        {row["image"].rpartition("/")[2]: row for row in table(at)} for at in (root / name, tmp_path / "deep")
    )
    assert shallow.keys() == deep.keys()
    for key, row in shallow.items():
        assert {**row, "image": ""} == {**deep[key], "image": ""}


@pytest.mark.parametrize(
    "name, folder", [("aptos", "train_images"), ("idrid", "a. Training Set"), ("adience", "aligned"), ("rsna", "")]
)
def test_two_pictures_of_one_name_are_refused(name, folder, tmp_path):
    """A folder of thumbnails inside that of the pictures, which would be taken for some of them."""
    MAKERS[name](tmp_path / "download")
    pictures = sorted(path for path in (tmp_path / "download").rglob("*.*g") if folder in path.as_posix())
    first = next(path for path in pictures if "training" in path.as_posix().lower() or name != "rsna")
    small = first.parent / "small" / first.name
    if name == "adience":  # known by user and name
        small = first.parent.parent / "small" / first.parent.name / first.name
    small.parent.mkdir(parents=True)
    shutil.copy(first, small)
    with pytest.raises(LayoutError, match=f"both .*{re.escape(first.name)} and .*{re.escape(first.name)} are there"):
        prepare(name, tmp_path / "download", tmp_path / "prepared", quiet=True)


def test_folders_above_do_not_say_the_part_of_rsna(tmp_path):
    MAKERS["rsna"](tmp_path / "latest")
    said = prepare("rsna", tmp_path, tmp_path.parent / "prepared-rsna", quiet=True)
    assert "challenge" in " ".join(said)


def test_a_file_of_ones_own_in_a_prepared_folder_is_never_replaced(tmp_path):
    downloads.elpv(tmp_path / "one")
    downloads.aptos(tmp_path / "two")
    prepare("elpv", tmp_path / "one", tmp_path / "prepared", quiet=True)
    mine = tmp_path / "prepared" / "mine.yaml"
    mine.write_text("extends: data.yaml\n")
    with pytest.raises(FileExistsError, match=r"mine\.yaml is not of a prepared folder"):
        prepare("aptos", tmp_path / "two", tmp_path / "prepared", overwrite=True, quiet=True)
    assert mine.exists()
    mine.unlink()
    prepare("aptos", tmp_path / "two", tmp_path / "prepared", overwrite=True, quiet=True)
    assert not (tmp_path / "prepared" / "seeds.yaml").exists()


@pytest.mark.parametrize("name, file", [("elpv", "labels.csv"), ("utkface", "utk_train.csv")])
def test_text_that_is_not_utf_8_is_refused_by_name(name, file, tmp_path):
    MAKERS[name](tmp_path / "download")
    (found,) = (tmp_path / "download").rglob(file)
    found.write_bytes("é".encode("latin-1") + found.read_bytes())
    with pytest.raises(ValueError, match=f"{file}: not a text in UTF-8"):
        prepare(name, tmp_path / "download", tmp_path / "prepared", quiet=True)
