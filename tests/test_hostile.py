"""Every hostile or unlucky input is answered rightly, or by one clear error: see `hostile`."""

import re
from pathlib import Path

import pytest
from hostile import load_cases, play

CASES = load_cases()


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=re.sub(r"\W+", "-", f"{case.area}-{case.what}"), marks=[pytest.mark.slow] * case.slow)
        for case in CASES
    ],
)
def test_the_user_sees_what_is_right_or_one_clear_error(case, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("COLUMNS", "120")
    seen = play(case, tmp_path)
    shown = seen.out + seen.err + caplog.text  # pytest takes warnings from standard error
    assert seen.status == case.status, shown
    assert "Traceback" not in shown
    if case.status == 2:
        *_, error = [line for line in seen.err.splitlines() if line.strip()]
        assert error.startswith("ordinalclip"), shown
        assert len(error) < 1200, error
        assert re.search(case.says, error), error
    else:
        assert re.search(case.says, shown), shown
    if case.after is not None:
        case.after(tmp_path)


def test_cases_have_names_of_their_own():
    names = [case.what for case in CASES]
    assert len(set(names)) == len(names)


def test_the_docs_show_them_all():
    """docs/bad-input.md is printed by benchmarks/hostile.py."""
    page = (Path(__file__).parents[1] / "docs" / "bad-input.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| (.+?) \| ", page, re.MULTILINE)
    assert sorted(set(shown) - {"case"}) == sorted(case.what.replace("|", "\\|") for case in CASES)
