"""Triton kernels of linear attention with a decay for each token and key channel; those of `scalar.py`, for it.

The decay between two tokens of a chunk differs from channel to channel, e^(b_ic - b_jc), so it stands inside the products
over channels. It is taken apart at a border m between the tokens, as e^(b_ic - b_mc) e^(b_mc - b_jc), neither above 1. The
chunk is halved down to single tokens; at each level, the tokens in right halves meet those in the left halves beside them
at the border, in one product for all. Sums of log-decays are in two parts, so that their differences lose no digits.
"""

import triton
import triton.language as tl

from lsys.kernels.linear_attention.gpu.scalar import load_state, place, product
from lsys.kernels.linear_attention.gpu.tiles import apart, at_least, load_rows, store_rows, store_state


@triton.jit
def load_decay(
    g, first, left, head, column,
    H: tl.constexpr, D: tl.constexpr, REVERSE: tl.constexpr, C: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """As `scalar.load_decay`, all [C, B] but G [B]; the second is r itself, which what is left of the state that enters has in it."""
    coarse, fine = apart(at_least(load_rows(g, first, left, head, column, H, D, C, B)))
    b, r, is_last = tl.cumsum(coarse, 0), tl.cumsum(fine, 0), tl.arange(0, C)[:, None] == C - 1
    total, more = tl.sum(tl.where(is_last, b, 0.0), 0), tl.sum(tl.where(is_last, r, 0.0), 0)
    since, until = (
        tl.exp(b + r),
        tl.exp(tl.minimum((total[None, :] - b) + (more[None, :] - r), 0.0, propagate_nan=tl.PropagateNan.ALL)),
    )
    return b, r, until if REVERSE else since, since if REVERSE else until, total + more


@triton.jit
def load_decay_to_end(
    g, first, left, head, H: tl.constexpr, D: tl.constexpr, REVERSE: tl.constexpr, C: tl.constexpr, B: tl.constexpr
):
    """What is left of each of a chunk's `left` tokens in the state that leaves it, [C, B], and G [B]. Sums alone need no second part."""
    each = at_least(load_rows(g, first, left, head, 0, H, D, C, B))
    if REVERSE:
        until = tl.cumsum(each, 0)
    else:  # of the tokens after each
        until = tl.cumsum(at_least(load_rows(g, first + 1, left - 1, head, 0, H, D, C, B)), 0, reverse=True)
    return tl.exp(until), tl.sum(each, 0)


@triton.jit
def halves(b, r, zero, HALF: tl.constexpr, REVERSE: tl.constexpr, C: tl.constexpr, B: tl.constexpr):
    """Decay between each token and the border of its two halves of HALF tokens, [C, B], and which pairs meet there, [C, C].

    A pair is a token of a right half and one of the left half beside it; REVERSE, the other way round.
    """
    i, j = tl.arange(0, C)[:, None] + zero, tl.arange(0, C)[None, :] + zero
    border = i // (2 * HALF) * (2 * HALF) + HALF
    other = (j >= border) & (j < border + HALF) if REVERSE else (j < border) & (j >= border - HALF)
    meet = (i < border) & other if REVERSE else (i >= border) & other
    at_border = tl.broadcast_to(border - 1, (C, B))
    difference = ((b - tl.gather(b, at_border, 0)) + r) - tl.gather(r, at_border, 0)
    return tl.exp(-tl.abs(difference)), meet


@triton.jit
def channel_outer_kernel(
    x, z, g, out, total, spans, scale, g_token, g_head,
    H: tl.constexpr, X_GROUP: tl.constexpr, DX: tl.constexpr, DZ: tl.constexpr, BX: tl.constexpr, BZ: tl.constexpr,
    C: tl.constexpr, BLOCKS: tl.constexpr, DECAY: tl.constexpr, REVERSE: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`scalar_outer_kernel`."""
    first, count, _, span, head, block = place(spans, H, BLOCKS)
    state, cumulative = tl.zeros((BZ, BX), tl.float32), tl.zeros((BX,), tl.float32)  # transposed
    chunks = tl.cdiv(count, C)
    for n in tl.range(0, chunks, num_stages=STAGES, disable_licm=True):
        at = ((chunks - 1 - n) if REVERSE else n) * C
        to_end, G = load_decay_to_end(g, first + at, tl.minimum(count - at, C), head, H, DX, REVERSE, C, BX)
        xs = load_rows(x, first + at, count - at, head // X_GROUP, 0, H // X_GROUP, DX, C, BX)
        zs = load_rows(z, first + at, count - at, head, block * BZ, H, DZ, C, BZ)
        xs = (xs * to_end).to(xs.dtype)
        state = tl.dot(tl.trans(zs), xs, state * tl.exp(G)[None, :], input_precision=PRECISION)
        cumulative += G
    state = tl.trans(state * scale if REVERSE else state)
    store_state(out, state, span, head, block * BZ, H, DX, DZ, BX, BZ)
    if not REVERSE:
        keys = tl.arange(0, BX)
        tl.store(total + (span * H + head) * DX + keys, cumulative, mask=keys < tl.where(block == 0, DX, 0))


@triton.jit
def inter_chunk(state, xs, from_start, G, TRANSPOSED: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr):
    """What tokens get from the state that enters their chunk [BZ, BX], and what is left of it after the chunk.

    The first is [BZ, C] or, if TRANSPOSED, [C, BZ].
    """
    if TRANSPOSED:
        os = tl.trans(product(state.to(WIDE), tl.trans(xs.to(WIDE)), PRECISION))
        return os * from_start, state * tl.exp(G)[:, None]
    else:
        weighted = (xs * from_start).to(WIDE)
        os = product(state.to(WIDE), tl.trans(weighted), PRECISION)
        return os, state * tl.exp(G)[None, :]


@triton.jit
def intra_scores(
    xs, ys, b, r, zero, scale,
    REVERSE: tl.constexpr, LEVELS: tl.constexpr, C: tl.constexpr, B: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sum_c e^(b_ic - b_jc) x_ic y_jc of the pairs j <= i of a chunk, at [i, j] of [C, C]; zero elsewhere.

    REVERSE: scale sum_c e^(b_jc - b_ic) x_ic y_jc of the pairs j >= i.
    """
    i = tl.arange(0, C)
    scores = tl.where(i[:, None] == i[None, :], tl.sum(xs * ys.to(tl.float32), 1)[:, None], 0.0)
    for level in tl.static_range(0, LEVELS):
        decay, meet = halves(b, r, zero, 1 << level, REVERSE, C, B)
        weighted = product((xs * decay).to(xs.dtype), tl.trans((ys * decay).to(ys.dtype)), PRECISION)
        scores += tl.where(meet, weighted, 0.0)
    return scores * scale if REVERSE else scores


@triton.jit
def intra_values(
    os, scores, zs, b, r, zero,
    REVERSE: tl.constexpr, LEVELS: tl.constexpr, C: tl.constexpr, B: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """os_ic + sum_j e^(b_ic - b_jc) scores_ij z_jc over the pairs j <= i of a chunk, [C, B].

    REVERSE: e^(b_jc - b_ic) and the pairs j >= i.
    """
    i = tl.arange(0, C)
    os += tl.sum(tl.where(i[:, None] == i[None, :], scores, 0.0), 1)[:, None] * zs
    for level in tl.static_range(0, LEVELS):
        decay, meet = halves(b, r, zero, 1 << level, REVERSE, C, B)
        pairs = tl.where(meet, scores, 0.0).to(zs.dtype)
        os += product(pairs, (zs * decay).to(zs.dtype), PRECISION) * decay
    return os


@triton.jit
def log_decay_gradient(
    each, later, inner, dg, first, left, head, column,
    H: tl.constexpr, D: tl.constexpr, REVERSE: tl.constexpr, LOCAL: tl.constexpr, C: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """`scalar.log_decay_gradient`, of each channel."""
    if REVERSE:
        if LOCAL:
            each -= load_rows(inner, first, left, head, column, H, D, C, B)
        each_dg = later[None, :] - tl.cumsum(each, 0, reverse=True)
        store_rows(dg, each_dg, first, left, head, column, H, D, C, B)
        return tl.sum(tl.where(tl.arange(0, C)[:, None] == 0, each_dg, 0.0), 0)
    else:
        store_rows(inner, each, first, left, head, column, H, D, C, B)
        return later


@triton.jit
def channel_pass_kernel(
    x, y, z, g, states, out, add, own, inner, edge, dg, spans, scale, g_token, g_head, tokens,
    H: tl.constexpr, X_GROUP: tl.constexpr, Z_GROUP: tl.constexpr, DX: tl.constexpr, DZ: tl.constexpr,
    TRANSPOSED: tl.constexpr, BX: tl.constexpr, BZ: tl.constexpr, C: tl.constexpr, BLOCKS: tl.constexpr,
    DECAY: tl.constexpr, REVERSE: tl.constexpr, LOCAL: tl.constexpr, ADD: tl.constexpr, DG: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """`scalar_pass_kernel`; the channels that decay are those of x and y or, if TRANSPOSED, of z.

    out_i = sum_(j <= i) sum_c e^(b_ic - b_jc) x_ic y_jc z_j + sum_c e^b_ic x_ic S_c, or
    out_ic = sum_(j <= i) e^(b_ic - b_jc) (x_i y_j) z_jc + e^b_ic x_i S_c; inner, edge and dg have channels: none is summed.
    """
    first, count, row, _, head, block = place(spans, H, BLOCKS)
    column, chunks, later = block * BZ, tl.cdiv(count, C), tl.zeros((BZ,), tl.float32)
    state = load_state(states, row, head, column, H, DX, DZ, TRANSPOSED, BX, BZ)  # transposed, [BZ, BX]
    if DG and REVERSE:
        channels = column + tl.arange(0, BZ)
        some = channels < tl.where(row >= 0, DZ, 0)
        later = tl.load(edge + (row * H + head) * DZ + channels, mask=some, other=0.0)
    for n in tl.range(0, chunks, num_stages=STAGES, disable_licm=True):
        at = ((chunks - 1 - n) if REVERSE else n) * C
        start, left = first + at, count - at
        xs = load_rows(x, start, left, head // X_GROUP, 0, H // X_GROUP, DX, C, BX)
        if TRANSPOSED:
            b, r, from_start, to_end, G = load_decay(g, start, left, head, column, H, DZ, REVERSE, C, BZ)
        else:
            b, r, from_start, to_end, G = load_decay(g, start, left, head, 0, H, DX, REVERSE, C, BX)
        os, state = inter_chunk(state, xs, from_start, G, TRANSPOSED, WIDE, PRECISION)
        if LOCAL:
            ys = load_rows(y, start, left, head // X_GROUP, 0, H // X_GROUP, DX, C, BX)
            zs = load_rows(z, start, left, head // Z_GROUP, column, H // Z_GROUP, DZ, C, BZ)
            zero = tl.minimum(left, 0)  # else masks would be kept in registers from chunk to chunk
            to_end = to_end * scale if REVERSE else to_end
            if TRANSPOSED:
                state = tl.dot(tl.trans((zs * to_end).to(zs.dtype)), ys, state, input_precision=PRECISION)
                scores = product(xs, tl.trans(ys), PRECISION) * (scale if REVERSE else 1.0)
                os = intra_values(os, scores, zs, b, r, zero, REVERSE, LEVELS, C, BZ, PRECISION)
            else:
                state = tl.dot(tl.trans(zs), (ys * to_end).to(ys.dtype), state, input_precision=PRECISION)
                scores = intra_scores(xs, ys, b, r, zero, scale, REVERSE, LEVELS, C, BX, PRECISION)
                os = tl.dot(tl.trans(zs), tl.trans(scores.to(zs.dtype)), os, input_precision=PRECISION)
        os = os if TRANSPOSED else tl.trans(os)
        os = os if REVERSE else os * scale
        if DG:
            each = load_rows(own, start, left, head // Z_GROUP, column, H // Z_GROUP, DZ, C, BZ) * os
            later = log_decay_gradient(each, later, inner, dg, start, left, head, column, H, DZ, REVERSE, LOCAL, C, BZ)
        if ADD:
            os += load_rows(add, start, left, head, column, H, DZ, C, BZ)
        store_rows(out, os, start, left, head, column, H, DZ, C, BZ)
