"""Ask a server from many clients at once, good pictures and bad ones, and say what became of every request.

    python load.py PICTURES --address http://127.0.0.1:8000 --clients 200 --requests 2000

A request that is answered 503, or whose connection breaks, is sent again, as a client should. The exit status is 1
where a good picture got no answer, or a bad request another one than a refusal.
"""

import argparse
import asyncio
import itertools
import random
import ssl
import struct
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

TRIES = 8
GOOD = "picture"
FORM = {"content-type": "multipart/form-data; boundary=x"}


@dataclass(frozen=True)
class Job:
    """A request: what kind it is, the file's name, and what httpx is to send."""

    kind: str
    name: str
    sends: dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What became of one: status (0: never answered), the answer, seconds from the first try on, how often sent."""

    job: Job
    status: int
    answer: Any
    seconds: float
    tries: int

    @property
    def as_expected(self) -> bool:
        return self.status == 200 if self.job.kind == GOOD else 400 <= self.status < 500


def good(files: Sequence[Path], count: int, level: float | None = None) -> list[Job]:
    """`count` requests with pictures, the files over and over."""
    data = {} if level is None else {"level": f"{level:g}"}
    read = [(file.name, file.read_bytes()) for file in files]
    turns = itertools.islice(itertools.cycle(read), count)
    return [Job(GOOD, name, {"files": {"image": (name, content)}, "data": data}) for name, content in turns]


def hostile(count: int, picture: bytes, largest: int = 10_000_000) -> list[Job]:
    """`count` requests that are to be refused, of all kinds in turn."""
    picture_but = {"files": {"image": ("gauge.png", picture)}}
    bodies = {
        "empty file": {"files": {"image": ("a.png", b"")}},
        "text": {"files": {"image": ("a.png", b"no picture\n" * 50)}},
        "half a picture": {"files": {"image": ("a.png", picture[: len(picture) // 2])}},
        "bomb": {"files": {"image": ("a.png", bomb(60_000, 60_000))}},
        "too long": {"files": {"image": ("a.png", bomb(5_000, 1))}},
        "program": {"files": {"image": ("../../a.png", b"\x7fELF" + random.Random(0).randbytes(4000))}},
        "document": {"files": {"image": ("a.svg", b'<svg xmlns="http://www.w3.org/2000/svg"><image href="/"/></svg>')}},
        "too large": {"files": {"image": ("a.png", bytes(largest + 1))}},
        "no picture": {"data": {"level": "0.9"}},
        "no file": {"data": {"image": "gauge.png"}},
        "no number": {**picture_but, "data": {"level": "many"}},
        "two pictures": {"files": [("image", ("a.png", picture)), ("image", ("b.png", picture))]},
        "other field": {**picture_but, "data": {"interval": "0.8"}},
        "no level": {**picture_but, "data": {"level": "7"}},
        "infinite": {**picture_but, "data": {"level": "nan"}},
        "no form": {"content": random.Random(1).randbytes(3000), "headers": FORM},
        "JSON": {"json": {"image": "gauge.png"}},
    }
    turns = itertools.islice(itertools.cycle(bodies.items()), count)
    return [Job(kind, kind, sends) for kind, sends in turns]


def bomb(width: int, height: int) -> bytes:
    """A PNG of some kilobytes that says it is width x height."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100_000))) + chunk(b"IEND", b"")


async def ask(client: httpx.AsyncClient, job: Job) -> Outcome:
    """Send it until it is answered."""
    begin = time.perf_counter()
    for tries in range(1, TRIES + 1):
        try:
            response = await client.post("/predict", **job.sends)
        except httpx.TimeoutException:  # a server that says nothing has lost it
            break
        except httpx.HTTPError:
            response = None
        if response is not None and response.status_code != 503:
            said = response.headers.get("content-type", "")
            answer = response.json() if said.startswith("application/json") else response.text
            return Outcome(job, response.status_code, answer, time.perf_counter() - begin, tries)
        await asyncio.sleep(random.uniform(0.5, 1.5))
    return Outcome(job, 0, None, time.perf_counter() - begin, tries)


async def hang_up(address: str) -> None:
    """A client that leaves in the middle of its upload."""
    url = httpx.URL(address)
    _, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 5000\r\n")
    writer.write(b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\nContent-Disposition: form-data;")
    await writer.drain()
    writer.close()


async def load(address: str, jobs: Iterable[Job], clients: int = 200, leaving: int = 0) -> list[Outcome]:
    """What became of the jobs, asked by that many clients at once, while others leave in the middle."""
    queue, outcomes = iter(jobs), []

    context = ssl.create_default_context()  # once: it takes longer than a request

    async def work() -> None:
        async with httpx.AsyncClient(base_url=address, timeout=60, verify=context, trust_env=False) as client:
            for job in queue:
                outcomes.append(await ask(client, job))

    await asyncio.gather(*(work() for _ in range(clients)), *(hang_up(address) for _ in range(leaving)))
    return outcomes


def summary(outcomes: Sequence[Outcome], seconds: float) -> str:
    """A line per kind of request with its answers, and how long good ones took."""
    kinds: dict[str, Counter[int]] = {}
    for each in outcomes:
        kinds.setdefault(each.job.kind, Counter())[each.status] += 1
    lines = [
        f"{kind:<15} {', '.join(f'{count} x {status}' for status, count in kinds[kind].items())}" for kind in kinds
    ]
    took = sorted(each.seconds for each in outcomes if each.status == 200)
    if took:
        p50, p99 = (took[min(len(took) - 1, int(share * len(took)))] for share in (0.5, 0.99))
        lines.append(f"pictures: p50 {p50:.3f} s, p99 {p99:.3f} s, {len(took) / seconds:.0f} a second")
    again, lost = sum(each.tries > 1 for each in outcomes), sum(each.status == 0 for each in outcomes)
    return "\n".join([*lines, f"{len(outcomes)} requests: {again} sent more than once, {lost} never answered"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, help="a folder of PNG and JPEG files")
    parser.add_argument("--address", default="http://127.0.0.1:8000")
    parser.add_argument("--clients", type=int, default=200, help="that ask at once (default 200)")
    parser.add_argument("--requests", type=int, default=2000, help="in all (default 2000)")
    parser.add_argument("--bad", type=float, default=0.1, help="share of them that is to be refused (default 0.1)")
    options = parser.parse_args()
    files = sorted(file for file in options.pictures.iterdir() if file.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if not files:
        parser.error(f"{options.pictures} holds no .png or .jpg")
    bad = round(options.bad * options.requests)
    jobs = good(files, options.requests - bad) + hostile(bad, files[0].read_bytes())
    random.Random(0).shuffle(jobs)
    begin = time.perf_counter()
    outcomes = asyncio.run(load(options.address, jobs, options.clients, leaving=options.clients // 10))
    print(summary(outcomes, time.perf_counter() - begin))
    return 0 if all(each.as_expected for each in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
