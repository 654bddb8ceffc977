"""Losses against plain loops, and their invariants."""

import math

import pytest
import torch

from ordinalclip.losses import absolute_error, alignment_loss, cross_entropy, weighted_mean


def batch(size=7, num_ranks=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(size, num_ranks, generator=generator, dtype=torch.float64) * 3
    return logits, torch.randint(num_ranks - 1, (size,), generator=generator)


def loop_alignment(logits, ranks, form):
    """METHODS in words: per rank present, KL over the batch between label row and softmax of similarities."""
    total, present = 0.0, sorted(set(ranks.tolist()))
    for rank in present:
        label = [10.0 * (r == rank) for r in ranks.tolist()]
        if form == "official":
            target = [math.exp(x) / sum(math.exp(y) for y in label) for x in label]
        else:
            target = [(x > 0) / sum(y > 0 for y in label) for x in label]
        column = [row[rank].item() for row in logits]
        similarity = [math.exp(x) / sum(math.exp(y) for y in column) for x in column]
        total += sum(t * math.log(t / s) for t, s in zip(target, similarity, strict=True) if t > 0)
    return total / len(present)


@pytest.mark.parametrize("form", ["official", "paper"])
def test_alignment_against_loops(form):
    logits, ranks = batch()
    terms = alignment_loss(logits, ranks, alignment=form, alignment_weight=0.5)
    contrastive = -sum(torch.log_softmax(row, 0)[rank].item() for row, rank in zip(logits, ranks, strict=True)) / 7
    assert terms["contrastive"].item() == pytest.approx(contrastive)
    assert terms["alignment"].item() == pytest.approx(loop_alignment(logits, ranks, form))
    assert terms["loss"].item() == pytest.approx(contrastive + 0.5 * terms["alignment"].item())


@pytest.mark.parametrize("form", ["official", "paper"])
def test_a_weight_counts_as_copies(form):
    logits, ranks = batch()
    copies = torch.tensor([1, 3, 1, 2, 1, 1, 2])
    weighted = alignment_loss(logits, ranks, copies.double(), form)
    repeated = alignment_loss(logits.repeat_interleave(copies, 0), ranks.repeat_interleave(copies), None, form)
    if form == "paper":
        assert weighted["alignment"].item() == pytest.approx(repeated["alignment"].item())
    assert weighted["contrastive"].item() == pytest.approx(repeated["contrastive"].item())
    assert weighted["alignment"].item() == pytest.approx(repeated["alignment"].item(), rel=1e-9)


@pytest.mark.parametrize("form", ["official", "paper"])
def test_order_of_the_batch_does_not_matter(form):
    logits, ranks = batch()
    order = torch.randperm(7)
    a, b = alignment_loss(logits, ranks, None, form), alignment_loss(logits[order], ranks[order], None, form)
    assert a["loss"].item() == pytest.approx(b["loss"].item())


@pytest.mark.parametrize("form", ["official", "paper"])
@pytest.mark.parametrize("size", [1, 4])
def test_one_rank_and_one_sample_are_finite(form, size):
    logits = torch.randn(size, 5, requires_grad=True)
    terms = alignment_loss(logits, torch.full((size,), 2), None, form)
    terms["loss"].backward()
    assert torch.isfinite(terms["loss"])
    assert torch.isfinite(logits.grad).all()


def test_gradient_is_right():
    logits, ranks = batch()
    for form in ("official", "paper"):
        function = lambda x, form=form: alignment_loss(x, ranks, None, form)["loss"]  # noqa: E731
        assert torch.autograd.gradcheck(function, logits.clone().requires_grad_())


def test_half_precision_logits_are_scored_in_float32():
    logits, ranks = batch()
    assert alignment_loss(logits.bfloat16(), ranks)["loss"].dtype == torch.float32


def test_unknown_form():
    with pytest.raises(ValueError, match="'symmetric' is unknown; choices: official, paper"):
        alignment_loss(*batch(), alignment="symmetric")


def test_weighted_means_against_loops():
    logits, ranks = batch()
    values, targets, weights = logits[:, 0], logits[:, 1], torch.linspace(0.2, 3, 7).double()
    errors = [abs(v - t) for v, t in zip(values.tolist(), targets.tolist(), strict=True)]
    surprise = [-torch.log_softmax(row, 0)[rank].item() for row, rank in zip(logits, ranks, strict=True)]
    for function, arguments, single in (
        (weighted_mean, (values,), values.tolist()),
        (absolute_error, (values, targets), errors),
        (cross_entropy, (logits, ranks), surprise),
    ):
        expected = sum(w * x for w, x in zip(weights.tolist(), single, strict=True)) / weights.sum().item()
        assert function(*arguments, weights).item() == pytest.approx(expected)
        assert function(*arguments).item() == pytest.approx(sum(single) / 7)
