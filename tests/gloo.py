"""A pool of persistent worker processes that run functions as the ranks of a gloo group.

Importing torch and megatron takes seconds. A server process does it once; the workers are forked from it and run many
cases each. What the workers do is in gloo_worker.py.
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent

# Groups that something still refers to keep gloo's threads, which wake many times a second: thousands of them would
# take all cores. A worker that has collected so many is replaced.
MOST_THREADS = 64


class RankError(AssertionError):
    """A rank failed, died or hung."""


class Worker:
    """One process and the pipe to it. `threads` is how many it had after its last call."""

    threads = 1

    def __init__(self) -> None:
        import gloo_worker

        context: Any = multiprocessing.get_context("forkserver")
        start_server(context)
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=gloo_worker.serve, args=(theirs,))  # a daemon could have no children
        self.process.start()
        theirs.close()

    def where(self, file: Path) -> str:
        """What the process is doing: its Python stack, which it writes into `file` when signalled."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid or 0, signal.SIGUSR1)
        for _ in range(20):
            if file.exists() and file.stat().st_size:
                break
            time.sleep(0.05)
        return file.read_text() if file.exists() else ""

    def last_words(self) -> str:
        """How the process ended."""
        self.process.join(5)
        code = self.process.exitcode
        return f"died of {signal.Signals(-code).name}" if code and code < 0 else f"exited with {code}"

    def end(self) -> None:
        """Kill the process and those that it started."""
        self.pipe.close()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid or 0, signal.SIGKILL)
        self.process.kill()
        self.process.join()


class Pool:
    """`pool(world_size, fn, *args)` calls fn(rank, world_size, *args) on every rank of a fresh gloo group.

    It gives the results by rank. `fn` is a function at the top level of a module; arguments and results are pickled. A
    rank that raises, dies or is silent for `timeout` seconds makes the call raise RankError; the workers that took part
    are then replaced, since they may wait for that rank in a collective.
    """

    def __init__(self) -> None:
        self.workers: list[Worker] = []

    def __call__(self, world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
        source = sys.modules[fn.__module__].__file__
        call = (source, fn.__module__, fn.__qualname__, pickle.dumps(args), timeout)
        workers = self._take(world_size)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            for rank, worker in enumerate(workers):
                with contextlib.suppress(BrokenPipeError):  # it died just now: reading from it says so
                    worker.pipe.send((call, rank, world_size, folder))
            results, failures = _collect(workers, timeout, Path(folder))
            if not failures:
                failures = _end_groups(workers, timeout)
        self._drop([worker for worker in workers if worker.threads > MOST_THREADS])
        if failures:
            self._drop([worker for worker in workers if worker in self.workers])
            raise RankError("\n".join(failures))
        return [pickle.loads(results[rank]) for rank in range(world_size)]

    def _take(self, count: int) -> list[Worker]:
        self._drop([worker for worker in self.workers if not worker.process.is_alive()])
        while len(self.workers) < count:
            self.workers.append(Worker())
        return self.workers[:count]

    def _drop(self, workers: list[Worker]) -> None:
        for worker in workers:
            self.workers.remove(worker)
            worker.end()

    def close(self) -> None:
        self._drop(list(self.workers))


def _end_groups(workers: list[Worker], timeout: float) -> list[str]:
    """Let every rank destroy its group, now that none needs another any more."""
    for worker in workers:
        with contextlib.suppress(BrokenPipeError):
            worker.pipe.send("end")
    failures = []
    for rank, worker in enumerate(workers):
        try:
            worker.threads = worker.pipe.recv() if worker.pipe.poll(timeout) else 0
            trouble = None if worker.threads else f"did not end its group in {timeout} s"
        except (EOFError, ConnectionResetError):
            trouble = f"{worker.last_words()} when its group ended"
        if trouble:
            failures.append(f"rank {rank} of {len(workers)} {trouble}")
    return failures


def start_server(context: Any) -> None:
    """Start the server that workers are forked from, unless it runs. It imports gloo_worker, and so the slow packages."""
    context.set_forkserver_preload(["gloo_worker"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(TESTS), str(TESTS.parent / "examples"), before])
    )  # all that the server can see of us
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before


def _collect(workers: list[Worker], timeout: float, folder: Path) -> tuple[dict[int, bytes], list[str]]:
    """Results by rank until all are in or one fails; then that failure, the first to be reported."""
    waiting = dict(enumerate(workers))
    results: dict[int, bytes] = {}
    failures: list[str] = []
    deadline = time.monotonic() + timeout
    while waiting and not failures:
        ready = connection.wait([worker.pipe for worker in waiting.values()], max(0, deadline - time.monotonic()))
        if not ready:
            failures.append(f"ranks {sorted(waiting)} of {len(workers)} gave nothing in {timeout} s")
            failures += [f"rank {r} is at:\n{w.where(folder / f'stack{r}')}" for r, w in waiting.items()]
        for rank in [rank for rank, worker in waiting.items() if worker.pipe in ready]:
            worker = waiting.pop(rank)
            try:
                failed, payload = worker.pipe.recv()
            except (EOFError, ConnectionResetError):
                failed, payload = True, worker.last_words()
            if failed:
                failures.append(f"rank {rank} of {len(workers)}: {payload}")
            else:
                results[rank] = payload
    return results, failures
