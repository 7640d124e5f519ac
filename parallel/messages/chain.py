"""What states passed along chains send: LASP-1 and ZeCO, the count of `lsys.parallel.linear.chain`.

Of one document cut in W stretches each rank receives a state forward, and again backward, the first nothing (backward the
last): in W - 1 steps, or W - 2 + blocks.
"""

from __future__ import annotations

import math
from collections import defaultdict

from lsys.parallel.messages.linear import Shape, chains
from lsys.parallel.messages.placement import Phase, Phases, Placement

# What a link moves in the time that a message takes whatever its size: 25 GB/s for 10 us.
LATENCY_BYTES = 1 << 18


def lasp1(place: Placement, shape: Shape) -> Phases:
    """The messages of one causal layer, whole states."""
    return _phases(place, shape, 1)


def zeco(place: Placement, shape: Shape) -> Phases:
    """The messages of one causal layer, states in blocks."""
    longest = max(map(len, chains(place)), default=0)
    return _phases(place, shape, block_count(longest, shape.state, shape.value_width))


def block_count(longest: int, state: int, width: int) -> int:
    """The blocks of ZeCO's states of so many bytes and value columns: alike on all ranks.

    A chain of W runs and K blocks takes W - 2 + K steps of latency + S / (K bandwidth): the least time is at
    K^2 = (W - 2) S / (latency bandwidth), of the longest chain. A block has a value column at least.
    """
    return min(width, max(1, round(math.sqrt(max(0, longest - 2) * state / LATENCY_BYTES))))


def columns(width: int, blocks: int) -> list[slice]:
    """The value columns of each block: their widths differ by one at most, the wider ones first."""
    base, wider = divmod(width, blocks)
    ends = [base * j + min(j, wider) for j in range(blocks + 1)]
    return [slice(a, b) for a, b in zip(ends, ends[1:], strict=False)]


def _phases(place: Placement, shape: Shape, blocks: int) -> Phases:
    if place.ranks == 1:
        return Phases([], [])
    return Phases(*(_chained(place, shape, blocks, reverse) for reverse in (False, True)))


def _chained(place: Placement, shape: Shape, blocks: int, reverse: bool) -> list[Phase]:
    """Block j of the state after run p goes at step p + j; gradients go back."""
    widths = [cut.stop - cut.start for cut in columns(shape.value_width, blocks)]
    column = shape.state // shape.value_width
    steps: dict[int, dict[tuple[int, int, int], int]] = defaultdict(lambda: defaultdict(int))
    for chain in chains(place):
        ranks = chain[::-1] if reverse else chain
        for place_, ends in enumerate(zip(ranks, ranks[1:], strict=False)):
            for block, width in enumerate(widths):
                steps[place_ + block][(*ends, block)] += column * width
    return [[(i, j, size) for (i, j, _), size in sent.items()] for _, sent in sorted(steps.items())]
