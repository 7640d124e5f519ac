"""Chunks without decay, or with one decay for all of a head's state: fixed (Lightning, retention) or per token (Mamba-2)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from lsys.kernels.linear_attention.chunked.chunks import ChunkDecay, Chunks, matmul, repeat_heads
from lsys.kernels.linear_attention.chunked.grid import ChunkGrid


class NoDecay:
    """Nothing is forgotten."""

    total = None

    def from_start(self, x: Tensor) -> Tensor:
        return x

    def to_end(self, x: Tensor) -> Tensor:
        return x

    def scores(self, q: Tensor, k: Tensor, group: int) -> Tensor:
        return repeat_heads(matmul(q, k.transpose(2, 3)).tril(), group)


class ScalarDecay:
    """Decays of heads within chunks, from their sums b [1 | n, H, C], which has one row where all chunks are alike, as `difference` has."""

    def __init__(self, b: Tensor, difference: Callable[[], Tensor], chunks: int) -> None:
        self.b, self.difference, self.chunks = b, difference, chunks

    @property
    def total(self) -> Tensor:
        return self.b[..., -1].expand(self.chunks, -1)

    def from_start(self, x: Tensor) -> Tensor:
        return x * self.b.exp()[..., None]

    def to_end(self, x: Tensor) -> Tensor:
        return x * (self.b[..., -1:] - self.b).exp()[..., None]

    def scores(self, q: Tensor, k: Tensor, group: int) -> Tensor:
        return repeat_heads(matmul(q, k.transpose(2, 3)), group) * self.inside

    @cached_property
    def inside(self) -> Tensor:
        """e^(b_i - b_j) for i >= j, else 0: [1 | n, H, C, C]."""
        place = torch.arange(self.b.shape[-1], device=self.b.device)
        return self.difference().masked_fill(place > place[:, None], -torch.inf).exp()


class ScalarChunks(Chunks):
    """log_decay None, [H] or [T, H]."""

    @cached_property
    def decay(self) -> ChunkDecay:
        return NoDecay() if self.log_decay is None else scalar_decay(self.log_decay, self.grid)


def scalar_decay(log_decay: Tensor, grid: ChunkGrid) -> ScalarDecay:
    """Decays within chunks of a log-decay per head [H] or per token and head [T, H]."""
    if log_decay.dim() == 1:
        place = torch.arange(grid.size, device=log_decay.device)
        tokens = (place + 1).expand(1, -1) if grid.filled is None else (place + 1).minimum(grid.filled[:, None])
        b = log_decay[:, None] * tokens[:, None]  # [1 | n, H, C]
        return ScalarDecay(b, lambda: log_decay[:, None, None] * (place[:, None] - place)[None, None], grid.chunks)
    b = grid.cut(log_decay.unsqueeze(-1), log_decay.dtype).squeeze(-1).cumsum(-1)  # [n, H, C]
    return ScalarDecay(b, lambda: b[..., :, None] - b[..., None, :], grid.chunks)
