"""Backbones: from a spec string to an image encoder, its text tower and its pixel statistics.

    tiny                               the small CLIP shipped with the package (64 px)
    open_clip:NAME[/PRETRAINED]        PRETRAINED is open_clip's tag or a local file; without it: random weights
    timm:NAME[/pretrained]             image tower only; its features are projected to the text width

A family is a function `(name, pretrained, load_weights, architecture, image_size) -> Backbone` and one line in
`FAMILIES`.
"""

from __future__ import annotations

import difflib
import json
import logging
import math
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ordinalclip.text import TextTower

logger = logging.getLogger(__name__)
TINY_FOLDER = Path(__file__).parent / "assets" / "tiny-clip"


@dataclass(frozen=True)
class PixelSpec:
    """What an image encoder expects of its pixels.

    Attributes:
        size: side of the square input in pixels.
        mean, std: per channel, of pixels in [0, 1].
        interpolation: "bicubic", "bilinear" or "nearest".
        resize: "shortest" scales the shorter side to `size` and crops the centre; "squash" scales both.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    resize: str = "shortest"


@dataclass
class Backbone:
    """An image encoder with what belongs to it.

    Attributes:
        encoder: (B, 3, size, size) -> (B, output_dim) features.
        output_dim: width D of the features.
        pixels: input size and statistics.
        text: the frozen text tower of the same CLIP, or None.
        logit_scale: log of the CLIP's temperature factor.
        spec: the spec that it was built from.
        architecture: what rebuilds the same architecture without its weights, as JSON data.
    """

    encoder: nn.Module
    output_dim: int
    pixels: PixelSpec
    spec: str
    text: TextTower | None = None
    logit_scale: float = math.log(1 / 0.07)
    architecture: dict[str, Any] = field(default_factory=dict)


def load_backbone(
    spec: str, load_weights: bool = True, architecture: dict[str, Any] | None = None, image_size: int | None = None
) -> Backbone:
    """Build a backbone from its spec (module docstring).

    Args:
        spec: "family:name" or "family:name/pretrained".
        load_weights: False builds the architecture with random weights, to be restored from a saved model.
        architecture: a `Backbone.architecture`, so that restoring needs no file or hub.
        image_size: another input size than the encoder's own; position embeddings are interpolated.

    Raises:
        ValueError: an unknown family, model or weights tag; the message lists near matches.
    """
    family, _, rest = spec.partition(":")
    name, _, pretrained = rest.partition("/")
    if family not in FAMILIES:
        raise ValueError(f"backbone {spec!r}: family {family!r} is unknown; choices: {', '.join(FAMILIES)}")
    backbone = FAMILIES[family](name, pretrained or None, load_weights, architecture or {}, image_size)
    backbone.spec = spec
    return backbone


def near_matches(given: str, choices: Iterable[str]) -> str:
    """The choices most like what was given, for an error message."""
    choices = list(choices)
    near = difflib.get_close_matches(given, choices, n=5, cutoff=0.4)
    return ("nearest: " if near else "choices: ") + ", ".join(near or choices[:20])


def _open_clip(
    name: str, pretrained: str | None, load_weights: bool, architecture: dict[str, Any], image_size: int | None
) -> Backbone:
    import open_clip

    if not architecture:
        config = open_clip.get_model_config(name)
        if config is None:
            raise ValueError(f"backbone open_clip:{name} is unknown; {near_matches(name, open_clip.list_models())}")
        architecture = {"model_cfg": config}
    if not load_weights:
        model = _build_open_clip(architecture["model_cfg"])
        return _from_open_clip_model(*_at_size(model, architecture, image_size))
    if pretrained is None:
        logger.warning("open_clip:%s is built with RANDOM weights; name a tag or file: open_clip:%s/TAG", name, name)
    elif not Path(pretrained).is_file() and pretrained not in open_clip.list_pretrained_tags_by_model(name):
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise ValueError(
            f"weights {pretrained!r} of open_clip:{name} are neither a local file nor a tag; "
            + near_matches(pretrained, tags)
        )
    tag = open_clip.get_pretrained_cfg(name, pretrained) if pretrained else None
    quick_gelu = bool(tag and tag.get("quick_gelu"))
    model = open_clip.create_model(name, pretrained=pretrained, force_quick_gelu=quick_gelu)
    if quick_gelu:
        architecture["model_cfg"]["quick_gelu"] = True
    tokenizer = open_clip.get_tokenizer(name)
    return _from_open_clip_model(*_at_size(model, architecture, image_size), tokenizer)


def _tiny(
    name: str, pretrained: str | None, load_weights: bool, architecture: dict[str, Any], image_size: int | None
) -> Backbone:
    if name or pretrained:
        raise ValueError(f"backbone 'tiny' takes no name, got {name!r}")
    architecture = architecture or json.loads((TINY_FOLDER / "open_clip_config.json").read_text())
    model = _build_open_clip(architecture["model_cfg"])
    if load_weights:
        from safetensors.torch import load_file

        state = load_file(TINY_FOLDER / "model.safetensors")
        model.load_state_dict(
            {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
        )
    return _from_open_clip_model(*_at_size(model, architecture, image_size))


def _at_size(model: Any, architecture: dict[str, Any], size: int | None) -> tuple[Any, dict[str, Any]]:
    """The same weights in an architecture for another input size, its position embeddings interpolated."""
    if size is None or size == architecture["model_cfg"]["vision_cfg"]["image_size"]:
        return model, architecture
    architecture = deepcopy(architecture)
    architecture["model_cfg"]["vision_cfg"]["image_size"] = size
    architecture.setdefault("preprocess_cfg", dict(getattr(model.visual, "preprocess_cfg", {})))["size"] = size
    resized = _build_open_clip(architecture["model_cfg"])
    state, expected = model.state_dict(), resized.state_dict()
    for key in ("visual.positional_embedding", "visual.attnpool.positional_embedding"):  # ViT, ResNet
        if key in state:
            first, grid = state[key][:1], state[key][1:]
            old, new = math.isqrt(len(grid)), math.isqrt(len(expected[key]) - 1)
            grid = grid.T.reshape(1, -1, old, old)
            grid = nn.functional.interpolate(grid, size=(new, new), mode="bicubic", antialias=True, align_corners=False)
            state[key] = torch.cat([first, grid.flatten(2)[0].T])
    resized.load_state_dict(state)
    return resized, architecture


def _build_open_clip(model_cfg: dict[str, Any]) -> nn.Module:
    import open_clip

    config = deepcopy(model_cfg)
    custom = config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]
    for tower, key in (("vision_cfg", "timm_model_pretrained"), ("text_cfg", "hf_model_pretrained")):
        if key in config[tower]:
            config[tower][key] = False
    return (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config)


def _from_open_clip_model(model: Any, architecture: dict[str, Any], tokenizer: Any = None) -> Backbone:
    visual = model.visual
    stored = architecture.get("preprocess_cfg") or getattr(visual, "preprocess_cfg", None)
    if stored is None:
        from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

        stored = {"mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD, "size": visual.image_size}
    size = stored.get("size", visual.image_size)
    size = size if isinstance(size, int) else size[0]
    pixels = PixelSpec(
        size,
        tuple(stored["mean"]),
        tuple(stored["std"]),
        stored.get("interpolation", "bicubic"),
        "squash" if stored.get("resize_mode") == "squash" else "shortest",
    )
    try:
        text: TextTower | None = TextTower.from_open_clip(model, tokenizer)
    except ValueError as error:  # a head that needs it will say so
        text = None
        logger.warning("image tower only: %s", error)
    architecture = {**architecture, "preprocess_cfg": {**asdict(pixels), "resize_mode": pixels.resize}}
    return Backbone(
        encoder=visual,
        output_dim=architecture["model_cfg"]["embed_dim"],
        pixels=pixels,
        spec="",
        text=text,
        logit_scale=model.logit_scale.item(),
        architecture=architecture,
    )


def _timm(
    name: str, pretrained: str | None, load_weights: bool, architecture: dict[str, Any], image_size: int | None
) -> Backbone:
    import timm

    if not timm.is_model(name):
        raise ValueError(f"backbone timm:{name} is unknown; {near_matches(name, timm.list_models())}")
    if pretrained not in (None, "pretrained"):
        raise ValueError(f"backbone timm:{name}/{pretrained}: write timm:{name} (random) or timm:{name}/pretrained")
    image_size = image_size or architecture.get("image_size")
    options: dict[str, Any] = {}
    published: Any = timm.get_pretrained_cfg(name)
    data = timm.data.resolve_data_config(published.to_dict())
    size = image_size or data["input_size"][1]
    if image_size is not None and published.fixed_input_size:  # its position embeddings depend on the size
        options["img_size"] = size
    encoder: Any = timm.create_model(name, load_weights and pretrained is not None, num_classes=0, **options)
    architecture = {"image_size": image_size} if image_size else {}
    pixels = PixelSpec(size, tuple(data["mean"]), tuple(data["std"]), data["interpolation"])
    output_dim = getattr(encoder, "head_hidden_size", None) or encoder.num_features
    return Backbone(encoder, output_dim, pixels, spec="", architecture=architecture)


FAMILIES: dict[str, Callable[[str, str | None, bool, dict[str, Any], int | None], Backbone]] = {
    "tiny": _tiny,
    "open_clip": _open_clip,
    "timm": _timm,
}
