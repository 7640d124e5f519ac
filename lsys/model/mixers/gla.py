"""`G`: gated linear attention, with a decay per token and key channel."""

from typing import Any

import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor

from lsys.model.mixers.heads import HeadNorm, upcast, zeros
from lsys.model.mixers.mixer import SharedLinear
from lsys.model.mixers.state import LinearMixer
from lsys.model.packed import PackedMicroBatch

TEMPERATURE = 16  # divides the log-decay, so that states last long at first


class GatedLinearMixer(LinearMixer):
    """o = W_o (norm(linear_attention(q, k, v, decay)) * silu(g)), log-decay = logsigmoid(W_2 W_1 x + b) / 16 (GLA: Yang et al., 2023).

    The low rank between W_1 and W_2 is shared by all heads: every tensor rank has W_1 whole and its heads' rows of W_2.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        config, rank = self.config, self.own.gate_rank
        self.out_norm = HeadNorm(config, self.heads, self.head_dim, self.model.norm_eps, self.tp_group)
        self.decay_in = SharedLinear(config, config.hidden_size, rank)
        self.decay_out = ColumnParallelLinear(
            rank,
            self.key_heads * self.key_dim,
            config=config,
            init_method=config.init_method,
            bias=True,
            skip_bias_add=False,
            tp_group=self.tp_group,
        )
        self.decay_out.bias.initial = zeros

    def project(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        decay, _ = self.decay_out(self.decay_in(hidden_states))  # [slots / tensor, 1, rank] -> [slots, 1, H_k Dk]
        return (*super().project(hidden_states), decay)

    def mix(self, projected: Tensor, packed: PackedMicroBatch, *more: Tensor) -> Tensor:
        q, k, v, gate = self.split_projection(projected)
        log_decay = F.logsigmoid(upcast(more[0])) / TEMPERATURE
        log_decay = log_decay.reshape(q.shape)  # [T_r, H_k, Dk]
        if self.values_per_key > 1:
            log_decay = log_decay.repeat_interleave(self.values_per_key, dim=1)
        o = self.attend(q, k, self.to_value_heads(v), packed, log_decay=log_decay)
        return (self.out_norm(o) * F.silu(self.to_value_heads(gate))).flatten(1)
