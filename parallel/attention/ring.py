"""Ring attention: blocks of keys and values pass from rank to rank (Liu et al., 2023).

Each rank's block starts at its owner and moves one rank further in every step, to where the last query stands that
sees any of it: what nobody further on needs is dropped on the way. Of the two directions the one with less traffic is
taken. With a causal zigzag, on the way to lower ranks the late chunk of a rank is needed by lower ranks only: P ranks
of s tokens receive 0.75 (P - 1) s tokens on average, where the other way carries (P - 1) s.

Few ranks have few steps, and so little work to hide transfers behind: with two, all that a rank receives would have to
arrive during its work on its own tokens. There the keys go around in several rounds, a part of each segment in each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lsys.parallel.layout import SegmentTable, SequenceLayout
from lsys.parallel.schedule import Schedule, Step, Transfer, crossing, cut, joined

# Documents are taken together up to so many pairs of a segment and a rank: what a few temporaries of them need.
_CHUNK = 1 << 20
# Rounds times ranks, at most, while a rank sends no fewer tokens than this in a round: short tiles run slowly.
_STEPS, _TOKENS = 8, 2048
_MOST_ROUNDS = 4


class Pieces(NamedTuple):
    """What ranks send, and how many ranks far each part travels: int64 [parts]."""

    parts: SegmentTable
    hops: Tensor


def schedule(
    layout: SequenceLayout, causal: bool = True, window: int | None = None, rounds: int | None = None
) -> Schedule:
    """The ring over the layout's ranks, in the direction with less traffic (upwards if equal)."""
    up, down = (_pieces(layout, causal, window, direction) for direction in (1, -1))
    direction, pieces = (1, up) if _traffic(up) <= _traffic(down) else (-1, down)
    rounds = rounds or (_rounds(layout) if len(pieces.hops) else 1)
    steps: list[Step] = []
    for number in range(rounds):
        local = tuple(_share(layout.table(rank), number, rounds) for rank in range(layout.ranks))
        length = _bounds(pieces.parts, number, rounds)[1]
        moved = Pieces(_share(pieces.parts, number, rounds), pieces.hops[length > 0])
        around = [Step(transfers) for transfers in _round(moved, layout.ranks, direction)] or [Step()]
        steps += [around[0]._replace(local=local), *around[1:]]
    if steps[-1].transfers:
        steps.append(Step())
    return Schedule(layout.ranks, tuple(steps))


def _rounds(layout: SequenceLayout) -> int:
    most = min(_MOST_ROUNDS, _STEPS // layout.ranks, layout.total // layout.ranks // _TOKENS)
    return max(1, most)


def _bounds(table: SegmentTable, number: int, rounds: int) -> tuple[Tensor, Tensor]:
    """Begin and length of the part of each segment that belongs to a round."""
    first, last = (table.length * n // rounds for n in (number, number + 1))
    return table.begin + first, last - first


def _share(table: SegmentTable, number: int, rounds: int) -> SegmentTable:
    return cut(table, *_bounds(table, number, rounds))


def _round(pieces: Pieces, ranks: int, direction: int) -> Iterator[tuple[Transfer, ...]]:
    """The transfers of each step of a round."""
    blocks = [list(sent) for sent in _blocks(pieces, ranks)]  # of each owner, what is sent in each step
    for number in range(max(map(len, blocks))):
        transfers = []
        for owner, sent in enumerate(blocks):
            if number < len(sent):
                source, destination = (owner + direction * hops for hops in (number, number + 1))
                transfers.append(Transfer(source % ranks, destination % ranks, sent[number]))
        yield tuple(transfers)


def _traffic(pieces: Pieces) -> int:
    """Tokens received by all ranks together."""
    return int(pieces.hops @ pieces.parts.length)


def _blocks(pieces: Pieces, ranks: int) -> Iterator[Iterator[SegmentTable]]:
    """For each owner, what remains of its pieces in each step.

    Those that go far come first, so that the rest is a prefix: a rank passes on the first rows of the block in its
    hand, without a copy.
    """
    owner, hops = pieces.parts.rank, pieces.hops
    parts = pieces.parts.take((owner * (ranks + 1) - hops).argsort(stable=True))
    traveling = torch.zeros(ranks, ranks + 1, dtype=torch.int64)  # how many parts of each owner go so far or further
    traveling.view(-1).index_add_(0, owner * (ranks + 1) + hops, torch.ones_like(hops))
    traveling = traveling.flip(1).cumsum(1).flip(1)
    ends = traveling[:, 0].cumsum(0).tolist()
    for end, counts in zip(ends, traveling.tolist(), strict=True):
        yield _prefixes(parts.take(slice(end - counts[0], end)), counts[1:])


def _prefixes(block: SegmentTable, counts: list[int]) -> Iterator[SegmentTable]:
    for number in filter(None, counts):
        block = block if number == len(block.begin) else block.take(slice(number))
        yield block


def _pieces(layout: SequenceLayout, causal: bool, window: int | None, direction: int) -> Pieces:
    """All tokens that others than their owners need, and how far they travel in the direction."""
    found = []
    for parts in _chunks(crossing(layout), layout.ranks):
        if window is None:
            hops = _hops(parts, layout.ranks, direction)
            farthest = (_needing(parts, layout.ranks, causal) * hops).amax(1)
            found.append(Pieces(parts.take(farthest > 0), farthest[farthest > 0]))
        else:
            found.append(_windowed(parts, layout, window, direction))
    return Pieces(joined([piece.parts for piece in found]), torch.cat([piece.hops for piece in found]))


def _chunks(parts: SegmentTable, ranks: int) -> Iterator[SegmentTable]:
    """Whole documents together, some at a time."""
    begins = torch.cat([torch.ones(1, dtype=torch.bool), parts.document.diff() != 0])[: len(parts.begin)]
    borders, start = [*begins.nonzero().flatten().tolist(), len(parts.begin)], 0
    for border, following in zip(borders, [*borders[1:], borders[-1]], strict=True):
        if border > start and (following - start) * ranks > _CHUNK or following == border:
            yield parts.take(slice(start, border))
            start = border


def _hops(parts: SegmentTable, ranks: int, direction: int) -> Tensor:
    """From the owner of each part to each rank: int64 [parts, ranks]."""
    return (torch.arange(ranks) - parts.rank[:, None]) * direction % ranks


def _needing(parts: SegmentTable, ranks: int, causal: bool) -> Tensor:
    """Which ranks have a query that sees the part: bool [parts, ranks]; owners may be among them."""
    documents, document = parts.document.unique_consecutive(return_inverse=True)
    latest = torch.full((len(documents), ranks), -1)  # where the last segment of each rank in the document begins
    latest.view(-1).scatter_reduce_(0, document * ranks + parts.rank, parts.begin, "amax")
    return latest[document] > (parts.begin[:, None] if causal else -1)


def _windowed(parts: SegmentTable, layout: SequenceLayout, window: int, direction: int) -> Pieces:
    """With a sliding window a rank needs the end of a part, from a place on that its next query after it sets."""
    ranks, rows = layout.ranks, torch.arange(len(parts.begin))
    never = torch.iinfo(torch.int64).max
    following = torch.full((len(rows) + 1, ranks), never)  # where the next segment of each rank begins
    following[rows, parts.rank] = parts.begin
    following = following[1:].flip(0).cummin(0).values.flip(0)
    outside = following >= layout.document_offsets[parts.document + 1][:, None]
    needed = (following - window + 1).maximum(parts.begin[:, None]).masked_fill(outside, never)
    needed = needed.minimum(parts.end[:, None])  # [parts, ranks]: from where on; its end if not at all
    by_hops = torch.empty_like(needed).scatter_(1, _hops(parts, ranks, direction), needed)[:, 1:]
    begin = by_hops.flip(1).cummin(1).values.flip(1)  # from where on it is needed so far away or further
    end = torch.cat([begin[:, 1:], parts.end[:, None]], 1)
    part, hops = (begin < end).nonzero().unbind(1)
    return Pieces(cut(parts.take(part), begin[part, hops], (end - begin)[part, hops]), hops + 1)
