"""Chunks of the delta rule and the gated delta rule, in Triton. `../TRITON_DELTA.md` has the mathematics."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lsys.kernels.linear_attention.chunked import SegmentMap
from lsys.kernels.linear_attention.chunked.chunks import Tokens
from lsys.kernels.linear_attention.gpu.delta.gradients import gradients
from lsys.kernels.linear_attention.gpu.delta.passes import (
    ONE,
    ZERO,
    Prepared,
    outputs,
    scores,
    span_states,
    start_gradients,
)
from lsys.kernels.linear_attention.gpu.delta.wy import WY
from lsys.kernels.linear_attention.gpu.handover import Handover
from lsys.kernels.linear_attention.gpu.spans import Division, divide, span_chunks
from lsys.kernels.linear_attention.gpu.tiles import chunk_tokens
from lsys.kernels.linear_attention.scan import adjoint, compose, scan


class States(NamedTuple):
    """The states before the scanned spans if their segments start from zero, and the maps they follow from.

    They serve both phases, whose gradients go through them without autograd: nothing here is recorded.
    """

    before: Tensor  # [m, H, K, V]
    transition: Tensor  # [m, H, K, K], of each span
    external_transition: Tensor  # [ml, H, K, K], of those in segments with external state
    external_before: Tensor  # [ml, H, K, V]
    cumulative: Tensor  # [ml, H, K, K], from the start of the segment to the span
    total: Tensor  # [L, H, K, V], after the segments with external state
    total_cumulative: Tensor  # [L, H, K, K]


@torch.no_grad()
def scan_states(x: Prepared, division: Division, width: int) -> States:
    """The states before the scanned spans, of `width` columns."""
    keys = x.k.shape[-1]
    update, transition = span_states(x, division.scanned, width, ZERO), span_states(x, division.scanned, keys, ONE)
    if (
        len(division.external_plan.counts) == 0
    ):  # nobody asks for cumulative transitions, which costs as much as the states
        scanned, none = compose(update, transition, division.plan), update[:0]
        return States(scanned.before, transition, transition[:0], none, transition[:0], none, transition[:0])
    scanned = scan(update, transition, division.plan)
    # States and their cumulative transitions are columns of one tensor: kernels want each by itself.
    before, cumulative, total, total_cumulative = (x.contiguous() for x in scanned if x is not None)
    spans, segments = division.external_rows, division.external_segments
    external = [x if spans is None else x.index_select(0, spans) for x in (transition, before, cumulative)]
    totals = [x if segments is None else x.index_select(0, segments) for x in (total, total_cumulative)]
    return States(before, transition, *external, *totals)


class DeltaTritonSegments:
    """log_decay None, [H] or [T, H]; beta [T, H]. See `lsys.kernels.linear_attention.Segments`.

    `intra` is called once, and `apply` at most once, with what `intra` gave, which nothing else reads. What these kernels do not compute is
    said by `gpu.triton_refusal`.

    Args:
        chunk: tokens of a chunk, a power of two of at least 16; default by width.
        span: chunks of a span, of whose states alone the first is kept for the backward pass; default by the work.
    """

    def __init__(
        self,
        tokens: Tokens,
        lengths: Sequence[int],
        external: Sequence[int],
        scale: float,
        *,
        chunk: int | None = None,
        span: int | None = None,
    ) -> None:
        q, k, v, log_decay, beta = tokens
        assert beta is not None
        heads = v.shape[1]
        chunk = chunk_tokens(k.shape[-1]) if chunk is None else chunk
        span = span_chunks(lengths, chunk, heads) if span is None else span
        self.division = divide(tuple(lengths), tuple(external), chunk, span, v.device)
        self.out_dtype, self.width = v.dtype, v.shape[-1]
        q, k, v, beta = q.contiguous(), k.contiguous(), v.contiguous(), beta.float().contiguous()
        g = torch.zeros_like(beta[:1, :1]) if log_decay is None else log_decay.float()
        w, u, b = WY.apply(k, v, beta, g.expand(beta.shape), self.division.every, chunk)
        self.tokens, self.handover = Prepared(q, k, w, u, b, scale, chunk), Handover[tuple[Tensor, Tensor]]()

    @cached_property
    def states(self) -> States:
        return scan_states(self.tokens, self.division, self.width)

    @cached_property
    @torch.no_grad()
    def scores(self) -> Tensor:
        return scores(self.tokens, self.division.every)

    def segment_map(self) -> SegmentMap:
        """The maps of the segments with external state."""
        state, transition = _Maps.apply(*self.tokens[1:], self.division, self.states)
        return SegmentMap(transition, state)

    def intra(self) -> Tensor:
        """What tokens get if every segment starts from zero, [T, H, V]; in fp32 if states may be added."""
        dtype = torch.float32 if len(self.division.external) else self.out_dtype
        self.handover.read()
        return _Intra.apply(*self.tokens, self.division, self.states, self.scores, self.handover, dtype)

    def apply(self, segment_map: SegmentMap, intra: Tensor, state: Tensor | None) -> Tensor:
        """The output [T, H, V]; `state` [L, H, K, V] is that before each segment with external state, None is zero."""
        if state is None or len(self.division.external) == 0:
            return intra.to(self.out_dtype)
        parts = (self.division, self.states, self.scores, self.handover, self.out_dtype)
        return _Apply.apply(intra, state.float(), *self.tokens, *parts)


class _Intra(torch.autograd.Function):
    """The output if every segment starts from zero. Its gradients go through the states before the spans, too."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        q, k, w, u, b, scale, chunk, division, states, p, handover, dtype = arguments
        ctx.save_for_backward(q, k, w, u, b, states.before, states.transition)
        ctx.scale, ctx.chunk, ctx.division, ctx.handover = scale, chunk, division, handover
        o = torch.empty_like(u, dtype=dtype)
        return outputs(Prepared(q, k, w, u, b, scale, chunk), p, division.every, states.before, o)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, w, u, b, start, transition = ctx.saved_tensors
        division, handover, x = ctx.division, ctx.handover, Prepared(q, k, w, u, b, ctx.scale, ctx.chunk)
        do = do.to(q.dtype).contiguous()
        found = handover.reading()
        if found is None:
            p = scores(x, division.every)
            end, _ = adjoint(start_gradients(x, p, division.scanned, do), None, transition, division.plan)
        else:
            p, end = found
            rows = division.external_rows
            start = start + handover.start if rows is None else start.index_add(0, rows, handover.start)
        dq, dk, dw, du, db = gradients(x, p, division.every, start, end, do)
        return dq, dk, dw, du, db, *[None] * 7


class _Apply(torch.autograd.Function):
    """`intra` plus what the states before the segments with external state [L, H, K, V] add to the output."""

    @staticmethod
    def forward(ctx: Any, intra: Tensor, state: Tensor, *arguments: Any) -> Tensor:
        q, k, w, _, b, scale, chunk, division, states, p, handover, dtype = arguments
        start = states.cumulative @ state.index_select(0, division.entry)  # [ml, H, K, V]
        handover.entered(start)
        ctx.save_for_backward(q, k, w, b, states.transition)
        ctx.scale, ctx.chunk, ctx.division, ctx.handover, ctx.intra_dtype = (
            scale,
            chunk,
            division,
            handover,
            intra.dtype,
        )
        external, intra = division.external, intra.contiguous()
        o = torch.empty_like(intra, dtype=dtype) if external.whole else intra.to(dtype, copy=True)
        return outputs(Prepared(q, k, w, None, b, scale, chunk), p, external, start, o, intra)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, w, b, transition = ctx.saved_tensors
        division, handover, x = ctx.division, ctx.handover, Prepared(q, k, w, None, b, ctx.scale, ctx.chunk)
        p = scores(x, division.every)
        from_output = start_gradients(x, p, division.scanned, do.to(q.dtype).contiguous())
        end, d_state = adjoint(from_output, None, transition, division.plan)
        handover.begin((p, end))
        if division.external_segments is not None:
            d_state = d_state.index_select(0, division.external_segments)
        return do.to(ctx.intra_dtype), d_state, *[None] * 12


class _Maps(torch.autograd.Function):
    """The states after the segments with external state from zero, [L, H, K, V], and the transitions over them, [L, H, K, K]."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        k, w, u, b, scale, chunk, division, states = arguments
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(k, w, u, b, states.external_before, states.cumulative, states.external_transition)
        ctx.scale, ctx.chunk, ctx.division = scale, chunk, division
        return states.total, states.total_cumulative

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_state: Tensor | None, d_transition: Tensor | None) -> tuple[Tensor | None, ...]:
        k, w, u, b, before, cumulative, transition = ctx.saved_tensors
        division = ctx.division
        found: list[tuple[Tensor | None, ...]] = [(None,) * 4]
        # The transition is what becomes of the state 1 without values: more columns of the same recurrence.
        for d_total, start, values in ((d_state, before, u), (d_transition, cumulative, None)):
            if d_total is not None:
                x = Prepared(None, k, w, values, b, ctx.scale, ctx.chunk)
                end, _ = adjoint(torch.zeros_like(start), d_total.float(), transition, division.external_plan)
                _, dk, dw, du, db = gradients(x, None, division.external, start, end, None)
                found.append((dk, dw, None if values is None else du, db))
        return *(_sum(x) for x in zip(*found, strict=True)), None, None, None, None


def _sum(gradients: Sequence[Tensor | None]) -> Tensor | None:
    given = [x for x in gradients if x is not None]
    return sum(given[1:], start=given[0]) if given else None
