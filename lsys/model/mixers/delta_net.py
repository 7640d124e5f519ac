"""`N`: delta net, whose state is corrected by what it says of a key, and never decays."""

from typing import Any

import torch
from torch import Tensor

from lsys.model.mixers.gated_delta import unit
from lsys.model.mixers.heads import HeadNorm, ShortConvolution, upcast
from lsys.model.mixers.state import LinearMixer
from lsys.model.packed import PackedMicroBatch


class DeltaNetMixer(LinearMixer):
    """o = W_o norm(delta_rule(q, k, v, beta)), q, k, v after a short convolution and SiLU (DeltaNet: Yang et al., 2024).

    Queries and keys have length 1; beta = sigmoid.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.conv = ShortConvolution(self.config, self.card.channels, self.own.conv_width, False, self.tp_group)
        self.out_norm = HeadNorm(self.config, self.heads, self.head_dim, self.model.norm_eps, self.tp_group)

    def mix(self, projected: Tensor, packed: PackedMicroBatch, *more: Tensor) -> Tensor:
        qkv, beta = self.split_projection(projected)
        qkv = self.conv(qkv.flatten(1), packed, self.layer_cache(packed)).view_as(qkv)
        q, k, v = qkv.split((self.key_dim, self.key_dim, self.values_per_key * self.head_dim), dim=-1)
        beta = torch.sigmoid(upcast(beta.flatten(1)))  # [T_r, H]
        o = self.attend(unit(q), unit(k), self.to_value_heads(v), packed, beta=beta)
        return self.out_norm(o).flatten(1)
