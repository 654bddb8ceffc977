"""`ordinalclip compare`: methods x settings x seeds on the same data, encoder and budget, in one table.

A comparison is a YAML file:

    output_dir: runs/compare/demo
    seeds: [1, 2, 3]
    base: {data: ..., ranks: ..., model: ..., train: ...}   # keys of a run, shared by all methods
    settings: [{train.lr: 1e-3}, {train.lr: 3e-3}]          # tried for every method; validation chooses one
    methods:
      OrdinalCLIP:                                          # a row of the table
        base: {method: ordinalclip, head: {...}}            # keys of a run, for this method
        settings: [...]                                     # its own instead of those above, as many
    splits: [{data.split_column: fold_0}, ...]              # published folds, by seed: the first seed has the first
    variants:                                               # a table each; default: one without a name
      all the data: {}
      10 %: {data.train_share: 0.1, train.max_steps: 100}   # keys of a run that are different

Every setting runs on the first `tuning_seeds` seeds; the one with the best mean validation MAE runs on the others too.
Every method must bring the same number of settings, unless nothing of it learns. A run that diverges counts as
infinitely bad; one that breaks off, for a broken picture or want of memory, leaves its method out, the exit status is
1, and the next call tries it again. Runs that are complete are not run again, so an interrupted comparison goes on with
those that are missing, inside the one it was interrupted in; a run of another experiment in its place is refused, or
replaced with overwrite=true. The test part is predicted once, by the runs of the chosen setting, after the choice.
Written: table.md and results.csv, a row per method; settings.csv, a row per run of every setting with its validation
metrics; report.html; comparison.json, from which `ordinalclip report` and `plot` find what they show; and model/: of
the method with the best mean validation MAE, the run of the first seed. That run gets a report of its own;
evaluation.report=true writes one for every run. From three seeds on, methods are tested against the first row
(docs/comparisons.md).
"""

from __future__ import annotations

import argparse
import sys

from ordinalclip import shipped
from ordinalclip.cli import add_configuration
from ordinalclip.quoting import printable

NEEDS = ("compare",)
NAMES = shipped.short_names("compare")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_configuration(parser)
    parser.epilog = (__doc__ or "").partition("\n\n")[2]


def run(arguments: argparse.Namespace) -> int:
    from ordinalclip.compare import compare

    tables, errors = compare(arguments.config, arguments.overrides, arguments.quiet, prepared=arguments.data)
    print(tables)
    for error in errors:
        print(f"ordinalclip: {printable(error)}", file=sys.stderr)
    return 1 if errors else 0
