"""Prompts and the packed text tower against the authors' numbers and against plain encoding."""

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch

from ordinalclip.losses import alignment_loss
from ordinalclip.metrics import ordinality
from ordinalclip.prompts import PromptLearner, interpolation_weights
from ordinalclip.ranks import Ranks
from ordinalclip.text import TextTower

GOLDEN = json.loads((Path(__file__).parent / "golden" / "ordinalclip_open.json").read_text())
INTERPOLATION = {"linear": "linear", "inv_prop": "inverse"}


def text_model(width=64, layers=3, heads=4, output=32, vocabulary=49408):
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": vocabulary, "width": width, "heads": heads, "layers": layers}
    return open_clip.CLIP(output, vision, text, quick_gelu=True)


@pytest.fixture(scope="module")
def golden_tower():
    """The text encoder of the golden numbers, from its seeded recipe."""
    model, rng = text_model(), np.random.default_rng(GOLDEN[0]["seed"])
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("visual") and k != "logit_scale"}
    for key in sorted(state):
        draw = torch.from_numpy(rng.standard_normal(tuple(state[key].shape)).astype(np.float32))
        if key.endswith(("ln_1.weight", "ln_2.weight", "ln_final.weight")):
            state[key] = 1 + 0.1 * draw
        elif key.endswith("bias") or key in ("token_embedding.weight", "positional_embedding"):
            state[key] = 0.05 * draw
        else:
            state[key] = 0.08 * draw
    model.load_state_dict(state, strict=False)
    return TextTower.from_open_clip(model)


def learner_of(tower, case):
    options, names = case["cfg"], case["cfg"].get("rank_names")
    count = options["num_ranks"]
    learner = PromptLearner(
        tower,
        Ranks(tuple(range(count)), tuple(names) if names else None),
        num_context=options["num_context_tokens"],
        context=options["init_context"],
        num_base_ranks=options["num_base_ranks"] if options["kind"] == "ordinal" else None,
        interpolation=INTERPOLATION[options["interpolation_type"]],
        rank_position=options["rank_tokens_position"],
        tokens_per_rank=options["num_tokens_per_rank"],
        rank_specific_context=options["rank_specific_context"],
        init_from_names=bool(names),
    )
    rng = np.random.default_rng(case["seed"] + 1)
    with torch.no_grad():
        for parameter, given in ((learner.context, options["init_context"]), (learner.rank_embeddings, names)):
            if not given:
                parameter.copy_(torch.from_numpy(rng.standard_normal(tuple(parameter.shape)) * 0.1))
    return learner


@pytest.mark.parametrize("number", range(len(GOLDEN)))
@pytest.mark.parametrize("packed", [True, False])
def test_golden_numbers(golden_tower, number, packed):
    case = GOLDEN[number]
    learner = learner_of(golden_tower, case)
    encode = golden_tower if packed else golden_tower.encode_plain
    features = encode(learner())
    expected = torch.tensor(case["text_features"])
    assert (features - expected).abs().max() <= 1e-4 * expected.abs().max()

    draw = np.random.default_rng(case["seed"] + 2).standard_normal((len(expected), 32)).astype(np.float32)
    (features * torch.from_numpy(draw)).sum().backward()
    assert learner.context.grad.norm().item() == pytest.approx(case["grad_context_norm"], rel=1e-4)
    assert learner.rank_embeddings.grad.norm().item() == pytest.approx(case["grad_rank_norm"], rel=1e-4)
    assert ordinality(features) == pytest.approx(case["ordinality"], abs=1e-6)
    if "interpolation_weights" in case:
        assert torch.allclose(learner.weights, torch.tensor(case["interpolation_weights"]), atol=1e-5)

    image = np.random.default_rng(case["seed"] + 3).standard_normal((6, 32)).astype(np.float32)
    cosine = torch.nn.functional.normalize(torch.from_numpy(image)) @ torch.nn.functional.normalize(features).t()
    logits = case["logit_scale"] * cosine
    terms = alignment_loss(logits, torch.tensor(case["labels"]))
    assert terms["contrastive"].item() == pytest.approx(case["ce"], rel=1e-4)
    assert terms["alignment"].item() == pytest.approx(case["kl"], rel=1e-4)
    probabilities = logits.softmax(dim=1)
    expected_rank = probabilities @ torch.arange(len(expected)).float()
    assert torch.allclose(expected_rank, torch.tensor(case["expected_rank"]), rtol=1e-3)
    assert probabilities.argmax(dim=1).tolist() == case["argmax_rank"]


OPTIONS = [
    {"rank_position": position, "rank_specific_context": specific, **more}
    for position in ("tail", "middle", "front")
    for specific in (False, True)
    for more in (
        {"num_base_ranks": 2, "interpolation": "inverse", "tokens_per_rank": 2},
        {"num_base_ranks": 2, "interpolation": "gaussian", "context": "the age of the person is"},
        {"num_base_ranks": None, "num_context": 3},
        {"init_from_names": True, "num_base_ranks": 2, "interpolation": "piecewise"},
        {"init_from_names": True, "num_base_ranks": None, "num_context": 0},
    )
]


def packed_against_plain(tower, learner):
    """Largest difference of features and of both gradients, relative to the largest entry."""
    results = []
    for encode in (tower.encode_packed, tower.encode_plain):
        learner.zero_grad()
        features = encode(learner())
        draw = torch.randn(features.shape, generator=torch.Generator().manual_seed(0), dtype=features.dtype)
        (features * draw).sum().backward()
        results.append([features.detach(), learner.context.grad, learner.rank_embeddings.grad])
    return [(a - b).abs().max() / b.abs().max() for a, b in zip(*results, strict=True) if b.numel()]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(f"{v}" for v in o.values()))
def test_packed_equals_plain(tower, options):
    names = ("one", "twenty two", "three hundred and five", "4", "fifty")
    torch.manual_seed(1)
    learner = PromptLearner(tower, Ranks(tuple(range(5)), names), **options)
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    assert max(packed_against_plain(tower, learner)) < 1e-5


@pytest.mark.parametrize("num_ranks", [2, 3, 81, 100, 251])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_equals_plain_for_many_ranks(tower, num_ranks, checkpointing):
    learner = PromptLearner(tower, num_ranks, num_base_ranks=2, num_context=4, interpolation="piecewise")
    tower.activation_checkpointing = checkpointing
    try:
        assert max(packed_against_plain(tower, learner)) < 1e-5
    finally:
        tower.activation_checkpointing = False


@pytest.mark.slow
def test_packed_equals_plain_for_two_thousand_ranks(tower):
    learner = PromptLearner(tower, 2000, num_base_ranks=7, num_context=4)
    assert max(packed_against_plain(tower, learner)) < 1e-5


def test_memory_grows_linearly_with_ranks(tower):
    """What the backward pass holds, in bytes of saved tensors: doubling R must not quadruple it."""

    def saved_bytes(num_ranks):
        total = 0

        def count(tensor):
            nonlocal total
            total += tensor.numel() * tensor.element_size()
            return tensor

        learner = PromptLearner(tower, num_ranks, num_base_ranks=3)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            tower(learner())
        return total

    small, middle, large = saved_bytes(160), saved_bytes(320), saved_bytes(640)
    assert 1.7 < (large - middle) / (middle - small) < 2.3  # the weights, saved once, drop out of the differences


def test_tokens_of_a_prompt(tower):
    """The prompt's tokens, written out by hand for each position of the rank."""
    ranks = Ranks((0, 1), ("one", "twenty two"))
    embed = tower.token_embedding.weight
    start, end = tower.start_token, tower.end_token
    (dot,) = tower.token_ids(".")
    context, words = tower.token_ids("the age is"), tower.token_ids("twenty two")
    for position, expected in {
        "tail": [start, *context, *words, dot, end],
        "middle": [start, context[0], *words, *context[1:], dot, end],
        "front": [start, *words, *context, dot, end],
    }.items():
        learner = PromptLearner(tower, ranks, context="the age is", rank_position=position, init_from_names=True)
        prefix, suffix, lengths = learner()
        whole = torch.cat([prefix, suffix[1, : lengths[1]]])
        assert torch.equal(whole, embed[expected])
        assert torch.equal(tower(["the age is one.", "the age is twenty two."]), tower(learner())) == (
            position == "tail"
        )


def test_bases_start_from_the_names_of_their_nearest_rank(tower):
    names = ("zero", "one", "two", "three", "four")
    learner = PromptLearner(tower, Ranks(tuple(range(5)), names), num_base_ranks=3, init_from_names=True)
    for base, name in enumerate(("zero", "two", "four")):
        assert torch.equal(learner.rank_embeddings[base, 0], tower.embed(tower.token_ids(name))[0])


def test_bases_between_ranks_start_from_the_nearer_one(tower):
    """Four bases over six ranks stand at 0, 1 2/3, 3 1/3 and 5."""
    names = ("zero", "one", "two", "three", "four", "five")
    learner = PromptLearner(tower, Ranks(tuple(range(6)), names), num_base_ranks=4, init_from_names=True)
    for base, name in enumerate(("zero", "two", "three", "five")):
        assert torch.equal(learner.rank_embeddings[base, 0], tower.embed(tower.token_ids(name))[0])


@pytest.mark.parametrize("specific", [False, True])
def test_random_embeddings_have_the_deviation_of_the_paper(tower, specific):
    torch.manual_seed(0)
    learner = PromptLearner(tower, 30, num_context=20, tokens_per_rank=2, rank_specific_context=specific)
    for parameter in (learner.context, learner.rank_embeddings):
        assert parameter.std().item() == pytest.approx(0.02, rel=0.05)
        assert parameter.mean().item() == pytest.approx(0, abs=2e-3)


def test_contexts_of_their_own_are_read_by_their_own_rank(tower):
    """A change of one rank's context changes that rank's features and no other's; so does a shared one for all."""
    for position in ("tail", "middle", "front"):
        for specific in (True, False):
            learner = PromptLearner(
                tower, 4, num_context=3, rank_position=position, rank_specific_context=specific, init_from_names=True
            )
            before = tower(learner()).detach()
            with torch.no_grad():
                learner.context[2 if specific else ...].add_(torch.randn(64))
            changed = (tower(learner()) - before).abs().amax(dim=1) > 1e-4
            assert changed.tolist() == ([False, False, True, False] if specific else [True] * 4), position


def test_texts_with_equal_tokens_after_different_ones_are_not_shared(tower):
    """Together as each for itself: only the start up to the first difference is one prefix."""
    texts = ["an age of 7 years.", "an sum of 8 years.", "an age of 9 years."]
    assert len(tower.prompts(texts).prefix) == 2  # [SOT] and "an"
    alone = torch.cat([tower([text]) for text in texts])
    assert torch.allclose(tower(texts), alone, atol=1e-5)
    assert (alone[0] - alone[1]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["linear", "inverse", "gaussian", "piecewise"])
@pytest.mark.parametrize(("num_ranks", "num_bases"), [(9, 1), (9, 2), (100, 3), (7, 7), (2000, 5)])
def test_interpolation_against_loops(kind, num_ranks, num_bases):
    weights = interpolation_weights(num_ranks, num_bases, kind)
    assert torch.isfinite(weights).all()
    if num_bases == 1:
        assert (weights == 1).all()
        return
    assert torch.allclose(weights.sum(dim=1), torch.ones(num_ranks))
    gap = (num_ranks - 1) / (num_bases - 1)
    for rank in range(0, num_ranks, max(1, num_ranks // 9)):
        distances = [abs(rank - base * gap) for base in range(num_bases)]
        nearest = min(distances)
        shape = {
            "linear": lambda d: 1 - d / (num_ranks - 1),
            "inverse": lambda d: 1 / (d + 1e-5),
            "gaussian": lambda d, nearest=nearest: float(np.exp(nearest**2 - d**2)),
            "piecewise": lambda d: max(0, 1 - d / gap),
        }[kind]
        expected = np.array([shape(d) for d in distances])
        assert np.allclose(weights[rank], expected / expected.sum(), atol=1e-5)


def test_piecewise_reproduces_a_base(tower):
    learner = PromptLearner(tower, 9, num_base_ranks=3, interpolation="piecewise")
    assert torch.allclose(learner.ranks_embedded()[[0, 4, 8]], learner.rank_embeddings)


def test_transformers_tower_equals_packed_and_its_own_model():
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(0)
    config = CLIPTextConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, projection_dim=32
    )
    model = CLIPTextModelWithProjection(config).eval()
    tower = TextTower.from_transformers(model)
    learner = PromptLearner(tower, 5, num_base_ranks=2, num_context=3)
    assert max(packed_against_plain(tower, learner)) < 1e-5
    ids = torch.tensor([[tower.start_token, *tower.token_ids("an age of 42."), tower.end_token]])
    expected = model(input_ids=ids).text_embeds
    assert torch.allclose(tower(["an age of 42."]), expected, atol=1e-5)


@pytest.mark.parametrize("pooling", ["last", "argmax"])
def test_bidirectional_tower_is_encoded_at_full_length(pooling):
    """SigLIP reads the last position, MobileCLIP [EOT]; both see the padding. Against open_clip's own forward."""
    torch.manual_seed(0)
    text = {"vocab_size": 49408, "width": 64, "heads": 4, "layers": 2, "no_causal_mask": True, "pool_type": pooling}
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    model = open_clip.CustomTextCLIP(32, vision, text).eval()
    tower = TextTower.from_open_clip(model)
    texts = ["an age of 42.", "a very old person."]
    expected = model.encode_text(open_clip.tokenize(texts))
    assert torch.allclose(tower(texts), expected, atol=1e-5)
    learner = PromptLearner(tower, 3, num_base_ranks=2, num_context=3)
    assert torch.equal(tower(learner()), tower.encode_plain(learner()))
    assert not torch.allclose(tower(learner()), tower.encode_packed(learner()), atol=1e-3)


def test_padding_that_a_bidirectional_tower_sees_is_the_tokenizers():
    """Texts of unequal lengths, padded with token 7, against open_clip's own forward."""
    torch.manual_seed(0)
    text = {"vocab_size": 49408, "width": 64, "heads": 4, "layers": 2, "no_causal_mask": True, "pad_id": 7}
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    model = open_clip.CustomTextCLIP(32, vision, text).eval()
    tower = TextTower.from_open_clip(model)
    assert tower.padding_token == 7
    texts = ["an age of 42.", "a very old person in a photo."]
    ids = open_clip.tokenize(texts)
    expected = model.encode_text(torch.where(ids == 0, 7, ids))
    assert torch.allclose(tower(texts), expected, atol=1e-5)
    assert not torch.allclose(model.encode_text(ids), expected, atol=1e-3)


def test_tower_in_bfloat16_takes_float32_prompts():
    model = text_model(layers=2)
    full = TextTower.from_open_clip(model)
    learner = PromptLearner(full, 4, num_base_ranks=2, num_context=3, context="the age is", init_from_names=True)
    expected = full(learner()).detach()
    half = TextTower.from_open_clip(model.bfloat16())
    features = half(PromptLearner(half, 4, num_base_ranks=2, context="the age is", init_from_names=True)())
    assert features.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(features.float(), expected).min() > 0.99


def test_frozen_tower_passes_gradient_through(tower):
    learner = PromptLearner(tower.train(), 3, num_base_ranks=2)
    tower(learner()).sum().backward()
    assert not tower.training
    assert all(parameter.grad is None for parameter in tower.parameters())
    assert learner.rank_embeddings.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_base_ranks": 6}, "between 1 and the number of ranks 5, got 6"),
        ({"num_base_ranks": 0}, "between 1 and the number of ranks 5, got 0"),
        ({"num_base_ranks": 2, "interpolation": "cubic"}, "'cubic' is unknown; choices: linear"),
        ({"rank_position": "end"}, "'end' is unknown; choices: tail"),
        ({"num_context": -1}, "num_context must be at least 0"),
        ({"tokens_per_rank": 0}, "tokens_per_rank must be at least 1"),
        ({"context": "  "}, "holds no token"),
        ({"context": "the age is {name}"}, "has braces: the rank is put beside it"),
        ({"num_context": 75}, "has 79 tokens .* at most 77"),
    ],
)
def test_bad_options(tower, options, message):
    with pytest.raises(ValueError, match=message):
        PromptLearner(tower, 5, **options)


def test_unsupported_models_are_named():
    with pytest.raises(ValueError, match="Linear"):
        TextTower.from_open_clip(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no CLIP or SigLIP text tower"):
        TextTower.from_transformers(torch.nn.Linear(2, 2))
