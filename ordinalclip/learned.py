"""Learned prompts to look at and to keep: the context, the rank embeddings, and the words nearest to them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ordinalclip.language import PromptHead
from ordinalclip.tokenization import words_of
from ordinalclip.weights import fault, read_safetensors, write_safetensors

SAVED = "prompts.safetensors"  # in the folder of a model
SIGNATURE = "ordinalclip"  # key of the metadata that names and words are noted under
RANDOM = 256  # vectors that the cosine of chance is the mean of


class Word(NamedTuple):
    """A word of the vocabulary, and its cosine with a learned token."""

    text: str
    cosine: float


@dataclass(frozen=True)
class LearnedPrompts:
    """The prompts that a method has learned, apart from the text tower that they are encoded by.

    Attributes:
        context: (C, W) embeddings of the context's tokens, or (R, C, W) where every rank has its own.
        rank_embeddings: (K, T, W), of K base ranks or of all R; tokens beyond those of `words` stand unused.
        names: K, of the ranks that the embeddings stand nearest to.
        words: of every token that is in use the nearest words of the tower's vocabulary, by falling cosine; tokens are
            called "context 1", ..., "near NAME", "near NAME, token 2".
        chance: the cosine that a random vector reaches with its nearest word; few learned tokens are much nearer.
    """

    context: Tensor
    rank_embeddings: Tensor
    names: tuple[str, ...]
    words: dict[str, tuple[Word, ...]]
    chance: float

    @classmethod
    @torch.no_grad()
    def of(cls, head: PromptHead, num: int = 5) -> LearnedPrompts:
        """Those of a head, with the `num` nearest words.

        Raises:
            ValueError: more words than the vocabulary has, or less than one.
        """
        learner, ranks = head.learner, head.ranks
        vocabulary = normalize(head.text.token_embedding.weight.detach().float(), dim=-1)
        if not 1 <= num <= len(vocabulary):
            raise ValueError(f"the number of nearest words must be from 1 to {len(vocabulary)}, got {num!r}")
        context, embeddings = learner.context.detach(), learner.rank_embeddings.detach()
        flat = context.flatten(0, -2)
        titles = [f"context {number + 1}" for number in range(len(flat))]
        nearest = torch.linspace(0, len(ranks) - 1, len(embeddings)).round().long()
        used = learner.in_use[nearest.to(learner.in_use.device)]  # of the rank that a base stands near
        for base, token in used.nonzero().tolist():
            titles.append(f"near {ranks.name(int(nearest[base]))}" + (f", token {token + 1}" if token else ""))
        tokens = normalize(torch.cat([flat, embeddings[used]]).float(), dim=-1)
        found = (tokens @ vocabulary.T).topk(num, dim=1)
        chance = torch.randn(RANDOM, vocabulary.shape[1], generator=torch.Generator().manual_seed(0))
        words = {}
        for title, ids, cosines in zip(titles, found.indices.tolist(), found.values.tolist(), strict=True):
            words[title] = tuple(map(Word, words_of(head.text.tokenizer, ids), cosines))
        return cls(
            context=context.cpu().clone(),
            rank_embeddings=embeddings.cpu().clone(),
            names=tuple(ranks.name(int(rank)) for rank in nearest),
            words=words,
            chance=(normalize(chance, dim=-1).to(vocabulary) @ vocabulary.T).amax(dim=1).mean().item(),
        )

    def save(self, file: str | Path) -> None:
        """A safetensors file: `context` and `rank_embeddings`; names and words are in its metadata."""
        about = {"names": self.names, "words": self.words, "chance": self.chance}
        tensors = {"context": self.context, "rank_embeddings": self.rank_embeddings}
        write_safetensors(Path(file), tensors, {SIGNATURE: json.dumps(about)})

    @classmethod
    def load(cls, file: str | Path) -> LearnedPrompts:
        """What `save` wrote.

        Raises:
            FileNotFoundError: no such file; ValueError: it is damaged, or of something else.
        """
        tensors, metadata = read_safetensors(file)
        try:
            about = json.loads(metadata[SIGNATURE])
            found = cls(
                context=tensors["context"],
                rank_embeddings=tensors["rank_embeddings"],
                names=tuple(map(str, about["names"])),
                words={
                    str(token): tuple(Word(str(text), float(cosine)) for text, cosine in words)
                    for token, words in about["words"].items()
                },
                chance=float(about["chance"]),
            )
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}: no learned prompts with their names and words in it") from error
        context, embeddings = found.context, found.rank_embeddings
        fits = context.ndim in (2, 3) and embeddings.ndim == 3 and context.shape[-1] == embeddings.shape[-1]
        if not fits or len(found.names) != len(embeddings):
            raise ValueError(f"{file}: context, rank embeddings and names do not fit together")
        if why := fault(tensors):
            raise ValueError(f"{file}: {why}")
        return found
