"""Shares of heads, and the groups of ranks that exchange heads for tokens: what runs and what is counted go by these."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

Groups = tuple[tuple[int, ...], ...]  # all ranks, in groups of equally many, each in ascending order
GroupsOf = Callable[[Sequence[int], int], Groups]  # of the node of each rank, and the number of query heads


class Share(NamedTuple):
    """Heads of one member of a group: query heads, and the key heads that these read."""

    query: slice
    key: slice

    @property
    def queries(self) -> int:
        """How many query heads."""
        return self.query.stop - self.query.start

    @property
    def keys(self) -> int:
        """How many key heads."""
        return self.key.stop - self.key.start

    @property
    def width(self) -> int:
        """Heads of q, k and v together."""
        return self.queries + 2 * self.keys


def shares(heads: int, kv_heads: int, members: int) -> tuple[Share, ...]:
    """Query heads in runs that differ by one at most, the longer first, empty ones last.

    Key heads that are read by several members are given to each of them.
    """
    group = heads // kv_heads
    base, longer = divmod(heads, members)
    ends = [0, *accumulate(base + (member < longer) for member in range(members))]
    return tuple(
        Share(slice(a, b), slice(a // group, (b - 1) // group + 1) if b > a else slice(0, 0))
        for a, b in zip(ends, ends[1:], strict=False)
    )


def alone(nodes: Sequence[int], heads: int) -> Groups:
    """Groups of one rank each: no heads are exchanged."""
    return tuple((rank,) for rank in range(len(nodes)))


def everyone(nodes: Sequence[int], heads: int) -> Groups:
    """One group of all ranks."""
    return (tuple(range(len(nodes))),)
