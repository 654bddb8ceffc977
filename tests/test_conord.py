"""ConOrd: reference values, plain loops, degenerate batches, what the unit of the labels does, and its read-out."""

import math

import pytest
import torch

from baselines.conord import conord_loss
from ordinalclip import Ranks
from ordinalclip.heads import HeadContext, Targets, build_head

RANKS = Ranks.linear(0, 100, 6)


def on_circle(*degrees):
    angles = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def batch(size=9, dimensions=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(size, dimensions, generator=generator, dtype=torch.float64)
    labels = torch.randint(5, (size,), generator=generator).double() / 2  # with ties
    return features, labels, 0.5 + torch.rand(size, generator=generator, dtype=torch.float64)


def loop_conord(features, labels, weights, temperature=0.07, power=2, pictures=None):
    """Samples of one of the `pictures` are copies of each other and make no pair."""
    rows, pictures = range(len(features)), pictures or list(range(len(features)))
    points = [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in features]
    total, count = 0.0, 0.0
    for i in rows:
        near, far = 0.0, 0.0
        for j in rows:
            if pictures[i] != pictures[j]:
                similar = weights[j] * math.exp(-math.dist(points[i], points[j]) / temperature)
                apart = abs(labels[i] - labels[j]) ** power
                near, far = near + similar / (apart + 1e-7), far + similar * apart
        if far > 0:
            total, count = total - weights[i] * math.log(near / far), count + weights[i]
    return total / count if count else 0.0


@pytest.mark.parametrize(
    ("labels", "power", "expected"),
    [([0, 1, 1, 3, 4], 2, -7.656199), ([0, 1, 1, 3, 4], 1, -7.661434), ([0, 1, 2, 3, 4], 2, 0.024555)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reference_values(labels, power, expected, dtype):
    """Computed with NumPy from the equations; features of length 1 or any other."""
    features = on_circle(0, 20, 35, 90, 100).to(dtype)
    lengths = torch.tensor([[0.1], [1], [2], [30], [4]], dtype=dtype)
    for given in (features, lengths * features):
        loss = conord_loss(given, torch.tensor(labels), temperature=0.07, power=power)
        assert loss.dtype == dtype
        assert loss.item() == pytest.approx(expected, abs=1e-6 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("temperature", "power"), [(0.07, 2), (0.5, 1), (1.0, 3)])
def test_against_loops(seed, temperature, power):
    features, labels, weights = batch(seed=seed)
    expected = loop_conord(features.tolist(), labels.tolist(), weights.tolist(), temperature, power)
    assert conord_loss(features, labels, temperature, power, weights).item() == pytest.approx(expected)
    plain = loop_conord(features.tolist(), labels.tolist(), [1] * 9, temperature, power)
    assert conord_loss(features, labels, temperature, power).item() == pytest.approx(plain)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
    shuffled = conord_loss(features[order], labels[order], temperature, power, weights[order])
    assert shuffled.item() == pytest.approx(expected)


def test_gradient_against_loops():
    """Central differences of the loops, entry by entry."""
    features, labels, weights = batch(6)
    features.requires_grad_()
    conord_loss(features, labels, 0.3, 2, weights).backward()
    for row, column in ((i, j) for i in range(6) for j in range(3)):
        ends = []
        for step in (1e-6, -1e-6):
            moved = features.detach().clone()
            moved[row, column] += step
            ends.append(loop_conord(moved.tolist(), labels.tolist(), weights.tolist(), 0.3, 2))
        assert features.grad[row, column].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5, abs=1e-7)


def test_a_weight_counts_as_copies():
    """Copies of one picture make no pairs with each other: at distance 0 with equal labels, they would outweigh all."""
    features, labels, _ = batch(5)
    copies = torch.tensor([1, 3, 1, 2, 1])
    rows = torch.arange(5).repeat_interleave(copies)
    repeated = loop_conord(features[rows].tolist(), labels[rows].tolist(), [1] * 8, 0.3, pictures=rows.tolist())
    assert conord_loss(features, labels, 0.3, weights=copies.double()).item() == pytest.approx(repeated)
    assert conord_loss(features, labels, 0.3, weights=copies).item() == pytest.approx(repeated)  # integers too


@pytest.mark.parametrize("temperature", [1e-4, 0.07])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_near_far_and_equal_samples_are_finite(temperature, dtype):
    """Similarities down to -20,000, and twins whose labels agree or not: no overflow, no root at 0."""
    features = torch.tensor([[1.0, 0], [1, 0], [1, 0], [-1, 0], [0, 1]], dtype=dtype, requires_grad=True)
    loss = conord_loss(features, torch.tensor([0.0, 0, 5, 100, 1]), temperature)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert features.grad.isfinite().all()


@pytest.mark.parametrize("labels", [[2.0], [2.0, 2.0], [2.0, 2.0, 2.0, 2.0]])
def test_equal_labels_order_nothing(labels):
    features = torch.randn(len(labels), 3, requires_grad=True)
    loss = conord_loss(features, torch.tensor(labels))
    loss.backward()
    assert loss == 0
    assert (features.grad == 0).all()


@pytest.mark.parametrize("labels", [[0.0, 1, 2, 3, 4], [0.0, 1, 1, 3, 4]])
def test_another_unit_of_the_labels_adds_a_constant(labels):
    """Of years and months; of an age of the universe, in which years are nearly equal, it is another loss."""
    features = on_circle(0, 20, 35, 90, 100).requires_grad_()
    losses = [conord_loss(features, unit * torch.tensor(labels).double(), temperature=0.5) for unit in (1, 12, 1e-4)]
    plain, months, ages = (torch.autograd.grad(loss, features, retain_graph=True)[0] for loss in losses)
    assert (losses[1] - losses[0]).item() == pytest.approx(
        (4 if len(set(labels)) == 5 else 16 / 5) * math.log(12), abs=1e-5
    )
    assert torch.allclose(plain, months, atol=1e-5)
    assert not torch.allclose(plain, ages, atol=1e-1)


# The head


def head_of(ranks=RANKS, label_mean=50.0, label_std=34.0, **options):
    torch.manual_seed(0)
    return build_head("conord", HeadContext(ranks, 4, label_mean=label_mean, label_std=label_std), options).double()


def targets_of(values, ranks=RANKS, weights=None):
    values = torch.tensor(values, dtype=torch.float64)
    return Targets(values, ranks.rank_of(values), weights)


def test_loss_is_order_and_center_in_gaps_between_ranks():
    head, targets = head_of(center_weight=0.3), targets_of([0, 20, 20, 60, 80])
    embedding = on_circle(0, 20, 35, 90, 100) @ torch.eye(2, 64, dtype=torch.float64)
    terms = head.embedding_loss(embedding, targets)
    assert terms["order_loss"].item() == pytest.approx(-7.656199, abs=1e-6)  # labels 0, 1, 1, 3, 4 in gaps of 20
    points = torch.nn.functional.normalize(head.reference_points, dim=1)
    expected = sum((embedding[i] - points[k]).norm().item() for i, k in enumerate([0, 1, 1, 3, 4])) / 5
    assert terms["center_loss"].item() == pytest.approx(expected)
    assert terms["loss"].item() == pytest.approx(terms["order_loss"].item() + 0.3 * expected)


def test_a_label_between_two_ranks_is_near_both_points():
    ranks, weights = Ranks((0.1, 0.2, 0.3, 0.4)), torch.tensor([2.0, 3.0])
    head = head_of(ranks, 0.25, 0.1)
    embedding = torch.nn.functional.normalize(torch.randn(2, 64).double(), dim=1)
    with torch.no_grad():
        head.reference_points *= torch.tensor([[1.0], [5], [0.2], [3]])  # their length does not matter
    points = torch.nn.functional.normalize(head.reference_points, dim=1)
    found = head.center_loss(embedding, targets_of([0.25, 0.31], ranks, weights)).item()  # 0.25 in the middle
    distances = [(2, 0, 1), (2, 0, 2), (3, 1, 2)]
    expected = sum(w * (embedding[i] - points[k]).norm().item() for w, i, k in distances) / 7
    assert found == pytest.approx(expected, rel=1e-6)


def test_answers_are_ranks_and_the_validation_part_chooses_the_neighbours():
    """Along a line of labels a few neighbours are best, among labels without any order all that there are."""
    generator = torch.Generator().manual_seed(2)
    rank = torch.arange(6).repeat(20)
    place = rank / 3 + 0.4 * torch.rand(120, generator=generator)
    embedding = torch.stack([place.cos(), place.sin()], dim=1) @ torch.eye(2, 64)
    counts = []
    for labels in (rank, rank[torch.randperm(120, generator=generator)]):
        head, targets = head_of().float(), Targets(RANKS.tensor()[labels], labels)
        parts = [
            ({"embedding": embedding[rows]}, Targets(*(each[rows] for each in targets[:2])))
            for rows in (slice(0, 80), slice(80, 120))
        ]
        head.fit(*parts)
        counts.append(int(head.neighbors.count))
        answer = head.predict(parts[1][0])
        assert set(answer.value.tolist()) <= set(RANKS.values)
        assert torch.equal(answer.value, RANKS.tensor()[answer.rank])
        maes = []
        for count in range(2, 59, 2):  # as answered: rounded
            nearest = torch.cdist(embedding[80:], embedding[:80]).argsort(dim=1)[:, :count]
            mean = targets.values[:80][nearest].mean(dim=1)
            maes.append((RANKS.tensor()[RANKS.nearest(mean - 1e-3)] - targets.values[80:]).abs().mean().item())
        assert counts[-1] == range(2, 59, 2)[maes.index(min(maes))]
        head.fit(parts[0], None)
        assert head.neighbors.count == counts[-1]  # stays without a validation part
    assert counts[0] < counts[1]
    assert head_of().neighbors.count == 10


def test_it_learns_what_hides_in_noise():
    """Two of 16 features tell the label, the others are noise and larger: neighbours of the start are no help."""
    generator = torch.Generator().manual_seed(3)
    rank = torch.randint(6, (400,), generator=generator)
    features = torch.randn(400, 16, generator=generator) * 2
    features[:, 0], features[:, 1] = (rank / 2).cos(), (rank / 2).sin()
    targets = Targets(RANKS.tensor()[rank], rank)
    torch.manual_seed(0)
    head = build_head("conord", HeadContext(RANKS, 16, label_mean=50, label_std=34), {})
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)

    def error():
        parts = [
            (head(features[rows]), Targets(*(each[rows] for each in targets[:2])))
            for rows in (slice(0, 200), slice(200, 300), slice(300, 400))
        ]
        head.fit(parts[0], parts[1])
        return (head.predict(parts[2][0]).value - parts[2][1].values).abs().mean().item()

    with torch.no_grad():
        before = error()
    for step in range(100):
        rows = torch.arange(50) + 50 * (step % 4)
        loss = head.loss(head(features[rows]), Targets(*(each[rows] for each in targets[:2])))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert error() < 0.6 * before
