"""A process with torch and Megatron loaded, from which each run of tests is forked: `python -m bench.mutation_parts.server`.

It reads one request a line from its input, JSON, and answers alike. It runs in a checkout of its own, whose sources the caller
changes between requests; lsys is imported anew in each fork.
"""

import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lsys.launch.worker import end_with_parent

PRELOADED = ("lsys", "gloo", "gloo_worker", "support", "conftest")
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


LONGEST = 180  # s that a test may take, well above all of them; with a fault it may go on for ever


class Failures:
    """A plugin of pytest that keeps the names of tests that fail, or do not end, in a file, as soon as they do."""

    def __init__(self, file: Path) -> None:
        self.file, self.names = file, dict[str, None]()
        file.write_text("[]")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Generator[None, Any, Any]:
        before = signal.signal(signal.SIGALRM, _give_up)
        signal.alarm(LONGEST)
        try:
            return (yield)
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)

    def pytest_runtest_logreport(self, report: Any) -> None:
        self._add(report)

    def pytest_collectreport(self, report: Any) -> None:
        self._add(report)

    def _add(self, report: Any) -> None:
        if report.failed:
            self.names[report.nodeid] = None
            self.file.write_text(json.dumps(list(self.names)))


def _give_up(*_: Any) -> None:
    raise TimeoutError(f"more than {LONGEST} s")


def _tests(request: dict[str, Any]) -> int:
    import gloo

    gloo.START = "fork"
    options = ["-q", "-p", "no:cacheprovider", "--no-header", "--tb=line", "-W", "ignore", "-m", "not slow"]
    options += [] if request["all"] else ["-x"]
    return int(pytest.main([*options, *request["paths"]], plugins=[Failures(Path(request["failures"]))]))


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
