"""Which rows of a rank's queries see which rows of a block of keys."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lsys.kernels.softmax_attention import Tile
from lsys.parallel.layout import SegmentTable, offsets, runs

_NONE = torch.iinfo(torch.int64).min  # no bound of a band


class Mask(NamedTuple):
    """Which positions of its document a query sees, as for `softmax_attention`."""

    causal: bool
    window: int | None


class Pairs(NamedTuple):
    """Segments of queries and segments of keys of which some query sees some key: numbers of both, int64 [pairs].

    `begin` to `end` are places in the stream: of the keys from the first that the first query sees to the last that the
    last query sees.
    """

    query: Tensor
    key: Tensor
    begin: Tensor
    end: Tensor


def pairs(queries: SegmentTable, keys: SegmentTable, mask: Mask) -> Pairs:
    """All pairs, key by key; the queries in the order of the stream."""
    first = torch.searchsorted(queries.document, keys.document)
    stop = torch.searchsorted(queries.document, keys.document, right=True)
    if mask.causal:  # those that end after the keys begin
        first = first.maximum(torch.searchsorted(queries.end, keys.begin, right=True))
    if mask.window is not None:  # those that begin less than a window after the keys end
        stop = stop.minimum(torch.searchsorted(queries.begin, keys.end + mask.window - 1))
    many = (stop - first).clamp(min=0)
    key, query = torch.arange(len(many)).repeat_interleave(many), runs(first, many)
    begin, end = keys.begin[key], keys.end[key]
    if mask.window is not None:
        begin = begin.maximum(queries.begin[query] - mask.window + 1)
    if mask.causal:
        end = end.minimum(queries.end[query])
    return Pairs(query, key, begin, end)


def seen(queries: SegmentTable, keys: SegmentTable, mask: Mask) -> tuple[Tensor, Tensor]:
    """Of each segment of keys the places from the first to the last that some query sees: begin, length (0 for none)."""
    found = pairs(queries, keys, mask)
    begin = keys.end.scatter_reduce(0, found.key, found.begin, "amin")
    end = keys.begin.scatter_reduce(0, found.key, found.end, "amax")
    return begin, (end - begin).clamp(min=0)


def tiles(queries: SegmentTable, keys: SegmentTable, rows: Tensor, mask: Mask) -> list[Tile]:
    """Tiles of all pairs of a query and a key that it sees.

    Keys that a segment of queries sees whole become one tile with what follows them, if their rows are adjacent.

    Args:
        queries: of this rank, in the order of the stream; their column `row` says where they are.
        keys: in the order of their rows.
        rows: of the first token of each segment of keys, int64 [segments].
        mask: what a query sees.
    """
    found = pairs(queries, keys, mask)
    order = found.query.argsort(stable=True)
    query, key, begin, end = (column[order] for column in found)
    query_begin, query_end, query_row = queries.begin[query], queries.end[query], queries.row[query]
    first = last = torch.full_like(begin, _NONE)  # a bound that all pairs of the tile keep is none
    if mask.window is not None:
        first = first.where(begin >= query_end - mask.window, query_begin - mask.window + 1 - begin)
    if mask.causal:
        last = last.where(end <= query_begin + 1, query_begin - begin)
    row = rows[key] + begin - keys.begin[key]
    stop = row + end - begin
    # Two tiles of the same queries are one if their keys are adjacent and one band describes both.
    joins = (query[1:] == query[:-1]) & (stop[:-1] == row[1:]) & (last[:-1] == _NONE) & (first[1:] == _NONE)
    joins &= (first == _NONE)[:-1] | ((query_end - query_begin - 1 + first <= end - begin)[:-1])
    head, tail = (torch.cat(edges).nonzero().flatten() for edges in _edges(joins, len(query)))
    last = last[tail].where(last[tail] == _NONE, last[tail] + row[tail] - row[head])
    columns = query_row[head], (query_row + query_end - query_begin)[head], row[head], stop[tail], first[head], last
    return [
        Tile(slice(a, b), slice(c, d), None if low == _NONE else low, None if high == _NONE else high)
        for a, b, c, d, low, high in zip(*(column.tolist() for column in columns), strict=True)
    ]


def _edges(joins: Tensor, tiles: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Whether each tile is the first, and the last, of those that it is joined with."""
    edge = torch.ones(min(tiles, 1), dtype=torch.bool)
    return (edge, ~joins), (~joins, edge)


def first_rows(table: SegmentTable) -> Tensor:
    """The row of each segment's first token where all tokens stand one after the other: int64 [segments]."""
    return offsets(table.length)[:-1]
