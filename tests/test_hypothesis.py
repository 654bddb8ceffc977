"""Properties that hold of any input: label spaces, configurations, overrides, tables."""

import csv
import math
import re
import struct
from itertools import pairwise

import datasets
from hypothesis import given, settings
from hypothesis import strategies as st

from ordinalclip.config import DataConfig, RanksConfig, RunConfig, load_config, parse_config, read_overrides
from ordinalclip.data.labels import read_labels
from ordinalclip.data.tables import Table, read_table
from ordinalclip.ranks import MAX_VALUE, Ranks
from ordinalclip.sections import describe
from ordinalclip.written import dump, read, scalar, values


def outcome(function, *arguments):
    """What a function returns and "", or None and what its ValueError says; other errors pass."""
    try:
        return function(*arguments), ""
    except ValueError as error:
        return None, str(error)


quickly = settings(deadline=None, max_examples=60, derandomize=True)
halves = st.integers(-20, 20).map(lambda number: number / 2)  # so that labels lie in the middle of two ranks
scales = st.one_of(
    *(
        st.lists(each, min_size=2, max_size=8, unique=True).map(sorted)
        for each in (halves, st.floats(-1e6, 1e6, width=32))
    )
)
TRICKY = """007 1e5 1_000 no Yes null ~ inf .nan .5 1. << = 0x1 1:30 2024-01-01 @x #x *x &x !x {} [] '"""
tricky = st.sampled_from(TRICKY.split())
words = tricky | st.text(max_size=12)


@settings(quickly, max_examples=200)
@given(scales, st.lists(halves | st.floats(-2e6, 2e6), min_size=1, max_size=20))
def test_a_label_takes_the_nearest_rank_the_lower_of_two(scale, labels):
    ranks = Ranks(tuple(scale), tolerance=1e7)
    for rank, label in zip(ranks.rank_of(labels).tolist(), labels, strict=True):
        middles = [(low + high) / 2 for low, high in pairwise(scale)]
        assert rank == sum(label > middle for middle in middles)
        nearest = min(abs(label - value) for value in scale)
        assert abs(label - scale[rank]) <= nearest + 1e-9 * max(1, abs(label), *map(abs, scale))


@quickly
@given(scales, st.text(max_size=5), st.none() | st.floats(0, 1e9), st.booleans())
def test_label_spaces_round_trip(scale, unit, tolerance, binned):
    edges = [(low + high) / 2 for low, high in pairwise(scale)]
    ranks, refusal = outcome(Ranks, tuple(scale), None, unit, tuple(edges) if binned else None, tolerance)
    if ranks is None:
        assert "control characters" in refusal or "float32" in refusal
        return
    assert Ranks(**ranks.to_dict()) == ranks
    assert len(set(ranks.names)) == len(scale)


@quickly
@given(st.lists(st.floats() | st.integers(2**26, 2**26 + 20).map(float), min_size=2, max_size=6).map(sorted))
def test_only_scales_that_rise_in_float32_are_label_spaces(scale):
    fine = all(math.isfinite(value) and abs(value) <= MAX_VALUE for value in scale)
    if fine:
        rounded = [struct.unpack("f", struct.pack("f", value))[0] for value in scale]
        fine = all(low < high for low, high in pairwise(rounded))
    ranks, refusal = outcome(Ranks, tuple(scale))
    assert ranks.values == tuple(scale) if fine else refusal.startswith("rank values")


KEYS = [key for key, _, _ in describe(RunConfig)]
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def nested(flat):
    content = {}
    for key, value in flat.items():
        *parents, last = key.split(".")
        place = content
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return content


@settings(quickly, max_examples=300)
@given(
    st.dictionaries(st.sampled_from(KEYS), anything, max_size=3).map(nested)
    | st.dictionaries(st.text(max_size=5), anything)
)
def test_any_mapping_is_a_configuration_or_refused_by_its_key(content):
    config, refusal = outcome(parse_config, content, "it")
    if config is None:
        assert refusal.startswith("it: ")
        assert any(key in refusal for key in content), refusal
        return
    again = parse_config(read(config.to_yaml()), "what was written")
    assert again.model_dump(exclude={"overwrite": True, "train": {"resume"}}) == config.model_dump(
        exclude={"overwrite": True, "train": {"resume"}}
    )


@settings(quickly, max_examples=200)
@given(st.text(max_size=30) | st.tuples(st.sampled_from(KEYS), words).map("=".join))
def test_any_override_is_read_or_refused(override):
    config, refusal = outcome(load_config, None, [override])
    assert isinstance(config, RunConfig) or refusal


@quickly
@given(words)
def test_text_survives_where_text_is_wanted(text):
    written = read_overrides([f"output_dir={text}"])["output_dir"]
    if text[:1] not in ("[", "{", '"', "'", " ") and text == text.strip():
        assert written == text
    assert scalar(text) == text


@settings(quickly, max_examples=200)
@given(anything)
def test_what_is_dumped_is_read_back(content):
    again = values(read(dump({"a": content})))["a"]
    assert repr(again) == repr(content)


@settings(quickly, max_examples=200)
@given(st.binary(max_size=60) | st.text("ab:&*!{}[]<>-? \n\t'\"|#%@,0.e", max_size=40))
def test_any_file_is_read_or_refused_in_a_line(data):
    _, refusal = outcome(read, data)
    assert "\n" not in refusal


# ---- tables

cells = (
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=8)
    | tricky
    | st.sampled_from([",", ";", '"', "a b"])
)


@quickly
@given(
    st.lists(st.tuples(cells, cells, cells), min_size=1, max_size=8),
    st.sampled_from([",", ";", "\t", "|"]),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    st.sampled_from(["\n", "\r\n"]),
)
def test_tables_come_back_cell_by_cell(tmp_path_factory, rows, separator, encoding, end):
    """Whatever `csv` writes, with the row and the line of the file where each row begins."""
    path = tmp_path_factory.mktemp("table") / "labels.csv"
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.writer(file, delimiter=separator, lineterminator=end)
        writer.writerows([("image", "label", "more"), *rows])
    table = read_table(path, DataConfig(source="table", table="labels.csv"))
    assert [tuple(cell.lstrip() for cell in row) for row in rows] == list(
        zip(*(table.rows[name] for name in ("image", "label", "more")), strict=True)
    )
    assert [table.place(row) for row in range(len(rows))] == [
        f"{path}, row {row + 1} (line {row + 2})" for row in range(len(rows))
    ]


written_numbers = st.one_of(
    st.integers(-(10**6), 10**6).map(str),
    st.floats(-1e6, 1e6).map(repr),
    st.decimals(-1000, 1000, places=3).map(str),
    st.sampled_from(["+1", " 2 ", "1e3", ".5", "2."]),
)


@settings(quickly, max_examples=200)
@given(st.lists(written_numbers, min_size=1, max_size=8), st.none() | words, st.integers(0, 7))
def test_labels_are_numbers_or_refused_by_row(texts, other, place):
    """Texts that are numbers by Python's own reading, apart from its syntax of code, are labels; nothing else is."""
    texts = texts if other is None else [*texts[:place], other, *texts[place:]]
    table = Table(datasets.Dataset.from_dict({"image": texts, "label": texts}), "labels.csv")
    plain = [re.fullmatch(r"[+-]?[0-9.]+(e[+-]?[0-9]+)?", text.strip(), re.IGNORECASE) for text in texts]
    odd = next((row for row, found in enumerate(plain) if not found), None)
    read_all, refusal = outcome(read_labels, {"all": table}, DataConfig(), RanksConfig())
    if odd is None:
        assert read_all[1]["all"].tolist() == [float(text) for text in texts]
    elif read_all is None:
        assert f"row {odd + 1}:" in refusal or "are words" in refusal or "missing" in refusal or "float32" in refusal
    else:  # a comma in a column of whole numbers
        assert all(re.fullmatch(r"[+-]?\d+(,\d+)?", text.strip()) for text in texts)
