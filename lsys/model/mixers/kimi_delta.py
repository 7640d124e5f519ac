"""`K`: Kimi delta attention, whose state is corrected by what it says of a key and decays channel by channel."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from lsys.model.mixers.gated_delta import unit
from lsys.model.mixers.heads import HeadNorm, ShortConvolution, StepDecay, upcast
from lsys.model.mixers.mixer import SharedLinear
from lsys.model.mixers.state import LinearMixer
from lsys.model.packed import PackedMicroBatch


class KimiDeltaMixer(LinearMixer):
    """o = W_o (norm(delta_rule(q, k, v, beta, decay)) * sigmoid(G_2 G_1 x)), q, k, v after a short convolution and SiLU (Kimi Linear, 2025).

    Queries and keys have length 1; beta = sigmoid; log-decay = -e^A_log softplus(D_2 D_1 x + dt_bias) for each channel of the keys
    of each value head. The low ranks behind D_1 and G_1 are shared by all heads.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        config, tp = self.config, self.tp_group
        self.conv = ShortConvolution(config, self.card.channels, self.own.conv_width, False, tp)
        self.decay = ChannelDecay(config, self.heads, self.key_dim, tp)
        self.out_norm = HeadNorm(config, self.heads, self.head_dim, self.model.norm_eps, tp)
        rank = self.own.gate_rank or self.head_dim
        self.decay_in = SharedLinear(config, config.hidden_size, rank)
        self.decay_out = self._widening(rank, self.heads * self.key_dim)
        self.gate_in = SharedLinear(config, config.hidden_size, rank)
        self.gate_out = self._widening(rank, self.heads * self.head_dim)

    def _widening(self, rank: int, width: int) -> ColumnParallelLinear:
        """The second product of a low rank: [slots / tensor, 1, rank] -> [slots, 1, width / tensor]."""
        named = dict(config=self.config, init_method=self.config.init_method, tp_group=self.tp_group)
        return ColumnParallelLinear(rank, width, bias=False, skip_bias_add=False, **named)

    def project(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        decay, _ = self.decay_out(self.decay_in(hidden_states))  # [slots, 1, H Dk / tensor]
        gate, _ = self.gate_out(self.gate_in(hidden_states))  # [slots, 1, H Dv / tensor]
        return (*super().project(hidden_states), decay, gate)

    def mix(self, projected: Tensor, packed: PackedMicroBatch, *more: Tensor) -> Tensor:
        qkv, beta = self.split_projection(projected)
        raw, gate = more
        qkv = self.conv(qkv.flatten(1), packed, self.layer_cache(packed)).view_as(qkv)
        q, k, v = qkv.split((self.key_dim, self.key_dim, self.values_per_key * self.head_dim), dim=-1)
        beta = torch.sigmoid(upcast(beta.flatten(1)))  # [T_r, H]
        _, log_decay = self.decay(raw)
        o = self.attend(unit(q), unit(k), self.to_value_heads(v), packed, log_decay=log_decay, beta=beta)
        return self.out_norm(o).flatten(1) * torch.sigmoid(gate)


class ChannelDecay(StepDecay):
    """Step size and decay per token, head and key channel, of rates that are the heads': raw [T, H K] -> dt, log-decay [T, H, K]."""

    dt_bias: Tensor  # [H K / tensor]

    def __init__(self, config: TransformerConfig, heads: int, channels: int, tp_group: Any) -> None:
        super().__init__(config, heads, tp_group)
        self.channels = channels
        self.add("dt_bias", (heads * channels,), self.dt_bias.initial)  # type: ignore[attr-defined]  # in place of one a head

    def forward(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        dt = F.softplus(upcast(raw) + self.dt_bias).unflatten(-1, (-1, self.channels))
        return dt, -upcast(self.A_log).exp().unsqueeze(-1) * dt
