"""`M`: Mamba-2, a state-space layer as linear attention with a decay per token and head."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lsys.model.mixers.heads import HeadNorm, HeadParameters, ShortConvolution, StepDecay, ones
from lsys.model.mixers.state import LinearMixer
from lsys.model.packed import PackedMicroBatch


class Mamba2Mixer(LinearMixer):
    """y = W_o norm((SSM(x, B, C, dt) + D x) * silu(z)), x, B, C after a short convolution (Mamba-2: Dao & Gu, 2024).

    S_t = e^(-e^A_log dt_t) S_(t-1) + B_t (dt_t x_t)^T, read by C_t: linear attention with q = C, k = B, v = dt x and scale 1. Groups
    of heads that share B and C are key heads; the norm goes over the channels of a group.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        config, tp = self.config, self.tp_group
        inner = self.values_per_key * self.head_dim  # channels of a group
        self.conv = ShortConvolution(config, self.card.channels, self.own.conv_width, True, tp)
        self.decay = StepDecay(config, self.heads, tp)
        self.skip = HeadParameters(config, tp)
        self.skip.add("D", (self.heads,), ones)
        self.out_norm = HeadNorm(config, self.key_heads, inner, self.model.norm_eps, tp)

    def mix(self, projected: Tensor, packed: PackedMicroBatch, *more: Tensor) -> Tensor:
        z, xbc, raw = self.split_projection(projected)
        xbc = self.conv(xbc.flatten(1), packed, self.layer_cache(packed)).view_as(xbc)
        x, b, c = xbc.split((self.values_per_key * self.head_dim, self.key_dim, self.key_dim), dim=-1)
        x = self.to_value_heads(x)  # [T_r, H, P]
        dt, log_decay = self.decay(raw.flatten(1))  # [T_r, H] each
        v = (dt.unsqueeze(-1) * x).to(x.dtype)
        y = self.attend(c, b, v, packed, log_decay=log_decay, scale=1.0)
        y = torch.addcmul(y, self.skip.D.unsqueeze(-1), x)
        return self.out_norm(y.reshape(z.shape) * F.silu(z)).flatten(1)
