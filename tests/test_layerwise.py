"""Features of every layer: the libraries' own intermediates, one tensor, exact steps, saving and serving."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import losses_of
from families import FAMILIES, e4e_pair, make_family
from layerwise_heads import MeanOfLayers
from PIL import Image
from torch import nn

from baselines.large.e4e import load_encoder
from ordinalclip import OrdinalModel, Ranks
from ordinalclip.backbones import load_backbone
from ordinalclip.backbones.base import Pooling
from ordinalclip.backbones.layers import LayerFeatures, encoder_layers
from ordinalclip.backbones.timm_models import pooling_of
from ordinalclip.config import ModelConfig
from ordinalclip.heads import HeadContext, build_head
from ordinalclip.images import prepare
from ordinalclip.pipeline import load_pipeline
from ordinalclip.training import train
from ordinalclip.training.layers import checkpoint_activations
from ordinalclip.training.preparation import add_adapters

METHOD = "layerwise_heads:MeanOfLayers"
RANKS = Ranks.linear(0, 100, 21)
SWIN = pytest.param("timm:swin_tiny_patch4_window7_224", marks=pytest.mark.slow)  # maps whose channels are last


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """A function (family) -> its encoder, images, and the layer-wise features of these with their widths."""

    def read(name):
        folder = tmp_path_factory.mktemp("layers")
        torch.manual_seed(0)
        backbone = load_backbone(make_family(name, folder) if name in FAMILIES else name)
        tower, size = backbone.encoder.eval(), backbone.pixels.size
        for parameter in tower.requires_grad_(False).parameters():  # timm's blocks begin as identities
            parameter.add_(0.1 * torch.rand_like(parameter))
        pixels = torch.randn(2, 3, size, size)
        layers = LayerFeatures(tower, backbone.pooling, size)
        features = layers(tower, pixels)
        assert features.shape == (2, len(layers.dims), max(layers.dims))
        for layer, width in enumerate(layers.dims):
            assert not features[:, layer, width:].any()
        assert torch.equal(features[:, -1, : layers.dims[-1]], tower(pixels))
        assert layers.dims[-1] == backbone.output_dim
        return tower, pixels, features, layers.dims

    return read


def check(features, dims, expected):
    """The last of the layers before the tower's own features, and those between, are the expected ones in order."""
    place = 0
    for number, vectors in enumerate(expected):
        width = vectors.shape[1]
        while not (dims[place] == width and torch.allclose(features[:, place, :width], vectors, atol=1e-6, rtol=1e-5)):
            place += 1
            assert place < len(dims) - 1, f"nothing like the library's output {number} among the layers"
        place += 1
    assert place == len(dims) - 1


@pytest.mark.parametrize(
    "name", ["timm:test_vit", "timm:test_resnet", "timm:test_efficientnet", "timm:test_convnext", SWIN]
)
def test_as_timm_gives_them(read, name):
    tower, pixels, features, dims = read(name)
    vit = name == "timm:test_vit"
    found = tower.forward_intermediates(
        pixels, norm=False, intermediates_only=True, **({"return_prefix_tokens": True} if vit else {})
    )
    if vit:
        assert len(dims) == 1 + len(found)
        check(features, dims, [prefix[:, 0] for _, prefix in found])
    else:  # its stages: a block each, or several of ours
        maps = found[1:] if name == "timm:test_resnet" else found
        check(features, dims, [each.mean(dim=(2, 3)) for each in maps])


@pytest.mark.parametrize("name", [name for name in FAMILIES if name.startswith("hf")])
def test_as_transformers_gives_them(read, name):
    tower, pixels, features, dims = read(name)
    hidden = tower.model(pixel_values=pixels, output_hidden_states=True, **tower.options).hidden_states[1:]
    assert len(dims) == len(hidden) + 1
    tokens = {"hf:hf_siglip": lambda x: x.mean(dim=1), "hf:hf_convnext": lambda x: x.mean(dim=(2, 3))}
    tokens["hf:hf_resnet"] = tokens["hf:hf_convnext"]
    check(features, dims, [tokens.get(name, lambda x: x[:, 0])(each) for each in hidden])


@pytest.mark.parametrize("name", ["tiny", *(name for name in FAMILIES if name.startswith("open_clip"))])
def test_as_open_clip_gives_them(read, name):
    tower, pixels, features, dims = read(name)
    if name == "tiny":
        found, x = [], tower.stem(pixels)
        for stage in (tower.layer1, tower.layer2, tower.layer3, tower.layer4):
            for block in stage:
                x = block(x)
                found.append(x.mean(dim=(2, 3)))
    elif hasattr(tower, "trunk"):
        found = [
            tokens.mean(dim=1)
            for tokens in tower.trunk.forward_intermediates(
                pixels, norm=False, intermediates_only=True, output_fmt="NLC"
            )
        ]
    else:
        options = {"normalize_intermediates": False, "intermediates_only": True, "output_extra_tokens": True}
        found = [
            prefix[:, 0] for prefix in tower.forward_intermediates(pixels, **options)["image_intermediates_prefix"]
        ]
    assert len(dims) == len(found) + 1
    check(features, dims, found)


def test_of_an_encoder_to_a_latent_space_they_are_the_rows_of_its_codes(tmp_path):
    """Relative to no mean code but as the generator takes them; one call of the encoder."""
    torch.manual_seed(0)
    file = tmp_path / "pair.pt"
    e4e_pair(file)
    backbone, pixels = load_backbone(f"e4e:{file}"), torch.randn(2, 3, 32, 32)
    tower = backbone.encoder.eval()
    layers = LayerFeatures(tower, backbone.pooling, backbone.pixels.size)
    assert layers.dims == (12,) * 8
    encoder, offset = load_encoder(file)
    with torch.no_grad():
        codes = layers(tower, pixels)
        torch.testing.assert_close(codes, encoder(pixels) + offset)
        assert torch.equal(tower(pixels), codes.flatten(1))
        assert backbone.generator(codes).shape == (2, 3, 32, 32)
    assert offset.abs().min() > 0
    with pytest.raises(ValueError, match=r"shape \(2, 3, 64, 64\); this encoder takes \(B, 3, 32, 32\)"):
        tower(torch.randn(2, 3, 64, 64))


def test_means_leave_out_what_is_no_patch():
    tokens = torch.tensor([[[9.0], [5.0], [1.0], [3.0]]])
    for pooling, expected in ((Pooling(), 4.5), (Pooling(True, 2), 9), (Pooling(False, 2), 2)):
        assert pooling(tokens).item() == expected
    maps = torch.arange(24.0).reshape(1, 2, 3, 4)
    assert Pooling()(maps).tolist() == [[5.5, 17.5]]
    assert Pooling(channels_last=True)(maps).tolist() == [[10, 11, 12, 13]]


def test_maps_with_channels_last_are_known_by_their_tower():
    for name, last in (("mambaout_femto", True), ("swin_tiny_patch4_window7_224", True), ("test_resnet", False)):
        with torch.device("meta"):
            tower = timm.create_model(name, num_classes=0)
        assert pooling_of(tower).channels_last == last, name


class Halves(nn.Linear):
    """A map in two pieces, as a dual-path network has it between its blocks."""

    def __init__(self):
        super().__init__(4, 4)

    def forward(self, x):
        return super().forward(x)[..., None], x[..., None]


class Blocks(nn.Module):
    """Blocks of tokens (B, N, 4), whose order a test can change."""

    def __init__(self, order=(0, 1)):  # "token": one more from here on; "map": from here on, with its channels last
        super().__init__()
        self.stem, self.order = nn.Conv2d(3, 4, 4, 4), order
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4), Halves()])

    def forward(self, pixels):
        x = self.stem(pixels).flatten(2).transpose(1, 2)
        for block in self.order:
            if block == "token":
                x = torch.cat([x[:, :1], x], dim=1)
            elif block == "map":
                x = x.unflatten(1, (2, 2))
            elif block == 2:
                x = self.blocks[block](x)[0][..., 0]
            else:
                x = self.blocks[block](x)
        return x.flatten(1, -2).mean(dim=1)


@pytest.mark.parametrize(
    ("tower", "message"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), "the layers of Sequential are not known"),
        (Blocks((0, 1, 0)), "a Linear of Blocks is called more than once"),
        (Blocks((0, 2)), "a Halves of Blocks gives neither tokens .* nor a map"),
        (Blocks((0, "token", 1)), "a Linear of Blocks has another number of tokens than those before"),
        (Blocks(("map", 0, 1)), r"a Linear of Blocks gives a map \(1, 2, 2, 4\): which axis are its channels"),
    ],
)
def test_what_has_no_layers_to_read(tower, message):
    with pytest.raises(ValueError, match=message):
        LayerFeatures(tower, Pooling(True, 1), 8)
    assert not [hook for module in tower.modules() for hook in module._forward_hooks]
    assert LayerFeatures(Blocks((1, 0)), Pooling(True, 1), 8).dims == (4, 4, 4)


def test_the_probe_leaves_the_tower_as_it_was():
    tower = load_backbone("tiny").encoder.train()
    tower.layer1.eval()
    state, modes = {k: v.clone() for k, v in tower.state_dict().items()}, [m.training for m in tower.modules()]
    LayerFeatures(tower, Pooling(), 64)
    assert modes == [m.training for m in tower.modules()]
    assert all(torch.equal(tensor, state[key]) for key, tensor in tower.state_dict().items())


def layerwise_tiny(**options):
    torch.manual_seed(0)
    return OrdinalModel.build("tiny", RANKS, METHOD, label_mean=40, label_std=30, **options).eval()


@torch.no_grad()
def test_mirrors_and_threads():
    model, pixels = layerwise_tiny(mirror=["horizontal"]), torch.randn(8, 3, 64, 64)
    plain = layerwise_tiny().encoder
    expected = (plain(pixels) + plain(pixels.flip(-1))) / 2
    assert torch.allclose(model.encoder(pixels), expected, atol=1e-6)
    answers = {}

    def ask(number):
        answers[number] = [model.encoder(pixels[number : number + 1]) for _ in range(4)]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == len(threads)  # what goes wrong in a thread is lost
    for number, found in answers.items():
        for features in found:
            assert torch.allclose(features[0], expected[number], atol=1e-5)


def test_recomputed_activations_and_adapters():
    """Recomputing layers changes no gradient; a layer that an adapter has taken the place of is read with it."""
    pixels, gradients = torch.randn(2, 3, 64, 64), []
    for recomputed in (False, True):
        encoder = layerwise_tiny().encoder.train()
        if recomputed:
            checkpoint_activations(encoder.tower)
        encoder(pixels).square().sum().backward()
        gradients.append([parameter.grad for parameter in encoder.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4 * one.abs().max().item())
    pytest.importorskip("peft", reason="needs the extra [lora]")
    tower = Blocks()
    layers, small = LayerFeatures(tower, Pooling(True, 1), 8), torch.randn(2, 3, 8, 8)
    before = layers(tower, small)
    add_adapters(tower, ModelConfig(lora_rank=2, lora_targets=["blocks.0"]), 8)
    nn.init.normal_(tower.blocks[0].lora_B["default"].weight)
    assert encoder_layers(tower)[0] is tower.blocks[0]
    assert not torch.allclose(layers(tower, small)[:, 0], before[:, 0])


@pytest.mark.parametrize("form", ["deployed", "trainable"])
@pytest.mark.parametrize("backbone", ["tiny", "timm:test_vit"])
def test_saved_and_served(tmp_path, form, backbone):
    torch.manual_seed(0)
    model = OrdinalModel.build(backbone, RANKS, METHOD, label_mean=40, label_std=30).eval()
    size, dims = model.config.pixel_spec.size, model.config.layer_dims
    assert (len(dims), model.config.input_dim) == {"tiny": (5, 512), "timm:test_vit": (7, 64)}[backbone]
    model.save_pretrained(tmp_path, form=form)
    loaded, pixels = OrdinalModel.from_pretrained(tmp_path), torch.randn(2, 3, size, size)
    assert loaded.encoder(pixels).shape == (2, len(dims), max(dims))
    assert torch.equal(loaded.predict(pixels).value, model.predict(pixels).value)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8))
    served = load_pipeline(str(tmp_path))(image)["value"]
    assert served == model.predict(prepare(image, model.config.pixel_spec)[None]).value.item()

    content = json.loads((tmp_path / "config.json").read_text())
    for wrong in (None, dims[:-1], [*dims[:-1], dims[-1] + 1]):
        changed = {**content, "layer_dims": wrong}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match="layer_dims"):
            OrdinalModel.from_pretrained(tmp_path)


def test_layers_that_are_not_the_backbones_are_refused():
    config = layerwise_tiny().config
    for wrong in (None, [64, 128, 256, 512, 127]):
        config.layer_dims = wrong
        with pytest.raises(ValueError, match=r"layer_dims .* is not that of the backbone and the method, \[64, 128"):
            OrdinalModel(config)


def test_what_a_head_is_told_and_the_space_of_its_answers(monkeypatch):
    assert build_head(METHOD, HeadContext(RANKS, 6, layer_dims=(4, 6)), {}).layer_dims == (4, 6)
    model = layerwise_tiny()
    assert model.head.layer_dims == (64, 128, 256, 512, 128)
    features = model.encoder(torch.randn(2, 3, 64, 64))
    assert torch.equal(model.head.space(features), features.reshape(2, 5 * 512))
    pooled = build_head("l1", HeadContext(RANKS, 512), {})
    monkeypatch.setattr(MeanOfLayers, "deploy", lambda self: ("l1", {}, pooled))
    with pytest.raises(TypeError, match=r"MeanOfLayers\.deploy: l1 takes other features"):
        model.deploy()


EXACT = ("train.precision=float64", "train.max_steps=2", "data.augment.flip=true", "model.dropout=0.1")


def test_micro_batches_do_not_change_the_curve(quick, tmp_path):
    scores = []
    for micro in ("null", "3"):
        options = (f"method={METHOD}", f"output_dir={tmp_path}/{micro}", f"train.micro_batch_size={micro}", *EXACT)
        folder = train(quick(*options, "evaluation.space=true"), quiet=True)
        scores.append((losses_of(folder), json.loads((folder / "metrics.json").read_text())["test"]))
    assert np.abs(scores[1][0] / scores[0][0] - 1).max() < 1e-10
    assert scores[1][1]["mae"] == pytest.approx(scores[0][1]["mae"], rel=1e-8)
    assert scores[1][1]["d5"] == pytest.approx(scores[0][1]["d5"], rel=1e-8)


@pytest.mark.slow
def test_processes_do_not_change_the_curve(quick, tmp_path):
    """8 samples as 3, 3 and 2, each share in micro-batches of 2."""
    single = train(quick(f"method={METHOD}", f"output_dir={tmp_path}/one", *EXACT), quiet=True)
    several = quick(f"method={METHOD}", f"output_dir={tmp_path}/several", "train.micro_batch_size=2", *EXACT)
    (tmp_path / "run.py").write_text(RUN)
    (tmp_path / "run.yaml").write_text(several.to_yaml())
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "3", "--standalone"]
    command += [str(tmp_path / "run.py"), str(tmp_path / "run.yaml")]
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert np.abs(losses_of(tmp_path / "several") / losses_of(single) - 1).max() < 1e-10
    one, other = (
        json.loads((folder / "metrics.json").read_text())["test"]["mae"] for folder in (single, tmp_path / "several")
    )
    assert other == pytest.approx(one, rel=1e-8)


RUN = """
import sys
from ordinalclip.config import load_config
from ordinalclip.training import train

if __name__ == "__main__":
    train(load_config(sys.argv[1], []), quiet=True)
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_compiled_as_not(quick, tmp_path):
    curves = [
        losses_of(train(quick(f"method={METHOD}", f"output_dir={tmp_path}/{option}", option, *EXACT), quiet=True))
        for option in ("train.compile=false", "train.compile=true")
    ]
    assert np.abs(curves[1] / curves[0] - 1).max() < 1e-10
