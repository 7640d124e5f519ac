"""LASP-2 (Sun et al., 2025): every rank gathers the maps of all segments that share a document with other ranks.

One all-gather each way, of a state, H K V numbers, and its transition a segment. Forward it carries the segments' maps while ranks
compute what tokens get from their own chunk; backward it carries the gradients of the states before segments while
ranks compute the gradients of that part. Each rank then composes them in the order of positions, backward in reverse.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lsys.kernels.linear_attention import Segments
from lsys.kernels.linear_attention.scan import adjoint, compose
from lsys.kernels.linear_attention.transition import gradient
from lsys.parallel.comm import Pending, SequenceComm
from lsys.parallel.linear.links import Links


def attention(
    parts: Segments, links: Links, comm: SequenceComm | None, initial: Tensor | None, final: bool
) -> tuple[Tensor, Tensor | None]:
    """The output [T_r, H, V] and, if `final`, the states [documents, H, K, V] after all documents."""
    maps = parts.segment_map()
    exchange = _Exchange(links, comm, final)
    initial = None if initial is None else initial.to(maps.state.dtype)
    ticket = _Send.apply(maps.state, maps.transition, initial, exchange)
    intra, state, final_state = _Receive.apply(ticket, parts.intra(), exchange)
    return parts.apply(maps, intra, state), final_state


class _Exchange:
    """What the four ends of one exchange share: a gather under way and what its end needs.

    `_Send` starts the forward gather and ends the backward one, `_Receive` the reverse, so that autograd, which goes
    through operations in reverse order, computes between them what was computed between them.
    """

    def __init__(self, links: Links, comm: SequenceComm | None, final: bool) -> None:
        self.links, self.comm, self.final = links, comm, final
        self.finish: Callable[..., Any] = _nothing_sent

    def gather(self, rows: Tensor, extra: Tensor | None = None) -> Callable[[], tuple[Tensor, Tensor | None]]:
        """One row [L, ...] a linked segment -> the ordered table and, of `extra` [n, ...], the sum over ranks.

        Started on return; the function returned waits for it.
        """
        links, comm = self.links, self.comm
        if comm is None or (extra is None and not any(links.sizes)):  # alike on all ranks
            return lambda: (rows.index_select(0, links.order), extra)
        sent, more = rows.index_select(0, links.sent), 0 if extra is None else len(extra)
        if extra is not None:
            sent = torch.cat([sent, extra])
        sizes = [size + more for size in links.sizes]
        pending: Pending = comm.all_gather_async(sent, sizes)

        def finish() -> tuple[Tensor, Tensor | None]:
            gathered = pending.wait().split(sizes)
            table = torch.cat([*(part[: len(part) - more] for part in gathered), rows.index_select(0, links.unsent)])
            total = torch.stack([part[len(part) - more :] for part in gathered]).sum(0) if more else extra
            return table.index_select(0, links.order), total

        return finish


class _Send(torch.autograd.Function):
    """Maps [L, H, K, V], [L, H ...] of the linked segments -> a ticket that `_Receive` takes."""

    @staticmethod
    def forward(
        ctx: Any, state: Tensor, transition: Tensor | None, initial: Tensor | None, exchange: _Exchange
    ) -> Tensor:
        ctx.exchange = exchange
        ctx.initial_rows = None if initial is None else len(initial)
        width, form = state.shape[2:], None if transition is None else transition.shape[2:]
        packed = state.flatten(2)  # [L, H, K V]
        if transition is not None:
            packed = torch.cat([packed, transition.reshape(*packed.shape[:2], transition.shape[2:].numel())], dim=-1)
        finish_gather = exchange.gather(packed)

        def finish() -> tuple[Tensor, Tensor | None, Tensor | None]:
            table, _ = finish_gather()
            states, others = table.split([width.numel(), table.shape[-1] - width.numel()], dim=-1)
            transitions = None if form is None else others.reshape(*others.shape[:2], *form)
            return states.unflatten(-1, width), transitions, initial

        exchange.finish = finish
        return state.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        links: Links = ctx.exchange.links
        d_before, d_final, transition, before = ctx.exchange.finish()
        ctx.exchange.finish = _nothing_sent
        d_update, d_start = adjoint(d_before, d_final, transition, links.plan)
        d_state, d_transition, d_initial = d_update.index_select(0, links.own), None, None
        if transition is not None:
            d_transition = gradient(transition.index_select(0, links.own), d_state, before)
        if ctx.needs_input_grad[2]:
            # Every rank has the whole gradient; the one that holds a document's start reports it.
            d_initial = d_start.new_zeros(ctx.initial_rows, *d_start.shape[1:])
            d_initial[links.documents[links.mine]] = d_start[links.mine]
        return d_state, d_transition, d_initial, None


class _Receive(torch.autograd.Function):
    """The states before the linked segments [L, H, K, V] and after all documents.

    Passes on what tokens get from their own chunk, so that ranks without links too take part in the backward gather.
    """

    @staticmethod
    def forward(ctx: Any, ticket: Tensor, intra: Tensor, exchange: _Exchange) -> tuple[Tensor, Tensor, Tensor | None]:
        links = exchange.links
        update, transition, initial = exchange.finish()
        exchange.finish = _nothing_sent
        initial = None if initial is None else initial.index_select(0, links.documents)
        composed = compose(update, transition, links.plan, initial)
        state = composed.before.index_select(0, links.own)
        ctx.exchange = exchange
        ctx.save_for_backward(transition, state)
        return intra.view_as(intra), state, composed.total if exchange.final else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_intra: Tensor, d_state: Tensor, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        # Under activation checkpointing this recomputes the forward pass, on ranks without links too: before the gather.
        saved = ctx.saved_tensors
        finish_gather = ctx.exchange.gather(d_state, d_final)
        ctx.exchange.finish = lambda: (*finish_gather(), *saved)
        return d_state.new_empty(0), d_intra, None


def _nothing_sent() -> None:
    raise RuntimeError("nothing is under way in this exchange: its ends must run in turn")
