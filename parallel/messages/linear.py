"""What a layer with a state is to those who count what it sends, and the halo of a short convolution."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from lsys.parallel.messages.placement import Phases, Placement

DECAYS = ("none", "head", "token", "channel")


@dataclass(frozen=True)
class Shape:
    """Sizes of one layer's linear attention on one rank (of tensor parallelism).

    Attributes:
        heads, key_heads, key_width, value_width: H, H_k, K, V.
        decay: one of DECAYS: of what there is a log-decay each.
        delta: whether it has the delta rule.
        itemsize: bytes of an element of q, k, v and o. States, log-decays and betas are in fp32 (fp64 for fp64).
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
        """Bytes of an element of a state."""
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


def chains(place: Placement) -> list[list[int]]:
    """By document, the ranks of its runs: longest stretches that one rank holds."""
    found: list[list[int]] = []
    document = None
    for part in place.parts:
        if part.document != document:
            found.append([part.rank])
            document = part.document
        elif found[-1][-1] != part.rank:
            found[-1].append(part.rank)
    return found


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
