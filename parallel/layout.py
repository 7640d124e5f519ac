"""Which tokens of which documents each rank holds, in order."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor


class Segment(NamedTuple):
    """Tokens [start, start + length) of one document."""

    document: int
    start: int
    length: int

    @property
    def stop(self) -> int:
        """One past the last position of the segment in its document."""
        return self.start + self.length


@dataclass(frozen=True)
class SequenceLayout:
    """A partition of packed documents over ranks.

    The T tokens of all documents, concatenated in order, are the *stream*; rank r holds T_r of them, in the order of
    its segments. Every token is on exactly one rank. Documents may be empty, and so may ranks. Segments of length zero
    are dropped and neighbours that continue each other on one rank are merged, so equal placements compare equal.
    Index tensors are built once and kept, one copy per device that asks: do not write to them.

    Args:
        lengths: tokens of each document.
        segments: for each rank, its segments in the order in which it holds them.

    Raises:
        ValueError: a token is held twice or by no rank, or a segment leaves its document.
    """

    lengths: tuple[int, ...]
    segments: tuple[tuple[Segment, ...], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "segments", tuple(_merged(rank) for rank in self.segments))
        object.__setattr__(self, "lengths", _checked(self.lengths, self.ranks))
        self._check_partition()

    def _check_partition(self) -> None:
        rows = [segment for rank in self.segments for segment in rank]
        table = torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)
        document, start, length = table.unbind(1)
        wrong = (document < 0) | (document >= len(self.lengths)) | (start < 0) | (length < 0)
        if not wrong.any():
            wrong = start + length > torch.tensor(self.lengths or (0,), dtype=torch.int64)[document]
        if wrong.any():
            raise ValueError(f"{rows[int(wrong.nonzero()[0])]} is outside its document; lengths are {self.lengths}")
        begin = self.document_offsets[document] + start
        begin, order = begin.sort()
        end = begin + length[order]
        edge = torch.tensor([self.total])
        # Sorted by begin, an exact cover starts each segment where the one before it stopped.
        gap = torch.cat([begin, edge]) - torch.cat([edge * 0, end])
        if gap.any():
            first = int(gap.nonzero()[0])
            at = int(end[first - 1]) if first else 0
            at, fault = (at, "held by no rank") if gap[first] > 0 else (int(begin[first]), "held twice")
            document_at = bisect_right(self.document_offsets.tolist(), at) - 1
            position = at - int(self.document_offsets[document_at])
            raise ValueError(f"token {position} of document {document_at} is {fault}; a layout holds each exactly once")

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.lengths, self.segments))

    def __reduce__(self) -> tuple:
        return SequenceLayout, (self.lengths, self.segments)  # without the cached tensors

    # ---- constructors

    @classmethod
    def contiguous(cls, lengths: Iterable[int], ranks: int) -> SequenceLayout:
        """The stream cut in `ranks` runs whose sizes differ by one at most, the longer ones first."""
        lengths = _checked(lengths, ranks)
        base, longer = divmod(sum(lengths), ranks)
        placed: list[list[Segment]] = [[] for _ in range(ranks)]
        rank, room = 0, base + (longer > 0)
        for document, length in enumerate(lengths):
            start = 0
            while start < length:
                if room == 0:
                    rank += 1
                    room = base + (rank < longer)
                    continue
                take = min(room, length - start)
                placed[rank].append(Segment(document, start, take))
                start, room = start + take, room - take
        return cls(lengths, tuple(map(tuple, placed)))

    @classmethod
    def zigzag(cls, lengths: Iterable[int], ranks: int) -> SequenceLayout:
        """Each document cut in 2 x ranks chunks of which rank i holds chunks i and 2 x ranks - 1 - i.

        Equalises causal attention within each document (Megatron-core, Transformer Engine, ring-flash-attention)
        without their divisibility rule: of a document at [a, b) of the stream, rank r gets as many tokens as there are
        x in [a, b) with x % ranks == r, split in two halves. Rank totals thus differ by one at most over the pack.
        """
        lengths = _checked(lengths, ranks)
        placed: list[list[Segment]] = [[] for _ in range(ranks)]
        begin = 0
        for document, length in enumerate(lengths):
            # Ranks with a quota: all of them, or those of the few tokens of a short document.
            present = sorted({x % ranks for x in range(begin, begin + min(length, ranks))})
            quota = {r: _multiples(begin + length - r, ranks) - _multiples(begin - r, ranks) for r in present}
            chunks = [(r, (quota[r] + 1) // 2) for r in present] + [(r, quota[r] // 2) for r in reversed(present)]
            start = 0
            for rank, size in chunks:
                placed[rank].append(Segment(document, start, size))
                start += size
            begin += length
        return cls(lengths, tuple(map(tuple, placed)))

    # ---- sizes

    @property
    def ranks(self) -> int:
        """How many ranks the stream is laid over."""
        return len(self.segments)

    @cached_property
    def total(self) -> int:
        """T, the tokens of all documents."""
        return sum(self.lengths)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """T_r of every rank."""
        return tuple(sum(segment.length for segment in rank) for rank in self.segments)

    def tokens(self, rank: int) -> int:
        """T_r, the tokens of one rank."""
        return self.sizes[self._rank(rank)]

    @cached_property
    def document_offsets(self) -> Tensor:
        """Where each document begins in the stream, then T: int64 [documents + 1]."""
        return torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int64)

    # ---- index tensors

    def index(self, rank: int, device: torch.device | str | None = None) -> Tensor:
        """Place in the stream of each token of the rank: int64 [T_r]."""

        def build() -> Tensor:
            return self.document_offsets[self.documents(rank)] + self.positions(rank)

        return self.derived(("index", self._rank(rank)), device, build)

    def positions(self, rank: int, device: torch.device | str | None = None) -> Tensor:
        """Position in its document of each token of the rank: int64 [T_r]."""

        def build() -> Tensor:
            _, start, length = self._columns(rank)
            first = start - (length.cumsum(0) - length)
            return torch.repeat_interleave(first, length) + torch.arange(self.tokens(rank))

        return self.derived(("positions", self._rank(rank)), device, build)

    def documents(self, rank: int, device: torch.device | str | None = None) -> Tensor:
        """Document of each token of the rank: int64 [T_r]."""

        def build() -> Tensor:
            document, _, length = self._columns(rank)
            return torch.repeat_interleave(document, length)

        return self.derived(("documents", self._rank(rank)), device, build)

    def cu_seqlens(self, rank: int, device: torch.device | str | None = None) -> Tensor:
        """Where each segment of the rank begins among its tokens, then T_r: int64 [segments + 1]."""

        def build() -> Tensor:
            return torch.nn.functional.pad(self._columns(rank)[2].cumsum(0), (1, 0))

        return self.derived(("cu_seqlens", self._rank(rank)), device, build)

    def order(self, device: torch.device | str | None = None) -> Tensor:
        """Stream place of each row when the ranks' tokens are concatenated in rank order: int64 [T]."""
        return self.derived("order", device, lambda: torch.cat([self.index(rank) for rank in range(self.ranks)]))

    def inverse(self, device: torch.device | str | None = None) -> Tensor:
        """Row of each stream token when the ranks' tokens are concatenated in rank order: int64 [T]."""

        def build() -> Tensor:
            return torch.empty(self.total, dtype=torch.int64).scatter_(0, self.order(), torch.arange(self.total))

        return self.derived("inverse", device, build)

    def derived(self, name: Hashable, device: torch.device | str | None, build: Callable[[], Tensor]) -> Tensor:
        """A tensor that depends on this layout alone: built on the host when first wanted, then kept as `name`."""
        device = torch.device(device or "cpu")
        if (name, device) not in self._tensors:
            on_host = device.type == "cpu"
            self._tensors[name, device] = build() if on_host else self.derived(name, None, build).to(device)
        return self._tensors[name, device]

    # ---- moving tensors

    def shard(self, x: Tensor, rank: int) -> Tensor:
        """The rank's rows of a stream tensor: [T, ...] -> [T_r, ...]. Differentiable."""
        if x.dim() == 0 or x.shape[0] != self.total:
            raise ValueError(f"shard takes [T, ...] with T = {self.total}, the layout's tokens; got {[*x.shape]}")
        return x.index_select(0, self.index(rank, x.device))

    def unshard(self, parts: Sequence[Tensor]) -> Tensor:
        """The stream tensor of all ranks' rows: `ranks` tensors [T_r, ...] -> [T, ...]. Differentiable."""
        if len(parts) != self.ranks:
            raise ValueError(f"unshard takes one part for each of {self.ranks} ranks; got {len(parts)}")
        for rank, part in enumerate(parts):
            if part.dim() == 0 or part.shape[0] != self.sizes[rank] or part.shape[1:] != parts[0].shape[1:]:
                wanted = [self.sizes[rank], *parts[0].shape[1:]]
                raise ValueError(f"part {rank} has shape {[*part.shape]}; the layout and part 0 make it {wanted}")
        return torch.cat(list(parts)).index_select(0, self.inverse(parts[0].device))  # [T, ...] rank order -> stream

    # ---- internals

    def _rank(self, rank: int) -> int:
        if not 0 <= rank < self.ranks:
            raise ValueError(f"rank {rank} is not in this layout; its ranks are 0 to {self.ranks - 1}")
        return rank

    def _columns(self, rank: int) -> tuple[Tensor, ...]:
        return torch.tensor(self.segments[rank], dtype=torch.int64).reshape(-1, 3).unbind(1)

    @cached_property
    def _tensors(self) -> dict[Hashable, Tensor]:
        return {}


def _multiples(n: int, ranks: int) -> int:
    """How many multiples of `ranks` are below n, up to a constant: differences count them in an interval."""
    return -(-n // ranks)


def _checked(lengths: Iterable[int], ranks: int) -> tuple[int, ...]:
    if ranks < 1:
        raise ValueError(f"a layout needs at least one rank; got {ranks}")
    lengths = tuple(int(n) for n in lengths)
    for document, length in enumerate(lengths):
        if length < 0:
            raise ValueError(f"document {document} has length {length}; lengths are 0 or more")
    return lengths


def _merged(segments: Iterable[tuple[int, int, int]]) -> tuple[Segment, ...]:
    merged: list[Segment] = []
    for document, start, length in segments:
        if length == 0:
            continue
        last = merged[-1] if merged else None
        if last and last.document == document and last.stop == start:
            merged[-1] = Segment(document, last.start, last.length + int(length))
        else:
            merged.append(Segment(int(document), int(start), int(length)))
    return tuple(merged)
