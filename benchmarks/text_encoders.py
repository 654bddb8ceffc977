"""Text encoders as towers, where nothing can be packed: what is equal to what, for every type; and what prompts cost.

    python benchmarks/text_encoders.py            # every type, random, 2 layers of width 256: table.md, encoders.csv
    python benchmarks/text_encoders.py --full     # and BiomedCLIP's layout at its full size: 8 GB, 12 minutes
    python benchmarks/text_encoders.py --costs    # only what CLIP's tower, MiniLM and a BERT of base size cost

Prompts are those of 62 ages ("a photo of an age of 4 2 ."), one or two tokens of which differ. The columns:

* ids: features of the towers, which take embeddings of prompts of one length together, against the library's own of
  ids, padded to 77 with a mask (transformers' forward, open_clip's `encode_text`); the largest difference over the
  largest feature.
* padded: the same of a prompt learner's embeddings, without padding against padded to 77 with a mask; gradients:
  likewise of those by the context.
* slope: the largest of these gradients in float64 against differences of fourth order; transformers has norms or
  rotations of some types in float32 whatever comes in, which differences show as noise, and a maximum has kinks.
* restored, deployed, served: after steps of AdamW on image encoder and prompts, the largest difference between
  probabilities of the model and of its trainable form, read back where the encoder's folder is gone, and of its
  deployed form; and between the value that the pipeline says of a picture and the model's own, over 62.
* cost: processor seconds of forward and backward to the prompts, padded over unpadded, medians, in turn in one run.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import open_clip
import torch
import transformers
from PIL import Image
from torch import Tensor

from ordinalclip import OrdinalModel, PromptLearner, Ranks, TextTower
from ordinalclip.backbones import load_backbone
from ordinalclip.images import prepare
from ordinalclip.text_encoders import EncoderTower

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

PADDED = 77
AGES = Ranks(tuple(range(1, 63)), names=tuple(" ".join(str(age)) for age in range(1, 63)))
HEAD = {"prompt": "a photo of an age of", "num_base_ranks": 3, "init_from_names": True}
CLIPS = {  # of open_clip, with such a tower: type of the encoder, `text_cfg`
    "BiomedCLIP's layout": ("bert", {"hf_pooler_type": "cls_last_hidden_state_pooler", "hf_proj_type": "mlp"}),
    "XLM-R CLIP": ("xlm-roberta", {"hf_pooler_type": "mean_pooler", "hf_proj_type": "mlp"}),
    "mT5 CLIP": ("mt5", {"hf_pooler_type": "mean_pooler", "hf_proj_type": "mlp"}),
    "NLLB-CLIP": ("m2m_100", {"hf_pooler_type": "cls_pooler", "hf_proj_type": "linear"}),
}
BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
BASE |= {"vocab_size": 30522, "max_position_embeddings": 512}
COLUMNS = ("ids", "padded", "gradients", "slope", "restored", "deployed", "served")
VIT = {"image_size": 224, "timm_model_name": "vit_base_patch16_224", "timm_pool": "", "timm_proj": "linear"}


def pooled(tower: EncoderTower, mask: Tensor, **tokens: Tensor) -> Tensor:
    """(R, D) features of padded prompts: ids, or their embeddings."""
    outputs = tower.model(attention_mask=mask, **tokens)
    hidden, wide = outputs.last_hidden_state, mask[..., None]
    if tower.pooling == "mean":
        features = (hidden * wide).sum(dim=1) / wide.sum(dim=1)
    elif tower.pooling == "max":
        features = hidden.masked_fill(wide == 0, -torch.inf).amax(dim=1)
    else:
        features = hidden[:, 0] if tower.pooling == "cls" else outputs.pooler_output
    return features if tower.projection is None else tower.projection(features)


def padded(tower: EncoderTower, prompts: Any) -> Tensor:
    """(R, D) features of prompts at `PADDED` tokens each, with a mask."""
    prefix, suffix, lengths = prompts
    count, size = suffix.shape[:2]
    rest = tower.embed([tower.padding_token]).expand(count, PADDED - len(prefix) - size, -1)
    tokens = torch.cat([prefix.expand(count, -1, -1), suffix, rest], dim=1)
    return pooled(tower, (torch.arange(PADDED) < (len(prefix) + lengths)[:, None]).long(), inputs_embeds=tokens)


def far(one: Tensor, other: Tensor) -> float:
    """The largest difference over the largest number."""
    return ((one - other).abs().max() / other.abs().max()).item()


def learner_of(tower: TextTower) -> PromptLearner:
    torch.manual_seed(0)
    options: dict[str, Any] = {**HEAD, "context": HEAD["prompt"]}
    del options["prompt"]
    return PromptLearner(tower, AGES, **options)


def costs(tower: TextTower, long: Callable[[Any], Tensor], repeats: int) -> dict[str, float]:
    """Both ways in turn: tokens a prompt, seconds each, and how far features and gradients are from each other."""
    learner = learner_of(tower)
    direction = torch.randn(len(AGES), tower.output_dim)
    seconds: dict[str, list[float]] = {"short": [], "long": []}
    gradients, features = {}, {}
    for _ in range(repeats + 1):
        for way, encode in (("short", tower), ("long", long)):
            learner.zero_grad()
            start = time.process_time()
            features[way] = encode(learner())
            (features[way] * direction).sum().backward()
            seconds[way].append(time.process_time() - start)
            assert learner.context.grad is not None
            gradients[way] = learner.context.grad.clone()
    short, full = (median(each[1:]) for each in (seconds["short"], seconds["long"]))  # the first warms up
    return {
        "tokens": learner.num_shared + learner.lengths.float().mean().item(),
        "short_s": short,
        "long_s": full,
        "cost": full / short,
        "padded": far(features["short"].detach(), features["long"].detach()),
        "gradients": far(gradients["short"], gradients["long"]),
        "gradient": gradients["short"].abs().max().item(),
    }


def slope(tower: EncoderTower) -> float:
    """How far the largest gradient by the context is from differences, in float64."""
    from text_families import differences

    learner = learner_of(tower.double()).double()
    direction = torch.randn(len(AGES), tower.output_dim, dtype=torch.float64)

    def value() -> Tensor:
        return (tower(learner()) * direction).sum()

    value().backward()
    assert learner.context.grad is not None
    place = int(learner.context.grad.abs().argmax())
    return abs(differences(value, learner.context, place) / learner.context.grad.view(-1)[place].item() - 1)


def served(backbone: str, text: str, folders: list[Path], folder: Path, steps: int) -> dict[str, float]:
    """A model trained for some steps, saved in both forms and read back where the encoders' folders are gone."""
    torch.manual_seed(0)
    model = OrdinalModel.build(backbone, AGES, head=HEAD, text=text).train()
    size = model.config.pixel_spec.size
    pixels, labels = torch.randn(4, 3, size, size), torch.tensor([3.0, 20.0, 41.0, 60.0])
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-4)
    losses = []
    for _ in range(steps):
        loss = model(pixels, labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    for form in ("trainable", "deployed"):
        model.save_pretrained(folder / form, form=form)
    for each in folders:
        shutil.rmtree(each)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8))
    with torch.no_grad():
        own, value = model(pixels).probabilities, model.predict(prepare(picture, model.config.pixel_spec)[None]).value
        restored = OrdinalModel.from_pretrained(folder / "trainable")(pixels).probabilities
        deployed = OrdinalModel.from_pretrained(folder / "deployed")(pixels).probabilities
    said = transformers.pipeline("image-ordinal-regression", model=str(folder / "deployed"))(picture)["value"]
    return {
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "restored": (restored - own).abs().max().item(),
        "deployed": (deployed - own).abs().max().item(),
        "served": abs(said - value.item()) / len(AGES),
    }


def row(name: str, kind: str, repeats: int, clip: dict[str, Any] | None = None, steps: int = 3) -> dict[str, Any]:
    """Everything about one encoder, or a CLIP of open_clip with it."""
    from text_families import clip_with, make

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        reference: Any = None
        if clip is None:
            text = make(kind, folder / kind, scale=8, longest=PADDED + 3)
            folders, backbone = [folder / kind], "timm:test_resnet"
        else:
            sizes = {"scale": 8, "longest": PADDED + 3, "context_length": PADDED, **clip}
            reference = clip_with(folder / "clip", kind, **sizes)
            folders, backbone, text = [folder / kind, folder / "clip"], f"open_clip:{folder / 'clip'}", ""
        tower: Any = load_backbone(text or backbone).text
        words = transformers.AutoTokenizer.from_pretrained(folders[0])
        texts = [f"{HEAD['prompt']} {name}." for name in AGES.names or ()]
        batch = words(texts, padding="max_length", max_length=PADDED, return_tensors="pt")
        with torch.no_grad():
            ids, mask = batch["input_ids"], batch["attention_mask"]
            expected = reference.encode_text(ids) if reference else pooled(tower, mask, input_ids=ids)
            result: dict[str, Any] = {"ids": far(tower(texts), expected)}
        result |= costs(tower, partial(padded, tower), repeats)
        config = tower.model.config
        result |= {
            "encoder": name,
            "class": type(tower.model).__name__,
            "pooling": tower.pooling,
            "projection": "none" if tower.projection is None else type(tower.projection).__name__.lower(),
            "width": config.hidden_size,
            "layers": config.num_hidden_layers,
        }
        result["slope"] = slope(tower)
        del tower, reference
        result |= served(backbone, text, folders, folder, steps)
    return result


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    what = row["pooling"] + {"sequential": ", MLP", "linear": ", linear"}.get(row["projection"], "")
    numbers = [f"{row[column]:.0e}" if row[column] else "0" for column in COLUMNS]
    return f"| {row['encoder']} | {row['class']} | {what} | {' | '.join(numbers)} | {row['cost']:.1f} |"


def print_costs(repeats: int) -> list[str]:
    """Seconds of prompts through CLIP's tower, MiniLM and a BERT of base size."""
    lines = ["| tower | tokens a prompt | as here, s | padded or plain, s | ratio | gradients differ by |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    minilm: Any = load_backbone("minilm").text
    torch.manual_seed(0)
    config = transformers.BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    base = EncoderTower(transformers.AutoModel.from_config(config), "mean", None, minilm.tokenizer, 512)
    clip = TextTower.from_open_clip(open_clip.create_model("ViT-B-16", pretrained=None))
    for name, tower, long in (
        ("MiniLM-L6", minilm, partial(padded, minilm)),
        ("BERT-base, random", base, partial(padded, base)),
        ("CLIP ViT-B-16, random", clip, clip.encode_plain),
    ):
        found = costs(tower, long, repeats)
        numbers = f"{found['short_s']:.3f} | {found['long_s']:.3f} | {found['cost']:.1f} | {found['gradients']:.0e}"
        lines.append(f"| {name} | {found['tokens']:.0f} | {numbers} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--full", action="store_true", help="BiomedCLIP's layout at its full size, too")
    parser.add_argument("--costs", action="store_true", help="only what prompts cost in towers of usual sizes")
    parser.add_argument("--only", nargs="*", help="of the types and CLIPs, these; nothing is written")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/text_encoders")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    versions = (
        f"{platform.machine()}, 1 thread of {os.cpu_count()} cores, Python {platform.python_version()}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}, open_clip {open_clip.__version__}, seed 0, "
        f"{arguments.repeats} repeats"
    )
    if arguments.costs:
        print("\n".join([versions, "", *print_costs(arguments.repeats)]))
        return
    from text_families import KINDS

    jobs: list[tuple[Any, ...]] = [(kind, kind, arguments.repeats) for kind in KINDS]
    jobs += [(name, kind, arguments.repeats, options) for name, (kind, options) in CLIPS.items()]
    if arguments.full:
        kind, options = CLIPS["BiomedCLIP's layout"]
        sizes = {"vision": VIT, "embed_dim": 512, "encoder": BASE, "scale": 24, "longest": 512, "context_length": 256}
        jobs.append(("BiomedCLIP, full size", kind, 2, {**options, **sizes}, 5))
    if arguments.only:
        jobs = [job for job in jobs if job[0] in arguments.only]
    lines = [f"| encoder | class | pooling | {' | '.join(COLUMNS)} | cost |", f"|---|---|---|{'---:|' * 8}"]
    print("\n".join([versions, "", *lines]))
    rows = []
    for job in jobs:
        rows.append(row(*job))
        lines.append(line(rows[-1]))
        print(lines[-1], flush=True)
    if arguments.only:
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "table.md").write_text("\n".join([versions, "", *lines]) + "\n", encoding="utf-8")
    names = ["encoder", "class", "pooling", "projection", "width", "layers"]
    names += [name for name in rows[0] if name not in names]
    with (arguments.out / "encoders.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        for each in rows:
            writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in each.items()})


if __name__ == "__main__":
    main()
