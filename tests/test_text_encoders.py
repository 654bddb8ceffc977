"""Text encoders of transformers as frozen towers: the libraries' own answers, gradients, saving, serving, processes."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
import transformers
from families import _save_open_clip, _spread
from PIL import Image
from safetensors.torch import load_file, save_file
from test_families import train_on_two_processes
from text_families import KINDS, NLLB, POOLING, SINGLE, SIZES, STARTS, WHOLE, clip_with, differences, make, tokenizer
from transformers import AutoModel, AutoModelForTextEncoding, pipeline

from ordinalclip import OrdinalModel, Ranks
from ordinalclip.backbones import load_backbone
from ordinalclip.backbones.hf_text import ENCODERS, published_pooling
from ordinalclip.config import load_config
from ordinalclip.images import prepare
from ordinalclip.prompts import PromptLearner
from ordinalclip.text_encoders import EncoderTower, longest_text
from ordinalclip.training import train
from ordinalclip.training.preparation import build_model

RANKS = Ranks(tuple(range(10)), names=(*map(str, range(9)), "a photo of 9"))  # names of one token and of four
QUICK = ("bert", "m2m_100", "modernbert", "mpnet", "t5")  # one of each way to have positions
TEXTS = ["an age of 7 .", "a photo of an age of 3 .", "9 .", "age 9 ."]


@pytest.fixture(scope="module")
def specs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    return {kind: make(kind, folder / kind) for kind in KINDS}


def pooled(kind, folder, texts):
    """transformers' own way: ids, padding and its mask."""
    words, load = transformers.AutoTokenizer.from_pretrained(folder), WHOLE.get(kind, AutoModelForTextEncoding)
    try:
        model = load.from_pretrained(folder).eval()
    except ValueError:  # no such class of its own
        model = AutoModel.from_pretrained(folder).eval()
    model = model.get_encoder() if kind in WHOLE else model
    batch = words(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    mask = batch["attention_mask"][..., None]
    if POOLING.get(kind) == "cls":
        return hidden[:, 0]
    if POOLING.get(kind) == "max":
        return hidden.masked_fill(mask == 0, -torch.inf).amax(dim=1)
    return (hidden * mask).sum(dim=1) / mask.sum(dim=1)


def test_every_encoder_that_is_taken_is_tested():
    assert sorted(ENCODERS) == sorted(KINDS) == list(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_without_padding_give_what_ids_with_padding_give(specs, kind, caplog):
    tower = load_backbone(specs[kind]).text
    expected = pooled(kind, specs[kind].partition(":")[2], TEXTS)
    with torch.no_grad():
        features = tower(TEXTS)
        assert torch.allclose(features, expected, atol=1e-6 * expected.abs().max().item() + 1e-6)
        assert torch.allclose(tower(TEXTS[::-1]).flip(0), features, atol=1e-6)
        assert torch.pdist(features).min() > 1e-3
    assert ("the mean is taken; model.text_pooling says otherwise" in caplog.text) == (kind not in POOLING)
    assert features.shape == (4, tower.output_dim)
    start = 0 if STARTS.get(kind, "") is not None else None
    assert (tower.start_token, tower.end_token, tower.padding_token) == (start, 2, 1)
    assert tower.context_length <= 64
    with pytest.raises(
        ValueError, match=rf"a prompt has {tower.context_length + 1 + (start == 0)} tokens; this text tower takes"
    ):
        tower(["age " * tower.context_length])


@pytest.mark.parametrize(("kind", "own"), [("bert", 512), ("roberta", 64), ("mpnet", 64), ("m2m_100", 64), ("t5", 512)])
def test_the_longest_text_is_as_long_as_there_are_positions(specs, kind, own):
    """Where the tokenizer sets no limit; RoBERTa's table has two rows more, which no text uses."""
    tower = load_backbone(specs[kind]).text
    assert longest_text(tower.model, SimpleNamespace(model_max_length=10**30)) == own
    ids = torch.full((1, own), 5)
    with torch.no_grad():
        expected = tower.model(input_ids=ids).last_hidden_state
        assert torch.allclose(tower.model(inputs_embeds=tower.embed(ids)).last_hidden_state, expected, atol=1e-5)
        if tower.model.config.model_type in ("roberta", "mpnet"):
            with pytest.raises((IndexError, RuntimeError), match=r"out of (bounds|range)"):
                tower.model(input_ids=torch.full((1, own + 1), 5))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_context_and_ranks(specs, kind):
    """As finite differences have them; the tower itself learns nothing."""
    tower = load_backbone(specs[kind]).text.double()
    torch.manual_seed(3)
    learner = PromptLearner(tower, RANKS, context="an age of", num_base_ranks=3, init_from_names=True).double()
    direction = torch.randn(len(RANKS), tower.output_dim, dtype=torch.float64)

    def value():
        return (tower(learner()) * direction).sum()

    value().backward()
    assert not [name for name, parameter in tower.named_parameters() if parameter.requires_grad]
    tower.activation_checkpointing = True
    gradients = [parameter.grad.clone() for parameter in (learner.context, learner.rank_embeddings)]
    learner.zero_grad()
    value().backward()
    for parameter, gradient in zip((learner.context, learner.rank_embeddings), gradients, strict=True):
        assert torch.allclose(parameter.grad, gradient)
        assert gradient.abs().sum() > 0
        slope = differences(value, parameter, int(gradient.abs().argmax()))
        assert gradient.abs().max() == pytest.approx(abs(slope), rel=5e-3 if kind in SINGLE else 1e-7)


def test_prompts_go_in_at_their_own_length(specs):
    """Ten ranks, one of which has a longer name: two calls, no padding, some eight tokens a prompt."""
    tower = load_backbone(specs["bert"]).text
    seen = []
    tower.model.register_forward_pre_hook(
        lambda model, args, options: seen.append(tuple(options["inputs_embeds"].shape)), with_kwargs=True
    )
    tower(PromptLearner(tower, RANKS, context="an age of", init_from_names=True)())
    assert seen == [(9, 7, 32), (1, 10, 32)]  # [CLS] an age of NAME . [SEP]


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_saved_models_come_back_offline(specs, tmp_path, kind):
    folder = shutil.copytree(specs[kind].partition(":")[2], tmp_path / kind)
    torch.manual_seed(1)
    head = {"prompt": "an age of", "init_from_names": True, "num_base_ranks": 3}
    model = OrdinalModel.build("timm:test_resnet", RANKS, head=head, text=f"hf:{folder}").eval()
    size = model.config.pixel_spec.size
    pixels, labels = torch.randn(3, 3, size, size), torch.tensor([1.0, 5.0, 8.0])
    before = model(pixels, labels)
    for form in ("deployed", "trainable"):
        model.save_pretrained(tmp_path / form, form=form)
    shutil.rmtree(folder)
    trainable, deployed = (OrdinalModel.from_pretrained(tmp_path / form) for form in ("trainable", "deployed"))
    assert torch.equal(trainable(pixels, labels).loss, before.loss)
    assert torch.allclose(deployed(pixels).probabilities, before.probabilities, atol=1e-5)
    assert not [key for key in deployed.state_dict() if "text" in key]
    assert trainable.head.text.token_ids("an age") == model.head.text.token_ids("an age")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8))
    answer = pipeline("image-ordinal-regression", model=str(tmp_path / "deployed"))(image)
    assert answer["value"] == deployed.predict(prepare(image, model.config.pixel_spec)[None]).value.item()


@pytest.mark.parametrize(
    ("text", "options"),
    [
        # the layout of BiomedCLIP: a BERT read at its class token, a projection of two layers, a timm ViT
        ("bert", {}),
        ("bert", {"hf_pooler_type": "cls_pooler", "hf_proj_type": "linear"}),
        ("xlm-roberta", {"hf_pooler_type": "mean_pooler"}),  # that of the multilingual CLIPs
    ],
)
def test_clips_of_open_clip_with_such_a_tower(tmp_path, text, options):
    """Its own features, trained prompts, saving and serving after the folders are gone."""
    reference = clip_with(tmp_path / f"clip-{text}", text, **options)
    backbone = load_backbone(f"open_clip:{tmp_path / f'clip-{text}'}")
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / text)
    with torch.no_grad():
        expected = reference.encode_text(
            words(TEXTS, padding="max_length", max_length=48, return_tensors="pt")["input_ids"]
        )
        features = backbone.text(TEXTS)
        assert torch.allclose(features, expected, atol=1e-5)
        assert torch.pdist(features).min() > 1e-3
        pixels = torch.randn(2, 3, 160, 160)
        assert torch.allclose(backbone.encoder.eval()(pixels), reference.encode_image(pixels), atol=1e-5)
    assert backbone.text.context_length == 48
    torch.manual_seed(1)
    model = OrdinalModel.build(f"open_clip:{tmp_path / f'clip-{text}'}", RANKS, head={"prompt": "an age of"}).eval()
    loss = model(pixels, torch.tensor([1.0, 8.0])).loss
    loss.backward()
    assert model.head.learner.context.grad.abs().sum() > 0
    for form in ("deployed", "trainable"):
        model.save_pretrained(tmp_path / form, form=form)
    shutil.rmtree(tmp_path / text)
    shutil.rmtree(tmp_path / f"clip-{text}")
    trainable, deployed = (OrdinalModel.from_pretrained(tmp_path / form) for form in ("trainable", "deployed"))
    assert torch.equal(trainable(pixels, torch.tensor([1.0, 8.0])).loss, loss)
    assert torch.allclose(deployed(pixels).probabilities, model(pixels).probabilities, atol=1e-5)


def test_weights_that_older_versions_wrote(tmp_path):
    """BiomedCLIP's own file is pickled and has positions that transformers no longer keeps."""
    clip_with(tmp_path / "clip", "bert")
    expected = load_backbone(f"open_clip:{tmp_path / 'clip'}").text(TEXTS)
    state = load_file(tmp_path / "clip/open_clip_model.safetensors")
    state["text.transformer.embeddings.position_ids"] = torch.arange(512)[None]
    torch.save(state, tmp_path / "clip/open_clip_pytorch_model.bin")
    (tmp_path / "clip/open_clip_model.safetensors").unlink()
    assert torch.equal(load_backbone(f"open_clip:{tmp_path / 'clip'}").text(TEXTS), expected)


LISTED = [name for name in open_clip.list_models() if "hf_model_name" in open_clip.get_model_config(name)["text_cfg"]]
TYPES = {"google/mt5": "mt5", "facebook/nllb": "m2m_100", "roberta": "roberta", "xlm-roberta": "xlm-roberta"}


def listed_kind(name):
    """The type of a listed model's text tower; None: a CoCa."""
    config = open_clip.get_model_config(name)
    own = config["text_cfg"]["hf_model_name"]
    return None if "multimodal_cfg" in config else next(TYPES[start] for start in TYPES if own.startswith(start))


@pytest.mark.parametrize("name", LISTED)
def test_the_text_towers_that_open_clip_lists(tmp_path, monkeypatch, name):
    """Small ones of the same classes, their pooling and their projection, against what open_clip makes of ids."""
    if listed_kind(name) is None:
        with pytest.raises(ValueError, match="is a CoCa"):
            load_backbone(f"open_clip:{name}")
        return
    options = open_clip.get_model_config(name)["text_cfg"]
    monkeypatch.chdir(tmp_path)  # where the folder has the hub's name
    reference = clip_with(tmp_path / f"small-{name}", listed_kind(name), **options)
    ids = open_clip.tokenizer.HFTokenizer(options["hf_tokenizer_name"], 48)(TEXTS)
    with torch.no_grad():
        expected = reference.encode_text(ids)
        features = load_backbone(f"open_clip:{tmp_path / f'small-{name}'}").text(TEXTS)
    assert torch.pdist(features).min() > 1e-3
    assert torch.allclose(features, expected, atol=2e-6 * expected.abs().max().item())


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LISTED if "base" in name or name.startswith("roberta")])
def test_listed_names_are_specs(tmp_path, monkeypatch, name):
    """The name itself, image tower of full size, with a small encoder in the place of the hub's."""
    options = open_clip.get_model_config(name)["text_cfg"]
    monkeypatch.chdir(tmp_path)
    make(listed_kind(name), Path(options["hf_model_name"]))
    torch.manual_seed(0)
    reference = open_clip.create_model(name)
    _spread(reference.text)
    torch.save(reference.state_dict(), "weights.pt")
    backbone = load_backbone(f"open_clip:{name}/weights.pt")
    with torch.no_grad():
        expected = reference.encode_text(open_clip.get_tokenizer(name)(TEXTS))
        assert torch.allclose(backbone.text(TEXTS), expected, atol=2e-6 * expected.abs().max().item())
    assert load_backbone(f"open_clip:{name}").text(TEXTS).shape == expected.shape


BERT_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "an", "age", "of", *map(str, range(10))]
CHARACTERS = [
    "<s>",
    "<pad>",
    "</s>",
    "<unk>",
    "\u2581",
    *"abcdefghijklmnopqrstuvwxyz.0123456789",
    "eng_Latn",
    "fra_Latn",
]


def nllb_tokenizer(**options):
    vocabulary = {word: number for number, word in enumerate(CHARACTERS)}
    return transformers.NllbTokenizer(vocabulary, [], extra_special_tokens=["eng_Latn", "fra_Latn"], **options)


@pytest.fixture
def nllb(monkeypatch):
    """NLLB of a vocabulary that the characters have room in."""
    monkeypatch.setitem(KINDS, "m2m_100", {**NLLB, "vocab_size": len(CHARACTERS)})


def test_the_language_of_a_tokenizer_begins_the_prompts(tmp_path, nllb):
    """NLLB's, set by open_clip's `language`; it comes back with the model."""
    options = {"tokenizer_kwargs": {"language": "fra_Latn"}, "hf_pooler_type": "cls_pooler"}
    reference = clip_with(tmp_path / "clip", "m2m_100", nllb_tokenizer(), **options)
    tower = load_backbone(f"open_clip:{tmp_path / 'clip'}").text
    assert tower.start_token == CHARACTERS.index("fra_Latn")
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "m2m_100", src_lang="fra_Latn")
    ids = words(TEXTS, padding="max_length", max_length=48, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = reference.encode_text(ids)
        assert torch.allclose(tower(TEXTS), expected, atol=2e-6 * expected.abs().max().item())
    model = OrdinalModel.build(f"open_clip:{tmp_path / 'clip'}", RANKS, head={"prompt": "an age of"})
    model.save_pretrained(tmp_path / "saved", form="trainable")
    restored = OrdinalModel.from_pretrained(tmp_path / "saved").head.text
    assert restored.start_token == tower.start_token
    assert torch.equal(restored(TEXTS), tower(TEXTS))


@pytest.mark.parametrize(
    ("text", "words", "options", "message"),
    [
        (
            "m2m_100",
            lambda: nllb_tokenizer(legacy_behaviour=True),  # the language after the end
            {},
            "begins '.' with 4, 31, 2, 42, 1; prompts are built with at most one token before a text and one after it",
        ),
        ("m2m_100", nllb_tokenizer, {"tokenizer_kwargs": {"language": "french"}}, "language 'french' is no token of"),
        ("roberta", None, {"tokenizer_mode": "clips"}, "begins '.' with 0, 4, 2, 1, 1; prompts"),
        (
            "bert",
            lambda: transformers.BertTokenizer({word: number for number, word in enumerate(BERT_WORDS)}),
            {"tokenizer_kwargs": {"strip_sep_token": True}},
            "masks token 0 as padding, which stands around every text",
        ),
        ("roberta", lambda: tokenizer("<s>", "</s>", padding="</s>"), {}, "masks token 1, its tokenizer pads with 2"),
    ],
)
def test_what_is_put_around_a_text_and_is_not_followed(
    tmp_path, monkeypatch, nllb, caplog, text, words, options, message
):
    monkeypatch.setitem(KINDS, "bert", {"pad_token_id": 0})
    clip_with(tmp_path / "clip", text, words and words(), **options)
    assert load_backbone(f"open_clip:{tmp_path / 'clip'}").text is None
    assert message in caplog.text


def test_a_separator_that_is_replaced_ends_the_prompts(tmp_path):
    """CLIPA's text tower, read at its last position: open_clip's tokenizer puts 0 in the place of [SEP]."""
    text = {"context_length": 16, "vocab_size": 20, "hf_tokenizer_name": "nobody/bert", "no_causal_mask": True}
    text |= {"tokenizer_kwargs": {"strip_sep_token": True}, "pool_type": "last"}
    torch.manual_seed(0)
    _save_open_clip(tmp_path / "clipa", {}, text=text)
    words = transformers.BertTokenizer({word: number for number, word in enumerate(BERT_WORDS)})
    words.save_pretrained(tmp_path / "clipa")
    tower = load_backbone(f"open_clip:{tmp_path / 'clipa'}").text
    reference = open_clip.create_model(f"local-dir:{tmp_path / 'clipa'}").eval()
    ids = open_clip.tokenizer.HFTokenizer(str(tmp_path / "clipa"), 16, strip_sep_token=True)(TEXTS)
    assert (tower.start_token, tower.end_token) == (2, 0)
    with torch.no_grad():
        assert torch.allclose(tower(TEXTS), reference.encode_text(ids), atol=1e-5)


@pytest.mark.parametrize("cased", [False, True])
def test_vocabularies_of_word_pieces(tmp_path, cased):
    """PubMedBERT's without case, BioBERT's with it: what is the same to the tokenizer is so to the tower."""
    pieces = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]", ".", "of", "an", "age", "grade", "Grade", "i", "##i", "I"]
    vocabulary = {word: number for number, word in enumerate([*pieces, "##I"])}
    words = transformers.BertTokenizer(vocabulary, do_lower_case=not cased)
    spec = make("bert", tmp_path / "bert")
    words.save_pretrained(tmp_path / "bert")
    texts = ["an age of Grade II.", "an age of grade ii.", "Grade I.", "age."]
    tower = load_backbone(spec).text
    with torch.no_grad():
        features, expected = tower(texts), pooled("bert", tmp_path / "bert", texts)
    assert torch.allclose(features, expected, atol=1e-6 * expected.abs().max().item() + 1e-6)
    assert torch.equal(features[0], features[1]) != cased
    assert tower.token_ids("Grade II") == [
        vocabulary[word] for word in (("Grade", "I", "##I") if cased else ("grade", "i", "##i"))
    ]
    ranks = Ranks((1, 2, 3), names=("Grade I", "Grade II", "age"))
    learner = PromptLearner(tower, ranks, context="an age of", init_from_names=True)
    with torch.no_grad():
        assert torch.allclose(tower(learner()), tower([f"an age of {name}." for name in ranks.names]), atol=1e-6)


def test_without_the_encoders_configuration_the_image_tower_serves(tmp_path, caplog):
    clip_with(tmp_path / "clip", "bert")
    shutil.rmtree(tmp_path / "bert")
    backbone = load_backbone(f"open_clip:{tmp_path / 'clip'}")
    assert backbone.text is None
    assert f"the text tower's configuration, {tmp_path / 'bert'}, is not to be had" in caplog.text
    with pytest.raises(ValueError, match="OrdinalCLIP needs a text tower"):
        OrdinalModel.build(f"open_clip:{tmp_path / 'clip'}", RANKS)


def test_names_of_the_hub_are_fetched_as_folders(tmp_path, monkeypatch):
    """What is asked of the hub, and what becomes of it; the hub itself is not there."""
    clip_with(tmp_path / "clip", "bert")
    asked = []

    def snapshot(name, allow_patterns):
        asked.append((name, allow_patterns[:2]))
        return str(tmp_path / "clip")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    backbone = load_backbone("open_clip:hf-hub:owner/name")
    assert asked == [("owner/name", ["open_clip_config.json", "open_clip_model.safetensors"])]
    assert torch.equal(backbone.text(TEXTS), load_backbone(f"open_clip:{tmp_path / 'clip'}").text(TEXTS))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="hf-hub:nobody/nothing: its weights can be had neither from the hub"):
        load_backbone("open_clip:hf-hub:nobody/nothing")


def test_notes_of_pooling(specs, tmp_path):
    folder = shutil.copytree(specs["bert"].partition(":")[2], tmp_path / "bert")
    note, modules = folder / "1_Pooling/config.json", folder / "modules.json"
    for content, pooling in (({"pooling_mode": "cls"}, "cls"), ({"pooling_mode": "mean"}, "mean")):
        note.write_text(json.dumps(content))
        assert published_pooling(str(folder)) == pooling
    both = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}
    for content in (both, {"pooling_mode_weightedmean_tokens": True}, {"pooling_mode": "lasttoken"}, {}):
        note.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"1_Pooling/config\.json: pools by .*; followed are pooling_mode_mean"):
            published_pooling(str(folder))
    for kinds, message in (
        (["Transformer", "WordWeights"], "names WordWeights; followed are Transformer, Pooling, Dense, Normalize"),
        (["Transformer", "Dense", "Pooling"], "has Transformer, Dense, Pooling; followed is the order Transformer, Po"),
    ):
        modules.write_text(json.dumps([{"type": f"sentence_transformers.models.{kind}"} for kind in kinds]))
        with pytest.raises(ValueError, match=rf"modules\.json {message}"):
            published_pooling(str(folder))


@pytest.mark.parametrize("pooling", ["mean", "cls", "pooler", "max"])
def test_the_pooling_is_said_where_it_is_not_noted(specs, tmp_path, caplog, pooling):
    """Against transformers; saved with the model; and from a run's configuration."""
    spec, pixels = specs["mpnet"], torch.randn(2, 3, 160, 160)
    folder = spec.partition(":")[2]
    words, reference = transformers.AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        outputs = [reference(**words(text, return_tensors="pt")) for text in TEXTS]
        hidden = [each.last_hidden_state[0] for each in outputs]
        expected = {
            "mean": [each.mean(dim=0) for each in hidden],
            "cls": [each[0] for each in hidden],
            "pooler": [each.pooler_output[0] for each in outputs],
            "max": [each.amax(dim=0) for each in hidden],
        }[pooling]
    options = [f"model.text={spec}", "model.backbone=timm:test_resnet", f"model.text_pooling={pooling}"]
    config = load_config(None, [*options, "head.init_from_names=true"])
    model = build_model(config, RANKS, SimpleNamespace(values=np.arange(10.0)))
    tower = model.head.text
    assert torch.allclose(tower(TEXTS), torch.stack(expected), atol=1e-5)
    assert "text_pooling" not in caplog.text
    model.save_pretrained(tmp_path, form="trainable")
    restored = OrdinalModel.from_pretrained(tmp_path)
    assert restored.config.text_architecture["pooling"] == pooling
    assert torch.equal(restored.head.text(TEXTS), tower(TEXTS))
    assert torch.equal(restored(pixels).probabilities, model(pixels).probabilities)


def test_a_pooling_that_contradicts_what_is_known_is_refused(specs, tmp_path):
    clip_with(tmp_path / "clip", "xlm-roberta", hf_pooler_type="mean_pooler")
    clip = f"open_clip:{tmp_path / 'clip'}"
    for spec, own in ((specs["bert"], "cls"), (clip, "mean")):
        assert torch.equal(load_backbone(spec, text_pooling=own).text(TEXTS), load_backbone(spec).text(TEXTS))
        with pytest.raises(ValueError, match=rf"text_pooling is max, but its text tower is known to pool by {own}"):
            load_backbone(spec, text_pooling="max")
    for backbone, text in (("tiny", ""), ("timm:test_resnet", "tiny"), ("timm:test_resnet", "")):
        with pytest.raises(ValueError, match="it has no text encoder that this could be said of"):
            OrdinalModel.build(backbone, RANKS, text=text, text_pooling="mean")
    assert OrdinalModel.build(clip, RANKS, text=specs["mpnet"], text_pooling="max").head.text.pooling == "max"
    with pytest.raises(ValueError, match=r"model\.text_pooling: .*'mean', 'cls', 'pooler' or 'max'"):
        load_config(None, ["model.text_pooling=average"])
    with pytest.raises(ValueError, match="T5Stack has no pooler"):
        load_backbone(specs["t5"], text_pooling="pooler")
    masked = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, vocab_size=20))
    masked.save_pretrained(tmp_path / "masked")
    tokenizer().save_pretrained(tmp_path / "masked")
    assert load_backbone(f"hf:{tmp_path / 'masked'}").text.pooling == "mean"
    with pytest.raises(ValueError, match="text_pooling is pooler, but the weights hold none"):
        load_backbone(f"hf:{tmp_path / 'masked'}", text_pooling="pooler")


@pytest.mark.parametrize(("kind", "activation", "bias"), [("t5", "Identity", False), ("bert", "Tanh", True)])
def test_dense_layers_after_the_pooling(tmp_path, kind, activation, bias):
    """As sentence-T5 and LaBSE have them; the width of the text features is theirs."""
    spec, dense = make(kind, tmp_path / kind), tmp_path / kind / "2_Dense"
    names = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Dense", "2_Dense"), ("Normalize", "3_Normalize")]
    modules = [{"type": f"sentence_transformers.models.{name}", "path": path} for name, path in names]
    (tmp_path / kind / "modules.json").write_text(json.dumps(modules))
    for folder, content in (
        ("1_Pooling", {"pooling_mode_mean_tokens": True}),
        (
            "2_Dense",
            {"in_features": 32, "out_features": 24, "bias": bias, "activation_function": f"torch.nn.{activation}"},
        ),
    ):
        (tmp_path / kind / folder).mkdir(exist_ok=True)
        (tmp_path / kind / folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"2_Dense holds no model\.safetensors; pickled weights are not read"):
        load_backbone(spec)
    weights = {"linear.weight": torch.randn(24, 32)} | ({"linear.bias": torch.randn(24)} if bias else {})
    save_file(weights, dense / "model.safetensors")
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / kind)
    reference = AutoModelForTextEncoding.from_pretrained(tmp_path / kind).eval()
    with torch.no_grad():
        means = [reference(**words(text, return_tensors="pt")).last_hidden_state[0].mean(dim=0) for text in TEXTS]
        expected = torch.nn.functional.linear(torch.stack(means), weights["linear.weight"], weights.get("linear.bias"))
    expected = expected.tanh() if activation == "Tanh" else expected
    tower = load_backbone(spec).text
    assert torch.allclose(tower(TEXTS), expected, atol=2e-6 * expected.abs().max().item())
    assert tower.output_dim == 24
    OrdinalModel.build("timm:test_resnet", RANKS, text=spec).save_pretrained(tmp_path / "saved", form="trainable")
    shutil.rmtree(tmp_path / kind)
    assert torch.equal(OrdinalModel.from_pretrained(tmp_path / "saved").head.text(TEXTS), tower(TEXTS))


def test_dense_layers_that_cannot_be_followed(specs, tmp_path):
    folder = shutil.copytree(specs["bert"].partition(":")[2], tmp_path / "bert")
    modules = json.loads((folder / "modules.json").read_text())
    modules.insert(2, {"type": "sentence_transformers.models.Dense", "path": "2_Dense"})
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "2_Dense").mkdir()
    sizes = {"in_features": 32, "out_features": 8, "bias": False}
    for content in (
        {},
        {**sizes, "activation_function": "my.Own"},
        {**sizes, "out_features": "8"},
        {**sizes, "in_features": 33},
    ):
        (folder / "2_Dense/config.json").write_text(json.dumps(content))
        with pytest.raises(
            ValueError, match=r"2_Dense/config\.json must name in_features \(32\), out_features and an act"
        ):
            load_backbone(f"hf:{folder}")
    (folder / "2_Dense/config.json").write_text(json.dumps({**sizes, "activation_function": "torch.nn.Tanh"}))
    save_file({"linear.weight": torch.randn(9, 32)}, folder / "2_Dense/model.safetensors")
    with pytest.raises(ValueError, match=r"2_Dense/model\.safetensors: does not fit its config\.json"):
        load_backbone(f"hf:{folder}")


def test_what_no_text_encoder_does(specs, tmp_path):
    with pytest.raises(ValueError, match=r"is a text encoder; it goes into model\.text"):
        OrdinalModel.build(specs["bert"], RANKS)
    backbone = load_backbone(specs["distilbert"])
    for pooling, message in (("pooler", "DistilBertModel has no pooler"), ("sum", "pooling 'sum' is unknown")):
        with pytest.raises(ValueError, match=message):
            EncoderTower(backbone.text.model, pooling, None, backbone.text.tokenizer, 64)
    folder = shutil.copytree(specs["bert"].partition(":")[2], tmp_path / "bert")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no \.safetensors; pickled weights are not read"):
        load_backbone(f"hf:{folder}")
    clip = clip_with(tmp_path / "clip", "roberta")
    with pytest.raises(ValueError, match="has a vocabulary of its own; give a tokenizer"):
        EncoderTower.from_open_clip(clip)
    del clip.text.proj  # as open_clip leaves it with hf_proj_type null
    with pytest.raises(ValueError, match="no projection to the width of its image tower, 16: hf_proj_type must be"):
        EncoderTower.from_open_clip(clip, tokenizer())
    architecture = load_backbone(f"open_clip:{tmp_path / 'clip'}").architecture
    architecture["text_config"]["model_type"] = "camembert"
    with pytest.raises(ValueError, match="open_clip builds no text tower of a 'camembert'; it knows roberta, xlm"):
        load_backbone("open_clip:clip", load_weights=False, architecture=architecture)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_train_prompts_through_every_encoder_as_one(specs, tmp_path):
    clip_with(tmp_path / "clip", "xlm-roberta", hf_pooler_type="mean_pooler")
    names = {**specs, "clip": f"open_clip:{tmp_path / 'clip'}"}

    def overrides(name, folder):
        backbone = names[name] if name == "clip" else "timm:test_resnet"
        options = [f"output_dir={tmp_path}/{folder}/{name}", f"model.backbone={backbone}"]
        options += [f"model.text='{'' if name == 'clip' else names[name]}'", "train.precision=float64"]
        options += [
            "ranks.low=0",
            "ranks.high=100",
            "ranks.num=11",
            "head.init_from_names=true",
            "head.prompt=an age of",
        ]
        options += ["data.num_train=8", "data.num_validation=4", "data.num_test=4", "train.max_steps=3"]
        options += ["evaluation.report=false"]
        return [*options, "train.batch_size=4", "train.lr=1e-3", "data.augment.flip=true", "model.dropout=0.1"]

    train_on_two_processes(tmp_path, [overrides(name, "two") for name in names])
    for name in names:
        train(load_config(None, overrides(name, "one")), quiet=True)
        one, two = (
            np.array([json.loads(line)["loss"] for line in (tmp_path / folder / name / "log.jsonl").open()])
            for folder in ("one", "two")
        )
        assert len(one) == 3
        assert np.abs(two / one - 1).max() < (1e-6 if name in SINGLE else 1e-8), name
