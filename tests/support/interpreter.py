"""Triton kernels on CPU: a process of its own in which Triton interprets them.

Triton decides at the import of a kernel whether it is interpreted, for the whole process, so the variable cannot be set
in the one that runs all tests. The process lives on from call to call. In it, new tensors that are not filled hold NaN
(or the largest integer), so that a place that no kernel writes shows. bf16 arithmetic is wrong in the interpreter: tests
use fp32.
"""

import contextlib
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]


class Interpreter:
    """`interpreter(fn, *args)`: fn(*args) in the process; fn is at the top level of a module, the rest is pickled.

    An exception in it, or the end of the process, is an AssertionError here, with the traceback.
    """

    def __init__(self) -> None:
        self.process = self._started()

    def _started(self) -> "subprocess.Popen[bytes]":
        path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", "from support.interpreter import serve; serve()"]
        return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __call__(self, fn: Callable[..., Any], *args: Any) -> Any:
        source = sys.modules[fn.__module__].__file__
        if self.process.poll() is not None:  # it ended in another test
            self.process = self._started()
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            pickle.dump((source, fn.__module__, fn.__qualname__, pickle.dumps(args)), self.process.stdin)
            self.process.stdin.flush()
            failed, result = pickle.load(self.process.stdout)
        except (EOFError, BrokenPipeError):
            raise AssertionError(f"the interpreter's process ended with {self.process.wait(10)}") from None
        if failed:
            raise AssertionError(result)
        return pickle.loads(result)

    def close(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait(10)


@contextlib.contextmanager
def interpreting() -> Iterator[Interpreter]:
    """For a fixture of a module or a session."""
    interpreter = Interpreter()
    try:
        yield interpreter
    finally:
        interpreter.close()


def serve() -> None:
    """The process: calls, one after the other, until its input ends. What is printed goes to the standard error."""
    from gloo_worker import load

    results, sys.stdout = sys.stdout.buffer, sys.stderr
    poison()
    while True:
        try:
            source, module, name, args = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        outcome: tuple[bool, bytes | str]
        try:
            outcome = (False, pickle.dumps(load(source, module, name)(*pickle.loads(args))))
        except BaseException:
            outcome = (True, traceback.format_exc())
        pickle.dump(outcome, results)
        results.flush()


def poison() -> None:
    """Fill what torch leaves uninitialised; deterministic mode does so in every way of making an empty tensor."""
    import torch

    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]  # a property, which the module gets at run time
    torch.use_deterministic_algorithms(True, warn_only=True)
