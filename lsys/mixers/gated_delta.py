"""The card of the gated delta net."""

from collections.abc import Iterator, Mapping

from pydantic import Field

from lsys.mixers.card import Kept, Place, Weight
from lsys.mixers.state import ConvolvedOptions, Decay, Sizes, StateCard, grouped


class GatedDeltaOptions(ConvolvedOptions):
    """Own keys of the gated delta net."""

    negative_eigenvalues: bool = Field(
        False, description="Beta goes up to 2 instead of 1, so that a state can be turned over."
    )


class GatedDelta(StateCard):
    name, letter, title = "gated_delta", "D", "gated delta net"
    Options = GatedDeltaOptions
    module = "lsys.model.mixers.gated_delta:GatedDeltaMixer"
    delta, convolved = True, "qkv"
    own: GatedDeltaOptions

    @property
    def decay(self) -> Decay:
        return "token"

    def parts(self) -> Mapping[str, int]:
        each = self.heads // self.key_heads
        return {**grouped(self), "beta": each, "decay": each}

    def small(self) -> Iterator[Weight]:
        yield from self.convolution(bias=False)
        yield from self.step_decay(self.heads)
        yield self.out_norm()

    def kept(self, place: Place) -> Kept:
        return kept_by_delta(self, place, 16)


def kept_by_delta(card: StateCard, place: Place, gates: int) -> Kept:
    """What a delta rule after a short convolution keeps; gates: bytes a head of what makes beta and decay."""
    sizes = Sizes(card, place)
    b, copied = sizes.b, sizes.is_copied
    # The convolution's output: of it fp32 queries and keys, and values, are views.
    convolved = sizes.convolution + (b * sizes.channels if b == 4 or not copied else 0)
    unit = 2 * ((4 if b == 2 else 0) * sizes.keys + b * sizes.keys + 4 * sizes.key_heads)
    betas = 4 * sizes.heads if sizes.is_sent else 0.0  # other ranks', beside the sigmoid's own
    before = convolved + unit + gates * sizes.heads + betas + sizes.taken(sizes.values)
    return Kept(before, sizes.normed + sizes.gated + sizes.clone, "none" if copied else "gate")
