"""What a gather of all states sends: LASP-2, the count of `lsys.parallel.linear.lasp2`."""

from __future__ import annotations

from lsys.parallel.messages.linear import Shape, chains
from lsys.parallel.messages.placement import Phases, Placement, around


def phases(place: Placement, shape: Shape) -> Phases:
    """The messages of one causal layer: one collective each way, forward with the transitions."""
    counts = [0] * place.ranks
    for chain in chains(place):
        for rank in chain if len(chain) > 1 else ():
            counts[rank] += 1
    most = (place.ranks - 1) * max(counts)
    forward = around(most * (shape.state + shape.transition), place.ranks)
    return Phases(forward, around(most * shape.state, place.ranks))
