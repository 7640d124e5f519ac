"""The recurrence over maps of states, S -> e^a S + B, for many sequences of any lengths at once.

Serves twice: over the chunks of each segment, and over the segments of each document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class ScanPlan:
    """In which order to go through maps that are concatenated sequence after sequence.

    Step p composes map p of every sequence that has one. With the sequences in falling order of their counts, those
    still active are the first ones.

    Attributes:
        counts: maps of each sequence, zero allowed.
        order: sequences by falling count, int64; None if they are in that order already.
        steps: of step p, the rows of its maps, a view where possible, and how many sequences are active.
    """

    counts: tuple[int, ...]
    order: Tensor | None
    steps: tuple[tuple[slice | Tensor, int], ...]

    def sorted(self, x: Tensor) -> Tensor:
        """One row a sequence -> the same by falling count; always a copy."""
        return x.clone() if self.order is None else x.index_select(0, self.order)

    def restored(self, x: Tensor) -> Tensor:
        """The inverse of `sorted`, without the copy where it can."""
        return x if self.order is None else torch.empty_like(x).index_copy_(0, self.order, x)


def scan_plan(counts: Sequence[int], device: torch.device) -> ScanPlan:
    """The plan for sequences of `counts` maps each."""
    count = torch.tensor(counts, dtype=torch.int64)
    longest = int(count.max()) if len(counts) else 0
    if longest * len(counts) == int(count.sum()):  # equal counts: step p takes each longest-th row
        return ScanPlan(tuple(counts), None, tuple((slice(p, None, longest), len(counts)) for p in range(longest)))
    count, order = count.sort(descending=True, stable=True)
    lengths = torch.tensor(counts, dtype=torch.int64)
    first = (lengths.cumsum(0) - lengths)[order]
    active = torch.searchsorted(-count, -torch.arange(longest)).tolist()  # sequences with more than p maps
    first_on_device, single = first.to(device), int(first[0])
    steps: list[tuple[slice | Tensor, int]] = []
    for p, n in enumerate(active):
        steps.append((slice(single + p, single + p + 1) if n == 1 else first_on_device[:n] + p, n))
    return ScanPlan(tuple(counts), order.to(device), tuple(steps))


class Scanned(NamedTuple):
    """States and log-decays before each map, and after the last map of each sequence."""

    before: Tensor  # [n, H, K, V]
    reach: Tensor | None  # [n, H], log-decay from the start of the sequence to this map
    total: Tensor  # [sequences, H, K, V]
    total_reach: Tensor | None  # [sequences, H]


def compose(update: Tensor, log_decay: Tensor | None, plan: ScanPlan, initial: Tensor | None = None) -> Scanned:
    """Compose the maps S -> e^log_decay S + update of each sequence, from `initial` (default zero). No autograd.

    update [n, H, K, V], log_decay [n, H] (None is 0), initial [sequences, H, K, V].
    """
    sequences = len(plan.counts)
    running = update.new_zeros(sequences, *update.shape[1:]) if initial is None else plan.sorted(initial)
    before = torch.empty_like(update, memory_format=torch.contiguous_format)
    if log_decay is None:
        for rows, active in plan.steps:
            before[rows] = running[:active]
            running[:active] += update[rows]
        return Scanned(before, None, plan.restored(running), None)
    decay = log_decay.exp()[..., None, None]
    reach = torch.empty_like(log_decay, memory_format=torch.contiguous_format)
    running_reach = log_decay.new_zeros(sequences, log_decay.shape[1])
    for rows, active in plan.steps:
        before[rows], reach[rows] = running[:active], running_reach[:active]
        running[:active].mul_(decay[rows]).add_(update[rows])
        running_reach[:active] += log_decay[rows]
    return Scanned(before, reach, plan.restored(running), plan.restored(running_reach))


def adjoint(
    d_before: Tensor, d_total: Tensor | None, log_decay: Tensor | None, plan: ScanPlan
) -> tuple[Tensor, Tensor]:
    """Gradients of `update` [n, H, K, V] and `initial` [sequences, H, K, V] from those of `before` and `total`.

    The gradient of map i's log-decay is e^log_decay_i <d_update_i, before_i>.
    """
    sequences = len(plan.counts)
    running = d_before.new_zeros(sequences, *d_before.shape[1:]) if d_total is None else plan.sorted(d_total)
    d_update = torch.empty_like(d_before, memory_format=torch.contiguous_format)
    decay = None if log_decay is None else log_decay.exp()[..., None, None]
    for rows, active in reversed(plan.steps):
        d_update[rows] = running[:active]
        if decay is not None:
            running[:active] *= decay[rows]
        running[:active] += d_before[rows]
    return d_update, plan.restored(running)


def inner(x: Tensor, y: Tensor) -> Tensor:
    """<x, y> of states: [n, H, K, V] twice -> [n, H]."""
    return (x.flatten(2).unsqueeze(2) @ y.flatten(2).unsqueeze(3))[..., 0, 0]


class _Scan(torch.autograd.Function):
    """`compose` from zero. A loop of recorded operations would keep every running state twice."""

    @staticmethod
    def forward(ctx: Any, update: Tensor, log_decay: Tensor | None, plan: ScanPlan) -> tuple[Tensor | None, ...]:
        scanned = compose(update, log_decay, plan)
        ctx.plan = plan
        wanted = log_decay is not None and ctx.needs_input_grad[1]
        ctx.save_for_backward(log_decay, scanned.before if wanted else None)
        return tuple(scanned)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_before: Tensor, d_reach: Tensor | None, d_total: Tensor, d_total_reach: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        log_decay, before = ctx.saved_tensors
        d_update, _ = adjoint(d_before, d_total, log_decay, ctx.plan)
        if before is None:
            return d_update, None, None
        assert d_reach is not None and d_total_reach is not None  # autograd fills in zeros
        d_log_decay = inner(d_update, before) * log_decay.exp()
        running = ctx.plan.sorted(d_total_reach)
        for rows, active in reversed(ctx.plan.steps):
            d_log_decay[rows] += running[:active]
            running[:active] += d_reach[rows]
        return d_update, d_log_decay, None


def scan(update: Tensor, log_decay: Tensor | None, plan: ScanPlan) -> Scanned:
    """`compose` from zero states; differentiable."""
    return Scanned(*_Scan.apply(update, log_decay, plan))
