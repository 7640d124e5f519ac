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
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lsys.parallel.attention.reach import farthest, readers
from lsys.parallel.layout import SequenceLayout
from lsys.parallel.messages import ring as messages
from lsys.parallel.schedule import Schedule, Step, Transfer, crossing
from lsys.parallel.segments import SegmentTable, cut

# Documents are taken together up to about so many segments, whose columns fit a cache.
_CHUNK = 1 << 15


class Pieces(NamedTuple):
    """What ranks send, and how many ranks far each piece travels: int64 [pieces].

    `part` numbers the segment that a piece is of; `begin` is the place in the stream of its first token.
    """

    part: Tensor
    begin: Tensor
    length: Tensor
    hops: Tensor

    def take(self, which: Tensor) -> Pieces:
        """The pieces with these numbers, or where a mask is true."""
        numbers = which.nonzero().flatten() if which.dtype == torch.bool else which
        return Pieces(*(column.index_select(0, numbers) for column in self))

    @property
    def traffic(self) -> int:
        """Tokens received by all ranks together."""
        return int(self.hops @ self.length)


def schedule(
    layout: SequenceLayout, causal: bool = True, window: int | None = None, rounds: int | None = None
) -> Schedule:
    """The ring over the layout's ranks, in the direction with less traffic (upwards if equal)."""
    parts = crossing(layout)
    up, down = _pieces(parts, layout.ranks, causal, window)
    direction, pieces = (1, up) if up.traffic <= down.traffic else (-1, down)
    rounds = rounds or (messages.rounds(layout.ranks, layout.total) if len(pieces.hops) else 1)
    steps: list[Step] = []
    for number in range(rounds):
        local, sent = tuple(layout.table(rank) for rank in range(layout.ranks)), pieces
        if rounds > 1:
            local = tuple(cut(table, *_share(table, number, rounds)) for table in local)
            begin, length = _share(pieces, number, rounds)
            sent = pieces._replace(begin=begin, length=length).take(length > 0)
        around = [*_round(parts, sent, layout.ranks, direction)] or [Step()]
        steps += [around[0]._replace(local=local), *around[1:]]
    if steps[-1].transfers:
        steps.append(Step())
    return Schedule(layout.ranks, tuple(steps))


def _share(table: SegmentTable | Pieces, number: int, rounds: int) -> tuple[Tensor, Tensor]:
    """Begin and length of the part of each segment that belongs to a round."""
    first, last = (table.length * n // rounds for n in (number, number + 1))
    return table.begin + first, last - first


def _round(parts: SegmentTable, pieces: Pieces, ranks: int, direction: int) -> Iterator[Step]:
    """The steps of a round.

    Of what an owner sends, the pieces that go far come first, so that in each step the rest is a prefix: a rank passes
    on the first rows of the block in its hand, without a copy.
    """
    key = parts.rank.index_select(0, pieces.part) * (ranks + 1) + ranks - pieces.hops
    pieces = pieces.take(key.int().argsort(stable=True))
    sent = cut(parts.take(pieces.part), pieces.begin, pieces.length)
    # Of each owner, how many pieces travel one rank far or further, two or further, and so on: [ranks, ranks].
    numbers = torch.bincount(key, minlength=ranks * (ranks + 1)).view(ranks, ranks + 1)[:, :ranks].cumsum(1).flip(1)
    ends, blocks = numbers[:, 0].cumsum(0).tolist(), []
    for end, number in zip(ends, numbers[:, 0].tolist(), strict=True):
        blocks.append(sent.take(slice(end - number, end)))
    for hops, travelling in enumerate(numbers.t().tolist()):
        transfers = [
            Transfer(
                (owner + direction * hops) % ranks, (owner + direction * (hops + 1)) % ranks, blocks[owner], number
            )
            for owner, number in enumerate(travelling)
            if number
        ]
        if transfers:
            yield Step(tuple(transfers))


def _pieces(parts: SegmentTable, ranks: int, causal: bool, window: int | None) -> tuple[Pieces, Pieces]:
    """All tokens that others than their owners need, and how far they travel, upwards and downwards."""
    up: list[Pieces] = []
    down: list[Pieces] = []
    for start, some in _chunks(parts):
        whole = farthest(some.rank, *readers(some, causal, window), ranks)
        cuts = Cuts(*some.begin.new_empty(3, 0)) if window is None else _cuts(some, window, ranks)
        back = cuts._replace(hops=(ranks - cuts.hops).masked_fill(cuts.hops == 0, 0))
        for found, hops, at in ((up, whole[0], cuts), (down, whole[1], back)):
            pieces = _travels(some, hops, at, ranks)
            found.append(pieces._replace(part=pieces.part + start))
    return _joined(up), _joined(down)


def _joined(found: list[Pieces]) -> Pieces:
    return Pieces(*map(torch.cat, zip(*found, strict=True)))


def _chunks(parts: SegmentTable) -> Iterator[tuple[int, SegmentTable]]:
    """Whole documents together, some at a time, and the number of their first part."""
    total = len(parts.begin)
    borders = torch.cat([parts.document.diff().nonzero().flatten() + 1, torch.tensor([total])])
    wanted = torch.arange(_CHUNK, max(total, _CHUNK), _CHUNK)
    edges = borders[torch.searchsorted(borders, wanted)].unique().tolist()
    for start, stop in pairwise([0, *edges, total]):
        yield start, parts.take(slice(start, stop))


class Cuts(NamedTuple):
    """Places inside segments from where on a query needs them: int64 [cuts]. Ascending.

    `part` numbers the segment and `begin` is the place; `hops` is how many ranks above the owner the query's rank is.
    """

    part: Tensor
    begin: Tensor
    hops: Tensor


def _cuts(parts: SegmentTable, window: int, ranks: int) -> Cuts:
    """With a sliding window: where the first query of each part stops seeing another part of its document."""
    edge = parts.begin - window + 1  # the first token that it sees
    part = (torch.searchsorted(parts.begin, edge, right=True) - 1).clamp(min=0)
    inside = (edge > parts.begin[part]) & (edge < parts.end[part]) & (parts.document[part] == parts.document)
    reader = inside.nonzero().flatten()
    part = part[reader]
    return Cuts(part, edge[reader], (parts.rank[reader] - parts.rank[part]) % ranks)


def _travels(parts: SegmentTable, whole: Tensor, cuts: Cuts, ranks: int) -> Pieces:
    """The pieces of the parts, one after the other; `whole` says how many ranks far each part is needed whole.

    A token travels as far as the farthest rank that needs it: what is behind a cut is needed at the cut's rank, too.
    """
    number = torch.arange(len(whole))
    if len(cuts.part) == 0:
        return Pieces(number, parts.begin, parts.length, whole).take(whole > 0)
    is_cut = torch.zeros(len(whole) + len(cuts.part), dtype=torch.bool)
    is_cut[cuts.part + 1 + torch.arange(len(cuts.part))] = True  # behind its part's begin and the cuts before it
    part, begin, hops = (
        torch.empty(len(is_cut), dtype=torch.int64).masked_scatter_(~is_cut, heads).masked_scatter_(is_cut, inside)
        for heads, inside in zip((number, parts.begin, whole), cuts, strict=True)
    )
    hops = (part * ranks + hops).cummax(0).values - part * ranks  # in each part
    rises = torch.ones_like(is_cut)
    rises[1:] = (part.diff() != 0) | (hops.diff() != 0)
    found = Pieces(part, begin, hops, hops).take(rises)
    end = parts.end.index_select(0, found.part)
    end[:-1] = torch.minimum(end[:-1], found.begin[1:])
    return found._replace(length=end - found.begin).take(found.hops > 0)
