"""`D`: gated delta net, whose state is corrected by what it says of a key instead of added to."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lsys.model.mixers.heads import HeadNorm, ShortConvolution, StepDecay, upcast
from lsys.model.mixers.state import LinearMixer
from lsys.model.packed import PackedMicroBatch


class GatedDeltaMixer(LinearMixer):
    """o = W_o (norm(delta_rule(q, k, v, beta, decay)) * silu(g)), q, k, v after a short convolution (Yang et al., 2024).

    Queries and keys have length 1; beta = sigmoid, or twice that, so that the state's transition can have negative eigenvalues
    (Grazzi et al., 2024); decay as in Mamba-2.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        config, tp = self.config, self.tp_group
        self.conv = ShortConvolution(config, self.card.channels, self.own.conv_width, False, tp)
        self.decay = StepDecay(config, self.heads, tp)
        self.out_norm = HeadNorm(config, self.heads, self.head_dim, self.model.norm_eps, tp)

    def mix(self, projected: Tensor, packed: PackedMicroBatch, *more: Tensor) -> Tensor:
        qkv, gate, beta, raw = self.split_projection(projected)
        qkv = self.conv(qkv.flatten(1), packed, self.layer_cache(packed)).view_as(qkv)
        q, k, v = qkv.split((self.key_dim, self.key_dim, self.values_per_key * self.head_dim), dim=-1)
        beta = torch.sigmoid(upcast(beta.flatten(1)))  # [T_r, H]
        if self.own.negative_eigenvalues:
            beta = 2 * beta
        _, log_decay = self.decay(raw.flatten(1))
        o = self.attend(unit(q), unit(k), self.to_value_heads(v), packed, log_decay=log_decay, beta=beta)
        return (self.out_norm(o) * F.silu(self.to_value_heads(gate))).flatten(1)


def unit(x: Tensor) -> Tensor:
    """x / |x| over the last dimension, 0 for 0."""
    precise = upcast(x)
    return (precise * torch.rsqrt(precise.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)
