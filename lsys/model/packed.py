"""What mixers need to know of a micro-batch, in a form that travels through Megatron's block (and survives recompute)."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from lsys.model.cache import Cache
from lsys.observe.values import Pass
from lsys.parallel.comm import SequenceComm
from lsys.parallel.layout import SequenceLayout


@dataclass(kw_only=True)
class PackedMicroBatch(PackedSeqParams):
    """The packed documents of one micro-batch, as one context rank sees them.

    Attributes:
        layout: which tokens of which documents each context rank holds.
        positions: int64 [T_r], position of each local token in its document.
        comm: the ranks of the layout; None is one rank.
        cache: what layers keep of the tokens of one document that came before these; None: nothing did, as in training.
        values: where layers report; None: nowhere, as in decoding.
    """

    layout: SequenceLayout
    positions: Tensor
    comm: SequenceComm | None = None
    cache: Cache | None = None
    values: Pass | None = None
    qkv_format: str = "thd"
    _tables: dict[Hashable, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def anew(self, values: Pass | None = None) -> "PackedMicroBatch":
        """The same without the tables: for one pass, so that they go with its activations, not with the last batch of the step."""
        return replace(self, _tables={}, values=values)

    def report(self, name: str, value: Tensor | float, weight: Tensor | float | None = None) -> None:
        """Add to a declared metric (`lsys.config.reports`); what a recomputed layer reports again in backward is dropped.

        Args:
            value: a tensor of the metric's size, or a number; of a mean, the total. weight: of a mean with weights of its own.
        """
        if self.values is not None:
            self.values.report(name, value, weight)

    def table(self, key: Hashable, build: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """What depends on the positions alone, such as (cos, sin); computed once per micro-batch."""
        if key not in self._tables:
            self._tables[key] = build()
        return self._tables[key]

    def rotary(self, base: float, dim: int) -> tuple[Tensor, Tensor]:
        """(cos, sin), each fp32 [T_r, dim / 2], for the local tokens."""

        def build() -> tuple[Tensor, Tensor]:
            exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=self.positions.device) / dim
            angles = self.positions.double()[:, None] * base**-exponents  # fp64: positions reach millions
            return angles.cos().float(), angles.sin().float()

        return self.table((base, dim), build)


def apply_rotary(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding, halves rotated (GPT-NeoX): x [T, H, D] -> [T, H, D], computed in fp32 at least.

    Source: Su et al., RoFormer.
    """
    cos, sin = (table[:, None] for table in rotary)  # [T, D/2] -> [T, 1, D/2]
    first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
