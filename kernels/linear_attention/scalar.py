"""Chunks without decay, or with one decay for all of a head's state: fixed (Lightning, retention) or per token (Mamba-2)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lsys.kernels.linear_attention.chunks import ChunkDecay, Chunks, matmul, repeat_heads
from lsys.kernels.linear_attention.grid import ChunkGrid


class NoDecay:
    """Nothing is forgotten."""

    total = None

    def entering(self, x: Tensor) -> Tensor:
        return x

    def leaving(self, x: Tensor) -> Tensor:
        return x

    def scores(self, q: Tensor, k: Tensor, group: int) -> Tensor:
        return repeat_heads(matmul(q, k.transpose(2, 3)).tril(), group)


@dataclass(frozen=True)
class ScalarDecay:
    """Of a `ChunkDecay` the numbers; the first dimension is 1 where all chunks are alike."""

    inside: Tensor  # [1 | n, H, C, C]: e^(b_i - b_j) for i >= j, else 0
    entry: Tensor  # [1 | n, H, C, 1]: e^b_i, from before the chunk to token i
    exit: Tensor  # [1 | n, H, C, 1]: e^(G - b_j), from token j to after the chunk
    total: Tensor  # [n, H]: G

    def entering(self, x: Tensor) -> Tensor:
        return x * self.entry

    def leaving(self, x: Tensor) -> Tensor:
        return x * self.exit

    def scores(self, q: Tensor, k: Tensor, group: int) -> Tensor:
        return repeat_heads(matmul(q, k.transpose(2, 3)), group) * self.inside


class ScalarChunks(Chunks):
    """log_decay None, [H] or [T, H]."""

    @cached_property
    def decay(self) -> ChunkDecay:
        return NoDecay() if self.log_decay is None else scalar_decay(self.log_decay, self.grid)


def scalar_decay(log_decay: Tensor, grid: ChunkGrid) -> ScalarDecay:
    """Of a decay per head [H] or per token and head [T, H]."""
    place = torch.arange(grid.size, device=log_decay.device)
    if log_decay.dim() == 1:
        tokens = (place + 1).expand(1, -1) if grid.filled is None else (place + 1).minimum(grid.filled[:, None])
        b = log_decay[:, None] * tokens[:, None]  # [1 | n, H, C]
        difference = log_decay[:, None, None] * (place[:, None] - place)[None, None]  # [1, H, C, C]
    else:
        b = grid.cut(log_decay.unsqueeze(-1), log_decay.dtype).squeeze(-1).cumsum(-1)  # [n, H, C]
        difference = b[..., :, None] - b[..., None, :]  # [n, H, C, C]
    later = place > place[:, None]
    inside = difference.masked_fill(later, -torch.inf).exp()
    total = b[..., -1]
    exit = (total[..., None] - b).exp()
    return ScalarDecay(inside, b.exp()[..., None], exit[..., None], total.expand(grid.chunks, -1))
