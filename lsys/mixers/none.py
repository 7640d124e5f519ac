"""The card of no channel mixer: a layer that is a token mixer alone, as those of Mamba-2."""

from collections.abc import Iterator, Sequence

from lsys.mixers.card import Place, Weight
from lsys.mixers.channel import ChannelCard
from lsys.section import Section


class NoOptions(Section):
    """It has no keys of its own."""


class NoChannels(ChannelCard):
    Options = NoOptions
    name, letter, title = "none", "-", "no channel mixer"
    module, is_empty = "", True

    def in_widths(self) -> Sequence[int]:
        return ()

    def weights(self) -> Iterator[Weight]:
        yield from ()

    def kept(self, place: Place) -> float:
        return 0.0

    def workspace(self, place: Place) -> float:
        return 0.0
