"""Typed run configuration: YAML files, dotted overrides, and errors that name the key.

The command line prints the keys before anything else is imported, so the modules that need torch are imported where a
value is checked.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from ordinalclip import shipped
from ordinalclip.ranks import MAX_RANKS, Decoding, Ranks
from ordinalclip.sections import Section, brief, parse_section
from ordinalclip.suggestions import near_matches
from ordinalclip.tokenization import TextPooling
from ordinalclip.written import MAX_BYTES, Written, dump, read, scalar

logger = logging.getLogger(__name__)

# Bounds beyond which a key means nothing: a million pictures fit no memory at once, and no training has more steps
# or takes larger ones. Seeds are what NumPy, torch and Python all take.
MAX_BATCH = 1 << 20
MAX_STEPS = 10**9
MAX_RATE = 100.0
MAX_SEED = 2**32 - 1
MAX_ROWS = 10**9
LEADING_NUMBER = re.compile(r"[-+]?\d+(\.\d+)?")
MAX_WORKERS = 1024
MAX_VIEWS = 1000
MOST_DERIVED = 200  # distinct labels that become ranks by themselves
MOST_BROKEN = 40  # where some are no whole numbers: measurements, rather than steps of a scale
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Rows = Annotated[int, Field(ge=1, le=MAX_ROWS)]
Steps = Annotated[int, Field(ge=1, le=MAX_STEPS)]
Batch = Annotated[int, Field(ge=1, le=MAX_BATCH)]
Rate = Annotated[float, Field(ge=0, le=MAX_RATE)]
Patterns = list[Annotated[str, Field(min_length=1)]]

# Ways to say the same, each a set of keys: what a file or the command line says in one way replaces what the files
# below it say in another.
WAYS: dict[str, list[set[str]]] = {
    "ranks": [{"values"}, {"low", "high", "num"}],
    "data": [{"table"}, {"train_table", "validation_table", "test_table"}, {"hub"}],
    "train": [{"max_steps"}, {"epochs"}],
}


class AugmentConfig(Section):
    crop_ratio: float = Field(
        256 / 224, ge=1, le=4, description="resize to this many times the input size before the random crop"
    )
    flip: bool = Field(False, description="mirror left-right with probability 1/2")
    flip_vertical: bool = Field(False, description="mirror top-bottom with probability 1/2")
    quarter_turns: bool = Field(False, description="rotate by a random multiple of 90 degrees")
    rotate: float = Field(0.0, ge=0, le=180, description="largest rotation in degrees")
    shift: float = Field(0.0, ge=0, lt=1, description="largest shift as a share of the size")
    scale: tuple[float, float] = Field((1.0, 1.0), description="smallest and largest zoom, 0.1 to 10")
    contrast: float = Field(0.0, ge=0, le=1, description="largest relative change of contrast")
    brightness: float = Field(0.0, ge=0, le=1, description="largest relative change of brightness")

    @field_validator("scale")
    @classmethod
    def _interval(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if not 0.1 <= scale[0] <= scale[1] <= 10:
            raise ValueError("the smallest zoom comes first, the largest second, both from 0.1 to 10")
        return scale


class RanksConfig(Section):
    values: list[float] | None = Field(
        None, max_length=MAX_RANKS, description="rank values in the label's unit; default: the distinct training labels"
    )
    names: list[str] | None = Field(None, description="a name per rank; default: the value")
    low: float | None = Field(None, description="first of `num` evenly spaced rank values")
    high: float | None = Field(None, description="last of `num` evenly spaced rank values")
    num: int | None = Field(None, ge=2, le=MAX_RANKS, description="number of evenly spaced ranks from low to high")
    unit: str = Field("", description="unit of the values, e.g. years")
    edges: list[float] | None = Field(None, description="bin edges; default: a label takes the nearest rank value")
    tolerance: float | None = Field(
        None, ge=0, description="how far outside the ranks a label may lie; default: half a step at the ends"
    )
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
            whole = all(float(value).is_integer() for value in values)
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
        spelled = Ranks(tuple(values)).names or ()
        if names and names != spelled and sorted(names) == sorted(spelled):
            raise ValueError(f"ranks.names are the rank values in another order: {', '.join(names)}; values ascend")
        read = [float(found[0]) for name in names or () if (found := LEADING_NUMBER.match(name))]
        if names and len(read) == len(names) and read != sorted(read):
            logger.warning("ranks.names are numbers that do not ascend, as the values do: %s", ", ".join(names[:10]))
        edges = tuple(self.edges) if self.edges else None
        tolerance = self.tolerance
        if tolerance is None and edges is None and len(values) > 1:  # what is nearer to the next step is none of these
            tolerance = min(values[1] - values[0], values[-1] - values[-2]) / 2
        return Ranks(tuple(values), names, self.unit, edges, tolerance)


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
        description="CSV, Excel, Parquet, JSON lines or list file (`path label [label ...]`) of all rows, to be split",
    )
    train_table: str = Field("", description="table of the training part, instead of `table`")
    validation_table: str = Field("", description="table of the validation part")
    test_table: str = Field("", description="table of the test part")
    separator: str = Field("", max_length=1, description="between cells of a text table; default: found")
    decimal: Literal["", ".", ","] = Field("", description="decimal mark of labels in text; default: found, and said")
    encoding: str = Field("", description="of text tables, e.g. cp1252; default: UTF-8, or what their first bytes say")
    sheet: str = Field("", description="sheet of an Excel file; default: the only one that holds something")
    suffix: str = Field("", description="ending of the picture files where the table names them without, e.g. .png")
    extra_formats: list[str] = Field(
        [], description="formats of pictures, by Pillow's names, that are read beside the usual ones, e.g. JPEG2000"
    )
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
    split_column: str = Field(
        "", description="column that says train / validation / test, or unused, instead of a random split"
    )
    split: tuple[float, float, float] = Field(
        (0.6, 0.15, 0.25), description="shares of train, validation and test in a random split"
    )
    split_seed: Seed | None = Field(None, description="seed of the split; default: the run's seed")
    draw_seed: Seed | None = Field(
        None, description="seed of draws by shots, train_share and label shift; default: that of the split"
    )
    folds: int | None = Field(
        None, ge=2, le=1000, description="cross-validation: one of this many folds is the test part"
    )
    fold: int = Field(0, ge=0, description="which fold is the test part, from 0")
    stratify: Patterns = Field([], description="columns whose every combination is split in the same shares")
    group: str = Field("", description="column (subject, patient) whose equal rows stay in one part")
    calibration: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the validation part that is kept out of the choice of the step, to calibrate the "
        "model's probabilities and intervals; 0: it keeps none",
    )
    shots: Rows | None = Field(None, description="few-shot: this many random training images per rank")
    train_share: float = Field(
        1.0, gt=0, le=1, description="share of the training images of every rank that is kept, at least one"
    )
    license: str = Field("", description="licence of the pictures, for the model card")
    kinds: list[str] = Field(["thermometer"], min_length=1, description="gauges: kinds of instrument")
    style: Literal["varied", "calm"] = Field(
        "varied", description="gauges: calm ones stand alone, upright and in the middle"
    )
    num_train: Rows = Field(64, description="gauges: training images")
    num_validation: Rows = Field(100, description="gauges: validation images")
    num_test: Rows = Field(500, description="gauges: test images")
    shift_ranks: int | None = Field(
        None,
        ge=1,
        le=MAX_RANKS,
        description="label shift: of this many most populated ranks keep only shift_keep of the training rows",
    )
    shift_keep: float = Field(0.1, gt=0, le=1, description="label shift: the share that is kept")
    workers: int = Field(0, ge=0, le=MAX_WORKERS, description="processes that decode images")
    prefetch: int = Field(2, ge=1, le=MAX_WORKERS, description="batches that each worker prepares ahead")
    cache_mb: int = Field(
        512,
        ge=0,
        le=1 << 24,
        description="memory for decoded, resized images, in each worker; used by parts that fit in, 0: by none",
    )
    views: Annotated[int, Field(ge=1, le=MAX_VIEWS)] | None = Field(
        None,
        description="fixed views of every training picture: 1: as it is evaluated, without data.augment; more: "
        "augmented ones, always the same, in turn; default: a new one every time",
    )
    augment: AugmentConfig = AugmentConfig()

    @field_validator("extra_formats")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        if names:
            from ordinalclip.images import read_formats

            read_formats(names)
        return names

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
        given = "split_column" if self.split_column else "train_table" if self.train_table else ""
        if given and (self.folds is not None or self.stratify):
            raise ValueError(f"{given} says the parts: folds and stratify have no effect beside it")
        if self.fold >= (self.folds or 1):
            raise ValueError(f"data.fold={self.fold} of data.folds={self.folds}: folds count from 0")
        if (
            self.source != "hub"
            and self.source != "memory"
            and (self.hub_config or self.hub_split or self.hub_revision)
        ):
            raise ValueError(f"keys of the hub are given, but source is {self.source}; set data.source=hub")
        if min(self.split) < 0 or abs(sum(self.split) - 1) > 1e-6 or self.split[0] == 0:
            raise ValueError(f"split must be three shares that add up to 1, the first above 0, got {self.split}")
        return self


class ModelConfig(Section):
    backbone: str = Field(
        "tiny",
        min_length=1,
        description="image encoder: tiny, efficientnet_lite0, open_clip:NAME[/TAG-or-FILE], open_clip:FOLDER, "
        "hf:NAME-or-FOLDER, timm:NAME[/pretrained-or-FILE], e4e[:FILE]",
    )
    text: str = Field("", description="text tower, as a backbone spec; default: that of the backbone")
    text_pooling: TextPooling | None = Field(
        None, description="of a text encoder's tokens; default: as its files say, else their mean, with a warning"
    )
    image_size: int | None = Field(
        None, ge=16, le=4096, description="input size in pixels; default: the backbone's own"
    )
    load_weights: bool = Field(
        True, description="load the backbone's weights; false: its architecture with random weights"
    )
    features: Literal["computed", "cached"] = Field(
        "computed",
        description="cached: the image encoder stays as it is, and its features are computed once for a picture and "
        "view, kept, and read by all runs (`ordinalclip features`)",
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
        None,
        ge=1,
        le=4096,
        description="train low-rank adapters of this rank in the image encoder, which stays as it is (peft)",
    )
    lora_alpha: int = Field(16, ge=1, le=1 << 16, description="scale of the adapters: alpha / rank")
    lora_targets: Patterns = Field(
        [], description="patterns of the encoder's layers that get adapters; default: all linear ones, or convolutions"
    )

    @model_validator(mode="after")
    def _as_it_is(self) -> ModelConfig:
        if self.features == "cached":
            for key in ("lora_rank", "drop_path"):
                if getattr(self, key):
                    raise ValueError(f"features=cached: the image encoder stays as it is, which {key} changes")
        return self

    @field_validator("mirror")
    @classmethod
    def _once(cls, mirror: list[str]) -> list[str]:
        if len(set(mirror)) < len(mirror):
            raise ValueError("each direction counts once")
        return mirror


class TrainConfig(Section):
    max_steps: int = Field(1000, ge=0, le=MAX_STEPS, description="optimiser steps")
    epochs: float | None = Field(
        None, gt=0, le=10**6, description="instead of max_steps: passes over the training part"
    )
    batch_size: Batch = Field(32, description="global batch, over all processes")
    micro_batch_size: Batch | None = Field(
        None, description="images encoded at once in one process; default: all of its share"
    )
    optimizer: Literal["adamw", "radam"] = Field(
        "adamw", description="adamw or radam, both with decoupled weight decay"
    )
    lr: float = Field(1e-4, gt=0, le=MAX_RATE, description="learning rate")
    lr_encoder: Rate | None = Field(None, description="of the image encoder; default: lr")
    lr_prompts: Rate | None = Field(None, description="of context and rank embeddings; default: lr")
    lr_head: Rate | None = Field(None, description="of all else in the head, projection included; default: lr")
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="learning rate of each encoder layer, as a share of that of the layer after it"
    )
    weight_decay: Rate = Field(5e-4, description="decoupled weight decay, not applied to biases and norms")
    warmup_steps: int = Field(0, ge=0, le=MAX_STEPS, description="linear warm-up")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="after the warm-up: cosine to 0, or constant")
    ema: float | None = Field(
        None, gt=0, lt=1, description="decay of a running average of the weights, e.g. 0.999, that becomes the model"
    )
    clip_grad_norm: float | None = Field(
        None, gt=0, le=10**9, description="largest norm of the gradient; default: no clipping"
    )
    freeze: Patterns = Field([], description="patterns of parameter names that stay as they are, e.g. encoder.*")
    freeze_layers: int | None = Field(
        None, ge=0, le=10**4, description="the image encoder's stem and this many of its layers stay as they are"
    )
    weighting: Literal["none", "inverse", "sqrt_inverse"] = Field(
        "none", description="sample weights: by the frequency of the rank, inverted, or inverted and rooted"
    )
    lds_sigma: float | None = Field(
        None,
        gt=0,
        le=10**4,
        description="label-distribution smoothing: width in ranks of the kernel over rank frequencies",
    )
    sampling: Literal["uniform", "balanced"] = Field(
        "uniform", description="every sample once an epoch, or every rank equally often"
    )
    mixed_precision: Literal["no", "bf16", "fp16"] = Field(
        "no", description="autocast dtype; logits and losses stay float32"
    )
    precision: Literal["float32", "float64"] = Field("float32", description="dtype of the weights")
    eval_every: Steps | None = Field(None, description="steps between validations; default: a tenth of the run")
    patience: Steps | None = Field(None, description="stop after this many validations without a better MAE")
    select: Literal["best", "last"] = Field(
        "best", description="which step becomes model/: best validation MAE, or the last"
    )
    keep_checkpoints: Steps = Field(2, description="newest checkpoints to keep, besides the best one")
    resume: str = Field(
        "none",
        min_length=1,
        description="none: start in an empty folder; auto: go on at the newest checkpoint; or one of them",
    )
    log_every: Steps = Field(10, description="steps between writes to log.jsonl (one entry per step all the same)")
    exact: bool = Field(
        True, description="refuse what depends on processes or micro-batches (some BatchNorm modes); false: warn"
    )
    fused: bool = Field(True, description="AdamW's update in one kernel")
    compile: bool = Field(False, description="torch.compile the image encoder")
    activation_checkpointing: bool = Field(
        False, description="compute the image encoder's activations again in the backward pass: less memory"
    )
    tf32: bool = Field(False, description="TensorFloat-32 in matrix products and convolutions of a GPU")
    process_group_timeout: float = Field(
        600.0, gt=0, le=30 * 86400, description="seconds after which processes give up waiting for one that is lost"
    )
    trackers: list[str] = Field([], description="Accelerate trackers, e.g. tensorboard, wandb")


class EvaluationConfig(Section):
    batch_size: Batch = Field(256, description="images at once in one process")
    decoding: Decoding = Field("median", description="how the saved model turns a distribution into one value")
    cs: list[Annotated[float, Field(ge=0)]] = Field(
        [5.0], description="CS@k: share of errors of at most k, in the label's unit"
    )
    space: bool = Field(
        False, description="D5 and residual variance of the feature space on the test part (seconds for 1,000 images)"
    )
    space_ks: list[Annotated[int, Field(ge=2, le=MAX_BATCH)]] = Field(
        [5, 10, 20, 50], min_length=1, description="residual variance: sizes of the neighbourhood, the best counts"
    )
    intervals: Literal["auto", "rps", "aps", "shortest", "residual", "scaled"] = Field(
        "auto",
        description="scores that a calibrated model's intervals are made of (data.calibration); auto: the kind of the "
        "smallest mean width on the validation part",
    )
    intervals_by_rank: bool = Field(
        False, description="intervals that keep their promise for every rank, which takes more calibration pictures"
    )
    test: bool = Field(True, description="read the test part at the end of training")
    report: bool = Field(True, description="write report.html and the model card at the end of training")
    prompts: bool = Field(
        False, description="keep learned prompts in model/, too, with their nearest words, for OrdinalModel.prompts()"
    )


class RunConfig(Section):
    output_dir: str = Field("runs/default", min_length=1, description="run folder")
    overwrite: bool = Field(
        False, description="replace the run that is in the folder; false: refuse to start anew there"
    )
    seed: int = Field(1, ge=0, le=MAX_SEED, description="of initial weights, order of samples and augmentation")
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
    def _fixed_views(self) -> RunConfig:
        if self.model.features == "cached" and self.data.views is None:
            raise ValueError(
                "model.features=cached needs data.views, the number of fixed views of a training picture; 1: the "
                "picture as it is evaluated"
            )
        return self

    @model_validator(mode="after")
    def _head_options(self) -> RunConfig:
        from ordinalclip.heads import checked_options

        self.head = checked_options(self.method, self.head)
        return self

    def to_yaml(self) -> str:
        """The whole configuration, defaults included; without what is for the command that says it: to overwrite a
        run, or to go on with it."""
        content = {**self.model_dump(mode="json"), "overwrite": False}
        content["train"]["resume"] = "none"
        return dump(content)


class Layer(NamedTuple):
    """What one file, or the command line, says: `name` of it in messages, nested `content`."""

    name: str
    content: dict[str, Any]


class Prepared(NamedTuple):
    """What a prepared folder says (`ordinalclip prepare`).

    Attributes:
        layer: sections `data` and `ranks`.
        recipe: whose pictures these are.
        parts: how they are divided, in a sentence.
        splits: keys of a run by split, for comparisons.
    """

    layer: Layer
    recipe: str
    parts: str
    splits: list[dict[str, Any]]


def read_prepared(path: str | Path) -> Prepared:
    """Read a prepared folder, which means its data.yaml, or another of its YAML files.

    Raises:
        FileNotFoundError: no such folder or file; ValueError: not of a prepared folder.
    """
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such prepared folder (--data); `ordinalclip prepare` writes one")
    if file.is_dir() and not (file / "data.yaml").is_file():
        raise FileNotFoundError(f"{file}: no data.yaml in it; --data takes what `ordinalclip prepare` has written")
    file = file / "data.yaml" if file.is_dir() else file
    content = _read_mapping(file)
    if odd := sorted(content.keys() ^ {"recipe", "parts", "data", "ranks", "splits"}):
        raise ValueError(
            f"{file}: key {odd[0]}; a YAML file of a prepared folder has recipe, parts, data, ranks and splits"
        )
    if not (isinstance(content["recipe"], str) and isinstance(content["parts"], str)):
        raise ValueError(f"{file}: recipe is a name and parts a sentence")
    layer = Layer(str(file), {key: content[key] for key in ("data", "ranks")})
    return Prepared(layer, content["recipe"], content["parts"], content["splits"])


def load_config(
    path: str | Path | None = None, overrides: Sequence[str] = (), prepared: str | Path | None = None
) -> RunConfig:
    """Read a YAML file, apply dotted overrides, check every key and value.

    Args:
        path: a YAML file, which may extend another, or the name of a configuration that comes with the package
            (`read_layers`); None or "default" for the defaults.
        overrides: "key=value" with dotted keys, e.g. "train.lr=1e-3", "data.kinds=[dial, tank]" (`read_overrides`).
        prepared: a prepared folder, laid over the file and below the overrides (`read_prepared`).

    Raises:
        FileNotFoundError: no such file (with the nearest that there is).
        ValueError: an unreadable file, an unknown key (with the nearest valid one), a value of the wrong type or
            outside its range. The message names the file, those it extends, and the key.
    """
    layers = read_layers(path)
    if prepared is not None:
        layers.append(read_prepared(prepared).layer)
    content = stack([*layers, Layer("the command line", read_overrides(overrides))])
    if path is not None and "methods" in content:
        raise ValueError(f"{path} is a comparison: ordinalclip compare {path}")
    return parse_config(content, names_of(layers))


def parse_config(content: dict[str, Any], source: str) -> RunConfig:
    """The configuration of a run that a nested mapping holds; `source` begins the message of what it refuses."""
    return parse_section(content, RunConfig, source)


def read_layers(path: str | Path | None, places: Sequence[str] = shipped.RUNS) -> list[Layer]:
    """A YAML file and those it extends, the lowest first; no layers for None and for "default".

    What is no file is the name of a configuration that comes with the package (`ordinalclip.shipped`).

    `extends: OTHER.yaml`, a path from the folder of the file that says it, or such a name, starts from what OTHER.yaml
    says: keys of the file itself win, mappings are merged key by key, lists are replaced. It may extend a third.

    Args:
        places: folders of `configs/` in which a name is looked for.

    Raises:
        FileNotFoundError: no such file; ValueError: not YAML, not a mapping, or files that extend each other.
    """
    layers: list[Layer] = []
    defaults = path is None or (path == "default" and not Path(path).is_file())
    file = None if defaults else _file(str(path), places)
    while file is not None:
        content = _read_mapping(file)
        layers.insert(0, Layer(str(file), content))
        file = _extended(file, content.pop("extends"), places) if "extends" in content else None
        if file is not None and any(file.samefile(layer.name) for layer in layers):
            chain = " extends ".join([*(layer.name for layer in reversed(layers)), str(file)])
            raise ValueError(f"configurations extend each other in a circle: {chain}")
    return layers


def names_of(layers: Sequence[Layer]) -> str:
    """How messages name a configuration: its file and those it extends, since a wrong key may stand in any of them."""
    return ", which extends ".join(layer.name for layer in reversed(layers)) or "configuration"


def _extended(file: Path, value: Any, places: Sequence[str]) -> Path:
    if not isinstance(value, str) or (isinstance(value, Written) and value.value is None):
        raise ValueError(f"{file}: extends is the path of one file from the folder of this one, got {value or None!r}")
    other = file.parent / value
    if not other.is_file():
        if (named := shipped.find(value, places)) is not None:
            _check_meant(other, named)
            return named
        raise FileNotFoundError(f"{file} extends {other}: no such configuration file{_beside(other)}")
    return other


def _check_meant(file: Path, named: Path) -> None:
    """Raises:
    ValueError: a file of one's own, but for its ending, is called like the configuration of the package."""
    if (own := file.with_name(f"{file.name}{shipped.ENDING}")).is_file():
        raise ValueError(f"{file}: there is {own}, and {_name(named)} of the package; write {own} or {_name(named)}")


def _file(given: str, places: Sequence[str]) -> Path:
    """The file that is there, or else that of a name.

    Raises:
        FileNotFoundError: neither.
    """
    file = Path(given)
    if file.is_file() or (named := shipped.find(given, places)) is None:
        named = file
    else:
        _check_meant(file, named)
    if named.exists():
        return named
    if file.suffix in (".yaml", ".yml"):
        of_its_name = shipped.find(file.stem, places)
        instead = f"; one comes with the package by the name {_name(of_its_name)}" if of_its_name else ""
        raise FileNotFoundError(f"{file}: no such configuration file{_beside(file)}{instead}")
    raise FileNotFoundError(
        f"{given}: no such configuration file, and none of this name comes with the package; "
        f"{near_matches(file.name, dict.fromkeys(shipped.short_names(*places)))} (ordinalclip configs lists them)"
    )


def _name(file: Path) -> str:
    return file.relative_to(shipped.folder()).with_suffix("").as_posix()


def _read_mapping(file: Path) -> dict[str, Any]:
    if file.is_dir():
        raise IsADirectoryError(f"{file}: a folder, where the YAML file of a configuration is wanted{_beside(file)}")
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such configuration file{_beside(file)}")
    if not file.is_file():
        raise ValueError(f"{file}: not a regular file")
    try:
        with file.open("rb") as opened:
            content = read(opened.read(MAX_BYTES + 1))
    except ValueError as error:
        raise ValueError(f"{file}: not valid YAML: {error}") from None
    if content is None or (isinstance(content, Written) and content.value is None):
        raise ValueError(f"{file}: holds nothing; a configuration has keys, `ordinalclip init` writes one")
    if not isinstance(content, dict):
        kind = "a list" if isinstance(content, list) else "one value"
        raise ValueError(f"{file}: a configuration is a mapping of keys to values, got {kind}")
    return content


def _beside(file: Path) -> str:
    """Where a file is not: what else there is, in words."""
    folder = file if file.is_dir() else file.parent
    if not folder.is_dir():
        return f"; there is no folder {folder}"
    found = sorted(other.name for other in folder.iterdir() if other.suffix in (".yaml", ".yml"))
    return f"; {near_matches(file.name, found)} in {folder}" if found else ""


def stack(layers: Sequence[Layer], ways: Sequence[set[str]] = ()) -> dict[str, Any]:
    """Nested mappings as one: see `merge`. Where a layer changes the method, options of the head that layers below it
    give, and that the new method lacks, are left out, with a warning for each."""
    merged: dict[str, Any] = {}
    for number, layer in enumerate(layers):
        if "method" in layer.content and isinstance(merged.get("head"), dict):
            merged["head"] = _options_left(layer.content["method"], merged, layers[:number])
        merged = merge(merged, layer.content, ways)
    return merged


def _options_left(method: Any, merged: dict[str, Any], below: Sequence[Layer]) -> dict[str, Any]:
    from ordinalclip.heads import head_options

    given = merged["head"]
    if not isinstance(method, str) or method == merged.get("method", RunConfig.model_fields["method"].default):
        return given
    try:
        known = head_options(method)
    except ValueError:  # which the configuration says in its turn
        return given
    for key in sorted(given.keys() - known.keys()):
        name = next(layer.name for layer in reversed(below) if key in (layer.content.get("head") or {}))
        logger.warning("head.%s of %s is not an option of method %s: left out", key, name, method)
    return {key: value for key, value in given.items() if key in known}


def merge(below: dict[str, Any], above: dict[str, Any], ways: Sequence[set[str]] = ()) -> dict[str, Any]:
    """Nested mappings as one: `above` wins, mappings on both sides are merged, everything else is replaced.

    What `above` says in one of several `WAYS` replaces what `below` says in another. An empty section says nothing.
    """
    used = [way for way in ways if any(_says(above.get(key)) for key in way)]
    other = {key for way in ways if used and way not in used for key in way}
    merged = {key: value for key, value in below.items() if key not in other}
    for key, value in above.items():
        mine = merged.get(key)
        if isinstance(mine, dict) and isinstance(value, dict):
            value = merge(mine, value, WAYS.get(key, ()))
        elif isinstance(mine, dict) and not _says(value):
            value = mine
        merged[key] = value
    return merged


def _says(value: Any) -> bool:
    return not (value is None or value == "" or (isinstance(value, Written) and value.value is None))


def read_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Dotted "key=value" as nested mappings; of a key that is given twice the last.

    A value that starts as a list, a mapping or a quotation is YAML; every other is one scalar, as it stands.

    Raises:
        ValueError: no key=value, a key below another that has a value, or two of the `WAYS` to say the same.
    """
    pairs: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = (part.strip() for part in override.partition("="))
        if not (equals and key):
            raise ValueError(f"override {brief(override)!r}: write key=value, e.g. train.lr=1e-3")
        pairs[key] = override_value(text)
    content = nested(pairs)
    for section, ways in WAYS.items():
        given = content.get(section)
        said = [key for way in ways for key in sorted(way) if isinstance(given, dict) and _says(given.get(key))]
        if len([way for way in ways if way.intersection(said)]) > 1:
            raise ValueError(f"{section} is given in ways that exclude each other: {', '.join(said)}")
    return content


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys as nested mappings; the opposite of `flat_keys`.

    Raises:
        ValueError: a key with an empty part, or below another that has a value.
    """
    content: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = (part.strip() for part in key.split("."))
        if not all([*parents, last]):
            raise ValueError(f"{brief(key)!r} is no key: write names with single dots between them, e.g. train.lr")
        place = content
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ValueError(f"{brief(key)} lies below a key that is given a value, too")
        if isinstance(place.get(last), dict):
            value = merge(place[last], value) if isinstance(value, dict) else value
        place[last] = value
    return content


def override_value(text: str) -> Any:
    if text[:1] not in ("[", "{", '"', "'"):
        return scalar(text)
    try:
        return read(text)
    except ValueError:  # a text that only begins like one, which is text where text is wanted
        return text


def say_repeated(overrides: Sequence[str]) -> None:
    """Warn of keys with two values on a command line, of which the last counts: scripts add to what they were given."""
    given: dict[str, str] = {}
    for override in overrides:
        key, _, value = (part.strip() for part in override.partition("="))
        if given.get(key, value) != value:
            logger.warning("%s is given twice, as %s and as %s: the last counts", key, given[key], value)
        given[key] = value


def flat_keys(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat.update(flat_keys(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat
