"""The module of the mixer whose card is in cards.py."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lsys.model.mixers.heads import HeadNorm
from lsys.model.mixers.state import LinearMixer
from lsys.model.packed import PackedMicroBatch


class FeatureMixer(LinearMixer):
    """o = W_o norm(sum over j <= i of phi(q_i) . phi(k_j) v_j) (linear transformers: Katharopoulos et al., 2020; their sum of keys left out)."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.out_norm = HeadNorm(self.config, self.heads, self.head_dim, self.model.norm_eps, self.tp_group)

    def mix(self, projected: Tensor, packed: PackedMicroBatch, *more: Tensor) -> Tensor:
        q, k, v = self.split_projection(projected)
        o = self.attend(self.phi(q), self.phi(k), self.to_value_heads(v), packed)  # [T_r, H, D]
        return self.out_norm(o).flatten(1)

    def phi(self, x: Tensor) -> Tensor:
        return F.elu(x) + self.own.shift
