"""Where work is done: in this process, in several, on a Dask cluster, or by any `concurrent.futures.Executor`.

    client (holds the folder)                       worker: a thread of a pool, of Dask, of whatever
    --------------------------------                ------------------------------------------------
    .lease-TOKEN: renewed every 5 s       -->       looks at it every 0.5 s
    pool.run: submits `perform`           -->       starts a child process, sends it the work, waits
                                                    lease empty, gone or old: SIGTERM to the child
                                                        child: does the work in its main thread;
    result                                <--           stops at a checkpoint on SIGTERM;
                                                        its worker is gone (end of file): the same

Signals reach only the main thread of a process, and workers of a cluster have none to spare: hence the child. The lease
is a file, since the folder is all that every executor shares. It cannot go stale: a stop that somebody left behind is
of another token, and a client that was killed renews nothing.
"""

from __future__ import annotations

import logging
import os
import pickle
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Annotated, Any, Literal, Protocol, TypeVar

import torch
from pydantic import AfterValidator, Field
from tqdm import tqdm

from ordinalclip import __version__
from ordinalclip.files import FolderInUse, write_text
from ordinalclip.provenance import num_cores, source
from ordinalclip.signals import Preempted, leave, listening
from ordinalclip.workers import portable

logger = logging.getLogger(__name__)
Item = TypeVar("Item")
Result = TypeVar("Result")

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
DEATHS = 3  # of processes, after which an item is refused
LEASE = ".lease-"
SERVE = "import sys; from ordinalclip.executors import serve; serve(*sys.argv[1:])"  # what a child does
RENEWAL, SILENCE = 5.0, 60.0  # s between renewals of a lease; without one, after which it is void
APPEARANCE = 5.0  # s that a shared file system has to show a lease
POLL = 0.5  # s
GRACE = 60.0  # s that a run has for its checkpoint
LEFT_OVER = 120.0  # s that a run of an earlier start has to notice and to stop; NFSv4 frees a dead host's locks in 90
ADDRESS = re.compile(r"dask://([^\s/]+:\d+)")


def _known(text: str) -> str:
    if text != "local" and not ADDRESS.fullmatch(text):
        raise ValueError("should be local or dask://HOST:PORT")
    return text


Jobs = Annotated[int, Field(ge=1, le=1024)] | Literal["auto"]
Where = Annotated[str, AfterValidator(_known)]


def num_jobs(jobs: int | str) -> int:
    """How many runs at a time this machine does: `auto` is one a core, on a GPU one."""
    return int(jobs) if jobs != "auto" else 1 if torch.cuda.is_available() else num_cores()


class WorkerDied(ChildProcessError):
    """The process of an item was killed, for want of memory perhaps, as often as it was tried."""


class Pool(Protocol):
    """What does work on items.

    Attributes:
        shares_files: whether workers may be on other machines, with files of the same names.
    """

    shares_files: bool

    def slots(self) -> int:
        """How many items are worked on at a time, now."""

    def run(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Future[Result]]]:
        """Do the work on every item, begun in order, no more at a time than there are slots.

        Args:
            work: a function of a module, or a `partial` of one. Where the process of an item dies, it is called again
                with the same item: it has to go on with what it finds.
            items: the next is asked for when a slot is free and what has finished was taken up.

        Returns:
            items with their futures, which are done, as they finish. `result()` raises what `work` has raised, or
            WorkerDied.

        Raises:
            Preempted: SIGTERM or Ctrl-C came. What is running ends when the pool is left, after a checkpoint.
            OSError: a worker does not see the folder, or the executor takes no more work; ValueError: a worker has
                another version of the package.
        """


@contextmanager
def open_pool(where: str, jobs: int, folder: Path, executor: Executor | None = None) -> Iterator[Pool]:
    """A pool within a `with` block, at whose end nothing runs any more.

    Args:
        where: "local", or "dask://HOST:PORT", a scheduler of Dask.
        jobs: of "local", how many processes; one is this process itself. A cluster does as many items as it can.
        folder: which the caller has locked, and which every worker sees.
        executor: instead of "local" or Dask, and then gets `jobs` items at a time. What it has to do is to call a
            function of this package, with an argument that is pickled, where the folder is seen.

    Raises:
        ImportError: without `distributed`; OSError: no scheduler there.
    """
    for lease in folder.glob(f"{LEASE}*"):  # of clients that are dead, since the lock is ours: their runs end
        lease.unlink(missing_ok=True)
    if executor is None and where == "local" and jobs == 1:
        yield _Here()
        return
    with _lease(folder) as lease:
        if executor is not None:
            with _Workers(lease, executor, lambda: jobs) as pool:
                yield pool
        elif where == "local":
            share = max(1, num_cores() // jobs)
            with ThreadPoolExecutor(jobs) as threads, _Workers(lease, threads, lambda: jobs, share) as pool:
                yield pool
        else:
            with _dask(lease, where) as pool:
                yield pool


def when_free(call: Callable[[], Result]) -> Result:
    """The result of a call that takes a folder, once what an earlier start has left running there has stopped.

    Raises:
        FolderInUse: somebody else does not give it back.
    """
    deadline = time.monotonic() + LEFT_OVER
    while True:
        try:
            return call()
        except FolderInUse:
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL)


# ---- the client


class _Here:
    """This process."""

    shares_files = False

    def slots(self) -> int:
        return 1

    def run(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Future[Result]]]:
        for item in items:
            done: Future[Result] = Future()
            try:
                done.set_result(work(item))
            except Exception as error:
                done.set_exception(error)
            yield item, done


class _Workers:
    """Workers elsewhere, within a `with` block, in which SIGTERM and Ctrl-C are listened to.

    Args:
        lease: the file by which they know that they are wanted.
        executor: to whom `perform` is submitted.
        count: how many slots there are.
        threads: of an item, for PyTorch and NumPy; None: what the worker's environment says.
        keywords: of every submission, beside the task.
        deaths: errors by which the executor says that an item has killed its workers.
    """

    def __init__(
        self,
        lease: Path,
        executor: Executor,
        count: Callable[[], int],
        threads: int | None = None,
        keywords: Callable[[], dict[str, Any]] = dict,
        deaths: tuple[type[Exception], ...] = (),
    ):
        self.lease, self.executor, self.slots, self.threads = lease, executor, count, threads
        self.keywords, self.deaths, self.shares_files = keywords, deaths, threads is None
        self.running: dict[Future[bytes], tuple[Any, Task, int]] = {}
        self.origin, self.told = _origin(), 0

    def __enter__(self) -> _Workers:
        self.listening = listening(self._take)
        self.listening.__enter__()
        return self

    def _take(self, number: int) -> None:
        self.told = number

    def __exit__(self, kind: type[BaseException] | None, *more: Any) -> None:
        try:
            with suppress(FileNotFoundError):
                os.truncate(self.lease, 0)  # which stops them
            wait(self.running, timeout=GRACE + 10)
            _close_idle(os.path.join(os.getcwd(), self.lease))
        finally:
            self.listening.__exit__(kind, *more)
        if self.told and kind is None:
            raise Preempted("told to stop", self.told)

    def run(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Future[Result]]]:
        left, again = iter(items), deque[tuple[Item, Task, int]]()
        exhausted = waited = False
        while True:
            while not self.told and (again or not exhausted) and len(self.running) < self.slots():
                if not again:
                    for item in left:
                        task = Task(pickle.dumps((work, item)), str(self.lease), os.getcwd(), self.threads, self.origin)
                        again.append((item, task, 0))
                        break
                    else:
                        exhausted = True
                        break
                next_ = again.popleft()
                try:
                    self.running[self.executor.submit(perform, next_[1], **self.keywords())] = next_
                except BrokenExecutor as error:
                    raise _broken(error) from error
            if not self.running and exhausted and not again:
                return
            if not self.running and not self.told:
                if not waited:
                    logger.warning("no worker is there yet; waiting for one")
                waited = True
                time.sleep(POLL)
            finished, _ = wait(self.running, timeout=POLL, return_when=FIRST_COMPLETED) if self.running else ((), ())
            if self.told:
                raise Preempted("told to stop", self.told)
            for future in finished:
                item, task, deaths = self.running.pop(future)
                done = self._outcome(future, deaths)
                if done is None:
                    again.append((item, task, deaths + 1))
                else:
                    yield item, done

    def _outcome(self, future: Future[bytes], deaths: int) -> Future[Any] | None:
        """What came of an item; None where it is to be tried again."""
        done: Future[Any] = Future()
        if future.cancelled():
            raise ConnectionError(
                "the executor has dropped a run, its scheduler is gone perhaps: the same command goes on"
            )
        error = future.exception()
        if isinstance(error, BrokenExecutor):
            raise _broken(error) from error
        if isinstance(error, self.deaths):  # it has counted itself
            done.set_exception(WorkerDied(f"its worker was killed again and again ({error})".replace("\n", " ")))
        elif isinstance(error, WorkerDied):
            time.sleep(POLL)  # who stops all processes of a job may not have come to this one yet
            if self.told:
                raise Preempted("told to stop", self.told)
            if deaths + 1 < DEATHS:
                return None
            done.set_exception(WorkerDied(f"{error}, {DEATHS} times"))
        elif isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("ordinalclip"):
            raise ValueError(f"a worker has not ordinalclip {__version__}, as this client has ({error})") from error
        elif error is not None:
            raise error
        else:
            fine, value = pickle.loads(future.result())
            if fine:
                done.set_result(value)
            else:
                done.set_exception(value)
        return done


def _broken(error: BrokenExecutor) -> OSError:
    return ChildProcessError(
        f"the executor has lost a worker and takes no more work ({error}): the same command goes on"
    )


@contextmanager
def _lease(folder: Path) -> Iterator[Path]:
    """A file that is renewed as long as this process lives."""
    lease, over = folder / f"{LEASE}{secrets.token_hex(4)}", threading.Event()

    def renew() -> None:
        while not over.wait(RENEWAL):
            with suppress(OSError):
                os.utime(lease)

    write_text(lease, f"process {os.getpid()} on {socket.gethostname()} wants its runs\n")
    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        over.set()
        thread.join()
        lease.unlink(missing_ok=True)


@contextmanager
def _dask(lease: Path, where: str) -> Iterator[_Workers]:
    """The workers of a Dask cluster: their threads, or their GPUs where any offers such a resource."""
    try:
        from distributed import Client
        from distributed.scheduler import KilledWorker
    except ImportError as error:
        raise ImportError(f"execution={where} needs Dask: pip install 'ordinalclip[cluster]'") from error
    try:
        client = Client(where.replace("dask", "tcp"), timeout=10, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ConnectionError(f"execution={where}: no scheduler of Dask answers there ({error})") from error
    offers: tuple[float, int, int] = (-1.0, 0, 0)

    def offered() -> tuple[float, int, int]:
        """When the cluster was asked, its GPUs, its threads."""
        nonlocal offers
        if time.monotonic() - offers[0] > 2:
            workers = client.scheduler_info(n_workers=-1)["workers"].values()
            gpus = sum(int(worker["resources"].get("GPU", 0)) for worker in workers)
            offers = time.monotonic(), gpus, sum(worker["nthreads"] for worker in workers)
        return offers

    def slots() -> int:
        return offered()[1] or offered()[2]

    def keywords() -> dict[str, Any]:
        return {"resources": {"GPU": 1}} if offered()[1] else {}

    with client, _Workers(lease, client.get_executor(pure=False), slots, None, keywords, (KilledWorker,)) as pool:
        yield pool


# ---- the worker


@dataclass(frozen=True)
class Task:
    """What a worker is sent.

    Attributes:
        content: pickled function and item.
        lease: path of the lease, as the client writes it.
        cwd: of the client, which relative paths start from.
        threads: for PyTorch and NumPy; None: as many as the worker's environment says.
        origin: version and commit of the client's package.
    """

    content: bytes
    lease: str
    cwd: str
    threads: int | None
    origin: tuple[str, str | None]

    @property
    def lease_path(self) -> str:
        return os.path.join(self.cwd, self.lease)


def _origin() -> tuple[str, str | None]:
    checkout = source()
    return __version__, checkout["commit"] if checkout else None


def perform(task: Task) -> bytes:
    """Do what is sent, in a child process; this is what executors call.

    Raises:
        ValueError: this is another version of the package; OSError: the folder is not seen here; WorkerDied.
    """
    version, commit = _origin()
    for ours, theirs in ((version, task.origin[0]), (commit, task.origin[1])):
        if None not in (ours, theirs) and ours != theirs:
            raise ValueError(f"the worker on {socket.gethostname()} has ordinalclip {ours}, the client {theirs}")
    child = _idle_child(task)
    answer = child.do(task)
    with _guard:
        _idle.append(child)
    return answer


_idle: list[Child] = []  # those of this process; they end by themselves when their lease does, or sooner
_guard = threading.Lock()


def _idle_child(task: Task) -> Child:
    """One that has worked for this client: it takes seconds to start another."""
    with _guard:
        for child in [*_idle]:
            if child.process.poll() is not None:
                _idle.remove(child)
                child.close()
        for child in _idle:
            if child.lease.path == task.lease_path:
                _idle.remove(child)
                return child
    return Child(task)


def _close_idle(lease_path: str) -> None:
    """End those of a client that is in this process, too."""
    with _guard:
        for child in [child for child in _idle if child.lease.path == lease_path]:
            _idle.remove(child)
            child.close()


class Lease:
    """A client's lease as a worker or its child sees it.

    Raises:
        OSError: it is not seen.
    """

    def __init__(self, path: str):
        self.path = path
        self.renewed, self.since = 0, time.monotonic()
        self.looked = self.since
        while not os.path.exists(self.path):  # a file system may take a moment to show it
            if time.monotonic() - self.since > APPEARANCE:
                raise OSError(
                    f"the worker on {socket.gethostname()} does not see {os.path.dirname(self.path)}: all workers "
                    "need the folder, under the same path"
                )
            time.sleep(POLL)

    def holds(self) -> bool:
        """Whether the work is still wanted."""
        now = time.monotonic()
        if now - self.looked > SILENCE / 2:  # this process was suspended, with the client's perhaps
            self.since = now
        self.looked = now
        try:
            with open(self.path, "rb") as file:  # NFS asks its server when a file is opened, not when it is looked at
                status = os.fstat(file.fileno())
        except FileNotFoundError:
            return False
        except OSError:  # no answer is no renewal
            return now - self.since < SILENCE
        if status.st_mtime_ns != self.renewed:
            self.renewed, self.since = status.st_mtime_ns, now
        return status.st_size > 0 and now - self.since < SILENCE

    def check(self) -> None:
        """Before something is begun.

        Raises:
            WorkerDied: it is no longer wanted.
        """
        if not self.holds():
            raise WorkerDied(f"its process on {socket.gethostname()} was told to stop")


class Child:
    """A process that does what it is sent, one task after the other, in its main thread.

    Args:
        task: one of those that it is for; all of one client, with one number of threads.

    Raises:
        OSError: the lease is not seen here; WorkerDied: it does not hold.
    """

    def __init__(self, task: Task):
        self.lease = Lease(task.lease_path)
        self.lease.check()
        self.connection, theirs = Pipe()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        if task.threads is not None:
            environment |= dict.fromkeys(THREADS, str(task.threads))
        with theirs:
            # No `multiprocessing`: workers of Dask are daemons, which may not use it. A process group of its own:
            # Ctrl-C goes to all of a terminal's, but the client passes it on.
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", SERVE, str(theirs.fileno()), self.lease.path],
                env=environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                process_group=0,
            )

    def do(self, task: Task) -> bytes:
        """The pickled answer: whether it went well, and the result or the error.

        Raises:
            WorkerDied: the process has ended, by itself or since the work is no longer wanted.
        """
        told = None
        try:
            self.lease.check()
            self.connection.send((task.cwd, task.content))
            while not self.connection.poll(POLL):
                if told is None and not self.lease.holds():
                    told = time.monotonic()
                    self.process.terminate()
                elif told is not None and time.monotonic() - told > GRACE:
                    self.process.kill()
                if self.process.poll() is not None and not self.connection.poll():  # children of its own may hold on
                    raise EOFError
            return self.connection.recv_bytes()
        except (EOFError, ConnectionError):
            self.close()
            why = "was told to stop" if told is not None else f"ended with status {self.process.returncode}"
            raise WorkerDied(f"its process on {socket.gethostname()} {why}") from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End it; what it is doing, after a checkpoint."""
        self.connection.close()
        try:
            self.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


# ---- the child


def serve(descriptor: str, path: str) -> None:
    """Do what comes, until nothing can come any more: the worker is gone, or the client's lease."""
    connection, lease = Connection(int(descriptor)), Lease(path)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which outlives processes that are ended
    tasks: SimpleQueue[tuple[str, bytes]] = SimpleQueue()

    def receive() -> None:
        with suppress(EOFError, OSError):
            while True:
                tasks.put(connection.recv())
        os.kill(os.getpid(), signal.SIGTERM)  # nobody outlives who started it, however that ended
        time.sleep(GRACE)
        os._exit(1)

    threading.Thread(target=receive, daemon=True).start()
    while True:
        try:
            cwd, content = tasks.get(timeout=POLL)
        except Empty:
            if lease.holds():
                continue
            return
        answer = _answer(cwd, content)
        with suppress(OSError):
            connection.send_bytes(answer)


def _answer(cwd: str, content: bytes) -> bytes:
    try:
        with listening(leave):
            with suppress(OSError):  # where paths are absolute, it need not be there
                os.chdir(cwd)
            work, item = pickle.loads(content)
            return pickle.dumps((True, work(item)))
    except (Preempted, KeyboardInterrupt) as stopped:
        os._exit(stopped.status if isinstance(stopped, Preempted) else 1)
    except Exception as error:
        return pickle.dumps((False, portable(error)))
