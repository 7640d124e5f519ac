"""Which rank holds which part of which document, as `lsys.parallel.layout.SequenceLayout` lays them, without torch."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

from lsys.kernels.mask import Mask

Phase = list[tuple[int, int, int]]  # messages under way together: source, destination, bytes


class Phases(NamedTuple):
    """The messages of one layer, forward and backward, in the phases that follow one another."""

    forward: list[Phase]
    backward: list[Phase]


class Part(NamedTuple):
    """Tokens [begin, end) of the stream, all of one document, on one rank."""

    rank: int
    document: int
    begin: int
    end: int

    @property
    def length(self) -> int:
        return self.end - self.begin


class Seen(NamedTuple):
    """The parts of a document, and by document those that see it, where they stand for it; each in order of positions."""

    parts: tuple[Part, ...]
    readers: tuple[tuple[Part, ...], ...]


@dataclass(frozen=True)
class Placement:
    """Parts in the order of the stream; none is empty."""

    lengths: tuple[int, ...]
    ranks: int
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, kind: str, lengths: Iterable[int], ranks: int) -> Placement:
        """kind: "contiguous" or "zigzag", as SequenceLayout's constructors of these names."""
        lengths = tuple(lengths)
        make = {"contiguous": _contiguous, "zigzag": _zigzag}[kind]
        return cls(lengths, ranks, tuple(part for part in make(lengths, ranks) if part.length))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Tokens of each rank."""
        sizes = [0] * self.ranks
        for part in self.parts:
            sizes[part.rank] += part.length
        return tuple(sizes)

    @cached_property
    def places(self) -> tuple[int, ...]:
        """Where each document begins in the stream, then how many tokens there are."""
        return (0, *accumulate(self.lengths))

    @cached_property
    def documents(self) -> tuple[tuple[Part, ...], ...]:
        """The parts of each document that several ranks hold, in order of positions."""
        found: dict[int, list[Part]] = {}
        for part in self.parts:
            found.setdefault(part.document, []).append(part)
        return tuple(tuple(parts) for parts in found.values() if len({part.rank for part in parts}) > 1)

    def crossing(self, mask: Mask) -> list[Seen]:
        """Documents of which, with those that see them, several ranks hold tokens."""
        if mask.is_own:
            return [Seen(parts, (parts,)) for parts in self.documents]
        parts: list[list[Part]] = [[] for _ in self.lengths]
        for part in self.parts:
            parts[part.document].append(part)
        readers: list[list[tuple[Part, ...]]] = [[] for _ in self.lengths]
        for document, reader, distance in mask.sights(self.lengths):
            ahead = self.places[reader] - distance - self.places[document]  # farther than its document sees it
            readers[document].append(
                tuple(part._replace(begin=part.begin - ahead, end=part.end - ahead) for part in parts[reader])
            )
        every = [Seen(tuple(held), tuple(seen)) for held, seen in zip(parts, readers, strict=True)]
        return [one for one in every if len({part.rank for some in (one.parts, *one.readers) for part in some}) > 1]

    def pooled(self, groups: Sequence[Sequence[int]]) -> Placement:
        """Over groups of ranks: each holds its members' tokens; neighbours in the stream become one part."""
        group_of = {rank: number for number, group in enumerate(groups) for rank in group}
        merged: list[Part] = []
        for part in self.parts:
            part = part._replace(rank=group_of[part.rank])
            if merged and merged[-1][:2] == part[:2] and merged[-1].end == part.begin:
                part = merged.pop()._replace(end=part.end)
            merged.append(part)
        return Placement(self.lengths, len(groups), tuple(merged))


# ---- the rules by which documents are laid, which `SequenceLayout` applies to columns


def rank_begins(total: int, ranks: int) -> list[int]:
    """Where each rank's run of a contiguous stream begins: sizes differ by one at most, the longer ones first."""
    base, longer = divmod(total, ranks)
    return [base * rank + min(rank, longer) for rank in range(ranks)]


def zigzag_quota(length: Any, begin: Any, rank: Any, ranks: int) -> Any:
    """Tokens that a rank gets of a document at this place of the stream: integers, or tensors of them.

    Of the last length % ranks tokens, the first is for rank begin % ranks, and so on in a cycle.
    """
    return length // ranks + ((rank - begin) % ranks < length % ranks)


def _contiguous(lengths: Sequence[int], ranks: int) -> Iterator[Part]:
    places = [0, *accumulate(lengths)]
    begins = rank_begins(places[-1], ranks)
    cuts = sorted({*places, *begins})
    for begin, end in zip(cuts, cuts[1:], strict=False):
        yield Part(bisect_right(begins, begin) - 1, bisect_right(places, begin) - 1, begin, end)


def _zigzag(lengths: Sequence[int], ranks: int) -> Iterator[Part]:
    begin = 0
    for document, length in enumerate(lengths):
        quota = [zigzag_quota(length, begin, rank, ranks) for rank in range(ranks)]
        second = [tokens // 2 for tokens in quota[:-1]] + [0]
        chunks = [(rank, quota[rank] - second[rank]) for rank in range(ranks)]
        chunks += [(rank, second[rank]) for rank in reversed(range(ranks))]
        for rank, tokens in chunks:
            yield Part(rank, document, begin, begin + tokens)
            begin += tokens


# ---- collectives


def is_uneven(sizes: Sequence[int]) -> bool:
    """Whether padding all to the largest adds more than a quarter."""
    return len(sizes) * max(sizes) > 1.25 * sum(sizes)


def pairs_of(ranks: int) -> list[tuple[int, int]]:
    """All (source, destination)."""
    return [(i, j) for i in range(ranks) for j in range(ranks) if i != j]


def around(each: int, ranks: int) -> list[Phase]:
    """A collective around the ring in which every rank sends its neighbour so many bytes; no phase without any."""
    return [[(rank, (rank + 1) % ranks, each) for rank in range(ranks)]] if each else []
