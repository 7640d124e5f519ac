"""Chunks without decay, or with one decay for all of a head's state: fixed (Lightning, retention) or per token (Mamba-2)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from lsys.kernels.linear_attention.chunked.chunks import ChunkDecay, Chunks, matmul, repeat_heads
from lsys.kernels.linear_attention.chunked.grid import ChunkGrid
from lsys.kernels.linear_attention.decay import bounded, running


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
    """Decays of heads within chunks, by logarithms, which have one row where all chunks are alike.

    Args:
        since: b [1 | n, H, C], from before the chunk to each token. until: G - b [1 | n, H, C], from each token to after the chunk.
        between: makes b_i - b_j [1 | n, H, C, C], of j <= i.
        chunks: n.
    """

    def __init__(self, since: Tensor, until: Tensor, between: Callable[[], Tensor], chunks: int) -> None:
        self.since, self.until, self.between, self.chunks = since, until, between, chunks

    @property
    def total(self) -> Tensor:
        return self.since[..., -1].expand(self.chunks, -1)

    def from_start(self, x: Tensor) -> Tensor:
        return x * self.since.exp()[..., None]

    def to_end(self, x: Tensor) -> Tensor:
        return x * self.until.exp()[..., None]

    def scores(self, q: Tensor, k: Tensor, group: int) -> Tensor:
        return repeat_heads(matmul(q, k.transpose(2, 3)), group) * self.inside

    @cached_property
    def inside(self) -> Tensor:
        """e^(b_i - b_j) for i >= j, else 0: [1 | n, H, C, C]."""
        place = torch.arange(self.since.shape[-1], device=self.since.device)
        return self.between().masked_fill_(place > place[:, None], -torch.inf).exp_()


class ScalarChunks(Chunks):
    """log_decay None, [H] or [T, H]."""

    @cached_property
    def decay(self) -> ChunkDecay:
        return NoDecay() if self.log_decay is None else scalar_decay(self.log_decay, self.grid)


def scalar_decay(log_decay: Tensor, grid: ChunkGrid) -> ScalarDecay:
    """Decays within chunks of a log-decay per head [H] or per token and head [T, H]."""
    return _of_heads(log_decay, grid) if log_decay.dim() == 1 else _of_tokens(log_decay, grid)


def _of_heads(log_decay: Tensor, grid: ChunkGrid) -> ScalarDecay:
    dtype, g = log_decay.dtype, bounded(log_decay).double()[:, None]  # whose gradient is a sum over all pairs
    place = torch.arange(grid.size, device=log_decay.device)
    tokens = place[-1:] + 1 if grid.filled is None else grid.filled  # [1 | n]
    upto = (place + 1).minimum(tokens[:, None])[:, None]  # [1 | n, 1, C]
    after = (tokens[:, None] - 1 - place).clamp(min=0)[:, None]
    distance = (place[:, None] - place).clamp(min=0)
    return ScalarDecay(
        (g * upto).to(dtype), (g * after).to(dtype), lambda: (g[..., None] * distance)[None].to(dtype), grid.chunks
    )


def _of_tokens(log_decay: Tensor, grid: ChunkGrid) -> ScalarDecay:
    b, rest = running(grid.cut(log_decay.unsqueeze(-1), log_decay.dtype).squeeze(-1))  # [n, H, C]

    def between() -> Tensor:
        difference = b[..., :, None] - b[..., None, :]
        return difference.add_(rest[..., :, None]).sub_(rest[..., None, :])

    return ScalarDecay(b, (b[..., -1:] - b) + (rest[..., -1:] - rest), between, grid.chunks)
