"""What linear attention sends that exchanges heads for tokens: the count of `lsys.parallel.linear.ulysses`."""

from __future__ import annotations

from lsys.parallel.messages.heads import shares
from lsys.parallel.messages.linear import Shape
from lsys.parallel.messages.placement import Phases, Placement, pairs_of


def phases(place: Placement, shape: Shape) -> Phases:
    """The messages of one causal layer: its tokens' inputs, and their outputs back."""
    if place.ranks == 1:
        return Phases([], [])
    split, sizes, pairs = shares(shape.heads, shape.key_heads, place.ranks), place.sizes, pairs_of(place.ranks)
    inputs = [shape.token(share.queries, share.keys) for share in split]
    outputs = [share.queries * shape.value_width * shape.itemsize for share in split]
    before = [(i, j, sizes[i] * inputs[j]) for i, j in pairs]
    after = [(i, j, sizes[j] * outputs[i]) for i, j in pairs]
    d_after = [(i, j, sizes[i] * outputs[j]) for i, j in pairs]
    d_before = [(i, j, sizes[j] * inputs[i]) for i, j in pairs]
    return Phases([before, after], [d_after, d_before])
