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

    def without_tables(self, values: Pass | None = None) -> "PackedMicroBatch":
        """The same without the tables: for one pass, so that they go with its activations, not with the last batch of the step."""
        return replace(self, _tables={}, values=values)

    def report(self, name: str, value: Tensor | float, weight: Tensor | float | None = None) -> None:
        """Add to a declared metric (`lsys.config.reports`); what a recomputed layer reports again in backward is dropped.

        Args:
            value: a tensor of the metric's size, or a number; of a mean, the total. weight: of a mean with weights of its own.
        """
        if self.values is not None:
            self.values.report(name, value, weight)

    def add_loss(self, name: str, total: Tensor, through: Tensor) -> Tensor:
        """`through`, unchanged; behind it, the backward pass differentiates a declared loss too (`lsys.config.losses.LayerLoss`).

        The loss of the step is the final one plus weight x (all totals) / (count over the step): every rank and micro-batch adds its part.
        Tensor ranks add theirs too: the sum over the slots or heads that the rank holds; what all of them compute alike, each divides by
        the tensor degree. A recomputed layer's counts once. In validation it is reported, and no part of the loss.

        Args:
            name: as declared.
            total: fp32 scalar, a sum (not a mean) over the rank's tokens; slack, behind the documents, is no token (`filled`).
            through: an activation on the layer's way to its output; what is made of the result has to reach the final loss.

        Raises:
            ValueError: it is not declared, or no scalar of fp32; at the end of the step, if the result was not used.
        """
        return through if self.values is None else self.values.add_loss(name, total, through)

    @property
    def is_recomputed(self) -> bool:
        """Whether a layer that runs now has run with this micro-batch before: what it counts of its own, it counts no more."""
        return self.values is not None and self.values.has_ended

    def filled(self, rows: int, tensor_rank: int) -> int:
        """How many of a tensor rank's `rows` slots of the residual stream are tokens; the others, at the end, are slack."""
        return min(max(len(self.positions) - tensor_rank * rows, 0), rows)

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
