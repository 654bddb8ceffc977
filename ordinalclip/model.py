"""OrdinalModel: image encoder and head as one Hugging Face model that saves, loads and serves."""

from __future__ import annotations

import inspect
import json
import logging
import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, cast, get_args

import torch
from huggingface_hub import HfApi, ModelCard, snapshot_download
from huggingface_hub.dataclasses import strict
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import ModelOutput, cached_file

from ordinalclip.backbones import Backbone, load_backbone
from ordinalclip.backbones.layers import LayerFeatures, TokenFeatures
from ordinalclip.calibration import Calibration
from ordinalclip.drift import Reference
from ordinalclip.files import read_json_object
from ordinalclip.heads import (
    Decoding,
    Head,
    HeadContext,
    Prediction,
    Reads,
    Targets,
    available_heads,
    build_head,
    check_numbers,
    foreign_class,
    head_class,
    names_from_a_file,
)
from ordinalclip.images import PixelSpec
from ordinalclip.language import PromptHead
from ordinalclip.learned import SAVED, LearnedPrompts
from ordinalclip.processing import HUB_OPTIONS, OrdinalImageProcessor, find_file
from ordinalclip.processing import NAME as PROCESSOR
from ordinalclip.progress import without_bars
from ordinalclip.ranks import Ranks
from ordinalclip.tokenization import TextPooling, save_tokenizer
from ordinalclip.weights import (
    FLOATS,
    LARGEST_LOGIT_SCALE,
    add_metadata,
    fault,
    first_line,
    limited_memory,
    misfit,
    read_safetensors,
)

logger = logging.getLogger(__name__)
Form = Literal["deployed", "trainable"]
Reader = LayerFeatures | TokenFeatures


@strict
class OrdinalConfig(PreTrainedConfig):
    """What rebuilds an `OrdinalModel` without weights, hub or training data.

    Attributes:
        backbone, backbone_architecture: spec of the image encoder and what rebuilds its architecture.
        text, text_architecture: likewise of the text tower; empty in the deployed form, which has none.
        method, head: the head and its options.
        head_class: "module:Class" behind a method that another package brings; empty for the methods of this one.
        ranks: `Ranks.to_dict()`.
        pixels: `PixelSpec` of the image encoder as a dict.
        input_dim: width of the image features; shared_space: whether they live in the text tower's space.
        logit_scale, label_mean, label_std, decoding: see `HeadContext`.
        dropout, mirror: see `Encoder`.
        layer_dims: widths of the layers for heads that read layers, else None.
        num_tokens: number of the tokens for heads that read tokens, else None.
        calibration: `Calibration.to_dict()`; None for a model that keeps none.
    """

    model_type = "ordinalclip"

    backbone: str = "tiny"
    backbone_architecture: dict | None = None
    text: str = ""
    text_architecture: dict | None = None
    method: str = "prototypes"
    head: dict | None = None
    head_class: str = ""
    ranks: dict | None = None
    pixels: dict | None = None
    input_dim: int = 0
    shared_space: bool = True
    logit_scale: float = 0.0
    label_mean: float = 0.0
    label_std: float = 1.0
    decoding: str = "median"
    dropout: float = 0.0
    mirror: list | None = None
    layer_dims: list | None = None
    num_tokens: int | None = None
    calibration: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        foreign = sorted(key for key in kwargs if key not in KNOWN_KEYS and not key.startswith("_"))
        if foreign:
            raise ValueError(f"OrdinalConfig has no field {', '.join(foreign)}")
        self._check_values()
        if self.ranks is not None:
            names = self.label_space.names or ()
            if self.id2label and {int(rank): name for rank, name in self.id2label.items()} != dict(enumerate(names)):
                raise ValueError("id2label contradicts ranks: it must give every rank its name, or be left out")
            if self.label2id and self.label2id != {name: rank for rank, name in enumerate(names)}:
                raise ValueError("label2id contradicts ranks: it must give every name its rank, or be left out")
            kwargs["id2label"] = dict(enumerate(names))
            kwargs["label2id"] = {name: rank for rank, name in enumerate(names)}
        super().__post_init__(**kwargs)

    def _check_values(self) -> None:
        """Raises:
        ValueError: a value of another type than the field's, or one that means nothing."""
        for name, hint in own_fields().items():
            try:
                TypeAdapter(hint).validate_python(getattr(self, name), strict=True)
            except ValidationError as error:
                raise ValueError(f"{name}: {error.errors()[0]['msg']}, got {getattr(self, name)!r}") from error
        if self.architectures not in (None, ["OrdinalModel"]):
            raise ValueError(f"architectures must be ['OrdinalModel'], got {self.architectures!r}")
        if self.dtype is not None and str(self.dtype).removeprefix("torch.") not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is unknown; choices: {', '.join(DTYPES)}")
        if any(labels is not None and not isinstance(labels, dict) for labels in (self.id2label, self.label2id)):
            raise ValueError("id2label and label2id must be objects, or be left out")
        for name in ("logit_scale", "label_mean", "label_std", "dropout"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be a finite number, got {getattr(self, name)!r}")
        if abs(self.logit_scale) > LARGEST_LOGIT_SCALE:
            allowed = f"-{LARGEST_LOGIT_SCALE:g} to {LARGEST_LOGIT_SCALE:g}"
            raise ValueError(
                f"logit_scale, the log of a temperature's inverse, must be {allowed}, got {self.logit_scale:g}"
            )
        if self.mirror and (len(set(self.mirror)) < len(self.mirror) or set(self.mirror) - {"horizontal", "vertical"}):
            raise ValueError(f"mirror holds horizontal and vertical, each at most once, got {self.mirror[:4]!r}")
        if self.label_std <= 0:
            raise ValueError(f"label_std must be above 0, got {self.label_std:g}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout:g}")
        if self.decoding not in get_args(Decoding):
            raise ValueError(f"decoding {self.decoding!r} is unknown; choices: {', '.join(get_args(Decoding))}")
        _ = Calibration.of(self.label_space, self.calibration), self.pixels is None or self.pixel_spec

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A configuration from the content of config.json.

        Raises:
            ValueError: another kind of model, unknown fields, values that mean nothing.
        """
        if (kind := config_dict.get("model_type")) != cls.model_type:
            raise ValueError(f"model_type is {kind!r}; models of this package are {cls.model_type!r}")
        if "attn_implementation" in config_dict:
            raise ValueError("OrdinalConfig has no field attn_implementation: it is said by who loads a model")
        _check_attention(kwargs.get("attn_implementation"), config_dict)
        return super().from_dict(config_dict, **kwargs)

    @property
    def label_space(self) -> Ranks:
        """The ranks as an object."""
        given = self.ranks or {"values": (0, 1)}
        for key, kind in (("values", int | float), ("edges", int | float), ("names", str)):
            listed = given.get(key) or ()
            if not isinstance(listed, list | tuple):
                raise ValueError(f"ranks.{key} must be a list, got {_short(listed)}")
            if not all(isinstance(each, kind) and not isinstance(each, bool) for each in listed):
                raise ValueError(f"ranks.{key} holds something else than {'text' if kind is str else 'numbers'}")
        if not isinstance(given.get("unit", ""), str):
            raise ValueError(f"ranks.unit must be text, got {_short(given['unit'])}")
        try:
            return Ranks(**given)
        except TypeError as error:
            raise ValueError(f"ranks: {error}") from error

    @property
    def pixel_spec(self) -> PixelSpec:
        """The pixel statistics as an object."""
        if self.pixels is None:
            raise ValueError("OrdinalConfig.pixels is not set; build models with OrdinalModel.build")
        return PixelSpec.from_dict(self.pixels)


DTYPES = tuple(str(dtype).removeprefix("torch.") for dtype in FLOATS)
# Beside the fields, in any model's config, or said by who loads it; use_cache is set by transformers' Trainer.
KNOWN_KEYS = ("model_type", "torch_dtype", "num_labels", "name_or_path", "attn_implementation", "use_cache")


def own_fields() -> dict[str, Any]:
    """The fields of `OrdinalConfig` that are not every model's, with their types."""
    return inspect.get_annotations(OrdinalConfig, eval_str=True)


@dataclass
class OrdinalOutput(ModelOutput):
    """`value` (B,) in label units, `rank` (B,), `probabilities` and `logits` (B, R) where the head has them, and
    the scalar `loss` when labels were given."""

    loss: Tensor | None = None
    value: Tensor | None = None
    rank: Tensor | None = None
    probabilities: Tensor | None = None
    logits: Tensor | None = None


class OrdinalModel(PreTrainedModel):
    """Image encoder + head. Train with `ordinalclip.training.train`; serve with the pipeline.

    `save_pretrained` writes the deployed form, image encoder and R prototypes, without text tower; with
    `form="trainable"` everything. Both come back through `from_pretrained` (safetensors only).

    Attributes:
        calibration: of its probabilities, and its intervals, see `OrdinalModel.interval`; None: it keeps none.
        reference: what it remembers of its training data, to tell other data from it; None: nothing.
        card: the content of README.md, the model card that lay beside the weights; it is written again where the model
            is saved or pushed. None: there was none, or set so because it no longer tells the truth.
        kept_prompts: likewise of prompts.safetensors, for `prompts`.
    """

    config_class = OrdinalConfig
    main_input_name = "pixel_values"
    base_model_prefix = ""
    _supports_sdpa = True

    def __init__(
        self,
        config: OrdinalConfig,
        encoder: Encoder | None = None,
        head: Head | None = None,
        tokenizer: Any = None,
    ):
        super().__init__(config)
        if encoder is None or head is None:
            encoder, head, tokenizer = _rebuild(config)
        self.encoder, self.head, self.tokenizer = encoder, head, tokenizer
        self.calibration = Calibration.of(config.label_space, config.calibration)
        self.reference: Reference | None = None
        self.card: bytes | None = None
        self.kept_prompts: LearnedPrompts | None = None
        self.all_tied_weights_keys: dict[str, str] = {}

    @classmethod
    def build(
        cls,
        backbone: str,
        ranks: Ranks,
        method: str = "ordinalclip",
        head: dict[str, Any] | None = None,
        text: str = "",
        load_weights: bool = True,
        label_mean: float = 0.0,
        label_std: float = 1.0,
        decoding: Decoding = "median",
        dropout: float = 0.0,
        image_size: int | None = None,
        mirror: Sequence[str] = (),
        text_pooling: TextPooling | None = None,
    ) -> OrdinalModel:
        """A trainable model from specs, with the backbones' pretrained weights.

        Args:
            backbone: spec of the image encoder, see `ordinalclip.backbones`.
            text: spec of the text tower; default: the backbone's own.
            image_size: another input size than the backbone's own.
            dropout, mirror: see `Encoder`.
            text_pooling: of a text encoder whose files do not say it.

        Raises:
            ValueError: unknown specs, methods or options, a `text_pooling` that contradicts what is known.
        """
        another = text not in ("", backbone)
        pooling = None if another else text_pooling
        image = load_backbone(backbone, load_weights, image_size=image_size, text_pooling=pooling)
        if not image.output_dim:
            raise ValueError(f"model.backbone {backbone!r} is a text encoder; it goes into model.text")
        other = load_backbone(text, load_weights, text_pooling=text_pooling) if another else None
        if other is not None and other.text is None:
            raise ValueError(
                f"model.text {text!r} has no text tower; use tiny, minilm, or an open_clip or hf spec with one"
            )
        tower = other or (image if image.text else None)
        reader = _reader(image, head_class(method))
        config = OrdinalConfig(
            backbone=backbone,
            backbone_architecture=image.architecture,
            text=tower.spec if tower else "",
            text_architecture=tower.architecture if tower else None,
            method=method,
            head=dict(head or {}),
            head_class=foreign_class(method),
            ranks=ranks.to_dict(),
            pixels=asdict(image.pixels),
            shared_space=other is None and image.text is not None,
            logit_scale=(tower or image).logit_scale,
            label_mean=label_mean,
            label_std=label_std,
            decoding=decoding,
            dropout=dropout,
            mirror=list(mirror),
            **_shape(image, reader),
        )
        tokenizer = tower.text.tokenizer if tower and tower.text else None
        head_module = _head(config, tower, image.generator if config.layer_dims else None)
        return cls(config, Encoder(image.encoder, dropout, mirror, reader), head_module, tokenizer)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> OrdinalOutput:
        """Predict.

        Args:
            pixel_values: (B, 3, size, size) from the image processor.
            labels: (B,) label values in the label's unit; then `loss` is the head's loss on this batch.

        In training mode, where gradients are asked for, the model drops a calibration: it was of other weights.

        Raises:
            NoNumber: answers that are not finite.
        """
        if self.calibration is not None and self.training and torch.is_grad_enabled():
            logger.warning("the model is trained further: its calibration no longer holds, and is dropped")
            self.calibration = self.config.calibration = None
        outputs = self.head(self.encoder(pixel_values))
        prediction = self.answer(outputs)
        loss = None
        if labels is not None:
            ranks = self.head.ranks.rank_of(labels).to(pixel_values.device)
            loss = self.head.loss(outputs, Targets(labels.to(pixel_values.device).float(), ranks))["loss"]
        return OrdinalOutput(loss, *prediction, logits=outputs.get("logits"))

    def predict(self, pixel_values: Tensor) -> Prediction:
        """`forward` without gradient, as a `Prediction`."""
        with torch.no_grad():
            return self.answer(self.head(self.encoder(pixel_values)))

    def answer(self, outputs: Any) -> Prediction:
        """What the head's outputs mean, with calibrated probabilities.

        Raises:
            NoNumber: answers that are not finite.
        """
        prediction = self.head.predict(outputs)
        if self.calibration is not None:
            prediction = self.calibration.answer(prediction, self.head.decoding)
        check_numbers(prediction.value)
        return prediction

    def interval(self, prediction: Prediction, level: float) -> tuple[Tensor, Tensor]:
        """Where the truth lies, as often as `level` says, of pictures that are drawn like those of the calibration.

        >>> low, high = model.interval(model.predict(pixel_values), 0.9)  # doctest: +SKIP

        Args:
            prediction: of `predict`.
            level: 0.50, 0.51 ... 0.99.

        Returns:
            lower and upper ends (B,) in the label's unit, both included; see `Calibration.interval`.

        Raises:
            ValueError: the model keeps no calibration, another level, or one that takes more calibration pictures.
        """
        return self.check_interval(level).interval(prediction, level)

    def check_interval(self, level: float) -> Calibration:
        """The calibration that has an interval of this level.

        Raises:
            ValueError: see `interval`.
        """
        if self.calibration is None:
            raise ValueError(
                f"interval={level!r}: this model keeps no intervals; train it with data.calibration=0.5, or calibrate "
                "it on labelled pictures that it has not seen: `ordinalclip calibrate`"
            )
        self.calibration.check_level(level)
        return self.calibration

    def deploy(self) -> OrdinalModel:
        """The form that is served: this model's own encoder, not a copy, with a head that needs no text tower."""
        config, head = deepcopy(self.config), self.head
        config.text, config.text_architecture = "", None
        if (deployed := head.deploy()) is not None:
            config.method, config.head, head = deployed
            config.head_class = foreign_class(config.method)
            if head.reads != self.head.reads:
                raise TypeError(
                    f"{type(self.head).__name__}.deploy: {config.method} takes other features: {head.reads}"
                )
        return self._with(config, head, self.calibration).eval()

    def calibrated(self, calibration: Calibration) -> OrdinalModel:
        """This model with another calibration; encoder and head are shared."""
        config = deepcopy(self.config)
        config.calibration = calibration.to_dict()
        model = self._with(config, self.head, calibration.to(self.device))
        model.tokenizer, model.name_or_path = self.tokenizer, self.name_or_path
        return model.train(self.training)

    def _with(self, config: OrdinalConfig, head: Head, calibration: Calibration | None) -> OrdinalModel:
        """Another model of this encoder, with what this one keeps."""
        model = OrdinalModel(config, self.encoder, head)
        model.calibration = calibration
        model.reference, model.card, model.kept_prompts = self.reference, self.card, self.kept_prompts
        return model

    def prompts(self, num: int = 5) -> LearnedPrompts:
        """The learned prompts: context, rank embeddings, and the words nearest to their tokens.

        Of a trainable model they are those of its head, of a deployed one those that its folder keeps.

        Args:
            num: how many words; a folder keeps as many as it was written with.

        Raises:
            ValueError: the method learns no prompts, or the folder keeps none.
        """
        if isinstance(self.head, PromptHead) and self.head.learned_prompts():
            return LearnedPrompts.of(self.head, num)
        if self.kept_prompts is not None:
            return self.kept_prompts
        raise ValueError(
            f"no learned prompts: method {self.config.method!r} has none, and no {SAVED} lay beside the model; "
            "evaluation.prompts=true writes it at the end of a training of ordinalclip or coop, "
            "save_pretrained(FOLDER, prompts=True) of a trainable model"
        )

    @classmethod
    def from_prompts(
        cls, backbone: str, ranks: Ranks | int, templates: str | Sequence[str], decoding: Decoding = "median"
    ) -> OrdinalModel:
        """Zero-shot CLIP: written sentences with the names of the ranks; nothing is trained.

        >>> model = OrdinalModel.from_prompts("tiny", Ranks.linear(0, 100, 5), "a gauge at {name} percent")

        Args:
            backbone: spec of a CLIP, see `ordinalclip.backbones`.
            ranks: the label space, or the number of ranks.
            templates: sentences with {name} and, if wanted, {unit}; of several the text features are averaged.
            decoding: how a distribution over the ranks becomes a value.

        Raises:
            ValueError: no sentence, one without {name} or with other braces, a backbone that is no CLIP.
        """
        listed = [templates] if isinstance(templates, str) else list(templates)
        if not listed or not all(isinstance(each, str) for each in listed):
            raise ValueError(f"templates must be a sentence with {{name}}, or a list of such, got {templates!r}")
        head = {"templates": listed}
        return cls.build(backbone, Ranks.of(ranks), "zero_shot", head, decoding=decoding).deploy()

    @property
    def image_processor(self) -> OrdinalImageProcessor:
        """The image processor that belongs to the encoder."""
        return OrdinalImageProcessor.from_spec(self.config.pixel_spec)

    def save_pretrained(
        self, save_directory: str | Path, form: Form = "deployed", prompts: bool = False, **kwargs: Any
    ) -> None:
        """Write config.json, model.safetensors, preprocessor_config.json and, where there are, the model card and
        reference.safetensors.

        The trainable form of a model whose text tower has a tokenizer of its own (SigLIP, Hugging Face CLIP) gets
        that tokenizer's files too, in the folder tokenizer/, and needs no hub to be restored.

        The configuration is noted in model.safetensors, too: a config.json that says otherwise is then refused.

        Args:
            form: "deployed" (image encoder and what the head needs to answer) or "trainable" (all of it).
            prompts: write prompts.safetensors, too, so that `prompts` gives the learned ones of the deployed form.

        Raises:
            ValueError: an unknown form, weights that are not finite, no prompts to be written; NotADirectoryError: a
                file is in the place; nothing is written.
        """
        if kwargs.get("push_to_hub"):
            raise ValueError("push_to_hub=True: save_pretrained writes a folder; model.push_to_hub(NAME) pushes it")
        if Path(save_directory).is_file():
            raise NotADirectoryError(f"{save_directory} is a file; a model is saved as a folder")
        if form not in ("deployed", "trainable"):
            raise ValueError(f"form {form!r} is unknown; choices: deployed, trainable")
        learned = self.prompts() if prompts else self.kept_prompts
        model = self.deploy() if form == "deployed" else self
        if why := fault(model.state_dict()):
            raise ValueError(f"a model that is not to be saved: {why}")
        options = {"save_original_format": False, **kwargs}  # else transformers renames the weights of its own towers
        with without_bars():
            super(OrdinalModel, model).save_pretrained(save_directory, **options)
        if (weights := Path(save_directory) / WEIGHTS).is_file():  # else in pieces, as max_shard_size asks for
            add_metadata(weights, {SIGNATURE: json.dumps(_signature(model.config))})
        self.image_processor.save_pretrained(save_directory)
        if self.reference is not None:
            self.reference.save(Path(save_directory) / REFERENCE)
        if form == "trainable" and self.tokenizer is not None:
            save_tokenizer(self.tokenizer, Path(save_directory) / TOKENIZER_FOLDER)
        if self.card is not None:
            (Path(save_directory) / CARD).write_bytes(self.card)
        if learned is not None:
            learned.save(Path(save_directory) / SAVED)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        form: Form = "deployed",
        tags: Sequence[str] = (),
        commit_message: str = "Upload model",
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> Any:
        """Upload what `save_pretrained` writes. A model without a card leaves the one that is there.

        Transformers' own would put a card of its template in the place of the model's.

        Args:
            repo_id: OWNER/NAME; made if need be.
            form: see `save_pretrained`.
            tags: to be added to those of the card.
            commit_message, commit_description, private, token, revision, create_pr: see `huggingface_hub.HfApi`.

        Returns:
            huggingface_hub's `CommitInfo`.

        Raises:
            ValueError: see `save_pretrained`; tags for a model without a card.
        """
        if isinstance(tags, str):
            raise ValueError(f"tags must be a list, got {tags!r}")
        if tags and self.card is None:
            raise ValueError(f"tags {', '.join(tags)}: this model has no card that they could stand in")
        api = HfApi(token=token)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, form)
            if tags:
                card = ModelCard.load(Path(folder) / CARD)
                card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *tags]))
                card.save(Path(folder) / CARD)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None and not revision.startswith("refs/pr"):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any) -> OrdinalModel:
        """Load a saved model, from a folder or the hub. A folder is loaded without any network.

        Builds the architecture for real and loads the weights strictly: transformers' own loading builds on the
        meta device, where buffers that are not saved (attention masks) would come back as garbage.

        Nothing in the folder is run, and no module is imported because it says so: the head is one of this package, one
        that an installed package registers, or one whose module the program has imported itself
        (`heads.names_from_a_file`).

        Args:
            cache_dir, force_download, local_files_only, token, revision, subfolder: of the hub.
            dtype: of the weights, e.g. "bfloat16"; default and "auto": as they were saved.
            device_map: "auto" (the accelerator, if there is one), a device or {"": device}; a model is not divided.
            attn_implementation: "eager" or "sdpa", for encoders of transformers (`hf:`), which have the choice.

        Raises:
            OSError: no such folder or files; ValueError: damaged files, parts that contradict each other, weights that
                are not finite or do not fit the configuration, a head of another package that is not known, an option
                with another value; TypeError: another option.
        """
        hub = {key: kwargs.pop(key) for key in HUB_OPTIONS if key in kwargs}
        config = kwargs.pop("config", None)
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
        device = _one_device(kwargs.pop("device_map", None))
        attention = kwargs.pop("attn_implementation", None) or getattr(config, "_attn_implementation", None)
        for ignored in (
            "trust_remote_code",
            "_from_pipeline",
            "_from_auto",
            "adapter_kwargs",
            "use_safetensors",
            "_commit_hash",
        ):
            kwargs.pop(ignored, None)
        if args or kwargs:
            raise TypeError(f"OrdinalModel.from_pretrained takes no option {', '.join(kwargs) or args}")
        name = str(pretrained_model_name_or_path)
        said = find_file(name, "config.json", hub)
        content = _infinities(read_json_object(said))
        try:
            config = config or OrdinalConfig.from_dict(content)
        except ValueError as error:
            raise ValueError(f"{said}: {first_line(error)}") from error
        file = find_file(name, WEIGHTS, hub)
        tensors, metadata = read_safetensors(file)
        _check_attention(attention, config.to_dict())
        _check_signature(said, config, metadata)
        _check_ranks(file, config, tensors)
        limit = MEMORY_FACTOR * file.stat().st_size + (1 << 30)
        try:
            with names_from_a_file(), limited_memory(limit, "the model that it describes"):
                model = cls(config, *_rebuild(config, _tokenizer_folder(name, config, hub)))
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, AssertionError, IndexError) as error:
            raise ValueError(f"{said}: no model can be built from it: {first_line(error)}") from error
        if why := fault(tensors) or misfit(model.state_dict(), tensors):
            raise ValueError(f"{file}: {why}")
        try:
            model.load_state_dict(tensors, strict=True)
        except RuntimeError as error:  # torch lists every tensor that does not fit
            raise ValueError(f"{file}: does not fit {said}: {' '.join(str(error).split())}") from error
        if dtype not in (None, "auto"):
            if str(dtype).removeprefix("torch.") not in DTYPES:
                raise ValueError(f"dtype {dtype!r} is unknown; choices: {', '.join(DTYPES)}")
            model.to(getattr(torch, str(dtype).removeprefix("torch.")))
        if device is not None:
            model.to(device)
        for tower in model.modules():
            if attention is not None and isinstance(tower, PreTrainedModel) and tower is not model:
                tower.set_attn_implementation(attention)
        model.name_or_path, model.card, kept = name, _read_card(name, hub), _beside(name, SAVED, hub)
        model.kept_prompts = None if kept is None else LearnedPrompts.load(kept)
        if (known := _beside(name, REFERENCE, hub)) is not None:  # of models that were trained by this package
            model.reference = Reference.load(known, len(config.label_space))
        return model.eval()


ATTENTION = ("eager", "sdpa")
CARD = "README.md"
LARGEST_CARD = 1 << 22  # bytes
TOKENIZER_FOLDER = "tokenizer"
WEIGHTS = "model.safetensors"
REFERENCE = "reference.safetensors"
FILES = ("config.json", WEIGHTS, PROCESSOR, CARD, REFERENCE, SAVED, TOKENIZER_FOLDER)  # of a model's folder
SIGNATURE = "ordinalclip"  # key of the metadata that the configuration is noted under
MEMORY_FACTOR = 8  # of the weights' size: a text tower comes with an image tower that is not kept


def _one_device(given: Any) -> torch.device | None:
    """The device that `device_map` means.

    Raises:
        ValueError: it divides the model, or names no device.
    """
    if isinstance(given, dict) and given.keys() == {""}:
        given = given[""]
    if given is None:
        return None
    if given == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.device(given)
    except (RuntimeError, TypeError) as error:
        allowed = "'auto', a device such as 'cpu' or 'cuda:0', or {'': DEVICE}"
        raise ValueError(f"device_map must be {allowed}: the model goes to one device; got {given!r}") from error


def _check_attention(given: Any, config: Mapping[str, Any]) -> None:
    """Of `attn_implementation`: whether a model has the choice.

    Raises:
        ValueError: another choice, such as code of the hub; no tower of the model is one of transformers.
    """
    if given is None:
        return
    if given not in ATTENTION:
        raise ValueError(f"attn_implementation {given!r} is unknown; choices: {', '.join(ATTENTION)}")
    towers = [str(config[key]) for key in ("backbone", "text") if config.get(key)]
    if not any(tower.startswith(("hf:", "minilm")) for tower in towers):
        raise ValueError(
            f"attn_implementation={given!r}: this model ({' and '.join(towers)}) has no choice of attention; hf: has"
        )


def _beside(name: str, file: str, hub: dict[str, Any]) -> Path | None:
    """A file of a model that need not be there."""
    found = cached_file(
        name, file, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False, **hub
    )
    return None if found is None else Path(found)


def _read_card(name: str, hub: dict[str, Any]) -> bytes | None:
    """README.md beside a model, if there is one."""
    file = _beside(name, CARD, hub)
    if file is not None and (size := file.stat().st_size) > LARGEST_CARD:
        logger.warning("%s: a model card of %d MB is left out", file, size >> 20)
        return None
    return None if file is None else file.read_bytes()


def _infinities(content: Any) -> Any:
    """JSON data with numbers in place of {"__float__": "Infinity"}, as which transformers writes what JSON lacks: an
    option may be infinite, such as sigma of RM-Loss."""
    if isinstance(content, list):
        return [_infinities(value) for value in content]
    if not isinstance(content, dict):
        return content
    if content in ({"__float__": "Infinity"}, {"__float__": "-Infinity"}):
        return float(content["__float__"])
    return {key: _infinities(value) for key, value in content.items()}


def _signature(config: OrdinalConfig) -> dict[str, Any]:
    """What of a configuration belongs to the weights, as JSON data."""
    fields = {name: value for name, value in config.to_dict().items() if name in own_fields()}
    return json.loads(json.dumps(fields))


def _check_signature(file: Path, config: OrdinalConfig, metadata: dict[str, str]) -> None:
    """Raises:
    ValueError: the configuration is not the one that the weights were saved with."""
    if SIGNATURE not in metadata:  # written before there was one
        return
    try:
        saved = dict(json.loads(metadata[SIGNATURE]))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file.parent / WEIGHTS}: its metadata are damaged") from error
    for name, value in _signature(config).items():
        if name in saved and json.dumps(saved[name], sort_keys=True) != json.dumps(value, sort_keys=True):
            where = _difference(name, saved[name], value)
            raise ValueError(
                f"{file}: {where} when the weights were saved; to change a model load it in Python and save it again"
            )


def _difference(name: str, saved: Any, now: Any) -> str:
    """Where two JSON values differ first, in words."""
    if isinstance(saved, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*saved, *now]):
            if key not in now or key not in saved:
                return f"{name} has {'no ' * (key not in now)}{key!r}, unlike"
            if saved[key] != now[key]:
                return _difference(f"{name}.{key}", saved[key], now[key])
    if isinstance(saved, list) and isinstance(now, list) and len(saved) == len(now):
        number = next((i for i, (one, other) in enumerate(zip(saved, now, strict=True)) if one != other), None)
        if number is not None:
            return _difference(f"{name}[{number}]", saved[number], now[number])
    return f"{name} is {_short(now)}, was {_short(saved)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check_ranks(file: Path, config: OrdinalConfig, tensors: dict[str, Any]) -> None:
    """Raises:
    ValueError: other prototypes than ranks; said before anything is built for them."""
    prototypes, ranks = tensors.get("head.prototypes"), len(config.label_space)
    if prototypes is not None and len(prototypes) != ranks:
        raise ValueError(f"{file}: holds prototypes of {len(prototypes)} ranks, config.json names {ranks}")


class Encoder(nn.Module):
    """An image tower with optional dropout on its features: (B, 3, H, W) -> (B, D), or (B, N, D) of layers or tokens.

    Args:
        mirror: "horizontal", "vertical" or both: in evaluation, features are averaged over the picture and its mirrors.
        reader: what reads the layers or tokens of the tower; None: its own features are wanted.

    Attributes:
        frozen_statistics: BatchNorm layers keep their running statistics in training too, so that a sample's
            features do not depend on the rest of its batch. Their affine part still learns.

    Raises:
        ValueError: an unknown mirror, or any for tokens, which lie elsewhere in a mirrored picture.
    """

    def __init__(
        self,
        tower: nn.Module,
        dropout: float = 0.0,
        mirror: Sequence[str] = (),
        reader: Reader | None = None,
    ):
        super().__init__()
        if mirror and isinstance(reader, TokenFeatures):
            raise ValueError("model.mirror: this method reads tokens, which lie elsewhere in a mirrored picture")
        # Convolutions are faster so (benchmarks/train_loop.py); here, so that what is loaded has it like what learns.
        self.tower = tower.to(memory_format=torch.channels_last)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.reader = reader
        self.frozen_statistics = True
        self.mirrors: list[tuple[int, ...]] = [()]  # axes to flip, the picture itself first
        for way in mirror:
            if way not in ("horizontal", "vertical"):
                raise ValueError(f"mirror {way!r} is unknown; choices: horizontal, vertical")
            self.mirrors += [(*axes, -1 if way == "horizontal" else -2) for axes in self.mirrors]

    def train(self, mode: bool = True) -> Encoder:
        super().train(mode)
        for child in self.modules():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                learns = child.weight is None or child.weight.requires_grad
                child.train(mode and learns and not self.frozen_statistics)
        return self

    def forward(self, pixel_values: Tensor) -> Tensor:
        if self.training or len(self.mirrors) == 1:
            return self.dropout(self.encode(pixel_values))
        features = [self.encode(pixel_values.flip(axes) if axes else pixel_values) for axes in self.mirrors]
        return torch.stack(features).mean(dim=0)

    def encode(self, pixel_values: Tensor) -> Tensor:
        """The features of the pictures as they are: without dropout, without their mirrors."""
        return self.tower(pixel_values) if self.reader is None else self.reader(self.tower, pixel_values)


def _reader(image: Backbone, head: type[Head]) -> Reader | None:
    """What reads the layers or tokens of an image encoder, if the head wants them."""
    readers: dict[Reads, type[Reader]] = {"layers": LayerFeatures, "tokens": TokenFeatures}
    return readers[head.reads](image.encoder, image.pooling, image.pixels.size) if head.reads in readers else None


def _shape(image: Backbone, reader: Reader | None) -> dict[str, Any]:
    """What a configuration says of the features."""
    if isinstance(reader, LayerFeatures):
        return {"input_dim": max(reader.dims), "layer_dims": list(reader.dims), "num_tokens": None}
    if isinstance(reader, TokenFeatures):
        return {"input_dim": reader.dim, "layer_dims": None, "num_tokens": reader.num_tokens}
    return {"input_dim": image.output_dim, "layer_dims": None, "num_tokens": None}


def _rebuild(config: OrdinalConfig, tokenizer: Path | None = None) -> tuple[Encoder, Head, Any]:
    """Encoder, head and the text tower's tokenizer of a configuration, with random weights.

    Args:
        tokenizer: folder of the tokenizer, for text towers whose tokenizer does not come with open_clip.
    """
    own = config.text == config.backbone
    image = load_backbone(config.backbone, False, config.backbone_architecture, None, own, tokenizer)
    tower = image if own else None
    if config.text and not own:
        tower = load_backbone(config.text, False, config.text_architecture, tokenizer=tokenizer)
    text = tower.text if tower else None
    reader = _reader(image, head_class(_method(config)))
    expected = _shape(image, reader)
    given = {name: getattr(config, name) for name in expected}
    expected["pixels.size"], given["pixels.size"] = image.pixels.size, config.pixel_spec.size
    for name, value in expected.items():
        if given[name] != value:
            raise ValueError(f"{name} {given[name]} is not that of the backbone and the method, {value}")
    encoder = Encoder(image.encoder, config.dropout, config.mirror or (), reader)
    return encoder, _head(config, tower), text.tokenizer if text else None


def _tokenizer_folder(name: str, config: OrdinalConfig, hub: dict[str, Any]) -> Path | None:
    """Where the tokenizer of a saved model lies; fetched from the hub if need be."""
    if (config.text_architecture or {}).get("tokenizer") != "files":
        return None
    inside = Path(hub.get("subfolder") or "") / TOKENIZER_FOLDER
    if not Path(name).is_dir():
        options = {key: value for key, value in hub.items() if key != "subfolder"}
        name = snapshot_download(name, allow_patterns=[f"{inside.as_posix()}/*"], **options)
    return Path(name) / inside


def _head(config: OrdinalConfig, tower: Backbone | None, generator: nn.Module | None = None) -> Head:
    context = HeadContext(
        ranks=config.label_space,
        input_dim=config.input_dim,
        text=tower.text if tower else None,
        logit_scale=config.logit_scale,
        shared_space=config.shared_space,
        label_mean=config.label_mean,
        label_std=config.label_std,
        decoding=cast(Decoding, config.decoding),
        layer_dims=tuple(config.layer_dims or ()),
        generator=generator,
        see=None if generator is None or tower is None else tower.see,
    )
    return build_head(_method(config), context, config.head or {})


def _method(config: OrdinalConfig) -> str:
    """The method, or the class behind it where no installed package registers that name.

    Raises:
        ValueError: it comes from another package, whose import is missing.
    """
    if config.head_class in ("", available_heads().get(config.method)):
        return config.method
    try:
        head_class(config.head_class)
    except ValueError as error:
        raise ValueError(f"this model's method {config.method!r} comes from another package: {error}") from error
    return config.head_class


AutoConfig.register(OrdinalConfig.model_type, OrdinalConfig, exist_ok=True)
AutoModel.register(OrdinalConfig, OrdinalModel, exist_ok=True)
AutoModelForImageClassification.register(OrdinalConfig, OrdinalModel, exist_ok=True)
_BACKENDS = {"pil": OrdinalImageProcessor, "torchvision": OrdinalImageProcessor}  # one code for both: equal pixels
AutoImageProcessor.register(OrdinalConfig, image_processor_classes=_BACKENDS, exist_ok=True)
