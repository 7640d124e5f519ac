"""Clocks: marks of the host or of a CUDA stream in seconds of one clock, time waited for a core, offsets between nodes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lsys.parallel.ledger.hooks import Mark


class Timer:
    """Marks moments, and says later when they were, in seconds of this process's `time.perf_counter`.

    On a GPU a mark is an event of the current stream, so that nothing waits within a step. Its time follows from that of a
    reference event whose host time is known. What CUDA gives is a float32 of milliseconds: 1 us over 16 s, 0.1 ms over half
    an hour; `anchor` takes a new reference, which is due before marks that are far from the last.
    """

    def __init__(self, device: torch.device) -> None:
        self.is_cuda = device.type == "cuda"
        self.anchor()

    def anchor(self) -> None:
        """Take the reference; on a GPU this waits for the current stream. Marks made before are lost."""
        if self.is_cuda:
            self._reference = torch.cuda.Event(enable_timing=True)
            self._reference.record()
            self._reference.synchronize()
        self._origin = time.perf_counter()

    def mark(self) -> Mark:
        if not self.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, mark: Mark) -> float:
        """When the mark was passed; waits until it is."""
        if isinstance(mark, float):
            return mark
        mark.synchronize()
        return self._origin + self._reference.elapsed_time(mark) / 1e3


class RunQueue:
    """`queue()`: seconds for which the thread that made it was ready to run, but waited for a core; since the thread began.

    Linux counts them: the second figure of /proc/self/task/ID/schedstat, in ns.

    Raises:
        OSError: the system does not count them.
    """

    def __init__(self) -> None:
        path = f"/proc/self/task/{threading.get_native_id()}/schedstat"
        self._file = os.open(path, os.O_RDONLY)
        if os.pread(self._file, 80, 0).split()[-1:] in ([], [b"0"]):  # it has never run: a kernel that does not count
            self.close()
            raise OSError(f"{path} holds no counts")

    def __call__(self) -> float:
        return int(os.pread(self._file, 80, 0).split()[1]) * 1e-9

    def close(self) -> None:
        os.close(self._file)


def clock_offset(nodes: Sequence[int], device: torch.device, rounds: int = 8) -> float:
    """Seconds by which the clock of this rank's node is ahead of that of rank 0's node. Collective over the default group.

    Ranks of a node share a clock. In each of some all-reduces there is a moment at which all ranks are inside, so the
    moments at which ranks of two nodes enter and leave bound the offset from both sides. It is taken for the middle of the
    narrowest bounds, as if messages took as long one way as the other; the error is at most half of the bounds' distance,
    and so of the fastest all-reduce.

    Args:
        nodes: of each rank of the default group.
    """
    token, rows = torch.zeros(1, device=device), []
    for _ in range(rounds):
        before = time.perf_counter()
        dist.all_reduce(token)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        rows.append((before, time.perf_counter()))
    own = torch.tensor(rows, dtype=torch.float64, device=device)  # [rounds, 2]
    whole = own.new_empty(len(nodes), rounds, 2)
    dist.all_gather_into_tensor(whole.flatten(0, 1), own)
    places, whole = torch.tensor(nodes), whole.cpu()
    here, there = (whole[places == node] for node in (nodes[dist.get_rank()], nodes[0]))
    return 0.0 if nodes[dist.get_rank()] == nodes[0] else _between(here, there)


def _between(here: Tensor, there: Tensor) -> float:
    """[ranks of a node, rounds, 2] of two nodes -> how far the first one's clock is ahead."""
    entered = [node[..., 0].amax(0) for node in (here, there)]  # [rounds], when its last rank entered
    left = [node[..., 1].amin(0) for node in (here, there)]
    least, most = (entered[0] - left[1]).amax(), (left[0] - entered[1]).amin()
    return float(least + most) / 2
