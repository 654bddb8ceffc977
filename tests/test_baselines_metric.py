"""Metric-space methods: golden numbers, plain loops, the running threshold, and the two read-outs."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import learner_of, losses_of
from safetensors.torch import load_file, save_file

from baselines import HEADS
from baselines.adaptive_triplet import adaptive_triplet_loss, draw_triples
from baselines.embedding import EmbeddingHead
from baselines.rank_n_contrast import rank_n_contrast_loss
from baselines.rm_loss import RMLoss
from ordinalclip import OrdinalModel, Ranks
from ordinalclip.heads import HeadContext, Targets, build_head, head_class
from ordinalclip.training import train

GOLDEN = json.loads((Path(__file__).parent / "golden" / "baselines_open.json").read_text())
RANKS = Ranks.linear(0, 100, 6)
METRIC = [method for method in HEADS if issubclass(head_class(method), EmbeddingHead)]


def batch(size=9, dimensions=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(size, dimensions, generator=generator, dtype=torch.float64)
    labels = torch.randint(5, (size,), generator=generator).double() / 2  # with ties
    return features, labels, 0.5 + torch.rand(size, generator=generator, dtype=torch.float64)


def norm(a, b):
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)))


# RM-Loss


def loop_rm_loss(features, labels, weights, threshold, sigma=0.5, alpha=0.1, momentum=0.9, mining=True):
    """The loss and the threshold after one batch."""
    rows = range(len(features))
    pairs = []
    for i in rows:
        for j in rows:
            d = norm(labels[i], labels[j])
            w = math.exp(-((d / sigma) ** 2) / 2) + alpha
            pairs.append((w, w * abs(norm(features[i], features[j]) - d), weights[i] * weights[j]))
    mean = sum(m * c for _, m, c in pairs) / sum(c for _, _, c in pairs)
    threshold = mean if threshold is None else momentum * threshold + (1 - momentum) * mean
    kept = [(w, m, c) for w, m, c in pairs if m > threshold or not mining]
    return sum(m * c for _, m, c in kept) / (sum(w * c for w, _, c in kept) + 1e-9), threshold


def test_golden_rm_loss():
    """Four batches through one object: loss, pairs kept, threshold, norm of the gradient."""
    golden = GOLDEN["rm_loss"]
    loss = RMLoss(golden["sigma"], golden["alpha"], golden["momentum"]).double()
    kept = []
    mined = loss.mined
    loss.mined = lambda errors, copies: kept.append(mined(errors, copies)) or kept[-1]
    for case in golden["batches"]:
        features = torch.tensor(case["features"], dtype=torch.float64, requires_grad=True)
        value = loss(features, torch.tensor(case["labels"], dtype=torch.float64))
        value.backward()
        assert value.item() == pytest.approx(case["loss"], rel=1e-9)
        assert kept[-1].sum() == case["kept_pairs"]
        assert loss.threshold.item() == pytest.approx(case["threshold"], rel=1e-9)
        assert features.grad.norm().item() == pytest.approx(case["grad_norm"], rel=1e-9)


@pytest.mark.parametrize(
    "options",
    [{}, {"sigma": math.inf}, {"alpha": 0.0}, {"mining": False}, {"momentum": 0.5, "sigma": 1.5, "alpha": 0.3}],
)
@pytest.mark.parametrize("dimensions", [1, 2])
def test_rm_loss_against_loops(options, dimensions):
    """With weights, label of one and two dimensions, and the threshold carried along."""
    loss, threshold = RMLoss(**options).double(), None
    for seed in range(3):
        features, labels, weights = batch(seed=seed)
        labels = torch.stack([labels, labels.flip(0) ** 2], dim=1)[:, :dimensions]
        expected, threshold = loop_rm_loss(
            features.tolist(), labels.tolist(), weights.tolist(), threshold, **{"mining": True, **options}
        )
        given = labels.squeeze(1) if dimensions == 1 else labels
        assert loss(features, given, weights).item() == pytest.approx(expected)
        if options.get("mining", True):
            assert loss.threshold.item() == pytest.approx(threshold)


def test_threshold_is_state_that_training_alone_moves(tmp_path):
    loss = RMLoss()
    loss.eval()(*batch()[:2])
    assert loss.threshold < 0  # nothing seen
    loss.train()(*batch(seed=1)[:2])
    seen = loss.threshold.clone()
    assert seen > 0
    loss.eval()(*batch(seed=2)[:2])
    assert torch.equal(loss.threshold, seen)
    save_file(loss.state_dict(), tmp_path / "state.safetensors")
    restored = RMLoss()
    restored.load_state_dict(load_file(tmp_path / "state.safetensors"))
    again = [each.train()(*batch(seed=3)[:2]) for each in (loss, restored)]
    assert torch.equal(*again)
    assert torch.equal(loss.threshold, restored.threshold)


def test_errors_as_large_as_the_threshold_do_not_count():
    """At a threshold of 0 the pairs of a sample with itself, without error, are left out; and of one error, all."""
    loss = RMLoss().double().eval()
    loss.threshold.fill_(0.0)
    features, labels, _ = batch()
    pairs = [
        (math.exp(-(((labels[i] - labels[j]).item() / 0.5) ** 2) / 2) + 0.1, i, j)
        for i in range(9)
        for j in set(range(9)) - {i}
    ]
    errors = [
        w * abs(norm(features[i].tolist(), features[j].tolist()) - abs(labels[i] - labels[j]).item())
        for w, i, j in pairs
    ]
    assert loss(features, labels).item() == pytest.approx(sum(errors) / sum(w for w, _, _ in pairs))
    assert RMLoss()(torch.zeros(4, 2), torch.zeros(4)) == 0


def test_identical_rows_have_a_finite_gradient():
    features = torch.zeros(4, 3, requires_grad=True)
    loss = RMLoss(mining=False)(features, torch.tensor([0.0, 0.0, 1.0, 2.0]))
    loss.backward()
    assert loss > 0
    assert torch.isfinite(features.grad).all()


def test_scale_of_rm_loss_learns():
    head = build_head("rm_loss", HeadContext(RANKS, 4, label_mean=50, label_std=30), {})
    assert head.scale == 1
    features = torch.randn(5, 4)
    before = head(features)["embedding"]
    head.loss(head(features), Targets(torch.rand(5) * 100, torch.zeros(5, dtype=torch.int64)))["loss"].backward()
    assert head.scale.grad != 0
    with torch.no_grad():
        head.scale.fill_(2)
    assert torch.allclose(head(features)["embedding"], 2 * before)


def test_many_ties_shrink_a_noisy_space():
    """What the docstring says of few levels: the labels beside some noise, times c. Without mining one point is the
    best space; all pairs alike, or alpha=1, and the labels' own scale is better than a third of it."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([-0.8, 0.0, 0.8, 1.6]).repeat_interleave(torch.tensor([57, 11, 4, 27]))
    space = torch.cat([labels[:, None], 0.25 * torch.randn(len(labels), 4, generator=generator)], dim=1)

    def best(**options):
        return min((0.0, 0.33, 1.0), key=lambda c: RMLoss(**options)(c * space, labels).item())

    assert best(mining=False) == 0.0
    assert best() == 0.33
    assert best(alpha=1.0) == 1.0
    assert best(sigma=math.inf) == 1.0


# Adaptive triplets


def loop_triplets(features, labels, triples, weights):
    total, count = 0.0, 0.0
    for a, j, k in triples:
        near, far = sorted((j, k), key=lambda other: abs(labels[a] - labels[other]))
        margin = (labels[a] - labels[far]) ** 2 - (labels[a] - labels[near]) ** 2
        if margin > 0:
            weight = weights[a] * weights[j] * weights[k]
            hinge = norm(features[a], features[near]) ** 2 - norm(features[a], features[far]) ** 2 + margin
            total, count = total + weight * max(0.0, hinge), count + weight
    return total / count


def test_adaptive_triplets_against_loops():
    features, labels, weights = batch()
    triples = draw_triples(9, 200, seed=3)
    expected = loop_triplets(features.tolist(), labels.tolist(), triples.t().tolist(), weights.tolist())
    assert adaptive_triplet_loss(features, labels, triples, weights).item() == pytest.approx(expected)
    swapped = triples[[0, 2, 1]]  # which of the two others comes first does not matter
    assert adaptive_triplet_loss(features, labels, swapped, weights).item() == pytest.approx(expected)


def test_a_weight_counts_as_copies_in_all_triplets():
    features, labels, _ = batch(5)
    copies = torch.tensor([1, 3, 1, 2, 1])
    rows = torch.arange(5).repeat_interleave(copies)
    every = torch.cartesian_prod(torch.arange(5), torch.arange(5), torch.arange(5)).t()
    repeated = torch.cartesian_prod(torch.arange(8), torch.arange(8), torch.arange(8)).t()
    assert adaptive_triplet_loss(features, labels, every, copies.double()).item() == pytest.approx(
        adaptive_triplet_loss(features[rows], labels[rows], repeated).item()
    )


def test_triples_are_of_three_samples_and_repeat():
    triples = draw_triples(4, 500, seed=1)
    assert all(len(set(triple)) == 3 for triple in triples.t().tolist())
    assert len({tuple(triple) for triple in triples.t().tolist()}) == 4 * 3 * 2
    assert torch.equal(triples, draw_triples(4, 500, seed=1))
    assert not torch.equal(triples, draw_triples(4, 500, seed=2))
    assert draw_triples(2, 500, seed=1).shape == (3, 0)


def test_rounding_makes_no_triples():
    """Labels one year apart on both sides of the anchor are a tie, whatever the last digit says."""
    labels = (torch.tensor([1955.0, 1954.0, 1956.0]) - 1951.37) / 27.3
    assert (labels[0] - labels[1]).abs() != (labels[0] - labels[2]).abs()
    assert adaptive_triplet_loss(torch.randn(3, 2), labels, torch.tensor([[0], [1], [2]])) == 0


def test_steps_draw_different_triples():
    head = build_head("atrip", HeadContext(RANKS, 4, label_mean=50, label_std=30), {})
    outputs, targets = head(torch.randn(6, 4)), Targets(torch.rand(6) * 100, torch.zeros(6, dtype=torch.int64))
    losses = [head.loss(outputs, targets._replace(progress=p / 1000))["loss"].item() for p in (0, 1, 2, 1)]
    assert losses[1] == losses[3]
    assert len(set(losses)) == 3


# Rank-N-Contrast


def test_golden_rank_n_contrast():
    golden = GOLDEN["rnc"]
    features, labels = torch.tensor(golden["features"]), torch.tensor(golden["labels"]).squeeze(1)
    views = torch.cat([features[:, 0], features[:, 1]])
    loss = rank_n_contrast_loss(views, labels.repeat(2), golden["temperature"])
    assert loss.item() == pytest.approx(golden["loss"], rel=1e-5)


def test_rank_n_contrast_against_loops():
    features, labels, weights = batch()
    total, count = 0.0, 0.0
    for i in range(9):
        similarity = [-norm(features[i].tolist(), other) / 2 for other in features.tolist()]
        distance = [abs(labels[i].item() - other) for other in labels.tolist()]
        for j in set(range(9)) - {i}:
            sum_ = sum(math.exp(similarity[k]) for k in range(9) if k != i and distance[k] >= distance[j])
            weight = (weights[i] * weights[j]).item()
            total, count = total - weight * (similarity[j] - math.log(sum_)), count + weight
    assert rank_n_contrast_loss(features, labels, 2.0, weights).item() == pytest.approx(total / count)


def test_rank_n_contrast_sees_the_order_of_labels_only():
    """Any map that keeps the order of their differences, e.g. another unit."""
    features, labels, _ = batch()
    plain = rank_n_contrast_loss(features, labels).item()
    assert rank_n_contrast_loss(features, 40 - 12 * labels).item() == pytest.approx(plain)


def test_rank_n_contrast_trains_on_two_views(quick):
    """A batch of 8 pictures has 16 rows: each picture twice in a row, in two crops."""
    learner = learner_of(quick("method=rank_n_contrast", "data.augment.crop_ratio=1.3"))
    with learner.batches(0) as batches:
        pixels, positions = next(batches)
    assert positions.tolist() == list(range(16))
    rows = learner.rows_of(0)
    assert rows[::2] == rows[1::2]
    targets = learner._targets(0, torch.device("cpu"), torch.float64)
    assert targets.values.tolist() == learner.train.values[rows].tolist()
    assert targets.ranks.tolist() == learner.train.ranks[rows].tolist()
    assert all(not torch.equal(*pair) for pair in pixels.view(8, 2, *pixels.shape[1:]))
    assert learner_of(quick("method=rank_n_contrast", "head.views=1")).rows_of(0) == rows[::2]


def test_far_embeddings_do_not_overflow():
    features = 1e4 * torch.randn(8, 3)
    features.requires_grad_()
    loss = rank_n_contrast_loss(features, torch.arange(8.0))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(features.grad).all()


# Metric losses on classes


def class_loss(method, embedding, ranks, weights, **options):
    head = build_head(method, HeadContext(Ranks.linear(0, 4, 5), 3), {"embedding_dim": 3, **options}).double()
    return head, head.embedding_loss(embedding, Targets(ranks.double(), ranks, weights))["loss"].item()


def weighted(pairs):
    counted = [(loss, weight) for loss, weight in pairs if loss > 0]
    return sum(loss * weight for loss, weight in counted) / sum(weight for _, weight in counted)


def test_contrastive_against_loops():
    features, labels, weights = batch()
    points, ranks = torch.nn.functional.normalize(features, dim=1), (2 * labels).long()
    same, other = [], []
    for i in range(9):
        for j in set(range(9)) - {i}:
            d, weight = norm(points[i].tolist(), points[j].tolist()), (weights[i] * weights[j]).item()
            (same if ranks[i] == ranks[j] else other).append((d if ranks[i] == ranks[j] else max(0, 1 - d), weight))
    assert class_loss("contrastive", points, ranks, weights)[1] == pytest.approx(weighted(same) + weighted(other))


def test_triplet_against_loops():
    features, labels, weights = batch()
    points, ranks = torch.nn.functional.normalize(features, dim=1), (2 * labels).long()
    found = []
    for i in range(9):
        distances = [norm(points[i].tolist(), other) for other in points.tolist()]
        positive = max(
            (j for j in range(9) if ranks[j] == ranks[i] and j != i), key=distances.__getitem__, default=None
        )
        negative = min((j for j in range(9) if ranks[j] != ranks[i]), key=distances.__getitem__)
        if positive is not None:
            hinge = max(0.0, distances[positive] - distances[negative] + 0.2)
            found.append((hinge, (weights[i] * weights[positive] * weights[negative]).item()))
    assert class_loss("triplet", points, ranks, weights)[1] == pytest.approx(weighted(found))


def test_n_pair_against_loops():
    features, labels, weights = batch()
    ranks = (2 * labels).long()
    pairs = []
    for rank in sorted(set(ranks.tolist())):
        rows = [i for i in range(9) if ranks[i] == rank]
        if len(rows) > 1:
            pairs.append(rows[:2])
    found = []
    for number, (anchor, _) in enumerate(pairs):
        products = [(features[anchor] @ features[positive]).item() for _, positive in pairs]
        loss = math.log(sum(math.exp(p) for p in products)) - products[number]
        found.append((loss, weights[anchor].item()))
    assert class_loss("n_pair", features, ranks, weights)[1] == pytest.approx(weighted(found))


@pytest.mark.parametrize("method", ["cosface", "arcface", "l2_softmax"])
def test_proxies_against_loops(method):
    features, labels, weights = batch()
    points, ranks = torch.nn.functional.normalize(features, dim=1), (2 * labels).long()
    head, loss = class_loss(method, points, ranks, weights, scale=8.0)
    found = []
    for i in range(9):
        if method == "l2_softmax":
            logits = [x + 0.0 for x in (8 * points[i] @ head.classifier.weight.t() + head.classifier.bias).tolist()]
        else:
            proxies = torch.nn.functional.normalize(head.criterion.W, dim=0)
            logits = (points[i] @ proxies).tolist()
            cosine = logits[ranks[i]]
            angle, margin = math.acos(cosine), math.radians(28.6)
            easy = math.cos(angle + margin) if angle <= math.pi - margin else cosine - margin * math.sin(margin)
            logits[ranks[i]] = cosine - 0.35 if method == "cosface" else easy
            logits = [8 * x for x in logits]
        found.append((math.log(sum(math.exp(x) for x in logits)) - logits[ranks[i]], weights[i].item()))
    assert loss == pytest.approx(weighted(found))


# Read-outs


def part(size, seed):
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.randint(6, (size,), generator=generator)
    angle = ranks[:, None] / 2 + torch.arange(4) * torch.pi / 2  # places on a circle, which layer norm leaves there
    features = torch.randn(size, 4, generator=generator) * 0.02 + angle.cos()
    return features, Targets(RANKS.tensor()[ranks].double(), ranks)


@pytest.mark.parametrize("method", METRIC)
@pytest.mark.parametrize("readout", ["neighbors", "nearest", "l1"])
def test_every_space_is_read_out_in_every_way(method, readout):
    torch.manual_seed(0)
    head = build_head(method, HeadContext(RANKS, 4, label_mean=50, label_std=34), {"readout": readout})
    features, targets = part(40, 0)
    assert head.needs_fit == (readout != "l1")
    if head.needs_fit:
        mean = 50 if readout == "neighbors" else 40  # the rank below it
        assert head.predict(head(features)).value.tolist() == pytest.approx([mean] * 40)  # before fit
        train, (queries, truth) = (head(features), targets), part(12, 1)
        head.fit(train, (head(queries), truth))
        assert (head.predict(head(queries)).value - truth.values).abs().mean() < 8  # ranks are 20 apart
        assert head.neighbors.labels.abs().max() < 2  # kept standardised
    terms = head.loss(head(features), targets)
    terms["loss"].backward()
    if readout == "l1":
        outputs = head(features)
        head.zero_grad()
        head.loss(outputs, targets)["readout_loss"].backward()
        assert head.probe.weight.grad.abs().sum() > 0
        others = [p.grad for name, p in head.named_parameters() if not name.startswith("probe.")]
        assert all(grad is None or (grad == 0).all() for grad in others)  # the probe never shapes the space
        assert terms["loss"].item() == pytest.approx((terms["embedding_loss"] + terms["readout_loss"]).item())


@pytest.mark.parametrize("method", [*METRIC, "cloc"])
def test_an_embedding_starts_alike_whatever_the_scale_of_the_features(method):
    torch.manual_seed(0)
    head, features = build_head(method, HeadContext(RANKS, 6), {}), torch.randn(5, 6)
    embedding = head(features)["embedding"]
    assert torch.allclose(head(30 * features + 7)["embedding"], embedding, atol=1e-4)
    assert embedding.std() > 0.01


@pytest.mark.parametrize(
    "method",
    ["rm_loss", *(pytest.param(name, marks=pytest.mark.slow) for name in ("atrip", "conord", "cloc", "text_anchors"))],
)
def test_resuming_brings_what_a_head_keeps_back(quick, method):
    """Steps 3 and 4 from the checkpoint of step 2 are those of the run that was not stopped."""
    config = quick(f"method={method}", "train.eval_every=2")
    folder = train(config, quiet=True)
    losses, metrics = losses_of(folder), json.loads((folder / "metrics.json").read_text())
    shutil.rmtree(folder / "checkpoints" / "step-00000004")
    train(config.model_copy(update={"train": config.train.model_copy(update={"resume": "auto"})}), quiet=True)
    assert losses_of(folder).tolist() == losses.tolist()
    assert json.loads((folder / "metrics.json").read_text())["test"] == metrics["test"]


@pytest.mark.parametrize("form", ["deployed", "trainable"])
def test_a_fitted_bank_is_saved_and_served(tmp_path, form):
    """Its size is known after the fit only; loading is strict all the same, into a head that was fitted or not."""
    torch.manual_seed(0)
    model = OrdinalModel.build("tiny", RANKS, "rm_loss", {"sigma": float("inf")}, label_mean=50, label_std=34).eval()
    pixels, targets = torch.randn(7, 3, 64, 64), part(7, 0)[1]
    with torch.no_grad():
        outputs = model.head(model.encoder(pixels))
    model.head.fit((outputs, targets), (outputs, targets))
    model.save_pretrained(tmp_path, form=form)
    loaded = OrdinalModel.from_pretrained(tmp_path)
    assert loaded.head.neighbors.features.shape == (7, 64)
    assert loaded.head.criterion.sigma == float("inf")
    assert torch.allclose(loaded.predict(pixels).value, model.predict(pixels).value)
    assert len(loaded.predict(pixels).value.unique()) > 1

    model.head.fit(({"embedding": outputs["embedding"][:3]}, Targets(*(label[:3] for label in targets[:2]))), None)
    model.load_state_dict(loaded.state_dict())
    assert torch.allclose(loaded.predict(pixels).value, model.predict(pixels).value)
    half = OrdinalModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.predict(pixels.bfloat16()).value.dtype == torch.float32
