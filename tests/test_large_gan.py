"""benchmarks/large_gan.py: the steps that train a small StyleGAN2 and its encoder."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from baselines.large.e4e import load_encoder
from baselines.large.stylegan2 import Discriminator, Generator, load_generator

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "large_gan.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("large_gan", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def settings(script):
    return script.Settings(style_dim=8, n_mlp=2, channels=8, batch_size=4, r1_every=2)


class Quadratic(nn.Module):
    """logit = sum of a x^2 / 2, whose gradient is a x."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.randn(3, 2, 2, dtype=torch.float64))

    def forward(self, x):
        return (self.a * x.square() / 2).sum(dim=(1, 2, 3))[:, None]


def test_the_gradient_penalty_of_a_known_function(script):
    torch.manual_seed(0)
    discriminator, x = Quadratic(), torch.randn(5, 3, 2, 2, dtype=torch.float64)
    penalty = script.gradient_penalty(discriminator, x)
    expected = np.mean([np.square(discriminator.a.detach().numpy() * picture.numpy()).sum() for picture in x])
    assert float(penalty.detach()) == pytest.approx(expected, rel=1e-12)
    penalty.backward()
    torch.testing.assert_close(discriminator.a.grad, 2 * discriminator.a.detach() * x.square().mean(dim=0))


def test_the_gradient_penalty_of_a_discriminator_by_differences(script):
    """Pictures of a batch see each other through its spread, so all of them count in a difference."""
    torch.manual_seed(0)
    discriminator, x = Discriminator(8, channels=3).double(), torch.randn(2, 3, 8, 8).double()
    penalty, step, gradient = script.gradient_penalty(discriminator, x), 1e-5, np.zeros(x.shape)
    with torch.no_grad():
        for index in np.ndindex(gradient.shape):
            moved = torch.zeros_like(x)
            moved[index] = step
            ends = discriminator(x + moved).sum() - discriminator(x - moved).sum()
            gradient[index] = float(ends) / (2 * step)
    assert float(penalty.detach()) == pytest.approx(np.square(gradient).sum() / 2, rel=1e-4)


def test_mixed_codes_switch_once(script):
    torch.manual_seed(0)
    generator = Generator(32, 8, 2, channels=4)
    codes = script.sampled_codes(generator, 400, mixing=0.5)
    assert codes.shape == (400, 8, 8)
    switches = (codes[:, 1:] != codes[:, :-1]).all(dim=2)
    assert torch.equal((codes[:, 1:] != codes[:, :-1]).any(dim=2), switches)
    assert set(switches.sum(dim=1).tolist()) == {0, 1}
    assert 0.4 < switches.any(dim=1).float().mean() < 0.6
    assert switches.any(dim=0).all()
    assert not (script.sampled_codes(generator, 50, mixing=0.0).std(dim=1) > 0).any()


def test_gauges_are_numbered_and_in_range(script, settings):
    pictures, values = script.drawn(settings, 3, 5)
    again, more = script.drawn(settings, 5, 3)
    assert torch.equal(pictures[2:], again)
    assert torch.equal(values[2:], more)
    assert pictures.min() >= -1
    assert pictures.max() <= 1
    assert pictures.max() > 0.8  # the face


def states(training):
    def tensors(content):
        if isinstance(content, torch.Tensor):
            yield content.clone()
        elif isinstance(content, dict):
            for value in content.values():
                yield from tensors(value)

    return {name: list(tensors(part.state_dict())) for name, part in training.parts().items()}


@pytest.mark.parametrize("stage", ["gan", "encoder"])
def test_a_training_goes_on_bit_for_bit(script, settings, tmp_path, stage):
    def begun():
        gan = script.GAN(settings)
        return gan if stage == "gan" else script.Encoding(settings, gan.average)

    file, straight = tmp_path / "state.pt", begun()
    start = states(straight)
    losses = [straight.train_step() for _ in range(2)]
    first = begun()
    assert first.train_step() == losses[0]
    script.save_state(file, first)
    torch.manual_seed(99)  # nothing hangs on what the process drew before
    resumed = begun()
    script.load_state(file, resumed)
    assert resumed.step == 1
    assert resumed.train_step() == losses[1]
    expected, got = states(straight), states(resumed)
    for name in expected:
        assert len(expected[name]) == len(got[name]) > 0
        assert all(torch.equal(a, b) for a, b in zip(expected[name], got[name], strict=True)), name
    learned = ("generator", "discriminator", "average") if stage == "gan" else ("encoder",)
    for name in learned:  # every step teaches something
        assert any(not torch.equal(a, b) for a, b in zip(start[name], got[name], strict=True)), name


def test_other_settings_do_not_go_on(script, settings, tmp_path):
    script.save_state(tmp_path / "state.pt", script.GAN(settings))
    with pytest.raises(ValueError, match=r"state\.pt was trained with r1 10\.0; take another folder"):
        script.load_state(tmp_path / "state.pt", script.GAN(replace(settings, r1=1.0)))


def test_a_step_is_of_the_discriminator_then_of_its_penalty_every_so_often_then_of_the_generator(
    script, settings, monkeypatch
):
    gan = script.GAN(settings)
    descents = []

    def recorded(optimizer, loss):
        open_to_learning = all(p.requires_grad for p in gan.discriminator.parameters())
        descents.append((optimizer, loss.item(), open_to_learning))

    monkeypatch.setattr(gan, "descend", recorded)  # nothing is learned, so that the losses can be computed afterwards
    for _ in range(2):
        gan.train_step()
    optimizers = [optimizer for optimizer, _, _ in descents]
    assert optimizers == [gan.d_optimizer] * 2 + [gan.g_optimizer, gan.d_optimizer, gan.g_optimizer]
    assert [learns for _, _, learns in descents] == [True, True, False, True, False]
    real, _ = script.drawn(settings, 0, 4)
    penalty = script.gradient_penalty(gan.discriminator, real).item()
    assert descents[1][1] == pytest.approx(10 / 2 * 2 * penalty)  # r1 / 2, and as many times more as it is rarer
    torch.manual_seed(0)
    fake = gan.pictures()
    logits = [gan.discriminator(pictures).detach().double().numpy() for pictures in (real, fake)]
    expected = np.log1p(np.exp(-logits[0])).mean() + np.log1p(np.exp(logits[1])).mean()
    assert descents[0][1] == pytest.approx(expected, rel=1e-4)
    fake = gan.discriminator(gan.pictures()).detach().double().numpy()
    assert descents[2][1] == pytest.approx(np.log1p(np.exp(-fake)).mean(), rel=1e-4)


@pytest.mark.parametrize(
    ("step", "half_life"),
    [(1_000_000, 10_000), (100, 20)],  # in pictures: 2,500 steps of 4, and early on 5 % of the 400 that were seen
)
def test_the_average_follows_with_a_half_life_in_pictures(script, settings, step, half_life):
    gan = script.GAN(settings)
    before = [p.clone() for p in gan.average.parameters()]
    with torch.no_grad():
        for p in gan.generator.parameters():
            p.add_(1)
    gan.step = step
    gan.follow()
    keep = 0.5 ** (4 / half_life)
    for old, mean in zip(before, gan.average.parameters(), strict=True):
        torch.testing.assert_close(mean, old + (1 - keep), rtol=1e-4, atol=1e-5)
    assert not any(p.requires_grad for p in gan.average.parameters())


@pytest.mark.slow
def test_the_script_leaves_what_the_readers_read(script, tmp_path, monkeypatch, capsys):
    small = "--style-dim 8 --n-mlp 2 --channels 8 --batch-size 4 --pictures 8 --encoder-pictures 8 --every 4"
    monkeypatch.setattr(sys, "argv", ["large_gan.py", "--out", str(tmp_path), *small.split()])
    script.main()
    assert "pictures per second" in capsys.readouterr().out
    assert {file.name for file in tmp_path.glob("*.png")} == {
        f"{what}-{number:07d}.png" for what in ("samples", "encoded") for number in (4, 8)
    }
    (generator, mean), (encoder, offset) = (
        load_generator(tmp_path / "generator.pt"),
        load_encoder(tmp_path / "encoder.pt"),
    )
    assert torch.equal(offset, mean.expand(8, 8))
    pictures, _ = script.drawn(script.Settings(), 0, 2)
    assert generator(encoder(pictures) + offset).shape == pictures.shape
    assert torch.equal(load_generator(tmp_path / "encoder.pt")[0](mean[None]), generator(mean[None]))
    script.main()  # all is done: nothing is trained
    assert "pictures per second" not in capsys.readouterr().out
