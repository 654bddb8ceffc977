"""Every hostile or unlucky input is answered rightly, or by one clear error: see `hostile`."""

import re

import pytest
from hostile import load_cases

from ordinalclip.cli import main

CASES = load_cases()


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=re.sub(r"\W+", "-", f"{case.area}-{case.what}"), marks=[pytest.mark.slow] * case.slow)
        for case in CASES
    ],
)
def test_the_user_sees_what_is_right_or_one_clear_error(case, tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    arguments = case.arrange(tmp_path)
    capsys.readouterr()
    try:
        status = main(arguments)
    except SystemExit as stopped:  # argparse
        status = stopped.code
    out, err = capsys.readouterr()
    assert status == case.status, f"{out}\n{err}"
    assert "Traceback" not in out + err
    if case.status == 2:
        *_, error = [line for line in err.splitlines() if line.strip()]
        assert error.startswith("ordinalclip"), err
        assert len(error) < 1200, error
        assert re.search(case.says, error), error
    else:
        shown = out + err + caplog.text  # pytest takes warnings from standard error
        assert re.search(case.says, shown), shown
    if case.after is not None:
        case.after(tmp_path)


def test_cases_have_names_of_their_own():
    names = [case.what for case in CASES]
    assert len(set(names)) == len(names)
