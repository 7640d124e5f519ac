"""The short causal convolution in Triton: one kernel forward, one backward, activation inside. No autograd.

Which rows belong together is in tables (`neighbours.py`), so that kernels know neither sequences nor ranks. Backward makes the sums of the
forward pass again from x instead of keeping them.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lsys.kernels.short_convolution.neighbours import Neighbours

ROWS, CHANNELS = 32, 128  # of a program


class Gradients(NamedTuple):
    x: Tensor  # [T, C], in x's dtype
    kept: Tensor  # fp32 [places, C], see `Neighbours.kept`
    weight: Tensor  # fp32 [C, W]
    bias: Tensor  # fp32 [C]


@triton.jit
def _row(x, others, row, channel, inside, T, C: tl.constexpr):
    """fp32 [rows, channels] of x, or of the rows from elsewhere behind it; zeros where row is -1."""
    at = tl.where(row < T, row, row - T).to(tl.int64)[:, None] * C + channel[None]
    own = tl.load(x + at, mask=inside & ((row >= 0) & (row < T))[:, None], other=0.0).to(tl.float32)
    other = tl.load(others + at, mask=inside & (row >= T)[:, None], other=0.0).to(tl.float32)
    return tl.where((row < T)[:, None], own, other)


@triton.jit
def _behind(behind, token, is_token, j: tl.constexpr, W: tl.constexpr):
    """The row j before each token."""
    if j == 0:
        return tl.where(is_token, token, -1)
    return tl.load(behind + token.to(tl.int64) * (W - 1) + (j - 1), mask=is_token, other=-1)


@triton.jit
def convolution_kernel(
    x, others, weight, bias, behind, y, T,
    C: tl.constexpr, W: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y [T, C] of BT tokens and BC channels; x [T, C], others [R, C], weight [C, W], bias [C], behind int32 [T, W - 1]."""
    token, channel = tl.program_id(0) * BT + tl.arange(0, BT), tl.program_id(1) * BC + tl.arange(0, BC)
    is_token, is_channel = token < T, channel < C
    inside = is_token[:, None] & is_channel[None]
    total = tl.zeros((BT, BC), tl.float32)
    if BIAS:
        total += tl.load(bias + channel, mask=is_channel, other=0.0).to(tl.float32)[None]
    for j in tl.static_range(W):
        tap = tl.load(weight + channel * W + (W - 1 - j), mask=is_channel, other=0.0).to(tl.float32)
        total += _row(x, others, _behind(behind, token, is_token, j, W), channel, inside, T, C) * tap[None]
    if SILU:
        total *= tl.sigmoid(total)
    tl.store(y + token.to(tl.int64)[:, None] * C + channel[None], total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def convolution_gradients_kernel(
    x, others, weight, bias, dy, behind, ahead, kept, dx, d_kept, d_taps, T, E,
    C: tl.constexpr, W: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Gradients of BT of the E = T + R rows and BC channels, from dy [T, C].

    dx [T, C] and, in fp32, d_kept [places, C]; d_taps fp32 [programs, W + 1, C] get this program's part of those of the weight, by
    distance, and of the bias.
    """
    block = tl.program_id(0)
    row, channel = block * BT + tl.arange(0, BT), tl.program_id(1) * BC + tl.arange(0, BC)
    is_row, is_channel = row < E, channel < C
    total = tl.zeros((BT, BC), tl.float32)
    start = tl.zeros((BC,), tl.float32)
    if BIAS:
        start = tl.load(bias + channel, mask=is_channel, other=0.0).to(tl.float32)
    part = d_taps + block.to(tl.int64) * ((W + 1) * C) + channel
    for j in tl.static_range(W):
        if j == 0:
            token = tl.where(row < T, row, -1)
        else:
            token = tl.load(ahead + row.to(tl.int64) * (W - 1) + (j - 1), mask=is_row, other=-1)
        is_token = token >= 0
        inside = is_token[:, None] & is_channel[None]
        at = token.to(tl.int64)[:, None] * C + channel[None]
        gradient = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        if SILU:
            made = tl.zeros((BT, BC), tl.float32) + start[None]
            for i in tl.static_range(W):
                tap = tl.load(weight + channel * W + (W - 1 - i), mask=is_channel, other=0.0).to(tl.float32)
                made += _row(x, others, _behind(behind, token, is_token, i, W), channel, inside, T, C) * tap[None]
            gate = tl.sigmoid(made)
            gradient = tl.where(inside, gradient * gate * (1 + made * (1 - gate)), 0.0)
        if j == 0:
            tl.store(part + W * C, tl.sum(gradient, 0), mask=is_channel)
            for i in tl.static_range(W):
                seen = _row(x, others, _behind(behind, token, is_token, i, W), channel, inside, T, C)
                tl.store(part + i * C, tl.sum(gradient * seen, 0), mask=is_channel)
        tap = tl.load(weight + channel * W + (W - 1 - j), mask=is_channel, other=0.0).to(tl.float32)
        total += gradient * tap[None]
    own = ((row < T)[:, None]) & is_channel[None]
    tl.store(dx + row.to(tl.int64)[:, None] * C + channel[None], total.to(dx.dtype.element_ty), mask=own)
    place = tl.load(kept + row, mask=is_row, other=-1)
    wanted = (place >= 0)[:, None] & is_channel[None]
    tl.store(d_kept + place.to(tl.int64)[:, None] * C + channel[None], total, mask=wanted)


def forward(
    x: Tensor, others: Tensor, weight: Tensor, bias: Tensor | None, near: Neighbours, activation: str | None
) -> Tensor:
    """x [T, C], others [R, C], weight [C, W], bias [C] -> [T, C] in x's dtype. All contiguous, of any dtypes."""
    y = torch.empty_like(x)
    tokens, channels = x.shape
    if x.numel():
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            convolution_kernel[(triton.cdiv(tokens, ROWS), triton.cdiv(channels, CHANNELS))](
                x, others, weight, bias, near.behind, y, tokens,
                C=channels, W=weight.shape[1], BIAS=bias is not None, SILU=activation == "silu", BT=ROWS, BC=CHANNELS, num_warps=4,
            )  # fmt: skip
    return y


def backward(
    x: Tensor, others: Tensor, weight: Tensor, bias: Tensor | None, near: Neighbours, activation: str | None, dy: Tensor
) -> Gradients:
    """From dy [T, C], contiguous, the gradients of all that `forward` takes; those of `others` are in `kept`."""
    tokens, channels = x.shape
    rows, width = tokens + len(others), weight.shape[1]
    blocks = triton.cdiv(rows, ROWS)
    dx, kept = torch.empty_like(x), x.new_empty(near.places, channels, dtype=torch.float32)
    taps = x.new_empty(blocks, width + 1, channels, dtype=torch.float32)
    if rows and channels:
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            convolution_gradients_kernel[(blocks, triton.cdiv(channels, CHANNELS))](
                x, others, weight, bias, dy, near.behind, near.ahead, near.kept, dx, kept, taps, tokens, rows,
                C=channels, W=width, BIAS=bias is not None, SILU=activation == "silu", BT=ROWS, BC=CHANNELS, num_warps=8,
            )  # fmt: skip
    total = taps.sum(0)  # [W + 1, C], by distance
    return Gradients(dx, kept, total[:width].flip(0).T, total[width])
