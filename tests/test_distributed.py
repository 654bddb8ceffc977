"""Parts of the exact batch in one process; tests/test_training.py runs the whole with several."""

import pytest
import torch
from torch import nn

from ordinalclip.training import distributed
from ordinalclip.training.distributed import (
    MicroBatches,
    average_running_statistics,
    check_batch_norm,
    frozen_running_statistics,
    make_accelerator,
)
from ordinalclip.training.sampling import SampleNoise


def encoder_of(dropout=0.0, seed=0):
    torch.manual_seed(seed)
    noise = SampleNoise(dropout, 0, 3, whole_sample=False)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 5), noise, nn.Tanh(), nn.Linear(5, 3)).double().train(), noise


@pytest.mark.parametrize("size", [1, 2, 3, 6, 7])
def test_micro_batches_have_the_gradient_of_the_whole(size):
    """With dropout, and a loss of all pairs, whose gradient is no mean over samples."""
    generator = torch.Generator().manual_seed(1)
    pixels, positions = torch.randn(7, 3, 2, 2, generator=generator).double(), torch.arange(7) + 50
    gradients = []
    for micro in (None, size):
        encoder, noise = encoder_of(0.3)
        batches = MicroBatches(make_accelerator("no"), encoder, [noise], micro)
        for start in (0, 100):  # a second step must not see the positions of the first
            encoder.zero_grad()
            features = batches.encode(pixels, positions + start)
            batches.backward(torch.cdist(features, features).square().sum())
            gradients.append([parameter.grad.clone() for parameter in encoder.parameters()])
    for whole, pieces in zip(gradients[:2], gradients[2:], strict=True):
        for one, other in zip(whole, pieces, strict=True):
            assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(gradients[0][0], gradients[1][0])  # the masks of other positions are others


def test_each_image_updates_running_statistics_once():
    """Two passes over the encoder, of which the second alone moves them."""
    encoder = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten()).train()
    reference = nn.BatchNorm2d(4).train()
    pixels = torch.randn(4, 3, 2, 2)
    batches = MicroBatches(make_accelerator("no"), encoder, [], 2)
    features = batches.encode(pixels, torch.arange(4))
    assert torch.equal(encoder[1].running_mean, torch.zeros(4))
    batches.backward(features.sum())
    for piece in pixels.split(2):
        reference(encoder[0](piece))
    assert torch.allclose(encoder[1].running_mean, reference.running_mean)
    assert torch.allclose(encoder[1].running_var, reference.running_var)


def test_momentum_comes_back_even_after_an_error():
    norms = nn.Sequential(nn.BatchNorm1d(2, momentum=0.3), nn.BatchNorm1d(2, momentum=None))

    def fail():
        with frozen_running_statistics(norms):
            assert [norm.momentum for norm in norms] == [0, 0]
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [norm.momentum for norm in norms] == [0.3, None]


def test_running_statistics_of_two_processes_become_their_mean(monkeypatch):
    """The sum over processes is put in by hand: the other one holds 5 everywhere."""
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda tensor: tensor.add_(5))
    module = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2, track_running_stats=False))
    module[0].running_mean.fill_(1)
    module[0].running_var.fill_(3)
    average_running_statistics(module, 1)
    assert module[0].running_mean.tolist() == [1, 1]
    average_running_statistics(module, 2)
    assert module[0].running_mean.tolist() == [3, 3]
    assert module[0].running_var.tolist() == [4, 4]


def test_local_statistics_of_two_processes_are_refused():
    with pytest.raises(ValueError, match="depend on the number of processes"):
        check_batch_norm(nn.BatchNorm1d(2), "local", 2, micro_batched=False)
    check_batch_norm(nn.BatchNorm1d(2), "local", 1, micro_batched=False)
    check_batch_norm(nn.BatchNorm1d(2), "frozen", 2, micro_batched=True)
