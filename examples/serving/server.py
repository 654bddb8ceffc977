"""An exported model behind LitServe: pictures in, ordered numbers out.

    python server.py EXPORTED --port 8000
    curl -F image=@gauge.png -F level=0.8 http://localhost:8000/predict

EXPORTED is a folder that `ordinalclip export` wrote; its predict.py reads the pictures and asks the graph, so that
neither torch nor ordinalclip is needed. /health is 200 while every worker is ready, /metrics is for Prometheus.
"""

import argparse
import asyncio
import importlib.util
import logging
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:  # where processes add up what they count; read by the next import
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = tempfile.mkdtemp(prefix="metrics-")

import litserve
import numpy as np
from fastapi import Form, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from litserve.loops.simple_loops import BatchedLoop
from PIL import UnidentifiedImageError
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from pydantic import BaseModel, ConfigDict, Field

REQUESTS = Counter("ordinal_requests", "Requests answered, by HTTP status", ["status"])
SECONDS = Histogram("ordinal_request_seconds", "From the first byte of a request to the last of its answer")
WAITING = Gauge("ordinal_requests_in_progress", "Requests that are not answered yet", multiprocess_mode="livesum")
BATCH = Histogram("ordinal_batch_size", "Requests answered at once", buckets=[1, 2, 4, 8, 16, 32, 64])


class Upload(BaseModel):
    """A request: a form with the picture's file, and how often its interval is to hold the truth.

    As lists, since of two files in a field FastAPI would take the last; what is in no field is refused.
    """

    model_config = ConfigDict(extra="forbid")
    image: list[UploadFile] = Field(min_length=1, max_length=1)
    level: list[float] = Field([], max_length=1)


class Answers(litserve.LitAPI):
    """A worker. One picture that cannot be read is refused alone, not with its batch."""

    def __init__(self, folder: Path, threads: int, pixels: int, **options: Any):
        super().__init__(loop=Waits(), **options)
        self.folder, self.threads, self.pixels = folder, threads, pixels

    def setup(self, device: str) -> None:
        self.program = load_program(self.folder)
        prepared = self.program.PIXELS
        prepared["max_pixels"] = min(self.pixels, prepared["max_pixels"])
        self.answer = self.program.load(self.threads)
        self.answer(np.zeros((1, 3, prepared["size"], prepared["size"]), np.float32))  # the first takes longer

    def decode_request(self, request: Annotated[Upload, Form()]) -> tuple[np.ndarray, float | None] | Response:
        level = request.level[0] if request.level else None
        if level is not None and self.program.RANKS["levels"] is None:
            return refused("level: this model keeps no intervals")
        try:
            return self.program.read(request.image[0].file.read()), level
        except UnidentifiedImageError:
            formats = ", ".join(self.program.PIXELS["formats"])
            return refused(f"image: not a picture of a format that is read ({formats})")
        except Exception as error:  # decoders of damaged files raise whatever they like
            return refused(f"image: not a readable picture ({error or type(error).__name__})")

    def batch(self, inputs: list[Any]) -> list[Any]:
        return inputs

    def predict(self, batch: list[Any]) -> list[dict[str, Any] | Response]:
        BATCH.observe(len(batch))
        found: list[Any] = list(batch)
        places = defaultdict(list)  # the graph takes one level at a time
        for place, each in enumerate(batch):
            if not isinstance(each, Response):
                places[each[1]].append(place)
        for level, group in places.items():
            pixels = np.stack([batch[place][0] for place in group])
            outputs, refusal = {}, None
            try:
                outputs = self.answer(pixels) if level is None else self.answer(pixels, level)
            except ValueError as error:  # a level that the model does not keep
                refusal = refused(str(error))
            for row, place in enumerate(group):
                found[place] = refusal or self.answered(outputs, row, level)
        return found

    def unbatch(self, output: list[Any]) -> list[Any]:
        return output

    def encode_response(self, output: dict[str, Any] | Response) -> Response:
        return output if isinstance(output, Response) else JSONResponse(output)

    def answered(self, outputs: dict[str, np.ndarray], row: int, level: float | None) -> dict[str, Any] | Response:
        if not all(np.isfinite(array[row]).all() for array in outputs.values()):
            return refused("image: the model answers it with a number that is not finite")
        ranks, rank = self.program.RANKS, int(outputs["rank"][row])
        found = {
            "value": float(outputs["value"][row]),
            "unit": ranks["unit"],
            "rank": rank,
            "name": ranks["names"][rank],
        }
        if "probabilities" in outputs:
            found["probability"] = float(outputs["probabilities"][row][rank])
        if "low" in outputs:
            ends = {name: float(outputs[name][row]) for name in ("low", "high")}
            found |= ends | {"level": ranks["levels"]["usual"] if level is None else level}
        return found


class Waits(BatchedLoop):
    """LitServe's loop asks for requests a thousand times a second; this one sleeps until there is one."""

    def get_batch_requests(self, lit_api: Any, request_queue: Any, transport: Any) -> tuple[list, list]:
        first = request_queue.get()
        return super().get_batch_requests(lit_api, _WithFirst(first, request_queue), transport)


class _WithFirst:
    """A queue before which one request stands."""

    def __init__(self, first: Any, queue: Any):
        self.first, self.queue = [first], queue

    def get(self, timeout: float) -> Any:
        return self.first.pop() if self.first else self.queue.get(timeout=timeout)


class Watched:
    """Counts requests, and answers one itself that no worker answers in time: it may have been killed."""

    def __init__(self, app: Any, seconds: float):
        self.app, self.seconds = app, seconds

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] != "/predict":
            await self.app(scope, receive, send)
            return
        status, begin = 0, time.perf_counter()

        async def counted(message: dict[str, Any]) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        with WAITING.track_inprogress():
            try:
                await asyncio.wait_for(self.app(scope, receive, counted), self.seconds)
            except TimeoutError:
                if status:
                    raise
                late = refused(f"no answer within {self.seconds:g} s; ask again", 503)
                late.headers["retry-after"] = "1"
                await late(scope, receive, counted)
            finally:
                REQUESTS.labels(status or 500).inc()
                SECONDS.observe(time.perf_counter() - begin)


def refused(why: str, status: int = 422) -> JSONResponse:
    return JSONResponse({"detail": why}, status)


def load_program(folder: Path) -> Any:
    """predict.py of an exported model."""
    spec = importlib.util.spec_from_file_location("predict", folder / "predict.py")
    assert spec is not None
    assert spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    return program


def build(options: argparse.Namespace) -> litserve.LitServer:
    answers = Answers(
        options.exported, options.threads, options.pixels, max_batch_size=options.batch, batch_timeout=options.wait
    )
    server = litserve.LitServer(
        answers,
        accelerator="cpu",
        workers_per_device=options.workers,
        restart_workers=True,
        timeout=options.timeout,
        max_payload_size=options.bytes,
        middlewares=[(Watched, {"seconds": options.timeout})],
    )
    registry = CollectorRegistry()
    MultiProcessCollector(registry)

    @server.app.get("/metrics")
    def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @server.app.exception_handler(RequestValidationError)
    def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        return refused("; ".join(f"{each['loc'][1]}: {each['msg']}" for each in error.errors()))

    return server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    add("exported", type=Path, help="folder that `ordinalclip export` wrote")
    add("--host", default="127.0.0.1", choices=["127.0.0.1", "0.0.0.0", "::"], help="0.0.0.0: from other machines, too")
    add("--port", type=int, default=8000)
    add("--workers", type=int, default=1, help="processes that answer (default 1)")
    add("--threads", type=int, help="of each worker (default: the cores, shared out)")
    add("--batch", type=int, default=16, help="requests answered at once, at most (default 16)")
    add("--wait", type=float, default=0.01, help="seconds to wait for more of them (default 0.01)")
    add("--bytes", type=int, default=10_000_000, help="of a request, at most (default 10,000,000)")
    add("--pixels", type=int, default=50_000_000, help="of a picture, at most (default 50,000,000)")
    add("--timeout", type=float, default=10, help="seconds after which a request is answered 503 (default 10)")
    add("--connections", type=int, default=512, help="at once, more are answered 503 (default 512)")
    options = parser.parse_args()
    for needed in ("predict.py", "preprocessing.json", "ranks.json", "export.json"):
        if not (options.exported / needed).is_file():
            parser.error(f"{options.exported} holds no {needed}: `ordinalclip export RUN --out FOLDER` writes one")
    for name in ("workers", "threads", "batch", "wait", "bytes", "pixels", "timeout", "connections"):
        if (given := getattr(options, name)) is not None and not 0 < given < math.inf:
            parser.error(f"--{name} is above 0, got {given}")
    if not options.wait < options.timeout:
        parser.error(f"--wait is less than --timeout ({options.timeout:g}), got {options.wait:g}")
    if not 1024 <= options.port <= 65535:
        parser.error(f"--port is 1024 to 65535, got {options.port}")
    options.threads = options.threads or max(1, cores // options.workers)

    started = os.getpid()

    def stop(number: int, frame: Any) -> None:  # as containers are stopped; forked processes come here, too
        raise KeyboardInterrupt if os.getpid() == started else SystemExit

    signal.signal(signal.SIGTERM, stop)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # or it writes a line per malformed form
    try:
        build(options).run(
            host=options.host,
            port=options.port,
            num_api_servers=1,
            log_level="warning",
            generate_client_file=False,
            limit_concurrency=options.connections,
        )
    finally:
        shutil.rmtree(os.environ["PROMETHEUS_MULTIPROC_DIR"], ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
