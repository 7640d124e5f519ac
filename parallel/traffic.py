"""What each operation of a process group moves, by rank and peer: a function of the operation alone. Needs no torch.

P ranks; n is the operation's `bytes`. What a rank sends, which is what its peers receive:

| operation | n | gloo (CPU tensors) | ring (NCCL, and all others) |
|---|---|---|---|
| all_gather | own part | (P - 1) n to the next rank | the same |
| reduce_scatter | whole input | 2 (P - 1) n / P to the next: it reduces everything to everyone | (P - 1) n / P to the next |
| all_reduce | tensor | 2 (P - 1) n / P to the next | the same |
| all_to_all | | the part for each peer, to that peer; empty parts and its own do not travel | the same |
| broadcast | tensor | n to each child in a binomial tree: ceil(log2 P) of them at the root | n to the next, but for the last |
| reduce | tensor | (P - 1) n / P to the next, then n / P to the root | n to the next, but for the root |
| gather | own part | n to the root | the same |
| scatter | one part | at the root, n to each other rank | the same |
| send, recv | tensor | n to or from the peer | the same |
| barrier | 0 | nothing, to ceil(log2 P) peers | the same |

Several tensors in one call (coalesced operations) count as one of their total. Headers, acknowledgements and the bytes
with which connections are set up do not count. Gloo's column is what network interfaces counted, to 1%, but for one
case: its reduce moves up to n / P more with tensors of many MiB. Where NCCL chooses a tree or reduces in the switch
(NVLS, SHARP), its all-reduce differs from the ring's figure.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

NODE, NETWORK = "node", "network"  # link classes: between ranks of one node, between ranks of different nodes
RINGS = ("all_gather", "reduce_scatter", "all_reduce")
ANY = -1  # the peer of a receive that takes what comes first


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation of a process group, as one rank issues it.

    Attributes:
        kind: the name in the table above.
        bytes: n of the table.
        peer: group rank of the peer or the root; ANY for a receive from any rank.
        send, receive: of an all_to_all, bytes for and from each group rank.
    """

    kind: str
    bytes: int = 0
    peer: int = ANY
    send: tuple[int, ...] = ()
    receive: tuple[int, ...] = ()


class Traffic(NamedTuple):
    """Bytes sent to and received from each peer, a group rank. Peers with 0 bytes take part in a handshake only."""

    sent: dict[int, int]
    received: dict[int, int]


@lru_cache(maxsize=4096)
def traffic(operation: Operation, rank: int, ranks: int, backend: str) -> Traffic:
    """What group rank `rank` of `ranks` moves; `backend` is "gloo", or anything else for rings. Do not change it.

    Raises:
        ValueError: the kind of operation is not in the table.
    """
    kind, n, peer = operation.kind, operation.bytes, operation.peer
    if kind == "send":
        return Traffic({peer: n} if peer != rank else {}, {})
    if kind == "recv":
        return Traffic({}, {peer: n} if peer != rank else {})
    if ranks == 1:
        return Traffic({}, {})
    gloo = backend == "gloo"
    if kind in RINGS:
        passes = 2 if kind == "all_reduce" or (gloo and kind == "reduce_scatter") else 1
        moved = (ranks - 1) * n if kind == "all_gather" else passes * (ranks - 1) * n // ranks
        return Traffic({(rank + 1) % ranks: moved}, {(rank - 1) % ranks: moved})
    if kind == "all_to_all":
        return Traffic(_others(operation.send, rank), _others(operation.receive, rank))
    if kind in ("gather", "scatter"):
        at_root = dict.fromkeys((r for r in range(ranks) if r != peer), n)
        at_leaf = {peer: n}
        if rank == peer:
            return Traffic({}, at_root) if kind == "gather" else Traffic(at_root, {})
        return Traffic(at_leaf, {}) if kind == "gather" else Traffic({}, at_leaf)
    if kind == "broadcast":
        return _tree(rank, ranks, peer, n) if gloo else _chain(rank, ranks, peer, n)
    if kind == "reduce":
        return _reduce(rank, ranks, peer, n) if gloo else _chain(rank, ranks, (peer + 1) % ranks, n)
    if kind == "barrier":
        steps = [1 << step for step in range((ranks - 1).bit_length())]
        return Traffic({(rank + s) % ranks: 0 for s in steps}, {(rank - s) % ranks: 0 for s in steps})
    raise ValueError(f"{kind!r} is no operation of a process group that is known here")


def _others(parts: tuple[int, ...], rank: int) -> dict[int, int]:
    return {peer: n for peer, n in enumerate(parts) if n and peer != rank}


def _chain(rank: int, ranks: int, first: int, n: int) -> Traffic:
    """Around the ring from `first` to the rank before it."""
    sent = {(rank + 1) % ranks: n} if (rank + 1) % ranks != first else {}
    return Traffic(sent, {(rank - 1) % ranks: n} if rank != first else {})


def _tree(rank: int, ranks: int, root: int, n: int) -> Traffic:
    """A binomial tree: in round i, the 2**i ranks that have it, counted from the root, send it 2**i ranks further."""
    place = (rank - root) % ranks
    joined = place.bit_length()  # the first round in which it has something to send
    rounds = range(joined, (ranks - 1).bit_length())
    sent = {(rank + (1 << i)) % ranks: n for i in rounds if place + (1 << i) < ranks}
    return Traffic(sent, {(rank - (1 << (joined - 1))) % ranks: n} if place else {})


def _reduce(rank: int, ranks: int, root: int, n: int) -> Traffic:
    """A reduce-scatter around the ring, then each rank's part to the root."""
    ring, part = (ranks - 1) * n // ranks, n // ranks
    sent, received = {(rank + 1) % ranks: ring}, {(rank - 1) % ranks: ring}
    if rank != root:
        sent[root] = sent.get(root, 0) + part
    else:
        for other in range(ranks):
            if other != root:
                received[other] = received.get(other, 0) + part
    return Traffic(sent, received)
