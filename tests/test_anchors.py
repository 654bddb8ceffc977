"""Text anchors: fixed prototypes, an ordinal loss, and the correction that the validation part teaches."""

import numpy as np
import pytest
import torch
from conftest import QUICK
from PIL import Image
from torch.nn.functional import normalize

from ordinalclip import OrdinalModel, Ranks
from ordinalclip.anchors import TextAnchors
from ordinalclip.backbones import load_backbone
from ordinalclip.config import load_config
from ordinalclip.heads import HeadContext, Targets
from ordinalclip.losses import ranked_probability_score
from ordinalclip.metrics import ranked_probability_score as score_of
from ordinalclip.training import train

RANKS = Ranks.linear(0, 100, 21, unit="%")
TEMPLATES = ["a photo of a gauge at {name} {unit}.", "it reads {name}"]


def head_of(shared=False, ranks=RANKS, **options):
    torch.manual_seed(0)
    text = load_backbone("tiny").text
    dim = text.output_dim if shared else 6
    return TextAnchors(HeadContext(ranks, dim, text=text, shared_space=shared, logit_scale=3.0), **options)


def of(ranks, weights=None):
    ranks = torch.as_tensor(ranks)
    return Targets(torch.tensor(RANKS.values)[ranks], ranks, weights)


@pytest.mark.parametrize("seed", range(3))
def test_the_loss_is_the_metric(seed):
    rng = np.random.default_rng(seed)
    logits, ranks = torch.from_numpy(rng.normal(size=(7, 5))), torch.from_numpy(rng.integers(0, 5, 7))
    loss = ranked_probability_score(logits, ranks)
    assert loss.item() == pytest.approx(score_of(logits.softmax(dim=1).numpy(), ranks.numpy()), abs=1e-12)
    copies = torch.tensor([1.0, 3, 2, 1, 1, 2, 1], dtype=torch.float64)
    repeated = torch.repeat_interleave(torch.arange(7), copies.long())
    assert ranked_probability_score(logits, ranks, copies).item() == pytest.approx(
        ranked_probability_score(logits[repeated], ranks[repeated]).item(), abs=1e-12
    )
    assert torch.autograd.gradcheck(lambda x: ranked_probability_score(x, ranks, copies), logits.requires_grad_())


def test_the_loss_knows_how_far_off_an_answer_is():
    """Cross-entropy does not: both wrong answers give the true rank the same probability."""
    near, far = torch.zeros(1, 5), torch.zeros(1, 5)
    near[0, 1], far[0, 4] = 5, 5
    truth = torch.tensor([0])
    assert torch.nn.functional.cross_entropy(near, truth) == torch.nn.functional.cross_entropy(far, truth)
    assert ranked_probability_score(near, truth) < ranked_probability_score(far, truth) - 2


def test_prototypes_are_what_the_language_says_and_stay_so(tmp_path):
    head = head_of(templates=TEMPLATES)
    tower = load_backbone("tiny").text
    with torch.no_grad():
        sentences = [
            normalize(tower([template.replace("{name}", name).replace("{unit}", "%") for name in RANKS.names]), dim=1)
            for template in TEMPLATES
        ]
    mean = normalize(sum(sentences), dim=1)
    expected = normalize(mean - mean.mean(dim=0), dim=1)
    assert torch.allclose(head.rank_prototypes(), expected, atol=1e-5)
    assert {name for name, parameter in head.named_parameters() if parameter.requires_grad} == {
        "projection.weight",
        "projection.bias",
    }
    assert not [name for name in head.state_dict() if name.startswith("text.")]  # no text tower in a checkpoint


def test_names_of_your_own():
    names = [f"number {number}" for number in range(21)]
    by_option = head_of(names=names, templates=["it is {name}"])
    by_ranks = head_of(ranks=Ranks(RANKS.values, names), templates=["it is {name}"])
    assert torch.equal(by_option.prototypes, by_ranks.prototypes)
    with pytest.raises(ValueError, match=r"head\.names: 20 names for 21 ranks"):
        head_of(names=names[1:])


def neighbours(head):
    """Cosine of neighbouring prototypes and of those eight ranks apart, on average."""
    cosines = head.prototypes @ head.prototypes.t()
    return cosines.diagonal(1).mean().item(), cosines.diagonal(8).mean().item()


def test_controls_take_away_what_they_say():
    text, shuffled, path, random = (head_of(control=control) for control in (None, "shuffled", "path", "random"))
    order = torch.cdist(shuffled.prototypes, text.prototypes).argmin(dim=1)
    assert torch.allclose(shuffled.prototypes, text.prototypes[order], atol=1e-5)
    assert sorted(order.tolist()) == list(range(21))
    assert order.tolist() != list(range(21))
    near, far = neighbours(path)
    assert near > 0.8 > far + 0.5
    assert all(abs(cosine) < 0.2 for cosine in neighbours(random))


def test_in_a_clip_s_own_space_it_starts_as_zero_shot():
    ranks = Ranks.linear(0, 100, 5, unit="%")
    anchors = OrdinalModel.build("tiny", ranks, "text_anchors", {"templates": TEMPLATES})
    zero_shot = OrdinalModel.build("tiny", ranks, "zero_shot", {"templates": TEMPLATES})
    pixels = torch.randn(2, 3, 64, 64)
    assert torch.allclose(anchors(pixels).logits, zero_shot(pixels).logits, atol=1e-4)


@pytest.mark.parametrize("template", ["no place", "{name} {age}"])
def test_templates_are_checked(template):
    with pytest.raises(ValueError, match=r"head\.templates: "):
        head_of(templates=[template])


def test_it_needs_a_text_tower():
    with pytest.raises(ValueError, match=r"TextAnchors needs a text tower: set model\.text"):
        TextAnchors(HeadContext(RANKS, 6))


def world(prior, size, seed, overconfidence=1.0):
    """Logits of a model that knows p(x | rank) and took all ranks for equally common, and ranks drawn by `prior`."""
    rng = np.random.default_rng(seed)
    ranks = rng.choice(len(prior), size, p=prior)
    seen = ranks + rng.normal(size=size) * 2
    logits = -((seen[:, None] - np.arange(len(prior))) ** 2) / 8
    return torch.from_numpy(overconfidence * logits).float(), torch.from_numpy(ranks)


def fitted(validation, seen=1.0, **options):
    head = head_of(**options)
    head.seen.fill_(seen)
    logits, ranks = validation
    head.fit(None, ({"logits": logits, "learnt": logits}, of(ranks)))
    return head


PRIOR = np.exp(-np.arange(21) / 4) / np.exp(-np.arange(21) / 4).sum()


def test_the_prior_is_put_back():
    """Where all that is wrong with a model is its prior, the right one is found, and answers are better for it."""
    head = fitted(world(PRIOR, 4000, 0))
    assert head.sharpness.item() == pytest.approx(1, rel=0.2)
    centred = head.correction - head.correction.mean()
    true = torch.from_numpy(np.log(PRIOR))
    assert torch.corrcoef(torch.stack([centred.double(), true]))[0, 1] > 0.98
    assert centred[:10].diff().mean().item() == pytest.approx(-0.25, abs=0.06)

    logits, ranks = world(PRIOR, 4000, 1)
    before = ranked_probability_score(logits, ranks)
    after = ranked_probability_score(head.sharpness * logits + head.correction, ranks)
    assert after < 0.93 * before


def test_what_is_too_sure_is_told_so():
    head = fitted(world(np.full(21, 1 / 21), 3000, 0, overconfidence=8.0))
    assert head.sharpness.item() == pytest.approx(1 / 8, rel=0.2)
    assert (head.correction.max() - head.correction.min()).item() < 0.5  # the ranks are equally common


def test_the_prior_of_the_training_is_kept_on_request():
    assert torch.count_nonzero(fitted(world(PRIOR, 500, 0), prior="training").correction) == 0


def test_without_a_validation_part_nothing_is_corrected():
    head = fitted(world(PRIOR, 500, 0))
    head.fit(None, None)
    assert head.sharpness.item() == 1
    assert torch.count_nonzero(head.correction) == 0


def test_a_rank_that_was_never_seen_gets_no_infinite_odds():
    head = fitted((torch.zeros(3, 21), torch.tensor([0, 0, 1])), seen=0.0)
    assert head.correction.isfinite().all()


def test_what_the_answers_assume_is_said_once(caplog):
    head = fitted(world(PRIOR, 500, 0))
    assert "answers assume that they are as common as in the validation part" in caplog.text
    caplog.clear()
    logits, ranks = world(PRIOR, 500, 0)
    head.fit(None, ({"logits": logits, "learnt": logits}, of(ranks)))
    fitted(world(np.full(21, 1 / 21), 3000, 0))
    fitted(world(PRIOR, 500, 0), prior="training")
    assert not caplog.text


def test_counts_go_on_where_float32_ends():
    """After 2^24 pictures of a rank adding 1 would change nothing, and other ranks would catch up."""
    head = head_of().train()
    head.seen[3] = 2.0**24
    outputs = head(torch.randn(2, 6))
    before = head.seen[3].item()
    for _ in range(3):
        head.loss(outputs, of([3, 3]))
    assert head.seen[3] < before
    assert head.seen[3] > 2.0**22
    counted = head.seen[3].item()
    head.loss(outputs, of([3, 3]))
    assert head.seen[3].item() == counted + 2


def test_ranks_are_counted_as_the_loss_sees_them():
    head = head_of()
    outputs = head(torch.randn(3, 6))
    head.train().loss(outputs, of([2, 2, 5], torch.tensor([1.0, 0.5, 3.0])))
    expected = torch.zeros(21)
    expected[2], expected[5] = 1.5, 3
    assert torch.equal(head.seen, expected)
    head.eval().loss(outputs, of([0, 0, 0]))
    assert torch.equal(head.seen, expected)


def test_what_is_learnt_does_not_depend_on_the_correction():
    """Or training would change when it is evaluated more often."""
    plain, corrected = head_of().train(), head_of().train()
    corrected.sharpness.fill_(0.3)
    corrected.correction.copy_(torch.randn(21))
    features, targets = torch.randn(4, 6), of([0, 7, 7, 20])
    for head in (plain, corrected):
        head.loss(head(features), targets)["loss"].backward()
    assert torch.equal(plain.projection.weight.grad, corrected.projection.weight.grad)


def test_what_is_deployed_answers_the_same():
    head = head_of().eval()
    head.sharpness.fill_(0.3)
    head.correction.copy_(torch.linspace(-2, 2, 21))
    features = torch.randn(9, 6)
    method, options, deployed = head.deploy()
    assert method == "prototypes"
    assert options["corrected"]
    ours, theirs = head.predict(head(features)), deployed.predict(deployed(features))
    assert torch.equal(ours.rank, theirs.rank)
    assert torch.allclose(ours.probabilities, theirs.probabilities, atol=1e-6)


def test_few_shots_do_not_make_rare_readings_common(tmp_path):
    """Trained on as many pictures of every reading, it answers a validation part of low readings with low ones."""
    lines = ["image,label"]
    rng = np.random.default_rng(0)
    for number in range(120):
        label = int(rng.choice(5, p=[0.6, 0.2, 0.1, 0.05, 0.05])) if number >= 30 else number % 5
        noise = rng.integers(0, 160, (8, 8, 3)) + 12 * label
        Image.fromarray(noise.astype(np.uint8)).save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png,{label}")
    for part, rows in (("train", lines[1:31]), ("validation", lines[31:])):
        (tmp_path / f"{part}.csv").write_text("\n".join([lines[0], *rows]) + "\n")
    config = load_config(
        None,
        [
            *(word for word in QUICK if not word.startswith(("ranks.", "data."))),
            f"output_dir={tmp_path}/run",
            "method=text_anchors",
            "data.source=table",
            f"data.root={tmp_path}",
            "data.train_table=train.csv",
            "data.validation_table=validation.csv",
            "ranks.values=[0,1,2,3,4]",
            "train.select=last",
        ],
    )
    train(config)
    head = OrdinalModel.from_pretrained(tmp_path / "run" / "model").head
    assert head.correction.argmax().item() == 0
    assert head.correction[0] > head.correction[4] + 0.5


def test_where_nothing_learns_it_is_said(tmp_path):
    """A frozen CLIP with anchors of its own text."""
    place = [f"output_dir={tmp_path / 'run'}", "method=text_anchors", "train.freeze=[encoder.*]", "train.max_steps=2"]
    config = load_config(None, [*place, "data.num_train=40", "data.num_validation=20", "data.num_test=20"])
    with pytest.raises(ValueError, match=r"nothing is trained: .* method=text_anchors has no parameters"):
        train(config, quiet=True)
