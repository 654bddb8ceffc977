"""open_clip: ResNet, ViT and timm image towers, CLIP's and SigLIP's text towers; and the tiny CLIP shipped here."""

from __future__ import annotations

import logging
import math
from copy import deepcopy
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ordinalclip.backbones.base import Backbone, Pooling, Request, fetching
from ordinalclip.backbones.hf_models import refuse_code
from ordinalclip.backbones.timm_models import pooling_of as timm_pooling
from ordinalclip.files import check_no_code, read_json_object
from ordinalclip.images import PixelSpec
from ordinalclip.suggestions import near_matches
from ordinalclip.text import TextTower
from ordinalclip.text_encoders import EncoderTower
from ordinalclip.tokenization import MissingTokenizer, load_tokenizer
from ordinalclip.weights import check_floats, first_line, is_torchscript, read_weights

logger = logging.getLogger(__name__)
TINY_FOLDER = Path(__file__).parent.parent / "assets" / "tiny-clip"
CONFIG_FILE = "open_clip_config.json"
WEIGHT_FILES = ("open_clip_model.safetensors", "model.safetensors", "open_clip_pytorch_model.bin")
TOKENIZER_FILES = ("*token*", "vocab*", "merges.txt", "*.model")
NO_TEXT = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}


def load(name: str, request: Request) -> Backbone:
    """`open_clip:NAME`, `open_clip:NAME/TAG` or `/FILE`, `open_clip:FOLDER`, `open_clip:hf-hub:OWNER/NAME`."""
    if name.startswith("hf-hub:") and not request.architecture:
        return _load_folder(_fetched(name), request)
    if request.architecture:
        return _from_model(*_at_size(_build(request.architecture, request.with_text), request), request)
    if Path(name).is_dir():
        return _load_folder(Path(name), request)
    return _load_named(name, request)


def load_tiny(name: str, request: Request) -> Backbone:
    """`tiny`: the CLIP in the package's assets."""
    if name:
        raise ValueError(f"backbone 'tiny' takes no name, got {name!r}")
    return load("", request) if request.architecture else _load_folder(TINY_FOLDER, request)


def _load_folder(folder: Path, request: Request) -> Backbone:
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise ValueError(f"backbone open_clip:{folder}: the folder holds no {CONFIG_FILE}")
    content = read_json_object(file)
    if not isinstance(content.get("model_cfg"), dict):
        raise ValueError(f"{file}: no model_cfg in it")
    _refuse_coca(f"open_clip:{folder}", content["model_cfg"])
    architecture: dict[str, Any] = {key: content[key] for key in ("model_cfg", "preprocess_cfg") if key in content}
    _add_text_config(architecture, request)
    try:
        model = _build(architecture)
    except (KeyError, TypeError, AttributeError, AssertionError, RuntimeError) as error:
        why = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"{file}: no model can be built from its model_cfg ({why})") from error
    if request.load_weights:
        weights = next((folder / known for known in WEIGHT_FILES if (folder / known).is_file()), None)
        if weights is None:
            raise ValueError(f"backbone open_clip:{folder}: the folder holds none of {', '.join(WEIGHT_FILES)}")
        _load_weights(model, weights)
    return _from_model(*_at_size(model, request, architecture), request, folder)


def _load_named(name: str, request: Request) -> Backbone:
    import open_clip

    name, _, pretrained = name.partition("/")
    config = open_clip.get_model_config(name) if name in open_clip.list_models() else None
    if config is None:
        raise ValueError(
            f"backbone open_clip:{name}{'/' if pretrained else ''}{pretrained} is unknown; "
            + near_matches(name, open_clip.list_models())
        )
    _refuse_coca(f"open_clip:{name}", config)
    architecture: dict[str, Any] = {"model_cfg": config}
    _add_text_config(architecture, request)
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pixels := _common_pixels([open_clip.get_pretrained_cfg(name, tag) for tag in tags]):
        architecture["preprocess_cfg"] = pixels
    if not pretrained and request.load_weights:
        logger.warning("open_clip:%s is built with RANDOM weights; name a tag or file: open_clip:%s/TAG", name, name)
    if not (pretrained and request.load_weights):
        return _from_model(*_at_size(_build(architecture, request.with_text), request, architecture), request)
    if Path(pretrained).is_file():
        model = _build(architecture)
        _load_weights(model, Path(pretrained))
    else:
        if pretrained not in tags:
            raise ValueError(
                f"weights {pretrained!r} of open_clip:{name} are neither a local file nor a tag; "
                + near_matches(pretrained, tags)
            )
        tag = open_clip.get_pretrained_cfg(name, pretrained)
        if tag.get("quick_gelu"):
            config["quick_gelu"] = True
        architecture.pop("preprocess_cfg", None)  # the tag's own comes with the model
        with fetching(f"open_clip:{name}/{pretrained}"):
            model = open_clip.create_model(name, pretrained=pretrained, force_quick_gelu=bool(tag.get("quick_gelu")))
    return _from_model(*_at_size(model, request, architecture), request)


def _refuse_coca(spec: str, config: dict[str, Any]) -> None:
    if "multimodal_cfg" in config:
        raise ValueError(f"backbone {spec} is a CoCa, whose image tower gives tokens for a decoder; not supported")


def _common_pixels(tags: list[dict[str, Any]]) -> dict[str, Any]:
    """The pixel statistics and resize rule of a model's published weights, as far as all of them agree."""
    keys = ("mean", "std", "interpolation", "resize_mode")
    return {key: tags[0][key] for key in keys if tags and all(tag.get(key) == tags[0].get(key, ()) for tag in tags)}


def _load_weights(model: Any, file: Path) -> None:
    """Any layout of weights that open_clip reads; position embeddings are fitted to the model's size."""
    from open_clip import load_checkpoint

    if is_torchscript(file):
        raise ValueError(
            f"{file} is a TorchScript archive; turn it into a folder first: ordinalclip convert {file} OUT"
        )
    if file.suffix in (".npz", ".npy"):
        raise ValueError(
            f"{file}: arrays of NumPy are not read; allowed are .safetensors and PyTorch's files of tensors"
        )
    state = read_weights(file)
    state = state.get("state_dict", state)
    check_floats(file, state)
    try:
        if model.text_is_stub:
            _fill_visual(model, state)
        else:
            load_checkpoint(model, str(file))
    except (
        RuntimeError,
        KeyError,
        AttributeError,
        StopIteration,
    ) as error:  # torch lists every tensor that does not fit
        raise ValueError(f"{file}: the weights do not fit the model: {' '.join(str(error).split())[:300]}") from error


def _fill_visual(model: Any, state: dict[str, Any]) -> None:
    """For text towers that are not built: the image tower and the temperature alone."""
    prefix = "visual."
    model.visual.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    model.logit_scale.data.copy_(state["logit_scale"])


def _build(architecture: dict[str, Any], with_text: bool = True) -> Any:
    """The model with random weights; without text a stub of no weight stands in the text tower's place."""
    import open_clip

    config = deepcopy(architecture["model_cfg"])
    foreign_text = "hf_model_name" in config["text_cfg"]
    custom = config.pop("custom_text", False) or foreign_text
    encoder = _text_encoder(architecture, config) if with_text and "text_config" in architecture else None
    if not with_text or foreign_text:
        config["text_cfg"] = NO_TEXT
    config["vision_cfg"].pop("timm_model_pretrained", None)
    model: Any = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config)
    model.text_is_stub = config["text_cfg"] is NO_TEXT and encoder is None
    if encoder is not None:
        model.text = encoder
    if "timm_size" in architecture:
        _resize_timm(model.visual, architecture["timm_size"])
    return model


def _text_encoder(architecture: dict[str, Any], config: dict[str, Any]) -> nn.Module:
    """A text tower of transformers inside an open_clip model, as open_clip builds it, without its hub."""
    from open_clip import CLIPTextCfg
    from open_clip.hf_configs import arch_dict
    from open_clip.hf_model import HFTextEncoder
    from transformers import AutoConfig

    refuse_code(architecture["text_config"])
    if (kind := architecture["text_config"].get("model_type")) not in arch_dict:
        raise ValueError(f"open_clip builds no text tower of a {kind!r}; it knows {', '.join(arch_dict)}")
    known = {field.name for field in fields(CLIPTextCfg)}
    options = CLIPTextCfg(**{key: value for key, value in config["text_cfg"].items() if key in known})
    text: Any = HFTextEncoder(
        "",
        config["embed_dim"],
        AutoConfig.for_model(**architecture["text_config"]),
        options.hf_pooler_type,
        options.hf_proj_type,
        pretrained=False,
    )
    if getattr(text.config, "is_encoder_decoder", False):
        text.transformer = text.transformer.encoder
    elif options.hf_pooler_type != "cls_pooler" and hasattr(text.transformer, "pooler"):
        text.transformer.pooler = None
    return text


def _add_text_config(architecture: dict[str, Any], request: Request) -> None:
    """Note the configuration of a text tower of transformers, which open_clip's own only names."""
    from transformers import AutoConfig

    name = architecture["model_cfg"].get("text_cfg", {}).get("hf_model_name")
    if not (name and request.with_text):
        return
    check_no_code(Path(name))
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:  # the image tower is of use without it; who wants the text will be told
        logger.warning(
            "image tower only: the text tower's configuration, %s, is not to be had (%s)", name, first_line(error)
        )
        return
    architecture["text_config"] = {key: value for key, value in config.to_dict().items() if key != "_name_or_path"}


def _fetched(name: str) -> Path:
    """The files of a CLIP on the hub, as far as they are read."""
    from huggingface_hub import snapshot_download

    with fetching(f"open_clip:{name}"):
        for weights in WEIGHT_FILES:
            wanted = [CONFIG_FILE, weights, *TOKENIZER_FILES]
            folder = Path(snapshot_download(name.removeprefix("hf-hub:"), allow_patterns=wanted))
            if (folder / weights).is_file():
                break
    return folder


def _at_size(model: Any, request: Request, architecture: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
    """The model for the input size that is asked for, its position embeddings interpolated; and its architecture.

    Raises:
        ValueError: a tower that is bound to its own size.
    """
    architecture = deepcopy(architecture or request.architecture)
    vision, size = architecture["model_cfg"]["vision_cfg"], request.image_size
    if size is None or size == vision.get("image_size", 224):
        return model, architecture
    vision["image_size"] = size
    if architecture.get("preprocess_cfg") is None:
        architecture["preprocess_cfg"] = dict(getattr(model.visual, "preprocess_cfg", None) or {})
    architecture["preprocess_cfg"]["size"] = size
    if vision.get("timm_model_name"):
        architecture["timm_size"] = size
        _resize_timm(model.visual, size)
        return model, architecture
    resized = _build(architecture, with_text=False).visual
    state, expected = model.visual.state_dict(), resized.state_dict()
    for key in ("positional_embedding", "attnpool.positional_embedding"):  # ViT, ResNet
        if key in state:
            first, grid = state[key][:1], state[key][1:]
            old, new = math.isqrt(len(grid)), math.isqrt(len(expected[key]) - 1)
            grid = grid.T.reshape(1, -1, old, old)
            grid = nn.functional.interpolate(grid, size=(new, new), mode="bicubic", antialias=True, align_corners=False)
            state[key] = torch.cat([first, grid.flatten(2)[0].T])
    resized.load_state_dict(state)
    model.visual = resized
    return model, architecture


def _resize_timm(visual: Any, size: int) -> None:
    """Give a timm tower inside open_clip another input size."""
    trunk, pool = visual.trunk, getattr(visual.head, "pool", None)
    if hasattr(trunk, "set_input_size") and pool is None:
        visual.set_input_size(size)
    elif hasattr(pool, "pos_embed") or trunk.default_cfg.get("fixed_input_size"):
        own = trunk.default_cfg.get("input_size")
        raise ValueError(
            f"timm tower {type(trunk).__name__} inside open_clip is bound to its input size {own}, got {size}"
        )
    visual.image_size = (size, size)


def _from_model(model: Any, architecture: dict[str, Any], request: Request, folder: Path | None = None) -> Backbone:
    config = architecture["model_cfg"]
    pixels = _pixels(model.visual, architecture)
    text: TextTower | None = None
    foreign = "hf_model_name" in config["text_cfg"]
    encoder = foreign and type(model.text).__name__ == "HFTextEncoder"
    if request.with_text and (encoder or not foreign):
        if "tokenizer" not in architecture and not request.architecture:  # built from a name or folder, not restored
            from_files = bool(config["text_cfg"].get("hf_tokenizer_name"))
            architecture["tokenizer"] = "files" if from_files else "clip"
            source: Any = config["text_cfg"].get("hf_tokenizer_name") if folder is None else folder
        else:
            architecture.setdefault("tokenizer", "clip")
            source = request.tokenizer
        try:
            tower = EncoderTower if encoder else TextTower
            text = tower.from_open_clip(model, _tokenizer(config, architecture["tokenizer"], source))
        except ValueError as error:  # a head that needs it will say so
            logger.warning("image tower only: %s", error)
    return Backbone(
        encoder=model.visual,
        output_dim=config["embed_dim"],
        pixels=pixels,
        text=text,
        logit_scale=model.logit_scale.item(),
        pooling=_pooling(model.visual),
        architecture={**architecture, "preprocess_cfg": {**asdict(pixels), "resize_mode": pixels.resize}},
    )


def _pooling(visual: Any) -> Pooling:
    """How an image tower pools the outputs of its layers: a timm model's own way, or a ViT's; ResNets have maps."""
    if hasattr(visual, "trunk"):
        return timm_pooling(visual.trunk)
    return Pooling(getattr(visual, "pool_type", "") == "tok" and visual.attn_pool is None, num_prefix_tokens=1)


def _pixels(visual: Any, architecture: dict[str, Any]) -> PixelSpec:
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    stored = architecture.get("preprocess_cfg") or getattr(visual, "preprocess_cfg", None) or {}
    if stored.get("resize_mode", "shortest") not in ("shortest", "squash"):
        raise ValueError(f"preprocess_cfg.resize_mode is {stored['resize_mode']!r}; allowed are shortest and squash")
    size = stored.get("size", visual.image_size)
    return PixelSpec(
        size if isinstance(size, int) else size[0],
        tuple(stored.get("mean", OPENAI_DATASET_MEAN)),
        tuple(stored.get("std", OPENAI_DATASET_STD)),
        stored.get("interpolation", "bicubic"),
        "squash" if stored.get("resize_mode") == "squash" else "shortest",
        stored.get("crop_ratio", 1.0),
    )


@cache  # a tenth of a second for the same table
def _clip_tokenizer(length: int) -> Any:
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(context_length=length)


def _tokenizer(config: dict[str, Any], kind: str, source: str | Path | None) -> Any:
    """CLIP's byte-pair encoding, or open_clip's wrapper around the tokenizer files that the text tower names."""
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    text = config["text_cfg"]
    length, options = text.get("context_length", 77), text.get("tokenizer_kwargs") or {}
    if kind == "clip":
        return SimpleTokenizer(context_length=length, **options) if options else _clip_tokenizer(length)
    found = load_tokenizer(source, f"open_clip:{text.get('hf_tokenizer_name', source)}")
    if isinstance(found, MissingTokenizer):
        return found
    wrapped: Any = HFTokenizer(str(source), length, tokenizer_mode=text.get("tokenizer_mode"), **options)
    if (language := options.get("language")) is not None:
        if language not in wrapped.tokenizer.get_vocab():
            raise ValueError(f"tokenizer_kwargs.language {language!r} is no token of {source}")
        wrapped.tokenizer.src_lang = language  # open_clip sets what transformers 5 overwrites with this
    return wrapped
