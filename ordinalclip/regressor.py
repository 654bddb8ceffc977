"""`OrdinalRegressor`: training, answers and evaluation as an estimator, from a data frame to a run folder and back."""

from __future__ import annotations

import functools
import inspect
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import datasets
import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from ordinalclip.answers import Answers, Errors, answer
from ordinalclip.config import (
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    RanksConfig,
    RunConfig,
    TrainConfig,
    merge,
    nested,
    parse_config,
)
from ordinalclip.data import Parts, make_parts
from ordinalclip.data.pictures import FILE, KEYS, PictureRows, of_rows, read_pictures
from ordinalclip.external import READ, calibrate_external, evaluate_external, served
from ordinalclip.heads import head_options
from ordinalclip.metrics import r2_score
from ordinalclip.model import OrdinalModel
from ordinalclip.results.external_report import ExternalEvaluation
from ordinalclip.run_folder import RunFolder
from ordinalclip.runs import train
from ordinalclip.sections import Section
from ordinalclip.suggestions import near_matches
from ordinalclip.training.distributed import from_main, make_accelerator

Rows: TypeAlias = pd.DataFrame | datasets.Dataset | str | Path | Sequence[Any] | np.ndarray
Call = TypeVar("Call", bound=Callable[..., Any])
OWN = "OrdinalRegressor"
SECTIONS = ("head", "data", "ranks", "model", "train", "evaluation")
ARGUMENTS = [("model", "text"), ("ranks", "unit"), ("ranks", "names")]  # keys of sections that are arguments, too
ARGUMENTS += [("train", key) for key in ("lr", "max_steps", "epochs", "batch_size")]
DIVIDING = {"split", "split_column", "folds", "train_table", "validation_table", "test_table"}
# Keys of a run's data that say where its own rows are and how they are read: other rows lie elsewhere.
OF_ITS_DATA = {*READ, *DIVIDING, "table", "hub", "group", "stratify"}
RUNS = Path("runs")  # where run folders without a name of their own are made


def names_nearest(call: Call) -> Call:
    """A function that says of an unknown keyword argument which were meant."""
    known = [name for name in inspect.signature(call).parameters if name != "self"]

    @functools.wraps(call)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if unknown := next((name for name in kwargs if name not in known), None):
            called = call.__name__ if call.__name__ != "__init__" else OWN
            raise TypeError(f"{called} has no argument {unknown!r}; {near_matches(unknown, known)}")
        return call(*args, **kwargs)

    return checked  # type: ignore[return-value]


class OrdinalRegressor(BaseEstimator):
    """A regressor of ordered values from pictures, in the manner of scikit-learn.

    What is left at None has the package's default (`ordinalclip train --help`). Every key of a run is reachable: the
    sections take dicts or the classes of `ordinalclip.config`, whose keys an editor completes. Nothing is checked
    before `fit`.

    Args:
        backbone: spec of the image encoder, and of the text tower unless `text` names another: `ordinalclip backbones`.
        method: a method's name (`ordinalclip methods`), or "module:Class".
        prompt: the words before a rank's name, of methods that have prompts, e.g. "the age of the person is".
        text: spec of the text tower.
        unit: unit of the labels, e.g. "years".
        names: names of the ranks, lowest first; labels may be these words.
        lr: learning rate.
        max_steps: optimiser steps; epochs: instead, passes over the training part.
        batch_size: global batch, over all processes.
        seed: of the split, the order, the weights that are drawn.
        output_dir: the run folder; default: a new one in runs/, see `run_folder_`.
        overwrite: replace a run that is there; resume: go on with it.
        head: options of the method.
        data, ranks, model, train, evaluation: sections of a run's configuration.
        quiet: show no progress.

    Attributes:
        model_: the trained `OrdinalModel`, as it is served.
        run_folder_: where the run is written, with its report; None for a model that was loaded alone.
        metrics_: the run's metrics.json.
        image_, label_: the columns of pictures and labels.

    >>> ages = OrdinalRegressor("tiny", prompt="the age of the person is", unit="years", lr=1e-3)
    >>> ages.fit(frame, image="path", label="age", group="patient", validation=0.15)  # doctest: +SKIP
    >>> ages.predict(others)[["value", "name"]]  # doctest: +SKIP
    """

    model_: OrdinalModel
    run_folder_: Path | None
    metrics_: dict[str, Any]
    image_: str
    label_: str

    @names_nearest
    def __init__(
        self,
        backbone: str = "tiny",
        *,
        method: str = "ordinalclip",
        prompt: str | None = None,
        text: str | None = None,
        unit: str | None = None,
        names: Sequence[str] | None = None,
        lr: float | None = None,
        max_steps: int | None = None,
        epochs: float | None = None,
        batch_size: int | None = None,
        seed: int | None = None,
        output_dir: str | Path | None = None,
        overwrite: bool = False,
        resume: bool = False,
        head: Mapping[str, Any] | None = None,
        data: DataConfig | Mapping[str, Any] | None = None,
        ranks: RanksConfig | Mapping[str, Any] | None = None,
        model: ModelConfig | Mapping[str, Any] | None = None,
        train: TrainConfig | Mapping[str, Any] | None = None,
        evaluation: EvaluationConfig | Mapping[str, Any] | None = None,
        quiet: bool = False,
    ):
        self.backbone = backbone
        self.method = method
        self.prompt = prompt
        self.text = text
        self.unit = unit
        self.names = names
        self.lr = lr
        self.max_steps = max_steps
        self.epochs = epochs
        self.batch_size = batch_size
        self.seed = seed
        self.output_dir = output_dir
        self.overwrite = overwrite
        self.resume = resume
        self.head = head
        self.data = data
        self.ranks = ranks
        self.model = model
        self.train = train
        self.evaluation = evaluation
        self.quiet = quiet

    # ---- from arguments to a configuration

    def run_config(self, **data: Any) -> RunConfig:
        """The configuration of the run that `fit` would start.

        Args:
            data: keys of its section data.

        Raises:
            ValueError: a key that is not one, or given twice, or a value of another type or range: with the key.
        """
        content: dict[str, Any] = {"method": self.method}
        for name in SECTIONS:
            content[name] = _section(name, getattr(self, name))
        given = {
            "model.backbone": self.backbone,
            "model.text": self.text,
            "ranks.unit": self.unit,
            "ranks.names": self.names if self.names is None or isinstance(self.names, str) else list(self.names),
            "train.lr": self.lr,
            "train.max_steps": self.max_steps,
            "train.epochs": self.epochs,
            "train.batch_size": self.batch_size,
            "train.resume": "auto" if self.resume else None,
            "seed": self.seed,
            "output_dir": None if self.output_dir is None else str(self.output_dir),
            "overwrite": self.overwrite or None,
            **self._prompt(),
            **{f"data.{key}": value for key, value in data.items()},
        }
        said = nested({key: _plain(value) for key, value in given.items() if value is not None})
        for name, section in said.items():
            if isinstance(section, dict):
                _refuse_twice(name, content.get(name, {}), section)
        return parse_config(merge(content, said), OWN)

    def _prompt(self) -> dict[str, Any]:
        if self.prompt is None:
            return {}
        options = head_options(self.method)
        if "prompt" in options:
            return {"head.prompt": self.prompt}
        if "templates" in options:
            return {"head.templates": [f"{self.prompt} {{name}}"]}
        raise ValueError(f"{OWN}: prompt: method {self.method} has no prompts")

    # ---- what estimators do

    @names_nearest
    def fit(
        self,
        X: Rows,
        y: ArrayLike | None = None,
        *,
        image: str | None = None,
        label: str | None = None,
        group: str | None = None,
        stratify: Sequence[str] | None = None,
        validation: float | Rows | None = None,
        test: float | Rows | None = None,
    ) -> OrdinalRegressor:
        """Train, choose the step by the validation part, and write a run folder.

        Args:
            X: a pandas frame or `datasets.Dataset` with a column of pictures (paths, PIL pictures, arrays, bytes); a
                table (CSV, Excel, Parquet, JSON lines); a folder with a folder for every label; or pictures alone, as
                a list or an (N, H, W, 3) uint8 array.
            y: (N,) labels, where `X` has none.
            image, label: columns of the pictures and of the labels; default: "image" and "label".
            group: column (subject, patient) whose equal rows stay in one part.
            stratify: column, or columns, whose every combination is split in the same shares.
            validation, test: their shares of `X`, or rows of their own in memory; 0: none. Default: 0.15 and 0, or what
                the section data says.

        Raises:
            ValueError: what a configuration or the data has wrong, see `ordinalclip.data.make_parts`; FolderOccupied:
                `output_dir` holds a run.
        """
        own = {"validation": validation, "test": test}
        apart = {name: rows for name, rows in own.items() if not isinstance(rows, Real | None)}
        shares = {"validation": 0.0 if apart else 0.15, "test": 0.0}
        shares |= {name: float(rows) for name, rows in own.items() if isinstance(rows, Real)}
        for name, share in shares.items():
            if not 0 <= share < 1:
                raise ValueError(f"{OWN}.fit: {name} is a share from 0 to below 1, or rows, got {share:g}")
        keys: dict[str, Any] = {"image_column": image, "label_column": label, "group": group}
        keys |= {"stratify": [stratify] if isinstance(stratify, str) else stratify and list(stratify)}
        if not apart:
            split = (1 - shares["validation"] - shares["test"], shares["validation"], shares["test"])
            if split[0] <= 0:
                raise ValueError(f"{OWN}.fit: validation and test leave nothing to train on")
            divided = sorted(DIVIDING & _section("data", self.data).keys())
            if not divided:
                keys["split"] = split
            elif twice := [name for name, rows in own.items() if rows is not None]:
                raise ValueError(f"{OWN}.fit: {twice[0]} is given, and data.{divided[0]}, which divides the rows, too")
        elif unequal := next((name for name, share in shares.items() if share), None):
            other = next(iter(apart))
            raise ValueError(f"{OWN}.fit: {other} has rows of its own: {unequal} needs rows, too, or 0")
        path = _path(X)
        if path is not None and not apart and y is None:
            config = self.run_config(**keys, **_source(path))
            parts = None
        else:
            config = self.run_config(**keys, source="memory")
            frames = {name: _frame(rows, None, config) for name, rows in apart.items()}
            whole = {"train" if apart else "all": _frame(X, y, config), **frames}
            parts = make_parts(whole, config.data, config.ranks, config.seed)
        self._trained(config, parts)
        return self

    def _trained(self, config: RunConfig, parts: Parts | None) -> None:
        """Train into the run folder; a new one, the same on all processes, where none is named."""
        options = config.train
        accelerator = make_accelerator(options.mixed_precision, timeout=options.process_group_timeout)
        if self.output_dir is None:
            config = config.model_copy(update={"output_dir": from_main(accelerator, self._new_folder)})
        folder = RunFolder(train(config, parts, quiet=self.quiet))
        accelerator.wait_for_everyone()
        self.model_, self.run_folder_ = folder.read_model(), folder.path
        self.metrics_ = folder.read_metrics()
        self.image_, self.label_ = config.data.image_column, config.data.label_column

    def _new_folder(self) -> str:
        name = f"{self.method.rpartition(':')[2]}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
        return str(RUNS / name)

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "model_")

    @names_nearest
    def predict(
        self,
        X: Rows,
        *,
        image: str | None = None,
        batch_size: int = 32,
        workers: int = 0,
        errors: Errors = "stop",
        interval: float | None = None,
    ) -> pd.DataFrame:
        """Answers to pictures, a row each, with the index of the frame or series that was given, or of the files of a
        folder.

        Args:
            X: see `fit`; a folder is searched for pictures, whatever they lie in.
            image: column of the pictures; default: that of `fit`.
            batch_size, workers, errors, interval: see `ordinalclip.answers.answer`.

        Returns:
            value, in the label's unit; rank; name; with `interval` low and high; probabilities, a list over the ranks,
            of methods that have them; error, missing where there is none.

        Raises:
            NotFittedError: there is no model yet; BrokenImageError: a picture that cannot be read, unless
            `errors="keep"` makes it a row with its error.
        """
        check_is_fitted(self)
        rows = self._pictures(X, image)
        about = self.model_, rows, batch_size, workers, rows.formats, errors, rows.places
        pieces = answer(*about, interval=interval)
        frame = Answers.joined(pieces).to_frame(self.model_.head.ranks)
        if isinstance(X, pd.DataFrame | pd.Series):
            frame.index = X.index
        elif rows.table is None:
            frame.index = pd.Index(rows.files, name=FILE)
        return frame

    def _pictures(self, X: Rows, image: str | None) -> PictureRows:
        column = image or self.image_
        section = {key: value for key, value in _section("data", self.data).items() if key in KEYS}
        if (path := _path(X)) is not None:
            section = {key: value for key, value in section.items() if key not in ("source", "image_column")}
            return read_pictures(path, {"data": section | ({"image_column": column} if os.path.isfile(path) else {})})
        config = parse_config({"data": {**section, "source": "memory", "image_column": column}}, OWN)
        frame = _frame(X, None, config)
        if isinstance(frame, pd.DataFrame) and column in frame.columns:
            frame = frame[[column]]  # what stands beside is of no concern
        return of_rows(frame, config.data)

    @names_nearest
    def evaluate(
        self,
        X: Rows,
        y: ArrayLike | None = None,
        *,
        image: str | None = None,
        label: str | None = None,
        by: Sequence[str] = (),
        out: str | Path | None = None,
        overwrite: bool = False,
    ) -> dict[str, Any]:
        """Score every row of other data: see `ordinalclip.external.evaluate_external`.

        Args:
            X, y, image, label: see `fit`; columns default to those of `fit`.
            by: columns whose every value is a group with metrics of its own.
            out: folder for numbers, answers and a report.
            overwrite: replace an evaluation that is there.

        Returns:
            num; metrics by name; intervals, [low, high] by name; groups by column and value; drift from the training
            data; notes.
        """
        return self._evaluated(X, y, image, label, by=by, out=out, overwrite=overwrite).to_dict()

    def _evaluated(
        self, X: Rows, y: ArrayLike | None, image: str | None = None, label: str | None = None, **options: Any
    ) -> ExternalEvaluation:
        rows, root, keys = self._labelled(X, y, image, label)
        return evaluate_external(self.model_, rows, root, overrides={"data": keys}, quiet=self.quiet, **options)

    def _labelled(
        self, X: Rows, y: ArrayLike | None, image: str | None, label: str | None
    ) -> tuple[Any, str, dict[str, Any]]:
        """Rows with labels, the folder that their paths start from, and keys of data by which they are read."""
        check_is_fitted(self)
        keys: dict[str, Any] = {key: value for key, value in _section("data", self.data).items() if key in READ}
        keys.pop("source", None)
        keys |= {"image_column": image or self.image_, "label_column": label or self.label_}
        rows: Any = _path(X)
        if rows is None or y is not None:
            rows = _frame(X, y, parse_config({"data": {**keys, "source": "memory"}}, OWN))
        root = str(keys.pop("root", "") or "")
        if isinstance(rows, str) and os.path.isdir(rows):
            root = ""  # a folder lies where it lies
        return rows, root, keys

    @names_nearest
    def calibrate(
        self,
        X: Rows,
        y: ArrayLike | None = None,
        *,
        image: str | None = None,
        label: str | None = None,
        group: str | None = None,
        share: float = 0.5,
        kind: str = "auto",
        by_rank: bool = False,
    ) -> OrdinalRegressor:
        """Give the model calibrated probabilities and intervals, from labelled pictures that it has not seen; its run
        folder stays as it is. `data={"calibration": 0.5}` does so in `fit`, with half of the validation part.

        Args:
            X, y, image, label: see `fit`; columns default to those of `fit`.
            group, share, kind, by_rank: see `ordinalclip.external.calibrate_external`.
        """
        rows, root, keys = self._labelled(X, y, image, label)
        more: dict[str, Any] = {"share": share, "kind": kind, "by_rank": by_rank, "quiet": self.quiet}
        self.model_, _ = calibrate_external(self.model_, rows, root, group, overrides={"data": keys}, **more)
        return self

    def score(self, X: Rows, y: ArrayLike | None = None) -> float:
        """R² of the values that `predict` gives, as scikit-learn's regressors have it; `evaluate` says more."""
        found = self._evaluated(X, y)
        return r2_score(found.answers, found.predictions.labels)

    # ---- models

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Write the model: see `OrdinalModel.save_pretrained`."""
        check_is_fitted(self)
        self.model_.save_pretrained(folder, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Upload the model, its card included: see `OrdinalModel.push_to_hub`."""
        check_is_fitted(self)
        return self.model_.push_to_hub(repo_id, **options)

    @classmethod
    def from_pretrained(cls, name: str | Path, *, image: str = "image", label: str = "label") -> OrdinalRegressor:
        """A fitted regressor of a run folder, a model folder, or a name on the hub.

        Args:
            image, label: columns of pictures and labels, where no run says them.
        """
        loaded, _, run = served(name)
        config = loaded.config
        regressor = cls(config.backbone, method=config.method, unit=loaded.head.ranks.unit or None)
        if run is not None:
            saved = run.read_config()
            sections = {name: getattr(saved, name).model_dump(exclude_defaults=True) for name in SECTIONS[1:]}
            given = {argument: sections[section].pop(argument, None) for section, argument in ARGUMENTS}
            sections["model"].pop("backbone", None)
            sections["data"] = {key: value for key, value in sections["data"].items() if key not in OF_ITS_DATA}
            regressor = cls(
                saved.model.backbone,
                method=saved.method,
                head=saved.head,
                output_dir=str(run.path),
                seed=saved.seed,
                **given,
                **{name: section for name, section in sections.items() if section},
            )
            image, label = saved.data.image_column, saved.data.label_column
            regressor.metrics_ = run.read_metrics()
        regressor.model_, regressor.run_folder_ = loaded, None if run is None else run.path
        regressor.image_, regressor.label_ = image, label
        return regressor


def _section(name: str, given: Any) -> dict[str, Any]:
    """What a section says, as a dict of its own."""
    if given is None:
        return {}
    if isinstance(given, Section):
        return given.model_dump(exclude_unset=True)
    if isinstance(given, Mapping):
        return _plain(given)
    raise ValueError(f"{OWN}: {name} is a dict or a section of ordinalclip.config, got {type(given).__name__}")


def _plain(value: Any) -> Any:
    """NumPy's numbers and arrays, and paths, as a configuration has them."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _refuse_twice(name: str, section: Mapping[str, Any], said: Mapping[str, Any]) -> None:
    """Raises:
    ValueError: a key that an argument and a section give, as two values."""
    for key, value in said.items():
        if key in section and section[key] != value and not (name == "data" and key == "source"):
            raise ValueError(f"{OWN}: {name}.{key} is given twice, as {section[key]!r} and as {value!r}")
    steps = {"max_steps", "epochs"}
    if name == "train" and said.keys() & steps and len({*section, *said} & steps) == 2:
        raise ValueError(f"{OWN}: train.max_steps and train.epochs are both given; one of them says how long")


def _path(X: Any) -> str | None:
    """The table or folder that is named; None for rows in memory."""
    return str(X) if isinstance(X, str | Path) else None


def _source(path: str) -> dict[str, Any]:
    """Keys of data that name a table or a folder.

    Raises:
        FileNotFoundError: neither.
    """
    if os.path.isdir(path):
        return {"source": "folder", "root": path}
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such table or folder")
    return {"source": "table", "table": os.path.abspath(path)}


def _frame(X: Any, y: Any, config: RunConfig) -> pd.DataFrame | datasets.Dataset:
    """Rows in memory as a table.

    Raises:
        ValueError: something else, labels that are given twice, or as many as there are no pictures.
    """
    image, label = config.data.image_column, config.data.label_column
    if (path := _path(X)) is not None:
        raise ValueError(f"{OWN}: {path}: with rows of their own for a part, or y, all rows are handed over in memory")
    if isinstance(X, datasets.Dataset):
        if y is not None:
            raise ValueError(f"{OWN}: y is given beside a datasets.Dataset, whose column {label!r} holds the labels")
        return X
    if isinstance(X, pd.DataFrame):
        frame = X
    elif not isinstance(X, list | tuple | pd.Series | np.ndarray) or getattr(X, "ndim", 1) not in (1, 4):
        raise ValueError(
            f"{OWN}: rows are a pandas frame, a datasets.Dataset, a table or folder, or pictures as a list or an "
            f"(N, H, W, 3) array; got a {type(X).__name__}"
        )
    else:
        pictures = list(X.to_numpy() if isinstance(X, pd.Series) else X)
        frame = pd.DataFrame({image: pd.Series(pictures, dtype=object)})
    if y is None:
        return frame
    if isinstance(X, pd.DataFrame | pd.Series) and isinstance(y, pd.Series) and not X.index.equals(y.index):
        raise ValueError(f"{OWN}: pictures and y have different indexes; y.to_numpy() takes labels by their places")
    labels = np.asarray(y)
    if labels.ndim != 1 or len(labels) != len(frame):
        raise ValueError(f"{OWN}: {len(frame)} pictures and labels of shape {labels.shape}; one label each is wanted")
    if label in frame.columns:
        raise ValueError(f"{OWN}: y is given, and a column {label!r} is there, too")
    return frame.assign(**{label: labels})
