"""Linear attention chunk by chunk, in PyTorch operations: matrix products inside chunks, a recurrence between them.

What all members share; `scalar.py`, `channel.py` and `delta.py` say what a chunk is. The README has the mathematics.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lsys.kernels.linear_attention.grid import chunk_grid, chunk_size
from lsys.kernels.linear_attention.scan import scan
from lsys.kernels.linear_attention.transition import carry


class SegmentMap(NamedTuple):
    """What each of the L linked segments does to a state, S -> A S + state, and what `apply` reuses of it.

    Attributes:
        transition: A in one of the forms of `transition.py`, [L, H ...].
        state: [L, H, K, V], the state after the segment when zero before it.
        before: [m, H, K, V], the states before the scanned chunks, zero before their segment.
        reach: [m, H ...], the transition from the start of the segment to the chunk.
    """

    transition: Tensor | None
    state: Tensor
    before: Tensor | None = None
    reach: Tensor | None = None


class ChunkedSegments(ABC):
    """Packed segments, cut in chunks once, for the two phases. See `lsys.kernels.linear_attention.Segments`.

    A chunk of C tokens gives, of the state S before it, the state A S + update after it and the output intra + query S.

    Attributes:
        q, k, v: [n, H_k | H, C, K | V], zero where a chunk has no token.
        log_decay: as given, in the dtype of states; None without decay.
        beta: [n, H, C] of the delta rule.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        beta: Tensor | None,
        lengths: Sequence[int],
        linked: Sequence[int],
        scale: float,
    ) -> None:
        self.dtype, self.out_dtype, self.scale = torch.promote_types(v.dtype, torch.float32), v.dtype, scale
        self.group = v.shape[1] // k.shape[1]
        size = self.chunk_size(lengths, k.shape[-1], v.shape[-1])
        self.grid = chunk_grid(lengths, linked, size, v.device)
        self.q, self.k, self.v = (self.grid.cut(x, self.dtype) for x in (q, k, v))
        self.log_decay = None if log_decay is None else log_decay.to(self.dtype)
        self.beta = None if beta is None else self.grid.cut(beta.unsqueeze(-1), self.dtype).squeeze(-1)

    def chunk_size(self, lengths: Sequence[int], key_width: int, value_width: int) -> int:
        """Tokens of a chunk, for segments of these lengths."""
        return chunk_size(lengths, key_width, value_width)

    @abstractmethod
    def chunk_maps(self) -> tuple[Tensor, Tensor | None]:
        """The updates [m, H, K, V] and transitions [m, H ...] of the scanned chunks."""

    @abstractmethod
    def intra(self) -> Tensor:
        """What tokens get from their own chunk: [n, H, C, V]. Needs no state."""

    @abstractmethod
    def queries(self) -> Tensor:
        """What reads the states before the scanned chunks: [m, H, C, K], without `scale`."""

    def segment_map(self) -> SegmentMap:
        """The maps of the linked segments; also scans the chunks' states, from zero before each segment."""
        grid = self.grid
        before, reach, state, total = scan(*self.chunk_maps(), grid.plan)
        if grid.linked is not None:
            state = state.index_select(0, grid.linked)
            total = None if total is None else total.index_select(0, grid.linked)
        return SegmentMap(total, state, before, reach)

    def apply(self, segment_map: SegmentMap, intra: Tensor, state: Tensor | None) -> Tensor:
        """The output [T, H, V]; `state` [L, H, K, V] is that before each linked segment, None is zero."""
        grid, before = self.grid, segment_map.before
        assert before is not None
        if len(before) == 0:
            return grid.join(intra).to(self.out_dtype)
        if state is not None:
            before = self._enter(before, segment_map.reach, state.to(self.dtype))
        if grid.scanned is None:
            o = matmul(self.queries(), before, self.scale, add=intra)
        else:
            o = intra.index_add(0, grid.scanned, matmul(self.queries(), before, self.scale))
        return grid.join(o).to(self.out_dtype)  # [n, H, C, V] -> [T, H, V]

    def _enter(self, before: Tensor, reach: Tensor | None, state: Tensor) -> Tensor:
        """Add what is left of the states before linked segments to those before their chunks: [m, H, K, V]."""
        grid = self.grid
        # One segment's state is broadcast; those of several are copied to their chunks.
        carried = state if len(state) == 1 else state.index_select(0, grid.entry)
        if reach is not None:
            carried = carry(reach if grid.entered is None else reach.index_select(0, grid.entered), carried)
        if grid.entered is None:
            return before + carried
        return before.index_add(0, grid.entered, carried.expand(len(grid.entered), *carried.shape[1:]))

    def heads(self, x: Tensor) -> Tensor:
        """[n, H_k, ...] -> [n, H, ...]."""
        return x if self.group == 1 else x.repeat_interleave(self.group, dim=1)


def matmul(x: Tensor, y: Tensor, scale: float = 1.0, add: Tensor | None = None) -> Tensor:
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
