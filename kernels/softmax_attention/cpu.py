"""PyTorch's flash attention for CPU, which knows dense operands, top-left causal masks and masks given as tensors.

A band becomes blocks of queries, each with a few adjacent ranges of keys, its pieces, merged by log-sum-exp: all keys,
or a full past and a causal end, or the few keys around a window under a mask. Small blocks of equal shape are one call.
"""

from functools import cache, lru_cache, partial, reduce
from typing import NamedTuple

import torch
from torch import Tensor

from lsys.kernels.softmax_attention.merge import merge
from lsys.kernels.softmax_attention.rows import Rows, rows_of, take
from lsys.kernels.softmax_attention.tile import FAR, Tiles, batches

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Queries per windowed block: b queries compute b (b + w - 1) scores of which b w count, and cost one call.
_MIN_BLOCK, _MAX_BLOCK = 32, 128
# Keys under one mask; a wider window is three pieces: masked, full, causal.
_MAX_MASK = 1024
# Blocks of up to so many scores are computed together: a call costs as much as they do. It takes copies of their rows,
# unless they are back to back, and so is given a bounded number of them.
_SMALL, _MAX_ROWS = 4096, 1024


class Piece(NamedTuple):
    """Keys `k` of a block, counted from its first, that are one call of the kernel."""

    k: slice
    causal: bool = False
    mask: Tensor | None = None


class Block(NamedTuple):
    """Queries `q` against keys `k`, each the rows of `number` blocks of equal shape, one after the other."""

    q: Rows
    k: Rows
    number: int
    pieces: list[Piece]


def obstacle(q: Tensor) -> str | None:
    """Why this backend cannot take q; None if it can."""
    if q.device.type != "cpu":
        return f"the tensors are on {q.device}"
    return None if q.is_floating_point() else f"{q.dtype} is no floating-point type"


def plan(tiles: Tiles, q: Tensor) -> list[Block]:
    """The launches that compute the tiles."""
    tiles = _cut(tiles.trimmed())
    most = (_MAX_ROWS // torch.maximum(tiles.n, tiles.m)).clamp(min=1).masked_fill(tiles.n * tiles.m > _SMALL, 1)
    tiles, bounds = batches(tiles, (tiles.n, tiles.m, tiles.first, tiles.last), most)
    rows_q = rows_of(tiles.q, tiles.n, bounds, q.device)
    rows_k = rows_of(tiles.k, tiles.m, bounds, q.device)
    shapes = zip(*(column[bounds[:-1]].tolist() for column in (tiles.n, tiles.m, tiles.first, tiles.last)), strict=True)
    pieces = cache(partial(_pieces, dtype=q.dtype))  # batches of a shape share them
    parts = zip(rows_q, rows_k, bounds.diff().tolist(), shapes, strict=True)
    return [Block(q_, k_, number, pieces(*shape)) for q_, k_, number, shape in parts]


def forward(block: Block, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """o [rows, H, D] and lse [rows, H] of the block's queries over its keys."""
    q, k, v = _heads(q, block.q, block.number), _heads(k, block.k, block.number), _heads(v, block.k, block.number)
    parts = (
        _forward(q, k[:, :, keys], v[:, :, keys], 0.0, causal, attn_mask=mask, scale=scale)
        for keys, causal, mask in block.pieces
    )
    o, lse = next(parts)
    if len(block.pieces) > 1:
        o = o.to(lse.dtype)
    for part in parts:
        merge(o, lse, *part)
    return _rows(o), _rows(lse)


def backward(
    block: Block, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The block's share of dq [rows, H, D], dk and dv [rows, H_kv, D], given o and lse over all keys."""
    do, q, o = (_heads(x, block.q, block.number).to(q.dtype) for x in (do, q, o))
    k, v = _heads(k, block.k, block.number), _heads(v, block.k, block.number)
    lse = _heads(lse, block.q, block.number)
    parts = []
    for keys, causal, mask in block.pieces:
        operands = do, q, k[:, :, keys], v[:, :, keys], o, lse
        parts.append(_backward(*operands, 0.0, causal, attn_mask=mask, scale=scale))
    dq, dk, dv = parts[0] if len(parts) == 1 else _joined(parts, lse.dtype)
    return _rows(dq), _rows(dk), _rows(dv)


def _joined(parts: list[tuple[Tensor, Tensor, Tensor]], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of pieces with the same queries and adjacent keys, [number, H, n, D]."""
    dq, dk, dv = zip(*parts, strict=True)
    return reduce(torch.add, (x.to(dtype) for x in dq)), torch.cat(dk, dim=2), torch.cat(dv, dim=2)


def _cut(tiles: Tiles) -> Tiles:
    """Trimmed tiles; those with a lower bound in blocks of few queries, each with the keys that these see."""
    if not tiles.has_lower_bound:
        return tiles
    window = (tiles.last - tiles.first + 1).clamp(max=_MAX_MASK)
    step = (window // 2).clamp(_MIN_BLOCK, _MAX_BLOCK).where(tiles.first > -FAR, tiles.n)
    blocks = (tiles.n + step - 1) // step
    tile = torch.arange(len(tiles)).repeat_interleave(blocks)
    shift = (torch.arange(len(tile)) - (blocks.cumsum(0) - blocks)[tile]) * step[tile]
    q, n, k, m, first, last = (column[tile] for column in tiles.columns)
    return Tiles(q + shift, torch.minimum(n - shift, step[tile]), k, m, first + shift, last + shift).trimmed()


def _pieces(n: int, m: int, first: int, last: int, dtype: torch.dtype) -> list[Piece]:
    """The pieces of a trimmed tile. They are adjacent, and every query sees a key of each: seeing nothing, it would become nan."""
    if first > -FAR and m <= _MAX_MASK:
        width = None if last == FAR else last - first
        return [Piece(slice(0, m), mask=_mask(width, dtype)[:n, -first : m - first])]
    pieces, edge, past = [], 0, min(m, last)  # from `edge` to `past` all queries see all keys
    if first > -FAR:
        edge = n + first
        pieces.append(Piece(slice(0, edge), mask=_mask(None, dtype)[:n, -first:n]))
    if edge < past:
        pieces.append(Piece(slice(edge, past)))
    if past < m:
        pieces.append(Piece(slice(past, m), causal=True))
    return pieces


@lru_cache(maxsize=8)
def _mask(width: int | None, dtype: torch.dtype) -> Tensor:
    """Added to scores: 0 where 0 <= j - i (<= width), else -inf. Columns from -first on are the mask of a band."""
    age = torch.arange(_MAX_MASK + _MAX_BLOCK) - torch.arange(_MAX_BLOCK)[:, None]
    hidden = age < 0 if width is None else (age < 0) | (age > width)
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, -torch.inf)


def _heads(x: Tensor, rows: Rows, count: int) -> Tensor:
    """[T, H, ...] -> [count, H, n, ...]; a view if the rows are."""
    return take(x, rows).unflatten(0, (count, -1)).transpose(1, 2)


def _rows(x: Tensor) -> Tensor:
    """[count, H, n, ...] -> [count * n, H, ...]"""
    return x.transpose(1, 2).flatten(0, 1)
