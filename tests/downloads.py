"""Downloads of the true layouts, made up: small drawn pictures under the owners' names, with the owners' tables."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
from PIL import Image


class Pictures:
    """Writes pictures into a download; the same `seed` gives the same bytes."""

    def __init__(self, root: Path):
        self.root = root
        self.seeds = itertools.count()

    def __call__(self, name: str, seed: int | None = None) -> str:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(next(self.seeds) if seed is None else 10_000 + seed)
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(path)
        return name

    def text(self, name: str, lines: list[str]) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def utkface(root: Path, coral: bool = True) -> None:
    """60 faces, one name without a race, one that is none; copies across the lists, one of them with two ages."""
    picture = Pictures(root)
    names = [f"{20 + number % 45}_{number % 2}_{number % 5}_2017{number:013d}.jpg.chip.jpg" for number in range(58)]
    for name in names:
        picture(f"UTKFace/{name}")
    picture("UTKFace/39_1_20170116174525125.jpg.chip.jpg")
    picture("UTKFace/no_age_at_all.jpg.chip.jpg")
    picture(f"UTKFace/{names[5]}", seed=1)  # 25, training
    picture("UTKFace/25_0_0_20170000000000999.jpg.chip.jpg", seed=1)  # 25, test
    picture(f"UTKFace/{names[6]}", seed=2)  # 26, training
    picture("UTKFace/40_0_0_20170000000000998.jpg.chip.jpg", seed=2)  # 40, training
    if coral:
        fitting = [name for name in names if 21 <= int(name[:2]) <= 60]
        test = [*fitting[30:], "25_0_0_20170000000000999.jpg.chip.jpg"]
        train = [*fitting[:30], "40_0_0_20170000000000998.jpg.chip.jpg"]
        for file, listed in (("utk_train.csv", train), ("utk_test.csv", test)):
            rows = [f"{number},{name},{int(name[:2]) - 21}" for number, name in enumerate(listed)]
            picture.text(file, [",file,age", *rows])


ADIENCE_AGES = ("(0, 2)", "(4, 6)", "(8, 12)", "(15, 20)", "(25, 32)", "(38, 43)", "(48, 53)", "(60, 100)")


def adience(root: Path) -> None:
    """Five folds of sixteen faces of eight people, and odd ages in the first."""
    picture = Pictures(root)
    header = "user_id\toriginal_image\tface_id\tage\tgender\tx\ty\tdx\tdy\ttilt_ang\tfiducial_yaw_angle\tfiducial_score"
    for fold in range(5):
        ages = [age for age in ADIENCE_AGES for _ in range(2)]
        ages += ["(8, 23)", "35", "None", "13", "(27, 32)"] if fold == 0 else []
        lines = [header]
        for number, age in enumerate(ages):
            user, face, image = f"{fold}00@N03", fold * 100 + number // 2, f"{fold}{number:03d}_o.jpg"
            picture(f"aligned/{user}/landmark_aligned_face.{face}.{image}")
            lines.append("\t".join([user, image, str(face), age, "m", *"1234", "0", "0", "90"]))
        picture.text(f"fold_{fold}_data.txt", lines)


def hci(root: Path) -> None:
    """Five decades of 26 pictures."""
    picture = Pictures(root)
    for decade in ("1930s", "1940s", "1950s", "1960s", "1970s"):
        for number in range(26):
            picture(f"HistoricalColor-ECCV2012/data/imgs/decade_database/{decade}/{decade}_{number:03d}.jpg")


def aesthetics(root: Path) -> None:
    """80 photos of four categories, three of which are not there any more."""
    picture = Pictures(root)
    lines = ["#flickr_photo_id\tcategory\tbeauty_scores"]
    for number in range(80):
        category = ("people", "animals", "urban", "nature")[number % 4]
        grade = number // 4 % 5 + 1
        lines.append(f"{1000 + number}\t{category}\t{grade},{grade},{grade},1,5")
        if number not in (3, 17, 40):
            picture(f"img_files/{1000 + number}.jpg")
    picture.text("beauty-icwsm15-dataset.tsv", lines)


def agedb(root: Path, dir_list: bool = True) -> None:
    """12 people with 5 ages each."""
    picture = Pictures(root)
    lines = ["age,path,split"]
    for number in range(60):
        name = f"{number}_Person{number % 12}_{20 + number // 12 * 10}_{'mf'[number % 2]}.jpg"
        picture(f"AgeDB/{name}")
        part = ("train", "train", "train", "val", "test")[number % 5]
        lines.append(f"{20 + number // 12 * 10},AgeDB/{name},{part}")
    if dir_list:
        picture.text("agedb.csv", lines)


def morph(root: Path, settings: str = "ABCD") -> None:
    """60 pictures of 20 people, and the lists of the settings."""
    picture = Pictures(root)
    names = [
        f"{100000 + number // 3}_{number % 3:02d}{'MF'[number // 3 % 2]}{20 + number % 40}.JPG" for number in range(60)
    ]
    for name in names:
        picture(f"Album2/{name}")

    def age(name: str) -> str:
        return name[-6:-4]

    if "A" in settings:
        for fold in range(5):
            test = names[fold:50:5]
            train = [name for name in names[:50] if name not in test]
            for part, members in (("train", train), ("test", test)):
                rows = [f"0 1 {age(name)} {name} morph" for name in members]
                picture.text(f"lists/Setting_1_fold{fold}_{part}.txt", ["race gender age filename database", *rows])
    if "B" in settings:
        for number in range(3):
            rows = [f"0 1 {age(name)} {name} morph" for name in names[number::3]]
            picture.text(f"lists/Setting_2_fold{number}.txt", ["race gender age filename database", *rows])
    if "C" in settings:
        rows = [f"{name}\t{place % 5}\t{age(name)}\tmorph" for place, name in enumerate(names)]
        picture.text("lists/Setting_3.txt", ["filename\tfold\tage\tdatabase", *rows])
    if "D" in settings:  # by person, but for the first picture
        folds = [place // 3 % 5 for place in range(60)]
        folds[0] = 4
        rows = [f"morph\t{name}\t{fold}\t{age(name)}" for name, fold in zip(names, folds, strict=True)]
        picture.text("lists/Setting_4.txt", ["database\tfilename\tfold\tage", *rows])


def rsna(root: Path, whole: bool = True) -> None:
    """40 training, 10 validation and 6 test radiographs."""
    picture = Pictures(root)
    rows = []
    for number in range(40):
        picture(f"boneage-training-dataset/{1377 + number}.png")
        rows.append(f"{1377 + number},{12 + 5 * number},{number % 2 == 0}")
    picture.text("train.csv", ["id,boneage,male", *rows])
    if not whole:
        return
    rows = []
    for number in range(10):
        picture(f"Bone Age Validation Set/boneage-validation-dataset-{1 + number % 2}/{2000 + number}.png")
        rows.append(f"{2000 + number},TRUE,{24 + 12 * number}")
    picture.text("Bone Age Validation Set/Validation Dataset.csv", ["Image ID,male,Bone Age (months)", *rows])
    rows = []
    for number in range(6):
        picture(f"Bone Age Test Set/Test Set Images/{4360 + number}.png")
        rows.append(f"{4360 + number},M,{30.5 + 20 * number}")
    header = "Case ID,Sex,Ground truth bone age (months)"
    picture.text("Bone Age Test Set/Bone age ground truth.csv", [header, *rows])


def knee(root: Path) -> None:
    """Both knees of 45 patients, one of whom is in two parts; auto_test beside them."""
    picture = Pictures(root)
    base = "KneeXrayData/ClsKLData/kneeKL224"
    for number in range(45):
        part = "train" if number < 30 else "val" if number < 35 else "test"
        for side in "LR":
            picture(f"{base}/{part}/{number % 5}/{9_000_000 + number}{side}.png")
    picture(f"{base}/train/0/9000044L.png")
    picture(f"{base}/auto_test/0/9000099L.png")


def aptos(root: Path) -> None:
    """50 photographs; one twice with two grades, one twice with one."""
    picture = Pictures(root)
    rows = []
    for number in range(50):
        seed = {0: 1, 1: 1, 5: 2, 10: 2}.get(number)
        picture(f"train_images/{number:012x}.png", seed)
        rows.append(f"{number:012x},{number % 5}")
    picture.text("train.csv", ["id_code,diagnosis", *rows])
    picture.text("test.csv", ["id_code", "0005cfc8afb6"])
    picture("test_images/0005cfc8afb6.png")


def idrid(root: Path) -> None:
    """40 training and 10 testing photographs; the first of either are the same, with two grades."""
    picture = Pictures(root)
    base = "B. Disease Grading"
    for part, folder, table, total in (
        ("Training", "a. Training Set", "a. IDRiD_Disease Grading_Training Labels.csv", 40),
        ("Testing", "b. Testing Set", "b. IDRiD_Disease Grading_Testing Labels.csv", 10),
    ):
        rows = []
        for number in range(1, total + 1):
            grade = (number + (part == "Testing")) % 5
            picture(f"{base}/1. Original Images/{folder}/IDRiD_{number:03d}.jpg", 1 if number == 1 else None)
            rows.append(f"IDRiD_{number:03d},{grade},2,,,")
        picture.text(
            f"{base}/2. Groundtruths/{table}", ["Image name,Retinopathy grade,Risk of macular edema ,,,", *rows]
        )


def koniq(root: Path) -> None:
    """50 pictures in the large size."""
    picture = Pictures(root)
    rows = []
    for number in range(50):
        picture(f"1024x768/{10_000 + number}.jpg")
        part = ("training", "training", "training", "validation", "test")[number % 5]
        rows.append(f"{10_000 + number}.jpg,0,0,0.2,0.7,0.1,105,{20 + number * 1.25},0.5,{part}")
    picture.text("koniq10k_distributions_sets.csv", ["image_name,c1,c2,c3,c4,c5,c_total,MOS,SD,set", *rows])


def elpv(root: Path) -> None:
    """40 cells of both types and all levels."""
    picture = Pictures(root)
    rows = []
    for number in range(40):
        picture(f"images/cell{number + 1:04d}.png")
        level = ("0.0", "0.3333333333333333", "0.6666666666666666", "1.0")[number // 2 % 4]
        rows.append(f"images/cell{number + 1:04d}.png  {level:<18}  {'mono' if number % 2 else 'poly'}")
    picture.text("labels.csv", rows)


MAKERS = {
    "adience": adience,
    "aesthetics": aesthetics,
    "agedb": agedb,
    "aptos": aptos,
    "elpv": elpv,
    "hci": hci,
    "idrid": idrid,
    "knee": knee,
    "koniq": koniq,
    "morph": morph,
    "rsna": rsna,
    "utkface": utkface,
}
