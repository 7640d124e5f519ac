"""Linear attention around an exchange of states: what the methods that move states have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lsys.kernels.linear_attention import Segments
from lsys.kernels.linear_attention.checks import without_autocast
from lsys.kernels.linear_attention.transition import carry
from lsys.parallel.comm import SequenceComm
from lsys.parallel.linear.state_exchange_plan import Composed, ExternalSegments

Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]  # q, k, v, log_decay, beta


class Exchange(Protocol):
    """The way of a method to bring each run the state before it, forward and adjoint: both are under way on return.

    States are zero before chains: initial states are part of the maps of first runs.
    """

    def forward(self, update: Tensor, transition: Tensor | None) -> Callable[[], Exchanged]:
        """Starts with this rank's runs' maps [R, H, K, V], [R, H ...]; the function returned ends it."""
        ...

    def backward(
        self, d_state: Tensor, d_final: Tensor | None, *saved: Tensor | None
    ) -> Callable[[], tuple[Tensor, Tensor | None]]:
        """Starts with the gradients of what `forward` gave; its end has those of `update` and `transition`."""
        ...


# The states before this rank's runs [R, H, K, V], those after all documents [documents, H, K, V] (None: not at hand),
# and what `backward` needs.
Exchanged = tuple[Tensor, Tensor | None, tuple[Tensor | None, ...]]


def attention(
    parts: Sequence[Segments],
    external: ExternalSegments,
    exchange: Exchange | None,
    comm: SequenceComm | None,
    initial: Tensor | None,
    inputs: Sequence[Tensor | None],
) -> tuple[list[Tensor], Tensor | None]:
    """The outputs of each direction's `parts` [T_r, H, V] and the states [documents, H, K, V] after documents, if wanted.

    `exchange` None: no state leaves a rank. `inputs` are all that has a gradient if states have one; initial [documents, H, K, V].
    """
    maps = [part.segment_map() for part in parts]
    composed = external.compose(maps)
    starts = None if initial is None else initial.to(composed.update.dtype).index_select(0, external.starts)
    composed = composed if starts is None else _begin(composed, external, starts)
    state = final = None
    if exchange is None:
        intra = [part.intra() for part in parts]
    else:
        shared = _Ends(exchange)
        ticket = _Send.apply(composed.update, composed.transition, shared, *inputs)
        intra = [part.intra() for part in parts]
        intra[0], state, final = _Receive.apply(ticket, intra[0], shared)
    if external.finals is not None and final is None:
        final, intra[0] = _final(composed, external, comm, state, intra[0])
    if starts is not None:
        assert initial is not None
        state = torch.zeros_like(composed.update) if state is None else state
        state = state.index_add(0, external.first, starts)
        if final is not None:
            final = final.index_add(0, external.empty, initial.to(final.dtype).index_select(0, external.empty))
    ends = zip(parts, maps, intra, external.states_before(composed, state), strict=True)
    return [part.apply(its_map, its_intra, before) for part, its_map, its_intra, before in ends], final


def _begin(composed: Composed, external: ExternalSegments, starts: Tensor) -> Composed:
    """With the states before documents as part of the updates of their first runs."""
    transition = composed.transition
    carried = carry(None if transition is None else transition.index_select(0, external.first), starts)
    return composed._replace(update=composed.update.index_add(0, external.first, carried))


def _final(
    composed: Composed, external: ExternalSegments, comm: SequenceComm | None, state: Tensor | None, intra: Tensor
) -> tuple[Tensor, Tensor]:
    """The states after documents, zero of those without tokens; and `intra`, for ranks that have no use for the states."""
    finals, transition = external.finals, composed.transition
    assert finals is not None
    after = composed.update.index_select(0, finals.rows)
    if state is not None:
        last = None if transition is None else transition.index_select(0, finals.rows)
        after = after + carry(last, state.index_select(0, finals.rows))
    if comm is not None and comm.size > 1:
        after, intra = GatherRows.apply(after, intra, comm, finals.sizes)
    after = after.index_select(0, finals.order)
    return after.new_zeros(external.documents, *after.shape[1:]).index_copy(0, finals.documents, after), intra


class GatherRows(torch.autograd.Function):
    """All ranks' rows in rank order: [sizes[rank], ...] -> [sum(sizes), ...]; gradients are summed over the ranks.

    Passes `through` on: backward then takes place on ranks, too, that use nothing of the result.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, through: Tensor, comm: SequenceComm, sizes: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)  # of what is passed on None is not zero: nodes before it need not work then
        ctx.comm, ctx.sizes = comm, sizes
        ctx.save_for_backward(x.new_empty(0))
        rows = comm.all_gather(x, sizes)
        ctx.rows = rows.shape
        return rows, through.view_as(through)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, d_rows: Tensor | None, d_through: Tensor | None) -> tuple[Tensor | None, ...]:
        (like,) = ctx.saved_tensors  # recomputes under activation checkpointing: see _Receive
        d_rows = like.new_zeros(ctx.rows) if d_rows is None else d_rows
        return ctx.comm.reduce_scatter(d_rows, ctx.sizes), d_through, None, None


class _Ends:
    """What the four ends of one exchange share: what ends the transfer under way.

    `_Send` starts the forward transfer and ends the backward one, `_Receive` the reverse, so that autograd, which goes
    through operations in reverse order, computes between them what was computed between them.
    """

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.finish: Callable[[], Any] | None = None

    def end(self) -> Any:
        """The result of the transfer under way, of which nothing is kept."""
        if self.finish is None:
            raise RuntimeError("nothing is under way in this exchange: its ends must run in turn")
        finish, self.finish = self.finish, None
        return finish()


class _Send(torch.autograd.Function):
    """Maps [R, H, K, V], [R, H ...] of this rank's runs -> a ticket that `_Receive` takes.

    `inputs` get no gradient here. By them the exchange is ended, too, on ranks without runs, whose maps depend on nothing,
    and where the gradient of queries alone is asked for, which no map depends on.
    """

    @staticmethod
    def forward(ctx: Any, update: Tensor, transition: Tensor | None, ends: _Ends, *inputs: Tensor | None) -> Tensor:
        ctx.ends, ctx.inputs = ends, len(inputs)
        ends.finish = ends.exchange.forward(update, transition)
        return update.new_empty(0)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.ends.end(), None, *[None] * ctx.inputs


class _Receive(torch.autograd.Function):
    """The states before the runs [R, H, K, V] and, where the exchange has them, after all documents.

    Passes on what tokens get from their own chunk, so that ranks without runs, too, take part in the backward exchange.
    """

    @staticmethod
    def forward(ctx: Any, ticket: Tensor, intra: Tensor, ends: _Ends) -> tuple[Tensor, Tensor, Tensor | None]:
        state, final, saved = ends.end()
        ctx.set_materialize_grads(False)  # see GatherRows
        ctx.ends, ctx.given = ends, [(x.shape, x.dtype, x.device) for x in (state, final) if x is not None]
        ctx.save_for_backward(*saved)
        return intra.view_as(intra), state, final

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, d_intra: Tensor | None, *d_states: Tensor | None) -> tuple[Tensor | None, ...]:
        # Under activation checkpointing this recomputes the forward pass, on ranks without runs, too: it communicates,
        # so it must be before anything is sent.
        saved = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:  # then nobody ends a backward exchange
            return None, d_intra, None
        d_state, *d_final = (_or_zeros(x, given) for x, given in zip(d_states, ctx.given, strict=False))
        ctx.ends.finish = ctx.ends.exchange.backward(d_state, d_final[0] if d_final else None, *saved)
        return d_state.new_empty(0), d_intra, None


def _or_zeros(x: Tensor | None, given: tuple[torch.Size, torch.dtype, torch.device]) -> Tensor:
    """x, or zeros for the gradient of what was given."""
    shape, dtype, device = given
    return torch.zeros(shape, dtype=dtype, device=device) if x is None else x
