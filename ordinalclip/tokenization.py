"""Tokenizers of text towers: open_clip's and transformers' behind the same few functions, saved and restored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ordinalclip.files import check_no_code

TextPooling = Literal["mean", "cls", "pooler", "max"]  # what a text encoder makes of its tokens


class MissingTokenizer:
    """Stands where a tokenizer could not be found: whoever wants to tokenize gets a ValueError with the reason."""

    def __init__(self, reason: str):
        self._reason = reason

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # copying and pickling ask for these
            raise AttributeError(name)
        raise ValueError(self._reason)


def load_tokenizer(source: str | Path | None, owner: str, **options: Any) -> Any:
    """The transformers tokenizer of a folder or hub name, or a `MissingTokenizer` that says why there is none.

    Args:
        source: folder or hub name; None where it is not known.
        owner: whose tokenizer it is, for the message.
        options: for `AutoTokenizer.from_pretrained`.

    Raises:
        ValueError: a folder that names code of its own.
    """
    from transformers import AutoTokenizer

    if source is None:
        return MissingTokenizer(
            f"text tower of {owner}: its tokenizer lies in the folder of the saved model; "
            "restore the model with OrdinalModel.from_pretrained(FOLDER)"
        )
    check_no_code(Path(source))
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False, **options)
    except (OSError, ValueError, ImportError, TypeError, AttributeError) as error:  # whatever the class behind raises
        why = str(error).strip().partition("\n")[0]
    else:
        if len(tokenizer) > len(tokenizer.all_special_ids):
            return tokenizer
        why = "no vocabulary there"  # transformers then gives an empty tokenizer without a word
    return MissingTokenizer(f"text tower of {owner}: no tokenizer could be loaded from {source} ({why})")


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the files of a transformers tokenizer; CLIP's own byte-pair encoding, part of open_clip, needs none."""
    if not isinstance(tokenizer, MissingTokenizer) and hasattr(inner(tokenizer), "save_pretrained"):
        inner(tokenizer).save_pretrained(folder)


def inner(tokenizer: Any) -> Any:
    """The transformers tokenizer inside open_clip's wrapper, or the tokenizer itself."""
    return getattr(tokenizer, "tokenizer", tokenizer)


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of the tokens of a text, without special tokens."""
    if hasattr(tokenizer, "sot_token_id"):  # open_clip's SimpleTokenizer
        return list(tokenizer.encode(text))
    if hasattr(tokenizer, "clean_fn"):  # open_clip's HFTokenizer; SigLIP's lower-cases and drops punctuation
        text = tokenizer.clean_fn(text)
    return list(inner(tokenizer)(text, add_special_tokens=False)["input_ids"])


def whole_text(tokenizer: Any, text: str) -> list[int]:
    """Ids of the tokens of a text with what the tokenizer puts around it; open_clip's HFTokenizer pads them."""
    if hasattr(tokenizer, "sot_token_id"):
        return [tokenizer.sot_token_id, *tokenizer.encode(text), tokenizer.eot_token_id]
    return tokenizer(text)[0].tolist() if hasattr(tokenizer, "clean_fn") else list(tokenizer(text)["input_ids"])


def words_of(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Each token as the piece of text that it stands for, as the vocabulary writes it."""
    if hasattr(tokenizer, "sot_token_id"):
        return [tokenizer.decoder[index].removesuffix("</w>") for index in ids]
    return [str(inner(tokenizer).convert_ids_to_tokens(int(index))) for index in ids]


def full_stop(tokenizer: Any) -> int:
    """Id of "."; looked up in the vocabulary where the tokenizer drops punctuation.

    Raises:
        ValueError: the vocabulary has no full stop.
    """
    if ids := token_ids(tokenizer, "."):
        return ids[-1]  # some tokenizers put a word mark before it
    token = inner(tokenizer).convert_tokens_to_ids(".")
    if token is None or token == inner(tokenizer).unk_token_id:
        raise ValueError(f"tokenizer {type(inner(tokenizer)).__name__} has no full stop, which every prompt ends with")
    return token


def start_token(tokenizer: Any) -> int | None:
    """Id of [SOT], [CLS] or a language (NLLB), whatever begins a text; None where nothing does (SigLIP, T5)."""
    if hasattr(tokenizer, "sot_token_id"):
        return int(tokenizer.sot_token_id)
    around = list(inner(tokenizer)("")["input_ids"])
    return around[0] if around and around[0] != end_token(inner(tokenizer)) else None


def end_token(tokenizer: Any) -> int:
    """Id of [EOT], the token that CLIP reads, or of [SEP].

    Raises:
        ValueError: the tokenizer names none.
    """
    if getattr(tokenizer, "strip_sep_token", False):  # CLIPA's [SEP], which open_clip's HFTokenizer replaces
        return 0
    token = getattr(tokenizer, "eot_token_id", None)
    for name in ("eos_token_id", "sep_token_id"):
        token = getattr(inner(tokenizer), name, None) if token is None else token
    if token is None:
        raise ValueError(f"tokenizer {type(inner(tokenizer)).__name__} names no end-of-text token")
    return int(token)


def padding_token(tokenizer: Any, default: int) -> int:
    """Id of the padding, which towers without a causal mask see; `default` for tokenizers that name none."""
    if isinstance(tokenizer, MissingTokenizer) or hasattr(tokenizer, "sot_token_id"):
        return default
    token = getattr(inner(tokenizer), "pad_token_id", None)
    return default if token is None else int(token)
