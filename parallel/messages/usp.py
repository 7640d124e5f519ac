"""The 2-D factorisation of USP (Fang and Zhao, 2024): heads are exchanged inside a node, blocks move between groups."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from math import gcd

from lsys.parallel.messages.heads import Groups


def groups(node_of_rank: Sequence[int], heads: int, inner: int | None = None) -> Groups:
    """The ranks in groups inside which heads are exchanged; a ring passes through the groups.

    Args:
        node_of_rank: node of each rank.
        heads: query heads.
        inner: ranks of a group; it must divide the ranks of every node. Default: the largest number that does, and
            divides the heads, so that all ranks compute equally: the ring then crosses nodes, and goes on inside a node
            only if the heads do not suffice.

    Raises:
        ValueError: `inner` does not divide the ranks of every node.
    """
    nodes: dict[int, list[int]] = defaultdict(list)
    for rank, node in enumerate(node_of_rank):
        nodes[node].append(rank)
    common = gcd(*map(len, nodes.values()))
    divisors = [n for n in range(1, common + 1) if common % n == 0]
    if inner is None:
        inner = max(n for n in divisors if heads % n == 0)
    elif inner not in divisors:
        filled = sorted({len(ranks) for ranks in nodes.values()})
        choices = ", ".join(map(str, divisors))
        raise ValueError(f"groups of {inner} ranks do not fill nodes of {filled} ranks; groups can be of {choices}")
    return tuple(
        tuple(ranks[start : start + inner]) for ranks in nodes.values() for start in range(0, len(ranks), inner)
    )
