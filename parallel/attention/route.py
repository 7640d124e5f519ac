"""A schedule as one rank sees it: what it sends, receives and attends to in each step, in rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lsys.kernels.mask import Mask
from lsys.kernels.softmax_attention import Tiles, sequences
from lsys.parallel.attention.tiles import Keys, Pairs, Queries, first_rows, seen, tiles
from lsys.parallel.layout import SequenceLayout
from lsys.parallel.schedule import Schedule, Step, returns
from lsys.parallel.segments import SegmentTable, continued, count, cut, find, is_prefix, joined, runs

Rows = slice | Tensor  # adjacent rows, or int64 rows that are all different


class Part(NamedTuple):
    """So many rows of a message: `rows` of the block in hand, or of the rank's own tokens."""

    in_hand: bool
    rows: Rows
    number: int

    def to(self, device: torch.device) -> Part:
        """With the rows there."""
        return self._replace(rows=_rows_to(self.rows, device))


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

    def to(self, device: torch.device) -> Gather:
        """With the rows there."""
        return self._replace(offered=tuple(part.to(device) for part in self.offered), kept=_rows_to(self.kept, device))


def _rows_to(rows: Rows, device: torch.device) -> Rows:
    return rows if isinstance(rows, slice) else rows.to(device)


_NOTHING = Tiles.of(())


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
        keys: those of each of the three, by name.
        returned: for backward, sums over the block that was in hand one step before, by the rank they go to.
        returning: sums that arrive, by rank, and the rows (of the block now in hand, or own) that they belong to.
        scatter: instead of the two, in the second step after a collective one.
    """

    sends: dict[int, Message] = field(default_factory=dict)
    receives: dict[int, int] = field(default_factory=dict)
    gather: Gather | None = None
    local: Tiles = _NOTHING
    remote: Tiles = _NOTHING
    local_backward: Tiles = _NOTHING
    keys: dict[str, Keys] = field(default_factory=dict)
    returned: dict[int, Message] = field(default_factory=dict)
    returning: dict[int, Message] = field(default_factory=dict)
    scatter: Gather | None = None

    @property
    def communicates(self) -> bool:
        """Whether the rank sends or receives anything in this step, forward or backward."""
        return bool(self.sends or self.receives or self.gather or self.returned or self.returning or self.scatter)

    def to(self, device: torch.device) -> RouteStep:
        """With all rows there. Tiles stay on the host: what is planned for them knows the device."""

        def moved(messages: dict[int, Message]) -> dict[int, Message]:
            return {rank: tuple(part.to(device) for part in message) for rank, message in messages.items()}

        return replace(
            self,
            sends=moved(self.sends),
            gather=self.gather and self.gather.to(device),
            returned=moved(self.returned),
            returning=moved(self.returning),
            scatter=self.scatter and self.scatter.to(device),
        )


@dataclass(frozen=True)
class Route:
    """What one rank does, in all layers of a kind.

    Attributes:
        steps: one more than the schedule has: in the last the last sums return in backward.
        whole: of a rank that communicates nothing and whose documents are whole and see themselves alone, a tile for
            each: for calls that select nothing, instead of the steps.
    """

    steps: tuple[RouteStep, ...]
    whole: Tiles | None = None

    def selected(self, queries: Queries, mask: Mask, select: Callable[[Pairs], Tiles]) -> tuple[RouteStep, ...]:
        """The steps of one call that attends to what it selects: they send the same."""

        def chosen(step: RouteStep) -> RouteStep:
            made = {id(keys): tiles(queries, keys, mask, select) for keys in step.keys.values()}
            local, remote, backward = (
                made[id(step.keys[name])] if name in step.keys else _NOTHING
                for name in ("local", "remote", "local_backward")
            )
            return replace(step, local=local, remote=remote, local_backward=backward)

        return tuple(map(chosen, self.steps))

    def to(self, device: torch.device) -> Route:
        """With all rows there."""
        return replace(self, steps=tuple(step.to(device) for step in self.steps))


Generator = Callable[[SequenceLayout, Mask], Schedule]


def route_of(
    layout: SequenceLayout, generator: Generator, rank: int, mask: Mask, device: torch.device | None = None
) -> Route:
    """The rank's route along the schedule that `generator(layout, mask)` makes: found once for a layout."""
    name = ("attention route", generator, rank, mask)
    return layout.derived(name, device, lambda: route(generator(layout, mask), layout, rank, mask))


def route(schedule: Schedule, layout: SequenceLayout, rank: int, mask: Mask) -> Route:
    """The schedule as one rank sees it."""
    steps = [RouteStep() for _ in range(len(schedule.steps) + 1)]
    queries, nothing = Queries.of(layout, rank), layout.table(rank).take(slice(0))
    hands = [nothing]  # in each step what the rank has in hand
    for number, step in enumerate(schedule.steps):
        here, hand = steps[number], hands[number]
        if step.local:
            here.keys["local"] = Keys(step.local[rank], step.local[rank].row)
            here.local = tiles(queries, here.keys["local"], mask)
        if step.collective:
            here.gather, arriving = _gather(step, schedule.ranks, queries, rank, mask)
        else:
            _transfers(here, step, rank, hand)
            arriving = schedule.received(number + 1, (rank,)).get(rank, nothing)
        hands.append(arriving)
        if len(hand.begin):
            here.keys["remote"] = Keys(hand, first_rows(hand))
            here.remote = tiles(queries, here.keys["remote"], mask)
    _spread_local(steps, schedule, rank, queries, mask)
    for number, entry in enumerate(returns(schedule, rank)):
        steps[number].scatter = steps[number - 2].gather if number >= 2 else None
        for transfer in entry:
            if transfer.source == rank:
                steps[number].returned[transfer.destination] = _message(transfer.parts, rank, hands[number - 1])
            else:
                steps[number].returning[transfer.source] = _message(transfer.parts, rank, hands[number])
    held = layout.table(rank)
    is_whole = torch.equal(held.length, layout.document_offsets.diff()[held.document])
    if mask.is_own and is_whole and not any(step.communicates for step in steps):
        return Route(tuple(steps), sequences(held.length, held.length, mask))
    return Route(tuple(steps))


def _transfers(here: RouteStep, step: Step, rank: int, hand: SegmentTable) -> None:
    for transfer in step.transfers:
        if transfer.source == rank:
            here.sends[transfer.destination] = _message(transfer.parts, rank, hand)
        elif transfer.destination == rank:
            here.receives[transfer.source] = count(transfer.parts)


def _spread_local(steps: list[RouteStep], schedule: Schedule, rank: int, queries: Queries, mask: Mask) -> None:
    """In backward, local work is spread from the first step to the last, where blocks or else sums are under way too."""
    parts = [step.local[rank] for step in schedule.steps if step.local]
    if len(schedule.steps) == 1:
        steps[0].local_backward = steps[0].local
        steps[0].keys["local_backward"] = steps[0].keys["local"]
        return
    if len(parts) == 1:
        parts = _halves(parts[0], (count(queries.segments) + 1) // 2)
    for number, part in enumerate(parts):
        step = steps[round(number * (len(steps) - 1) / (len(parts) - 1))]
        step.keys["local_backward"] = Keys(part, part.row)
        step.local_backward = tiles(queries, step.keys["local_backward"], mask)


def _halves(table: SegmentTable, row: int) -> list[SegmentTable]:
    """The tokens in the rows before this one, and the others."""
    length = (row - table.row).clamp(min=0).minimum(table.length)
    return [cut(table, table.begin, length), cut(table, table.begin + length, table.length - length)]


def _gather(step: Step, ranks: int, queries: Queries, rank: int, mask: Mask) -> tuple[Gather, SegmentTable]:
    """The rank's part in a collective step, and what it keeps of it, in the order of the stream."""
    tables = {transfer.source: transfer.parts for transfer in step.transfers}
    offered = joined([tables[source] for source in sorted(tables)])
    order = offered.begin.argsort()
    rows, offered = first_rows(offered)[order], offered.take(order)
    begin, length = seen(queries, offered, mask)
    which = ((length > 0) & (offered.rank != rank)).nonzero().flatten()
    begin, length = begin[which], length[which]
    rows = rows[which] + begin - offered.begin[which]
    sizes = tuple(count(tables[source]) if source in tables else 0 for source in range(ranks))
    message = _message(tables[rank], rank, offered.take(slice(0))) if rank in tables else ()
    return Gather(message, sizes, _rows(rows, length)), continued(cut(offered.take(which), begin, length))


def _message(parts: SegmentTable, rank: int, hand: SegmentTable) -> Message:
    """Where the rows of the parts are, in their order: in hand, or among the rank's own."""
    if len(parts.begin) and is_prefix(parts, hand):  # what a ring passes on
        rows = count(parts)
        return (Part(True, slice(0, rows), rows),)
    own, runs_of_kind = (parts.rank == rank).unique_consecutive(return_counts=True)
    message, start = [], 0
    for is_own, number in zip(own.tolist(), runs_of_kind.tolist(), strict=True):
        same = parts.take(slice(start, start + number))
        first = same.row if is_own else first_rows(hand)[find(same, hand)]
        message.append(Part(not is_own, _rows(first, same.length), count(same)))
        start += number
    return tuple(message)


def _rows(first: Tensor, length: Tensor) -> Rows:
    """Rows of segments with these first rows and lengths: a slice if they follow one another, else an index."""
    if len(first) == 0:
        return slice(0, 0)
    end = first + length
    if torch.equal(first[1:], end[:-1]):
        return slice(int(first[0]), int(end[-1]))
    return runs(first, length)
