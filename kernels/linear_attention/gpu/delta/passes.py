"""The passes over the chunks of each span of the delta rule: states, outputs, and gradients of states.

One program a span, head and block of columns of the state, which stays in registers. `../TRITON_DELTA.md` has the
mathematics; S is the state before a chunk, D the gradient of that after it, r = u - w S.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lsys.kernels.linear_attention.gpu.spans import Spans
from lsys.kernels.linear_attention.gpu.tiles import (
    load_chunk,
    load_rows,
    load_span,
    load_state,
    load_sums,
    pair_decay,
    sizes,
    store_rows,
    store_state,
)

ZERO, GIVEN, ONE = 0, 1, 2  # the state before a span: zero, the row of it that the table names, or the identity


@triton.jit
def scores_kernel(
    q, k, b, p, chunks, scale,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P = scale tril(q k^T e^(b_i - b_j)) of one chunk and head."""
    chunk, head = tl.program_id(0) // H, tl.program_id(0) % H
    first, count = load_chunk(chunks, chunk)
    q_i = load_rows(q, first, count, head // GROUP, 0, H // GROUP, K, C, BK)
    k_i = load_rows(k, first, count, head // GROUP, 0, H // GROUP, K, C, BK)
    b_i, r_i, _, _ = load_sums(b, first, count, head, H, C)
    decay = pair_decay(b_i, r_i, C)
    p_ij = tl.dot(q_i, tl.trans(k_i), input_precision=PRECISION) * (decay * scale)
    store_rows(p, p_ij, first, count, head, 0, H, C, C, C)


@triton.jit
def states_pass(
    k, w, u, b, start, kept, r_kept, end, spans,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
    START: tl.constexpr, HAS_U: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """S' = e^G S + (k e^(G - b))^T r; KEEP stores r and the state before each chunk, or else that after the span."""
    span, head, column = tl.program_id(0) // H, tl.program_id(0) % H, tl.program_id(1) * BV
    first, count, chunk, row = load_span(spans, span)
    s = tl.zeros([BK, BV], tl.float32)
    if START == 1:
        s = load_state(start, row, head, column, H, K, V, BK, BV)
    if START == 2:
        s = tl.where(tl.arange(0, BK)[:, None] == column + tl.arange(0, BV)[None, :], 1.0, 0.0)
    for at in range(0, count, C):
        left = tl.minimum(count - at, C)
        if KEEP:
            store_state(kept, s, chunk + at // C, head, column, H, K, V, BK, BV)
        w_i = load_rows(w, first + at, left, head, 0, H, K, C, BK)
        r = -tl.dot(w_i, s.to(w_i.dtype), input_precision=PRECISION)
        if HAS_U:
            r += load_rows(u, first + at, left, head, column, H, V, C, BV)
        if KEEP:
            store_rows(r_kept, r, first + at, left, head, column, H, V, C, BV)
        b_i, r_i, total, more = load_sums(b, first + at, left, head, H, C)
        r = (r * tl.exp((total - b_i) + (more - r_i))[:, None]).to(w_i.dtype)
        k_i = load_rows(k, first + at, left, head // GROUP, 0, H // GROUP, K, C, BK)
        s = tl.dot(tl.trans(k_i), r, s * tl.exp(total + more), input_precision=PRECISION)
    if not KEEP:
        store_state(end, s, span.to(tl.int64), head, column, H, K, V, BK, BV)


@triton.jit
def output_pass(
    q, k, w, u, b, p, start, add, o, spans, scale,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
    START: tl.constexpr, HAS_U: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """o = scale (q e^b) S + P r, plus `add`; S as in `states_pass`."""
    span, head, column = tl.program_id(0) // H, tl.program_id(0) % H, tl.program_id(1) * BV
    first, count, _, row = load_span(spans, span)
    s = tl.zeros([BK, BV], tl.float32)
    if START == 1:
        s = load_state(start, row, head, column, H, K, V, BK, BV)
    for at in range(0, count, C):
        left = tl.minimum(count - at, C)
        w_i = load_rows(w, first + at, left, head, 0, H, K, C, BK)
        s_in = s.to(w_i.dtype)
        r = -tl.dot(w_i, s_in, input_precision=PRECISION)
        if HAS_U:
            r += load_rows(u, first + at, left, head, column, H, V, C, BV)
        b_i, r_i, total, more = load_sums(b, first + at, left, head, H, C)
        q_i = load_rows(q, first + at, left, head // GROUP, 0, H // GROUP, K, C, BK)
        o_i = tl.dot(q_i, s_in, input_precision=PRECISION) * (tl.exp(b_i + r_i) * scale)[:, None]
        p_i = load_rows(p, first + at, left, head, 0, H, C, C, C)
        o_i = tl.dot(p_i, r.to(w_i.dtype), o_i, input_precision=PRECISION)
        if ADD:
            o_i += load_rows(add, first + at, left, head, column, H, V, C, BV)
        store_rows(o, o_i, first + at, left, head, column, H, V, C, BV)
        r = (r * tl.exp((total - b_i) + (more - r_i))[:, None]).to(w_i.dtype)
        k_i = load_rows(k, first + at, left, head // GROUP, 0, H // GROUP, K, C, BK)
        s = tl.dot(tl.trans(k_i), r, s * tl.exp(total + more), input_precision=PRECISION)


@triton.jit
def reverse_pass(
    q, k, w, b, p, do, end, kept, dr, d_start, spans, scale,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
    HAS_END: tl.constexpr, HAS_DO: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """From the last chunk to the first: dr = P^T do + e^(G - b) k D; D' = e^G D + scale (q e^b)^T do - w^T dr.

    KEEP stores dr and the D of each chunk, or else the gradient of the state before the span.
    """
    span, head, column = tl.program_id(0) // H, tl.program_id(0) % H, tl.program_id(1) * BV
    first, count, chunk, row = load_span(spans, span)
    chunks = tl.cdiv(count, C)
    d = tl.zeros([BK, BV], tl.float32)
    if HAS_END:
        d = load_state(end, row, head, column, H, K, V, BK, BV)
    for passed in range(0, chunks):
        at = (chunks - 1 - passed) * C
        left = tl.minimum(count - at, C)
        if KEEP:
            store_state(kept, d, chunk + at // C, head, column, H, K, V, BK, BV)
        b_i, r_i, total, more = load_sums(b, first + at, left, head, H, C)
        k_i = load_rows(k, first + at, left, head // GROUP, 0, H // GROUP, K, C, BK)
        dr_i = tl.dot(k_i, d.to(k_i.dtype), input_precision=PRECISION) * tl.exp((total - b_i) + (more - r_i))[:, None]
        d *= tl.exp(total + more)
        if HAS_DO:
            do_i = load_rows(do, first + at, left, head, column, H, V, C, BV)
            p_i = load_rows(p, first + at, left, head, 0, H, C, C, C)
            dr_i = tl.dot(tl.trans(p_i), do_i, dr_i, input_precision=PRECISION)
            do_i = (do_i * (scale * tl.exp(b_i + r_i))[:, None]).to(k_i.dtype)
            q_i = load_rows(q, first + at, left, head // GROUP, 0, H // GROUP, K, C, BK)
            d = tl.dot(tl.trans(q_i), do_i, d, input_precision=PRECISION)
        if KEEP:
            store_rows(dr, dr_i, first + at, left, head, column, H, V, C, BV)
        w_i = load_rows(w, first + at, left, head, 0, H, K, C, BK)
        d = tl.dot(tl.trans(w_i), (-dr_i).to(k_i.dtype), d, input_precision=PRECISION)
    if not KEEP:
        store_state(d_start, d, span.to(tl.int64), head, column, H, K, V, BK, BV)


class Prepared(NamedTuple):
    """What the passes read of tokens: q, k [T, H_k, K], w [T, H, K], u [T, H, V] (None: zero), b [T, H] in fp64.

    Without q there are no outputs.
    """

    q: Tensor | None
    k: Tensor
    w: Tensor
    u: Tensor | None
    b: Tensor
    scale: float
    chunk: int

    @property
    def stages(self) -> int:
        """Chunks in flight: of fp32, more would not fit in shared memory."""
        return 2 if self.k.element_size() == 2 else 1

    def launch(self, spans: Spans, width: int) -> tuple[tuple[int, int], dict]:
        """Grid and sizes for states of `width` columns."""
        shape = sizes(self.k, width, self.b.shape[1], self.chunk)
        return (len(spans) * shape["H"], triton.cdiv(width, shape["BV"])), shape


def scores(x: Prepared, spans: Spans) -> Tensor:
    """P of the spans' chunks, [T, H, C] in k's dtype: the rows of a chunk's [C, C] lie with its tokens."""
    heads = x.b.shape[1]
    p = x.k.new_empty(*x.b.shape, x.chunk)
    if len(spans):
        grid, shape = (len(spans.chunks) * heads,), sizes(x.k, x.k.shape[-1], heads, x.chunk)
        scores_kernel[grid](x.q, x.k, x.b, p, spans.chunks, x.scale, **shape, num_warps=4)
    return p


def span_states(x: Prepared, spans: Spans, width: int, start: int) -> Tensor:
    """The states [m, H, K, width] after the spans, from ZERO with x.u or from ONE without."""
    grid, shape = x.launch(spans, width)
    end = x.b.new_empty(len(spans), shape["H"], shape["K"], width, dtype=torch.float32)
    if len(spans):
        options = dict(START=start, HAS_U=start == ZERO, KEEP=False, num_warps=4)
        states_pass[grid](x.k, x.w, x.u, x.b, None, None, None, end, spans.table, **shape, **options)
    return end


def chunk_states(x: Prepared, spans: Spans, start: Tensor) -> tuple[Tensor, Tensor]:
    """The states before the chunks [n, H, K, V] and r [T, H, V], in k's dtype, from `start` [rows, H, K, V]."""
    grid, shape = x.launch(spans, start.shape[-1])
    kept = x.k.new_empty(len(spans.chunks), *start.shape[1:])
    r = x.k.new_empty(*x.b.shape, start.shape[-1])
    if len(spans):
        options = dict(START=GIVEN if len(start) else ZERO, HAS_U=x.u is not None, KEEP=True, num_warps=4)
        states_pass[grid](x.k, x.w, x.u, x.b, start, kept, r, None, spans.table, **shape, **options)
    return kept, r


def outputs(x: Prepared, p: Tensor, spans: Spans, start: Tensor, o: Tensor, add: Tensor | None = None) -> Tensor:
    """Write to o [T, H, V] what the spans' tokens get, from `start` [rows, H, K, V], plus `add` [T, H, V]."""
    grid, shape = x.launch(spans, start.shape[-1])
    if len(spans):
        options = dict(
            START=GIVEN if len(start) else ZERO, HAS_U=x.u is not None, ADD=add is not None, num_warps=4, num_stages=2
        )
        arrays = (x.q, x.k, x.w, x.u, x.b, p, start, add, o)
        output_pass[grid](*arrays, spans.table, x.scale, **shape, **options)
    return o


def start_gradients(x: Prepared, p: Tensor, spans: Spans, do: Tensor) -> Tensor:
    """The gradients [m, H, K, V] of the states before the spans, as far as their own outputs make them."""
    grid, shape = x.launch(spans, do.shape[-1])
    d_start = x.b.new_empty(len(spans), shape["H"], shape["K"], shape["V"], dtype=torch.float32)
    if len(spans):
        options = dict(HAS_END=False, HAS_DO=True, KEEP=False, num_warps=4, num_stages=x.stages)
        arrays = (x.q, x.k, x.w, x.b, p, do, None, None, None, d_start)
        reverse_pass[grid](*arrays, spans.table, x.scale, **shape, **options)
    return d_start


def chunk_gradients(
    x: Prepared, p: Tensor | None, spans: Spans, end: Tensor, do: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradients of the states after the chunks [n, H, K, V] and of r [T, H, V], in k's dtype.

    `end` [rows, H, K, V] are those of the states after the spans, do [T, H, V] that of the output (None: zero).
    """
    width = end.shape[-1]
    grid, shape = x.launch(spans, width)
    kept = x.k.new_empty(len(spans.chunks), *end.shape[1:])
    dr = (torch.empty if spans.whole else torch.zeros)(*x.b.shape, width, dtype=x.k.dtype, device=x.k.device)
    if len(spans):
        options = dict(HAS_END=len(end) > 0, HAS_DO=do is not None, KEEP=True, num_warps=4, num_stages=x.stages)
        arrays = (x.q, x.k, x.w, x.b, p, do, end, kept, dr, None)
        reverse_pass[grid](*arrays, spans.table, x.scale, **shape, **options)
    return kept, dr
