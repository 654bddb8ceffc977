"""Imported losses against the losses themselves, and what is refused before it trains."""

import subprocess
import sys

import dlordinal.losses
import numpy as np
import pytest
import torch
from conftest import losses_of

from ordinalclip import OrdinalModel, Ranks
from ordinalclip.config import load_config
from ordinalclip.heads import HeadContext, Targets, build_head
from ordinalclip.training import train

RANKS = Ranks.linear(0, 4, 5)
CROSS_ENTROPY = "torch.nn:CrossEntropyLoss"


def squared(logits, ranks, power: float = 2.0, reduction: str = "mean"):
    """A function as a user would write one, on the expected rank."""
    expected = torch.softmax(logits, dim=1) @ torch.arange(logits.shape[1]).to(logits)
    errors = (expected - ranks).abs() ** power
    return errors if reduction == "none" else errors.mean()


def no_scalar(logits, ranks):
    return torch.softmax(logits, dim=1)


def a_number(logits, ranks):
    return 3.0


def without_gradient(logits, ranks):
    return squared(logits, ranks).detach()


def not_finite(logits, ranks):
    return torch.softmax(logits, dim=1).sum() / 0


def head_of(loss, options=None, input=None, ranks=RANKS):
    torch.manual_seed(0)
    options = {"loss": loss, "options": options, "input": input}
    return build_head("loss", HeadContext(ranks, 6), options)


def batch(size=9):
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(size, 6, generator=generator)
    ranks = torch.randint(5, (size,), generator=generator)
    return features, Targets(ranks.float(), ranks)


ORACLES = {  # head.loss, head.options, head.input -> the loss called directly, on logits or probabilities
    "emd": ("dlordinal.losses:EMDLoss", {}, None, dlordinal.losses.EMDLoss(5)),
    "cdw": ("dlordinal.losses:CDWCELoss", {"alpha": 2.0}, None, dlordinal.losses.CDWCELoss(5, alpha=2.0)),
    "kappa": ("dlordinal.losses:WKLoss", {}, None, dlordinal.losses.WKLoss(5, use_logits=True)),
    "kappa of probabilities": ("dlordinal.losses:WKLoss", {}, "probabilities", dlordinal.losses.WKLoss(5)),
    "slace": ("dlordinal.losses:SLACELoss", {"alpha": 1.5}, None, dlordinal.losses.SLACELoss(1.5, 5)),
    "binomial": (
        "dlordinal.losses:BinomialLoss",
        {"base_loss": CROSS_ENTROPY, "eta": 0.8},
        None,
        dlordinal.losses.BinomialLoss(torch.nn.CrossEntropyLoss(), 5, eta=0.8),
    ),
    "weights of classes": (
        CROSS_ENTROPY,
        {"weight": [1.0, 2.0, 1.0, 3.0, 1.0]},
        None,
        torch.nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 1.0, 3.0, 1.0])),
    ),
    "function": ("test_baselines_adapter:squared", {"power": 1.5}, None, lambda x, y: squared(x, y, 1.5)),
    "log of probabilities": (
        "torch.nn:NLLLoss",
        {},
        "logits",
        lambda x, y: -x[torch.arange(len(y)), y].mean(),
    ),
}


@pytest.mark.parametrize("name", ORACLES)
def test_it_is_the_loss_itself(name):
    loss, options, input, oracle = ORACLES[name]
    head, (features, targets) = head_of(loss, options, input), batch()
    logits = features @ head.linear.weight.t() + head.linear.bias
    given = torch.softmax(logits, dim=1) if input == "probabilities" else logits
    expected = oracle(given, targets.ranks)
    found = head.loss(head(features), targets)["loss"]
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    slopes = [torch.autograd.grad(value, head.linear.weight, retain_graph=True)[0] for value in (found, expected)]
    assert torch.allclose(*slopes, atol=1e-6)


def test_use_logits_follows_the_input():
    """The default of dlordinal's MCELoss takes logits for probabilities without a word."""
    assert head_of("dlordinal.losses:MCELoss").criterion.use_logits is True
    assert head_of("dlordinal.losses:MCELoss", None, "probabilities").criterion.use_logits is False


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (CROSS_ENTROPY, {}),
        ("torch.nn.functional:cross_entropy", {}),
        ("dlordinal.losses:TriangularLoss", {"base_loss": CROSS_ENTROPY}),
        ("test_baselines_adapter:squared", {}),
    ],
)
def test_a_weight_counts_as_copies(loss, options):
    head, (features, targets) = head_of(loss, options), batch()
    copies = torch.tensor([1, 3, 1, 2, 1, 1, 2, 1, 1])
    weighted = head.loss(head(features), targets._replace(weights=copies.float()))["loss"]
    repeated = Targets(targets.values.repeat_interleave(copies), targets.ranks.repeat_interleave(copies))
    expected = head.loss(head(features.repeat_interleave(copies, 0)), repeated)["loss"]
    assert weighted.item() == pytest.approx(expected.item(), rel=1e-5)
    assert weighted.item() != pytest.approx(head.loss(head(features), targets)["loss"].item(), rel=1e-4)


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ("dlordinal.losses:EMDLoss", {}),  # no reduction
        ("dlordinal.losses:MCELoss", {}),  # "none" gives losses of ranks
        ("dlordinal.losses:MCEAndWKLoss", {}),  # says reduction and does not follow it
        (CROSS_ENTROPY, {"weight": [1.0, 2.0, 1.0, 3.0, 1.0]}),  # no mean over samples
        (CROSS_ENTROPY, {"reduction": "sum"}),
    ],
)
def test_weights_are_refused_by_name_where_samples_have_no_loss(loss, options):
    head, (features, targets) = head_of(loss, options), batch()
    assert torch.isfinite(head.loss(head(features), targets)["loss"])
    with pytest.raises(ValueError, match=rf"head\.loss {loss} gives no losses of single samples.*train\.weighting"):
        head.loss(head(features), targets._replace(weights=torch.ones(9)))


@pytest.mark.parametrize(
    ("loss", "options", "input", "message"),
    [
        ("dlordinal.losses:EMDLos", {}, None, r"head\.loss: .*has no 'EMDLos'; nearest: EMDLoss"),
        ("no_such:Loss", {}, None, r"head\.loss: module 'no_such' cannot be imported .*PYTHONPATH"),
        ("EMDLoss", {}, None, r"head\.loss: write module:name"),
        ("subprocess:Popen", {"args": "true"}, None, "neither a function nor a class of torch"),
        ("dlordinal.losses:CDWCELoss", {"aplha": 2}, None, r"head\.options\.aplha is not an option.*nearest: alpha"),
        ("dlordinal.losses:SLACELoss", {}, None, r"SLACELoss needs head\.options with alpha"),
        (
            "dlordinal.losses:BetaLoss",
            {"base_loss": "torch.nn:Cross"},
            None,
            r"head\.options\.base_loss: .*has no 'Cross'; nearest",
        ),
        ("dlordinal.losses:MCEAndWKLoss", {"C": 3}, None, r"cannot be built with \{'C': 3\}: ValueError: C must be"),
        ("dlordinal.losses:WKLoss", {"use_logits": False}, None, r"use_logits=False contradicts head\.input"),
        ("dlordinal.losses:EMDLoss", {}, "probabilities", r"takes the softmax itself: leave out head\.input"),
        ("torch.nn:NLLLoss", {}, None, r"NLLLoss changes when a number is added.*head\.input=probabilities"),
        ("dlordinal.losses:CORNLoss", {}, None, r"never looks at column 4: .*R - 1 thresholds .*corn"),
        ("dlordinal.losses:OrdinalECOCDistanceLoss", {}, None, r"called with logits \(11, 5\) .*fails: RuntimeError"),
        ("test_baselines_adapter:no_scalar", {}, None, r"must give a scalar with a gradient, got a tensor of .*11, 5"),
        ("test_baselines_adapter:a_number", {}, None, r"must give a scalar with a gradient, got float"),
        ("test_baselines_adapter:without_gradient", {}, None, r"must give a scalar with a gradient"),
        ("test_baselines_adapter:not_finite", {}, None, r"gives inf or a gradient that is not finite"),
        (CROSS_ENTROPY, {"reduction": "none"}, None, r"must give a scalar .*shape \(11,\)"),
        (CROSS_ENTROPY, {}, "softmax", r"head\.input: .*'logits' or 'probabilities', got 'softmax'"),
    ],
)
def test_what_does_not_fit_is_refused_at_once(loss, options, input, message):
    with pytest.raises(ValueError, match=message):
        head_of(loss, options, input)


def test_without_dlordinal_the_error_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "dlordinal"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "dlordinal", None)
    with pytest.raises(ValueError, match=r"cannot be imported .*pip install 'ordinalclip\[losses\]'"):
        head_of("dlordinal.losses:EMDLoss")


def test_configuration_of_a_loss():
    config = load_config(
        None,
        [
            "method=loss",
            "head.loss=dlordinal.losses:BinomialLoss",
            "head.options={base_loss: torch.nn:CrossEntropyLoss}",
            "head.options.eta=0.5",
        ],
    )
    assert config.head["options"] == {"base_loss": CROSS_ENTROPY, "eta": 0.5}
    with pytest.raises(ValueError, match=r"head\.input: .*'logits' or 'probabilities'"):
        load_config(None, ["method=loss", "head.input=softmax"])


@pytest.mark.slow
@pytest.mark.parametrize("form", ["deployed", "trainable"])
def test_saved_and_served(tmp_path, form):
    model = OrdinalModel.build("tiny", RANKS, "loss", {"loss": "dlordinal.losses:SLACELoss", "options": {"alpha": 1.0}})
    model.eval().save_pretrained(tmp_path, form=form)
    script = (
        "import sys, torch; from ordinalclip import OrdinalModel\n"
        f"print(OrdinalModel.from_pretrained({str(tmp_path)!r}).config.method, 'dlordinal' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    expected = "cross_entropy False" if form == "deployed" else "loss True"
    assert done.stdout.strip() == expected
    pixels = torch.randn(3, 3, 64, 64)
    one, other = (m.predict(pixels).probabilities for m in (model, OrdinalModel.from_pretrained(tmp_path)))
    assert torch.equal(one, other)


def test_it_trains_whatever_the_micro_batch(quick, tmp_path):
    options = ("method=loss", "head.loss=dlordinal.losses:WKLoss", "train.eval_every=100")
    whole, parts = (
        losses_of(train(quick(*options, f"output_dir={tmp_path}/{m}", f"train.micro_batch_size={m}"), quiet=True))
        for m in ("null", "3")
    )
    assert np.allclose(whole, parts, rtol=1e-4)
    with pytest.raises(ValueError, match="so samples cannot have weights"):
        train(quick(*options, "train.weighting=inverse"), quiet=True)
