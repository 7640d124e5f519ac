"""A process with torch and Megatron loaded, from which each run of tests is forked: `python -m bench.mutation_parts.server`.

It reads one request a line from its input, JSON, and answers alike. It runs in a checkout of its own, whose sources the caller
changes between requests; lsys is imported anew in each fork.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from functools import partial
from multiprocessing import forkserver, util
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from lsys.launch.worker import end_with_parent

PRELOADED = ("lsys", "gloo", "gloo_worker", "support", "conftest")
LONGEST = 180.0  # s that a test of unknown length may take, well above all of them; with a fault it may go on for ever
# s, and times its usual length, that another may take: it may be the first now to make what tests share.
SPARE, TIMES = 60.0, 5.0
# The process that the ranks of tests are forked from and its tracker of resources, once they are there.
POOLS = set[int]()
KEPT = "lsys.runtime.megatron"  # its import hook stands in front of Megatron, which is loaded


def main() -> None:
    end_with_parent(None)
    root = Path.cwd()
    sys.path[:0] = [str(root), str(root / "tests"), str(root / "examples")]
    sys.dont_write_bytecode = True
    import gloo_worker  # noqa: F401
    import hypothesis.strategies  # noqa: F401
    import torch
    import torch.utils.tensorboard  # noqa: F401

    torch.set_num_threads(1)
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what tests print is no reply
    print(json.dumps({"ready": True}), file=replies)
    for line in sys.stdin:
        request = json.loads(line)
        action = {"tests": _tests, "quickstart": _quickstart}[request["what"]]
        print(json.dumps(_forked(partial(action, request), request["limit"], Path(request["log"]))), file=replies)


def _forked(action: Callable[[], int], limit: float, log: Path) -> dict[str, Any]:
    """Exit code (None: it took longer than `limit` seconds) and seconds of an action in a fork; what it prints goes to `log`."""
    begun = time.monotonic()
    code: int | None = 98  # of what fails before it has a code of its own
    child = os.fork()
    if not child:
        try:
            os.setpgid(0, 0)
            end_with_parent(None)
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(handle, stream)
            _forget()
            code = action()
        except BaseException as error:
            print(repr(error), flush=True)
        finally:
            sys.stdout.flush()
            os._exit(code or 0)
    code = None
    while time.monotonic() - begun < limit:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            break
        time.sleep(0.1)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    if code is None:
        os.waitpid(child, 0)
    return {"code": code, "seconds": round(time.monotonic() - begun, 1)}


def _forget() -> None:
    """Let what may be changed be imported anew."""
    for name in list(sys.modules):
        if name != KEPT and name.partition(".")[0] in PRELOADED:
            del sys.modules[name]


class Found:
    """A plugin of pytest that keeps in a file the names of tests that fail, or do not end, as soon as they do, and what all of them took."""

    def __init__(self, file: Path, usual: dict[str, float]) -> None:
        self.file, self.usual = file, usual
        self.failed, self.seconds = dict[str, None](), dict[str, float]()
        self._write()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: Any) -> Generator[None, Any, Any]:
        return (yield from self._limited(item.nodeid))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: Any) -> Generator[None, Any, Any]:
        return (yield from self._limited(item.nodeid))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: Any) -> Generator[None, Any, Any]:
        return (yield from self._limited(item.nodeid))

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] = round(self.seconds.get(report.nodeid, 0.0) + report.duration, 2)
        self._add(report)

    def pytest_collectreport(self, report: Any) -> None:
        self._add(report)

    def pytest_sessionfinish(self) -> None:
        self._write()

    def _limited(self, name: str) -> Generator[None, Any, Any]:
        limit = SPARE + TIMES * self.usual[name] if name in self.usual else LONGEST
        before = signal.signal(signal.SIGALRM, partial(_give_up, limit))
        signal.setitimer(signal.ITIMER_REAL, limit, SPARE)  # again, should a test not let itself be ended
        try:
            return (yield)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before or signal.SIG_DFL)  # None: not set by Python

    def _add(self, report: Any) -> None:
        if report.failed:
            self.failed[report.nodeid] = None
            self._write()

    def _write(self) -> None:
        self.file.write_text(json.dumps({"failed": list(self.failed), "seconds": self.seconds}))


def _give_up(limit: float, *_: Any) -> None:
    """End a test that does not end, and all processes that tests started: the next would get those that hang."""
    for process in {*_descendants(os.getpid())} - POOLS:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process, signal.SIGKILL)
    pytest.fail(f"it took more than {limit:.0f} s")  # no Exception, which the code under test may handle


def _descendants(process: int) -> list[int]:
    try:
        tasks = Path(f"/proc/{process}/task").glob("*/children")  # of each thread
        children = [int(word) for task in tasks for word in task.read_text().split()]
    except OSError:
        return []
    return [*children, *(each for child in children for each in _descendants(child))]


def _fork_the_pool() -> None:
    """Start the pool's server of forks as a fork of this process: what it imports is there already. Later, when tests have run, threads of
    theirs would be missing in forks, and backward passes wait for these for ever."""
    import gloo

    spawn = util.spawnv_passfds

    def fork(path: str, arguments: list[str], passed: list[int]) -> int:
        child = os.fork()
        if not child:
            try:
                # As in a process that was started: a server of forks of its own may be wanted, and is not being made.
                util.spawnv_passfds = spawn  # type: ignore[attr-defined]
                forkserver._forkserver.__init__()  # type: ignore[misc]
                for handle in {int(name) for name in os.listdir("/proc/self/fd")} - {0, 1, 2, *passed}:
                    with contextlib.suppress(OSError):
                        os.close(handle)
                exec(arguments[-1], {})  # what `python -c` would be given
            finally:
                os._exit(1)
        POOLS.add(child)
        return child

    with mock.patch("multiprocessing.util.spawnv_passfds", fork):
        gloo.start_server(multiprocessing.get_context("forkserver"))


def _tests(request: dict[str, Any]) -> int:
    _fork_the_pool()
    options = ["-q", "-p", "no:cacheprovider", "--no-header", "--tb=line", "-W", "ignore", "-m", "not slow"]
    options += ["--continue-on-collection-errors"] if request["all"] else ["-x"]
    return int(pytest.main([*options, *request["paths"]], plugins=[Found(Path(request["found"]), request["usual"])]))


def _quickstart(request: dict[str, Any]) -> int:
    """The first step of the README's run, on one rank."""
    from lsys.cli import main as lsys

    with tempfile.TemporaryDirectory() as folder:
        options = {"--train.folder": folder, "--train.steps": "1", "--optimizer.warmup_steps": "0"}
        options |= {"--train.batch_tokens": "512", "--train.micro_batch_tokens": "512", "--train.validate_tokens": "0"}
        options |= {
            "--parallel.tensor": "1",
            "--parallel.context": "1",
            "--parallel.pipeline": "1",
            "--train.profile.first": "0",
        }
        return lsys(["train", "configs/quickstart.yaml", *(word for pair in options.items() for word in pair)])


if __name__ == "__main__":
    main()
