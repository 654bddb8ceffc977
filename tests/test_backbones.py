"""Spec strings: what they build, what they say when they cannot."""

import json

import numpy as np
import open_clip
import pytest
import torch
from families import interpolated
from safetensors.torch import save_file

from ordinalclip.backbones import TINY_FOLDER, load_backbone
from ordinalclip.gauges import make_gauges
from ordinalclip.heads import HeadContext, build_head
from ordinalclip.images import prepare
from ordinalclip.model import OrdinalModel
from ordinalclip.ranks import Ranks


@pytest.fixture(scope="module")
def architecture(tmp_path_factory):
    """A small architecture registered with open_clip under a name of its own, and a file of weights."""
    folder = tmp_path_factory.mktemp("architectures")
    config = json.loads((TINY_FOLDER / "open_clip_config.json").read_text())["model_cfg"]
    config["text_cfg"].update(width=32, heads=2, layers=1)
    (folder / "micro-test.json").write_text(json.dumps({**config, "quick_gelu": False}))
    open_clip.add_model_config(folder)
    model = open_clip.create_model("micro-test")
    save_file(model.state_dict(), folder / "micro.safetensors")
    return folder / "micro.safetensors", model.eval()


def test_open_clip_file(architecture):
    path, model = architecture
    backbone = load_backbone(f"open_clip:micro-test/{path}")
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(backbone.encoder.eval()(images), model.encode_image(images))
    expected = model.encode_text(open_clip.tokenize(["an age of 7."]))
    assert torch.allclose(backbone.text(["an age of 7."]), expected, atol=1e-5)
    assert backbone.pixels.mean == pytest.approx(open_clip.OPENAI_DATASET_MEAN)
    assert backbone.pixels.size == 64
    assert backbone.logit_scale == pytest.approx(model.logit_scale.item())


def test_tiny_is_the_shipped_model():
    from safetensors.torch import load_file

    backbone = load_backbone("tiny")
    shipped = load_file(TINY_FOLDER / "model.safetensors")
    for name, tensor in backbone.encoder.state_dict().items():
        assert torch.equal(tensor, shipped[f"visual.{name}"].to(tensor.dtype))
    assert not torch.equal(
        load_backbone("tiny", load_weights=False).encoder.conv1.weight, backbone.encoder.conv1.weight
    )


@pytest.mark.parametrize(
    ("name", "size"),
    [("resnet10t", 176), ("test_convnext", 160), ("test_vit", 160), ("test_nfnet", 160)],
)
def test_timm_with_a_projection_to_another_text_tower(name, size):
    """As the paper's VGG-16 beside CLIP's text tower, with small members of the families."""
    model = OrdinalModel.build(f"timm:{name}", Ranks.linear(0, 4, 5), text="tiny")
    spec = model.config.pixel_spec
    outputs = model(torch.randn(2, 3, spec.size, spec.size), labels=torch.tensor([1.0, 3.0]))
    outputs.loss.backward()
    assert not model.config.shared_space
    assert model.head.projection.weight.shape == (model.head.text.output_dim, model.config.input_dim)
    assert model.head.projection.weight.grad.abs().sum() > 0
    assert model.head.learner.rank_embeddings.grad.abs().sum() > 0
    assert model.encoder.tower(torch.randn(1, 3, size, size)).shape == (1, model.config.input_dim)


@pytest.mark.parametrize("spec", ["tiny", "open_clip:ViT-test", "timm:test_vit", "timm:resnet10t"])
def test_another_input_size(spec, tmp_path):
    if "ViT-test" in spec:
        vision = {"image_size": 64, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
        text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
        (tmp_path / "ViT-test.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
        open_clip.add_model_config(tmp_path)
    torch.manual_seed(0)
    model = OrdinalModel.build(spec, Ranks.of(4), text="tiny", image_size=96).eval()
    assert model.config.pixel_spec.size == 96
    pixels = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        features = model.encoder(pixels)
        assert (features[0] - features[1]).norm() > 1e-3 * features[0].norm()
        if not spec.startswith("timm"):  # the tower of the own size, its position embeddings interpolated by hand
            torch.manual_seed(0)
            own = load_backbone(spec).encoder.eval()
            holder = getattr(own, "attnpool", own)
            table = holder.positional_embedding
            grid = 3 if spec == "tiny" else 6
            assert len(table) == 1 + (64 * grid // 96) ** 2
            holder.positional_embedding = torch.nn.Parameter(interpolated(table, grid, smooth=True))
            assert torch.allclose(features, own(pixels), atol=1e-5 * features.abs().max().item())
        elif spec == "timm:resnet10t":  # convolutions take any size
            torch.manual_seed(0)
            own = load_backbone(spec).encoder.eval()(pixels)  # in another memory order: not bit for bit
            assert torch.allclose(features, own, atol=1e-6 * own.abs().max().item())
    model.save_pretrained(tmp_path / "model")
    loaded = OrdinalModel.from_pretrained(tmp_path / "model")
    assert torch.allclose(loaded(pixels).logits, model(pixels).logits, atol=1e-4)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("clip:RN50", "family 'clip' is unknown; choices: tiny, efficientnet_lite0, minilm, open_clip, hf"),
        ("open_clip:RN5", "open_clip:RN5 is unknown; nearest: .*RN50"),
        ("open_clip:RN50/openia", "neither a local file nor a tag; nearest: openai"),
        ("timm:vgg61", "timm:vgg61 is unknown; nearest: .*vgg"),
        ("timm:vgg16/imagenet", "write timm:vgg16 .*, timm:vgg16/pretrained or timm:vgg16/FILE"),
        ("tiny:small", "'tiny' takes no name"),
    ],
)
def test_unknown_specs(spec, message):
    with pytest.raises(ValueError, match=message):
        load_backbone(spec)


def test_what_a_generator_draws_is_seen_as_a_picture_from_a_file_is():
    clip = load_backbone("tiny")
    side = clip.pixels.size
    image = make_gauges("tank", 1, size=side)["image"][0]
    drawn = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    clip.encoder.train()  # `see` leaves it in evaluation mode
    drawn.requires_grad_()
    seen = clip.see(drawn)
    assert not clip.encoder.training
    with torch.no_grad():
        torch.testing.assert_close(seen, clip.encoder(prepare(image, clip.pixels)[None]), rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(seen.sum(), drawn)
    assert gradient.abs().max() > 0
    assert clip.see(torch.zeros(2, 3, 32, 32)).shape == (2, clip.output_dim)


def test_methods_that_need_text_say_so():
    with pytest.raises(ValueError, match=r"OrdinalCLIP needs a text tower: set model\.text"):
        build_head("ordinalclip", HeadContext(Ranks.of(3), 8), {})
    with pytest.raises(ValueError, match="same CLIP"):
        OrdinalModel.build("timm:resnet10t", Ranks.of(3), "zero_shot", text="tiny")
    with pytest.raises(ValueError, match="has no text tower"):
        OrdinalModel.build("tiny", Ranks.of(3), text="timm:resnet10t")
    with pytest.raises(ValueError, match=r"lacks the place \{name\}"):
        OrdinalModel.build("tiny", Ranks.of(3), "zero_shot", {"templates": ["a photo"]})
    with pytest.raises(ValueError, match=r"options of method 'cnn': head\.scales is not a key; nearest: head\.scale"):
        OrdinalModel.build("tiny", Ranks.of(3), "cnn", {"scales": 3})


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("resnet10t_mine.safetensors", None),
        ("best.safetensors", None),
        ("resnet10t.c3_in1k/model.safetensors", None),
        ("resnet14t/best/model.safetensors", None),  # only the nearest folder counts
        ("resnet14t.c3_in1k/model.safetensors", "timm model resnet14t.c3_in1k by its folder's name"),
        ("models--timm--resnet14t.c3_in1k/snapshots/1a2b/model.safetensors", "resnet14t.c3_in1k by its folder's name"),
        ("resnet14t_a1-5f3c.safetensors", r"resnet14t by its name, .*: write timm:resnet14t/.*resnet14t_a1-5f3c"),
    ],
)
def test_timm_files_are_of_the_model_that_they_name(tmp_path, place, message):
    import timm

    file = tmp_path / place
    file.parent.mkdir(parents=True, exist_ok=True)
    model = timm.create_model("resnet10t").eval()
    save_file(model.state_dict(), file)
    if message is not None:
        with pytest.raises(ValueError, match=message):
            load_backbone(f"timm:resnet10t/{file}")
        return
    backbone = load_backbone(f"timm:resnet10t/{file}")
    assert torch.equal(backbone.encoder.state_dict()["conv1.0.weight"], model.state_dict()["conv1.0.weight"])


@pytest.mark.parametrize("written", ["metadata", "arch", "pixels"])
def test_timm_files_are_of_the_model_that_is_noted(tmp_path, written):
    import timm

    state, file = timm.create_model("resnet10t").state_dict(), tmp_path / "best.safetensors"
    if written == "metadata":
        save_file(state, file, {"architecture": "resnet14t"})
        message = r"resnet14t by its metadata \(architecture\)"
    elif written == "arch":
        file = tmp_path / "best.pth"
        torch.save({"arch": "resnet14t", "state_dict": state}, file)
        message = "resnet14t by its entry arch"
    else:
        save_file(state, file)
        tag = {"mean": [0.5, 0.5, 0.5], "tag": "mine"}
        (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet10t", "pretrained_cfg": tag}))
        message = r"says mean \[0\.5, 0\.5, 0\.5\] of best\.safetensors, .*write timm:resnet10t\.mine/"
    with pytest.raises(ValueError, match=message):
        load_backbone(f"timm:resnet10t/{file}")
