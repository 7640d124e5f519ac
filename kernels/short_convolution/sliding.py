"""The short causal convolution by shifted sums: W products of whole rows, block by block so that a block stays in a CPU's cache."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK = 1 << 16  # elements of a block on CPU (measured); on other devices one block is all


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, lengths: Sequence[int]) -> Tensor:
    """As `reference.convolution` with nothing before the sequences: x [T, C], weight [C, W], bias [C] -> [T, C] in fp32 at least."""
    return _Slide.apply(x, weight, bias, _Borders(lengths, weight.shape[1], x.device))


class _Borders:
    """Which rows see another sequence when they look j rows back: those of the first j places of theirs."""

    def __init__(self, lengths: Sequence[int], width: int, device: torch.device) -> None:
        length = torch.tensor([length for length in lengths if length], dtype=torch.int64)
        start = (length.cumsum(0) - length)[1:, None]  # the first sequence has no other before it
        place = torch.arange(max(width - 1, 0))
        self.rows: list[list[int]] = [[]]  # by j, ascending
        for j in range(1, width):
            held = place[:j] < length[1:, None]
            self.rows.append((start + place[:j])[held].tolist())
        self.on_device = [torch.tensor(rows, dtype=torch.int64, device=device) for rows in self.rows]

    def seen(self, part: Tensor, j: int, row: int) -> Tensor:
        """What the rows from `row` on see j rows back, [n, C], with zeros in place of other sequences' rows.

        Also the other way round: what is given to the rows that are j before those from `row` on.
        """
        first = bisect_left(self.rows[j], row)
        stop = bisect_left(self.rows[j], row + len(part), first)
        return part if first == stop else part.index_fill(0, self.on_device[j][first:stop] - row, 0)


class _Slide(torch.autograd.Function):
    """x [T, C], weight [C, W], bias [C] -> [T, C]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, borders: _Borders) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.borders, ctx.bias_dtype = borders, None if bias is None else bias.dtype
        dtype = torch.promote_types(x.dtype, torch.float32)
        taps = _taps(weight, dtype)
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        for start, stop in _blocks(x):
            rows, first = _behind(x, start, stop, len(taps), dtype)
            torch.mul(rows[start - first :], taps[0], out=out[start:stop])
            if bias is not None:
                out[start:stop] += bias
            for j, tap in enumerate(taps[1:], 1):
                begin = max(start, j)  # before it there are no j rows
                if begin < stop:
                    seen = borders.seen(rows[begin - j - first : stop - j - first], j, begin)
                    out[begin:stop].addcmul_(seen, tap)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        taps = _taps(weight, grad.dtype)
        d_x, d_taps = torch.empty_like(x), torch.zeros_like(taps)
        for start, stop in _blocks(grad):
            d_rows = grad[start:stop] * taps[0]
            for j, tap in enumerate(taps[1:], 1):
                last = min(stop, len(grad) - j)  # rows from there on are seen by none j rows on
                if last > start:
                    d_rows[: last - start].addcmul_(ctx.borders.seen(grad[start + j : last + j], j, start + j), tap)
            d_x[start:stop] = d_rows
            rows, first = _behind(x, start, stop, len(taps), grad.dtype)
            for j, d_tap in enumerate(d_taps):
                begin = max(start, j)
                if begin < stop:
                    seen = ctx.borders.seen(rows[begin - j - first : stop - j - first], j, begin)
                    d_tap += (grad[begin:stop] * seen).sum(0)
        d_weight = d_taps.flip(0).T.to(weight.dtype)
        return d_x, d_weight, None if ctx.bias_dtype is None else grad.sum(0).to(ctx.bias_dtype), None


def _taps(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[C, W] -> [W, C], that of the token itself first."""
    return weight.to(dtype).T.flip(0).contiguous()


def _blocks(x: Tensor) -> Iterator[tuple[int, int]]:
    size = max(_BLOCK // max(x.shape[1], 1), 16) if x.device.type == "cpu" else max(len(x), 1)
    return ((start, min(start + size, len(x))) for start in range(0, len(x), size))


def _behind(x: Tensor, start: int, stop: int, width: int, dtype: torch.dtype) -> tuple[Tensor, int]:
    """A block's rows behind the width - 1 rows before it, and the number of the first of them."""
    first = max(start - width + 1, 0)
    return x[first:stop].to(dtype), first
