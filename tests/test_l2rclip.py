"""L2RCLIP: its losses against plain loops, attention between prompts against PyTorch's own, and the head."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from baselines.l2rclip import (
    RankAttention,
    asymmetric_contrastive,
    feature_distances,
    ordinal_entropy,
    ordinal_entropy_stage1,
)
from ordinalclip import OrdinalModel, Ranks
from ordinalclip.backbones import load_backbone
from ordinalclip.heads import HeadContext, Targets, build_head
from ordinalclip.losses import alignment_loss

VALUES = torch.tensor([0.0, 1.0, 3.0, 4.0, 9.0], dtype=torch.float64)
NAMES = Ranks((0, 1, 2, 3), ("functional", "nearly functional", "slightly defective", "defective"))


def batch(size=7, seed=0):
    """Images and prompts, not of length 1; ranks, of which some have no image; weights."""
    rng = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, generator=rng, dtype=torch.float64)
    texts = torch.randn(5, 3, generator=rng, dtype=torch.float64)
    ranks = torch.randint(4, (size,), generator=rng)
    return images, texts, ranks, 0.5 + torch.rand(size, generator=rng, dtype=torch.float64)


def squared(a, b):
    return max(sum((x - y) ** 2 for x, y in zip(a.tolist(), b.tolist(), strict=True)), 1e-12)


def loop_entropy(images, texts, ranks, weights):
    gaps = [[abs(VALUES[rank] - value).item() for value in VALUES] for rank in ranks]
    least, most = min(map(min, gaps)), max(map(max, gaps))
    near = far = 0.0
    for image, rank, row, weight in zip(images, ranks, gaps, weights.tolist(), strict=True):
        near += weight * squared(image, texts[rank])
        for gap, text in zip(row, texts, strict=True):
            far += weight * (gap - least) / most * math.sqrt(squared(image, text)) / len(texts)
    return (near - far) / weights.sum().item()


def published_stage1(images, texts, ranks):
    """As the authors have it: every pair once, the earlier image with the later one's prompt."""
    own = texts[ranks]
    pairs = [(i, j) for i in range(len(images)) for j in range(i + 1, len(images))]
    gaps = [abs(VALUES[ranks[i]] - VALUES[ranks[j]]).item() for i, j in pairs]
    apart = [(gap - min(gaps)) / max(gaps) for gap in gaps]
    crossed = sum(w * math.sqrt(squared(images[i], own[j])) for w, (i, j) in zip(apart, pairs, strict=True))
    between = sum(w * math.sqrt(squared(own[i], own[j])) for w, (i, j) in zip(apart, pairs, strict=True))
    near = sum(squared(image, text) for image, text in zip(images, own, strict=True))
    return 0.5 * near / len(images) - crossed / len(pairs) - 0.5 * between / len(pairs)


@pytest.mark.parametrize("seed", range(5))
def test_ordinal_entropy_against_loops(seed):
    images, texts, ranks, weights = batch(seed=seed)
    distances = feature_distances(images, texts)
    found = ordinal_entropy(distances, ranks, VALUES, weights)
    assert found.item() == pytest.approx(loop_entropy(images, texts, ranks, weights))
    plain = ordinal_entropy(distances, ranks, VALUES)
    assert plain.item() == pytest.approx(loop_entropy(images, texts, ranks, torch.ones(7)))
    assert plain.item() != pytest.approx(found.item(), rel=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_stage_1_is_the_published_one_forwards_and_backwards(seed):
    images, texts, ranks, _ = batch(seed=seed)
    distances, between = feature_distances(images, texts), feature_distances(texts, texts)
    ways = published_stage1(images, texts, ranks), published_stage1(images.flip(0), texts, ranks.flip(0))
    assert abs(ways[0] - ways[1]) > 1e-3
    assert ordinal_entropy_stage1(distances, between, ranks, VALUES).item() == pytest.approx(sum(ways) / 2)


def test_stage_1_weighs_pairs_by_both_images():
    images, texts, ranks, weights = batch()
    distances, between = feature_distances(images, texts), feature_distances(texts, texts)
    gaps = {(i, j): abs(VALUES[ranks[i]] - VALUES[ranks[j]]).item() for i in range(7) for j in range(7) if i != j}
    least, most = min(gaps.values()), max(gaps.values())
    total = expected = 0.0
    for (i, j), gap in gaps.items():
        pair = (weights[i] * weights[j]).item()
        apart = distances[i, ranks[j]] + between[ranks[i], ranks[j]] / 2
        total, expected = total + pair, expected - pair * (gap - least) / most * apart.item()
    own = sum(w * distances[i, rank] ** 2 for i, (w, rank) in enumerate(zip(weights, ranks, strict=True)))
    expected = expected / total + 0.5 * (own / weights.sum()).item()
    assert ordinal_entropy_stage1(distances, between, ranks, VALUES, weights).item() == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(5))
def test_contrastive_against_loops_and_as_the_alignment_of_the_paper(seed):
    images, texts, ranks, weights = batch(seed=seed)
    logits = (4 * images @ texts.t()).requires_grad_()
    rows = []
    for rank in set(ranks.tolist()):
        scores, own = logits[:, rank].tolist(), [i for i in range(7) if ranks[i] == rank]
        total = math.log(sum(w * math.exp(s) for w, s in zip(weights.tolist(), scores, strict=True)))
        rows.append(sum(weights[i].item() * (total - scores[i]) for i in own) / weights[own].sum().item())
    found = asymmetric_contrastive(logits, ranks, weights)
    assert found.item() == pytest.approx(sum(rows) / len(rows))
    alignment = alignment_loss(logits, ranks, weights, "paper")["alignment"]
    for one, other in zip(*(torch.autograd.grad(term, logits)[0] for term in (found, alignment)), strict=True):
        assert torch.allclose(one, other, atol=1e-12)


def losses(images, texts, ranks, weights=None):
    distances, between = feature_distances(images, texts), feature_distances(texts, texts)
    return (
        ordinal_entropy(distances, ranks, VALUES, weights),
        asymmetric_contrastive(images @ texts.t(), ranks, weights),
        ordinal_entropy_stage1(distances, between, ranks, VALUES, weights),
    )


def test_order_copies_and_gradient():
    images, texts, ranks, weights = batch()
    plain, order = losses(images, texts, ranks, weights), torch.randperm(7)
    for one, other in zip(plain, losses(images[order], texts, ranks[order], weights[order]), strict=True):
        assert one.item() == pytest.approx(other.item())
    copies = torch.tensor([1, 3, 1, 2, 1, 1, 2])
    repeated = losses(images.repeat_interleave(copies, 0), texts, ranks.repeat_interleave(copies))
    weighted = losses(images, texts, ranks, copies.double())
    for one, other in zip(weighted[:2], repeated[:2], strict=True):  # stage 1 has no pair of an image and its copy
        assert one.item() == pytest.approx(other.item())
    for number in range(3):
        function = lambda x, t, number=number: losses(x, t, ranks, weights)[number]  # noqa: E731
        assert torch.autograd.gradcheck(function, (images.requires_grad_(), texts.requires_grad_()))


@pytest.mark.parametrize("size", [1, 4])
def test_one_label_and_images_at_their_prompts_are_finite(size):
    images, texts, _, _ = batch(size)
    texts = texts.requires_grad_()
    ranks = torch.full((size,), 2)
    at_prompt = texts[ranks] + 0 * images
    for loss in losses(at_prompt, texts, ranks):
        (gradient,) = torch.autograd.grad(loss, texts, retain_graph=True)
        assert torch.isfinite(loss)
        assert torch.isfinite(gradient).all()
    assert ordinal_entropy_stage1(*(torch.ones(size, 5), torch.ones(5, 5)), ranks, VALUES).item() == pytest.approx(0.5)
    assert losses(images.half(), texts.half(), ranks)[0].dtype == torch.float32


def test_images_go_to_their_prompt_and_away_from_far_ones():
    """Free images and fixed prompts: the sign of each part, and what minimising it ends in."""
    images, texts, ranks, _ = batch(40)
    distances = feature_distances(images, texts).requires_grad_()
    (gradient,) = torch.autograd.grad(ordinal_entropy(distances, ranks, VALUES), distances)
    own = torch.zeros_like(gradient).scatter(1, ranks[:, None], 1).bool()
    assert (gradient[own] > 0).all()
    assert (gradient[~own] < 0).all()  # another reader's code pulls here
    images = images.requires_grad_()
    optimizer = torch.optim.Adam([images], 0.1)
    nearest = lambda: feature_distances(images, texts).argmin(dim=1)  # noqa: E731
    assert (nearest() == ranks).double().mean() < 0.5
    for _ in range(100):
        optimizer.zero_grad()
        ordinal_entropy(feature_distances(images, texts), ranks, VALUES).backward()
        optimizer.step()
    assert (nearest() == ranks).all()


def test_attention_between_ranks_is_the_formula():
    """R' = (1 - a) R + a FFN(MSA(LN(R))), with PyTorch's own attention; tokens that no prompt holds are not seen."""
    torch.manual_seed(0)
    module, ranks = RankAttention(16).double(), torch.randn(3, 2, 16, dtype=torch.float64)
    in_use = torch.tensor([[True, True], [True, False], [True, True]])
    reference = nn.MultiheadAttention(16, 8, batch_first=True).double()
    parts = module.attention
    with torch.no_grad():
        module.blend.fill_(0.3)
        module.norm.weight.copy_(torch.rand(16))
        reference.in_proj_weight.copy_(torch.cat([p.weight for p in (parts.query, parts.key, parts.value)]))
        reference.in_proj_bias.copy_(torch.cat([p.bias for p in (parts.query, parts.key, parts.value)]))
        reference.out_proj.load_state_dict(parts.out.state_dict())
    tokens = module.norm(ranks.reshape(1, 6, 16))
    attended, _ = reference(tokens, tokens, tokens, key_padding_mask=~in_use.reshape(1, 6))
    mixed = module.out(nn.functional.gelu(module.hidden(attended))).reshape(3, 2, 16)
    assert torch.allclose(module(ranks, in_use), 0.7 * ranks + 0.3 * mixed)
    changed = ranks.clone()
    changed[1, 1] = torch.randn(16)
    assert torch.allclose(module(changed, in_use)[in_use], module(ranks, in_use)[in_use])
    changed[0, 0] = torch.randn(16)
    assert not torch.allclose(module(changed, in_use)[2], module(ranks, in_use)[2])


def test_the_head_is_its_parts():
    torch.manual_seed(0)
    text = load_backbone("tiny").text
    context = HeadContext(NAMES, 6, text, shared_space=False)
    options = {"ordinal_weight": 2.0, "stage1_weight": 0.5, "alignment_weight": 0.25}
    head = build_head("l2rclip", context, options)
    used = head.learner.in_use
    assert used.sum(dim=1).tolist() == [len(text.token_ids(name)) for name in NAMES.names]
    assert not used.all()
    features, ranks = torch.randn(5, 6), torch.tensor([0, 1, 1, 3, 2])
    outputs = head(features)
    terms = head.loss(outputs, Targets(ranks.float(), ranks))
    images, texts = head.space(features), normalize(head.rank_prototypes(), dim=1)
    assert torch.allclose(outputs["distances"], (images[:, None] - texts).norm(dim=2), atol=1e-5)
    values, between = NAMES.tensor(), feature_distances(texts, texts)
    logits = outputs["logits"]
    expected = {
        "contrastive": nn.functional.cross_entropy(logits, ranks),
        "alignment": alignment_loss(logits, ranks, None, "paper")["alignment"],
        "ordinal": ordinal_entropy(outputs["distances"], ranks, values),
        "stage1": ordinal_entropy_stage1(outputs["distances"], between, ranks, values),
    }
    for name, term in expected.items():
        assert terms[name].item() == pytest.approx(term.item(), rel=1e-5), name
    total = sum(w * term for w, term in zip((1, 0.25, 2, 0.5), expected.values(), strict=True))
    assert terms["loss"].item() == pytest.approx(total.item(), rel=1e-5)
    assert {id(p) for p in head.attention.parameters()} <= {id(p) for p in head.prompt_parameters()}
    assert "stage1" not in build_head("l2rclip", context, {}).loss(outputs, Targets(ranks.float(), ranks))


def test_attention_between_ranks_is_served_within_the_prototypes():
    torch.manual_seed(0)
    model = OrdinalModel.build("tiny", NAMES, "l2rclip").eval()
    with torch.no_grad():
        plain = normalize(model.head.text(model.head.learner()), dim=1)
        model.head.attention.blend.fill_(0.5)
        blended = normalize(model.head.rank_prototypes(), dim=1)
    deployed = model.deploy()
    assert not any("attention" in name for name, _ in deployed.head.named_parameters())
    assert torch.allclose(deployed.head.rank_prototypes(), blended, atol=1e-6)
    assert not torch.allclose(plain, blended, atol=1e-3)
    assert deployed.config.head["ordinal_weight"] == 1  # whose loss is the same
