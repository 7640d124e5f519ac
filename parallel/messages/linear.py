"""What one layer with a state sends by each method, and the halo of a short convolution. Formulas: `lsys.parallel.linear.cost`."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from lsys.parallel.messages.attention import shares
from lsys.parallel.messages.placement import Phase, Phases, Placement, around, pairs_of

METHODS = ("lasp1", "lasp2", "zeco", "ulysses")
DECAYS = ("none", "head", "token", "channel")

# What a link moves in the time that a message takes whatever its size: 25 GB/s for 10 us.
LATENCY_BYTES = 1 << 18


@dataclass(frozen=True)
class Shape:
    """Of one layer's linear attention on one rank (of tensor parallelism).

    Attributes:
        heads, key_heads, key_width, value_width: H, H_k, K, V.
        decay: one of DECAYS: of what there is a log-decay each.
        delta: whether it has the delta rule.
        itemsize: bytes of a number of q, k, v and o. States, log-decays and betas are in fp32 (fp64 for fp64).
    """

    heads: int
    key_heads: int
    key_width: int
    value_width: int
    decay: str = "head"
    delta: bool = False
    itemsize: int = 2

    def __post_init__(self) -> None:
        if self.decay not in DECAYS:
            raise ValueError(f"decay {self.decay!r} is not one of: {', '.join(DECAYS)}")

    @property
    def wide(self) -> int:
        """Bytes of a number of a state."""
        return max(4, self.itemsize)

    @property
    def state(self) -> int:
        """Bytes of a state, S."""
        return self.heads * self.key_width * self.value_width * self.wide

    @property
    def transition(self) -> int:
        """Bytes of the transition over a run that travels beside its state; those of fixed decays follow from lengths."""
        numbers = {"token": 1, "channel": self.key_width}.get(self.decay, 0)
        return self.heads * (self.key_width**2 if self.delta else numbers) * self.wide

    def token(self, heads: int, keys: int) -> int:
        """Bytes of what one token needs for so many heads and key heads."""
        gates = {"token": 1, "channel": self.key_width}.get(self.decay, 0) + self.delta
        each = self.value_width * self.itemsize + gates * self.wide
        return 2 * keys * self.key_width * self.itemsize + heads * each


def phases(method: str, place: Placement, shape: Shape) -> Phases:
    """The messages of one causal layer without initial or final states."""
    if place.ranks == 1:
        return Phases([], [])
    if method == "ulysses":
        return _heads(place, shape)
    if method == "lasp2":
        counts = [0] * place.ranks
        for chain in chains(place):
            for rank in chain if len(chain) > 1 else ():
                counts[rank] += 1
        most = (place.ranks - 1) * max(counts)
        forward = around(most * (shape.state + shape.transition), place.ranks)
        return Phases(forward, around(most * shape.state, place.ranks))
    blocks = block_count(place, shape) if method == "zeco" else 1
    return Phases(*(_chained(place, shape, blocks, reverse) for reverse in (False, True)))


def chains(place: Placement) -> list[list[int]]:
    """Of each document the ranks of its runs: longest stretches that one rank holds."""
    found: list[list[int]] = []
    document = None
    for part in place.parts:
        if part.document != document:
            found.append([part.rank])
            document = part.document
        elif found[-1][-1] != part.rank:
            found[-1].append(part.rank)
    return found


def block_count(place: Placement, shape: Shape) -> int:
    """The blocks of ZeCO's states (`lsys.parallel.linear.chain.block_count`)."""
    steps = max((len(chain) for chain in chains(place)), default=0) - 2
    return min(shape.value_width, max(1, round(math.sqrt(max(0, steps) * shape.state / LATENCY_BYTES))))


def _chained(place: Placement, shape: Shape, blocks: int, reverse: bool) -> list[Phase]:
    """Block j of the state after run p goes at step p + j; gradients go back."""
    base, wider = divmod(shape.value_width, blocks)
    column = shape.state // shape.value_width
    steps: dict[int, dict[tuple[int, int, int], int]] = defaultdict(lambda: defaultdict(int))
    for chain in chains(place):
        ranks = chain[::-1] if reverse else chain
        for place_, ends in enumerate(zip(ranks, ranks[1:], strict=False)):
            for block in range(blocks):
                steps[place_ + block][(*ends, block)] += column * (base + (block < wider))
    return [[(i, j, size) for (i, j, _), size in sent.items()] for _, sent in sorted(steps.items())]


def _heads(place: Placement, shape: Shape) -> Phases:
    split, sizes, pairs = shares(shape.heads, shape.key_heads, place.ranks), place.sizes, pairs_of(place.ranks)
    inputs = [shape.token(*share) for share in split]
    outputs = [heads * shape.value_width * shape.itemsize for heads, _ in split]
    before = [(i, j, sizes[i] * inputs[j]) for i, j in pairs]
    after = [(i, j, sizes[j] * outputs[i]) for i, j in pairs]
    d_after = [(i, j, sizes[i] * outputs[j]) for i, j in pairs]
    d_before = [(i, j, sizes[j] * inputs[i]) for i, j in pairs]
    return Phases([before, after], [d_after, d_before])


def halo(place: Placement, reach: int, row: int, wide_row: int) -> Phases:
    """The last `reach` tokens before each segment, from their owners; their gradients back (`lsys.parallel.halo`).

    Args:
        row, wide_row: bytes of a token, of its gradient (fp32 at least).
    """
    lacking: dict[int, set[int]] = defaultdict(set)  # by rank, places in the stream
    owner: dict[int, int] = {}
    for number, part in enumerate(place.parts):
        first, before = max(place.places[part.document], part.begin - reach), number
        while before and place.parts[before - 1].end > first:
            before -= 1
            other = place.parts[before]
            if other.rank != part.rank:
                held = range(max(first, other.begin), other.end)
                lacking[part.rank].update(held)
                owner.update(dict.fromkeys(held, other.rank))
    tokens: dict[tuple[int, int], int] = defaultdict(int)
    for rank, places in lacking.items():
        for at in places:
            tokens[owner[at], rank] += 1
    if not tokens:
        return Phases([], [])
    return Phases(
        [[(i, j, n * row) for (i, j), n in tokens.items()]], [[(j, i, n * wide_row) for (i, j), n in tokens.items()]]
    )


def imbalance(heads: int, key_heads: int, ranks: int) -> float:
    """Most heads of a rank over the mean, of heads shared out over ranks."""
    given: Sequence[int] = [share for share, _ in shares(heads, key_heads, ranks)]
    return max(given) * ranks / heads
