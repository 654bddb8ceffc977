"""Pairs of methods of a finished comparison, tested over seeds and pictures together.

    python benchmarks/contrasts.py runs/compare/faces_language --pair "text anchors" "names shuffled" --out FILE.md

A comparison's own stars compare with its first row. Here every pair is tested in every variant, and p is corrected for
all of them by Holm's method.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ordinalclip.results.comparison import read_comparison
from ordinalclip.results.leaderboard import Leaderboard
from ordinalclip.results.significance import judge


def difference(board: Leaderboard, first: str, second: str) -> tuple[float, float, float, float, float]:
    """MAE of the second, and its mean excess over the first's, with 95 % interval and p of this pair alone.

    Raises:
        KeyError: a method that the comparison does not have.
    """
    entries = {entry.name: entry for entry in board.entries}
    pair = {name: entries[name].errors for name in (first, second)}
    verdicts = judge(pair, entries[first].images)
    worse = next(reversed(verdicts.values()))
    assert worse.p is not None, "three seeds at least"
    low, high = worse.difference_interval
    excess = worse.difference
    if next(iter(verdicts)) == second:
        excess, low, high = -excess, -high, -low
    return verdicts[first].mae, excess, low, high, worse.p


def holm(values: list[float]) -> list[float]:
    """p-values that hold for all of them together (Holm, 1979).

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    corrected, largest = [0.0] * len(values), 0.0
    for place, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        largest = max(largest, min(1.0, (len(values) - place) * values[index]))
        corrected[index] = largest
    return corrected


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path, help="folder of a finished comparison")
    parser.add_argument("--pair", nargs=2, action="append", required=True, metavar=("FIRST", "SECOND"))
    parser.add_argument("--out", type=Path, help="file for the table; default: printed alone")
    arguments = parser.parse_args()
    boards = read_comparison(arguments.comparison).boards
    tested = [(board, *pair, difference(board, *pair)) for pair in arguments.pair for board in boards]
    corrected = holm([found[-1] for *_, found in tested])
    lines = [
        "| pair | variant | MAE of the first | second - first | 95 % | p | p, corrected |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for (board, first, second, (mae, excess, low, high, p)), p_all in zip(tested, corrected, strict=True):
        numbers = f"{mae:.2f} | {excess:+.2f} | {low:+.2f} to {high:+.2f} | {p:.2g} | {p_all:.2g}"
        lines.append(f"| {first}; {second} | {board.variant or '-'} | {numbers} |")
    table = "\n".join(lines) + "\n"
    print(table, end="")
    if arguments.out:
        arguments.out.write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
