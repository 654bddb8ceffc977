"""`benchmarks/mutants.py` in small: a fault is caught, a harmless change survives, a hang ends, and nothing rots."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FAULTS = """
one:
  file: package/**/code.py
  tests: tests/test_code.py
  faults:
  - text: the sign
    old: a + b
    new: a - b
  - text: the order
    old: a + b
    new: b + a
    survives: since addition commutes
  - text: for ever
    old: "    return a + b"
    new: "    while True: pass"
  - text: a slow test alone sees it
    old: HIDDEN = 1
    new: HIDDEN = 2
    slow: true
"""


def mutants(folder, *arguments):
    command = [sys.executable, folder / "benchmarks" / "mutants.py", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def project(tmp_path):
    """The script beside a package of one function, with two tests."""
    for name in ("benchmarks", "package/inner", "tests"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "benchmarks" / "mutants.py").write_text((BENCHMARKS / "mutants.py").read_text())
    (tmp_path / "benchmarks" / "mutants.yaml").write_text(FAULTS)
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\nmarkers = ['slow']\naddopts = '-n 2'\n")
    (tmp_path / "package" / "inner" / "code.py").write_text("HIDDEN = 1\n\n\ndef add(a, b):\n    return a + b\n")
    (tmp_path / "tests" / "test_code.py").write_text(
        "import pytest\nfrom package.inner.code import HIDDEN, add\n\n\n"
        "def test_add():\n    assert add(2, 3) == 5\n\n\n"
        "@pytest.mark.slow\ndef test_hidden():\n    assert HIDDEN == 1\n"
    )
    return tmp_path


@pytest.mark.slow
def test_what_is_caught_and_what_survives(project):
    before = {path: path.read_bytes() for path in project.rglob("*") if path.is_file()}
    done = mutants(project, "--jobs", "2", "--timeout", "20", "--out", str(project / "table.md"))
    assert done.returncode == 0, done.stderr
    lines = (project / "table.md").read_text().splitlines()
    assert "| one | the sign | `test_code.py::test_add` |" in lines[2]
    assert "| one | the order | **survived** since addition commutes |" in lines[3]
    assert "| one | for ever | `hangs: 2" in lines[4]
    assert "| one | a slow test alone sees it | `test_code.py::test_hidden` |" in lines[5]
    assert lines[-1] == "| all | 4 | 3 |"
    (project / "table.md").unlink()
    assert {path: path.read_bytes() for path in project.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_what_is_wrong_with_a_list_is_said(project):
    text = project / "benchmarks" / "mutants.yaml"
    for old, new, message in (
        ("old: HIDDEN = 1", "old: HIDDEN = 3", "must occur once in 1 files that match package/**/code.py, got 0"),
        ("old: HIDDEN = 1", "old: a", "the sign|a slow test alone sees it: must occur once"),
        ("new: HIDDEN = 2", "new: HIDDEN = (", "the fault is no Python"),
        ("tests: tests/test_code.py", "tests: tests/test_code.py -k nothing", "pytest ran no test"),
    ):
        text.write_text(FAULTS.replace(old, new))
        done = mutants(project)
        assert done.returncode == 2
        assert any(part in done.stderr for part in message.split("|")), done.stderr
    text.write_text(FAULTS.replace("    survives: since addition commutes\n", ""))
    assert mutants(project, "--timeout", "20").returncode == 1
    (project / "tests" / "test_code.py").write_text("def test_broken():\n    assert False\n")
    done = mutants(project)
    assert done.returncode == 2
    assert "without a fault, tests/test_code.py: tests/test_code.py::test_broken" in done.stderr
    assert "two is not in mutants.yaml; modules: one" in mutants(project, "--only", "two").stderr


@pytest.mark.slow
def test_every_fault_still_has_its_place():
    """Whoever changes a line that the list names changes the list."""
    done = mutants(BENCHMARKS.parent, "--list")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 75
