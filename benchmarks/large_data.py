"""A million rows on three processes: memory stays flat, and the second epoch starts as fast as the first.

    python benchmarks/large_data.py                     # some minutes; writes to a temporary folder

A Parquet table of small PNG pictures is trained on by `ordinalclip train` under torchrun (gloo). Shown for every
process: private memory (Linux: anonymous pages of /proc/self/smaps_rollup; the memory-mapped table does not count) once
the data is there, after the first steps and at the end; and the seconds until the first batch of epochs 1 and 2.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from ordinalclip.config import load_config
from ordinalclip.data import Parts
from ordinalclip.model import OrdinalModel
from ordinalclip.training import train, trainer
from ordinalclip.training.sampling import Stream


def private_mb() -> float:
    """Anonymous memory of this process in MB."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/smaps_rollup names no anonymous memory")


def write_table(path: Path, num_rows: int) -> None:
    """`num_rows` grey pictures of 16 x 16 pixels with labels 0 to 100, in row groups of 50,000."""
    rng = np.random.default_rng(0)
    pictures = []
    for level in range(101):
        buffer = io.BytesIO()
        noise = rng.integers(0, 40, (16, 16))
        Image.fromarray((noise + 2 * level).astype(np.uint8)).save(buffer, "PNG")
        pictures.append({"bytes": buffer.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("float32")})
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    schema = pa.schema({"image": kind, "label": pa.float32()}).with_metadata(features.arrow_schema.metadata)
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, num_rows, 50_000):
            labels = rng.integers(0, 101, min(50_000, num_rows - start))
            images = pa.array([pictures[label] for label in labels], kind)
            writer.write_table(pa.table({"image": images, "label": pa.array(labels, pa.float32())}, schema))


def work(table: str, folder: str, steps: int) -> None:
    """In each process: train, and look at the memory on the way."""
    config = load_config(
        None,
        [
            f"output_dir={folder}/run",
            "method=l1",
            "data.source=table",
            f"data.train_table={table}",
            "model.image_size=32",
            "ranks.low=0",
            "ranks.high=100",
            "ranks.num=101",
            "train.batch_size=96",
            f"train.max_steps={steps}",
            f"train.eval_every={steps}",
        ],
    )
    memory: dict[int, float] = {}
    first: dict[int, float] = {}

    class Watched(trainer.Learner):
        """Looks at the clock before the first batch of each of two epochs, and at the memory between steps."""

        def __init__(self, model: OrdinalModel, parts: Parts, *more: Any):
            super().__init__(model, parts, *more)
            for epoch in (1, 2):
                start = -(-len(parts.train) * (epoch - 1) // config.train.batch_size)
                self.stream, self.total = Stream(len(parts.train), config.seed), start + 1
                begun = time.monotonic()
                with self.batches(start) as batches:
                    next(batches)
                first[epoch] = time.monotonic() - begun
            self.total = steps

        def step(self, number: int, pixels: torch.Tensor, positions: torch.Tensor) -> dict[str, Any]:
            if number in (0, 10, steps // 2, steps - 1):
                memory[number] = private_mb()
            return super().step(number, pixels, positions)

    trainer.Learner = Watched
    train(config, quiet=True)
    rank = int(os.environ["RANK"])
    Path(folder, f"rank{rank}.json").write_text(json.dumps({"memory": memory, "first": first}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--worker", nargs=2, metavar=("TABLE", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        torch.set_num_threads(1)
        work(*arguments.worker, arguments.steps)
        return
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, datasets {datasets.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "rows.parquet"
        write_table(table, arguments.rows)
        print(f"{arguments.rows:,} rows, {table.stat().st_size >> 20} MB, {arguments.steps} steps of batch 96, seed 1")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(arguments.processes), __file__, "--steps", str(arguments.steps)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": f"{folder}/cache"}
        done = subprocess.run(
            [*command, "--worker", str(table), folder], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(done.stderr[:4000])
        found = [json.loads((Path(folder) / f"rank{rank}.json").read_text()) for rank in range(arguments.processes)]
    steps = list(found[0]["memory"])
    print("| process | " + " | ".join(f"MB at step {step}" for step in steps) + " | first batch, epoch 1 | epoch 2 |")
    print("|---:|" + "---:|" * (len(steps) + 2))
    for rank, figures in enumerate(found):
        cells = [f"{figures['memory'][step]:.0f}" for step in steps]
        cells += [f"{figures['first'][epoch]:.3f} s" for epoch in ("1", "2")]
        print(f"| {rank} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
