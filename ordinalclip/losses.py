"""Losses as pure functions of whole batches; every weighted mean is sum(w * x) / sum(w)."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy as _cross_entropy

Alignment = Literal["official", "paper"]
LABEL_SHARPNESS = 10.0  # the official code's softmax(10 * onehot)


def at_least_float32(features: Tensor) -> Tensor:
    """Half precision lifted to float32, so that normalising, scaling and softmax never run in bf16."""
    return features.float() if features.dtype in (torch.float16, torch.bfloat16) else features


def weighted_mean(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean of (B,) values, weighted by (B,) sample weights if given."""
    return values.mean() if weights is None else (values * weights).sum() / weights.sum()


def cross_entropy(logits: Tensor, ranks: Tensor, weights: Tensor | None = None) -> Tensor:
    """Weighted mean cross-entropy of (B, R) logits with (B,) rank indices: a scalar."""
    return weighted_mean(_cross_entropy(logits, ranks, reduction="none"), weights)


def absolute_error(values: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Weighted mean absolute error (L1) of (B,) values: a scalar in the unit of the values."""
    return weighted_mean((values - targets).abs(), weights)


def ranked_probability_score(logits: Tensor, ranks: Tensor, weights: Tensor | None = None) -> Tensor:
    """Weighted mean ranked probability score of (B, R) logits, in ranks: a scalar.

    The sum over k < R - 1 of (P(rank <= k) - 1[true rank <= k])^2 (Epstein, 1969), which is the squared earth mover's
    distance to the true rank (Hou et al., 2016). It is proper: no distribution has a smaller expected score than the
    true one. `ordinalclip.metrics.ranked_probability_score` is the same of probabilities.

    >>> ranked_probability_score(torch.tensor([[-99.0, -99.0, 99.0]]), torch.tensor([0])).item()
    2.0
    """
    reached = torch.softmax(at_least_float32(logits), dim=1).cumsum(dim=1)[:, :-1]
    truth = ranks[:, None] <= torch.arange(reached.shape[1], device=ranks.device)
    return weighted_mean((reached - truth.to(reached.dtype)).square().sum(dim=1), weights)


def alignment_loss(
    logits: Tensor,
    ranks: Tensor,
    weights: Tensor | None = None,
    alignment: Alignment = "official",
    alignment_weight: float = 1.0,
) -> dict[str, Tensor]:
    """OrdinalCLIP's loss: images matched to ranks, and ranks matched to the images of the batch.

    `contrastive` is the cross-entropy over ranks: KL(onehot(r) || softmax over ranks). `alignment` is the KL
    divergence over the BATCH axis between a label matrix T (R, B) and softmax over the batch of logits^T, its mean
    taken over the ranks present in the batch; rows of absent ranks count nothing.

    `official` (the authors' code): T = softmax over the batch of 10 * onehot(r)^T.
    `paper` (eqs. 5-7): T = onehot(r)^T with rows normalised to sum 1, the "identity" of the symmetric pair.
    They differ by the 5e-5 share that softmax(10 * onehot) leaves to each wrong image.

    A sample of weight w counts as w copies of itself, in both terms.

    Args:
        logits: (B, R) scaled similarities of images and rank prototypes.
        ranks: (B,) int64 rank indices.
        weights: (B,) sample weights > 0, or None.
        alignment: form of the second term.
        alignment_weight: factor of the second term in `loss`.

    Returns:
        scalars `loss` = contrastive + alignment_weight * alignment, `contrastive`, `alignment`.

    Raises:
        ValueError: an unknown form, or a rank outside 0 .. R - 1 (by PyTorch's indexing).

    >>> logits = torch.eye(3) * 4
    >>> {name: round(term.item(), 4) for name, term in alignment_loss(logits, torch.arange(3)).items()}
    {'loss': 0.0713, 'contrastive': 0.036, 'alignment': 0.0353}
    """
    if alignment not in get_args(Alignment):
        raise ValueError(f"alignment {alignment!r} is unknown; choices: {', '.join(get_args(Alignment))}")
    logits = at_least_float32(logits)
    batch_size = logits.shape[0]
    contrastive = cross_entropy(logits, ranks, weights)

    present, row = ranks.unique(return_inverse=True)  # only these rows of the (R, B) matrices count
    onehot = torch.zeros(len(present), batch_size, dtype=logits.dtype, device=logits.device)
    onehot[row, torch.arange(batch_size, device=logits.device)] = 1
    log_copies = torch.zeros_like(logits[:, 0]) if weights is None else weights.to(logits.dtype).log()
    log_similarity = torch.log_softmax(logits.t()[present] + log_copies, dim=1)
    if alignment == "official":
        log_target = torch.log_softmax(LABEL_SHARPNESS * onehot + log_copies, dim=1)
    else:
        log_target = torch.log_softmax(log_copies.masked_fill(onehot == 0, -torch.inf), dim=1)
    target = log_target.exp()
    divergence = torch.where(target > 0, target * (log_target - log_similarity), 0.0).sum() / len(present)
    return {"loss": contrastive + alignment_weight * divergence, "contrastive": contrastive, "alignment": divergence}
