"""The time of transfers: a latency for each step of an algorithm, and what the busiest port moves over its bandwidth.

As `lsys.parallel.replay.cost` has it, with what an operation takes its issuer; and, on GPUs, as NCCL does it: a collective leaves a node
through the ports of all its ranks there, one ring for each, and sums go through a tree where that has fewer steps (NCCL 2.21,
src/graph/tuning.cc: per node a chain, between nodes log2).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from lsys.parallel.links import NETWORK, NODE
from lsys.parallel.messages import Phase
from lsys.parallel.traffic import Operation, traffic
from lsys.predict.deployment import Deployment
from lsys.predict.hardware import Hardware
from lsys.predict.traffic import Issued

ROUND = ("all_gather", "reduce_scatter", "all_reduce", "broadcast")  # go around all ranks, so some port crosses nodes


class Transfers:
    """Seconds of transfers between the ranks of a configuration, on hardware whose links are known."""

    def __init__(self, deployment: Deployment, hardware: Hardware) -> None:
        self.deployment, self.hardware, self.links = deployment, hardware, hardware.links

    def operation(self, issued: Issued, rank: int) -> float:
        """Seconds of one operation."""
        if len(issued.ranks) == 1:
            return self.hardware.call
        sizes = self._sizes(issued, rank)
        ports = (
            self._ports([self.deployment.nodes[each] for each in issued.ranks]) if issued.operation.kind in ROUND else 1
        )
        busy = max(self._busy(size, link, ports) for link, size in sizes.items() if link in self.links)
        return self.hardware.call + self._latency(issued) + busy

    def operations(self, found: Iterable[Issued], rank: int) -> float:
        """Seconds of all of them, one after the other."""
        return sum(issued.times * self.operation(issued, rank) for issued in found if issued.times)

    def phase(self, phase: Phase, is_collective: bool = False) -> float:
        """Seconds of context messages that are under way together: the busiest rank's."""
        nodes, links = self.deployment.context_nodes, self.links
        busy: dict[tuple[int, int, str], int] = {}
        peers: dict[int, set[int]] = {}
        for source, destination, size in phase:
            link = NODE if nodes[source] == nodes[destination] else NETWORK
            for end, way in ((source, 0), (destination, 1)):
                busy[end, way, link] = busy.get((end, way, link), 0) + size
            peers.setdefault(source, set()).add(destination)
        latency = max((links[link].latency for *_, link in busy), default=0.0)
        calls = max(map(len, peers.values()), default=0) * self.hardware.call
        ports = self._ports(nodes) if is_collective else 1
        return latency + calls + max((self._busy(size, link, ports) for (*_, link), size in busy.items()), default=0.0)

    def _ports(self, nodes: Sequence[int]) -> int:
        """Through how many a collective of ranks on these nodes leaves each: NCCL's, all its ranks' there; gloo's, one."""
        return min(Counter(nodes).values()) if self.deployment.backend == "nccl" else 1

    def _busy(self, size: float, link: str, ports: int) -> float:
        """Seconds of so many bytes; what goes out by several ports crosses the node to get there."""
        if link == NODE or ports == 1:
            return size / self.links[link].bandwidth
        return max(size / ports / self.links[link].bandwidth, size / self.links[NODE].bandwidth)

    def _nodes(self, issued: Issued) -> int:
        """How many an operation reaches."""
        return len({self.deployment.nodes[rank] for rank in issued.ranks})

    def _sizes(self, issued: Issued, rank: int) -> dict[str, int]:
        """Bytes that the busiest port of each link class moves."""
        operation, ranks, nodes = issued.operation, issued.ranks, self.deployment.nodes
        moved = traffic(operation, ranks.index(rank), len(ranks), self.deployment.backend)
        if self._nodes(issued) > 1 and operation.kind in ROUND:
            least = operation.bytes if operation.kind == "broadcast" else 0
            return {NODE: 0, NETWORK: max(sum(moved.sent.values()), least)}
        sizes = {NODE: 0, NETWORK: 0}
        for peer, size in moved.sent.items():
            sizes[NODE if nodes[ranks[peer]] == nodes[rank] else NETWORK] += size
        return sizes

    def _latency(self, issued: Issued) -> float:
        """Latency of all steps, s: around a ring, two of every node's go over the network."""
        others, far = len(issued.ranks) - 1, self._nodes(issued) - 1
        special = {"all_reduce": 2 * others, "broadcast": others.bit_length(), "send": 1, "recv": 0}
        steps = special.get(issued.operation.kind, others)
        outside = min(steps, 2 * far)
        ring = self._steps(steps - outside, outside)
        if self.deployment.backend != "nccl" or issued.operation.kind != "all_reduce":
            return ring
        return min(ring, self._steps(2 * (-(-(others + 1) // (far + 1)) - 1), 2 * far.bit_length()))

    def _steps(self, inside: int, outside: int) -> float:
        """Seconds of so many steps inside nodes and between them."""
        near = inside * self.links[NODE].latency if NODE in self.links else 0.0
        return near + (outside * self.links[NETWORK].latency if outside else 0.0)


def once(axis: str, ranks: Iterable[int], operation: Operation) -> Issued:
    """An operation by itself."""
    return Issued(axis, tuple(ranks), operation, 1)
