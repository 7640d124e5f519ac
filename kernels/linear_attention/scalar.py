"""Chunks without decay, or with one decay for all of a head's state: fixed (Lightning, retention) or per token (Mamba-2)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lsys.kernels.linear_attention.chunked import ChunkedSegments, matmul
from lsys.kernels.linear_attention.grid import ChunkGrid


class ChunkDecay(NamedTuple):
    """Decay between places of a chunk; the first dimension is 1 where all chunks are alike.

    b_i is the sum of the log-decays of the chunk up to token i, G that of all. Only differences that are never positive
    are exponentiated.
    """

    inside: Tensor  # [1 | n, H, C, C]: e^(b_i - b_j) for i >= j, else 0
    entry: Tensor  # [1 | n, H, C, 1]: e^b_i, from before the chunk to token i
    exit: Tensor  # [1 | n, H, C, 1]: e^(G - b_j), from token j to after the chunk
    total: Tensor  # [n, H]: G


class ScalarSegments(ChunkedSegments):
    """log_decay None, [H] or [T, H]."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.decay = None if self.log_decay is None else chunk_decay(self.log_decay, self.grid)

    def chunk_maps(self) -> tuple[Tensor, Tensor | None]:
        grid, decay = self.grid, self.decay
        k, v = self.heads(grid.scan_rows(self.k)), grid.scan_rows(self.v)
        if decay is not None:
            v = v * grid.scan_rows(decay.exit)
        update = matmul(k.transpose(2, 3), v)  # [m, H, K, C] [m, H, C, V] -> [m, H, K, V]
        return update, None if decay is None else grid.scan_rows(decay.total)

    def intra(self) -> Tensor:
        scores = matmul(self.q, self.k.transpose(2, 3), self.scale)  # [n, H_k, C, C]
        if self.decay is None:
            return matmul(self.heads(scores.tril()), self.v)
        return matmul(self.heads(scores) * self.decay.inside, self.v)

    def queries(self) -> Tensor:
        q = self.heads(self.grid.scan_rows(self.q))
        return q if self.decay is None else q * self.grid.scan_rows(self.decay.entry)


def chunk_decay(log_decay: Tensor, grid: ChunkGrid) -> ChunkDecay:
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
    return ChunkDecay(inside, b.exp()[..., None], exit[..., None], total.expand(grid.chunks, -1))
