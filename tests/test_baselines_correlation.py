"""PLC and SRC against plain loops; what they do not change under; batches without correlation."""

import math

import pytest
import torch

from baselines.correlation import plc_loss, src_loss
from ordinalclip import Ranks
from ordinalclip.heads import HeadContext, Targets, build_head


def batch(size=12, seed=0, ties=True):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(size, 3, generator=generator, dtype=torch.float64)
    labels = torch.randn(size, generator=generator, dtype=torch.float64)
    if ties:
        labels = (4 * labels).round() / 4
    predictions = labels + torch.randn(size, generator=generator, dtype=torch.float64)
    return features, predictions, labels, 0.5 + torch.rand(size, generator=generator, dtype=torch.float64)


def loop_plc(predictions, labels, weights, outliers):
    rows = sorted(range(len(labels)), key=lambda i: abs(predictions[i] - labels[i]), reverse=True)
    num = math.ceil(outliers * len(labels))
    far, near = rows[:num], rows[num:]
    total = sum(weights[i] for i in near)
    mean = [sum(weights[i] * x[i] for i in near) / total for x in (predictions, labels)]
    std = [
        math.sqrt(sum(weights[i] * (x[i] - m) ** 2 for i in near) / total)
        for x, m in zip((predictions, labels), mean, strict=True)
    ]
    covariance = sum(weights[i] * (predictions[i] - mean[0]) * (labels[i] - mean[1]) for i in near) / total
    return {
        "pearson": 1 - covariance / (std[0] * std[1]),
        "mean": (mean[0] - mean[1]) ** 2,
        "deviation": (std[0] - std[1]) ** 2,
        "outliers": sum(weights[i] * (predictions[i] - labels[i]) ** 2 for i in far)
        / (sum(weights[i] for i in far) or 1),
    }


@pytest.mark.parametrize("outliers", [0.0, 0.1, 0.5])
def test_plc_against_loops(outliers):
    _, predictions, labels, weights = batch()
    terms = plc_loss(predictions, labels, weights, outliers)
    expected = loop_plc(predictions.tolist(), labels.tolist(), weights.tolist(), outliers)
    assert {name: terms[name].item() for name in expected} == pytest.approx(expected)
    assert terms["loss"].item() == pytest.approx(sum(expected.values()))


def loop_src(features, labels, weights, gap, margin):
    """All anchors, all pairs, as the docstring of `src_loss` says."""
    size = len(labels)
    unit = [[x / math.hypot(*row) for x in row] for row in features]
    cosine = [[sum(a * b for a, b in zip(one, other, strict=True)) for other in unit] for one in unit]
    coarse, fine = [], []
    for i in range(size):
        others = sorted(set(range(size)) - {i}, key=lambda k: (abs(labels[i] - labels[k]), -cosine[i][k]))
        distance = {k: abs(labels[i] - labels[k]) for k in others}
        for place, j in enumerate(others):
            far = [k for k in others if distance[k] >= distance[j] + gap]  # the nearest of them, the hardest of ties
            if far:
                weight = weights[i] * weights[j] * weights[far[0]]
                coarse.append((max(0.0, margin - (cosine[i][j] - cosine[i][far[0]])), weight))
            if place + 1 < len(others):
                k = others[place + 1]
                g = distance[k] - distance[j]
                if 0 < g < gap:
                    weight = weights[i] * weights[j] * weights[k]
                    fine.append((max(0.0, margin * g / gap - (cosine[i][j] - cosine[i][k])), weight))
    return [sum(e * w for e, w in part) / (sum(w for _, w in part) or 1) for part in (coarse, fine)]


@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("gap", [0.6, 0.5])  # with ties, in quarters, some gaps are exactly 0.5
def test_src_against_loops(ties, seed, gap):
    features, _, labels, weights = batch(seed=seed, ties=ties)
    terms = src_loss(features, labels, gap, 0.3, 0.2, weights)
    coarse, fine = loop_src(features.tolist(), labels.tolist(), weights.tolist(), gap, 0.2)
    assert terms["coarse"].item() == pytest.approx(coarse)
    assert terms["fine"].item() == pytest.approx(fine)
    assert min(coarse, fine) > 0
    assert terms["loss"].item() == pytest.approx(coarse + 0.3 * fine)


def test_pearson_does_not_change_under_positive_affine_maps():
    _, predictions, labels, weights = batch()
    plain = plc_loss(predictions, labels, weights, 0.0)["pearson"].item()
    assert plc_loss(0.2 * predictions + 7, labels, weights, 0.0)["pearson"].item() == pytest.approx(plain)
    assert plc_loss(predictions, 30 * labels - 9, weights, 0.0)["pearson"].item() == pytest.approx(plain)
    assert plc_loss(-predictions, labels, weights, 0.0)["pearson"].item() == pytest.approx(2 - plain)
    assert plc_loss(predictions**3, labels, weights, 0.0)["pearson"].item() != pytest.approx(plain, rel=1e-3)


def test_outliers_do_not_spoil_the_correlation():
    _, _, labels, _ = batch(20)
    predictions = labels.clone()
    predictions[3] = 100
    terms = plc_loss(predictions, labels)
    assert terms["pearson"].item() == pytest.approx(0, abs=1e-9)
    assert terms["outliers"].item() == pytest.approx((100 - labels[3].item()) ** 2 / 2)  # 2 of 20


def test_what_src_does_not_change_under():
    features, _, labels, weights = batch()
    plain = src_loss(features, labels, 0.6, weights=weights)["loss"].item()
    assert src_loss(features, labels + 8, 0.6, weights=weights)["loss"].item() == pytest.approx(plain)
    assert src_loss(features, -labels, 0.6, weights=weights)["loss"].item() == pytest.approx(plain)
    assert src_loss(features, 16 * labels, 16 * 0.6, weights=weights)["loss"].item() == pytest.approx(plain)
    lengths = torch.linspace(0.5, 4, 12).double()[:, None]
    assert src_loss(lengths * features, labels, 0.6, weights=weights)["loss"].item() == pytest.approx(plain)
    assert src_loss(features, labels**3, 0.6, weights=weights)["loss"].item() != pytest.approx(plain, rel=1e-3)


def test_features_in_order_cost_nothing():
    """On a half circle the cosines fall as the labels part; the other way round it is the worst order."""
    labels = torch.arange(8, dtype=torch.float64)
    angle = labels * torch.pi / 8
    ordered = torch.stack([angle.cos(), angle.sin()], dim=1)
    assert src_loss(ordered, labels, 2.0, margin=1e-3)["loss"] == 0
    assert src_loss(ordered[[0, 7, 1, 6, 2, 5, 3, 4]], labels, 2.0, margin=1e-3)["loss"] > 0.5


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("constant", ["labels", "predictions", "features", "all"])
def test_batches_without_correlation(size, constant):
    features, predictions, labels, _ = (tensor.clone() for tensor in batch(size))
    for name, tensor in (("labels", labels), ("predictions", predictions), ("features", features)):
        if constant in (name, "all"):
            tensor.fill_(0.3)
    features.requires_grad_()
    predictions.requires_grad_()
    terms = (plc_loss(predictions, labels), src_loss(features, labels, 0.25))
    loss = sum(term["loss"] for term in terms)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(features.grad).all()
    assert torch.isfinite(predictions.grad).all()
    if constant == "all":
        assert terms[1]["loss"] == 0


def test_rounding_is_no_correlation():
    """Predictions that are equal but for the last bit of float32 make no gradient of 1e7."""
    predictions = (torch.ones(16) + torch.finfo(torch.float32).eps * (torch.arange(16) % 2)).requires_grad_()
    plc_loss(predictions, torch.randn(16), outliers=0.0)["pearson"].backward()
    assert predictions.grad.abs().max() < 1


def test_memory_is_that_of_pairs():
    """256 samples have 16.8 million triples: no tensor of the graph or on the way has more than a few B^2 entries."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        entries = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else (result,):
                if isinstance(tensor, torch.Tensor):
                    self.entries = max(self.entries, tensor.numel())
            return result

    features = torch.randn(256, 8, requires_grad=True)
    with Largest() as largest:
        src_loss(features, torch.randn(256), 0.25)["loss"].backward()
    assert 256 * 255 <= largest.entries <= 2 * 256**2


def test_the_fine_part_comes_in_by_half_of_the_training():
    head = build_head("src", HeadContext(Ranks.linear(0, 10, 11), 3, label_mean=5, label_std=3), {"gap": 1.0})
    features, _, labels, _ = batch()
    labels = (5 + 2 * labels).clamp(0, 10).float()
    outputs = head(features.float())
    values = [
        head.loss(outputs, Targets(labels, labels.round().long(), None, progress))["src"].item()
        for progress in (0, 0.25, 0.5, 1)
    ]
    terms = src_loss(features.float(), labels, 3.0)
    coarse, fine = terms["coarse"].item(), terms["fine"].item()
    assert values == pytest.approx([coarse, coarse + fine / 2, coarse + fine, coarse + fine], rel=1e-5)
    assert fine > 0


def test_both_losses_are_added():
    context = HeadContext(Ranks.linear(0, 10, 11), 3, label_mean=5, label_std=3)
    features, _, labels, weights = (tensor.float() for tensor in batch())
    targets, terms = Targets(5 + labels, torch.zeros(12, dtype=torch.int64), weights, 0.4), {}
    for method in ("plc", "src", "plc_src"):
        torch.manual_seed(0)
        head = build_head(method, context, {})
        terms[method] = {name: term.item() for name, term in head.loss(head(features), targets).items()}
    assert terms["plc_src"] == pytest.approx(
        {
            "loss": terms["plc"]["loss"] + terms["src"]["src"],
            "mse": terms["plc"]["mse"],
            "plc": terms["plc"]["plc"],
            "src": terms["src"]["src"],
        }
    )


@pytest.mark.parametrize("labels", ["drawn", "all but one equal"])
@pytest.mark.parametrize("outliers", [0.0, 0.1, 0.5])
def test_slopes_are_those_of_differences(labels, outliers):
    """Of PLC and its terms by themselves, and of SRC; away from the samples between which outliers are chosen."""
    features, predictions, drawn, weights = batch(16)
    given = drawn if labels == "drawn" else torch.zeros_like(drawn).index_fill_(0, torch.tensor([5]), 1.0)
    for term in ("loss", "pearson", "mean", "deviation", "outliers"):
        torch.autograd.gradcheck(
            lambda p, term=term: plc_loss(p, given, weights, outliers)[term], predictions.clone().requires_grad_()
        )
    torch.autograd.gradcheck(
        lambda f: src_loss(f, given, 0.5, 0.3, 0.2, weights)["loss"], features.clone().requires_grad_()
    )
