"""The ranking-aware adapter: losses and the comparison of pairs against plain loops, and the tokens that it reads."""

import json
import math

import pytest
import torch
from families import e4e_pair
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d

from baselines.attention import Attention, num_heads
from baselines.large.e4e import load_encoder
from baselines.ranking_adapter import Comparator, log_smooth_l1, pairwise_ranking_loss
from ordinalclip import OrdinalModel, Ranks
from ordinalclip.backbones import load_backbone
from ordinalclip.backbones.base import Pooling
from ordinalclip.backbones.layers import TokenFeatures
from ordinalclip.heads import HeadContext, Targets, build_head
from ordinalclip.training.preparation import freeze_unread

RANKS = Ranks.linear(0, 100, 21)


def batch(size=7, seed=0):
    """Logits of pairs, scores, labels with ties, and weights."""
    rng = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(size, size, generator=rng, dtype=torch.float64)
    scores = 2 * torch.randn(size, generator=rng, dtype=torch.float64)
    labels = torch.randint(4, (size,), generator=rng).double()
    return logits, scores, labels, 0.5 + torch.rand(size, generator=rng, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(5))
def test_losses_against_loops(seed):
    logits, scores, labels, weights = batch(seed=seed)
    total = counted = error = 0.0
    for i in range(7):
        for j in range(7):
            p = 1 / (1 + math.exp(-logits[i, j]))
            pair = (weights[i] * weights[j]).item()
            total, counted = total - pair * math.log(p if labels[i] > labels[j] else 1 - p), counted + pair
        e = abs(scores[i] - labels[i]).item()
        error += weights[i].item() * (e * e / 2 if e < 1 else e - 0.5)
    assert pairwise_ranking_loss(logits, labels, weights).item() == pytest.approx(total / counted)
    regression = log_smooth_l1(scores, labels, weights)
    assert regression.item() == pytest.approx(math.log(1 + error / weights.sum().item()))
    ones = torch.ones(7).double()
    for loss, given in ((pairwise_ranking_loss, logits), (log_smooth_l1, scores)):
        assert loss(given, labels).item() == pytest.approx(loss(given, labels, ones).item())
        assert torch.autograd.gradcheck(lambda x, loss=loss: loss(x, labels, weights), given.requires_grad_())


@pytest.mark.parametrize("size", [1, 4])
def test_one_label_is_finite_and_half_precision_is_lifted(size):
    logits, scores, _, _ = batch(size)
    for loss, given in ((pairwise_ranking_loss, logits.half()), (log_smooth_l1, scores.half())):
        found = loss(given.requires_grad_(), torch.full((size,), 2.0))
        (gradient,) = torch.autograd.grad(found, given)
        assert found.dtype == torch.float32
        assert torch.isfinite(gradient).all()


def loop_comparisons(module, tokens):
    """Every pair for itself: queries attend to the tokens of both, and what i gives less what j gives is read."""
    count, (queries, width) = len(tokens), module.queries.shape
    size = width // module.heads
    query, found = module.query(module.queries), module.key_and_value(tokens)
    logits = []
    for i in range(count):
        for j in range(count):
            both, total = torch.cat([found[i], found[j]]), torch.zeros(width, dtype=tokens.dtype)
            for q in range(queries):
                heads = []
                for h in range(module.heads):
                    part = slice(h * size, (h + 1) * size)
                    attention = (both[:, part] @ query[q, part] / math.sqrt(size)).softmax(dim=0)
                    values = attention[:, None] * both[:, part]
                    heads.append(values[: len(found[i])].sum(dim=0) - values[len(found[i]) :].sum(dim=0))
                total = total + module.merge.weight @ torch.cat(heads)
            logits.append(module.layers(total + module.merge.bias))
    return torch.cat(logits).view(count, count)


def test_comparisons_against_loops():
    torch.manual_seed(0)
    module, tokens = Comparator(16, 3).double(), torch.randn(4, 5, 16, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        module.queries.mul_(4)
        module.query[1].weight.mul_(3)  # attention that is not flat
        module.merge.bias.normal_()
    weights = torch.randn(4, 4, dtype=torch.float64)
    found, expected = module(*module.read(tokens)), loop_comparisons(module, tokens)
    assert torch.allclose(found, expected)
    assert found.std() > 0.01
    inputs = [tokens, *module.parameters()]
    for one, other in zip(
        torch.autograd.grad((weights * found).sum(), inputs),
        torch.autograd.grad((weights * expected).sum(), inputs),
        strict=True,
    ):
        assert torch.allclose(one, other, atol=1e-10)


def test_comparisons_hold_no_tensor_of_pairs_and_tokens():
    module, tokens, largest = Comparator(16, 2), torch.randn(24, 200, 16), 0

    def keep(tensor):
        nonlocal largest
        largest = max(largest, tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        read = module.read(tokens)
        seen, largest = largest, 0
        module(*read)
    assert seen <= 24 * 200 * 16 * 2  # of images and tokens
    assert largest <= 24 * 24 * 16 * 2  # of pairs; with tokens it would be 24 * 24 * 400


def test_one_sided_attention_is_finite():
    module = Comparator(16, 2)
    found, mass = module.read(torch.randn(3, 5, 16))
    mass = (1000 * torch.tensor([1.0, -1.0, 0.0])[:, None, None] + mass).detach().requires_grad_()
    logits = module(found, mass)
    (gradient,) = torch.autograd.grad(logits.sum(), mass)
    assert torch.isfinite(logits).all()
    assert torch.isfinite(gradient).all()


def test_attention_is_pytorchs():
    assert [num_heads(width) for width in (256, 384, 12, 7)] == [8, 8, 6, 7]
    torch.manual_seed(0)
    module, reference = Attention(12), nn.MultiheadAttention(12, 6, batch_first=True)
    with torch.no_grad():
        parts = module.query, module.key, module.value
        reference.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        reference.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
        reference.out_proj.load_state_dict(module.out.state_dict())
    queries, others = torch.randn(2, 5, 12), torch.randn(2, 3, 12)
    assert torch.allclose(module(queries, others), reference(queries, others, others)[0], atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module.bfloat16()(queries, others), module.float()(queries, others))


def head_of(**options):
    torch.manual_seed(0)
    return build_head("ranking_adapter", HeadContext(RANKS, 6, label_mean=50.0, label_std=30.0), options)


def test_the_head_is_its_parts():
    head, features = head_of(width=16, dropout=0.5).eval(), torch.randn(5, 9, 6)
    outputs, values = head(features), torch.tensor([0.0, 20, 20, 70, 100])
    ranks = RANKS.nearest(values)
    terms = head.loss(outputs, Targets(values, ranks))
    logits = head.comparator(*head.comparator.read(head.tokens(features)))
    assert terms["ranking"].item() == pytest.approx(pairwise_ranking_loss(logits, values).item(), rel=1e-5)
    standardised = (head.predict(outputs).value - 50) / 30
    regression = log_smooth_l1(standardised, (values - 50) / 30).item()
    assert terms["regression"].item() == pytest.approx(regression, rel=1e-4)
    assert terms["loss"].item() == pytest.approx(terms["ranking"].item() + 0.2 * regression, rel=1e-4)
    shuffled = head(features[:, torch.randperm(9)])
    assert torch.allclose(
        shuffled["standardised"], outputs["standardised"], atol=1e-5
    )  # tokens bring their place along
    with torch.no_grad():
        head.text_tokens.add_(torch.randn_like(head.text_tokens))
    assert not torch.allclose(head(features)["standardised"], outputs["standardised"], atol=1e-3)
    dropped = []
    for module in head.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda layer, given, kept: dropped.append((layer.p, (kept == 0).any().item())))
    head.train()(features)
    assert dropped == [(0, False)] * 4 + [(0.5, True)] * 4  # both branches of the last two blocks


def test_both_parts_learn():
    """Labels are how much of one channel the tokens have: the score reads it, and the comparison tells who has more."""
    head = head_of(width=16, num_text_tokens=4, num_queries=4)
    rng = torch.Generator().manual_seed(0)
    values = 100 * torch.rand(64, generator=rng)
    features = torch.randn(64, 9, 6, generator=rng)
    features[:, :, 0] += 0.04 * (values[:, None] - 50)
    targets = Targets(values, RANKS.nearest(values))
    optimizer = torch.optim.AdamW(head.parameters(), 3e-3)
    for step in range(60):
        begin = 16 * (step % 3)  # the last quarter is not seen
        rows = slice(begin, begin + 16)
        optimizer.zero_grad()
        head.loss(head(features[rows]), Targets(values[rows], targets.ranks[rows]))["loss"].backward()
        optimizer.step()
    with torch.no_grad():
        outputs = head.eval()(features[48:])
        answers, truth = head.predict(outputs).value, values[48:]
        logits = head.comparator(outputs["found"], outputs["mass"])
    assert (answers - truth).abs().mean() < 0.5 * (truth - 50).abs().mean()
    apart = (truth[:, None] - truth).abs() > 10
    assert ((logits > 0) == (truth[:, None] > truth))[apart].double().mean() > 0.85


# Tokens of an image encoder


def tokens_of(name):
    torch.manual_seed(0)
    backbone = load_backbone(name)
    tower, size = backbone.encoder.eval(), backbone.pixels.size
    reader, pixels = TokenFeatures(tower, backbone.pooling, size), torch.randn(2, 3, size, size)
    with torch.no_grad():
        tokens = reader(tower, pixels)
    assert tokens.shape == (2, reader.num_tokens, reader.dim)
    return tower, pixels, tokens


@torch.no_grad()
def test_tokens_are_those_of_the_libraries():
    tower, pixels, tokens = tokens_of("timm:test_vit")
    patches, first = tower.forward_intermediates(pixels, 1, return_prefix_tokens=True, norm=False)[1][0]
    expected = adaptive_avg_pool2d(patches, 7).flatten(2).transpose(1, 2)
    assert patches.shape[-1] > 7
    assert torch.allclose(tokens, torch.cat([first, expected], dim=1), atol=1e-5)
    for name in ("timm:test_resnet", "tiny"):
        tower, pixels, tokens = tokens_of(name)
        if name == "tiny":
            places = tower.layer4(tower.layer3(tower.layer2(tower.layer1(tower.stem(pixels)))))
        else:
            places = tower.forward_features(pixels)
        if places.shape[-1] > 7:
            places = adaptive_avg_pool2d(places, 7)
        assert torch.allclose(tokens, places.flatten(2).transpose(1, 2), atol=1e-5), name


def test_maps_with_their_channels_last_and_patches_that_are_no_square():
    reader = object.__new__(TokenFeatures)
    reader.pooling = Pooling(channels_last=True)
    places = torch.randn(2, 9, 9, 5)
    expected = adaptive_avg_pool2d(places.movedim(-1, 1), 7).flatten(2).transpose(1, 2)
    assert torch.allclose(reader._tokens(places), expected, atol=1e-6)
    reader.pooling = Pooling(True, 1)
    assert torch.equal(reader._tokens(places[:, 0, :5]), places[:, 0, :5])  # few enough: as they are
    with pytest.raises(ValueError, match="tokens: 8 patches, which is no square"):
        reader._tokens(places[:, 0])
    with pytest.raises(ValueError, match="tokens: the layers of Sequential are not known"):
        TokenFeatures(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), Pooling(), 8)


def test_of_an_encoder_to_a_latent_space_they_are_the_rows_of_its_codes(tmp_path):
    torch.manual_seed(0)
    e4e_pair(tmp_path / "pair.pt")
    _, pixels, tokens = tokens_of(f"e4e:{tmp_path}/pair.pt")
    encoder, offset = load_encoder(tmp_path / "pair.pt")
    with torch.no_grad():
        torch.testing.assert_close(tokens, encoder(pixels) + offset)


def test_saved_models_say_how_many_tokens(tmp_path):
    model = OrdinalModel.build("tiny", RANKS, "ranking_adapter", {"width": 16}, label_mean=40, label_std=30).eval()
    assert (model.config.num_tokens, model.config.input_dim, model.config.layer_dims) == (4, 512, None)
    model.save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 64, 64)
    assert torch.equal(OrdinalModel.from_pretrained(tmp_path).predict(pixels).value, model.predict(pixels).value)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, "num_tokens": 9}))
    with pytest.raises(ValueError, match="num_tokens"):
        OrdinalModel.from_pretrained(tmp_path)
    model.config.num_tokens = 9
    with pytest.raises(ValueError, match="num_tokens 9 is not that of the backbone and the method, 4"):
        OrdinalModel(model.config)


def test_models_of_before_there_were_tokens_load(tmp_path):
    model = OrdinalModel.build("tiny", RANKS, "large", label_mean=40, label_std=30).eval()
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert content.pop("num_tokens") is None
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert OrdinalModel.from_pretrained(tmp_path).config.layer_dims == model.config.layer_dims


def test_what_tokens_do_not_depend_on_does_not_learn():
    """All else gets a gradient: several processes would wait for what is lacking."""
    model = OrdinalModel.build("timm:test_vit", RANKS, "ranking_adapter", {"width": 16})
    freeze_unread(model.encoder, model.config.pixel_spec.size)
    frozen = [name for name, parameter in model.encoder.tower.named_parameters() if not parameter.requires_grad]
    assert frozen == ["norm.weight", "norm.bias"]
    size, labels = model.config.pixel_spec.size, torch.tensor([10.0, 90])
    model(torch.randn(2, 3, size, size), labels).loss.backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())


def test_mirrored_pictures_have_their_tokens_elsewhere():
    with pytest.raises(ValueError, match=r"model\.mirror: this method reads tokens"):
        OrdinalModel.build("tiny", RANKS, "ranking_adapter", mirror=["horizontal"])
