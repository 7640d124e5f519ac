"""Attention by gathering keys and values (context parallelism of Llama 3, Meta, 2024; LASP-2H, Sun et al., 2025).

One all-gather, and in backward one reduce-scatter, of the tokens that some other rank needs, while ranks attend to
their own.
"""

from __future__ import annotations

import torch

from lsys.parallel.layout import SequenceLayout
from lsys.parallel.schedule import Schedule, Step, Transfer, crossing
from lsys.parallel.segments import SegmentTable, cut


def schedule(layout: SequenceLayout, causal: bool = True, window: int | None = None) -> Schedule:
    """One collective step, then one to work on what it brings; only local work if nobody needs anything."""
    local = tuple(layout.table(rank) for rank in range(layout.ranks))
    offered = _offered(layout, causal, window)
    if len(offered.begin) == 0:
        return Schedule(layout.ranks, (Step(local=local),))
    offered = offered.take(offered.rank.int().argsort(stable=True))
    bounds = torch.searchsorted(offered.rank, torch.arange(layout.ranks + 1)).tolist()
    transfers = []
    for source in range(layout.ranks):
        parts = offered.take(slice(*bounds[source : source + 2]))
        if len(parts.begin):
            transfers += [Transfer(source, other, parts) for other in range(layout.ranks) if other != source]
    return Schedule(layout.ranks, (Step(tuple(transfers), local, collective=True), Step()))


def _offered(layout: SequenceLayout, causal: bool, window: int | None) -> SegmentTable:
    """The tokens that some other rank than their owner needs, in the order of the stream."""
    parts = crossing(layout)
    if not causal or len(parts.begin) == 0:
        return parts
    # The first queries of others that see a part are those of the document's next part that another rank holds.
    number = torch.arange(1, len(parts.begin) + 1)
    changes = torch.cat([parts.rank.diff() != 0, torch.tensor([True])])
    following = number.where(changes, len(number)).flip(0).cummin(0).values.flip(0)
    query = torch.cat([parts.begin, torch.tensor([layout.total])])[following]
    needed = parts.begin if window is None else (query - window + 1).maximum(parts.begin)
    is_seen = query < layout.document_offsets[parts.document + 1]
    return cut(parts, needed, (parts.end - needed).clamp(min=0).where(is_seen, 0))
