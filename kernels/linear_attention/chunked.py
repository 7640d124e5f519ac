"""Linear attention chunk by chunk, in PyTorch operations: matrix products inside chunks, a recurrence between them.

Inside a chunk, b_i is the sum of its log-decays up to token i and G that of all. Only differences that are never
positive are exponentiated. The README has the mathematics.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lsys.kernels.linear_attention.grid import ChunkGrid, chunk_grid, chunk_size
from lsys.kernels.linear_attention.scan import scan


class SegmentMap(NamedTuple):
    """What each of the L linked segments does to a state, S -> e^log_decay S + state, and what `apply` reuses of it.

    Attributes:
        log_decay: [L, H]; None is 0.
        state: [L, H, K, V], the state after the segment when zero before it.
        before: [m, H, K, V], the states before the scanned chunks, zero before their segment.
        reach: [m, H], log-decay from the start of the segment to the chunk; None is 0.
    """

    log_decay: Tensor | None
    state: Tensor
    before: Tensor | None = None
    reach: Tensor | None = None


class ChunkDecay(NamedTuple):
    """Decay between places of a chunk; the first dimension is 1 where all chunks are alike."""

    inside: Tensor  # [1 | n, H, C, C]: e^(b_i - b_j) for i >= j, else 0
    entry: Tensor  # [1 | n, H, C, 1]: e^b_i, from before the chunk to token i
    exit: Tensor  # [1 | n, H, C, 1]: e^(G - b_j), from token j to after the chunk
    total: Tensor  # [n, H]: G


class ChunkedSegments:
    """Packed segments, cut in chunks once, for the two phases. See `lsys.kernels.linear_attention.Segments`."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        lengths: Sequence[int],
        linked: Sequence[int],
        scale: float,
    ) -> None:
        self.dtype, self.out_dtype, self.scale = torch.promote_types(v.dtype, torch.float32), v.dtype, scale
        self.group = v.shape[1] // k.shape[1]
        size = chunk_size(lengths, k.shape[-1], v.shape[-1])
        self.grid = chunk_grid(lengths, linked, size, v.device)
        self.q, self.k, self.v = (self.grid.cut(x, self.dtype) for x in (q, k, v))  # [n, H_k | H, C, K | V]
        self.decay = None if log_decay is None else _chunk_decay(log_decay.to(self.dtype), self.grid)

    def segment_map(self) -> SegmentMap:
        """The maps of the linked segments; also scans the chunks' states, from zero before each segment."""
        grid, decay = self.grid, self.decay
        k, v = self._heads(grid.scan_rows(self.k)), grid.scan_rows(self.v)
        if decay is not None:
            v = v * grid.scan_rows(decay.exit)
        update = _matmul(k.transpose(2, 3), v)  # [m, H, K, C] [m, H, C, V] -> [m, H, K, V]
        log_decay = None if decay is None else grid.scan_rows(decay.total)
        before, reach, state, total = scan(update, log_decay, grid.plan)
        if grid.linked is not None:
            state = state.index_select(0, grid.linked)
            total = None if total is None else total.index_select(0, grid.linked)
        return SegmentMap(total, state, before, reach)

    def intra(self) -> Tensor:
        """What tokens get from their own chunk: [n, H, C, V]. Needs no state."""
        scores = _matmul(self.q, self.k.transpose(2, 3), self.scale)  # [n, H_k, C, C]
        if self.decay is None:
            return _matmul(self._heads(scores.tril()), self.v)
        return _matmul(self._heads(scores) * self.decay.inside, self.v)

    def apply(self, segment_map: SegmentMap, intra: Tensor, state: Tensor | None) -> Tensor:
        """The output [T, H, V]; `state` [L, H, K, V] is that before each linked segment, None is zero."""
        grid, before = self.grid, segment_map.before
        assert before is not None
        if len(before) == 0:
            return grid.join(intra).to(self.out_dtype)
        if state is not None:
            before = self._enter(before, segment_map.reach, state.to(self.dtype))
        q = self._heads(grid.scan_rows(self.q))
        if self.decay is not None:
            q = q * grid.scan_rows(self.decay.entry)
        if grid.scanned is None:
            o = _matmul(q, before, self.scale, add=intra)
        else:
            o = intra.index_add(0, grid.scanned, _matmul(q, before, self.scale))
        return grid.join(o).to(self.out_dtype)  # [n, H, C, V] -> [T, H, V]

    def _enter(self, before: Tensor, reach: Tensor | None, state: Tensor) -> Tensor:
        """Add what is left of the states before linked segments to those before their chunks: [m, H, K, V]."""
        grid = self.grid
        # One segment's state is broadcast; those of several are copied to their chunks.
        carried = state if len(state) == 1 else state.index_select(0, grid.entry)
        if reach is not None:
            reach = reach if grid.entered is None else reach.index_select(0, grid.entered)
            carried = carried * reach.exp()[..., None, None]
        if grid.entered is None:
            return before + carried
        return before.index_add(0, grid.entered, carried.expand(len(grid.entered), *carried.shape[1:]))

    def _heads(self, x: Tensor) -> Tensor:
        """[n, H_k, ...] -> [n, H, ...]."""
        return x if self.group == 1 else x.repeat_interleave(self.group, dim=1)


def _chunk_decay(log_decay: Tensor, grid: ChunkGrid) -> ChunkDecay:
    """Of a decay per head [H] or per token and head [T, H]."""
    place = torch.arange(grid.size, device=log_decay.device)
    if log_decay.dim() == 1:
        tokens = (place + 1).expand(1, -1) if grid.filled is None else (place + 1).minimum(grid.filled[:, None])
        b = log_decay[:, None] * tokens[:, None]  # [1 | n, H, C]
        difference = log_decay[:, None, None] * (place[:, None] - place)[None, None]  # [1, H, C, C]
    else:
        b = grid.cut(log_decay.unsqueeze(-1), log_decay.dtype).squeeze(-1).cumsum(-1)  # [n, H, C]
        difference = b[..., :, None] - b[..., None, :]  # [n, H, C, C]
    later = place > place[:, None]
    inside = difference.masked_fill(later, -torch.inf).exp()
    total = b[..., -1]
    exit = (total[..., None] - b).exp()
    return ChunkDecay(inside, b.exp()[..., None], exit[..., None], total.expand(grid.chunks, -1))


def _matmul(x: Tensor, y: Tensor, scale: float = 1.0, add: Tensor | None = None) -> Tensor:
    """scale x y (+ add), batched over the first two dimensions without copies: [n, H, A, B] [n, H, B, C] -> [n, H, A, C]."""
    batch = x.shape[:2]
    x, y = x.flatten(0, 1), y.flatten(0, 1)
    if add is not None:
        product = torch.baddbmm(add.flatten(0, 1), x, y, alpha=scale)
    elif scale == 1.0:
        product = torch.bmm(x, y)
    else:
        product = torch.baddbmm(x.new_empty(()), x, y, beta=0, alpha=scale)
    return product.unflatten(0, batch)
