"""What is done to an encoder before training: depth, freezing, drop-path, adapters, recomputed activations."""

import json

import numpy as np
import open_clip
import pytest
import timm
import torch
from conftest import learner_of, losses_of
from torch import nn

from ordinalclip import OrdinalModel
from ordinalclip.backbones import load_backbone
from ordinalclip.backbones.layers import encoder_layers
from ordinalclip.config import ModelConfig
from ordinalclip.model import Encoder
from ordinalclip.training import train
from ordinalclip.training.distributed import check_batch_norm, frozen_running_statistics
from ordinalclip.training.layers import add_drop_path, checkpoint_activations, parameter_depths
from ordinalclip.training.preparation import add_adapters, merge_adapters
from ordinalclip.training.sampling import use_sample_noise


def test_batch_norm_modes(caplog):
    encoder = Encoder(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    assert not encoder.train().tower[1].training
    encoder.frozen_statistics = False
    assert encoder.train().tower[1].training
    encoder.tower[1].requires_grad_(False)  # a frozen layer keeps its statistics too
    assert not encoder.train().tower[1].training
    check_batch_norm(encoder, "local", 1, False)
    for mode, processes, micro, message in (
        ("sync", 1, True, "micro_batch_size"),
        ("local", 2, False, "number of processes"),
    ):
        with pytest.raises(ValueError, match=message):
            check_batch_norm(encoder, mode, processes, micro)
        check_batch_norm(encoder, mode, processes, micro, exact=False)
        assert message in caplog.text
    with pytest.raises(ValueError, match="activation_checkpointing"):
        check_batch_norm(encoder, "local", 1, False, recomputed=True)


def test_the_first_of_two_passes_leaves_running_statistics_alone():
    norm = nn.BatchNorm2d(3).train()
    before = norm.running_mean.clone()
    with frozen_running_statistics(norm):
        norm(torch.randn(4, 3, 5, 5) + 7)
    assert torch.equal(norm.running_mean, before)
    norm(torch.randn(4, 3, 5, 5) + 7)
    assert not torch.equal(norm.running_mean, before)


VIT = {"image_size": 64, "layers": 3, "width": 32, "head_width": 16, "patch_size": 16}
TEXT = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
TOWERS = {
    "tiny": lambda: load_backbone("tiny").encoder,
    "open_clip ViT": lambda: open_clip.CLIP(16, VIT, TEXT).visual,
    "timm ViT": lambda: timm.create_model("test_vit", num_classes=0, img_size=64, depth=3),
    "timm ResNet": lambda: timm.create_model("resnet18", num_classes=0, zero_init_last=False),
}
IMAGES = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def running(tower):
    """In training mode, with BatchNorm as at evaluation."""
    tower.train()
    for child in tower.modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            child.eval()
    return tower


@pytest.mark.parametrize("name", TOWERS)
def test_depths_rise_from_stem_to_output(name):
    tower = TOWERS[name]()
    layers, depths = encoder_layers(tower), parameter_depths(tower)
    assert set(depths) == {name for name, _ in tower.named_parameters()}
    assert set(depths.values()) >= set(range(len(layers) + 1))
    for depth, layer in enumerate(layers, 1):
        own = {id(p) for p in layer.parameters()}
        assert {depths[n] for n, p in tower.named_parameters() if id(p) in own} == {depth}
    stem = {"tiny": "conv1.weight", "open_clip ViT": "conv1.weight", "timm ViT": "patch_embed.proj.weight"}
    top = {"tiny": "attnpool.c_proj.weight", "open_clip ViT": "proj", "timm ViT": "norm.weight"}
    if name in stem:
        assert depths[stem[name]] == 0
        assert depths[top[name]] == len(layers) + 1


def test_layer_decay_and_freezing_by_depth(quick):
    run = learner_of(quick("method=l1", "train.layer_decay=0.5", "train.freeze_layers=1"))
    depths = parameter_depths(run.model.encoder.tower)
    rate = {id(p): group["peak_lr"] for group in run.optimizer.param_groups for p in group["params"]}
    for name, parameter in run.model.encoder.tower.named_parameters():
        if depths[name] <= 1:
            assert not parameter.requires_grad
            assert id(parameter) not in rate
        else:
            assert rate[id(parameter)] == pytest.approx(1e-3 * 0.5 ** (5 - depths[name]))
    assert rate[id(run.model.head.linear.weight)] == 1e-3
    with pytest.raises(ValueError, match=r"train\.freeze_layers=9: this image encoder has 4 layers"):
        learner_of(quick("train.freeze_layers=9"))


@pytest.mark.parametrize("name", TOWERS)
def test_drop_path_leaves_out_branches_of_single_samples(name):
    tower = TOWERS[name]()
    plain = tower.eval()(IMAGES)
    add_drop_path(tower, 0.5)
    noises = use_sample_noise(tower, seed=3)
    rates = [noise.p for noise in noises if noise.whole_sample]
    assert rates == sorted(rates)
    assert (rates[0], rates[-1]) == (0, 0.5)
    assert torch.equal(tower.eval()(IMAGES), plain)
    found = []
    for order in ([0, 1, 2], [2, 0, 1]):
        for noise in noises:
            noise.positions = torch.tensor(order) + 40
        found.append(running(tower)(IMAGES[order])[np.argsort(order)])
    assert torch.allclose(found[0], found[1], atol=1e-5)  # masks go with the samples
    assert not torch.allclose(found[0], plain, atol=1e-3)


def test_a_dropped_branch_adds_nothing():
    """With its last block's branches dropped for everybody, a ViT answers as if it had one block less."""
    tower = TOWERS["open_clip ViT"]()
    add_drop_path(tower, 0.999)
    noises = use_sample_noise(tower, seed=3)
    for noise in noises:
        noise.p = 0.999 if noise.p > 0.9 else 0.0
        noise.positions = torch.arange(3)
    dropped = tower.train()(IMAGES)
    tower.transformer.resblocks = tower.transformer.resblocks[:-1]
    assert torch.allclose(dropped, tower(IMAGES), atol=1e-6)


def test_drop_path_needs_known_branches():
    with pytest.raises(ValueError, match=r"model\.drop_path: the residual branches of VGG are not known"):
        add_drop_path(timm.create_model("vgg11", num_classes=0), 0.1)


@pytest.mark.parametrize("name", TOWERS)
def test_recomputed_activations_give_the_same_gradients(name):
    tower, calls = running(TOWERS[name]()), []
    tower(IMAGES).square().sum().backward()
    expected = {n: p.grad.clone() for n, p in tower.named_parameters() if p.grad is not None}
    tower.zero_grad()
    checkpoint_activations(tower)
    inner = next(part for part in encoder_layers(tower)[-1].modules() if not list(part.children()))
    inner.register_forward_hook(lambda *_: calls.append(1))
    tower(IMAGES).square().sum().backward()
    assert len(calls) == 2  # once more in the backward pass
    for n, p in tower.named_parameters():
        if n in expected:
            assert torch.allclose(p.grad, expected[n], atol=1e-6 + 1e-4 * expected[n].abs().max().item()), n


@pytest.mark.parametrize("name", TOWERS)
def test_adapters_learn_and_merge(name):
    pytest.importorskip("peft", reason="needs the extra [lora]")
    tower = TOWERS[name]().eval()
    before, keys = tower(IMAGES), set(tower.state_dict())
    add_adapters(tower, ModelConfig(lora_rank=2), 64)
    assert torch.allclose(tower.eval()(IMAGES), before, atol=1e-5)  # adapters start at zero
    adapters = {n: p for n, p in tower.named_parameters() if p.requires_grad}
    assert all("lora_" in n for n in adapters)
    with torch.no_grad():
        for parameter in adapters.values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    adapted = tower(IMAGES)
    adapted.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapters.values())  # every adapter acts
    merge_adapters(tower)
    assert set(tower.state_dict()) == keys
    assert torch.allclose(tower(IMAGES), adapted, atol=1e-3)


def test_a_run_with_adapters_saves_a_plain_model(quick, tmp_path):
    pytest.importorskip("peft", reason="needs the extra [lora]")
    options = ("method=l1", "model.lora_rank=2", "train.ema=0.5", "train.eval_every=1", "train.resume=auto")
    folder = train(quick(*options), quiet=True)
    model = OrdinalModel.from_pretrained(folder / "model")
    assert not [name for name in model.state_dict() if "lora" in name]
    figures = json.loads((folder / "metrics.json").read_text())
    assert train(quick(*options, "train.max_steps=4"), quiet=True) == folder
    assert json.loads((folder / "metrics.json").read_text())["test"] == figures["test"]
    with pytest.raises(ValueError, match=r"model\.lora_targets: 'nothing\.\*' matches no linear layer"):
        train(quick(*options, "model.lora_targets=[nothing.*]", f"output_dir={tmp_path}/none"), quiet=True)


def test_mirrors_are_averaged(quick):
    folder = train(quick("method=l1", "model.mirror=[horizontal, vertical]"), quiet=True)
    model = OrdinalModel.from_pretrained(folder / "model")
    x = torch.randn(2, 3, 64, 64)
    views = [model.encoder.tower(x.flip(dims) if dims else x) for dims in ((), (-1,), (-2,), (-1, -2))]
    assert torch.allclose(model.encoder(x), sum(views) / 4, atol=1e-5)
    assert torch.allclose(model.predict(x).value, model.predict(x.flip(-1)).value, atol=1e-3)


def test_the_average_of_the_weights_becomes_the_model(quick, tmp_path):
    """Against the recursion written out, over the weights that every step left."""
    decay, options = 0.8, ("method=l1", "train.eval_every=1", "train.keep_checkpoints=9", "train.select=last")
    plain = train(quick(*options, f"output_dir={tmp_path}/plain"), quiet=True)
    averaged = train(quick(*options, f"output_dir={tmp_path}/averaged", f"train.ema={decay}"), quiet=True)
    assert np.array_equal(losses_of(plain), losses_of(averaged))
    start = learner_of(quick(*options)).model.head.linear.weight.detach()
    expected = start.double()
    for step in range(4):
        weight = load(plain, step + 1)["head.linear.weight"].double()
        kept = min(decay, (1 + step) / (10 + step))
        expected = kept * expected + (1 - kept) * weight
    model = OrdinalModel.from_pretrained(averaged / "model")
    assert torch.allclose(model.head.linear.weight.double(), expected, atol=1e-6)


def load(folder, step):
    from ordinalclip.training.checkpoint import load_checkpoint

    return load_checkpoint(folder / "checkpoints" / f"step-{step:08d}").weights


@pytest.mark.parametrize(
    "option",
    [
        pytest.param("train.activation_checkpointing=true", marks=pytest.mark.slow),
        pytest.param("train.fused=false", marks=pytest.mark.slow),
        "data.workers=2",
        pytest.param("data.cache_mb=0", marks=pytest.mark.slow),
        pytest.param("train.compile=true", marks=pytest.mark.slow),
    ],
)
def test_speed_switches_leave_the_curve_alone(quick, tmp_path, option):
    options = ("train.precision=float64", "model.drop_path=0.1", "model.dropout=0.1", "data.augment.flip=true")
    plain = train(quick(*options, f"output_dir={tmp_path}/plain"), quiet=True)
    other = train(quick(*options, option, f"output_dir={tmp_path}/other"), quiet=True)
    assert np.abs(losses_of(other) / losses_of(plain) - 1).max() < 1e-10
