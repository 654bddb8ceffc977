"""What may be searched: how it is written, what is refused before anything runs, and what is drawn."""

import math

import numpy as np
import pytest

from ordinalclip.config import Layer, nested, parse_config, read_overrides, stack
from ordinalclip.search import Choice, Range, drawn, read_search, split


def search_of(*overrides):
    searched, plain = split(overrides)

    def check(setting, what):
        return parse_config(
            stack([Layer("the command line", read_overrides(plain)), Layer("the search", nested(setting))]), what
        )

    return read_search(searched, check, "c.yaml")


def test_a_key_says_which_numbers_its_range_has():
    found = search_of(
        "train.lr=1e-5..1e-3:log",
        "train.batch_size=16..64:step=16",
        "model.drop_path=0..0.3",
        "head.num_base_ranks=2..9",
        "train.schedule=cosine|constant",
        "model.image_size=null|64",
    )
    assert found == {
        "train.lr": Range("1e-5..1e-3:log", 1e-5, 1e-3, log=True),
        "train.batch_size": Range("16..64:step=16", 16, 64, step=16),
        "model.drop_path": Range("0..0.3", 0.0, 0.3),
        "head.num_base_ranks": Range("2..9", 2, 9),
        "train.schedule": Choice("cosine|constant", ("cosine", "constant")),
        "model.image_size": Choice("null|64", ("null", "64")),
    }
    assert [each.is_whole for each in found.values() if isinstance(each, Range)] == [False, True, False, True]


@pytest.mark.parametrize(
    "plain", ["data.root=../data", 'data.root="a|b"', "data.separator=|", "ranks.names=[a|b, c]", "train.lr=1e-3"]
)
def test_what_is_no_range_stays_an_override(plain):
    assert split([plain]) == ({}, [plain])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.lr=0..1"], r"^c\.yaml train\.lr=0\.\.1: train\.lr: Input should be greater than 0, got 0$"),
        (["train.lr=1..1000"], r"train\.lr: Input should be less than or equal to 100, got 1000"),
        (["model.drop_path=0..1"], r"model\.drop_path: Input should be less than 1, got 1"),
        (["train.batch_size=8..32.5"], r"train\.batch_size: Input should be a valid integer, got '32\.5'"),
        (["train.lrr=0..1"], r"train\.lrr is not a key; nearest: train\.lr"),
        (["head.base_ranks=2..9"], r"head\.base_ranks is not a key; nearest: head\.num_base_ranks"),
        (["head.interpolation=linear|cubic"], r"head\.interpolation: Input should be 'linear', .*got 'cubic'"),
        (["method=coop|ordinalclip", "head.interpolation=linear|piecewise"], r"options of method 'coop'"),
        (["train.lr=1e-3..1e-5"], r"train\.lr=1e-3\.\.1e-5: the low end comes first"),
        (["train.lr=1e-5..1e-3:lgo"], r"after a range come :log or :step=NUMBER, got :lgo"),
        (["train.lr=1e-5..1e-3:log:step=1"], r"either :log or :step"),
        (["model.drop_path=0..0.3:log"], r"a logarithmic range begins above 0"),
        (["train.batch_size=16..64:step=17"], r"steps of 17 from 16 do not lead to 64; the last is 50"),
        (["model.drop_path=0..0.3:step=0.07"], r"steps of 0\.07 from 0\.0 do not lead to 0\.3; the last is 0\.28"),
        (["train.batch_size=16..64:step=0.5"], r"the step is a whole number above 0"),
        (["train.batch_size=16..64:step=100"], r"at most 48, got 100"),
        (["model.backbone=1..3"], r"model\.backbone is no number"),
        (["train.schedule=cosine|"], r"an empty choice"),
        (["train.schedule=cosine|cosine"], r"cosine is there twice"),
        (["seed=1..3"], r"seed cannot be searched: several seeds are averaged"),
        (["evaluation.test=true|false"], r"the test part is not read by a search"),
        (["data.split_seed=1..3"], r"data\.split_seed cannot be searched: all trials are judged by the same pictures"),
        (["train.lr=1e-3"], r"nothing to search"),
        (["train.lr=1e-5...1e-3:log"], r"train\.lr=1e-5\.\.\.1e-3:log: a range has two dots, 1e-5\.\.1e-3; write \.5"),
        (["train.micro_batch_size=1|2"], r"train\.micro_batch_size cannot be searched: it changes no model"),
        (["evaluation.space=true|false"], r"evaluation\.space cannot be searched: it changes no model"),
        (["evaluation.decoding=median|argmax"], r"evaluation\.decoding cannot be searched: .* by the same answers"),
        (["train.eval_every=1|2"], r"train\.eval_every cannot be searched: all trials are judged equally often"),
    ],
)
def test_a_search_is_refused_by_name_before_anything_runs(overrides, message):
    with pytest.raises(ValueError, match=message):
        search_of(*overrides)


def test_ends_that_are_fine_alone_are_checked_together():
    def check(setting, what):
        if (setting["train.schedule"], setting["train.warmup_steps"].value) == ("constant", 9):
            raise ValueError(f"{what}: not together")
        return parse_config(nested(setting), what)

    with pytest.raises(ValueError, match=r"^c\.yaml, train\.schedule=constant, train\.warmup_steps=9: not together$"):
        read_search({"train.schedule": "cosine|constant", "train.warmup_steps": "0..9"}, check, "c.yaml")


def test_of_many_keys_a_sample_is_checked_together():
    def check(setting, what):
        if (setting["head.key0"], setting["head.key11"]) == ("b", "b"):
            raise ValueError(f"{what}: not together")
        return parse_config({}, what)

    with pytest.raises(ValueError, match="not together"):
        read_search({f"head.key{number}": "a|b" for number in range(12)}, check, "c.yaml")


def test_ends_are_drawn_as_often_as_what_lies_between():
    counts = {}
    each = Range("", 1, 4)
    for share in (np.arange(4000) + 0.5) / 4000:
        counts[each.at(share)] = counts.get(each.at(share), 0) + 1
    assert counts == dict.fromkeys("1234", 1000)
    assert [Range("", 0.0, 0.3, step=0.1).at(share) for share in (0, 0.26, 0.51, 0.99)] == ["0.0", "0.1", "0.2", "0.3"]
    assert [Range("", 1e-4, 1.0, log=True).at(share) for share in (0, 0.25, 0.5, 0.75)] == [
        "0.0001",
        "0.001",
        "0.01",
        "0.1",
    ]
    assert {Range("", 1, 100, log=True).at(share) for share in (0.0, 0.999999)} == {"1", "100"}
    rounded = Range("", 0.00012345, 0.00012349)
    assert all(rounded.low <= float(rounded.at(share)) <= rounded.high for share in np.linspace(0, 0.999, 50))


def test_settings_cover_the_search_and_the_first_stay_the_first():
    search = search_of("train.lr=1e-5..1e-3:log", "model.drop_path=0..0.3", "train.schedule=cosine|constant")
    settings = drawn(search, 16)
    assert drawn(search, 5) == settings[:5]
    assert drawn(search, 16, seed=1) != settings
    for key, each in (("train.lr", search["train.lr"]), ("model.drop_path", search["model.drop_path"])):
        scale = math.log if each.log else float
        low, high = scale(each.low), scale(each.high)
        places = sorted(int(16 * (scale(float(setting[key])) - low) / (high - low) * 0.9999) for setting in settings)
        assert max(places.count(place) for place in range(16)) <= 2  # one in each sixteenth, but for rounded digits
        assert len(set(places)) >= 14
    assert [setting["train.schedule"] for setting in settings].count("cosine") == 8
