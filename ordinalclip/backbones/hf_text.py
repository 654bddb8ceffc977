"""transformers: text encoders alone (BERT, RoBERTa, XLM-R, MPNet, T5, ...), for `model.text`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ordinalclip.backbones.base import Backbone, Request, fetching
from ordinalclip.files import check_no_code, read_json, read_json_object
from ordinalclip.images import PixelSpec
from ordinalclip.text_encoders import EncoderTower, longest_text
from ordinalclip.tokenization import TextPooling, load_tokenizer

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
KNOWN_MODULES = ("Transformer", "Pooling", "Normalize")
NO_PIXELS = PixelSpec(1, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def load(name: str, config: Any, request: Request) -> Backbone:
    """`hf:NAME` whose model is a text encoder: no image encoder, and the text tower with its published pooling.

    Of a sequence-to-sequence model (T5, NLLB) it is the encoder.

    Args:
        config: the transformers configuration of NAME, or the one that is rebuilt.

    Raises:
        ValueError: a pooler is asked for that the weights lack.
    """
    stored, known_pooler = request.architecture, True
    if stored or not request.load_weights:
        model: Any = model_class(config).from_config(config, dtype=torch.float32)
    else:
        model, known_pooler = with_weights(name, config)
    pooling = stored["pooling"] if stored else published_pooling(name) or request.text_pooling
    if pooling is None:
        pooling = "mean"
        logger.warning(
            "hf:%s does not say how its tokens are pooled (1_Pooling/config.json): the mean is taken; "
            "model.text_pooling says otherwise",
            name,
        )
    model = model.encoder if hasattr(model, "shared") else model
    if pooling != "pooler":
        model.pooler = None
    elif not known_pooler:
        raise ValueError(f"backbone hf:{name}: text_pooling is pooler, but the weights hold none")
    tokenizer = load_tokenizer(request.tokenizer if stored else name, f"hf:{name}")
    length = stored["context_length"] if stored else longest_text(model, tokenizer)
    tower = EncoderTower(model, pooling, None, tokenizer, length)
    fields = {key: value for key, value in config.to_dict().items() if key != "_name_or_path"}
    architecture = {"config": fields, "pooling": pooling, "context_length": length, "tokenizer": "files"}
    return Backbone(nn.Identity(), 0, NO_PIXELS, tower, architecture=architecture)


def model_class(config: Any) -> Any:
    """transformers' Auto class for a configuration: without the decoder of a T5."""
    from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING, AutoModel, AutoModelForTextEncoding

    return AutoModelForTextEncoding if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel


def with_weights(name: str, config: Any) -> tuple[Any, bool]:
    """The transformers model of a folder or hub name, in float32, and whether the file has its pooler, else random.

    Raises:
        ValueError: weights that are pickled, cannot be had, or lack more than a pooler.
    """
    if Path(name).is_dir() and not list(Path(name).glob("*.safetensors")):
        raise ValueError(f"backbone hf:{name}: the folder holds no .safetensors; pickled weights are not read")
    with fetching(f"hf:{name}"):
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
    modules, pooling = (_beside(name, file) for file in ("modules.json", "1_Pooling/config.json"))
    if modules is None or pooling is None:
        return None
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in read_json(modules)]
    if foreign := [kind for kind in kinds if kind not in KNOWN_MODULES]:
        known = ", ".join(KNOWN_MODULES)
        raise ValueError(f"backbone hf:{name}: modules.json names {', '.join(foreign)}; followed are {known}")
    content = read_json_object(pooling)
    on = [key for key, value in content.items() if key.startswith("pooling_mode") and value is True]
    if isinstance(mode := content.get("pooling_mode"), str):  # as newer versions write it
        on = [key for key in MODES if key.startswith(f"pooling_mode_{mode}_")] or [mode]
    if len(on) != 1 or on[0] not in MODES:
        raise ValueError(f"{pooling}: pools by {', '.join(on) or mode}; followed are {', '.join(MODES)}, one of them")
    return MODES[on[0]]


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
