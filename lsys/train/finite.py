"""An update that is finite or is not made: the norm of all gradients, looked at before Megatron's optimizer changes anything.

Megatron looks for infinities only where it has a loss scaler, which fp32 and bf16 have none of; its `optimizer.step()` is here in its parts.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32, get_grad_norm_fp32
from torch import Tensor


@torch.no_grad()
def gradient_norm(optimizer: Any) -> float:
    """The 2-norm of the whole model's gradients, which `optimizer.prepare_grads()` has made ready (collective).

    NaN or inf where any gradient of any rank of its group is not finite, or where the sum of squares overflows fp32. What Megatron leaves out
    of the norm, since another rank or stage counts it, is looked at too: it adds nothing to the sum, or NaN. So each gradient is read once,
    and no message is needed beside the norm's.
    """
    counted: list[Tensor] = []
    copies: list[Tensor] = []
    for each in optimizer.chained_optimizers:
        own = each.get_main_grads_for_grad_norm()
        known = {id(gradient) for gradient in own}
        counted += own
        copies += [p.grad for p in each.get_parameters() if p.grad is not None and id(p.grad) not in known]
    if copies:
        counted.append(torch.stack(torch._foreach_norm(copies)).sum().mul(0.0).reshape(1))  # inf x 0 is NaN
    return float(get_grad_norm_fp32(counted, grad_stats_parallel_group=optimizer.get_grad_stats_parallel_group()))


@torch.no_grad()
def apply(optimizer: Any, norm: float) -> None:
    """Clip the gradients by their norm and update, as `ChainedOptimizer.step` does."""
    for each in optimizer.chained_optimizers:
        parameters = each.get_parameters()
        if parameters and each.config.clip_grad > 0:
            clip_grad_by_total_norm_fp32(parameters, each.config.clip_grad, norm)
    optimizer.step_with_ready_grads()


def agreed(is_finite: bool, device: torch.device, replicas: Any) -> bool:
    """Whether all of `replicas` found everything finite; 8 bytes, and only where there are several.

    Replicas of the plain optimizer have the same gradients, and each its own norm of them: one flipped bit must not part them.
    """
    if replicas.size() == 1:
        return is_finite
    flag = torch.tensor(int(not is_finite), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=replicas)
    return not flag.item()


def states(optimizer: Any) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of what Adam keeps on this rank: the fp32 copies of parameters that it updates, and its moments.

    States of a user's own optimizer are left out: infinity may mean something to it.
    """
    for each in optimizer.chained_optimizers:
        for parameter in each.get_parameters():
            yield "an optimizer's fp32 copy of a parameter", parameter.detach()
            if getattr(each, "is_own", False):
                continue
            for name, value in each.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.is_floating_point():
                    yield f"an optimizer's {name}", value


def first_not_finite(numbers: Iterator[tuple[str, Tensor]]) -> str:
    """The name of the first tensor with a number that is not finite; empty: there is none. One pass, one wait for the device."""
    held = [(name, tensor) for name, tensor in numbers if tensor.numel()]
    if not held:
        return ""
    device = next((tensor.device for _, tensor in held if tensor.device.type != "cpu"), held[0][1].device)
    wide = torch.float32
    largest = [torch.linalg.vector_norm(t, math.inf, dtype=torch.promote_types(t.dtype, wide)) for _, t in held]
    wrong = (~torch.stack([each.to(device) for each in largest]).isfinite()).nonzero()
    return held[int(wrong[0])][0] if len(wrong) else ""
