"""Folders and tables as people have them: orders, separators, missing cells, copies, paths that lead elsewhere."""

import json
import os
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
from PIL import Image

from hostile import case
from ordinalclip.cli import main

DEGREES = ["none", "mild", "moderate", "severe"]
CLOTHES = ["S", "M", "L", "XL"]


def picture(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(path)


def pictures(folder, number=12):
    """`number` different pictures p0.png, p1.png, ..."""
    for index in range(number):
        picture(folder / f"p{index}.png", index)


def check(*more, table="labels.csv", root="."):
    return ["check-data", "default", "-q", "data.source=table", f"data.root={root}", f"data.table={table}", *more]


def labelled(folder, labels, *more, number=12, **options):
    """Pictures, a CSV that repeats `labels`, and the words of `check-data`."""
    pictures(folder, number)
    rows = [f"p{index}.png,{labels[index % len(labels)]}" for index in range(number)]
    (folder / "labels.csv").write_text("\n".join(["image,label", *rows]) + "\n")
    return check(*more, **options)


def written(folder, text, *more, encoding="utf-8", name="labels.csv"):
    """Pictures, a table of exactly this text, and the words of `check-data`."""
    pictures(folder)
    (folder / name).write_bytes(text.encode(encoding) if isinstance(text, str) else text)
    return check(*more, table=name)


def lines(separator=",", end="\n", header=("image", "label"), labels=(0, 1, 2)):
    """A table of twelve rows."""
    rows = [header, *((f"p{index}.png", str(labels[index % len(labels)])) for index in range(12))]
    return end.join(separator.join(row) for row in rows) + end


def sorted_into(folder, names, *more):
    """Three pictures in a folder of each of these names, and the words of `check-data`."""
    for place, name in enumerate(names):
        for number in range(3):
            picture(folder / "all" / name / f"{number}.png", 3 * place + number)
    return ["check-data", "default", "-q", "data.source=folder", "data.root=all", *more]


def trained(words):
    """The words of `train` instead of `check-data`, for what is refused before a training."""
    return ["train", *words[1:], "output_dir=run", "train.max_steps=1", "train.batch_size=4", "method=l1"]


# ---- the order of classes


@case(
    "a folder for every degree, no order said",
    r"all: labels in column 'label' are words: mild \(3\), moderate "
    r"\(3\), none \(3\), severe \(3\)\. Their order is yours to say, lowest first: "
    r"ranks\.names='\[none, mild, moderate, severe\]' \(the usual order",
)
def _(folder):
    return sorted_into(folder, DEGREES)


@case(
    "a folder for every size, in no known order",
    r"order is yours to say.*ranks\.names='\[LOWEST, \.\.\., HIGHEST\]' of L, M, S, XL",
)
def _(folder):
    return sorted_into(folder, CLOTHES)


@case(
    "a folder for every degree, the order said", r"none \(\d\), mild \(\d\), moderate \(\d\), severe \(\d\)", status=0
)
def _(folder):
    return sorted_into(folder, DEGREES, "ranks.names=[none, mild, moderate, severe]")


@case("folders 5, 10, 20", r"ranks: 3, 5 to 20\n", status=0)
def _(folder):
    return sorted_into(folder, ["5", "10", "20"])


@case(
    "folders for the parts, and in them folders for labels", r"validation: 2 images, labels 1 to 2, 0 broken", status=0
)
def _(folder):
    for part, names in (("train", "1234"), ("val", "12"), ("test", "12")):
        for name in names:
            picture(folder / "all" / part / name / "a.png", hash((part, name)) % 10_000)
    return ["check-data", "default", "-q", "data.source=folder", "data.root=all"]


@case("pictures beside the folders for labels", r"all: pictures lie beside the folders for the labels, a\.png for one")
def _(folder):
    words = sorted_into(folder, ["1", "2"])
    picture(folder / "all" / "a.png", 99)
    return words


@case("a HEIC among the pictures of a label", r"all/2/phone\.HEIC: not a readable image", status=1)
def _(folder):
    words = sorted_into(folder, ["1", "2"])
    (folder / "all/2/phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    return words


@case("folders for the parts below those for labels", r"all/1/t\w+: a part below a label")
def _(folder):
    for part in ("train", "test"):
        for name in "12":
            picture(folder / "all" / name / part / "a.png", hash((part, name)) % 10_000)
    return ["check-data", "default", "-q", "data.source=folder", "data.root=all"]


@case("a folder for a label without pictures", r"all/3: no pictures in this folder; endings searched: \.png")
def _(folder):
    words = sorted_into(folder, ["1", "2"])
    (folder / "all/3").mkdir()
    return words


@case("words in a table, no order said", r"labels\.csv: labels in column 'label' are words: L \(4\), M \(4\), S \(4\)")
def _(folder):
    return labelled(folder, ["S", "M", "L"])


@case("words in a table, the order said", r"ranks: 3, S = 0 to L = 2\n", status=0)
def _(folder):
    return labelled(folder, ["S", "M", "L"], "ranks.names=[S, M, L]")


@case("words with values of their own", r"ranks: 3, S = 10 to L = 90\n", status=0)
def _(folder):
    return labelled(folder, ["S", "M", "L"], "ranks.names=[S, M, L]", "ranks.values=[10, 20, 90]")


@case("a word that the order lacks", r"labels\.csv, row 4 \(line 5\): label 'Lage' is none of ranks\.names; .*Large")
def _(folder):
    return labelled(folder, ["Small", "Medium", "Large", "Lage"], "ranks.names=[Small, Medium, Large]")


@case("more names than values", r"ranks\.names has 3 names for 2 rank values")
def _(folder):
    return labelled(folder, ["S", "M", "L"], "ranks.names=[S, M, L]", "ranks.values=[1, 2]")


@case("names that are the values in another order", r"ranks\.names are the rank values in another order: 2, 0, 1")
def _(folder):
    return labelled(folder, [0, 1, 2], "ranks.names=[2, 0, 1]")


@case("true and false as labels", r"are words: false \(6\), true \(6\).*ranks\.names='\[\"false\", \"true\"\]'")
def _(folder):
    return labelled(folder, ["true", "false"])


@case("names that YAML takes for truth values", r"ranks: 2, no = 0 to yes = 1\n", status=0)
def _(folder):
    return labelled(folder, ["no", "yes"], "ranks.names=[no, yes]")


@case("a column of classes, which are numbered by alphabet", r"labels\.parquet: .* are words: mild \(3\), moderate")
def _(folder):
    pictures(folder)
    rows = {"image": [f"p{index}.png" for index in range(12)], "label": [DEGREES[index % 4] for index in range(12)]}
    frame = datasets.Dataset.from_dict(rows).cast_column("label", datasets.ClassLabel(names=sorted(DEGREES)))
    frame.to_parquet("labels.parquet")
    return check(table="labels.parquet")


# ---- labels


def _label(what, label, says, status=2, *more):
    @case(what, says, status=status)
    def _(folder):
        return labelled(folder, [0, 1, 2, label], *more)


_label("a number as Python writes it", "1_000", r"row 4 \(line 5\): label '1_000' in column 'label' is not a number")
_label("a hexadecimal label", "0x1F", r"label '0x1F' in column 'label' is not a number")
_label("an infinite label", "inf", r"label 'inf' in column 'label' is not a number")
_label("a label beyond float32", "1e39", r"label 1e\+39 is beyond float32")
_label("a label with its unit", "3 years", r"label '3 years' in column 'label' is not a number, as 3 of 12 are not")
_label("a formula", "=1+1", r"label '=1\+1' in column 'label' is not a number")
_label("a label in digits of another script", "٣", r"label '٣' in column 'label' is not a number")
_label(
    "a label that is missing",
    "",
    r"row 4 \(line 5\): the label in column 'label' is missing, in 3 of 12 rows; data"
    r"\.missing=drop",
)
_label("NA for a label", "NA", r"is missing, in 3 of 12 rows")
_label(
    "missing labels left out",
    "",
    r"3 of 12 rows have no label in column 'label' and are left out",
    0,
    "data.missing=drop",
)
_label("a label outside the ranks", 7, r"label 7 .*outside the ranks 0 to 2", 2, "ranks.values=[0, 1, 2]")
_label("-1 beside grades", -1, r"label -1 is outside the ranks 0 to 2 \(tolerance 0\.5\)", 2, "ranks.values=[0, 1, 2]")
_label("999 beside grades", 999, r"3 labels are 999, apart from the others: are they labels\?", 0)
_label("spaces around labels", " 3 ", r"labels 0 to 3, 0 broken", 0)


@case("decimal commas between semicolons", r"labels 0\.5 to 2\.25(.*\n)*.*are read with a decimal comma", 0)
def _(folder):
    return written(folder, lines(";", labels=("0,5", "1,5", "2,25")))


@case("a comma that may part thousands", r"label '1,000' in column 'label' .*data\.decimal=',' reads decimal commas")
def _(folder):
    return written(folder, lines(";", labels=("1,000", "2", "3")))


@case("decimal commas that were told, and points", r"label '1\.5' in column 'label' is not a number")
def _(folder):
    return written(folder, lines(";", labels=("0,5", "1.5", "2,25")), "data.decimal=,")


@case("all labels the same", r"all training labels are 3; ranks\.values says which other values there are")
def _(folder):
    return labelled(folder, [3])


@case(
    "measurements instead of steps",
    r"have \d+ distinct values from .* set ranks\.low, high and num, such as ranks\.low=",
)
def _(folder):
    return labelled(folder, [f"{value:.3f}" for value in np.linspace(-11, 43, 90)], number=90)


@case("a label of the test part beyond the ranks of training", r"ranks\.values=\[0, 0\.25, .*, 99\] says others")
def _(folder):
    pictures(folder)
    rows = [f"p{index}.png,{index / 4 if index < 11 else 99},{'train' if index < 8 else 'test'}" for index in range(12)]
    return written(folder, "\n".join(["image,label,part", *rows]) + "\n", "data.split_column=part")


@case(
    "ranks of per cent for grades",
    r"the training labels go from 0 to 3, the 101 ranks from 0 to 100: they are of "
    r"something else\. ranks\.values=\[0, 1, 2, 3\] fits",
)
def _(folder):
    (folder / "c.yaml").write_text("ranks: {low: 0, high: 100, num: 101, unit: '%'}\n")
    words = labelled(folder, [0, 1, 2, 3], number=48)
    return ["check-data", "c.yaml", *words[2:]]


@case("ranks that replace those of the file", r"ranks: 4, 0 to 3\n", status=0)
def _(folder):
    (folder / "c.yaml").write_text("ranks: {low: 0, high: 100, num: 101, unit: '%'}\n")
    words = labelled(folder, [0, 1, 2, 3], "ranks.values=[0, 1, 2, 3]", number=48)
    return ["check-data", "c.yaml", *words[2:]]


@case("ranks that labels do not reach, on purpose", r"ranks: 101, 0 to 100", status=0)
def _(folder):
    more = ["ranks.low=0", "ranks.high=100", "ranks.num=101", "ranks.unused=true"]
    return labelled(folder, [0, 1, 2, 3], *more, number=48)


@case(
    "labels that are nearly all the same, for a direction between their ends",
    r"the scores do not tell two ends apart: the 3 lowest of 7 go up to 5, the 3 highest down to 5; all are",
)
def _(folder):
    words = labelled(folder, [5] * 11 + [6], "ranks.unused=true")
    return ["train", *words[1:], "output_dir=run", "method=large", "head.share=0.5"]


# ---- tables


def _table(what, text, says, status=2, *more, **options):
    @case(what, says, status=status)
    def _(folder):
        return written(folder, text, *more, **options)


SOUND = r"train: 7 images, labels 0 to 2, 0 broken"
_table("semicolons", lines(";"), SOUND, 0)
_table("tabs", lines("\t"), SOUND, 0)
_table("bars", lines("|"), SOUND, 0)
_table("a separator that is told", lines("/"), SOUND, 0, "data.separator=/")
_table(
    "a separator that is told wrongly",
    lines(";"),
    r"column 'label' .*is missing; it has 'image;label'",
    2,
    "data.separator=,",
)
_table("line ends of Windows", lines(end="\r\n"), SOUND, 0)
_table("line ends of old Macs", lines(end="\r"), SOUND, 0)
_table("UTF-8 with a mark", lines(), SOUND, 0, encoding="utf-8-sig")
_table("UTF-16", lines("\t"), SOUND, 0, encoding="utf-16")
_table(
    "Latin-1 that nobody told of",
    lines(header=("image", "größe")),
    r"labels\.csv, line 1: not utf-8 \(byte 0xf6\)"
    r"; data\.encoding=cp1252",
    2,
    "data.label_column=größe",
    encoding="latin-1",
)
_table(
    "Latin-1",
    lines(header=("image", "größe")),
    SOUND,
    0,
    "data.label_column=größe",
    "data.encoding=latin-1",
    encoding="latin-1",
)
_table("an encoding that does not exist", lines(), r"data\.encoding='klingon' is unknown", 2, "data.encoding=klingon")
_table("a picture instead of a table", b"\x89PNG\r\n\x1a\n\0\0", r"labels\.csv, line 1: not utf-8")
_table("NUL characters", lines().replace("1", "\0"), r"labels\.csv, line \d: holds NUL characters")
_table("an empty file", "", r"labels\.csv: the file is empty")
_table("blank lines only", "\n\n  \n", r"labels\.csv: the file is empty")
_table("a header only", "image,label\n", r"labels\.csv: has no rows below its header")
_table(
    "a column twice",
    lines(header=("image", "label")).replace("label", "image"),
    r"column 'image' stands in the header more",
)
_table("a cell too many", lines().replace("p4.png,1", "p4.png,1,9"), r"labels\.csv, line 6: 3 cells, the header has 2")
_table(
    "a quote that is not closed", lines().replace("p4.png", '"p4.png'), r"labels\.csv, line 6: quotes are not balanced"
)
_table(
    "blank lines between rows, and a bad label",
    lines(end="\n\n").replace("p4.png,1", "p4.png,x"),
    r"labels\.csv, row 5 \(line 11\): label 'x'",
)
_table(
    "a cell of two lines, and a bad label below it",
    lines(header=("image", "label"))
    .replace("p0.png,0", '"p0.png",0')
    .replace("p1.png,1", '"p1\n.png",1')
    .replace("p4.png,1", "p4.png,x"),
    r"labels\.csv, row 5 \(line 7\): label 'x'",
)
_table(
    "labels under another name",
    lines().replace("label", "other"),
    r"column 'label' .*is missing; it has 'image', 'other'",
)
_table(
    "a part by another name",
    lines()
    .replace("image,label", "image,label,part")
    .replace(".png,0", ".png,0,holdout")
    .replace(".png,1", ".png,1,train")
    .replace(".png,2", ".png,2,test"),
    r"row 1 \(line 2\): column 'part' \(data\.split_column\) says 'holdout'; allowed are train, validation, test",
    2,
    "data.split_column=part",
)
_table("a list with a path alone", "p0.png 1\n\np1.png\n", r"list\.txt, line 3: write `path label", name="list.txt")
_table(
    "a list with several opinions",
    "p0.png 0 1 1\np1.png 2 2 3\np2.png 0\n",
    r"labels 0 to 2, 0 broken",
    0,
    "data.split=[1,0,0]",
    name="list.txt",
)
_table("a list with a word among opinions", "p0.png 0 1 x\n", r"list\.txt, line 1: write `path label", name="list.txt")
_table(
    "JSON lines",
    "".join(json.dumps({"image": f"p{n}.png", "label": n % 3}) + "\n" for n in range(12)),
    SOUND,
    0,
    name="rows.jsonl",
)
_table(
    "JSON that breaks off",
    '{"image": "p0.png", "label": 1}\n{"image": ',
    r"rows\.jsonl, line 2: not a JSON object",
    name="rows.jsonl",
)
_table(
    "JSON with NaN",
    '{"image": "p0.png", "label": NaN}\n',
    r"rows\.jsonl, line 1: .*NaN is not a number",
    name="rows.jsonl",
)
_table(
    "JSON lines with other keys",
    '{"image": "p0.png", "label": 1}\n{"image": "p1.png"}\n',
    r"rows\.jsonl, line 2: key 'label' is not in every row",
    name="rows.jsonl",
)
_table(
    "JSON with a key twice",
    '{"image": "p0.png", "label": 1, "label": 2}\n',
    r"rows\.jsonl, line 1: .*key stands in it "
    "twice",
    name="rows.jsonl",
)
_table(
    "text in a file that ends like Parquet", lines(), r"rows\.parquet: not a readable Parquet file", name="rows.parquet"
)
_table("text in a file that ends like Excel", lines(), r"rows\.xlsx: not a readable Excel file", name="rows.xlsx")
_table("a table of another kind", lines(), r"rows\.ods: tables end in \.csv, .*; this ends in '\.ods'", name="rows.ods")


@case("a table that is not there", r"label\.csv: no such table; .*labels\.csv")
def _(folder):
    labelled(folder, [0, 1, 2])
    return check(table="label.csv")


@case("a table that is a folder", r"labels\.csv: is a folder")
def _(folder):
    (folder / "labels.csv").mkdir()
    return check()


@case(
    "a table that is not below the root", r"tables are looked for under data\.root, write .*labels\.csv for that here"
)
def _(folder):
    labelled(folder, [0, 1, 2])
    (folder / "other").mkdir()
    return check(root="other")


def excel(folder, **sheets):
    """Sheets of Excel by name, with labels of twelve pictures, or empty."""
    pictures(folder)
    with pd.ExcelWriter(folder / "rows.xlsx") as file:
        for name, labels in sheets.items():
            rows = [(f"p{index}.png", labels[index % len(labels)]) for index in range(12) if labels]
            frame = pd.DataFrame(rows, columns=["image", "label"] if labels else [])
            frame.to_excel(file, sheet_name=name, index=False)


@case("Excel", SOUND, status=0)
def _(folder):
    excel(folder, Sheet1=[0, 1, 2], Sheet2=[])
    return check(table="rows.xlsx")


@case("Excel with None as a grade", r"None \(\d\), Mild \(\d\), Severe \(\d\)", status=0)
def _(folder):
    excel(folder, grades=["None", "Mild", "Severe"])
    return check("ranks.names=[None, Mild, Severe]", table="rows.xlsx")


@case("Excel with two sheets", r"rows\.xlsx: 2 sheets hold something \(old, new\); data\.sheet says which")
def _(folder):
    excel(folder, old=[0, 1, 2], new=[3, 4, 5])
    return check(table="rows.xlsx")


@case("Excel, the sheet said", r"train: 7 images, labels 3 to 5", status=0)
def _(folder):
    excel(folder, old=[0, 1, 2], new=[3, 4, 5])
    return check("data.sheet=new", table="rows.xlsx")


@case("Excel, a sheet that it lacks", r"no sheet 'newer' \(data\.sheet\); it has 'old', 'new'")
def _(folder):
    excel(folder, old=[0, 1, 2], new=[3, 4, 5])
    return check("data.sheet=newer", table="rows.xlsx")


@case("a table corrected in place, with its time stamp", r"labels 7 to 9", status=0)
def _(folder):
    pictures(folder)
    rows = {"image": [f"p{index}.png" for index in range(12)], "label": [index % 3 for index in range(12)]}
    table = folder / "rows.parquet"
    datasets.Dataset.from_dict(rows).to_parquet(str(table))
    words = check("data.split=[1, 0, 0]", table="rows.parquet")
    assert main(words) == 0
    stamp = table.stat()
    datasets.Dataset.from_dict({**rows, "label": [7 + index % 3 for index in range(12)]}).to_parquet(str(table))
    os.utime(table, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    return words


# ---- paths


@case(
    "pictures that are not there",
    r"labels\.csv: 2 of 12 images do not exist under '\.': row 4 \(line 5\), p3\.png; row 6",
)
def _(folder):
    words = labelled(folder, [0, 1, 2])
    Path("p3.png").unlink()
    Path("p5.png").unlink()
    return words


@case("names without their ending", r"12 of 12 images do not exist .*; data\.suffix=\.png would find them")
def _(folder):
    return written(folder, lines().replace(".png", ""))


@case("names without their ending, which is said", SOUND, status=0)
def _(folder):
    return written(folder, lines().replace(".png", ""), "data.suffix=.png")


@case("a path of nothing", r"row 1 \(line 2\).*: '' in column 'image' is no path of a picture")
def _(folder):
    return written(folder, lines().replace("p0.png", ""))


def elsewhere(folder, path, *more):
    """A table whose first picture is at `path`, seen from the folder `here`."""
    (folder / "here").mkdir()
    pictures(folder / "here")
    picture(folder / "secret.png", 100)
    (folder / "here/labels.csv").write_text(lines().replace("p0.png", path))
    return check(*more, root="here")


LEAVES = r"labels\.csv, row 1 \(line 2\), .*: leaves data\.root=here; data\.outside_root=true allows that"


@case("a path that leads out of the root", LEAVES)
def _(folder):
    return elsewhere(folder, "../secret.png")


@case("a path that leads out of the root by a detour", LEAVES)
def _(folder):
    return elsewhere(folder, "../here/../secret.png")


@case("an absolute path out of the root", LEAVES)
def _(folder):
    return elsewhere(folder, f"{folder}/secret.png")


@case("a link that leads out of the root", LEAVES)
def _(folder):
    words = elsewhere(folder, "link.png")
    (folder / "here/link.png").symlink_to(folder / "secret.png")
    return words


@case("a folder that is a link out of the root", LEAVES)
def _(folder):
    words = elsewhere(folder, "link/secret.png")
    (folder / "here/link").symlink_to(folder)
    return words


@case("a path out of the root that is allowed", SOUND, status=0)
def _(folder):
    return elsewhere(folder, "../secret.png", "data.outside_root=true")


@case("absolute paths without a root", SOUND, status=0)
def _(folder):
    words = written(folder, lines().replace("p", f"{folder}/p"))
    (folder / "labels.csv").write_text(lines().replace("p0", f"{folder}/p0").replace("p1.", f"{folder}/p1."))
    return [word for word in words if not word.startswith(("data.root", "data.table"))] + ["data.table=labels.csv"]


# ---- copies


@case(
    "one picture with two labels",
    r"the same picture with two labels: .*row 1 \(line 2\), p0\.png \(label 0\) = row 2 "
    r"\(line 3\), p0\.png \(label 1\); 1 pictures are\. Take copies out, keep them .* data\.duplicates=allow",
)
def _(folder):
    return trained(written(folder, lines().replace("p1.png", "p0.png")))


@case(
    "one picture under two names with two labels",
    r"the same picture with two labels: .*p0\.png \(label 0\) = .*p1\.png",
)
def _(folder):
    words = labelled(folder, [0, 1, 2])
    Path("p1.png").write_bytes(Path("p0.png").read_bytes())
    return trained(words)


@case(
    "one picture in training and test", r"the same picture in two parts: .*p0\.png \(label 0\) = .*p3\.png \(label 0\)"
)
def _(folder):
    rows = [f"p{index}.png,{index % 3},{'train' if index < 3 else 'test'}" for index in range(12)]
    words = written(folder, "\n".join(["image,label,part", *rows]) + "\n", "data.split_column=part")
    Path("p3.png").write_bytes(Path("p0.png").read_bytes())
    return trained(words)


@case(
    "copies, as check-data says them",
    r"the same picture with two labels: .*\n1 pictures are in two parts or have two "
    r"labels: an error in training; data\.duplicates=together or allow",
    status=1,
)
def _(folder):
    words = labelled(folder, [0, 1, 2])
    Path("p1.png").write_bytes(Path("p0.png").read_bytes())
    return words


@case("copies that are kept together", r"ranks: 3, 0 to 2", status=0)
def _(folder):
    words = labelled(folder, [0, 1, 2], "data.duplicates=together")
    for number in (3, 6, 9):
        Path(f"p{number}.png").write_bytes(Path("p0.png").read_bytes())
    return words


@case(
    "pictures that are nearly the same",
    r"1 pairs of pictures are nearly the same by their pixels, [01] of them in two parts",
    status=0,
)
def _(folder):
    words = labelled(folder, [0, 1, 2])
    gradient = Image.linear_gradient("L").convert("RGB")
    gradient.save("p0.png")
    gradient.resize((200, 200)).save("p1.png", format="JPEG")
    return words


# ---- splits


def grouped(folder, *more, who="s{0}"):
    pictures(folder, 48)
    rows = [f"p{n}.png,{n % 3},{who.format(n // 4)}" for n in range(48)]
    (folder / "labels.csv").write_text("\n".join(["image,label,patient", *rows]) + "\n")
    return check("data.group=patient", *more)


@case("groups that are stratified, too", r"train: \d+ images, .*\nvalidation: \d+ images.*\ntest: \d+ images", status=0)
def _(folder):
    return grouped(folder, "data.stratify=[label]")


@case("a fold of groups", r"test: 12 images", status=0)
def _(folder):
    return grouped(folder, "data.folds=4", "data.fold=3")


@case("more folds than groups", r"12 groups are too few for 13 folds")
def _(folder):
    return grouped(folder, "data.folds=13")


@case("a fold beyond the last", r"data\.fold=4 of data\.folds=4: folds count from 0")
def _(folder):
    return grouped(folder, "data.folds=4", "data.fold=4")


@case("a group without a name", r"labels\.csv, row 1 \(line 2\): column 'patient' \(data\.group\) is empty")
def _(folder):
    return grouped(folder, who="")


@case(
    "a group by a column that is missing",
    r"column 'eye' \(data\.group\) is missing; it has 'image', 'label', 'patient'",
)
def _(folder):
    words = grouped(folder)
    return [word.replace("data.group=patient", "data.group=eye") for word in words]


@case(
    "one patient in two parts that are given",
    r"patient 's0' \(data\.group\) is in two of the given parts, train and test",
)
def _(folder):
    words = grouped(folder, "data.split_column=part")
    rows = (folder / "labels.csv").read_text().splitlines()
    parts = ["part", *(["train", "test"] * 24)]
    (folder / "labels.csv").write_text("\n".join(f"{row},{part}" for row, part in zip(rows, parts, strict=True)) + "\n")
    return words


@case(
    "patients whose names differ by a nought",
    r"'007' and '7' in column 'patient' .* are two groups; are they one\?",
    status=0,
)
def _(folder):
    words = grouped(folder, who="{0}")
    text = (folder / "labels.csv").read_text()
    (folder / "labels.csv").write_text(text.replace("p28.png,1,7", "p28.png,1,007"))
    return words


@case("strata beside parts that are given", r"split_column says the parts: folds and stratify have no effect beside it")
def _(folder):
    return grouped(folder, "data.split_column=patient", "data.stratify=[label]")


@case("a fold without folds", r"data\.fold=2 of data\.folds=None: folds count from 0")
def _(folder):
    return grouped(folder, "data.fold=2")


@case("strata of two rows", r"train: \d+ images.*\nvalidation: [1-9]\d* images.*\ntest: [1-9]\d* images", status=0)
def _(folder):
    return labelled(folder, range(20), "data.stratify=[label]", "ranks.values=[0, 10, 19]", number=40)


# ---- sources


@case("an empty configuration", r"c\.yaml: holds nothing; a configuration has keys, `ordinalclip init` writes one")
def _(folder):
    (folder / "c.yaml").write_text("# nothing but this\n")
    return ["check-data", "c.yaml"]


@case("the defaults", r"ranks: 101, 0 to 100", status=0)
def _(folder):
    return ["check-data", "default", "-q", "data.num_test=4", "data.num_validation=4"]


@case("a run of data that was in memory", r"handed over in memory \(data\.source=memory\): hand it over again")
def _(folder):
    return ["check-data", "default", "data.source=memory"]


@case("a folder without a source", r"data\.root or data\.hub is given, but source is gauges; set data\.source")
def _(folder):
    return ["check-data", "default", "data.root=."]


@case("a table without a source", r"a table is given, but source is gauges; set data\.source=table")
def _(folder):
    return ["check-data", "default", "data.table=labels.csv"]


@case("a root that is not there", r"data\.root='nowhere': no such folder")
def _(folder):
    return check(root="nowhere")


@case(
    "a data set with a script",
    r"set: holds set\.py; scripts of data sets are not run",
    after=lambda folder: not (folder / "ran").exists() or 1 / 0,
)
def _(folder):
    (folder / "set").mkdir()
    (folder / "set/set.py").write_text("open('ran', 'w')")
    return ["check-data", "default", "data.source=hub", "data.hub=set"]


@case("a data set that is out of reach", r"data\.hub=nobody/nothing: cannot be loaded")
def _(folder):
    return ["check-data", "default", "data.source=hub", "data.hub=nobody/nothing"]


def hub_folder(folder, *more):
    (folder / "set").mkdir()
    for part in ("train", "holdout"):
        for number in range(6):
            picture(folder / "set" / part / f"{number}.png", hash((part, number)) % 10_000)
        rows = [f"{number}.png,{number % 3}" for number in range(6)]
        (folder / "set" / part / "metadata.csv").write_text("\n".join(["file_name,label", *rows]) + "\n")
    return ["check-data", "default", "-q", "data.source=hub", "data.hub=set", *more]


@case("a data set of the hub's form, one split of it", r"train: \d images, labels 0 to 2", status=0)
def _(folder):
    return hub_folder(folder, "data.hub_split=train", "data.split=[1, 0, 0]")


@case("a split that a data set lacks", r"data\.hub_split='holdin': set has ")
def _(folder):
    return hub_folder(folder, "data.hub_split=holdin")


# ---- data that changes between two calls


def _stopped(folder, change):
    """A run with a checkpoint, whose data then changes; the words that resume it."""
    words = trained(labelled(folder, [0, 1, 2], "ranks.values=[0, 1, 2]"))
    assert main([*words, "evaluation.report=false"]) == 0
    Path("run/metrics.json").unlink()
    change()
    return [*words, "train.resume=auto"]


@case("labels that change before a run goes on", r"run: .*the train part has changed: names or labels differ")
def _(folder):
    def change():
        table = Path("labels.csv")
        table.write_text(table.read_text().replace(".png,2", ".png,1"))

    return _stopped(folder, change)


@case("pictures that change before a run goes on", r"run: .*the \w+ part has changed: pictures differ")
def _(folder):
    def change():
        for number in range(12):
            Image.new("RGB", (30 + number, 30)).save(f"p{number}.png")

    return _stopped(folder, change)


# ---- a configuration of one's own


@case(
    "init: a table with an age",
    r"label_column: age\n(.*\n)*ranks:\n(.*\n)*  # As the column is called age: right\?\n"
    "  unit: years\n",
    status=0,
)
def _(folder):
    written(folder, lines(header=("file", "age")))
    return ["init", "."]


@case(
    "init: a folder for every degree",
    r"none \(3\), mild \(3\)(.*\n)*  names: \[none, mild, moderate, severe\]",
    status=0,
)
def _(folder):
    sorted_into(folder, DEGREES)
    return ["init", "all"]


@case(
    "init: a folder for every size, in no known order",
    r"  # names: \[LOWEST, '\.\.\.', HIGHEST\]\n(.*\n)*ordinalclip: before a training "
    r"can start: .*order is yours to say",
    status=1,
)
def _(folder):
    sorted_into(folder, CLOTHES)
    return ["init", "all"]


@case("init: the order said", r"  names: \[S, M, L, XL\]", status=0)
def _(folder):
    sorted_into(folder, CLOTHES)
    return ["init", "all", "ranks.names=[S, M, L, XL]"]


@case(
    "init: Excel with words and ids",
    r"table: rows\.xlsx\n(.*\n)*  suffix: \.png\n(.*\n)*  names: \[none, mild,",
    status=0,
)
def _(folder):
    pictures(folder)
    rows = {"id": [f"p{index}" for index in range(12)], "finding": [DEGREES[index % 4] for index in range(12)]}
    pd.DataFrame(rows).to_excel(folder / "rows.xlsx", index=False)
    return ["init", "."]


@case("init: missing labels", r"  # 3 rows have no label\.\n  missing: drop\n", status=0)
def _(folder):
    labelled(folder, [0, 1, 2, ""])
    return ["init", "."]


@case(
    "init: measurements, patients and a column of parts",
    r"split_column: part\n(.*\n)*  low: 10\n  high: 22\n  num: 7\n",
    status=0,
)
def _(folder):
    pictures(folder, 48)
    parts = ["train", "train", "validation", "test"]
    rows = [f"p{n}.png,{10 + n * 0.25:.3f},s{n // 4},{parts[n // 4 % 4]}" for n in range(48)]
    (folder / "labels.csv").write_text("\n".join(["image,reading,patient,part", *rows]) + "\n")
    return ["init", "."]


@case("init: copies", r"pictures are there more than once: copies stay in one part\.\n  duplicates: together", status=0)
def _(folder):
    labelled(folder, [0, 1, 2], number=48)
    for number in range(3, 48, 3):
        Path(f"p{number}.png").write_bytes(Path("p0.png").read_bytes())
    return ["init", "."]


@case(
    "init: two columns that could be the label",
    r"labels\.csv: several columns could be the label: blue \(0, 1, \.\.\.\), red "
    r"\(0, 1, \.\.\.\); data\.label_column=NAME says which",
)
def _(folder):
    rows = [f"p{n}.png,{n % 2},{n % 3 % 2}" for n in range(12)]
    written(folder, "\n".join(["image,blue,red", *rows]) + "\n")
    return ["init", "."]


@case("init: the column of the words that are put in order", r"  label_column: mood\n", status=0)
def _(folder):
    rows = [f"p{n}.png,{n % 3},{CLOTHES[n % 4]}" for n in range(12)]
    written(folder, "\n".join(["image,class,mood", *rows]) + "\n")
    return ["init", ".", "ranks.names=[S, M, L, XL]"]


@case(
    "init: a column of parts by other names",
    r"  # The column that says the part of every row: Train \(6\), val \(3\), Test \(3\)\.\n"
    r"  split_column: split\n",
    status=0,
)
def _(folder):
    parts = ["Train", "val", "Train", "Test"]
    rows = [f"p{n}.png,{n % 3},{parts[n % 4]}" for n in range(12)]
    written(folder, "\n".join(["image,grade,split", *rows]) + "\n")
    return ["init", "."]


@case("init: patients by number, and what else is about them", r"  group: PatientID\n", status=0)
def _(folder):
    rows = [f"p{n}.png,{n % 3},{n // 2},{'mf'[n % 2]},{n % 5}" for n in range(12)]
    written(folder, "\n".join(["image,grade,PatientID,patient_sex,user", *rows]) + "\n")
    return ["init", "."]


@case("init: an age in months", r"  unit: months\n", status=0)
def _(folder):
    written(folder, lines(header=("image", "age_months")))
    return ["init", "."]


@case(
    "init: two columns of pictures",
    r"labels\.csv: several columns name pictures: mask, image; data\.image_column=NAME says",
)
def _(folder):
    rows = [f"p{(n + 1) % 12}.png,p{n}.png,{n % 3}" for n in range(12)]
    written(folder, "\n".join(["mask,image,grade", *rows]) + "\n")
    return ["init", "."]


@case("init: two tables", r"\.: holds 2 tables \(a\.csv, b\.csv\); name the one to take")
def _(folder):
    for name in ("a.csv", "b.csv"):
        (folder / name).write_text(lines())
    return ["init", "."]


@case(
    "init: pictures alone",
    r"\.: nothing says the labels; name a table, .*, or sort the pictures into a folder for every",
)
def _(folder):
    pictures(folder)
    return ["init", "."]


@case(
    "init: a table of other pictures",
    r"labels\.csv, row 1 \(line 2\): no column names a picture: image 'q0\.png'.*p\d+\.png",
)
def _(folder):
    written(folder, lines().replace("\np", "\nq"))
    return ["init", "."]


@case("init: a table without labels", r"labels\.csv: no column beside 'image' holds labels; it has 'image'")
def _(folder):
    written(folder, "\n".join(line.partition(",")[0] for line in lines().splitlines()) + "\n")
    return ["init", "."]


@case("init: a folder that is not there", r"nowhere: no such folder")
def _(folder):
    return ["init", "nowhere"]


@case("init: a key that is not of the data", r"train: init takes keys of data and ranks")
def _(folder):
    labelled(folder, [0, 1, 2])
    return ["init", ".", "labels.csv", "train.lr=1"]
