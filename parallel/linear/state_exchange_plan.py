"""Which states ranks exchange, and in which order these compose: a function of the layout alone.

A *chain* is one document in one direction; its *runs* are its longest stretches between which, by position, no other
rank holds a token of it. A rank composes the maps of its segments of a run before it exchanges any: 10,000 fragments of
a document that one rank holds are one run, and neighbours in a chain always lie on different ranks.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lsys.kernels.linear_attention import SegmentMap
from lsys.kernels.linear_attention.scan import ScanPlan, scan
from lsys.kernels.linear_attention.transition import carry
from lsys.parallel.layout import SequenceLayout
from lsys.parallel.segments import SegmentTable, offsets

Key = tuple[Hashable, ...]


class Runs(NamedTuple):
    """Runs as columns, each int64 [runs], chain after chain, in each in the order of the recurrence.

    Attributes:
        rank: that holds the run.
        chain: its document d; documents + d for the way back of both directions.
        place: its number in the chain.
        places: how many runs the chain has.
        length: tokens.
    """

    rank: Tensor
    chain: Tensor
    place: Tensor
    places: Tensor
    length: Tensor

    def take(self, which: Tensor) -> Runs:
        """The runs with these numbers, or where a mask is true."""
        return Runs(*(column[which] for column in self))


class Composed(NamedTuple):
    """The maps of a rank's runs, and what leads from there to its segments.

    Attributes:
        update: [R, H, K, V], the state after each run when zero before it.
        transition: over the run, in one of the forms of the kernel's `transition.py`, [R, H ...].
        before: [L, H, K, V], the state before each segment with external state when zero before its run, run after run; None if
            each run is one segment.
        cumulative: the transition from the start of the run to the segment, [L, H ...].
    """

    update: Tensor
    transition: Tensor | None
    before: Tensor | None = None
    cumulative: Tensor | None = None


@dataclass(frozen=True)
class ExternalSegments:
    """The segments with external state of one rank, L in all directions together, and its R runs that they make.

    External state is what a segment receives or sends: that of documents in several segments, or of all if there are
    initial or final states.

    Attributes:
        key: all that they depend on beside the layout, for what is derived from it and them.
        rank, causal: whose they are; without `causal` of both directions.
        documents: how many there are.
        segments: by direction, numbers of segments in the order of the direction's tokens, ascending.
        order: segments with external state run after run, int64 [L]; None if that is the order that they have.
        back: the inverse of `order`.
        run: of each segment with external state, in that order, its run: int64 [L].
        plan: of the scan over the segments of each run; None if each run is one segment.
        numbers: of the runs among all ranks' (`all_runs`), ascending, on the host: int64 [R].
        crosses: whether some document is held by several ranks: alike on all ranks.
        first, starts: runs that begin their chain, and the documents of these: int64 each.
        empty: documents without tokens, int64.
        finals: where the states after documents are; None if they are not wanted.
    """

    key: Key
    rank: int
    causal: bool
    documents: int
    segments: tuple[tuple[int, ...], ...]
    order: Tensor | None
    back: Tensor | None
    run: Tensor
    plan: ScanPlan | None
    numbers: Tensor
    crosses: bool
    first: Tensor
    starts: Tensor
    empty: Tensor
    finals: Finals | None

    def compose(self, maps: Sequence[SegmentMap]) -> Composed:
        """The maps of the runs, of those of the segments with external state, by direction. Differentiable."""
        update, transition = maps[0].state, maps[0].transition
        if len(maps) > 1:
            update = torch.cat([each.state for each in maps])
            transition = None if transition is None else torch.cat([_given(each.transition) for each in maps])
        if self.order is not None:
            update = update.index_select(0, self.order)
            transition = None if transition is None else transition.index_select(0, self.order)
        if self.plan is None:
            return Composed(update, transition)
        scanned = scan(update, transition, self.plan)
        return Composed(scanned.total, scanned.total_cumulative, scanned.before, scanned.cumulative)

    def states_before(self, composed: Composed, state: Tensor | None) -> list[Tensor | None]:
        """The states before the segments with external state [L_direction, H, K, V], of those before the runs [R, H, K, V] (None is 0)."""
        if composed.before is not None:
            before = composed.before
            if state is not None:
                before = before + carry(composed.cumulative, state.index_select(0, self.run))
        elif state is None:
            return [None] * len(self.segments)
        else:
            before = state
        if self.back is not None:
            before = before.index_select(0, self.back)
        return list(before.split([len(numbers) for numbers in self.segments]))


class Finals(NamedTuple):
    """Who has the states after documents.

    Attributes:
        rows: runs of this rank that end their chain, int64.
        sizes: how many each rank has.
        order: all ranks' of these, one rank after the other, in the order of documents: int64 [documents that have tokens].
        documents: those that have tokens, int64.
    """

    rows: Tensor
    sizes: tuple[int, ...]
    order: Tensor
    documents: Tensor


def position_order(layout: SequenceLayout) -> SegmentTable:
    """All segments by document, then by position: the order of ranks says nothing about positions (zigzag)."""
    return layout.sorted()


def all_runs(layout: SequenceLayout, causal: bool) -> Runs:
    """The runs of all ranks; without `causal` both directions', forward first."""
    return _mapped_runs(layout, causal).runs


class _MappedRuns(NamedTuple):
    """Runs; the forward run of each segment in position order; of each forward run the one that it is on the way back."""

    runs: Runs
    of_segment: Tensor
    mirror: Tensor


def _mapped_runs(layout: SequenceLayout, causal: bool) -> _MappedRuns:
    def build() -> _MappedRuns:
        table, documents = position_order(layout), len(layout.lengths)
        is_new = torch.ones_like(table.rank, dtype=torch.bool)
        is_new[1:] = (table.document[1:] != table.document[:-1]) | (table.rank[1:] != table.rank[:-1])
        first = is_new.nonzero().flatten()
        rank, chain = table.rank[first], table.document[first]
        tokens = offsets(table.length)
        length = torch.cat([tokens[first], tokens[-1:]]).diff()
        counts = torch.bincount(chain, minlength=documents)
        begin, places = offsets(counts)[chain], counts[chain]
        place = torch.arange(len(chain)) - begin
        mirror = begin + places - 1 - place
        runs = Runs(rank, chain, place, places, length)
        if not causal:
            back = Runs(rank[mirror], chain + documents, place, places, length[mirror])
            runs = Runs(*map(torch.cat, zip(runs, back, strict=True)))
        return _MappedRuns(runs, is_new.cumsum(0) - 1, mirror + len(chain))

    return layout.derived(("linear runs", causal), None, build)


def external_segments(
    layout: SequenceLayout, rank: int, causal: bool, initial: bool, final: bool, device: torch.device
) -> ExternalSegments:
    """Those of `rank`, if there are initial states, and if final ones are wanted: made once for a layout."""
    key = ("segments with external state", rank, causal, initial, final, device)
    return layout.derived(key, None, lambda: _external_segments(layout, rank, causal, initial, final, device, key))


def _external_segments(
    layout: SequenceLayout, rank: int, causal: bool, initial: bool, final: bool, device: torch.device, key: Key
) -> ExternalSegments:
    table, (runs, run, mirror) = position_order(layout), _mapped_runs(layout, causal)
    segments = torch.bincount(table.document, minlength=len(layout.lengths))
    is_held = table.rank == rank
    if not (initial or final):
        is_held &= segments[table.document] > 1
    held = is_held.nonzero().flatten()
    rows = layout.table(rank).row
    number = torch.searchsorted(rows, table.row[held])  # of each segment in the rank's order
    ways = [_Way(number, run[held])]
    if not causal:
        ways.append(_Way(len(rows) - 1 - number.flip(0), mirror[run[held]].flip(0)))
    ascending = [way.number.sort() for way in ways]
    order, before = [], 0
    for way, (_, by_number) in zip(ways, ascending, strict=True):
        order.append(by_number.argsort()[way.run.argsort(stable=True)] + before)
        before += len(by_number)
    composed, in_order = torch.cat(order), torch.arange(before)
    of_run = torch.cat([way.run.sort().values for way in ways])
    numbers, of_run, counts = torch.unique_consecutive(of_run, return_inverse=True, return_counts=True)
    mine = runs.take(numbers)
    first = (mine.place == 0).nonzero().flatten()
    is_ordered = torch.equal(composed, in_order)
    return ExternalSegments(
        key=key,
        rank=rank,
        causal=causal,
        documents=len(layout.lengths),
        segments=tuple(tuple(numbers.tolist()) for numbers, _ in ascending),
        order=None if is_ordered else composed.to(device),
        back=None if is_ordered else composed.argsort().to(device),
        run=of_run.to(device),
        plan=ScanPlan(tuple(counts.tolist()), device) if bool((counts > 1).any()) else None,
        numbers=numbers,
        crosses=bool((runs.places > 1).any()),
        first=first.to(device),
        starts=mine.chain[first].to(device),
        empty=(segments == 0).nonzero().flatten().to(device),
        finals=_finals(runs, rank, layout.ranks, mine, device) if final else None,
    )


class _Way(NamedTuple):
    """A rank's segments with external state in the order of one direction: their numbers in the order of its tokens, and their runs."""

    number: Tensor
    run: Tensor


def _finals(runs: Runs, rank: int, ranks: int, mine: Runs, device: torch.device) -> Finals:
    last = runs.take(runs.place == runs.places - 1)
    return Finals(
        rows=(mine.place == mine.places - 1).nonzero().flatten().to(device),
        sizes=tuple(torch.bincount(last.rank, minlength=ranks).tolist()),
        order=last.rank.argsort(stable=True).argsort().to(device),
        documents=last.chain.to(device),
    )


def _given(x: Tensor | None) -> Tensor:
    assert x is not None
    return x
