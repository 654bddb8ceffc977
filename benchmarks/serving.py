"""One model asked in every way, and a server under load, one of whose workers is killed.

    python benchmarks/serving.py RUN PICTURES --slim PYTHON --out benchmarks/results/serving

RUN keeps intervals. The same files go through the pipeline, `OrdinalRegressor`, `predict.py` with onnxruntime and with
OpenVINO under `--slim`, a Python without torch that has `examples/serving/requirements.txt` and openvino, and through
the server; differences are from the pipeline's answers. Then 200 clients ask the server, a tenth of their requests are
to be refused, and after a third of them a worker is killed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import importlib.metadata
import io
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import psutil

from ordinalclip.export import export
from ordinalclip.files import whole
from ordinalclip.pipeline import load_pipeline
from ordinalclip.provenance import device
from ordinalclip.regressor import OrdinalRegressor

SERVING = Path(__file__).parents[1] / "examples" / "serving"
COLUMNS = ["value", "low", "high", "probability"]

sys.path.append(str(SERVING))
client = importlib.import_module("load")


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


def healthy(address: str) -> bool:
    """Whether the server is there and all its workers are ready."""
    ask = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
    try:
        return bool(ask(f"{address}/health", timeout=5).status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def wait_until_healthy(address: str, server: subprocess.Popen[Any] | None = None, seconds: float = 90) -> None:
    """Raises: RuntimeError: it ended, or took too long."""
    end = time.monotonic() + seconds
    while not healthy(address):
        if time.monotonic() > end or (server is not None and server.poll() is not None):
            raise RuntimeError("the server is not ready")
        time.sleep(0.2)


@contextlib.contextmanager
def serving(
    folder: Path, python: str = sys.executable, **options: float
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The server of an export: its address, and its process."""
    port = free_port()
    words = [f"--{name}={value}" for name, value in options.items()]
    command = [python, str(SERVING / "server.py"), str(folder), "--port", str(port), *words]
    with subprocess.Popen(command) as server:
        try:
            wait_until_healthy(f"http://127.0.0.1:{port}", server)
            yield f"http://127.0.0.1:{port}", server
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(30)


def workers(server: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The processes that answer."""
    children = psutil.Process(server.pid).children()
    return [each for each in children if "spawn_main" in " ".join(each.cmdline())]


def tabled(folder: Path, files: Sequence[Path], level: float, python: str) -> pd.DataFrame:
    """What predict.py prints."""
    command = [python, "-I", str(folder / "predict.py"), "--level", f"{level:g}", *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return pd.read_csv(io.StringIO(done.stdout))[COLUMNS]


def served(address: str, files: Sequence[Path], level: float) -> pd.DataFrame:
    """What the server answers to every file, in their order."""
    outcomes = asyncio.run(client.load(address, client.good(files, len(files), level), clients=32))
    found = {each.job.name: each.answer for each in outcomes}
    return pd.DataFrame([found[file.name] for file in files])[COLUMNS]


def everywhere(run: Path, files: Sequence[Path], level: float, scratch: Path, slim: str) -> dict[str, pd.DataFrame]:
    """A frame of `COLUMNS` for every way of asking, a row per file."""
    pipe = load_pipeline(run / "model")
    asked = pipe([str(file) for file in files], interval=level, top_k=len(pipe.model.config.label_space))
    for each in asked:
        each["probability"] = next(top["probability"] for top in each["top"] if top["name"] == each["name"])
    found = {"pipeline": pd.DataFrame(asked)[COLUMNS]}
    table = pd.DataFrame({"image": [str(file) for file in files]})
    frame = OrdinalRegressor.from_pretrained(run).predict(table, interval=level)
    frame["probability"] = [row["probabilities"][row["rank"]] for _, row in frame.iterrows()]
    found["OrdinalRegressor"] = frame[COLUMNS]
    for form, name in (("onnx", "onnxruntime, predict.py"), ("openvino", "OpenVINO, predict.py")):
        export(run, scratch / form, form)  # type: ignore[arg-type]
        found[name] = tabled(scratch / form, files, level, slim)
    if slim != sys.executable:
        found["onnxruntime, Pillow as here"] = tabled(scratch / "onnx", files, level, sys.executable)
    with serving(scratch / "onnx", slim) as (address, _):
        found["onnxruntime, LitServe"] = served(address, files, level)
    return found


def differences(found: dict[str, pd.DataFrame], width: float) -> pd.DataFrame:
    """The largest from the pipeline's answers, of values and ends as a share of the range of the ranks."""
    first, *others = found
    rows = {}
    for name in others:
        apart = (found[name] - found[first]).abs()
        moved, off = apart.max(), (apart["probability"] > 1e-5).sum()
        rows[name] = [len(found[name]), *(moved[column] / width for column in COLUMNS[:3]), moved["probability"], off]
    return pd.DataFrame.from_dict(rows, orient="index", columns=["pictures", *COLUMNS, "by more than 1e-5"])


def under_load(
    folder: Path, files: Sequence[Path], clients: int, requests: int, python: str = sys.executable
) -> tuple[list[Any], float]:
    """What became of the requests, a worker killed after a third of them, and the seconds that they took."""
    bad = requests // 10
    fine = requests - bad
    jobs = client.good(files, fine // 2) + client.good(files, fine - fine // 2, level=0.6)  # two levels in a batch
    jobs += client.hostile(bad, files[0].read_bytes())
    random.Random(0).shuffle(jobs)
    with serving(folder, python, workers=2, timeout=20) as (address, server):
        before = workers(server)

        def killing() -> Iterator[Any]:
            for place, job in enumerate(jobs):
                if place == len(jobs) // 3:
                    os.kill(before[0].pid, signal.SIGKILL)
                yield job

        begin = time.perf_counter()
        outcomes = asyncio.run(client.load(address, killing(), clients, leaving=clients // 10))
        seconds = time.perf_counter() - begin
        wait_until_healthy(address)
        after = workers(server)
        assert not before[0].is_running() or before[0].status() == psutil.STATUS_ZOMBIE
        assert len([each for each in after if each.status() != psutil.STATUS_ZOMBIE]) == 2
    return outcomes, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("pictures", type=Path, help="a folder of PNG and JPEG files")
    parser.add_argument("--level", type=float, default=0.9)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--slim", default=sys.executable, help="a Python without torch; default: this one")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    files = sorted(file for file in options.pictures.iterdir() if file.suffix in (".png", ".jpg"))
    with tempfile.TemporaryDirectory() as scratch:
        found = everywhere(options.run, files, options.level, Path(scratch), options.slim)
        values = load_pipeline(options.run / "model").model.config.label_space.values
        table = differences(found, max(values) - min(values))
        outcomes, seconds = under_load(Path(scratch) / "onnx", files, options.clients, options.requests, options.slim)
    names = ("litserve", "onnxruntime", "pillow")
    code = f"import importlib.metadata as m; print(', '.join(f'{{p}} {{m.version(p)}}' for p in {names}))"
    versions = subprocess.run([options.slim, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    spread = found["pipeline"]["value"].nunique()
    text = f"""# One model, asked in every way

`python benchmarks/serving.py RUN PICTURES --level {options.level:g} --clients {options.clients} \
--requests {options.requests} --slim PYTHON --out benchmarks/results/serving`, RUN that of `ordinalclip train demo`.
{versions} (here Pillow {importlib.metadata.version("pillow")}); {device()}.

Largest differences from the pipeline's answers to the same files ({spread} different values), of values and ends of
intervals as a share of the range of the ranks:

```
{table.to_string(float_format="{:.2g}".format)}
```

The server with two workers, {options.clients} clients at once, a worker killed after a third of the requests; the
clients run on the same cores:

```
{client.summary(outcomes, seconds)}
```
"""
    options.out.mkdir(parents=True, exist_ok=True)
    with whole(options.out / "table.md") as aside:
        aside.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
