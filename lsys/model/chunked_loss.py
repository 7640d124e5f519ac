"""Cross-entropy that holds the logits of some tokens at a time.

s = x W^T, lse = log sum_j e^(s_j), loss = lse - s_y + z lse^2. Forward keeps lse alone; backward makes each chunk's s again, and with the
gradients g of the loss and h of lse: dS = (g + h) e^(s - lse) - g 1_y, dX = dS W, dW += dS^T X, in fp32.
As in Cut Cross-Entropy (Wijmans et al., 2024), in plain PyTorch and over a sharded vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lsys.config import Config
from lsys.config.losses import CHUNK
from lsys.config.reports import LOSS, Z_LOSS
from lsys.model.loss import NEVER, Output
from lsys.parallel.vocabulary import log_sum_over_ranks


class ChunkedCrossEntropy:
    """The same sums as `CrossEntropy`, never with the logits of more than CHUNK tokens."""

    def __init__(self, settings: Config) -> None:
        self.z_loss = settings.train.z_loss

    def __call__(self, output: Output) -> dict[str, Tensor]:
        mask = output.mask
        entropy, log_z = _Chunked.apply(
            output.states(), output.weight, output.targets, output.tp_group, output.slots, output.held
        )
        return {LOSS: (entropy * mask).sum(), Z_LOSS: self.z_loss * (log_z.square() * mask).sum()}


class _Chunked(torch.autograd.Function):
    """states [T, hidden], weight [vocab / tensor, hidden], targets [T] -> cross-entropy, log Z: fp32 [T] (fp64 of fp64).

    Of the weight's rows the first `held` are tokens; the others' slopes are zero, e^(NEVER - lse).
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, targets: Tensor, tp_group: Any, slots: int, held: int
    ) -> tuple[Tensor, Tensor]:
        local = targets - tp_group.rank() * len(weight)
        here = (local >= 0) & (local < len(weight))
        local = local.clamp(0, len(weight) - 1)
        kind = torch.promote_types(states.dtype, torch.float32)
        log_z = torch.empty(len(states), dtype=kind, device=states.device)
        chosen = torch.empty_like(log_z)
        for part in _chunks(len(states)):
            logits = (states[part] @ weight.T).to(kind)  # [C, vocab / tensor]
            logits[:, held:] = NEVER
            chosen[part] = logits.gather(1, local[part, None])[:, 0] * here[part]
            log_z[part] = logits.logsumexp(-1)
            del logits  # before the next ones
        if tp_group.size() > 1:
            log_z, chosen = log_sum_over_ranks(log_z, chosen, tp_group, slots)
        ctx.held = held
        ctx.save_for_backward(states, weight, local, here, log_z)
        return log_z - chosen, log_z

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, local, here, log_z = ctx.saved_tensors
        of_loss, of_log_z = gradients
        by_states = torch.empty_like(states)
        by_weight = torch.zeros(weight.shape, dtype=log_z.dtype, device=weight.device)
        for part in _chunks(len(states)):
            slopes = (states[part] @ weight.T).to(log_z.dtype)  # [C, vocab / tensor]
            slopes[:, ctx.held :] = NEVER
            slopes = slopes.sub_(log_z[part, None]).exp_().mul_((of_loss + of_log_z)[part, None])
            slopes.scatter_add_(1, local[part, None], -(of_loss[part] * here[part])[:, None])
            slopes = slopes.to(states.dtype)
            by_states[part] = slopes @ weight
            if slopes.dtype == by_weight.dtype:
                by_weight.addmm_(slopes.T, states[part])
            else:
                by_weight += slopes.T @ states[part]
            del slopes
        return by_states, by_weight.to(weight.dtype), None, None, None, None


def _chunks(count: int) -> Iterator[slice]:
    return (slice(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK))
