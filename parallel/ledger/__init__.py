"""The ledger: every byte and second of communication of this process, by axis and link class.

    label(group, "tensor", node_of_rank=[0, 0, 1, 1])
    with record() as ledger:
        train_step()
    ledger.bytes(axis="tensor", link=NETWORK)
    print(ledger.table())

All operations that Python issues through a ProcessGroup are seen, on every thread, whoever issues them (`hooks.py` says
how, and what is not). What counts as moved is in `lsys.parallel.traffic`. Outside of `record` nothing is changed or measured.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from lsys.parallel.ledger.hooks import HOOKS, Call, Mark, Observer
from lsys.parallel.ledger.labels import OTHER, WORLD, Place, label, unlabel
from lsys.parallel.traffic import NETWORK, NODE, Operation, Traffic, traffic

__all__ = [
    "NETWORK",
    "NODE",
    "OTHER",
    "WORLD",
    "Event",
    "Ledger",
    "Operation",
    "Place",
    "Traffic",
    "bytes_sent",
    "label",
    "record",
    "traffic",
    "unlabel",
]


@contextlib.contextmanager
def record(programs: bool = False) -> Iterator[Ledger]:
    """Record what this process communicates while the context is open; read the ledger inside or after.

    Contexts may nest or overlap: each ledger gets what is issued while its own context is open.

    Args:
        programs: record the computation between the operations too, for `lsys.parallel.replay`: the CPU time of the
            thread that issues them. For ranks that compute on a CPU.
    """
    ledger = Ledger(programs)
    HOOKS.add(ledger)
    try:
        yield ledger
    finally:
        HOOKS.remove(ledger)
        ledger._stop()


@dataclass(frozen=True, slots=True)
class Event:
    """One operation.

    Attributes:
        operation: its kind and size. ranks: of its group, global, in group order.
        axis: of its group; OTHER for groups without a label.
        link: NETWORK if any peer that it talks to is on another node, else NODE.
        sent, received: bytes by link class.
        seconds: from its issue to the end of the first wait for it. For an operation that finished behind computation
            this is more than its transfer took: nobody looked earlier. Without a wait, the time of its issue.
        exposed: seconds for which the issuing thread (on a GPU, the stream that issued it) was blocked in it.
    """

    operation: Operation
    ranks: tuple[int, ...]
    axis: str
    link: str
    sent: dict[str, int]
    received: dict[str, int]
    seconds: float
    exposed: float


class Ledger(Observer):
    """What was recorded.

    The sums take the same selection: `axis`, a label's; `link`, NODE or NETWORK; `op`, the kind of operation, as
    "all_gather". None takes all. Bytes are of the link that they cross; calls and seconds of an operation with peers on
    both kinds of link count for NETWORK, which bounds it. Operations in batches share the time of their batch equally.
    Reading waits for the GPU where times are its events.
    """

    def __init__(self, programs: bool = False) -> None:
        self.clock = time.thread_time if programs else None
        self._calls: list[Call] = []
        self._trace: list[Moment] = []
        if programs:
            self._trace.append(Moment(None, False, threading.get_ident(), 0.0, time.thread_time()))

    def issued(self, call: Call, before: float, after: float) -> None:
        self._calls.append(call)
        if self.clock is not None:
            self._trace.append(Moment(call, False, threading.get_ident(), before, after))

    def waited(self, call: Call, before: float, after: float) -> None:
        if self.clock is not None:
            self._trace.append(Moment(call, True, threading.get_ident(), before, after))

    def _stop(self) -> None:
        if self.clock is not None:
            self._trace.append(Moment(None, True, threading.get_ident(), time.thread_time(), 0.0))

    @property
    def events(self) -> tuple[Event, ...]:
        """All operations, in the order of their issue."""
        return tuple(map(_event, list(self._calls)))

    @property
    def trace(self) -> tuple[Moment, ...]:
        """Issues and waits in order, with the CPU time of their threads; with `programs` only."""
        return tuple(self._trace)

    def bytes(
        self, axis: str | None = None, link: str | None = None, op: str | None = None, *, direction: str = "sent"
    ) -> int:
        """Bytes this rank sent, or with direction="received" received."""
        if direction not in ("sent", "received"):
            raise ValueError(f"bytes are sent or received; got direction={direction!r}")
        _check_link(link)
        total = 0
        for call in self._selected(axis, None, op):
            moved = getattr(_moved(call.operation, call.place, call.backend), direction)
            total += sum(moved.values()) if link is None else moved[link]
        return total

    def calls(self, axis: str | None = None, link: str | None = None, op: str | None = None) -> int:
        """Operations issued; those of one rank and those of zero bytes count."""
        return len(self._selected(axis, link, op))

    def seconds(self, axis: str | None = None, link: str | None = None, op: str | None = None) -> float:
        """Sum of the operations' seconds, issue to completion; see `Event`. Concurrent ones count each."""
        return sum(_seconds(call) for call in self._selected(axis, link, op))

    def exposed(self, axis: str | None = None, link: str | None = None, op: str | None = None) -> float:
        """Seconds for which the rank was blocked in communication."""
        return sum(_exposed(call) for call in self._selected(axis, link, op))

    def take(self) -> Ledger:
        """What was recorded so far, which this ledger forgets: a step's part of a long recording.

        Operations still under way are the new ledger's, and go on to be timed there.

        Raises:
            ValueError: the ledger records programs, which cannot be cut.
        """
        if self.clock is not None:
            raise ValueError("a ledger with programs is not divided; record each part by itself")
        part = Ledger()
        part._calls, self._calls = self._calls, []
        return part

    def table(self) -> str:
        """A line for each axis, link class and operation; bytes in millions."""
        rows: dict[tuple[str, str, str], list[float]] = {}
        for event in self.events:
            row = rows.setdefault((event.axis, event.link, event.operation.kind), [0.0] * 5)
            sent, received = sum(event.sent.values()) / 1e6, sum(event.received.values()) / 1e6
            for column, value in enumerate((1, sent, received, event.seconds, event.exposed)):
                row[column] += value
        heads = ("calls", "sent MB", "received MB", "s", "exposed s")
        lines = [f"{'axis':12} {'link':8} {'operation':15} " + " ".join(f"{head:>11}" for head in heads)]
        for (axis, link, op), (calls, *others) in sorted(rows.items()):
            numbers = " ".join(f"{value:11.3f}" for value in others)
            lines.append(f"{axis:12} {link:8} {op:15} {calls:11.0f} {numbers}")
        return "\n".join(lines)

    def _selected(self, axis: str | None, link: str | None, op: str | None) -> list[Call]:
        _check_link(link)
        return [
            call
            for call in list(self._calls)
            if axis in (None, call.place.axis)
            and op in (None, call.operation.kind)
            and (link is None or link == _moved(call.operation, call.place, call.backend).link)
        ]


def _check_link(link: str | None) -> None:
    if link not in (None, NODE, NETWORK):
        raise ValueError(f"link {link!r} is no link class; there are {NODE!r} and {NETWORK!r}")


class Moment(NamedTuple):
    """A call was issued, or waited for; `call` None: the recording began, or ended.

    Attributes:
        thread: that did it. before, after: its CPU time, s, on both sides of what it did.
    """

    call: Call | None
    is_wait: bool
    thread: int
    before: float
    after: float


class _Moved(NamedTuple):
    link: str
    sent: dict[str, int]
    received: dict[str, int]


@lru_cache(maxsize=4096)
def _moved(operation: Operation, place: Place, backend: str) -> _Moved:
    """Bytes by link class, and the class that bounds the operation."""
    moved = traffic(operation, place.rank, len(place.ranks), backend)
    sums = {way: {NODE: 0, NETWORK: 0} for way in moved._fields}
    links = set()
    for way, by_peer in moved._asdict().items():
        for peer, count in by_peer.items():
            links.add(place.link(peer))
            sums[way][place.link(peer)] += count
    return _Moved(NETWORK if NETWORK in links else NODE, **sums)


def bytes_sent(call: Call) -> int:
    """By this rank, over links of all classes."""
    return sum(_moved(call.operation, call.place, call.backend).sent.values())


def _event(call: Call) -> Event:
    link, sent, received = _moved(call.operation, call.place, call.backend)
    place = call.place
    return Event(
        call.operation, place.ranks, place.axis, link, dict(sent), dict(received), _seconds(call), _exposed(call)
    )


def _seconds(call: Call) -> float:
    return call.share * _between(call.begin, call.end)


def _exposed(call: Call) -> float:
    return call.share * sum(_between(begin, end) for begin, end in list(call.blocked))


def _between(begin: Mark, end: Mark) -> float:
    if isinstance(begin, float) or isinstance(end, float):
        assert isinstance(begin, float) and isinstance(end, float)
        return end - begin
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
