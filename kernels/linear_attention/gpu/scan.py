"""The recurrence over the maps of spans, S -> e^A S + B, in Triton: forwards, and backwards for gradients. No autograd."""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 16  # of a state, in a program


class Scan(NamedTuple):
    """What a recurrence over spans gives: forwards states and sums of log-decays, backwards their gradients."""

    each: Tensor  # [m, H, K, V], before each scanned span; backwards after it
    end: Tensor  # [s, H, K, V], after each scanned segment; backwards before it
    cumulative: Tensor | None = None  # [m, H ...], from the start of the segment to the span
    total: Tensor | None = None  # [s, H ...], over the segment
    transition: Tensor | None = None  # [m, H ...], over the span
    edge: Tensor | None = None  # backwards: [m, H ...], <D, state> after each span


@triton.jit
def scan_kernel(
    update, transition, begin, out, end, cumulative, end_cumulative, before, total, edge, segments, rows,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BLOCKS: tl.constexpr,
    DECAY: tl.constexpr, CHANNEL: tl.constexpr, UPDATE: tl.constexpr, BEGIN: tl.constexpr, REVERSE: tl.constexpr,
    EDGE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program has BK rows of one head's state and goes through the spans of a segment.

    `segments` int32 [s, 2]: the row of the first span, and how many. `out` [m, H, K, V] gets the state before each span,
    `end` [s, H, K, V] the last, `cumulative` and `end_cumulative` the sums of `transition`, [m | s, H ...]. The state begins as
    `begin` [s, H, K, V], or zero.

    REVERSE goes from the last span to the first: of `update`, the gradient of the state before each span by way of the
    outputs, and of `begin`, that of the state after the segment, `out` gets the gradient D of the state after each span
    and `end` that of the state before the segment. EDGE: also <D, the state after the span>, with the states `before` and
    `total` of the forward run: [m, H, K] if CHANNEL, else parts to be summed, [BLOCKS, m, H].
    """
    program = tl.program_id(0)
    block, head, segment = program % BLOCKS, (program // BLOCKS) % H, (program // (BLOCKS * H)).to(tl.int64)
    first, count = tl.load(segments + 2 * segment).to(tl.int64), tl.load(segments + 2 * segment + 1)
    keys, columns = block * BK + tl.arange(0, BK), tl.arange(0, BV)
    tile = head * (K * V) + keys[:, None] * V + columns[None]  # of the row's [H, K, V]
    inside = (keys < K)[:, None] & (columns < V)[None]
    width: tl.constexpr = H * K if CHANNEL else H  # of a row's transition
    channel = head * K + keys if CHANNEL else head + tl.zeros((BK,), tl.int32)
    own = keys < K if CHANNEL else keys == 0  # who stores them
    state, passed = tl.zeros((BK, BV), tl.float32), tl.zeros((BK,), tl.float32)
    if BEGIN:
        state = tl.load(begin + segment * (H * K * V) + tile, mask=inside, other=0.0)
    for n in tl.range(0, count, num_stages=STAGES):
        row = first + ((count - 1 - n) if REVERSE else n)
        tl.store(out + row * (H * K * V) + tile, state, mask=inside)
        if EDGE:
            later = tl.load(before + (row + 1) * (H * K * V) + tile, mask=inside & (n > 0), other=0.0)
            later += tl.load(total + segment * (H * K * V) + tile, mask=inside & (n == 0), other=0.0)
            if CHANNEL:
                tl.store(edge + row * width + channel, tl.sum(state * later, 1), mask=own)
            else:
                tl.store(edge + (block * rows + row) * H + head, tl.sum(state * later))
        if DECAY:
            decay = tl.load(transition + row * width + channel, mask=keys < K, other=0.0)
            state *= tl.exp(decay)[:, None]
            if not REVERSE:
                tl.store(cumulative + row * width + channel, passed, mask=own)
                passed += decay
        if UPDATE:
            state += tl.load(update + row * (H * K * V) + tile, mask=inside, other=0.0)
    tl.store(end + segment * (H * K * V) + tile, state, mask=inside)
    if DECAY and not REVERSE:
        tl.store(end_cumulative + segment * width + channel, passed, mask=own)


def scan_spans(
    update: Tensor | None,
    transition: Tensor | None,
    counts: tuple[int, ...],
    *,
    begin: Tensor | None = None,
    forward: Scan | None = None,
    reverse: bool = False,
    edge: bool = False,
) -> Scan:
    """Scan the maps S -> e^transition S + update of segments of `counts` spans each, from `begin` [s, H, K, V] or zero.

    `forward` is the scan of which this is the reverse, for `edge`.
    """
    like = update if update is not None else begin
    assert like is not None
    heads, keys, columns = like.shape[1:]
    spans, blocks, channel = sum(counts), triton.cdiv(keys, ROWS), transition is not None and transition.dim() == 3
    each, end = like.new_empty(spans, heads, keys, columns), like.new_empty(len(counts), heads, keys, columns)
    cumulative = total = edges = None
    if transition is not None and not reverse:
        cumulative, total = torch.empty_like(transition), transition.new_empty(len(counts), *transition.shape[1:])
    if edge:
        assert transition is not None and forward is not None
        edges = torch.empty_like(transition) if channel else transition.new_empty(blocks, *transition.shape)
    arrays = (update, transition, begin, each, end, cumulative, total)
    states = (None, None) if forward is None else (forward.each, forward.end)
    if counts and heads:
        with torch.cuda.device(like.device) if like.is_cuda else nullcontext():
            scan_kernel[(len(counts) * heads * blocks,)](
                *arrays, *states, edges, segment_table(counts, like.device), spans,
                H=heads, K=keys, V=columns, BK=ROWS, BV=max(16, triton.next_power_of_2(columns)), BLOCKS=blocks,
                DECAY=transition is not None, CHANNEL=channel, UPDATE=update is not None, BEGIN=begin is not None,
                REVERSE=reverse, EDGE=edge, STAGES=3, num_warps=4,
            )  # fmt: skip
    return Scan(each, end, cumulative, total, transition, edges if edges is None or channel else edges.sum(0))


@lru_cache(maxsize=32)
def segment_table(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 [s, 2]: of each segment the first span and their number."""
    count = torch.tensor(counts, dtype=torch.int32)
    return torch.stack([(count.cumsum(0) - count).int(), count], dim=1).to(device)
