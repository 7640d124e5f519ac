"""Links between ranks, measured: latency and bandwidth of messages between two of them."""

import statistics
import time

import torch
import torch.distributed as dist

from lsys.parallel.comm import SequenceComm
from lsys.parallel.links import NETWORK, NODE, Link

LARGE = 2**20  # fp32 elements of a long message


def measured_links(comm: SequenceComm) -> dict[str, Link]:
    """The links from rank 0 to its first peer of each class. All ranks call it together."""
    peers: dict[str, int] = {}
    for rank in range(1, comm.size):
        peers.setdefault(NODE if comm.node_of_rank[rank] == comm.node_of_rank[0] else NETWORK, rank)
    return {name: measured_link(comm, peer) for name, peer in peers.items()}


def measured_link(comm: SequenceComm, peer: int, *, both_ways: bool = True) -> Link:
    """The link between rank 0 and a peer, when both send at the same time or rank 0 alone. All ranks call it together.

    Gloo sends and receives on one thread: two long messages at once get less than twice what one gets of the link.
    """
    dist.barrier(comm.group)
    small, large = (_seconds(comm, peer, *size, both_ways) for size in ((1, 200), (LARGE, 9)))
    slower = torch.tensor([small, large - small], dtype=torch.float64)
    dist.all_reduce(slower, dist.ReduceOp.MAX, comm.group)
    latency, transfer = slower.tolist()
    return Link(latency, 4 * LARGE / max(transfer, 1e-9))


def _seconds(comm: SequenceComm, peer: int, numel: int, repeats: int, both_ways: bool) -> float:
    """Median time of a message; 0 on ranks that have no part."""
    if comm.rank not in (0, peer):
        return 0.0
    other, times = (peer if comm.rank == 0 else 0), []
    ready, message = torch.ones(2, 1), torch.ones(2, numel)  # each: to send, to receive into
    send = {other: message[0]} if both_ways or comm.rank == 0 else {}
    receive = {other: message[1]} if both_ways or comm.rank == peer else {}
    for _ in range(repeats):
        comm.exchange({other: ready[0]}, {other: ready[1]}).wait()
        began = time.perf_counter()
        comm.exchange(send, receive).wait()
        times.append(time.perf_counter() - began)
    return statistics.median(times)
