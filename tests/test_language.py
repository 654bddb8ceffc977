"""How heads that compare images with text start where the two do not share a space."""

import math

import pytest
import torch
from families import WITH_TEXT, make_family
from torch.nn.functional import normalize

from ordinalclip import OrdinalModel, Ranks
from ordinalclip.backbones import load_backbone
from ordinalclip.heads import HeadContext, Targets, build_head

LEVELS = Ranks((0, 1, 2, 3), ("functional", "nearly functional", "slightly defective", "defective"))
METHODS = {"coop": {}, "ordinalclip": {"init_from_names": True, "num_base_ranks": 3, "interpolation": "piecewise"}}
PROMPT = "a photo of a solar cell that is"


def stranger(method, text="tiny", ranks=LEVELS, seed=0, **options):
    backbone = load_backbone(text)
    context = HeadContext(ranks, 1280, text=backbone.text, logit_scale=backbone.logit_scale, shared_space=False)
    torch.manual_seed(seed)
    return build_head(method, context, {**METHODS[method], **options})


def pictures(count, seed):
    """Features as a network of another kind gives them: never negative, much alike, a little of them the label's."""
    rng = torch.Generator().manual_seed(seed)
    ranks = torch.randint(4, (count,), generator=rng)
    shared, label = torch.rand(2, 1280, generator=torch.Generator().manual_seed(5))
    noise = 0.5 * torch.randn(count, 1280, generator=rng)
    return (shared + 0.1 * (ranks[:, None] - 1.5) * (label - 0.5) + noise).relu(), Targets(ranks.float(), ranks)


@torch.no_grad()
def entropy(head, features):
    """Of the distributions, as a share of that of the uniform one."""
    log = head(features)["logits"].log_softmax(dim=1)
    return (-(log.exp() * log).sum(dim=1).mean() / math.log(log.shape[1])).item()


@pytest.mark.parametrize("method", METHODS)
def test_prototypes_are_centred_only_where_image_and_text_are_strangers(method):
    head = stranger(method)
    with torch.no_grad():
        texts = normalize(head.text(head.learner()), dim=1)
        assert torch.allclose(head.rank_prototypes(), texts - texts.mean(dim=0), atol=1e-6)
        plain = stranger(method, centred=False)
        assert torch.equal(plain.rank_prototypes(), plain.text(plain.learner()))
    backbone = load_backbone("tiny")
    assert head.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    assert plain.logit_scale.item() == pytest.approx(backbone.logit_scale)
    own = OrdinalModel.build("tiny", LEVELS, method, METHODS[method]).head
    assert own.logit_scale.item() == pytest.approx(backbone.logit_scale)
    with torch.no_grad():
        assert torch.equal(own.rank_prototypes(), own.text(own.learner()))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("text", ["tiny", *WITH_TEXT])
def test_distributions_are_not_flat_at_the_start(method, text, tmp_path):
    """Whatever the text tower, its width and its temperature; those of real width are not sure of anything either."""
    head = stranger(method, text if text == "tiny" else make_family(text, tmp_path), prompt=PROMPT).eval()
    features, _ = pictures(200, seed=1)
    assert entropy(head, features) < 0.95
    if text == "tiny":
        assert entropy(head, features) > 0.5


@torch.no_grad()
def error(head, others):
    features, truth = others
    return (head.eval().predict(head(features)).value - truth.values).abs().mean().item()


@pytest.mark.parametrize("method", [pytest.param("coop", marks=pytest.mark.slow), "ordinalclip"])
def test_sixty_steps_beat_a_constant_answer(method):
    """In the mean over seeds of weights and pictures; as published, they nearly end there."""
    errors = {None: [], False: []}
    for seed in range(3):
        (features, targets), others = pictures(512, seed), pictures(512, 100 + seed)
        for centred, found in errors.items():
            head = stranger(method, ranks=Ranks.of(4), seed=seed, prompt=PROMPT, centred=centred)
            optimizer = torch.optim.AdamW([each for each in head.parameters() if each.requires_grad], 1e-3)
            for step in range(60):
                rows = slice(32 * step % 512, 32 * step % 512 + 32)
                optimizer.zero_grad()
                head.loss(head(features[rows]), Targets(targets.values[rows], targets.ranks[rows]))["loss"].backward()
                optimizer.step()
            found.append(error(head, others))
    centred, published = (sum(found) / 3 for found in errors.values())
    assert centred < 0.8  # 1: the error of a constant answer to ranks 0 to 3 that are equally frequent
    assert centred < published - 0.1


@pytest.mark.parametrize("method", METHODS)
def test_what_is_deployed_answers_as_what_was_trained(method, tmp_path):
    model = OrdinalModel.build("timm:test_resnet", LEVELS, method, METHODS[method], text="tiny").eval()
    pixels = torch.randn(3, 3, model.config.pixel_spec.size, model.config.pixel_spec.size)
    with torch.no_grad():
        expected = model(pixels).probabilities
        assert expected.std(dim=1).min() > 0.01
        for form, name in ((model, "trainable"), (model.deploy(), "deployed")):
            form.save_pretrained(tmp_path / name)
            loaded = OrdinalModel.from_pretrained(tmp_path / name).eval()
            assert torch.allclose(loaded(pixels).probabilities, expected, atol=1e-5)


def test_ranks_of_equal_prompts_are_not_told_apart():
    """One base rank: nothing differs between the ranks but rounding, which is no reason for an answer."""
    head = stranger("ordinalclip", init_from_names=False, num_base_ranks=1).eval()
    features, _ = pictures(20, seed=1)
    with torch.no_grad():
        assert torch.allclose(head(features)["logits"].softmax(dim=1), torch.full((20, 4), 0.25))
