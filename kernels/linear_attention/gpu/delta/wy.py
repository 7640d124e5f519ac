"""The WY form of chunks of the delta rule, forward and backward: w = T (beta e^b k), u = T (beta v), T = (1 + A)^-1.

Kernels, one program a chunk and head. `../TRITON_DELTA.md` has the mathematics.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lsys.kernels.linear_attention.gpu.spans import Spans
from lsys.kernels.linear_attention.gpu.tiles import (
    apart,
    at_least,
    grouped_sum,
    load_chunk,
    load_rows,
    load_sums,
    load_vector,
    pair_decay,
    sizes,
    store_rows,
)


@triton.jit
def inverse(a, C: tl.constexpr, PRECISION: tl.constexpr):
    """(1 + a)^-1 of a strictly lower triangular [C, C], by blocks of 2, 4, ... C.

    From the inverse t of the blocks on the diagonal follows that of blocks twice as large, t - t a t with the part of a that
    lies between them. Unlike a product of powers of a, no term is larger than what it adds to.
    """
    i = tl.arange(0, C)
    apart = i[:, None] ^ i[None, :]  # less than s: in the same block of s
    t = tl.where(apart == 0, 1.0, 0.0) - tl.where(apart == 1, a, 0.0)
    for level in tl.static_range(1, 8):
        if 2**level < C:
            between = tl.where((apart >= 2**level) & (apart < 2 ** (level + 1)), a, 0.0)
            part = tl.dot(between, t, input_precision=PRECISION)
            t -= tl.dot(t, part, input_precision=PRECISION)
    return t


@triton.jit
def wy_forward(
    k, v, beta, g, w, u, sums, t, chunks, g_token, g_head,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """b, the sums of the log-decays g, in fp64; t = T; w and u, of one chunk and head."""
    chunk, head = tl.program_id(0) // H, tl.program_id(0) % H
    first, count = load_chunk(chunks, chunk)
    i = tl.arange(0, C)
    g_i = tl.load(g + first * g_token + head * g_head + i * g_token, mask=i < count, other=0.0)
    b = tl.cumsum(at_least(g_i).to(tl.float64), 0)
    b_i, r_i = apart(b)
    beta_i = tl.load(beta + first * H + head + i * H, mask=i < count, other=0.0)
    k_i = load_rows(k, first, count, head // GROUP, 0, H // GROUP, K, C, BK)
    a = tl.dot(k_i, tl.trans(k_i), input_precision=PRECISION) * pair_decay(b_i, r_i, C, STRICT=True)
    t_ij = inverse(a * beta_i[:, None], C, PRECISION)
    # The factors of k and v go to the columns of T, which is rounded once.
    t_k = (t_ij * (beta_i * tl.exp(b_i + r_i))[None, :]).to(k_i.dtype)
    store_rows(w, tl.dot(t_k, k_i, input_precision=PRECISION), first, count, head, 0, H, K, C, BK)
    t_v = (t_ij * beta_i[None, :]).to(k_i.dtype)
    for block in tl.static_range(0, V, BV):
        v_i = load_rows(v, first, count, head, block, H, V, C, BV)
        store_rows(u, tl.dot(t_v, v_i, input_precision=PRECISION), first, count, head, block, H, V, C, BV)
    store_rows(t, t_ij, first, count, head, 0, H, C, C, C)
    tl.store(sums + first * H + head + i * H, b, mask=i < count)


@triton.jit
def wy_backward(
    k, v, beta, b, w, u, t, dw, du, db, dk, dv, dbeta, dg, chunks,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From the gradients of w, u and b those of k (one a value head), v, beta and g, of one chunk and head."""
    chunk, head = tl.program_id(0) // H, tl.program_id(0) % H
    first, count = load_chunk(chunks, chunk)
    i = tl.arange(0, C)
    b_i, r_i, _, _ = load_sums(b, first, count, head, H, C)
    beta_i = load_vector(beta, first, count, head, H, C)
    t_ji = tl.trans(load_rows(t, first, count, head, 0, H, C, C, C))
    dt = k.dtype.element_ty
    da, dbeta_i = tl.zeros([C, C], tl.float32), tl.zeros([C], tl.float32)
    for block in range(0, V, BV):
        du_i = load_rows(du, first, count, head, block, H, V, C, BV)
        dy = tl.dot(t_ji, du_i, input_precision=PRECISION)  # of y = beta v
        u_i = load_rows(u, first, count, head, block, H, V, C, BV)
        da = tl.dot(dy.to(dt), tl.trans(u_i), da, input_precision=PRECISION)
        dbeta_i += tl.sum(dy * load_rows(v, first, count, head, block, H, V, C, BV), 1)
        store_rows(dv, dy * beta_i[:, None], first, count, head, block, H, V, C, BV)
    dw_i = load_rows(dw, first, count, head, 0, H, K, C, BK)
    dx = tl.dot(t_ji, dw_i, input_precision=PRECISION)  # of x = beta e^b k
    w_i = load_rows(w, first, count, head, 0, H, K, C, BK)
    da = tl.dot(dx.to(dt), tl.trans(w_i), da, input_precision=PRECISION)
    k_i = load_rows(k, first, count, head // GROUP, 0, H // GROUP, K, C, BK)
    da *= -pair_decay(b_i, r_i, C, STRICT=True)
    free = da * tl.dot(k_i, tl.trans(k_i), input_precision=PRECISION)  # dA times A / beta
    from_start = tl.sum(dx * k_i, 1) * tl.exp(b_i + r_i)
    tl.store(dbeta + first * H + head + i * H, dbeta_i + tl.sum(free, 1) + from_start, mask=i < count)
    free *= beta_i[:, None]
    db_i = tl.load(db + first * H + head + i * H, mask=i < count, other=0.0)
    db_i += tl.sum(free, 1) - tl.sum(free, 0) + beta_i * from_start
    tl.store(dg + first * H + head + i * H, tl.cumsum(db_i, 0, reverse=True), mask=i < count)
    dkk = (da * beta_i[:, None]).to(dt)
    dk_i = dx * (beta_i * tl.exp(b_i + r_i))[:, None]
    dk_i = tl.dot(dkk, k_i, dk_i, input_precision=PRECISION)
    dk_i = tl.dot(tl.trans(dkk), k_i, dk_i, input_precision=PRECISION)
    store_rows(dk, dk_i, first, count, head, 0, H, K, C, BK)


class WY(torch.autograd.Function):
    """k [T, H_k, K], v [T, H, V], beta, g [T, H] in fp32 -> w [T, H, K], u [T, H, V] in v's dtype, b [T, H] in fp64."""

    @staticmethod
    def forward(
        ctx: Any, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, spans: Spans, chunk: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens, heads = beta.shape
        w, u, b = (
            k.new_empty(tokens, heads, k.shape[-1]),
            torch.empty_like(v),
            torch.empty_like(beta, dtype=torch.float64),
        )
        t = k.new_empty(tokens, heads, chunk)
        if len(spans.chunks):
            grid, shape = (len(spans.chunks) * heads,), sizes(k, v.shape[-1], heads, chunk)
            wy_forward[grid](k, v, beta, g, w, u, b, t, spans.chunks, *g.stride(), **shape, num_warps=4)
        ctx.save_for_backward(k, v, beta, b, w, u, t)
        ctx.spans, ctx.chunk = spans, chunk
        return w, u, b

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dw: Tensor, du: Tensor, db: Tensor) -> tuple[Tensor | None, ...]:
        k, v, beta, b, w, u, t = ctx.saved_tensors
        tokens, heads = beta.shape
        each = k.dtype if k.shape[1] == heads else torch.float32  # what is summed over a group is not rounded before
        dk = torch.empty(tokens, heads, k.shape[-1], dtype=each, device=k.device)
        dv, dbeta, dg = torch.empty_like(v), torch.empty_like(beta), torch.empty_like(beta)
        if len(ctx.spans.chunks):
            grid, shape = (len(ctx.spans.chunks) * heads,), sizes(k, v.shape[-1], heads, ctx.chunk)
            gradients = (dw.contiguous(), du.contiguous(), db.float().contiguous(), dk, dv, dbeta, dg)
            wy_backward[grid](k, v, beta, b, w, u, t, *gradients, ctx.spans.chunks, **shape, num_warps=8)
        return grouped_sum(dk, k), dv, dbeta, dg, None, None
