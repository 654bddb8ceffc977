"""The notebooks run from top to bottom, as committed, and what is committed was run."""

import importlib.util
import re
from pathlib import Path

import nbformat
import pytest

SCRIPT = Path(__file__).parents[1] / "notebooks" / "execute.py"
NOTEBOOKS = sorted(SCRIPT.parent.glob("*.ipynb"))


def codes_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_a_notebook_says_what_it_needs_and_its_cells_are_short(path):
    notebook = nbformat.read(path, 4)
    assert re.search(r"`pip install 'ordinalclip\[notebooks[a-z,]*]'`", notebook.cells[0].source)
    for number, cell in enumerate(codes_of(notebook), 1):
        assert cell.execution_count == number
        assert len(list(filter(None, cell.source.splitlines()))) <= 10, cell.source


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_notebook(path, tmp_path):
    spec = importlib.util.spec_from_file_location("execute", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    committed = nbformat.read(path, 4)
    for before, after in zip(codes_of(committed), codes_of(script.executed(path, tmp_path)), strict=True):
        assert [output.output_type for output in before.outputs] == [output.output_type for output in after.outputs]
        assert not [output for output in after.outputs if output.get("name") == "stderr"]
    assert str(Path.home()) not in str(committed)  # no path of the machine it was run on
