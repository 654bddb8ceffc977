"""The table of `benchmarks/invariance.py`, in small, and that planted faults turn it red."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "invariance.py"
SMALL = ("--steps", "2", "--micro-batches", "1/2")


def table(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_heads_with_unequal_shares():
    """Every method that is registered, without being named here: 8 samples are 3, 3 and 2, one by one.

    One process with micro-batches: tests/test_training.py.
    """
    done = table(*SMALL, "--processes", "3", "--batch-size", "8", "--precision", "float64")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 cells in red" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["local-loss", "local-batch-norm", "scaled-gradient"])
def test_a_planted_fault_is_red(fault):
    done = table(*SMALL, "--processes", "2", "--batch-size", "32", "--methods", "ordinalclip", "--fault", fault)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "**RED**" in done.stdout
