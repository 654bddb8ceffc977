"""What a comparison comes to: its tables, the report, and the model that it keeps."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ordinalclip import __version__
from ordinalclip.compare.execution import Execution, parts_of
from ordinalclip.compare.plan import Place, Plan
from ordinalclip.config import flat_keys
from ordinalclip.files import whole, write_text
from ordinalclip.metrics import METRICS, decodings
from ordinalclip.provenance import device
from ordinalclip.quoting import markdown
from ordinalclip.results.comparison import Comparison
from ordinalclip.results.comparison_report import write_comparison_report
from ordinalclip.results.leaderboard import Entry, Leaderboard, in_words, write_csv
from ordinalclip.results.pages import never_fatal
from ordinalclip.results.record import shown
from ordinalclip.results.run_report import document_run
from ordinalclip.results.significance import LEVEL, MIN_SEEDS
from ordinalclip.run_folder import RunFolder, local

OWN_KEYS = {"output_dir", "method", "head", "seed"}  # in which the runs of a variant differ by nature


@dataclass(frozen=True)
class Outcome:
    """A finished comparison.

    Attributes:
        num_runs: runs that it consists of.
        summaries: everything known of every method, by variant and method: see `Leaderboard.summaries`.
        left_out: methods that failed, diverged or answer no numbers, and how.
        table: all tables as Markdown.
        errors: what broke runs off; the next call tries them again.
    """

    num_runs: int
    summaries: list[dict[str, Any]]
    left_out: list[str]
    table: str
    errors: list[str]


def write_outcome(plan: Plan, execution: Execution) -> Outcome:
    """Write table.md, results.csv, settings.csv, comparison.json, report.html and model/ into the comparison's folder.

    Raises:
        ValueError: every method of every variant failed.
    """
    tried = runs_tried(plan, execution)
    write_csv(plan.folder / "settings.csv", tried)  # also when there is nothing to compare
    boards, left_out = _boards(plan, execution)
    notes = _notes(plan, left_out, execution.at_once)
    summaries = [summary for board in boards for summary in board.summaries]
    table = _table(plan, boards, notes)
    write_text(plan.folder / "table.md", table)
    write_csv(plan.folder / "results.csv", summaries)
    best = _keep_best(plan, boards)
    comparison = Comparison(plan.folder, plan.config.title, boards, notes, best, tried)
    comparison.write()
    with never_fatal(plan.folder):
        write_comparison_report(comparison)
    return Outcome(execution.num_runs, summaries, left_out, table, list(execution.errors.values()))


def _boards(plan: Plan, execution: Execution) -> tuple[list[Leaderboard], list[str]]:
    """A table per variant without the methods of which a run failed, and which those are."""
    left_out = []
    entries: dict[str, list[Entry]] = {variant: [] for variant in plan.config.variants}
    for variant, name in ((variant, name) for variant in entries for name in plan.config.methods):
        number = execution.chosen.get((variant, name))
        places = [Place(variant, name, number, seed) for seed in plan.seeds] if number is not None else []
        errors = [text for place, text in execution.errors.items() if (place.variant, place.method) == (variant, name)]
        failures = [f"failed: {text}" for text in errors] + [
            failure for place in places if (failure := execution.results[place].failure)
        ]
        if number is None or failures:
            left_out.append(f"{name}{f' ({variant})' if variant else ''} {failures[0]}")
            continue
        data = plan.runs[places[0]].data
        entry = Entry(
            name,
            [RunFolder(plan.runs[place].output_dir) for place in places],
            plan.settings[name][number],
            number,
            len(plan.settings[name]),
            images_recur=data.source != "gauges" or data.split_seed is not None,
        )
        entries[variant].append(entry)
    if not any(entries.values()):
        raise ValueError(f"{plan.folder}: nothing to compare: {'; '.join(left_out)}")
    return [Leaderboard(variant, found) for variant, found in entries.items() if found], left_out


def runs_tried(plan: Plan, execution: Execution) -> list[dict[str, Any]]:
    """A row for every run of every setting, those that diverged or failed among them.

    Returns:
        variant, method, number of the setting and the setting itself, each of its keys (`train.lr`, ...), seed, whether
        the setting was chosen, what kept the run from an end ("" for none), and every validation metric as
        validation_mae, validation_rmse, ...; None where it is not defined.
    """
    keys = {key: None for settings in plan.settings.values() for each in settings for key in flat_keys(each)}
    rows = []
    variants, methods = list(plan.config.variants), list(plan.config.methods)
    for place in sorted(plan.runs, key=lambda place: (variants.index(place[0]), methods.index(place[1]), place.number)):
        if (result := execution.results.get(place)) is None:  # of a setting that was not chosen, on the other seeds
            continue
        setting = flat_keys(plan.settings[place.method][place.number])
        scores = (result.metrics or {}).get("validation", {})
        row: dict[str, Any] = {"variant": place.variant, "method": place.method, "number": place.number}
        row["setting"] = in_words(setting) or "-"
        row |= keys | {key: local(value) if isinstance(value, str) else value for key, value in setting.items()}
        row["seed"] = place.seed
        row["chosen"] = execution.chosen.get((place.variant, place.method)) == place.number
        row["failure"] = result.failure
        row |= {f"validation_{name}": value for name, value in scores.items() if not isinstance(value, dict)}
        rows.append(row)
    return rows


def _keep_best(plan: Plan, boards: Sequence[Leaderboard]) -> str:
    """Keep the model of the best method by validation, and write a report of its run; returns the method's name."""
    board, entry = min(
        ((board, entry) for board in boards for entry in board.entries), key=lambda pair: pair[1].validation_mae
    )
    winner = plan.runs[Place(board.variant, entry.name, entry.number, plan.seeds[0])]
    folder, remark = RunFolder(winner.output_dir), ""
    if len(plan.seeds) > 1:
        summary = next(summary for summary in board.summaries if summary["method"] == entry.name)
        mae = f"{shown(summary['mae'], summary['mae_std'])} {winner.ranks.unit}".rstrip()
        remark = f"Over seeds {_seeds(plan)}: MAE {mae} (mean ± standard deviation)."
    document_run(folder, parts_of(winner), remark=remark)
    with whole(RunFolder(plan.folder).model) as aside:
        shutil.copytree(folder.model, aside)
    return entry.name + (f" ({board.variant})" if board.variant else "")


def _table(plan: Plan, boards: Sequence[Leaderboard], notes: Sequence[str]) -> str:
    """All tables as Markdown: mean +- standard deviation over the seeds, best MAE first."""
    blocks: list[str] = [markdown(" ".join(plan.config.title.split()))] if plan.config.title else []
    for board in boards:
        blocks += [f"### {markdown(board.variant)}"] if board.variant else []
        blocks += [board.markdown(), markdown(f"{board.claim} {board.beside_constant}".rstrip())]
    return "\n\n".join([*blocks, *map(markdown, notes)]) + "\n"


def _seeds(plan: Plan) -> str:
    return ", ".join(map(str, plan.seeds))


def _notes(plan: Plan, left_out: Sequence[str], at_once: str = "one run at a time") -> list[str]:
    """What the table's columns are, in paragraphs."""
    unit = next(iter(plan.runs.values())).ranks.unit
    in_unit = [metric.title for metric in METRICS.values() if metric.in_unit]
    errors = f"; {', '.join(in_unit[:-1])} and {in_unit[-1]} in {unit}" if unit else ""
    several = len(plan.seeds) > 1
    spread = f"mean and standard deviation over seeds {_seeds(plan)}" if several else f"seed {_seeds(plan)}"
    falling = ", ".join(metric.title for metric in METRICS.values() if metric.falls)
    if len(plan.seeds) >= MIN_SEEDS:
        test = (
            "95 %: interval of the MAE over seeds and test images together. * larger errors than the first row's (p < "
            f"{LEVEL}): two-sided test over seeds and images, paired by both, corrected for the number of rows and for "
            "the first being picked by the same errors."
        )
    else:
        test = (
            "95 %: interval of the MAE over the test images of these runs; the spread over seeds is not in it. No "
            f"stars: methods are tested from {MIN_SEEDS} seeds on."
        )
    columns = (
        f"Test part, {spread}{errors}; {decodings()}. D5 and RV (residual variance): of the feature space. Smaller is "
        f"better: {falling}. {test} Processor ms / step (on a GPU the device's): median; trained: parameters; MB: of "
        "the saved model."
    )
    choice = " ".join(part for part in (_choice(plan), _unequal(plan), *left_out) if part)
    environment = f"Written by ordinalclip {__version__} with torch {torch.__version__} on {_devices(plan)}, {at_once}."
    return [columns, choice, environment]


def _devices(plan: Plan) -> str:
    """What the runs were trained on, by their own record; workers of a cluster may differ."""
    folders = [RunFolder(run.output_dir) for run in plan.runs.values()]
    found = {folder.read_provenance().get("device") for folder in folders if folder.is_finished}
    return "; ".join(sorted(str(each) for each in found if each)) or device()


def _choice(plan: Plan) -> str:
    """How settings came about."""
    tried = list(plan.tried().values())
    if all(len(settings) == 1 for settings in tried):
        return "One setting per method, fixed beforehand."
    choice = f"Settings chosen by the validation MAE on seed {', '.join(map(str, plan.tuning_seeds))}"
    searched = {name: plan.searched(name) for name in plan.tried()}
    if any(searched.values()):
        drawn = f"{choice}, of {len(tried[0])} for each method, points of a Sobol sequence in"
        texts = {name: in_words(search) for name, search in searched.items()}
        if len(set(texts.values())) == 1:
            return f"{drawn} {next(iter(texts.values()))}."
        own = [f"{text or 'settings of its own'} ({name})" for name, text in texts.items()]
        return f"{drawn} {'; '.join(own)}."
    if all(settings == tried[0] for settings in tried):
        return f"{choice}; tried for every method: {' | '.join(map(in_words, tried[0]))}."
    return f"{choice}, of {len(tried[0])} for each method."


def _unequal(plan: Plan) -> str:
    """In which keys the methods differ beyond what they are and what was tried for all of them."""
    variant, seed, flat = next(iter(plan.config.variants)), plan.seeds[0], []
    for name, settings in plan.tried().items():
        runs = [flat_keys(plan.runs[Place(variant, name, k, seed)].model_dump()) for k in range(len(settings))]
        flat.append({key: [run[key] for run in runs] for key in runs[0] if key.partition(".")[0] not in OWN_KEYS})
    keys = [
        key for key in dict.fromkeys(key for each in flat for key in each) if len({str(e.get(key)) for e in flat}) > 1
    ]
    return f"Not the same for all methods: {', '.join(keys)}." if keys else ""
