"""Tiles as launches of a variable-length flash kernel (Dao, FlashAttention-2, 2023).

Such a kernel takes many sequences, each as rows of q and of k, and one band for all: query i of n sees, of m keys,
those from i + m - n - left to i + m - n + right, where -1 is no bound.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lsys.kernels.softmax_attention.rows import Rows, move, rows_of, take
from lsys.kernels.softmax_attention.tile import Tile, trim, waves


class Launch(NamedTuple):
    """Sequences of one band: rows of q and k, one sequence after the other, their bounds and greatest lengths."""

    q: Rows
    k: Rows
    bounds_q: Tensor
    bounds_k: Tensor
    max_q: int
    max_k: int
    left: int
    right: int


@dataclass(frozen=True)
class Varlen:
    """A backend around one kernel.

    run: (q, k, v, launch, scale) -> o [n, H, D], lse [H, n].
    run_backward: (do, q, k, v, o, lse [H, n], launch, scale) -> dq, dk, dv.
    Both get the launch's own rows, with a head width that `granularity` divides.
    """

    obstacle: Callable[[Tensor], str | None]
    run: Callable[..., tuple[Tensor, Tensor]]
    run_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    granularity: int = 8

    def plan(self, tiles: list[Tile], q: Tensor) -> list[Launch]:
        """The launches that compute the tiles: one for each band, unless its tiles share queries."""
        bands: dict[tuple[int, int], list[Tile]] = defaultdict(list)
        for tile in _aligned(trim(tiles)):
            bands[_band(tile)].append(tile)
        return [_launch(wave, *band, q.device) for band, same in bands.items() for wave in waves(same)]

    def forward(self, launch: Launch, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """o [rows, H, D] and lse [rows, H] of the launch's queries over its keys."""
        width = q.shape[-1]
        o, lse = self.run(
            self._pad(take(q, launch.q)), self._pad(take(k, launch.k)), self._pad(take(v, launch.k)), launch, scale
        )
        return o[..., :width], lse.t()

    def backward(
        self, launch: Launch, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The launch's share of dq [rows, H, D], dk and dv [rows, H_kv, D], given o and lse over all keys."""
        width = q.shape[-1]
        do, q, o = (self._pad(take(x, launch.q).to(q.dtype)) for x in (do, q, o))
        k, v = self._pad(take(k, launch.k)), self._pad(take(v, launch.k))
        dq, dk, dv = self.run_backward(do, q, k, v, o, take(lse, launch.q).t().contiguous(), launch, scale)
        return dq[..., :width], dk[..., :width], dv[..., :width]

    def _pad(self, x: Tensor) -> Tensor:
        """Zero columns change neither scores nor the other columns of o."""
        missing = -x.shape[-1] % self.granularity
        return F.pad(x, (0, missing)) if missing else x


def _aligned(tiles: list[Tile]) -> Iterator[Tile]:
    """Trimmed tiles, split by queries so that `last` is m - n if at all, and m >= n if there is any bound.

    All tiles of a causal kind then share one band; besides, the kernels replace a missing bound by the greatest length,
    which hides keys from the first of n > m queries, and take a bound of that length for none.
    """
    for tile in tiles:
        (q, k, first, last), n, m = tile, tile.q.stop - tile.q.start, tile.k.stop - tile.k.start
        split = n
        if last is not None:
            split = m - last  # queries from it on reach the last key
        elif first is not None and n > m:
            split = 1 - first  # queries before it reach the first key
        if split >= n:
            yield tile
            continue
        middle = q.start + split
        head, tail = slice(q.start, middle), slice(middle, q.stop)
        shifted = None if first is None else first + split
        yield from trim([Tile(head, k, first, last)])
        yield from _aligned(trim([Tile(tail, k, shifted, None)]))


def _band(tile: Tile) -> tuple[int, int]:
    """(left, right) of an aligned tile."""
    past = (tile.k.stop - tile.k.start) - (tile.q.stop - tile.q.start)
    return -1 if tile.first is None else past - tile.first, -1 if tile.last is None else tile.last - past


def _launch(tiles: list[Tile], left: int, right: int, device: torch.device) -> Launch:
    spans_q, spans_k = [tile.q for tile in tiles], [tile.k for tile in tiles]
    lengths_q, lengths_k = ([x.stop - x.start for x in spans] for spans in (spans_q, spans_k))
    bounds = torch.tensor([[0, *accumulate(lengths)] for lengths in (lengths_q, lengths_k)], dtype=torch.int32)
    bounds_q, bounds_k = move(bounds, device)
    return Launch(
        rows_of(spans_q, device),
        rows_of(spans_k, device),
        bounds_q,
        bounds_k,
        max(lengths_q),
        max(lengths_k),
        left,
        right,
    )
