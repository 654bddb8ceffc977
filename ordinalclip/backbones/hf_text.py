"""transformers: text encoders alone (BERT, RoBERTa, XLM-R, MPNet, T5, ...), for `model.text`."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ordinalclip.backbones.base import Backbone, Request, fetching
from ordinalclip.files import check_no_code, read_json, read_json_object
from ordinalclip.images import PixelSpec
from ordinalclip.progress import without_bars
from ordinalclip.text_encoders import EncoderTower, longest_text
from ordinalclip.tokenization import TextPooling, load_tokenizer
from ordinalclip.weights import read_weights

logger = logging.getLogger(__name__)
ENCODERS = (  # model types whose padding, positions and embeddings the tests have looked at
    "albert", "bert", "camembert", "data2vec-text", "deberta", "deberta-v2", "distilbert", "electra", "ernie",
    "eurobert", "gte", "m2m_100", "megatron-bert", "modernbert", "mpnet", "mt5", "nomic_bert", "rembert", "roberta",
    "roberta-prelayernorm", "roformer", "t5", "umt5", "xlm-roberta", "xlm-roberta-xl",
)  # fmt: skip
MODES: dict[str, TextPooling] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
}
KNOWN_MODULES = ("Transformer", "Pooling", "Dense", "Normalize")
ACTIVATIONS = {"Identity": nn.Identity, "Tanh": nn.Tanh, "ReLU": nn.ReLU, "GELU": nn.GELU}  # of dense layers
NO_PIXELS = PixelSpec(1, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def load(name: str, config: Any, request: Request) -> Backbone:
    """`hf:NAME` whose model is a text encoder: no image encoder, and the text tower with its published pooling.

    Of a sequence-to-sequence model (T5, NLLB) it is the encoder.

    Args:
        config: the transformers configuration of NAME, or the one that is rebuilt.

    Raises:
        ValueError: a pooler is asked for that the weights lack.
    """
    stored, has_pooler = request.architecture, True
    if stored or not request.load_weights:
        model: Any = model_class(config).from_config(config, dtype=torch.float32)
    else:
        model, has_pooler = with_weights(name, config)
    model = model.encoder if hasattr(model, "shared") else model
    tokenizer = load_tokenizer(request.tokenizer if stored else name, f"hf:{name}")
    architecture = stored or {
        "config": {key: value for key, value in config.to_dict().items() if key != "_name_or_path"},
        "pooling": pooling_of(name, request),
        "dense": published_layers(name, config.hidden_size),
        "context_length": longest_text(model, tokenizer),
        "tokenizer": "files",
    }
    if architecture["pooling"] != "pooler":
        model.pooler = None
    elif not has_pooler:
        raise ValueError(f"backbone hf:{name}: text_pooling is pooler, but the weights hold none")
    layers = [dense_layer(layer) for layer in architecture["dense"]]
    if not stored and request.load_weights:
        for layer, module in zip(architecture["dense"], layers, strict=True):
            load_dense(name, layer["path"], module)
    projection = nn.Sequential(*layers) if layers else None
    tower = EncoderTower(model, architecture["pooling"], projection, tokenizer, architecture["context_length"])
    return Backbone(nn.Identity(), 0, NO_PIXELS, tower, architecture=architecture)


def pooling_of(name: str, request: Request) -> TextPooling:
    """The published pooling, else the one that is asked for, else the mean with a warning."""
    if (pooling := published_pooling(name) or request.text_pooling) is not None:
        return pooling
    logger.warning(
        "hf:%s does not say how its tokens are pooled (1_Pooling/config.json): the mean is taken; "
        "model.text_pooling says otherwise",
        name,
    )
    return "mean"


def model_class(config: Any) -> Any:
    """transformers' Auto class for a configuration: without the decoder of a T5."""
    from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING, AutoModel, AutoModelForTextEncoding

    return AutoModelForTextEncoding if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel


def with_weights(name: str, config: Any) -> tuple[Any, bool]:
    """The transformers model of a folder or hub name, in float32, and whether the file has its pooler, else random.

    Raises:
        ValueError: weights that are pickled, cannot be had, or lack more than a pooler.
    """
    here = Path(name).is_dir()
    if here and not list(Path(name).glob("*.safetensors")):
        raise ValueError(f"backbone hf:{name}: the folder holds no .safetensors; pickled weights are not read")
    with fetching(f"hf:{name}"), without_bars() if here else nullcontext():
        model, found = model_class(config).from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, use_safetensors=True, trust_remote_code=False
        )
    missing = sorted(found["missing_keys"])
    if others := [key for key in missing if not key.startswith("pooler.")]:
        raise ValueError(f"backbone hf:{name}: the weights lack {len(others)} tensors, e.g. {others[0]}")
    return model, not missing


def published_pooling(name: str) -> TextPooling | None:
    """How a text encoder's tokens were pooled in its training, as sentence-transformers notes it beside the weights.

    Raises:
        ValueError: a note of something else than one mean, class token or maximum.
    """
    pooling = _beside(name, "1_Pooling/config.json")
    if pooling is None or not published_modules(name):
        return None
    content = read_json_object(pooling)
    on = [key for key, value in content.items() if key.startswith("pooling_mode") and value is True]
    if isinstance(mode := content.get("pooling_mode"), str):  # as newer versions write it
        on = [key for key in MODES if key.startswith(f"pooling_mode_{mode}_")] or [mode]
    if len(on) != 1 or on[0] not in MODES:
        raise ValueError(f"{pooling}: pools by {', '.join(on) or mode}; followed are {', '.join(MODES)}, one of them")
    return MODES[on[0]]


def published_modules(name: str) -> list[tuple[str, str]]:
    """What a sentence encoder does, in its order: kinds of modules and their folders; nothing where it is not said.

    Raises:
        ValueError: kinds that are not known, or another order than that of `KNOWN_MODULES`.
    """
    file = _beside(name, "modules.json")
    if file is None:
        return []
    modules = [(str(each.get("type", "")).rpartition(".")[2], str(each.get("path", ""))) for each in read_json(file)]
    kinds, known = [kind for kind, _ in modules], ", ".join(KNOWN_MODULES)
    if foreign := [kind for kind in kinds if kind not in KNOWN_MODULES]:
        raise ValueError(f"backbone hf:{name}: modules.json names {', '.join(foreign)}; followed are {known}")
    if kinds != sorted(kinds, key=KNOWN_MODULES.index):
        raise ValueError(f"backbone hf:{name}: modules.json has {', '.join(kinds)}; followed is the order {known}")
    return modules


def published_layers(name: str, width: int) -> list[dict[str, Any]]:
    """The dense layers after the pooling, as sentence-transformers notes them (LaBSE, sentence-T5): see `dense_layer`.

    Args:
        width: of the pooled vector.

    Raises:
        ValueError: one whose configuration is missing, says what is not known, or wants another width.
    """
    layers = []
    for kind, path in published_modules(name):
        if kind == "Dense":
            file = _beside(name, f"{path}/config.json")
            content = read_json_object(file) if file else {}
            activation = str(content.get("activation_function", "torch.nn.modules.activation.Tanh")).rpartition(".")[2]
            sizes = [content.get(key) for key in ("in_features", "out_features")]
            if activation not in ACTIVATIONS or sizes[0] != width or not isinstance(sizes[1], int) or sizes[1] < 1:
                raise ValueError(
                    f"backbone hf:{name}: {path}/config.json must name in_features ({width}), out_features and an "
                    f"activation_function of {', '.join(ACTIVATIONS)}, got {content}"
                )
            width = sizes[1]
            bias = bool(content.get("bias", True))
            layers.append({"path": path, "sizes": sizes, "bias": bias, "activation": activation})
    return layers


def dense_layer(layer: dict[str, Any]) -> nn.Sequential:
    """A linear layer and its activation, with random weights.

    Args:
        layer: "sizes" of its input and output, "bias", "activation", and the "path" of its weights.
    """
    before, after = layer["sizes"]
    return nn.Sequential(nn.Linear(before, after, bias=layer["bias"]), ACTIVATIONS[layer["activation"]]())


def load_dense(name: str, path: str, module: nn.Module) -> None:
    """The weights of a dense layer, from the folder beside those of the encoder.

    Raises:
        ValueError: there are none but pickled ones, or they do not fit.
    """
    file = _beside(name, f"{path}/model.safetensors")
    if file is None:
        raise ValueError(f"backbone hf:{name}: {path} holds no model.safetensors; pickled weights are not read")
    state = {key.replace("linear.", "0."): tensor.float() for key, tensor in read_weights(file).items()}
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{file}: does not fit its config.json: {' '.join(str(error).split())}") from error


def _beside(name: str, file: str) -> Path | None:
    """A file of a folder or of a model on the hub; None: it has none."""
    if Path(name).is_dir():
        check_no_code(Path(name))
        return Path(name) / file if (Path(name) / file).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        with fetching(f"hf:{name}"):
            return Path(hf_hub_download(name, file))
    except ValueError as error:
        if isinstance(error.__cause__, EntryNotFoundError):
            return None
        raise
