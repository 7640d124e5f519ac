"""The family of mixers that keep a state: linear attention in all its forms, and what follows from decay, delta rule and convolution."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from pydantic import Field, PositiveInt

from lsys.mixers.card import NORM, VECTOR, Card, Place, Refusal, Weight
from lsys.mixers.exchange import Decay, Exchange, Halo, States
from lsys.section import Section

CHUNK = 64  # tokens of one chunk of linear attention, as FLOPs are counted


class StateOptions(Section):
    """Own keys of a mixer with a state."""

    heads: PositiveInt | None = Field(None, description="Value heads; `model.linear.heads` if empty.")
    head_dim: PositiveInt | None = Field(
        None, description="Channels of the values of one head; `model.linear.head_dim` if empty."
    )
    key_heads: PositiveInt | None = Field(
        None, description="Heads of queries and keys; `model.linear.key_heads` if empty."
    )
    key_dim: PositiveInt | None = Field(
        None, description="Channels of the queries and keys of one head; `model.linear.key_dim` if empty."
    )


class ConvolvedOptions(StateOptions):
    """Own keys of a mixer with a short convolution."""

    conv_width: PositiveInt = Field(4, description="Tokens that the short convolution sees, the token itself included.")


class StateCard(Card):
    """Queries and keys of H_k heads of width K, values of H heads of width V, of which each key head serves n = H / H_k.

    Attributes:
        delta: whether the state is corrected by what it says of a key (the delta rule). convolved: the part of the input projection
            that a short convolution goes over.
    """

    has_state = True
    Options: ClassVar[type[Section]] = StateOptions
    delta: ClassVar[bool] = False
    convolved: ClassVar[str | None] = None
    own: StateOptions

    @property
    @abstractmethod
    def decay(self) -> Decay:
        """What has a log-decay of its own: none, a head, a token and head, or a channel of these."""

    # ---- sizes

    @property
    def heads(self) -> int:
        return self.own.heads or self.model.linear_heads

    @property
    def value_width(self) -> int:
        return self.own.head_dim or self.model.linear_head_width

    @property
    def key_heads(self) -> int:
        return self.own.key_heads or self.model.linear.key_heads or self.heads

    @property
    def key_width(self) -> int:
        return self.own.key_dim or self.model.linear.key_dim or self.value_width

    def widened(self, is_first: bool) -> int:
        """Width of the keys that the kernel sees; is_first: in the first layer of its kind."""
        return self.key_width

    @property
    def groups(self) -> int:
        return self.key_heads

    @property
    def served(self) -> int:
        """Channels of the values of the heads of one key head."""
        return self.heads // self.key_heads * self.value_width

    @property
    def keys(self) -> int:
        """Channels of all key heads."""
        return self.key_heads * self.key_width

    @property
    def values(self) -> int:
        """Channels of all heads' values."""
        return self.heads * self.value_width

    @property
    def out_width(self) -> int:
        return self.values

    # ---- parameters that several have

    def convolution(self, bias: bool) -> Iterator[Weight]:
        """The short convolution's parameters."""
        yield Weight("conv.weight", self.channels * self.conv_width, VECTOR)
        if bias:
            yield Weight("conv.bias", self.channels, VECTOR)

    def step_decay(self, steps: int) -> Iterator[Weight]:
        """Parameters of a decay by steps: one rate a head, and so many biases of the step."""
        yield Weight("decay.A_log", self.heads, VECTOR)
        yield Weight("decay.dt_bias", steps, VECTOR)

    def out_norm(self) -> Weight:
        """The weight of the output's norm."""
        return Weight("out_norm", self.values, NORM)

    @property
    def conv_width(self) -> int:
        """Tokens that the short convolution sees; 1 without one."""
        return self.own.conv_width if isinstance(self.own, ConvolvedOptions) else 1

    @property
    def channels(self) -> int:
        """Channels of the short convolution, over all tensor ranks."""
        return self.groups * self.parts()[self.convolved] if self.convolved else 0

    # ---- rules

    def refusals(self) -> Iterator[Refusal]:
        if self.heads % self.key_heads:
            divisors = [d for d in range(1, self.heads + 1) if self.heads % d == 0]
            near = _beside(self.key_heads, divisors)
            problem = f"{self.key_heads} key heads do not divide {self.heads} linear heads"
            yield Refusal(self.where("key_heads"), problem, f"{' or '.join(map(str, near))} does")

    def sliced(self) -> Iterator[tuple[str, str, int]]:
        yield self.where("heads"), "linear heads", self.heads
        if self.key_heads != self.heads:
            yield self.where("key_heads"), "linear key heads", self.key_heads

    def where(self, key: str) -> str:
        """The path below `model` where a size comes from."""
        return self.option(key) if getattr(self.own, key) is not None else f"linear.{key}"

    # ---- work and traffic

    def mixing_flops(self, lengths: Sequence[int], is_first: bool = False) -> float:
        return sum(lengths) * (2.0 * self.channels * self.conv_width + self.state_flops(is_first))

    def state_flops(self, is_first: bool = False) -> float:
        """FLOPs per token: with the state, and in chunks.

        A head does 4 K V with the state (read and update) and 2 C (K + V) inside the chunk (two full C x C products, scores and values;
        scores once for all the heads that share keys, but where the decay of a channel or the delta rule is in them). The delta rule also
        takes from values what the state says, 2 K V, and solves for a chunk's corrections: scores of keys, 2 C K, and the solution
        times keys and values, 2 C (K + V).
        """
        heads, k, v = self.heads, self.widened(is_first), self.value_width
        scored = heads if self.delta or self.decay == "channel" else self.key_heads
        flops = heads * (4 * k * v + 2 * CHUNK * v) + scored * 2 * CHUNK * k
        if self.delta:
            flops += heads * (2 * k * v + 2 * CHUNK * (2 * k + v))
        return float(flops)

    def exchanges(self, tensor: int, is_first: bool = False) -> Sequence[Exchange]:
        heads, key_heads = self.heads // tensor, self.key_heads // tensor
        states = States(heads, key_heads, self.widened(is_first), self.value_width, self.decay, self.delta)
        return [Halo(self.conv_width - 1, self.channels // tensor), states] if self.convolved else [states]

    # ---- memory

    def gates(self, tensor: int) -> float:
        """Elements a token of log-decays and betas on a tensor rank, which are fp32."""
        each = {"token": 1, "channel": self.key_width}.get(self.decay, 0) + self.delta
        return self.heads // tensor * each


class Sizes:
    """Elements a token of a state mixer on a rank, and bytes that several mixers keep alike.

    b is the bytes of an element of the model. Keys and values are the channels of all the rank's heads.
    """

    def __init__(self, card: StateCard, place: Place) -> None:
        self.b, self.gpu, self.is_sent = place.itemsize, place.gpu, place.is_sent
        self.heads, self.key_heads = card.heads / place.tensor, card.key_heads / place.tensor
        self.keys, self.values = self.key_heads * card.key_width, self.heads * card.value_width
        self.channels = card.channels / place.tensor
        self.is_copied = card.heads != card.key_heads  # groups of heads are views where each has its key
        self.clone = self.b * self.values if self.is_copied else 0.0

    @property
    def output(self) -> float:
        """The kernel's output, where the norm keeps that itself."""
        return self.b * self.values if self.b == 4 or self.gpu else 0.0

    @property
    def normed(self) -> float:
        """The output's norm has its weights apart: its input, normalised, then weighted."""
        fp32 = 4 * self.values if self.b == 2 and not self.gpu else 0.0
        return self.output + self.b * self.values * 2 + 4 * self.heads + fp32

    @property
    def gated(self) -> float:
        """The gate of the output."""
        return self.b * self.values

    def taken(self, elements: float) -> float:
        """Bytes of what the kernel takes and nothing else keeps: so many elements were views, but what was sent to this rank is no view."""
        return self.b * elements if self.is_sent else self.clone

    @property
    def convolution(self) -> float:
        """Its input, cut out of the projections; its fp32 sum."""
        return (self.b + 4) * self.channels


def _beside(value: int, candidates: Sequence[int]) -> list[int]:
    """The nearest candidate below the value and the nearest above it."""
    return [c for c in candidates if c < value][-1:] + [c for c in candidates if c > value][:1]


def grouped(card: StateCard) -> Mapping[str, int]:
    """The parts of an input projection of queries, keys and values, and of a gate."""
    return {"qkv": 2 * card.key_width + card.served, "gate": card.served}
