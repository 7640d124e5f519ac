"""The card of a channel mixer that looks at the token before: of RWKV's kind (Peng et al., 2023), brought by its path."""

from collections.abc import Iterator, Sequence

from lsys.mixers.card import PRODUCT, VECTOR, Place, Weight
from lsys.mixers.channel import ChannelCard
from lsys.mixers.exchange import Halo


class Shift(ChannelCard):
    name, title = "shift", "channel mixer of a token and the one before"
    module = "support.shift_module:ShiftMLP"

    def in_widths(self) -> Sequence[int]:
        return (self.model.ffn_width,)

    def weights(self) -> Iterator[Weight]:
        size = self.model.ffn_width * self.model.hidden
        yield Weight("linear_fc1", size, PRODUCT)
        yield Weight("linear_fc2", size, PRODUCT)
        yield Weight("mix.weight", self.model.ffn_width, VECTOR)

    def sliced(self) -> Iterator[tuple[str, str, int]]:
        yield "ffn", "channels of the MLP", self.model.ffn_width

    def kept(self, place: Place) -> float:
        return 4 * place.itemsize * self.model.ffn_width / place.tensor

    def workspace(self, place: Place) -> float:
        return 3 * place.itemsize * self.model.ffn_width / place.tensor

    def exchanges(self, tensor: int) -> Sequence[Halo]:
        return [Halo(1, self.model.ffn_width // tensor)]
