"""The card of a mixer: without torch, since `lsys check` reads it."""

from collections.abc import Iterator, Mapping

from pydantic import Field, PositiveFloat

from lsys.mixers.card import Kept, Place, Weight
from lsys.mixers.state import Decay, Sizes, StateCard, StateOptions


class FeatureOptions(StateOptions):
    """Own keys of linear attention over a feature map."""

    shift: PositiveFloat = Field(1.0, description="phi(x) = elu(x) + shift.")


class FeatureAttention(StateCard):
    name, title = "feature_attention", "linear attention over a feature map"
    Options = FeatureOptions
    module = "my_parts.mixers:FeatureMixer"
    own: FeatureOptions

    @property
    def decay(self) -> Decay:
        return "none"

    def parts(self) -> Mapping[str, int]:
        return {"q": self.key_width, "k": self.key_width, "v": self.served}

    def small(self) -> Iterator[Weight]:
        yield self.out_norm()

    def kept(self, place: Place) -> Kept:
        sizes = Sizes(self, place)
        # What phi gives of queries and keys, and values; phi's own inputs are views of the projections. Then the output's norm.
        before = sizes.b * 2 * sizes.keys + sizes.taken(sizes.values)
        return Kept(before, sizes.normed - sizes.b * sizes.values, "kernel")
