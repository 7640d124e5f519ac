"""The card of the delta net."""

from collections.abc import Iterator, Mapping

from lsys.mixers.card import Kept, Place, Weight
from lsys.mixers.gated_delta import kept_by_delta
from lsys.mixers.state import ConvolvedOptions, Decay, Sizes, StateCard


class DeltaNetOptions(ConvolvedOptions):
    """Own keys of the delta net."""


class DeltaNet(StateCard):
    name, letter, title = "delta_net", "N", "delta net"
    Options = DeltaNetOptions
    module = "lsys.model.mixers.delta_net:DeltaNetMixer"
    delta, convolved = True, "qkv"
    own: DeltaNetOptions

    @property
    def decay(self) -> Decay:
        return "none"

    def parts(self) -> Mapping[str, int]:
        return {"qkv": 2 * self.key_width + self.served, "beta": self.heads // self.key_heads}

    def small(self) -> Iterator[Weight]:
        yield from self.convolution(bias=False)
        yield self.out_norm()

    def kept(self, place: Place) -> Kept:
        # Of beta its fp32 sigmoid. The normed output is the mixer's, and no gate is a view of the projections.
        before = kept_by_delta(self, place, 4).before
        sizes = Sizes(self, place)
        return Kept(before, sizes.normed - sizes.b * sizes.values, "none")
