"""Which rows of a rank's queries see which rows of a block of keys."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lsys.kernels.softmax_attention import FAR, Tiles
from lsys.parallel.layout import SequenceLayout
from lsys.parallel.segments import SegmentTable, offsets


class Mask(NamedTuple):
    """Which positions of its document a query sees, as for `softmax_attention`."""

    causal: bool
    window: int | None


class Queries(NamedTuple):
    """Segments of queries in the order of the stream, and where those of each document begin among them, then all end.

    `bounds` is int64 [documents + 1].
    """

    segments: SegmentTable
    bounds: Tensor

    @classmethod
    def of(cls, layout: SequenceLayout, rank: int) -> Queries:
        """Those of a rank."""
        held = layout.sorted(rank)
        return cls(held, torch.searchsorted(held.document, torch.arange(len(layout.lengths) + 1)))


def _readers(queries: Queries, keys: SegmentTable, mask: Mask) -> tuple[Tensor, Tensor]:
    """By segment of keys, the range [first, stop) of segments of queries that see some of it: int64 [keys] each.

    A range of no segments may stop before it begins.
    """
    segments, bounds = queries
    stop = bounds.index_select(0, keys.document + 1)
    if not mask.causal:
        return bounds.index_select(0, keys.document), stop
    if mask.window is not None:  # those that begin less than a window after the keys end
        stop = stop.minimum(torch.searchsorted(segments.begin, keys.end + mask.window - 1))
    return torch.searchsorted(segments.end, keys.begin, right=True), stop  # those that end after the keys begin


def seen(queries: Queries, keys: SegmentTable, mask: Mask) -> tuple[Tensor, Tensor]:
    """By segment of keys, the places from the first to the last that some query sees: begin, length (0 for none)."""
    begin, end, segments = keys.begin, keys.end, queries.segments
    if len(segments.begin) == 0:
        return begin, torch.zeros_like(begin)
    first, stop = _readers(queries, keys, mask)
    if mask.window is not None:
        begin = begin.maximum(segments.begin[first.clamp(max=len(segments.begin) - 1)] - mask.window + 1)
    if mask.causal:
        end = end.minimum(segments.end[(stop - 1).clamp(min=0)])
    return begin, (end - begin).clamp(min=0).masked_fill(first >= stop, 0)


def tiles(queries: Queries, keys: SegmentTable, rows: Tensor, mask: Mask) -> Tiles:
    """Tiles of all pairs of a query and a key that it sees.

    Keys that a segment of queries sees whole become one tile with what follows them, if their rows are adjacent.

    Args:
        queries: of this rank; their column `row` says where they are.
        keys: in the order of their rows.
        rows: of the first token of each segment of keys, int64 [segments].
        mask: what a query sees.
    """
    first, stop = _readers(queries, keys, mask)
    many = (stop - first).clamp(min=0)
    key = torch.arange(len(many)).repeat_interleave(many)
    query = torch.arange(len(key)) + (first - many.cumsum(0) + many).index_select(0, key)
    order = query.int().argsort(stable=True)
    query, key = query.index_select(0, order), key.index_select(0, order)
    segments = queries.segments
    q_begin, n, q = (column.index_select(0, query) for column in (segments.begin, segments.length, segments.row))
    key_begin, length, row = (column.index_select(0, key) for column in (keys.begin, keys.length, rows))
    begin, end = key_begin, key_begin + length  # places that some query of the pair sees
    none = torch.full_like(begin, FAR)  # a bound that all pairs of the tile keep is none
    first, last = -none, none
    if mask.window is not None:
        begin = begin.maximum(q_begin - mask.window + 1)
        first = first.where(begin >= q_begin + n - mask.window, q_begin - mask.window + 1 - begin)
    if mask.causal:
        end = end.minimum(q_begin + n)
        last = last.where(end <= q_begin + 1, q_begin - begin)
    k, m = row + begin - key_begin, end - begin
    # Two tiles of the same queries are one if their keys are adjacent and one band describes both.
    starts = torch.ones_like(query, dtype=torch.bool)
    joins = (query[1:] == query[:-1]) & ((k + m)[:-1] == k[1:]) & (last == none)[:-1] & (first == -none)[1:]
    starts[1:] = ~(joins & (n - 1 + first <= m)[:-1])
    head = starts.nonzero().flatten()
    tail = torch.cat([head[1:], torch.tensor([len(query)])])[: len(head)] - 1
    end, last, moved = (column.index_select(0, tail) for column in (k + m, last, k))
    found = Tiles(q, n, k, m, first, first).take(head)
    last = last.where(last == FAR, last + moved - found.k)
    return Tiles(found.q, found.n, found.k, end - found.k, found.first, last)


def first_rows(table: SegmentTable) -> Tensor:
    """The row of each segment's first token where all tokens stand one after the other: int64 [segments]."""
    return offsets(table.length)[:-1]
