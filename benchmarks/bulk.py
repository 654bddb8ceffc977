"""Bulk prediction: nothing lost or repeated by kills, and what it costs beside a bare loop over the encoder.

    python benchmarks/bulk.py chaos                  # 100,000 pictures on two processes, five kills
    python benchmarks/bulk.py speed                  # images per processor second, against a bare loop

chaos: a table names some hundred drawn gauges again and again, broken ones among them, with ids and another column.
`predict --out FOLDER` runs over it on two processes (gloo), undisturbed; then once more into another folder, killed by
SIGKILL, both processes at once, at moments drawn at random, and given again until it is through. What both folders
hold, joined, is compared row for row, and with the table.

speed: `predict --data TABLE --out FOLDER` and a loop that one would write by hand over the same files: Pillow, resize,
crop, normalise, stack, encoder; no head, no answers, no output. In turn, in one process, so that other work on the
machine meets both, one thread. Processor seconds are those of the loop, as the command prints them; imports and loading
the model are in neither.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import platform
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

PICTURES, BROKEN = 300, 5  # files that the table names
PER_SECOND = re.compile(r"([\d,.]+) per processor second")


def make_model(folder: Path, backbone: str, size: int | None) -> None:
    """A saved model with random prototypes, whose answers differ from picture to picture."""
    import torch

    from ordinalclip import OrdinalModel, Ranks

    torch.manual_seed(0)
    ranks = Ranks.linear(0, 100, 101, unit="%")
    loaded = backbone == "tiny"
    model = OrdinalModel.build(
        backbone, ranks, "prototypes", load_weights=loaded, image_size=size, decoding="expectation"
    )
    with torch.no_grad():
        model.head.prototypes.normal_()
    model.save_pretrained(folder)


def write_table(folder: Path, rows: int, size: int, ending: str, broken: int = BROKEN) -> Path:
    """Drawn gauges, some of them cut off, named again and again in random order by a table with ids."""
    from ordinalclip.gauges import drawn_gauges

    names = []
    for index, (picture, _) in enumerate(drawn_gauges("dial", PICTURES, 0, size)):
        names.append(f"{index:04d}{ending}")
        picture.save(folder / names[-1], **({"quality": 90} if ending == ".jpg" else {}))
    rng = random.Random(0)
    for name in rng.sample(names, broken):
        (folder / name).write_bytes((folder / name).read_bytes()[:100])
    table = folder / "rows.csv"
    with table.open("w", encoding="utf-8") as file:
        file.write("id,image,note\n")
        for row in range(rows):
            file.write(f'{row:07d},{rng.choice(names)},"a, ""{rng.random():.3f}"""\n')
    return table


def start(arguments: list[str], processes: int, log: Path) -> list[subprocess.Popen]:
    """The processes of one launch, in one process group, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started: list[subprocess.Popen] = []
    for rank in range(processes):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RANK": str(rank)}
        environment.update(LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
        environment.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
        with log.open("a") as output:
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", "ordinalclip", "predict", *arguments],
                    env=environment,
                    stdout=output,
                    stderr=output,
                    process_group=started[0].pid if started else 0,
                )
            )
    return started


def finish(started: list[subprocess.Popen], log: Path) -> None:
    statuses = [process.wait() for process in started]
    if any(statuses):
        raise RuntimeError(log.read_text())


def parts_in(folder: Path) -> int:
    return len(list(folder.glob("part-*.parquet")))


def chaos(rows: int, kills: int, block: int, seed: int) -> None:
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as made:
        place = Path(made)
        make_model(place / "model", "tiny", None)
        (place / "pictures").mkdir()
        table = write_table(place / "pictures", rows, 64, ".png")
        common = ["--model", str(place / "model"), "--data", str(table), "--block", str(block), "--quiet"]
        log = place / "log"
        began = time.monotonic()
        finish(start([*common, "--out", str(place / "whole")], 2, log), log)
        took = time.monotonic() - began
        print(f"undisturbed: {took:.0f} s; {log.read_text().splitlines()[0]}", flush=True)

        number = -(-rows // block)
        moments = sorted(rng.uniform(0, 0.9) for _ in range(kills))
        for kill, moment in enumerate(moments, 1):
            before = parts_in(place / "killed")
            started = start([*common, "--out", str(place / "killed")], 2, log)
            while parts_in(place / "killed") < moment * number and all(each.poll() is None for each in started):
                time.sleep(0.05)
            time.sleep(rng.uniform(0, 2 * took / number))  # in the middle of a block, or in writing one
            if all(each.poll() is None for each in started):
                os.killpg(started[0].pid, signal.SIGKILL)
                after = parts_in(place / "killed")
                print(f"kill {kill}: {after} of {number} parts are there, {after - before} of them new", flush=True)
            else:
                raise RuntimeError(log.read_text())
            for each in started:
                each.wait()
        finish(start([*common, "--out", str(place / "killed")], 2, log), log)
        print(f"last: {log.read_text().splitlines()[-2]}", flush=True)
        whole, killed = (pq.read_table(place / name) for name in ("whole", "killed"))
        ids = [f"{row:07d}" for row in range(rows)]
        errors = rows - killed["error"].null_count
        print(f"ids as in the table: {killed['id'].to_pylist() == ids}; row by row equal: {whole.equals(killed)}")
        different = len(set(killed["value"].to_pylist()))
        print(f"{len(killed):,} rows, {errors:,} with an error, {different:,} different values")
        left = sorted(each.name for each in (place / "killed").iterdir() if not each.name.startswith("part-"))
        print(f"beside the parts: {', '.join(left)}")


def bare(model: str, table: Path, batch_size: int) -> float:
    """The loop that one would write by hand; images per processor second."""
    import csv

    import torch
    from PIL import Image

    from ordinalclip import OrdinalModel

    loaded = OrdinalModel.from_pretrained(model)
    encoder, spec = loaded.encoder, loaded.config.pixel_spec
    with table.open(newline="") as file:
        files = [table.parent / row["image"] for row in csv.DictReader(file)]
    mean, std = torch.tensor(spec.mean)[:, None, None], torch.tensor(spec.std)[:, None, None]

    def pixels(path: Path) -> torch.Tensor:
        with Image.open(path) as file:
            image = file.convert("RGB")
        scale = spec.scaled_size / min(image.size)
        size = tuple(max(spec.scaled_size, round(side * scale)) for side in image.size)
        image = image if image.size == size else image.resize(size, Image.Resampling[spec.interpolation.upper()])
        left, top = round((image.width - spec.size) / 2), round((image.height - spec.size) / 2)
        image = image.crop((left, top, left + spec.size, top + spec.size))
        return (torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 - mean) / std

    started = time.process_time()
    with torch.no_grad():
        for begin in range(0, len(files), batch_size):
            encoder(torch.stack([pixels(file) for file in files[begin : begin + batch_size]]))
    return len(files) / (time.process_time() - started)


def command(model: str, table: Path, batch_size: int) -> float:
    """Images per processor second, as `predict` prints it."""
    from ordinalclip.cli import main as ordinalclip

    printed = io.StringIO()
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(printed):
        call = ["predict", "--model", model, "--data", str(table), "--out", out, "--batch-size", str(batch_size), "-q"]
        status = ordinalclip(call)
    found = PER_SECOND.search(printed.getvalue())
    assert status == 0, status
    assert found is not None, printed.getvalue()
    return float(found[1].replace(",", ""))


def speed(backbone: str, size: int | None, picture: int, rows: int, batch_size: int, repeats: int) -> None:
    import torch

    torch.set_num_threads(1)
    rates: dict[str, list[float]] = {"bare": [], "command": []}
    with tempfile.TemporaryDirectory() as made:
        place = Path(made)
        model = str(place / "model")
        make_model(place / "model", backbone, size)
        (place / "pictures").mkdir()
        table = write_table(place / "pictures", rows, picture, ".jpg", broken=0)
        command(model, table, batch_size)  # what happens once in a process
        for _ in range(repeats):
            rates["bare"].append(bare(model, table, batch_size))
            rates["command"].append(command(model, table, batch_size))
    print(f"{backbone}, pictures of {picture} px, {rows:,} rows, batch {batch_size}, {repeats} repeats")
    for kind, found in rates.items():
        print(
            f"{kind}: {statistics.median(found):.1f} images per processor second ({min(found):.1f} to {max(found):.1f})"
        )
    ratios = [ours / loop for ours, loop in zip(rates["command"], rates["bare"], strict=True)]
    print(f"command / bare: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    seconds = {kind: sum(1 / rate for rate in found) for kind, found in rates.items()}
    print(f"of all processor seconds together: {seconds['bare'] / seconds['command']:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("chaos", "speed"))
    parser.add_argument("--rows", type=int, help="default: 100,000 for chaos, 1,024 for speed")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--block", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backbone", default="tiny")
    parser.add_argument("--size", type=int, help="of the encoder's input; default: its own")
    parser.add_argument("--picture", type=int, default=128, help="side of the files")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    import torch

    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, pyarrow {pa.__version__}")
    if arguments.what == "chaos":
        chaos(arguments.rows or 100_000, arguments.kills, arguments.block, arguments.seed)
    else:
        shape = arguments.backbone, arguments.size, arguments.picture
        speed(*shape, arguments.rows or 1024, arguments.batch_size, arguments.repeats)


if __name__ == "__main__":
    main()
