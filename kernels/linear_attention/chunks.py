"""Chunks of packed segments in PyTorch operations: what each gives of a state S before it, and what it makes of it.

What all members share; `scalar.py`, `channel.py` and `delta.py` say how it decays and what it writes. The README has the
mathematics.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lsys.kernels.linear_attention.grid import ChunkGrid, chunk_size
from lsys.kernels.linear_attention.scan import scan


class Tokens(NamedTuple):
    """Packed tokens, and a decay per head among them: see `lsys.kernels.linear_attention.segments`."""

    q: Tensor  # [T, H_k, K]
    k: Tensor
    v: Tensor  # [T, H, V]
    log_decay: Tensor | None  # [H], [T, H] or [T, H, K]
    beta: Tensor | None  # [T, H]

    def each(self, change: Callable[[Tensor], Tensor]) -> "Tokens":
        """`change` made to all that is there but a decay per head, which has no tokens."""
        return Tokens(*(x if x is None or x.dim() == 1 else change(x) for x in self))  # type: ignore[arg-type]


class ChunkDecay(Protocol):
    """Decay inside the chunks of a grid. b_i is the sum of the log-decays of a chunk up to token i, G that of all.

    Only numbers that are never positive are exponentiated.
    """

    @property
    def total(self) -> Tensor | None:
        """G, [n, H] or [n, H, K]; None without decay."""

    def entering(self, x: Tensor) -> Tensor:
        """From before the chunk to token i, e^(b_i) x_i: [n, H, C, K] -> the same."""

    def leaving(self, x: Tensor) -> Tensor:
        """From token j to after the chunk, e^(G - b_j) x_j: [n, H, C, K] -> the same."""

    def scores(self, q: Tensor, k: Tensor, group: int) -> Tensor:
        """q_i . e^(b_i - b_j) k_j for j <= i, else 0: [n, H_k, C, K] twice -> [n, H_k group, C, C]."""


class Chunks(ABC):
    """Tokens of packed segments, cut in chunks of C.

    Of the state S before a chunk it makes A S + update, and its output is scale (intra + queries S).

    Attributes:
        q, k, v: [n, H_k | H, C, K | V], zero where a chunk has no token.
        log_decay: as given, in the dtype of states; None without decay.
        beta: [n, H, C] of the delta rule.
    """

    def __init__(self, tokens: Tokens, grid: ChunkGrid, scale: float) -> None:
        q, k, v, log_decay, beta = tokens
        self.dtype, self.out_dtype, self.scale = torch.promote_types(v.dtype, torch.float32), v.dtype, scale
        self.group, self.grid = v.shape[1] // k.shape[1], grid
        self.q, self.k, self.v = (grid.cut(x, self.dtype) for x in (q, k, v))
        self.log_decay = None if log_decay is None else log_decay.to(self.dtype)
        self.beta = None if beta is None else grid.cut(beta.unsqueeze(-1), self.dtype).squeeze(-1)

    chunk_size = staticmethod(chunk_size)

    @cached_property
    @abstractmethod
    def decay(self) -> ChunkDecay:
        """Of all chunks."""

    def maps(self) -> tuple[Tensor, Tensor | None]:
        """The updates [m, H, K, V] and transitions A [m, H ...] of the scanned chunks."""
        rows, total = self.grid.scan_rows, self.decay.total
        k = rows(self.decay.leaving(self.heads(self.k)))
        return matmul(k.transpose(2, 3), rows(self.v)), None if total is None else rows(total)

    def intra(self) -> Tensor:
        """What tokens get from their own chunk: [n, H, C, V]. Needs no state."""
        return matmul(self.decay.scores(self.q, self.k, self.group), self.v, self.scale)

    def queries(self) -> Tensor:
        """What reads the states before the scanned chunks: [m, H, C, K]."""
        return self.grid.scan_rows(self.decay.entering(self.heads(self.q)))

    def read(self, before: Tensor, intra: Tensor) -> Tensor:
        """The output [T, H, V], from the states before the scanned chunks [m, H, K, V]."""
        grid = self.grid
        if len(before) == 0:
            o = intra
        elif grid.scanned is None:
            o = matmul(self.queries(), before, self.scale, add=intra)
        else:
            o = intra.index_add(0, grid.scanned, matmul(self.queries(), before, self.scale))
        return grid.join(o).to(self.out_dtype)  # [n, H, C, V] -> [T, H, V]

    def run(self, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The output [T, H, V] and the states after the linked segments [L, H, K, V], given those before; None is zero."""
        grid = self.grid
        if not grid.plan.counts:
            return grid.join(self.intra()).to(self.out_dtype), None
        if state is not None and grid.linked is not None:
            state = state.new_zeros(len(grid.plan.counts), *state.shape[1:]).index_copy(0, grid.linked, state)
        before, _, after, _ = scan(*self.maps(), grid.plan, state, reach=False)
        if grid.linked is not None:
            after = after.index_select(0, grid.linked)
        return self.read(before, self.intra()), after

    def heads(self, x: Tensor) -> Tensor:
        """[n, H_k, ...] -> [n, H, ...]."""
        return repeat_heads(x, self.group)


def repeat_heads(x: Tensor, group: int) -> Tensor:
    """[n, H_k, ...] -> [n, H_k group, ...]."""
    return x if group == 1 else x.repeat_interleave(group, dim=1)


def matmul(x: Tensor, y: Tensor, scale: float = 1.0, add: Tensor | None = None) -> Tensor:
    """scale x y (+ add), batched over the first two dimensions without copies: [n, H, A, B] [n, H, B, C] -> [n, H, A, C]."""
    batch = x.shape[:2]
    x, y = x.flatten(0, 1), y.flatten(0, 1)
    if add is not None:
        product = torch.baddbmm(add.flatten(0, 1), x, y, alpha=scale)
    elif scale == 1.0:
        product = torch.bmm(x, y)
    else:
        product = torch.baddbmm(x.new_empty(()), x, y, beta=0, alpha=scale)
    return product.unflatten(0, batch)
