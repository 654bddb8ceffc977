"""Hostile and unlucky input: every case of tests/hostile is run, and docs/bad-input.md says what the user sees.

    python benchmarks/hostile.py

All cases run in this process, in two to three minutes; `--check` exits with 1 where one is not answered as it says.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import tempfile
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "bad-input.md"
LONGEST = 260  # characters of an answer
HEAD = """# Bad input, and what you see

Every input below is answered rightly, or by one line that names file, row, key or option and says what was allowed;
the exit status is then not 0, nothing half-written looks whole, and `--debug` shows where an error comes from. The
cases are tests (`tests/hostile`); `python benchmarks/hostile.py` runs them all and prints this page.

Status 0: done, with what is worth knowing; 1: done, but not all of it; 2: refused; 75: told to stop; 130: Ctrl-C.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a case is not answered as it says")
    arguments = parser.parse_args()
    os.environ |= {"COLUMNS": "120", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    sys.path.insert(0, str(ROOT / "tests"))
    from hostile import load_cases, play

    lines, wrong = [HEAD], []
    cases = load_cases()
    for area, members in groupby(cases, key=lambda case: case.area):
        lines += ["", f"## {area.capitalize()}", "", "| case | status | what the user sees |", "|---|---:|---|"]
        for case in members:
            with tempfile.TemporaryDirectory() as folder:
                seen = play(case, Path(folder))
                answer = answer_of(case, seen)
                if answer is None or seen.status != case.status:
                    wrong.append(f"{area}, {case.what}: status {seen.status}\n{seen.out}\n{seen.err}")
                if case.after is not None:
                    with contextlib.chdir(folder):
                        case.after(Path(folder))
                answer = re.sub(re.escape(folder) + "/?", "", answer or "")
            lines.append(f"| {cell(case.what)} | {seen.status} | {shown(answer)} |")
    text = "\n".join(lines) + f"\n\n{len(cases)} cases.\n"
    for each in wrong:
        print(each, file=sys.stderr)
    if not arguments.check:
        PAGE.write_text(text, encoding="utf-8")
        print(f"{len(cases)} cases in {PAGE.relative_to(ROOT)}, {len(wrong)} not answered as they say")
    return 1 if wrong else 0


def answer_of(case, seen) -> str | None:
    """The line of the output by which a case is known, None where there is none."""
    lines = [line for line in seen.err.splitlines() if line.strip()]
    text = lines[-1] if case.status == 2 and lines else seen.out + seen.err
    found = re.search(case.says, text)
    if found is None:
        return None
    begin = text.rfind("\n", 0, found.end() - 1 if found.group().endswith("\n") else found.end()) + 1
    return text[begin:].partition("\n")[0]


def shown(answer: str) -> str:
    """An answer as code, without our name, cut to `LONGEST` characters."""
    answer = re.sub(r"/tmp/[\w-]+/?", "", answer.removeprefix("ordinalclip: ").strip())
    answer = answer if len(answer) <= LONGEST else f"{answer[: LONGEST - 20]} ... {answer[-15:]}"
    return f"`` {cell(answer)} ``" if "`" in answer else f"`{cell(answer)}`"


def cell(text: str) -> str:
    """Text for a cell of a table in Markdown."""
    return text.replace("|", "\\|").replace("\t", " ")


if __name__ == "__main__":
    sys.exit(main())
