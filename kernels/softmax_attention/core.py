"""What a backend is, and the differentiable function over any of them."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lsys.kernels.softmax_attention.rows import Rows, add, put
from lsys.kernels.softmax_attention.tile import Tiles


class Backend(Protocol):
    """A way to compute tiles, launch by launch: a module or an object.

    What `forward` and `backward` return belongs to the rows `launch.q` and `launch.k`, a slice or an index tensor. The
    queries of one launch are all different; its keys may repeat in an index.
    """

    def obstacle(self, q: Tensor) -> str | None:
        """Why this backend cannot take q; None if it can."""

    def plan(self, tiles: Tiles, q: Tensor) -> Sequence[Any]:
        """The launches that compute the tiles: they depend on q's device and dtype only."""

    def forward(self, launch: Any, /, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """o [rows, H, D] and lse [rows, H] of the launch's queries over its keys."""

    def backward(
        self, launch: Any, /, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The launch's share of dq [rows, H, D], dk and dv [rows, H_kv, D], given o and lse over all keys."""


def planned(backend: Backend, tiles: Tiles, q: Tensor) -> Sequence[Any]:
    """The launches that compute the tiles: planned once, kept with them."""
    return tiles.derived((backend, q.device, q.dtype), lambda: backend.plan(tiles, q))


class Attention(torch.autograd.Function):
    """(q, k, v, tiles, scale, backend) -> (o in q's dtype, lse). No query is in two tiles: nothing needs merging."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, scale: float, backend: Backend
    ) -> tuple[Tensor, Tensor]:
        q, k, v = dense(q), dense(k), dense(v)
        launches = planned(backend, tiles, q)
        if len(launches) == 1 and _is_all(launches[0].q, q):
            o, lse = backend.forward(launches[0], q, k, v, scale)
            o = o.to(q.dtype)
        else:
            o = torch.zeros_like(q, memory_format=torch.contiguous_format)
            lse = torch.full_like(q[..., 0], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
            for launch in launches:
                part, part_lse = backend.forward(launch, q, k, v, scale)
                put(o, launch.q, part)
                put(lse, launch.q, part_lse)
        ctx.save_for_backward(q, k, v, o, lse)
        # Only a tile with a lower bound may be cut into launches that share keys: their sum is then in fp32.
        ctx.shared = tiles.has_lower_bound
        ctx.launches, ctx.scale, ctx.backend = launches, scale, backend
        ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse = ctx.saved_tensors
        launches, run = ctx.launches, ctx.backend.backward
        tensors = dense(do), q, k, v, o, lse
        if len(launches) == 1 and _is_all(launches[0].q, q) and _is_all(launches[0].k, k):
            totals = run(launches[0], *tensors, ctx.scale)
        else:
            dtype_k = lse.dtype if ctx.shared else k.dtype
            totals = q.new_zeros(q.shape), k.new_zeros(k.shape, dtype=dtype_k), v.new_zeros(v.shape, dtype=dtype_k)
            for launch in launches:
                parts = run(launch, *tensors, ctx.scale)
                for total, rows, part in zip(totals, (launch.q, launch.k, launch.k), parts, strict=True):
                    add(total, rows, part)
        return *(total.to(q.dtype) for total in totals), None, None, None


def dense(x: Tensor) -> Tensor:
    """The kernels want the last dimension dense; the others may be strided."""
    return x if x.stride(-1) == 1 and x.stride(0) > 0 else x.contiguous()


def _is_all(rows: Rows, x: Tensor) -> bool:
    return isinstance(rows, slice) and rows.start == 0 and rows.stop == len(x)
