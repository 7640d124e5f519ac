"""What one transfer takes: the alpha-beta costs of the ring and pairwise algorithms, from what they move.

With latency a and bandwidth b of the link, P ranks and n as in `lsys.parallel.traffic`:

| operation | seconds, all links alike |
|---|---|
| send and recv | a + n / b |
| all_gather | (P - 1) a + (P - 1) n / b |
| reduce_scatter | (P - 1) a + (P - 1) n / (P b) |
| all_reduce | 2 (P - 1) a + 2 (P - 1) n / (P b) |
| all_to_all | (P - 1) a + (what the busiest rank sends or receives) / b |
| broadcast, reduce | (P - 1) a + n / b; gloo's tree: ceil(log2 P) (a + n / b) |
| gather, scatter | (P - 1) (a + n / b) |
| barrier | ceil(log2 P) a |

Sources: Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in MPICH" (2005), for
rings, pairwise exchange, trees and dissemination; Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms" (2009).
On links that are not alike, the bytes take what the slowest port takes, and a message around a ring the sum of the
latencies of all hops but the quickest. Arithmetic of reductions is not counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from lsys.parallel.ledger import NETWORK, NODE, Operation, traffic
from lsys.parallel.links import Links
from lsys.parallel.traffic import RINGS

Port = tuple[int, str, str]  # rank, link class, "out" or "in"


class Member(NamedTuple):
    """One rank of a transfer: its number, its place in the group, the group's ranks, what it issued."""

    rank: int
    place: int
    ranks: tuple[int, ...]
    operation: Operation


class Cost(NamedTuple):
    """The ports that are taken, for how long, and how much later the last byte is there; s."""

    ports: tuple[Port, ...]
    busy: float
    latency: float


def cost(members: Sequence[Member], links: Links, nodes: Sequence[int], backend: str) -> Cost:
    """The cost of what all members, in order of rank, do together; nodes: of each rank.

    Raises:
        ValueError: the members' sizes or roots do not fit together.
    """
    _check(members)
    loads: Counter[Port] = Counter()
    latencies = [0.0]
    for member in members:
        moved = traffic(member.operation, member.place, len(member.ranks), backend)
        for direction, by_peer in (("out", moved.sent), ("in", moved.received)):
            classes = {peer: _link(member.rank, member.ranks[peer], nodes) for peer in by_peer}
            for peer, n in by_peer.items():
                loads[member.rank, classes[peer], direction] += n
            latencies.append(sum(links[link].latency for link in classes.values()))
    busy = max((n / links[link].bandwidth for (_, link, _), n in loads.items()), default=0.0)
    kind = members[0].operation.kind
    if kind in RINGS or (backend != "gloo" and kind in ("broadcast", "reduce")):
        latency = _around(members[0].ranks, links, nodes) * (2 if kind == "all_reduce" else 1)
    else:
        latency = max(latencies)
    return Cost(tuple(port for port, n in loads.items() if n), busy, latency)


def _link(rank: int, other: int, nodes: Sequence[int]) -> str:
    return NODE if nodes[rank] == nodes[other] else NETWORK


def _around(ranks: tuple[int, ...], links: Links, nodes: Sequence[int]) -> float:
    """Latency of a message that passes all ranks of a ring, from the start that takes longest."""
    if len(ranks) == 1:
        return 0.0
    hops = [links[_link(rank, ranks[at - 1], nodes)].latency for at, rank in enumerate(ranks)]
    return sum(hops) - min(hops)


def _check(members: Sequence[Member]) -> None:
    first = members[0]
    kind = first.operation.kind
    if kind == "all_to_all":
        for member in members:
            for other in members:
                sent, expected = member.operation.send[other.place], other.operation.receive[member.place]
                if sent != expected:
                    what = f"rank {member.rank} sends rank {other.rank} {sent} bytes, which expects {expected}"
                    raise ValueError(f"all_to_all of the ranks {first.ranks}: {what}")
        return
    for other in members[1:]:
        if other.operation.bytes != first.operation.bytes:
            what = f"{first.operation.bytes} bytes on rank {first.rank}, {other.operation.bytes} on rank {other.rank}"
            raise ValueError(f"{kind} of the ranks {first.ranks}: {what}")
        if kind in ("broadcast", "reduce", "gather", "scatter") and other.operation.peer != first.operation.peer:
            what = f"the root is {first.operation.peer} on rank {first.rank}, {other.operation.peer} on {other.rank}"
            raise ValueError(f"{kind} of the ranks {first.ranks}: {what}")
