"""The wheel, as whoever installs the package gets it: built, installed into an environment of its own, and used in an
empty folder. The libraries it needs are those of the running environment, to which a .pth file points."""

import os
import shutil
import site
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import ordinalclip

ROOT = Path(__file__).parents[1]
NEEDED = ("pyproject.toml", "README.md", "LICENSE", "ordinalclip", "baselines", "configs", "tests")
FEW = ("train.max_steps=2", "train.warmup_steps=0", "data.num_validation=10", "data.num_test=12")


def call(*command, cwd, status=0):
    """Run a command, without what this one has been told of where the package lies, and without any network."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PIP_NO_INDEX": "1", "PIP_NO_CACHE_DIR": "1"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that nothing of an earlier build is in it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in NEEDED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    build = ("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", out, ".")
    call(sys.executable, *build, cwd=source)
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The console script of a new environment."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    call(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--quiet", wheel, cwd=folder)
    paths = {"base": str(folder), "platbase": str(folder)}
    # Plain paths: .pth files in them, such as that of an editable installation of this package, are not read.
    libraries = Path(sysconfig.get_path("purelib", vars=paths)) / "libraries.pth"
    libraries.write_text("".join(f"{path}\n" for path in site.getsitepackages()))
    where = call(
        python, "-c", "import ordinalclip, baselines; print(ordinalclip.__file__, baselines.__file__)", cwd=folder
    )
    assert all(file.startswith(str(folder)) for file in where.stdout.split())
    return folder / "bin" / "ordinalclip"


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    ours = {name for name in names if not name.startswith(f"ordinalclip-{ordinalclip.__version__}.dist-info/")}
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "ordinalclip").rglob("*") if path.is_file()}
    expected |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "baselines").rglob("*") if path.is_file()}
    expected |= {f"ordinalclip/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert ours == {name for name in expected if "__pycache__" not in name}


@pytest.mark.slow
@pytest.mark.timeout(900)  # a minute of processor time
def test_an_installed_wheel_works_in_an_empty_folder(installed, tmp_path):
    """By names, and with everything that comes inside: configurations, weights, templates, other methods."""

    def ordinalclip(*words):
        done = call(installed, *words, cwd=tmp_path)
        assert done.stderr == "", "nothing of the libraries is said where a command went well"
        return done.stdout

    asked = "import importlib.metadata; print('ordinalclip', importlib.metadata.version('ordinalclip'))"
    assert ordinalclip("--version") == call(installed.parent / "python", "-c", asked, cwd=tmp_path).stdout
    listed = ordinalclip("configs")
    assert {"demo", "methods/ordinalclip", "compare/demo"} <= {line.split()[0] for line in listed.splitlines() if line}
    assert ordinalclip("configs", "show", "demo") == (ROOT / "configs" / "demo.yaml").read_text(encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(ordinalclip("configs", "show", "ordinalclip"))
    data = ("data.num_train=101", "data.shots=1", *FEW)
    assert "0 broken" in ordinalclip("check-data", "mine.yaml", "-q", *data)
    assert "run folder: runs/methods/ordinalclip\n" in ordinalclip("train", "ordinalclip", "-q", *data)
    assert (tmp_path / "runs/methods/ordinalclip/report.html").is_file()
    assert (tmp_path / "runs/methods/ordinalclip/model/README.md").is_file()
    table = ordinalclip("compare", "demo", "-q", "seeds=[1]", "data.num_train=16", *FEW)
    assert all(f"| {row} |" in table for row in ("OrdinalCLIP", "CNN head", "zero-shot CLIP", "constant"))
    assert ordinalclip("make-gauges", "pictures", "--num", "12", "-q") == "12 pictures and labels.csv in pictures\n"
    assert len(ordinalclip("predict", "pictures", "--model", "runs/compare/demo", "-q").splitlines()) == 12
    assert "data:" in ordinalclip("init", "pictures", "pictures/labels.csv")
    assert "paper: Cao et al." in ordinalclip("methods")
