"""Prompts and the packed text tower against the authors' figures and against plain encoding."""

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch

from ordinalclip.losses import alignment_loss
from ordinalclip.metrics import ordinality
from ordinalclip.prompts import PromptLearner
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
    """The text encoder of the golden figures, from its seeded recipe."""
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
def test_golden_figures(golden_tower, number, packed):
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
