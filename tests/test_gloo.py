"""The pool of ranks: what comes back, and what is said when a rank raises, dies or hangs."""

import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from gloo import Pool, RankError


@dataclass
class Shape:
    rows: int


def _sum(rank, world_size, offset):
    total = torch.tensor([rank + offset], dtype=torch.float64)
    dist.all_reduce(total)
    return rank, world_size, total


def _double(rank, world_size, tensor, shape):
    return tensor * 2, Shape(shape.rows * 2)


def _pid(rank, world_size):
    return os.getpid()


def _threads(rank, world_size):
    return torch.get_num_threads()


def _raise_on(rank, world_size, bad):
    if rank == bad:
        raise ValueError(f"planted on {rank}")
    dist.all_reduce(torch.zeros(1))


def _die(rank, world_size, number):
    if rank == 1:
        os.kill(os.getpid(), number)
    dist.all_reduce(torch.zeros(1))


def _hang(rank, world_size):
    if rank == 1:
        time.sleep(60)


def _ends_its_group(rank, world_size):
    dist.destroy_process_group()
    return rank


def _die_later(rank, world_size):
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, 0.5)


def _die_at_the_end(rank, world_size):
    if rank == 1:
        dist.destroy_process_group = lambda *_: os.kill(os.getpid(), signal.SIGKILL)


def _unpicklable(rank, world_size):
    return lambda: rank


class Outer:
    @staticmethod
    def rank(rank, world_size):
        return rank


def _alive(pid: int) -> bool:
    """Whether the process runs; one that ended but was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_results_by_rank(gloo, world_size):
    results = gloo(world_size, _sum, 10)
    expected = sum(10.0 + rank for rank in range(world_size))
    assert [(rank, size, total.item()) for rank, size, total in results] == [
        (rank, world_size, expected) for rank in range(world_size)
    ]


def test_tensors_and_classes_of_the_test_module_travel(gloo):
    tensor = torch.arange(300_000.0).requires_grad_()  # larger than a pipe's buffer
    for doubled, shape in gloo(2, _double, tensor, Shape(3)):
        assert doubled.requires_grad and torch.equal(doubled, tensor * 2)
        assert shape == Shape(6)


def test_workers_persist_and_have_one_thread(gloo):
    assert gloo(2, _pid) == gloo(4, _pid)[:2]
    assert gloo(2, _threads) == [1, 1]


def test_nested_functions_of_classes(gloo):
    assert gloo(2, Outer.rank) == [0, 1]


def test_a_rank_may_end_its_group(gloo):
    assert gloo(2, _ends_its_group) == [0, 1]
    assert gloo(2, _pid)


@pytest.mark.parametrize("bad", [0, 2])
def test_error_of_one_rank_while_others_wait(gloo, bad):
    before = gloo(3, _pid)
    with pytest.raises(RankError, match=rf"^rank {bad} of 3: Traceback[^$]*in _raise_on[^$]*planted on {bad}"):
        gloo(3, _raise_on, bad)
    after = gloo(3, _pid)
    assert not set(before) & set(after)
    assert not any(_alive(pid) for pid in before)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGFPE])
def test_signal_of_a_dead_rank(gloo, number):
    with pytest.raises(RankError, match=f"rank 1 of 2: died of {number.name}"):
        gloo(2, _die, number)
    assert len(gloo(2, _pid)) == 2


def test_timeout_names_the_ranks_that_hang_and_where(gloo):
    gloo(3, _pid)
    started = time.monotonic()
    with pytest.raises(RankError, match=r"ranks \[1\] of 3 gave nothing in 3 s[^$]*rank 1 is at:[^$]*in _hang"):
        gloo(3, _hang, timeout=3)
    assert time.monotonic() - started < 30
    assert len(gloo(3, _pid)) == 3


def test_a_worker_that_died_between_calls_is_replaced(gloo):
    first = gloo(1, _pid)
    gloo(1, _die_later)
    deadline = time.monotonic() + 10
    while gloo.workers[0].process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert gloo(1, _pid) != first


def test_a_rank_that_dies_when_its_group_ends(gloo):
    with pytest.raises(RankError, match="rank 1 of 2 died of SIGKILL when its group ended"):
        gloo(2, _die_at_the_end)
    assert gloo(2, _pid)


@pytest.mark.slow
def test_workers_of_a_killed_caller_end(tmp_path):
    caller = "import gloo, sys, test_gloo as t; p = gloo.Pool(); print(*p(2, t._pid), flush=True); sys.stdin.read()"
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
    command = [sys.executable, "-c", caller]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, cwd=tmp_path, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 2 and all(map(_alive, pids))
        process.kill()
    deadline = time.monotonic() + 10
    while any(map(_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(_alive, pids))


def test_what_does_not_pickle_is_refused(gloo):
    with pytest.raises(RankError, match="rank [01] of 2:[^$]*[Pp]ickl"):
        gloo(2, _unpicklable)
    with pytest.raises((pickle.PicklingError, AttributeError)):
        gloo(2, _double, lambda: None, None)
    assert gloo(2, _pid)


def test_close_ends_all_workers():
    pool = Pool()
    pids = pool(2, _pid)
    pool.close()
    assert not any(_alive(pid) for pid in pids)
