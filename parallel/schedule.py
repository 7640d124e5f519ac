"""Traffic between ranks as data: which tokens' rows go from whom to whom, in which step.

A generator makes a schedule from a layout (`lsys.parallel.attention.ring`, `.gather`); one executor runs any schedule,
forward and adjoint (`lsys.parallel.attention.executor`). Nothing here assumes a ring.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lsys.kernels.mask import CAUSAL, Mask, Sight
from lsys.parallel.layout import SequenceLayout
from lsys.parallel.segments import Segment, SegmentTable, cut, find, is_prefix, joined
from lsys.parallel.sights import sights


class Transfer(NamedTuple):
    """Rows of tokens from one rank to another, in the order of `parts`: the first `number` of a block, all for None.

    Each part is (a part of) one segment of the layout; its columns `rank` and `row` are those of its owner. A ring
    passes on fewer and fewer of one block.
    """

    source: int
    destination: int
    block: SegmentTable
    number: int | None = None

    @property
    def parts(self) -> SegmentTable:
        """What is sent."""
        return self.block if self.number in (None, len(self.block.begin)) else self.block.take(slice(self.number))


class Step(NamedTuple):
    """What happens at the same time.

    Attributes:
        transfers: under way during the step, at most one from one rank to another. A rank sends parts of its own
            segments, and passes on, whole, parts that it received in the step before. What a rank receives it works on
            in the next step, and may then pass on or drop: it holds two blocks of others at most.
        local: by rank, parts of its own segments that it works on in this step; () if there are none.
        collective: the transfers are one all-gather: each rank sends the same of its own tokens to all others. What is
            received is not passed on.
    """

    transfers: tuple[Transfer, ...] = ()
    local: tuple[SegmentTable, ...] = ()
    collective: bool = False


@dataclass(frozen=True)
class Schedule:
    """Steps that bring each rank the tokens of others that it needs, and let it work on its own, each exactly once."""

    ranks: int
    steps: tuple[Step, ...]

    def received(self, step: int, ranks: Collection[int] | None = None) -> dict[int, SegmentTable]:
        """What ranks (all, or these) that received something in the step before have in hand, in the order of its rows."""
        parts: dict[int, list[SegmentTable]] = defaultdict(list)
        for transfer in self.steps[step - 1].transfers if step > 0 else ():
            if ranks is None or transfer.destination in ranks:
                parts[transfer.destination].append(transfer.parts)
        return {rank: joined(tables) for rank, tables in parts.items()}


# ---- tables of parts


def parts_of(layout: SequenceLayout, segments: Iterable[tuple[int, int, int]]) -> SegmentTable:
    """The table of (document, start, length), each inside one segment of the layout.

    Raises:
        ValueError: one of them is not.
    """
    wanted = torch.tensor([*segments], dtype=torch.int64).reshape(-1, 3)
    document, start, length = wanted.unbind(1)
    begin = layout.document_offsets[document] + start
    every = layout.sorted()
    at = (torch.searchsorted(every.begin, begin, right=True) - 1).clamp(min=0)
    outside = begin + length > every.end[at] if len(every.begin) else length >= 0
    if outside.any():
        raise ValueError(f"{Segment(*wanted[int(outside.nonzero()[0])].tolist())} is not inside a segment of a rank")
    return cut(every.take(at), begin, length)


def crossing(layout: SequenceLayout, mask: Mask) -> SegmentTable:
    """The segments of documents of which, with one that sees them, several ranks hold tokens, in the order of the stream.

    Those that see them are there too.
    """
    every = layout.sorted()
    changes = (every.rank.diff() != 0) & (every.document.diff() == 0)
    crosses = torch.zeros(len(layout.lengths), dtype=torch.bool)
    crosses[every.document[1:][changes]] = True
    if not mask.is_own and len(every.document):
        begins = torch.searchsorted(every.document, torch.arange(len(crosses))).clamp(max=len(every.document) - 1)
        owner = every.rank[begins].masked_fill(torch.tensor(layout.lengths) == 0, -1)
        pairs = torch.stack(sights(layout, mask)[:2])
        apart = (owner[pairs[0]] != owner[pairs[1]]) & (owner[pairs] >= 0).all(0)
        crosses[pairs[:, apart | crosses[pairs].any(0)]] = True
    wanted = crosses.index_select(0, every.document)
    return every if bool(wanted.all()) else every.take(wanted)


# ---- the adjoint


def returns(schedule: Schedule, rank: int | None = None) -> tuple[tuple[Transfer, ...], ...]:
    """The way back of sums (gradients) over the ranks that worked on a row: entry s is under way during step s.

    What a rank added up for a row in step s - 1 goes where it passed the row on to, to be added there to what that rank
    adds up in step s (the first of several such ranks), or, where the row's way ended, to its owner. There is one entry
    more than the schedule has steps. A collective step has none: its adjoint is a reduce-scatter.

    Args:
        schedule: the way there.
        rank: only what this rank sends or receives.
    """
    entries: list[tuple[Transfer, ...]] = [()]
    holders: set[int] = set()  # others that have some of the rank's own tokens in hand
    for number, step in enumerate(schedule.steps):
        concerned = None
        if rank is not None:
            concerned = {rank, *holders, *(t.source for t in step.transfers if t.destination == rank)}
        after_collective = number > 0 and schedule.steps[number - 1].collective
        held = {} if after_collective else schedule.received(number, concerned)
        entry = [transfer for other in held for transfer in _passed_back(other, held[other], step)]
        entries.append(tuple(t for t in entry if rank in (None, t.source, t.destination)))
        if rank is not None:
            holders = {
                t.destination
                for t in step.transfers
                if t.source in (rank, *holders) and bool((t.parts.rank == rank).any())
            }
    return tuple(entries)


def _passed_back(rank: int, held: SegmentTable, step: Step) -> list[Transfer]:
    """Where the sums over what a rank has in hand during a step go in the step after."""
    messages: dict[int, list[SegmentTable]] = defaultdict(list)
    for transfer in step.transfers:
        if transfer.source == rank:
            passed, held = _taken(held, transfer.parts)
            messages[transfer.destination] += [passed] if len(passed.begin) else []
    for owner in held.rank.unique().tolist() if len(held.begin) else ():
        messages[owner].append(held.take(held.rank == owner))
    return [Transfer(rank, other, joined(tables)) for other, tables in messages.items() if tables]


def _taken(held: SegmentTable, wanted: SegmentTable) -> tuple[SegmentTable, SegmentTable]:
    """Those held parts that are wanted, and the others."""
    if is_prefix(wanted, held):  # the usual case in a ring, where this is done for each rank and step
        return wanted, held.take(slice(len(wanted.begin), None))
    chosen = find(held, wanted) >= 0
    return held.take(chosen), held.take(~chosen)


# ---- proof


def check(schedule: Schedule, layout: SequenceLayout, mask: Mask = CAUSAL) -> None:
    """Prove that a schedule is right for attention over the layout.

    Ranks send only what they hold, and each works exactly once on every token that one of its queries sees: its own,
    and those that it receives.

    Raises:
        ValueError: with the step, rank and tokens that break a rule.
    """
    if schedule.ranks != layout.ranks:
        raise ValueError(f"the schedule is over {schedule.ranks} ranks and the layout over {layout.ranks}")
    worked: list[list[SegmentTable]] = [[] for _ in range(layout.ranks)]
    held: dict[int, SegmentTable] = {}
    for number, step in enumerate(schedule.steps):
        passable = {} if number > 0 and schedule.steps[number - 1].collective else held
        _check_transfers(f"step {number}", step, layout, passable)
        for rank, parts in enumerate(step.local):
            _check_parts(f"step {number}", parts, layout)
            if bool((parts.rank != rank).any()):
                raise ValueError(f"step {number}: rank {rank} works on tokens of others as if they were its own")
            worked[rank].append(parts)
        for rank, parts in held.items():
            worked[rank].append(parts)
        held = schedule.received(number + 1)
    if held:
        raise ValueError(f"step {len(schedule.steps) - 1} is the last; nobody works on what it transfers")
    seen: dict[int, list[Sight]] = defaultdict(list)  # by reader
    for sight in mask.sights(layout.lengths):
        seen[sight.reader].append(sight)
    for rank, tables in enumerate(worked):
        _check_coverage(rank, tables, layout, mask, seen)


def _check_transfers(at: str, step: Step, layout: SequenceLayout, held: dict[int, SegmentTable]) -> None:
    pairs: set[tuple[int, int]] = set()
    offered: dict[int, SegmentTable] = {}
    nothing = parts_of(layout, [])
    for transfer in step.transfers:
        source, destination, parts = transfer.source, transfer.destination, transfer.parts
        if source == destination or (source, destination) in pairs:
            raise ValueError(f"{at}: rank {source} sends to rank {destination}, itself or a second time")
        pairs.add((source, destination))
        _check_parts(at, parts, layout)
        if bool((parts.rank == destination).any()):
            raise ValueError(f"{at}: rank {source} sends rank {destination} what that rank owns")
        foreign = (parts.rank != source) & ((find(parts, held.get(source, nothing)) < 0) | step.collective)
        if foreign.any():
            raise ValueError(f"{at}: rank {source} sends {_segments(parts.take(foreign))[0]}, which it does not hold")
        same = offered.setdefault(source, parts)
        if step.collective and not (is_prefix(same, parts) and len(same.begin) == len(parts.begin)):
            raise ValueError(f"{at} is collective, but rank {source} sends not the same to all")


def _check_parts(at: str, parts: SegmentTable, layout: SequenceLayout) -> None:
    """That the columns are those that the layout gives."""
    segments = _segments(parts)
    for column, right in zip(parts, parts_of(layout, segments), strict=True):
        if not torch.equal(column, right):
            wrong = segments[int((column != right).nonzero()[0])]
            raise ValueError(f"{at}: {wrong} has another owner or row in the layout; make tables with parts_of")


def _check_coverage(
    rank: int, worked: list[SegmentTable], layout: SequenceLayout, mask: Mask, seen: Mapping[int, Sequence[Sight]]
) -> None:
    """That the rank works exactly once on each token that one of its queries sees."""
    by_document: dict[int, list[Segment]] = defaultdict(list)
    for segment in sorted(segment for table in worked for segment in _segments(table)):
        by_document[segment.document].append(segment)
    reach = mask.reach()
    for (_, start, length), (document, _, distance) in (
        (segment, sight) for segment in layout.segments[rank] for sight in seen[segment.document]
    ):
        first = 0 if reach is None else max(0, start + distance - reach)
        stop = layout.lengths[document]
        stop = min(stop, start + distance + length) if mask.causal else stop
        at = first  # all tokens from `first` to here are worked on once
        for segment in by_document[document]:
            begin, end = max(segment.start, first), min(segment.stop, stop)
            if begin >= end:
                continue
            if begin != at:
                fault = f"never on token {at}" if begin > at else f"twice on token {begin}"
                raise ValueError(f"rank {rank} works {fault} of document {document}")
            at = end
        if at < stop:
            raise ValueError(f"rank {rank} works never on token {at} of document {document}")


def _segments(table: SegmentTable) -> list[Segment]:
    return [*map(Segment, table.document.tolist(), table.start.tolist(), table.length.tolist())]
