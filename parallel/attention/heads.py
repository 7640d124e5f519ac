"""Exchange of heads for tokens inside groups of ranks (DeepSpeed-Ulysses, Jacobs et al., 2023), for any head counts."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lsys.parallel.comm import SequenceComm
from lsys.parallel.layout import SequenceLayout
from lsys.parallel.messages.heads import Share
from lsys.parallel.segments import joined, offsets, runs


def pieces(share: Share, group: int) -> tuple[tuple[slice, slice], ...]:
    """A share's query heads beside their key heads, counted from the share's first, in pieces with a constant ratio.

    Where a share begins or ends inside a group of queries that read one key, its first or last key has fewer of them.
    """
    readers = [
        min(share.query.stop, (key + 1) * group) - max(share.query.start, key * group)
        for key in range(share.key.start, share.key.stop)
    ]
    found, query, key = [], 0, 0
    for ratio, run in groupby(readers):
        keys = len(list(run))
        found.append((slice(query, query + ratio * keys), slice(key, key + keys)))
        query, key = query + ratio * keys, key + keys
    return tuple(found)


class Order(NamedTuple):
    """Rows of the members of a group, one after the other, in the order of the stream, and the inverse: int64 [T_g]."""

    rows: Tensor
    inverse: Tensor

    def to(self, device: torch.device) -> Order:
        """There."""
        return Order(self.rows.to(device), self.inverse.to(device))


def _order(layout: SequenceLayout, group: tuple[int, ...], device: torch.device) -> Order | None:
    """None if the rows are in this order: found once for a layout."""

    def build() -> Order | None:
        held = joined([layout.table(rank) for rank in group])
        order = held.begin.argsort()
        if torch.equal(order, torch.arange(len(order))):
            return None
        rows = runs(offsets(held.length)[order], held.length[order])
        return Order(rows, torch.empty_like(rows).scatter_(0, rows, torch.arange(len(rows))))

    name = ("order of heads", group)
    found = layout.derived(name, None, build)
    return found and layout.derived(name, device, build)


@dataclass(frozen=True)
class HeadExchange:
    """Each member of a group has all heads of its own tokens, or its share of the heads of the group's tokens.

    All ranks of `comm` must take part, each with its group.

    Attributes:
        comm: the ranks.
        layout: over the ranks.
        group: those of this rank's group, itself among them.
        shares: by member.
    """

    comm: SequenceComm
    layout: SequenceLayout
    group: tuple[int, ...]
    shares: tuple[Share, ...]

    @property
    def share(self) -> Share:
        """The heads of this rank."""
        return self.shares[self.group.index(self.comm.rank)]

    def to_heads(self, parts: list[Tensor]) -> Tensor:
        """For each member, heads of own tokens [T_r, w_member, D] -> own heads of the group's tokens [T_g, w, D]."""
        own, width = parts[self.group.index(self.comm.rank)].shape[1], parts[0].shape[2]
        received = self._swap(
            torch.cat([part.reshape(-1, width) for part in parts]),
            [part.shape[0] * part.shape[1] for part in parts],
            [self.layout.sizes[rank] * own for rank in self.group],
        )
        rows = received.view(sum(self.layout.sizes[rank] for rank in self.group), own, width)
        order = _order(self.layout, self.group, rows.device)
        return rows if order is None else rows.index_select(0, order.rows)

    def to_tokens(self, x: Tensor, widths: list[int]) -> list[Tensor]:
        """Own heads of the group's tokens [T_g, w, D] -> from each member, its heads of own tokens [T_r, widths[i], D].

        The adjoint of `to_heads`, and its inverse.
        """
        order = _order(self.layout, self.group, x.device)
        x = x if order is None else x.index_select(0, order.inverse)
        sizes = [self.layout.sizes[rank] for rank in self.group]
        tokens = self.layout.sizes[self.comm.rank]
        receive = [tokens * width for width in widths]
        received = self._swap(x.reshape(-1, x.shape[2]), [size * x.shape[1] for size in sizes], receive)
        parts = zip(received.split(receive), widths, strict=True)
        return [part.view(tokens, width, x.shape[2]) for part, width in parts]

    def _swap(self, x: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """All-to-all inside the group: on all ranks of the comm, with nothing for those outside, to need no new group."""
        sizes = [[0] * self.comm.size, [0] * self.comm.size]
        for member, rank in enumerate(self.group):
            sizes[0][rank], sizes[1][rank] = send[member], receive[member]
        assert self.group == tuple(sorted(self.group))  # the comm sends and receives in rank order
        return self.comm.all_to_all(x, *sizes)


class HeadsIn(torch.autograd.Function):
    """q [T_r, H, D], k, v [T_r, H_kv, D] -> the same of the group's tokens and the own share of heads.

    Backward sums the gradients of key heads that several members have, in fp32 (fp64 for fp64).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, exchange: HeadExchange) -> tuple[Tensor, ...]:
        ctx.exchange, ctx.kv_heads = exchange, k.shape[1]
        parts = [torch.cat((q[:, s.query], k[:, s.key], v[:, s.key]), 1) for s in exchange.shares]
        return _split(exchange.to_heads(parts), exchange.share)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        exchange: HeadExchange = ctx.exchange
        parts = exchange.to_tokens(torch.cat(grads, 1), [share.width for share in exchange.shares])
        split = [_split(part, share) for part, share in zip(parts, exchange.shares, strict=True)]
        dq = torch.cat([part[0] for part in split], 1)
        wide = torch.promote_types(dq.dtype, torch.float32)
        dkv = dq.new_zeros(2, len(dq), ctx.kv_heads, dq.shape[2], dtype=wide)
        for (_, dk, dv), share in zip(split, exchange.shares, strict=True):
            dkv[0, :, share.key] += dk
            dkv[1, :, share.key] += dv
        return dq, *dkv.to(dq.dtype), None


class HeadsOut(torch.autograd.Function):
    """o [T_g, H_share, D] of the group's tokens and the own share of heads -> [T_r, H, D]."""

    @staticmethod
    def forward(ctx: Any, o: Tensor, exchange: HeadExchange) -> Tensor:
        ctx.exchange = exchange
        ctx.save_for_backward(o.new_empty(0))
        return torch.cat(exchange.to_tokens(o, [share.queries for share in exchange.shares]), 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        # Under activation checkpointing this recomputes the forward pass, which communicates: before anything is sent.
        _ = ctx.saved_tensors
        return ctx.exchange.to_heads([do[:, share.query] for share in ctx.exchange.shares]), None


def _split(x: Tensor, share: Share) -> tuple[Tensor, ...]:
    """[T, w, D] -> q, k, v: views."""
    return x.split([share.queries, share.keys, share.keys], 1)
