"""The model card: its front matter as the hub reads it, and its way with the model to folders and the hub."""

from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import EvalResult, HfApi, ModelCard, RepoUrl
from transformers import AutoModel, pipeline

from ordinalclip import OrdinalModel, Ranks, __version__
from ordinalclip.backbones import hub_name
from ordinalclip.config import load_config
from ordinalclip.model import LARGEST_CARD
from ordinalclip.results.card import front_matter
from ordinalclip.results.record import read_run
from ordinalclip.training import train

TASK = "image-ordinal-regression"
QUICK = ("data.num_train=24", "data.num_validation=12", "data.num_test=12", "train.max_steps=2", "train.batch_size=8")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card") / "run"
    return train(load_config("demo", [f"output_dir={folder}", *QUICK]), quiet=True)


@pytest.fixture
def hub(monkeypatch):
    """What would be sent to the hub, by the names of repository and file; only the network is replaced."""
    sent = {}

    def create_repo(_self, repo_id, **options):
        sent["options"] = options
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(_self, *, repo_id, folder_path, commit_message, **options):
        sent["commit"] = (repo_id, commit_message, options["revision"], options["create_pr"])
        for file in Path(folder_path).rglob("*"):
            sent[file.relative_to(folder_path).as_posix()] = file.read_bytes()

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return sent


def test_the_front_matter(run):
    record = read_run(run)
    card = ModelCard.load(run / "model" / "README.md")
    data = card.data.to_dict()
    assert (card.data.license, card.data.library_name, card.data.pipeline_tag) == (
        *("apache-2.0", "ordinalclip", "image-classification"),
    )
    assert "base_model" not in data  # the tiny CLIP comes with the package, the gauges are drawn
    assert "datasets" not in data
    versions = record.folder.read_provenance()["versions"]
    assert data["versions"].items() >= versions.items()
    assert data["versions"]["ordinalclip"] == __version__
    assert f"ordinalclip {__version__}, torch {versions['torch']}" in card.text
    results = {result.metric_type: result for result in card.data.eval_results}
    assert all(isinstance(result, EvalResult) for result in results.values())
    assert results.keys() == set(card.data.metrics) >= {"mae", "rmse", "rps"}
    for name, result in results.items():
        assert result.metric_value == record.scores[name]
        low, high = result.metric_args["interval"]
        assert (low, high) == tuple(map(float, record.intervals[name]))
        assert low <= result.metric_value <= high
    assert "import ordinalclip" in card.text
    assert "does not recognize the architecture `ordinalclip`" in card.text


def test_base_models_and_data_sets_of_the_hub(run):
    record, config = read_run(run), read_run(run).config
    model = config.model.model_copy(update={"backbone": "open_clip:RN50/openai", "text": "hf:google/mt5-small"})
    hub = {"source": "hub", "hub": "owner/faces", "hub_config": "small", "hub_revision": "v1", "root": ""}
    other = config.model_copy(update={"model": model, "data": config.data.model_copy(update=hub)})
    card = ModelCard(f"---\n{front_matter(replace(record, config=other))}\n---\n")
    assert card.data.base_model == ["timm/resnet50_clip.openai", "google/mt5-small"]
    assert card.data.datasets == ["owner/faces"]
    assert (card.data.license, card.data.license_name) == ("other", "that-of-data-and-backbone")
    result = card.data.eval_results[0]
    assert (result.dataset_type, result.dataset_config, result.dataset_revision) == ("owner/faces", "small", "v1")


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("tiny", ""),
        ("minilm", "sentence-transformers/all-MiniLM-L6-v2"),
        ("hf:facebook/dinov2-small", "facebook/dinov2-small"),
        ("hf:FOLDER", ""),
        ("open_clip:RN50", ""),
        ("open_clip:ViT-B-32/laion2b_s34b_b79k", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"),
        ("open_clip:hf-hub:owner/clip", "owner/clip"),
        ("open_clip:RN50/FOLDER/weights.pt", ""),
        ("open_clip:FOLDER", ""),
        ("timm:vgg16", ""),
        ("timm:vgg16/pretrained", "timm/vgg16.tv_in1k"),
        ("timm:vgg16/FOLDER/weights.pt", ""),
        ("another:owner/name", ""),
    ],
)
def test_where_weights_are_published(tmp_path, spec, name):
    (tmp_path / "weights.pt").touch()
    assert hub_name(spec.replace("FOLDER", str(tmp_path))) == name


def test_the_card_goes_with_the_model(run, tmp_path):
    written = (run / "model" / "README.md").read_bytes()
    model = OrdinalModel.from_pretrained(run / "model")
    model.save_pretrained(tmp_path / "one")
    AutoModel.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two", form="trainable")
    pipeline(TASK, model=str(tmp_path / "two")).save_pretrained(tmp_path / "three")
    assert {(tmp_path / name / "README.md").read_bytes() for name in ("one", "two", "three")} == {written}
    model.card = None  # trained on, say
    model.save_pretrained(tmp_path / "four")
    assert not (tmp_path / "four" / "README.md").exists()


def test_a_card_that_is_none_stops_no_model(run, tmp_path, caplog):
    OrdinalModel.from_pretrained(run / "model").save_pretrained(tmp_path)
    (tmp_path / "README.md").write_bytes(b"\xff\x00 no text")
    assert OrdinalModel.from_pretrained(tmp_path).card == b"\xff\x00 no text"
    with (tmp_path / "README.md").open("wb") as file:
        file.truncate(LARGEST_CARD + 1)
    assert OrdinalModel.from_pretrained(tmp_path).card is None
    assert "a model card of 4 MB is left out" in caplog.text
    (tmp_path / "README.md").unlink()
    assert OrdinalModel.from_pretrained(tmp_path).card is None


def test_pushed_to_the_hub(run, hub, tmp_path):
    """By the model and by the pipeline: the same files as in the folder, which load, and the card as it was."""
    files = {file.name: file.read_bytes() for file in (run / "model").iterdir()}
    for give in (OrdinalModel.from_pretrained, lambda folder: pipeline(TASK, model=str(folder))):
        hub.clear()
        give(run / "model").push_to_hub("owner/thermometer", private=True, commit_message="A first one")
        assert hub.pop("options")["private"]
        assert hub.pop("commit") == ("owner/thermometer", "A first one", None, False)
        assert hub.keys() == files.keys()
        assert hub["README.md"] == files["README.md"]
    for name, content in hub.items():
        (tmp_path / name).write_bytes(content)
    assert OrdinalModel.from_pretrained(tmp_path).config.to_dict() == (
        OrdinalModel.from_pretrained(run / "model").config.to_dict()
    )


def test_tags_go_into_the_card(run, hub):
    model = OrdinalModel.from_pretrained(run / "model")
    model.push_to_hub("owner/thermometer", tags=["medical", "ordinalclip"])
    data = ModelCard(hub["README.md"].decode()).data
    assert data.tags[-1] == "medical"
    assert data.tags.count("ordinalclip") == 1
    assert data.eval_results == ModelCard(model.card.decode()).data.eval_results
    with pytest.raises(ValueError, match="tags must be a list, got 'medical'"):
        model.push_to_hub("owner/thermometer", tags="medical")


def test_a_model_without_a_card_leaves_that_of_the_hub(hub):
    model = OrdinalModel.build("tiny", Ranks.of(5), "cross_entropy")
    model.push_to_hub("owner/plain")
    assert "README.md" not in hub
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= hub.keys()
    with pytest.raises(ValueError, match="tags medical: this model has no card that they could stand in"):
        model.push_to_hub("owner/plain", tags=["medical"])
    with pytest.raises(ValueError, match=r"push_to_hub=True: .*; model\.push_to_hub\(NAME\) pushes it"):
        model.save_pretrained(Path("nowhere"), push_to_hub=True)
    assert not Path("nowhere").exists()
