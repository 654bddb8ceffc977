"""TextTower: the frozen text encoder of a CLIP, encoding all rank prompts in one packed pass.

All rank prompts share a prefix, and a causal text encoder is read at the [EOT] token only. So nothing after
[EOT] needs computing, and the prefix needs computing once. One packed row holds

    position   0    1    2    3    4    5    6    4    5    6    4   5  ...
    token     SOT  ctx  ctx  ctx  r=0  "."  EOT  r=1  "."  EOT  r=2 "." ...
              `---- prefix -----' `- suffix 0 -' `- suffix 1 -' `- ...

under a mask that lets a token see the prefix and the earlier tokens of its own suffix: a tree with one trunk.
The result is exact, and the cost grows with R x 3 tokens instead of R x 77.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ordinalclip import tokenization
from ordinalclip.tokenization import MissingTokenizer

TOKENS_PER_ROW = 256  # keeps the (L, L) mask small: 80 ranks a row with a ten-token context


class Prompts(NamedTuple):
    """Token embeddings of R prompts that start with the same tokens.

    Attributes:
        prefix: (P, W) token embeddings shared by all prompts.
        suffix: (R, S, W) the rest of each prompt, padded at the end.
        lengths: (R,) how many suffix tokens are in use; the last of them is [EOT].
    """

    prefix: Tensor
    suffix: Tensor
    lengths: Tensor


class TextTower(nn.Module):
    """A frozen text encoder: no gradient to its weights, gradient through it to the prompts.

    Build one with `from_open_clip` or `from_transformers`. Towers with a causal mask encode all prompts packed
    (module docstring); the others (SigLIP) let every token see every token, padding included, and are encoded
    rank by rank at full length, which costs R x context length tokens.

    Args of `forward`:
        prompts: `Prompts`, e.g. what a `PromptLearner` gives, or a list of texts.

    Returns of `forward`:
        (R, D) text features, not normalised, in the tower's dtype.

    Raises:
        ValueError: a prompt is longer than `context_length`; when built, a tokenizer that puts more than one token
            before a text or after it.
    """

    def __init__(
        self,
        token_embedding: nn.Embedding,
        positional_embedding: nn.Parameter,
        blocks: nn.Module,
        final_norm: nn.Module,
        projection: nn.Module | nn.Parameter | None,
        tokenizer: Any,
        causal: bool = True,
        read_last: bool = False,
        padding_token: int = 0,
    ):
        super().__init__()
        self.token_embedding = token_embedding
        self.positional_embedding = positional_embedding
        self.blocks = blocks
        self.final_norm = final_norm
        self.projection = projection
        self.tokenizer = tokenizer
        self.causal = causal
        self.read_last = read_last
        self.padding_token = padding_token
        self.context_length, self.width = positional_embedding.shape
        self.activation_checkpointing = False
        self.check_tokenizer()
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def from_open_clip(cls, model: nn.Module, tokenizer: Any = None) -> TextTower:
        """The text tower of an open_clip model (`CLIP` or `CustomTextCLIP`), sharing its weights.

        Args:
            model: an `open_clip` model.
            tokenizer: its tokenizer; default: CLIP's own byte-pair encoding.

        Raises:
            ValueError: a text tower that is neither CLIP's nor SigLIP's (CoCa; for encoders of transformers there is
                `ordinalclip.text_encoders.EncoderTower`).
        """
        text: Any = getattr(model, "text", model)
        pooling = getattr(text, "text_pool_type", getattr(text, "pool_type", None))
        known = {"argmax", "eos", "last"}
        if not hasattr(text, "token_embedding") or pooling not in known or getattr(text, "cls_emb", None) is not None:
            raise ValueError(
                f"{type(model).__name__}: text tower {type(text).__name__} with pooling {pooling!r} is not supported; "
                f"supported are open_clip's own text transformers with pooling {sorted(known)}"
            )
        if tokenizer is None:
            import open_clip

            tokenizer = open_clip.SimpleTokenizer()
        causal = text.attn_mask is not None
        if getattr(text, "use_pad_mask", False):
            raise ValueError(f"{type(model).__name__}: text towers that mask their padding are not supported")
        parts = (text.token_embedding, text.positional_embedding, text.transformer, text.ln_final)
        padding = tokenization.padding_token(tokenizer, getattr(text, "pad_id", 0))
        return _OpenClipTower(*parts, text.text_projection, tokenizer, causal, pooling == "last", padding)

    @classmethod
    def from_transformers(cls, model: Any, tokenizer: Any = None) -> TextTower:
        """The text tower of a transformers CLIP or SigLIP, sharing its weights.

        Args:
            model: `CLIPModel`, `CLIPTextModelWithProjection` or `SiglipModel`.
            tokenizer: its tokenizer; default for CLIP: CLIP's own byte-pair encoding.

        Raises:
            ValueError: the model has no such text tower, or a SigLIP comes without its tokenizer.
        """
        text: Any = getattr(model, "text_model", None)
        projection = getattr(model, "text_projection", None)
        siglip = projection is None and isinstance(getattr(text, "head", None), nn.Linear)
        if not hasattr(text, "final_layer_norm") or (projection is None and not siglip):
            raise ValueError(f"{type(model).__name__} has no CLIP or SigLIP text tower (text_model with a projection)")
        if tokenizer is None:
            if siglip:
                raise ValueError(f"{type(model).__name__}: SigLIP has no common vocabulary; give its tokenizer")
            import open_clip

            tokenizer = open_clip.SimpleTokenizer()
        words = text.embeddings
        parts = (words.token_embedding, words.position_embedding.weight, text.encoder, text.final_layer_norm)
        padding = tokenization.padding_token(tokenizer, text.config.pad_token_id or 0)
        if siglip:
            return _TransformersTower(*parts, text.head, tokenizer, False, True, padding)
        return _TransformersTower(*parts, projection, tokenizer, padding_token=padding)

    def train(self, mode: bool = True) -> TextTower:
        return super().train(False)  # frozen: never in training mode

    @property
    def output_dim(self) -> int:
        """D, the width of the text features."""
        if isinstance(self.projection, nn.Linear):
            return self.projection.out_features
        if isinstance(self.projection, Tensor):
            return self.projection.shape[1]
        return self.width

    @property
    def start_token(self) -> int | None:
        """Id of [SOT]; None for tokenizers that have none (SigLIP)."""
        return tokenization.start_token(self.tokenizer)

    @property
    def end_token(self) -> int:
        """Id of [EOT], the token that CLIP's towers are read at."""
        return tokenization.end_token(self.tokenizer)

    @property
    def full_stop(self) -> int:
        """Id of "."."""
        return tokenization.full_stop(self.tokenizer)

    def token_ids(self, text: str) -> list[int]:
        """Ids of the tokens of a text, without [SOT] and [EOT]."""
        return tokenization.token_ids(self.tokenizer, text)

    def check_tokenizer(self) -> None:
        """Prompts are [start] tokens [end], then padding: the tokenizer has to say the same.

        Raises:
            ValueError: it puts something else around a text, such as a language after the end (NLLB's old way).
        """
        if isinstance(self.tokenizer, MissingTokenizer):
            return
        own = tokenization.whole_text(self.tokenizer, ".")
        ours = [*([] if self.start_token is None else [self.start_token]), *self.token_ids("."), self.end_token]
        if own != ours + [self.padding_token] * (len(own) - len(ours)):
            shown = ", ".join(map(str, own[: len(ours) + 2]))
            raise ValueError(
                f"tokenizer {type(tokenization.inner(self.tokenizer)).__name__} begins '.' with {shown}; prompts are "
                f"built with at most one token before a text and one after it, {', '.join(map(str, ours))}"
            )

    def embed(self, ids: Sequence[int] | Tensor) -> Tensor:
        """Token embeddings of ids, without position: (..., W)."""
        ids = torch.as_tensor(ids, dtype=torch.long, device=self.token_embedding.weight.device)
        return self.token_embedding(ids)

    def prompts(self, texts: Sequence[str]) -> Prompts:
        """Plain texts as `Prompts`, sharing the longest common start."""
        start = [] if self.start_token is None else [self.start_token]
        rows = [[*start, *self.token_ids(text), self.end_token] for text in texts]
        lengths = torch.tensor([len(row) for row in rows])
        padded = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row) for row in rows], batch_first=True, padding_value=self.padding_token
        )
        same = (padded == padded[:1]).all(dim=0).long().cumprod(dim=0)
        shared = min(int(same.sum()), int(lengths.min()) - 1)  # at least [EOT] stays in the suffix
        embedded = self.embed(padded)
        device = embedded.device
        return Prompts(embedded[0, :shared], embedded[:, shared:], (lengths - shared).to(device))

    def forward(self, prompts: Prompts | Sequence[str]) -> Tensor:
        if not isinstance(prompts, Prompts):
            prompts = self.prompts(prompts)
        dtype = self.positional_embedding.dtype
        prompts = Prompts(prompts.prefix.to(dtype), prompts.suffix.to(dtype), prompts.lengths)
        length = prompts.prefix.shape[0] + prompts.suffix.shape[1]
        if length > self.context_length:
            raise ValueError(f"a prompt has {length} tokens; this text tower takes at most {self.context_length}")
        return self.encode_packed(prompts) if self.causal and not self.read_last else self.encode_plain(prompts)

    def encode_packed(self, prompts: Prompts) -> Tensor:
        """(R, D) features from packed rows of at most about `TOKENS_PER_ROW` tokens (module docstring).

        Memory grows linearly with R; with `activation_checkpointing` only the token embeddings of all rows and
        the activations of one are held for the backward pass.
        """
        prefix, suffix, lengths = prompts
        (shared, width), (count, size, _) = prefix.shape, suffix.shape
        per_row = min(count, max(1, (TOKENS_PER_ROW - shared) // size))
        num_rows = math.ceil(count / per_row)
        per_row = math.ceil(count / num_rows)  # rows of nearly equal length
        missing = num_rows * per_row - count
        suffix = torch.nn.functional.pad(suffix, (0, 0, 0, 0, 0, missing))
        packed = torch.cat([prefix.expand(num_rows, -1, -1), suffix.reshape(num_rows, per_row * size, width)], dim=1)
        positions = self.positional_embedding[: shared + size]
        packed = packed + torch.cat([positions[:shared], positions[shared:].repeat(per_row, 1)])
        mask = _tree_mask(shared, size, per_row, packed)
        read = shared + torch.arange(per_row, device=packed.device) * size - 1
        read = read + torch.nn.functional.pad(lengths, (0, missing), value=1).view(num_rows, per_row)

        def encode(rows: Tensor, read: Tensor) -> Tensor:
            hidden = self.run_blocks(rows, mask)
            return self._project(hidden.gather(1, read[..., None].expand(-1, -1, width)))

        if self.activation_checkpointing and torch.is_grad_enabled():
            pieces = zip(packed.split(1), read.split(1), strict=True)
            features = torch.cat([checkpoint(encode, *piece, use_reentrant=False) for piece in pieces])
        else:
            features = encode(packed, read)
        return features.flatten(0, 1)[:count]

    def encode_plain(self, prompts: Prompts) -> Tensor:
        """(R, D) features, every prompt for itself at full context length: what the published code does.

        Read at [EOT], or at the last position (SigLIP). Towers without a causal mask see the padding too.
        """
        prefix, suffix, lengths = prompts
        count, size = suffix.shape[:2]
        rest = self.context_length - prefix.shape[0] - size
        padding = self.embed([self.padding_token]).expand(count, rest, -1)
        full = torch.cat([prefix.expand(count, -1, -1), suffix, padding], dim=1) + self.positional_embedding
        mask = _tree_mask(self.context_length, 0, 0, full) if self.causal else None
        hidden = self.run_blocks(full, mask)
        read = torch.full_like(lengths, self.context_length - 1) if self.read_last else prefix.shape[0] + lengths - 1
        return self._project(hidden[torch.arange(count, device=hidden.device), read])

    def run_blocks(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Transformer blocks on (N, L, W) with an additive mask (L, L): (N, L, W)."""
        raise NotImplementedError(f"{type(self).__name__}: build towers with from_open_clip or from_transformers")

    def _project(self, hidden: Tensor) -> Tensor:
        hidden = self.final_norm(hidden)
        if self.projection is None:
            return hidden
        return self.projection(hidden) if isinstance(self.projection, nn.Module) else hidden @ self.projection


class _OpenClipTower(TextTower):
    def run_blocks(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        return self.blocks(tokens, attn_mask=mask)


class _TransformersTower(TextTower):
    def run_blocks(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        mask = None if mask is None else mask[None, None]
        return self.blocks(inputs_embeds=tokens, attention_mask=mask).last_hidden_state


def _tree_mask(shared: int, size: int, count: int, like: Tensor) -> Tensor:
    """Additive mask (L, L), L = shared + count * size: a token sees the prefix and its own suffix, up to itself."""
    branch = torch.arange(count, device=like.device).repeat_interleave(size)
    branch = torch.nn.functional.pad(branch, (shared, 0), value=-1)
    visible = (branch[None, :] == branch[:, None]) | (branch[None, :] == -1)
    return torch.full(visible.shape, -torch.inf, dtype=like.dtype, device=like.device).masked_fill(visible.tril(), 0.0)
