"""What a model costs as a graph: errors, speed, cold start and memory of torch, onnxruntime and OpenVINO.

    python benchmarks/export.py --elpv FOLDER --faces FOLDER --slim PYTHON --out benchmarks/results/export

Trains a small model on each data set (frozen EfficientNet-Lite0 at 96 px, a linear head), writes it in all formats and
measures, on its test part,

* the MAE of torch, ONNX and int8, and how far int8 moves answers;
* pictures a processor second, of batches of 16, with one and two threads: the median of `--repeats`, all ways in turn;
* the processor and wall seconds and the peak memory of a process that answers one picture: `predict.py` under
  `--slim`, a Python with numpy, pillow, onnxruntime and openvino alone; `ordinalclip predict` under this one.

Processor time counts all threads, those that wait by spinning among them.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime
import openvino
import torch

from ordinalclip.config import load_config
from ordinalclip.data import Part, load_parts
from ordinalclip.export import export, run_onnx, run_openvino
from ordinalclip.model import OrdinalModel
from ordinalclip.provenance import device
from ordinalclip.runs import train

BATCH = 16
# A small process of its own: the peak memory of what a large one starts is at least that of the large one.
MEASURE = """
import os, sys, time
begun = time.monotonic()
nowhere = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
_, status, usage = os.wait4(os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=nowhere), 0)
assert status == 0
print(usage.ru_utime + usage.ru_stime, time.monotonic() - begun, usage.ru_maxrss / 1024)
"""
COMMON = (
    "model.backbone=efficientnet_lite0",
    "model.text=tiny",
    "model.image_size=96",
    "model.features=cached",
    "data.views=1",
    "data.source=table",
    "data.table=labels.csv",
    "data.image_column=file",
    "data.split=[0.6,0.15,0.25]",
    "train.freeze=[encoder.*]",
    "train.max_steps=400",
    "train.lr=1e-3",
    "evaluation.report=false",
)
DATA = {
    "elpv": ("method=cross_entropy", "data.label_column=label", "ranks.values=[0,1,2,3]", "ranks.unit=levels"),
    "faces": ("method=l1", "data.label_column=age", "ranks.unit=years"),
}


def pixels_of(model: OrdinalModel, part: Part, count: int) -> np.ndarray:
    """(count, 3, size, size) pictures of a part, spread over its rows."""
    rows = np.linspace(0, len(part) - 1, min(count, len(part))).round().astype(int)
    return model.image_processor([part.image(row) for row in rows])["pixel_values"].numpy()


def in_batches(ask: Callable[[np.ndarray], np.ndarray], pixels: np.ndarray) -> np.ndarray:
    return np.concatenate([ask(pixels[begin : begin + BATCH]) for begin in range(0, len(pixels), BATCH)])


def ways(run: Path, folder: Path, threads: int) -> dict[str, Callable[[], Callable[[np.ndarray], np.ndarray]]]:
    """How a batch of pixels may become values, each made when its turn comes."""

    def of_torch(compiled: bool) -> Callable[[np.ndarray], np.ndarray]:
        torch.set_num_threads(threads)
        model = OrdinalModel.from_pretrained(run / "model")
        if compiled:
            model.encoder = torch.compile(model.encoder)  # type: ignore[assignment]
        return lambda pixels: model.predict(torch.from_numpy(pixels)).value.numpy()

    def of_graph(ask: Any) -> Callable[[np.ndarray], np.ndarray]:
        return lambda pixels: ask({"pixel_values": pixels})["value"]

    return {
        "torch": lambda: of_torch(False),
        "torch.compile": lambda: of_torch(True),
        "onnxruntime": lambda: of_graph(run_onnx(folder / "onnx" / "model.onnx", threads)),
        "onnxruntime, int8": lambda: of_graph(run_onnx(folder / "int8" / "model.onnx", threads)),
        "OpenVINO": lambda: of_graph(run_openvino(folder / "openvino" / "model.xml", threads)),
        "OpenVINO, int8 ONNX": lambda: of_graph(run_openvino(folder / "int8" / "model.onnx", threads)),
    }


def speeds(run: Path, folder: Path, pixels: np.ndarray, threads: int, repeats: int) -> dict[str, float]:
    """Pictures a processor second of every way."""
    asked = {name: make() for name, make in ways(run, folder, threads).items()}
    for ask in asked.values():
        in_batches(ask, pixels[: 2 * BATCH])  # compiles, and warms up
    found: dict[str, list[float]] = {}
    for _ in range(repeats):
        for name, ask in asked.items():
            begun = time.process_time()
            in_batches(ask, pixels)
            found.setdefault(name, []).append(len(pixels) / (time.process_time() - begun))
    return {name: median(each) for name, each in found.items()}


def cold(command: list[str], repeats: int) -> tuple[float, float, float]:
    """Processor seconds, wall seconds and peak MB of a process, medians."""
    found = []
    for _ in range(repeats):
        shell = [sys.executable, "-I", "-S", "-c", MEASURE, *command]
        shown = subprocess.run(shell, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, check=True)
        found.append(tuple(map(float, shown.stdout.split()[-3:])))
    return tuple(median(column) for column in zip(*found, strict=True))  # type: ignore[return-value]


def table(heads: list[str], rows: list[list[Any]]) -> str:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elpv", type=Path, required=True)
    parser.add_argument("--faces", type=Path, required=True)
    parser.add_argument("--slim", default="", help="a Python without torch; default: this one")
    parser.add_argument("--pictures", type=int, default=600, help="of the test part, for errors and speed")
    parser.add_argument("--train", type=int, default=None, help="pictures to train on; default: all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    errors, rates, starts = [], [], []
    with tempfile.TemporaryDirectory() as scratch:
        for name, own in DATA.items():
            folder = Path(scratch) / name
            few = [] if options.train is None else [f"data.num_train={options.train}"]
            overrides = [*COMMON, *own, *few, f"data.root={getattr(options, name)}", f"output_dir={folder}/run"]
            config = load_config(None, overrides)
            run = train(config, quiet=True)
            exported = {
                label: export(run, folder / label, form, label == "int8")  # type: ignore[arg-type]
                for label, form in (("onnx", "onnx"), ("int8", "onnx"), ("openvino", "openvino"))
            }
            part = load_parts(config.data, config.ranks, config.seed).test
            assert part is not None
            model = OrdinalModel.from_pretrained(run / "model")
            pixels = pixels_of(model, part, options.pictures)
            chosen = np.linspace(0, len(part) - 1, len(pixels)).round().astype(int)
            labels = part.values[chosen]
            made = {way: make for way, make in ways(run, folder, 1).items() if way != "torch.compile"}
            values = {way: in_batches(make(), pixels) for way, make in made.items()}
            for way, each in values.items():
                moved = np.abs(each - values["torch"]).mean()
                errors.append([name, way, f"{np.abs(each - labels).mean():.4f}", f"{moved:.2g}"])
            print(name, len(pixels), {label: str(each.agreement) for label, each in exported.items()}, flush=True)
            if name == "elpv":
                for threads in (1, 2):
                    found = speeds(run, folder, pixels[: 20 * BATCH], threads, options.repeats)
                    for way, rate in found.items():
                        rates.append([way, threads, f"{rate:.0f}", f"{rate / found['torch']:.2f}"])
                slim = options.slim or sys.executable
                picture = str(part.picture(0))
                for label, way in (("onnx", "onnxruntime"), ("int8", "onnxruntime, int8"), ("openvino", "OpenVINO")):
                    spent = cold([slim, "-I", str(folder / label / "predict.py"), picture], options.repeats)
                    starts.append([f"predict.py, {way}", *(f"{each:.2f}" for each in spent[:2]), f"{spent[2]:.0f}"])
                command = [sys.executable, "-m", "ordinalclip", "predict", picture, "--model", str(run), "--quiet"]
                spent = cold(command, options.repeats)
                starts.append(["ordinalclip predict", *(f"{each:.2f}" for each in spent[:2]), f"{spent[2]:.0f}"])
    options.out.mkdir(parents=True, exist_ok=True)
    used = "--elpv FOLDER --faces FOLDER --slim PYTHON" + "".join(
        f" --{key} {value}" for key in ("pictures", "train", "repeats") if (value := getattr(options, key)) is not None
    )
    text = f"""# Models as graphs

`python benchmarks/export.py {used} --out benchmarks/results/export`.
Frozen EfficientNet-Lite0 at 96 px, a linear head (ELPV: cross-entropy over four levels; faces: L1), 400 steps: models
to compare with themselves, not the best ones.
torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, OpenVINO {openvino.__version__.partition("-")[0]};
{device()}, shared with other work: read the ratios.

Errors on pictures of the test part, and how far answers are from torch's on average, in the label's unit:

{table(["data", "answered by", "MAE", "moved by"], errors)}

Pictures a processor second, batches of {BATCH}, medians of {options.repeats}:

{table(["answered by", "threads", "pictures / s", "of torch"], rates)}

A process that answers one picture and ends:

{table(["program", "processor s", "wall s", "peak MB"], starts)}
"""
    (options.out / "table.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
