"""The recurrence over maps of states, S -> A S + B, for many sequences of any lengths at once.

Serves over the chunks of each segment, over the segments of each document, and over what ranks hold of it. The forms of
A, a transition, are in `transition.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lsys.kernels.linear_attention.checks import without_autocast
from lsys.kernels.linear_attention.transition import gradient, identity, is_matrix, operator, transposed

WIDEST_MATRIX = 128  # K of a transition [K, K] that a program has in fp32, whole


@dataclass(frozen=True)
class ScanPlan:
    """In which order to go through maps that are concatenated sequence after sequence.

    Step p composes map p of every sequence that has one. With the sequences in falling order of their counts, those
    still active are the first ones. A kernel that goes through a sequence by itself needs the counts alone.

    Attributes:
        counts: maps of each sequence, zero allowed.
        device: of the maps.
    """

    counts: tuple[int, ...]
    device: torch.device

    @cached_property
    def order(self) -> Tensor | None:
        """Sequences by falling count, int64; None if they are in that order already."""
        with torch.inference_mode(False):  # a plan outlives the call that made it
            return None if self._are_equal else self._sorted.indices.to(self.device)

    @cached_property
    def steps(self) -> tuple[tuple[slice | Tensor, int], ...]:
        """By step p the rows of its maps, a view where possible, and how many sequences are active."""
        longest = max(self.counts, default=0)
        if self._are_equal:  # step p takes each longest-th row
            return tuple((slice(p, None, longest), len(self.counts)) for p in range(longest))
        with torch.inference_mode(False):
            count, order = self._sorted
            lengths = torch.tensor(self.counts, dtype=torch.int64)
            first = (lengths.cumsum(0) - lengths)[order]
            active = torch.searchsorted(-count, -torch.arange(longest)).tolist()  # sequences with more than p maps
            first_on_device, single = first.to(self.device), int(first[0])
            return tuple(
                (slice(single + p, single + p + 1) if n == 1 else first_on_device[:n] + p, n)
                for p, n in enumerate(active)
            )

    @property
    def _are_equal(self) -> bool:
        return max(self.counts, default=0) * len(self.counts) == sum(self.counts)

    @cached_property
    def _sorted(self) -> torch.return_types.sort:
        """The counts that fall, and whose they are."""
        return torch.tensor(self.counts, dtype=torch.int64).sort(descending=True, stable=True)

    def sorted(self, x: Tensor) -> Tensor:
        """One row a sequence -> the same by falling count; always a copy."""
        return x.clone() if self.order is None else x.index_select(0, self.order)

    def restored(self, x: Tensor) -> Tensor:
        """The inverse of `sorted`, without the copy where it can."""
        return x if self.order is None else torch.empty_like(x).index_copy_(0, self.order, x)


class Scanned(NamedTuple):
    """States and transitions before each map, and after the last map of each sequence.

    Transitions are those from the start of the sequence; None is 1.
    """

    before: Tensor  # [n, H, K, V]
    cumulative: Tensor | None  # [n, H ...]
    total: Tensor  # [sequences, H, K, V]
    total_cumulative: Tensor | None  # [sequences, H ...]


def compose(
    update: Tensor, transition: Tensor | None, plan: ScanPlan, initial: Tensor | None = None, cumulative: bool = True
) -> Scanned:
    """Compose the maps S -> A S + update of each sequence, from `initial` (default zero). No autograd.

    update [n, H, K, V], transition [n, H ...], initial [sequences, H, K, V]. `cumulative` only if asked for (a kernel makes
    it in passing), and not of matrices: see `scan`.
    """
    if takes_triton(update, transition):
        from lsys.kernels.linear_attention.gpu.compose import forwards

        return Scanned(*forwards(update, transition, plan.counts, initial))
    sequences = len(plan.counts)
    running = update.new_zeros(sequences, *update.shape[1:]) if initial is None else plan.sorted(initial)
    before = torch.empty_like(update, memory_format=torch.contiguous_format)
    a = None if transition is None else operator(transition)
    for rows, active in plan.steps:
        now = running[:active]
        before[rows] = now
        step(now, None if a is None else a[rows]).add_(update[rows])
    total = plan.restored(running)
    if transition is None or is_matrix(transition) or not cumulative:
        return Scanned(before, None, total, None)
    passed = torch.empty_like(transition, memory_format=torch.contiguous_format)
    running = transition.new_zeros(sequences, *transition.shape[1:])
    for rows, active in plan.steps:
        passed[rows] = running[:active]
        running[:active] += transition[rows]
    return Scanned(before, passed, total, plan.restored(running))


def takes_triton(states: Tensor, transition: Tensor | None) -> bool:
    """Whether a kernel goes through all maps at once, instead of one after the other: on CUDA, of states [n, H, K, V] in fp32."""
    fits = states.dtype == torch.float32 and (transition is None or transition.dtype == torch.float32)
    narrow = not is_matrix(transition) or states.shape[2] <= WIDEST_MATRIX
    return states.is_cuda and fits and narrow and find_spec("triton") is not None


def last(
    update: Tensor, transition: Tensor | None, plan: ScanPlan, initial: Tensor, cumulative: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The states [sequences, H, K, V] and transitions [sequences, H ...] after the maps, given those before. No autograd."""
    running, passed = plan.sorted(initial), None if cumulative is None else plan.sorted(cumulative)
    a = None if transition is None else operator(transition)
    for rows, active in plan.steps:
        now = None if a is None else a[rows]
        step(running[:active], now).add_(update[rows])
        if passed is None or transition is None:
            continue
        if is_matrix(transition):
            step(passed[:active], now)
        else:
            passed[:active] += transition[rows]
    return plan.restored(running), None if passed is None else plan.restored(passed)


def step(state: Tensor, a: Tensor | None) -> Tensor:
    """A S in place of S, of A as `transition.operator` gives it; None is 1."""
    if a is None:
        return state
    return state.mul_(a) if a.shape[-1] == 1 else state.copy_(a @ state)


def adjoint(
    d_before: Tensor, d_total: Tensor | None, transition: Tensor | None, plan: ScanPlan
) -> tuple[Tensor, Tensor]:
    """Gradients of `update` [n, H, K, V] and `initial` [sequences, H, K, V] from those of `before` and `total`.

    That of a map's update is that of the state after it, of which `transition.gradient` makes that of its transition.
    """
    if takes_triton(d_before, transition):
        from lsys.kernels.linear_attention.gpu.compose import backwards

        return backwards(d_before, d_total, transition, plan.counts)
    sequences = len(plan.counts)
    running = d_before.new_zeros(sequences, *d_before.shape[1:]) if d_total is None else plan.sorted(d_total)
    d_update = torch.empty_like(d_before, memory_format=torch.contiguous_format)
    back = None if transition is None else transposed(operator(transition))
    for rows, active in reversed(plan.steps):
        d_update[rows] = running[:active]
        step(running[:active], None if back is None else back[rows]).add_(d_before[rows])
    return d_update, plan.restored(running)


class _Scan(torch.autograd.Function):
    """`compose`. A loop of recorded operations would keep every running state twice."""

    @staticmethod
    def forward(
        ctx: Any, update: Tensor, transition: Tensor | None, initial: Tensor | None, plan: ScanPlan
    ) -> tuple[Tensor | None, ...]:
        scanned = compose(update, transition, plan, initial)
        ctx.plan = plan
        wanted = transition is not None and ctx.needs_input_grad[1]
        ctx.save_for_backward(transition, scanned.before if wanted else None)
        return tuple(scanned)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(
        ctx: Any, d_before: Tensor, d_cumulative: Tensor | None, d_total: Tensor, d_total_cumulative: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        transition, before = ctx.saved_tensors
        d_update, d_start = adjoint(d_before, d_total, transition, ctx.plan)
        d_initial = d_start if ctx.needs_input_grad[2] else None
        if before is None:
            return d_update, None, d_initial, None
        d_transition = gradient(transition, d_update, before)
        if d_cumulative is not None and d_total_cumulative is not None:  # of logarithms, which add up
            running = ctx.plan.sorted(d_total_cumulative)
            for rows, active in reversed(ctx.plan.steps):
                d_transition[rows] += running[:active]
                running[:active] += d_cumulative[rows]
        return d_update, d_transition, d_initial, None


def scan(
    update: Tensor, transition: Tensor | None, plan: ScanPlan, initial: Tensor | None = None, cumulative: bool = True
) -> Scanned:
    """`compose`, differentiable, and with the cumulative transition of matrices: they are what the maps without update make of 1.

    That doubles the work; `cumulative=False` leaves it out.
    """
    if transition is None or not (cumulative and is_matrix(transition)):
        return Scanned(*_Scan.apply(update, transition, initial, plan))
    sequences, width = len(plan.counts), update.shape[-1]
    start = update.new_zeros(sequences, *update.shape[1:]) if initial is None else initial
    start = torch.cat([start, identity(transition, sequences)], dim=-1)
    update = torch.cat([update, torch.zeros_like(transition)], dim=-1)
    before, _, total, _ = _Scan.apply(update, transition, start, plan)
    return Scanned(before[..., :width], before[..., width:], total[..., :width], total[..., width:])
