"""Runs a route: attention over the block in hand while the next one is under way, forward and adjoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lsys.kernels import softmax_attention as kernel
from lsys.kernels.mask import Mask
from lsys.kernels.softmax_attention import Tiles
from lsys.parallel.attention.route import Gather, Generator, Message, RouteStep, Rows, route_of
from lsys.parallel.attention.select import Select
from lsys.parallel.attention.tiles import Queries
from lsys.parallel.comm import Pending, SequenceComm
from lsys.parallel.layout import SequenceLayout


class Options(NamedTuple):
    """As for `softmax_attention`, the scale given."""

    mask: Mask
    scale: float
    backend: str
    select: Select | None = None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SequenceLayout,
    comm: SequenceComm | None,
    generator: Generator,
    options: Options,
    *,
    rank: int | None = None,
    peers: tuple[int, ...] | None = None,
    heads: tuple[tuple[slice, slice], ...] | None = None,
) -> Tensor:
    """Attention along the schedule that `generator(layout, mask)` makes, once for all calls with this layout and mask.

    Args:
        q: [T_r, H, D], this rank's tokens.
        k, v: [T_r, H_kv, D].
        rank: this rank's number in the layout; default its number in `comm`.
        peers: the rank in `comm` of each rank of the layout; default the same.
        heads: which query heads read which key heads, in pieces of a constant ratio; default all in one.

    Returns:
        [T_r, H, D].
    """
    rank = (0 if comm is None else comm.rank) if rank is None else rank
    heads = ((slice(0, q.shape[1]), slice(0, k.shape[1])),) if heads is None else heads
    route = route_of(layout, generator, rank, options.mask, q.device)
    if route.whole is not None and options.select is None:
        parts = [_on_one_device(q[:, h], k[:, g], v[:, g], route.whole, options) for h, g in heads]
        return parts[0] if len(parts) == 1 else torch.cat([q[:, :0], *parts], 1)
    peers = tuple(range(layout.ranks)) if peers is None else peers
    steps = route.steps
    if options.select is not None:
        steps = route.selected(Queries.of(layout, rank), options.mask, options.select)
    return Attention.apply(q, k, v, Program(steps, comm, peers, heads, options))


def _on_one_device(q: Tensor, k: Tensor, v: Tensor, documents: Tiles, options: Options) -> Tensor:
    o, _ = kernel.attend_sequences(q, k, v, documents, scale=options.scale, backend=options.backend)
    return o


@dataclass(frozen=True)
class Program:
    """What one rank runs.

    Attributes:
        steps: its route.
        comm: None if the route sends nothing.
        peers: the rank in `comm` of each rank of the route.
        heads: which query heads belong to which key heads, in pieces with the same number of queries for each key.
        options: of the local attention.
    """

    steps: tuple[RouteStep, ...]
    comm: SequenceComm | None
    peers: tuple[int, ...]
    heads: tuple[tuple[slice, slice], ...]
    options: Options


class Attention(torch.autograd.Function):
    """(q [T_r, H, D], k, v [T_r, H_kv, D], program) -> [T_r, H, D].

    Backward, the blocks travel as they did forward, and after each the sum of the gradients of its keys and values, in
    fp32 (fp64 for fp64): one step later along the same way, and from the way's end to the owner. Kept are this rank's
    own q, k, v and o and the log-sum-exp, whatever the number of ranks.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, program: Program) -> Tensor:
        o, lse = kernel.empty_result(q)
        hand: Tensor | None = None  # rows of keys and values of other ranks, [rows, 2, H_kv, D]
        for step in program.steps:
            arriving = _send_blocks(step, program, k, v, hand)
            _attend(program, step.local, q, k, v, o, lse)
            if hand is not None:
                _attend(program, step.remote, q, hand[:, 0], hand[:, 1], o, lse)
            hand = arriving.wait()
        result = o.to(q.dtype)
        ctx.program = program
        ctx.save_for_backward(q, k, v, result, lse)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        # Under activation checkpointing this recomputes the forward pass, which communicates: before anything is sent.
        q, k, v, o, lse = ctx.saved_tensors
        program: Program = ctx.program
        dq = torch.zeros_like(q, dtype=lse.dtype, memory_format=torch.contiguous_format)
        own = lse.new_zeros(len(k), 2, *k.shape[1:])  # the gradients of k and v
        hand = sums = previous = None  # keys and values in hand, their gradients, those of the block before
        for step in program.steps:
            arriving = _send_blocks(step, program, k, v, hand)
            returning = _send_sums(step, program, previous, own)
            _attend_backward(program, step.local_backward, do, q, k, v, o, lse, dq, own)
            if hand is not None:
                sums = own.new_zeros(hand.shape)
                _attend_backward(program, step.remote, do, q, hand[:, 0], hand[:, 1], o, lse, dq, sums)
            _add_sums(step, returning.wait(), own, sums)
            hand, previous, sums = arriving.wait(), sums, None
            del arriving, returning  # and their buffers, before the next step makes new ones
        return dq.to(q.dtype), *own.to(k.dtype).unbind(1), None


def _attend(program: Program, tiles: Tiles, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor) -> None:
    scale, backend = program.options.scale, program.options.backend
    for h, g in program.heads if len(tiles) else ():
        kernel.attend(q[:, h], k[:, g], v[:, g], tiles, o[:, h], lse[:, h], scale=scale, backend=backend)


def _attend_backward(
    program: Program,
    tiles: Tiles,
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    dq: Tensor,
    dkv: Tensor,
) -> None:
    scale, backend = program.options.scale, program.options.backend
    for h, g in program.heads if len(tiles) else ():
        queries, keys = (do[:, h], q[:, h]), (k[:, g], v[:, g])
        sums = dq[:, h], dkv[:, 0, g], dkv[:, 1, g]
        kernel.attend_backward(*queries, *keys, o[:, h], lse[:, h], tiles, *sums, scale=scale, backend=backend)


# ---- keys and values on their way


def _send_blocks(step: RouteStep, program: Program, k: Tensor, v: Tensor, hand: Tensor | None) -> Pending[Any]:
    """Starts the transfers of a step; the result is the next block in hand [rows, 2, H_kv, D], None without rows."""
    if step.gather is not None:
        return _gather(step.gather, program, k, v)
    if program.comm is None or not (step.sends or step.receives):
        return Pending(lambda: None)
    send = {program.peers[rank]: _take(message, k, v, hand) for rank, message in step.sends.items()}
    block = k.new_empty(sum(step.receives.values()), 2, *k.shape[1:])
    parts = block.split([*step.receives.values()])
    pending = program.comm.exchange(
        send, {program.peers[r]: part for r, part in zip(step.receives, parts, strict=True)}
    )
    return pending.then(lambda _: block if len(block) else None)


def _take(message: Message, k: Tensor, v: Tensor, hand: Tensor | None) -> Tensor:
    """The rows of a message, [rows, 2, H_kv, D], contiguous; without a copy if they are adjacent rows in hand."""
    parts = [
        hand[part.rows] if part.in_hand and hand is not None else torch.stack((k[part.rows], v[part.rows]), 1)
        for part in message
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else k.new_empty(0, 2, *k.shape[1:])


def _gather(gather: Gather, program: Program, k: Tensor, v: Tensor) -> Pending[Any]:
    assert program.comm is not None
    pending = program.comm.all_gather_async(_take(gather.offered, k, v, None), gather.sizes, exact=True)
    return pending.then(lambda rows: rows[gather.kept])


# ---- sums of gradients on their way back


def _send_sums(step: RouteStep, program: Program, previous: Tensor | None, own: Tensor) -> Pending[Any]:
    """Starts the return of sums; the result is a buffer [rows, 2, H_kv, D] for each rank that sends some here."""
    if step.scatter is not None:
        return _scatter(step.scatter, program, previous, own)
    if program.comm is None or not (step.returned or step.returning):
        return Pending(lambda: {})
    send = {}
    for rank, message in step.returned.items():
        assert previous is not None
        parts = [previous[part.rows] for part in message]  # all of the block that was in hand
        send[program.peers[rank]] = parts[0] if len(parts) == 1 else torch.cat(parts)
    receive = {
        program.peers[rank]: own.new_empty(sum(part.number for part in message), *own.shape[1:])
        for rank, message in step.returning.items()
    }
    return program.comm.exchange(send, receive)


def _scatter(gather: Gather, program: Program, previous: Tensor | None, own: Tensor) -> Pending[Any]:
    assert program.comm is not None
    total = own.new_zeros(sum(gather.sizes), *own.shape[1:])
    if previous is not None:
        total[gather.kept] = previous
    return program.comm.reduce_scatter_async(total, gather.sizes)


def _add_sums(step: RouteStep, arrived: Any, own: Tensor, sums: Tensor | None) -> None:
    if step.scatter is not None:
        _add(step.scatter.offered, arrived, own, sums)
        return
    for message, buffer in zip(step.returning.values(), arrived.values(), strict=True):
        _add(message, buffer, own, sums)


def _add(message: Message, buffer: Tensor, own: Tensor, sums: Tensor | None) -> None:
    for part, rows in zip(message, buffer.split([part.number for part in message]), strict=True):
        target = sums if part.in_hand else own
        assert target is not None
        _add_rows(target, part.rows, rows)


def _add_rows(target: Tensor, rows: Rows, values: Tensor) -> None:
    if isinstance(rows, slice):
        target[rows] += values
    else:
        target.index_add_(0, rows, values)
