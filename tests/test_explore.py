"""Prompts to play with: against the parts that they are made of, on the tiny CLIP and on short runs."""

import io
import os
import re
import stat
from shutil import copyfile, copytree

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from ordinalclip import PromptLearner, Ranks, explore, metrics
from ordinalclip.backbones import load_backbone
from ordinalclip.config import load_config
from ordinalclip.gauges import draw
from ordinalclip.pipeline import load_pipeline
from ordinalclip.prompts import interpolation_weights, weights_at
from ordinalclip.run_folder import RunFolder
from ordinalclip.runs import train
from ordinalclip.shipped import folder

READINGS = Ranks.linear(0, 100, 11, unit="%")
PROMPT = "a photo of a thermometer reading"


@pytest.fixture(scope="module")
def tower():
    return load_backbone("tiny").text


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of OrdinalCLIP, CoOp and L1, some steps each, on thermometers with eleven ranks; and "strangers", an
    OrdinalCLIP whose text encoder has never seen a picture, so that prototypes are taken less their mean."""
    made = {}
    for name in ("ordinalclip", "coop", "l1", "strangers"):
        place, method = tmp_path_factory.mktemp(name) / "run", "ordinalclip" if name == "strangers" else name
        head = [f"head.prompt={PROMPT}", "head.init_from_names=true"] if method != "l1" else []
        head += ["head.num_base_ranks=3", "head.interpolation=piecewise"] if method == "ordinalclip" else []
        head += ["model.backbone=timm:test_resnet", "model.text=tiny"] if name == "strangers" else []
        config = load_config(
            folder() / "methods" / f"{method}.yaml",
            [f"output_dir={place}", "train.max_steps=4", "train.eval_every=2", "ranks.num=11", "data.num_validation=40",
             "data.num_test=40", "data.num_train=40", "data.shots=null", "evaluation.report=false", *head],
        )  # fmt: skip
        made[name] = train(config, quiet=True)
    return made


def test_written_prompts_are_the_text_features_of_the_sentences(tower):
    prompts = explore.written("a photo of {name} {unit}.", READINGS)
    expected = normalize(tower([f"a photo of {name} %." for name in READINGS.names]), dim=-1)
    assert torch.allclose(prompts.prototypes, expected, atol=1e-6)
    both = explore.written(["a photo of {name} {unit}.", "{name}"], READINGS)
    second = normalize(tower(list(READINGS.names)), dim=-1)
    assert torch.allclose(both.prototypes, normalize(expected + second, dim=-1), atol=1e-6)
    assert both.title == "a photo of {name} {unit}. + {name}"
    assert explore.written("a {name} cell", ["whole", "cracked"]).ranks.values == (0, 1)
    assert explore.written("{name}", range(3, 6)).ranks.names == ("3", "4", "5")


def test_interpolated_prompts_are_those_of_a_prompt_learner(tower):
    prompts = explore.interpolated(PROMPT, READINGS, num_base_ranks=4, interpolation="inverse", rank_position="middle")
    options = {"num_base_ranks": 4, "interpolation": "inverse", "rank_position": "middle", "init_from_names": True}
    torch.manual_seed(0)  # for tokens that a shorter name lacks
    with torch.no_grad():
        expected = normalize(tower(PromptLearner(tower, READINGS, context=PROMPT, **options)()), dim=-1)
    assert torch.allclose(prompts.prototypes, expected, atol=1e-6)


def test_in_words():
    assert explore.in_words([7, 37, 100]).names == ("seven", "thirty-seven", "one hundred")
    assert explore.in_words(Ranks((0.5, 2), unit="m")).names == ("zero point five", "two")


def test_ordinality_by_span_counted_by_hand():
    prompts = explore.written("{name}", Ranks.linear(0, 14, 15))
    unit = prompts.prototypes.double().numpy()
    cosine, count = unit @ unit.T, len(unit)
    whole = [cosine[i, j] > cosine[i, j + 1] for i in range(count - 1) for j in range(i, count - 1)]
    near = [cosine[i, i + 1] > cosine[i, i + 2] for i in range(count - 2)]
    far = [cosine[i, j] > cosine[i, j + 10] for i in range(count - 10) for j in range(i, count - 10)]
    row = explore.ordinality(prompts).iloc[0]
    assert row.to_dict() == pytest.approx(
        {"whole": np.mean(whole), "neighbours": np.mean(near), "steps of 10": np.mean(far)}
    )
    assert row["whole"] == metrics.ordinality(prompts.prototypes)
    assert "steps of 10" not in explore.ordinality(explore.written("{name}", range(10)))
    assert list(explore.ordinality(prompts, step=4)) == ["whole", "neighbours", "steps of 4"]


def test_compared_in_one_table(runs):
    written = explore.written("{name}", READINGS, title="by hand")
    table = explore.compare_prompts([written, runs["ordinalclip"], runs["coop"]])
    assert list(table.index) == ["by hand", "ordinalclip", "coop"]
    assert np.isnan(table.loc["by hand", "MAE"])
    for method in ("ordinalclip", "coop"):
        scores = RunFolder(runs[method]).read_metrics()
        assert table.loc[method, "MAE"] == scores["test"]["mae"]
        assert table.loc[method, "whole"] == pytest.approx(scores["ordinality"])  # as the run has it
    unit = written.prototypes.numpy()
    assert table.loc["by hand", "cosine of neighbours"] == pytest.approx(
        np.mean((unit[1:] * unit[:-1]).sum(axis=1)), abs=1e-6
    )


def test_a_run_comes_back_with_the_prompts_it_learned(runs):
    for method in ("ordinalclip", "coop"):
        prompts, model = explore.learned(runs[method]), RunFolder(runs[method]).read_model()
        assert torch.allclose(prompts.prototypes, model.head.rank_prototypes(), atol=1e-5)
        start = explore.interpolated(PROMPT, READINGS, 3 if method == "ordinalclip" else None, "piecewise")
        assert not torch.allclose(prompts.prototypes, start.prototypes, atol=1e-3)  # it did learn
    with pytest.raises(ValueError, match="l1 has no rank prototypes"):
        explore.learned(runs["l1"])
    with pytest.raises(FileNotFoundError):
        explore.learned(runs["l1"] / "nowhere")


def test_prompts_of_strangers_are_compared_less_their_mean(runs):
    """The language's own cosines are shown; pictures are compared as in training."""
    run = runs["strangers"]
    prompts, model = explore.learned(run), RunFolder(run).read_model()
    unit = normalize(prompts.prototypes - prompts.prototypes.mean(dim=0), dim=-1)
    assert torch.allclose(unit, model.head.rank_prototypes(), atol=1e-4)
    assert not torch.allclose(prompts.prototypes, unit, atol=0.1)
    assert explore.interpolate(run, [0, 50, 100], quiet=True)["cosine"].min() > 0.9999
    table = explore.what_if(run, rank_position="tail", quiet=True)
    assert table["MAE"].to_numpy() == pytest.approx([RunFolder(run).read_metrics()["validation"]["mae"]] * 2, abs=1e-4)
    pictures = [draw("thermometer", value, np.random.default_rng(1)) for value in (5.0, 95.0)]
    answers = [answer["value"] for answer in load_pipeline(str(run / "model"))(pictures)]
    assert explore.read(pictures, run, by=run)["ordinalclip"].tolist() == pytest.approx(answers)


def test_what_a_run_keeps_is_held_against_its_model_and_its_data(runs, tmp_path):
    copy = tmp_path / "run"
    copytree(runs["ordinalclip"], copy)
    assert stat.filemode((copy / "prompts.safetensors").stat().st_mode) == stat.filemode(
        (copy / "metrics.json").stat().st_mode
    )
    kept = RunFolder(copy).read_prompts()
    RunFolder(copy).write_prompts({**kept, "context": kept["context"].flip(0)})
    with pytest.raises(ValueError, match=r"prompts\.safetensors: not the prompts of the model beside it"):
        explore.learned(copy)
    copyfile(runs["coop"] / "prompts.safetensors", copy / "prompts.safetensors")
    os.utime(copy / "metrics.json")
    with pytest.raises(ValueError, match=r"prompts\.safetensors: damaged, or of another run"):
        explore.learned(copy)
    pooled = tmp_path / "pooled"
    copytree(runs["coop"], pooled)
    config = pooled / "config.yaml"
    config.write_text(config.read_text().replace("text_pooling: null", "text_pooling: cls"))
    with pytest.raises(ValueError, match="text_pooling is cls"):  # it is read with the run's own
        explore.learned(pooled)
    other = tmp_path / "other"
    copytree(runs["coop"], other)
    config = other / "config.yaml"
    config.write_text(config.read_text().replace("num_validation: 40", "num_validation: 41"))
    with pytest.raises(ValueError, match="this is not the data of the run any more"):
        explore.what_if(other, rank_position="front", quiet=True)


def test_prompts_of_one_title_are_told_apart(runs):
    two = [runs["coop"], explore.written("{name}", READINGS, title="coop")]
    assert list(explore.compare_prompts(two).index) == ["coop", "coop (2)"]
    assert list(explore.ordinality(*two, two[0]).index) == ["coop", "coop (2)", "coop (3)"]
    picture = draw("thermometer", 5.0, np.random.default_rng(1))
    assert list(explore.read(picture, *two, by=runs["coop"])) == ["coop", "coop (2)"]


def test_what_if_nothing_changes(runs):
    """What a change that is none gives, the trained error, and a context that is none."""
    for method, options in {
        "ordinalclip": {"num_base_ranks": 3, "interpolation": "piecewise", "rank_position": "tail"},
        "coop": {"rank_position": "tail"},
    }.items():
        table = explore.what_if(runs[method], **options, quiet=True)
        error = RunFolder(runs[method]).read_metrics()["validation"]["mae"]
        assert table["MAE"].to_numpy() == pytest.approx([error] * len(table), abs=1e-4)
        assert table["cosine to learned"].min() > 0.9999
    table = explore.what_if(runs["ordinalclip"], context=["the weather", PROMPT], num_base_ranks=[2], quiet=True)
    assert list(table.index) == ["as it is", "context = the weather", f"context = {PROMPT}", "num_base_ranks = 2"]
    assert table.loc["context = the weather", "cosine to learned"] < table.iloc[2]["cosine to learned"]
    with pytest.raises(ValueError, match="no interpolation to be changed"):
        explore.what_if(runs["coop"], interpolation="linear", quiet=True)
    with pytest.raises(ValueError, match="num_base_ranks must be between"):
        explore.what_if(runs["ordinalclip"], num_base_ranks=12, quiet=True)


def test_values_that_are_ranks_have_the_trained_prototypes(runs):
    for method in ("ordinalclip", "coop"):
        table = explore.interpolate(runs[method], [0, 50, 100], quiet=True)
        assert list(table["like"]) == ["0 %", "50 %", "100 %"]
        assert table["cosine"].min() > 0.9999
        assert table["chosen"].sum() == pytest.approx(1)


def test_values_between_and_beyond(runs):
    """In pairs of ranks of one number of tokens; against the prompts that a learner of such ranks has."""
    table = explore.interpolate(runs["ordinalclip"], [22, 48, 115], quiet=True)
    assert list(table["like"]) == ["20 %", "50 %", "100 %"]
    assert table["cosine"].max() < 0.99999
    assert explore.interpolate(runs["coop"], [55], quiet=True).index.tolist() == [55]
    with pytest.raises(ValueError, match="0 and 10 have embeddings of different numbers of tokens"):
        explore.interpolate(runs["coop"], [5], quiet=True)
    with pytest.raises(ValueError, match="values must be a list of numbers"):
        explore.interpolate(runs["coop"], [float("nan")], quiet=True)


def test_values_have_their_places_among_uneven_ranks():
    places = explore._places(Ranks((0, 10, 30)), [-5, 0, 4, 20, 30, 50])
    assert places.tolist() == pytest.approx([-0.5, 0, 0.4, 1.5, 2, 3])


def test_a_value_is_put_into_the_prompt_of_the_rank_that_is_nearest(runs):
    """0 has one token, 10 has two; two values of one rank and one of another are encoded as if each were alone."""
    head = explore.learned(runs["ordinalclip"]).head
    places = explore._places(READINGS, [8, 12, 52])
    embedded = explore._mixed(head, places, "piecewise")
    found = explore._texts_at(head, places, embedded)
    for row, slot in enumerate((1, 1, 5)):
        ranks = head.learner.ranks_embedded().detach().clone()
        ranks[slot] = embedded[row]
        with torch.no_grad():
            expected = normalize(head.text(head.learner(ranks)), dim=-1)[slot]
        assert torch.allclose(found[row], expected, atol=1e-5)


def test_values_are_chosen_by_the_pictures_nearest_to_them(runs):
    table = explore.interpolate(runs["ordinalclip"], READINGS.values, quiet=True)
    points, labels = explore._opened(runs["ordinalclip"]).pictures(quiet=True)
    prototypes = RunFolder(runs["ordinalclip"]).read_model().head.rank_prototypes()
    nearest = torch.cdist(points, normalize(prototypes, dim=-1)).argmin(dim=1).numpy()
    for rank, value in enumerate(READINGS.values):
        assert table.loc[value, "chosen"] == np.mean(nearest == rank)
        if (nearest == rank).any():
            assert table.loc[value, "label of these"] == pytest.approx(labels[nearest == rank].mean())
    assert len({*nearest}) > 1


def test_weights_between_and_beyond():
    for kind in ("linear", "inverse", "gaussian", "piecewise"):
        ranks = torch.arange(7, dtype=torch.float64)
        assert torch.equal(weights_at(ranks, 7, 3, kind), interpolation_weights(7, 3, kind))
    between = weights_at(torch.tensor([1.5, 4.25]), 7, 3, "piecewise")  # bases at 0, 3 and 6
    assert between.numpy() == pytest.approx(np.array([[0.5, 0.5, 0], [0, 7 / 12, 5 / 12]]), abs=1e-6)
    beyond = weights_at(torch.tensor([7.5, -3.0]), 7, 3, "piecewise")
    assert beyond.numpy() == pytest.approx(np.array([[0, -0.5, 1.5], [2, -1, 0]]), abs=1e-6)
    assert weights_at(torch.tensor([9.0]), 7, 1).tolist() == [[1.0]]
    with pytest.raises(ValueError, match="too far beyond"):
        weights_at(torch.tensor([20.0]), 7, 3, "linear")


def test_nearest_words(runs, tower):
    frame = explore.nearest_words(explore.interpolated(PROMPT, READINGS, num_base_ranks=3), num=2)
    words = [*PROMPT.split(), "0", "5", "0", "1", "0", "0"]
    assert [text.split(", ")[0] for text in frame["words"]] == words  # which they start from
    assert frame["cosine"].min() == pytest.approx(1, abs=1e-4)
    assert frame["of a random vector"].iloc[0] < 0.6
    assert list(frame.index[:6]) == [f"context {number}" for number in range(1, 7)]
    assert list(frame.index[6:]) == ["near 0", "near 50", "near 50, token 2", "near 100", "near 100, token 2",
                                     "near 100, token 3"]  # fmt: skip
    assert "random vector" in frame.attrs["caveat"]
    assert len(explore.nearest_words(runs["coop"])) == 6 + 1 + 9 * 2 + 3
    with pytest.raises(ValueError, match=re.escape("{name}: no context and rank embeddings to look at")):
        explore.nearest_words(explore.written("{name}", READINGS))


def test_zero_shot_answers_are_those_of_the_method(tmp_path):
    """As `method=zero_shot` with the same template, its ensemble and its pictures, through the pipeline."""
    from ordinalclip.model import OrdinalModel

    files = []
    for number, value in enumerate((10.0, 60.0, 90.0)):
        picture = draw("thermometer", value, np.random.default_rng(number))
        picture.save(tmp_path / f"{number}.png")
        files.append(str(tmp_path / f"{number}.png"))
    templates = ["a photo of {name} {unit}.", "{name}"]
    frame = explore.zero_shot(str(tmp_path), READINGS, templates)
    assert list(frame.index) == files
    assert list(frame) == [*templates, "all"]
    for column, given in {templates[0]: templates[:1], "all": templates}.items():
        model = OrdinalModel.build("tiny", READINGS, "zero_shot", {"templates": given})
        model.save_pretrained(tmp_path / "model")
        answers = [answer["value"] for answer in load_pipeline(str(tmp_path / "model"))(files)]
        assert frame[column].tolist() == pytest.approx(answers)
    assert list(explore.zero_shot([picture], READINGS, "{name}")) == ["{name}"]


def test_a_run_decodes_as_it_does_itself(runs, monkeypatch):
    pictures = [draw("thermometer", value, np.random.default_rng(1)) for value in range(0, 100, 7)]
    run, given = runs["coop"], dict.fromkeys(("median", "argmax"))
    for how in given:
        given[how] = explore.read(pictures, run, by=run, decoding=how)["coop"].tolist()
    assert given["median"] != given["argmax"]
    monkeypatch.setattr(explore._opened(run).model.head, "decoding", "argmax")
    assert explore.read(pictures, run, by=run)["coop"].tolist() == given["argmax"]


def test_a_run_reads_pictures_by_its_own_prompts_and_by_others(runs):
    pictures = [draw("thermometer", value, np.random.default_rng(1)) for value in (5.0, 40.0, 95.0)]
    for method in ("ordinalclip", "coop"):
        frame = explore.read(pictures, runs[method], explore.written("{name}", READINGS), by=runs[method])
        answers = [answer["value"] for answer in load_pipeline(str(runs[method] / "model"))(pictures)]
        assert frame[method].tolist() == pytest.approx(answers)
        assert list(frame) == [method, "{name}"]
    by_hand = explore.written("{name}", READINGS)
    for given, by, message in (
        (explore.written("{name}", range(5)), runs["coop"], "5 ranks, text features of width"),
        (by_hand, runs["l1"], "l1 has no rank prototypes"),
        (by_hand, "minilm", "to read pictures it takes a CLIP"),
    ):
        with pytest.raises(ValueError, match=message):
            explore.read(pictures, given, by=by)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: explore.written("no place", READINGS), "lacks the place {name}"),
        (lambda: explore.written("{name}", READINGS, clip="timm:resnet18"), "no text tower"),
        (lambda: explore.prototype_path(explore.written("{name}", READINGS), by="umap"), "choices: pca, mds"),
        (lambda: explore.interpolated(PROMPT, READINGS, num_base_ranks=12), "between 1 and the number of ranks"),
        (lambda: explore.zero_shot([], READINGS), "no pictures"),
        (lambda: explore.written("{name}", ["10", "20", "35"]), "ranks named 10, 20, 35, ...: if these are the values"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_the_name_of_a_clip_is_not_a_run_of_that_name(runs, tmp_path, monkeypatch):
    copytree(runs["ordinalclip"], tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    picture = draw("tank", 80.0, np.random.default_rng(0))
    prompts = explore.written("{name}", READINGS, title="by hand")
    own, run = (explore.read(picture, prompts, by=by)["by hand"].item() for by in ("tiny", "./tiny"))
    assert own == explore.zero_shot(picture, READINGS, "{name}").iloc[0, 0]
    assert run == explore.read(picture, prompts, by=runs["ordinalclip"])["by hand"].item() != own


def test_a_notebook_draws_a_figure_without_being_asked():
    """As IPython asks, where nobody has said `%matplotlib inline`: twice as fine as it is shown."""
    figure = explore.similarity_matrix(explore.written("{name}", READINGS))
    png, shown = figure._repr_png_()
    with Image.open(io.BytesIO(png)) as image:
        assert image.size == pytest.approx((2 * shown["width"], 2 * shown["height"]), abs=2)
        assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    assert figure.get_size_inches() * 96 == pytest.approx([shown["width"], shown["height"]], abs=1)


def test_figures_show_every_rank_once(runs):
    prompts = [explore.written("{name}", READINGS, title="by hand" * 20), runs["ordinalclip"]]
    figure = explore.similarity_matrix(*prompts)
    panels = [axes for axes in figure.axes if axes.images]
    for axes, given in zip(panels, prompts, strict=True):
        unit = (given if isinstance(given, explore.RankPrompts) else explore.learned(given)).prototypes.numpy()
        np.testing.assert_allclose(axes.images[0].get_array(), unit @ unit.T, atol=1e-5)
    for by in ("pca", "mds"):
        figure = explore.prototype_path(*prompts, by=by)
        dots = [axes.collections[0] for axes in figure.axes if axes.get_xlabel() and axes.collections]
        assert [len(each.get_offsets()) for each in dots] == [11, 11]
        assert dots[0].get_array().tolist() == list(READINGS.values)
    figure = explore.prototype_path(prompts[0], explore.written("{name}", range(300, 304)))
    scales = [axes.collections[0].norm for axes in figure.axes if axes.get_xlabel() and axes.collections]
    assert [(scale.vmin, scale.vmax) for scale in scales] == [(0, 303)] * 2  # for which there is one bar
