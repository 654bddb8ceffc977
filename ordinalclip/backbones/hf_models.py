"""transformers: CLIP and SigLIP with their text towers, vision models that take plain pixels, and text encoders."""

from __future__ import annotations

import inspect
import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ordinalclip.backbones import hf_text
from ordinalclip.backbones.base import Backbone, Pooling, Request, check_map
from ordinalclip.files import check_no_code
from ordinalclip.images import PixelSpec
from ordinalclip.suggestions import near_matches
from ordinalclip.text import TextTower
from ordinalclip.tokenization import MissingTokenizer, load_tokenizer

logger = logging.getLogger(__name__)
DUAL = ("clip", "siglip")  # model types with a text tower that is supported
FETCHING = ("auto_map", "attn_implementation", "use_pretrained_backbone", "quantization_config", "backbone")
CLIP_VOCABULARY = 49408  # words of CLIP's own byte-pair encoding, which comes with open_clip


class PooledVision(nn.Module):
    """A transformers vision model as an image encoder: (B, 3, H, W) -> (B, D).

    The feature is the model's `pooler_output` where it has one; else its class token; else the mean over tokens, or
    over the places of a convolutional map. CLIP's visual projection follows where there is one.

    Raises:
        ValueError: `forward` meets a map whose channels come last: see `check_map`.
    """

    def __init__(self, model: nn.Module, projection: nn.Module | None = None, options: dict[str, Any] | None = None):
        super().__init__()
        self.model = model
        self.projection = nn.Identity() if projection is None else projection
        self.options = options or {}
        self.has_class_token = any(name.endswith(("cls_token", "class_embedding")) for name in model.state_dict())

    def forward(self, pixel_values: Tensor) -> Tensor:
        outputs = self.model(pixel_values=pixel_values, **self.options)
        pooled = getattr(outputs, "pooler_output", None)
        if pooled is not None:
            return self.projection(pooled.flatten(1))
        hidden = outputs.last_hidden_state
        if hidden.ndim == 4:
            check_map(hidden, type(self.model).__name__)
            return self.projection(hidden.mean(dim=(2, 3)))
        return self.projection(hidden[:, 0] if self.has_class_token else hidden.mean(dim=1))


def load(name: str, request: Request) -> Backbone:
    """`hf:NAME`: a folder that `save_pretrained` wrote, or a name on the hub."""
    from transformers import AutoConfig, AutoModel

    stored = request.architecture
    if stored:
        refuse_code(stored["config"])
    else:
        check_no_code(Path(name))
    config = AutoConfig.for_model(**stored["config"]) if stored else _published_config(name)
    if config.model_type in hf_text.ENCODERS:
        return hf_text.load(name, config, request)
    _check_type(name, config)
    dual = config.model_type in DUAL
    pixels = PixelSpec.from_dict(stored["pixels"]) if stored else _published_pixels(name)
    if request.image_size is not None:
        pixels = replace(pixels, size=request.image_size)

    pooler = stored.get("pooler", True)
    if stored or not request.load_weights:
        wanted = config.vision_config if dual and not request.with_text else config
        model: Any = AutoModel.from_config(wanted, dtype=torch.float32)
    else:
        model, pooler = hf_text.with_weights(name, config)  # a classifier's file has none
    if not pooler:
        model.pooler = None

    vision = getattr(model, "vision_model", model) if dual else model
    projection = None
    if config.model_type == "clip":
        own = (config.vision_config.hidden_size, config.projection_dim)
        projection = getattr(model, "visual_projection", None) or nn.Linear(*own, bias=False)
    encoder = PooledVision(_without_foreign_drop_path(vision), projection, _size_options(vision, pixels.size))
    fields = {key: value for key, value in config.to_dict().items() if key != "_name_or_path"}
    architecture = {"config": fields, "pixels": asdict(pixels), "pooler": pooler}
    width = _probe(name, encoder, pixels.size)
    backbone = Backbone(encoder.eval(), width, pixels, pooling=_pooling(vision), architecture=architecture)
    if dual and request.with_text:
        tokenizer, architecture["tokenizer"] = _tokenizer(name, config, request)
        backbone.text = TextTower.from_transformers(model, tokenizer)
        backbone.logit_scale = model.logit_scale.item()
    return backbone


def _pooling(vision: Any) -> Pooling:
    """How a vision model pools the outputs of its layers: by a class token that all of them have, or by the mean."""
    names = dict(vision.named_parameters())
    has_class_token = any(f"embeddings.{name}" in names for name in ("cls_token", "class_embedding"))
    registers = getattr(vision.config, "num_register_tokens", 0)
    means = getattr(vision.config, "use_mean_pooling", False)  # BEiT: over the patches
    return Pooling(has_class_token and not means, has_class_token + registers)


def _published_config(name: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        why = str(error).strip().partition("\n")[0]
        parent = Path(name).parent
        near = [str(parent / folder.name) for folder in sorted(parent.iterdir())] if parent.is_dir() else []
        hint = f"; {near_matches(name, near)}" if near else ""
        raise ValueError(f"backbone hf:{name} is neither a model's folder nor on the hub ({why}){hint}") from error


def refuse_code(stored: Any) -> None:
    """A saved architecture is rebuilt from numbers alone: what would fetch or import something is refused."""
    if isinstance(stored, dict):
        for key, value in stored.items():
            if value and str(key).lstrip("_") in FETCHING:
                raise ValueError(
                    f"an architecture with {key}={value!r}, which would fetch or run something, is not built"
                )
            refuse_code(value)
    elif isinstance(stored, list):
        for value in stored:
            refuse_code(value)


def _check_type(name: str, config: Any) -> None:
    """Refuse what cannot serve as an image encoder, and say what can."""
    from transformers import MODEL_MAPPING

    kind = config.model_type
    allowed = (
        "supported are CLIP, SigLIP (its fixed-size SigLIP 2 too), vision models that take plain pixels, and as "
        f"model.text {', '.join(hf_text.ENCODERS)}"
    )
    if kind.startswith("siglip2"):
        raise ValueError(
            f"backbone hf:{name} is a SigLIP 2 of flexible resolution (NaFlex), whose input is patches and their "
            "shapes; use one of the checkpoints of fixed size, whose model type is siglip"
        )
    if type(config) not in MODEL_MAPPING:
        raise ValueError(f"backbone hf:{name} is a {kind!r}, which AutoModel cannot build; {allowed}")
    found = MODEL_MAPPING[type(config)]
    names = inspect.signature((found[0] if isinstance(found, tuple) else found).forward).parameters
    if kind not in DUAL and ("pixel_values" not in names or "input_ids" in names):
        raise ValueError(f"backbone hf:{name} is a {kind!r}; {allowed}")
    if hasattr(config, "mask_ratio"):
        raise ValueError(f"backbone hf:{name} is a {kind!r}, which hides patches at random; {allowed}")


def _published_pixels(name: str) -> PixelSpec:
    """Statistics, size and resize rule of the image processor beside the weights.

    Raises:
        ValueError: no image processor, or a rule other than scaling to a square or cutting one out.
    """
    from transformers import AutoImageProcessor

    try:
        processor: Any = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"backbone hf:{name}: no image processor there (preprocessor_config.json), so its pixel statistics and "
            "input size are not known"
        ) from error
    crops = getattr(processor, "do_center_crop", False)
    scale, window = processor.size, processor.crop_size if crops else None
    crop_share = getattr(processor, "crop_pct", None)
    side = scale.get("shortest_edge") or scale.get("height")
    squash = not scale.get("shortest_edge")
    size = window.get("height") if window else side
    known = side and size and (scale.get("width") in (None, side)) and (not window or window.get("width") == size)
    if not known or scale.get("longest_edge") or not processor.do_resize:
        raise ValueError(
            f"backbone hf:{name}: image size {dict(processor.size)}, crop {window and dict(window)} is no rule "
            "that can be followed; allowed are a square, and a shorter side with or without a square centre crop"
        )
    if not processor.do_rescale or abs(processor.rescale_factor * 255 - 1) > 1e-6:
        raise ValueError(f"backbone hf:{name}: pixels must be rescaled by 1 / 255, got {processor.rescale_factor}")
    if crop_share and not window:  # ConvNeXt's own rule
        squash, side = side >= 384, side if side >= 384 else int(side / crop_share)
    from PIL import Image

    normal = processor.do_normalize
    return PixelSpec(
        size,
        tuple(processor.image_mean) if normal else (0.0, 0.0, 0.0),
        tuple(processor.image_std) if normal else (1.0, 1.0, 1.0),
        Image.Resampling(processor.resample).name.lower(),
        "squash" if squash else "shortest",
        side / size,
    )


def _size_options(vision: nn.Module, size: int) -> dict[str, Any]:
    """Ask for interpolated position embeddings where the input size is not the model's own."""
    own = getattr(vision.config, "image_size", None)
    takes = "interpolate_pos_encoding" in inspect.signature(vision.forward).parameters
    return {"interpolate_pos_encoding": True} if takes and own not in (None, size, (size, size), [size, size]) else {}


def _without_foreign_drop_path(model: nn.Module) -> nn.Module:
    """transformers has a DropPath class per architecture; timm's equal one is the one that the trainer knows."""
    from timm.layers import DropPath

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("DropPath") and not isinstance(child, DropPath):
                setattr(parent, name, DropPath(float(getattr(child, "drop_prob", 0.0) or 0.0)))
    return model


def _probe(name: str, encoder: nn.Module, size: int) -> int:
    """Width of the features, by a pass without data; parameters that they do not depend on are frozen.

    DDP cannot train with parameters that get no gradient (DINOv2's mask token, for instance).

    Raises:
        ValueError: the encoder cannot take pictures of this size.
    """
    parameters = {key: p.detach().to("meta").requires_grad_() for key, p in encoder.named_parameters()}
    buffers = {key: buffer.to("meta") for key, buffer in encoder.named_buffers()}
    pixels = torch.zeros(1, 3, size, size, device="meta")
    try:
        features = functional_call(encoder, {**parameters, **buffers}, (pixels,))
        gradients = torch.autograd.grad(features.sum(), list(parameters.values()), allow_unused=True)
    except (ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"backbone hf:{name} cannot encode pictures of {size} x {size} pixels: {error}") from error
    for (_, parameter), gradient in zip(encoder.named_parameters(), gradients, strict=True):
        parameter.requires_grad_(gradient is not None)
    return features.shape[1]


def _tokenizer(name: str, config: Any, request: Request) -> tuple[Any, str]:
    """The tokenizer and how it is restored: "clip", out of open_clip, or "files", beside the saved model."""
    import open_clip

    stored = request.architecture.get("tokenizer")
    if stored != "clip":
        found = load_tokenizer(request.tokenizer if stored else name, f"hf:{name}")
        is_clip = config.model_type == "clip" and config.text_config.vocab_size == CLIP_VOCABULARY
        if stored or not (isinstance(found, MissingTokenizer) and is_clip):
            return found, "files"
    return open_clip.SimpleTokenizer(context_length=config.text_config.max_position_embeddings), "clip"
