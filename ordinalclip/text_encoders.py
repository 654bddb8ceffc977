"""Text towers of transformer encoders, in which every token sees every other: BERT, RoBERTa, XLM-R, MPNet, T5 and kin.

Nothing can be packed exactly where a token sees what comes after it. Prompts are encoded at their own length, those of
one length together, without padding: R x some 12 tokens, not R x 77.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ordinalclip.text import Prompts, TextTower
from ordinalclip.tokenization import MissingTokenizer, TextPooling, padding_token

ROWS = 64  # prompts whose activations are held at once with activation checkpointing


class EncoderTower(TextTower):
    """A frozen transformer encoder as a text tower.

    Args:
        model: a transformers encoder that takes `inputs_embeds`.
        pooling: what becomes of the tokens: their mean, the first one (cls), the model's own pooler, or the maximum.
        projection: of the pooled vector, as CLIPs with such a tower have one; None: none.
        tokenizer: its tokenizer.
        context_length: most tokens that it takes, those at start and end among them.

    Raises:
        ValueError: an unknown pooling, `pooler` of a model without one, or a tokenizer that puts more than one token
            before a text or after it.
    """

    def __init__(
        self, model: Any, pooling: TextPooling, projection: nn.Module | None, tokenizer: Any, context_length: int
    ):
        nn.Module.__init__(self)
        if pooling not in get_args(TextPooling):
            raise ValueError(f"pooling {pooling!r} is unknown; choices: {', '.join(get_args(TextPooling))}")
        if pooling == "pooler" and getattr(model, "pooler", None) is None:
            raise ValueError(f"{type(model).__name__} has no pooler; choose mean, cls or max")
        self.model, self.pooling, self.projection, self.tokenizer = model, pooling, projection, tokenizer
        self.causal, self.read_last, self.activation_checkpointing = False, False, False
        self.context_length, self.width = context_length, self.token_embedding.embedding_dim
        self.padding_token = padding_token(tokenizer, getattr(model.config, "pad_token_id", None) or 0)
        self.check_tokenizer()
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def from_open_clip(cls, model: nn.Module, tokenizer: Any = None) -> EncoderTower:
        """The text tower of an open_clip model that is an encoder of transformers, sharing its weights.

        Args:
            model: an `open_clip.CustomTextCLIP` whose `text` is an `HFTextEncoder`.
            tokenizer: its tokenizer.

        Raises:
            ValueError: no tokenizer or one that pads with something else than what the model masks, no projection where
                one is needed, or a pooling that is not supported.
        """
        text: Any = model.text
        if tokenizer is None:
            raise ValueError(f"{type(model).__name__}: its text encoder has a vocabulary of its own; give a tokenizer")
        pooler, own = type(text.pooler).__name__, getattr(text.transformer, "pooler", None) is not None
        pooling: dict[str, TextPooling] = {
            "MeanPooler": "mean",
            "ClsPooler": "pooler" if own else "cls",
            "ClsLastHiddenStatePooler": "cls",
        }
        if pooler not in pooling:
            raise ValueError(f"open_clip's text tower pools by {pooler}; supported are {', '.join(pooling)}")
        if not hasattr(text, "proj"):
            raise ValueError(
                f"open_clip's text tower has no projection to the width of its image tower, {text.output_dim}: "
                "hf_proj_type must be linear or mlp"
            )
        length = min(longest_text(text.transformer, tokenizer), getattr(tokenizer, "context_length", None) or 1 << 30)
        tower, masked = cls(text.transformer, pooling[pooler], text.proj, tokenizer, length), text.config.pad_token_id
        if not isinstance(tokenizer, MissingTokenizer) and masked in (tower.start_token, tower.end_token):
            raise ValueError(f"open_clip's text tower masks token {masked} as padding, which stands around every text")
        if tower.padding_token != masked:
            raise ValueError(
                f"open_clip's text tower masks token {masked}, its tokenizer pads with {tower.padding_token}"
            )
        return tower

    @property
    def token_embedding(self) -> nn.Embedding:  # type: ignore[override]
        """Of the words."""
        return self.model.get_input_embeddings()

    @property
    def output_dim(self) -> int:
        """D, the width of the text features."""
        layers = self.projection.modules() if isinstance(self.projection, nn.Module) else ()
        linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
        return linear[-1].out_features if linear else self.model.config.hidden_size

    def forward(self, prompts: Prompts | Sequence[str]) -> Tensor:
        if not isinstance(prompts, Prompts):
            prompts = self.prompts(prompts)
        dtype = self.token_embedding.weight.dtype
        prefix, suffix, lengths = prompts.prefix.to(dtype), prompts.suffix.to(dtype), prompts.lengths
        longest = len(prefix) + int(lengths.max())
        if longest > self.context_length:
            raise ValueError(f"a prompt has {longest} tokens; this text tower takes at most {self.context_length}")
        features, order = [], []
        for length in sorted(set(lengths.tolist())):
            rows = (lengths == length).nonzero()[:, 0]
            tokens = torch.cat([prefix.expand(len(rows), -1, -1), suffix[rows, :length]], dim=1)
            order.append(rows)
            if self.activation_checkpointing and torch.is_grad_enabled():
                features += [checkpoint(self.encode, part, use_reentrant=False) for part in tokens.split(ROWS)]
            else:
                features.append(self.encode(tokens))
        return torch.cat(features)[torch.cat(order).argsort()]

    def encode(self, tokens: Tensor) -> Tensor:
        """(N, L, W) token embeddings without padding -> (N, D)."""
        outputs = self.model(inputs_embeds=tokens)
        hidden = outputs.last_hidden_state
        if self.pooling == "mean":
            pooled = hidden.mean(dim=1)
        elif self.pooling == "max":
            pooled = hidden.amax(dim=1)
        else:
            pooled = hidden[:, 0] if self.pooling == "cls" else outputs.pooler_output
        return self.projection(pooled) if isinstance(self.projection, nn.Module) else pooled


def longest_text(model: Any, tokenizer: Any) -> int:
    """Most tokens that an encoder and its tokenizer take."""
    positions = getattr(model.config, "max_position_embeddings", 0) or 512
    embeddings: Any = getattr(model, "embeddings", None)
    first = getattr(embeddings, "padding_idx", None)  # RoBERTa and MPNet count positions from the one after it
    own = positions if first is None else positions - first - 1
    return min(own, getattr(tokenizer, "model_max_length", own))
