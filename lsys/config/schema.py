"""The one description of a run: every key of the YAML, its type, its default and its meaning.

Units: tokens unless said otherwise. Rules that tie several keys to each other, or to the number of ranks, are in `lsys.config.rules`.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from lsys.config.mixers import MOVED, Mixers
from lsys.mixers.card import Card, Layer, MixerCard
from lsys.mixers.channel import ChannelCard
from lsys.mixers.registry import ALL, CARDS, CHANNEL_CARDS, CHANNEL_LETTERS, CHANNELS, LETTERS, MIXERS, listed
from lsys.parallel.methods import SOFTMAX, STATE, described
from lsys.section import Section

if TYPE_CHECKING:  # names from tables, which type checkers do not follow
    AttentionMethod = str
    StateMethod = str
else:
    AttentionMethod, StateMethod = Literal["auto", *SOFTMAX], Literal[*STATE]


def _moved(key: str) -> Any:
    """A field that is read and not written: the key has moved to the sections of the mixers that have it."""
    there = " and ".join(f"`model.mixers.{name}.{key}`" for name in MOVED[key])
    return Field(None, exclude=True, description=f"Now {there}; read as before.")


def _is_valid(name: str, key: str, value: Any) -> bool:
    """Whether a mixer's own section takes this value."""
    try:
        ALL[name].Options.model_validate({key: value})
    except ValidationError:
        return False
    return True


def _described(cards: Iterable[type[MixerCard]]) -> str:
    return "; ".join(f"`{card.letter}`, `{card.name}`: {card.title}" for card in cards) + "."


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
        description="The embedding is padded to a multiple of this, whatever the tensor degree, so checkpoints reshard.",
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
        given = data.get("linear") if isinstance(data, dict) else None
        given = given.model_dump(exclude_unset=True) if isinstance(given, LinearMixer) else given
        moved = {key: given[key] for key in MOVED if key in given} if isinstance(given, dict) else {}
        mixers = data.get("mixers", {}) if moved else {}
        if not moved or not isinstance(mixers, dict):
            return data
        found, twice = {name: section for name, section in mixers.items()}, list[InitErrorDetails]()
        for key, value in moved.items():
            for name in MOVED[key]:
                section = found.get(name, {})
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
        if unknown := {kind for kind in self.kinds if self.mixers.kind(kind) not in MIXERS}:
            raise KeyError(f"no token mixer is called {', '.join(sorted(unknown))}; there are {listed()}")
        return self.known_cards

    @property
    def channel_cards(self) -> dict[str, ChannelCard]:
        """The cards of the channel mixers that there are.

        Raises:
            KeyError: a layer is of a kind that nothing knows; `lsys.config.rules` refuses it.
        """
        if unknown := {kind for kind in self.channel_kinds if self.mixers.kind(kind) not in CHANNELS}:
            known = listed(CHANNEL_CARDS)
            raise KeyError(f"no channel mixer is called {', '.join(sorted(unknown))}; there are {known}")
        return self.known_channel_cards

    @property
    def known_cards(self) -> dict[str, Card]:
        """As `cards`, without the kinds that nothing knows."""
        kinds = {*self.kinds}
        return {key: self.card(key) for key in self.mixers.keys if key in kinds and self.mixers.kind(key) in MIXERS}

    @property
    def known_channel_cards(self) -> dict[str, ChannelCard]:
        """As `channel_cards`, without the kinds that nothing knows."""
        kinds = {*self.channel_kinds}
        keys = [key for key in self.mixers.keys if key in kinds and self.mixers.kind(key) in CHANNELS]
        return {key: CHANNELS[self.mixers.kind(key) or key](key, self, self.mixers.section(key)) for key in keys}

    def card(self, key: str) -> Card:
        """The card of a token mixer or variant in this model."""
        return MIXERS[self.mixers.kind(key) or key](key, self, self.mixers.section(key))


def pattern_text(pattern: str | list[str]) -> str:
    """A pattern as messages name it."""
    return pattern if isinstance(pattern, str) else "[" + ", ".join(pattern) + "]"


def _shortened(kinds: Iterable[str], letters: dict[str, str]) -> str:
    short, kinds = {name: letter for letter, name in letters.items()}, tuple(kinds)
    return "".join(short[k] for k in kinds) if {*kinds} <= short.keys() else ",".join(kinds)


def _repeated(pattern: str | list[str], letters: dict[str, str], layers: int) -> tuple[str, ...]:
    names = tuple(letters.get(each, each) for each in pattern)
    return (names * -(-layers // max(1, len(pattern))))[:layers]


class Parallel(Section):
    """Degrees of parallelism. Data parallelism is what is left: world size / (tensor x pipeline x context)."""

    tensor: PositiveInt = Field(
        1,
        description="Tensor parallel degree; above 1 the residual stream is sharded over it too (sequence parallelism).",
    )
    pipeline: PositiveInt = Field(1, description="Pipeline stages.")
    virtual_pipeline: PositiveInt = Field(
        1, description="Chunks of layers per pipeline stage; above 1 the interleaved schedule runs."
    )
    context: PositiveInt = Field(
        1, description="Context parallel degree: ranks that share the tokens of a micro-batch."
    )
    expert: PositiveInt = Field(1, description="Expert parallel degree; 1 for models without experts.")
    layout: Literal["contiguous", "zigzag"] = Field(
        "zigzag", description="How the documents of a micro-batch are laid over the context ranks."
    )
    attention: AttentionMethod = Field(
        "auto",
        description=f"How softmax and window layers cross context ranks: {described(SOFTMAX)}; `auto`: the cheapest for each kind of layer, "
        "which `lsys check` prints.",
    )
    linear: StateMethod = Field(
        "lasp2",
        description=f"How layers with a state cross context ranks: {described(STATE)}.",
    )


class Corpus(Section):
    """One prepared corpus (`lsys data prepare`)."""

    path: Path = Field(description="Prefix of the .bin and .idx files, without the ending.")
    weight: PositiveFloat = Field(1.0, description="Share of tokens, relative to the other corpora.")


class Data(Section):
    """Where the tokens come from."""

    corpora: list[Corpus] = Field(min_length=1, description="Corpora, blended by weight.")
    seed: NonNegativeInt = Field(0, description="Seed of the document order.")
    shuffle_window: NonNegativeInt = Field(
        0,
        description="Micro-batches are taken in random order within windows of this many, which parts the pieces of documents longer than "
        "a micro-batch; 0: in the order of the stream.",
    )
    validation_fraction: float = Field(
        0.01, ge=0.0, lt=1.0, description="Share of the documents of each corpus that is held out for validation."
    )
    verify: bool = Field(
        True, description="Scan every token id against `model.vocab` before training (once per run, on the first rank)."
    )


class Optimizer(Section):
    """AdamW and its learning-rate schedule."""

    lr: PositiveFloat = Field(3e-4, description="Peak learning rate.")
    min_lr: NonNegativeFloat = Field(0.0, description="Learning rate at the end of the decay.")
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        "cosine", description="After warm-up: cosine decay; warm-up-stable-decay; or constant."
    )
    warmup_steps: NonNegativeInt = Field(0, description="Steps of linear warm-up.")
    decay_steps: PositiveInt | None = Field(
        None, description="Steps of the final decay of `wsd` (1/5 of `train.steps` if empty)."
    )
    beta1: float = Field(0.9, ge=0.0, lt=1.0, description="Adam's first-moment decay.")
    beta2: float = Field(0.95, ge=0.0, lt=1.0, description="Adam's second-moment decay.")
    eps: PositiveFloat = Field(1e-8, description="Adam's epsilon.")
    weight_decay: NonNegativeFloat = Field(0.1, description="Decoupled weight decay (matrices only).")
    clip: NonNegativeFloat = Field(1.0, description="Gradient norm to clip at; 0: no clipping.")
    distributed: bool = Field(
        True, description="Shard optimizer states over the data and context ranks (Megatron's distributed optimizer)."
    )


class Profile(Section):
    """Traces of chosen steps, written to `train.folder`/profile."""

    first: NonNegativeInt = Field(0, description="First step of the trace, counted from 1; 0: no trace.")
    steps: PositiveInt = Field(2, description="Steps of the trace.")
    ranks: list[NonNegativeInt] = Field([0], description="Ranks that write one.")
    shapes: bool = Field(False, description="Note the shapes of operators.")
    stacks: bool = Field(False, description="Note the source lines that called operators; slow.")
    memory: bool = Field(False, description="On GPUs, write a snapshot of the allocator besides.")


class Train(Section):
    """What a step is, and how many."""

    folder: Path = Field(description="Everything that the run writes goes here.")
    steps: PositiveInt = Field(description="Optimizer steps.")
    batch_tokens: PositiveInt = Field(description="Tokens of one step over all ranks.")
    micro_batch_tokens: PositiveInt = Field(
        description="Tokens of one micro-batch, shared by the context ranks of one data replica."
    )
    precision: Literal["fp32", "bf16"] = Field(
        "bf16", description="Arithmetic of the model; optimizer states and gradient sums are fp32."
    )
    seed: NonNegativeInt = Field(0, description="Seed of the initial weights (equal for all degrees of parallelism).")
    z_loss: NonNegativeFloat = Field(0.0, description="Weight of log(Z)^2 in the loss (PaLM uses 1e-4).")
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="Recompute in backward: nothing, the token mixers, or whole layers."
    )
    overlap: bool | None = Field(
        None, description="Overlap gradient reduction and parameter gathering with compute; on GPUs only if empty."
    )
    validate_every: NonNegativeInt = Field(0, description="Steps between validations; 0: only at the end.")
    validate_tokens: NonNegativeInt = Field(
        0, description="Tokens of one validation, rounded up to whole batches; 0: no validation."
    )
    timeout_minutes: PositiveFloat = Field(
        10.0, description="How long a collective may wait before the run is declared dead."
    )
    profile: Profile = Field(Profile(), description="Traces of chosen steps.")


class Checkpoint(Section):
    """Saving and resuming."""

    every: NonNegativeInt = Field(0, description="Steps between checkpoints; 0: only at the end and on SIGTERM.")
    keep: PositiveInt = Field(2, description="How many checkpoints are kept.")
    resume: Literal["auto", "never"] | Path = Field(
        "auto",
        description="`auto`: go on from the newest checkpoint of `train.folder`; `never`: refuse to overwrite one; or a checkpoint's path.",
    )
    save: bool = Field(True, description="Write checkpoints.")


class Metrics(Section):
    """Console and TensorBoard."""

    every: PositiveInt = Field(10, description="Steps between console lines and TensorBoard points.")
    tensorboard: bool = Field(True, description="Write TensorBoard events under `train.folder`/tensorboard.")
    baseline: Path | None = Field(
        None,
        description="The `scaling.json` of a run, to compare this one's FLOP/s of a rank with: `scaling/efficiency(%)`. Both must do the same work, for "
        "each rank (weak scaling) or in all (strong).",
    )
    waterfall_every: NonNegativeInt = Field(
        1,
        description="Of every so many steps, one is split into compute, exposed communication, waiting and the rest (`waterfall/*`, `comm/*`); 0: none.",
    )


class Config(Section):
    """A whole run."""

    model: Model = Field(description="The model.")
    parallel: Parallel = Field(Parallel(), description="Degrees of parallelism.")
    data: Data = Field(description="Corpora.")
    optimizer: Optimizer = Field(Optimizer(), description="Optimizer.")
    train: Train = Field(description="The run.")
    checkpoint: Checkpoint = Field(Checkpoint(), description="Checkpoints.")
    metrics: Metrics = Field(Metrics(), description="What is reported.")

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one step over all data replicas."""
        return self.train.batch_tokens // self.train.micro_batch_tokens
