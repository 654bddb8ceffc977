"""Downloads of data sets, wrong, half unpacked or damaged, and prepared folders: `ordinalclip prepare` and `--data`."""

import shutil

import downloads

from hostile import case
from ordinalclip.cli import main


def prepared(folder, name, *more):
    """A made-up download, changed by the caller, and the words that prepare it."""
    downloads.MAKERS[name](folder / "download")
    return ["prepare", name, "-q", "--from", "download", "--to", "ready", *more]


def nothing_written(folder):
    assert not (folder / "ready").exists()
    assert not list(folder.glob(".partial-*"))


@case(
    "prepare: the folder of another data set",
    r"download: looked for faces named AGE_GENDER_RACE_DATE\.jpg\.chip\.jpg \(UTKFace\.tar\.gz\), found 1024x768/, "
    r"koniq10k_distributions_sets\.csv",
    after=nothing_written,
)
def _(folder):
    downloads.koniq(folder / "download")
    return ["prepare", "utkface", "--from", "download", "--to", "ready"]


@case(
    "prepare: an archive that is not unpacked",
    r"looked for pictures in train_images/, found train\.csv, train_images\.zip; train_images\.zip is not unpacked",
    after=nothing_written,
)
def _(folder):
    words = prepared(folder, "aptos")
    for name in ("train_images", "test_images"):
        shutil.rmtree(folder / "download" / name)
    (folder / "download/test.csv").unlink()
    (folder / "download/train_images.zip").write_bytes(b"PK\x03\x04")
    return words


@case(
    "prepare: an archive in place of a folder", r"^ordinalclip: faces\.zip is an archive: unpack it and give the fold"
)
def _(folder):
    (folder / "faces.zip").write_bytes(b"PK\x03\x04")
    return ["prepare", "utkface", "--from", "faces.zip", "--to", "ready"]


@case(
    "prepare: half of the pictures are missing",
    r"train\.csv, line 2: 1377 is not below download, as 20 of the 40 pictures listed there are not; is everything un",
    after=nothing_written,
)
def _(folder):
    words = prepared(folder, "rsna")
    for number in range(1377, 1397):
        (folder / f"download/boneage-training-dataset/{number}.png").unlink()
    return words


@case(
    "prepare: pictures that cannot be read",
    r"9000000L\.png: not a readable image \(empty\), as 2 of 91 are",
    after=nothing_written,
)
def _(folder):
    words = prepared(folder, "knee")
    part = folder / "download/KneeXrayData/ClsKLData/kneeKL224/train/0"
    (part / "9000000L.png").write_bytes(b"")
    (part / "9000000R.png").write_text("<html>Not found</html>")
    return words


@case(
    "prepare: a picture whose name does not say the patient",
    r"scan\.png: not called by seven digits of the patient with L or R, as 9003175R\.png is; 1 are so",
    after=nothing_written,
)
def _(folder):
    words = prepared(folder, "knee")
    part = folder / "download/KneeXrayData/ClsKLData/kneeKL224/train/0"
    (part / "9000000L.png").rename(part / "scan.png")
    return words


@case(
    "prepare: a row of the owners' table twice",
    r"labels\.csv, line 41: images/cell0001\.png stands in the table twice, first in download/labels\.csv, line 1",
    after=nothing_written,
)
def _(folder):
    words = prepared(folder, "elpv")
    table = folder / "download/labels.csv"
    table.write_text(table.read_text() + table.read_text().partition("\n")[0] + "\n")
    return words


@case(
    "prepare: a column of the owners' table is missing",
    r"train\.csv: looked for a column 'diagnosis', found 'id_code', 'level'",
    after=nothing_written,
)
def _(folder):
    words = prepared(folder, "aptos")
    table = folder / "download/train.csv"
    table.write_text(table.read_text().replace("diagnosis", "level"))
    return words


@case(
    "prepare: a list of a published split that says other ages",
    r"utk_test\.csv, line 2: age 0 for .*; the lists of CORAL say its age or the years from 21",
    after=nothing_written,
)
def _(folder):
    words = prepared(folder, "utkface")
    table = folder / "download/utk_test.csv"
    first = table.read_text().splitlines()[1]
    table.write_text(table.read_text().replace(first, first.rpartition(",")[0] + ",0"))
    return words


@case(
    "prepare: one list of a published split without the other",
    r"looked for utk_test\.csv beside the other list of the CORAL split, found UTKFace/, utk_train\.csv",
    after=nothing_written,
)
def _(folder):
    words = prepared(folder, "utkface")
    (folder / "download/utk_test.csv").unlink()
    return words


@case(
    "prepare: an age that is none",
    r"fold_3_data\.txt, line 2: age 'young' is none; such as \(25, 32\), 35 or None",
    after=nothing_written,
)
def _(folder):
    words = prepared(folder, "adience")
    table = folder / "download/fold_3_data.txt"
    table.write_text(table.read_text().replace("(0, 2)", "young", 1))
    return words


@case(
    "prepare: a table that is no text in UTF-8",
    r"^ordinalclip: download/train\.csv: not a text in UTF-8",
    after=nothing_written,
)
def _(folder):
    words = prepared(folder, "aptos")
    (folder / "download/train.csv").write_bytes("id_code,diagnosis\nä,1\n".encode("latin-1"))
    return words


@case(
    "prepare: the same pictures in two sizes", r"pictures are in 1024x768/ \(50\), copy/1024x768/ \(50\); give one of"
)
def _(folder):
    words = prepared(folder, "koniq")
    shutil.copytree(folder / "download/1024x768", folder / "download/copy/1024x768")
    return words


@case("prepare: to a folder inside the download", r"--to download/ready and --from download lie in each other")
def _(folder):
    downloads.hci(folder / "download")
    return ["prepare", "hci", "--from", "download", "--to", "download/ready"]


@case("prepare: to a folder that holds something else", r"^ordinalclip: ready holds notes\.txt already; name another")
def _(folder):
    words = prepared(folder, "hci", "--overwrite")
    (folder / "ready").mkdir()
    (folder / "ready/notes.txt").write_text("mine")
    return words


@case(
    "prepare: to a folder with other content of the same data set",
    r"ready holds elpv prepared from other files or in another way; --overwrite replaces it",
)
def _(folder):
    words = prepared(folder, "elpv")
    assert main(words) == 0
    (folder / "download/labels.csv").write_text((folder / "download/labels.csv").read_text().replace("1.0", "0.0"))
    return words


@case("prepare: a recipe that there is not", r"there is no recipe 'utk'; nearest: utkface")
def _(folder):
    return ["prepare", "utk", "--from", "download", "--to", "ready"]


@case("prepare: half of what it needs", r"^ordinalclip: prepare hci: --from DOWNLOAD and --to FOLDER belong together")
def _(folder):
    return ["prepare", "hci", "--to", "ready"]


@case(
    "compare: a data set that is not prepared",
    r"adience needs prepared pictures: .*`ordinalclip prepare adience --from DOWNLOAD --to FOLDER`, then add --data",
)
def _(folder):
    return ["compare", "adience"]


@case("compare: the prepared folder of another data set", r"compares on adience; the folder of --data holds hci")
def _(folder):
    assert main(prepared(folder, "hci")) == 0
    return ["compare", "adience", "--data", "ready"]


@case("--data: a folder that nothing has prepared", r"^ordinalclip: download: no data\.yaml in it; --data takes what")
def _(folder):
    downloads.hci(folder / "download")
    return ["train", "hci", "--data", "download"]


@case(
    "--data: a configuration of one's own",
    r"mine\.yaml: key method; a YAML file of a prepared folder has recipe, parts",
)
def _(folder):
    (folder / "mine.yaml").write_text("recipe: a\nparts: b\ndata: {}\nranks: {}\nsplits: []\nmethod: l1\n")
    return ["train", "default", "--data", "mine.yaml"]


@case(
    "--data: the pictures have gone",
    r"^ordinalclip: data\.root='.*download': no such folder",
)
def _(folder):
    assert main(prepared(folder, "hci")) == 0
    shutil.rmtree(folder / "download")
    return ["check-data", "default", "-q", "--data", "ready"]


@case(
    "--data: a published split with somebody in two parts, held to its people",
    r"subject '\d+' \(data\.group\) is in two of the given parts, train and",
)
def _(folder):
    assert main(prepared(folder, "morph")) == 0
    return ["check-data", "default", "-q", "--data", "ready/A.yaml", "data.group=subject"]
