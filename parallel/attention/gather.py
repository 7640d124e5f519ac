"""Attention by gathering keys and values (context parallelism of Llama 3, Meta, 2024; LASP-2H, Sun et al., 2025).

One all-gather, and in backward one reduce-scatter, of the tokens that some other rank needs, while ranks attend to
their own.
"""

from __future__ import annotations

import torch

from lsys.kernels.mask import CAUSAL, Mask
from lsys.parallel.attention.ring_distance import readers
from lsys.parallel.layout import SequenceLayout
from lsys.parallel.schedule import Schedule, Step, Transfer, crossing
from lsys.parallel.segments import SegmentTable, cut
from lsys.parallel.sights import as_seen, most


def schedule(layout: SequenceLayout, mask: Mask = CAUSAL) -> Schedule:
    """One collective step, then one to work on what it brings; only local work if nobody needs anything."""
    local = tuple(layout.table(rank) for rank in range(layout.ranks))
    offered = _offered(layout, mask)
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


def _offered(layout: SequenceLayout, mask: Mask) -> SegmentTable:
    """The tokens that some other rank than their owner needs, in the order of the stream."""
    parts = crossing(layout, mask)
    if len(parts.begin) == 0:
        return parts
    keys, number = as_seen(parts, layout, mask)
    first, stop = readers(parts, keys, mask, len(layout.lengths))
    # The first queries of another rank that see a part are those of its first reader, or of the next that is not of its rank.
    total = len(parts.begin)
    changes = torch.cat([parts.rank.diff() != 0, torch.tensor([True])])
    following = torch.arange(1, total + 1).where(changes, total).flip(0).cummin(0).values.flip(0)
    at = first.clamp(max=total - 1)
    query = first.where(parts.rank[at] != keys.rank, following[at])
    length, reach = keys.length, mask.reach()
    if reach is not None:  # what is seen of a part is its end
        edge = parts.begin[query.clamp(max=total - 1)] - reach
        length = (keys.end - edge.maximum(keys.begin)).clamp(min=0)
    length = most(length.where(query < stop, 0), number, total)
    return cut(parts, parts.end - length, length)
