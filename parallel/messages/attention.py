"""What one layer of softmax attention sends: heads for tokens inside groups of ranks, and keys and values between groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lsys.kernels.mask import CAUSAL, Mask
from lsys.parallel.messages.heads import Groups, GroupsOf, alone, shares
from lsys.parallel.messages.placement import Phases, Placement


@dataclass(frozen=True)
class Shape:
    """Sizes of one layer's attention on one rank (of tensor parallelism): heads, key heads, width and bytes of an element."""

    heads: int
    kv_heads: int
    width: int
    itemsize: int = 2

    @property
    def wide(self) -> int:
        """Bytes of an element of a sum of gradients: fp32, fp64 for fp64."""
        return max(4, self.itemsize)


# The messages between groups, of: where tokens are, over groups; the groups; elements of a token's keys and values of each
# member; the layer; its mask; the backend.
Between = Callable[[Placement, Groups, Sequence[int], Shape, Mask, str], Phases]


def phases(
    groups_of: GroupsOf,
    between: Between,
    place: Placement,
    shape: Shape,
    nodes: Sequence[int],
    mask: Mask = CAUSAL,
    backend: str = "gloo",
) -> Phases:
    """The messages of one layer.

    Args:
        groups_of, between: what makes the method: its groups, and what they send each other.
        nodes: of each rank.
        mask: what a query sees.
        backend: on "nccl" a reduce-scatter goes around the ring.
    """
    if place.ranks == 1:
        return Phases([], [])
    groups = groups_of(nodes, shape.heads)
    split = shares(shape.heads, shape.kv_heads, len(groups[0]))
    rows = [2 * share.keys * shape.width for share in split]
    if len(groups[0]) == 1:
        return between(place, alone(nodes, shape.heads), rows, shape, mask, backend)  # whatever their order
    forward, backward = between(place.pooled(groups), groups, rows, shape, mask, backend)
    sizes, unit = place.sizes, shape.width * shape.itemsize
    pairs = [(i, j, m, n) for group in groups for m, i in enumerate(group) for n, j in enumerate(group) if i != j]
    before = [(i, j, sizes[i] * split[n].width * unit) for i, j, m, n in pairs]
    after = [(i, j, sizes[j] * split[m].queries * unit) for i, j, m, n in pairs]
    d_after = [(i, j, sizes[i] * split[n].queries * unit) for i, j, m, n in pairs]
    d_before = [(i, j, sizes[j] * split[m].width * unit) for i, j, m, n in pairs]
    return Phases([before, *forward, after], [d_after, *backward, d_before])
