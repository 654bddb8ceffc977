"""timm: image towers alone (VGG, ResNet, Swin, ConvNeXt, ...), pooled and without classifier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ordinalclip.backbones.base import Backbone, Request
from ordinalclip.images import PixelSpec
from ordinalclip.suggestions import near_matches
from ordinalclip.weights import read_weights


def load(name: str, request: Request) -> Backbone:
    """`timm:NAME` (random weights), `timm:NAME/pretrained` or `timm:NAME/FILE`."""
    import timm

    name, _, pretrained = name.partition("/")
    if not timm.is_model(name):
        raise ValueError(f"backbone timm:{name} is unknown; {near_matches(name, timm.list_models())}")
    published: Any = timm.get_pretrained_cfg(name)
    data = timm.data.resolve_data_config(published.to_dict())
    wanted = bool(pretrained) and request.load_weights and not request.architecture
    file = Path(pretrained) if wanted and pretrained != "pretrained" else None
    if file is not None and not file.is_file():
        raise ValueError(
            f"backbone timm:{name}/{pretrained}: no such file; write timm:{name} (random), timm:{name}/pretrained "
            f"or timm:{name}/FILE"
        )
    image_size = request.image_size or request.architecture.get("image_size")
    size = image_size or data["input_size"][1]
    options: dict[str, Any] = {"pretrained": wanted and file is None}
    if image_size is not None and published.fixed_input_size:  # its position embeddings depend on the size
        options["img_size"] = size
    try:
        encoder: Any = timm.create_model(name, num_classes=0, **options)
    except (AssertionError, TypeError) as error:
        raise ValueError(f"backbone timm:{name} cannot be built for input size {size}: {error}") from error
    if file is not None:
        _load_file(encoder, file, published.classifier)
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


def _load_file(encoder: Any, file: Path, classifier: str | tuple[str, ...]) -> None:
    """Weights of the same timm model, with or without its classifier."""
    state = read_weights(file)
    state = state.get("state_dict", state)
    drop = tuple(f"{layer}." for layer in ([classifier] if isinstance(classifier, str) else classifier))
    try:
        encoder.load_state_dict({key: tensor for key, tensor in state.items() if not key.startswith(drop)})
    except RuntimeError as error:  # torch lists every tensor that does not fit
        raise ValueError(
            f"{file}: the weights do not fit the model: {' '.join(str(error).splitlines()[:2])}"
        ) from error
