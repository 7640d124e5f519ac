"""`L`: Lightning linear attention with a fixed decay per head and a gated output norm."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lsys.model.mixers.heads import HeadNorm, upcast
from lsys.model.mixers.state import LinearMixer
from lsys.model.packed import PackedMicroBatch


def decay_rates(heads: int, layer: int, layers: int) -> Tensor:
    """Log-decay per head, fp32 [heads], of layer `layer` (from 0) of `layers`: -2^(-8 (h+1) / heads) (1 - layer / (layers - 1) + 1e-5).

    ALiBi's slopes (Press et al., 2022), falling to almost no decay in the last layer: TransNormerLLM (Qin et al., 2023), MiniMax-01 (2025).
    """
    slopes = 2.0 ** (-8.0 * torch.arange(1, heads + 1, dtype=torch.float64) / heads)
    return (-slopes * (1 - layer / max(layers - 1, 1) + 1e-5)).float()


def phase_rates(heads: int, dim: int) -> Tensor:
    """Radians per token of LRPE's phases, fp64 [heads, dim]: 10000^(-2 i / (heads dim)) of channel i of them all (Qin et al., 2023)."""
    channel = torch.arange(heads * dim, dtype=torch.float64)
    return (10_000.0 ** (-2 * channel / (heads * dim))).view(heads, dim)


class LightningMixer(LinearMixer):
    """o = W_o (norm(linear_attention(silu q, silu k, silu v)) * sigmoid(g)), decay fixed per head (Lightning attention, MiniMax-01).

    With LRPE-d (TransNormerLLM), a score of tokens s and t is also weighed by cos(theta (s - t)) in every channel: q and k become
    (x cos(theta t), x sin(theta t)), twice as wide. The phases are fixed here, which keeps them exact at positions of millions.
    Norm `srms` has no weight (SRMSNorm); normalising head by head leaves the result alike for all tensor degrees.
    """

    log_decay: Tensor  # [H]
    phases: Tensor  # [H_k, Dk]

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.eps = self.model.norm_eps
        self.out_norm = None
        if self.own.norm == "head":
            self.out_norm = HeadNorm(self.config, self.heads, self.head_dim, self.eps, self.tp_group)
        rates = self.local_heads(decay_rates(self.heads, self.layer_number - 1, self.model.layers))
        self.register_buffer("log_decay", rates, persistent=False)
        self.has_phases = self.own.lrpe == "all" or self.own.lrpe == "first" and self.is_first
        if self.has_phases:
            self.register_buffer(
                "phases", self.local_heads(phase_rates(self.key_heads, self.key_dim)), persistent=False
            )

    def mix(self, projected: Tensor, packed: PackedMicroBatch, *more: Tensor) -> Tensor:
        qkv, gate = self.split_projection(projected)
        q, k, v = F.silu(qkv).split((self.key_dim, self.key_dim, self.values_per_key * self.head_dim), dim=-1)
        if self.has_phases:
            q, k = self.rotated(q, packed), self.rotated(k, packed)
        decay, scale = self.log_decay if self.own.decay else None, self.key_dim**-0.5
        o = self.attend(q, k, self.to_value_heads(v), packed, log_decay=decay, scale=scale)
        o = F.rms_norm(o, (self.head_dim,), None, self.eps) if self.out_norm is None else self.out_norm(o)
        return (o * torch.sigmoid(self.to_value_heads(gate))).flatten(1)

    def rotated(self, x: Tensor, packed: PackedMicroBatch) -> Tensor:
        """LRPE: [T_r, H_k, Dk] -> [T_r, H_k, 2 Dk]."""
        precise = upcast(x)

        def build() -> tuple[Tensor, Tensor]:
            angles = packed.positions.double()[:, None, None] * self.phases
            return angles.cos().to(precise.dtype), angles.sin().to(precise.dtype)

        cos, sin = packed.table(("lrpe", *x.shape[1:]), build)
        return torch.cat((precise * cos, precise * sin), dim=-1).to(x.dtype)
