"""The arithmetic of the waterfall on made-up marks, and the exchange of issue times on made-up operations."""

import itertools
import math
import time
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from lsys.observe.clocks import RunQueue, Timer, clock_offset
from lsys.observe.waterfall import Moved, Waterfall, part_names
from lsys.observe.waterfall_peers import Channel, Issues
from lsys.observe.waterfall_split import Blocked, Boundary, Split
from lsys.parallel.ledger import Operation, Place
from lsys.parallel.ledger.hooks import Call

CPU = torch.device("cpu")


# ---- one rank's steps


class PeersStub:
    """Stands in for `Peers`: what the exchange is to give for every operation."""

    def __init__(self, last: float, near: float | None = None) -> None:
        self.last, self.near = last, last if near is None else near

    def add(self, call: Call, begin: float) -> Issues:
        issues = Issues()
        issues.begins.append(begin)
        issues.last, issues.near = [self.last], [self.near]
        return issues


def call(axis: str = "data", kind: str = "all_reduce", begin: float = 0.0, size: int = 8) -> Call:
    return Call(Operation(kind, size), Place(axis, 0, (0, 1), (0, 0)), "gloo", begin, begin)


def split(
    peers: Any, *step: Boundary | Blocked, axes: tuple[str, ...] = ("data", "pipeline", "other")
) -> dict[str, Any]:
    """Parts of a step, without those that are zero; they sum to the time between its first and last boundary."""
    whole = Split(Timer(CPU), peers, axes)
    whole.add(step)
    whole.settle()
    return {part: pytest.approx(seconds) for part, seconds in whole.seconds.items() if not abs(seconds) <= 1e-12}


def waited_for(axis: str, begin: float, end: float, before: float = 0.0, after: float = 0.0) -> list[Blocked]:
    begin, end = float(begin), float(end)
    one = call(axis, begin=begin)
    return [Blocked(begin, begin, before, before, [one], True), Blocked(begin, end, before, after, [one], False)]


def step(*inside: Blocked, waited: float = 0.0) -> list[Boundary | Blocked]:
    """0 .. 1 between regions, 1 .. 9 compute, 9 .. 10 data."""
    boundaries = [(0.0, 0.0, None), (1.0, 0.0, "compute"), (9.0, waited, "data"), (10.0, waited, None)]
    first, second, *others = [Boundary(*each) for each in boundaries]
    return [first, second, *inside, *others]


def test_segments_between_waits_are_compute() -> None:
    assert split(PeersStub(-math.inf), *step(*waited_for("data", 2, 5))) == {
        "other": 1, "compute": 5, "exposed_data": 3, "data": 1
    }  # fmt: skip


def test_waiting_for_peers_is_no_transfer() -> None:
    assert split(PeersStub(4.0), *step(*waited_for("data", 2, 5)))["imbalance"] == 2
    assert (
        split(PeersStub(99.0), *step(*waited_for("data", 2, 5)))["imbalance"] == 3
    )  # later than its end: clocks differ
    assert split(PeersStub(4.0), *step(*waited_for("pipeline", 2, 5)))["bubble"] == 2
    # The last rank of this one's stage came at 3, that of another stage at 4.
    parts = split(PeersStub(4.0, 3.0), *step(*waited_for("data", 2, 5)))
    assert (parts["imbalance"], parts["bubble"], parts["exposed_data"]) == (1, 1, 1)


def test_waiting_for_a_core_is_taken_out_of_the_end_of_a_wait() -> None:
    def parts(core: float) -> dict[str, float]:
        return split(PeersStub(4.0), *step(*waited_for("data", 2, 5, 0.5, 0.5 + core), waited=0.5 + core + 0.25))

    assert parts(0.0) == {"other": 1, "compute": 4.25, "core": 0.75, "imbalance": 2, "exposed_data": 1, "data": 1}
    assert parts(0.5) == {"other": 1, "compute": 4.25, "core": 1.25, "imbalance": 2, "exposed_data": 0.5, "data": 1}
    assert parts(1.5) == {"other": 1, "compute": 4.25, "core": 2.25, "imbalance": 1.5, "data": 1}


def test_what_a_segment_is_too_short_for_counts_later() -> None:
    assert split(PeersStub(0.0), *step(*waited_for("data", 2, 2.5, 1.5, 1.5), waited=3.0))["core"] == 3


def test_stops_inside_of_a_checkpoint_are_the_checkpoint() -> None:
    boundaries: list[Boundary | Blocked] = [
        Boundary(0.0, 0.0, None),
        Boundary(0.0, 0.0, "checkpoint"),
        *waited_for("data", 1, 3),
        Boundary(4.0, 0.0, "paused"),
    ]
    assert split(PeersStub(0.0), *boundaries, Boundary(7.0, 0.0, None), Boundary(8.0, 0.0, None)) == {
        "checkpoint": 4,
        "other": 1,
    }


def test_a_batch_stops_once() -> None:
    calls = [call("pipeline", "send", 2.0), call("pipeline", "recv", 2.5)]
    issues = [Blocked(each.begin, each.begin, 0.0, 0.0, [each], True) for each in calls]
    parts = split(PeersStub(3.0), *step(*issues, Blocked(2.5, 4.0, 0.0, 0.0, calls, False)))
    assert parts == {"other": 1, "compute": 6.5, "bubble": 0.5, "exposed_pipeline": 1, "data": 1}


def test_an_operation_may_outlast_its_step() -> None:
    one = call()
    whole = Split(Timer(CPU), PeersStub(1.5), ["data"])  # type: ignore[arg-type]
    whole.add([Boundary(0.0, 0.0, None), Blocked(0.5, 0.5, 0.0, 0.0, [one], True), Boundary(1.0, 0.0, None)])
    whole.settle()
    assert whole.seconds["other"] == 1 and whole.moved == {
        ("data", "calls"): 1,
        ("data", "bytes"): 8,
        ("data", "total"): 0,
    }
    whole.restart()
    whole.add([Boundary(1.0, 0.0, None), Blocked(1.25, 2.0, 0.0, 0.0, [one], False), Boundary(3.0, 0.0, None)])
    whole.settle()
    assert whole.seconds == {"other": 1.25, "core": 0, "imbalance": 0.25, "exposed_data": 0.5, "bubble": 0}
    assert whole.moved == {("data", "total"): 1.5}


def test_axes_without_a_group_are_other() -> None:
    assert split(PeersStub(0.0), *step(*waited_for("spare", 2, 5)))["exposed_other"] == 3


# ---- what is shown


def test_what_is_shown() -> None:
    names = part_names(["tensor", "data"], ranks=4, stages=2, cores=True)
    seconds = dict(zip(names, (8.0, 0.5, 0.3, 0.4, 0.0, 0.0, 0.0, 0.7, 0.05, 0.05), strict=True))
    moved = {"data": Moved(bytes=100.0, total=1.0, exposed=0.3)}
    shown = Waterfall(3, 10.0, seconds, (seconds,) * 4, moved)
    assert shown.line == "compute 80% exposed 8% imbalance 4% core 7%"
    assert shown.percent["compute"] == 80 and sum(shown.percent.values()) == pytest.approx(100)
    scalars = shown.scalars
    assert scalars["waterfall/exposed_tensor(%)"] == pytest.approx(5) and scalars["waterfall/bubble(%)"] == 0
    assert scalars["comm/data/exposed(ms)"] == pytest.approx(300) and scalars["comm/data/bytes"] == 100
    assert scalars["comm/data/total(ms)"] == pytest.approx(1000) and len(scalars) == 10 + 3
    assert part_names([], ranks=1, stages=1, cores=False) == ("compute", "data", "checkpoint", "report", "other")


# ---- several ranks


def channel(rank: int, ranks: int, stage: int = 0, stages: int = 1) -> Channel:
    assert dist.group.WORLD is not None
    return Channel(dist.group.WORLD, Place("data", rank, tuple(range(ranks)), (0,) * ranks), stage, stages, CPU)


def exchanged(rank: int, ranks: int) -> tuple[bool, Issues]:
    """Operation n is issued by rank r at 10 n + r, by a clock that is 1000 r ahead: whether all agree, and what it learns."""
    own = channel(rank, ranks)
    for number, (kind, root) in enumerate([("all_reduce", -1), ("broadcast", 1), ("reduce", 1), ("scatter", 0)]):
        own.add(Call(Operation(kind, 4, root), own.place, "gloo", 0.0, 0.0), 10.0 * number + rank)
    issues = own.collectives
    ahead = 1000.0 * rank
    issues.begins[:] = [begin + ahead for begin in issues.begins]
    own.roots[:] = [root + ahead for root in own.roots]
    return own.exchange(ahead), issues


def test_issue_times_of_the_last_rank(gloo: Any) -> None:
    for rank, (agree, issues) in enumerate(gloo(3, exchanged)):
        # A broadcast's followers wait for its root only.
        expected = [2, 10 + (2 if rank == 1 else 1), 20 + 2, 30 + (2 if rank == 0 else 0)]
        assert agree and issues.last == issues.near == [1000 * rank + each for each in expected]


def exchanged_stages(rank: int, ranks: int) -> tuple[bool, Issues]:
    """Ranks 0 and 1 are the first stage, the others the second."""
    own = channel(rank, ranks, rank // 2, 2)
    issues = own.add(call(), float(rank))
    return own.exchange(0.0), issues


def test_the_last_rank_of_the_own_stage(gloo: Any) -> None:
    for rank, (agree, issues) in enumerate(gloo(4, exchanged_stages)):
        assert agree and issues.last == [3] and issues.near == [1 if rank < 2 else 3]


def exchanged_messages(rank: int, ranks: int) -> tuple[bool, Issues, Issues, bool]:
    """Each rank sends r + 1 messages to the next; the last one's first neighbour takes one less than it gets. Then nothing."""
    own = channel(rank, ranks)
    after, before = (rank + 1) % ranks, (rank - 1) % ranks
    sends, receives = own.messages[after, "send"], own.messages[before, "recv"]
    sends.begins += [100.0 * n + 10 for n in range(rank + 1)]
    receives.begins += [100.0 * n + 20 - rank for n in range(before + 1 - (rank == 0))]
    agree = own.exchange(0.0)
    own.restart()
    return agree, sends, receives, own.exchange(0.0)


def test_messages_match_in_order(gloo: Any) -> None:
    for rank, (agree, sends, receives, agree_on_nothing) in enumerate(gloo(3, exchanged_messages)):
        after, before = (rank + 1) % 3, (rank - 1) % 3
        assert agree == (rank == 1) and agree_on_nothing  # the pair that differs notices
        assert sends.last == (None if rank == 2 else [100 * n + 20 - after for n in range(rank + 1)])
        assert receives.last == (None if rank == 0 else [100 * n + 20 - rank for n in range(before + 1)])


def exchanged_differing(rank: int, ranks: int) -> list[tuple[bool, Issues]]:
    """An operation that only rank 0 issues; then one that rank 1 issues as another kind."""
    own, found = channel(rank, ranks), []
    for kinds in (["all_reduce"] * (2 if rank == 0 else 1), [("all_reduce", "all_gather")[rank % 2]]):
        for number, kind in enumerate(kinds):
            own.add(call(kind=kind), 1.0 + number)
        found.append((own.exchange(0.0), own.collectives))
        own.restart()
    return found


def test_differing_operations_teach_nothing(gloo: Any) -> None:
    for found in gloo(3, exchanged_differing):
        assert all(not agree and issues.last is None for agree, issues in found)


def shifted(rank: int, ranks: int) -> float:
    """Rank 2 is alone on a node, whose clock is ahead."""
    real = time.perf_counter
    with mock.patch.object(time, "perf_counter", lambda: real() + (12.5 if rank == 2 else 0.0)):
        return min((clock_offset((0, 0, 1), CPU) for _ in range(5)), key=lambda found: abs(found - 12.5))


def test_offset_of_clocks(gloo: Any) -> None:
    first, second, third = gloo(3, shifted)
    assert first == second == 0 and third == pytest.approx(12.5, abs=0.005)


def test_time_waited_for_a_core_grows() -> None:
    queue = RunQueue()
    readings = [queue() for _ in range(1000)]
    queue.close()
    assert readings[0] >= 0 and all(a <= b for a, b in itertools.pairwise(readings))


def test_a_gpus_marks_have_the_hosts_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of CUDA's events as they are: passed when the stream comes there, known to the host when it has waited for them."""
    stream, host = [10.0], [100.0]  # ms of the device, s of the host

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.at, self.is_known = math.nan, False

        def record(self) -> None:
            self.at = stream[0]

        def synchronize(self) -> None:
            self.is_known, host[0] = True, host[0] + 1.0  # that takes a while

        def elapsed_time(self, later: "Event") -> float:
            assert self.is_known and later.is_known
            return later.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr("lsys.observe.clocks.time", SimpleNamespace(perf_counter=lambda: host[0]))
    timer = Timer(torch.device("cuda"))
    stream[0] += 250.0
    mark = timer.mark()
    assert timer.seconds(mark) == 101.25  # the reference was passed when it had been waited for
    timer.anchor()
    stream[0] += 500.0
    assert timer.seconds(timer.mark()) == 103.5
