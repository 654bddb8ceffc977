"""The engine below the command, bulk prediction and data frames: what a model answers to pictures."""

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from ordinalclip.answers import NOT_FINITE, Answers, answer
from ordinalclip.gauges import draw
from ordinalclip.heads import NoNumber
from ordinalclip.images import BrokenImageError
from ordinalclip.model import OrdinalModel
from ordinalclip.pipeline import load_pipeline
from ordinalclip.ranks import Ranks

RANKS = Ranks((0, 50, 100), ("low", "middle", "high"))


def model_of(method):
    """Random, with answers that differ from picture to picture."""
    torch.manual_seed(0)
    model = OrdinalModel.build("tiny", RANKS, method, decoding="expectation")
    with torch.no_grad():
        for tensor in (*model.head.parameters(), *model.head.buffers()):
            if tensor.ndim > 1:
                tensor.normal_(std=0.1)
    return model


@pytest.fixture
def pictures(tmp_path):
    """Eight files, of which the first, fourth and fifth are broken."""
    paths = [tmp_path / f"{number}.png" for number in range(8)]
    for number, path in enumerate(paths):
        draw("dial", 12.0 * number, np.random.default_rng(number)).save(path)
    for number in (0, 3, 4):
        paths[number].write_text("no picture")
    return [str(path) for path in paths]


@pytest.mark.parametrize("method", ["prototypes", "l1"])
@pytest.mark.parametrize("workers", [0, 2])
def test_answers_are_those_of_the_pipeline_and_broken_pictures_are_rows(tmp_path, pictures, method, workers):
    model_of(method).save_pretrained(tmp_path / "model")
    pipe = load_pipeline(str(tmp_path / "model"))
    batches = list(answer(pipe.model, pictures, 2, workers))
    assert [len(batch) for batch in batches] == [2, 2, 2, 2]  # the second has one that can be read, the third one
    found = Answers.joined(batches)
    assert [number for number, error in enumerate(found.errors) if error] == [0, 3, 4]
    assert "cut off, or in none of the formats" in found.errors[3]
    assert np.ptp(found.values[[1, 2, 5, 6, 7]]) > 1e-3
    for number, path in enumerate(pictures):
        if found.errors[number]:
            assert np.isnan(found.values[number])
            assert found.ranks[number] == -1
            continue
        said = pipe(path, top_k=3)
        assert found.values[number] == pytest.approx(said["value"], abs=1e-5)
        assert found.ranks[number] == said["rank"]
        if method == "l1":
            assert found.probabilities is None
            continue
        likely = {entry["name"]: entry["probability"] for entry in said["top"]}
        np.testing.assert_allclose(found.probabilities[number], [likely[name] for name in RANKS.names], atol=1e-6)


def test_tables_of_answers_have_nulls_where_pictures_are_broken(pictures):
    model = model_of("prototypes")
    found = Answers.joined(answer(model, pictures, 3))
    table = found.to_arrow(RANKS)
    assert table.column_names == ["value", "rank", "name", "probabilities", "error"]
    for name in ("value", "rank", "name", "probabilities"):
        cells = table[name].to_pylist()
        assert [number for number, cell in enumerate(cells) if cell is None] == [0, 3, 4], name
    assert table["name"].to_pylist()[1] == RANKS.names[found.ranks[1]]
    np.testing.assert_array_equal(table["probabilities"].to_pylist()[5], found.probabilities[5])
    frame = found.to_frame(RANKS)
    assert list(frame.columns) == table.column_names
    assert frame["rank"].dtype == pd.Int64Dtype()
    assert frame["rank"].isna().tolist() == [error is not None for error in found.errors]
    np.testing.assert_array_equal(frame["value"], found.values)


def test_a_whole_batch_of_broken_pictures_knows_of_probabilities(pictures):
    found = next(answer(model_of("prototypes"), [pictures[0], pictures[3]]))
    assert np.isnan(found.probabilities).all()
    assert found.probabilities.shape == (2, 3)
    assert found.to_arrow(RANKS)["probabilities"].null_count == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_stop_raises_the_first_broken_picture_by_name(pictures, workers):
    answers = answer(model_of("l1"), pictures[1:], 2, workers, errors="stop")
    assert len(next(answers)) == 2
    with pytest.raises(BrokenImageError, match=r"3\.png: not a readable image"):
        next(answers)
    with pytest.raises(BrokenImageError, match=r"^row 1: not a readable image"):
        list(answer(model_of("l1"), [np.zeros((4, 4), np.uint8), b"text"], errors="stop", names=["row 0", "row 1"]))
    with pytest.raises(ValueError, match="errors must be keep or stop, got 'skip'"):
        list(answer(model_of("l1"), pictures, errors="skip"))


def test_one_batch_is_decoded_at_a_time(pictures):
    """Pictures are asked for when their turn comes, and none beyond the batch in hand."""
    asked = []

    class Asked(list):
        def __getitem__(self, index):
            asked.append(index)
            return super().__getitem__(index)

    answers = answer(model_of("l1"), Asked(pictures), batches=[[5, 1], [7]])
    found = next(answers)
    assert asked == [5, 1]
    alone = next(answer(model_of("l1"), [pictures[5]]))
    assert found.values[0] == pytest.approx(alone.values[0], abs=1e-5)


def test_a_picture_that_is_answered_with_no_number_is_a_row_and_the_others_are_answered(pictures, monkeypatch):
    model = model_of("prototypes")
    good = [Image.open(path).convert("RGB") for path in pictures[5:]]
    plain = next(answer(model, good))
    predict = OrdinalModel.predict
    white = Image.new("RGB", (64, 64), "white")

    def failing(self, pixels):
        if (pixels.amin(dim=(1, 2, 3)) > 1).any():
            raise NoNumber("not finite")
        return predict(self, pixels)

    monkeypatch.setattr(OrdinalModel, "predict", failing)
    found = next(answer(model, [*good[:2], white, good[2]]))
    assert found.errors == [None, None, NOT_FINITE, None]
    np.testing.assert_allclose(found.values[[0, 1, 3]], plain.values, atol=1e-4)
    with pytest.raises(NoNumber):
        next(answer(model, [*good, white], errors="stop"))
    with pytest.raises(NoNumber):  # if no picture of a batch has a number, the model is damaged
        next(answer(model, [white, white]))

    def damaged(self, pixels):
        raise NoNumber("not finite")

    monkeypatch.setattr(OrdinalModel, "predict", damaged)
    with pytest.raises(NoNumber):
        next(answer(model, good))
