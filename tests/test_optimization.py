"""Rates, decay and the running average of the weights, against the recursions written out."""

import math

import pytest
import torch
from torch import nn

from ordinalclip import OrdinalModel, Ranks
from ordinalclip.config import TrainConfig
from ordinalclip.training.optimization import WeightAverage, lr_factor, make_optimizer, parameter_groups


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return OrdinalModel.build("tiny", Ranks.of(4))


def test_rates_of_all_steps():
    """Up in equal steps to the peak, which the last warm-up step has, then down a half cosine that ends before 0."""
    options = TrainConfig(warmup_steps=3)
    factors = [lr_factor(step, 11, options) for step in range(11)]
    expected = [1 / 3, 2 / 3, 1] + [(1 + math.cos(math.pi * k / 8)) / 2 for k in range(8)]
    assert factors == pytest.approx(expected)
    assert lr_factor(11, 11, options) == pytest.approx(0)
    constant = TrainConfig(warmup_steps=2, schedule="constant")
    assert [lr_factor(step, 5, constant) for step in range(5)] == [0.5, 1, 1, 1, 1]
    assert lr_factor(0, 1, TrainConfig()) == 1


def test_each_parameter_has_the_rate_and_decay_of_its_kind(model):
    options = TrainConfig(lr=1.0, lr_encoder=2.0, lr_prompts=3.0, lr_head=5.0, weight_decay=0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(p)]: group for group in parameter_groups(model, options) for p in group["params"]}
    assert set(found) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, group in found.items():
        rate = 2.0 if name.startswith("encoder.") else 3.0 if name.startswith("head.learner.") else 5.0
        assert group["lr"] == group["peak_lr"] == rate, name
        decays = dict(model.named_parameters())[name].ndim > 1  # no biases, no norms
        assert group["weight_decay"] == (0.1 if decays else 0.0), name
    default = parameter_groups(model, TrainConfig(lr=1.0, lr_encoder=0.0))
    assert {(group["name"], group["lr"]) for group in default} == {("encoder", 0.0), ("prompts", 1.0)}


@pytest.mark.parametrize("optimizer", ["adamw", "radam"])
def test_decay_is_decoupled(model, optimizer):
    """Without a gradient a weight shrinks by the rate times the decay in each step, whatever the moments; biases stay.

    Eight steps, since RAdam takes no account of second moments in the first five.
    """
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    adam = make_optimizer(model, TrainConfig(optimizer=optimizer, lr=0.1, weight_decay=0.2))
    parameters = dict(model.named_parameters())
    for name in before:
        parameters[name].grad = torch.zeros_like(parameters[name])
    for _ in range(8):
        adam.step()
    try:
        for name, tensor in before.items():
            kept = (1 - 0.1 * 0.2) ** 8 if tensor.ndim > 1 else 1
            assert torch.allclose(parameters[name], kept * tensor), name
    finally:
        with torch.no_grad():
            for name, tensor in before.items():
                parameters[name].copy_(tensor)
                parameters[name].grad = None


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(2, 2), nn.BatchNorm1d(2)
        self.linear.bias.requires_grad_(False)


def test_average_of_weights_and_running_statistics():
    """Five steps of random values against a_t = d_t a_t-1 + (1 - d_t) w_t, d_t = min(0.4, (1 + t) / (10 + t))."""
    torch.manual_seed(0)
    module = Small()
    state = module.state_dict()
    averaged = {"linear.weight", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"}
    average, expected = WeightAverage(module, 0.4), {name: state[name].clone() for name in averaged}
    for step in range(5):
        with torch.no_grad():
            for name in averaged:
                state[name].copy_(torch.rand_like(state[name]))
        average.update(step)
        decay = min(0.4, (1 + step) / (10 + step))
        expected = {name: decay * old + (1 - decay) * state[name] for name, old in expected.items()}
    assert average.average.keys() == averaged
    live = {name: state[name].clone() for name in averaged}
    for _ in range(2):  # a second time: the first left everything in its place
        with average.applied():
            for name in averaged:
                assert torch.allclose(module.state_dict()[name], expected[name]), name
        for name in averaged:
            assert torch.equal(module.state_dict()[name], live[name]), name
            assert torch.allclose(average.average[name], expected[name]), name
    average.swap()
    average.update(100)  # the model's tensors are the averages now: neither is a view of the other
    assert not torch.equal(average.average["linear.weight"], module.linear.weight)
