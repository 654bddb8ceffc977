"""Saving, loading and serving: equal outputs and buffers, no text tower, nothing unpickled."""

import json
import math
import shutil
import socket

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel, pipeline

from ordinalclip import OrdinalConfig, OrdinalModel, Ranks
from ordinalclip.gauges import make_gauges
from ordinalclip.heads import HeadContext, NoNumber, available_heads, build_head, decode
from ordinalclip.weights import fault

RANKS = Ranks.linear(0, 100, 21, unit="%")
METHODS = sorted(set(available_heads()) - {"prototypes"})


def perturbed(method, backbone="tiny", **options):
    """A model none of whose tensors is at its initial value."""
    torch.manual_seed(0)
    model = OrdinalModel.build(backbone, RANKS, method, text="tiny", label_mean=40, label_std=30, **options).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and "text." not in name and name != "head.frequencies":
                tensor.mul_(1 + 0.05 * torch.rand_like(tensor))
    return model


def same(a, b, exact):
    close = torch.equal if exact else (lambda x, y: torch.allclose(x, y, atol=2e-5, rtol=1e-4))
    return all((a[key] is None) == (b[key] is None) and (a[key] is None or close(a[key], b[key])) for key in a)


KINDS = {"ordinalclip", "l1", "rm_loss"}  # with a text tower and projection, without, with a bank


@pytest.mark.parametrize(
    ("method", "backbone"),
    [
        pytest.param(method, backbone, marks=[] if backbone == "tiny" or method in KINDS else pytest.mark.slow)
        for method in METHODS
        for backbone in ("tiny", "timm:test_vit", "timm:resnet10t")
    ],
)
@pytest.mark.parametrize("form", ["deployed", "trainable"])
def test_round_trip(tmp_path, method, form, backbone):
    if method == "zero_shot" and backbone != "tiny":
        pytest.skip("zero-shot needs image and text tower of the same CLIP")
    model = perturbed(method, backbone)
    model.save_pretrained(tmp_path, form=form)
    loaded = OrdinalModel.from_pretrained(tmp_path)
    size = model.config.pixel_spec.size
    pixels, labels = torch.randn(3, 3, size, size), torch.tensor([5.0, 50.0, 77.0])
    before, after = dict(model(pixels, labels)), dict(loaded(pixels, labels))
    assert same({k: before.get(k) for k in after}, after, exact=form == "trainable")

    reference = model if form == "trainable" else model.deploy()
    buffers = dict(loaded.named_buffers())
    assert buffers.keys() == dict(reference.named_buffers()).keys()
    for name, buffer in reference.named_buffers():  # those that are not saved too
        assert torch.equal(buffer, buffers[name]), name
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    if form == "deployed":
        assert not [name for name in loaded.state_dict() if "text." in name]


def test_trainable_form_goes_on_learning(tmp_path):
    model = perturbed("ordinalclip")
    model.save_pretrained(tmp_path, form="trainable")
    loaded = OrdinalModel.from_pretrained(tmp_path)
    loss = loaded(torch.randn(2, 3, 64, 64), torch.tensor([5.0, 50.0])).loss
    loss.backward()
    assert loaded.head.learner.rank_embeddings.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in loaded.head.text.parameters())
    with pytest.raises(ValueError, match="form 'small' is unknown; choices: deployed, trainable"):
        model.save_pretrained(tmp_path, form="small")


def test_auto_classes_and_config(tmp_path):
    model = perturbed("ordinalclip")
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(AutoModel.from_pretrained(tmp_path), OrdinalModel)
    assert config.label_space == RANKS
    assert config.num_labels == 21
    assert config.id2label[20] == "100"
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    image = make_gauges("dial", 1)[0]["image"]
    assert torch.equal(processor(image)["pixel_values"], model.image_processor([image])["pixel_values"])
    with pytest.raises(ValueError, match="no field bakbone"):
        OrdinalConfig(bakbone="tiny")


def test_weights_that_do_not_fit_are_refused(tmp_path):
    perturbed("l1").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("head.linear.bias")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.safetensors: head\.linear\.bias is missing"):
        OrdinalModel.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="takes no option dytpe"):
        OrdinalModel.from_pretrained(tmp_path, dytpe="auto")


def test_convolutions_keep_their_memory_order(tmp_path):
    """Channels last, which is faster, wherever an encoder comes from."""
    model = OrdinalModel.build("tiny", RANKS, "l1")
    model.save_pretrained(tmp_path)
    for each in (model, model.deploy(), OrdinalModel.from_pretrained(tmp_path)):
        weights = [w for w in each.encoder.parameters() if w.ndim == 4 and min(w.shape[1:]) > 1]
        assert weights
        assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


def test_dtype_of_a_loaded_model(tmp_path):
    perturbed("ordinalclip").save_pretrained(tmp_path)
    model = OrdinalModel.from_pretrained(tmp_path, dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert model(torch.randn(1, 3, 64, 64).bfloat16()).logits.dtype == torch.float32


@pytest.mark.parametrize("method", ["ordinalclip", "l1"])
def test_pipeline(tmp_path, method):
    perturbed(method).save_pretrained(tmp_path / "model")
    pipe = pipeline("image-ordinal-regression", model=str(tmp_path / "model"))
    images = [row["image"] for row in make_gauges("tank", 5)]
    images[0].save(tmp_path / "a.png")
    alone = [pipe(image, top_k=2) for image in images]
    for batch_size in (1, 2, 5):
        mixed = [str(tmp_path / "a.png"), np.asarray(images[1]), *images[2:]]
        for one, other in zip(alone, pipe(mixed, top_k=2, batch_size=batch_size), strict=True):
            assert other["value"] == pytest.approx(one["value"], abs=1e-3)
            assert other["name"] == RANKS.name(other["rank"])
            assert [entry["name"] for entry in other["top"]] == [entry["name"] for entry in one["top"]]
    assert alone[0]["unit"] == "%"
    if method == "l1":
        assert alone[0]["top"] == []
    else:
        top = alone[0]["top"]
        assert len(top) == 2
        assert 1 >= top[0]["probability"] >= top[1]["probability"] > 0
    with pytest.raises(ValueError, match=r"b\.png: not a readable image"):
        pipe(str(tmp_path / "b.png"))
    with pytest.raises(ValueError, match="no option topk"):
        pipe(images[0], topk=3)


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[] if name in {*KINDS, "coral"} else pytest.mark.slow) for name in METHODS]
)
def test_half_precision_answers_like_full_precision(tmp_path, method):
    """Label statistics in the thousands must survive bfloat16, where numbers near 2000 are 8 apart.

    The deviation is small so that the rounding of the encoder, which is not meant here, does not show.
    """
    torch.manual_seed(0)
    ranks = Ranks.linear(1900, 2000, 11, unit="year")
    model = OrdinalModel.build("tiny", ranks, method, label_mean=1955.3, label_std=2.8).eval()
    model.save_pretrained(tmp_path)
    half = OrdinalModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    pixels = torch.randn(4, 3, 64, 64)
    one, other = (m.head.predict(m.head(m.encoder(pixels.to(m.dtype)))) for m in (model, half))
    assert other.value.dtype == torch.float32
    if one.probabilities is None:
        assert torch.allclose(one.value, other.value, atol=1.0)
    else:
        assert torch.allclose(one.probabilities, other.probabilities, atol=0.05)


def test_decoding_against_loops():
    ranks = Ranks((0, 1, 5, 10))
    probabilities = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.1, 0.1, 0.3], [0.0, 0.0, 0.0, 1.0]])
    for row, one in enumerate(probabilities.tolist()):
        cost = [sum(p * abs(v - w) for p, w in zip(one, ranks.values, strict=True)) for v in ranks.values]
        assert cost[decode(probabilities, ranks, "median").rank[row]] == pytest.approx(min(cost))
        assert decode(probabilities, ranks, "argmax").rank[row] == one.index(max(one))
        mean = sum(p * v for p, v in zip(one, ranks.values, strict=True))
        assert decode(probabilities, ranks, "expectation").value[row].item() == pytest.approx(mean)
    with pytest.raises(ValueError, match="'mode' is unknown; choices: median"):
        decode(probabilities, ranks, "mode")


def test_the_median_is_the_first_rank_that_reaches_one_half():
    """Exactly one half is enough; random distributions against a loop, in which it never costs more than any rank."""
    ranks = Ranks((0, 1, 5, 10))
    for probabilities, rank in (
        ([0.5, 0.5, 0.0, 0.0], 0),
        ([0.25, 0.25, 0.25, 0.25], 1),
        ([0.0, 0.0, 0.5, 0.5], 2),
        ([0.55, 0.45, 0.0, 0.0], 0),
        ([0.45, 0.55, 0.0, 0.0], 1),
        ([0.3, 0.25, 0.25, 0.2], 1),
        ([0.1, 0.1, 0.1, 0.1], 3),  # rounding may leave less than one half: the last rank then
    ):
        found = decode(torch.tensor([probabilities]), ranks, "median")
        assert found.rank.item() == rank, probabilities
        assert found.value.item() == ranks.values[rank]
    many = torch.distributions.Dirichlet(torch.ones(4).double()).sample((300,))
    for row, rank in zip(many.tolist(), decode(many, ranks, "median").rank.tolist(), strict=True):
        assert rank == next(k for k in range(4) if sum(row[: k + 1]) >= 0.5)
        cost = [sum(p * abs(v - w) for p, w in zip(row, ranks.values, strict=True)) for v in ranks.values]
        assert cost[rank] == pytest.approx(min(cost))


def test_the_rank_of_an_expectation_is_the_one_nearest_to_it():
    """Half 0 and half 10 are 4 or 5 on the average, which is neither of the likely ranks."""
    probabilities = torch.tensor([[0.6, 0.0, 0.0, 0.4], [0.0, 0.2, 0.0, 0.8]])
    found = decode(probabilities, Ranks((0, 1, 5, 10)), "expectation")
    assert found.value.tolist() == pytest.approx([4.0, 8.2])
    assert found.rank.tolist() == [2, 3]


def test_logits_of_prompts_are_scaled_cosines():
    """Of image and text features, in loops; each row is a distribution, whoever else is in the batch."""
    model = perturbed("ordinalclip")
    pixels = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        image, text = model.encoder(pixels).double(), model.head.text(model.head.learner()).double()
        output = model(pixels)
    scale = torch.tensor(float(model.head.logit_scale)).exp().item()
    for row, feature in enumerate(image):
        cosines = [(feature @ other / feature.norm() / other.norm()).item() for other in text]
        assert output.logits[row].tolist() == pytest.approx([scale * cosine for cosine in cosines], abs=1e-3)
        weights = np.exp(scale * (np.array(cosines) - max(cosines)))
        assert np.allclose(output.probabilities[row].detach().numpy(), weights / weights.sum(), atol=1e-4)
        assert torch.allclose(model(pixels[row : row + 1]).probabilities[0], output.probabilities[row], atol=1e-4)


def test_zero_shot_templates_count_alike():
    """Each template's features have length 1 before they are averaged, however long the tower makes them."""
    templates = ["a photo of {name} {unit}.", "it reads {name}."]
    model = OrdinalModel.build("tiny", RANKS, "zero_shot", {"templates": templates})
    tower = OrdinalModel.build("tiny", RANKS, "ordinalclip").head.text
    for rank in (0, 7, 20):
        name = RANKS.name(rank)
        features = tower([f"a photo of {name} %.", f"it reads {name}."]).double()
        mean = sum(feature / feature.norm() for feature in features)
        assert torch.allclose(model.head.prototypes[rank].double(), mean / mean.norm(), atol=1e-5)


def test_regressors_learn_standardised_labels_and_answer_in_the_unit():
    head = build_head("l1", HeadContext(RANKS, 3, label_mean=40.0, label_std=8.0), {})
    assert head.standardise(torch.tensor([40.0, 48.0, 20.0])).tolist() == [0, 1, -2.5]
    answer = head.predict({"standardised": torch.tensor([0.0, 1.0, -2.5, 9.0])})
    assert answer.value.tolist() == [40, 48, 20, 112]
    assert answer.rank.tolist() == [8, 10, 4, 20]


def test_grey_and_large_images_are_served(tmp_path):
    model = perturbed("ordinalclip")
    pixels = model.image_processor([Image.new("L", (300, 200), 90), np.zeros((70, 64), np.uint8)])["pixel_values"]
    assert pixels.shape == (2, 3, 64, 64)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved models of two forms, each with the answer to one picture."""
    picture = make_gauges("dial", 1)[0]["image"].resize((90, 70))
    made = {}
    for method, form in (("ordinalclip", "deployed"), ("l1", "deployed"), ("rm_loss", "trainable")):
        folder = tmp_path_factory.mktemp(f"{method}-{form}")
        head = {"readout": "l1"} if method == "rm_loss" else {}
        perturbed(method, head=head).save_pretrained(folder, form=form)
        made[folder] = answer_of(folder, picture)
    return picture, made


def answer_of(folder, picture):
    return pipeline("image-ordinal-regression", model=str(folder))(picture, top_k=3)


DELETED = object()


def leaves(value, path=()):
    """Paths of all values in nested JSON, containers too."""
    if path:
        yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, (*path, key))


def others(value):
    """Other values than this one: of its type, and of other types."""
    yield DELETED
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int | float):
        yield from (value + 1, value * 1.5 + 0.25, -value - 1, 0, 1e300, float("nan"), float("inf"))
    elif isinstance(value, str):
        yield from ("", value + "x", "median", "argmax", "expectation", "squash", "bilinear", "float16", "l1", "timm:x")
    elif isinstance(value, list):
        yield from ([], value[:-1], value[::-1], [*value, *value[:1]])
    elif isinstance(value, dict):
        yield from ({}, {**value, "foreign": 1})
    yield from (None, True, 1, 7.5, "text", [1], {"a": 1})


def changed(content, path, value):
    content = json.loads(json.dumps(content))
    place = content
    for key in path[:-1]:
        place = place[key]
    if value is DELETED:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return content


def check_change(folder, before, picture, file, path, value, place):
    """A folder whose file has one other value is refused, or answers as before."""
    content = json.loads((folder / file).read_text())
    shutil.copytree(folder, place, dirs_exist_ok=True)
    (place / file).write_text(json.dumps(changed(content, path, value)))
    try:
        after = answer_of(place, picture)
    except (ValueError, OSError):
        return
    assert after == before, (path, value)


ELSEWHERE = ("model_type", "image_processor_type")  # transformers asks them for the class: see the hostile cases
FILES = ("config.json", "preprocessor_config.json")


@pytest.mark.parametrize("key", ["values", "names", "edges", "unit"])
@pytest.mark.parametrize("value", [True, 1, 7.5, {"a": 1}])
def test_ranks_are_lists_of_their_kind(key, value):
    with pytest.raises(ValueError, match=rf"ranks\.{key} must be (a list|text), got"):
        OrdinalConfig(ranks={**Ranks.linear(0, 9, 10).to_dict(), key: value})


@pytest.mark.slow
def test_one_changed_value_is_refused_or_changes_nothing(folders, tmp_path):
    """Every top-level key, deleted and at many other values; by the pipeline, as `transformers` builds it."""
    picture, made = folders
    for folder, before in made.items():
        for file in FILES:
            content = json.loads((folder / file).read_text())
            for key, old in content.items():
                if key in ELSEWHERE:
                    continue
                for value in others(old):
                    check_change(folder, before, picture, file, (key,), value, tmp_path / "copy")


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_one_changed_value_inside_is_refused_or_changes_nothing(folders, tmp_path, data):
    picture, made = folders
    folder = data.draw(st.sampled_from(list(made)))
    file = data.draw(st.sampled_from(FILES))
    content = json.loads((folder / file).read_text())
    path = data.draw(st.sampled_from([path for path in leaves(content) if path[0] not in ELSEWHERE]))
    old = content
    for key in path:
        old = old[key]
    value = data.draw(st.sampled_from(list(others(old))))
    check_change(folder, made[folder], picture, file, path, value, tmp_path / "copy")


def test_a_folder_needs_no_network(folders, monkeypatch):
    """Without HF_HUB_OFFLINE, every socket that is opened fails the test."""

    def no_socket(*arguments, **options):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "socket", no_socket)
    monkeypatch.setattr(socket, "create_connection", no_socket)
    monkeypatch.setattr(socket, "getaddrinfo", no_socket)
    picture, made = folders
    for folder, before in made.items():
        assert answer_of(folder, picture) == before
        assert isinstance(OrdinalModel.from_pretrained(folder), OrdinalModel)


def test_what_is_not_finite_is_not_saved(tmp_path):
    model = perturbed("l1")
    model.head.linear.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match=r"head\.linear\.bias holds 1 numbers that are not finite, of 1"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("numbers", "bad"), [([6e4, 6e4], 0), ([math.inf, -math.inf, 1], 2), ([6e4, 6e4, math.nan], 1), ([], 0)]
)
def test_finite_weights_may_be_large(numbers, bad):
    """The sum of the first ones is beyond float16."""
    said = f"w holds {bad} numbers that are not finite, of {len(numbers)}" if bad else ""
    assert fault({"w": torch.tensor(numbers, dtype=torch.float16)}) == said


@pytest.mark.parametrize("decoding", ["median", "argmax", "expectation"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_is_no_rank(decoding, bad):
    probabilities = torch.tensor([[0.5, 0.5, 0.0], [bad, 0.5, 0.5], [bad, bad, bad]])
    with pytest.raises(NoNumber, match="answers 2 of 3 pictures with numbers that are not finite"):
        decode(probabilities, Ranks.of(3), decoding)
    head = build_head("l1", HeadContext(RANKS, 3, label_mean=40.0, label_std=8.0), {})
    with pytest.raises(NoNumber, match="answers 1 of 2"):
        head.predict({"standardised": torch.tensor([0.0, bad])})
