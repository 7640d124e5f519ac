"""Losses that layers add: their gradients enter the backward pass beside something that passes through the layer.

The step's loss is L = F / N + sum over losses of w A / C: F of the final loss and A of a loss are sums over all ranks and micro-batches, N
the targets that count, C what the loss counts. Megatron differentiates the final loss's sums and divides the gradients by N at the end of
the step, so A is differentiated with the factor w N / C. It stands beside an activation on the way to the final loss, in an autograd
node that is the identity forward (as Megatron's MoEAuxLossAutoScaler): so it goes with any schedule of the pipeline, and where a layer
is recomputed it is differentiated in the recomputed pass, which is the one that autograd sees.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lsys.config.losses import LayerLoss


class Scale(NamedTuple):
    """The scale of one loss in one step, fp64 scalars on the device.

    Attributes:
        factor: w N / C, of its gradient, with C at least 1. counted: C, over all ranks.
    """

    factor: Tensor
    counted: Tensor


def scales(losses: Sequence[LayerLoss], batches: Iterable[Any], group: Any, device: torch.device) -> dict[str, Scale]:
    """The scales of a step's losses (collective where there are losses; without a wait for the device).

    Args:
        batches: this rank's micro-batches (`lsys.data.plan.RankBatch`).
        group: data x context ranks.
    """
    if not losses:
        return {}
    counts = torch.zeros(1 + len(losses), dtype=torch.float64, device=device)
    for batch in batches:
        counts[0] += batch.loss_mask.sum()
        for place, loss in enumerate(losses, start=1):
            counts[place] += _count(loss, batch)
    dist.all_reduce(counts, group=group)
    return {
        loss.name: Scale(loss.weight * counts[0] / count.clamp(min=1), count)
        for loss, count in zip(losses, counts[1:], strict=True)
    }


def _count(loss: LayerLoss, batch: Any) -> Any:
    if loss.count == "targets":
        return batch.loss_mask.sum()
    return len(batch.packed.positions) if loss.count == "tokens" else loss.count(batch)


class Pending:
    """How many of the added losses wait for their gradient."""

    def __init__(self) -> None:
        self.names: dict[str, int] = {}

    def change(self, name: str, by: int) -> None:
        self.names[name] = self.names.get(name, 0) + by

    def require_none(self) -> None:
        """After the backward passes of a step.

        Raises:
            ValueError: a loss was added, and nothing that leads to the final loss was made of what that gave.
        """
        if left := [name for name, count in self.names.items() if count]:
            raise ValueError(
                f"{', '.join(left)}: added to the loss and never differentiated; a layer goes on with what packed.add_loss gives, not with what "
                "it was given"
            )


class Added(torch.autograd.Function):
    """(through, total, factor, name, pending) -> through; backward, total has the gradient `factor`."""

    @staticmethod
    def forward(ctx: Any, through: Tensor, total: Tensor, factor: Tensor, name: str, pending: Pending) -> Tensor:
        ctx.save_for_backward(factor)
        ctx.name, ctx.pending, ctx.kind = name, pending, (total.shape, total.dtype)
        pending.change(name, 1)
        return through.view_as(through)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (factor,), (shape, dtype) = ctx.saved_tensors, ctx.kind
        ctx.pending.change(ctx.name, -1)
        return gradients[0], factor.to(dtype).reshape(shape), None, None, None
