"""Which tokens of which documents each rank holds, in order."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from lsys.parallel.messages.placement import rank_begins, zigzag_quota
from lsys.parallel.segments import Segment, SegmentTable, offsets, runs

__all__ = ["Segment", "SequenceLayout"]

Derived = TypeVar("Derived")


class SequenceLayout:
    """A partition of packed documents over ranks.

    The T tokens of all documents, concatenated in order, are the *stream*; rank r holds T_r of them, in the order of
    its segments. Every token is on exactly one rank. Documents may be empty, and so may ranks. Segments of length zero
    are dropped and neighbours that continue each other on one rank are merged, so equal placements compare equal.
    Layouts do not change. Index tensors are built once and kept, one copy per device that asks: do not write to them.

    Args:
        lengths: tokens of each document.
        segments: for each rank, its segments in the order in which it holds them: (document, start, length).

    Raises:
        ValueError: a token is held twice or by no rank, or a segment leaves its document.
    """

    def __init__(self, lengths: Iterable[int], segments: Iterable[Iterable[tuple[int, int, int]]]) -> None:
        held = [tuple(rank) for rank in segments]
        lengths = _checked(lengths, len(held))
        rank = [number for number, rank in enumerate(held) for _ in rank]
        columns = [*zip(*(segment for rank in held for segment in rank), strict=True)] or [()] * 3
        table = torch.tensor([rank, *columns], dtype=torch.int64)
        table = table[:, table[3] != 0]
        _check_inside(lengths, table)
        self._lay(lengths, len(held), _merged(table))

    @classmethod
    def _of(cls, lengths: tuple[int, ...], ranks: int, table: Tensor) -> SequenceLayout:
        """From segments that lie inside their documents, none of them empty, no neighbours to be merged."""
        layout = cls.__new__(cls)
        layout._lay(lengths, ranks, table)
        return layout

    def _lay(self, lengths: tuple[int, ...], ranks: int, table: Tensor) -> None:
        """`table`: rank, document, start and length of each segment, the ranks in turn: int64 [4, segments]."""
        self._lengths, self._ranks, self._table = lengths, ranks, table
        _, document, start, length = table.unbind()
        begin, self._stream_order = (self.document_offsets[document] + start).sort()
        end = begin + length[self._stream_order]
        # In the order of the stream, an exact cover starts each segment where the one before it stopped.
        gap = torch.cat([begin, self.document_offsets[-1:]]) - torch.cat([self.document_offsets[:1], end])
        if gap.any():
            first = int(gap.nonzero()[0])
            at = int(end[first - 1]) if first else 0
            at, fault = (at, "held by no rank") if gap[first] > 0 else (int(begin[first]), "held twice")
            document_at = bisect_right(self.document_offsets.tolist(), at) - 1
            position = at - int(self.document_offsets[document_at])
            raise ValueError(f"token {position} of document {document_at} is {fault}; a layout holds each exactly once")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SequenceLayout):
            return NotImplemented
        if self is other:
            return True
        sizes_agree = (self.ranks, self.lengths) == (other.ranks, other.lengths)
        return sizes_agree and torch.equal(self._table, other._table)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        numbers = self._table.flatten()
        return hash((self.lengths, self.ranks, int(numbers @ torch.arange(len(numbers)))))

    def __repr__(self) -> str:
        return f"SequenceLayout(lengths={self.lengths}, segments={self.segments})"

    def __reduce__(self) -> tuple:
        return _restored, (self.lengths, self.ranks, self._table.flatten().tolist())  # without the cached tensors

    # ---- constructors

    @classmethod
    def contiguous(cls, lengths: Iterable[int], ranks: int) -> SequenceLayout:
        """The stream cut in `ranks` runs whose sizes differ by one at most, the longer ones first."""
        lengths = _checked(lengths, ranks)
        documents = _places(lengths)
        begins = torch.tensor(rank_begins(sum(lengths), ranks))
        cuts = torch.cat([documents, begins]).unique()
        begin = cuts[:-1]
        # The document that begins at or before a token; of those that begin together the last, which is not empty.
        document = torch.searchsorted(documents, begin, right=True) - 1
        rank = torch.searchsorted(begins, begin, right=True) - 1
        return cls._of(lengths, ranks, torch.stack([rank, document, begin - documents[document], cuts.diff()]))

    @classmethod
    def zigzag(cls, lengths: Iterable[int], ranks: int) -> SequenceLayout:
        """Each document cut in 2 x ranks chunks of which rank i holds chunks i and 2 x ranks - 1 - i.

        Equalises causal attention within each document (Megatron-core, Transformer Engine, ring-flash-attention)
        without their divisibility rule: of a document at [a, b) of the stream, rank r gets as many tokens as there are
        x in [a, b) with x % ranks == r, split in two halves. Rank totals thus differ by one at most over the pack.
        """
        lengths = _checked(lengths, ranks)
        size, rank = torch.tensor(lengths, dtype=torch.int64)[:, None], torch.arange(ranks)
        begin = size.cumsum(0) - size
        quota = zigzag_quota(size, begin, rank, ranks)  # [documents, ranks]
        second = quota // 2
        second[:, -1] = 0  # the two chunks of the last rank are one
        chunk = torch.stack([quota - second, second.flip(1)], dim=1)  # [documents, 2, ranks], in order of positions
        start = chunk.flatten(1).cumsum(1).view_as(chunk) - chunk
        columns = torch.stack([torch.arange(len(lengths))[:, None, None].expand_as(chunk), start, chunk])
        columns[:, :, 1] = columns[:, :, 1].flip(-1)  # now place r of the second half is that of rank r too
        columns = columns.permute(0, 3, 1, 2).flatten(1)  # [3, documents, 2, ranks] -> [3, ranks * documents * 2]
        table = torch.cat([rank.repeat_interleave(2 * len(lengths))[None], columns])
        return cls._of(lengths, ranks, table[:, table[3] != 0])

    def pooled(self, groups: Sequence[Sequence[int]]) -> SequenceLayout:
        """The layout over groups of ranks: each holds the tokens of its members, in the order of the stream."""

        def build() -> SequenceLayout:
            group = torch.empty(self.ranks, dtype=torch.int64)
            for number, ranks in enumerate(groups):
                group[list(ranks)] = number
            _, document, start, length = self._table[:, self._stream_order]
            table = _merged(torch.stack([group[self._table[0, self._stream_order]], document, start, length]))
            return self._of(self.lengths, len(groups), table[:, table[0].argsort(stable=True)])

        return self.derived(("pooled", tuple(map(tuple, groups))), None, build)

    # ---- sizes

    @property
    def lengths(self) -> tuple[int, ...]:
        """The tokens of each document."""
        return self._lengths

    @property
    def ranks(self) -> int:
        """How many ranks the stream is laid over."""
        return self._ranks

    @cached_property
    def total(self) -> int:
        """T, the tokens of all documents."""
        return sum(self.lengths)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """T_r of every rank."""
        return tuple(offsets(self._table[3])[self._bounds].diff().tolist())

    def tokens(self, rank: int) -> int:
        """T_r, the tokens of one rank."""
        return self.sizes[self._rank(rank)]

    @cached_property
    def document_offsets(self) -> Tensor:
        """Where each document begins in the stream, then T: int64 [documents + 1]."""
        return _places(self.lengths)

    # ---- segments

    @cached_property
    def segments(self) -> tuple[tuple[Segment, ...], ...]:
        """The segments of every rank, in the order in which it holds them. Made when first wanted: `table` is faster."""
        every = tuple(map(Segment, *self._table[1:].tolist()))
        return tuple(every[first:stop] for first, stop in pairwise(self._bounds.tolist()))

    def table(self, rank: int | None = None) -> SegmentTable:
        """The segments of a rank, in the order in which it holds them; of all ranks in turn for None."""

        def build() -> SegmentTable:
            if rank is None:
                return self._columns()
            return self.table().take(slice(*self._bounds[self._rank(rank) : rank + 2].tolist()))

        return self.derived(("table", rank), None, build)

    def sorted(self, rank: int | None = None) -> SegmentTable:
        """As `table`, but in the order of the stream."""

        def build() -> SegmentTable:
            held = self.table(rank)
            return held.take(self._stream_order if rank is None else held.begin.argsort())

        return self.derived(("sorted", rank), None, build)

    def _columns(self) -> SegmentTable:
        rank, document, start, length = self._table.unbind()
        rows = offsets(length)  # of all ranks in turn
        row = rows[:-1] - rows[self._bounds][rank]
        return SegmentTable(rank, document, start, length, self.document_offsets[document] + start, row)

    @cached_property
    def _bounds(self) -> Tensor:
        """Number of the first segment of each rank, then of segments: int64 [ranks + 1]."""
        return torch.searchsorted(self._table[0], torch.arange(self.ranks + 1))

    # ---- index tensors

    def index(self, rank: int, device: torch.device | str | None = None) -> Tensor:
        """Place in the stream of each token of the rank: int64 [T_r]."""
        return self._of_rank("index", rank, device, lambda held: runs(held.begin, held.length))

    def positions(self, rank: int, device: torch.device | str | None = None) -> Tensor:
        """Position in its document of each token of the rank: int64 [T_r]."""
        return self._of_rank("positions", rank, device, lambda held: runs(held.start, held.length))

    def documents(self, rank: int, device: torch.device | str | None = None) -> Tensor:
        """Document of each token of the rank: int64 [T_r]."""
        return self._of_rank("documents", rank, device, lambda held: held.document.repeat_interleave(held.length))

    def cu_seqlens(self, rank: int, device: torch.device | str | None = None) -> Tensor:
        """Where each segment of the rank begins among its tokens, then T_r: int64 [segments + 1]."""
        return self._of_rank("cu_seqlens", rank, device, lambda held: offsets(held.length))

    def order(self, device: torch.device | str | None = None) -> Tensor:
        """Stream place of each row when the ranks' tokens are concatenated in rank order: int64 [T]."""
        return self.derived("order", device, lambda: runs(self.table().begin, self.table().length))

    def inverse(self, device: torch.device | str | None = None) -> Tensor:
        """Row of each stream token when the ranks' tokens are concatenated in rank order: int64 [T]."""

        def build() -> Tensor:
            return torch.empty(self.total, dtype=torch.int64).scatter_(0, self.order(), torch.arange(self.total))

        return self.derived("inverse", device, build)

    def derived(self, name: Hashable, device: torch.device | str | None, build: Callable[[], Derived]) -> Derived:
        """What depends on this layout alone: built on the host when first wanted, then kept as `name`.

        A tensor, or whatever else has a method `to(device)`.
        """
        device = torch.device(device or "cpu")
        if (name, device) not in self._derived:
            on_host: Any = build() if device.type == "cpu" else self.derived(name, None, build)
            self._derived[name, device] = on_host if device.type == "cpu" else on_host.to(device)
        return self._derived[name, device]

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

    def _of_rank(
        self, name: str, rank: int, device: torch.device | str | None, build: Callable[[SegmentTable], Tensor]
    ) -> Tensor:
        return self.derived((name, rank), device, lambda: build(self.table(self._rank(rank))))

    @cached_property
    def _derived(self) -> dict[Hashable, Any]:
        return {}


def _checked(lengths: Iterable[int], ranks: int) -> tuple[int, ...]:
    if ranks < 1:
        raise ValueError(f"a layout needs at least one rank; got {ranks}")
    lengths = tuple(map(int, lengths))
    if min(lengths, default=0) < 0:
        document = next(d for d, length in enumerate(lengths) if length < 0)
        raise ValueError(f"document {document} has length {lengths[document]}; lengths are 0 or more")
    return lengths


def _places(lengths: Sequence[int]) -> Tensor:
    """Where each document begins in the stream, then T: int64 [documents + 1]."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int64)


def _check_inside(lengths: tuple[int, ...], table: Tensor) -> None:
    _, document, start, length = table
    sizes = torch.tensor(lengths or (0,), dtype=torch.int64)
    wrong = (document < 0) | (document >= len(lengths)) | (start < 0) | (length < 0)
    wrong |= start > sizes[document.clamp(0, len(sizes) - 1)] - length
    if wrong.any():
        segment = Segment(*table[1:, int(wrong.nonzero()[0])].tolist())
        raise ValueError(f"{segment} is outside its document; lengths are {lengths}")


def _merged(table: Tensor) -> Tensor:
    """[4, segments] with neighbours that continue each other as one."""
    rank, document, start, length = table
    is_first = torch.ones_like(rank, dtype=torch.bool)
    is_first[1:] = (rank[1:] != rank[:-1]) | (document[1:] != document[:-1]) | (start[1:] != (start + length)[:-1])
    first = is_first.nonzero().squeeze(1)
    rows = offsets(length)
    return torch.cat([table[:3, first], torch.cat([rows[first], rows[-1:]]).diff()[None]])


def _restored(lengths: tuple[int, ...], ranks: int, numbers: list[int]) -> SequenceLayout:
    return SequenceLayout._of(lengths, ranks, torch.tensor(numbers, dtype=torch.int64).reshape(4, -1))
