"""Which rows of a rank's queries see which rows of a block of keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lsys.kernels.mask import Mask
from lsys.kernels.softmax_attention import FAR, Tiles
from lsys.parallel.layout import SequenceLayout
from lsys.parallel.segments import SegmentTable, offsets
from lsys.parallel.sights import as_seen, by_key, most


class Queries(NamedTuple):
    """Segments of queries in the order of the stream, and where those of each document begin among them, then all end.

    `layout` is what they are of; `bounds` is int64 [documents + 1].
    """

    layout: SequenceLayout
    segments: SegmentTable
    bounds: Tensor

    @classmethod
    def of(cls, layout: SequenceLayout, rank: int) -> Queries:
        """Those of a rank."""
        held = layout.sorted(rank)
        return cls(layout, held, torch.searchsorted(held.document, torch.arange(len(layout.lengths) + 1)))


def _readers(queries: Queries, keys: SegmentTable, mask: Mask) -> tuple[Tensor, Tensor]:
    """By segment of keys (`as_seen`), the range [first, stop) of segments of queries of its document that see some of it.

    int64 [keys] each. A range of no segments may stop before it begins.
    """
    _, segments, bounds = queries
    first, stop = bounds.index_select(0, keys.document), bounds.index_select(0, keys.document + 1)
    reach = mask.reach()
    if reach is not None:  # those that begin no more than this after the keys end
        stop = stop.minimum(torch.searchsorted(segments.begin, keys.end + reach))
    if mask.causal:  # those that end after the keys begin
        first = first.maximum(torch.searchsorted(segments.end, keys.begin, right=True))
    return first, stop


def seen(queries: Queries, keys: SegmentTable, mask: Mask) -> tuple[Tensor, Tensor]:
    """By segment of keys, the places from the first to the last that some query sees: begin, length (0 for none)."""
    segments = queries.segments
    if len(segments.begin) == 0:
        return keys.begin, torch.zeros_like(keys.begin)
    readers, number = as_seen(keys, queries.layout, mask)
    first, stop = _readers(queries, readers, mask)
    begin, end, reach = readers.begin, readers.end, mask.reach()
    if reach is not None:
        begin = begin.maximum(segments.begin[first.clamp(max=len(segments.begin) - 1)] - reach)
    if mask.causal:
        end = end.minimum(segments.end[(stop - 1).clamp(min=0)])
    none = (first >= stop) | (begin >= end)
    # From the segment's end and begin on, where the most of both is of all that see it.
    back, on = ((x.masked_fill(none, 0)) for x in (readers.end - begin, end - readers.begin))
    back, on = (most(x, number, len(keys.begin)) for x in (back, on))
    return keys.end - back, (back + on - keys.length).clamp(min=0)


class Keys(NamedTuple):
    """Segments of keys that a rank has at a time, in the order of their rows, and the row of each's first: int64 [segments]."""

    segments: SegmentTable
    rows: Tensor


@dataclass(frozen=True)
class Pairs:
    """Segments of queries, each beside a segment of keys of which it sees some: one tile for each pair.

    Attributes:
        tiles: of each the whole segment of queries, and what of the keys some of them see.
        queries, keys: the segments.
        query, key: their numbers, by tile.
        skipped: tokens of the segment of keys before the tile's first, by tile.
    """

    tiles: Tiles
    queries: Queries
    keys: SegmentTable
    query: Tensor
    key: Tensor
    skipped: Tensor

    @property
    def query_document(self) -> Tensor:
        """Document of the queries, by tile."""
        return self.queries.segments.document.index_select(0, self.query)

    @property
    def query_start(self) -> Tensor:
        """Position of the first query in its document, by tile."""
        return self.queries.segments.start.index_select(0, self.query)

    @property
    def key_document(self) -> Tensor:
        """Document of the keys, by tile."""
        return self.keys.document.index_select(0, self.key)

    @property
    def key_start(self) -> Tensor:
        """Position of the first key in its document, by tile."""
        return self.keys.start.index_select(0, self.key) + self.skipped


def tiles(queries: Queries, keys: Keys, mask: Mask, select: Callable[[Pairs], Tiles] | None = None) -> Tiles:
    """Tiles of all pairs of a query and a key that it sees.

    Keys that a segment of queries sees whole become one tile with what follows them, if their rows are adjacent.

    Args:
        queries: of this rank; their column `row` says where they are.
        keys: what it has of them.
        mask: what a query sees.
        select: of that, what one call attends to.
    """
    found = _pairs(queries, keys, mask)
    return _joined(found) if select is None else select(found)


def _pairs(queries: Queries, keys: Keys, mask: Mask) -> Pairs:
    """By segment of queries, in the order of the keys."""
    held, number = as_seen(keys.segments, queries.layout, mask)
    first, stop = _readers(queries, held, mask)
    many = (stop - first).clamp(min=0)
    key = torch.arange(len(many)).repeat_interleave(many)
    query = torch.arange(len(key)) + (first - many.cumsum(0) + many).index_select(0, key)
    order = query.int().argsort(stable=True)
    query, key = query.index_select(0, order), key.index_select(0, order)
    segments, rows = queries.segments, by_key(keys.rows, number)
    q_begin, n, q = (column.index_select(0, query) for column in (segments.begin, segments.length, segments.row))
    key_begin, length, row = (column.index_select(0, key) for column in (held.begin, held.length, rows))
    begin, end = key_begin, key_begin + length  # places that some query of the pair sees
    none = torch.full_like(begin, FAR)  # a bound that all pairs of the tile keep is none
    reach = mask.reach()
    if reach is not None:
        begin = begin.maximum(q_begin - reach)
    if mask.causal:
        end = end.minimum(q_begin + n)
    low, high = mask.band(q_begin - begin)
    low = -none if reach is None else (-none).where(begin >= q_begin + n - 1 - reach, low)
    high = none.where(end <= q_begin + 1, high) if mask.causal else none
    found = Tiles(q, n, row + begin - key_begin, end - begin, low, high)
    number = key if number is None else number.index_select(0, key)
    return Pairs(found, queries, keys.segments, query, number, begin - key_begin)


def _joined(pairs: Pairs) -> Tiles:
    """Two tiles of the same queries are one if their keys are adjacent and one band describes both."""
    query, (_, n, k, m, first, last) = pairs.query, pairs.tiles.columns
    starts = torch.ones_like(query, dtype=torch.bool)
    joins = (query[1:] == query[:-1]) & ((k + m)[:-1] == k[1:]) & (last == FAR)[:-1] & (first == -FAR)[1:]
    starts[1:] = ~(joins & (n - 1 + first <= m)[:-1])
    head = starts.nonzero().flatten()
    tail = torch.cat([head[1:], torch.tensor([len(query)])])[: len(head)] - 1
    end, last, moved = (column.index_select(0, tail) for column in (k + m, last, k))
    found = pairs.tiles.take(head)
    last = last.where(last == FAR, last + moved - found.k)
    return Tiles(found.q, found.n, found.k, end - found.k, found.first, last)


def first_rows(table: SegmentTable) -> Tensor:
    """The row of each segment's first token where all tokens stand one after the other: int64 [segments]."""
    return offsets(table.length)[:-1]
