"""A comparison whose seeds ran in parts, of the first of which only the table is kept, as one.

    python benchmarks/pool_seeds.py benchmarks/results/cells_finetuned benchmarks/results/cells_finetuned/seeds_4_5 \
        --pair cross-entropy OrdinalCLIP --out benchmarks/results/cells_finetuned/five_seeds.md

Means and standard deviations over all seeds follow exactly from those of the parts. So does the difference of a pair.
What a difference varies by over seeds, and over the pictures that seeds share, the first part's results.csv tells of
every method against its first row. Of two others it is at most the sum of theirs (triangle inequality), and p is at
most what follows from that; such pairs are marked. The other parts bring the errors of every picture (`contrasts.py
--errors`). Where the errors of all seeds are kept, contrasts.py says more.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from contrasts import holm, together

from ordinalclip.metrics import metrics_with
from ordinalclip.results.significance import MIN_SEEDS, Spread

METRICS = ["mae", "macro_mae", "rmse", "r2", "qwk", "spearman"]  # and CS at what the tables have


def pooled(parts: Sequence[tuple[int, float, float]]) -> tuple[float, float]:
    """Mean and standard deviation of all values, from the number, mean and standard deviation of each part.

    >>> pooled([(3, 2.0, 1.0), (2, 4.5, 0.5**0.5)])  # of 1, 2, 3 and of 4, 5
    (3.0, 1.5811388300841898)
    >>> pooled([(2, 1.5, 0.5**0.5), (1, 3.0, float("nan"))])  # of 1, 2 and of 3
    (2.0, 1.0)
    """
    numbers, means, stds = np.asarray(parts, dtype=float).T
    mean = float(numbers @ means / numbers.sum())
    squares = (numbers - 1) @ np.where(numbers > 1, stds, 0) ** 2 + numbers @ (means - mean) ** 2
    return mean, float(np.sqrt(squares / (numbers.sum() - 1)))


@dataclass(frozen=True)
class Pair:
    """The excess of one method's MAE over another's, over all seeds; `bounded`: its p may be smaller, not larger."""

    mean: float
    spread: Spread
    bounded: bool

    @property
    def p(self) -> float:
        return self.spread.p_value(self.mean)


def pair_of(table: pd.DataFrame, errors: pd.DataFrame, first: str, second: str) -> Pair:
    """The second's excess over the first.

    Args:
        table: results.csv of the first part by method, its first row first, of three seeds at least.
        errors: of the other parts, of other seeds, as `contrasts.errors_of` has them.

    Raises:
        ValueError: the comparison has variants, or the first part too few seeds to have standard errors.
    """
    if table.index.has_duplicates or errors["variant"].nunique() > 1 or table["seeds"].iloc[0] < MIN_SEEDS:
        raise ValueError(f"a table without variants is asked for, the first part's of {MIN_SEEDS} seeds at least")
    excess = (errors[second] - errors[first]).groupby(errors["seed"]).mean()
    others = table.loc[[name for name in (first, second) if name != table.index[0]]]
    seeds, images = others[["difference_se_seeds", "difference_se_images"]].sum()
    number = int(table["seeds"].iloc[0])
    before = table["mae"][second] - table["mae"][first]
    parts = [(number, before, seeds * number**0.5), *((1, value, 0.0) for value in excess)]
    mean, std = pooled(parts)
    every = number + len(excess)
    df_images = int(others["df_images"].iloc[0])
    return Pair(mean, Spread(std / every**0.5, float(images), every - 1, df_images), bounded=len(others) > 1)


def rows_of(tables: Sequence[pd.DataFrame]) -> list[str]:
    """The methods over all seeds, the smallest MAE first, as lines of Markdown."""
    cs = [name for name in tables[0] if name.startswith("cs@") and not name.endswith("_std")]
    metrics = [*METRICS, *cs]
    found = {
        method: {
            metric: pooled([tuple(table.loc[method, ["seeds", metric, f"{metric}_std"]]) for table in tables])
            for metric in metrics
        }
        for method in tables[0].index
    }
    known = metrics_with([float(name.removeprefix("cs@")) for name in cs])
    titles = [known[name].title for name in metrics]
    lines = [f"| method | {' | '.join(titles)} |", f"|---|{'---:|' * len(titles)}"]
    for method in sorted(found, key=lambda name: found[name]["mae"]):
        cells = ("-" if np.isnan(mean) else f"{mean:z.3f} ± {std:.3f}" for mean, std in found[method].values())
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path, help="folder with results.csv of three seeds at least")
    parser.add_argument(
        "others", type=Path, nargs="+", help="folders with results.csv and errors.csv.gz of other seeds"
    )
    parser.add_argument("--pair", nargs=2, action="append", required=True, metavar=("FIRST", "SECOND"))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    folders = [arguments.first, *arguments.others]
    tables = [pd.read_csv(folder / "results.csv", index_col="method") for folder in folders]
    errors = together([folder / "errors.csv.gz" for folder in arguments.others])
    pairs = [pair_of(tables[0], errors, *pair) for pair in arguments.pair]
    lines = [*rows_of(tables), "", "| pair | second - first | 95 % | p | p, corrected |", "|---|---:|---:|---:|---:|"]
    for (first, second), pair, corrected in zip(arguments.pair, pairs, holm([each.p for each in pairs]), strict=True):
        low, high = pair.mean - pair.spread.margin(), pair.mean + pair.spread.margin()
        mark = " †" if pair.bounded else ""
        numbers = f"{pair.mean:+.3f} | {low:+.3f} to {high:+.3f} | {pair.p:.2g} | {corrected:.2g}"
        lines.append(f"| {first}; {second}{mark} | {numbers} |")
    seeds = sum(int(table["seeds"].iloc[0]) for table in tables)
    lines += ["", f"Test part, {seeds} seeds. † p and the width of the interval are at most these."]
    arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
