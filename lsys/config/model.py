"""The model's section of the YAML: the layers, their sizes, and the cards of their mixers."""

from collections.abc import Iterable
from typing import Any, Literal, TypeVar

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from lsys.config.mixers import MOVED, Mixers
from lsys.mixers.card import Card, Layer, MixerCard
from lsys.mixers.channel import ChannelCard
from lsys.mixers.registry import ALL, CARDS, CHANNEL_CARDS, CHANNEL_LETTERS, LETTERS, listed
from lsys.section import Section

Made = TypeVar("Made", bound=MixerCard)


def _moved(key: str) -> Any:
    """A field that is read and not written: the key has moved to the sections of the mixers that have it."""
    there = " and ".join(f"`model.mixers.{name}.{key}`" for name in MOVED[key])
    return Field(None, exclude=True, description=f"Now {there}; read as before.")


def _given(section: Any) -> Any:
    """What the keys of a section were given, also of one that has been made in Python; a mapping of its own."""
    if isinstance(section, Section):
        return {key: getattr(section, key) for key in section.model_fields_set}
    return {**section} if isinstance(section, dict) else section


def _is_valid(name: str, key: str, value: Any) -> bool:
    """Whether a mixer's own section takes this value."""
    try:
        ALL[name].Options.model_validate({key: value})
    except ValidationError:
        return False
    return True


def _described(cards: Iterable[type[MixerCard]]) -> str:
    short = {card: f"`{card.letter}`, " if card.letter else "" for card in cards}
    return "; ".join(f"{letter}`{card.name}`: {card.title}" for card, letter in short.items()) + "."


class LinearMixer(Section):
    """Sizes of layers with a state; the state of a head is [`key_dim`, `head_dim`]."""

    heads: PositiveInt | None = Field(None, description="Value heads; `model.heads` if empty.")
    head_dim: PositiveInt | None = Field(
        None, description="Channels of the values of one head; `model.head_dim` if empty."
    )
    key_heads: PositiveInt | None = Field(
        None,
        description="Heads of queries and keys, each for `heads / key_heads` value heads; `heads` if empty. Mamba-2's groups, which share B and C.",
    )
    key_dim: PositiveInt | None = Field(
        None, description="Channels of the queries and keys of one head; `head_dim` if empty. Mamba-2's state size."
    )
    decay: bool | None = _moved("decay")
    lrpe: Literal["none", "first", "all"] | None = _moved("lrpe")
    norm: Literal["head", "srms"] | None = _moved("norm")
    gate_rank: PositiveInt | None = _moved("gate_rank")
    conv_width: PositiveInt | None = _moved("conv_width")
    negative_eigenvalues: bool | None = _moved("negative_eigenvalues")


class Model(Section):
    """The hybrid decoder: `pattern` and `channels`, each repeated over `layers`."""

    pattern: str | list[str] = Field(
        "LLLS",
        description="The token mixer of each layer, repeated: one letter a layer, or a list of names, of these and of `model.mixers`: "
        + _described(CARDS),
    )
    channels: str | list[str] = Field(
        "F", description="The channel mixer of each layer, in the same way: " + _described(CHANNEL_CARDS)
    )
    layers: PositiveInt = Field(description="Number of layers.")
    hidden: PositiveInt = Field(description="Width of the residual stream.")
    heads: PositiveInt = Field(description="Query heads of softmax and window layers.")
    groups: PositiveInt | None = Field(
        None, description="Key-value heads of softmax and window layers (GQA); `heads` if empty (MHA)."
    )
    head_dim: PositiveInt | None = Field(None, description="Width of one head; `hidden / heads` if empty.")
    ffn: PositiveInt | None = Field(
        None, description="Inner width of the MLP; 8/3 of `hidden` rounded up to a multiple of 64 if empty."
    )
    vocab: PositiveInt = Field(
        description="Size of the vocabulary: every token id is below it. Bytes with end-of-document: 257."
    )
    vocab_multiple: PositiveInt = Field(
        64,
        description="The embedding is padded to a multiple of this, whatever the tensor degree, so checkpoints reshard. "
        "The padding is in no loss: its probability is 0.",
    )
    window: PositiveInt | None = Field(
        None, description="Tokens that a query of a `W` layer sees, itself included; needed if the pattern has `W`."
    )
    tied: bool = Field(True, description="Share the embedding with the output layer.")
    qk_norm: bool = Field(True, description="RMSNorm of queries and keys per head (softmax and window layers).")
    rope_base: PositiveFloat = Field(
        10_000.0, description="Base of rotary position embedding (softmax, window and retention layers)."
    )
    norm_eps: PositiveFloat = Field(1e-6, description="Epsilon of RMSNorm.")
    init_std: PositiveFloat = Field(
        0.02, description="Standard deviation of initial weights; output projections divide it by sqrt(2 layers)."
    )
    linear: LinearMixer = Field(LinearMixer(), description="Sizes of layers with a state.")
    mixers: Mixers = Field(Mixers(), description="Own keys of each mixer, and variants.")

    @field_validator("channels", mode="before")
    @classmethod
    def _dash(cls, data: Any) -> Any:
        """`channels: -` is, to YAML, a list of nothing; it is the letter that is meant."""
        return "-" if data == [None] else data

    @model_validator(mode="before")
    @classmethod
    def _read_moved(cls, data: Any) -> Any:
        """With the keys that have moved out of `linear` where they are now; given in both places they are refused."""
        given = _given(data.get("linear")) if isinstance(data, dict) else None
        moved = {key: given[key] for key in MOVED if key in given} if isinstance(given, dict) else {}
        found, twice = _given(data.get("mixers", {})) if moved else {}, list[InitErrorDetails]()
        if not moved or not isinstance(found, dict):
            return data
        for key, value in moved.items():
            for name in MOVED[key]:
                section = _given(found.get(name, {}))
                if not _is_valid(name, key, value):
                    continue  # told of the key that is given
                if isinstance(section, dict) and key in section:
                    problem = PydanticCustomError(
                        "twice", "it is given as {there} too", {"there": f"model.mixers.{name}.{key}"}
                    )
                    twice.append({"type": problem, "loc": ("linear", key), "input": value})
                elif isinstance(section, dict):
                    found[name] = {**section, key: value}
        if twice:
            raise ValidationError.from_exception_data(cls.__name__, twice)
        return {**data, "mixers": found}

    @property
    def kv_heads(self) -> int:
        return self.groups or self.heads

    @property
    def head_width(self) -> int:
        return self.head_dim or self.hidden // self.heads

    @property
    def ffn_width(self) -> int:
        return self.ffn or -(-self.hidden * 8 // 3 // 64) * 64

    @property
    def linear_heads(self) -> int:
        return self.linear.heads or self.heads

    @property
    def linear_head_width(self) -> int:
        return self.linear.head_dim or self.head_width

    @property
    def linear_key_heads(self) -> int:
        return self.linear.key_heads or self.linear_heads

    @property
    def linear_key_width(self) -> int:
        return self.linear.key_dim or self.linear_head_width

    @property
    def padded_vocab(self) -> int:
        return -(-self.vocab // self.vocab_multiple) * self.vocab_multiple

    @property
    def pattern_text(self) -> str:
        """The pattern as messages name it."""
        return pattern_text(self.pattern)

    def shortened(self, kinds: Iterable[str]) -> str:
        """The token mixers of layers by their letters, where all have one; else by their names."""
        return _shortened(kinds, LETTERS)

    def shortened_channels(self, kinds: Iterable[str]) -> str:
        """The channel mixers of layers by their letters, where all have one; else by their names."""
        return _shortened(kinds, CHANNEL_LETTERS)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The token mixer or variant of each layer by its name, `layers` long; letters that no mixer has stay as they are."""
        return _repeated(self.pattern, LETTERS, self.layers)

    @property
    def channel_kinds(self) -> tuple[str, ...]:
        """The channel mixer or variant of each layer by its name, `layers` long."""
        return _repeated(self.channels, CHANNEL_LETTERS, self.layers)

    @property
    def layer_kinds(self) -> tuple[Layer, ...]:
        """Both of each layer."""
        return tuple(map(Layer, self.kinds, self.channel_kinds))

    @property
    def cards(self) -> dict[str, Card]:
        """The cards of the token mixers that there are, in the order of the registry, then of `mixers`.

        Raises:
            KeyError: a layer is of a kind that nothing knows; `lsys.config.rules` refuses it.
        """
        if unknown := {*self.kinds} - self.known_cards.keys():
            raise KeyError(f"no token mixer is called {', '.join(sorted(unknown))}; there are {listed()}")
        return self.known_cards

    @property
    def channel_cards(self) -> dict[str, ChannelCard]:
        """The cards of the channel mixers that there are.

        Raises:
            KeyError: a layer is of a kind that nothing knows; `lsys.config.rules` refuses it.
        """
        if unknown := {*self.channel_kinds} - self.known_channel_cards.keys():
            known = listed(CHANNEL_CARDS)
            raise KeyError(f"no channel mixer is called {', '.join(sorted(unknown))}; there are {known}")
        return self.known_channel_cards

    @property
    def known_cards(self) -> dict[str, Card]:
        """The cards of the token mixers that there are, by name as in `cards`, without the kinds that nothing knows."""
        kinds = {*self.kinds}
        found = ((key, self.mixers.card(key)) for key in self.mixers.keys if key in kinds)
        return {key: self._made(card, key) for key, card in found if card is not None and issubclass(card, Card)}

    @property
    def known_channel_cards(self) -> dict[str, ChannelCard]:
        """The cards of the channel mixers that there are, by name as in `channel_cards`, without the kinds that nothing knows."""
        kinds = {*self.channel_kinds}
        found = ((key, self.mixers.card(key)) for key in self.mixers.keys if key in kinds)
        return {key: self._made(card, key) for key, card in found if card is not None and issubclass(card, ChannelCard)}

    def card(self, key: str) -> Card:
        """The card of a token mixer or variant in this model."""
        card = self.mixers.card(key)
        assert card is not None and issubclass(card, Card)
        return self._made(card, key)

    def _made(self, card: type[Made], key: str) -> Made:
        return card(key, self, self.mixers.section(key))


def pattern_text(pattern: str | list[str]) -> str:
    """A pattern as messages name it."""
    return pattern if isinstance(pattern, str) else "[" + ", ".join(pattern) + "]"


def _shortened(kinds: Iterable[str], letters: dict[str, str]) -> str:
    short, kinds = {name: letter for letter, name in letters.items()}, tuple(kinds)
    return "".join(short[k] for k in kinds) if {*kinds} <= short.keys() else ",".join(kinds)


def _repeated(pattern: str | list[str], letters: dict[str, str], layers: int) -> tuple[str, ...]:
    names = tuple(letters.get(each, each) for each in pattern)
    return (names * -(-layers // max(1, len(pattern))))[:layers]
