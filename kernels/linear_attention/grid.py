"""Packed segments cut in chunks: the shape of every chunked computation."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

CHUNKS = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Chain:
    """Rows that follow one another: row r of a group continues row r - 1 of the same group.

    Attributes:
        sizes: rows of each group; rows of a group are adjacent.
    """

    sizes: tuple[int, ...]

    @property
    def rows(self) -> int:
        return sum(self.sizes)

    @cached_property
    def group(self) -> Tensor:
        """Group of each row, int64 [rows]."""
        return torch.repeat_interleave(torch.arange(len(self.sizes)), torch.tensor(self.sizes, dtype=torch.int64))

    @cached_property
    def steps(self) -> list[Tensor]:
        """Rows at place 0, 1, ... of their groups: what can be computed at once."""
        sizes = torch.tensor(self.sizes, dtype=torch.int64)
        first = sizes.cumsum(0) - sizes
        return [(first + place)[sizes > place] for place in range(max(self.sizes, default=0))]

    @cached_property
    def last(self) -> tuple[Tensor, Tensor]:
        """(groups that have rows, the last row of each)."""
        sizes = torch.tensor(self.sizes, dtype=torch.int64)
        filled = (sizes > 0).nonzero()[:, 0]
        return filled, (sizes.cumsum(0) - 1)[filled]


@dataclass(frozen=True)
class ChunkGrid:
    """Segments of the given lengths, each cut in chunks of `size` tokens; the last chunk of a segment may be short and is padded.

    As in flash-linear-attention, a chunk never holds tokens of two segments.
    """

    lengths: tuple[int, ...]
    size: int

    @cached_property
    def chain(self) -> Chain:
        return Chain(tuple(-(-length // self.size) for length in self.lengths))

    @property
    def chunks(self) -> int:
        return self.chain.rows

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @cached_property
    def filled(self) -> Tensor:
        """Tokens of each chunk, int64 [chunks]."""
        place = (
            torch.cat([torch.arange(size) for size in self.chain.sizes])
            if self.lengths
            else torch.zeros(0, dtype=torch.int64)
        )
        return (torch.tensor(self.lengths, dtype=torch.int64)[self.chain.group] - place * self.size).clamp(
            max=self.size
        )

    @cached_property
    def rows(self) -> Tensor | None:
        """Where each token lies among the chunks * size places, int64 [T]; None if that is where it is already."""
        if self.tokens == self.chunks * self.size:
            return None
        start = torch.arange(self.chunks) * self.size
        first = self.filled.cumsum(0) - self.filled
        return torch.repeat_interleave(start - first, self.filled) + torch.arange(self.tokens)

    def spread(self, x: Tensor) -> Tensor:
        """[T, ...] -> [chunks, size, ...], zeros in the padding. Differentiable."""
        if self.rows is not None:
            x = _Place.apply(x, self.rows.to(x.device), self.chunks * self.size)
        return x.view(self.chunks, self.size, *x.shape[1:])

    def collect(self, x: Tensor) -> Tensor:
        """[chunks, size, ...] -> [T, ...]. Differentiable."""
        x = x.reshape(self.chunks * self.size, *x.shape[2:])
        return x if self.rows is None else _Take.apply(x, self.rows.to(x.device))


class _Place(torch.autograd.Function):
    """Rows of x at distinct places of a larger tensor of zeros; the adjoint of _Take."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(rows)
        return x.new_zeros(count, *x.shape[1:]).index_copy_(0, rows, x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _Take.apply(gradient, ctx.saved_tensors[0]), None, None


class _Take(torch.autograd.Function):
    """Rows of x at distinct places."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.count = len(x)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Place.apply(gradient, ctx.saved_tensors[0], ctx.count), None


@lru_cache(maxsize=64)
def chunk_grid(lengths: Sequence[int], key_width: int, value_width: int, size: int | None = None) -> ChunkGrid:
    """The grid with the least work: a large chunk wastes padding and scores, a small one states.

    Per padded token of a head: size * (K + V) multiplications inside the chunk and 2 K V with states; per chunk, its state is read and written often.
    """
    lengths = tuple(lengths)

    def work(chunk: int) -> int:
        chunks = sum(-(-length // chunk) for length in lengths)
        states = key_width * value_width
        return chunks * (chunk * (chunk * (key_width + value_width) + 2 * states) + 128 * states)

    return ChunkGrid(lengths, size or min(CHUNKS, key=work))
