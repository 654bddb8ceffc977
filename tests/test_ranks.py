"""The label space: nearest ranks, bins, names, and errors that name the row."""

from contextlib import nullcontext

import pytest
import torch

from ordinalclip.ranks import Ranks


def test_nearest_rank_with_ties_going_down():
    ranks = Ranks((0, 10, 30))
    values = [-3, 0, 5, 5.1, 19.9, 20, 20.1, 30, 41]
    expected = [min(range(3), key=lambda k: (abs(ranks.values[k] - v), k)) for v in values]
    assert ranks.rank_of(values).tolist() == expected


@pytest.mark.parametrize("edges", [(10, 20), (0, 10, 20, 40)])
def test_bins(edges):
    ranks = Ranks((5, 15, 25), edges=edges)
    assert ranks.rank_of([0, 9.99, 10, 19.99, 20, 40]).tolist() == [0, 0, 1, 1, 2, 2]
    if len(edges) == 2:
        assert ranks.rank_of([-1e6, 1e6]).tolist() == [0, 2]
    with pytest.raises(ValueError, match=r"label (nan|51) is outside"):
        ranks.rank_of([51.0] if len(edges) == 4 else [float("nan")])


@pytest.mark.parametrize(
    ("ranks", "value", "said"),
    [
        (Ranks((0, 1, 2), ("whole", "cracked", "broken"), "grade"), 1.0, "cracked"),
        (Ranks((0, 1, 2), ("whole", "cracked", "broken"), "grade"), 1.5000001, "broken (1.5 grade)"),
        (Ranks((0, 1, 2), ("whole", "cracked", "broken")), -7, "whole (-7)"),
        (Ranks((0.1, 0.2), ("low", "high")), torch.tensor(0.1).item(), "low"),  # as a model answers it
        (Ranks((0.1, 0.2), unit="mm"), torch.tensor(0.1).item(), "0.1 mm"),
        (Ranks((16, 17, 18), unit="years"), 17.0, "17 years"),
        (Ranks((16, 17, 18), unit="years"), 17.26049, "17.26 years"),
        (Ranks((1_000_000, 2_000_001)), 1_234_567.2, "1234567"),
        (Ranks((5, 15), ("young", "old"), edges=(6,)), 7, "old (7)"),
    ],
)
def test_a_value_is_said_by_name_or_as_a_number_with_its_unit(ranks, value, said):
    assert ranks.say(value) == said


def test_names_default_to_values_and_round_trip():
    assert Ranks((0.5, 1, 20)).names == ("0.5", "1", "20")
    ranks = Ranks((1930, 1940), ("thirties", "forties"), unit="year", tolerance=4)
    assert Ranks(**ranks.to_dict()) == ranks


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ((1,), {}, "at least 2 ranks and at most 10000, got 1;"),
        ((1, 1), {}, "strictly increasing, got 1 before 1"),
        ((1, float("nan")), {}, "strictly increasing|finite"),
        ((1, float("inf")), {}, "finite"),
        ((1, 2), {"names": ("a",)}, "2 rank values need as many names"),
        ((1, 2), {"names": ("a", "a")}, "unique"),
        ((1, 2), {"names": ("a", " ")}, "not empty"),
        ((1, 2), {"edges": (1.5, 1.7)}, "1 inner or 3 bin edges, got 2"),
        ((1, 2), {"edges": (2.5,)}, "outside its bin"),
        ((1, 2), {"tolerance": -1}, "tolerance"),
        (range(10_001), {}, "at most 10000, got 10001"),
        ((0, 1e39), {}, r"between -1e\+18 and 1e\+18, got 1e\+39"),
        ((1e8, 1e8 + 1), {}, "100000000.0 and 100000001.0 are the same number in float32"),
        ((0, 1e-50), {}, "same number in float32"),
        ((1, 2), {"edges": (1.5, 1.5)}, "strictly increasing"),
        ((1, 2), {"edges": (float("inf"),)}, "bin edges must be finite"),
        ((1, 2), {"names": ("a", "b\n")}, None),  # stripped
        ((1, 2), {"names": ("a", "b\nc")}, "control characters"),
        ((1, 2), {"names": ("a", "\x1b[31mred")}, "control characters"),
        ((1, 2), {"names": ("a", "\udcff")}, "control characters"),
        ((1, 2), {"names": ("a", "b" * 1001)}, "at most 1000 characters"),
        ((1, 2), {"unit": "a\tb"}, "control characters"),
        ((1, 2), {"names": ("👨‍👩‍👧", "👶🏽")}, None),
    ],
)
def test_bad_label_spaces(values, options, message):
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        Ranks(values, **options)


@pytest.mark.parametrize("label", [22.1, -2.1, float("nan"), float("inf")])
def test_labels_far_outside_name_their_row(label):
    ranks = Ranks((0, 2, 20), tolerance=2)
    assert ranks.rank_of([22, -2]).tolist() == [2, 0]
    with pytest.raises(ValueError, match=r"b\.png: label .* outside the ranks 0 to 20 .*tolerance 2.*1 of 2"):
        ranks.rank_of([3, label], rows=["a.png", "b.png"])


def test_predictions_beyond_the_ends_take_the_end_rank_and_bins_count():
    import torch

    assert Ranks((0, 10)).nearest(torch.tensor([-99.0, 5.0, 5.1, 99.0])).tolist() == [0, 0, 1, 1]
    binned = Ranks((1, 2, 10), edges=(1.5, 3))
    assert binned.nearest(torch.tensor([5.0])).tolist() == binned.rank_of([5]).tolist() == [2]


def test_evenly_spaced_ranks_hold_both_ends():
    assert Ranks.linear(0, 100, 5, unit="%").values == (0, 25, 50, 75, 100)
    assert Ranks.linear(-1, 1, 11).values == pytest.approx([-1 + 0.2 * k for k in range(11)])
    with pytest.raises(ValueError, match="at least 2 ranks and at most 10000, got 1;"):
        Ranks.linear(0, 1, 1)


def test_labels_may_lie_outside_by_the_widest_gap():
    ranks = Ranks((0, 1, 5))
    assert ranks.rank_of([-4, 9]).tolist() == [0, 2]
    for label in (-4.1, 9.1):
        with pytest.raises(ValueError, match="tolerance 4"):
            ranks.rank_of([label])


def test_of_several_labels_outside_the_first_is_named():
    with pytest.raises(ValueError, match=r"b\.png: label 50 is outside .*; 2 of 4 labels are"):
        Ranks((0, 1)).rank_of([0, 50, 1, 99], rows=["a.png", "b.png", "c.png", "d.png"])


def test_names_of_values_have_as_many_digits_as_tell_them_apart():
    assert Ranks((100000.25, 100000.5)).names == ("100000.2", "100000.5")
    assert Ranks((0, 1e6)).names == ("0", "1e+06")
    assert Ranks.linear(0, 1, 4).names == ("0", "0.333333", "0.666667", "1")


def test_evenly_spaced_ranks_of_any_size():
    assert Ranks.linear(0, 1e-12, 3).values == (0, 5e-13, 1e-12)
    for low, high in ((1, 0), (0, 0), (0, float("inf")), (float("nan"), 1), (-1e300, 1e300)):
        with pytest.raises(ValueError, match="low must be below high"):
            Ranks.linear(low, high, 3)
    with pytest.raises(ValueError, match="at most 10000, got 1000000000"):
        Ranks.linear(0, 1, 10**9)
