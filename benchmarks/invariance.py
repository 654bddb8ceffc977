"""One config, any hardware, the same numbers: every method, on 1 to 4 processes, with and without micro-batches.

    python benchmarks/invariance.py                        # the whole table, minutes on two cores
    python benchmarks/invariance.py --fault local-loss     # a planted fault: must end in red, with status 1

Each number of processes is one launch of torchrun (gloo) that trains all methods with all micro-batches through
`ordinalclip train`: the shipped tiny CLIP (at 32 px, to save time), crop, flip, dropout and drop-path on. Shown is the
largest relative difference to one process without micro-batches, of the losses of all steps and of the final weights'
norm of difference. In float64 both have to agree to 1e-8, in float32 the losses to 1e-3.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import accelerate
import numpy as np
import torch

from ordinalclip.cli import main as ordinalclip
from ordinalclip.heads import available_heads
from ordinalclip.training import distributed, trainer
from ordinalclip.training.checkpoint import checkpoints, load_checkpoint
from ordinalclip.training.sampling import shares

TOLERANCE = {"float64": 1e-8, "float32": 1e-3}
FAULTS = ("local-loss", "local-batch-norm", "scaled-gradient")
SERVED_ONLY = {"prototypes"}  # what other heads become; needs their prototypes
OPTIONS = [
    "ranks.low=0",
    "ranks.high=100",
    "ranks.num=21",
    "data.num_train=48",
    "data.num_validation=8",
    "data.num_test=1",
    "data.augment.flip=true",
    "data.augment.crop_ratio=1.2",
    "model.image_size=32",
    "model.dropout=0.1",
    "model.drop_path=0.1",
    "train.lr=1e-3",
    "train.eval_every=1000",
    "evaluation.test=false",
    "evaluation.report=false",
]


def micro_batches(batch_size: int, processes: int) -> dict[str, int | None]:
    """None, half and an eighth of the largest share."""
    share = max(shares(batch_size, processes))
    return {"none": None, "1/2": max(1, share // 2), "1/8": max(1, share // 8)}


def plant(fault: str) -> list[str]:
    """Spoil the trainer in this process; returns overrides that belong to the fault."""
    if fault == "local-loss":  # every process takes the loss of its own share; targets likewise
        trainer.gather_outputs = lambda outputs, sizes: outputs
        trainer.gather = lambda tensor, sizes: tensor
    elif fault == "scaled-gradient":
        right = distributed._GatherWithGradient.backward

        def scaled(ctx, gradient):
            return right(ctx, gradient * torch.distributed.get_world_size())

        distributed._GatherWithGradient.backward = staticmethod(scaled)
    elif fault == "local-batch-norm":
        return ["model.batch_norm=local", "train.exact=false"]
    return []


def work(arguments: argparse.Namespace) -> None:
    """In one of the processes: train everything, one run after the other."""
    processes = int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    overrides = plant(arguments.fault)
    for method in arguments.methods:
        for precision in arguments.precision:
            for name, size in micro_batches(arguments.batch_size, processes).items():
                folder = run_folder(arguments.folder, processes, method, name, precision)
                command = ["train", "default", "--quiet", f"method={method}", f"output_dir={folder}", *OPTIONS]
                command += [f"train.precision={precision}", f"train.max_steps={arguments.steps}"]
                command += [f"train.batch_size={arguments.batch_size}", f"train.micro_batch_size={size or 'null'}"]
                with contextlib.redirect_stdout(io.StringIO()):
                    status = ordinalclip([*command, *overrides])
                if status:
                    raise SystemExit(status)


def run_folder(root: str, processes: int, method: str, micro: str, precision: str) -> Path:
    return Path(root) / f"{processes}-{method}-{micro.replace('/', '')}-{precision}"


def launch(processes: int, arguments: argparse.Namespace) -> None:
    """torchrun this file with --worker."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [__file__, "--worker", "--folder", arguments.folder, "--steps", str(arguments.steps)]
    command += ["--batch-size", str(arguments.batch_size), "--fault", arguments.fault]
    command += ["--precision", *arguments.precision, "--methods", *arguments.methods]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{processes} processes failed:\n{done.stderr[:4000]}")


def losses(folder: Path) -> np.ndarray:
    return np.array([json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()])


def weights(folder: Path) -> torch.Tensor:
    """All floating-point weights of the last checkpoint in one vector, (P,) float64."""
    state = load_checkpoint(checkpoints(folder / "checkpoints")[-1]).weights
    return torch.cat([tensor.double().flatten() for tensor in state.values() if tensor.is_floating_point()])


def differences(folder: Path, reference: Path) -> tuple[float, float]:
    """Largest relative difference of the losses, and the norm of the weights' difference over that of the weights."""
    right, found = losses(reference), losses(folder)
    if found.shape != right.shape:
        return float("inf"), float("inf")
    vector = weights(reference)
    relative = np.abs(found - right) / np.maximum(np.abs(right), 1e-9)  # some losses are 0 in some batches
    return float(relative.max()), ((weights(folder) - vector).norm() / vector.norm()).item()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32, help="global batch (default 32)")
    parser.add_argument("--methods", nargs="+", default=sorted(set(available_heads()) - SERVED_ONLY))
    parser.add_argument("--precision", nargs="+", choices=list(TOLERANCE), default=list(TOLERANCE))
    parser.add_argument("--fault", choices=["none", *FAULTS], default="none")
    parser.add_argument("--folder", default="", help="where the runs go (default: a temporary folder)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        arguments.folder = arguments.folder or temporary
        return table(arguments)


def table(arguments: argparse.Namespace) -> int:
    """Run everything and print the table; the number of cells in red, at most 1."""
    started = time.monotonic()
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, accelerate "
        f"{accelerate.__version__}; {arguments.steps} steps of batch {arguments.batch_size}, seed 1, "
        f"fault: {arguments.fault}"
    )
    fault = arguments.fault
    for processes in sorted({1, *arguments.processes}):
        arguments.fault = fault if processes > 1 else "none"  # the reference is always sound
        launch(processes, arguments)
    heads = {"float64": ["loss, float64", "weights, float64"], "float32": ["loss, float32"]}
    shown_heads = [head for precision in arguments.precision for head in heads[precision]]
    print(f"| method | processes | micro-batch | {' | '.join(shown_heads)} |")
    print("|---|" + "---:|" * (2 + len(shown_heads)))
    red, worst = 0, 0.0
    for method in arguments.methods:
        references = {p: run_folder(arguments.folder, 1, method, "none", p) for p in arguments.precision}
        if not len(losses(references[arguments.precision[0]])):
            print(f"| {method} | - | - | learns nothing |" + " |" * (len(shown_heads) - 1))
            continue
        for processes in arguments.processes:
            for micro, size in micro_batches(arguments.batch_size, processes).items():
                if processes == 1 and micro == "none":
                    continue
                cells = []
                for precision in arguments.precision:
                    tolerance = TOLERANCE[precision]
                    folder = run_folder(arguments.folder, processes, method, micro, precision)
                    found = differences(folder, references[precision])
                    shown = found if precision == "float64" else found[:1]
                    cells += [f"{value:.1e}" + ("" if value < tolerance else " **RED**") for value in shown]
                    red += sum(not value < tolerance for value in shown)
                    worst = max(worst, *found) if precision == "float64" else worst
                print(f"| {method} | {processes} | {micro} ({size or 'all'}) | " + " | ".join(cells) + " |")
    print(f"{red} cells in red, largest difference in float64 {worst:.1e}; {time.monotonic() - started:.0f} s")
    return int(red > 0)


if __name__ == "__main__":
    sys.exit(main())
