"""The card of Kimi delta attention."""

from collections.abc import Iterator, Mapping, Sequence

from pydantic import Field, PositiveInt

from lsys.mixers.card import Kept, LowRank, Place, Weight
from lsys.mixers.gated_delta import kept_by_delta
from lsys.mixers.state import ConvolvedOptions, Decay, Sizes, StateCard


class KimiDeltaOptions(ConvolvedOptions):
    """Own keys of Kimi delta attention."""

    gate_rank: PositiveInt | None = Field(
        None, description="Rank of the two projections that make decay and output gate; `head_dim` if empty."
    )


class KimiDelta(StateCard):
    name, letter, title = "kimi_delta", "K", "Kimi delta attention"
    Options = KimiDeltaOptions
    module = "lsys.model.mixers.kimi_delta:KimiDeltaMixer"
    delta, convolved = True, "qkv"
    own: KimiDeltaOptions

    @property
    def decay(self) -> Decay:
        return "channel"

    @property
    def decays(self) -> int:
        """Log-decays of a token: every value head has its own for the channels of its keys."""
        return self.heads * self.key_width

    @property
    def rank(self) -> int:
        return self.own.gate_rank or self.value_width

    def parts(self) -> Mapping[str, int]:
        return {"qkv": 2 * self.key_width + self.served, "beta": self.heads // self.key_heads}

    def small(self) -> Iterator[Weight]:
        yield from self.convolution(bias=False)
        yield from self.step_decay(self.decays)
        yield self.out_norm()

    def low_ranks(self) -> Sequence[LowRank]:
        return [
            LowRank("decay", self.rank, self.decays, bias=False),
            LowRank("gate", self.rank, self.values, bias=False),
        ]

    def kept(self, place: Place) -> Kept:
        sizes, decays = Sizes(self, place), self.decays / place.tensor
        # Of a log-decay itself, the step, and what softplus makes this of. Of what comes out of the low ranks, which is counted
        # apart in fp32, nothing stays: that of the gate is its sigmoid, which goes with the output's norm.
        apart = 4 * (decays + sizes.values) if sizes.b == 4 else 0.0
        before = kept_by_delta(self, place, 4).before + 12 * decays - apart
        return Kept(before, sizes.normed + sizes.gated, "none")
