"""Linear attention in Triton: without decay, with a decay per head, per token, or per token and key channel.

Segments are cut in *spans* of many chunks, each one program a head, of whose states alone the first is kept. `TRITON.md`
has the mathematics and the bytes; kernels are in `scalar.py`, `channel.py` and `scan.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lsys.kernels.linear_attention.chunked import SegmentMap
from lsys.kernels.linear_attention.chunked.chunks import Tokens
from lsys.kernels.linear_attention.gpu.handover import Handover
from lsys.kernels.linear_attention.gpu.passes import CHUNK, Passes, log_decays
from lsys.kernels.linear_attention.gpu.scan import Scan
from lsys.kernels.linear_attention.gpu.spans import divide, span_chunks


class TritonSegments:
    """log_decay None, [H], [T, H] or [T, H, K]. See `lsys.kernels.linear_attention.Segments`.

    `intra` and `apply` are called once each. What these kernels do not compute is said by `gpu.triton_refusal`.

    Args:
        span: chunks of 64 tokens in a span; default by the work.
    """

    def __init__(
        self,
        tokens: Tokens,
        lengths: Sequence[int],
        external: Sequence[int],
        scale: float,
        *,
        span: int | None = None,
    ) -> None:
        q, k, v, log_decay, _ = tokens
        span = span_chunks(lengths, CHUNK, v.shape[1]) if span is None else span
        division = divide(tuple(lengths), tuple(external), CHUNK, span, v.device)
        g = log_decays(log_decay, v)
        self.tokens = (q.contiguous(), k.contiguous(), v.contiguous(), g)
        self.passes, self.handover = Passes(division, scale, g is not None and g.requires_grad), Handover[Scan]()

    @cached_property
    def scan(self) -> Scan:
        """The states before the scanned spans of segments that start from zero."""
        with torch.no_grad():
            return self.passes.states(*self.tokens[1:])

    def segment_map(self) -> SegmentMap:
        """The maps of the segments with external state."""
        state, transition = _Maps.apply(*self.tokens[1:], self.passes, self.scan)
        return SegmentMap(transition, state)

    def intra(self) -> Tensor:
        """What tokens get if every segment starts from zero, [T, H, V]."""
        self.handover.read()
        o, _ = _Intra.apply(*self.tokens, None, self.passes, self.scan, self.handover)
        return o

    def apply(self, segment_map: SegmentMap, intra: Tensor, state: Tensor | None) -> Tensor:
        """The output [T, H, V]; `state` [L, H, K, V] is that before each segment with external state, None is zero."""
        if state is None or len(state) == 0:
            return intra
        q, _, _, g = (None if x is None else x.detach() for x in self.tokens)
        return _Apply.apply(intra, state.float(), q, g, self.passes, self.scan, self.handover)

    def whole(self, initial: Tensor | None = None, final: bool = False) -> tuple[Tensor, Tensor | None]:
        """Both phases at once, for known states before the segments with external state [L, H, K, V], default zero.

        The output [T, H, V] and, if `final`, the states after the segments with external state [L, H, K, V].
        """
        if initial is None:
            scan = self.scan
        else:
            initial = initial.float()
            with torch.no_grad():
                scan = self.passes.states(*self.tokens[1:], self.passes.among_scanned(initial))
        o, after = _Intra.apply(*self.tokens, initial, self.passes, scan, Handover[Scan]())
        return o, after if final else None


class _Intra(torch.autograd.Function):
    """The output, and the states after the segments with external state; segments begin with `state` [L, H, K, V], or zero.

    The node of `intra`, and of both phases at once (`whole`).
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        q, k, v, g, state, passes, scan, handover = arguments
        ctx.set_materialize_grads(False)
        ctx.passes, ctx.handover = passes, handover
        ctx.save_for_backward(q, k, v, g, *scan)
        return passes.local(q, k, v, g, scan.each), passes.of_external(scan.end)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, d_end: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, g, *states = ctx.saved_tensors
        passes, scan = ctx.passes, ctx.passes.with_external(Scan(*states), ctx.handover.start)
        do = torch.zeros_like(v) if do is None else do.contiguous()
        after = ctx.handover.reading()
        if after is None:
            d_end = None if d_end is None else passes.among_scanned(d_end)
            after = passes.state_gradients(q, do, g, scan, d_end)
        found = passes.gradients(q, k, v, g, scan.each, after, do)
        d_state = passes.of_external(after.end) if ctx.needs_input_grad[4] else None
        return *found, d_state, None, None, None


class _Apply(torch.autograd.Function):
    """`intra` plus what the states before the segments with external state [L, H, K, V] add to the output.

    Its gradients are those of `intra` and of the states; `_Intra` sees to the others.
    """

    @staticmethod
    def forward(ctx: Any, intra: Tensor, state: Tensor, *arguments: Any) -> Tensor:
        q, g, passes, scan, handover = arguments
        start = passes.at_spans(scan, state)
        handover.entered(start)
        ctx.passes, ctx.handover = passes, handover
        ctx.save_for_backward(q, g, *scan)
        return passes.add_external(q, g, start, intra.contiguous())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, g, *states = ctx.saved_tensors
        passes, scan = ctx.passes, ctx.passes.with_external(Scan(*states), ctx.handover.start)
        after = passes.state_gradients(q, do.contiguous(), g, scan, None)
        ctx.handover.begin(after)
        return do, passes.of_external(after.end), None, None, None, None, None


class _Maps(torch.autograd.Function):
    """The states after the segments with external state from zero [L, H, K, V], and the sums of their log-decays [L, H ...]."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor | None]:
        k, v, g, passes, scan = arguments
        ctx.set_materialize_grads(False)
        ctx.passes = passes
        ctx.save_for_backward(k, v, g, *scan)
        return passes.of_external(scan.end), None if scan.total is None else passes.of_external(scan.total)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_state: Tensor | None, d_total: Tensor | None) -> tuple[Tensor | None, ...]:
        k, v, g, *states = ctx.saved_tensors
        after = ctx.passes.carried_gradients(Scan(*states), d_state, d_total)
        _, dk, dv, dg = ctx.passes.carried(k, v, g, after)
        return dk, dv, dg, None, None
