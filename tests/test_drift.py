"""Whether other data is like that of the training: labels and features."""

import numpy as np
import pytest
import torch
from scipy import stats

from ordinalclip.drift import LEVEL, SAMPLE, Reference, feature_drift, label_drift
from ordinalclip.ranks import Ranks

AGES = Ranks((20, 30, 40, 50), unit="years")


def points(num, dims=40, seed=0, shift=0.0):
    torch.manual_seed(seed)
    return torch.randn(num, dims) + shift


def test_features_of_the_same_kind_are_rarely_told_apart_and_shifted_ones_always():
    found, sizes = 0, []
    for seed in range(200):
        reference = Reference.of([1, 1], points(SAMPLE, seed=2 * seed))
        drift = feature_drift(reference, points(300, seed=2 * seed + 1))
        found += drift.p < 0.05
        sizes.append(drift.size)
        assert drift.by_chance == pytest.approx((1 / SAMPLE + 1 / 300) ** 0.5)
    assert stats.binomtest(found, 200, 0.05).pvalue > 0.001  # the test keeps its level
    assert np.mean(sizes) == pytest.approx(drift.by_chance, rel=0.03)
    moved = feature_drift(Reference.of([1, 1], points(SAMPLE)), points(300, seed=1, shift=0.5))
    assert moved.found
    assert moved.size == pytest.approx(0.5, abs=0.05)


def test_one_dimension_of_many_is_enough():
    other = points(300, seed=1)
    other[:, 7] += 1
    drift = feature_drift(Reference.of([1, 1], points(SAMPLE)), other)
    assert drift.found
    assert "1 dimensions by more than chance" in drift.text


@pytest.mark.parametrize("number", [3, 5, 10, 30])
def test_few_pictures_of_the_same_kind_are_rarely_told_apart(number):
    found = sum(
        feature_drift(Reference.of([1, 1], points(SAMPLE, 512, 2 * seed)), points(number, 512, 2 * seed + 1)).p < 0.05
        for seed in range(60)
    )
    assert stats.binomtest(found, 60, 0.05, alternative="greater").pvalue > 0.001


def test_dimensions_that_never_move_say_nothing_but_another_value_of_theirs_does():
    still, same = points(SAMPLE), points(300, seed=1)
    still[:, 0] = same[:, 0] = 3
    reference = Reference.of([1, 1], still)
    assert not feature_drift(reference, same).found
    same[:, 0] = 3 + 1e-6  # rounding, on another machine
    assert not feature_drift(reference, same).found
    same[:, 0] = 4
    assert feature_drift(reference, same).found


def test_points_of_another_space_are_refused():
    reference = Reference.of([1, 1], points(SAMPLE))
    for wrong in (points(300, 41), points(1)):
        with pytest.raises(ValueError, match=r"points must be \(N >= 2, 40\)"):
            feature_drift(reference, wrong)
    with pytest.raises(ValueError, match=r"points must be"):
        feature_drift(Reference.of([1, 1], None), points(5))


def test_labels_are_compared_with_their_counts():
    counts = [10, 40, 40, 10]
    same = label_drift(counts, np.repeat(range(4), [5, 20, 20, 5]), AGES)
    assert not same.found
    assert same.size == 0
    other = label_drift(counts, np.repeat(range(4), [0, 0, 10, 40]), AGES)
    assert other.found
    assert other.p < LEVEL
    assert other.size == pytest.approx(13)  # mean 48 against 35, all moved upwards
    assert "mean rank 48 years here, 35 in training" in other.text
    assert (
        "5 labels are of 1 ranks that no training label had"
        in label_drift([1, 1, 1, 0], [0, 1, 3, 3, 3, 3, 3], AGES).text
    )


def test_what_is_remembered_is_kept(tmp_path):
    reference = Reference.of([3, 4], points(9, 5))
    reference.save(tmp_path / "reference.safetensors")
    again = Reference.load(tmp_path / "reference.safetensors", 2)
    assert again.num == 9
    assert again.counts.tolist() == [3, 4]
    torch.testing.assert_close(again.mean, points(9, 5).double().mean(0))
    torch.testing.assert_close(again.variance, points(9, 5).double().var(0))
    with pytest.raises(ValueError, match="of another model, it counts \\(2,\\) ranks"):
        Reference.load(tmp_path / "reference.safetensors", 3)
    (tmp_path / "reference.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="damaged or no safetensors file"):
        Reference.load(tmp_path / "reference.safetensors", 2)
