"""The halo of a segment: the last k tokens of its document before it, whichever ranks hold them.

What a short causal convolution, a token shift or window attention needs from elsewhere. Each rank sends its peers the
rows that they lack, each row once however many segments want it; backward their gradients go home, summed in at least
fp32. A row travels point to point and only ranks that lack or hold one talk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lsys.parallel.comm import Pending, SequenceComm
from lsys.parallel.layout import SequenceLayout
from lsys.parallel.segments import SegmentTable, offsets, runs


class Extended(NamedTuple):
    """The segments of a rank, each behind its halo.

    Attributes:
        x: [E, ...], for every segment in the layout's order first its halo, in order, then its own rows.
        cu_seqlens: where each extended segment begins in x, then E: int64 [segments + 1], on the host.
        own: the rows of x that are this rank's: int64 [T_r], on x's device.
    """

    x: Tensor
    cu_seqlens: Tensor
    own: Tensor


def halo(x: Tensor, layout: SequenceLayout, comm: SequenceComm | None, k: int) -> Extended:
    """This rank's segments, each behind the last k tokens of its document before it.

    Behind fewer where the document begins: nothing is padded. Whatever sees a token and up to k before it gives the
    rows of `own` the right values when it runs over the packed sequences of `cu_seqlens`:

        c = halo(x, layout, comm, width - 1);  y = causal_convolution(c.x, c.cu_seqlens)[c.own]
        s = halo(x, layout, comm, 1);  before = s.x[s.own - 1], to be masked where layout.positions(rank) is 0
        w = halo(torch.stack((k, v), 1), layout, comm, window - 1), the keys of attention of this rank's queries

    All ranks of `comm` must call it, and backpropagate through its result; gradients are those of the sum of all ranks'
    losses.

    Args:
        x: [T_r, ...], this rank's tokens in the layout's order, alike on all ranks in dtype and other sizes.
        layout: any placement of the documents over the ranks.
        comm: the ranks; None is one rank.
        k: tokens wanted before each segment, 0 or more.

    Returns:
        The rows with their bounds, differentiable in x.

    Raises:
        ValueError: k is negative, or x, layout and comm do not fit together.
    """
    return halo_async(x, layout, comm, k).wait()


def halo_async(x: Tensor, layout: SequenceLayout, comm: SequenceComm | None, k: int) -> Pending[Extended]:
    """As `halo`, under way on return; leave x unchanged until `wait()`.

    What is computed between the two overlaps the exchange, and its gradient the exchange of the gradients.
    """
    rank = check(x, layout, comm, k)
    held = layout.table(rank)
    pending = _fetch(x, layout, comm, k, fixed=False)
    cu_seqlens = layout.derived(("halo bounds", rank, k), None, lambda: offsets(_before(held, k) + held.length))
    own = layout.derived(("halo own", rank, k), x.device, lambda: runs(cu_seqlens[1:] - held.length, held.length))
    return pending.then(lambda rows: Extended(rows, cu_seqlens, own))


def halo_state(x: Tensor, layout: SequenceLayout, comm: SequenceComm | None, k: int) -> Tensor:
    """The halos alone, zero-filled on the left where the document begins: [T_r, ...] -> [segments, k, ...].

    The state that convolutions over the packed sequences of `layout.cu_seqlens(rank)` start from; otherwise as `halo`.
    """
    return halo_state_async(x, layout, comm, k).wait()


def halo_state_async(x: Tensor, layout: SequenceLayout, comm: SequenceComm | None, k: int) -> Pending[Tensor]:
    """As `halo_state`, under way on return; see `halo_async`."""
    rank = check(x, layout, comm, k)
    shape = (len(layout.cu_seqlens(rank)) - 1, k, *x.shape[1:])
    return _fetch(x, layout, comm, k, fixed=True).then(lambda rows: rows.view(shape))


def check(x: Tensor, layout: SequenceLayout, comm: SequenceComm | None, k: int) -> int:
    """The rank in the layout, if x [T_r, ...], layout and comm fit together.

    Raises:
        ValueError: they do not, or k is negative.
    """
    rank, size = (0, 1) if comm is None else (comm.rank, comm.size)
    if k < 0:
        raise ValueError(f"a halo is of k = 0 tokens or more; got k = {k}")
    if size != layout.ranks:
        remedy = "; comm=None is one rank" if comm is None else ""
        raise ValueError(f"the layout is over {layout.ranks} ranks and the comm has {size}{remedy}")
    if x.dim() == 0 or len(x) != layout.tokens(rank):
        wanted = f"the layout gives rank {rank} {layout.tokens(rank)} tokens"
        raise ValueError(f"halo takes this rank's rows, x [T_r, ...], and {wanted}; got {[*x.shape]}")
    return rank


# ---- the exchange


def _fetch(x: Tensor, layout: SequenceLayout, comm: SequenceComm | None, k: int, fixed: bool) -> Pending[Tensor]:
    rank = 0 if comm is None else comm.rank
    plan = layout.derived(("halo", rank, k, fixed), x.device, lambda: halo_plan(layout, rank, k, fixed))
    exchange = _Exchange(plan, comm)
    ticket = _Send.apply(x, exchange)
    return Pending(lambda: _Receive.apply(ticket, exchange))


def swap(comm: SequenceComm | None, rows: Tensor, send: dict[int, int], receive: dict[int, int]) -> Pending[Tensor]:
    """Rows for each peer in turn -> rows from each peer: [sum(send), ...] -> [sum(receive), ...].

    Under way on return. A rank without peers calls nothing.
    """
    buffer = rows.new_empty(sum(receive.values()), *rows.shape[1:])
    if comm is None or not (send or receive):
        return Pending(lambda: buffer)
    return comm.exchange(_by_peer(rows, send), _by_peer(buffer, receive)).then(lambda _: buffer)


class _Exchange:
    """What the ends of one exchange share: the transfer under way, in `finish`.

    `_Send` starts the forward transfer and ends the backward one, `_Receive` the reverse, so that autograd, which goes
    through operations in reverse order, computes between them what was computed between them.
    """

    def __init__(self, plan: HaloPlan, comm: SequenceComm | None) -> None:
        self.plan, self.comm = plan, comm
        self.finish: Callable[[], Tensor] | None = None

    def end(self) -> Tensor:
        """The result of the transfer under way, of which nothing is kept."""
        assert self.finish is not None
        finish, self.finish = self.finish, None
        return finish()


class _Send(torch.autograd.Function):
    """Rows [T_r, ...] -> a ticket that `_Receive` takes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: _Exchange) -> Tensor:
        plan = exchange.plan
        ctx.exchange = exchange
        received = swap(exchange.comm, x.index_select(0, plan.sent), plan.send, plan.receive)

        def finish() -> Tensor:
            out = x.new_zeros(plan.rows, *x.shape[1:])
            out.index_copy_(0, plan.near[1], x.index_select(0, plan.near[0]))
            return out.index_copy_(0, plan.far[1], received.wait().index_select(0, plan.far[0]))

        exchange.finish = finish
        return x.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.exchange.end(), None


class _Receive(torch.autograd.Function):
    """Ticket -> the result, [rows, ...]."""

    @staticmethod
    def forward(ctx: Any, ticket: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        ctx.save_for_backward(exchange.plan.near, exchange.plan.far)
        return exchange.end()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Under activation checkpointing this recomputes the forward pass, transfers included, on every rank: these must
        # all come before that of the gradients, also on ranks for which the plan itself would do.
        near, far = ctx.saved_tensors
        exchange, plan = ctx.exchange, ctx.exchange.plan
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
        shape = grad.shape[1:]
        theirs = wide.new_zeros(sum(plan.receive.values()), *shape)
        theirs.index_add_(0, far[0], wide.index_select(0, far[1]))
        returned = swap(exchange.comm, theirs, plan.receive, plan.send)
        own = wide.new_zeros(plan.tokens, *shape).index_add_(0, near[0], wide.index_select(0, near[1]))
        exchange.finish = lambda: own.index_add_(0, plan.sent, returned.wait()).to(grad.dtype)
        return grad.new_empty(0), None


def _by_peer(rows: Tensor, counts: dict[int, int]) -> dict[int, Tensor]:
    return dict(zip(counts, rows.split(list(counts.values())), strict=True)) if counts else {}


# ---- which rows go where: a function of the layout alone


class HaloPlan(NamedTuple):
    """How one rank takes part in an exchange.

    Attributes:
        tokens: T_r, rows of x.
        rows: of the result.
        near: rows of x, and the rows of the result that they become: int64 [2, n].
        far: rows received, all peers' in the order of ranks, and the rows of the result that they become: int64 [2, m].
        sent: rows of x that are sent, to all peers in the order of ranks: int64.
        send, receive: how many rows go to each peer and come from it; peers without any are left out.
    """

    tokens: int
    rows: int
    near: Tensor
    far: Tensor
    sent: Tensor
    send: dict[int, int]
    receive: dict[int, int]

    def to(self, device: torch.device) -> HaloPlan:
        return self._replace(near=self.near.to(device), far=self.far.to(device), sent=self.sent.to(device))


def halo_plan(layout: SequenceLayout, rank: int, k: int, fixed: bool) -> HaloPlan:
    """How the rank fetches its halos. `fixed`: the result is k rows for each segment, its halo the last of them; otherwise see `Extended`."""
    every, own, tokens = layout.sorted(), layout.sorted(rank), layout.tokens(rank)
    holder, first, stop = _lacking(every, k)
    mine = holder == rank
    # Rows between two ranks travel in the order of the stream: both ends know it.
    lack, run, place, length = _overlaps(first[~mine], stop[~mine], own.begin, own.end)
    sent = runs(own.row[run] + place - own.begin[run], length)
    send = _counts(holder[~mine][lack], length, layout.ranks)
    _, run, place, length = _overlaps(first[mine], stop[mine], every.begin, every.end)
    source, order = every.rank[run].sort(stable=True)
    place, length = place[order], length[order]
    receive = _counts(source, length, layout.ranks)
    # All rows at hand, those received numbered after those of x, as runs in the order of the stream.
    begin, order = torch.cat([own.begin, place]).sort()
    end = begin + torch.cat([own.length, length])[order]
    row = torch.cat([own.row, tokens + offsets(length)[:-1]])[order]
    # The result, segment after segment. Where a segment's own rows begin in it, or would if they were in it:
    held = layout.table(rank)
    before = _before(held, k)
    ends = k * torch.arange(1, len(before) + 1) if fixed else offsets(before + held.length)[1:]
    origin = ends if fixed else ends - held.length
    segment, run, place, length = _overlaps(held.begin - before, held.begin if fixed else held.end, begin, end)
    rows_from = runs(row[run] + place - begin[run], length)
    rows_to = runs(origin[segment] + place - held.begin[segment], length)
    is_far = rows_from >= tokens
    near = torch.stack([rows_from, rows_to])[:, ~is_far]
    far = torch.stack([rows_from - tokens, rows_to])[:, is_far]
    return HaloPlan(tokens, int(ends[-1]) if len(ends) else 0, near, far, sent, send, receive)


def _before(held: SegmentTable, k: int) -> Tensor:
    """How many tokens of the halo there are."""
    return held.start.clamp(max=k)


def _lacking(every: SegmentTable, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens that ranks lack, as ranges [first, stop) of the stream, and the rank: disjoint, by rank and place.

    Of a segment's halo, what its rank lacks is behind the rank's segment before it: whatever it lacks ahead of that
    one, that one lacks too.
    """
    every = every.take(every.rank.argsort(stable=True))
    first = every.begin - _before(every, k)
    same = every.rank[1:] == every.rank[:-1]
    first[1:] = torch.where(same, torch.maximum(first[1:], every.end[:-1]), first[1:])
    return every.rank, first, every.begin


def _overlaps(first: Tensor, stop: Tensor, begin: Tensor, end: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where ranges [first, stop) meet runs [begin, end), which are ascending, disjoint and not empty.

    Of each meeting, range after range: the numbers of the range and of the run, its first place and its length.
    """
    met = torch.searchsorted(end, first, right=True)
    count = torch.searchsorted(begin, stop) - met
    which, run = torch.arange(len(first)).repeat_interleave(count), runs(met, count)
    place = torch.maximum(first[which], begin[run])
    return which, run, place, torch.minimum(stop[which], end[run]) - place


def _counts(rank: Tensor, length: Tensor, ranks: int) -> dict[int, int]:
    """Sums of the lengths by rank, those that are not zero."""
    total = torch.zeros(ranks, dtype=torch.int64).index_add_(0, rank, length)
    return {peer: rows for peer, rows in enumerate(total.tolist()) if rows}
