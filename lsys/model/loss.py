"""Loss per token over a vocabulary that is sharded over the tensor ranks."""

from typing import Any

import torch
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region, vocab_parallel_cross_entropy
from torch import Tensor


def token_losses(logits: Tensor, targets: Tensor, z_loss: float, tp_group: Any) -> Tensor:
    """Cross-entropy and z-loss of every slot.

    Args:
        logits: [slots, 1, vocab / tensor], this rank's shard of the vocabulary; may be overwritten.
        targets: int64 [slots, 1], ids of the whole vocabulary.
        z_loss: weight of log(Z)^2 (PaLM: Chowdhery et al., 2022); 0 skips its cost.
        tp_group: the tensor group.

    Returns:
        fp32 [2, slots]: nats per token, and z_loss * log(Z)^2. Unmasked: slack slots hold numbers without meaning.
    """
    if not z_loss:
        entropy = vocab_parallel_cross_entropy(logits, targets)[:, 0]
        return torch.stack((entropy, torch.zeros_like(entropy)))
    target_logit = _target_logits(logits, targets, tp_group)  # first: Megatron's cross-entropy overwrites fp32 logits
    entropy = vocab_parallel_cross_entropy(logits, targets)[:, 0]
    log_z = entropy + target_logit  # entropy = log Z - logit of the target
    return torch.stack((entropy, z_loss * log_z.square()))


def _target_logits(logits: Tensor, targets: Tensor, tp_group: Any) -> Tensor:
    """[slots, 1, vocab / tensor], [slots, 1] -> fp32 [slots]: the target's logit, wherever its shard is."""
    width = logits.shape[-1]
    local = targets[:, 0] - tp_group.rank() * width
    here = (local >= 0) & (local < width)
    rows = torch.arange(len(local), device=local.device) * width
    # index_select and not gather: its adjoint needs the index alone, so the logits may be overwritten afterwards.
    picked = logits.view(-1).index_select(0, rows + local.clamp(0, width - 1)).float()
    return reduce_from_tensor_model_parallel_region(picked * here, group=tp_group)
