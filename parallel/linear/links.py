"""Which segments exchange states, and in which order these compose: a function of the layout alone."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lsys.kernels.linear_attention.scan import ScanPlan, scan_plan
from lsys.parallel.layout import Segment, SequenceLayout


@dataclass(frozen=True)
class Links:
    """How one rank takes part in the exchange of one layout.

    Sent are the maps of documents that cross ranks, or of all if final states are wanted on several ranks. A document
    in several segments of one rank is linked but not sent. The *table* is all ranks' sent maps in rank order and then
    this rank's linked but unsent ones.

    Attributes:
        linked: this rank's segments that send or receive a state.
        sent, unsent: which of these (0 to L - 1) are sent, and the others, int64.
        sizes: how many maps each rank sends.
        order: rows of the table by document, then position, int64 [rows].
        own: of each linked segment its row in that order, int64 [L].
        documents: those composed, int64 [D].
        mine: of these, those of which this rank answers for the gradient of the initial state (it holds their start).
        plan: of the scan over the maps of each of `documents`.
    """

    linked: tuple[int, ...]
    sent: Tensor
    unsent: Tensor
    sizes: tuple[int, ...]
    order: Tensor
    own: Tensor
    documents: Tensor
    mine: Tensor
    plan: ScanPlan


@lru_cache(maxsize=64)  # the layers of a step ask for the same few
def links(layout: SequenceLayout, rank: int, initial: bool, final: bool, device: torch.device) -> Links:
    """The links of `rank` if there are initial states, and if final ones are wanted."""
    cut, crossing = _cut_and_crossing(layout)
    sent_documents = set(range(len(layout.lengths))) if final and layout.ranks > 1 else crossing
    segments = layout.segments[rank]
    everything = initial or final
    linked = tuple(i for i, segment in enumerate(segments) if everything or segment.document in cut)
    is_sent = [segments[i].document in sent_documents for i in linked]
    sent = [number for number, yes in enumerate(is_sent) if yes]
    unsent = [number for number, yes in enumerate(is_sent) if not yes]
    by_rank = [[segment for segment in held if segment.document in sent_documents] for held in layout.segments]
    sizes = tuple(len(held) for held in by_rank)
    table = [segment for held in by_rank for segment in held] + [segments[linked[number]] for number in unsent]
    order = position_order(table)
    place = {table[row][:2]: at for at, row in enumerate(order)}
    counts = dict.fromkeys(range(len(layout.lengths)) if final else sorted({row.document for row in table}), 0)
    for row in table:
        counts[row.document] += 1
    starts = {segment.document for segment in segments if segment.start == 0}
    mine = [document in starts or (rank == 0 and layout.lengths[document] == 0) for document in counts]

    def index(rows: list[int]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int64, device=device)

    return Links(
        linked=linked,
        sent=index(sent),
        unsent=index(unsent),
        sizes=sizes,
        order=index(order),
        own=index([place[segments[i][:2]] for i in linked]),
        documents=index(list(counts)),
        mine=torch.tensor(mine, dtype=torch.bool, device=device),
        plan=scan_plan(list(counts.values()), device),
    )


def position_order(table: list[Segment]) -> list[int]:
    """Rows of the table by document, then by position: the order of ranks says nothing about positions (zigzag)."""
    return sorted(range(len(table)), key=lambda row: table[row][:2])


def _cut_and_crossing(layout: SequenceLayout) -> tuple[set[int], set[int]]:
    """Documents in several segments, and those of which several ranks hold tokens."""
    holder: dict[int, int] = {}
    cut, crossing = set(), set()
    for rank, held in enumerate(layout.segments):
        for segment in held:
            if segment.document in holder:
                cut.add(segment.document)
                if holder[segment.document] != rank:
                    crossing.add(segment.document)
            holder[segment.document] = rank
    return cut, crossing
