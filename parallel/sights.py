"""Which documents of a layout see which, as columns, and keys as each of their readers sees them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lsys.kernels.mask import Mask
from lsys.parallel.layout import SequenceLayout
from lsys.parallel.segments import SegmentTable, offsets, runs


class Sights(NamedTuple):
    """As `Mask.sights`, each int64 [sights]: `reader` sees `document`, `distance` behind whose first token its own stands."""

    document: Tensor
    reader: Tensor
    distance: Tensor


def sights(layout: SequenceLayout, mask: Mask) -> Sights:
    """All of a layout's documents with those that see them, in the order of both: found once for a layout."""

    def build() -> Sights:
        if mask.is_own:
            every = torch.arange(len(layout.lengths))
            return Sights(every, every, torch.zeros_like(every))
        return Sights(*torch.tensor(mask.sights(layout.lengths), dtype=torch.int64).reshape(-1, 3).unbind(1))

    return layout.derived(("sights", mask.documents), None, build)


def as_seen(keys: SegmentTable, layout: SequenceLayout, mask: Mask) -> tuple[SegmentTable, Tensor | None]:
    """Each segment once for each document that sees it, as if it were one of that document's, and its number in `keys`.

    `begin` is where it stands for that document's queries: as far before them as the mask says, in the stream's numbers.
    The other columns but `document` are the segment's own. In the order of `keys`, then of readers; int64 [seen], None
    if each is seen by its own document alone.
    """
    if mask.is_own:
        return keys, None
    found = sights(layout, mask)
    many = torch.bincount(found.document, minlength=len(layout.lengths))
    each = many.index_select(0, keys.document)
    number = torch.arange(len(each)).repeat_interleave(each)
    sight = runs(offsets(many)[:-1].index_select(0, keys.document), each)
    reader, distance = found.reader.index_select(0, sight), found.distance.index_select(0, sight)
    seen = keys.take(number)
    begin = layout.document_offsets.index_select(0, reader) - distance + seen.start
    return seen._replace(document=reader, begin=begin), number


def by_key(x: Tensor, number: Tensor | None) -> Tensor:
    """What is told of each key, of each as it is seen: [keys] -> [seen]."""
    return x if number is None else x.index_select(0, number)


def most(x: Tensor, number: Tensor | None, keys: int) -> Tensor:
    """By key, the most of the numbers from 0 on that its readers have: [seen] -> [keys]."""
    return x if number is None else x.new_zeros(keys).scatter_reduce(0, number, x, "amax")
