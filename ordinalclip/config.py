"""Typed run configuration: YAML files, dotted overrides, and errors that name the key."""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model, model_validator

from ordinalclip.heads import head_options
from ordinalclip.ranks import Decoding, Ranks
from ordinalclip.suggestions import near_matches


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=())


MOST_DERIVED = 200  # distinct labels that become ranks by themselves
MOST_BROKEN = 40  # where some are no whole numbers: measurements, rather than steps of a scale


class AugmentConfig(Section):
    crop_ratio: float = Field(
        256 / 224, ge=1, description="resize to this many times the input size before the random crop"
    )
    flip: bool = Field(False, description="mirror left-right with probability 1/2")
    flip_vertical: bool = Field(False, description="mirror top-bottom with probability 1/2")
    quarter_turns: bool = Field(False, description="rotate by a random multiple of 90 degrees")
    rotate: float = Field(0.0, ge=0, description="largest rotation in degrees")
    shift: float = Field(0.0, ge=0, lt=1, description="largest shift as a share of the size")
    scale: tuple[float, float] = Field((1.0, 1.0), description="smallest and largest zoom")
    contrast: float = Field(0.0, ge=0, le=1, description="largest relative change of contrast")
    brightness: float = Field(0.0, ge=0, le=1, description="largest relative change of brightness")


class RanksConfig(Section):
    values: list[float] | None = Field(
        None, description="rank values in the label's unit; default: the distinct training labels"
    )
    names: list[str] | None = Field(None, description="a name per rank; default: the value")
    low: float | None = Field(None, description="first of `num` evenly spaced rank values")
    high: float | None = Field(None, description="last of `num` evenly spaced rank values")
    num: int | None = Field(None, ge=2, description="number of evenly spaced ranks from low to high")
    unit: str = Field("", description="unit of the values, e.g. years")
    edges: list[float] | None = Field(None, description="bin edges; default: a label takes the nearest rank value")
    tolerance: float | None = Field(None, ge=0, description="how far outside the ranks a label may lie")
    unused: bool = Field(False, description="allow ranks of which the training labels cover less than a fifth")

    @model_validator(mode="after")
    def _one_way(self) -> RanksConfig:
        evenly = [self.low, self.high, self.num]
        if any(part is not None for part in evenly):
            if self.values is not None:
                raise ValueError("give either values or low / high / num, not both")
            if any(part is None for part in evenly):
                raise ValueError("low, high and num belong together")
        return self

    def given_values(self) -> list[float] | None:
        """The rank values, where the configuration says them."""
        if self.low is not None and self.high is not None and self.num is not None:
            return list(Ranks.linear(self.low, self.high, self.num).values)
        return self.values

    def with_values(self, values: list[float]) -> RanksConfig:
        """The same with the rank values said one by one."""
        return self.model_copy(update={"values": values, "low": None, "high": None, "num": None})

    def build(self, labels: Iterable[float]) -> Ranks:
        """The ranks: as given, or the distinct values of the training labels (at most 200).

        Raises:
            ValueError: labels too many or too continuous to be ranks each, names in another order than the values they
                spell, or what `Ranks` refuses: with the cure.
        """
        values = self.given_values()
        if values is None:
            values = sorted(set(labels))
            whole = all(value.is_integer() for value in values)
            if len(values) > MOST_DERIVED or (not whole and len(values) > MOST_BROKEN):
                low, high = math.floor(values[0]), math.ceil(values[-1])
                raise ValueError(
                    f"the training labels have {len(values)} distinct values from {values[0]:g} to {values[-1]:g}, too "
                    f"many to be a rank each; set ranks.low, high and num, such as ranks.low={low} ranks.high={high} "
                    f"ranks.num={min(high - low + 1, 101) if high - low > 10 else 21}, or ranks.values"
                )
            if len(values) == 1:
                raise ValueError(
                    f"all training labels are {values[0]:g}; ranks.values says which other values there are"
                )
        names = tuple(self.names) if self.names else None
        if names and sorted(names) == sorted(f"{v:g}" for v in values) and list(names) != [f"{v:g}" for v in values]:
            raise ValueError(f"ranks.names are the rank values in another order: {', '.join(names)}; values ascend")
        edges = tuple(self.edges) if self.edges else None
        return Ranks(tuple(values), names, self.unit, edges, self.tolerance)


class DataConfig(Section):
    source: Literal["gauges", "table", "folder", "hub", "memory"] = Field(
        "gauges",
        description="generated gauges, files with a table, a folder for every label, a `datasets` name, or what was "
        "handed over in Python",
    )
    root: str = Field("", description="folder that image paths and table names start from")
    outside_root: bool = Field(False, description="allow image paths that leave root: ../, links, absolute ones")
    table: str = Field(
        "",
        description="CSV, Excel, Parquet, JSON lines or list file (`path label [label ...]`) with all rows, to be split",
    )
    train_table: str = Field("", description="table of the training part, instead of `table`")
    validation_table: str = Field("", description="table of the validation part")
    test_table: str = Field("", description="table of the test part")
    separator: str = Field("", max_length=1, description="between cells of a text table; default: found")
    decimal: Literal["", ".", ","] = Field("", description="decimal mark of labels in text; default: found, and said")
    encoding: str = Field("", description="of text tables, e.g. cp1252; default: UTF-8, or what their first bytes say")
    sheet: str = Field("", description="sheet of an Excel file; default: the only one that holds something")
    suffix: str = Field("", description="ending of the picture files where the table names them without, e.g. .png")
    missing: Literal["refuse", "drop"] = Field("refuse", description="rows without a label: an error, or left out")
    duplicates: Literal["refuse", "together", "allow"] = Field(
        "refuse",
        description="the same picture in two parts or with two labels: an error, kept in one part, or left as it is",
    )
    hub: str = Field("", description="name or folder for datasets.load_dataset")
    hub_config: str = Field("", description="configuration of the data set on the hub")
    hub_split: str = Field("", description="the one split that is taken and divided, instead of those that it has")
    hub_revision: str = Field("", description="revision of the data set on the hub: a tag, branch or commit")
    image_column: str = Field("image", description="column with the image or its path")
    label_column: str = Field(
        "label", description="column with the label: a number in the label's unit, or one of ranks.names"
    )
    split_column: str = Field("", description="column that says train / validation / test, instead of a random split")
    split: tuple[float, float, float] = Field(
        (0.6, 0.15, 0.25), description="shares of train, validation and test in a random split"
    )
    split_seed: int | None = Field(None, ge=0, description="seed of the split; default: the run's seed")
    draw_seed: int | None = Field(
        None, ge=0, description="seed of draws by shots, train_share and label shift; default: that of the split"
    )
    folds: int | None = Field(None, ge=2, description="cross-validation: one of this many folds is the test part")
    fold: int = Field(0, ge=0, description="which fold is the test part, from 0")
    stratify: list[str] = Field([], description="columns whose every combination is split in the same shares")
    group: str = Field("", description="column (subject, patient) whose equal rows stay in one part")
    shots: int | None = Field(None, ge=1, description="few-shot: this many random training images per rank")
    train_share: float = Field(
        1.0, gt=0, le=1, description="share of the training images of every rank that is kept, at least one"
    )
    license: str = Field("", description="licence of the pictures, for the model card")
    kinds: list[str] = Field(["thermometer"], description="gauges: kinds of instrument")
    num_train: int = Field(64, ge=1, description="gauges: training images")
    num_validation: int = Field(100, ge=1, description="gauges: validation images")
    num_test: int = Field(500, ge=1, description="gauges: test images")
    shift_ranks: int | None = Field(
        None,
        ge=1,
        description="label shift: of this many most populated ranks keep only shift_keep of the training rows",
    )
    shift_keep: float = Field(0.1, gt=0, le=1, description="label shift: the share that is kept")
    workers: int = Field(0, ge=0, description="processes that decode images")
    prefetch: int = Field(2, ge=1, description="batches that each worker prepares ahead")
    cache_mb: int = Field(
        512,
        ge=0,
        description="memory for decoded, resized images, in each worker; used by parts that fit in, 0: by none",
    )
    augment: AugmentConfig = AugmentConfig()

    @model_validator(mode="after")
    def _complete(self) -> DataConfig:
        if self.source not in ("table", "memory") and (self.table or self.train_table):
            raise ValueError(f"a table is given, but source is {self.source}; set data.source=table")
        if self.source == "table" and not (self.table or self.train_table):
            raise ValueError("source table needs data.table, or data.train_table with validation_table and test_table")
        if self.table and (self.train_table or self.validation_table or self.test_table):
            raise ValueError("give either data.table, to be split, or data.train_table with its kin, not both")
        if self.source == "folder" and not self.root:
            raise ValueError("source folder needs data.root, a folder with one folder for every label")
        if self.source == "hub" and not self.hub:
            raise ValueError("source hub needs data.hub")
        if self.source == "gauges" and (self.root or self.hub):
            raise ValueError("data.root or data.hub is given, but source is gauges; set data.source")
        if self.folds is not None and (self.fold >= self.folds or self.split_column):
            raise ValueError(
                f"data.fold={self.fold} of data.folds={self.folds}: folds count from 0, without split_column"
            )
        if min(self.split) < 0 or abs(sum(self.split) - 1) > 1e-6 or self.split[0] == 0:
            raise ValueError(f"split must be three shares that add up to 1, the first above 0, got {self.split}")
        return self


class ModelConfig(Section):
    backbone: str = Field(
        "tiny",
        description="image encoder: tiny, open_clip:NAME[/TAG-or-FILE], open_clip:FOLDER, hf:NAME-or-FOLDER, "
        "timm:NAME[/pretrained-or-FILE]",
    )
    text: str = Field("", description="text tower, as a backbone spec; default: that of the backbone")
    image_size: int | None = Field(None, ge=16, description="input size in pixels; default: the backbone's own")
    load_weights: bool = Field(
        True, description="load the backbone's weights; false: its architecture with random weights"
    )
    batch_norm: Literal["frozen", "sync", "local"] = Field(
        "frozen", description="statistics of BatchNorm layers in training"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the image features")
    drop_path: float = Field(
        0.0, ge=0, lt=1, description="stochastic depth: largest rate at which residual branches are left out"
    )
    mirror: list[Literal["horizontal", "vertical"]] = Field(
        [], description="at evaluation and serving, features are averaged over the picture and its mirrors"
    )
    lora_rank: int | None = Field(
        None, ge=1, description="train low-rank adapters of this rank in the image encoder, which stays as it is (peft)"
    )
    lora_alpha: int = Field(16, ge=1, description="scale of the adapters: alpha / rank")
    lora_targets: list[str] = Field(
        [], description="patterns of the encoder's layers that get adapters; default: all linear ones, or convolutions"
    )


class TrainConfig(Section):
    max_steps: int = Field(1000, ge=0, description="optimiser steps")
    epochs: float | None = Field(None, gt=0, description="instead of max_steps: passes over the training part")
    batch_size: int = Field(32, ge=1, description="global batch, over all processes")
    micro_batch_size: int | None = Field(
        None, ge=1, description="images encoded at once in one process; default: all of its share"
    )
    optimizer: Literal["adamw", "radam"] = Field(
        "adamw", description="adamw or radam, both with decoupled weight decay"
    )
    lr: float = Field(1e-4, gt=0, description="learning rate")
    lr_encoder: float | None = Field(None, ge=0, description="of the image encoder; default: lr")
    lr_prompts: float | None = Field(None, ge=0, description="of context and rank embeddings; default: lr")
    lr_head: float | None = Field(None, ge=0, description="of all else in the head, projection included; default: lr")
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="learning rate of each encoder layer, as a share of that of the layer after it"
    )
    weight_decay: float = Field(5e-4, ge=0, description="decoupled weight decay, not applied to biases and norms")
    warmup_steps: int = Field(0, ge=0, description="linear warm-up")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="after the warm-up: cosine to 0, or constant")
    ema: float | None = Field(
        None, gt=0, lt=1, description="decay of a running average of the weights, e.g. 0.999, that becomes the model"
    )
    clip_grad_norm: float | None = Field(None, gt=0, description="largest norm of the gradient; default: no clipping")
    freeze: list[str] = Field([], description="patterns of parameter names that stay as they are, e.g. encoder.*")
    freeze_layers: int | None = Field(
        None, ge=0, description="the image encoder's stem and this many of its layers stay as they are"
    )
    weighting: Literal["none", "inverse", "sqrt_inverse"] = Field(
        "none", description="sample weights: by the frequency of the rank, inverted, or inverted and rooted"
    )
    lds_sigma: float | None = Field(
        None, gt=0, description="label-distribution smoothing: width in ranks of the kernel over rank frequencies"
    )
    sampling: Literal["uniform", "balanced"] = Field(
        "uniform", description="every sample once an epoch, or every rank equally often"
    )
    mixed_precision: Annotated[Literal["no", "bf16", "fp16"], BeforeValidator(lambda v: "no" if v is False else v)] = (
        Field("no", description="autocast dtype; logits and losses stay float32")
    )
    precision: Literal["float32", "float64"] = Field("float32", description="dtype of the weights")
    eval_every: int | None = Field(None, ge=1, description="steps between validations; default: a tenth of the run")
    patience: int | None = Field(None, ge=1, description="stop after this many validations without a better MAE")
    select: Literal["best", "last"] = Field(
        "best", description="which step becomes model/: best validation MAE, or the last"
    )
    keep_checkpoints: int = Field(2, ge=1, description="newest checkpoints to keep, besides the best one")
    resume: str = Field(
        "none", description="none: start in an empty folder; auto: go on at the newest checkpoint; or one of them"
    )
    log_every: int = Field(10, ge=1, description="steps between writes to log.jsonl (one entry per step all the same)")
    exact: bool = Field(
        True, description="refuse what depends on processes or micro-batches (some BatchNorm modes); false: warn"
    )
    channels_last: bool = Field(False, description="channels-last memory order; faster on some machines")
    fused: bool = Field(True, description="AdamW's update in one kernel")
    compile: bool = Field(False, description="torch.compile the image encoder")
    activation_checkpointing: bool = Field(
        False, description="compute the image encoder's activations again in the backward pass: less memory"
    )
    tf32: bool = Field(False, description="TensorFloat-32 in matrix products and convolutions of a GPU")
    process_group_timeout: float = Field(
        600.0, gt=0, description="seconds after which processes give up waiting for one that is lost"
    )
    trackers: list[str] = Field([], description="Accelerate trackers, e.g. tensorboard, wandb")


class EvaluationConfig(Section):
    batch_size: int = Field(256, ge=1, description="images at once in one process")
    decoding: Decoding = Field("median", description="how the saved model turns a distribution into one value")
    cs: list[float] = Field([5.0], description="CS@k: share of errors of at most k, in the label's unit")
    space: bool = Field(
        False, description="D5 and residual variance of the feature space on the test part (seconds for 1,000 images)"
    )
    space_ks: list[Annotated[int, Field(ge=2)]] = Field(
        [5, 10, 20, 50], min_length=1, description="residual variance: sizes of the neighbourhood, the best counts"
    )
    test: bool = Field(True, description="read the test part at the end of training")
    report: bool = Field(True, description="write report.html and the model card at the end of training")


class RunConfig(Section):
    output_dir: str = Field("runs/default", description="run folder")
    overwrite: bool = Field(
        False, description="replace the run that is in the folder; false: refuse to start anew there"
    )
    seed: int = Field(1, ge=0, description="of initial weights, order of samples and augmentation")
    method: str = Field(
        "ordinalclip",
        description="head: ordinalclip, coop, zero_shot, one of baselines/, or a class of your own as module:Class",
    )
    head: dict[str, Any] = Field({}, description="options of the method, e.g. head.num_base_ranks=5")
    data: DataConfig = DataConfig()
    ranks: RanksConfig = RanksConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _one_way_on(self) -> RunConfig:
        if self.overwrite and self.train.resume != "none":
            raise ValueError("overwrite=true replaces a run, train.resume goes on with it; give one of them")
        return self

    @model_validator(mode="after")
    def _head_options(self) -> RunConfig:
        self.head = parse_config(self.head, f"options of method {self.method!r}", head_section(self.method), "head.")
        return self

    def to_yaml(self) -> str:
        """The whole configuration, defaults included; without what is for the command that says it: to overwrite a
        run, or to go on with it."""
        content = {**self.model_dump(mode="json"), "overwrite": False}
        content["train"]["resume"] = "none"
        return yaml.safe_dump(content, sort_keys=False)


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply dotted overrides, check every key and value.

    Args:
        path: a YAML file, which may extend another (`read_yaml`); None for the defaults.
        overrides: "key=value" with dotted keys; values are YAML, e.g. "train.lr=1e-3", "data.kinds=[dial, tank]".

    Raises:
        ValueError: an unreadable file, an unknown key (with the nearest valid one), a value of the wrong type or
            outside its range. The message names the file, those it extends, and the key.
    """
    return parse_config(apply_overrides(read_yaml(path), overrides), files_of(path))


def read_yaml(path: str | Path | None) -> dict[str, Any]:
    """The mapping in a YAML file; an empty one for None.

    `extends: OTHER.yaml`, a path from the folder of the file that says it, starts from the mapping in OTHER.yaml: keys
    of the file itself win, mappings are merged key by key, lists are replaced. OTHER.yaml may extend a third.

    Raises:
        FileNotFoundError: no such file; ValueError: not YAML, not a mapping, or files that extend each other.
    """
    merged: dict[str, Any] = {}
    for _, content in reversed(_layers(path)):
        merged = merge(merged, content)
    return merged


def files_of(path: str | Path | None) -> str:
    """How messages name a configuration: its file and those it extends, since a wrong key may stand in any of them."""
    return ", which extends ".join(str(file) for file, _ in _layers(path)) or "configuration"


def _layers(path: str | Path | None) -> list[tuple[Path, dict[str, Any]]]:
    """A file with its mapping, then the file it extends with its own, and so on."""
    layers: list[tuple[Path, dict[str, Any]]] = []
    file = None if path is None else Path(path)
    while file is not None:
        content = _read_mapping(file)
        layers.append((file, content))
        file = _extended(file, content.pop("extends")) if "extends" in content else None
        if file is not None and any(file.samefile(earlier) for earlier, _ in layers):
            chain = " extends ".join(str(part) for part in [*(earlier for earlier, _ in layers), file])
            raise ValueError(f"configurations extend each other in a circle: {chain}")
    return layers


def _extended(file: Path, value: Any) -> Path:
    if not isinstance(value, str):
        raise ValueError(f"{file}: extends is the path of one file from the folder of this one, got {value!r}")
    other = file.parent / value
    if not other.is_file():
        raise FileNotFoundError(f"{file} extends {other}: no such configuration file")
    return other


def _read_mapping(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such configuration file")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: a configuration is a mapping of keys to values, got {type(content).__name__}")
    return content


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Nested mappings as one: `above` wins, mappings on both sides are merged, everything else is replaced."""
    merged = {**below, **above}
    for key in below.keys() & above.keys():
        if isinstance(below[key], dict) and isinstance(above[key], dict):
            merged[key] = merge(below[key], above[key])
    return merged


def apply_overrides(content: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of nested `content` with dotted "key=value" overrides applied; values are YAML, or else text."""
    content = deepcopy(content)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ValueError(f"override {override!r}: write key=value, e.g. train.lr=1e-3")
        *parents, last = key.strip().split(".")
        place = content
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ValueError(f"override {override!r}: {parent} is a value, not a section")
        try:
            place[last] = yaml.safe_load(text)
        except yaml.YAMLError:  # such as ranks.unit=%
            place[last] = text
    return content


def flat_keys(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat.update(flat_keys(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def parse_config(content: dict[str, Any], source: str, section: type[Section] = RunConfig, prefix: str = "") -> Any:
    """Check a mapping against a section; every problem in one ValueError, each with its dotted key.

    Returns:
        the section; for a method's options (`head_section`), those that were set as a dict.
    """
    try:
        checked = section.model_validate(content)
    except ValidationError as error:
        lines = [_explain(problem, section, prefix) for problem in error.errors()]
        raise ValueError(f"{source}: " + "; ".join(lines)) from None
    return checked.model_dump(exclude_unset=True) if prefix else checked


def head_section(method: str) -> type[Section]:
    """The options of a method as a section that checks their types, with their descriptions."""
    fields: dict[str, Any] = {
        name: (
            option.annotation,
            Field(... if option.default is inspect.Parameter.empty else option.default, description=option.description),
        )
        for name, option in head_options(method).items()
    }
    return create_model(f"{method} options", __base__=Section, **fields)


def _explain(problem: Any, section: type[Section], prefix: str) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        names = [prefix + name for name, _, _ in describe(section)]
        known = names if "." in key or prefix else [*names, *section.model_fields]
        return f"{prefix}{key} is not a key; {near_matches(prefix + key, known)}"
    key = prefix + key if key else ""
    given = "" if isinstance(problem["input"], dict) else f", got {problem['input']!r}"
    return (f"{key}: " if key else "") + problem["msg"].removeprefix("Value error, ") + (given if key else "")


def describe(section: type[Section] = RunConfig, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Every dotted key with its default and description."""
    for name, info in section.model_fields.items():
        annotation = info.annotation
        if isinstance(annotation, type) and issubclass(annotation, Section):
            yield from describe(annotation, f"{prefix}{name}.")
        else:
            choices = typing.get_args(annotation) if typing.get_origin(annotation) is Literal else ()
            allowed = f" [{', '.join(map(str, choices))}]" if choices else ""
            yield f"{prefix}{name}", info.default, (info.description or "") + allowed
