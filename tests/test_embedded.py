"""Regressors with layers of their own: what they learn, where, and that they are the plain ones on it."""

import pytest
import torch
from torch.nn.functional import layer_norm

from ordinalclip import Ranks
from ordinalclip.heads import HeadContext, Targets, build_head

CONTEXT = HeadContext(Ranks.linear(0, 10, 11), 6, label_mean=5, label_std=3)
HEADS = {"mse": "EmbeddedMSE", "l1": "EmbeddedL1", "ordreg": "EmbeddedOrdReg"}


def embedded(method, **options):
    torch.manual_seed(0)
    return build_head(f"baselines.embedded:{HEADS[method]}", CONTEXT, {"embedding_dim": 4, **options})


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(32, 6, generator=generator)
    values = (5 + 3 * (features[:, 0] * features[:, 1]).tanh()).round()  # no line on the features says it
    return features, Targets(values, values.long())


@pytest.mark.parametrize("method", HEADS)
def test_the_plain_method_reads_the_embedding(method):
    """Same loss and answers as the plain head with the same linear layer, on the space that is measured."""
    head, (features, targets) = embedded(method), batch()
    plain = build_head(method, HeadContext(CONTEXT.ranks, 4, label_mean=5, label_std=3), {})
    plain.linear.load_state_dict(head.linear.state_dict())
    space = head.space(features)
    assert space.shape == (32, 4)
    outputs, expected = head(features), plain(space)
    assert head.loss(outputs, targets)["loss"] == plain.loss(expected, targets)["loss"]
    assert torch.equal(head.predict(outputs).value, plain.predict(expected).value)


@pytest.mark.parametrize("method", HEADS)
def test_the_loss_shapes_the_space(method):
    head, (features, targets) = embedded(method, hidden_dim=32), batch()
    before = head.space(features).detach()
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        head.loss(head(features), targets)["loss"].backward()
        optimizer.step()
    assert not torch.allclose(head.space(features), before, atol=0.1)
    error = (head.predict(head(features)).value - targets.values).abs().mean()
    assert error < 0.5 * (targets.values - targets.values.median()).abs().mean()


@pytest.mark.parametrize("method", HEADS)
def test_layers_are_those_of_the_metric_methods(method):
    ours, theirs = embedded(method), build_head("rm_loss", CONTEXT, {"embedding_dim": 4})
    theirs.layers.load_state_dict(ours.layers.state_dict())
    features = batch()[0]
    assert torch.equal(ours.space(features), theirs.space(features))  # the scale of RM-Loss starts at 1
    half = ours.bfloat16().space(features.bfloat16())
    expected = layer_norm(features.bfloat16().float(), (6,))
    assert half.dtype == torch.float32
    assert torch.allclose(half, ours.layers(expected), atol=1e-6)
    assert len(embedded(method, hidden_dim=None).layers.weight) == 4
