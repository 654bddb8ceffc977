"""Tables, lists, hub folders and memory -> parts; splits; errors that name file and row."""

from decimal import Decimal

import datasets
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from ordinalclip.config import DataConfig, RanksConfig, RunConfig
from ordinalclip.data import ImageCache, load_parts, make_parts
from ordinalclip.data.checks import check
from ordinalclip.data.duplicates import near_duplicates, thumbnail
from ordinalclip.images import PixelSpec
from ordinalclip.run_folder import RunFolder
from ordinalclip.runs import evaluate_run, train


def parts_of(root, ranks=None, seed=1, **options):
    options = {
        "source": "table",
        "root": str(root),
        "image_column": "file",
        "label_column": "grade",
        "duplicates": "allow",
        **options,
    }
    return load_parts(DataConfig(**options), RanksConfig(**(ranks or {})), seed)


def test_rows_that_a_split_column_leaves_out_are_counted(image_folder, caplog):
    table = image_folder / "labels.csv"
    names = ["part", "train", "train", "train", "test", "unused", "unused"]
    lines = zip(table.read_text().splitlines(), names, strict=True)
    table.write_text("\n".join(f"{line},{name}" for line, name in lines))
    parts = parts_of(image_folder, table="labels.csv", split_column="part")
    assert (len(parts.train), len(parts.test)) == (3, 1)
    assert "labels.csv: 2 of 6 rows are unused by column 'part'" in caplog.text


def test_csv_with_a_split_column(image_folder):
    table = image_folder / "labels.csv"
    lines = table.read_text().splitlines()
    names = ["part", "train", "train", "train", "validation", "test", "test"]
    table.write_text("\n".join(f"{line},{name}" for line, name in zip(lines, names, strict=True)))
    parts = parts_of(image_folder, table="labels.csv", split_column="part")
    assert [len(parts.train), len(parts.validation), len(parts.test)] == [3, 1, 2]
    assert parts.ranks.values == (0, 1, 2)
    assert parts.test.ranks.tolist() == [1, 2]
    assert np.asarray(parts.test.image(1)).mean() == pytest.approx(160 + 30, abs=4)
    table.write_text(table.read_text().replace("validation", "holdout"))
    with pytest.raises(ValueError, match=r"row 4 \(line 5\): column 'part' .*says 'holdout'; allowed are train"):
        parts_of(image_folder, table="labels.csv", split_column="part")


def test_parquet_list_file_and_hub_folder_agree_with_csv(image_folder):
    rows = datasets.Dataset.from_csv(str(image_folder / "labels.csv"))
    rows.to_parquet(str(image_folder / "labels.parquet"))
    lines = [f"{row['file']} {row['grade']} {row['grade']} 2" for row in rows]
    (image_folder / "list.txt").write_text("\n".join(lines) + "\n")
    (image_folder / "metadata.csv").write_text((image_folder / "labels.csv").read_text().replace("file,", "file_name,"))
    from_csv = parts_of(image_folder, table="labels.csv", split=(1, 0, 0))
    for part in (
        parts_of(image_folder, table="labels.parquet", split=(1, 0, 0)).train,
        parts_of(image_folder, train_table="list.txt").train,  # the median of (g, g, 2) is g
        load_parts(
            DataConfig(source="hub", hub=str(image_folder), label_column="grade", split=(1, 0, 0)), RanksConfig(), 1
        ).train,
    ):
        assert part.values.tolist() == from_csv.train.values.tolist()
        assert (np.asarray(part.image(4)) == np.asarray(from_csv.train.image(4))).all()


def test_stratified_split_keeps_shares_and_is_a_function_of_the_seed(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    rows = ["file,grade,kind"] + [f"a.png,{number % 4},{'xyz'[number % 3]}" for number in range(240)]
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    options = {"table": "labels.csv", "stratify": ["grade", "kind"], "split": (0.6, 0.15, 0.25)}
    parts = parts_of(tmp_path, **options)
    assert [len(parts.train), len(parts.validation), len(parts.test)] == [144, 36, 60]
    assert np.bincount(parts.test.ranks).tolist() == [15] * 4
    drawn = [[n for part in (p.train, p.validation, p.test) for n in part.rows["grade"]] for p in (parts,)]
    assert len(drawn[0]) == 240
    again, other = parts_of(tmp_path, **options), parts_of(tmp_path, seed=2, **options)
    assert again.train.rows["kind"][:] == parts.train.rows["kind"][:]
    assert other.train.rows["kind"][:] != parts.train.rows["kind"][:]
    fixed = [parts_of(tmp_path, seed=s, split_seed=5, **options).train.rows["kind"][:] for s in (1, 2)]
    assert fixed[0] == fixed[1]


@pytest.mark.parametrize("count", [3, 10, 11, 14, 27])
@pytest.mark.parametrize("split", [(0.6, 0.15, 0.25), (0.7, 0.1, 0.2), (1 / 3, 1 / 3, 1 / 3)])
def test_shares_are_rounded_to_the_nearest_row(count, split):
    """Every cut lies within half a row of where it should; every row is in one part."""
    rows = datasets.Dataset.from_dict({"image": [None] * count, "label": list(range(count))})
    parts = make_parts({"all": rows}, DataConfig(split=split), RanksConfig(low=0, high=count, num=count + 1), seed=3)
    labels = [[] if part is None else part.values.tolist() for part in (parts.train, parts.validation, parts.test)]
    assert sorted(label for part in labels for label in part) == list(range(count))
    sizes = [len(part) for part in labels]
    for cut in (1, 2):
        assert abs(sum(sizes[:cut]) - count * sum(split[:cut])) <= 0.5 + 1e-9
    if count == 10 and split[0] == 0.6:
        assert sizes == [6, 2, 2]


def test_selected_rows_keep_label_rank_and_name_together():
    """Rows are called by their place in the table, from 1, however often a part was drawn from."""
    rows = datasets.Dataset.from_dict({"image": [None] * 60, "label": [(7 * k) % 12 for k in range(60)]})
    config = DataConfig(split=(0.5, 0.2, 0.3), shots=2, train_share=0.5)
    parts = make_parts({"all": rows}, config, RanksConfig(low=0, high=11, num=12), seed=2)
    assert len(parts.train) == 12
    for part in (parts.train, parts.validation, parts.test.select([5, 0, 2])):
        for name, value, rank, row in zip(part.names, part.values, part.ranks, part.rows, strict=True):
            place = int(name.removeprefix("row ")) - 1
            assert value == row["label"] == rows[place]["label"]
            assert rank == parts.ranks.rank_of([value]).item()
    assert min(int(name[4:]) for part in (parts.train, parts.validation, parts.test) for name in part.names) >= 1
    whole = make_parts({"all": rows}, DataConfig(split=(1, 0, 0)), RanksConfig(), seed=2).train
    assert sorted(whole.names, key=lambda name: int(name[4:])) == [f"row {k + 1}" for k in range(60)]


def test_draws_are_random_rows_of_a_rank():
    """Not the first ones: over some seeds every row of a rank is drawn."""
    rows = datasets.Dataset.from_dict({"image": [None] * 12, "label": [0, 1] * 6})
    drawn = [
        make_parts({"train": rows}, DataConfig(shots=2, draw_seed=seed), RanksConfig(), 0).train for seed in range(20)
    ]
    assert {name for part in drawn for name in part.names} == {f"row {k + 1}" for k in range(12)}


def test_groups_stay_whole(image_folder):
    ranks = {"values": [0, 1, 2]}
    parts = parts_of(image_folder, ranks, table="labels.csv", group="subject", split=(1 / 3, 1 / 3, 1 / 3))
    groups = [set(part.rows["subject"]) for part in (parts.train, parts.validation, parts.test)]
    assert sorted(len(group) for group in groups) == [1, 1, 1]
    assert len(set.union(*groups)) == 3


def test_few_shot_draws_by_rank(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    rows = ["file,grade,id"] + [f"a.png,{number % 5},{number}" for number in range(100)]
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    options = {"table": "labels.csv", "split": (0.8, 0.1, 0.1)}
    few = parts_of(tmp_path, shots=3, **options)
    assert np.bincount(few.train.ranks).tolist() == [3] * 5
    whole = parts_of(tmp_path, **options)
    assert set(few.train.rows["id"]) < set(whole.train.rows["id"])
    assert few.test.rows["id"][:] == whole.test.rows["id"][:]


def test_gauges_test_part_does_not_depend_on_the_number_of_training_images():
    def test_values(num_train):
        config = DataConfig(num_train=num_train, num_validation=3, num_test=5, kinds=["tank", "dial"])
        return load_parts(config, RanksConfig(low=0, high=100, num=11), 3).test

    assert test_values(2).values.tolist() == test_values(8).values.tolist()
    assert set(test_values(2).rows["kind"]) == {"tank", "dial"}


def test_datasets_in_memory():
    config = DataConfig(image_column="picture", label_column="age", split=(0.5, 0.0, 0.5))
    images = [Image.fromarray(np.full((4, 4), 40 * k, np.uint8)) for k in range(6)]
    rows = datasets.Dataset.from_dict({"picture": images, "age": list(range(6))})
    parts = make_parts({"all": rows}, config, RanksConfig(low=0, high=5, num=6), 1)
    assert parts.validation is None
    assert [parts.train.image(i).getpixel((0, 0))[0] // 40 for i in range(3)] == parts.train.values.tolist()


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (
            lambda text: text.replace("cell3.png,0", "cell3.png,soft"),
            ValueError,
            r"labels\.csv, row 4 \(line 5\): label 'soft' .*is not a number, as 1 of 6",
        ),
        (
            lambda text: text.replace("cell3.png,0", "cell3.png,"),
            ValueError,
            r"row 4 \(line 5\): the label in column 'grade' is missing, in 1 of 6 rows; data\.missing=drop",
        ),
        (lambda text: text.replace("cell3.png", "cell9.png"), FileNotFoundError, r"1 of 6 images .*cell9\.png"),
        (
            lambda text: text.replace("grade", "level"),
            ValueError,
            r"column 'grade' \(data.label_column\) is missing; .*'level'",
        ),
        (
            lambda text: text.replace("cell5.png,2", "cell5.png,9"),
            ValueError,
            r"labels\.csv, row 6 \(line 7\), cell5\.png: label 9 is",
        ),
    ],
)
def test_bad_tables(image_folder, damage, error, message):
    table = image_folder / "labels.csv"
    table.write_text(damage(table.read_text()))
    with pytest.raises(error, match=message):
        parts_of(image_folder, {"values": [0, 1, 2]}, table="labels.csv")


def test_bad_places(image_folder):
    with pytest.raises(FileNotFoundError, match=r"none\.csv: no such table"):
        parts_of(image_folder, table="none.csv")
    (image_folder / "list.txt").write_text("cell0.png 1\n\ncell1.png old\n")
    with pytest.raises(ValueError, match=r"list\.txt, row 2 \(line 3\): label 'old' .* is not a number"):
        parts_of(image_folder, train_table="list.txt")
    (image_folder / "list.txt").write_text("cell0.png 1\n\ncell1.png 1 old\n")
    with pytest.raises(ValueError, match=r"list\.txt, line 3: write `path label"):
        parts_of(image_folder, train_table="list.txt")
    with pytest.raises(ValueError, match=r"column 'site' \(data\.stratify\) is missing"):
        parts_of(image_folder, table="labels.csv", stratify=["site"])
    rows = ["file,grade"] + [f"cell0.png,{number / 10}" for number in range(400)]
    (image_folder / "many.csv").write_text("\n".join(rows))
    with pytest.raises(ValueError, match=r"240 distinct values .* ranks.low=0 ranks.high=40 ranks.num=41"):
        parts_of(image_folder, table="many.csv")


def test_check_names_every_broken_file_and_every_copy(image_folder):
    def checked():
        config = RunConfig(data=DataConfig(source="table", root=str(image_folder), **columns))
        parts = load_parts(config.data.model_copy(update={"duplicates": "allow"}), config.ranks, 1)
        return check(parts, config, quiet=True)

    columns = {"image_column": "file", "label_column": "grade", "table": "labels.csv", "split": (1, 0, 0)}
    assert checked().problems == 0
    (image_folder / "cell1.png").write_text("no image")
    (image_folder / "cell4.png").write_bytes((image_folder / "cell0.png").read_bytes()[:300])
    (image_folder / "cell5.png").write_bytes((image_folder / "cell0.png").read_bytes())
    report = checked()
    assert report.problems == 3
    assert "cell1.png" in report.lines[0]
    assert "cell4.png" in report.lines[1]
    assert any("cell0.png (label 0) = " in line and "cell5.png (label 2)" in line for line in report.lines)


def test_train_share_keeps_some_of_every_rank_and_small_shares_lie_in_large_ones():
    config = {"num_train": 300, "num_validation": 4, "num_test": 4}
    ranks = RanksConfig(low=0, high=100, num=6)
    names, before = [], None
    for share in (1.0, 0.5, 0.1, 0.001):
        part = load_parts(DataConfig(**config, train_share=share), ranks, 3).train
        counts = np.bincount(part.ranks, minlength=6)
        before = counts if before is None else before
        assert counts.tolist() == [max(1, round(share * count)) for count in before]
        names.append(set(part.names))
    assert names[0] > names[1] > names[2] > names[3]
    other = load_parts(DataConfig(**config, train_share=0.1, draw_seed=9), ranks, 3).train
    assert set(other.names) != names[2]
    assert set(other.names) < names[0]


def test_label_shift_thins_the_most_populated_ranks(image_folder):
    rows = datasets.Dataset.from_dict({"image": [None] * 100, "label": [0] * 50 + [1] * 8 + [2] * 30 + [3] * 12})
    plain = DataConfig(shift_ranks=2, shift_keep=0.1)
    parts = make_parts({"train": rows}, plain, RanksConfig(), seed=4)
    assert np.bincount(parts.train.ranks).tolist() == [5, 8, 3, 12]
    again = make_parts({"train": rows}, plain, RanksConfig(), seed=4).train
    assert list(again.names) == list(parts.train.names)
    other = make_parts({"train": rows}, plain.model_copy(update={"draw_seed": 5}), RanksConfig(), seed=4).train
    assert list(other.names) != list(parts.train.names)


def test_a_cache_that_cannot_hold_all_holds_nothing():
    image = Image.new("RGB", (10, 10))
    for budget, held in ((3000, 10), (2999, 0)):
        cache = ImageCache(budget, 10)
        for key in range(10):
            assert cache.get(key, lambda: image) is image
        assert len(cache.images) == held


def test_numbers_of_any_column_type():
    for column in (
        [1, 2, 3],
        [1.5, 2.0, 3.0],
        ["1", "2.5", "3"],
        [Decimal("1"), Decimal("2"), Decimal("3")],
    ):
        rows = datasets.Dataset.from_dict({"image": [None] * 3, "label": column})
        train = make_parts({"train": rows}, DataConfig(), RanksConfig(), seed=0).train
        assert train.values.tolist() == [float(value) for value in column]
    for column, shown in (
        (["1", "old", "3"], "row 2: label 'old' .* is not a number, as 1 of 3"),
        ([1.0, None, 3.0], "row 2: the label in column 'label' is missing"),
        ([1.0, float("inf"), 3.0], "row 2: label inf"),
        (["1", "1e39", "3"], "row 2: label 1e\\+39 is beyond float32"),
        (["1", "1_000", "3"], "row 2: label '1_000'"),
        ([True, False, True], "labels .* are words: false \\(1\\), true \\(2\\)"),
    ):
        rows = datasets.Dataset.from_dict({"image": [None] * 3, "label": column})
        with pytest.raises(ValueError, match=shown):
            make_parts({"train": rows}, DataConfig(), RanksConfig(), seed=0)


def test_the_cache_keeps_sizes_apart(quick):
    """The training part is also evaluated, at a size of the encoder's own."""
    config = quick()
    part = load_parts(config.data, config.ranks, config.seed).train
    spec = PixelSpec(16, (0, 0, 0), (1, 1, 1), crop_ratio=1.25)
    assert [part.resized(0, spec, size).size for size in (16, None, 16, 20)] == [(16, 16), (20, 20), (16, 16), (20, 20)]


def many(folder, rows, columns="file,grade,subject"):
    """A picture of its own for every row, and the table."""
    for number, _ in enumerate(rows):
        Image.new("RGB", (3, 3), (number % 256, number // 256, 7)).save(folder / f"{number}.png")
    lines = [",".join([f"{number}.png", *map(str, row)]) for number, row in enumerate(rows)]
    (folder / "labels.csv").write_text("\n".join([columns, *lines]) + "\n")


def test_words_take_the_order_that_was_said(tmp_path):
    many(tmp_path, [(word, 0) for word in ("low", "high", "mid", "low")])
    ranks = {"names": ["low", "mid", "high"], "unit": "levels"}
    parts = parts_of(tmp_path, ranks, table="labels.csv", split=(1, 0, 0))
    assert parts.train.values.tolist() == [0, 2, 1, 0]
    assert (parts.ranks.names, parts.ranks.values) == (("low", "mid", "high"), (0, 1, 2))
    parts = parts_of(tmp_path, {**ranks, "low": 10, "high": 30, "num": 3}, table="labels.csv", split=(1, 0, 0))
    assert parts.train.values.tolist() == [10, 30, 20, 10]


@pytest.mark.parametrize("stratify", [[], ["grade"]])
def test_folds_take_every_row_for_test_once_and_keep_groups_whole(tmp_path, stratify):
    rng = np.random.default_rng(0)
    many(tmp_path, [(number % 4, f"s{rng.integers(30)}") for number in range(240)])
    options = {"table": "labels.csv", "group": "subject", "folds": 4, "stratify": stratify}
    seen = []
    for fold in range(4):
        parts = parts_of(tmp_path, fold=fold, **options)
        groups = [set(part.rows["subject"]) for part in (parts.train, parts.validation, parts.test)]
        assert sum(map(len, groups)) == len(set.union(*groups))
        assert 0.1 < len(parts.validation) / (len(parts.train) + len(parts.validation)) < 0.3  # asked: 0.2
        seen += parts.test.names[:]
    assert sorted(seen) == sorted(f"{number}.png" for number in range(240))


def test_groups_and_strata_together(tmp_path):
    """Each subject has one grade or two; the shares of grades in all parts are about those of the whole."""
    rng = np.random.default_rng(0)
    subjects = rng.integers(0, 120, 600)
    many(tmp_path, [((s + rng.integers(2)) % 3, f"s{s}") for s in subjects])
    for seed in range(3):
        parts = parts_of(tmp_path, table="labels.csv", group="subject", stratify=["grade"], seed=seed)
        groups = [set(part.rows["subject"]) for part in (parts.train, parts.validation, parts.test)]
        assert sum(map(len, groups)) == len(set.union(*groups))
        whole = np.bincount(np.concatenate([part.ranks for part in (parts.train, parts.validation, parts.test)])) / 600
        for part, share in ((parts.train, 0.6), (parts.validation, 0.15), (parts.test, 0.25)):
            assert len(part) / 600 == pytest.approx(share, abs=0.05)
            assert np.abs(np.bincount(part.ranks, minlength=3) / len(part) - whole).max() < 0.08


def test_copies_are_kept_together(tmp_path):
    many(tmp_path, [(number % 3, number) for number in range(60)])
    for number in range(0, 60, 6):  # five groups of copies, under names of their own
        for copy in (number, number + 3):
            Image.new("RGB", (5, 5), (number // 12, 0, 0)).save(tmp_path / f"{copy}.png")
    with pytest.raises(ValueError, match=r"the same picture in two parts: .* data\.duplicates=together"):
        parts_of(tmp_path, table="labels.csv", duplicates="refuse", seed=4)
    for seed in range(5):
        parts = parts_of(tmp_path, table="labels.csv", duplicates="together", seed=seed)
        owners = {}
        for part in (parts.train, parts.validation, parts.test):
            for name in part.names:
                owners.setdefault((tmp_path / name).read_bytes(), set()).add(id(part))
        assert max(map(len, owners.values())) == 1
        assert sum(map(len, owners.values())) == 60 - 15


def test_near_copies_are_pairs_of_pictures_that_look_alike():
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)).resize((90, 90)) for _ in range(20)]
    pictures += [pictures[3].resize((60, 60)), Image.new("RGB", (9, 9), "red"), Image.new("RGB", (9, 9), "blue")]
    small = np.stack([thumbnail(picture) for picture in pictures])
    assert near_duplicates(small, np.arange(23)) == [(3, 20)]
    assert near_duplicates(small, np.arange(23), chunk=2) == [(3, 20)]
    assert near_duplicates(small, np.array([*range(20), 3, 21, 22])) == []  # equal bytes are no near copies


def test_frames_with_pictures_in_memory(quick, tmp_path):
    """A run on them says so, is not taken up on other data, and is scored only where they are handed over again."""
    pictures = [Image.new("RGB", (20, 20), (9 * number, 0, 0)) for number in range(24)]
    frame = pd.DataFrame({"image": pictures, "label": ["a", "b", "c"] * 8})
    config = quick("ranks.low=null", "ranks.high=null", "ranks.num=null", "method=l1", "evaluation.report=true")
    ranks = config.ranks.model_copy(update={"names": ["a", "b", "c"]})
    config = config.model_copy(update={"ranks": ranks})
    parts = make_parts({"all": frame}, config.data, ranks, 1)
    assert parts.train.image(0).size == (20, 20)
    folder = RunFolder(train(config, parts, quiet=True))
    assert folder.read_config().data.source == "memory"
    assert "data handed over in memory" in (folder.model / "README.md").read_text()
    with pytest.raises(ValueError, match=r"handed over in memory \(data\.source=memory\)"):
        evaluate_run(folder.path, quiet=True)
    assert evaluate_run(folder.path, parts, quiet=True)["test"]["num"] == len(parts.test)
    other = make_parts({"all": frame.assign(image=pictures[::-1])}, config.data, ranks, 1)
    with pytest.raises(ValueError, match=r"this is not the data of the run: .*pictures differ"):
        evaluate_run(folder.path, other, quiet=True)
