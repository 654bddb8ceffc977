"""Learned prompts that go with a model, and a model of written ones."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from ordinalclip import LearnedPrompts, OrdinalModel, OrdinalRegressionPipeline, Ranks, explore
from ordinalclip.config import load_config
from ordinalclip.gauges import make_gauges
from ordinalclip.run_folder import RunFolder
from ordinalclip.training import train

READINGS = Ranks.linear(0, 100, 11, unit="%")
OPTIONS = {"num_base_ranks": 3, "prompt": "a photo of a gauge at", "init_from_names": True}
QUICK = (
    *("ranks.low=0", "ranks.high=100", "ranks.num=21", "data.num_train=24", "data.num_validation=12"),
    *("data.num_test=12", "train.max_steps=3", "train.batch_size=8", "train.lr=1e-2", "evaluation.report=false"),
    "evaluation.prompts=true",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder, found = tmp_path_factory.mktemp("learned"), {}
    for method in ("ordinalclip", "coop", "l1"):
        found[method] = train(
            load_config(None, [f"output_dir={folder}/{method}", f"method={method}", *QUICK]), quiet=True
        )
    return found


@pytest.fixture
def model():
    return OrdinalModel.build("tiny", READINGS, "ordinalclip", OPTIONS).eval()


def equal(one, other):
    assert torch.equal(one.context, other.context)
    assert torch.equal(one.rank_embeddings, other.rank_embeddings)
    assert (one.names, one.words, one.chance) == (other.names, other.words, other.chance)


@pytest.mark.parametrize("method", ["ordinalclip", "coop"])
def test_a_run_keeps_its_prompts_in_its_model(runs, tmp_path, method):
    """The folder of the model alone is enough, and says what the run's files and `explore` say."""
    learned, table = RunFolder(runs[method]).read_prompts(), explore.nearest_words(runs[method])
    shutil.copytree(runs[method] / "model", tmp_path / "alone")
    found = OrdinalModel.from_pretrained(tmp_path / "alone").prompts()
    assert torch.equal(found.context, learned["context"])
    assert torch.equal(found.rank_embeddings, learned["rank_embeddings"])
    assert len(found.names) == len(found.rank_embeddings) == (21 if method == "coop" else 3)
    assert (found.names[0], found.names[-1]) == ("0", "100")
    assert list(found.words) == list(table.index)
    assert [", ".join(word.text for word in words) for words in found.words.values()] == list(table["words"])
    cosines = [words[0].cosine for words in found.words.values()]
    assert cosines == pytest.approx(list(table["cosine"]), abs=1e-6)
    assert found.chance == pytest.approx(table["of a random vector"].iloc[0])
    AutoModel.from_pretrained(tmp_path / "alone").save_pretrained(tmp_path / "again")
    equal(OrdinalModel.from_pretrained(tmp_path / "again").prompts(), found)


def test_prompts_of_a_run_that_is_done(runs, tmp_path):
    """Where nobody has asked for them before: from the run's own files."""
    shutil.copytree(runs["coop"], tmp_path / "run")
    file = tmp_path / "run" / "model" / "prompts.safetensors"
    before = LearnedPrompts.load(file)
    file.unlink()
    LearnedPrompts.of(explore.learned(tmp_path / "run").head).save(file)
    after = OrdinalModel.from_pretrained(file.parent).prompts()
    assert torch.equal(after.context, before.context)
    assert torch.equal(after.rank_embeddings, before.rank_embeddings)
    assert (after.names, after.words) == (before.names, before.words)


def test_a_method_without_prompts_keeps_none(runs):
    assert not (runs["l1"] / "model" / "prompts.safetensors").exists()
    with pytest.raises(ValueError, match=r"method 'l1' has none, .*; evaluation\.prompts=true writes it at the end"):
        OrdinalModel.from_pretrained(runs["l1"] / "model").prompts()


def test_the_key_makes_no_other_experiment(runs):
    folder = RunFolder(runs["coop"])
    assert not folder.difference(folder.read_config(["evaluation.prompts=false"]))


def test_prompts_of_a_trainable_model(model, tmp_path):
    found = model.prompts(num=2)
    assert found.context.shape == (6, 96)  # "a photo of a gauge at"
    assert found.rank_embeddings.shape[::2] == (3, 96)
    assert found.names == ("0", "50", "100")
    assert [words[0].text for words in found.words.values()][:6] == ["a", "photo", "of", "a", "gauge", "at"]
    for words in found.words.values():
        assert len(words) == 2
        assert words[0].cosine >= words[1].cosine
        assert words[0].cosine > 0.999 > found.chance > 0  # they start from words
    with pytest.raises(ValueError, match="nearest words must be from 1 to 49408, got 0"):
        model.prompts(num=0)
    with pytest.raises(ValueError, match="no learned prompts"):
        model.deploy().prompts()
    model.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / "prompts.safetensors").exists()
    for form in ("deployed", "trainable"):
        model.save_pretrained(tmp_path / form, form=form, prompts=True)
        equal(OrdinalModel.from_pretrained(tmp_path / form).prompts(), model.prompts())
    plain, kept = (OrdinalModel.from_pretrained(tmp_path / name) for name in ("plain", "deployed"))
    pixels = torch.randn(2, 3, 64, 64)
    assert torch.equal(plain(pixels).value, kept(pixels).value)
    with pytest.raises(ValueError, match="no learned prompts: method 'prototypes' has none"):
        plain.save_pretrained(tmp_path / "never", prompts=True)
    assert not (tmp_path / "never").exists()


def test_contexts_of_their_own(tmp_path):
    head = {"rank_specific_context": True, "num_context": 2, "num_base_ranks": None, "tokens_per_rank": 2}
    model = OrdinalModel.build("tiny", Ranks.of(3), "ordinalclip", head)
    found = model.prompts(num=1)
    assert found.context.shape == (3, 2, 96)
    assert len(found.words) == 3 * 2 + 3 * 2
    found.save(tmp_path / "kept.safetensors")
    equal(LearnedPrompts.load(tmp_path / "kept.safetensors"), found)


def test_damaged_prompts_are_refused(model, tmp_path):
    model.save_pretrained(tmp_path, prompts=True)
    file = tmp_path / "prompts.safetensors"
    whole, tensors = file.read_bytes(), load_file(file)
    about = {"ordinalclip": '{"names": ["0"], "words": {}, "chance": 0.1}'}
    for write, said in (
        (lambda: file.write_bytes(whole[:-20]), "damaged or no safetensors file"),
        (lambda: save_file(tensors, file), "no learned prompts with their names and words in it"),
        (lambda: save_file({"context": tensors["context"]}, file, about), "no learned prompts with their names"),
        (lambda: save_file(tensors, file, about), "context, rank embeddings and names do not fit together"),
        (lambda: save_file(tensors, file, {"ordinalclip": "[]"}), "no learned prompts with their names"),
    ):
        write()
        with pytest.raises(ValueError, match=rf"prompts\.safetensors: {said}"):
            OrdinalModel.from_pretrained(tmp_path)


# ---- written prompts


def test_written_prompts_are_the_zero_shot_method(tmp_path):
    """As the method, as `explore.zero_shot`, and again when it is saved."""
    templates = ["a gauge at {name} {unit}.", "a photo of the reading {name}."]
    model = OrdinalModel.from_prompts("tiny", READINGS, templates)
    method = OrdinalModel.build("tiny", READINGS, "zero_shot", {"templates": templates}).eval()
    pictures = [row["image"] for row in make_gauges("dial", 5)]
    pixels = model.image_processor(pictures)["pixel_values"]
    with torch.no_grad():
        assert torch.equal(model(pixels).logits, method(pixels).logits)
    frame = explore.zero_shot(pictures, READINGS, templates)
    model.save_pretrained(tmp_path)
    for each in (model, OrdinalModel.from_pretrained(tmp_path)):
        answers = [answer["value"] for answer in OrdinalRegressionPipeline(model=each)(pictures)]
        assert answers == pytest.approx(list(frame["all"]))
    one = OrdinalModel.from_prompts("tiny", READINGS, templates[0], decoding="expectation")
    values = [answer["value"] for answer in OrdinalRegressionPipeline(model=one)(pictures)]
    assert np.allclose(values, explore.zero_shot(pictures, READINGS, templates[0], decoding="expectation").iloc[:, 0])
    assert OrdinalModel.from_prompts("tiny", 4, "grade {name}").config.label_space.names == ("0", "1", "2", "3")


@pytest.mark.parametrize(
    ("backbone", "templates", "said"),
    [
        ("tiny", [], r"templates must be a sentence with \{name\}, or a list of such, got \[\]"),
        ("tiny", [3], "templates must be a sentence"),
        ("tiny", "a gauge", r"'a gauge' lacks the place \{name\}"),
        ("tiny", ["at {name}", "at {name} {colour}"], r"has braces besides \{name\} and \{unit\}"),
        ("timm:resnet18", "at {name}", "needs a text tower"),
        ("tinny", "at {name}", "family 'tinny' is unknown"),
    ],
)
def test_written_prompts_are_checked(backbone, templates, said):
    with pytest.raises(ValueError, match=said):
        OrdinalModel.from_prompts(backbone, READINGS, templates)
