"""Pairs of a comparison: the sign of a difference, and p-values that hold for all pairs."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "contrasts.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("contrasts", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def board(**excess):
    """Five seeds of 200 pictures each, and methods whose errors are larger by `excess` on average."""
    rng = np.random.default_rng(0)
    images = [[f"{seed}-{number}" for number in range(200)] for seed in range(5)]
    common = [rng.gamma(2, 1, 200) for _ in images]
    errors = {name: [each + more + rng.normal(0, 0.1, 200) for each in common] for name, more in excess.items()}
    return SimpleNamespace(
        entries=[SimpleNamespace(name=name, errors=errors[name], images=images) for name in excess], variant=""
    )


def test_the_second_is_compared_with_the_first(script):
    boards = board(good=0.0, bad=0.5)
    mae, excess, low, high, p = script.difference(boards, "good", "bad")
    assert mae == pytest.approx(np.concatenate(boards.entries[0].errors).mean())
    assert low < excess < high
    assert low > 0.4
    assert high < 0.6
    assert p < 0.001
    other = script.difference(boards, "bad", "good")
    assert other[0] == pytest.approx(mae + excess)
    assert other[1:] == pytest.approx((-excess, -high, -low, p))


def test_p_values_hold_for_all_pairs(script):
    """Holm's: the smallest times all, the next times one less, none below one before it, none above 1."""
    assert script.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert script.holm([0.02, 0.021, 0.9]) == pytest.approx([0.06, 0.06, 0.9])
    assert script.holm([0.6, 0.7]) == [1, 1]
