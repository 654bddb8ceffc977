"""What each speed switch of the trainer does, as a ratio to the same run without it.

    python benchmarks/switches.py                     # images a second and peak memory, minutes on two cores

Every switch trains the same OrdinalCLIP on gauges in a process of its own, `--repeats` times, plain runs in between.
Shown are the median ratio of images a second after the first steps, the ratio of the peak resident memory (on a GPU:
of its peak allocation), and the relative difference of the last loss.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile

import torch

from ordinalclip.config import load_config
from ordinalclip.training import train

SWITCHES = {
    "train.fused=false": "",
    "train.compile=true": "",
    "train.activation_checkpointing=true": "",
    "train.mixed_precision=bf16": "",
    "train.tf32=true": "GPU only",
    "data.workers=1": "",
    "data.cache_mb=0": "",
    "train.ema=0.999": "",
    "train.freeze_layers=2": "",
    "model.lora_rank=4": "",
    "train.micro_batch_size=16": "",
}
WARM_UP = 5


def work(folder: str, backbone: str, steps: int, batch_size: int, switch: str) -> None:
    """In a process of its own: train and say how fast it went."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    options = [f"output_dir={folder}", f"model.backbone={backbone}", "ranks.low=0", "ranks.high=100", "ranks.num=101"]
    options += ["data.num_train=512", "data.num_validation=1", "evaluation.test=false", "train.lr=1e-4"]
    options += [f"train.max_steps={steps}", f"train.batch_size={batch_size}", f"train.eval_every={steps}"]
    run = train(load_config(None, [*options, *([switch] if switch else [])]), quiet=True)
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    # the last row's time includes the validation
    rate = batch_size * (len(rows) - 2 - WARM_UP) / (rows[-2]["seconds"] - rows[WARM_UP - 1]["seconds"])
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if torch.cuda.is_available():
        memory = torch.cuda.max_memory_allocated() / 2**20
    print(json.dumps({"rate": rate, "memory": memory, "loss": rows[-1]["loss"]}))


def measure(arguments: argparse.Namespace, switch: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--worker", folder, "--backbone", arguments.backbone, "--switch", switch]
        command += ["--steps", str(arguments.steps), "--batch-size", str(arguments.batch_size)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="tiny")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--switch", default="", help="only this one, e.g. train.compile=true")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, arguments.backbone, arguments.steps, arguments.batch_size, arguments.switch)
        return
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores"
    print(
        f"{platform.machine()}, {where}, torch {torch.__version__}, OMP_NUM_THREADS "
        f"{os.environ.get('OMP_NUM_THREADS', 'unset: 1')}; {arguments.backbone}, {arguments.steps} steps of batch "
        f"{arguments.batch_size}, {arguments.repeats} repeats, seed 1"
    )
    print("| switch | images/s, ratio | peak memory, ratio | last loss, relative difference |\n|---|---:|---:|---:|")
    for switch in [arguments.switch] if arguments.switch else SWITCHES:
        if SWITCHES.get(switch) == "GPU only" and not torch.cuda.is_available():
            print(f"| {switch} | needs a GPU | | |")
            continue
        pairs = []
        try:
            for _ in range(arguments.repeats):
                pairs.append((measure(arguments, ""), measure(arguments, switch)))
        except RuntimeError as error:
            print(f"| {switch} | {error} | | |")
            continue
        rate = statistics.median(on["rate"] / off["rate"] for off, on in pairs)
        memory = statistics.median(on["memory"] / off["memory"] for off, on in pairs)
        loss = max(abs(on["loss"] / off["loss"] - 1) for off, on in pairs)
        print(f"| {switch} | {rate:.2f} | {memory:.2f} | {loss:.1e} |", flush=True)


if __name__ == "__main__":
    main()
