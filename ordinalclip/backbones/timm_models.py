"""timm: image towers alone (VGG, ResNet, Swin, ConvNeXt, ...), pooled and without classifier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ordinalclip.backbones.base import Backbone, PixelSpec, Request, near_matches
from ordinalclip.weights import read_weights


def load(name: str, request: Request) -> Backbone:
    """`timm:NAME` (random weights), `timm:NAME/pretrained` or `timm:NAME/FILE`."""
    import timm

    name, _, pretrained = name.partition("/")
    if not timm.is_model(name):
        raise ValueError(f"backbone timm:{name} is unknown; {near_matches(name, timm.list_models())}")
    published: Any = timm.get_pretrained_cfg(name)
    data = timm.data.resolve_data_config(published.to_dict())
    options: dict[str, Any] = {}
    if pretrained and request.load_weights and not request.architecture:
        options["pretrained"] = True
        if Path(pretrained).is_file():
            weights = read_weights(pretrained)
            options["pretrained_cfg_overlay"] = {"state_dict": weights.get("state_dict", weights)}
        elif pretrained != "pretrained":
            raise ValueError(
                f"backbone timm:{name}/{pretrained}: no such file; write timm:{name} (random), timm:{name}/pretrained "
                f"or timm:{name}/FILE"
            )
    image_size = request.image_size or request.architecture.get("image_size")
    size = image_size or data["input_size"][1]
    if image_size is not None and published.fixed_input_size:  # its position embeddings depend on the size
        options["img_size"] = size
    try:
        encoder: Any = timm.create_model(name, num_classes=0, **options)
    except (AssertionError, TypeError, RuntimeError) as error:
        what = f"{pretrained}, input size {size}" if pretrained else f"input size {size}"
        raise ValueError(f"backbone timm:{name} cannot be built with {what}: {error}") from error
    pixels = PixelSpec(
        size,
        tuple(data["mean"]),
        tuple(data["std"]),
        data["interpolation"],
        "squash" if data["crop_mode"] == "squash" else "shortest",
        1 / data["crop_pct"],
    )
    output_dim = getattr(encoder, "head_hidden_size", None) or encoder.num_features
    return Backbone(encoder, output_dim, pixels, architecture={"image_size": image_size} if image_size else {})
