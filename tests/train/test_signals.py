"""SIGTERM ends a process as ever, but for a run whose work is done and saved."""

import os
import signal
from collections.abc import Iterator

import pytest
import torch

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
