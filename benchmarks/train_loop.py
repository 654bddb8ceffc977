"""The trainer against a plain PyTorch loop doing the same: images per second of processor time.

    python benchmarks/train_loop.py              # about four minutes on two cores
    python benchmarks/train_loop.py --serving --batch-size 256 --steps 5

L1 on EfficientNet-Lite0 with random weights, JPEG files, batch 32, one thread, decoding in, one pass so that no decoded
picture is seen twice. The plain loop is what one would write by hand: the same files, crops, layers, optimiser, rates
and memory order, and no log, no checks, no norm of the gradient, nothing to resume from. Both run in turn in a process
each, in which their first steps are not counted; the trainer's validation and checkpoints are not either. Processor
seconds are of the whole process from one step to another, so other work on the machine matters little.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WARM_UP = 4
LR, DECAY = 1e-4, 5e-4


def plain(table: Path, backbone: str, size: int, steps: int, batch_size: int) -> float:
    """The loop that one would write by hand; processor seconds a step."""
    import numpy as np
    import pandas as pd
    import timm
    import torch
    from PIL import Image

    torch.manual_seed(1)
    rows = pd.read_csv(table)
    encoder = timm.create_model(backbone, num_classes=0).to(memory_format=torch.channels_last)
    head = torch.nn.Linear(encoder.num_features, 1)
    parameters = [*encoder.parameters(), *head.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    config = timm.data.resolve_data_config(model=encoder)
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
    target = torch.tensor(rows["value"].to_numpy(), dtype=torch.float32)
    target = (target - target.mean()) / target.std()
    large = round(size * 256 / 224)
    order = torch.randperm(len(rows)).tolist()

    def pixels(index: int) -> torch.Tensor:
        with Image.open(table.parent / rows["file"][index]) as file:
            image = file.convert("RGB").resize((large, large), Image.Resampling.BICUBIC)
        left, top = random.randrange(large - size + 1), random.randrange(large - size + 1)
        image = image.crop((left, top, left + size, top + size))
        return (torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 - mean) / std

    encoder.train()
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    for step in range(steps):
        if step == WARM_UP:
            started = time.process_time()
        batch = order[step * batch_size : (step + 1) * batch_size]
        prediction = head(encoder(torch.stack([pixels(index) for index in batch])))[:, 0]
        loss = (prediction - target[batch]).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return (time.process_time() - started) / (steps - WARM_UP)


def ours(table: Path, backbone: str, size: int, steps: int, batch_size: int) -> float:
    """The `train` command's steps; processor seconds a step."""
    from ordinalclip.config import load_config
    from ordinalclip.run_folder import RunFolder
    from ordinalclip.training import train

    with tempfile.TemporaryDirectory() as folder:
        options = {
            "output_dir": folder,
            "method": "l1",
            "model.backbone": f"timm:{backbone}",
            "model.image_size": size,
            "model.load_weights": "false",
            "data.source": "table",
            "data.train_table": table,
            "data.image_column": "file",
            "data.label_column": "value",
            "ranks.low": 0,
            "ranks.high": 100,
            "ranks.num": 101,
            "train.max_steps": steps,
            "train.batch_size": batch_size,
            "train.lr": LR,
            "train.weight_decay": DECAY,
            "train.eval_every": steps,
            "evaluation.report": "false",
        }
        train(load_config(None, [f"{key}={value}" for key, value in options.items()]), quiet=True)
        log = RunFolder(folder).read_log()
    return sum(entry["processor_ms"] for entry in log[WARM_UP:]) / 1000 / (steps - WARM_UP)


def serving(backbone: str, size: int, batch_size: int, batches: int, way: str) -> float:
    """A model of `from_pretrained` encodes batches; processor seconds a batch.

    Args:
        way: "as loaded"; "contiguous", in the other memory order; "memory given back", without `keep_freed_memory`.
    """
    import torch

    from ordinalclip import OrdinalModel, Ranks
    from ordinalclip.memory import keep_freed_memory

    if way != "memory given back":
        keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        ranks = Ranks.linear(0, 100, 101)
        model = OrdinalModel.build(f"timm:{backbone}", ranks, "l1", load_weights=False, image_size=size)
        model.save_pretrained(folder)
        model = OrdinalModel.from_pretrained(folder)
    if way == "contiguous":
        model.to(memory_format=torch.contiguous_format)
    pixels = torch.randn(batch_size, 3, size, size)
    model.predict(pixels)
    started = time.process_time()
    for _ in range(batches):
        model.predict(pixels)
    return (time.process_time() - started) / batches


def write_pictures(folder: Path, number: int, size: int) -> Path:
    """Gauges as JPEG files with a table, as people have them."""
    from ordinalclip.gauges import drawn_gauges

    lines = ["file,value"]
    for index, (picture, value) in enumerate(drawn_gauges("dial", number, 1, size)):
        picture.save(folder / f"{index}.jpg", quality=90)
        lines.append(f"{index}.jpg,{value:.2f}")
    table = folder / "labels.csv"
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="tf_efficientnet_lite0", help="a model of timm")
    parser.add_argument("--size", type=int, default=96, help="of input and files")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--serving", action="store_true", help="how fast what is loaded answers, instead")
    parser.add_argument("--worker", nargs=2, metavar=("KIND", "TABLE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shape = arguments.backbone, arguments.size, arguments.steps, arguments.batch_size
    if arguments.worker:
        kind, table = arguments.worker
        if arguments.serving:
            print(serving(arguments.backbone, arguments.size, arguments.batch_size, arguments.steps, kind))
            return
        print((plain if kind == "plain" else ours)(Path(table), *shape))
        return
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        table = write_pictures(Path(folder), arguments.steps * arguments.batch_size, arguments.size)
        kinds = ["contiguous", "memory given back", "as loaded"] if arguments.serving else ["plain", "ours"]
        seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(arguments.repeats):
            for kind, found in seconds.items():
                command = [sys.executable, *sys.argv, "--worker", kind, str(table)]
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise RuntimeError(done.stderr)
                found.append(float(done.stdout.split()[-1]))
    import timm
    import torch

    print(
        f"{platform.machine()}, torch {torch.__version__}, timm {timm.__version__}; {arguments.backbone}, "
        f"{arguments.size} px, {arguments.steps} steps of batch {arguments.batch_size}, {arguments.repeats} repeats, "
        "seed 1"
    )
    for kind, found in seconds.items():
        each = f"{1000 * min(found):.0f} to {1000 * max(found):.0f}"
        print(f"{kind}: {arguments.batch_size / statistics.median(found):.1f} images per processor second ({each} ms)")
    *others, last = seconds
    for other in others:
        ratios = [one / mine for one, mine in zip(seconds[other], seconds[last], strict=True)]
        print(f"{last} / {other}: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
