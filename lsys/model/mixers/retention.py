"""`R`: retention, linear attention with rotary phases and a decay fixed per head."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lsys.model.mixers.state import LinearMixer
from lsys.model.packed import PackedMicroBatch, apply_rotary


def decay_rates(heads: int) -> Tensor:
    """Log-decay per head, fp32 [heads]: log(1 - 2^(-5 - h)), h from 0."""
    return torch.log1p(-(2.0 ** (-5 - torch.arange(heads, dtype=torch.float64)))).float()


class RetentionMixer(LinearMixer):
    """o = W_o (silu(g) * groupnorm(retention(q, k, v))), one group a head, without weights (RetNet: Sun et al., 2023).

    Keys and queries are rotated by rotary phases. RetNet's xPos is these and its decay.
    """

    log_decay: Tensor  # [H]

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.register_buffer("log_decay", self.local_heads(decay_rates(self.heads)), persistent=False)

    def mix(self, projected: Tensor, packed: PackedMicroBatch, *more: Tensor) -> Tensor:
        q, k, v, gate = self.split_projection(projected)
        rotary = packed.rotary(self.model.rope_base, self.key_dim)
        q, k = apply_rotary(q, rotary), apply_rotary(k, rotary)
        o = self.attend(q, k, self.to_value_heads(v), packed, log_decay=self.log_decay)
        o = F.layer_norm(o, (self.head_dim,), None, None, self.model.norm_eps)
        return (o * F.silu(self.to_value_heads(gate))).flatten(1)
