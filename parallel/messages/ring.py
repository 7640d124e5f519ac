"""What a ring sends between groups of ranks: the count of `lsys.parallel.attention.ring`.

A part of a document goes from rank to rank up to the farthest that has a query which sees it; of the two directions the
one with less traffic is taken; what a rank passes on is what the next ones need; the sums of gradients go the same way and,
where a part's way ended, home.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from lsys.kernels.mask import Mask
from lsys.parallel.messages.attention import Shape
from lsys.parallel.messages.heads import Groups
from lsys.parallel.messages.placement import Phase, Phases, Placement, Seen

# Rounds times ranks, at most, while a rank sends no fewer tokens than this in a round: short tiles run slowly.
_STEPS, _TOKENS = 8, 2048
_MOST_ROUNDS = 4


def rounds(ranks: int, tokens: int) -> int:
    """In how many rounds the keys of so many tokens go around, if any do: with few ranks in several."""
    return max(1, min(_MOST_ROUNDS, _STEPS // ranks, tokens // ranks // _TOKENS))


@dataclass(frozen=True)
class _Piece:
    """Tokens that travel so many ranks far from their owner."""

    owner: int
    tokens: int
    hops: int


def between(place: Placement, groups: Groups, rows: Sequence[int], shape: Shape, mask: Mask, backend: str) -> Phases:
    """The messages; rows: elements of a token's keys and values that each member of a group passes on."""
    pieces, direction = travelling(place, mask)
    ranks = place.ranks
    turns = rounds(ranks, sum(place.lengths)) if pieces else 1
    blocks, sums = defaultdict[int, Phase](list), defaultdict[int, Phase](list)

    def send(phases: dict[int, Phase], step: int, source: int, destination: int, tokens: int, itemsize: int) -> None:
        for member, numbers in enumerate(rows if tokens else ()):
            ends = groups[source % ranks][member], groups[destination % ranks][member]
            phases[step].append((*ends, tokens * numbers * itemsize))

    step = 0
    for number in range(turns):
        sent = [_Piece(p.owner, p.tokens * (number + 1) // turns - p.tokens * number // turns, p.hops) for p in pieces]
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
    return Phases([blocks[at] for at in sorted(blocks)], [phase for phase in both if phase])


def travelling(place: Placement, mask: Mask) -> tuple[list[_Piece], int]:
    """What ranks send around the ring, and its direction: 1 upwards."""
    crossing = place.crossing(mask)
    up = [piece for seen in crossing for piece in _document(seen, place.ranks, mask, 1)]
    down = [piece for seen in crossing for piece in _document(seen, place.ranks, mask, -1)]
    if sum(p.tokens * p.hops for p in up) <= sum(p.tokens * p.hops for p in down):
        return up, 1
    return down, -1


def _document(seen: Seen, ranks: int, mask: Mask, direction: int) -> list[_Piece]:
    """The pieces of one document's parts. A query behind a cut in a part needs what follows it, not what is before."""
    parts, reach = seen.parts, mask.reach()
    begins = [part.begin for part in parts]
    whole = [0] * len(parts)  # how far each part is needed from its first token on
    cuts: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for readers in seen.readers:
        starts = [reader.begin for reader in readers]
        for number, part in enumerate(parts):
            first = bisect_right(starts, part.begin) if mask.causal else 0
            stop = len(readers) if reach is None else bisect_right(starts, part.begin + reach)
            hops = max(((reader.rank - part.rank) * direction % ranks for reader in readers[first:stop]), default=0)
            whole[number] = max(whole[number], hops)
        for reader in readers if reach is not None else ():
            edge = reader.begin - (reach or 0)
            at = max(bisect_right(begins, edge) - 1, 0)
            if at < len(parts) and parts[at].begin < edge < parts[at].end:
                cuts[at].append((edge, (reader.rank - parts[at].rank) * direction % ranks))
    found = []
    for number, part in enumerate(parts):
        places = [(part.begin, whole[number])]
        for edge, needed in sorted(cuts[number]):
            if needed > places[-1][1]:
                places.append((edge, needed))
        for (begin, hops), (end, _) in zip(places, [*places[1:], (part.end, 0)], strict=True):
            if hops:
                found.append(_Piece(part.rank, end - begin, hops))
    return found
