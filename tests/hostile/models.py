"""Models, weights and conversion: files that are damaged, disagree, hold code, or ask for too much."""

import json
import pickle
import shutil
import zipfile
from functools import lru_cache

import torch
from families import latent_pair
from PIL import Image
from safetensors.torch import load_file, save_file

from hostile import case, lasting_folder
from ordinalclip import OrdinalModel, Ranks
from ordinalclip.backbones import TINY_FOLDER, load_backbone

CODE = "open('ran', 'w').close()\n"


@lru_cache
def saved(method="prototypes", **options):
    """A folder with a small random model that answers; made once."""
    torch.manual_seed(0)
    folder = lasting_folder()
    ranks = Ranks.linear(0, 10, 11, unit="points")
    model = OrdinalModel.build("tiny", ranks, method, load_weights=False, label_mean=5, label_std=2, **options)
    if method == "prototypes":
        model.head.prototypes.normal_()
    model.save_pretrained(folder, form="deployed")
    return folder


def predict(folder, method="prototypes", **changes):
    """A picture and a copy of the model, changed; the words of `predict`.

    Args:
        changes: name of a file, with "." written "__" -> function (content) -> content, or new text.
    """
    Image.linear_gradient("L").resize((70, 64)).save(folder / "a.png")
    shutil.copytree(saved(method), folder / "model")
    for name, change in changes.items():
        file = folder / "model" / name.replace("__", ".")
        if callable(change):
            file.write_text(json.dumps(change(json.loads(file.read_text()))))
        else:
            file.write_text(change)
    return ["predict", "a.png", "--model", "model"]


def config(folder, method="prototypes", **values):
    """`predict` with other values in config.json."""
    return predict(folder, method, config__json=lambda content: content | values)


def processor(folder, **values):
    """`predict` with other values in preprocessor_config.json."""
    return predict(folder, preprocessor_config__json=lambda content: content | values)


def weights(folder, change, method="prototypes"):
    """`predict` with other tensors; without the note of the configuration, as an older version wrote them."""
    words = predict(folder, method)
    file = folder / "model" / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    return words


def unsigned(folder, **values):
    """`config` whose weights do not note their configuration, as a hostile folder or an older version."""
    words = weights(folder, lambda tensors: None)
    file = folder / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return words


def nothing_ran(folder):
    assert not (folder / "ran").exists()


class Evil:
    def __reduce__(self):
        return exec, (CODE,)


# ---- a model that is there


@case("a sound model", r"a\.png\t[\d.]+ points\t\(", status=0)
def _(folder):
    return predict(folder)


@case("a model of an earlier version, whose weights note no configuration", r"a\.png\t[\d.]+ points", status=0)
def _(folder):
    return unsigned(folder)


@case("a model folder that is missing", r"^ordinalclip: runs/nothing: no such folder")
def _(folder):
    return [*predict(folder)[:-1], "runs/nothing"]


@case("a model folder that is missing, of three parts", r"^ordinalclip: runs/my/nothing: no such folder$")
def _(folder):
    return [*predict(folder)[:-1], "runs/my/nothing"]


@case("a file in place of a model folder", r"a\.png: a file, and not a folder with a model")
def _(folder):
    return [*predict(folder)[:-1], "a.png"]


@case("a model folder without weights", r"model/model\.safetensors: no such file, so model is no saved model")
def _(folder):
    words = predict(folder)
    (folder / "model/model.safetensors").unlink()
    return words


@case("pickled weights in a model folder", r"no saved model \(pytorch_model\.bin is not read", after=nothing_ran)
def _(folder):
    words = predict(folder)
    (folder / "model/model.safetensors").unlink()
    (folder / "model/pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    return words


@case("a model folder without config.json", r"model/config\.json: no such file")
def _(folder):
    words = predict(folder)
    (folder / "model/config.json").unlink()
    return words


@case("a model folder without preprocessor_config.json", r"model/preprocessor_config\.json: no such file")
def _(folder):
    words = predict(folder)
    (folder / "model/preprocessor_config.json").unlink()
    return words


# ---- files that are damaged


@case("an empty config.json", r"model/config\.json: damaged, not valid JSON")
def _(folder):
    return predict(folder, config__json="")


@case("a config.json that is a list", r"model/config\.json: holds a JSON list, not an object")
def _(folder):
    return predict(folder, config__json="[1, 2]")


@case("a config.json of a million brackets", r"model/config\.json: damaged, not valid JSON")
def _(folder):
    return predict(folder, config__json="[" * 1_000_000)


@case("a config.json without content", r"model/config\.json: model_type is None")
def _(folder):
    return predict(folder, config__json="{}")


@case("a preprocessor_config.json that is no JSON", r"model/preprocessor_config\.json: damaged")
def _(folder):
    return predict(folder, preprocessor_config__json="size: 64")


@case("weights that are cut off", r"model/model\.safetensors: damaged or no safetensors file")
def _(folder):
    words = predict(folder)
    file = folder / "model/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return words


@case("weights that are garbage", r"model/model\.safetensors: damaged or no safetensors file")
def _(folder):
    words = predict(folder)
    (folder / "model/model.safetensors").write_bytes(bytes(range(256)) * 100)
    return words


# ---- weights that mean nothing


@case("a weight that is NaN", r"model\.safetensors: head\.prototypes holds 1 numbers that are not finite, of 1408")
def _(folder):
    return weights(folder, lambda tensors: tensors["head.prototypes"][3, :1].fill_(float("nan")))


@case("an infinite weight", r"model\.safetensors: encoder\.tower\.\S+ holds \d+ numbers that are not finite")
def _(folder):
    return weights(folder, lambda tensors: tensors["encoder.tower.conv1.weight"][0].fill_(float("inf")))


@case("weights of int8", r"model\.safetensors: head\.prototypes is of int8, the model's is of float32")
def _(folder):
    return weights(folder, lambda tensors: tensors.update({"head.prototypes": tensors["head.prototypes"].char()}))


@case("weights of float8", r"head\.prototypes is of float8_e4m3fn; allowed are float16, bfloat16, float32, float64")
def _(folder):
    half = torch.float8_e4m3fn
    return weights(folder, lambda tensors: tensors.update({"head.prototypes": tensors["head.prototypes"].to(half)}))


@case("weights of float64", r"a\.png\t[\d.]+ points", status=0)
def _(folder):
    return weights(
        folder, lambda tensors: tensors.update({n: t.double() for n, t in tensors.items() if t.is_floating_point()})
    )


@case("a temperature of a thousand million", r"head\.logit_scale is 1e\+09; 10 is the largest that is allowed")
def _(folder):
    return weights(folder, lambda tensors: tensors["head.logit_scale"].fill_(1e9))


@case("large weights under which every answer is NaN", r"answers 1 of 1 pictures with numbers that are not finite")
def _(folder):
    return weights(folder, lambda tensors: tensors["encoder.tower.bn1.weight"].fill_(3e38))


@case("large weights of a regressor", r"answers 1 of 1 pictures with numbers that are not finite")
def _(folder):
    return [*weights(folder, lambda tensors: tensors["encoder.tower.bn1.weight"].fill_(3e38), method="l1"), "--json"]


@case("a weight too many", r"model\.safetensors: head\.extra is not of this model")
def _(folder):
    return weights(folder, lambda tensors: tensors.update({"head.extra": torch.zeros(2)}))


# ---- parts that disagree


@case("another decoding than that of the weights", r"config\.json: decoding is 'argmax', was 'median' when the weights")
def _(folder):
    return config(folder, decoding="argmax")


@case("other names of ranks", r"config\.json: ranks\.names\[0\] is 'zero', was '0' when the weights were saved")
def _(folder):
    ranks = json.loads((saved() / "config.json").read_text())["ranks"]
    names = ["zero", *ranks["names"][1:]]
    return config(folder, ranks=ranks | {"names": names}, id2label=None, label2id=None)


@case("id2label that contradicts the ranks", r"model/config\.json: id2label contradicts ranks")
def _(folder):
    return config(folder, id2label={str(rank): f"grade {rank}" for rank in range(11)})


@case("ranks out of order", r"model/config\.json: rank values must be strictly increasing, got 2 before 1")
def _(folder):
    return unsigned(folder, ranks={"values": [0, 2, 1]}, id2label=None, label2id=None)


@case("fewer ranks than prototypes", r"model\.safetensors: holds prototypes of 11 ranks, config\.json names 3")
def _(folder):
    return unsigned(folder, ranks={"values": [0, 1, 2]}, id2label=None, label2id=None)


@case("another kind of model", r"model/config\.json: model_type is 'clip'; models of this package are 'ordinalclip'")
def _(folder):
    return config(folder, model_type="clip")


@case("a key of no model", r"model/config\.json: OrdinalConfig has no field shift")
def _(folder):
    return config(folder, shift=3)


@case(
    "another mean in the image processor", r"preprocessor_config\.json contradicts the pixels .*: image_mean is \[0\.5"
)
def _(folder):
    return processor(folder, image_mean=[0.5, 0.5, 0.5])


@case("another size in the image processor", r"preprocessor_config\.json contradicts .*: size is 96, there 64")
def _(folder):
    return processor(folder, size=96)


@case(
    "an unknown rule of resizing", r"preprocessor_config\.json: resize 'longest' is unknown; choices: shortest, squash"
)
def _(folder):
    return processor(folder, resize="longest")


@case("an unknown interpolation", r"preprocessor_config\.json: interpolation 'cubic' is unknown; choices: nearest")
def _(folder):
    return processor(folder, interpolation="cubic")


@case("an image processor of another kind", r"has no image_processor_type 'CLIPImageProcessor'")
def _(folder):
    return processor(folder, image_processor_type="CLIPImageProcessor")


@case("a standard deviation of 0", r"preprocessor_config\.json: std must be above 0")
def _(folder):
    return processor(folder, image_std=[0.0, 1.0, 1.0])


@case("a picture of 100000 pixels", r"config\.json: size must be a whole number of pixels from 1 to 4096, got 100000")
def _(folder):
    pixels = json.loads((saved() / "config.json").read_text())["pixels"]
    return unsigned(folder, pixels=pixels | {"size": 100_000})


@case("a tower of a million channels", r"config\.json: no model can be built from it: .* asks for more than")
def _(folder):
    architecture = json.loads((saved() / "config.json").read_text())["backbone_architecture"]
    architecture["model_cfg"]["vision_cfg"]["width"] = 1_000_000
    return unsigned(folder, backbone_architecture=architecture)


@case("a model of a million ranks", r"config\.json: a label space has at least 2 ranks and at most 10000, got 1000000")
def _(folder):
    return unsigned(folder, ranks={"values": list(range(1_000_000))}, id2label=None, label2id=None)


@case("a model of more ranks than its weights", r"holds prototypes of 11 ranks, config\.json names 9000")
def _(folder):
    return unsigned(folder, ranks={"values": list(range(9000))}, id2label=None, label2id=None)


@case("a model with 26 mirrors", r"mirror holds horizontal and vertical, each at most once")
def _(folder):
    return unsigned(folder, mirror=["horizontal"] * 26)


@case("a key twice in config.json", r"model/config\.json: damaged, not valid JSON \(key 'dropout' stands in it twice\)")
def _(folder):
    words = weights(folder, lambda tensors: None)
    file = folder / "model" / "config.json"
    file.write_text('{"dropout": 0.5, ' + file.read_text().lstrip("{ \n"))
    return words


@case("names of ranks that are a text", r"config\.json: ranks\.names must be a list, got 'abcdefghijk'")
def _(folder):
    return unsigned(folder, ranks={"values": list(range(11)), "names": "abcdefghijk"}, id2label=None, label2id=None)


# ---- code


@case(
    "a model folder with code of its own", r"config\.json: auto_map names code of the folder's own", after=nothing_ran
)
def _(folder):
    words = config(folder, auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}, model_type="evil")
    (folder / "model/evil.py").write_text(CODE)
    return words


@case("an image processor with code of its own", r"preprocessor_config\.json: auto_map names code", after=nothing_ran)
def _(folder):
    words = processor(folder, auto_map={"AutoImageProcessor": "evil.Processor"})
    (folder / "model/evil.py").write_text(CODE)
    return words


@case(
    "a head whose module lies beside the pictures", r"may not import by themselves; .*--import evil", after=nothing_ran
)
def _(folder):
    (folder / "evil.py").write_text(CODE)
    return unsigned(folder, method="evil:Head", head_class="evil:Head")


@case("a module to import that is not there", r"--import: module 'nothing' cannot be imported \(ModuleNotFoundError")
def _(folder):
    return [*predict(folder), "--import", "nothing"]


@case("a loss of Python's own in a model folder", r"names code of the module 'shutil', which a model's files may not")
def _(folder):
    return unsigned(folder, method="loss", head={"loss": "shutil:rmtree"})


def train(*overrides):
    return ["train", "default", "output_dir=run", "method=l1", *overrides]


def hf_folder(folder, **more):
    """A folder of transformers' layout whose config.json has other keys, too."""
    (folder / "hf").mkdir()
    (folder / "hf/config.json").write_text(json.dumps({"model_type": "vit", **more}))
    return train("model.backbone=hf:hf")


@case("a backbone's folder with code of its own", r"hf/config\.json: auto_map names code", after=nothing_ran)
def _(folder):
    (folder / "evil.py").write_text(CODE)
    words = hf_folder(folder, auto_map={"AutoConfig": "evil.Config"})
    (folder / "hf/evil.py").write_text(CODE)
    return words


@case("pickled weights in a backbone's folder", r"hf:hf.*(no \.safetensors|image processor)", after=nothing_ran)
def _(folder):
    words = hf_folder(folder, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    kind = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    (folder / "hf/preprocessor_config.json").write_text(json.dumps(kind))
    (folder / "hf/pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    return words


@case("a pickle as weights of a backbone", r"evil\.pth: not readable as plain tensors", after=nothing_ran)
def _(folder):
    (folder / "evil.pth").write_bytes(pickle.dumps({"state_dict": Evil()}))
    return train("model.backbone=timm:resnet10t/evil.pth")


# ---- backbones


@case(
    "a hub that is out of reach, open_clip", r"^ordinalclip: backbone open_clip:RN50/openai: its weights can be had nei"
)
def _(folder):
    return train("model.backbone=open_clip:RN50/openai")


@case(
    "a hub that is out of reach, timm", r"^ordinalclip: backbone timm:resnet10t/pretrained: its weights can be had nei"
)
def _(folder):
    return train("model.backbone=timm:resnet10t/pretrained")


@case(
    "a hub that is out of reach, transformers", r"^ordinalclip: backbone hf:openai/clip-vit-base-patch32 is neither a m"
)
def _(folder):
    return train("model.backbone=hf:openai/clip-vit-base-patch32")


@case(
    "weights of a sibling by the file's name", r"is of the timm model efficientnet_lite0 by its name, .*timm:efficient"
)
def _(folder):
    torch.save({"conv_stem.weight": torch.zeros(3)}, folder / "efficientnet_lite0_ra-37913777.pth")
    return train("model.backbone=timm:tf_efficientnet_lite0/efficientnet_lite0_ra-37913777.pth")


@case("weights of a sibling by the config.json beside them", r"is of the timm model resnet18 by config\.json beside it")
def _(folder):
    save_file({"conv1.weight": torch.zeros(3)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": "resnet18"}))
    return train("model.backbone=timm:resnet34/model.safetensors")


@case("quantised weights of a backbone", r"best\.pth: conv1\.weight is of int8: quantised weights are not read")
def _(folder):
    torch.save({"conv1.weight": torch.zeros(3, dtype=torch.int8)}, folder / "best.pth")
    return train("model.backbone=timm:resnet10t/best.pth")


@case(
    "a backbone with a weight that is NaN", r"^ordinalclip: backbone open_clip:clip: .* holds \d+ numbers that are not"
)
def _(folder):
    shutil.copytree(TINY_FOLDER, folder / "clip")
    tensors = load_file(folder / "clip/model.safetensors")
    tensors["visual.conv1.weight"][0] = float("nan")
    save_file(tensors, folder / "clip/model.safetensors", {"format": "pt"})
    return train("model.backbone=open_clip:clip")


@case("an open_clip folder whose config is a list", r"clip/open_clip_config\.json: holds a JSON list")
def _(folder):
    (folder / "clip").mkdir()
    (folder / "clip/open_clip_config.json").write_text("[]")
    return train("model.backbone=open_clip:clip")


@case(
    "an open_clip folder without a text tower", r"clip/open_clip_config\.json: no model can be built from its model_cfg"
)
def _(folder):
    (folder / "clip").mkdir()
    (folder / "clip/open_clip_config.json").write_text(json.dumps({"model_cfg": {"embed_dim": 8}}))
    return train("model.backbone=open_clip:clip")


def latent(folder, change=lambda state: None, **encoder):
    """`train` on the encoder of a small generator, its checkpoint changed."""
    torch.manual_seed(0)
    content = latent_pair()
    content["state_dict"] |= {k: v for k, v in latent_pair(**encoder)["state_dict"].items() if k.startswith("encoder.")}
    change(content["state_dict"])
    torch.save(content, folder / "pair.pt")
    return train("method=large", "model.backbone=e4e:pair.pt")


@case("a checkpoint of e4e that is missing", r"^ordinalclip: .*pair\.pt: no such file")
def _(folder):
    return train("method=large", "model.backbone=e4e:pair.pt")


@case("a checkpoint of e4e that is a pickle", r"pair\.pt: not readable as plain tensors", after=nothing_ran)
def _(folder):
    (folder / "pair.pt").write_bytes(pickle.dumps({"state_dict": Evil()}))
    return train("method=large", "model.backbone=e4e:pair.pt")


@case("a checkpoint of e4e without one of its tensors", r"^ordinalclip: pair\.pt: latlayer1\.bias is missing")
def _(folder):
    return latent(folder, lambda state: state.pop("encoder.latlayer1.bias"))


@case("a checkpoint of e4e with a foreign tensor", r"^ordinalclip: pair\.pt: more is not of this model")
def _(folder):
    return latent(folder, lambda state: state.update({"decoder.more": torch.zeros(2)}))


@case(
    "the encoder of another generator in a checkpoint of e4e",
    r"gives codes of 10 rows of 12, the generator in the same file takes 8 of 12: it is the encoder of another",
)
def _(folder):
    return latent(folder, size=64)


def latent_model(folder, **options):
    """`predict` by a model whose encoder is one of e4e with these options."""
    architecture = load_backbone("e4e").architecture | options
    return unsigned(folder, backbone="e4e", backbone_architecture=architecture)


@case("a model of e4e whose encoder has an unknown option", r"config\.json: no model can be built from it: .*depth")
def _(folder):
    return latent_model(folder, depth=50)


@case("a model of e4e with three stages", r"config\.json: no model can be built from it")
def _(folder):
    return latent_model(folder, units=[1, 1, 1])


@case("a model of e4e of 4096 pixels", r"config\.json: .*size is 4096; it must be a power of two from 8 to 1024")
def _(folder):
    return latent_model(folder, size=4096)


# ---- conversion


def odd_clip(folder):
    """A file of OpenAI's names whose shapes do not fit each other."""
    tensors = load_file(TINY_FOLDER / "model.safetensors")
    tensors["ln_final.weight"] = torch.zeros(3)
    torch.save(tensors, folder / "clip.pt")
    return ["convert", "clip.pt", "out"]


def good_is_left(folder):
    assert (folder / "out/open_clip_model.safetensors").read_bytes() == b"good"
    assert {path.name for path in (folder / "out").iterdir()} == {
        "open_clip_config.json",
        "open_clip_model.safetensors",
    }
    assert not list(folder.glob(".partial-*"))


@case(
    "a conversion that fails, over a good folder", r"clip\.pt: not a CLIP as OpenAI published them", after=good_is_left
)
def _(folder):
    (folder / "out").mkdir()
    (folder / "out/open_clip_model.safetensors").write_bytes(b"good")
    (folder / "out/open_clip_config.json").write_text("{}")
    return [*odd_clip(folder), "--overwrite"]


@case(
    "a conversion over a model that was trained since",
    r"out holds a model that is not, or no longer, what was converted",
)
def _(folder):
    shutil.copytree(saved(), folder / "out")
    torch.save({"state_dict": {"module.prompt_learner.context_embeds": torch.zeros(1)}}, folder / "best.ckpt")
    return ["convert", "best.ckpt", "out"]


def thesis_is_left(folder):
    assert {path.name for path in (folder / "out").iterdir()} == {"thesis.tex"}


@case("a conversion to a folder of something else", r"out holds something else .*\(thesis\.tex\)", after=thesis_is_left)
def _(folder):
    (folder / "out").mkdir()
    (folder / "out/thesis.tex").write_text("")
    return odd_clip(folder)


@case("a conversion of weights that are NaN", r"clip\.pt: ln_final\.weight holds 3 numbers that are not finite, of 3")
def _(folder):
    words = odd_clip(folder)
    tensors = torch.load(folder / "clip.pt") | {"ln_final.weight": torch.full((3,), torch.nan)}
    torch.save(tensors, folder / "clip.pt")
    return words


@case("a conversion of a file that is no weights", r"clip\.pt: not readable as plain tensors")
def _(folder):
    (folder / "clip.pt").write_text("weights")
    return ["convert", "clip.pt", "out"]


@case("a conversion of an empty dictionary", r"clip\.pt: holds no tensors by name")
def _(folder):
    torch.save({}, folder / "clip.pt")
    return ["convert", "clip.pt", "out"]


@case(
    "an archive that unpacks to a thousand times its size", r"bomb\.pt: not readable .*it would unpack to 256,000,\d+ b"
)
def _(folder):
    with zipfile.ZipFile(folder / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(16):
            archive.writestr(f"bomb/data/{number}", bytes(16_000_000))
        archive.writestr("bomb/constants.pkl", b"x" * 10)
    return ["convert", "bomb.pt", "out"]


@case(
    "a tensor of one number, repeated a million million times", r"views\.pt: its tensors claim 4,000,000,000,000 bytes"
)
def _(folder):
    torch.save({"a": torch.zeros(1).expand(10**12)}, folder / "views.pt")
    return ["convert", "views.pt", "out"]


# ---- explanations


def explained(folder, *words):
    predict(folder)
    return ["explain", *(words or ("model", "a.png")), "--quiet"]


def run_that(folder, how):
    """A run folder in some state, none of whose files matter but those that are read."""
    words = explained(folder, "run", "a.png")
    (folder / "run").mkdir()
    how(folder / "run")
    return words


@case("a model alone is explained, without its training pictures", r"a\.png\t.*points.*\twhy\.png", status=0)
def _(folder):
    return explained(folder)


@case("an explanation of a picture that is broken", r"b\.png: not a readable image", after=lambda f: nothing_drawn(f))
def _(folder):
    (folder / "b.png").write_bytes(b"\x89PNG")
    return explained(folder, "model", "a.png", "b.png")


def nothing_drawn(folder):
    assert not list(folder.glob("why*"))


@case("an explanation by a model that is not there", r"runs/nothing: no such folder")
def _(folder):
    return explained(folder, "runs/nothing", "a.png")


@case("an explanation of a run that diverged", r"run: a run that diverged, .*; it has no model to explain")
def _(folder):
    return run_that(folder, lambda run: (run / "diverged.txt").write_text("step 3: loss is nan"))


@case("an explanation of a run that is not finished", r"run: no finished run \(metrics\.json is missing\)")
def _(folder):
    return run_that(folder, lambda run: (run / "log.jsonl").write_text('{"step": 1}\n'))


@case("an explanation of a run whose model was deleted", r"run/model is missing")
def _(folder):
    from ordinalclip.config import RunConfig

    def finished(run):
        (run / "config.yaml").write_text(RunConfig(output_dir="run").to_yaml())
        metrics = {"num_train": 1, "train_counts": [1], "best_step": 1, "train_seconds": 1}
        (run / "metrics.json").write_text(json.dumps(metrics))

    return run_that(folder, finished)


@case("an explanation of a comparison", r"run: the folder of a comparison, no run; name one of its runs")
def _(folder):
    def compared(run):
        (run / "runs").mkdir()
        (run / "results.csv").touch()

    return run_that(folder, compared)


@case("an explanation into a file of another kind", r"--out why\.jpg: figures end in \.png, \.pdf, \.svg")
def _(folder):
    return explained(folder, "model", "a.png", "--out", "why.jpg")


def still_mine(folder):
    assert (folder / "why.png").read_text() == "mine"


@case("an explanation onto a file that is not ours", r"why\.png is there and no figure of ours", after=still_mine)
def _(folder):
    (folder / "why.png").write_text("mine")
    return explained(folder)


@case("more neighbours than can be shown", r"--neighbors: '99' is not a whole number from 0 to 12")
def _(folder):
    return explained(folder, "model", "a.png", "--neighbors", "99")
