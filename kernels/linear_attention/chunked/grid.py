"""How packed segments are cut in chunks: every chunk lies in one segment, whose last chunk may be partial."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lsys.kernels.linear_attention.scan import ScanPlan

SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class ChunkGrid:
    """Chunks of `size` tokens, segment after segment.

    Segments of one chunk without external state need no states at all; the others are *scanned*.

    Attributes:
        chunks: n, how many.
        slots: of each token its place in the grid, int64 [T]; None if the tokens fill it in order (a view does).
        filled: tokens of each chunk, int64 [n]; None if all are full.
        scanned: the chunks of scanned segments, int64 [m]; None if all n are.
        plan: of the scan over these chunks.
        external: of each segment with external state its row among the scanned segments, int64 [L]; None if it is these in order.
    """

    size: int
    chunks: int
    slots: Tensor | None
    filled: Tensor | None
    scanned: Tensor | None
    plan: ScanPlan
    external: Tensor | None

    def cut(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[T, H, D] -> [n, H, C, D], contiguous; zeros where there is no token."""
        if self.slots is not None:
            x = x.new_zeros(self.chunks * self.size, *x.shape[1:]).index_copy(0, self.slots, x)
        x = x.unflatten(0, (self.chunks, self.size)).transpose(1, 2)
        return x.to(dtype, memory_format=torch.contiguous_format).contiguous()

    def join(self, x: Tensor) -> Tensor:
        """[n, H, C, D] -> [T, H, D]."""
        x = x.transpose(1, 2).flatten(0, 1)
        return x if self.slots is None else x.index_select(0, self.slots)

    def scan_rows(self, x: Tensor) -> Tensor:
        """The scanned chunks of [n, ...] (or [1, ...], the same for all chunks): [m, ...]."""
        return x if self.scanned is None or x.shape[0] != self.chunks else x.index_select(0, self.scanned)

    def among_scanned(self, state: Tensor | None) -> Tensor | None:
        """Rows of segments with external state [L, ...] -> of scanned ones, zero where one is without; None is zero."""
        if state is None or self.external is None:
            return state
        return state.new_zeros(len(self.plan.counts), *state.shape[1:]).index_copy(0, self.external, state)

    def of_external(self, x: Tensor) -> Tensor:
        """The reverse."""
        return x if self.external is None else x.index_select(0, self.external)


def chunk_size(lengths: Sequence[int], key_width: int, value_width: int) -> int:
    """The size with the least estimated work: elements moved and multiplied, padding included, per head."""
    length = torch.tensor(lengths, dtype=torch.int64)
    chunks = torch.stack([-(-length // size) for size in SIZES])  # [sizes, segments]
    size = torch.tensor(SIZES, dtype=torch.float64)
    width, state = key_width + value_width, key_width * value_width
    # A moved element costs as much as some tens of multiplications; a step of the scan is a few launches.
    inside = size * size * (width + MOVE) + size * width * MOVE
    across = 2 * size * state + state * MOVE
    steps = chunks.amax(1) if len(lengths) else chunks.sum(1)
    cost = chunks.sum(1) * inside + chunks.where(chunks > 1, 0).sum(1) * across + steps * STEP
    return SIZES[int(cost.argmin())]


MOVE, STEP = 32, 50_000


def chunk_grid(lengths: Sequence[int], external: Sequence[int], size: int, device: torch.device) -> ChunkGrid:
    """The grid of segments of `lengths` tokens, of which `external` send or receive states."""
    length = torch.tensor(lengths, dtype=torch.int64)
    counts = -(-length // size)  # chunks of each segment
    chunks, full = int(counts.sum()), not (length % size).any()
    segment = torch.repeat_interleave(torch.arange(len(lengths)), counts)  # of each chunk
    slots = filled = None
    if not full:
        first = counts.cumsum(0) - counts
        skipped = first * size - (length.cumsum(0) - length)  # empty places before each segment
        slots = torch.repeat_interleave(skipped, length) + torch.arange(int(length.sum()))
        filled = (length[segment] - (torch.arange(chunks) - first[segment]) * size).clamp(max=size)
    is_external = torch.zeros(len(lengths), dtype=torch.bool)
    external_segments = torch.tensor(external, dtype=torch.int64)
    is_external[external_segments] = True
    is_scanned = is_external | (counts > 1)
    chunk_scanned = is_scanned[segment]
    row = is_scanned.cumsum(0) - 1  # of a segment among the scanned ones
    external_rows = row[external_segments]
    identity = torch.equal(external_rows, torch.arange(int(is_scanned.sum())))

    def place(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(device)

    return ChunkGrid(
        size=size,
        chunks=chunks,
        slots=place(slots),
        filled=place(filled),
        scanned=None if chunk_scanned.all() else place(chunk_scanned.nonzero()[:, 0]),
        plan=ScanPlan(tuple(counts[is_scanned].tolist()), device),
        external=None if identity else place(external_rows),
    )
