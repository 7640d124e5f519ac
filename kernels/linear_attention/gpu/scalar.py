"""Triton kernels of linear attention without decay, and with one decay for all of a head's state.

A program goes through a span of one head, chunk of C tokens by chunk, with the state in registers. b_i is the sum of the
log-decays of the chunk up to token i, G that of all. The output and the gradients of q, k and v are one recurrence over
different tensors, so they are one kernel; `TRITON.md` has the mathematics. `channel.py` has the same passes with a
decay for each key channel.
"""

import triton
import triton.language as tl

from lsys.kernels.linear_attention.gpu.tiles import apart, at_least, load_rows, load_span, store_rows, store_state


@triton.jit
def place(spans, H: tl.constexpr, BLOCKS: tl.constexpr):
    """What a program works on: first token, tokens, row of states (-1: none), span, head, block of columns."""
    program = tl.program_id(0)
    span = program // (BLOCKS * H)
    first, count, _, row = load_span(spans, span)
    return first, count, row, span.to(tl.int64), (program // BLOCKS) % H, program % BLOCKS


@triton.jit
def load_state(
    states, row, head, column, H: tl.constexpr, DX: tl.constexpr, DZ: tl.constexpr, TRANSPOSED: tl.constexpr,
    BX: tl.constexpr, BZ: tl.constexpr,
):  # fmt: skip
    """Columns from `column` of a state [DX, DZ], or one that lies TRANSPOSED, as [BZ, BX]; zero for a negative row."""
    x, z = tl.arange(0, BX), column + tl.arange(0, BZ)
    x_stride: tl.constexpr = 1 if TRANSPOSED else DZ
    z_stride: tl.constexpr = DX if TRANSPOSED else 1
    at = states + (row * H + head) * (DX * DZ) + z[:, None] * z_stride + x[None, :] * x_stride
    return tl.load(at, mask=(z[:, None] < tl.where(row >= 0, DZ, 0)) & (x[None, :] < DX), other=0.0)


@triton.jit
def product(x, y, PRECISION: tl.constexpr):
    return tl.dot(x, y, input_precision=PRECISION, out_dtype=tl.float32)


@triton.jit
def load_decay(g, first, left, head, g_token, g_head, REVERSE: tl.constexpr, C: tl.constexpr):
    """b [C], as a sum and the factor e^r of what is left; what is left, at each token, of the state that enters a chunk, and of each token in
    that which leaves it; G.

    These are e^b_i, without the factor, and e^(G - b_j), whose exponent rounding could leave above 0; REVERSE, from the end, the other way round.
    """
    i = tl.arange(0, C)
    each = tl.load(g + first * g_token + head * g_head + i * g_token, mask=i < left, other=0.0)
    coarse, fine = apart(at_least(each))
    b, r = tl.cumsum(coarse, 0), tl.cumsum(fine, 0)
    # The last of b itself, not another sum: G - b is then exactly zero there, however large both are.
    total, more = tl.sum(tl.where(i == C - 1, b, 0.0), 0), tl.sum(tl.where(i == C - 1, r, 0.0), 0)
    if REVERSE:
        return b, tl.exp(r), tl.exp((total - b) + more), tl.exp(b + r), total + more
    else:
        return (
            b,
            tl.exp(r),
            tl.exp(b),
            tl.exp(tl.minimum((total - b) + (more - r), 0.0, propagate_nan=tl.PropagateNan.ALL)),
            total + more,
        )


@triton.jit
def intra_scores(xs, ys, b, rest, scale, REVERSE: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr):
    """e^(b_i - b_j) (x_i y_j) of the pairs j <= i of a chunk, without b (x_i y_j), at [j, i] of [C, C]; zero elsewhere.

    REVERSE: scale e^(b_j - b_i) (x_i y_j) of the pairs j >= i. Of the small factors `rest` of e^b that of j is in it, that of i is left.
    """
    i = tl.arange(0, C)
    scores = product(ys, tl.trans(xs), PRECISION)
    if b is not None:
        difference = b[:, None] - b[None, :] if REVERSE else b[None, :] - b[:, None]
        scores *= tl.exp(tl.minimum(difference, 0.0))
        scores *= rest[:, None] if REVERSE else (1 / rest)[:, None]
    scores = tl.where(i[:, None] >= i[None, :] if REVERSE else i[None, :] >= i[:, None], scores, 0.0)
    return scores * scale if REVERSE else scores


@triton.jit
def log_decay_gradient(
    each, later, inner, dg, first, left, H: tl.constexpr, REVERSE: tl.constexpr, LOCAL: tl.constexpr, C: tl.constexpr
):
    """dg_t = edge + sum_(s >= t) (<q_s, dq_s> - <k_s, dk_s>), edge = <gradient, state> after the span.

    `each` is a product of one chunk. The pass of dq leaves the first in `inner`. That of dk, REVERSE, has the second: it
    makes the chunk's dg from `later`, the first of the chunk after it, and gives the chunk's own first.
    """
    i = tl.arange(0, C)
    at = (first + i) * H
    if REVERSE:
        if LOCAL:
            each -= tl.load(inner + at, mask=i < left, other=0.0)
        tl.store(dg + at, later - tl.cumsum(each, 0, reverse=True), mask=i < left)
        return later - tl.sum(each, 0)
    else:
        tl.store(inner + at, each, mask=i < left)
        return later


@triton.jit
def scalar_outer_kernel(
    x, z, g, out, total, spans, scale, g_token, g_head,
    H: tl.constexpr, X_GROUP: tl.constexpr, DX: tl.constexpr, DZ: tl.constexpr, BX: tl.constexpr, BZ: tl.constexpr,
    C: tl.constexpr, BLOCKS: tl.constexpr, DECAY: tl.constexpr, REVERSE: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The update of a span, sum_j e^(G - b_j) k_j^T v_j with b and G of all its tokens, of x = k, z = v; and that G.

    REVERSE: scale sum_i e^b_i q_i^T do_i, the gradient of the state before the span, of x = q, z = do.
    """
    first, count, _, span, head, block = place(spans, H, BLOCKS)
    state, cumulative, chunks = tl.zeros((BX, BZ), tl.float32), 0.0, tl.cdiv(count, C)
    for n in tl.range(0, chunks, num_stages=STAGES, disable_licm=True):
        at = ((chunks - 1 - n) if REVERSE else n) * C
        xs = load_rows(x, first + at, count - at, head // X_GROUP, 0, H // X_GROUP, DX, C, BX)
        zs = load_rows(z, first + at, count - at, head, block * BZ, H, DZ, C, BZ)
        if DECAY:
            b, rest, from_start, to_end, G = load_decay(g, first + at, count - at, head, g_token, g_head, REVERSE, C)
            zs = (zs * to_end[:, None]).to(z.dtype.element_ty)
            state *= tl.exp(G)
            cumulative += G
        state = tl.dot(tl.trans(xs), zs, state, input_precision=PRECISION)
    store_state(out, state * scale if REVERSE else state, span, head, block * BZ, H, DX, DZ, BX, BZ)
    if DECAY and not REVERSE:
        tl.store(total + span * H + head, cumulative, mask=block == 0)


@triton.jit
def scalar_pass_kernel(
    x, y, z, g, states, out, add, own, inner, edge, dg, spans, scale, g_token, g_head, tokens,
    H: tl.constexpr, X_GROUP: tl.constexpr, Z_GROUP: tl.constexpr, DX: tl.constexpr, DZ: tl.constexpr,
    TRANSPOSED: tl.constexpr, BX: tl.constexpr, BZ: tl.constexpr, C: tl.constexpr, BLOCKS: tl.constexpr,
    DECAY: tl.constexpr, REVERSE: tl.constexpr, LOCAL: tl.constexpr, ADD: tl.constexpr, DG: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out_i = sum_(j <= i) e^(b_i - b_j) (x_i y_j) z_j + e^b_i x_i S;  S' = e^G S + sum_j e^(G - b_j) y_j^T z_j

    times `scale`. S is the state [DX, DZ] before a chunk, of `states` before the span; a program has a block of its columns.
    Of x, y, z = q, k, v and the states before spans out is o; of do, v, k and the same states transposed it is dq.

    REVERSE goes from the last chunk to the first:
    out_j = scale sum_(i >= j) e^(b_i - b_j) (x_j y_i) z_i + e^(G - b_j) x_j S;  S' = e^G S + scale sum_i e^b_i y_i^T z_i
    Of v, do, q and the transposed gradients of states after spans out is dk; of k, q, do and these gradients it is dv.

    Without LOCAL as if y were 0. ADD: `add` is added. DG, for dq (own = q) and then dk (own = k): `log_decay_gradient`;
    inner and dg are [BLOCKS, T, H], whose blocks are to be summed.
    """
    first, count, row, _, head, block = place(spans, H, BLOCKS)
    column, chunks, later = block * BZ, tl.cdiv(count, C), 0.0
    state = load_state(states, row, head, column, H, DX, DZ, TRANSPOSED, BX, BZ)  # transposed, [BZ, BX]
    if DG:
        of_block = block.to(tl.int64) * tokens * H + head
        if REVERSE:  # the edge once, not in each block
            later = tl.load(edge + row * H + head, mask=(row >= 0) & (block == 0), other=0.0)
    for n in tl.range(0, chunks, num_stages=STAGES, disable_licm=True):
        at = ((chunks - 1 - n) if REVERSE else n) * C
        start, left = first + at, count - at
        xs = load_rows(x, start, left, head // X_GROUP, 0, H // X_GROUP, DX, C, BX)
        os = product(state.to(WIDE), tl.trans(xs.to(WIDE)), PRECISION)  # [BZ, C]
        if DECAY:
            b, rest, from_start, to_end, G = load_decay(g, start, left, head, g_token, g_head, REVERSE, C)
            os *= from_start[None, :]
            state *= tl.exp(G)
        if LOCAL:
            ys = load_rows(y, start, left, head // X_GROUP, 0, H // X_GROUP, DX, C, BX)
            zs = load_rows(z, start, left, head // Z_GROUP, column, H // Z_GROUP, DZ, C, BZ)
            weighted = zs
            if DECAY:
                weighted = (zs * (to_end * scale if REVERSE else to_end)[:, None]).to(zs.dtype)
            elif REVERSE:
                weighted = (zs * scale).to(zs.dtype)
            state = tl.dot(tl.trans(weighted), ys, state, input_precision=PRECISION)
            scores = intra_scores(xs, ys, b if DECAY else None, rest if DECAY else None, scale, REVERSE, C, PRECISION)
            os = tl.dot(tl.trans(zs), scores.to(zs.dtype), os, input_precision=PRECISION)
        if DECAY:
            os *= ((1 / rest) if REVERSE else rest)[None, :]
        os = tl.trans(os if REVERSE else os * scale)
        if DG:
            owns = load_rows(own, start, left, head // Z_GROUP, column, H // Z_GROUP, DZ, C, BZ)
            each = tl.sum(owns * os, 1)
            later = log_decay_gradient(each, later, inner + of_block, dg + of_block, start, left, H, REVERSE, LOCAL, C)
        if ADD:
            os += load_rows(add, start, left, head, column, H, DZ, C, BZ)
        store_rows(out, os, start, left, head, column, H, DZ, C, BZ)
