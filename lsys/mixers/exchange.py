"""What mixers exchange between the ranks of a sequence, and the messages that it makes: keys and values, states, halos."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

from lsys.kernels.mask import CAUSAL, Mask
from lsys.parallel.messages import Phases, Placement, attention, linear
from lsys.parallel.methods import Method

Decay = Literal["none", "head", "token", "channel"]  # what has a log-decay of its own


class Ranks(NamedTuple):
    """The ranks of a sequence and what lies on them.

    Attributes:
        layout: kind of the layout. documents: tokens of each. nodes: of each rank. backend: "nccl" or "gloo".
        itemsize: bytes of an element.
    """

    layout: str
    documents: tuple[int, ...]
    nodes: tuple[int, ...]
    backend: str
    itemsize: int

    @property
    def placement(self) -> Placement:
        return _placement(self.layout, self.documents, len(self.nodes))


@lru_cache(maxsize=64)
def _placement(layout: str, documents: tuple[int, ...], ranks: int) -> Placement:
    return Placement.of(layout, documents, ranks)


@dataclass(frozen=True)
class KeyValues:
    """Keys and values of softmax attention, of `kv_heads` heads of this width for `heads` of queries; mask: what these see."""

    heads: int
    kv_heads: int
    width: int
    mask: Mask = CAUSAL

    def phases(self, method: Method, ranks: Ranks) -> Phases:
        """The messages of one layer by this method."""
        return _key_values(self, method, ranks)


@lru_cache(maxsize=64)
def _key_values(one: KeyValues, method: Method, ranks: Ranks) -> Phases:
    shape = attention.Shape(one.heads, one.kv_heads, one.width, ranks.itemsize)
    return method.phases(ranks.placement, shape, ranks.nodes, one.mask, ranks.backend)


@dataclass(frozen=True)
class States:
    """States [key_width, value_width] of `heads` heads; decay: "none", "head", "token" or "channel"; delta: by the delta rule."""

    heads: int
    key_heads: int
    key_width: int
    value_width: int
    decay: Decay
    delta: bool

    def phases(self, method: Method, ranks: Ranks) -> Phases:
        """The messages of one layer by this method."""
        return method.phases(ranks.placement, linear.Shape(**vars(self), itemsize=ranks.itemsize))


@dataclass(frozen=True)
class Halo:
    """The last `reach` tokens before each segment, of so many channels: of a short convolution."""

    reach: int
    channels: int

    def phases(self, method: Method | None, ranks: Ranks) -> Phases:
        """The messages of one layer, which no method changes. Gradients are fp32 at least."""
        size = self.channels * ranks.itemsize
        return linear.halo(ranks.placement, self.reach, size, self.channels * max(4, ranks.itemsize))


Exchange = KeyValues | States | Halo
