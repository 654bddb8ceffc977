"""Run notebooks from top to bottom and keep what they say and draw.

    python notebooks/execute.py [NOTEBOOK ...]      # in place; all without names. `make notebooks` does it

Each runs in a folder of its own that is thrown away. The tests run them by the same function.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = sorted(Path(__file__).parent.glob("*.ipynb"))


def executed(path: Path, folder: Path) -> nbformat.NotebookNode:
    """A notebook as it is after running in a folder.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell fails.
        ValueError: an output that names a folder of this machine.
    """
    notebook = nbformat.read(path, 4)
    # What is printed comes in pieces, as many as the kernel's timer makes of it: joined.
    options = {"timeout": 280, "coalesce_streams": True, "resources": {"metadata": {"path": str(folder)}}}
    # One thread: two kernels with two each on two cores wait for one another, several times as long as they compute.
    NotebookClient(notebook, record_timing=False, **options).execute(env={"OMP_NUM_THREADS": "1", **os.environ})
    for cell in notebook.cells:
        for place in (str(Path.home()), str(folder)):
            if place in str(cell.get("outputs", "")):
                raise ValueError(f"{path.name}: an output names {place}: {cell.source}")
    return notebook


def main(paths: list[Path]) -> None:
    for path in paths:
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            notebook = executed(path, Path(folder))
        nbformat.write(notebook, path)
        print(f"{path.name}: {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]] or NOTEBOOKS)
