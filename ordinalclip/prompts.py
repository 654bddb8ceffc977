"""PromptLearner: learnable context and interpolated rank embeddings, one prompt per rank."""

from __future__ import annotations

import re
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ordinalclip.ranks import Ranks
from ordinalclip.text import Prompts, TextTower

Interpolation = Literal["linear", "inverse", "gaussian", "piecewise"]
RankPosition = Literal["tail", "middle", "front"]
INITIAL_STD = 0.02
SPECIAL_TOKENS = 4  # [SOT], ".", [EOT] and padding stand at the start of the token pool


def interpolation_weights(num_ranks: int, num_base_ranks: int, kind: Interpolation = "linear") -> Tensor:
    """Share of every base embedding in every rank embedding (OrdinalCLIP, eq. 4).

    The K bases stand evenly between the first and the last rank, at b_k; d = |r - b_k| in rank indices.
    `linear` 1 - d / (R - 1), `inverse` 1 / (d + 1e-5) and `gaussian` exp(-d^2) are normalised over all bases, as
    published; `piecewise` mixes the two neighbouring bases only, so that a base rank reproduces itself.

    Returns:
        (R, K) float32, rows summing to 1.

    Raises:
        ValueError: an unknown kind, or K outside 1 .. R.

    >>> interpolation_weights(5, 3, "piecewise")[1].tolist()
    [0.5, 0.5, 0.0]
    """
    return weights_at(torch.arange(num_ranks, dtype=torch.float64, device="cpu"), num_ranks, num_base_ranks, kind)


def weights_at(places: Tensor, num_ranks: int, num_base_ranks: int, kind: Interpolation = "linear") -> Tensor:
    """`interpolation_weights` at any places among R ranks, (V,) in rank indices: between ranks, and beyond them.

    Beyond the ends `piecewise` goes on along the line through the last two bases; the others keep their formulas.

    Returns:
        (V, K) float32, rows summing to 1.

    Raises:
        ValueError: an unknown kind, K outside 1 .. R, or places so far beyond that `linear` weights do not sum to more
            than 0.
    """
    if kind not in get_args(Interpolation):
        raise ValueError(f"interpolation {kind!r} is unknown; choices: {', '.join(get_args(Interpolation))}")
    if not 1 <= num_base_ranks <= num_ranks:
        raise ValueError(f"num_base_ranks must be between 1 and the number of ranks {num_ranks}, got {num_base_ranks}")
    if num_base_ranks == 1:
        return torch.ones(len(places), 1)
    bases = _base_positions(num_ranks, num_base_ranks)
    distance = (places.to(bases)[:, None] - bases).abs()
    if kind == "gaussian":
        return torch.softmax(-(distance**2), dim=1).float()  # the same as exp / sum, without its underflow
    if kind == "piecewise":
        steps = places.to(bases) * (num_base_ranks - 1) / (num_ranks - 1)  # in gaps between bases
        before = steps.floor().clamp(0, num_base_ranks - 2)
        share = (steps - before)[:, None]  # of the base after it; outside of 0 to 1 beyond the ends
        before = before.long()[:, None]
        weights = torch.zeros_like(distance).scatter_(1, before, 1 - share).scatter_(1, before + 1, share)
        return weights.float()
    weights = 1 - distance / (num_ranks - 1) if kind == "linear" else 1 / (distance + 1e-5)
    total = weights.sum(dim=1, keepdim=True)
    if (total <= 0).any():
        raise ValueError("too far beyond the ranks: linear weights of the base ranks sum to nothing there")
    return (weights / total).float()


class PromptLearner(nn.Module):
    """Builds the prompts `[SOT] context, rank tokens, "." [EOT]` of all ranks in tensor operations.

    OrdinalCLIP (Li et al., NeurIPS 2022) shares K base embeddings between all ranks; with `num_base_ranks=None`
    every rank has an embedding of its own (CoOp, Zhou et al. 2022).

    Args:
        tower: the text tower whose token embeddings the prompts live among.
        ranks: the label space, or the number of ranks.
        num_context: number of context tokens C; ignored when `context` is a text.
        context: a sentence to start the context from, e.g. "age estimation: the age of the person is";
            default: N(0, 0.02^2).
        num_base_ranks: number K of base embeddings, or None for R free ones.
        interpolation: how the bases mix, see `interpolation_weights`.
        rank_position: rank tokens after ("tail"), inside ("middle") or before ("front") the context.
        tokens_per_rank: number T of rank tokens; with `init_from_names` every rank has as many as its name.
        rank_specific_context: a context of its own for every rank, (R, C, W), instead of a shared one, (C, W).
        init_from_names: start rank embeddings from the names of the ranks; base k from the name of the rank
            nearest to it. Each prompt then holds as many rank tokens as its own name, so "." and [EOT] move.

    Attributes:
        context: parameter (C, W) or (R, C, W).
        rank_embeddings: parameter (K or R, T, W), T the longest name's length with `init_from_names`;
            tokens past a name's own length stand unused.

    Raises:
        ValueError: unknown option values, K outside 1 .. R, an empty context or name, prompts that are longer
            than the tower's context length.
    """

    special: Tensor
    index: Tensor
    lengths: Tensor
    weights: Tensor

    def __init__(
        self,
        tower: TextTower,
        ranks: Ranks | int,
        num_context: int = 10,
        context: str | None = None,
        num_base_ranks: int | None = None,
        interpolation: Interpolation = "linear",
        rank_position: RankPosition = "tail",
        tokens_per_rank: int = 1,
        rank_specific_context: bool = False,
        init_from_names: bool = False,
    ):
        super().__init__()
        ranks = Ranks.of(ranks)
        count, width = len(ranks), tower.width
        if rank_position not in get_args(RankPosition):
            raise ValueError(
                f"rank_position {rank_position!r} is unknown; choices: {', '.join(get_args(RankPosition))}"
            )
        for option, number, least in (("num_context", num_context, 0), ("tokens_per_rank", tokens_per_rank, 1)):
            if number < least:
                raise ValueError(f"{option} must be at least {least}, got {number}")

        if (context is None) * num_context + tokens_per_rank > tower.context_length:  # before memory is taken
            raise ValueError(
                f"num_context {num_context} and tokens_per_rank {tokens_per_rank} make prompts that are too long; the "
                f"text tower takes at most {tower.context_length} tokens"
            )
        with torch.no_grad():
            end = tower.end_token
            start = end if tower.start_token is None else tower.start_token
            self.register_buffer(
                "special", tower.embed([start, tower.full_stop, end, tower.padding_token]).clone().float()
            )
            if context is not None and re.search("[{}]", context):
                raise ValueError(
                    f"the context text {context!r} has braces: the rank is put beside it by itself (rank_position)"
                )
            if context is None:
                initial = torch.randn(num_context, width) * INITIAL_STD
            else:
                ids = tower.token_ids(context)
                if not ids:
                    raise ValueError(f"the context text {context!r} holds no token")
                initial = tower.embed(ids).cpu().float()
            num_context = len(initial)
            if rank_specific_context:
                initial = (
                    initial.repeat(count, 1, 1) if context else torch.randn(count, num_context, width) * INITIAL_STD
                )
            self.context = nn.Parameter(initial)

            num_free = num_base_ranks or count
            if num_base_ranks is not None:
                mixing = interpolation_weights(count, num_base_ranks, interpolation)
                nearest = _base_positions(count, num_base_ranks).round().long()
            else:
                mixing, nearest = torch.empty(0), torch.arange(count, device="cpu")
            self.register_buffer("weights", mixing)
            if init_from_names:
                tokens = [tower.token_ids(ranks.name(rank)) for rank in range(count)]
                for rank, ids in enumerate(tokens):
                    if not ids:
                        raise ValueError(f"the name {ranks.name(rank)!r} of rank {rank} holds no token")
                used = torch.tensor([len(ids) for ids in tokens])
                tokens_per_rank = int(used.max())
            else:
                used = torch.full((count,), tokens_per_rank)
            embeddings = torch.randn(num_free, tokens_per_rank, width) * INITIAL_STD
            if init_from_names:
                for base, rank in enumerate(nearest.tolist()):
                    embeddings[base, : len(tokens[rank])] = tower.embed(tokens[rank]).cpu()
            self.rank_embeddings = nn.Parameter(embeddings)

        has_start = tower.start_token is not None
        index, lengths = _layout(used, num_context, tokens_per_rank, rank_position, rank_specific_context, has_start)
        if index.shape[1] > tower.context_length:
            raise ValueError(
                f"the longest prompt has {index.shape[1]} tokens ({num_context} context, {int(used.max())} rank); "
                f"the text tower takes at most {tower.context_length}"
            )
        before = {"tail": num_context, "middle": num_context // 2, "front": 0}[rank_position]
        self.num_shared = int(has_start) + (0 if rank_specific_context else before)
        self.register_buffer("index", index)
        self.register_buffer("lengths", lengths - self.num_shared)
        self.to(tower.token_embedding.weight.device)

    def ranks_embedded(self) -> Tensor:
        """The rank embeddings of all ranks, (R, T, W): interpolated, or the free ones."""
        if self.weights.numel() == 0:
            return self.rank_embeddings
        return torch.einsum("rk,ktw->rtw", self.weights.to(self.rank_embeddings.dtype), self.rank_embeddings)

    @property
    def in_use(self) -> Tensor:
        """(R, T), which tokens of the rank embeddings stand in the prompts."""
        count, length = len(self.index), self.rank_embeddings.shape[1]
        first = SPECIAL_TOKENS + self.context.flatten(0, -2).shape[0]
        tokens = torch.arange(first, first + count * length, device=self.index.device)
        return torch.isin(tokens, self.index).view(count, length)

    def forward(self, ranks_embedded: Tensor | None = None) -> Prompts:
        """`Prompts` for a `TextTower`: prefix (P, W), suffix (R, S, W), lengths (R,).

        Args:
            ranks_embedded: (R, T, W) in place of `ranks_embedded()`.
        """
        ranks = self.ranks_embedded() if ranks_embedded is None else ranks_embedded
        pool = torch.cat([self.special, self.context.flatten(0, -2), ranks.flatten(0, 1)])
        prefix, suffix = self.index[0, : self.num_shared], self.index[:, self.num_shared :]
        return Prompts(pool[prefix], pool[suffix], self.lengths)


def _base_positions(num_ranks: int, num_base_ranks: int) -> Tensor:
    return torch.linspace(0, num_ranks - 1, num_base_ranks, dtype=torch.float64, device="cpu")


def _layout(
    used: Tensor, num_context: int, tokens_per_rank: int, position: RankPosition, rank_specific: bool, has_start: bool
) -> tuple[Tensor, Tensor]:
    """Where each prompt token comes from: (R, L) indices into the token pool, and the (R,) prompt lengths.

    The pool is [special tokens, context tokens (of every rank), rank tokens of every rank].
    """
    count = len(used)
    rank = torch.arange(count, device="cpu")[:, None]
    before = {"tail": num_context, "middle": num_context // 2, "front": 0}[position]
    rank_start = int(has_start) + before
    rank_end = (rank_start + used)[:, None]
    dot = rank_end + num_context - before
    lengths = dot[:, 0] + 2
    column = torch.arange(int(lengths.max()), device="cpu")[None, :]

    context = SPECIAL_TOKENS + (rank * num_context if rank_specific else 0)
    ranks = SPECIAL_TOKENS + num_context * (count if rank_specific else 1) + rank * tokens_per_rank
    start_token, dot_token, end_token, padding = range(SPECIAL_TOKENS)
    index = torch.where(column > dot, torch.where(column == dot + 1, end_token, padding), dot_token)
    index = torch.where(column < dot, context + before + column - rank_end, index)
    index = torch.where(column < rank_end, ranks + column - rank_start, index)
    index = torch.where(column < rank_start, context + column - int(has_start), index)
    if has_start:
        index[:, 0] = start_token
    return index, lengths
