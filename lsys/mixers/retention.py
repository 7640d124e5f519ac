"""The card of retention."""

from collections.abc import Hashable, Iterator, Mapping

from lsys.mixers.card import Kept, Place, Refusal
from lsys.mixers.state import Decay, Sizes, StateCard


class Retention(StateCard):
    name, letter, title = "retention", "R", "retention"
    model_keys = ("rope_base",)
    module = "lsys.model.mixers.retention:RetentionMixer"

    @property
    def decay(self) -> Decay:
        return "head"

    def parts(self) -> Mapping[str, int]:
        return {"q": self.key_width, "k": self.key_width, "v": self.served, "gate": self.served}

    def refusals(self) -> Iterator[Refusal]:
        yield from super().refusals()
        width = self.key_width
        if width % 2:
            layers = self.symbol if self.key == self.name else self.key
            problem = f"{width} is odd, and the phases of {layers} layers turn pairs of channels"
            yield Refusal(self.where("key_dim"), problem, f"{width - 1 or 2} or {width + 1} does")

    def kept(self, place: Place) -> Kept:
        sizes = Sizes(self, place)
        normed = 2 * sizes.b * (sizes.values + sizes.heads)  # layer_norm keeps its input
        before = 2 * sizes.b * sizes.keys + sizes.taken(sizes.values)
        # What is sent is no view of the projections; of them the gate is.
        after = normed + sizes.gated + sizes.clone
        if sizes.is_copied:
            return Kept(before, after, "none")
        return Kept(before, after, "gate" if sizes.is_sent else "kernel")

    def tables(self, tensor: int, is_first: bool = False) -> Mapping[Hashable, int]:
        return {("rotary", self.key_width): self.key_width}
