"""PyTorch's flash attention for CPU, which knows one sequence and top-left causal masks, applied tile by tile.

A causal sequence with more keys than queries is two tiles over the same queries, the full past and the causal
diagonal, merged by log-sum-exp; a windowed one is a row of query blocks, each with a mask over the few keys that it
sees. Given the merged output and log-sum-exp, the backward kernel yields each tile's exact share of the gradients.
"""

from collections.abc import Iterator
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lsys.kernels.softmax_attention.merge import merge

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Queries per windowed tile: a tile of b queries computes b (b + w - 1) scores of which b w count, and costs one launch.
_MIN_BLOCK, _MAX_BLOCK = 64, 256


class Tile(NamedTuple):
    """Queries `q` against keys `k`, neither empty; `first` is set if no earlier tile covered these queries."""

    q: slice
    k: slice
    causal: bool = False
    mask: Tensor | None = None
    first: bool = True


def obstacle(q: Tensor) -> str | None:
    """Why this backend cannot take q; None if it can."""
    if q.device.type != "cpu":
        return f"the tensors are on {q.device}"
    return None if q.is_floating_point() else f"{q.dtype} is no floating-point type"


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths_q: list[int],
    lengths_k: list[int],
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """q [Tq, H, D], k, v [Tk, H_kv, D] -> o [Tq, H, D], lse [Tq, H]."""
    tiles = list(_tiles(lengths_q, lengths_k, causal, window, q.dtype))
    return _Attention.apply(q, k, v, tiles, scale)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, tiles: list[Tile], scale: float) -> tuple[Tensor, Tensor]:
        q, k, v = _rows_dense(q), _rows_dense(k), _rows_dense(v)
        o = torch.zeros_like(q, memory_format=torch.contiguous_format)
        lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
        for tile in tiles:
            operands = _heads(q, tile.q), _heads(k, tile.k), _heads(v, tile.k)
            part, part_lse = _forward(*operands, 0.0, tile.causal, attn_mask=tile.mask, scale=scale)
            part, part_lse = part[0].transpose(0, 1), part_lse[0].transpose(0, 1)  # [1, H, n, ...] -> [n, H, ...]
            if not tile.first:
                part, part_lse = merge(o[tile.q], lse[tile.q], part, part_lse)
            o[tile.q], lse[tile.q] = part, part_lse
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.tiles, ctx.scale = tiles, scale
        ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse = ctx.saved_tensors
        do = _rows_dense(do)
        # Where tiles overlap, half-precision gradients are summed in fp32.
        dtype_q = q.dtype if all(tile.first for tile in ctx.tiles) else lse.dtype
        dtype_k = q.dtype if _disjoint(ctx.tiles) else lse.dtype
        dq = torch.zeros(q.shape, dtype=dtype_q)
        dk, dv = torch.zeros(k.shape, dtype=dtype_k), torch.zeros(v.shape, dtype=dtype_k)
        for tile in ctx.tiles:
            operands = _heads(do, tile.q), _heads(q, tile.q), _heads(k, tile.k), _heads(v, tile.k), _heads(o, tile.q)
            tile_lse = lse[tile.q].transpose(0, 1).unsqueeze(0)  # [n, H] -> [1, H, n]
            parts = _backward(*operands, tile_lse, 0.0, tile.causal, attn_mask=tile.mask, scale=ctx.scale)
            for total, rows, part in zip((dq, dk, dv), (tile.q, tile.k, tile.k), parts, strict=True):
                total[rows] += part[0].transpose(0, 1)  # [1, H, n, D] -> [n, H, D]
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def _tiles(
    lengths_q: list[int], lengths_k: list[int], causal: bool, window: int | None, dtype: torch.dtype
) -> Iterator[Tile]:
    masks: dict[tuple[int, int], Tensor] = {}
    starts_q, starts_k = accumulate(lengths_q, initial=0), accumulate(lengths_k, initial=0)
    for a, b, n, m in zip(starts_q, starts_k, lengths_q, lengths_k, strict=False):
        if n == 0 or m == 0:  # the kernel divides by the sizes
            continue
        past = m - n
        if not causal:
            yield Tile(slice(a, a + n), slice(b, b + m))
        elif window is not None and window < m:
            block = min(max(window, _MIN_BLOCK), _MAX_BLOCK)
            for start in range(0, n, block):
                stop = min(start + block, n)
                key, key_stop = max(0, past + start - window + 1), past + stop
                shape = (stop - start, key_stop - key)
                if shape not in masks:
                    masks[shape] = _window_mask(*shape, window, dtype)
                yield Tile(slice(a + start, a + stop), slice(b + key, b + key_stop), mask=masks[shape])
        else:
            if past:
                yield Tile(slice(a, a + n), slice(b, b + past))
            yield Tile(slice(a, a + n), slice(b + past, b + m), causal=True, first=past == 0)


def _window_mask(n: int, m: int, window: int, dtype: torch.dtype) -> Tensor:
    """Added to the scores of the last n of m positions against all m: 0 if visible, else -inf; [n, m]."""
    age = torch.arange(m - n, m)[:, None] - torch.arange(m)
    return torch.zeros(n, m, dtype=dtype).masked_fill((age < 0) | (age >= window), -torch.inf)


def _disjoint(tiles: list[Tile]) -> bool:
    """Whether no key is in two tiles; tiles come in the order of their keys' starts."""
    return all(left.k.stop <= right.k.start for left, right in zip(tiles, tiles[1:], strict=False))


def _heads(x: Tensor, rows: slice) -> Tensor:
    """[T, H, D] -> [1, H, n, D], a view."""
    return x[rows].transpose(0, 1).unsqueeze(0)


def _rows_dense(x: Tensor) -> Tensor:
    """The kernels want the last dimension dense; the others may be strided."""
    return x if x.stride(-1) == 1 and x.stride(0) > 0 else x.contiguous()
