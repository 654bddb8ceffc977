"""NumCLIP: FCRC in both forms against reference values and loops, coarse classes, what is learned and served."""

import math

import pytest
import torch

from baselines.numclip import (
    CoarseToFine,
    FineRegressor,
    classes_of,
    coarse_ranks,
    fcrc_code,
    fcrc_code_alignment,
    fcrc_paper,
)
from ordinalclip import OrdinalModel, Ranks
from ordinalclip.backbones import load_backbone
from ordinalclip.config import load_config
from ordinalclip.heads import HeadContext, Targets, build_head, head_options
from ordinalclip.losses import alignment_loss, cross_entropy

LOGITS = torch.tensor([[2, 1, 0, -1, -2], [0.5, 1.5, 1, -0.5, 0], [-1, 0, 0.5, 2, 1]], dtype=torch.float64)
TRUE = torch.tensor([0, 2, 3])
AGES = Ranks.linear(16, 77, 62, unit="years")
LIFE = [("child", 0.0), ("teenager", 13.0), ("young adult", 19.0), ("middle adult", 35.0), ("older adult", 65.0)]
LEVELS = Ranks((0, 1, 2, 3), ("functional", "nearly functional", "slightly defective", "defective"))
FORMS = {
    "code": fcrc_code,
    "alignment": fcrc_code_alignment,
    "alignment paper": lambda logits, ranks, weights=None: fcrc_code_alignment(logits, ranks, weights, "paper"),
    **{
        f"{negatives} {norm}": lambda logits, ranks, weights=None, negatives=negatives, norm=norm: fcrc_paper(
            logits, ranks, 1.0, weights, negatives, norm
        )
        for negatives in ("ranks", "batch")
        for norm in ("sum", "mean")
    },
}


def batch(size=9, num_ranks=5, seed=0):
    """With an absent rank, and some twice."""
    rng = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(size, num_ranks, generator=rng, dtype=torch.float64)
    return logits, torch.randint(num_ranks - 1, (size,), generator=rng)


def test_reference_values():
    """Computed from the equations by other code (NumPy), with three digits more than are compared."""
    assert fcrc_code(LOGITS, TRUE).item() == pytest.approx(0.663356, abs=1e-6)
    singles = [fcrc_code(LOGITS[[b]], TRUE[[b]]).item() for b in range(3)]
    assert singles == pytest.approx([0.324624, 1.208366, 0.457078], abs=1e-6)
    assert fcrc_code_alignment(LOGITS, TRUE).item() == pytest.approx(0.363305, abs=1e-6)
    assert fcrc_paper(LOGITS, TRUE, beta=1.0).item() == pytest.approx(0.236750, abs=1e-6)
    assert fcrc_paper(LOGITS, TRUE, norm="mean").item() == pytest.approx(0.672709, abs=1e-6)
    regressor = FineRegressor([0, 13, 19, 35, 65]).double()
    torch.nn.init.zeros_(regressor.layers[2].weight)  # delta = 0
    assert regressor(LOGITS).tolist() == pytest.approx([6.546651, 18.759800, 36.546269], abs=1e-6)


def loop_code(logits, ranks):
    total = 0.0
    for row, y in zip(logits, ranks, strict=True):
        away = sum(abs(y - k) for k in range(len(row)))
        factors = [(len(row) - 1) * abs(y - j) / away if j != y else 1.0 for j in range(len(row))]
        scaled = [x * factor for x, factor in zip(row, factors, strict=True)]
        total += math.log(sum(math.exp(x) for x in scaled)) - scaled[y]
    return total / len(ranks)


def loop_code_alignment(logits, ranks, form):
    num, present, total = len(logits[0]), sorted(set(ranks)), 0.0
    for i in present:
        away = sum(abs(i - y) for y in ranks)
        column = [
            row[i] * ((num - 1) * abs(i - y) / away if y != i else 1.0) for row, y in zip(logits, ranks, strict=True)
        ]
        label = [math.exp(10.0 * (y == i)) if form == "official" else float(y == i) for y in ranks]
        p = [math.exp(x) / sum(math.exp(other) for other in column) for x in column]
        t = [x / sum(label) for x in label]
        total += sum(a * math.log(a / b) for a, b in zip(t, p, strict=True) if a)
    return total / len(present)


def loop_paper(logits, ranks, negatives, norm):
    total = 0.0
    for i, (row, y) in enumerate(zip(logits, ranks, strict=True)):
        if negatives == "ranks":
            others = [j for j in range(len(row)) if j != y]
        else:  # the other images, each with the text of its rank
            others = [rank for j, rank in enumerate(ranks) if j != i]
        away = sum(abs(y - j) for j in others)
        scale = 1 if norm == "sum" else sum(j != y for j in others)
        weighted = sum(scale * abs(y - j) / away * math.exp(row[j]) for j in others)
        total -= math.log(math.exp(row[y]) / (math.exp(row[y]) + weighted))
    return total / len(ranks)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_ranks", [2, 3, 7])
def test_losses_against_loops(seed, num_ranks):
    logits, ranks = batch(8, num_ranks + 1, seed)
    if num_ranks == 2:
        ranks = ranks.clone().index_fill(0, torch.tensor([0, 1]), 0).index_fill(0, torch.tensor([2]), 1)
    plain = logits.tolist(), ranks.tolist()
    assert fcrc_code(logits, ranks).item() == pytest.approx(loop_code(*plain))
    for form in ("official", "paper"):
        found = fcrc_code_alignment(logits, ranks, None, form).item()
        assert found == pytest.approx(loop_code_alignment(*plain, form))
    for negatives in ("ranks", "batch"):
        for norm in ("sum", "mean"):
            found = fcrc_paper(logits, ranks, 1.0, None, negatives, norm).item()
            assert found == pytest.approx(loop_paper(*plain, negatives, norm)), (negatives, norm)


def test_two_forms_are_two_functions():
    """A far rank with a logit below 0: as coded it costs less the farther it is, as printed more."""
    near, far = torch.tensor([[1.0, -1, -9, -9, -9]]), torch.tensor([[1.0, -9, -9, -9, -1]])
    first = torch.tensor([0])
    assert fcrc_code(far, first) < fcrc_code(near, first)
    assert fcrc_paper(far, first) > fcrc_paper(near, first)
    assert cross_entropy(far, first).item() == pytest.approx(cross_entropy(near, first).item())


def test_two_ranks_are_plain_losses():
    """The only wrong rank is at the mean distance."""
    logits, ranks = batch(6, 2)[0], torch.tensor([0, 1, 1, 0, 1, 0])
    plain = cross_entropy(logits, ranks).item()
    assert fcrc_code(logits, ranks).item() == pytest.approx(plain)
    for norm in ("sum", "mean"):
        assert fcrc_paper(logits, ranks, norm=norm).item() == pytest.approx(plain)


def test_beta_cancels_and_is_checked():
    logits, ranks = batch()
    assert fcrc_paper(logits, ranks, beta=7.0).item() == pytest.approx(fcrc_paper(logits, ranks).item())
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="beta must be above 0, got"):
            fcrc_paper(logits, ranks, beta=wrong)
    with pytest.raises(ValueError, match="negatives is ranks or batch and norm sum or mean, got 'all' and 'sum'"):
        fcrc_paper(logits, ranks, negatives="all")


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_copies_and_the_order_does_not_matter(form):
    logits, ranks = batch()
    copies = torch.tensor([1, 3, 1, 2, 1, 1, 2, 1, 1])
    weighted = FORMS[form](logits, ranks, copies.double()).item()
    repeated = FORMS[form](logits.repeat_interleave(copies, 0), ranks.repeat_interleave(copies)).item()
    assert weighted == pytest.approx(repeated)
    assert weighted != pytest.approx(FORMS[form](logits, ranks).item(), rel=1e-4)
    order = torch.randperm(9)
    assert FORMS[form](logits[order], ranks[order], copies[order].double()).item() == pytest.approx(weighted)


@pytest.mark.parametrize("form", ["code", "ranks sum", "ranks mean", "batch sum"])
def test_copies_of_a_whole_batch_change_nothing(form):
    logits, ranks = batch()
    twice = FORMS[form](logits.repeat(2, 1), ranks.repeat(2)).item()
    assert twice == pytest.approx(FORMS[form](logits, ranks).item())


def test_the_coded_alignment_shrinks_with_the_batch():
    """As published: R - 1 in place of the number of images. With 5 ranks and 450 images all factors are near 0."""
    logits, ranks = batch()
    plain = alignment_loss(logits, ranks)["alignment"].item()
    found = [fcrc_code_alignment(logits.repeat(n, 1), ranks.repeat(n)).item() for n in (1, 50)]
    assert found[0] != pytest.approx(found[1], rel=1e-2)
    assert plain != pytest.approx(found[0], rel=1e-2)


@pytest.mark.parametrize("form", FORMS)
def test_gradient_is_right(form):
    logits, ranks = batch(6)
    weights = torch.linspace(0.5, 2, 6).double()
    assert torch.autograd.gradcheck(lambda x: FORMS[form](x, ranks, weights), logits.requires_grad_())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 4])
def test_one_rank_in_the_batch(form, size, dtype):
    """No image of another rank: nothing is divided by 0. Scores are float32 whatever the logits are."""
    logits = (50 * torch.randn(size, 5)).to(dtype).requires_grad_()
    loss = FORMS[form](logits, torch.full((size,), 2))
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()
    if form.startswith("batch"):
        assert loss == 0
        assert (logits.grad == 0).all()


# Coarse classes


def test_classes_in_words():
    classes = coarse_ranks(AGES, LIFE)
    assert classes.names == ("child", "teenager", "young adult", "middle adult", "older adult")
    ages = [16, 18, 19, 34, 35, 64, 65, 77]
    members = dict(zip(AGES.values, classes_of(AGES, classes), strict=True))
    assert [members[age] for age in ages] == [1, 1, 2, 2, 3, 3, 4, 4]


def test_classes_that_nobody_gave():
    """Few ranks are the classes; many are cut into five parts that say what they are, whatever the distances."""
    assert coarse_ranks(LEVELS, None) == LEVELS
    assert len(coarse_ranks(Ranks.of(10), None)) == 10
    parts = coarse_ranks(Ranks.linear(0, 100, 101, unit="%"), None)
    assert parts.names == ("0 to 19", "20 to 39", "40 to 59", "60 to 79", "80 to 100")
    assert parts.values == (0, 20, 40, 60, 80)
    uneven = Ranks((1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024))
    assert coarse_ranks(uneven, None).names == ("1 to 2", "4 to 8", "16 to 32", "64 to 128", "256 to 1024")
    assert classes_of(uneven, coarse_ranks(uneven, None)) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 4]


@pytest.mark.parametrize(
    ("coarse", "message"),
    [
        ([("teenager", 13), ("child", 0)], "head.coarse, names and starts .*strictly increasing, got 13 before 0"),
        ([("child", 0), ("child", 13)], r"head.coarse, names and .* unique and not empty, got \['child'\]"),
        ([("young", 20), ("old", 60)], "head.coarse: the first class, 'young', starts at 20; .*with 16 years"),
        (
            [("young", 0), ("old", 100)],
            "head.coarse: all ranks, 16 years to 77 years, are in one class; is it in the la",
        ),
    ],
)
def test_classes_that_are_refused(coarse, message):
    with pytest.raises(ValueError, match=message):
        coarse_ranks(AGES, coarse)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["head.coarse=[[child, 0]]"], r"head\.coarse: .*at least 2 items"),
        (["head.coarse=[[child, none], [old, 3]]"], r"head\.coarse\.0\.1: .*number.*'none'"),
        (["head.coarse=[[child, 0], [old]]"], r"head\.coarse\.1\.1: Field required"),
        (["head.adapter_share=1.5"], r"head\.adapter_share: .*less than or equal to 1, got 1\.5"),
        (["head.bin_values=middle"], r"head\.bin_values: .*'start' or 'centre'"),
        (["head.num_base_ranks=3"], r"head\.num_base_ranks is not a key"),
    ],
)
def test_bad_options(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config(None, ["method=numclip", *overrides])


def test_options_of_the_prompts_are_its_own():
    options = head_options("numclip")
    assert set(options) - set(head_options("coop")) == {
        *("coarse", "bin_values", "adapter_share", "fcrc", "negatives", "norm", "regression_weight")
    }
    assert set(head_options("coop")) <= set(options)
    config = load_config(None, ["method=numclip", "head.coarse=[[young adult, 19], [old, 35.5]]"])
    assert config.head["coarse"] == [("young adult", 19), ("old", 35.5)]


# The head


def head_of(ranks=AGES, coarse=LIFE, seed=0, **options):
    backbone = load_backbone("tiny")
    torch.manual_seed(seed)
    context = HeadContext(ranks, 12, text=backbone.text, shared_space=False)
    return build_head("numclip", context, {"coarse": coarse, **options})


def people(count=64, seed=0):
    """Features that hold the age, in the range of the ranks, and noise."""
    rng = torch.Generator().manual_seed(seed)
    ages = torch.randint(16, 78, (count,), generator=rng)
    direction = torch.randn(2, 12, generator=torch.Generator().manual_seed(9))
    features = direction[0] + (ages[:, None] - 45) / 20 * direction[1]
    return features + 0.1 * torch.randn(count, 12, generator=rng), Targets(ages.float(), ages - 16)


def test_what_the_loss_is_made_of():
    head, (features, targets) = head_of(bin_values="centre", alignment_weight=0.5, regression_weight=0.25), people(8)
    weights = torch.linspace(0.5, 2, 8)
    outputs = head(features)
    terms = head.loss(outputs, targets._replace(weights=weights))
    classes = torch.tensor([sum(age >= start for _, start in LIFE) - 1 for age in targets.values.tolist()])
    logits = outputs["coarse_logits"]
    error = (weights * (outputs["value"] - targets.values).abs()).sum() / weights.sum()
    assert terms["contrastive"].item() == pytest.approx(fcrc_code(logits, classes, weights).item())
    assert terms["alignment"].item() == pytest.approx(fcrc_code_alignment(logits, classes, weights).item())
    assert terms["error"].item() == pytest.approx(error.item())
    total = terms["contrastive"] + 0.5 * terms["alignment"] + 0.25 * terms["error"]
    assert terms["loss"].item() == pytest.approx(total.item())
    for negatives in ("ranks", "batch"):
        for norm in ("sum", "mean"):
            other = head_of(fcrc="paper", negatives=negatives, norm=norm)
            found = other.loss(outputs, targets)["contrastive"].item()
            assert found == pytest.approx(fcrc_paper(logits, classes, 1.0, None, negatives, norm).item())


def test_adapter_and_bin_values():
    """Of a picture by hand: the adapter, the cosines, the corrections, held above a tenth."""
    for bin_values, values in (("start", [0, 13, 19, 35, 65]), ("centre", [0, 17, 26.5, 49.5, 71])):  # none is a child
        head = head_of(bin_values=bin_values).double()
        assert list(head.fine.bin_values) == values
        for layer in (head.fine.layers[0], head.fine.layers[2]):
            assert layer.weight.std() < 0.002
            assert (layer.bias == 0).all()
        torch.nn.init.normal_(head.fine.layers[0].weight, std=3)
        torch.nn.init.normal_(head.fine.layers[2].weight, std=3)
        x = people(6)[0].double()
        down, up = (head.adapter.layers[k].weight for k in (0, 2))
        assert down.shape == (3, 12)
        adapted = 0.8 * (up @ (down @ x.t()).relu()).relu().t() + 0.2 * x
        image = torch.nn.functional.normalize(head.similarity.projection(adapted), dim=1)
        text = torch.nn.functional.normalize(head.similarity.rank_prototypes(), dim=1)
        logits = image @ text.t() / 0.07
        first, last = head.fine.layers[0], head.fine.layers[2]
        delta = torch.tanh((logits @ first.weight.t() + first.bias).relu() @ last.weight.t() + last.bias)
        expected = [
            sum(p * b / max(1 + d, 0.1) for p, b, d in zip(row, values, deltas, strict=True))
            for row, deltas in zip(logits.softmax(dim=1).tolist(), delta.tolist(), strict=True)
        ]
        assert delta.min() < -0.9  # so the bound counts
        outputs = head(x)
        assert torch.allclose(outputs["coarse_logits"], logits)
        assert outputs["value"].tolist() == pytest.approx(expected)
        assert torch.allclose(head.space(x), image)


def test_few_ranks_are_answered_from_their_distribution():
    head = head_of(LEVELS, None)
    assert head.fine is None
    features = people(8)[0]
    targets = Targets(torch.tensor([0.0, 1, 2, 3, 3, 2, 1, 0]), torch.tensor([0, 1, 2, 3, 3, 2, 1, 0]))
    outputs = head(features)
    prediction, p = head.predict(outputs), outputs["logits"].softmax(dim=1)
    assert torch.equal(prediction.probabilities, p)
    mean = p @ torch.arange(4.0)
    assert head.loss(outputs, targets)["error"].item() == pytest.approx((mean - targets.values).abs().mean().item())
    assert head.rank_prototypes().shape == (4, 128)
    assert head_of().rank_prototypes() is None  # of classes, which are not the ranks
    renamed = head_of(LEVELS, [("good", -1), ("fair", 0.5), ("poor", 1.5), ("bad", 3)])
    assert renamed.fine is None
    assert renamed.similarity.ranks.names == ("good", "fair", "poor", "bad")


def trained(without=(), **options):
    """After 50 steps; without some terms of the loss."""
    head, (features, targets) = head_of(**options), people(256)
    optimizer = torch.optim.Adam([p for p in head.parameters() if p.requires_grad], 1e-2)
    for step in range(50):
        rows = slice(32 * step % 256, 32 * step % 256 + 32)
        terms = head.loss(head(features[rows]), Targets(targets.values[rows], targets.ranks[rows]))
        optimizer.zero_grad()
        (terms["loss"] - sum(terms[name] for name in without)).backward()
        optimizer.step()
    return head


@torch.no_grad()
def scores(head):
    """MAE, and how often the likeliest coarse class is the right one, on other people."""
    features, targets = people(256, seed=1)
    outputs = head(features)
    mae = (head.predict(outputs).value - targets.values).abs().mean().item()
    classes = head.class_of_rank[targets.ranks]
    return mae, (outputs["coarse_logits"].argmax(dim=1) == classes).double().mean().item()


@pytest.mark.parametrize("fcrc", ["code", "paper"])
def test_learns_values_and_classes(fcrc):
    """Ages 16 to 77 at random: a constant answer is 15.5 years off, and half of all are middle adults. FCRC alone finds
    the classes, and says nothing of the value that they stand for."""
    mae, right = scores(trained(fcrc=fcrc))
    assert mae < 4
    assert right > 0.65
    mae, right = scores(trained(["error"], fcrc=fcrc))
    assert mae > 8
    assert right > 0.65


def test_the_coded_loss_over_the_batch_learns_too():
    assert scores(trained(["error", "contrastive"]))[1] > scores(head_of())[1] + 0.2


@pytest.mark.parametrize("coarse", [LIFE, None])
def test_what_is_deployed_answers_as_what_was_trained(coarse, tmp_path):
    """Words come back from config.json; no text tower, no prompts; nothing else is imported for it."""
    ranks = AGES if coarse else LEVELS
    torch.manual_seed(0)
    options = {"coarse": coarse, "adapter_share": 0.5, "bin_values": "centre", "prompt": "the person is a"}
    model = OrdinalModel.build("timm:test_resnet", ranks, "numclip", options, text="tiny", decoding="expectation")
    for parameter in model.head.adapter.parameters():
        torch.nn.init.normal_(parameter)
    pixels = torch.randn(3, 3, model.config.pixel_spec.size, model.config.pixel_spec.size)
    model.eval().save_pretrained(tmp_path)
    loaded = OrdinalModel.from_pretrained(tmp_path)
    assert isinstance(loaded.head, CoarseToFine)
    assert loaded.config.method == "baselines.numclip:CoarseToFine"
    assert not [name for name in loaded.state_dict() if "text" in name or "learner" in name]
    with torch.no_grad():
        assert torch.allclose(loaded(pixels).value, model(pixels).value, atol=1e-4)
    assert len(loaded(pixels).value.unique()) == 3
    if coarse:
        assert loaded.config.head["coarse"] == [list(each) for each in coarse]


def test_text_tower_is_needed():
    with pytest.raises(ValueError, match=r"NumCLIP needs a text tower: set model\.text"):
        OrdinalModel.build("timm:test_resnet", AGES, "numclip")
