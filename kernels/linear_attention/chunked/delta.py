"""Chunks of the delta rule, in UT/WY form, with any decay.

What the tokens of a chunk write depends on what those before them wrote: with A_ij = beta_i k_i . e^(b_i - b_j) k_j for
j < i and T = (1 + A)^-1, they write u - w S of the state S before the chunk, u = T (beta v), w = T (beta e^b k).
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lsys.kernels.linear_attention.chunked.channel import ChannelDecay
from lsys.kernels.linear_attention.chunked.chunks import ChunkDecay, Chunks, Written, matmul
from lsys.kernels.linear_attention.chunked.scalar import NoDecay, scalar_decay


class DeltaChunks(Chunks):
    """beta [T, H], log_decay None, [H], [T, H] or [T, H, K]."""

    @cached_property
    def decay(self) -> ChunkDecay:
        if self.log_decay is None:
            return NoDecay()
        if self.log_decay.dim() < 3:
            return scalar_decay(self.log_decay, self.grid)
        return ChannelDecay(self.grid.cut(self.log_decay, self.dtype))

    @cached_property
    def written(self) -> Written:
        """u [n, H, C, V] and w [n, H, C, K]."""
        tokens, grid = self.tokens, self.grid
        assert tokens.beta is not None
        beta, v = grid.cut(tokens.beta.unsqueeze(-1), self.dtype), grid.cut(tokens.v, self.dtype)  # beta [n, H, C, 1]
        unmixed = _Inverse.apply(beta * self.decay.scores(self.k, self.k, self.group))
        return matmul(unmixed, beta * v), matmul(unmixed, beta * self.decay.from_start(self.heads(self.k)))

    def costly(self) -> Written:
        return self.written


class _Inverse(torch.autograd.Function):
    """(1 + A)^-1 of the strictly lower part A of matrices."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        one = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand_as(a)
        inverse = torch.linalg.solve_triangular(a, one, upper=False, unitriangular=True)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_inverse: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        back = inverse.transpose(2, 3)
        return matmul(matmul(back, d_inverse), back).tril(-1).neg()
