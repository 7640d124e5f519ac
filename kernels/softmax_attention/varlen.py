"""Tiles as launches of a variable-length flash kernel (Dao, FlashAttention-2, 2023).

Such a kernel takes many sequences, each as rows of q and of k, and one band for all: query i of n sees, of m keys,
those from i + m - n - left to i + m - n + right, where -1 is no bound.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lsys.kernels.softmax_attention.rows import Rows, move, rows_of, take
from lsys.kernels.softmax_attention.tile import FAR, Batches, Tiles, batches


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

    def plan(self, tiles: Tiles, q: Tensor) -> list[Launch]:
        """The launches that compute the tiles: one for each band, unless its tiles share queries."""
        tiles = _aligned(tiles.trimmed())
        return _launches(batches(tiles, _bands(tiles)), q.device)

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


def _aligned(tiles: Tiles) -> Tiles:
    """Trimmed tiles, split by queries so that `last` is m - n if at all, and m >= n if there is any bound.

    All tiles of a causal kind then share one band; besides, the kernels replace a missing bound by the greatest length,
    which hides keys from the first of n > m queries, and take a bound of that length for none.
    """
    done = []
    while len(tiles):
        _, n, _, m, first, last = tiles.columns
        split = n.where((first == -FAR) | (n <= m), 1 - first)  # queries before it reach the first key
        split = split.where(last == FAR, m - last)  # queries from it on reach the last key
        is_cut = split < n
        cut, split = tiles.take(is_cut), split[is_cut]
        done += [tiles.take(~is_cut), replace(cut, n=split).trimmed()]
        none = torch.full_like(split, FAR)
        tiles = replace(cut, q=cut.q + split, n=cut.n - split, first=cut.first + split, last=none).trimmed()
    return Tiles.joined(done) if done else tiles


def _bands(tiles: Tiles) -> tuple[Tensor, Tensor]:
    """(left, right) of aligned tiles."""
    past = tiles.m - tiles.n
    left = (past - tiles.first).masked_fill(tiles.first == -FAR, -1)
    return left, (tiles.last - past).masked_fill(tiles.last == FAR, -1)


def _launches(found: Batches, device: torch.device) -> list[Launch]:
    tiles, bounds = found
    rows = zip(*(rows_of(*spans, bounds, device) for spans in ((tiles.q, tiles.n), (tiles.k, tiles.m))), strict=True)
    bands = zip(*(band.tolist() for band in _bands(tiles.take(bounds[:-1]))), strict=True)
    lengths = torch.stack((tiles.n, tiles.m))
    ends = F.pad(lengths.cumsum(1), (1, 0))
    launches = []
    for (a, b), where, band in zip(pairwise(bounds.tolist()), rows, bands, strict=True):
        cu_seqlens = (ends[:, a : b + 1] - ends[:, a : a + 1]).int()
        launches.append(Launch(*where, *move(cu_seqlens, device), *lengths[:, a:b].amax(1).tolist(), *band))
    return launches
