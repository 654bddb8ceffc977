"""What prompts cost in a text encoder where nothing can be packed: at their own length, against padded to a common one.

    python benchmarks/text_encoders.py

Processor seconds of forward and backward, to context and rank embeddings, of the prompts of 62 ages ("the age of the
person is", three base ranks): unpadded, those of one length together, as `EncoderTower` does it; and padded to the
common length that the libraries take, with a mask; `minilm` with its weights (ordinalclip[pretrained]), a BERT of base
size with random ones. Beside them CLIP's text tower of ViT-B-16, packed and plain, with random weights. Both ways in
turn, in one run; the results agree.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import open_clip
import torch
import transformers
from torch import Tensor

from ordinalclip import PromptLearner, Ranks, TextTower
from ordinalclip.backbones import load_backbone
from ordinalclip.text_encoders import EncoderTower

PADDED = 77
AGES = Ranks.linear(16, 77, 62)


def padded(tower: EncoderTower, prompts: Any) -> Tensor:
    """(R, D) features of prompts at `PADDED` tokens each, with a mask."""
    prefix, suffix, lengths = prompts
    count, size = suffix.shape[:2]
    rest = tower.embed([tower.padding_token]).expand(count, PADDED - len(prefix) - size, -1)
    tokens = torch.cat([prefix.expand(count, -1, -1), suffix, rest], dim=1)
    mask = (torch.arange(PADDED) < (len(prefix) + lengths)[:, None]).long()
    hidden = tower.model(inputs_embeds=tokens, attention_mask=mask).last_hidden_state
    return (hidden * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)


def measure(name: str, tower: TextTower, long: Callable[[Any], Tensor], repeats: int) -> None:
    """Time both ways in turn and print a row of the table."""
    torch.manual_seed(0)
    learner = PromptLearner(tower, AGES, context="the age of the person is", num_base_ranks=3, init_from_names=True)
    direction = torch.randn(len(AGES), tower.output_dim)
    seconds: dict[str, list[float]] = {"short": [], "long": []}
    gradients: dict[str, Tensor] = {}
    for _ in range(repeats + 1):
        for way, encode in (("short", tower), ("long", long)):
            learner.zero_grad()
            start = time.process_time()
            (encode(learner()) * direction).sum().backward()
            seconds[way].append(time.process_time() - start)
            assert learner.context.grad is not None
            gradients[way] = learner.context.grad.clone()
    short, full = (median(each[1:]) for each in (seconds["short"], seconds["long"]))  # the first warms up
    off = (gradients["short"] - gradients["long"]).abs().max() / gradients["long"].abs().max()
    tokens = learner.num_shared + learner.lengths.float().mean().item()
    print(f"| {name} | {tokens:.0f} | {short:.3f} | {full:.3f} | {full / short:.1f} | {off:.0e} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    print(
        f"{platform.machine()}, 1 thread of {os.cpu_count()} cores, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {repeats} repeats\n"
    )
    print("| tower | tokens a prompt | as here, s | padded or plain, s | ratio | gradients differ by |")
    print("|---|---:|---:|---:|---:|---:|")
    minilm: Any = load_backbone("minilm").text
    measure("MiniLM-L6", minilm, lambda prompts: padded(minilm, prompts), repeats)
    torch.manual_seed(0)
    config = transformers.BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = transformers.AutoModel.from_config(config)
    base = EncoderTower(model, "mean", None, minilm.tokenizer, 512)
    measure("BERT-base, random", base, lambda prompts: padded(base, prompts), repeats)
    clip = TextTower.from_open_clip(open_clip.create_model("ViT-B-16", pretrained=None))
    measure("CLIP ViT-B-16, random", clip, clip.encode_plain, repeats)


if __name__ == "__main__":
    main()
