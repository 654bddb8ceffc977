"""`ordinalclip tune`: the values of some keys with which the validation MAE is smallest.

    ordinalclip tune CONFIG --trials 30 output_dir=runs/tune train.lr=1e-5..1e-3:log model.drop_path=0..0.3

A trial trains one run. The first ten cover the ranges evenly (a Sobol sequence), the others are drawn where earlier
ones were good, by Optuna's TPE sampler (Bergstra et al., 2011). After every validation a trial is judged: one that has
nothing better to show than the median of the others had at that point (Golovin et al., 2017) is pruned. --pruner
hyperband (Li et al., 2018) prunes earlier and harder, --pruner none not at all. The value of a trial is the error that
its model was chosen by; with --seeds K it is the mean of K runs, which evens out what is luck; pruned is by the first
of them.

key=low..high is a range, key=low..high:log one that is even in its logarithm, key=low..high:step=S one of steps,
key=a|b|c are choices; any other key=value is an override. All are checked before anything runs. jobs=N and
execution=dask://HOST:PORT say where trials run, as in a comparison.

The search lives in output_dir. However it ends, the same command goes on with it: finished trials are not repeated,
interrupted ones are resumed at their checkpoint, and a larger --trials adds some. One command at a time holds the
folder. With jobs=1 the trials are the same however often they were interrupted; with more, what a trial is drawn from
depends on which others have finished.

Written: report.html, trials.csv, best.yaml (to train from), and trials/, a run folder each, of which only the best
keeps its model. The test part is not read: `ordinalclip evaluate` with the best trial's folder does that, once. The
smallest of many validation errors is smaller than what new pictures will show.
"""

from __future__ import annotations

import argparse
import sys

from ordinalclip import shipped
from ordinalclip.cli import add_configuration, whole_number
from ordinalclip.quoting import printable

NEEDS = ("tuning",)
NAMES = ("default", *shipped.short_names("", "methods"))
PRUNERS = ("median", "hyperband", "none")  # of `tuning.plan.Pruner`, whose module takes seconds to import


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_configuration(parser, "; default: the defaults of all keys")
    parser.add_argument(
        "--trials", type=whole_number(1, 100_000), default=20, help="how many there are to be in all (default: 20)"
    )
    parser.add_argument(
        "--seeds", type=whole_number(1, 100), default=1, help="runs of each trial, whose mean counts (default: 1)"
    )
    parser.add_argument("--pruner", choices=PRUNERS, default="median", help="what ends trials early (default: median)")
    parser.epilog = (__doc__ or "").partition("\n\n")[2]


def run(arguments: argparse.Namespace) -> int:
    from ordinalclip.tuning import tune

    text, errors = tune(
        arguments.config,
        arguments.overrides,
        arguments.trials,
        arguments.seeds,
        arguments.pruner,
        arguments.quiet,
        arguments.data,
    )
    print(text)
    for error in errors:
        print(f"ordinalclip: {printable(error)}", file=sys.stderr)
    return 1 if errors else 0
