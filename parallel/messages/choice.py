"""Which way of softmax attention is estimated to take the least time, beside what the others cost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from lsys.kernels.mask import CAUSAL, Mask
from lsys.parallel.gpus import GPUS
from lsys.parallel.links import NETWORK, NODE, Links
from lsys.parallel.messages.attention import Shape
from lsys.parallel.messages.placement import Phase, Placement
from lsys.parallel.methods import SOFTMAX, Method

# A method is not chosen if some rank computes so much more than the mean because of how heads fall.
MOST_IMBALANCE = 1.25


@dataclass(frozen=True)
class Estimate:
    """One method in the table of `choose`, for a forward and a backward pass of one layer.

    Attributes:
        same_node, across_nodes: bytes received by all ranks together.
        most: bytes received by the rank that receives most.
        steps: phases that follow one another.
        seconds: of communication, none of it hidden.
        chosen: whether this is the method to take.
        note: why it is not, or is the same as another.
    """

    method: str
    same_node: int
    across_nodes: int
    most: int
    steps: int
    seconds: float
    chosen: bool = False
    note: str = ""


def choose(
    place: Placement,
    shape: Shape,
    nodes: Sequence[int],
    links: Links = GPUS["H100"].links,
    mask: Mask = CAUSAL,
) -> tuple[Estimate, ...]:
    """All methods, one of them chosen: the least time of those that keep all ranks busy, in doubt the one named first."""
    rows = []
    for method in SOFTMAX.values():
        forward, backward = method.phases(place, shape, nodes, mask)
        same, across, by_rank = 0, 0, [0] * place.ranks
        for source, destination, size in (message for phase in (*forward, *backward) for message in phase):
            by_rank[destination] += size
            if nodes[source] == nodes[destination]:
                same += size
            else:
                across += size
        taken = sum(seconds(phase, nodes, links) for phase in (*forward, *backward))
        steps, note = len(forward) + len(backward), _note(method, shape, nodes)
        rows.append(Estimate(method.name, same, across, max(by_rank), steps, taken, note=note))
    best = min((row for row in rows if not row.note), key=lambda row: row.seconds)
    return tuple(Estimate(**{**vars(row), "chosen": row is best}) for row in rows)


def seconds(phase: Phase, nodes: Sequence[int], links: Links) -> float:
    """How long a phase takes if nothing else happens: as long as the rank that sends or receives longest."""
    busy: dict[tuple[int, int, bool], int] = defaultdict(int)
    for source, destination, size in phase:
        far = nodes[source] != nodes[destination]
        busy[source, 0, far] += size
        busy[destination, 1, far] += size
    link = {False: links[NODE], True: links[NETWORK]} if any(far for *_, far in busy) else {False: links[NODE]}
    latency = max((link[far].latency for (*_, far), size in busy.items() if size), default=0.0)
    return latency + max((size / link[far].bandwidth for (*_, far), size in busy.items()), default=0.0)


def _note(method: Method, shape: Shape, nodes: Sequence[int]) -> str:
    groups, ranks = method.groups(nodes, shape.heads), len(nodes)
    members = len(groups[0])
    for other in SOFTMAX.values() if ranks > 1 else ():
        if other.name == method.name:
            break
        if other.run == method.run and sorted(other.groups(nodes, shape.heads)) == sorted(groups):
            return f"here the same as {other.name}"
    if -(-shape.heads // members) * members > MOST_IMBALANCE * shape.heads:
        return f"{shape.heads} heads do not keep {members} ranks equally busy"
    return ""
