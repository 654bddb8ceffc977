"""How much the frozen text encoder adds to a training step: packed as in `TextTower`, against plain.

    python benchmarks/text_tower.py

Forward and backward of the image encoder on a batch of 32 (a), of the prompts of 100 ranks through the packed text
tower (b), and of the same prompts at 100 x 77 tokens as the published code encodes them (c), full-size towers,
random weights, in one run. Needs 5 GB and minutes. Measured with `--architectures RN50 --repeats 1`, one thread of two
busy CPU cores, torch 2.15, open_clip 3.3, seed 0:

    RN50   a 22.81 s   b 1.40 s (6.1 % of a)   c 24.32 s (106.6 % of a)   c / b 17.3
    packed - plain, relative to the largest entry: features 9.3e-07, context 1.2e-06, rank embeddings 1.0e-06
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import time
from collections.abc import Callable
from statistics import median

import open_clip
import torch
from torch import Tensor

from ordinalclip import PromptLearner, TextTower

SEED = 0
NUM_CONTEXT, NUM_BASE_RANKS = 10, 3


def seconds_of(work: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def relative_difference(given: Tensor, reference: Tensor) -> float:
    """Largest absolute difference of two tensors of one shape, as a share of the reference's largest element."""
    return float((given - reference).abs().max() / reference.abs().max())


def measure(architecture: str, num_ranks: int, batch_size: int, repeats: int) -> None:
    """Time image encoder, packed and plain text tower of one architecture in turn, and print what comes out."""
    torch.manual_seed(SEED)
    clip = open_clip.create_model(architecture, pretrained=None)
    # Frozen BatchNorm statistics, the trainer's default. The weights of the image encoder do get gradients.
    encoder = clip.visual.eval()
    tower = TextTower.from_open_clip(clip)
    learner = PromptLearner(tower, num_ranks, NUM_CONTEXT, num_base_ranks=NUM_BASE_RANKS, rank_position="tail")
    size = open_clip.get_model_config(architecture)["vision_cfg"]["image_size"]
    pixels = torch.randn(batch_size, 3, size, size)
    # Any gradient at the features will do: head and loss cost next to nothing and are the same on both ways.
    image_gradient = torch.randn(batch_size, tower.output_dim)
    text_gradient = torch.randn(num_ranks, tower.output_dim)

    def image() -> None:
        encoder.zero_grad()
        encoder(pixels).backward(image_gradient)

    def text(encode: Callable[..., Tensor]) -> list[Tensor]:
        learner.zero_grad()
        features = encode(learner())
        features.backward(text_gradient)
        return [features.detach(), learner.context.grad, learner.rank_embeddings.grad]

    work = {"image": image, "packed": lambda: text(tower), "plain": lambda: text(tower.encode_plain)}
    image()  # the first pass allocates and picks kernels; it does not count
    results = zip(("features", "context", "rank embeddings"), work["packed"](), work["plain"](), strict=True)
    differences = {name: relative_difference(packed, plain) for name, packed, plain in results}
    # In turn, so that a load from outside falls on all three.
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repeats):
        for name, call in work.items():
            seconds[name].append(seconds_of(call))

    middle = {name: median(taken) for name, taken in seconds.items()}
    print(f"\n{architecture}: {size} px, prompts of {int(learner.lengths.max()) + learner.num_shared} tokens")
    titles = {"image": "a  image encoder", "packed": "b  text, packed", "plain": "c  text, plain"}
    for name, title in titles.items():
        share = "" if name == "image" else f"{100 * middle[name] / middle['image']:6.1f} % of a"
        spread = f"({min(seconds[name]):.2f} to {max(seconds[name]):.2f})"
        print(f"  {title:16} {middle[name]:6.2f} s  {spread:16} {share}".rstrip())
    print(f"  c / b            {middle['plain'] / middle['packed']:6.1f}")
    print("  packed - plain   " + ", ".join(f"{name} {value:.1e}" for name, value in differences.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", default=["RN50", "ViT-B-32"], help="names that open_clip knows")
    parser.add_argument("--ranks", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.architectures) - set(open_clip.list_models()))
    if unknown:
        parser.error(f"--architectures {', '.join(unknown)}: unknown; see open_clip.list_models()")
    for option in ("ranks", "batch_size", "repeats"):
        least = NUM_BASE_RANKS if option == "ranks" else 1
        if getattr(arguments, option) < least:
            parser.error(f"--{option.replace('_', '-')} must be at least {least}, got {getattr(arguments, option)}")

    logging.disable(logging.WARNING)  # open_clip's, about random weights
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads,")
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, open_clip {open_clip.__version__}, seed {SEED}"
    )
    print(f"{arguments.ranks} ranks, batch {arguments.batch_size}, repetitions: {arguments.repeats}, float32;", end=" ")
    print("median seconds (least to most) of forward + backward")
    for architecture in arguments.architectures:
        measure(architecture, arguments.ranks, arguments.batch_size, arguments.repeats)


if __name__ == "__main__":
    main()
