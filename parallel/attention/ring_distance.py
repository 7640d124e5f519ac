"""How far around a ring the readers of a segment are: ranges of segments, and the farthest of their owners."""

from __future__ import annotations

import torch
from torch import Tensor

from lsys.kernels.mask import Mask
from lsys.parallel.segments import SegmentTable
from lsys.parallel.sights import by_key

_WORD = 48  # ranks in a word of a set of ranks: its bits are exact in a double, which tells the highest


def readers(parts: SegmentTable, keys: SegmentTable, mask: Mask, documents: int) -> tuple[Tensor, Tensor]:
    """By key, the range [first, stop) of the parts of its document that may see it: int64 [keys] each.

    Those behind where it begins, of a causal mask; a window is not looked at.

    Args:
        parts: all those of some documents, in the order of the stream.
        keys: parts, `as_seen`; a part may be among its own readers.
        mask: what a query sees.
        documents: of the layout.
    """
    bounds = torch.searchsorted(parts.document, torch.arange(documents + 1))
    stop = bounds.index_select(0, keys.document + 1)
    if not mask.causal:
        return bounds.index_select(0, keys.document), stop
    if keys is parts:
        return torch.arange(1, len(stop) + 1), stop
    behind = torch.searchsorted(parts.begin, keys.begin, right=True)
    return behind.maximum(bounds.index_select(0, keys.document)), stop


def farthest(
    owner: Tensor, first: Tensor, stop: Tensor, ranks: int, number: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """How many ranks from its owner the farthest owner of parts [first, stop) is: upwards and downwards, 0 if none is.

    int64 [ranges] each. Sets of ranks are bits of words: the union over a range is that of two ranges whose length is a
    power of two, which are made by doubling.

    Args:
        owner: rank of each part, int64 [parts].
        first, stop: ranges of parts, int64 [ranges].
        ranks: how many there are.
        number: the part that each range belongs to; default one range for each part.
    """
    at = by_key(owner, number)
    up = down = torch.zeros_like(at)
    levels = _levels(stop - first)
    for base in range(0, ranks, _WORD):
        place = at - base
        above = (place + 1).clamp_(0, _WORD)
        bit = _bit(place)
        seen = _unions(bit if number is None else _bit(owner - base), first, stop, levels)
        higher = seen >> above << above  # owners above the part's own
        lower = seen - higher - (seen & bit)
        # Upwards, any that is lower is farther than those that are higher, and the highest of them is the farthest.
        turns = lower != 0
        last = torch.where(turns, lower, higher)
        up = up.maximum((_digits(last) - 1 - place + turns * ranks).masked_fill_(last == 0, 0))
        turns = higher != 0
        last = torch.where(turns, higher, lower)
        down = down.maximum((place + 1 - _digits(last & -last) + turns * ranks).masked_fill_(last == 0, 0))
    return up, down


def _bit(place: Tensor) -> Tensor:
    """The ranks at these places of a word, each as its set of one; no bits for one that is not in the word."""
    return (1 << (place + 1).clamp(0, _WORD) >> 1).masked_fill_(place >= _WORD, 0)


def _levels(length: Tensor) -> list[Tensor]:
    """Which ranges are covered by two of length 1, by two of length 2, of 4, and so on; empty ones are nowhere."""
    digits = _digits(length.clamp(min=0)).clamp_(min=0)
    order = digits.to(torch.int8).argsort(stable=True)
    return [*order.split(torch.bincount(digits).tolist())][1:]


def _unions(bits: Tensor, first: Tensor, stop: Tensor, levels: list[Tensor]) -> Tensor:
    """Unions of the sets with the numbers of each range [first, stop); no bits for an empty one."""
    found = torch.zeros_like(first)
    for number, chosen in enumerate(levels):
        if number:
            half = 1 << (number - 1)
            bits = bits[:-half] | bits[half:]  # now of ranges of length 2 ** number
        left, right = first.index_select(0, chosen), stop.index_select(0, chosen) - (1 << number)
        found.index_copy_(0, chosen, bits.index_select(0, left) | bits.index_select(0, right))
    return found


def _digits(number: Tensor) -> Tensor:
    """How many binary digits a number from 0 to 2 ** 52 has: the exponent of a double; less than 0 for 0."""
    return (number.double().view(torch.int64) >> 52) - 1022
