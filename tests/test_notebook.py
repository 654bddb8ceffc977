"""The notebooks run from top to bottom, as committed, and what is committed was run."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_notebook(path, tmp_path):
    notebook = nbformat.read(path, 4)
    committed = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    # What is printed comes in pieces, as many as the kernel's timer makes of it.
    client = NotebookClient(
        notebook, timeout=280, coalesce_streams=True, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    for before, after in zip(committed, outputs, strict=True):
        assert [output.output_type for output in before] == [output.output_type for output in after]
        assert not [output for output in after if output.get("name") == "stderr"]
    assert str(Path.home()) not in str(committed)  # no path of the machine it was run on
