"""What ranks that share a vocabulary tell each other of its logits."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def log_sum_over_ranks(log_z: Tensor, chosen: Tensor, group: Any, slots: int) -> tuple[Tensor, Tensor]:
    """(log Z, the target's logit) of each token over the whole vocabulary, from those over each rank's part: [T], [T] -> [T], [T].

    Args:
        log_z: log of the sum of exponentials over this rank's part. chosen: the target's logit where it is here, else 0.
        slots: elements of a message, T or more: alike in all steps. There are two messages.
    """
    count = len(log_z)
    own = F.pad(torch.stack((log_z, chosen)), (0, slots - count))
    largest = own[0].clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    sums = torch.stack(((own[0] - largest).exp(), own[1]))
    dist.all_reduce(sums, group=group)
    return (largest + sums[0].log())[:count], sums[1, :count]
