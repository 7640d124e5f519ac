"""Splits recorded steps into parts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from lsys.observe.clocks import Timer
from lsys.observe.waterfall import BUBBLE, CHECKPOINT, COMPUTE, CORE, DATA, IMBALANCE, REPORT, REST, exposed
from lsys.observe.waterfall_peers import PIPELINE, Issues, Peers
from lsys.parallel.ledger import OTHER, bytes_sent
from lsys.parallel.ledger.hooks import Call, Mark

PAUSED = "paused"  # a region that is no step's
REGIONS = (COMPUTE, DATA, CHECKPOINT, REPORT, PAUSED)


class Boundary(NamedTuple):
    """A step or a region begins or ends. waited: for a core so far, s. region: what follows; None is between regions."""

    mark: Mark
    waited: float
    region: str | None


class Blocked(NamedTuple):
    """This rank issued an operation, or was blocked by some. before, after: waited for a core so far, s."""

    begin: Mark
    end: Mark
    before: float
    after: float
    calls: list[Call]
    is_issue: bool


class Issued(NamedTuple):
    """An operation: its place among those of its group, if they are matched, and when its issue returned."""

    issues: Issues | None
    number: int
    returned: float


class BlockedInterval(NamedTuple):
    """A `Blocked` in seconds: since when, how long, how much of that for a core; the operations, and their axis."""

    begin: float
    length: float
    core: float
    operations: list[Issued]
    axis: str


class Split:
    """Sums of recorded steps: `add` each, let the ranks exchange when they issued their operations, then `settle`.

    Attributes:
        steps: how many were added.
        seconds: by part, of all of them.
        moved: by axis, and "bytes", "total" (s) or "calls".
    """

    def __init__(self, timer: Timer, peers: Peers, axes: Sequence[str]) -> None:
        self._timer, self._peers, self._axes = timer, peers, axes
        self._open: dict[Call, Issued] = {}
        self.restart()

    def restart(self) -> None:
        self.steps = 0
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.moved: defaultdict[tuple[str, str], float] = defaultdict(float)
        self._blocked: list[BlockedInterval] = []
        # Operations under way were matched, and may be waited for later. What nothing waits for does not pile up.
        self._older, self._open = self._open, {}

    def add(self, step: Sequence[Boundary | Blocked]) -> None:
        """A step, from its first boundary to its last."""
        self.steps += 1
        first, region = step[0], None
        assert isinstance(first, Boundary)
        self._now, self._waited = self._timer.seconds(first.mark), first.waited
        for each in step[1:]:
            if isinstance(each, Boundary):
                self._advance(self._timer.seconds(each.mark), each.waited, region)
                region = each.region
            elif region in (COMPUTE, None):
                begin, end = self._timer.seconds(each.begin), self._timer.seconds(each.end)
                self._advance(begin, each.before, region)
                self._add_blocked(each, begin, end)

    def _advance(self, time: float, waited: float, region: str | None) -> None:
        """Nothing but this region, and waits for a core, since the last time."""
        length, core = self._pass(time, waited)
        if region != PAUSED:
            self.seconds[region or REST] += length - core
            self.seconds[CORE] += core

    def _pass(self, time: float, waited: float) -> tuple[float, float]:
        """Seconds that passed, and how many of them this thread waited for a core. What is too much is left for later."""
        length = max(0.0, time - self._now)  # marks of host and GPU may cross
        core = min(max(0.0, waited - self._waited), length)
        self._now += length
        self._waited += core
        return length, core

    def _add_blocked(self, blocked: Blocked, begin: float, end: float) -> None:
        operations = []
        for call in blocked.calls:
            axis = call.place.axis if call.place.axis in self._axes else OTHER
            if blocked.is_issue:
                issues = self._peers.add(call, begin)
                issued = Issued(issues, len(issues.begins) - 1 if issues else 0, end)
                self._open[call] = issued
                self.moved[axis, "calls"] += 1
                self.moved[axis, "bytes"] += bytes_sent(call)
                self.moved[axis, "total"] += call.share * (end - begin)
            else:
                opened = self._open if call in self._open else self._older
                issued = opened.pop(call, Issued(None, 0, begin))
                self.moved[axis, "total"] += call.share * (end - issued.returned)
            operations.append(issued)
        since = self._now
        length, core = self._pass(end, blocked.after)
        self._blocked.append(BlockedInterval(since, length, core, operations, axis))

    def settle(self) -> None:
        """Split the blocked intervals, now that it is known when the other ranks came. Once before `restart`."""
        for interval in self._blocked:
            last = near = interval.begin
            for issues, number, _ in interval.operations:
                if issues is not None and issues.last is not None and issues.near is not None:
                    last, near = max(last, issues.last[number]), max(near, issues.near[number])
            late = min(last - interval.begin, interval.length)
            transfer = interval.length - late
            of_transfer = min(interval.core, transfer)  # it waits for a core when it is done
            of_late = interval.core - of_transfer
            imbalance = 0.0 if interval.axis == PIPELINE else min(near - interval.begin, late)
            self.seconds[CORE] += interval.core
            self.seconds[exposed(interval.axis)] += transfer - of_transfer
            self.seconds[IMBALANCE] += max(0.0, imbalance - of_late)
            self.seconds[BUBBLE] += late - imbalance - max(0.0, of_late - imbalance)
