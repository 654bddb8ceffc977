"""timm: image towers alone (VGG, ResNet, Swin, ConvNeXt, ...), pooled and without classifier."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ordinalclip.backbones.base import Backbone, Pooling, Request, fetching
from ordinalclip.files import read_json_object
from ordinalclip.images import PixelSpec
from ordinalclip.suggestions import near_matches
from ordinalclip.weights import check_floats, read_weights


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
        with fetching(f"timm:{name}/{pretrained}") if options["pretrained"] else nullcontext():
            encoder: Any = timm.create_model(name, num_classes=0, **options)
    except (AssertionError, TypeError) as error:
        raise ValueError(f"backbone timm:{name} cannot be built for input size {size}: {error}") from error
    if file is not None:
        _load_file(encoder, file, name, published)
    pixels = PixelSpec(
        size,
        tuple(data["mean"]),
        tuple(data["std"]),
        data["interpolation"],
        "squash" if data["crop_mode"] == "squash" else "shortest",
        1 / data["crop_pct"],
    )
    output_dim = getattr(encoder, "head_hidden_size", None) or encoder.num_features
    architecture = {"image_size": image_size} if image_size else {}
    return Backbone(encoder, output_dim, pixels, pooling=pooling_of(encoder), architecture=architecture)


def pooling_of(model: Any) -> Pooling:
    """How a timm model pools the outputs of its layers."""
    prefix = getattr(model, "num_prefix_tokens", 0)
    return Pooling(
        class_token=prefix > 0 and getattr(model, "global_pool", "") == "token",
        num_prefix_tokens=0 if getattr(model, "pool_include_prefix", False) else prefix,
        channels_last=getattr(model, "output_fmt", "NCHW") == "NHWC",
    )


def _load_file(encoder: Any, file: Path, name: str, published: Any) -> None:
    """Weights of the same timm model, with or without its classifier."""
    content = read_weights(file)
    _check_names(file, name, published, content)
    state = content.get("state_dict", content)
    check_floats(file, state)
    classifier = published.classifier
    drop = tuple(f"{layer}." for layer in ([classifier] if isinstance(classifier, str) else classifier))
    try:
        encoder.load_state_dict({key: tensor for key, tensor in state.items() if not key.startswith(drop)})
    except (RuntimeError, AttributeError) as error:  # torch lists every tensor that does not fit
        raise ValueError(f"{file}: the weights do not fit the model: {' '.join(str(error).split())[:300]}") from error


def _check_names(file: Path, name: str, published: Any, content: dict[str, Any]) -> None:
    """Weights of a sibling may fit, but want other pixels: what says whose they are must not contradict the spec.

    Asked are the names of the file and of its folder, the metadata of safetensors, the architecture that timm notes in
    its checkpoints and in the config.json beside them. A file that says nothing is taken at the spec's word.

    Raises:
        ValueError: they are of another model, or, by config.json, of other pixels.
    """
    own = name.partition(".")[0]
    claims = {
        "its name": "" if file.name in _published_files(own) else _named_model(file.stem),
        "its folder's name": _folder_model(file),
    }
    if isinstance(content.get("arch"), str):
        claims["its entry arch"] = content["arch"]
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
        claims |= {f"its metadata ({key})": metadata.get(key, "") for key in ("architecture", "arch", "model_name")}
    sidecar = file.parent / "config.json"
    beside = read_json_object(sidecar) if sidecar.is_file() else {}
    if isinstance(beside.get("architecture"), str):
        claims[f"{sidecar.name} beside it"] = beside["architecture"]
    for who, model in claims.items():
        if model and model.partition(".")[0] != own:
            raise ValueError(
                f"{file} is of the timm model {model} by {who}, the backbone is timm:{name}, whose pixels may be "
                f"others: write timm:{model}/{file}, or rename what is named wrongly"
            )
    pixels = beside.get("pretrained_cfg") if "architecture" in beside else None
    for key in ("mean", "std", "interpolation", "crop_pct"):
        said, assumed = (pixels or {}).get(key), getattr(published, key, None)
        if said is not None and assumed is not None and _as_list(said) != _as_list(assumed):
            tag = (pixels or {}).get("tag") or "TAG"
            raise ValueError(
                f"{sidecar} says {key} {said} of {file.name}, timm:{name} means {assumed}: "
                f"write timm:{own}.{tag}/{file}"
            )


def _as_list(value: Any) -> Any:
    """JSON has no tuples."""
    return list(value) if isinstance(value, tuple) else value


def _named_model(stem: str) -> str:
    """The timm model that a file's name begins with, the longest one; "" if there is none.

    >>> _named_model("efficientnet_lite0_ra-37913777"), _named_model("tf_efficientnet_lite0"), _named_model("best")
    ('efficientnet_lite0', 'tf_efficientnet_lite0', '')
    """
    import timm

    parts = re.split(r"([_.-])", stem)
    known = set(timm.list_models())
    beginnings = ("".join(parts[:end]) for end in range(len(parts), 0, -2))
    return next((beginning for beginning in beginnings if beginning in known), "")


def _published_files(model: str) -> set[str]:
    """Names of the files that a timm model's weights were published under; a few begin with another model's."""
    import timm

    tags = (timm.get_pretrained_cfg(name) for name in timm.list_pretrained(f"{model}.*"))
    return {Path(tag.url).name for tag in tags if tag is not None and isinstance(tag.url, str)}


def _folder_model(file: Path) -> str:
    """The timm model whose name, with or without a tag, a file's folder has; in a hub's cache two above it."""
    import timm

    above = file.resolve().parents
    names = [
        above[0].name,
        *([above[2].name.rpartition("--")[2]] if len(above) > 2 and above[1].name == "snapshots" else []),
    ]
    return next((name for name in names if name.partition(".")[0] in timm.list_models()), "")
