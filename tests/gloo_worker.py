"""The worker side of tests/gloo.py."""

import contextlib
import ctypes
import faulthandler
import gc
import importlib.util
import operator
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

with contextlib.suppress(Exception):  # what does not import fails, with its traceback, in the tests that need it
    from lsys.runtime import install_megatron

    install_megatron()
    import torch._dynamo  # which the first optimizer of a process would import: 2 s in every worker

    import lsys.checkpoint.state
    import lsys.train.engine  # noqa: F401  (and so megatron's model, schedules and optimizer)

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def serve(pipe: Any) -> None:
    """A worker's life: calls, one after the other, until the pipe closes."""
    os.setpgrp()  # the worker and its children can be ended together
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # or it would hang on when pytest is killed
    torch.set_num_threads(1)
    gc.freeze()  # so that collecting looks only at what calls made
    with contextlib.suppress(EOFError, KeyboardInterrupt, BrokenPipeError):
        while True:
            call, rank, world_size, folder = pipe.recv()
            with open(f"{folder}/stack{rank}", "w") as stack:
                faulthandler.register(signal.SIGUSR1, stack, all_threads=False)
                source, module, name, args, timeout = call
                _call(pipe, source, module, name, args, timeout, rank, world_size, folder)
                faulthandler.unregister(signal.SIGUSR1)
            gc.collect()
            pipe.send(len(os.listdir("/proc/self/task")))


def _call(
    pipe: Any, source: str, module: str, name: str, args: bytes, timeout: float, rank: int, world_size: int, folder: str
) -> None:
    """Run one call and send what came of it. The group ends when the caller says that all ranks have done so.

    A rank that closed its connections earlier could break another that is still connecting, or waits for the rank that
    failed and would then report that instead of the cause.
    """
    outcome: tuple[bool, bytes | str]
    try:
        # Longer than the caller waits, so that the caller names the ranks that hang.
        limit = timedelta(seconds=timeout + 60)
        store = dist.FileStore(f"{folder}/store", world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=limit)
        result = load(source, module, name)(rank, world_size, *pickle.loads(args))
        outcome = (False, pickle.dumps(result))
    except BaseException:
        outcome = (True, traceback.format_exc())
    try:
        pipe.send(outcome)
        pipe.recv()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def load(source: str, module: str, name: str) -> Callable[..., Any]:
    """The function `name` of the file `source`, whose module gets its name at the caller, so that its classes unpickle."""
    if getattr(sys.modules.get(module), "__file__", None) != source:
        spec = importlib.util.spec_from_file_location(module, source)
        if spec is None or spec.loader is None:
            raise ImportError(f"cannot import {source}")
        for dot in (
            at for at, letter in enumerate(module) if letter == "."
        ):  # unpickling may import the packages above
            sys.modules.setdefault(module[:dot], ModuleType(module[:dot]))
        sys.modules[module] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[module])
        except BaseException:
            del sys.modules[module]
            raise
    return operator.attrgetter(name)(sys.modules[module])
