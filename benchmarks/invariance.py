"""One config, any hardware, the same numbers: every method, on 1 to 4 processes, with and without micro-batches.

    python benchmarks/invariance.py                        # the whole table, minutes on two cores
    python benchmarks/invariance.py --fault local-loss     # a planted fault: must end in red, with status 1

Each number of processes is one launch of torchrun (gloo) that trains all methods with all micro-batches through
`ordinalclip train`: the shipped tiny CLIP (at 32 px, to save time), crop, flip, dropout and drop-path on. Shown is the
largest relative difference to one process without micro-batches, of the losses of all steps and of the final weights'
norm of difference. In float64 both have to agree to 1e-8, in float32 the losses to 1e-3. Run folders are deleted once
they are compared.

Training lets differences grow: rounding in float32 becomes a per cent within ten steps at a learning rate of 1e-3, for
losses with hinges (contrastive, atrip) or large gradients (dldl_v2). So float32 has the package's default, 1e-4, and
float64 the harder 1e-3.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import accelerate
import torch
from accelerate import PartialState

from ordinalclip.cli import main as ordinalclip
from ordinalclip.heads import available_heads
from ordinalclip.training import distributed, step
from ordinalclip.training.checkpoint import checkpoints, load_checkpoint
from ordinalclip.training.sampling import shares

TOLERANCE = {"float64": 1e-8, "float32": 1e-3}
RATE = {"float64": 1e-3, "float32": 1e-4}
FAULTS = ("local-loss", "local-batch-norm", "scaled-gradient")
MICRO_BATCHES = {"none": 0, "1/2": 2, "1/8": 8}  # parts of the largest share
RESULTS = "results.jsonl"  # processes, method, micro-batch, precision, differences
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
    "train.eval_every=1000",
    "evaluation.test=false",
    "evaluation.report=false",
]


def micro_batches(arguments: argparse.Namespace, processes: int) -> dict[str, int | None]:
    """Those that were asked for; of one process none in any case, which is the reference."""
    share = max(shares(arguments.batch_size, processes))
    asked = arguments.micro_batches if processes in arguments.processes else []
    names = [name for name in MICRO_BATCHES if name in asked or (processes == 1 and name == "none")]
    return {name: max(1, share // MICRO_BATCHES[name]) if MICRO_BATCHES[name] else None for name in names}


def plant(fault: str) -> list[str]:
    """Spoil the trainer in this process; returns overrides that belong to the fault."""
    if fault == "local-loss":  # every process takes the loss of its own share; targets likewise
        step.gather_outputs = lambda outputs, sizes: outputs
        targets = step.Learner._targets

        def own(self, *arguments):
            rank, (values, ranks, weights, progress) = torch.distributed.get_rank(), targets(self, *arguments)
            begin = sum(self.shares[:rank])
            share = slice(begin, begin + self.shares[rank])
            return step.Targets(values[share], ranks[share], None if weights is None else weights[share], progress)

        step.Learner._targets = own
    elif fault == "scaled-gradient":
        right = distributed._GatherWithGradient.backward

        def scaled(ctx, gradient):
            return right(ctx, gradient * torch.distributed.get_world_size())

        distributed._GatherWithGradient.backward = staticmethod(scaled)
    elif fault == "local-batch-norm":
        return ["model.batch_norm=local", "train.exact=false"]
    return []


def work(arguments: argparse.Namespace) -> None:
    """In one of the processes: train everything, one run after the other, and write down the differences."""
    processes = int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    overrides = plant(arguments.fault)
    for method in arguments.methods:
        for precision in arguments.precision:
            for name, size in micro_batches(arguments, processes).items():
                folder = Path(arguments.folder) / "run"
                command = ["train", "default", "--quiet", f"method={method}", f"output_dir={folder}", *OPTIONS]
                command += [f"train.precision={precision}", f"train.lr={RATE[precision]}"]
                command += [f"train.max_steps={arguments.steps}"]
                command += [f"train.batch_size={arguments.batch_size}", f"train.micro_batch_size={size or 'null'}"]
                with contextlib.redirect_stdout(io.StringIO()):
                    status = ordinalclip([*command, *overrides])
                if status:
                    raise SystemExit(status)
                state = PartialState()
                state.wait_for_everyone()  # all have left the folder
                if state.is_main_process:
                    found, reference = read(folder), Path(arguments.folder) / f"{method}-{precision}.pt"
                    if processes == 1 and name == "none":
                        torch.save(found, reference)
                    result = [processes, method, name, precision, *differences(found, torch.load(reference))]
                    with (Path(arguments.folder) / RESULTS).open("a", encoding="utf-8") as file:
                        file.write(json.dumps(result) + "\n")
                    shutil.rmtree(folder)
                state.wait_for_everyone()


def launch(processes: int, arguments: argparse.Namespace) -> None:
    """torchrun this file with --worker."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [__file__, "--worker", "--folder", arguments.folder, "--steps", str(arguments.steps)]
    command += ["--batch-size", str(arguments.batch_size), "--fault", arguments.fault]
    command += ["--precision", *arguments.precision, "--methods", *arguments.methods]
    command += ["--micro-batches", *arguments.micro_batches, "--processes", *map(str, arguments.processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{processes} processes failed:\n{done.stderr[:4000]}")


def read(folder: Path) -> dict[str, torch.Tensor]:
    """A run's losses, (steps,), and all floating-point weights of its last checkpoint, (P,), both in float64."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    if json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["parameters"] == 0:  # learns nothing
        return {"losses": torch.zeros(0), "weights": torch.zeros(0)}
    state = load_checkpoint(checkpoints(folder / "checkpoints")[-1]).weights
    weights = [tensor.double().flatten() for tensor in state.values() if tensor.is_floating_point()]
    losses = torch.tensor([row["loss"] for row in rows], dtype=torch.float64)
    return {"losses": losses, "weights": torch.cat(weights)}


def differences(found: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> tuple[float, float] | tuple[()]:
    """Largest relative difference of the losses, and the norm of the weights' difference over that of the weights;
    nothing for a method that learns nothing."""
    right = reference["losses"]
    if found["losses"].shape != right.shape:
        return float("inf"), float("inf")
    if not len(right):
        return ()
    relative = (found["losses"] - right).abs() / right.abs().clamp_min(1e-9)  # some losses are 0 in some batches
    weights = reference["weights"]
    return relative.max().item(), ((found["weights"] - weights).norm() / weights.norm()).item()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32, help="global batch (default 32)")
    parser.add_argument("--micro-batches", nargs="+", choices=list(MICRO_BATCHES), default=list(MICRO_BATCHES))
    parser.add_argument("--methods", nargs="+", default=sorted(set(available_heads()) - SERVED_ONLY))
    parser.add_argument("--precision", nargs="+", choices=list(TOLERANCE), default=list(TOLERANCE))
    parser.add_argument("--fault", choices=["none", *FAULTS], default="none")
    parser.add_argument("--folder", default="", help="where runs and results go (default: a temporary folder)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        arguments.folder = arguments.folder or temporary
        (Path(arguments.folder) / RESULTS).unlink(missing_ok=True)
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
    lines = (Path(arguments.folder) / RESULTS).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    results = {(method, processes, micro, precision): found for processes, method, micro, precision, *found in rows}
    heads = {"float64": ["loss, float64", "weights, float64"], "float32": ["loss, float32"]}
    shown_heads = [head for precision in arguments.precision for head in heads[precision]]
    print(f"| method | processes | micro-batch | {' | '.join(shown_heads)} |")
    print("|---|" + "---:|" * (2 + len(shown_heads)))
    red, found_by_head = 0, {head: [0.0] for head in shown_heads}
    for method in arguments.methods:
        if not results[method, 1, "none", arguments.precision[0]]:
            print(f"| {method} | - | - | learns nothing |" + " |" * (len(shown_heads) - 1))
            continue
        for processes in arguments.processes:
            for micro, size in micro_batches(arguments, processes).items():
                if processes == 1 and micro == "none":
                    continue
                cells = []
                for precision in arguments.precision:
                    found = results[method, processes, micro, precision]
                    for head, value in zip(heads[precision], found, strict=False):  # of float32 the losses only
                        sound = value < TOLERANCE[precision]
                        cells.append(f"{value:.1e}" + ("" if sound else " **RED**"))
                        red += not sound
                        found_by_head[head].append(value)
                print(f"| {method} | {processes} | {micro} ({size or 'all'}) | " + " | ".join(cells) + " |")
    worst = {head: torch.tensor(values).max().item() for head, values in found_by_head.items()}  # NaN if one is
    print("largest: " + ", ".join(f"{head} {value:.1e}" for head, value in worst.items()))
    print(f"{red} cells in red; {time.monotonic() - started:.0f} s")
    return int(red > 0)


if __name__ == "__main__":
    sys.exit(main())
