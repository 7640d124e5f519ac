"""What a card says of a channel mixer: what a layer does with the channels of each token, after its token mixer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar

from lsys.mixers.card import PRODUCT, MixerCard, Place, Weight
from lsys.mixers.exchange import Halo


class ChannelCard(MixerCard):
    """A channel mixer in a model.

    Attributes:
        is_empty: whether it is none: the layer has no second norm and no second sum then, and no module.
    """

    is_empty: ClassVar[bool] = False

    @property
    def row(self) -> str:
        """What tables of parameters and FLOPs call it."""
        return f"{self.key} channels"

    @abstractmethod
    def weights(self) -> Iterator[Weight]:
        """All its parameters, in the order in which the module makes them."""

    @property
    def products(self) -> int:
        return self.numel(PRODUCT)

    @abstractmethod
    def in_widths(self) -> Sequence[int]:
        """Rows, over all tensor ranks, of each projection that they share out: slots are gathered before it, and scattered behind the
        one that leads back to the residual stream.
        """

    @abstractmethod
    def kept(self, place: Place) -> float:
        """Bytes a token slot that autograd keeps of one layer on a rank, without the norm before it."""

    @abstractmethod
    def workspace(self, place: Place) -> float:
        """Bytes a token slot that are alive at the peak of its backward pass beside `kept`: gradients of what lies inside."""

    def exchanges(self, tensor: int) -> Sequence[Halo]:
        """What one layer of a tensor rank exchanges over the ranks of a sequence before its products, in order."""
        return ()
