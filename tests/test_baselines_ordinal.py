"""Regressors, distributions and thresholds against plain loops; what all sample-wise losses have in common."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from baselines import HEADS
from baselines.thresholds import corn_loss, rank_probabilities, threshold_loss
from ordinalclip import Ranks
from ordinalclip.backbones import load_backbone
from ordinalclip.heads import HeadContext, Targets, build_head, decode, head_class

GOLDEN = json.loads((Path(__file__).parent / "golden" / "baselines_open.json").read_text())
RANKS = Ranks((0.0, 1.0, 3.0, 4.0, 6.0))
SAMPLE_WISE = {  # a sample of weight 2 is that sample twice
    **{method: {} for method in ("l1", "mse", "huber", "cross_entropy", "cnn", "sord", "dldl_v2", "mean_variance")},
    **{method: {} for method in ("ordreg", "coral", "corn", "l2_softmax", "cosface", "arcface", "rm_loss", "loss")},
    **{method: {} for method in ("large_tuned", "l2rclip", "ranking_adapter")},
    "plc": {"outliers": 0.0},  # which samples are outliers does not depend on weights
}
LEARNING = sorted(method for method in HEADS if head_class(method).learns)
SMALL = {"ranking_adapter": {"width": 16}}  # what would take long
LAYERS = (6, 4, 6)  # widths, for heads on the features of layers
SHAPES = {"pooled": (6,), "layers": (len(LAYERS), 6), "tokens": (4, 6)}  # of what heads read


def head_of(method, ranks=RANKS, label_mean=2.5, label_std=1.5, **options):
    torch.manual_seed(0)
    dims = LAYERS if head_class(method).reads == "layers" else ()
    text = load_backbone("tiny").text if head_class(method).rebuilt else None
    context = HeadContext(ranks, 6, text, 0.0, False, label_mean, label_std, layer_dims=dims)
    return build_head(method, context, {**SMALL.get(method, {}), **options}).double()


def shape_of(method):
    """Of what an encoder gives the method for a picture."""
    return SHAPES[head_class(method).reads]


def batch(size=9, seed=0, ranks=RANKS, shape=(6,)):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(size, *shape, generator=generator, dtype=torch.float64)
    rank = torch.randint(len(ranks), (size,), generator=generator)
    shift = 0.3 * torch.rand(size, generator=generator, dtype=torch.float64)
    return features, Targets(ranks.tensor().double()[rank] + shift, rank, None, 0.3)


def loss_of(head, features, targets):
    return head.loss(head(features), targets)["loss"]


def expected(method, head, features, targets):
    """The losses of single samples in plain Python; `head` gives the numbers that a linear layer puts out."""
    outputs, total = head(features), 0.0
    for row, (value, rank) in enumerate(zip(targets.values.tolist(), targets.ranks.tolist(), strict=True)):
        if "standardised" in outputs:
            error = abs(outputs["standardised"][row].item() - (value - 2.5) / 1.5)
            total += {"l1": error, "mse": error**2, "huber": error**2 / 2 if error < 1 else error - 0.5}[method]
            continue
        logits = outputs["above" if "above" in outputs else "logits"][row].tolist()
        if "above" in outputs:
            yes = [1 / (1 + math.exp(-x)) for x in logits]
            total -= sum(math.log(p if rank > k else 1 - p) for k, p in enumerate(yes))
            continue
        p = [math.exp(x) / sum(math.exp(y) for y in logits) for x in logits]
        mean = sum(q * v for q, v in zip(p, RANKS.values, strict=True))
        one_hot = [float(k == rank) for k in range(len(p))]
        if method == "sord":
            soft = [math.exp(-abs(v - value)) for v in RANKS.values]
        elif method == "dldl_v2":
            soft = [math.exp(-((v - value) ** 2) / (2 * 2.0**2)) for v in RANKS.values]
            total += abs(mean - value)
        else:
            soft = one_hot
        if method == "mean_variance":
            variance = sum(q * (v - mean) ** 2 for q, v in zip(p, RANKS.values, strict=True))
            total += 0.2 * (mean - value) ** 2 / 2 + 0.05 * variance
        total -= sum(t / sum(soft) * math.log(q) for t, q in zip(soft, p, strict=True))
    return total / len(features)


@pytest.mark.parametrize(
    "method", ["l1", "mse", "huber", "cross_entropy", "sord", "dldl_v2", "mean_variance", "ordreg", "coral"]
)
def test_losses_against_loops(method):
    head, (features, targets) = head_of(method), batch()
    with torch.no_grad():
        features = 3 * features  # errors on both sides of Huber's delta
        assert loss_of(head, features, targets).item() == pytest.approx(expected(method, head, features, targets))


def test_corn_against_loops():
    logits, ranks = torch.randn(9, 4, dtype=torch.float64), torch.randint(5, (9,))
    total, answers = 0.0, 0
    for row, rank in zip(logits.tolist(), ranks.tolist(), strict=True):
        for k in range(4):
            if rank >= k:
                p = 1 / (1 + math.exp(-row[k]))
                total, answers = total - math.log(p if rank > k else 1 - p), answers + 1
    assert corn_loss(logits, ranks).item() == pytest.approx(total / answers)


def test_golden_coral_and_corn():
    logits, ranks = torch.tensor(GOLDEN["coral"]["logits"]), torch.tensor(GOLDEN["coral"]["labels"])
    assert threshold_loss(logits, ranks).item() == pytest.approx(GOLDEN["coral"]["coral_loss"], rel=1e-5)
    assert corn_loss(logits, ranks).item() == pytest.approx(GOLDEN["coral"]["corn_loss"], rel=1e-5)


@pytest.mark.parametrize("size", [0, 1, 3])
def test_corn_without_answers_is_finite(size):
    """Nobody above the lowest rank, and nobody at all: the published code divides 0 by 0."""
    logits = torch.randn(size, 4, requires_grad=True)
    loss = corn_loss(logits, torch.zeros(size, dtype=torch.int64))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()
    assert (loss == 0) == (size == 0)


def test_contradicting_answers_become_a_distribution():
    exceedance = torch.tensor([[0.9, 0.2, 0.7, 0.1], [0.4, 0.6, 0.6, 0.6], [0.0, 0.0, 0.0, 0.0]])
    probabilities = rank_probabilities(exceedance)
    assert (probabilities >= 0).all()
    assert torch.allclose(probabilities.sum(dim=1), torch.ones(3))
    assert decode(probabilities, RANKS, "median").rank.tolist() == (exceedance > 0.5).sum(dim=1).tolist()
    assert torch.allclose(probabilities @ torch.arange(5.0), exceedance.sum(dim=1))


def test_corn_probabilities_are_products():
    head = head_of("corn")
    above = torch.tensor([[2.0, -1.0, 0.5, 0.0]])
    answers = above.sigmoid()[0].tolist()
    at_least = [1, answers[0], answers[0] * answers[1], math.prod(answers[:3]), math.prod(answers), 0]
    probabilities = head.predict({"above": above}).probabilities[0].tolist()
    assert probabilities == pytest.approx([a - b for a, b in pairwise(at_least)])


def test_coral_starts_from_equally_likely_ranks():
    head = head_of("coral")
    with torch.no_grad():
        head.linear.weight.zero_()
    outputs = head(batch()[0])
    assert torch.allclose(outputs["above"].sigmoid(), torch.tensor([0.8, 0.6, 0.4, 0.2]).double(), atol=1e-6)
    assert torch.allclose(head.predict(outputs).probabilities, torch.full((9, 5), 0.2).double(), atol=1e-6)


@pytest.mark.parametrize("method", sorted(SAMPLE_WISE))
def test_a_weight_counts_as_copies(method):
    head = head_of(method, **SAMPLE_WISE[method]).eval()
    features, targets = batch(shape=shape_of(method))
    copies = torch.tensor([1, 3, 1, 2, 1, 1, 2, 1, 1])
    weighted = loss_of(head, features, targets._replace(weights=copies.double()))
    values, ranks = (label.repeat_interleave(copies) for label in targets[:2])
    repeated = loss_of(head, features.repeat_interleave(copies, 0), targets._replace(values=values, ranks=ranks))
    assert weighted.item() == pytest.approx(repeated.item())
    assert weighted.item() != pytest.approx(loss_of(head, features, targets).item(), rel=1e-4)


@pytest.mark.parametrize("method", LEARNING)
def test_gradient_is_right(method):
    """Through head and loss; the L1 probe sees no gradient by intent, so its share is left out."""
    head, (features, targets) = head_of(method), batch(7, shape=shape_of(method))
    head.eval()
    targets = targets._replace(weights=torch.linspace(0.5, 2, 7).double())

    def loss(x):
        terms = head.loss(head(x), targets)
        return terms.get("embedding_loss", terms["loss"])

    assert torch.autograd.gradcheck(loss, features.requires_grad_())


@pytest.mark.parametrize("method", LEARNING)
def test_scale_of_the_weights_and_order_of_the_batch_do_not_matter(method):
    if method == "atrip":
        pytest.skip("its random triples are places in the batch: see test_baselines_metric.py")
    if method == "numclip":
        pytest.skip("its coded loss over the batch depends on how many copies there are: see test_numclip.py")
    head, (features, targets) = head_of(method).eval(), batch(shape=shape_of(method))
    weights = torch.linspace(0.5, 2, 9).double()
    plain = loss_of(head, features, targets._replace(weights=weights)).item()
    assert plain > 0
    assert loss_of(head, features, targets._replace(weights=3 * weights)).item() == pytest.approx(plain)
    if method != "n_pair":  # takes the first pair of each rank
        order = torch.randperm(9)
        shuffled = Targets(targets.values[order], targets.ranks[order], weights[order], targets.progress)
        assert loss_of(head, features[order], shuffled).item() == pytest.approx(plain)


@pytest.mark.parametrize(
    "method",
    ["l1", "mse", "huber", "plc", "src", "plc_src", "rm_loss", "atrip", "large_tuned", "conord", "ranking_adapter"],
)
def test_the_unit_of_the_labels_does_not_matter(method):
    """Years or months: losses are those of standardised labels, answers those of the unit."""
    years, months = head_of(method), head_of(method, Ranks(tuple(12 * v for v in RANKS.values)), 12 * 2.5, 12 * 1.5)
    years, months = years.eval(), months.eval()
    features, targets = batch(shape=shape_of(method))
    assert loss_of(months, features, targets._replace(values=12 * targets.values)).item() == pytest.approx(
        loss_of(years, features, targets).item()
    )
    answers = [head.eval().predict(head(features)).value for head in (years, months)]
    assert torch.allclose(12 * answers[0], answers[1])


@pytest.mark.parametrize("method", LEARNING)
@pytest.mark.parametrize("size", [1, 4])
def test_one_label_and_equal_pictures_are_finite(method, size):
    """Identical rows with one label: roots, norms and correlations of nothing."""
    head = head_of(method)
    features = torch.ones(size, *shape_of(method), dtype=torch.float64, requires_grad=True)
    loss = loss_of(head, features, Targets(torch.full((size,), 3.0).double(), torch.full((size,), 2)))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(features.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in head.parameters() if p.requires_grad)  # DDP needs one for each


@pytest.mark.parametrize("method", LEARNING)
def test_half_precision_features_are_scored_in_float32(method):
    features, targets = batch(shape=shape_of(method))
    head = head_of(method).float().eval()
    targets = targets._replace(values=targets.values.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = head(features.bfloat16())
    assert {output.dtype for output in outputs.values()} == {torch.float32}
    exact = head(features.bfloat16().float())
    if not head.rebuilt:  # text towers compute as autocast says
        assert all(torch.equal(outputs[name], exact[name]) for name in exact)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("huber", {"delta": 0}, r"head\.delta: .*greater than 0, got 0"),
        ("sord", {"sharpness": -1}, r"head\.sharpness: .*greater than 0"),
        ("dldl_v2", {"std": 0}, r"head\.std: .*greater than 0"),
        ("rm_loss", {"sigma": 0}, r"head\.sigma: .*greater than 0, got 0"),
        ("rm_loss", {"momentum": 1}, r"head\.momentum: .*less than 1, got 1"),
        ("rm_loss", {"readout": "nn"}, r"head\.readout: .*'neighbors', 'nearest' or 'l1', got 'nn'"),
        ("atrip", {"triples_per_sample": 0}, r"head\.triples_per_sample: .*greater than or equal to 1"),
        ("rank_n_contrast", {"temperature": 0}, r"head\.temperature: .*greater than 0"),
        ("plc_src", {"gap": 0}, r"head\.gap: .*greater than 0, got 0"),
        ("large", {"share": 0}, r"head\.share: .*greater than 0, got 0"),
        ("large", {"budget": 1}, r"head\.budget: .*greater than or equal to 2, got 1"),
        ("ranking_adapter", {"dropout": 1}, r"head\.dropout: .*less than 1, got 1"),
        ("l2rclip", {"ordinal_weight": -1}, r"head\.ordinal_weight: .*greater than or equal to 0"),
        ("large_tuned", {"budget": 5}, r"head\.budget: training reads all labels; draw fewer .* data\.shots"),
        ("coral", {"margin": 1}, "options of method 'coral': head.margin is not a key; there are none"),
    ],
)
def test_bad_options(method, options, message):
    with pytest.raises(ValueError, match=message):
        head_of(method, **options)
