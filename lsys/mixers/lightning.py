"""The card of Lightning linear attention."""

from collections.abc import Hashable, Iterator, Mapping
from typing import Literal

from pydantic import Field

from lsys.mixers.card import Kept, Place, Weight
from lsys.mixers.state import Decay, Sizes, StateCard, StateOptions, grouped


class LightningOptions(StateOptions):
    """Own keys of Lightning linear attention."""

    decay: bool = Field(True, description="Fixed per-head decay; false: plain linear attention.")
    lrpe: Literal["none", "first", "all"] = Field(
        "none",
        description="Relative positions by phases of queries and keys (LRPE-d), which double the state: in no layer, the first of these layers "
        "(as TransNormerLLM) or all.",
    )
    norm: Literal["head", "srms"] = Field(
        "head", description="Norm of the output, inside each head: RMSNorm with weights, or without (SRMSNorm)."
    )


class Lightning(StateCard):
    name, letter, title = "lightning", "L", "Lightning linear attention"
    Options = LightningOptions
    module = "lsys.model.mixers.lightning:LightningMixer"
    own: LightningOptions

    @property
    def decay(self) -> Decay:
        return "head" if self.own.decay else "none"

    def parts(self) -> Mapping[str, int]:
        return grouped(self)

    def small(self) -> Iterator[Weight]:
        if self.own.norm == "head":
            yield self.out_norm()

    def widened(self, is_first: bool) -> int:
        return self.key_width * (2 if self._has_phases(is_first) else 1)

    def _has_phases(self, is_first: bool) -> bool:
        return self.own.lrpe == "all" or is_first and self.own.lrpe == "first"

    def kept(self, place: Place) -> Kept:
        sizes = Sizes(self, place)
        normed = sizes.normed - (sizes.b * sizes.values if self.own.norm == "srms" else 0.0)
        before = sizes.b * (2 * sizes.keys + sizes.values) + sizes.taken(0.0)
        if self._has_phases(place.is_first):
            # Queries and keys with phases are tensors of their own; what they were made of stays where the values are a view of it.
            stays = 0.0 if sizes.is_copied or sizes.is_sent else sizes.b * 2 * sizes.keys
            before = sizes.b * (4 * sizes.keys + sizes.values) + stays
        return Kept(before, normed + sizes.gated, "kernel")

    def tables(self, tensor: int, is_first: bool = False) -> Mapping[Hashable, int]:
        if not self._has_phases(is_first):
            return {}
        return {("lrpe", self.key_heads // tensor, self.key_width): 2 * self.keys // tensor}
