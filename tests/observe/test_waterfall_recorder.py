"""The recorder: which steps it records, against which reference, what it says once, and to what its own work counts."""

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from lsys.observe import clocks
from lsys.observe.clocks import Timer
from lsys.observe.waterfall import Waterfall
from lsys.observe.waterfall_split import Split


@contextlib.contextmanager
def recorder(rank: int, ranks: int) -> Iterator[Any]:
    from lsys.config.schema import Parallel
    from lsys.runtime import install_megatron

    install_megatron()
    from lsys.observe.waterfall_recorder import Recorder
    from lsys.runtime.environment import Launch
    from lsys.runtime.groups import process_groups

    with process_groups(Parallel(), Launch(rank=rank, world_size=ranks)) as groups:
        yield Recorder(groups)


def differing(rank: int, ranks: int) -> list[Waterfall]:
    """An operation that only rank 0 records; then it is waited for by both. In the second step all is well."""
    found = []
    with recorder(rank, ranks) as own, own.recording(1):
        for number in (1, 2, 3):
            with own.region("compute"):
                if rank == 1:
                    time.sleep(0.2)
                dist.all_reduce(torch.ones(4))
            if number < 3:
                with own.region("compute" if rank == 0 else "paused"):
                    dist.all_reduce(torch.ones(4))
            own.end_step(number)
            with own.region("report"):
                found.append(own.take())
    return found


def test_differing_operations_are_said_once(gloo: Any) -> None:
    for first, second, third in gloo(2, differing):
        assert [len(each.notes) for each in (first, second, third)] == [1, 0, 0]
        assert first.notes[0].startswith("world: its ranks issued different operations")
        assert first.per_rank[0]["exposed_world"] > 0.15 and first.per_rank[0]["imbalance"] < 0.05
        assert third.per_rank[0]["imbalance"] > 0.15 and third.per_rank[0]["exposed_world"] < 0.05


def without_counts(rank: int, ranks: int) -> list[Waterfall]:
    found = []
    missing = mock.patch.object(clocks.os, "open", side_effect=FileNotFoundError)
    with recorder(rank, ranks) as own, missing, own.recording(1):
        for number in (1, 2):
            dist.all_reduce(torch.ones(4))
            own.end_step(number)
            found.append(own.take())
    return found


def test_a_system_that_does_not_count_waits_for_cores(gloo: Any) -> None:
    first, second = gloo(2, without_counts)[0]
    assert first.parts["core"] == 0 and "does not tell how long" in first.notes[0]
    assert second.notes == () and dataclasses.replace(second, notes=()) == second


SUMMING = 0.05  # s


def slow_to_sum_up(rank: int, ranks: int) -> tuple[Waterfall, tuple[float, float]]:
    """Three steps of nothing; between which times they took, in s."""
    add = Split.add

    def slow(whole: Split, step: Any) -> None:
        time.sleep(SUMMING)
        add(whole, step)

    with recorder(rank, ranks) as own, mock.patch.object(Split, "add", slow):
        earliest = time.perf_counter()
        with own.recording(1):
            began = time.perf_counter()
            own.end_step(1)
            own.end_step(2)
            ended = time.perf_counter()
            own.end_step(3)
            latest = time.perf_counter()
            waterfall = own.take()
    return waterfall, (ended - began, latest - earliest)


def test_summing_up_is_the_report_of_a_step(gloo: Any) -> None:
    ((waterfall, (least, most)),) = gloo(1, slow_to_sum_up)
    assert waterfall.steps == 3 and least - 1e-6 < 3 * sum(waterfall.parts.values()) < most + 1e-6
    assert 3 * waterfall.parts["report"] + 3 * waterfall.parts["core"] > SUMMING - 1e-6  # of step 1, in step 3


# ---- which steps


def recorded_of(every: int, blocks: int) -> list[int]:
    from lsys.observe.waterfall_recorder import is_sampled

    return [number for number in range(1, 1 + blocks * every) if is_sampled(number, every)]


@pytest.mark.parametrize("every", [1, 2, 3, 10, 16])
def test_one_step_of_each_block_is_sampled(every: int) -> None:
    found = recorded_of(every, 2000)
    assert [(number - 1) // every for number in found] == list(range(2000))
    places = Counter((number - 1) % every for number in found)
    assert len(places) == every and min(places.values()) > 0.7 * 2000 / every  # none is preferred


def test_steps_that_pay_for_checkpoints_and_reports_are_among_the_sampled() -> None:
    found = recorded_of(10, 20_000)
    after_report = [number for number in found if number % 10 == 1]
    after_checkpoint = [number for number in after_report if number % 1000 == 1]
    assert len(after_report) == pytest.approx(2000, rel=0.1) and len(after_checkpoint) == pytest.approx(20, abs=10)


def test_steps_one_and_two() -> None:
    assert recorded_of(2, 1) == [2]  # bench/ledger.py calls what is recorded 2, and the rest 1


class Event:
    """Stands in for one of CUDA: lost with the reference that it was to be measured against."""

    def __init__(self, anchors: int) -> None:
        self.anchors, self.time = anchors, time.perf_counter()


class EventTimer(Timer):
    anchors = 0

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.is_cuda = True

    def anchor(self) -> None:
        self.anchors += 1

    def mark(self) -> Any:
        return Event(self.anchors)

    def seconds(self, mark: Any) -> float:
        if isinstance(mark, float):
            return mark
        assert mark.anchors == self.anchors
        return mark.time


def sparse(rank: int, ranks: int, every: int) -> tuple[list[int], list[int], int]:
    """Of 40 steps and reports after each seventh: recorded ones, how many were reported, and references since the start."""
    from lsys.runtime import install_megatron

    install_megatron()
    from lsys.observe import waterfall_recorder

    recorded, reported = [], []
    with recorder(rank, ranks) as own, mock.patch.object(waterfall_recorder, "Timer", EventTimer):
        own.every = every
        with own.recording(1):
            for number in range(1, 41):
                if own.is_on:
                    recorded.append(number)
                    mark = own._current[0].mark  # s where a report came in between
                    assert isinstance(mark, float) or mark.anchors == own._timer.anchors
                with own.region("compute"):
                    dist.all_reduce(torch.ones(4))
                own.end_step(number)
                if number % 7 == 0 or number == 40:
                    with own.region("report"):
                        waterfall = own.take()
                    reported.append(waterfall.steps if waterfall else 0)
            return recorded, reported, own._timer.anchors - 1


@pytest.mark.parametrize("every", [1, 3])
def test_a_recorded_step_is_measured_against_a_new_reference(gloo: Any, every: int) -> None:
    for recorded, reported, anchors in gloo(2, sparse, every):
        assert recorded == [number for number in recorded_of(every, 40) if number <= 40]
        assert sum(reported) == len(recorded)
        starts = [number for number in recorded if number - 1 not in recorded]
        assert anchors == len(starts) + sum(map(bool, reported))
