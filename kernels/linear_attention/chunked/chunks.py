"""Chunks of packed segments in PyTorch operations: what each gives of a state S before it, and what it makes of it.

What all variants share; `scalar.py`, `channel.py` and `delta.py` say how it decays and what it writes. The README has the
mathematics. A variant makes *factors* of the tokens, by operations that record gradients; what is made of factors and
states are matrix products, whose gradients are products too and are here beside them, so that each is computed once and
when it is wanted: the states alone, the output alone, or both.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lsys.kernels.linear_attention.chunked.grid import ChunkGrid, chunk_size
from lsys.kernels.linear_attention.transition import gradient, operator


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

    def from_start(self, x: Tensor) -> Tensor:
        """From before the chunk to token i, e^(b_i) x_i: [n, H, C, K] -> the same."""

    def to_end(self, x: Tensor) -> Tensor:
        """From token j to after the chunk, e^(G - b_j) x_j: [n, H, C, K] -> the same."""

    def scores(self, q: Tensor, k: Tensor, group: int) -> Tensor:
        """q_i . e^(b_i - b_j) k_j for j <= i, else 0: [n, H_k, C, K] twice -> [n, H_k group, C, C]."""


Written = tuple[Tensor, Tensor | None]  # u [n, H, C, V] and, of the delta rule, w [n, H, C, K]
Pairs = list[tuple[Tensor | None, Tensor | None]]  # factors and their gradients


class Chunks(ABC):
    """Tokens of packed segments, cut in chunks of C.

    Of the state S before a chunk it makes A S + update, and its output is scale (intra + queries S). Factors are made
    when they are first asked for, and recorded if gradients are at that time.

    Args:
        tokens: of which only what is asked for is cut.
        written: if it is known already.
    """

    def __init__(self, tokens: Tokens, grid: ChunkGrid, scale: float, written: Written | None = None) -> None:
        k, v, self.log_decay = tokens.k, tokens.v, tokens.log_decay
        self.tokens, self.grid, self.scale = tokens, grid, scale
        self.dtype = torch.promote_types(v.dtype, torch.float32)
        self.group = v.shape[1] // k.shape[1]
        if self.log_decay is not None:
            self.log_decay = self.log_decay.to(self.dtype)
        if written is not None:
            self.written = written

    chunk_size = staticmethod(chunk_size)

    @cached_property
    def q(self) -> Tensor:
        """[n, H_k, C, K], zero where a chunk has no token."""
        return self.grid.cut(self.tokens.q, self.dtype)

    @cached_property
    def k(self) -> Tensor:
        return self.grid.cut(self.tokens.k, self.dtype)

    @cached_property
    @abstractmethod
    def decay(self) -> ChunkDecay:
        """Decays within all chunks."""

    @cached_property
    def scores(self) -> Tensor:
        """P [n, H, C, C]."""
        return self.decay.scores(self.q, self.k, self.group)

    @cached_property
    def q_from_start(self) -> Tensor:
        """e^b q of the scanned chunks: [m, H, C, K]."""
        return self.grid.scan_rows(self.decay.from_start(self.heads(self.q)))

    @cached_property
    def k_to_end(self) -> Tensor:
        """e^(G - b) k of the scanned chunks: [m, H, C, K]."""
        return self.grid.scan_rows(self.decay.to_end(self.heads(self.k)))

    @cached_property
    def total(self) -> Tensor | None:
        """G of the scanned chunks, [m, H] or [m, H, K]."""
        total = self.decay.total
        return None if total is None else self.grid.scan_rows(total)

    @cached_property
    def written(self) -> Written:
        """What tokens write, u - w S of the state S before the chunk."""
        return self.grid.cut(self.tokens.v, self.dtype), None

    def record(self) -> None:
        """Make all factors."""
        _ = self.scores, self.written
        if self.grid.plan.counts:
            _ = self.q_from_start, self.k_to_end, self.total

    def costly(self) -> Written | None:
        """What is written, if it is dear to make again."""
        return None

    # ---- products

    def maps(self) -> tuple[Tensor, Tensor | None]:
        """The updates [m, H, K, V] and transitions A [m, H ...] of the scanned chunks."""
        (u, w), rows, total = self.written, self.grid.scan_rows, self.total
        k = self.k_to_end.mT
        update = matmul(k, rows(u))
        if w is None:
            return update, total
        kept = torch.eye(k.shape[2], dtype=k.dtype, device=k.device).expand(*k.shape[:2], -1, -1)
        if total is not None:
            kept = kept * operator(total)
        return update, matmul(k, rows(w), -1.0, add=kept)

    def intra(self) -> Tensor:
        """What tokens get from their own chunk: [n, H, C, V]. Needs no state."""
        return matmul(self.scores, self.written[0], self.scale)

    def queries(self) -> Tensor:
        """What reads the states before the scanned chunks: [m, H, C, K]."""
        w, rows = self.written[1], self.grid.scan_rows
        return self.q_from_start if w is None else matmul(rows(self.scores), rows(w), -1.0, add=self.q_from_start)

    def output(self, before: Tensor | None, intra: Tensor | None = None, queries: Tensor | None = None) -> Tensor:
        """[n, H, C, V], from the states before the scanned chunks [m, H, K, V], if any are; the rest may be known."""
        intra = self.intra() if intra is None else intra
        if before is None:
            return intra
        return self._add(intra, self.queries() if queries is None else queries, before, self.scale)

    # ---- their gradients, of `do` [n, H, C, V]

    def before_gradients(self, do: Tensor) -> Tensor:
        """Gradients of the states before the scanned chunks, by what these chunks read: [m, H, K, V]."""
        return matmul(self.queries().mT, self.grid.scan_rows(do), self.scale)

    def read_gradients(self, do: Tensor, before: Tensor | None) -> tuple[Pairs, Written]:
        """Gradients of what the output is read with, and of what is written."""
        (u, w), rows = self.written, self.grid.scan_rows
        d_scores, du, dw = matmul(do, u.mT, self.scale), matmul(self.scores.mT, do, self.scale), None
        if before is None:
            return [(self.scores, d_scores)], (du, None if w is None else torch.zeros_like(w))
        d_queries = matmul(rows(do), before.mT, self.scale)
        if w is not None:
            dw = self._unscanned(matmul(rows(self.scores).mT, d_queries, -1.0))
            d_scores = self._add(d_scores, d_queries, rows(w).mT, -1.0)
        return [(self.scores, d_scores), (self.q_from_start, d_queries)], (du, dw)

    def map_gradients(self, d_update: Tensor | None, before: Tensor | None, d_written: Written) -> Pairs:
        """Gradients of all else, if the state after each scanned chunk has the gradient `d_update`, and also of what is written."""
        (u, w), (du, dw), rows, total = self.written, d_written, self.grid.scan_rows, self.total
        if d_update is None or before is None:
            return [(u, du), (w, dw)]
        dk_to_end, d_total = matmul(rows(u), d_update.mT), None
        du = self._add(du, self.k_to_end, d_update)
        if total is not None and w is None:
            d_total = gradient(total, d_update, before)
        if w is not None:
            assert dw is not None
            d_matrix = matmul(d_update, before.mT)  # of the transition
            dk_to_end = matmul(rows(w), d_matrix.mT, -1.0, add=dk_to_end)
            dw = self._add(dw, self.k_to_end, d_matrix, -1.0)
            if total is not None:
                kept = d_matrix.diagonal(dim1=2, dim2=3)
                d_total = total.exp() * (kept if total.dim() == 3 else kept.sum(-1))
        return [(self.k_to_end, dk_to_end), (total, d_total), (u, du), (w, dw)]

    def _add(self, x: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
        """x [n, ...] + scale left right of the scanned chunks [m, ...]."""
        scanned = self.grid.scanned
        if scanned is None:
            return matmul(left, right, scale, add=x)
        return x.index_add(0, scanned, matmul(left, right, scale))

    def _unscanned(self, x: Tensor) -> Tensor:
        """Rows of the scanned chunks [m, ...] -> of all [n, ...], else zero."""
        scanned = self.grid.scanned
        return x if scanned is None else x.new_zeros(self.grid.chunks, *x.shape[1:]).index_copy(0, scanned, x)

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
