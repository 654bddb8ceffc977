"""Original checkpoints: OrdinalCLIP's Lightning files and OpenAI's CLIP files, turned into what this package loads.

Which files, and what has to be said of them: `ordinalclip convert --help`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ordinalclip.backbones import load_backbone
from ordinalclip.backbones.open_clip_models import CONFIG_FILE, WEIGHT_FILES
from ordinalclip.config import RunConfig
from ordinalclip.files import content_digest, read_json_object, whole, write_json
from ordinalclip.images import PixelSpec
from ordinalclip.model import TOKENIZER_FOLDER, WEIGHTS, Form, OrdinalModel
from ordinalclip.processing import NAME as PROCESSOR_FILE
from ordinalclip.ranks import Ranks
from ordinalclip.weights import fault, read_weights

# How the published configuration (configs/default.yaml of xk-huang/OrdinalCLIP) prepares its pictures.
PUBLISHED_PIXELS = PixelSpec(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear", "squash", 256 / 224)
MARK = "converted.json"  # says which weights were written, so that no others are replaced
MODEL_FILES = ("config.json", WEIGHTS, PROCESSOR_FILE, TOKENIZER_FOLDER)
LEARNER, TEXT = "module.prompt_learner.", "module.text_encoder."
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")  # numbers that OpenAI keeps among the weights


def convert(
    file: str | Path,
    out: str | Path,
    config: RunConfig | None = None,
    form: Form = "deployed",
    overwrite: bool = False,
) -> str:
    """Convert an original checkpoint (module docstring); only tensors are read, nothing in it is executed.

    Args:
        file: OpenAI's CLIP (TorchScript archive or state dict) or OrdinalCLIP's Lightning checkpoint.
        out: folder to write.
        config: for OrdinalCLIP: `model`, `ranks`, `method` and `head` of the run; the rest is not looked at.
        form: for OrdinalCLIP: see `OrdinalModel.save_pretrained`.
        overwrite: replace a model in `out` that is not, or no longer, the result of a conversion.

    Returns:
        a line that says what was written and how to use it.

    Raises:
        FileNotFoundError: no such file; FileExistsError: `out` holds something else than an earlier result of the
            same kind; ValueError: another layout, one that does not fit the configuration, or weights that are not
            finite. After an error `out` is as it was.
    """
    content = read_weights(file)
    state = content.get("state_dict", content)
    if not isinstance(state, dict) or not state or not all(isinstance(name, str) for name in state):
        raise ValueError(f"{file}: holds no tensors by name")
    if why := fault({name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}, masks=True):
        raise ValueError(f"{file}: {why}")
    if LEARNER + "context_embeds" in state:
        _check_replaceable(Path(out), MODEL_FILES, overwrite)
        with _named(file):
            model = read_ordinalclip(file, state, config or RunConfig())
        with whole(_with_parent(Path(out))) as aside:
            model.save_pretrained(aside, form=form)
            write_json(aside / MARK, {"from": Path(file).name, "weights": content_digest([aside / WEIGHTS])})
        return f"{form} OrdinalModel in {out}: ordinalclip predict IMAGE --model {out}"
    if {"visual.conv1.weight", "text_projection", "token_embedding.weight", "ln_final.weight"} <= state.keys():
        _check_replaceable(Path(out), (CONFIG_FILE, WEIGHT_FILES[0]), overwrite)
        with _named(file), whole(_with_parent(Path(out))) as aside:
            write_open_clip(file, state, aside)
            weights = content_digest([aside / WEIGHT_FILES[0]])
            write_json(aside / MARK, {"from": Path(file).name, "weights": weights})
        return f"open_clip folder in {out}: model.backbone=open_clip:{out}"
    if "module.last_project.weight" in state:
        raise ValueError(f"{file}: the repository's Baseline, a linear classifier without prompts, is not converted")
    raise ValueError(
        f"{file}: neither OrdinalCLIP's layout ({LEARNER}context_embeds, ...) nor OpenAI's CLIP (visual.*, "
        f"text_projection, token_embedding.weight, ...); it begins with {', '.join(map(str, list(state)[:3]))}"
    )


@contextmanager
def _named(file: str | Path) -> Iterator[None]:
    """Tensors of other shapes or kinds than the layout's are an error of the file."""
    try:
        yield
    except (AttributeError, TypeError, IndexError, KeyError, ZeroDivisionError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{file}: its tensors are not of the layout's shapes ({type(error).__name__}: {reason})"
        ) from error


def _check_replaceable(out: Path, own: tuple[str, ...], overwrite: bool) -> None:
    """What is there is nothing, an empty folder, or an earlier result, whose weights are as they were written; or files
    of the same names that are to be overwritten.

    Raises:
        FileExistsError: it is something else.
    """
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir():
        raise FileExistsError(f"{out} is a file; name another folder to write to")
    inside = {path.name for path in out.iterdir()}
    if inside and (own[0] not in inside or inside - {*own, MARK}):
        other = min(inside - {*own, MARK}, default=f"no {own[0]}")
        raise FileExistsError(
            f"{out} holds something else than an earlier result of this conversion ({other}); name another folder"
        )
    if inside and not overwrite and not _is_as_written(out, own):
        raise FileExistsError(
            f"{out} holds a model that is not, or no longer, what was converted; --overwrite replaces it, another "
            "folder leaves it alone"
        )


def _is_as_written(out: Path, own: tuple[str, ...]) -> bool:
    weights = next((out / name for name in (WEIGHTS, WEIGHT_FILES[0]) if name in own and (out / name).is_file()), None)
    if weights is None or not (out / MARK).is_file():
        return False
    return read_json_object(out / MARK).get("weights") == content_digest([weights])


def _with_parent(out: Path) -> Path:
    """The folder by its real name, so that a link stays; its parent is made."""
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    return out


def write_open_clip(file: str | Path, state: Mapping[str, Tensor], folder: Path) -> None:
    """OpenAI's CLIP as a folder in the layout of open_clip's `save_for_hf`; weights keep their dtype.

    The architecture follows from the shapes; heads are 64 wide in all of OpenAI's models.
    """
    model_cfg = _openai_architecture(state)
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    pixels = {"mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD}
    content = {"model_cfg": model_cfg, "preprocess_cfg": {**pixels, "interpolation": "bicubic"}}
    masks = [key for key in state if key.rpartition(".")[2] == "attn_mask"]
    weights = {key: tensor.contiguous() for key, tensor in state.items() if key not in (*NOT_WEIGHTS, *masks)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    save_file(weights, folder / WEIGHT_FILES[0], metadata={"format": "pt"})
    try:
        load_backbone(f"open_clip:{folder}")
    except ValueError as error:
        raise ValueError(f"{file}: not a CLIP as OpenAI published them ({error})") from error


def _openai_architecture(state: Mapping[str, Tensor]) -> dict[str, Any]:
    width, embed_dim = state["text_projection"].shape
    conv = state["visual.conv1.weight"]
    if "visual.proj" in state:
        patch, grid = conv.shape[-1], math.isqrt(len(state["visual.positional_embedding"]) - 1)
        layers: Any = _count(state, "visual.transformer.resblocks.")
        vision = {"layers": layers, "width": conv.shape[0], "patch_size": patch, "image_size": patch * grid}
    else:
        grid = math.isqrt(len(state["visual.attnpool.positional_embedding"]) - 1)
        layers = [_count(state, f"visual.layer{stage}.") for stage in (1, 2, 3, 4)]
        vision = {"layers": layers, "width": 2 * conv.shape[0], "image_size": 32 * grid}
    text = {
        "context_length": len(state["positional_embedding"]),
        "vocab_size": len(state["token_embedding.weight"]),
        "width": width,
        "heads": width // 64,
        "layers": _count(state, "transformer.resblocks."),
    }
    return {"embed_dim": embed_dim, "vision_cfg": vision, "text_cfg": text, "quick_gelu": True}


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({key.removeprefix(prefix).partition(".")[0] for key in state if key.startswith(prefix)})


def read_ordinalclip(file: str | Path, state: Mapping[str, Tensor], config: RunConfig) -> OrdinalModel:
    """The model of a Lightning checkpoint of xk-huang/OrdinalCLIP, as an `OrdinalModel`.

    Args:
        state: its `state_dict`: module.image_encoder.*, module.text_encoder.*, module.prompt_learner.context_embeds
            (C, W) or (R, C, W), module.prompt_learner.rank_embeds (K or R, T, W), module.logit_scale.
        config: `model`, `ranks`, `method` ("ordinalclip", or "coop" for the plain prompt learner) and `head`.

    Raises:
        ValueError: what the checkpoint holds does not fit the configuration.
    """
    for key in (f"{LEARNER}rank_embeds", f"{TEXT}positional_embedding", f"{TEXT}text_projection", "module.logit_scale"):
        if key not in state:
            raise ValueError(f"{file}: lacks {key}, which OrdinalCLIP's checkpoints hold")
    context, rank = state[f"{LEARNER}context_embeds"], state[f"{LEARNER}rank_embeds"]
    ranks = config.ranks.build(range(len(rank))) if config.method == "coop" else _ranks(file, config)
    head = {
        **config.head,
        "prompt": None,
        "num_context": context.shape[-2],
        "tokens_per_rank": rank.shape[1],
        "rank_specific_context": context.ndim == 3,
        "centred": False,  # the published code compares with the prototypes as they are, projected or not
    }
    if config.method == "ordinalclip":
        head |= {"num_base_ranks": len(rank), "init_from_names": False}
    elif config.method == "coop":
        head["init_from_names"] = config.head.get("init_from_names", False)
    else:
        raise ValueError(f"{file}: holds learned prompts; method must be ordinalclip or coop, got {config.method!r}")
    model = OrdinalModel.build(
        config.model.backbone,
        ranks,
        config.method,
        head,
        text=config.model.text,
        load_weights=config.model.load_weights,
        text_pooling=config.model.text_pooling,
        decoding=config.evaluation.decoding,
    )
    size = model.config.pixel_spec.size
    model.config.pixels = asdict(replace(PUBLISHED_PIXELS, size=size))
    encoder, projection = _image_encoder(file, _below(state, "module.image_encoder."))
    if model.config.shared_space == (projection is not None):
        found = "a CLIP" if projection is None else "a torchvision model"
        raise ValueError(
            f"{file}: the image encoder is {found}, model.backbone={config.model.backbone} is not; "
            "set model.backbone to what it is (open_clip:..., or timm:vgg16 with model.text=open_clip:...)"
        )
    text = _below(state, TEXT)
    parts = {
        "encoder.tower": encoder,
        "head.text.blocks": _below(text, "transformer."),
        "head.text.final_norm": _below(text, "ln_final."),
        "head.text": {
            "positional_embedding": text["positional_embedding"],
            "projection": text["text_projection"],
        },
        "head.learner": {"context": context, "rank_embeddings": rank},
        "head": {"logit_scale": state["module.logit_scale"]},
    }
    if projection is not None:  # the last layer of the original has no bias
        parts["head.projection"] = {"weight": projection, "bias": torch.zeros(len(projection))}
    for place, tensors in parts.items():
        _fill(file, model, place, tensors)
    return model.eval()


def _ranks(file: str | Path, config: RunConfig) -> Ranks:
    if config.ranks.values is None and config.ranks.num is None:
        raise ValueError(
            f"{file}: does not say its ranks; set ranks.values, or ranks.low, ranks.high and ranks.num "
            "(or method=coop for the plain prompt learner)"
        )
    return config.ranks.build(())


def _image_encoder(file: str | Path, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor | None]:
    """The weights for our tower, and the last linear layer of torchvision's models, which projects to CLIP's space.

    timm writes VGG's first two linear layers as convolutions on the 7 x 7 map.
    """
    if "classifier.1.weight" in state:
        raise ValueError(f"{file}: the image encoder is an AlexNet, which timm does not have; not converted")
    if "classifier.6.weight" in state:
        renamed = {key: tensor for key, tensor in state.items() if key.startswith("features.")}
        for old, new, shape in (("0", "fc1", (-1, 512, 7, 7)), ("3", "fc2", (-1, 4096, 1, 1))):
            renamed[f"pre_logits.{new}.weight"] = state[f"classifier.{old}.weight"].reshape(shape)
            renamed[f"pre_logits.{new}.bias"] = state[f"classifier.{old}.bias"]
        return renamed, state["classifier.6.weight"]
    if "fc.weight" in state:
        return {key: tensor for key, tensor in state.items() if not key.startswith("fc.")}, state["fc.weight"]
    return state, None


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}


def _fill(file: str | Path, model: OrdinalModel, place: str, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors to the module at `place`; whole modules must be given in full.

    Raises:
        ValueError: names or shapes that differ.
    """
    own = _below(model.state_dict(keep_vars=True), f"{place}.")
    whole = place not in ("head", "head.text", "head.learner")
    lacking = sorted(own.keys() - tensors.keys()) if whole else []
    if wrong := lacking or sorted(tensors.keys() - own.keys()):
        what = "lacks" if lacking else "has a foreign"
        raise ValueError(f"{file}: {place} {what} {wrong[0]} ({len(wrong)} in all); is model.backbone the right one?")
    for name, tensor in tensors.items():
        if own[name].shape != tensor.shape:
            raise ValueError(
                f"{file}: {place}.{name} is {tuple(tensor.shape)}, the configured model has {tuple(own[name].shape)}"
            )
        own[name].data.copy_(tensor)
