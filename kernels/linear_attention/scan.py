"""States along chains: the one recurrence of the family, over chunks of a segment and over segments of a document alike."""

from typing import Any

import torch
from lsys.kernels.linear_attention.grid import Chain
from torch import Tensor


def scan(updates: Tensor, log_decay: Tensor, chain: Chain, initial: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """S_after(r) = exp(log_decay_r) S_before(r) + updates_r along each group of rows.

    Args:
        updates: [rows, H, K, V]. log_decay: [rows, H], not positive.
        chain: which rows follow which.
        initial: [groups, H, K, V], the state before a group's first row; None is zero.

    Returns:
        the states before each row [rows, H, K, V], and after each group [groups, H, K, V] (`initial` for groups without rows).
        Differentiable in updates, log_decay and initial.
    """
    if initial is None:
        initial = updates.new_zeros(len(chain.sizes), *updates.shape[1:])
    return _Scan.apply(updates, log_decay.exp(), initial, chain)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, updates: Tensor, decay: Tensor, initial: Tensor, chain: Chain) -> tuple[Tensor, Tensor]:
        before, after = torch.empty_like(updates), initial.clone()
        factor = decay[..., None, None]
        for place, rows in enumerate(chain.steps):
            rows = rows.to(updates.device)
            if place == 0:
                before[rows] = initial[chain.group.to(rows.device)[rows]]
            else:
                before[rows] = factor[rows - 1] * before[rows - 1] + updates[rows - 1]
        groups, last = (x.to(updates.device) for x in chain.last)
        after[groups] = factor[last] * before[last] + updates[last]
        ctx.save_for_backward(before, decay)
        ctx.chain = chain
        return before, after

    @staticmethod
    def backward(ctx: Any, d_before: Tensor, d_after: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        before, decay = ctx.saved_tensors
        d_updates, d_initial = scan_adjoint(d_before, d_after, decay, ctx.chain)
        return d_updates, (d_updates * before).sum((-2, -1)), d_initial, None


def scan_adjoint(d_before: Tensor, d_after: Tensor, decay: Tensor, chain: Chain) -> tuple[Tensor, Tensor]:
    """The transpose of `scan` in updates and initial state, from the last row of each group to the first.

    Args:
        d_before: [rows, H, K, V], d_after: [groups, H, K, V], gradients of what `scan` returns. decay: [rows, H], exponentiated.

    Returns:
        the gradients of updates [rows, H, K, V] (that of a row is also the gradient of the state after it) and of initial [groups, H, K, V].
    """
    factor = decay[..., None, None]
    d_updates, d_initial = torch.empty_like(d_before), d_after.clone()
    groups, last = (x.to(d_before.device) for x in chain.last)
    d_updates[last] = d_after[groups]
    for rows in reversed(chain.steps[1:]):
        rows = rows.to(d_before.device)
        d_updates[rows - 1] = d_before[rows] + factor[rows] * d_updates[rows]
    if chain.steps:
        first = chain.steps[0].to(d_before.device)
        d_initial[chain.group.to(first.device)[first]] = d_before[first] + factor[first] * d_updates[first]
    return d_updates, d_initial
