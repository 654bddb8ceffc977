"""Checkpoints in the layouts of OrdinalCLIP's and OpenAI's repositories, with random weights, against plain loops."""

import pickle

import numpy as np
import open_clip
import pytest
import torch
import torchvision
from open_clip.openai import load_openai_model
from PIL import Image
from torch.nn.functional import normalize

from ordinalclip import OrdinalModel
from ordinalclip.backbones import load_backbone
from ordinalclip.cli import main
from ordinalclip.config import load_config
from ordinalclip.convert import convert
from ordinalclip.weights import read_weights

RANKS = ("ranks.low=10", "ranks.high=20", "ranks.num=6")


def openai_clip(resnet=False, vocabulary=49408):
    """Heads of 64 as in all of OpenAI's models; weights large enough that a wrong mask shows."""
    torch.manual_seed(0)
    tower = {"layers": [1, 1, 1, 1], "width": 8} if resnet else {"layers": 2, "width": 64, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": vocabulary, "width": 64, "heads": 1, "layers": 2}
    vision = {**tower, "image_size": 32, "head_width": 64}
    model = open_clip.CLIP(32, vision, text, quick_gelu=True).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
            parameter.copy_(parameter.half())  # OpenAI's files are partly in half precision
    return model


def openai_state(model):
    numbers = {"input_resolution": 32, "context_length": 77, "vocab_size": 49408}
    return {**model.state_dict(), **{name: torch.tensor(number) for name, number in numbers.items()}}


@pytest.fixture(scope="module")
def clip():
    return openai_clip()


@pytest.fixture(scope="module")
def clip_folder(clip, tmp_path_factory):
    folder = tmp_path_factory.mktemp("openai")
    torch.save(openai_state(clip), folder / "clip.pt")
    convert(folder / "clip.pt", folder / "clip")
    return folder / "clip"


def lightning(file, image_encoder, clip, context, rank):
    """What a ModelCheckpoint of the original repository writes; text weights as they are, tokens not."""
    tensors = {f"module.image_encoder.{key}": tensor for key, tensor in image_encoder.state_dict().items()}
    for key, tensor in clip.state_dict().items():
        if key.startswith(("transformer.", "ln_final.")) or key in ("positional_embedding", "text_projection"):
            tensors[f"module.text_encoder.{key}"] = tensor
    tensors["module.prompt_learner.context_embeds"] = context
    tensors["module.prompt_learner.rank_embeds"] = rank
    tensors["module.logit_scale"] = torch.tensor(3.2)
    callbacks = {"ModelCheckpoint{'monitor': 'val_mae_max_metric'}": {"best_model_score": torch.tensor(2.0)}}
    torch.save({"epoch": 3, "pytorch-lightning_version": "1.6.5", "state_dict": tensors, "callbacks": callbacks}, file)


def by_hand(clip, image_features, context, rank, position="tail"):
    """Softmax over the ranks, every prompt written out at 77 tokens as in the original."""
    embed = clip.token_embedding
    features = []
    for number in range(len(rank)):
        own = context[number] if context.ndim == 3 else context
        tokens = {
            "tail": [own, rank[number]],
            "front": [rank[number], own],
            "middle": [own[: len(own) // 2], rank[number], own[len(own) // 2 :]],
        }[position]
        sentence = torch.cat([embed.weight[49406:49407], *tokens, embed.weight[[269, 49407]]])
        end = len(sentence) - 1
        sentence = torch.cat([sentence, embed.weight[:1].expand(77 - len(sentence), -1)])
        hidden = clip.transformer((sentence + clip.positional_embedding)[None], attn_mask=clip.attn_mask)
        features.append(clip.ln_final(hidden)[0, end] @ clip.text_projection)
    logits = np.exp(3.2) * normalize(image_features, dim=-1) @ normalize(torch.stack(features), dim=-1).T
    return torch.softmax(logits, dim=1)


def interpolated(bases, num_ranks):
    """OrdinalCLIP's linear rule, written out."""
    rows = []
    for rank in range(num_ranks):
        places = [base * (num_ranks - 1) / (len(bases) - 1) for base in range(len(bases))]
        weights = [1 - abs(rank - place) / (num_ranks - 1) for place in places]
        rows.append(sum(w * base for w, base in zip(weights, bases, strict=True)) / sum(weights))
    return torch.stack(rows)


@pytest.mark.filterwarnings("ignore")  # tracing warns about every shape, and that it is deprecated
@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("resnet", [True, False])
def test_openai_files(tmp_path, resnet, archive):
    """An archive and a state dict, against the model that wrote them and open_clip's own reader."""
    model = openai_clip(resnet, vocabulary=600)
    file, reference = tmp_path / "clip.pt", model
    if archive:
        model.register_buffer("input_resolution", torch.tensor(32))  # one of the numbers in OpenAI's archives
        example = {"encode_image": torch.zeros(1, 3, 32, 32), "encode_text": torch.ones(1, 77, dtype=torch.long)}
        torch.jit.save(torch.jit.trace_module(model, example), file)
    else:
        halves = {k: v.half() if k.endswith(("conv1.weight", "proj")) else v for k, v in openai_state(model).items()}
        torch.save(halves, file)
        reference = model if resnet else load_openai_model(str(file), device="cpu")  # it knows no narrow ResNet
    said = convert(file, tmp_path / "clip")
    assert said.endswith(f"model.backbone=open_clip:{tmp_path / 'clip'}")
    backbone = load_backbone(f"open_clip:{tmp_path / 'clip'}")
    pixels, ids = torch.randn(2, 3, 32, 32), torch.arange(2, 79)[None]
    ids[0, -1] = 599
    with torch.no_grad():
        assert torch.allclose(backbone.encoder.eval()(pixels), reference.encode_image(pixels), atol=1e-5)
        whole = open_clip.create_model(f"local-dir:{tmp_path / 'clip'}").eval()
        assert torch.allclose(whole.encode_text(ids), reference.encode_text(ids), atol=1e-5)
    assert backbone.pixels.mean == pytest.approx(open_clip.OPENAI_DATASET_MEAN)
    assert backbone.pixels.size == 32
    assert backbone.logit_scale == pytest.approx(model.logit_scale.item())


@pytest.mark.filterwarnings("ignore")
def test_archives_in_place_of_weights(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "linear.pt")
    assert read_weights(tmp_path / "linear.pt").keys() == {"weight", "bias"}
    with pytest.raises(ValueError, match=f"ordinalclip convert {tmp_path}/linear.pt"):
        load_backbone(f"open_clip:RN50/{tmp_path}/linear.pt")


@pytest.mark.parametrize("position", ["tail", "middle", "front"])
@pytest.mark.parametrize("own_context", [True, False])
def test_ordinalclip_checkpoint(tmp_path, clip, clip_folder, position, own_context):
    torch.manual_seed(1)
    context = torch.randn(*((6,) if own_context else ()), 5, 64) * 0.3
    bases = torch.randn(3, 2, 64) * 0.3
    visual = openai_clip().visual
    with torch.no_grad():
        for parameter in visual.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))  # it was trained
    lightning(tmp_path / "best.ckpt", visual, clip, context, bases)
    options = [f"model.backbone=open_clip:{clip_folder}", f"head.rank_position={position}", *RANKS]
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    ranks = interpolated(bases, 6)
    for form in ("deployed", "trainable"):
        assert main(["convert", str(tmp_path / "best.ckpt"), str(tmp_path / form), *options, "--form", form]) == 0
        model = OrdinalModel.from_pretrained(tmp_path / form)
        pixels = model.image_processor(image)["pixel_values"]
        with torch.no_grad():
            expected = by_hand(clip, visual(pixels), context, ranks, position)
            assert torch.allclose(model(pixels).probabilities, expected, atol=1e-5)
        assert model.config.label_space.values == (10, 12, 14, 16, 18, 20)

    resized = np.asarray(image.resize((round(32 * 256 / 224),) * 2, Image.Resampling.BILINEAR))
    assert resized.shape == (37, 37, 3)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    cut = (resized[2:34, 2:34] / 255 - mean) / std
    assert np.allclose(pixels[0].permute(1, 2, 0), cut, atol=1e-5)


def test_plain_prompt_learner_is_coop(tmp_path, clip, clip_folder):
    """Free rank embeddings, some ranks with names of two tokens: the original pads to the longest."""
    torch.manual_seed(2)
    context, names = torch.randn(4, 64) * 0.3, ["seven", "twenty seven", "nine"]
    ids = [open_clip.SimpleTokenizer().encode(name) for name in names]
    rank = torch.randn(3, max(map(len, ids)), 64) * 0.3
    lightning(tmp_path / "best.ckpt", clip.visual, clip, context, rank)
    options = [f"model.backbone=open_clip:{clip_folder}", "method=coop", "evaluation.decoding=argmax"]
    pixels = torch.randn(2, 3, 32, 32)

    convert(tmp_path / "best.ckpt", tmp_path / "equal", load_config(None, options))
    model = OrdinalModel.from_pretrained(tmp_path / "equal")
    with torch.no_grad():
        assert torch.allclose(model(pixels).probabilities, by_hand(clip, clip.visual(pixels), context, rank), atol=1e-5)
    assert model.config.label_space.values == (0, 1, 2)

    named = [*options, f"ranks.names={names}", "ranks.values=[7, 8, 9]", "head.init_from_names=true"]
    convert(tmp_path / "best.ckpt", tmp_path / "named", load_config(None, named))
    model = OrdinalModel.from_pretrained(tmp_path / "named")
    ragged = [tokens[: len(own)] for tokens, own in zip(rank, ids, strict=True)]
    with torch.no_grad():
        expected = by_hand(clip, clip.visual(pixels), context, ragged)
        assert torch.allclose(model(pixels).probabilities, expected, atol=1e-5)


def torchvision_encoder(make):
    """As the original builds them: the classifier replaced by a projection to the text width, without bias."""
    model = make(weights=None)
    torch.manual_seed(4)
    if hasattr(model, "fc"):
        model.fc = torch.nn.Linear(model.fc.in_features, 32, bias=False)
    else:
        model.classifier[-1] = torch.nn.Linear(model.classifier[-1].in_features, 32, bias=False)
    return model.eval()


@pytest.mark.parametrize(
    ("make", "name"),
    [
        pytest.param(torchvision.models.resnet18, "timm:resnet18", marks=pytest.mark.slow),
        pytest.param(torchvision.models.vgg16, "timm:vgg16", marks=pytest.mark.slow),
    ],
)
def test_torchvision_encoders(tmp_path, clip, clip_folder, make, name):
    visual = torchvision_encoder(make)
    context, bases = torch.randn(5, 64) * 0.3, torch.randn(3, 1, 64) * 0.3
    lightning(tmp_path / "best.ckpt", visual, clip, context, bases)
    options = [f"model.backbone={name}", f"model.text=open_clip:{clip_folder}", *RANKS]
    pixels = torch.randn(2, 3, 224, 224)
    for form in ("deployed", "trainable"):
        convert(tmp_path / "best.ckpt", tmp_path / form, load_config(None, options), form)
        model = OrdinalModel.from_pretrained(tmp_path / form)
        with torch.no_grad():
            expected = by_hand(clip, visual(pixels), context, interpolated(bases, 6))
            assert torch.allclose(model(pixels).probabilities, expected, atol=1e-4)
    with pytest.raises(ValueError, match=r"the image encoder is a torchvision model, model\.backbone=open_clip"):
        convert(
            tmp_path / "best.ckpt",
            tmp_path / "x",
            load_config(None, [f"model.backbone=open_clip:{clip_folder}", *RANKS]),
        )


class Evil:
    def __reduce__(self):
        return eval, ("__import__('pathlib').Path('/nowhere/evil').touch()",)


def test_what_is_refused(tmp_path, clip, clip_folder, capsys):
    with open(tmp_path / "evil.ckpt", "wb") as file:
        pickle.dump({"state_dict": Evil()}, file)
    torch.save({"state_dict": {"a": torch.zeros(1)}, "extra": Evil()}, tmp_path / "evil.pt")
    torch.save({"module.last_project.weight": torch.zeros(3, 4)}, tmp_path / "baseline.ckpt")
    torch.save({"conv1.weight": torch.zeros(3, 4)}, tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("no weights")
    context, bases = torch.randn(5, 64), torch.randn(3, 1, 64)
    lightning(tmp_path / "best.ckpt", clip.visual, clip, context, bases)
    alexnet = torch.nn.ModuleDict({"classifier": torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(2, 2))})
    lightning(tmp_path / "alex.ckpt", alexnet, clip, context, bases)
    half = torch.load(tmp_path / "best.ckpt", weights_only=True)
    del half["state_dict"]["module.logit_scale"]
    torch.save(half, tmp_path / "half.ckpt")
    lightning(tmp_path / "narrow.ckpt", clip.visual, clip, context[:, :32], bases)
    lightning(tmp_path / "deep.ckpt", openai_clip(resnet=True).visual, clip, context, bases)
    backbone = f"model.backbone=open_clip:{clip_folder}"
    for name, options, message in (
        ("evil.ckpt", (), "evil.ckpt: not readable as plain tensors"),
        ("evil.pt", (), "evil.pt: not readable as plain tensors"),
        ("text.pt", (), "text.pt: not readable as plain tensors"),
        ("none.pt", (), "none.pt: no such file of weights"),
        ("baseline.ckpt", (), "the repository's Baseline"),
        ("other.pt", (), "neither OrdinalCLIP's layout"),
        ("best.ckpt", (backbone,), "does not say its ranks; set ranks.values"),
        ("best.ckpt", (backbone, *RANKS, "method=l1"), "method must be ordinalclip or coop, got 'l1'"),
        ("best.ckpt", (backbone, "method=coop", *RANKS), "head.learner.rank_embeddings is (3, 1, 64), the configured"),
        ("narrow.ckpt", (backbone, *RANKS), "head.learner.context is (5, 32), the configured model has (5, 64)"),
        ("alex.ckpt", (backbone, *RANKS), "the image encoder is an AlexNet"),
        ("half.ckpt", (backbone, *RANKS), "lacks module.logit_scale"),
        ("deep.ckpt", (backbone, *RANKS), "is model.backbone the right one?"),
    ):
        assert main(["convert", str(tmp_path / name), str(tmp_path / "out"), *options]) == 2, name
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1


def test_a_clip_of_another_make_is_no_openai_clip(tmp_path, clip):
    state = openai_state(clip)
    state["visual.ln_post.bias"] = torch.zeros(3)
    torch.save(state, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=r"odd\.pt: not a CLIP as OpenAI published them"):
        convert(tmp_path / "odd.pt", tmp_path / "out")


def test_a_conversion_replaces_an_earlier_one_and_nothing_else(tmp_path, clip):
    torch.save(openai_state(clip), tmp_path / "clip.pt")
    out = tmp_path / "new" / "out"
    convert(tmp_path / "clip.pt", out)
    before = (out / "open_clip_model.safetensors").read_bytes()
    changed = openai_state(clip)
    changed["logit_scale"] = changed["logit_scale"] + 0.5
    torch.save(changed, tmp_path / "clip.pt")
    convert(tmp_path / "clip.pt", out)
    after = (out / "open_clip_model.safetensors").read_bytes()
    assert after != before

    changed["visual.proj"] = changed["visual.proj"][:, :5]  # it fails once everything is written
    torch.save(changed, tmp_path / "clip.pt")
    with pytest.raises(ValueError, match="not a CLIP as OpenAI published them"):
        convert(tmp_path / "clip.pt", out)
    assert (out / "open_clip_model.safetensors").read_bytes() == after
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    (out / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds something else than an earlier result .*\(notes\.txt\)"):
        convert(tmp_path / "clip.pt", out)
