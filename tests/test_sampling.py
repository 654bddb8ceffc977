"""Which sample is seen when, in which view, with what weight: pure functions of seed, epoch and position."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ordinalclip.images import Augmentation, PixelSpec
from ordinalclip.training.imbalance import balanced_order, sample_weights
from ordinalclip.training.sampling import (
    SampleNoise,
    Stream,
    StreamDataset,
    StreamSampler,
    inexact_dropout,
    shares,
    use_sample_noise,
)


def test_stream_is_endless_permutations():
    order = [Stream(5, seed=3).at(position) for position in range(15)]
    for epoch in range(3):
        assert sorted(order[5 * epoch : 5 * epoch + 5]) == list(range(5))
        assert order[5 * epoch : 5 * epoch + 5] == Stream(5, seed=3).order(epoch).tolist()
    assert order[:5] != order[5:10]
    assert order[:5] != [Stream(5, seed=4).at(position) for position in range(5)]


def test_views_are_positions_in_a_row():
    stream, views = Stream(5, seed=3), Stream(5, seed=3, views=2)
    assert [views.at(position) for position in range(20)] == [stream.at(k // 2) for k in range(20)]


@pytest.mark.parametrize("num_processes", [1, 2, 3, 5])
def test_shares_cover_every_batch_once(num_processes):
    assert sum(shares(32, num_processes)) == 32
    assert max(shares(32, num_processes)) - min(shares(32, num_processes)) <= 1
    pieces = [list(StreamSampler(32, 2, 5, rank, num_processes)) for rank in range(num_processes)]
    joined = [[position for piece in pieces for position in piece[step]] for step in range(3)]
    assert joined == [list(range(32 * step, 32 * step + 32)) for step in (2, 3, 4)]


def test_sample_noise_follows_the_sample():
    noise = SampleNoise(0.3, layer=2, seed=7, whole_sample=False).train()
    x = torch.ones(6, 50, 40)
    noise.positions = torch.arange(6) + 1000
    whole = noise(x)
    noise.positions = torch.tensor([1004, 1001])
    assert torch.equal(noise(x[:2]), whole[[4, 1]])
    assert (whole == 0).float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert whole.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert not torch.equal(whole[0], whole[1])
    other = SampleNoise(0.3, layer=3, seed=7, whole_sample=False).train()
    other.positions = torch.arange(6) + 1000
    agree = ((other(x) == 0) == (whole == 0)).float().mean().item()
    assert agree == pytest.approx(0.3**2 + 0.7**2, abs=0.02)  # independent masks
    noise.positions = None
    with pytest.raises(RuntimeError, match="stream position"):
        noise(x)
    assert torch.equal(noise.eval()(x), x)


def test_dropout_and_drop_path_are_replaced():
    import timm

    module = timm.create_model("test_vit", drop_path_rate=0.2, proj_drop_rate=0.1, num_classes=0)
    noises = use_sample_noise(module, seed=1)
    assert {noise.whole_sample for noise in noises if noise.p} == {True, False}
    assert not [m for m in module.modules() if isinstance(m, nn.Dropout)]
    assert inexact_dropout(nn.MultiheadAttention(8, 2, dropout=0.1)) == [""]


def test_balanced_epochs_hold_every_rank_equally_often():
    ranks = np.repeat([0, 1, 4], [70, 20, 10])
    stream = Stream(100, seed=5, ranks=ranks)
    seen = set()
    for epoch in range(4):
        order = stream.order(epoch)
        assert sorted(np.bincount(ranks[order], minlength=5).tolist()) == [0, 0, 33, 33, 34]
        times = np.bincount(order, minlength=100)
        for rank in (0, 1, 4):  # nobody a second time before all of the rank were taken
            own = times[ranks == rank]
            assert own.max() - own.min() <= 1
        seen |= set(order.tolist())
        assert np.array_equal(order, Stream(100, seed=5, ranks=ranks).order(epoch))
    assert len(seen) > 80
    assert not np.array_equal(stream.order(0), stream.order(1))
    assert len(balanced_order(np.arange(3), np.random.default_rng(0))) == 3


def test_weights_against_a_plain_loop():
    ranks = np.repeat([0, 1, 2, 3], [50, 5, 1, 20])
    sigma = 1.3
    frequency = [50, 5, 1, 20]
    smoothed = []
    for r in range(4):  # the kernel reflects at both ends: ... 1 0 | 0 1 2 3 | 3 2 ...
        mirrored = [(q, f) for q, f in enumerate(frequency)]
        mirrored += [(-1 - q, f) for q, f in enumerate(frequency)] + [(7 - q, f) for q, f in enumerate(frequency)]
        kernel = [np.exp(-0.5 * ((r - q) / sigma) ** 2) for q, _ in mirrored]
        smoothed.append(sum(k * f for k, (_, f) in zip(kernel, mirrored, strict=True)) / sum(kernel))
    for weighting, power in (("inverse", 1.0), ("sqrt_inverse", 0.5)):
        for density, lds in ((frequency, None), (smoothed, sigma)):
            expected = np.array([density[r] ** -power for r in ranks])
            found = sample_weights(ranks, 4, weighting, lds)
            assert np.allclose(found, expected / expected.mean())
    assert sample_weights(ranks, 4, "none") is None
    with pytest.raises(ValueError, match="lds_sigma smooths"):
        sample_weights(ranks, 4, "none", 1.0)


def masks(seed, layer):
    noise = SampleNoise(0.3, layer, seed, whole_sample=False).train()
    noise.positions = torch.arange(4)
    return noise(torch.ones(4, 3000)) == 0


def test_masks_of_all_layers_and_seeds_are_independent():
    """Whatever is added up: layer 3 of seed 7 shares nothing with layer 2 of seed 8, 4 of 6, or 2 of 7."""
    dropped = masks(7, 3)
    for seed, layer in ((8, 2), (6, 4), (7, 2), (8, 3), (3, 7)):
        agree = (masks(seed, layer) == dropped).float().mean().item()
        assert agree == pytest.approx(0.3**2 + 0.7**2, abs=0.03)


def test_drop_path_leaves_out_whole_samples():
    noise = SampleNoise(0.5, 1, 7, whole_sample=True).train()
    noise.positions = torch.arange(400)
    share = (noise(torch.ones(400, 3, 5)) == 0).float().mean(dim=(1, 2))
    assert set(share.tolist()) == {0.0, 1.0}
    assert share.mean().item() == pytest.approx(0.5, abs=0.08)


def test_no_two_layers_of_a_model_have_the_same_number():
    """Encoder first, head after: a mask is a function of the number."""
    encoder = use_sample_noise(nn.Sequential(nn.Dropout(0.1), nn.Sequential(nn.Dropout(0.2), nn.Dropout(0.3))), 1)
    head = use_sample_noise(nn.Sequential(nn.Dropout(0.4), nn.Dropout(0.5)), 1, len(encoder))
    assert [noise.p for noise in encoder + head] == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert [noise.layer for noise in encoder + head] == list(range(5))


def test_every_epoch_sees_an_image_in_another_view():
    """The view is that of the position: the same again when resumed there, another one epoch later."""

    class OnePart:
        values, ranks = np.array([3.0, 4.0]), np.array([0, 1])

        def resized(self, index, spec, size):
            pixels = np.random.default_rng(index).integers(0, 255, (size, size, 3), dtype=np.uint8)
            return Image.fromarray(pixels)

    stream = Stream(2, seed=5)
    samples = StreamDataset(OnePart(), PixelSpec(8, (0, 0, 0), (1, 1, 1)), Augmentation(crop_ratio=4.0), stream)
    first = [stream.at(position) for position in range(6)]
    for position in range(6):
        pixels, place = samples[position]
        assert place == position
        assert torch.equal(pixels, samples[position][0])
        again = next(later for later in range(position + 1, 9) if stream.at(later) == first[position])
        assert not torch.equal(pixels, samples[again][0])


def test_the_odd_sample_of_a_balanced_epoch_falls_to_any_rank():
    """100 samples of 3 ranks: one of them comes 34 times, and not always the same."""
    ranks = np.repeat([0, 1, 4], [70, 20, 10])
    stream = Stream(100, seed=5, ranks=ranks)
    assert {int(np.bincount(ranks[stream.order(epoch)]).argmax()) for epoch in range(20)} == {0, 1, 4}
