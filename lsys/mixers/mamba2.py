"""The card of Mamba-2."""

from collections.abc import Iterator, Mapping

from lsys.mixers.card import VECTOR, Kept, Place, Weight
from lsys.mixers.state import ConvolvedOptions, Decay, Sizes, StateCard


class Mamba2Options(ConvolvedOptions):
    """Own keys of Mamba-2."""


class Mamba2(StateCard):
    name, letter, title = "mamba2", "M", "Mamba-2"
    Options = Mamba2Options
    module = "lsys.model.mixers.mamba2:Mamba2Mixer"
    convolved = "xbc"
    own: Mamba2Options

    @property
    def decay(self) -> Decay:
        return "token"

    def parts(self) -> Mapping[str, int]:
        return {"z": self.served, "xbc": self.served + 2 * self.key_width, "dt": self.heads // self.key_heads}

    def small(self) -> Iterator[Weight]:
        yield from self.convolution(bias=True)
        yield from self.step_decay(self.heads)
        yield Weight("skip.D", self.heads, VECTOR)
        yield self.out_norm()

    def kept(self, place: Place) -> Kept:
        sizes = Sizes(self, place)
        b, values = sizes.b, sizes.values
        taken = sizes.taken(2 * sizes.keys) if sizes.is_sent else 0.0
        before = sizes.convolution + sizes.clone + 12 * sizes.heads + b * (sizes.channels + values) + taken
        # The norm is of what is gated, over the channels of a group.
        normed = sizes.normed - sizes.output - b * values - 4 * (sizes.heads - sizes.key_heads)
        return Kept(before, b * values * (3 if b == 4 else 2) + normed, "gate")
