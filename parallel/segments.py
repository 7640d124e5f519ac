"""Segments of documents: one by one, and as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Segment(NamedTuple):
    """Tokens [start, start + length) of one document."""

    document: int
    start: int
    length: int

    @property
    def stop(self) -> int:
        """One past the last position of the segment in its document."""
        return self.start + self.length


class SegmentTable(NamedTuple):
    """Segments as columns, each int64 [segments].

    Attributes:
        rank: that holds the segment.
        document, start, length: as in `Segment`.
        begin: place in the stream of its first token.
        row: of its first token among its rank's tokens.
    """

    rank: Tensor
    document: Tensor
    start: Tensor
    length: Tensor
    begin: Tensor
    row: Tensor

    @property
    def end(self) -> Tensor:
        """One past the place in the stream of the last token."""
        return self.begin + self.length

    def take(self, which: Tensor | slice) -> SegmentTable:
        """The segments with these numbers, in their order; or those where a mask, bool [segments], is true."""
        if isinstance(which, slice):
            return SegmentTable(*(column[which] for column in self))
        numbers = which.nonzero().flatten() if which.dtype == torch.bool else which
        return SegmentTable(*(column.index_select(0, numbers) for column in self))


def runs(first: Tensor, length: Tensor) -> Tensor:
    """first[i], first[i] + 1, ... of each i in turn, length[i] numbers: int64 [n], [n] -> [sum(length)]."""
    place = torch.arange(int(length.sum()))
    return place.add_((first - length.cumsum(0) + length).repeat_interleave(length))


def offsets(length: Tensor) -> Tensor:
    """Where each of several runs begins when they are put end to end, then their sum: int64 [n] -> [n + 1]."""
    return torch.nn.functional.pad(length.cumsum(0), (1, 0))


def count(table: SegmentTable) -> int:
    """Tokens of all segments."""
    return int(table.length.sum())


def cut(table: SegmentTable, begin: Tensor, length: Tensor) -> SegmentTable:
    """The part of each segment that begins at this place in the stream and has this length; empty ones are dropped."""
    shift = begin - table.begin
    parts = SegmentTable(table.rank, table.document, table.start + shift, length, begin, table.row + shift)
    return parts if bool((length > 0).all()) else parts.take(length > 0)


def joined(tables: Sequence[SegmentTable]) -> SegmentTable:
    """The tables, one after the other."""
    if len(tables) == 1:
        return tables[0]
    return SegmentTable(*(torch.cat(columns) for columns in zip(*tables, strict=True)))


def continued(table: SegmentTable) -> SegmentTable:
    """Neighbours that continue each other in their document, whoever holds them, as one, which is as the first is."""
    is_first = torch.ones_like(table.begin, dtype=torch.bool)
    is_first[1:] = (table.begin[1:] != table.end[:-1]) | (table.document[1:] != table.document[:-1])
    first, rows = is_first.nonzero().flatten(), offsets(table.length)
    return table.take(first)._replace(length=torch.cat([rows[first], rows[-1:]]).diff())


def find(parts: SegmentTable, among: SegmentTable) -> Tensor:
    """The number in `among` of each part, -1 if it is not there, whole and alone: int64 [parts]."""
    if len(among.begin) == 0:
        return torch.full_like(parts.begin, -1)
    begin, order = among.begin.sort()
    at = order[torch.searchsorted(begin, parts.begin).clamp(max=len(begin) - 1)]
    same = (among.begin[at] == parts.begin) & (among.length[at] == parts.length)
    return at.where(same, -1)


def is_prefix(parts: SegmentTable, of: SegmentTable) -> bool:
    """Whether `of` begins with these parts."""
    n = len(parts.begin)
    return parts is of or (torch.equal(parts.begin, of.begin[:n]) and torch.equal(parts.length, of.length[:n]))
