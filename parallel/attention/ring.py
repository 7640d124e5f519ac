"""Ring attention: blocks of keys and values pass from rank to rank (Liu et al., 2023).

In ten lines, forward, where rank r of several holds the tokens r n to (r + 1) n of one causal document, q, k, v [n, H, D]:

    o, lse = empty_result(q)
    block, whole = torch.stack((k, v), 1), slice(0, n)
    for step in range(ranks):
        owner, following = (rank - step) % ranks, torch.empty_like(block)  # whose block is in hand, and the next one
        under_way = comm.exchange({(rank + 1) % ranks: block}, {(rank - 1) % ranks: following})
        if owner <= rank:  # what is of higher ranks is not seen; of the own block what is not ahead
            tile = Tile(whole, whole, last=0 if owner == rank else None)
            attend(q, *block.unbind(1), [tile], o, lse, scale=q.shape[-1] ** -0.5)
        under_way.wait()
        block = following

What follows makes a schedule, which the executor runs, of the same for documents of any length, anywhere, and any mask.

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

from lsys.kernels.mask import CAUSAL, Mask
from lsys.parallel.attention.ring_distance import farthest, readers
from lsys.parallel.layout import SequenceLayout
from lsys.parallel.messages import ring as messages
from lsys.parallel.schedule import Schedule, Step, Transfer, crossing
from lsys.parallel.segments import SegmentTable, cut, runs
from lsys.parallel.sights import as_seen, most, sights

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


def schedule(layout: SequenceLayout, mask: Mask = CAUSAL, rounds: int | None = None) -> Schedule:
    """The ring over the layout's ranks, in the direction with less traffic (upwards if equal)."""
    parts = crossing(layout, mask)
    up, down = _pieces(parts, layout, mask)
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


def _pieces(parts: SegmentTable, layout: SequenceLayout, mask: Mask) -> tuple[Pieces, Pieces]:
    """All tokens that others than their owners need, and how far they travel, upwards and downwards."""
    up: list[Pieces] = []
    down: list[Pieces] = []
    reach, ranks = mask.reach(), layout.ranks
    for start, some in _chunks(parts, layout, mask):
        keys, number = as_seen(some, layout, mask)
        first, stop = readers(some, keys, mask, len(layout.lengths))
        cuts = Cuts(*some.begin.new_empty(3, 0))
        if reach is not None:
            cuts = _cuts(some, keys, number, (first, stop), reach, ranks)
            last = keys.begin + reach  # where the first query of a part may stand that sees all of the key
            stop = stop.minimum(torch.searchsorted(some.begin, last, right=True))
        hops = farthest(some.rank, first, stop, ranks, number)
        whole = [most(far, number, len(some.rank)) for far in hops]
        back = cuts._replace(hops=(ranks - cuts.hops).masked_fill(cuts.hops == 0, 0))
        for found, needed, at in ((up, whole[0], cuts), (down, whole[1], back)):
            pieces = _travels(some, needed, at, ranks)
            found.append(pieces._replace(part=pieces.part + start))
    return _joined(up), _joined(down)


def _joined(found: list[Pieces]) -> Pieces:
    return Pieces(*map(torch.cat, zip(*found, strict=True)))


def _chunks(parts: SegmentTable, layout: SequenceLayout, mask: Mask) -> Iterator[tuple[int, SegmentTable]]:
    """Whole documents together with those that see them, some at a time, and the number of their first part."""
    total, found = len(parts.begin), sights(layout, mask)
    last = torch.arange(len(layout.lengths)).scatter_reduce(0, found.document, found.reader, "amax").cummax(0).values
    ends = (parts.document.diff() != 0) & (last[parts.document[:-1]] < parts.document[1:])
    borders = torch.cat([ends.nonzero().flatten() + 1, torch.tensor([total])])
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


def _cuts(
    parts: SegmentTable,
    keys: SegmentTable,
    number: Tensor | None,
    ranges: tuple[Tensor, Tensor],
    reach: int,
    ranks: int,
) -> Cuts:
    """With a sliding window: where the first query of each part stops seeing another part.

    Args:
        parts: whole documents.
        keys, number: these, `as_seen`.
        ranges: of each key the parts [first, stop) that may see it.
        reach: of the mask.
        ranks: how many there are.
    """
    # The first token that reader i sees, parts.begin[i] - reach, is inside the key.
    first = torch.searchsorted(parts.begin, keys.begin + reach, right=True).maximum(ranges[0])
    stop = torch.searchsorted(parts.begin, keys.end + reach).minimum(ranges[1])
    many = (stop - first).clamp(min=0)
    key = torch.arange(len(many)).repeat_interleave(many)
    reader, part = runs(first, many), key if number is None else number[key]
    begin = parts.begin[reader] - reach - keys.begin[key] + parts.begin[part]
    if number is not None:  # a part may be cut for several documents
        order = begin.argsort(stable=True)  # as that of the parts is
        part, begin, reader = part[order], begin[order], reader[order]
    return Cuts(part, begin, (parts.rank[reader] - parts.rank[part]) % ranks)


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
    found = found._replace(length=end - found.begin)
    return found.take((found.hops > 0) & (found.length > 0))
