"""A pool of persistent worker processes that run functions as the ranks of a gloo group.

Importing torch and megatron takes seconds; the workers do it once (they are forked from a server that has) and then run many cases.
"""

import contextlib
import importlib.util
import multiprocessing
import multiprocessing.connection
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

TESTS = Path(__file__).parent


class RankError(AssertionError):
    """A rank failed, died or hung."""


class Worker:
    """One process and the pipe to it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([])
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,))  # not daemonic: checkpoint writers have children
        self.process.start()
        theirs.close()

    def end(self) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.join()


class Pool:
    """`pool(world_size, fn, *args)` calls fn(rank, world_size, *args) on every rank of a fresh gloo group and gives the results by rank.

    `fn` is a function at the top level of a test module. A rank that raises, dies or is silent for `timeout` seconds makes the call raise
    RankError; the workers that took part are then replaced, since others may wait for it in a collective.
    """

    def __init__(self) -> None:
        self.workers: list[Worker] = []

    def __call__(self, world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = 180) -> list[Any]:
        while len(self.workers) < world_size:
            self.workers.append(Worker())
        workers = self.workers[:world_size]
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            for rank, worker in enumerate(workers):
                worker.pipe.send(
                    (
                        sys.modules[fn.__module__].__file__,
                        fn.__qualname__,
                        rank,
                        world_size,
                        f"{folder}/store",
                        args,
                        timeout,
                    )
                )
            results, failures = self._collect(workers, timeout)
        if failures:
            for worker in workers:
                worker.end()
            del self.workers[:world_size]
            raise RankError("\n".join(failures))
        return [pickle.loads(results[rank]) for rank in range(world_size)]

    def _collect(self, workers: list[Worker], timeout: float) -> tuple[dict[int, bytes], list[str]]:
        waiting = dict(enumerate(workers))
        results: dict[int, bytes] = {}
        failures: list[str] = []
        deadline = time.monotonic() + timeout
        while waiting and not failures:
            ready = multiprocessing.connection.wait(
                [w.pipe for w in waiting.values()], max(0, deadline - time.monotonic())
            )
            if not ready:
                failures.append(f"ranks {sorted(waiting)} of {len(workers)} gave nothing in {timeout} s")
            for rank, worker in list(waiting.items()):
                if worker.pipe in ready:
                    del waiting[rank]
                    try:
                        ok, payload = worker.pipe.recv()
                    except (EOFError, ConnectionResetError):
                        ok, payload = False, _last_words(worker)
                    if ok:
                        results[rank] = payload
                    else:
                        failures.append(f"rank {rank} of {len(workers)}: {payload}")
        return results, failures

    def close(self) -> None:
        for worker in self.workers:
            worker.end()
        self.workers.clear()


def _last_words(worker: Worker) -> str:
    worker.process.join(5)
    code = worker.process.exitcode
    return f"died of {signal.Signals(-code).name}" if code and code < 0 else f"exited with {code}"


def _serve(pipe: Any) -> None:
    """A worker's life: calls, one after the other, until the pipe closes."""
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, str(TESTS))
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            path, name, rank, world_size, store, args, timeout = pipe.recv()
            try:
                result = _run(_function(path, name), rank, world_size, store, args, timeout)
                pipe.send((True, pickle.dumps(result)))
            except BaseException:
                pipe.send((False, traceback.format_exc()))


def _run(fn: Callable[..., Any], rank: int, world_size: int, store: str, args: tuple, timeout: float) -> Any:
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
    )
    try:
        return fn(rank, world_size, *args)
    finally:
        dist.destroy_process_group()


_modules: dict[str, ModuleType] = {}


def _function(path: str, name: str) -> Callable[..., Any]:
    if path not in _modules:
        module_name = f"worker_{Path(path).stem}"
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        spec.loader.exec_module(module)
        _modules[path] = module
    return getattr(_modules[path], name)
