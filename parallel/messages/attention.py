"""What one layer of causal softmax attention sends by each method, and which method is estimated to take the least time.

Ring: a part of a document goes from rank to rank up to the farthest that has a query which sees it; of the two directions the
one with less traffic is taken; what a rank passes on is what the next ones need; the sums of gradients go the same way and,
where a part's way ended, home. See `lsys.parallel.attention.ring`, of which this is the count.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import gcd

from lsys.parallel.links import HARDWARE, NETWORK, NODE, Links
from lsys.parallel.messages.placement import Phase, Phases, Placement, around, pairs_of

METHODS = ("ring", "gather", "ulysses", "usp")

# A method is not chosen if some rank computes so much more than the mean because of how heads fall.
MOST_IMBALANCE = 1.25


@dataclass(frozen=True)
class Shape:
    """Of one layer's attention on one rank (of tensor parallelism): heads, key heads, width and bytes of a number."""

    heads: int
    kv_heads: int
    width: int
    itemsize: int = 2

    @property
    def wide(self) -> int:
        """Bytes of a number of a sum of gradients: fp32, fp64 for fp64."""
        return max(4, self.itemsize)


def phases(
    method: str, place: Placement, shape: Shape, nodes: Sequence[int], window: int | None = None, backend: str = "gloo"
) -> Phases:
    """The messages of one layer; nodes: of each rank; backend: on "nccl" a reduce-scatter goes around the ring."""
    if place.ranks == 1:
        return Phases([], [])
    if method == "gather":
        return _gather(place, shape, window, backend)
    groups = rank_groups(method, place.ranks, shape.heads, nodes)
    split = shares(shape.heads, shape.kv_heads, len(groups[0]))
    forward, backward = _ring(
        place.pooled(groups), groups, [2 * keys * shape.width for _, keys in split], shape, window
    )
    if len(groups[0]) > 1:
        sizes, unit = place.sizes, shape.width * shape.itemsize
        pairs = [(i, j, m, n) for group in groups for m, i in enumerate(group) for n, j in enumerate(group) if i != j]
        every = [queries + 2 * keys for queries, keys in split]
        before = [(i, j, sizes[i] * every[n] * unit) for i, j, m, n in pairs]
        after = [(i, j, sizes[j] * split[m][0] * unit) for i, j, m, n in pairs]
        d_after = [(i, j, sizes[i] * split[n][0] * unit) for i, j, m, n in pairs]
        d_before = [(i, j, sizes[j] * every[m] * unit) for i, j, m, n in pairs]
        forward, backward = [before, *forward, after], [d_after, *backward, d_before]
    return Phases(forward, backward)


def rank_groups(method: str, ranks: int, heads: int, nodes: Sequence[int]) -> list[tuple[int, ...]]:
    """Ranks that exchange heads among them (`lsys.parallel.attention.usp.groups`)."""
    if method == "ulysses":
        return [tuple(range(ranks))]
    if method != "usp":
        return [(rank,) for rank in range(ranks)]
    by_node: dict[int, list[int]] = defaultdict(list)
    for rank, node in enumerate(nodes):
        by_node[node].append(rank)
    common = gcd(*map(len, by_node.values()))
    inner = max(n for n in range(1, common + 1) if common % n == 0 and heads % n == 0)
    return [tuple(held[at : at + inner]) for held in by_node.values() for at in range(0, len(held), inner)]


def shares(heads: int, kv_heads: int, members: int) -> list[tuple[int, int]]:
    """Query heads and key heads of each member of a group (`lsys.parallel.attention.heads.shares`)."""
    group = heads // kv_heads
    base, longer = divmod(heads, members)
    ends = [0, *accumulate(base + (member < longer) for member in range(members))]
    return [(b - a, (b - 1) // group + 1 - a // group if b > a else 0) for a, b in zip(ends, ends[1:], strict=False)]


# ---- the ring


@dataclass(frozen=True)
class _Piece:
    """Tokens that travel so many ranks far from their owner."""

    owner: int
    tokens: int
    hops: int


def _ring(
    place: Placement, groups: Sequence[Sequence[int]], rows: Sequence[int], shape: Shape, window: int | None
) -> tuple[list[Phase], list[Phase]]:
    """rows: numbers of a token's keys and values that each member of a group passes on."""
    pieces, direction = travelling(place, window)
    ranks = place.ranks
    rounds = _rounds(place) if pieces else 1
    blocks, sums = defaultdict[int, Phase](list), defaultdict[int, Phase](list)

    def send(phases: dict[int, Phase], step: int, source: int, destination: int, tokens: int, itemsize: int) -> None:
        for member, numbers in enumerate(rows if tokens else ()):
            ends = groups[source % ranks][member], groups[destination % ranks][member]
            phases[step].append((*ends, tokens * numbers * itemsize))

    step = 0
    for number in range(rounds):
        sent = [
            _Piece(p.owner, p.tokens * (number + 1) // rounds - p.tokens * number // rounds, p.hops) for p in pieces
        ]
        longest = max((piece.hops for piece in sent if piece.tokens), default=0)
        for owner in range(ranks):
            own = [piece for piece in sent if piece.owner == owner]
            far = [sum(piece.tokens for piece in own if piece.hops >= hops) for hops in range(longest + 2)]
            for hops in range(1, longest + 1):  # from the place hops - 1 ranks on to the next
                at, onward = owner + direction * hops, far[hops + 1]
                send(blocks, step + hops - 1, at - direction, at, far[hops], shape.itemsize)
                send(sums, step + hops + 1, at, at + direction, onward, shape.wide)
                send(sums, step + hops + 1, at, owner, far[hops] - onward, shape.wide)
        step += max(longest, 1)
    both = [blocks.get(at, []) + sums.get(at, []) for at in range(step + 3)]
    return [blocks[at] for at in sorted(blocks)], [phase for phase in both if phase]


def _rounds(place: Placement) -> int:
    """As `lsys.parallel.attention.ring`: with few ranks the keys go around in several rounds."""
    return max(1, min(4, 8 // place.ranks, sum(place.lengths) // place.ranks // 2048))


def travelling(place: Placement, window: int | None = None) -> tuple[list[_Piece], int]:
    """What ranks send around the ring, and its direction: 1 upwards."""
    up = [piece for parts in place.documents for piece in _document(parts, place.ranks, window, 1)]
    down = [piece for parts in place.documents for piece in _document(parts, place.ranks, window, -1)]
    if sum(p.tokens * p.hops for p in up) <= sum(p.tokens * p.hops for p in down):
        return up, 1
    return down, -1


def _document(parts: Sequence, ranks: int, window: int | None, direction: int) -> list[_Piece]:
    """The pieces of one document's parts. A query behind a cut in a part needs what follows it, not what is before."""
    begins = [part.begin for part in parts]
    found = []
    cuts: dict[int, list[tuple[int, int]]] = defaultdict(list)
    if window is not None:
        for reader in parts:
            edge = reader.begin - window + 1
            at = max(bisect_right(begins, edge) - 1, 0)
            if parts[at].begin < edge < parts[at].end:
                cuts[at].append((edge, (reader.rank - parts[at].rank) * direction % ranks))
    for number, part in enumerate(parts):
        stop = len(parts) if window is None else min(len(parts), bisect_left(begins, part.begin + window))
        hops = max(((parts[r].rank - part.rank) * direction % ranks for r in range(number + 1, stop)), default=0)
        places = [(part.begin, hops)]
        for edge, needed in cuts[number]:
            if needed > places[-1][1]:
                places.append((edge, needed))
        for (begin, hops), (end, _) in zip(places, [*places[1:], (part.end, 0)], strict=True):
            if hops:
                found.append(_Piece(part.rank, end - begin, hops))
    return found


# ---- the gather


def offered(place: Placement, window: int | None = None) -> list[int]:
    """Tokens of each rank that some other rank needs."""
    sizes = [0] * place.ranks
    for parts in place.documents:
        following = None  # the first query of another rank after a part
        for number in reversed(range(len(parts))):
            part = parts[number]
            if number + 1 < len(parts) and parts[number + 1].rank != part.rank:
                following = parts[number + 1].begin
            if following is not None:
                first = part.begin if window is None else max(part.begin, following - window + 1)
                sizes[part.rank] += max(0, part.end - first)
    return sizes


def is_uneven(sizes: Sequence[int]) -> bool:
    """Whether padding all to the largest adds more than a quarter (`lsys.parallel.comm`)."""
    return len(sizes) * max(sizes) > 1.25 * sum(sizes)


def _gather(place: Placement, shape: Shape, window: int | None, backend: str) -> Phases:
    """Nearly equal parts are padded and go around the ring, others directly. Gloo sums what ranks exchange directly."""
    sizes, ranks = offered(place, window), place.ranks
    if not any(sizes):
        return Phases([], [])
    row, uneven = 2 * shape.kv_heads * shape.width, is_uneven(sizes)
    if uneven:
        forward: list[Phase] = [[(i, j, sizes[i] * row * shape.itemsize) for i, j in pairs_of(ranks)]]
    else:
        forward = around((ranks - 1) * max(sizes) * row * shape.itemsize, ranks)
    if uneven or backend == "gloo":
        home: list[Phase] = [[(i, j, sizes[j] * row * shape.wide) for i, j in pairs_of(ranks)]]
    else:
        home = around((ranks - 1) * max(sizes) * row * shape.wide, ranks)
    return Phases(forward, [*forward, *home])


# ---- the choice


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
    links: Links = HARDWARE["h100"],
    window: int | None = None,
) -> tuple[Estimate, ...]:
    """All methods, one of them chosen: the least time of those that keep all ranks busy, in doubt the one named first."""
    rows = []
    for method in METHODS:
        forward, backward = phases(method, place, shape, nodes, window)
        same, across, by_rank = 0, 0, [0] * place.ranks
        for source, destination, size in (message for phase in (*forward, *backward) for message in phase):
            by_rank[destination] += size
            if nodes[source] == nodes[destination]:
                same += size
            else:
                across += size
        taken = sum(seconds(phase, nodes, links) for phase in (*forward, *backward))
        steps, note = len(forward) + len(backward), _note(method, place.ranks, shape, nodes)
        rows.append(Estimate(method, same, across, max(by_rank), steps, taken, note=note))
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


def _note(method: str, ranks: int, shape: Shape, nodes: Sequence[int]) -> str:
    members = 1 if method == "gather" else len(rank_groups(method, ranks, shape.heads, nodes)[0])
    if method == "usp" and members in (1, ranks):
        return f"here the same as {'ring' if members == 1 else 'ulysses'}"
    if -(-shape.heads // members) * members > MOST_IMBALANCE * shape.heads:
        return f"{shape.heads} heads do not keep {members} ranks equally busy"
    return ""
