"""Linear attention chunk by chunk, in PyTorch operations: matrix products inside chunks, a recurrence between them."""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from lsys.kernels.linear_attention.chunks import Chunks, Tokens
from lsys.kernels.linear_attention.grid import chunk_grid
from lsys.kernels.linear_attention.scan import scan
from lsys.kernels.linear_attention.sweep import sweep
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


class ChunkedSegments:
    """Packed segments, as `Chunks` of a member of the family. See `lsys.kernels.linear_attention.Segments`.

    Where no segment is linked, nothing waits for a state, and the output is made as a whole.
    """

    def __init__(
        self,
        member: type[Chunks],
        tokens: Tokens,
        lengths: Sequence[int],
        linked: Sequence[int],
        scale: float,
    ) -> None:
        self.member, self.tokens, self.scale = member, tokens, scale
        self.lengths, self.linked = lengths, linked

    @cached_property
    def chunks(self) -> Chunks:
        """Of all tokens."""
        k, v = self.tokens.k, self.tokens.v
        size = self.member.chunk_size(self.lengths, k.shape[-1], v.shape[-1])
        return self.member(self.tokens, chunk_grid(self.lengths, self.linked, size, v.device), self.scale)

    def segment_map(self) -> SegmentMap:
        """The maps of the linked segments; also scans the chunks' states, from zero before each segment."""
        if not self.linked:
            return self._no_maps()
        grid = self.chunks.grid
        before, reach, state, total = scan(*self.chunks.maps(), grid.plan)
        if grid.linked is not None:
            state = state.index_select(0, grid.linked)
            total = None if total is None else total.index_select(0, grid.linked)
        return SegmentMap(total, state, before, reach)

    def intra(self) -> Tensor:
        """What tokens get from their own chunk, [n, H, C, V]; without links the output, [T, H, V]."""
        return self.chunks.intra() if self.linked else self.whole()[0]

    def apply(self, segment_map: SegmentMap, intra: Tensor, state: Tensor | None) -> Tensor:
        """The output [T, H, V]; `state` [L, H, K, V] is that before each linked segment, None is zero."""
        if not self.linked:
            return intra
        before = segment_map.before
        assert before is not None
        if state is not None and len(before):
            before = self._enter(before, segment_map.reach, state.to(before.dtype))
        return self.chunks.read(before, intra)

    def whole(self, initial: Tensor | None = None, final: bool = False) -> tuple[Tensor, Tensor | None]:
        """Both phases at once, for known states before all segments, [N, H, K, V], default zero.

        The output [T, H, V] and, if `final`, the states after the segments [N, H, K, V].
        """
        return sweep(self.member, self.tokens, self.lengths, self.scale, initial, final)

    def _enter(self, before: Tensor, reach: Tensor | None, state: Tensor) -> Tensor:
        """Add what is left of the states before linked segments to those before their chunks: [m, H, K, V]."""
        grid = self.chunks.grid
        # One segment's state is broadcast; those of several are copied to their chunks.
        carried = state if len(state) == 1 else state.index_select(0, grid.entry)
        if reach is not None:
            carried = carry(reach if grid.entered is None else reach.index_select(0, grid.entered), carried)
        if grid.entered is None:
            return before + carried
        return before.index_add(0, grid.entered, carried.expand(len(grid.entered), *carried.shape[1:]))

    def _no_maps(self) -> SegmentMap:
        _, k, v, log_decay, beta = self.tokens
        none = v.new_zeros(0, v.shape[1], k.shape[2], v.shape[2], dtype=torch.promote_types(v.dtype, torch.float32))
        if beta is not None:
            return SegmentMap(none.new_zeros(0, v.shape[1], k.shape[2], k.shape[2]), none)
        form = () if log_decay is None else log_decay.shape[2:]
        return SegmentMap(None if log_decay is None else none.new_zeros(0, v.shape[1], *form), none)
