"""L1 by a plain PyTorch loop, on the splits of a comparison: is the package's own L1 a fair baseline?

    python benchmarks/plain_l1.py --config faces --root FOLDER --out plain_l1.csv

EfficientNet-Lite0 from its ImageNet weights with a linear layer, absolute error of standardised labels, AdamW at two
rates that fall along a cosine, mirrored pictures, BatchNorm in evaluation mode, the last weights. Nothing of the
package trains, decodes, predicts or scores here: it gives the encoder's weights, and knows which part a picture is in.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import statistics
import time

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from ordinalclip.backbones import load_backbone
from ordinalclip.compare.plan import load_plan
from ordinalclip.data import Part, load_parts


def read_pictures(part: Part, size: int) -> Tensor:
    """(N, 3, size, size) uint8; every file is squashed to a square."""
    pictures = []
    for name in part.names:
        with Image.open(os.path.join(part.root, name)) as file:
            pictures.append(np.array(file.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


class Regressor(nn.Module):
    """Pictures (B, 3, H, W) uint8 -> (B,) standardised labels."""

    def __init__(self, size: int):
        super().__init__()
        backbone = load_backbone("efficientnet_lite0", image_size=size, with_text=False)
        self.encoder = backbone.encoder.to(memory_format=torch.channels_last)
        self.linear = nn.Linear(backbone.output_dim, 1)
        mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (backbone.pixels.mean, backbone.pixels.std))
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.linear(self.encoder((pictures.float() / 255 - self.mean) / self.std))[:, 0]


def learn(model: Regressor, pictures: Tensor, labels: Tensor, options: argparse.Namespace, seed: int) -> None:
    """Train on (N, 3, H, W) pictures and (N,) standardised labels, epoch after epoch."""
    groups = [
        {"params": list(model.encoder.parameters()), "lr": options.lr_encoder},
        {"params": list(model.linear.parameters()), "lr": options.lr},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=options.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    model.eval()  # BatchNorm keeps its statistics
    for _ in range(options.steps):
        while len(order) < options.batch_size:
            order = torch.cat([order, torch.randperm(len(labels), generator=generator)])
        rows, order = order[: options.batch_size], order[options.batch_size :]
        mirrored = torch.rand(len(rows), generator=generator) < 0.5
        batch = torch.where(mirrored[:, None, None, None], pictures[rows].flip(-1), pictures[rows])
        loss = (model(batch) - labels[rows]).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def run(options: argparse.Namespace, seed: int) -> dict[str, float]:
    """MAE in the labels' unit on the validation and test part of a seed's split."""
    config = next(iter(load_plan(options.config, [f"data.root={options.root}"]).runs.values()))
    parts = load_parts(config.data, config.ranks, seed)
    torch.manual_seed(seed)
    model = Regressor(options.size)
    values = torch.from_numpy(parts.train.values)
    mean, std = values.mean(), values.std()
    started = time.process_time()
    learn(model, read_pictures(parts.train, options.size), ((values - mean) / std).float(), options, seed)
    seconds = time.process_time() - started
    errors = {}
    for name, part in (("validation_mae", parts.validation), ("test_mae", parts.test)):
        with torch.no_grad():
            answers = torch.cat([model(batch) for batch in read_pictures(part, options.size).split(256)])
        errors[name] = float((answers * std + mean - torch.from_numpy(part.values)).abs().mean())
    return {"seed": seed, "steps": options.steps, **errors, "processor_seconds": round(seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="faces", help="comparison, by name or file, whose splits are taken")
    parser.add_argument("--root", required=True, help="folder of its table and pictures")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of split, weights and order")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3, help="of the linear layer")
    parser.add_argument("--lr-encoder", type=float, default=2e-4)
    parser.add_argument("--weight-decay", type=float, default=1e-2)
    parser.add_argument("--size", type=int, default=96, help="of the pictures in pixels")
    parser.add_argument("--out", help="CSV file with a row for every seed")
    options = parser.parse_args()

    print(f"{platform.machine()}, torch {torch.__version__}, timm {timm.__version__}; {vars(options)}")
    rows = []
    for seed in options.seeds:
        rows.append(run(options, seed))
        print(", ".join(f"{name} {value:g}" for name, value in rows[-1].items()), flush=True)
        if options.out:  # after every seed, so that an interruption loses none
            with open(options.out, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
    errors = [row["test_mae"] for row in rows]
    spread = f" ± {statistics.stdev(errors):.3f}" if len(errors) > 1 else ""
    print(f"test MAE {statistics.mean(errors):.3f}{spread} over seeds {', '.join(map(str, options.seeds))}")


if __name__ == "__main__":
    main()
