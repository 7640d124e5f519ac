"""Linear attention chunk by chunk, in PyTorch operations: matrix products inside chunks, a recurrence between them."""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from lsys.kernels.linear_attention.chunked.blocks import in_blocks
from lsys.kernels.linear_attention.chunked.chunks import Chunks, Tokens
from lsys.kernels.linear_attention.chunked.one_pass import sweep
from lsys.kernels.linear_attention.chunked.two_phase import Apply, Intra, Maps, Work


class SegmentMap(NamedTuple):
    """What each of the L segments with external state does to a state, S -> A S + state.

    S is the state that `apply` is given: gradients through `transition` are taken to be those of such states.

    Attributes:
        transition: A in one of the forms of `transition.py`, [L, H ...].
        state: [L, H, K, V], the state after the segment when zero before it.
    """

    transition: Tensor | None
    state: Tensor


class ChunkedSegments:
    """Packed segments, as the `Chunks` of a variant. See `lsys.kernels.linear_attention.Segments`.

    Where no segment has external state, nothing waits for a state, and the output is made as a whole.
    """

    def __init__(
        self,
        variant: type[Chunks],
        tokens: Tokens,
        lengths: Sequence[int],
        external: Sequence[int],
        scale: float,
    ) -> None:
        self.variant, self.tokens, self.scale = variant, tokens, scale
        self.lengths, self.external = lengths, external

    @cached_property
    def work(self) -> Work:
        among = set(self.external)
        apart = [i for i in range(len(self.lengths)) if i not in among]
        external = in_blocks(self.variant, self.tokens, self.lengths, self.external, True)
        others = in_blocks(self.variant, self.tokens, self.lengths, apart, False)
        return Work(
            self.variant, external, others, self.scale, [x is not None and x.requires_grad for x in self.tokens]
        )

    @cached_property
    def mapped(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """The states and transitions of the segments with external state, and the ticket to `Intra`."""
        q, *others = self.tokens
        return Maps.apply(self.work, [self.lengths[i] for i in self.external], q.detach(), *others)

    def segment_map(self) -> SegmentMap:
        """The maps of the segments with external state."""
        if not self.external:
            return self._no_maps()
        state, transition, _ = self.mapped
        return SegmentMap(transition, state)

    def intra(self) -> Tensor:
        """What tokens get from their own chunk, of segments without external state all, [T, H, V]."""
        if not self.external:
            return self.whole()[0]
        q, *others = self.tokens
        return Intra.apply(self.work, self.mapped[2], q, *(x if x is None else x.detach() for x in others))

    def apply(self, segment_map: SegmentMap, intra: Tensor, state: Tensor | None) -> Tensor:
        """The output [T, H, V]; `state` [L, H, K, V] is that before each segment with external state, None is zero."""
        if not self.external:
            return intra
        return Apply.apply(self.work, intra, state, *(x if x is None else x.detach() for x in self.tokens))

    def whole(self, initial: Tensor | None = None, final: bool = False) -> tuple[Tensor, Tensor | None]:
        """Both phases at once, for known states before all segments, [N, H, K, V], default zero.

        The output [T, H, V] and, if `final`, the states after the segments [N, H, K, V].
        """
        return sweep(self.variant, self.tokens, self.lengths, self.scale, initial, final)

    def _no_maps(self) -> SegmentMap:
        _, k, v, log_decay, beta = self.tokens
        none = v.new_zeros(0, v.shape[1], k.shape[2], v.shape[2], dtype=torch.promote_types(v.dtype, torch.float32))
        if beta is not None:
            return SegmentMap(none.new_zeros(0, v.shape[1], k.shape[2], k.shape[2]), none)
        form = () if log_decay is None else log_decay.shape[2:]
        return SegmentMap(None if log_decay is None else none.new_zeros(0, v.shape[1], *form), none)
