"""Runs the programs of all ranks in simulated time: each rank with a device of its own, and given links between them."""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count

from lsys.parallel.ledger import NETWORK, NODE
from lsys.parallel.links import Links
from lsys.parallel.replay.cost import Member, Port, cost
from lsys.parallel.replay.program import Compute, Issue, Program, Wait
from lsys.parallel.replay.timeline import Share, Timeline


class ReplayError(ValueError):
    """The programs do not fit together."""


def simulate(
    programs: Sequence[Program], links: Links, *, nodes: Sequence[int] | None = None, backend: str = "nccl"
) -> Timeline:
    """When everything ends, if each rank computes by itself and transfers take what the links say.

    A rank computes, issues and waits in the order of its program; issuing takes no time. A message starts once both ends
    have issued it, a collective once all ranks have, and once the ports that it uses are free: a rank has one port per
    link class and direction, which serves one transfer after the other, in the order in which they became ready, as far
    as their other ends are free; nothing overtakes a collective. What a transfer takes: `cost.py`. Sends and receives
    between two ranks of a group match in their order, collectives of a group in theirs.

    Args:
        programs: of ranks 0, 1, ..., in this order.
        links: latency and bandwidth of each link class that occurs.
        nodes: of each rank; default what the programs say.
        backend: whose algorithms the collectives use: "nccl", or "gloo" to compare with a run on CPUs.

    Raises:
        ReplayError: programs that are not of ranks 0, 1, ...; operations that do not match; ranks that wait for ever.
        ValueError: a link class without a link.
    """
    if [program.rank for program in programs] != list(range(len(programs))):
        raise ReplayError(f"programs are of ranks 0, 1, ... in order; got {[program.rank for program in programs]}")
    places = [program.node for program in programs] if nodes is None else list(nodes)
    if len(places) != len(programs):
        raise ReplayError(f"nodes names {len(places)} ranks; there are {len(programs)} programs")
    count_of_nodes = len(set(places))
    needed = {NODE: count_of_nodes < len(places), NETWORK: count_of_nodes > 1}
    missing = [link for link, is_needed in needed.items() if is_needed and link not in links]
    if missing:
        raise ValueError(f"links lack {', '.join(missing)}")
    return _Simulation(programs, links, places, backend).run()


@dataclass(eq=False)
class _Transfer:
    """A message or a collective.

    Attributes:
        members: who has issued it, by rank, and how. size: how many there will be.
        ready: when the last member came. done: when it ends; both None until known.
        waiters: ranks that are blocked, and since when.
    """

    size: int
    members: dict[int, Issue] = field(default_factory=dict)
    ready: float | None = None
    done: float | None = None
    ports: tuple[Port, ...] = ()
    busy: float = 0.0
    latency: float = 0.0
    waiters: list[tuple[int, float]] = field(default_factory=list)
    is_collective: bool = True


class _Ports:
    """Every port serves one transfer after the other."""

    def __init__(self) -> None:
        self.free_at: dict[Port, float] = defaultdict(float)
        self.queues: dict[Port, deque[_Transfer]] = defaultdict(deque)  # by port, in the order of readiness

    def may_start(self, transfer: _Transfer, now: float) -> bool:
        return all(self.free_at[p] <= now and not self._is_blocked(p, transfer) for p in transfer.ports)

    def _is_blocked(self, port: Port, transfer: _Transfer) -> bool:
        """Whether a collective, or for a collective anything, is before it in the queue."""
        for other in self.queues[port]:
            if other is transfer:
                return False
            if other.is_collective or transfer.is_collective:
                return True
        return False

    def startable(self, port: Port, now: float) -> _Transfer | None:
        """The first transfer in a port's queue that can start."""
        for transfer in self.queues[port]:
            if self.may_start(transfer, now):
                return transfer
            if transfer.is_collective:
                return None
        return None


class _Simulation:
    def __init__(self, programs: Sequence[Program], links: Links, nodes: list[int], backend: str) -> None:
        self.programs, self.links, self.nodes, self.backend = programs, links, nodes, backend
        self.shares = [Share() for _ in programs]
        self.places = [0] * len(programs)  # the next step of each rank
        self.ends: list[float | None] = [None] * len(programs)
        self.issued: list[dict[int, _Transfer]] = [{} for _ in programs]  # by rank and key
        self.queued: dict[object, deque[_Transfer]] = defaultdict(deque)  # messages of which one end has come
        self.collectives: dict[object, list[_Transfer]] = defaultdict(list)  # by group, in order
        self.counts: dict[object, int] = defaultdict(int)  # collectives that a rank has issued in a group
        self.ports = _Ports()
        self.agenda: list[tuple[float, int, Callable[[float], None]]] = []
        self.numbers = count()

    def run(self) -> Timeline:
        for rank in range(len(self.programs)):
            self.at(0.0, partial(self.proceed, rank))
        while self.agenda:
            now, _, action = heapq.heappop(self.agenda)
            action(now)
        self.check_end()
        ends = [end for end in self.ends if end is not None]
        for share, end in zip(self.shares, ends, strict=True):
            share.idle = max(ends) - end
        return Timeline(max(ends, default=0.0), tuple(self.shares))

    def at(self, time: float, action: Callable[[float], None]) -> None:
        heapq.heappush(self.agenda, (time, next(self.numbers), action))

    def proceed(self, rank: int, now: float) -> None:
        """Run the rank's steps until one takes time."""
        steps = self.programs[rank].steps
        while self.places[rank] < len(steps):
            step = steps[self.places[rank]]
            self.places[rank] += 1
            if isinstance(step, Compute):
                if step.seconds < 0:
                    raise ReplayError(f"rank {rank} computes for {step.seconds} s")
                self.shares[rank].compute += step.seconds
                return self.at(now + step.seconds, partial(self.proceed, rank))
            if isinstance(step, Issue):
                self.issue(rank, step, now)
            elif self.wait(rank, step, now):
                return None
        self.ends[rank] = now
        return None

    def issue(self, rank: int, step: Issue, now: float) -> None:
        if step.key in self.issued[rank]:
            raise ReplayError(f"rank {rank} issues {step.key} twice")
        if rank not in step.ranks or min(step.ranks) < 0 or max(step.ranks) >= len(self.programs):
            raise ReplayError(f"rank {rank} issues a {step.operation.kind} over ranks {step.ranks}")
        is_message = step.operation.kind in ("send", "recv")
        transfer = self.message(rank, step) if is_message else self.collective(rank, step)
        transfer.members[rank] = step
        self.issued[rank][step.key] = transfer
        if len(transfer.members) == transfer.size:
            self.make_ready(transfer, now)

    def message(self, rank: int, step: Issue) -> _Transfer:
        """The transfer of which this is one end: an end that came earlier waits in `queued`."""
        kind, peer = step.operation.kind, step.operation.peer
        if not 0 <= peer < len(step.ranks):
            raise ReplayError(f"rank {rank} has a {kind} whose peer is unknown; what comes first cannot be replayed")
        other = step.ranks[peer]
        if other == rank:
            return _Transfer(1, is_collective=False)
        ends = (rank, other) if kind == "send" else (other, rank)
        mine, theirs = ((step.axis, *ends, each) for each in ((kind, "recv") if kind == "send" else (kind, "send")))
        if self.queued[theirs]:
            return self.queued[theirs].popleft()
        transfer = _Transfer(2, is_collective=False)
        self.queued[mine].append(transfer)
        return transfer

    def collective(self, rank: int, step: Issue) -> _Transfer:
        """The group's transfer with the number that this is among the rank's own."""
        group = (step.axis, step.ranks)
        number = self.counts[group, rank]
        self.counts[group, rank] += 1
        if number == len(self.collectives[group]):
            self.collectives[group].append(_Transfer(len(step.ranks)))
        transfer = self.collectives[group][number]
        for other, issue in transfer.members.items():
            if issue.operation.kind != step.operation.kind:
                raise ReplayError(
                    f"operation {number} of the {step.axis} group {step.ranks} is {issue.operation.kind} on rank "
                    f"{other} and {step.operation.kind} on rank {rank}"
                )
        return transfer

    def make_ready(self, transfer: _Transfer, now: float) -> None:
        """All members have come: what it takes is known, and it starts if its ports are free."""
        members = [
            Member(rank, issue.ranks.index(rank), issue.ranks, issue.operation)
            for rank, issue in sorted(transfer.members.items())
        ]
        try:
            transfer.ports, transfer.busy, transfer.latency = cost(members, self.links, self.nodes, self.backend)
        except ValueError as error:
            raise ReplayError(str(error)) from None
        transfer.ready = now
        for port in transfer.ports:
            self.ports.queues[port].append(transfer)
        if transfer.ports:
            self.release(transfer.ports, now)
        else:
            self.start(transfer, now)

    def start(self, transfer: _Transfer, now: float) -> None:
        free = now + transfer.busy
        for port in transfer.ports:
            self.ports.queues[port].remove(transfer)
            self.ports.free_at[port] = free
        if transfer.ports:
            self.at(free, partial(self.release, transfer.ports))
        transfer.done = free + transfer.latency
        for rank, since in transfer.waiters:
            self.resume(rank, transfer, since)

    def release(self, ports: tuple[Port, ...], now: float) -> None:
        """Start what can start on these ports."""
        for port in ports:
            while (following := self.ports.startable(port, now)) is not None:
                self.start(following, now)

    def wait(self, rank: int, step: Wait, now: float) -> bool:
        """Whether the rank stops here."""
        transfer = self.issued[rank].get(step.key)
        if transfer is None:
            raise ReplayError(f"rank {rank} waits for {step.key}, which it has not issued")
        if transfer.done is None:
            transfer.waiters.append((rank, now))
            return True
        if transfer.done <= now:
            return False
        self.resume(rank, transfer, now)
        return True

    def resume(self, rank: int, transfer: _Transfer, since: float) -> None:
        """The rank, which is blocked since then, goes on when the transfer is done."""
        assert transfer.done is not None and transfer.ready is not None
        late = min(max(transfer.ready - since, 0.0), transfer.done - since)
        share, axis = self.shares[rank], transfer.members[rank].axis
        share.waiting += late
        share.exposed[axis] = share.exposed.get(axis, 0.0) + transfer.done - since - late
        self.at(transfer.done, partial(self.proceed, rank))

    def check_end(self) -> None:
        """Nothing more can happen: raise if something should have."""
        stuck = [self.describe(rank) for rank, end in enumerate(self.ends) if end is None]
        if stuck:
            raise ReplayError("ranks wait for ever:\n" + "\n".join(stuck))
        for rank, transfers in enumerate(self.issued):
            for transfer in transfers.values():
                if transfer.ready is None:
                    raise ReplayError(f"rank {rank} {self.lack(transfer, rank)}")

    def describe(self, rank: int) -> str:
        step = self.programs[rank].steps[self.places[rank] - 1]
        assert isinstance(step, Wait)
        return f"rank {rank}, step {self.places[rank] - 1}: {self.lack(self.issued[rank][step.key], rank)}"

    def lack(self, transfer: _Transfer, rank: int) -> str:
        """Which operation of the rank lacks whom."""
        issue = transfer.members[rank]
        kind, peer = issue.operation.kind, issue.operation.peer
        if not transfer.is_collective:
            return f"{kind} of {issue.operation.bytes} bytes: rank {issue.ranks[peer]} has no counterpart to it"
        absent = [r for r in issue.ranks if r not in transfer.members]
        return f"{kind} of the {issue.axis} group {issue.ranks}: ranks {absent} do not issue it"
