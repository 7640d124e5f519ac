"""`merge` into some rows of a running result, in one kernel (CUDA, and interpreted on CPU)."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from lsys.kernels.softmax_attention.rows import Rows

ROWS = 16  # of a program


@triton.jit
def merge_kernel(
    o, lse, other_o, other_lse, rows, first, count, o_row, o_head, lse_row, lse_head, other_row, other_head, other_lse_row,
    other_lse_head, D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """A program merges BR rows of a head; row i of the other result is for row rows[i], or first + i without INDEX."""
    place, head = tl.program_id(0) * BR + tl.arange(0, BR), tl.program_id(1).to(tl.int64)
    is_row = place < count
    row = tl.load(rows + place, mask=is_row, other=0) if INDEX else (first + place).to(tl.int64)
    place, column = place.to(tl.int64), tl.arange(0, BD)
    inside = is_row[:, None] & (column < D)[None]
    target = lse + row * lse_row + head * lse_head
    old = tl.load(target, mask=is_row, other=-float("inf"))
    new = tl.load(other_lse + place * other_lse_row + head * other_lse_head, mask=is_row, other=-float("inf"))
    most = tl.maximum(old, new)
    finite = tl.where(most == -float("inf"), 0.0, most)  # no keys in either
    merged = tl.log(tl.exp(old - finite) + tl.exp(new - finite)) + finite
    weight = tl.exp(new - tl.where(merged == -float("inf"), 0.0, merged))[:, None]
    at = o + row[:, None] * o_row + head * o_head + column[None]
    other = tl.load(other_o + place[:, None] * other_row + head * other_head + column[None], mask=inside, other=0.0)
    total = tl.load(at, mask=inside, other=0.0)
    tl.store(at, total + weight * (other.to(tl.float32) - total), mask=inside)
    tl.store(target, merged, mask=is_row)


def merge_rows(o: Tensor, lse: Tensor, rows: Rows, other_o: Tensor, other_lse: Tensor) -> None:
    """`merge` of rows of o fp32 [Tq, H, D] and lse fp32 [Tq, H], each once, with other_o [n, H, D] and other_lse fp32 [n, H].

    The last dimensions of o and other_o are dense.
    """
    count, heads, width = other_o.shape
    if other_o.numel() == 0:
        return
    index, first = (rows, 0) if isinstance(rows, Tensor) else (None, rows.start or 0)
    with torch.cuda.device(o.device) if o.is_cuda else nullcontext():
        merge_kernel[(triton.cdiv(count, ROWS), heads)](
            o, lse, other_o, other_lse, index, first, count, *o.stride()[:2], *lse.stride(), *other_o.stride()[:2], *other_lse.stride(),
            D=width, BD=max(16, triton.next_power_of_2(width)), BR=ROWS, INDEX=index is not None, num_warps=4,
        )  # fmt: skip
