"""Measures of the steps since the last report."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

GIB = 2**30


@dataclass(frozen=True)
class Interval:
    """The steps between two reports.

    Attributes:
        steps: how many. seconds: wall-clock of all of them. data_seconds: of these, waiting for data.
        tokens: of all ranks. flops: model FLOPs (forward and backward) without recompute, of whom `add` was told them.
    """

    steps: int
    seconds: float
    data_seconds: float
    tokens: int
    flops: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def step_seconds(self) -> float:
        return self.seconds / self.steps

    @property
    def data_percent(self) -> float:
        return 100 * self.data_seconds / self.seconds


class Meter:
    """Adds up steps; `take` returns the sums and starts anew."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self.began, self.steps, self.tokens, self.flops, self.data_seconds = time.perf_counter(), 0, 0, 0.0, 0.0

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.data_seconds += time.perf_counter() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside (validation, checkpoints) is not a step's."""
        began = time.perf_counter()
        yield
        self.began += time.perf_counter() - began

    def add(self, tokens: int, flops: float) -> None:
        self.steps += 1
        self.tokens += tokens
        self.flops += flops

    def take(self) -> Interval:
        interval = Interval(self.steps, time.perf_counter() - self.began, self.data_seconds, self.tokens, self.flops)
        self._start()
        return interval


def memory(device: torch.device) -> tuple[str, float]:
    """(name, GiB): the most the allocator reserved on a GPU since the last call, or the process's largest resident size on a CPU."""
    if device.type == "cuda":
        reserved = torch.cuda.max_memory_reserved(device)
        torch.cuda.reset_peak_memory_stats(device)
        return "max_reserved", reserved / GIB
    return "max_resident", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
