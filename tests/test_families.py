"""Every family of backbones: the library's own answers, gradients, saving and serving offline, several processes."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import open_clip
import pytest
import timm
import torch
import transformers
from families import FAMILIES, WITH_TEXT, WORDS, interpolated, latent_pair, make_family, word_tokenizer
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, pipeline

from ordinalclip import OrdinalModel, Ranks, TextTower, tokenization
from ordinalclip.backbones import load_backbone
from ordinalclip.config import load_config
from ordinalclip.images import prepare
from ordinalclip.training import train
from ordinalclip.training.sampling import inexact_dropout, use_sample_noise

RANKS = Ranks.linear(0, 9, 10)
TEXTS = ["an age of 7 .", "a photo of 3 .", "age 9 ."]
TIMM = ["timm:test_resnet", pytest.param("timm:swin_tiny_patch4_window7_224", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tmp_path_factory.mktemp("families")


@pytest.fixture
def spec_of(folders):
    def spec_of(name):
        family, _, label = name.partition(":")
        if family == "timm":
            return name
        return f"{family}:{folders / label}" if (folders / label).exists() else make_family(name, folders)

    return spec_of


def built(spec, **options):
    text = "" if spec.startswith("open_clip") or spec.endswith(("clip", "siglip")) else "tiny"
    torch.manual_seed(1)
    return OrdinalModel.build(spec, RANKS, text=text, **options).eval()


@pytest.mark.parametrize("name", [*FAMILIES, *TIMM])
def test_saved_models_come_back_offline(spec_of, tmp_path, name):
    """Both forms, after the folder that the weights came from is gone: every buffer and output; and the pipeline."""
    spec = spec_of(name)
    if not name.startswith("timm"):
        source = tmp_path / spec.partition(":")[2].rpartition("/")[2]
        copied = spec.partition(":")[2]
        (shutil.copy if os.path.isfile(copied) else shutil.copytree)(copied, source)
        spec = f"{name.partition(':')[0]}:{source}"
    model = built(spec, head={"prompt": "an age of", "init_from_names": True})
    size = model.config.pixel_spec.size
    pixels, labels = torch.randn(3, 3, size, size), torch.tensor([1.0, 5.0, 8.0])
    before = model(pixels, labels)
    for form in ("deployed", "trainable"):
        model.save_pretrained(tmp_path / form, form=form)
    if not name.startswith("timm"):
        source.rename(tmp_path / "away")

    trainable = OrdinalModel.from_pretrained(tmp_path / "trainable")
    deployed = OrdinalModel.from_pretrained(tmp_path / "deployed")
    for reference, loaded in ((model, trainable), (model.deploy(), deployed)):
        buffers, expected = dict(loaded.named_buffers()), dict(reference.named_buffers())
        assert buffers.keys() == expected.keys()
        for key, buffer in expected.items():  # those that are not saved too
            assert torch.equal(buffer, buffers[key]), key
        assert [k for k, p in loaded.named_parameters() if p.requires_grad] == [
            k for k, p in reference.named_parameters() if p.requires_grad
        ]
    assert torch.equal(trainable(pixels, labels).logits, before.logits)
    assert torch.equal(trainable(pixels, labels).loss, before.loss)
    assert torch.allclose(deployed(pixels).probabilities, before.probabilities, atol=1e-5)
    assert not [key for key in deployed.state_dict() if "text" in key]
    assert not (tmp_path / "deployed" / "tokenizer").exists()
    assert trainable.head.text.token_ids("an age") == model.head.text.token_ids("an age")

    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8))
    answer = pipeline("image-ordinal-regression", model=str(tmp_path / "deployed"))(image)
    expected = model.predict(prepare(image, model.config.pixel_spec)[None])
    assert answer["value"] == expected.value.item()


@pytest.mark.parametrize("name", [*FAMILIES, *TIMM])
def test_the_gradient_reaches_all_that_is_trained(spec_of, name):
    model = built(spec_of(name)).train()
    size = model.config.pixel_spec.size
    model(torch.randn(2, 3, size, size), torch.tensor([1.0, 8.0])).loss.backward()
    trained = [p for p in model.encoder.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None for p in trained)
    assert sum(p.grad.abs().sum() for p in trained) > 0
    assert model.head.learner.rank_embeddings.grad.abs().sum() > 0
    norms = [m for m in model.encoder.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert not any(norm.training for norm in norms)
    assert norms or "resnet" not in name


@pytest.mark.parametrize("name", [name for name in FAMILIES if name.startswith("hf")])
def test_transformers_own_features(spec_of, name):
    spec = spec_of(name)
    folder = spec.partition(":")[2]
    backbone = load_backbone(spec)
    reference = AutoModel.from_pretrained(folder).eval()
    size = backbone.pixels.size
    pixels = torch.randn(2, 3, size, size)
    with torch.no_grad():
        features = backbone.encoder(pixels)
        whole = reference.get_image_features(pixels) if backbone.text else reference(pixels)
    assert torch.allclose(features, whole.pooler_output.flatten(1), atol=1e-5)
    assert features.shape == (2, backbone.output_dim)

    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 80, 3), dtype=np.uint8))
    image = image.resize((640, 800), Image.Resampling.BICUBIC)  # smooth: the two libraries' filters then agree
    theirs = AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"][0]
    ours = prepare(image, backbone.pixels)
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().mean() < 0.02


@pytest.mark.parametrize("name", WITH_TEXT)
def test_the_libraries_own_text_features(spec_of, name):
    spec = spec_of(name)
    folder = spec.partition(":")[2]
    backbone = load_backbone(spec)
    with torch.no_grad():
        features = backbone.text(TEXTS)
        if name.startswith("open_clip"):
            reference = open_clip.create_model(f"local-dir:{folder}").eval()
            tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
            expected = reference.encode_text(tokenizer(TEXTS))
            pixels = torch.randn(2, 3, backbone.pixels.size, backbone.pixels.size)
            assert torch.allclose(backbone.encoder.eval()(pixels), reference.encode_image(pixels), atol=1e-5)
        elif name.endswith("siglip"):
            tokens = word_tokenizer()(TEXTS, padding="max_length", max_length=16)
            expected = AutoModel.from_pretrained(folder).get_text_features(torch.tensor(tokens["input_ids"]))
        else:
            expected = AutoModel.from_pretrained(folder).get_text_features(open_clip.tokenize(TEXTS))
    expected = getattr(expected, "pooler_output", expected)
    assert torch.allclose(features, expected, atol=1e-5)
    assert (features[0] - features[1]).norm() > 1e-3


def test_tokenizers_with_habits_of_their_own(spec_of):
    """SigLIP's drops full stops and capitals, which every prompt ends with; SigLIP 2's has a start that is not used."""
    tower = load_backbone(spec_of("open_clip:open_clip_siglip")).text
    assert tower.token_ids("An age of 7.") == [WORDS.index(word) for word in ("an", "age", "of", "7")]
    assert tower.full_stop == WORDS.index(".")
    assert (tower.start_token, tower.end_token, tower.padding_token) == (None, 1, 0)
    assert tokenization.start_token(word_tokenizer(bos_token="a")) is None
    model = built(spec_of("open_clip:open_clip_siglip"))
    assert torch.equal(model.head.learner.special[1], tower.token_embedding.weight[WORDS.index(".")])


def test_prompts_through_transformers_clip_are_packed(spec_of):
    """All ranks in rows of a few tokens each, exactly as one by one at full length."""
    tower = load_backbone(spec_of("hf:hf_clip")).text
    prompts = tower.prompts([f"an age of {number} ." for number in range(40)])
    widths = []
    tower.blocks.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["inputs_embeds"].shape[:2]), with_kwargs=True
    )
    packed = tower(prompts)
    assert torch.allclose(packed, tower.encode_plain(prompts), atol=1e-5)
    assert sum(rows * length for rows, length in widths[:-1]) < 40 * 77 / 10
    assert widths[-1] == (40, 77)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *[
            (name, 48)
            for name in FAMILIES
            if not name.startswith("e4e") and ("siglip" not in name or name.startswith("hf"))
        ],
        ("open_clip:open_clip_siglip", 96),
        pytest.param("timm:swin_tiny_patch4_window7_224", 112, marks=pytest.mark.slow),
    ],
)
def test_another_input_size(spec_of, tmp_path, name, size):
    """Features are those of the library's own tower, its position embeddings interpolated by hand; both come back."""
    spec = spec_of(name)
    model = built(spec, image_size=size)
    assert model.config.pixel_spec.size == size
    coarse = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    pixels = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic")
    with torch.no_grad():
        features, expected = model.encoder(pixels), at_another_size(name, spec, model, size)(pixels)
    assert torch.allclose(features, expected, atol=1e-4 * expected.abs().max().item())
    assert torch.pdist(features).min() > 1e-2 * features.norm(dim=1).mean()  # of other pictures other features
    model.save_pretrained(tmp_path)
    loaded = OrdinalModel.from_pretrained(tmp_path)
    assert torch.allclose(loaded.encoder(pixels), features, atol=1e-5)
    assert torch.allclose(loaded(pixels).logits, model(pixels).logits, atol=1e-4)


def at_another_size(name, spec, model, size):
    """Pixels -> features, without our own way to another input size."""
    if name.startswith("hf"):
        folder = spec.partition(":")[2]
        weights, config = AutoModel.from_pretrained(folder).state_dict(), AutoConfig.from_pretrained(folder)
        for part in (config, getattr(config, "vision_config", config)):
            if hasattr(part, "image_size"):
                part.image_size = size
        for key in [key for key in weights if "position_embedding" in key and "text" not in key]:
            weights[key] = interpolated(weights[key], size // 16, smooth=False)
        reference = AutoModel.from_config(config).eval()
        reference.load_state_dict(weights)
        call = reference.get_image_features if hasattr(reference, "get_image_features") else reference
        return lambda pixels: call(pixels).pooler_output.flatten(1)
    if name.startswith("timm"):  # random weights; the size is timm's own option
        reference = timm.create_model(name.partition(":")[2], num_classes=0, img_size=size).eval()
        reference.load_state_dict(model.encoder.tower.state_dict())
        return reference
    reference = load_backbone(spec).encoder.eval()
    trunk = getattr(reference, "trunk", None)
    if trunk is None:
        reference.positional_embedding = torch.nn.Parameter(
            interpolated(reference.positional_embedding, size // 16, True)
        )
    else:
        trunk.patch_embed.strict_img_size, trunk.patch_embed.grid_size = False, (size // 16,) * 2
        trunk.pos_embed = torch.nn.Parameter(interpolated(trunk.pos_embed, size // 16, True))
    return reference


def test_interpolated_position_embeddings_keep_their_grid(spec_of):
    """A picture's first token stays, the grid keeps its mean, and the text tower is not touched."""
    own, larger = (load_backbone(spec_of("open_clip:open_clip_vit"), image_size=size) for size in (None, 64))
    embeddings = own.encoder.positional_embedding, larger.encoder.positional_embedding
    assert [len(embedding) for embedding in embeddings] == [1 + 4, 1 + 16]
    assert torch.equal(embeddings[0][0], embeddings[1][0])
    assert torch.allclose(embeddings[0][1:].mean(0), embeddings[1][1:].mean(0), atol=1e-5)
    assert torch.equal(own.text(TEXTS), larger.text(TEXTS))


def test_open_clip_with_a_text_tower_of_another_make(spec_of, tmp_path, caplog):
    """One whose make is not known: the image tower alone, with a word about it, at any size, back without the hub."""
    folder = shutil.copytree(spec_of("open_clip:open_clip_custom").partition(":")[2], tmp_path / "roberta")
    content = json.loads((folder / "open_clip_config.json").read_text())
    content["model_cfg"]["text_cfg"] = {"hf_model_name": "nobody/roberta", "hf_tokenizer_name": "nobody/roberta"}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    backbone = load_backbone(f"open_clip:{folder}")
    assert backbone.text is None
    assert "image tower only: the text tower's configuration, nobody/roberta, is not to be had" in caplog.text
    pixels = torch.randn(1, 3, 32, 32)
    whole = load_backbone(spec_of("open_clip:open_clip_custom"))
    assert torch.equal(backbone.encoder.eval()(pixels), whole.encoder.eval()(pixels))
    model = built(f"open_clip:{folder}", method="l1", image_size=48)
    model.save_pretrained(tmp_path / "saved", form="trainable")
    loaded = OrdinalModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded.encoder(torch.ones(1, 3, 48, 48)), model.encoder(torch.ones(1, 3, 48, 48)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("encoder.latlayer1.bias"), r"pair\.pt: latlayer1\.bias is missing"),
        (lambda s: s.update({"encoder.more": torch.zeros(1)}), r"pair\.pt: more is not of this model"),
        (lambda s: s.pop("decoder.to_rgbs.0.bias"), r"pair\.pt: to_rgbs\.0\.bias is missing"),
        (lambda s: s.update({"decoder.more": torch.zeros(1)}), r"pair\.pt: more is not of this model"),
    ],
)
def test_checkpoints_of_e4e_that_do_not_fit(tmp_path, change, message):
    content = latent_pair()
    change(content["state_dict"])
    torch.save(content, tmp_path / "pair.pt")
    with pytest.raises(ValueError, match=message):
        load_backbone(f"e4e:{tmp_path / 'pair.pt'}")


def part(state, prefix):
    return {name: tensor for name, tensor in state.items() if name.startswith(prefix)}


def test_the_encoder_of_another_generator(tmp_path):
    """In one file: of other rows, or of another width."""
    own = latent_pair()
    for other, given in ((latent_pair(64), "10 rows of 12"), (latent_pair(style_dim=16), "8 rows of 16")):
        state = part(other["state_dict"], "encoder.") | part(own["state_dict"], "decoder.")
        mean = torch.zeros(state["encoder.styles.0.linear.weight"].shape[0])
        torch.save({**own, "state_dict": state, "latent_avg": mean}, tmp_path / "pair.pt")
        with pytest.raises(
            ValueError, match=rf"pair\.pt: .*gives codes of {given}, the generator in the same file takes 8 of 12"
        ):
            load_backbone(f"e4e:{tmp_path / 'pair.pt'}")


def test_latent_encoders_take_pictures_of_their_size_alone(spec_of):
    spec = spec_of("e4e:e4e_pair")
    assert load_backbone(spec, image_size=32).pixels.size == 32
    with pytest.raises(
        ValueError, match=r"e4e_pair: its encoder takes pictures of 32 px alone, model\.image_size is 64"
    ):
        load_backbone(spec, image_size=64)


def test_coca_is_refused():
    with pytest.raises(ValueError, match="open_clip:coca_ViT-B-32 is a CoCa"):
        load_backbone("open_clip:coca_ViT-B-32")


def test_a_size_that_a_tower_cannot_take(tmp_path):
    config = {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 176, "timm_model_name": "resnet10t", "timm_pool": "abs_attn", "timm_proj": ""},
        "text_cfg": {"context_length": 8, "vocab_size": 16, "width": 32, "heads": 2, "layers": 1},
    }
    (tmp_path / "bound.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "bound.json")
    assert load_backbone("open_clip:bound").pixels.size == 176
    with pytest.raises(ValueError, match=r"timm tower .* is bound to its input size .* got 96"):
        load_backbone("open_clip:bound", image_size=96)


def test_parameters_that_no_feature_depends_on_are_frozen(spec_of, tmp_path):
    encoder = load_backbone(spec_of("hf:hf_dinov2")).encoder
    frozen = [name for name, parameter in encoder.named_parameters() if not parameter.requires_grad]
    assert frozen == ["model.embeddings.mask_token"]
    torch.save(latent_pair(16), tmp_path / "pair.pt")
    tower = load_backbone(f"e4e:{tmp_path / 'pair.pt'}").encoder
    frozen = [name for name, parameter in tower.named_parameters() if not parameter.requires_grad]
    assert frozen == ["encoder.latlayer2.weight", "encoder.latlayer2.bias"]
    tower(torch.randn(1, 3, 32, 32)).sum().backward()
    assert all((p.grad is None) == (name in frozen) for name, p in tower.named_parameters())
    noises = use_sample_noise(encoder, seed=1)
    assert {noise.whole_sample for noise in noises if noise.p} == {True, False}
    assert not inexact_dropout(encoder)


def test_dropout_inside_attention_is_reported(spec_of, tmp_path):
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=32,
        attention_probs_dropout_prob=0.1,
    )  # fmt: skip
    transformers.ViTModel(config).save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    assert inexact_dropout(load_backbone(f"hf:{tmp_path}").encoder)


def test_a_pooler_without_weights_is_not_used(spec_of, tmp_path):
    """The file of a classifier holds no pooler: the class token is the feature, not a random layer on it."""
    shutil.copytree(spec_of("hf:hf_vit").partition(":")[2], tmp_path / "vit")
    config = transformers.ViTConfig.from_pretrained(tmp_path / "vit", num_labels=3)
    classifier = transformers.ViTForImageClassification(config).eval()
    classifier.save_pretrained(tmp_path / "vit")
    model = built(f"hf:{tmp_path / 'vit'}")
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features = model.encoder(pixels)
        assert torch.allclose(classifier.classifier(features), classifier(pixels).logits, atol=1e-5)
    model.save_pretrained(tmp_path / "saved", form="trainable")
    assert torch.equal(OrdinalModel.from_pretrained(tmp_path / "saved").encoder(pixels), features)


def test_statistics_and_resize_rules(spec_of):
    pixels = load_backbone(spec_of("hf:hf_dinov2")).pixels
    assert (pixels.size, pixels.resize, pixels.crop_ratio) == (32, "shortest", 36 / 32)
    pixels = load_backbone(spec_of("open_clip:open_clip_siglip")).pixels
    assert (pixels.size, pixels.mean, pixels.resize) == (160, (0.5, 0.5, 0.5), "squash")
    pixels = load_backbone("open_clip:ViT-B-16-SigLIP", load_weights=False, with_text=False).pixels
    assert (pixels.size, pixels.mean, pixels.resize) == (224, (0.5, 0.5, 0.5), "squash")
    pixels = load_backbone("timm:test_resnet").pixels
    assert pixels.crop_ratio == 1 / timm.get_pretrained_cfg("test_resnet").crop_pct


def test_a_missing_tokenizer_is_named(spec_of, tmp_path):
    folder = tmp_path / "siglip"
    shutil.copytree(spec_of("hf:hf_siglip").partition(":")[2], folder)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match=f"hf:{folder}: no tokenizer could be loaded from {folder}"):
        OrdinalModel.build(f"hf:{folder}", RANKS)
    OrdinalModel.build(f"hf:{folder}", RANKS, "l1")  # no text, no tokenizer
    model = OrdinalModel.build(spec_of("hf:hf_siglip"), RANKS)
    model.save_pretrained(tmp_path / "saved", form="trainable")
    shutil.rmtree(tmp_path / "saved" / "tokenizer")
    with pytest.raises(ValueError, match=r"no tokenizer could be loaded from .*saved/tokenizer"):
        OrdinalModel.from_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"restore the model with OrdinalModel\.from_pretrained"):
        OrdinalModel(model.config)
    with pytest.raises(ValueError, match="SigLIP has no common vocabulary"):
        TextTower.from_transformers(AutoModel.from_pretrained(spec_of("hf:hf_siglip").partition(":")[2]))


def test_a_clip_without_tokenizer_files_takes_the_common_one(spec_of, tmp_path):
    spec = spec_of("hf:hf_clip")
    folder = shutil.copytree(spec.partition(":")[2], tmp_path / "clip")
    for file in folder.glob("*token*"):
        file.unlink()
    own, common = load_backbone(spec), load_backbone(f"hf:{folder}")
    assert (own.architecture["tokenizer"], common.architecture["tokenizer"]) == ("files", "clip")
    for text in ("The person is 42 years old.", "a photo of a café, aged 7", ""):
        assert own.text.token_ids(text) == common.text.token_ids(text)
    for tower in (own.text, common.text):
        assert (tower.start_token, tower.end_token, tower.full_stop) == (49406, 49407, 269)
    assert torch.equal(own.text(TEXTS), common.text(TEXTS))


def test_zero_shot_comes_back_with_its_tokenizer(spec_of, tmp_path):
    head = {"templates": ["an age of {name}."]}
    model = OrdinalModel.build(spec_of("hf:hf_siglip"), RANKS, "zero_shot", head)
    model.save_pretrained(tmp_path, form="trainable")
    loaded = OrdinalModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.head.prototypes, model.head.prototypes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: transformers.Siglip2Config(), "NaFlex"),
        (lambda: transformers.GPT2Config(), "is a 'gpt2'; supported are CLIP, SigLIP"),
        (lambda: transformers.CLIPSegConfig(), "is a 'clipseg'; supported are CLIP, SigLIP"),
        (lambda: transformers.ViTMAEConfig(), "hides patches at random"),
        (lambda: transformers.ViTConfig(), "no image processor there"),
    ],
)
def test_transformers_models_that_cannot_serve(tmp_path, make, message):
    make().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_backbone(f"hf:{tmp_path}")


def test_maps_with_channels_last_are_refused(tmp_path):
    """The mean over a place's row and its channels would be features without a word."""
    small = {"hidden_size": 8, "num_attention_heads": 1, "image_size": [64, 64], "blocks_per_stage": [1, 1, 1, 1]}
    widths = {"embed_dim_per_stage": [8, 16, 32, 64], "num_attention_heads_per_stage": [1, 1, 1, 1]}
    config = transformers.Sam2HieraDetConfig(**small, **widths, global_attention_blocks=[])
    transformers.Sam2HieraDetModel(config).save_pretrained(tmp_path / "sam2")
    transformers.ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "sam2")
    with pytest.raises(
        ValueError, match=r"sam2 cannot encode pictures of 64 x 64 .*gives a map \(1, 2, 2, 64\): which"
    ):
        load_backbone(f"hf:{tmp_path / 'sam2'}")


def test_image_processors_that_cannot_be_followed(spec_of, tmp_path):
    shutil.copytree(spec_of("hf:hf_vit").partition(":")[2], tmp_path / "vit")
    for options, message in (
        ({"size": {"height": 32, "width": 64}}, "is no rule that can be followed"),
        ({"size": {"height": 32, "width": 32}, "rescale_factor": 1 / 127.5}, "rescaled by 1 / 255"),
    ):
        transformers.ViTImageProcessor(**options).save_pretrained(tmp_path / "vit")
        with pytest.raises(ValueError, match=message):
            load_backbone(f"hf:{tmp_path / 'vit'}")


def test_names_that_do_not_exist(spec_of, tmp_path):
    spec = spec_of("hf:hf_vit")
    with pytest.raises(ValueError, match=r"neither a model's folder nor on the hub .*nearest: .*hf_vit"):
        load_backbone(spec + "s")
    with pytest.raises(ValueError, match=r"holds no open_clip_config\.json"):
        load_backbone(f"open_clip:{tmp_path}")
    folder = shutil.copytree(spec_of("open_clip:open_clip_vit").partition(":")[2], tmp_path / "empty")
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds none of open_clip_model\.safetensors"):
        load_backbone(f"open_clip:{folder}")


def test_local_weights_of_timm(tmp_path):
    """A file of a classifier, as torch saves it: the tower takes it without the classifier."""
    torch.manual_seed(3)
    classifier = timm.create_model("test_resnet").eval()
    torch.save(classifier.state_dict(), tmp_path / "weights.pth")
    encoder = load_backbone(f"timm:test_resnet/{tmp_path / 'weights.pth'}").encoder.eval()
    pixels = torch.randn(1, 3, 64, 64)
    assert torch.allclose(encoder(pixels), classifier.forward_head(classifier.forward_features(pixels), True))
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match=r"wrong\.pth: the weights do not fit the model: .*Missing"):
        load_backbone(f"timm:test_resnet/{tmp_path / 'wrong.pth'}")


RUNS = """
import json, sys
from accelerate import Accelerator, PartialState
from ordinalclip.config import load_config
from ordinalclip.training import train
Accelerator.end_training = lambda self: None  # one group for all: a second one would find the first one's addresses
for overrides in json.loads(sys.argv[1]):
    train(load_config(None, overrides), quiet=True)
PartialState().destroy_process_group()
"""


def train_on_two_processes(folder, runs):
    """torchrun with gloo, one launch for all runs, each a list of overrides."""
    (folder / "runs.py").write_text(RUNS)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += [str(folder / "runs.py"), json.dumps(runs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=560, check=False)
    assert done.returncode == 0, done.stderr[-9000:]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_train_every_family_as_one(spec_of, tmp_path):
    """The losses of every step agree with those of one process."""
    names = [*FAMILIES, "timm:test_resnet"]

    def overrides(name, folder):
        text = "" if name in WITH_TEXT else "tiny"
        options = [f"output_dir={tmp_path}/{folder}/{name.partition(':')[2]}", f"model.backbone={spec_of(name)}"]
        options += [f"model.text='{text}'", "ranks.low=0", "ranks.high=100", "ranks.num=11", "train.precision=float64"]
        options += ["data.num_train=8", "data.num_validation=4", "data.num_test=4", "train.max_steps=3"]
        options += ["evaluation.report=false"]
        return [*options, "train.batch_size=4", "train.lr=1e-3", "data.augment.flip=true", "model.dropout=0.1"]

    train_on_two_processes(tmp_path, [overrides(name, "two") for name in names])
    for name in names:
        losses = []
        for folder in ("one", "two"):
            if folder == "one":
                train(load_config(None, overrides(name, folder)), quiet=True)
            log = tmp_path / folder / name.partition(":")[2] / "log.jsonl"
            losses.append(np.array([json.loads(line)["loss"] for line in log.read_text().splitlines()]))
        assert len(losses[0]) == 3
        assert np.abs(losses[1] / losses[0] - 1).max() < 1e-8, name


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["open_clip:RN50", "open_clip:ViT-B-16", "timm:vgg16"])
def test_full_size(spec, tmp_path):
    """Random weights, one step of training, and back from the disk."""
    model = OrdinalModel.build(spec, Ranks.linear(16, 77, 62), text="tiny" if spec.startswith("timm") else "")
    pixels = torch.randn(2, 3, 224, 224)
    model.train()(pixels, torch.tensor([20.0, 60.0])).loss.backward()
    assert all(p.grad is not None for p in model.encoder.parameters())
    expected = model.eval()(pixels)
    model.save_pretrained(tmp_path)
    loaded = OrdinalModel.from_pretrained(tmp_path)
    assert torch.allclose(loaded(pixels).probabilities, expected.probabilities, atol=1e-5)
