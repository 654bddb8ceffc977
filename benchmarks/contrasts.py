"""Pairs of methods of finished comparisons, tested over seeds and pictures together.

    python benchmarks/contrasts.py runs/compare/faces_language --pair "text anchors" "names shuffled" --out FILE.md

A comparison's own stars compare with its first row. Here every pair is tested in every variant, and p is corrected for
all of them by Holm's method. `--errors FILE` keeps all that the test needs, the absolute errors of every test picture:
such files stand for folders, and seeds that ran apart are put together by naming several.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from ordinalclip.results.comparison import read_comparison
from ordinalclip.results.significance import judge

KEYS = ["variant", "seed", "image", "label"]  # of a row; its other columns are methods


def errors_of(comparison: Path) -> pd.DataFrame:
    """Absolute errors of the test parts of a comparison, or of a file that `--errors` wrote.

    Returns:
        a row per variant, seed and picture, with the `KEYS` and a column per method, NaN where a variant lacks it.
    """
    if comparison.is_file():
        names = {"variant": str, "image": str}  # a picture may be called NA, and the only variant is called nothing
        return pd.read_csv(comparison, keep_default_na=False, na_values=[""], dtype=names).fillna({"variant": ""})
    frames = []
    for board in read_comparison(comparison).boards:
        first = board.entries[0]
        for run, (folder, images) in enumerate(zip(first.folders, first.images, strict=True)):
            seed = folder.read_config().seed
            rows = [
                (board.variant, seed, name if first.images_recur else f"{name}, seed {seed}", label)
                for name, label, _ in images
            ]
            values = {entry.name: entry.errors[run] for entry in board.entries}
            frames.append(pd.concat([pd.DataFrame(rows, columns=KEYS), pd.DataFrame(values)], axis=1))
    return pd.concat(frames, ignore_index=True)


def together(comparisons: list[Path]) -> pd.DataFrame:
    """The seeds of several comparisons as those of one.

    Raises:
        ValueError: a seed of a variant that two of them have.
    """
    frames = [errors_of(each) for each in comparisons]
    found: dict[tuple[str, int], Path] = {}
    for path, frame in zip(comparisons, frames, strict=True):
        for variant, seed in frame[KEYS[:2]].drop_duplicates().itertuples(index=False):
            if other := found.get((variant, seed)):
                raise ValueError(f"seed {seed} is in {other} and in {path}: its pictures would count twice")
            found[variant, seed] = path
    return pd.concat(frames, ignore_index=True)


def difference(errors: pd.DataFrame, first: str, second: str) -> tuple[float, float, float, float, float]:
    """MAE of the first, and the mean excess of the second over it, with 95 % interval and p of this pair alone.

    Raises:
        KeyError: a method that the comparison does not have.
        ValueError: fewer than three seeds.
    """
    if missing := [name for name in (first, second) if name not in errors or errors[name].isna().any()]:
        raise KeyError(f"{', '.join(missing)}: not a method of all that is compared here")
    seeds = [rows for _, rows in errors.groupby("seed")]
    pair = {name: [rows[name].to_numpy(float) for rows in seeds] for name in (first, second)}
    verdicts = judge(pair, [list(zip(rows["image"], rows["label"], strict=True)) for rows in seeds])
    worse = next(reversed(verdicts.values()))
    if worse.p is None:
        raise ValueError(f"{len(seeds)} seeds, and it takes three at least to see what they vary by")
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


def table(errors: pd.DataFrame, pairs: list[tuple[str, str]]) -> str:
    """A row per pair and variant, as Markdown."""
    variants = dict(tuple(errors.groupby("variant", sort=False)))
    tested = [(name, *pair, difference(rows, *pair)) for pair in pairs for name, rows in variants.items()]
    corrected = holm([found[-1] for *_, found in tested])
    lines = [
        "| pair | variant | MAE of the first | second - first | 95 % | p | p, corrected |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for (variant, first, second, (mae, excess, low, high, p)), p_all in zip(tested, corrected, strict=True):
        numbers = f"{mae:.2f} | {excess:+.2f} | {low:+.2f} to {high:+.2f} | {p:.2g} | {p_all:.2g}"
        lines.append(f"| {first}; {second} | {variant or '-'} | {numbers} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparisons", type=Path, nargs="+", help="folders of finished comparisons, or error files")
    parser.add_argument("--pair", nargs=2, action="append", default=[], metavar=("FIRST", "SECOND"))
    parser.add_argument("--errors", type=Path, help="file for the errors of all methods; .csv.gz")
    parser.add_argument("--out", type=Path, help="file for the table; default: printed alone")
    arguments = parser.parse_args()
    errors = together(arguments.comparisons)
    if arguments.errors:
        shorter = errors.astype(dict.fromkeys(errors.columns.drop(KEYS), "float32"))  # labels tell pictures apart
        shorter.to_csv(arguments.errors, index=False, compression={"method": "gzip", "mtime": 0})
    if arguments.pair:
        text = table(errors, [tuple(pair) for pair in arguments.pair])
        print(text, end="")
        if arguments.out:
            arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
