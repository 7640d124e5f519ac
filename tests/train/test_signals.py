"""SIGTERM ends a process as ever, but for a run whose work is done and saved."""

import os
import signal
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lsys.runtime import install_megatron
from lsys.runtime.lock import LostError
from lsys.train.signals import StopRequest, heed_until


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def end_of(done: bool) -> int:
    """What a process ends with that gets SIGTERM twice: a signal as a negative number, else its exit code."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    heed_until(lambda: done)
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
    os._exit(0)


def test_a_run_that_is_done_ends_well_whatever_comes() -> None:
    assert end_of(True) == 0 and end_of(False) == -signal.SIGTERM


def test_a_request_is_heard_as_often_as_it_comes_and_no_longer_than_it_lasts() -> None:
    heed_until(lambda: True)
    outer = signal.getsignal(signal.SIGTERM)
    with StopRequest(torch.device("cpu")) as request:
        assert not request.received
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert request.received
    assert signal.getsignal(signal.SIGTERM) is outer


def asked(rank: int, world_size: int, lost: bool) -> list[object]:
    """What a rank hears while the last one gets SIGTERM, or the first one has lost the run's folder."""
    with StopRequest(torch.device("cpu"), lambda: lost and rank == 0) as request:
        heard: list[object] = [request.agreed()]
        if rank == world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        heard.append(request.agreed())
    return heard


def all_asked(rank: int, world_size: int) -> bool:
    """As a scheduler has it, which sends SIGTERM to all."""
    with StopRequest(torch.device("cpu")) as request:
        os.kill(os.getpid(), signal.SIGTERM)
        return request.agreed()


def loses(rank: int, world_size: int) -> str:
    try:
        asked(rank, world_size, True)
    except LostError as error:
        return str(error)
    return ""


def test_all_ranks_hear_the_same(gloo: Any) -> None:
    assert gloo(2, asked, False) == [[False, True]] * 2
    assert gloo(3, all_asked) == [True] * 3
    first, second = gloo(2, loses)
    assert first == second and "another run has taken it over" in first


def test_behind_an_update_that_was_left_out_sigterm_waits_for_one_that_is_made() -> None:
    """Nothing could be saved then, and the steps since the last save would be lost."""
    install_megatron()
    from lsys.train.observers import Stopping

    updates = SimpleNamespace(last="the update of step 3 was not made")
    reporter = SimpleNamespace(say=lambda text: None)
    run: Any = SimpleNamespace(updates=updates, reporter=reporter, is_stopping=False, lock=None)
    run.groups = SimpleNamespace(device=torch.device("cpu"))
    stopping = Stopping(run)
    stopping.request.agreed = lambda: True  # type: ignore[method-assign]
    assert not stopping.hear(3) and not run.is_stopping
    updates.last = ""
    assert stopping.hear(4) and run.is_stopping
    stopping.close(False)
