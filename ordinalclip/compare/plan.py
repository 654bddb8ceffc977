"""What runs a comparison consists of: methods x settings x seeds x variants, checked before anything runs."""

from __future__ import annotations

import logging
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
    override_value,
    parse_config,
    read_layers,
    read_overrides,
    read_prepared,
    stack,
)
from ordinalclip.executors import Jobs, Where
from ordinalclip.heads import head_class
from ordinalclip.search import Setting, drawn, read_search, refuse_set
from ordinalclip.sections import Section, parse_section
from ordinalclip.shipped import COMPARISONS
from ordinalclip.written import values

logger = logging.getLogger(__name__)

SHARED = {"data", "ranks"}  # or errors could not be compared image by image
OWN = {  # keys of a run that the comparison sets itself, and how they are said to it
    "seed": "seeds",
    "output_dir": "output_dir of the comparison",
    "overwrite": "overwrite of the comparison",
    "evaluation.test": "nothing: the test part is read once, by the chosen setting",
    "train.resume": "nothing: what is there is gone on with",
}
WAYS_TO_TRY = [{"settings"}, {"search", "trials"}]  # of which a file replaces what it extends: see `merge`
MAX_NAME = 100  # characters; names are parts of paths
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
    search: dict[str, str] | None = Field(None, min_length=1, description="drawn from instead, as many as `trials`")


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
    recipe: str = Field("", description="whose prepared folder is to be given: --data FOLDER (ordinalclip prepare)")
    base: dict[str, Any] = Field({}, description="keys of a run, shared by all methods")
    splits: list[Setting] = Field(
        [],
        description="dotted keys of data by seed, such as published folds: the first seed has the first, and so on",
    )
    settings: Settings = Field([{}], description="dotted keys to try for every method that learns")
    search: dict[str, str] | None = Field(
        None,
        min_length=1,
        description="instead of settings: ranges and choices by dotted key, such as train.lr: 1e-5..1e-3:log, in which "
        "`trials` settings are drawn",
    )
    trials: int | None = Field(None, ge=1, le=1000, description="settings drawn for every method that learns")
    methods: dict[str, MethodConfig] = Field(min_length=1, description="a line of the table each")
    variants: dict[str, Setting] = Field({"": {}}, min_length=1, description="a table each: dotted keys that differ")

    @model_validator(mode="after")
    def _fair(self) -> CompareConfig:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be different, got {self.seeds}")
        if odd := [key for split in self.splits for key in flat_keys(split) if not key.startswith("data.")]:
            raise ValueError(f"splits say how the data is divided, in keys that begin with data., got {odd[0]}")
        for name in [*self.methods, *(self.variants if self.variants.keys() != {""} else ())]:
            if not 0 < len(name.strip()) <= MAX_NAME:
                raise ValueError(f"names of methods and variants have 1 to {MAX_NAME} characters, got {name[:200]!r}")
        both = ["methods." + name + ": " for name, method in self.methods.items() if method.search and method.settings]
        both += [""] if self.search and "settings" in self.model_fields_set else []
        if both:
            raise ValueError(f"{both[0]}give either settings, to be tried as they are, or a search, to draw them from")
        searches = [self.search, *(method.search for method in self.methods.values())]
        if (self.trials is None) == any(searches):
            raise ValueError("search and trials belong together: in which to draw settings, and how many")
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
        given = read_overrides(overrides)
        self._written: dict[str, list[Setting]] = {}
        for name in config.methods:
            try:
                searched, learns = self.searched(name), self._learns(config.methods[name])
            except ValueError as error:
                raise ValueError(f"{source}: {error}") from error
            method = config.methods[name]
            if searched:
                self._written[name] = self._drawn(name, searched, source, given)
            else:
                self._written[name] = method.settings or (config.settings if learns else [{}])
        self.settings: dict[str, list[Setting]] = values(self._written)
        self._check(source, given)
        self.runs: dict[Place, RunConfig] = {}
        for variant in config.variants:
            for seed in self.seeds:  # runs on the same data one after the other
                for name, settings in self.settings.items():
                    for number in range(len(settings)):
                        where = f"{source}, {_where(variant, name)}, setting {number}"
                        folder = self._run_folder(variant, name, number, seed)
                        written = self._written[name][number]
                        run = self._run_config(variant, name, written, seed, folder, where, given)
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

    def searched(self, name: str) -> dict[str, str]:
        """The ranges and choices in which a method's settings are drawn; none for one whose settings are given."""
        method = self.config.methods[name]
        if method.search or method.settings or not self._learns(method):
            return method.search or {}
        return self.config.search or {}

    def _drawn(self, name: str, searched: dict[str, str], source: str, overrides: dict[str, Any]) -> list[Setting]:
        """Before anything runs, so that what a method gets depends on nothing but the search: methods that share it get
        the same settings, and as many."""
        variant = next(iter(self.config.variants))
        try:
            refuse_set(searched, flat_keys(overrides))
        except ValueError as error:
            raise ValueError(f"{source}, {_where(variant, name)}: {error}") from None

        def check(setting: Setting, what: str) -> RunConfig:
            folder = self._run_folder(variant, name, 0, self.seeds[0])
            return self._run_config(variant, name, setting, self.seeds[0], folder, what, overrides)

        search = read_search(searched, check, f"{source}, {_where(variant, name)}, search")
        return [
            {key: override_value(text) for key, text in setting.items()}
            for setting in drawn(search, self.config.trials or 1)
        ]

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
        divided = {key for keys in self.config.splits for key in flat_keys(keys)}
        for name, method in self.config.methods.items():
            twice = flat_keys(method.base).keys() & {key for each in self.settings[name] for key in flat_keys(each)}
            if twice:
                raise ValueError(f"{source}: methods.{name}: {min(twice)} is set by its base and by settings")
        given = set(flat_keys(overrides))
        for first, second, what in (
            (varied, tuned, "by variants and by settings"),
            (given, tuned, "on the command line and by settings"),
            (given, varied, "on the command line and by variants"),
            (given, divided, "on the command line and by splits"),
            (varied, divided, "by variants and by splits"),
            (tuned, divided, "by settings and by splits"),
        ):
            if both := sorted(first & second):
                raise ValueError(f"{source}: {both[0]} is set {what}")

    def _split(self, seed: int) -> Setting:
        """What the data of a seed is divided by."""
        splits = self.config.splits
        return splits[self.seeds.index(seed) % len(splits)] if splits else {}

    def _run_folder(self, variant: str, name: str, number: int, seed: int) -> Path:
        return self.folder / "runs" / _label(variant) / f"{_label(name)}-{number}-seed{seed}"

    def _run_config(
        self, variant: str, name: str, setting: Setting, seed: int, folder: Path, source: str, overrides: dict[str, Any]
    ) -> RunConfig:
        content: dict[str, Any] = {"evaluation": {"report": False, "space": True}}
        for above in (
            self.config.base,
            self.config.methods[name].base,
            nested({**self._split(seed), **self.config.variants[variant], **setting}),
            overrides,
            {"output_dir": str(folder), "seed": seed, "evaluation": {"test": False}, "train": {"resume": "auto"}},
        ):
            content = merge(content, above)
        return parse_config(content, source)


def load_plan(path: str | Path, overrides: Sequence[str] = (), prepared: str | Path | None = None) -> Plan:
    """Read a comparison file.

    Args:
        path: a YAML file, or the name of a comparison that comes with the package.
        overrides: dotted "key=value"; keys of a run (data.root, train.max_steps, ...) apply to all runs, keys of
            the comparison itself (seeds, output_dir, title) to it.
        prepared: a prepared folder, whose data, ranks and splits are laid over those of the file; how its parts are
            made is said in the title.

    Raises:
        ValueError: unknown keys or wrong values, with file, method and key; no prepared folder where one is needed, or
            that of other pictures.
    """
    own = [override for override in overrides if re.split("[.=]", override)[0].strip() in CompareConfig.model_fields]
    shared = [override for override in overrides if override not in own]
    layers = read_layers(path, COMPARISONS)
    recipe = ""
    if prepared is not None:
        (name, sections), recipe, parts, splits = read_prepared(prepared)
        title = next((layer.content["title"] for layer in reversed(layers) if "title" in layer.content), "")
        layers.append(Layer(name, {"base": sections, "splits": splits, "title": f"{title} {parts}".strip()}))
    content = stack([*layers, Layer("the command line", read_overrides(own))], WAYS_TO_TRY)
    if "methods" not in content and content.keys() & (
        RunConfig.model_fields.keys() - CompareConfig.model_fields.keys()
    ):
        raise ValueError(f"{path} is the configuration of a run: ordinalclip train {path}")
    config = parse_section(content, CompareConfig, names_of(layers))
    _check_pictures(config, str(path), recipe, shared)
    if len(config.seeds) < len(config.splits):
        logger.warning(
            "%s: %d seeds take %d of %d splits", path, len(config.seeds), len(config.seeds), len(config.splits)
        )
    return Plan(config, str(path), shared)


def _check_pictures(config: CompareConfig, source: str, recipe: str, overrides: Sequence[str]) -> None:
    """Raises:
    ValueError: a comparison on pictures of a recipe without them, or with those of another."""
    if not config.recipe or recipe == config.recipe:
        return
    if recipe:
        raise ValueError(f"{source} compares on {config.recipe}; the folder of --data holds {recipe}")
    data = read_overrides(overrides).get("data")
    if not isinstance(data, dict) or not data.keys() & {"table", "train_table", "hub"}:
        raise ValueError(
            f"{source} needs prepared pictures: `ordinalclip prepare {config.recipe}` says which; "
            f"`ordinalclip prepare {config.recipe} --from DOWNLOAD --to FOLDER`, then add --data FOLDER"
        )


def _label(name: str) -> str:
    """A name as part of a path."""
    return "".join(c if c.isalnum() else "-" for c in name.lower())


def _where(variant: str, name: str) -> str:
    return f"variant {variant!r}, method {name!r}" if variant else f"method {name!r}"
