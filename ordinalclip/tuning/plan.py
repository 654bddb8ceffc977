"""What a search consists of: a configuration, what is searched of it, and its folder; checked before anything runs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ordinalclip.config import (
    MAX_SEED,
    Layer,
    RunConfig,
    flat_keys,
    names_of,
    nested,
    override_value,
    parse_config,
    read_layers,
    read_overrides,
    read_prepared,
    stack,
)
from ordinalclip.executors import Jobs, Where
from ordinalclip.files import delete, read_json_object, write_json
from ordinalclip.run_folder import WAYS, FolderOccupied, RunFolder, changed_data, changed_keys, described
from ordinalclip.search import read_search, refuse_set, split
from ordinalclip.sections import Section, parse_section

Pruner = Literal["median", "hyperband", "none"]


class TuneConfig(Section):
    trials: int = Field(20, ge=1, le=100_000, description="how many there are to be, those of earlier calls included")
    seeds: int = Field(1, ge=1, le=100, description="runs of each trial, whose mean validation MAE counts")
    pruner: Pruner = Field("median", description="what ends trials early that are behind the others")
    jobs: Jobs = Field(1, description="trials at a time, each a process with its share of the cores")
    execution: Where = Field("local", description="where they run: local, or dask://HOST:PORT")


class Files:
    """The files of a search.

    Args:
        folder: `output_dir`.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.record = folder / "search.json"  # what is searched, and on which data
        self.journal = folder / "study.journal"  # Optuna's: written by every process that runs a trial
        self.trials = folder / "trials"
        self.table = folder / "trials.csv"
        self.best = folder / "best.yaml"
        self.report = folder / "report.html"

    @property
    def own(self) -> tuple[Path, ...]:
        return (self.record, self.journal, self.trials, self.table, self.best, self.report)

    def run(self, number: int, seed: int) -> Path:
        """The folder of a trial's run."""
        return self.trials / f"{number:03d}-seed{seed}"


@dataclass(frozen=True)
class Outcome:
    """A finished search.

    Attributes:
        num_trials: of all calls, those that failed left out.
        setting: the best, by dotted key.
        validation_mae: its error.
        run: the folder of its run, of the first seed.
        errors: what broke trials off in this call; the next one draws others in their place.
    """

    num_trials: int
    setting: dict[str, str]
    validation_mae: float
    run: Path
    errors: list[str]


class TuningPlan:
    """A search of a configuration.

    Args:
        layers: the configuration's files and overrides.
        searched: texts of ranges and choices by key.
        options: of the search.

    Attributes:
        search: ranges and choices by key.
        base: the configuration with the first end of everything; the folder and the data are those of all trials.

    Raises:
        ValueError: what `read_search` refuses, or seeds beyond the largest.
    """

    def __init__(self, layers: Sequence[Layer], searched: Mapping[str, str], options: TuneConfig):
        self.layers, self.options, self.source = layers, options, names_of(layers)
        refuse_set(searched, flat_keys(layers[-1].content))
        self.search = read_search(searched, self._checked, f"{self.source}, search")
        first = {key: each.ends[0] for key, each in self.search.items()}
        self.base = base = self._checked({key: override_value(text) for key, text in first.items()}, self.source)
        self.seeds = [base.seed + number for number in range(options.seeds)]
        if self.seeds[-1] > MAX_SEED:
            raise ValueError(f"seed={base.seed} with {options.seeds} seeds leads beyond {MAX_SEED}")
        self.folder, self.files = Path(base.output_dir), Files(Path(base.output_dir))

    def _checked(self, setting: Mapping[str, Any], source: str) -> RunConfig:
        return parse_config(stack([*self.layers, Layer("the search", nested(dict(setting)))]), source)

    def runs(self, number: int, setting: Mapping[str, str]) -> list[RunConfig]:
        """The runs of a trial, one a seed.

        Args:
            setting: texts by key.

        Raises:
            ValueError: values that the configuration refuses together.
        """
        values = Layer("the search", nested({key: override_value(text) for key, text in setting.items()}))
        found = []
        for seed in self.seeds:
            own: dict[str, Any] = {"output_dir": str(self.files.run(number, seed)), "seed": seed, "overwrite": False}
            own |= {"evaluation": {"test": False, "report": False}, "train": {"resume": "auto"}}
            content = stack([*self.layers, values, Layer("the search", own)])
            found.append(parse_config(content, f"{self.source}, trial {number}"))
        return found

    def best_config(self, setting: Mapping[str, str]) -> RunConfig:
        """The configuration that training starts from with what was found."""
        values = {**setting, "output_dir": str(self.folder / "best")}
        return self._checked({key: override_value(text) for key, text in values.items()}, self.source)

    @property
    def record(self) -> dict[str, Any]:
        """What makes it this search: all but how many trials there are and where they run."""
        return {
            "config": self.base.model_dump(mode="json"),
            "search": {key: each.text for key, each in self.search.items()},
            "seeds": self.options.seeds,
            "pruner": self.options.pruner,
        }

    def claim(self, data: dict[str, Any]) -> None:
        """The folder, held by this job, is this search's: it holds nothing else.

        Args:
            data: fingerprints of the data.

        Raises:
            FolderOccupied: the folder of a run, of a comparison, or of somebody else; ValueError: another search.
        """
        files, run = self.files, RunFolder(self.folder)
        if run.config.is_file() or run.metrics.is_file():
            raise FolderOccupied(
                f"{self.folder} is the folder of {run.state().text}; give the search another, such as "
                f"output_dir={self.folder}-tune"
            )
        if not files.record.is_file():
            if theirs := [path.name for path in (*files.own, self.folder / "results.csv") if path.exists()]:
                raise FolderOccupied(
                    f"{self.folder} holds {theirs[0]}, and no search: give the search another folder (output_dir)"
                )
        elif difference := self._difference(read_json_object(files.record), data):
            if not self.base.overwrite:
                raise ValueError(f"{self.folder} holds another search: {difference}; {WAYS}")
            for path in (*files.own, *self.folder.glob("study.journal*")):
                delete(path)
        if not files.record.is_file():
            write_json(files.record, {**self.record, "data": data})

    def _difference(self, before: dict[str, Any], data: dict[str, Any]) -> str:
        """In what the search in the folder is another one, in words."""
        now = self.record
        try:
            if difference := changed_keys({"search": before["search"]}, {"search": now["search"]}) or changed_keys(
                before["config"], now["config"]
            ):
                return described(difference)
            for key in ("seeds", "pruner"):
                if before[key] != now[key]:
                    return f"{key} was {before[key]!r}, is {now[key]!r}"
            return changed_data(before["data"], data)
        except (KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{self.files.record}: damaged ({error!r})") from error


def load_plan(
    path: str | Path | None,
    overrides: Sequence[str] = (),
    trials: int = 20,
    seeds: int = 1,
    pruner: str = "median",
    prepared: str | Path | None = None,
) -> TuningPlan:
    """Read a configuration and what is searched of it.

    Args:
        overrides: ranges and choices; keys of a run; jobs and execution.
        prepared: a prepared folder, laid over the configuration.

    Raises:
        ValueError: unknown keys or wrong values, nothing to search, a range of which the configuration refuses an end.
    """
    own = [each for each in overrides if re.split("[.=]", each)[0].strip() in ("jobs", "execution")]
    searched, plain = split(each for each in overrides if each not in own)
    given = {"trials": trials, "seeds": seeds, "pruner": pruner, **read_overrides(own)}
    options = parse_section(given, TuneConfig, "the command line")
    layers = read_layers(path)
    if any("methods" in layer.content for layer in layers):
        raise ValueError(f"{path} is a comparison: it searches for every method with its own key `search`")
    if prepared is not None:
        layers.append(read_prepared(prepared).layer)
    return TuningPlan([*layers, Layer("the command line", read_overrides(plain))], searched, options)
