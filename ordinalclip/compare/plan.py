"""What runs a comparison consists of: methods x settings x seeds x variants, checked before anything runs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field, model_validator

from ordinalclip.config import (
    MAX_SEED,
    Layer,
    RunConfig,
    flat_keys,
    merge,
    names_of,
    nested,
    parse_config,
    read_layers,
    read_overrides,
    stack,
)
from ordinalclip.executors import Jobs, Where
from ordinalclip.heads import head_class
from ordinalclip.sections import Section, parse_section
from ordinalclip.written import values

SHARED = {"data", "ranks"}  # or errors could not be compared image by image
OWN = {  # keys of a run that the comparison sets itself, and how they are said to it
    "seed": "seeds",
    "output_dir": "output_dir of the comparison",
    "overwrite": "overwrite of the comparison",
    "evaluation.test": "nothing: the test part is read once, by the chosen setting",
    "train.resume": "nothing: what is there is gone on with",
}
MAX_NAME = 100  # characters; names are parts of paths
Setting = dict[str, Any]  # dotted keys of a run
Settings = Annotated[list[Setting], Field(min_length=1)]


class Place(NamedTuple):
    """Of a run in a comparison."""

    variant: str
    method: str
    number: int  # of the setting
    seed: int


class MethodConfig(Section):
    base: dict[str, Any] = Field({}, description="keys of a run for this method")
    settings: Settings | None = Field(None, description="tried instead of the comparison's; validation chooses")


class CompareConfig(Section):
    output_dir: str = Field("runs/compare/default", min_length=1, description="folder of the table and of all runs")
    title: str = Field("", description="a sentence above the table")
    seeds: list[Annotated[int, Field(ge=0, le=MAX_SEED)]] = Field(
        [1, 2, 3], min_length=1, description="one run per method, setting and seed"
    )
    tuning_seeds: int = Field(1, ge=1, description="how many of the seeds, the first ones, choose between settings")
    execution: Where = Field("local", description="local: this machine, jobs at a time; or a cluster, dask://HOST:PORT")
    jobs: Jobs = Field(
        1, description="runs at a time, each a process with its share of the cores; auto: a core each, on a GPU one"
    )
    overwrite: bool = Field(
        False, description="replace runs of another experiment in the folder; false: refuse to start beside them"
    )
    keep_checkpoints: bool = Field(False, description="keep checkpoints/ and model-last/ of finished runs")
    base: dict[str, Any] = Field({}, description="keys of a run, shared by all methods")
    settings: Settings = Field([{}], description="dotted keys to try for every method that learns")
    methods: dict[str, MethodConfig] = Field(min_length=1, description="a line of the table each")
    variants: dict[str, Setting] = Field({"": {}}, min_length=1, description="a table each: dotted keys that differ")

    @model_validator(mode="after")
    def _fair(self) -> CompareConfig:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be different, got {self.seeds}")
        for name in [*self.methods, *(self.variants if self.variants.keys() != {""} else ())]:
            if not 0 < len(name.strip()) <= MAX_NAME:
                raise ValueError(f"names of methods and variants have 1 to {MAX_NAME} characters, got {name[:200]!r}")
        for name, method in self.methods.items():
            keys = [*method.base, *(key for setting in method.settings or [] for key in setting)]
            if own := [key for key in keys if key.partition(".")[0] in SHARED]:
                raise ValueError(
                    f"methods.{name}: {own[0]} must be the same for all methods; set it in base or variants"
                )
        return self


class Plan:
    """A comparison read from a file: which runs there are.

    Args:
        config: the comparison.
        source: its name in errors.
        overrides: dotted "key=value" that all runs get, whatever the comparison says.

    Attributes:
        settings: those to try, by method.
        runs: configuration of every run that may be needed.

    Raises:
        ValueError: a run's configuration that is wrong, methods with unequal numbers of settings, or a key that is
            set twice.
    """

    def __init__(self, config: CompareConfig, source: str, overrides: Sequence[str] = ()):
        self.config = config
        self.folder = Path(config.output_dir)
        self.seeds = config.seeds
        try:
            self._written = {name: self._settings_of(method) for name, method in config.methods.items()}
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        self.settings: dict[str, list[Setting]] = values(self._written)
        given = read_overrides(overrides)
        self._check(source, given)
        self.runs: dict[Place, RunConfig] = {}
        for variant in config.variants:
            for seed in self.seeds:  # runs on the same data one after the other
                for name, settings in self.settings.items():
                    for number in range(len(settings)):
                        run = self._run_config(variant, name, number, seed, source, given)
                        self.runs[Place(variant, name, number, seed)] = run
        folders = Counter(run.output_dir for run in self.runs.values())
        if shared := [folder for folder, times in folders.items() if times > 1]:
            raise ValueError(
                f"{source}: names of methods or variants are too alike, runs would share {', '.join(shared[:3])}"
            )

    @property
    def tuning_seeds(self) -> list[int]:
        """The seeds on which settings are chosen."""
        return self.seeds[: self.config.tuning_seeds]

    def _learns(self, method: MethodConfig) -> bool:
        """Of a method that does not, one setting is all there is; one without a name is found out when it is built."""
        name = method.base.get("method", self.config.base.get("method"))
        return not isinstance(name, str) or head_class(name).learns

    def _settings_of(self, method: MethodConfig) -> list[Setting]:
        return method.settings or (self.config.settings if self._learns(method) else [{}])

    def tried(self) -> dict[str, list[Setting]]:
        """Settings of the methods that learn."""
        return {name: self.settings[name] for name, method in self.config.methods.items() if self._learns(method)}

    def _check(self, source: str, overrides: dict[str, Any]) -> None:
        """As many settings for every method, and no key that would be set twice, where one would go unheard."""
        everything = [self.config.base, overrides, *self.config.variants.values()]
        everything += [
            part for name, method in self.config.methods.items() for part in [method.base, *self.settings[name]]
        ]
        for content in everything:
            if own := sorted(OWN.keys() & flat_keys(content)):
                raise ValueError(f"{source}: {own[0]} is not for a run of a comparison to say; set {OWN[own[0]]}")
        numbers = {name: len(settings) for name, settings in self.tried().items()}
        if len(set(numbers.values())) > 1:
            raise ValueError(f"{source}: every method needs the same number of settings to try, got {numbers}")
        tuned = {key for settings in self.settings.values() for setting in settings for key in flat_keys(setting)}
        varied = {key for keys in self.config.variants.values() for key in flat_keys(keys)}
        for name, method in self.config.methods.items():
            twice = flat_keys(method.base).keys() & {key for each in self.settings[name] for key in flat_keys(each)}
            if twice:
                raise ValueError(f"{source}: methods.{name}: {min(twice)} is set by its base and by settings")
        given = set(flat_keys(overrides))
        for first, second, what in (
            (varied, tuned, "by variants and by settings"),
            (given, tuned, "on the command line and by settings"),
            (given, varied, "on the command line and by variants"),
        ):
            if both := sorted(first & second):
                raise ValueError(f"{source}: {both[0]} is set {what}")

    def _run_config(
        self, variant: str, name: str, number: int, seed: int, source: str, overrides: dict[str, Any]
    ) -> RunConfig:
        where = f"variant {variant!r}, method {name!r}" if variant else f"method {name!r}"
        folder = self.folder / "runs" / _label(variant) / f"{_label(name)}-{number}-seed{seed}"
        content: dict[str, Any] = {"evaluation": {"report": False, "space": True}}
        for above in (
            self.config.base,
            self.config.methods[name].base,
            nested({**self.config.variants[variant], **self._written[name][number]}),
            overrides,
            {"output_dir": str(folder), "seed": seed, "evaluation": {"test": False}, "train": {"resume": "auto"}},
        ):
            content = merge(content, above)
        return parse_config(content, f"{source}, {where}, setting {number}")


def load_plan(path: str | Path, overrides: Sequence[str] = ()) -> Plan:
    """Read a comparison file.

    Args:
        overrides: dotted "key=value"; keys of a run (data.root, train.max_steps, ...) apply to all runs, keys of
            the comparison itself (seeds, output_dir, title) to it.

    Raises:
        ValueError: unknown keys or wrong values, with file, method and key.
    """
    own = [override for override in overrides if re.split("[.=]", override)[0].strip() in CompareConfig.model_fields]
    shared = [override for override in overrides if override not in own]
    layers = read_layers(path)
    content = stack([*layers, Layer("the command line", read_overrides(own))])
    if "methods" not in content and content.keys() & (
        RunConfig.model_fields.keys() - CompareConfig.model_fields.keys()
    ):
        raise ValueError(f"{path} is the configuration of a run: ordinalclip train {path}")
    return Plan(parse_section(content, CompareConfig, names_of(layers)), str(path), shared)


def _label(name: str) -> str:
    """A name as part of a path."""
    return "".join(c if c.isalnum() else "-" for c in name.lower())
