"""LASP-2 (Sun et al., 2025): every rank gathers the maps of all runs of documents that cross ranks.

One all-gather each way, of a state, H K V elements a run, and its transition, whatever the depth to which documents are
cut. Forward it carries the maps while ranks compute what tokens get from their own chunk; backward it carries the
gradients of the states before runs while ranks compute the gradients of that part. Each rank then composes them in the
order of positions, backward in reverse. A decay fixed per head is not sent: with the lengths of runs, which the layout
has, every rank knows all transitions.

It does not move fewer bytes than a chain, whose ranks receive one state each: it takes fewer steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lsys.kernels.linear_attention.scan import ScanPlan, adjoint, compose
from lsys.kernels.linear_attention.transition import gradient
from lsys.parallel.comm import SequenceComm
from lsys.parallel.layout import SequenceLayout
from lsys.parallel.linear.exchange import Exchanged, Inputs
from lsys.parallel.linear.state_exchange_plan import ExternalSegments, all_runs


@dataclass(frozen=True)
class GatherPlan:
    """What one rank gathers: the runs of chains that cross ranks, or all if final states are wanted.

    Attributes:
        sizes: how many each rank sends.
        rows: which of this rank's runs are sent, int64 [n]; None: all.
        own: of these the rows in the composed order, int64 [n].
        order: rows of the gathered table, chain after chain: int64 [rows].
        length: tokens of each row in that order, int64 [rows].
        plan: of the scan over each chain; if final states are wanted, over each document.
    """

    sizes: tuple[int, ...]
    rows: Tensor | None
    own: Tensor
    order: Tensor
    length: Tensor
    plan: ScanPlan


def gather_plan(layout: SequenceLayout, external: ExternalSegments) -> GatherPlan:
    """The plan of the rank that these segments of the layout are of: made once."""
    return layout.derived((*external.key, "gathered"), None, lambda: _gather_plan(layout, external))


def _gather_plan(layout: SequenceLayout, external: ExternalSegments) -> GatherPlan:
    rank, final, device = external.rank, external.finals is not None, external.run.device
    every = all_runs(layout, external.causal)
    numbers = ((every.places > 1) | final).nonzero().flatten()
    sent = every.take(numbers)
    own = (sent.rank == rank).nonzero().flatten()
    counts = torch.bincount(sent.chain, minlength=len(layout.lengths)) if final else sent.places[sent.place == 0]
    return GatherPlan(
        sizes=tuple(torch.bincount(sent.rank, minlength=layout.ranks).tolist()),
        rows=None
        if len(own) == len(external.numbers)
        else torch.searchsorted(external.numbers, numbers[own]).to(device),
        own=own.to(device),
        order=sent.rank.argsort(stable=True).argsort().to(device),
        length=sent.length.to(device),
        plan=ScanPlan(tuple(counts.tolist()), device),
    )


def exchange(comm: SequenceComm, layout: SequenceLayout, external: ExternalSegments, inputs: Inputs) -> Gather | None:
    """The exchange of a call; None if no state leaves a rank: alike on all ranks."""
    *_, log_decay, beta = inputs
    is_fixed = log_decay is not None and log_decay.dim() == 1 and beta is None
    return (
        Gather(comm, layout, external, log_decay if is_fixed else None) if external.crosses or external.finals else None
    )


class Gather:
    """The exchange of one call. See `lsys.parallel.linear.exchange.Exchange`.

    Args:
        comm: the ranks.
        layout, external: of the tokens, and this rank's.
        log_decay: [H] if transitions follow from it and lengths; else None.
    """

    def __init__(
        self, comm: SequenceComm, layout: SequenceLayout, external: ExternalSegments, log_decay: Tensor | None
    ) -> None:
        self.comm, self.plan, self.final = comm, gather_plan(layout, external), external.finals is not None
        self.log_decay = None if log_decay is None else log_decay.detach()

    def forward(self, update: Tensor, transition: Tensor | None) -> Callable[[], Exchanged]:
        plan, runs, shape = self.plan, len(update), update.shape[2:]
        form = None if transition is None or self.log_decay is not None else transition.shape[2:]
        packed = self._sent(update).flatten(2)  # [n, H, K V]
        if transition is not None and form is not None:
            packed = torch.cat([packed, self._sent(transition).reshape(*packed.shape[:2], form.numel())], dim=-1)
        pending = self.comm.all_gather_async(packed, plan.sizes)

        def finish() -> Exchanged:
            table = pending.wait().index_select(0, plan.order)
            states, others = table.tensor_split([shape.numel()], dim=-1)
            transitions = None if form is None else others.unflatten(-1, form) if form else others.squeeze(-1)
            if self.log_decay is not None:
                transitions = self.log_decay.to(states.dtype) * plan.length[:, None]  # [rows, H]
            composed = compose(states.unflatten(-1, shape), transitions, plan.plan, cumulative=False)
            before = composed.before.index_select(0, plan.own)
            return self._spread(before, runs), composed.total if self.final else None, (transitions, before)

        return finish

    def backward(
        self, d_state: Tensor, d_final: Tensor | None, *saved: Tensor | None
    ) -> Callable[[], tuple[Tensor, Tensor | None]]:
        plan, (transition, before), runs = self.plan, saved, len(d_state)
        sent, more = self._sent(d_state), 0 if d_final is None else len(d_final)
        sizes = [size + more for size in plan.sizes]
        pending = self.comm.all_gather_async(sent if d_final is None else torch.cat([sent, d_final]), sizes)

        def finish() -> tuple[Tensor, Tensor | None]:
            gathered = pending.wait().split(sizes)
            table = torch.cat([part[: len(part) - more] for part in gathered]).index_select(0, plan.order)
            d_total = torch.stack([part[len(part) - more :] for part in gathered]).sum(0) if more else None
            d_update = adjoint(table, d_total, transition, plan.plan)[0].index_select(0, plan.own)
            d_transition = None
            if transition is not None:
                assert before is not None
                d_transition = self._spread(gradient(transition.index_select(0, plan.own), d_update, before), runs)
            return self._spread(d_update, runs), d_transition

        return finish

    def _sent(self, x: Tensor) -> Tensor:
        return x if self.plan.rows is None else x.index_select(0, self.plan.rows)

    def _spread(self, x: Tensor, runs: int) -> Tensor:
        """Rows of what is sent -> those of all this rank's runs, zero where nothing is."""
        return x if self.plan.rows is None else x.new_zeros(runs, *x.shape[1:]).index_copy_(0, self.plan.rows, x)
