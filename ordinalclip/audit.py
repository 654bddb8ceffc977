"""Which labels are wrong: every labelled picture of a run's data, judged by a model that has not seen it.

OUT/audit.json             which run's configuration and data, and how many folds: what makes it this audit
OUT/folds/K/               the run that was trained without fold K, with its predictions of it, without its model
OUT/audit.html             the page
OUT/near_duplicates.csv    pairs of pictures that are almost the same
OUT/labels.csv             all labels, the one that fits least first; written last: an audit that has it is finished
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ordinalclip.compare.execution import Result, ended, forget_data, parts_of, train_one
from ordinalclip.config import DataConfig, RunConfig, flat_keys, read_overrides
from ordinalclip.data import Part, Parts
from ordinalclip.data.duplicates import MOST_COMPARED, MOST_SIMILAR, Similar, copies, similar, thumbnail
from ordinalclip.data.parts import joined
from ordinalclip.data.splits import cross_validated
from ordinalclip.executors import WorkerDied, num_jobs, open_pool
from ordinalclip.files import delete, read_json_object, write_json
from ordinalclip.metrics import against_constant, constant_answer, mean_absolute_error, ranked_probability_scores
from ordinalclip.predictions import DECODINGS, Predictions
from ordinalclip.progress import Progress
from ordinalclip.provenance import fingerprints
from ordinalclip.ranks import Ranks
from ordinalclip.results.audit_report import LabelAudit, write_labels, write_page, write_pairs
from ordinalclip.run_folder import EXECUTION, FolderOccupied, RunFolder, changed_data, changed_keys, described
from ordinalclip.signals import Preempted
from ordinalclip.training.distributed import make_accelerator
from ordinalclip.training.features import FeatureCache
from ordinalclip.training.preparation import build_model, use_precision

logger = logging.getLogger(__name__)
HARDLY = 0.8  # of the constant's error: a method that errs by more hardly knows the pictures
OWN = ("output_dir", "overwrite", "train.resume", "train.trackers")  # keys of execution that the audit sets itself
DRAWS: dict[str, Any] = {"shots": None, "train_share": 1.0, "shift_ranks": None}  # training labels left out: none
GIVEN = ("table", "train_table", "validation_table", "test_table", "split_column")  # say parts, which folds say here


class Files:
    """The files of an audit."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.record = folder / "audit.json"
        self.folds = folder / "folds"
        self.page = folder / "audit.html"
        self.pairs = folder / "near_duplicates.csv"
        self.labels = folder / "labels.csv"

    @property
    def made(self) -> tuple[Path, ...]:
        """What is made of the predictions, what makes it look whole first."""
        return (self.labels, self.page, self.pairs)


@dataclass(frozen=True)
class Pool:
    """All labelled pictures of a run.

    Attributes:
        pictures: the parts one after the other.
        origins: (N,) name of the part that each is in.
        sizes: of the training and validation part, in whose shares the folds that are no test part are divided.
    """

    pictures: Part
    origins: np.ndarray
    sizes: tuple[int, int]
    ranks: Ranks

    @classmethod
    def of(cls, parts: Parts) -> Pool:
        given = parts.named
        origins = np.concatenate([np.full(len(part), name) for name, part in given.items()])
        sizes = len(parts.train), sum(len(given.get(name, ())) for name in ("validation", "calibration"))
        return cls(joined(list(given.values())), origins, sizes, parts.ranks)

    def part(self, rows: np.ndarray) -> Part | None:
        return self.pictures.select(rows) if len(rows) else None

    def parts(self, rows: dict[str, np.ndarray]) -> Parts:
        """The data of a fold, by row indices of train, validation and test."""
        train, test = self.pictures.select(rows["train"]), self.part(rows["test"])
        return Parts(train, self.part(rows["validation"]), test, self.ranks, in_memory=True)


def audit(
    folder: str | Path,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    folds: int = 5,
    top: int = 60,
    jobs: int | str = 1,
    overwrite: bool = False,
    quiet: bool = False,
    parts: Parts | None = None,
) -> tuple[LabelAudit, Path]:
    """Judge every label of a run's data by the predictions of models that have not seen it; see above.

    The run's configuration is trained once for every fold, on the other folds, on all labels there (`data.shots`,
    `train_share` and label shift draw nothing). A label is scored by the ranked probability score of the predicted
    distribution; by the absolute error where the method gives none. The run folder stays as it is.

    Args:
        folder: a finished run.
        out: where to write; default: the folder audit/ of the run.
        overrides: dotted "key=value" of how the folds are executed, such as data.root of pictures that have moved.
        folds: how many.
        top: labels on the page.
        jobs: folds at a time, each in a process of its own; "auto": one a core, on a GPU one.
        overwrite: replace what an earlier audit has left there; folds of the same audit that are done stay.
        parts: the run's data, if it was handed over in memory.

    Returns:
        what was found, and the folder that it was written to.

    Raises:
        FileNotFoundError: no finished run there, or no data; ValueError: other data than that of the run, too few
            pictures or groups for the folds, a picture that cannot be read, an override of what is computed, a fold
            that diverged; FolderOccupied: something else is in the folder; FolderInUse: another job writes to it.
        Preempted: SIGTERM or Ctrl-C came; the same call goes on.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("an audit is one process that starts others: set --jobs N instead of launching several")
    run, place = RunFolder(folder), Path(folder) / "audit" if out is None else Path(out)
    run.require_finished()
    changed = flat_keys(read_overrides(overrides))
    if wrong := [key for key in changed if key not in EXECUTION or key in OWN]:
        allowed = ", ".join(sorted(EXECUTION - set(OWN)))
        raise ValueError(f"{wrong[0]}: the run says what is trained; allowed are {allowed}")
    config = run.read_config(overrides)
    forget_data()
    given = parts or parts_of(config)
    if difference := run.data_difference(fingerprints(given)):
        raise ValueError(
            f"{folder}: this is not the data of the run any more: {difference}; `ordinalclip train {run.config} "
            "output_dir=FOLDER` trains on it, and that run can be audited"
        )
    config = config.model_copy(update={"data": config.data.model_copy(update=DRAWS)})
    pool = Pool.of(parts or parts_of(config))
    with RunFolder(place).locked():
        return _audit(config, pool, Files(place), folds, top, jobs, overwrite, quiet, parts), place


def _audit(
    config: RunConfig,
    pool: Pool,
    files: Files,
    folds: int,
    top: int,
    jobs: int | str,
    overwrite: bool,
    quiet: bool,
    parts: Parts | None,
) -> LabelAudit:
    """`audit` in a folder that is held."""
    pictures, group = pool.pictures, config.data.group
    ids = copies([pictures])
    groups = np.asarray([str(name).strip() for name in pictures.rows[group]]) if group else None
    rows = cross_validated(pictures.ranks, groups, ids, folds, (*pool.sizes, 0), config.seed)
    _claim(files, config, pool, folds, overwrite)
    pairs = _near_duplicates(config, pool, ids, quiet)
    runs = [_fold_config(config, files, fold, folds) for fold in range(folds)]
    _train(runs, partial(train_fold, data=parts or config.data, rows=rows), files.folder, jobs, quiet)

    number = np.zeros(len(pictures), dtype=np.int64)
    for fold, each in enumerate(rows):
        number[each["test"]] = fold
    predictions = _out_of_fold(runs, rows, pictures)
    scores, measure = _scores(predictions, config)
    notes = [f"The folds have {', '.join(str(len(each['test'])) for each in rows)} pictures"]
    notes[0] += f" and keep {group} (data.group) together." if group else "; copies of a picture are in the same."
    if pairs is None:
        notes.append(f"Near-duplicates were not looked for among more than {MOST_COMPARED:,} pictures.")
    elif len(pairs) == MOST_SIMILAR:
        notes.append(f"Of near-duplicates the {MOST_SIMILAR:,} most similar pairs are listed; there may be more.")
    answers, labels = predictions.decoded[config.evaluation.decoding], predictions.labels
    counts = np.bincount(predictions.label_ranks, minlength=len(pool.ranks))
    constant = against_constant(answers, labels, constant_answer(counts, pool.ranks.values))["mae"]
    error = mean_absolute_error(answers, labels)
    if constant is not None and error > HARDLY * constant:
        notes.append(
            f"The models err by {error:.3g}, always answering the median label by {constant:.3g}: they hardly know the "
            "pictures, and what they doubt says more about them than about the labels."
        )
    if unseen := _unseen(pictures.ranks, rows):
        notes.append(
            f"{unseen} labels are of ranks of which the model that judges them has seen no label in training: their "
            "scores are large by that alone."
        )
    found = LabelAudit(config, pool.ranks, pictures, pool.origins, number, predictions, scores, measure, pairs, notes)
    write_page(found, files.page, top)
    write_pairs(found, files.pairs)
    write_labels(found, files.labels)
    return found


def _claim(files: Files, config: RunConfig, pool: Pool, folds: int, overwrite: bool) -> None:
    """The folder, held by this job, is this audit's.

    Raises:
        FolderOccupied: it holds something else, or a finished audit that is not to be replaced; ValueError: it holds
            another audit.
    """
    folder = files.folder
    data = fingerprints(Parts(pool.pictures, None, None, pool.ranks))
    record = {"config": config.model_dump(mode="json"), "folds": folds, "data": data}
    if not files.record.is_file():
        if theirs := sorted(path.name for path in folder.iterdir() if path.name != RunFolder(folder).lock.name):
            raise FolderOccupied(f"{folder} holds {theirs[0]}, and no audit; --out names another folder")
    elif difference := _difference(files.record, record):
        if not overwrite:
            raise FolderOccupied(
                f"{folder} holds another audit: {difference}; --overwrite replaces it, --out names another folder"
            )
        for path in (*files.made, files.record, files.folds):
            delete(path)
    elif files.labels.is_file() and not overwrite:
        raise FolderOccupied(
            f"{folder} holds this audit, finished; --overwrite writes its page and tables again, without training, "
            "--out names another folder"
        )
    for path in files.made:
        delete(path)
    write_json(files.record, record)


def _difference(path: Path, now: dict[str, Any]) -> str:
    """In what the audit in a folder is another one, in words."""
    before = read_json_object(path)
    try:
        if changed := changed_keys(before["config"], now["config"]):
            return described(changed)
        if before["folds"] != now["folds"]:
            return f"it has {before['folds']} folds, not {now['folds']}"
        return changed_data(before["data"], now["data"])
    except (KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: damaged ({error!r}), or not of an audit") from error


def _near_duplicates(config: RunConfig, pool: Pool, ids: np.ndarray, quiet: bool) -> list[Similar] | None:
    """By the features of the encoder that the run starts from, which are kept as those of runs that cache them are.

    Raises:
        BrokenImageError: a picture that cannot be read, by row and name.
    """
    pictures = pool.pictures
    if len(pictures) > MOST_COMPARED:
        return None
    progress = Progress(range(len(pictures)), "comparing pictures", unit="images", quiet=quiet)
    thumbnails = np.stack([thumbnail(pictures.image(row)) for row in progress])
    use_precision(config.train)
    accelerator = make_accelerator(config.train.mixed_precision)
    model = build_model(config, pool.ranks, pictures).to(accelerator.device)
    features = FeatureCache(model, config, accelerator, quiet).evaluated(pictures).take(range(len(pictures)))
    return similar(features.flatten(1).numpy(), ids, thumbnails)


def _fold_config(config: RunConfig, files: Files, fold: int, folds: int) -> RunConfig:
    """The run without one fold; what its data is no configuration says, so it is on record as data in memory."""
    data: dict[str, Any] = {"source": "memory", "folds": folds, "fold": fold, **dict.fromkeys(GIVEN, "")}
    evaluation = {"test": True, "report": False, "space": False}
    return config.model_copy(
        update={
            "output_dir": str(files.folds / str(fold)),
            "overwrite": False,
            "data": config.data.model_copy(update=data),
            "train": config.train.model_copy(update={"resume": "auto", "trackers": []}),
            "evaluation": config.evaluation.model_copy(update=evaluation),
        }
    )


def _train(
    runs: Sequence[RunConfig], train: Callable[[RunConfig], Result], folder: Path, jobs: int | str, quiet: bool
) -> None:
    """Train the folds that are missing.

    Raises:
        ValueError: one diverged or broke off, once the others are done.
    """
    results = {run.output_dir: result for run in runs if (result := ended(RunFolder(run.output_dir))) is not None}
    missing = [run for run in runs if run.output_dir not in results]
    progress: Progress = Progress(None, "training", len(runs), "folds", quiet)
    progress.advance(len(results))
    try:
        with open_pool("local", min(num_jobs(jobs), max(1, len(missing))), folder) as pool:
            for run, done in pool.run(train, missing):
                try:
                    results[run.output_dir] = done.result()
                except WorkerDied as died:
                    results[run.output_dir] = Result(None, error=f"{run.output_dir}: {died}")
                progress.advance()
    except (Preempted, KeyboardInterrupt) as stopped:
        number = stopped.number if isinstance(stopped, Preempted) else signal.SIGINT
        done_so_far = f"{len(results)} of {len(runs)} folds are done"
        raise Preempted(f"{folder}: told to stop; {done_so_far}, the same command goes on", number) from None
    progress.close()
    for run in runs:
        if why := results[run.output_dir].error:
            raise ValueError(why)
        if why := results[run.output_dir].divergence:
            raise ValueError(f"{run.output_dir}: diverged: {why}")


def train_fold(run: RunConfig, data: DataConfig | Parts, rows: Sequence[dict[str, np.ndarray]]) -> Result:
    """Train one fold, or go on with it; its model is not kept.

    Args:
        run: the fold's; `data.fold` says which.
        data: of the run that is audited.
        rows: of every fold.
    """

    def load(run: RunConfig) -> Parts:
        whole = data if isinstance(data, Parts) else parts_of(run.model_copy(update={"data": data}))
        return Pool.of(whole).parts(rows[run.data.fold])

    result = train_one(run, keep_checkpoints=False, overwrite=False, load=load)
    if result.metrics is not None:
        delete(RunFolder(run.output_dir).model)
    return result


def _out_of_fold(runs: Sequence[RunConfig], rows: Sequence[dict[str, np.ndarray]], pictures: Part) -> Predictions:
    """The predictions of every picture by the run that has not seen it.

    Raises:
        ValueError: those that are there are not of these pictures.
    """
    read = [RunFolder(run.output_dir).read_predictions("test") for run in runs]
    test = np.concatenate([each["test"] for each in rows])
    order = np.argsort(test)
    labels = np.concatenate([each.labels for each in read])
    if len(labels) != len(test) or not np.array_equal(labels[order], pictures.values):
        raise ValueError(f"{Path(runs[0].output_dir).parent}: the predictions there are of other pictures; delete it")

    def whole(arrays: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(arrays)[order]

    given = [each.probabilities for each in read]
    return Predictions(
        names=pictures.names,
        labels=pictures.values,
        label_ranks=pictures.ranks,
        decoded={how: whole([each.decoded[how] for each in read]) for how in DECODINGS},
        ranks=whole([each.ranks for each in read]),
        probabilities=whole([p for p in given if p is not None]) if all(p is not None for p in given) else None,
    )


def _scores(predictions: Predictions, config: RunConfig) -> tuple[np.ndarray, str]:
    """(N,) how badly each given label fits the prediction, and what that is called.

    Raises:
        ValueError: answers that are no numbers.
    """
    answers = predictions.decoded[config.evaluation.decoding]
    if not np.isfinite(answers).all():
        raise ValueError(f"{int((~np.isfinite(answers)).sum())} of the out-of-fold answers are no numbers")
    if predictions.probabilities is None:
        return np.abs(answers - predictions.labels), "absolute error"
    return ranked_probability_scores(predictions.probabilities, predictions.label_ranks), "RPS"


def _unseen(ranks: np.ndarray, rows: Sequence[dict[str, np.ndarray]]) -> int:
    """Labels of ranks that the model which judges them was not trained on."""
    return sum(int((~np.isin(ranks[each["test"]], ranks[each["train"]])).sum()) for each in rows)
