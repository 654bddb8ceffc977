"""CLOC: reference values, plain loops, the two phases of its margins, and how much memory its triples take."""

import json
import math
import shutil

import pytest
import torch
from conftest import losses_of
from torch.utils._python_dispatch import TorchDispatchMode

from baselines.cloc import cloc_loss
from ordinalclip import Ranks
from ordinalclip.heads import HeadContext, Targets, build_head
from ordinalclip.training import train
from ordinalclip.training.checkpoint import load_checkpoint

RANKS = Ranks.linear(0, 4, 5)


def batch(size=9, dimensions=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(size, dimensions, generator=generator, dtype=torch.float64)
    ranks = torch.randint(5, (size,), generator=generator)
    weights = 0.5 + torch.rand(size, generator=generator, dtype=torch.float64)
    return features, ranks, 0.3 * torch.rand(4, generator=generator, dtype=torch.float64), weights


def loop_cloc(features, ranks, gaps, weights, pictures=None):
    """The loss of every anchor; samples of one of the `pictures` are copies of each other and make no pair."""
    rows, pictures = range(len(features)), pictures or list(range(len(features)))
    points = [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in features]

    def cosine(i, j):
        return sum(x * y for x, y in zip(points[i], points[j], strict=True))

    anchors = []
    for i in rows:
        partners = [j for j in rows if ranks[j] == ranks[i] and pictures[j] != pictures[i]]
        others = [k for k in rows if ranks[k] != ranks[i]]
        total = 0.0
        for j in partners:
            for k in others:
                low, high = sorted((ranks[i], ranks[k]))
                hinge = max(0.0, cosine(i, k) - cosine(i, j) + sum(gaps[low:high]))
                total += weights[j] * weights[k] * hinge
        mass = sum(weights[j] for j in partners) * sum(weights[k] for k in others)
        anchors.append(total / mass if mass else 0.0)
    return anchors


def mean(anchors, weights):
    return sum(w * loss for w, loss in zip(weights, anchors, strict=True)) / sum(weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reference_values(dtype):
    """Computed with NumPy from the equations."""
    angles = torch.deg2rad(torch.tensor([0, 20, 35, 90, 100, 10], dtype=dtype))
    features, ranks = torch.stack([angles.cos(), angles.sin()], dim=1), [0, 1, 1, 3, 4, 0]
    gaps = [0.5, 0.7, 0.6, 0.9]
    anchors = loop_cloc(features.tolist(), ranks, gaps, [1] * 6)
    assert anchors == pytest.approx([0.786491, 0.769116, 0.839488, 0, 0, 0.906383], abs=1e-6)
    loss = cloc_loss(3 * features, torch.tensor(ranks), torch.tensor(gaps, dtype=dtype))
    assert loss.dtype == dtype
    assert loss.item() == pytest.approx(0.550246, abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0])
def test_against_loops(seed, scale):
    features, ranks, gaps, weights = batch(size=12, seed=seed)
    gaps = scale * gaps
    given = features.tolist(), ranks.tolist(), gaps.tolist()
    expected = mean(loop_cloc(*given, weights.tolist()), weights.tolist())
    assert expected > 0
    assert cloc_loss(features, ranks, gaps, weights).item() == pytest.approx(expected)
    assert cloc_loss(features, ranks, gaps).item() == pytest.approx(mean(loop_cloc(*given, [1] * 12), [1] * 12))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    assert cloc_loss(features[order], ranks[order], gaps, weights[order]).item() == pytest.approx(expected)


def test_equal_cosines_are_counted_right():
    """Hinges of exactly 0, and equal ones, on a grid of directions."""
    features = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]], dtype=torch.float64).repeat(4, 1)
    ranks, gaps = torch.arange(16) // 4 % 3, torch.tensor([1.0, 1.0, 1.0, 1.0])
    expected = loop_cloc(features.tolist(), ranks.tolist(), gaps.tolist(), [1] * 16)
    assert cloc_loss(features, ranks, gaps).item() == pytest.approx(mean(expected, [1] * 16))


def test_gradients_against_loops():
    """Of features and gaps: central differences of the loops, entry by entry."""
    features, ranks, gaps, weights = batch()
    features.requires_grad_()
    gaps.requires_grad_()
    cloc_loss(features, ranks, gaps, weights).backward()
    for given in (features, gaps):
        for place in torch.cartesian_prod(*map(torch.arange, given.shape)).view(-1, given.ndim).tolist():
            ends = []
            for step in (1e-6, -1e-6):
                with torch.no_grad():
                    given[tuple(place)] += step
                    anchors = loop_cloc(features.tolist(), ranks.tolist(), gaps.tolist(), weights.tolist())
                    given[tuple(place)] -= step
                ends.append(mean(anchors, weights.tolist()))
            assert given.grad[tuple(place)].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5, abs=1e-7)
    assert (gaps.grad >= 0).all()  # the loss alone only makes them smaller
    assert (gaps.grad > 0).any()


def test_a_weight_counts_as_copies():
    """Without the pairs of one picture's copies, which are as alike as can be."""
    features, ranks, gaps, _ = batch(6, seed=5)
    copies = torch.tensor([1, 3, 1, 2, 1, 2])
    rows = torch.arange(6).repeat_interleave(copies)
    anchors = loop_cloc(features[rows].tolist(), ranks[rows].tolist(), gaps.tolist(), [1] * 10, rows.tolist())
    assert sum(anchors) > 0
    assert cloc_loss(features, ranks, gaps, copies).item() == pytest.approx(mean(anchors, [1] * 10))


@pytest.mark.parametrize("ranks", [[2], [2, 2, 2], [0, 1, 4]])
def test_batches_without_triples(ranks):
    features = torch.randn(len(ranks), 3, dtype=torch.float16, requires_grad=True)
    gaps = torch.full((4,), 0.5, requires_grad=True)
    loss = cloc_loss(features, torch.tensor(ranks), gaps)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss == 0
    assert (features.grad == 0).all()
    assert (gaps.grad == 0).all()


def test_triples_are_never_built():
    """A batch of 512 has 70 million of them; nothing is larger than a few numbers a pair."""

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for each in result if isinstance(result, tuple | list) else [result]:
                self.numbers = max(self.numbers, each.numel() if torch.is_tensor(each) else 0)
            return result

    with Largest() as seen:
        loss = cloc_loss(torch.randn(512, 8, requires_grad=True), torch.randint(5, (512,)), torch.full((4,), 0.3))
        loss.backward()
    assert 512**2 <= seen.numbers <= 2 * 512**2


# The head


def head_of(ranks=RANKS, dimensions=4, **options):
    torch.manual_seed(0)
    return build_head("cloc", HeadContext(ranks, dimensions), options)


def targets_of(rank, progress=0.0):
    return Targets(RANKS.tensor()[rank], rank, None, progress)


def test_gaps_start_between_a_half_and_one():
    ranks = Ranks.linear(0, 100, 101)
    gaps = head_of(ranks).current_gaps(0.0)
    assert gaps.shape == (100,)
    assert 0.5 <= gaps.min() < 0.55
    assert 0.95 < gaps.max() <= 1
    single = head_of(ranks, single_margin=True)
    assert single.margins.shape == (1,)
    assert len(single.current_gaps(0.0).unique()) == 1
    assert torch.equal(head_of(ranks).gaps, head_of(ranks).gaps)  # drawn by the global generator
    for head in (head_of(ranks), single):
        assert torch.allclose(head.gaps, head.current_gaps(0.0), atol=1e-6)
        assert torch.equal(head.current_gaps(1.0), head.gaps)


def test_margins_learn_and_are_fixed_then():
    """Whatever the optimiser does to the parameter by momentum."""
    head = head_of(margin_share=0.5)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.01)
    features, rank = torch.randn(12, 4), torch.arange(12) % 5
    used, kept, terms = [], [], {}
    for step in range(8):
        used.append(head.current_gaps(step / 8).tolist())
        terms = head.loss(head(features), targets_of(rank, step / 8))
        assert terms["loss"].item() == pytest.approx((terms["contrast_loss"] + terms["classification_loss"]).item())
        kept.append(head.gaps.tolist())
        optimizer.zero_grad()
        terms["loss"].backward()
        assert all(p.grad is not None for p in head.parameters())
        optimizer.step()
    assert len({tuple(gaps) for gaps in used[:4]}) == 4
    lowest = [min(gaps) for gaps in used[:4]]
    assert sorted(lowest, reverse=True) == lowest
    assert lowest[-1] > 0
    assert used[4:] == [used[3]] * 4
    assert kept == used
    head.eval()
    head.current_gaps(0.1)  # what is no training moves nothing
    assert head.gaps.tolist() == used[3]
    assert head_of(margin_share=0).current_gaps(0.0).tolist() == head_of().gaps.tolist()


def test_the_classifier_answers_and_both_losses_shape_the_space():
    head = head_of(contrast_weight=0.5, margin_share=1)
    features, rank = torch.randn(12, 4), torch.arange(12) % 5
    outputs = head(features)
    assert torch.equal(head.predict(outputs).probabilities, outputs["logits"].softmax(dim=1))
    assert torch.allclose(head.space(features).norm(dim=1), torch.ones(12))
    terms = head.loss(outputs, targets_of(rank))
    torch.testing.assert_close(terms["contrast_loss"], cloc_loss(head.space(features), rank, head.gaps))
    for name in ("contrast_loss", "classification_loss"):
        (gradient,) = torch.autograd.grad(terms[name], head.layers[0].weight, retain_graph=True)
        assert gradient.abs().sum() > 0
    expected = terms["classification_loss"] + 0.5 * terms["contrast_loss"]
    assert terms["loss"].item() == pytest.approx(expected.item())


def test_it_spreads_the_ranks_in_their_order():
    """Cross-entropy alone tells the ranks apart just as well, but not where they lie."""
    generator = torch.Generator().manual_seed(3)
    rank = torch.randint(5, (300,), generator=generator)
    features = torch.nn.functional.one_hot(rank, 5) * 3 + torch.randn(300, 5, generator=generator)
    correlations = []
    for weight in (0.0, 4.0):
        head = head_of(dimensions=5, contrast_weight=weight)
        optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
        for step in range(120):
            rows = torch.arange(50) + 50 * (step % 5)
            loss = head.loss(head(features[rows]), targets_of(rank[rows], step / 120))["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            space, apart = head.space(features[250:]), (rank[250:, None] - rank[250:]).abs().float()
            cosine = space @ space.t()
            correlations.append(-torch.corrcoef(torch.stack([cosine.flatten(), apart.flatten()]))[0, 1].item())
            assert (head(features[250:])["logits"].argmax(dim=1) == rank[250:]).float().mean() > 0.7
    assert correlations[1] > correlations[0] + 0.1


@pytest.mark.slow
def test_resuming_in_the_second_phase_keeps_the_margins(quick):
    """Steps 3 and 4 of 4, after a checkpoint at step 2, use the gaps of step 2."""
    config = quick("method=cloc", "train.eval_every=2")
    folder = train(config, quiet=True)
    losses, metrics = losses_of(folder), json.loads((folder / "metrics.json").read_text())
    gaps = [load_checkpoint(folder / "checkpoints" / f"step-0000000{n}").weights["head.gaps"] for n in (2, 4)]
    assert torch.equal(*gaps)
    shutil.rmtree(folder / "checkpoints" / "step-00000004")
    train(config.model_copy(update={"train": config.train.model_copy(update={"resume": "auto"})}), quiet=True)
    assert losses_of(folder).tolist() == losses.tolist()
    assert json.loads((folder / "metrics.json").read_text())["test"] == metrics["test"]
