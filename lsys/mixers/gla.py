"""The card of gated linear attention."""

from collections.abc import Iterator, Mapping, Sequence

from pydantic import Field, PositiveInt

from lsys.mixers.card import Kept, LowRank, Place, Weight
from lsys.mixers.state import Decay, Sizes, StateCard, StateOptions


class GatedLinearOptions(StateOptions):
    """Own keys of gated linear attention."""

    gate_rank: PositiveInt = Field(16, description="Rank of the projection that makes the decay.")


class GatedLinear(StateCard):
    name, letter, title = "gla", "G", "gated linear attention"
    Options = GatedLinearOptions
    module = "lsys.model.mixers.gla:GatedLinearMixer"
    own: GatedLinearOptions

    @property
    def decay(self) -> Decay:
        return "channel"

    def parts(self) -> Mapping[str, int]:
        return {"q": self.key_width, "k": self.key_width, "v": self.served, "gate": self.served}

    def small(self) -> Iterator[Weight]:
        yield self.out_norm()

    def low_ranks(self) -> Sequence[LowRank]:
        return [LowRank("decay", self.own.gate_rank, self.keys, bias=True)]

    def kept(self, place: Place) -> Kept:
        sizes = Sizes(self, place)
        log_decay = 4 * (sizes.heads * self.key_width if sizes.is_copied else sizes.keys)
        # logsigmoid's input; fp32 copies
        makes = (0 if place.gpu else 4 * sizes.keys) + (4 * sizes.keys if sizes.b == 2 else 0)
        before = log_decay + makes + sizes.taken(2 * sizes.keys + sizes.values)
        return Kept(before, sizes.normed + sizes.gated + sizes.clone, "gate" if sizes.is_sent else "kernel")
