"""A schedule as one rank sees it: what it sends, receives and attends to in each step, in rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lsys.kernels.softmax_attention import Tile
from lsys.parallel.attention.tiles import Mask, first_rows, seen, tiles
from lsys.parallel.layout import SegmentTable, SequenceLayout, runs
from lsys.parallel.schedule import Schedule, Step, count, cut, find, is_prefix, joined, returns

Rows = slice | Tensor  # adjacent rows, or int64 rows that are all different


class Part(NamedTuple):
    """So many rows of a message: `rows` of the block in hand, or of the rank's own tokens."""

    in_hand: bool
    rows: Rows
    number: int


Message = tuple[Part, ...]


class Gather(NamedTuple):
    """One rank's part in a collective step.

    Attributes:
        offered: the rank's own rows that it sends.
        sizes: how many rows each rank sends.
        kept: which of all ranks' rows, concatenated in rank order, the rank attends to.
    """

    offered: Message
    sizes: tuple[int, ...]
    kept: Rows


@dataclass
class RouteStep:
    """One step of one rank, forward and backward.

    Attributes:
        sends: rows for other ranks, by rank.
        receives: how many rows come from other ranks, by rank; in this order they are the next step's block in hand.
        gather: instead of the two, in a collective step.
        local: tiles of own queries and own keys.
        remote: tiles of own queries and the keys in hand.
        local_backward: as `local`, for backward.
        returned: for backward, sums over the block that was in hand one step before, by the rank they go to.
        returning: sums that arrive, by rank, and the rows (of the block now in hand, or own) that they belong to.
        scatter: instead of the two, in the second step after a collective one.
    """

    sends: dict[int, Message] = field(default_factory=dict)
    receives: dict[int, int] = field(default_factory=dict)
    gather: Gather | None = None
    local: list[Tile] = field(default_factory=list)
    remote: list[Tile] = field(default_factory=list)
    local_backward: list[Tile] = field(default_factory=list)
    returned: dict[int, Message] = field(default_factory=dict)
    returning: dict[int, Message] = field(default_factory=dict)
    scatter: Gather | None = None

    @property
    def communicates(self) -> bool:
        """Whether the rank sends or receives anything in this step, forward or backward."""
        return bool(self.sends or self.receives or self.gather or self.returned or self.returning or self.scatter)


def route(
    schedule: Schedule, layout: SequenceLayout, rank: int, mask: Mask, device: torch.device
) -> tuple[RouteStep, ...]:
    """The steps of one rank; one more than the schedule has, in which the last sums return in backward."""
    steps = [RouteStep() for _ in range(len(schedule.steps) + 1)]
    queries, nothing = layout.sorted(rank), layout.table(rank).take(slice(0))
    hands = [schedule.received(number).get(rank, nothing) for number in range(len(steps))]
    for number, step in enumerate(schedule.steps):
        here = steps[number]
        if step.local:
            here.local = tiles(queries, step.local[rank], step.local[rank].row, mask)
        if step.collective:
            here.gather, hands[number + 1] = _gather(step, schedule.ranks, queries, rank, mask, device)
        else:
            for source, destination, parts in step.transfers:
                if source == rank:
                    here.sends[destination] = _message(parts, rank, hands[number], device)
                elif destination == rank:
                    here.receives[source] = count(parts)
        if len(hands[number].begin):
            here.remote = tiles(queries, hands[number], first_rows(hands[number]), mask)
    _spread_local(steps, schedule, rank, queries, mask)
    for number, entry in enumerate(returns(schedule)):
        steps[number].scatter = steps[number - 2].gather if number >= 2 else None
        for source, destination, parts in entry:
            if source == rank:
                steps[number].returned[destination] = _message(parts, rank, hands[number - 1], device)
            elif destination == rank:
                steps[number].returning[source] = _message(parts, rank, hands[number], device)
    return tuple(steps)


def _spread_local(steps: list[RouteStep], schedule: Schedule, rank: int, queries: SegmentTable, mask: Mask) -> None:
    """In backward, local work is spread from the first step to the last, where blocks or else sums are under way too."""
    parts = [step.local[rank] for step in schedule.steps if step.local]
    if len(schedule.steps) == 1:
        steps[0].local_backward = steps[0].local
        return
    if len(parts) == 1:
        parts = _halves(parts[0], int(queries.length.sum() + 1) // 2)
    for number, part in enumerate(parts):
        step = steps[round(number * (len(steps) - 1) / (len(parts) - 1))]
        step.local_backward = step.local_backward + tiles(queries, part, part.row, mask)


def _halves(table: SegmentTable, row: int) -> list[SegmentTable]:
    """The tokens in the rows before this one, and the others."""
    length = (row - table.row).clamp(min=0).minimum(table.length)
    return [cut(table, table.begin, length), cut(table, table.begin + length, table.length - length)]


def _gather(
    step: Step, ranks: int, queries: SegmentTable, rank: int, mask: Mask, device: torch.device
) -> tuple[Gather, SegmentTable]:
    """The rank's part in a collective step, and what it keeps of it, in the order of the stream."""
    tables = {source: parts for source, _, parts in step.transfers}
    offered = joined([tables[source] for source in sorted(tables)])
    begin, length = seen(queries, offered, mask)
    length = length.masked_fill(offered.rank == rank, 0)
    order = offered.begin.argsort()
    order = order[length[order] > 0]
    rows = (first_rows(offered) + begin - offered.begin)[order]
    kept = cut(offered.take(order), begin[order], length[order])
    sizes = tuple(count(tables[source]) if source in tables else 0 for source in range(ranks))
    message = _message(tables[rank], rank, kept, device) if rank in tables else ()
    return Gather(message, sizes, _rows(rows, kept.length, device)), kept


def _message(parts: SegmentTable, rank: int, hand: SegmentTable, device: torch.device) -> Message:
    """Where the rows of the parts are, in their order: in hand, or among the rank's own."""
    if len(parts.begin) and is_prefix(parts, hand):  # what a ring passes on
        rows = count(parts)
        return (Part(True, slice(0, rows), rows),)
    own, runs_of_kind = (parts.rank == rank).unique_consecutive(return_counts=True)
    message, start = [], 0
    for is_own, number in zip(own.tolist(), runs_of_kind.tolist(), strict=True):
        same = parts.take(slice(start, start + number))
        first = same.row if is_own else first_rows(hand)[find(same, hand)]
        message.append(Part(not is_own, _rows(first, same.length, device), count(same)))
        start += number
    return tuple(message)


def _rows(first: Tensor, length: Tensor, device: torch.device) -> Rows:
    """Rows of segments with these first rows and lengths: a slice if they follow one another, else an index."""
    if len(first) == 0:
        return slice(0, 0)
    end = first + length
    if torch.equal(first[1:], end[:-1]):
        return slice(int(first[0]), int(end[-1]))
    return runs(first, length).to(device)
