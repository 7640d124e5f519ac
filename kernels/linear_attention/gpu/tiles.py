"""Tiles of packed tensors in Triton, and their sizes: what the kernels share.

A tile has C tokens of one chunk and head, and a power of two of channels; what is outside is read as zero and not written.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

# Log-decays below count as this one: its exponential is zero in fp32.
LEAST = tl.constexpr(-104.0)
# Sums of log-decays are in two parts, multiples of this and what is left: of the first, sums of 64 tokens and their differences are exact
# in fp32, and the second are small. One sum would lose digits of mild decays behind strong ones: 1e-4 of what they leave.
GRAIN = tl.constexpr(2.0**-11)
NARROW = 128  # K up to which a state of K x 64 elements fits in the registers of four warps


@triton.jit
def load_span(table, span):
    """A row of `Spans.table`: first token, tokens, first chunk, row of states."""
    first, count = tl.load(table + 4 * span).to(tl.int64), tl.load(table + 4 * span + 1)
    return first, count, tl.load(table + 4 * span + 2).to(tl.int64), tl.load(table + 4 * span + 3).to(tl.int64)


@triton.jit
def load_chunk(chunks, chunk):
    """A row of `Spans.chunks`: first token, tokens."""
    return tl.load(chunks + 2 * chunk).to(tl.int64), tl.load(chunks + 2 * chunk + 1)


@triton.jit
def load_rows(
    x, first, count, head, channel, HEADS: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr, B: tl.constexpr
):
    """x [T, HEADS, WIDTH] -> [C, B]: `count` tokens from `first` (int64), B channels from `channel`."""
    i, j = tl.arange(0, C)[:, None], channel + tl.arange(0, B)[None, :]
    at = x + (first * HEADS + head) * WIDTH
    # A mask that is always true would cost registers.
    inside = i < count if WIDTH % B == 0 else (i < count) & (j < WIDTH)
    return tl.load(at + i * (HEADS * WIDTH) + j, mask=inside, other=0.0)


@triton.jit
def store_rows(
    x, tile, first, count, head, channel, HEADS: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr, B: tl.constexpr
):
    """The reverse of `load_rows`, in x's dtype."""
    i, j = tl.arange(0, C)[:, None], channel + tl.arange(0, B)[None, :]
    at = x + (first * HEADS + head) * WIDTH
    inside = i < count if WIDTH % B == 0 else (i < count) & (j < WIDTH)
    tl.store(at + i * (HEADS * WIDTH) + j, tile.to(x.dtype.element_ty), mask=inside)


@triton.jit
def load_vector(x, first, count, head, HEADS: tl.constexpr, C: tl.constexpr):
    """x [T, HEADS] -> [C]; places after the last token repeat it: as a sum of log-decays it then has nothing added."""
    i = tl.minimum(tl.arange(0, C), count - 1)
    return tl.load(x + first * HEADS + head + i * HEADS)


@triton.jit
def apart(x):
    """Log-decays or their sums, fp32 or fp64, in two parts in fp32: see GRAIN."""
    coarse = tl.floor(x * (1 / GRAIN)) * GRAIN
    return coarse.to(tl.float32), (x - coarse).to(tl.float32)


@triton.jit
def at_least(g):
    """Log-decays of which none is below LEAST; NaN stays."""
    return tl.maximum(g, LEAST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def load_sums(b, first, count, head, HEADS: tl.constexpr, C: tl.constexpr):
    """Sums of log-decays b [T, HEADS] in fp64 -> [C], and that of the last token, in two parts each."""
    coarse, fine = apart(load_vector(b, first, count, head, HEADS, C))
    total, more = apart(tl.load(b + (first + count - 1) * HEADS + head))
    return coarse, fine, total, more


@triton.jit
def load_state(
    x, row, head, column, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr
):
    """x [m, H, K, V] -> [BK, BV]: columns from `column` of state `row` (int64); zero for a negative one."""
    i, j = tl.arange(0, BK)[:, None], column + tl.arange(0, BV)[None, :]
    at = x + (row * H + head) * (K * V)
    rows = tl.where(row >= 0, K, 0)
    return tl.load(at + i * V + j, mask=(i < rows) & (j < V), other=0.0)


@triton.jit
def load_state_block(
    x, row, head, channel, column, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr
):
    """x [m, H, K, V] -> [BK, BV]: of state `row` (int64) rows from `channel`, columns from `column`."""
    i, j = channel + tl.arange(0, BK)[:, None], column + tl.arange(0, BV)[None, :]
    at = x + (row * H + head) * (K * V)
    if K % BK == 0 and V % BV == 0:
        return tl.load(at + i * V + j)
    else:
        return tl.load(at + i * V + j, mask=(i < K) & (j < V), other=0.0)


@triton.jit
def store_state(
    x, tile, row, head, column, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr
):
    """The reverse of `load_state`, in x's dtype."""
    i, j = tl.arange(0, BK)[:, None], column + tl.arange(0, BV)[None, :]
    at = x + (row * H + head) * (K * V)
    if K % BK == 0 and V % BV == 0:
        tl.store(at + i * V + j, tile.to(x.dtype.element_ty))
    else:
        tl.store(at + i * V + j, tile.to(x.dtype.element_ty), mask=(i < K) & (j < V))


@triton.jit
def pair_decay(b_i, r_i, C: tl.constexpr, STRICT: tl.constexpr = False):
    """e^(b_i - b_j), [C, C], of the pairs j <= i or, if STRICT, j < i; zero for the others. Of sums b in two parts."""
    i = tl.arange(0, C)
    pairs = i[:, None] > i[None, :] if STRICT else i[:, None] >= i[None, :]
    difference = ((b_i[:, None] - b_i[None, :]) + r_i[:, None]) - r_i[None, :]
    return tl.exp(tl.where(pairs, difference, float("-inf")))


def chunk_tokens(keys: int) -> int:
    """Tokens of a chunk for K = `keys`, and a bound on columns of the state at once: both fill registers."""
    return 64 if keys <= NARROW else 32


def sizes(k: Tensor, width: int, heads: int, chunk: int) -> dict[str, Any]:
    """The compile-time sizes of a kernel over k [T, H_k, K] and `heads` heads of `width` columns."""
    half = k.element_size() == 2
    block = chunk_tokens(k.shape[2]) if half else 32  # fp32 takes three products on the tensor cores, and registers
    return dict(
        H=heads,
        GROUP=heads // k.shape[1],
        K=k.shape[2],
        V=width,
        C=chunk,
        BK=max(16, triton.next_power_of_2(k.shape[2])),
        BV=max(16, min(block, triton.next_power_of_2(width))),
        PRECISION="tf32" if half else "tf32x3",
    )


def grouped_sum(x: Tensor, like: Tensor) -> Tensor:
    """Sums of gradients one a value head [T, H, K] over the heads that share a key head: [T, H_k, K], as `like`."""
    if x.shape != like.shape:
        x = x.unflatten(1, (like.shape[1], -1)).sum(2)
    return x.to(like.dtype)
