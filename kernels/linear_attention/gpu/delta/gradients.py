"""Gradients of what the passes over the chunks of the delta rule read, all chunks at once.

`../TRITON_DELTA.md` has the mathematics; S is the state before a chunk, D the gradient of that after it, r = u - w S.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lsys.kernels.linear_attention.gpu.delta.passes import Prepared, chunk_gradients, chunk_states
from lsys.kernels.linear_attention.gpu.spans import Spans
from lsys.kernels.linear_attention.gpu.tiles import (
    NARROW,
    grouped_sum,
    load_chunk,
    load_rows,
    load_state_block,
    load_sums,
    pair_decay,
    sizes,
    store_rows,
)


@triton.jit
def tokens_backward(
    q, k, b, p, s, r, d, dr, do, dq, dk, dw, db, chunks, tokens, scale,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr, HAS_DO: tl.constexpr,
):  # fmt: skip
    """Gradients of q and k (one a value head), w and b, of one chunk, head and block of key channels.

    That of u is dr; that of b [blocks, T, H] is to be summed over the blocks.
    """
    chunk, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    channel = tl.program_id(1) * BK
    first, count = load_chunk(chunks, chunk)
    i = tl.arange(0, C)
    dt = k.dtype.element_ty
    dk_i, dw_i, inner = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32), 0.0
    dq_i, dp = tl.zeros([C, BK], tl.float32), tl.zeros([C, C], tl.float32)
    for column in range(0, V, BV):
        s_i = load_state_block(s, chunk, head, channel, column, H, K, V, BK, BV)
        d_i = load_state_block(d, chunk, head, channel, column, H, K, V, BK, BV)
        inner += tl.sum(s_i.to(tl.float32) * d_i.to(tl.float32))  # <D, S>
        r_i = load_rows(r, first, count, head, column, H, V, C, BV)
        dr_i = load_rows(dr, first, count, head, column, H, V, C, BV)
        dw_i = tl.dot(dr_i, tl.trans(s_i), dw_i, input_precision=PRECISION)  # of -w
        dk_i = tl.dot(r_i, tl.trans(d_i), dk_i, input_precision=PRECISION)
        if HAS_DO:
            do_i = load_rows(do, first, count, head, column, H, V, C, BV)
            dq_i = tl.dot(do_i, tl.trans(s_i), dq_i, input_precision=PRECISION)
            dp = tl.dot(do_i, tl.trans(r_i), dp, input_precision=PRECISION)
    store_rows(dw, -dw_i, first, count, head, channel, H, K, C, BK)
    b_i, r_i, total, more = load_sums(b, first, count, head, H, C)
    k_i = load_rows(k, first, count, head // GROUP, channel, H // GROUP, K, C, BK)
    dk_i *= tl.exp((total - b_i) + (more - r_i))[:, None]
    to_end = tl.sum(dk_i * k_i, 1)
    db_i = tl.where(i == count - 1, tl.sum(to_end) + tl.exp(total + more) * inner, 0.0) - to_end
    if HAS_DO:
        q_i = load_rows(q, first, count, head // GROUP, channel, H // GROUP, K, C, BK)
        dq_i *= (scale * tl.exp(b_i + r_i))[:, None]
        db_i += tl.sum(dq_i * q_i, 1)
        if channel == 0:
            moved = dp * load_rows(p, first, count, head, 0, H, C, C, C)
            db_i += tl.sum(moved, 1) - tl.sum(moved, 0)
        dp *= pair_decay(b_i, r_i, C) * scale
        dq_i = tl.dot(dp.to(dt), k_i, dq_i, input_precision=PRECISION)
        dk_i = tl.dot(tl.trans(dp.to(dt)), q_i, dk_i, input_precision=PRECISION)
        store_rows(dq, dq_i, first, count, head, channel, H, K, C, BK)
    store_rows(dk, dk_i, first, count, head, channel, H, K, C, BK)
    db += tl.program_id(1).to(tl.int64) * tokens * H
    tl.store(db + first * H + head + i * H, db_i, mask=i < count)


def gradients(
    x: Prepared, p: Tensor | None, spans: Spans, start: Tensor, end: Tensor, do: Tensor | None
) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q (None without do), k, w, u and b, in these shapes, zero for tokens in none of the spans.

    start, end: [rows, H, K, V], the states before the spans and the gradients of those after.
    p, do: `scores` and [T, H, V], the gradient of the output; None without.
    """
    (s, r), (d, dr) = chunk_states(x, spans, start), chunk_gradients(x, p, spans, end, do)
    tokens, heads = x.b.shape
    each = x.k.dtype if x.k.shape[1] == heads else torch.float32  # what is summed over a group is not rounded before
    new = torch.empty_like if spans.whole else torch.zeros_like
    shape = sizes(x.k, start.shape[-1], heads, x.chunk)
    # Three gradients of a block of key channels are in registers.
    shape["BK"], warps = (shape["BK"], 8) if shape["BK"] <= NARROW else (NARROW // 2, 4)
    blocks = triton.cdiv(shape["K"], shape["BK"])
    dq, dk = None if do is None else new(x.w, dtype=each), new(x.w, dtype=each)
    dw, db = (
        new(x.w),
        new(x.b.expand(blocks, tokens, heads), dtype=torch.float32, memory_format=torch.contiguous_format),
    )
    if len(spans):
        arrays = (x.q, x.k, x.b, p, s, r, d, dr, do, dq, dk, dw, db, spans.chunks, tokens, x.scale)
        grid = (len(spans.chunks) * heads, blocks)
        tokens_backward[grid](*arrays, **shape, HAS_DO=do is not None, num_warps=warps)
    dq = None if dq is None or x.q is None else grouped_sum(dq, x.q)
    return dq, grouped_sum(dk, x.k), dw, dr, db.sum(0) if blocks > 1 else db[0]
