"""What mixers need to know of a micro-batch, in a form that travels through Megatron's block (and survives recompute)."""

from dataclasses import dataclass, field

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from lsys.parallel.layout import SequenceLayout


@dataclass(kw_only=True)
class PackedMicroBatch(PackedSeqParams):
    """The packed documents of one micro-batch, as one context rank sees them.

    Attributes:
        layout: which tokens of which documents each context rank holds.
        positions: int64 [T_r], position of each local token in its document.
    """

    layout: SequenceLayout
    positions: Tensor
    qkv_format: str = "thd"
    _rotary: dict[tuple[float, int], tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def rotary(self, base: float, dim: int) -> tuple[Tensor, Tensor]:
        """(cos, sin), each fp32 [T_r, dim / 2], for the local tokens; computed once per micro-batch."""
        key = (base, dim)
        if key not in self._rotary:
            exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=self.positions.device) / dim
            angles = self.positions.double()[:, None] * base**-exponents  # fp64: positions reach millions
            self._rotary[key] = (angles.cos().float(), angles.sin().float())
        return self._rotary[key]


def apply_rotary(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding, halves rotated (GPT-NeoX): x [T, H, D] -> [T, H, D], computed in fp32.

    Source: Su et al., RoFormer.
    """
    cos, sin = (table[:, None] for table in rotary)  # [T, D/2] -> [T, 1, D/2]
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
