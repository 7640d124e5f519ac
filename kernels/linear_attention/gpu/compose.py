"""`scan.compose` and `scan.adjoint` in Triton: the recurrence over maps of states, S -> A S + B, forwards and backwards. No autograd.

Of matrices A, one launch goes through up to 32 maps of each sequence. Beyond, sequences are cut into blocks: a launch makes one map of each block, these are
composed, and a last launch goes through all blocks at once from the states before them. So 1,024 maps take four launches and 96 dependent
products, where one launch would take 1,023.

Decays of heads or channels need one launch for any number of maps (`gpu.scan`): a step of theirs costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lsys.kernels.linear_attention.gpu.scan import scan_spans, segment_table
from lsys.kernels.linear_attention.transition import is_matrix

BLOCK = 32  # maps of a sequence that one launch goes through
COLUMNS = 32  # of a state, in a program
STAGES = 1  # a transition [128, 128] is 64 KiB: two at once would not fit every GPU
PRECISION = "tf32x3"  # of fp32 products: three of TF32 make up for its short mantissa


class Composed(NamedTuple):
    """Forwards the states before each map and after each sequence; backwards the gradients of those after each map and before each sequence."""

    each: Tensor  # [n, H, K, V]
    end: Tensor  # [sequences, H, K, V]


@triton.jit
def compose_kernel(
    update, transition, begin, out, end, segments,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, COLUMN_BLOCKS: tl.constexpr,
    BEGIN: tl.constexpr, UPDATE: tl.constexpr, OUT: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program has BV columns of one head's state and goes through the maps of a sequence.

    `segments` int32 [s, 2]: the row of a sequence's first map, and how many. `out` [n, H, K, V] gets the state before each map, `end`
    [s, H, K, V] the last one. The state begins as `begin` [s, H, K, V]; without, as 1 (then V is K) unless UPDATE, else as 0.

    REVERSE goes from the last map to the first, with A^T: `update` is the gradient of the state before each map by way of what was made of
    it, `begin` that of the last state; `out` gets that of the state after each map, `end` that of the first.
    """
    program = tl.program_id(0)
    block, head = program % COLUMN_BLOCKS, (program // COLUMN_BLOCKS) % H
    segment = (program // (COLUMN_BLOCKS * H)).to(tl.int64)
    first, count = tl.load(segments + 2 * segment).to(tl.int64), tl.load(segments + 2 * segment + 1)
    keys, columns = tl.arange(0, BK), block * BV + tl.arange(0, BV)
    tile = head * (K * V) + keys[:, None] * V + columns[None]  # of the row's [H, K, V]
    inside = (keys < K)[:, None] & (columns < V)[None]
    square = (keys < K)[:, None] & (keys < K)[None]
    across = keys[None] * K + keys[:, None] if REVERSE else keys[:, None] * K + keys[None]
    if BEGIN:
        state = tl.load(begin + segment * (H * K * V) + tile, mask=inside, other=0.0)
    elif UPDATE:
        state = tl.zeros((BK, BV), tl.float32)
    else:
        state = (keys[:, None] == columns[None]).to(tl.float32)
    for n in tl.range(0, count):
        row = first + ((count - 1 - n) if REVERSE else n)
        if OUT:
            tl.store(out + row * (H * K * V) + tile, state, mask=inside)
        a = tl.load(transition + (row * H + head) * (K * K) + across, mask=square, other=0.0)
        state = tl.dot(a, state, input_precision=PRECISION)
        if UPDATE:
            state += tl.load(update + row * (H * K * V) + tile, mask=inside, other=0.0)
    tl.store(end + segment * (H * K * V) + tile, state, mask=inside)


def forwards(
    update: Tensor, transition: Tensor | None, counts: tuple[int, ...], initial: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """As `scan.compose`: (before, cumulative, total, total_cumulative)."""
    if transition is not None and is_matrix(transition):
        before, total = compose_matrices(update, transition, counts, initial)
        return before, None, total, None
    found = scan_spans(update.contiguous(), _contiguous(transition), counts, begin=_contiguous(initial))
    return found.each, found.cumulative, found.end, found.total


def backwards(
    d_before: Tensor, d_total: Tensor | None, transition: Tensor | None, counts: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """As `scan.adjoint`: gradients of the updates and of the initial states."""
    if transition is not None and is_matrix(transition):
        return compose_matrices(d_before, transition, counts, d_total, reverse=True)
    begin = _contiguous(d_total)
    found = scan_spans(d_before.contiguous(), _contiguous(transition), counts, begin=begin, reverse=True)
    return found.each, found.end


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def compose_matrices(
    update: Tensor, transition: Tensor, counts: Sequence[int], begin: Tensor | None = None, *, reverse: bool = False
) -> Composed:
    """The states of sequences of `counts` maps each, from `begin` [sequences, H, K, V] or zero.

    Args:
        update: [n, H, K, V] fp32. transition: [n, H, K, K] fp32. reverse: gradients, see `Composed`.
    """
    counts, begin = tuple(counts), None if begin is None else begin.contiguous()
    update, transition = update.contiguous(), transition.contiguous()
    if max(counts, default=0) <= BLOCK:
        return _launch(update, transition, begin, counts, reverse)
    cut = _cut(counts)
    only = _launch(update, transition, None, cut.blocks, reverse, keeps=False).end
    across = _launch(None, transition, None, cut.blocks, reverse, keeps=False).end
    # A block's map goes back by A^T as it goes forth by A: what was composed backwards is transposed already.
    whole = compose_matrices(only, across.mT if reverse else across, cut.counts, begin, reverse=reverse)
    each = _launch(update, transition, whole.each, cut.blocks, reverse).each
    return Composed(each, whole.end)


class Cut(NamedTuple):
    """Sequences in blocks of at most BLOCK maps: the maps of each block, and the blocks of each sequence."""

    blocks: tuple[int, ...]
    counts: tuple[int, ...]


@lru_cache(maxsize=64)
def _cut(counts: tuple[int, ...]) -> Cut:
    blocks = [min(BLOCK, count - begin) for count in counts for begin in range(0, count, BLOCK)]
    return Cut(tuple(blocks), tuple(-(-count // BLOCK) for count in counts))


def _launch(
    update: Tensor | None,
    transition: Tensor,
    begin: Tensor | None,
    counts: tuple[int, ...],
    reverse: bool,
    *,
    keeps: bool = True,
) -> Composed:
    """`update` None: from 1, without additions, what the maps make of 1; `keeps`: the states before each map."""
    heads, keys = transition.shape[1:3]
    columns = keys if update is None else update.shape[-1]
    rows = transition.new_empty(len(transition) if keeps else 0, heads, keys, columns)
    end = transition.new_empty(len(counts), heads, keys, columns)
    blocks = triton.cdiv(columns, COLUMNS)
    if counts and heads:
        with torch.cuda.device(end.device) if end.is_cuda else nullcontext():
            compose_kernel[(len(counts) * heads * blocks,)](
                update, transition, begin, rows, end, segment_table(counts, end.device),
                H=heads, K=keys, V=columns, BK=max(16, triton.next_power_of_2(keys)), BV=COLUMNS, COLUMN_BLOCKS=blocks,
                BEGIN=begin is not None, UPDATE=update is not None, OUT=keeps, REVERSE=reverse, PRECISION=PRECISION, num_warps=8, num_stages=STAGES,
            )  # fmt: skip
    return Composed(rows, end)
