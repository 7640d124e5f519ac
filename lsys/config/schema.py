"""The one description of a run: every key of the YAML, its type, its default and its meaning.

Units: tokens unless said otherwise. Rules that tie several keys to each other, or to the number of ranks, are in `lsys.config.rules`.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

from lsys.config.losses import LOSSES
from lsys.config.model import Model
from lsys.config.user_code import FINAL_LOSS, OBSERVER, OPTIMIZER, SCHEDULE, Named, imported
from lsys.parallel.methods import SOFTMAX, STATE, described
from lsys.section import Section

if TYPE_CHECKING:  # names from tables, which type checkers do not follow
    AttentionMethod = str
    StateMethod = str
else:
    AttentionMethod, StateMethod = Literal["auto", *SOFTMAX], Literal[*STATE]


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
    restart: bool = Field(
        False,
        description="Resume with other data (`seed`, weights, `validation_fraction`, corpora, masks) than the checkpoint's, which is refused otherwise: it "
        "begins at its first token, once; steps, weights and `n_tokens_seen` go on.",
    )
    verify: bool = Field(
        True,
        description="Read the corpora before training, on the first rank: every token id against `model.vocab`, and files of up to 8 GiB against the "
        "hashes of when they were prepared (`lsys data inspect --verify` for longer ones).",
    )


ADAMW = "adamw"


class Optimizer(Section):
    """AdamW, or an optimizer of your own, and its learning-rate schedule."""

    kind: Annotated[str, Named(OPTIMIZER, (ADAMW,))] = Field(
        ADAMW,
        description="The optimizer, or `package.module:name` of your own, which is called with groups of parameters and these keys; "
        "with `distributed` false.",
    )
    lr: PositiveFloat = Field(3e-4, description="Peak learning rate.")
    min_lr: NonNegativeFloat = Field(0.0, description="Learning rate at the end of the decay.")
    schedule: Annotated[str, Named(SCHEDULE, ("cosine", "wsd", "constant"))] = Field(
        "cosine",
        description="After warm-up: cosine decay; warm-up-stable-decay; or constant. Or `package.module:name` of your own, a function of the steps "
        "done (0 in the first step) to the factor of `lr`, which takes the place of warm-up and decay.",
    )
    warmup_steps: NonNegativeInt = Field(
        0, description="Steps of linear warm-up: the first has `lr` / `warmup_steps`, the last of them `lr`."
    )
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

    @property
    def moments(self) -> int:
        """Optimizer states that each element of a parameter has; one's own optimizer may say so by an attribute `states`."""
        return 2 if self.kind == ADAMW else int(getattr(imported(self.kind), "states", 2))


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
    loss: Annotated[str, Named(FINAL_LOSS, tuple(LOSSES))] = Field(
        "cross_entropy",
        description="The loss of next tokens: "
        + "; ".join(f"`{name}`: {loss.title}" for name, loss in LOSSES.items())
        + "; or the path of your own.",
    )
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
    skip_limit: PositiveInt = Field(
        3,
        description="Updates in a row that are not made, since loss or gradients are not finite, which stop the run: exit code 3, also of a "
        "launcher's restarts.",
    )
    timeout_minutes: PositiveFloat = Field(
        10.0, description="How long a collective may wait before the run is declared dead."
    )
    observers: list[Annotated[str, Named(OBSERVER)]] = Field(
        [], description="Observers of your own, `package.module:Class` each, which are told of every step."
    )
    profile: Profile = Field(Profile(), description="Traces of chosen steps.")


class Checkpoint(Section):
    """Saving and resuming."""

    every: NonNegativeInt = Field(0, description="Steps between checkpoints; 0: only at the end and on SIGTERM.")
    keep: PositiveInt = Field(2, description="How many checkpoints are kept.")
    resume: Literal["auto", "never", "scratch"] | Path = Field(
        "auto",
        description="`auto`: go on from the newest whole checkpoint of `train.folder`; `never`: refuse to overwrite one; `scratch`: start anew and set "
        "aside what is there, once; or the path of a checkpoint or of a run's folder, where the run starts, once. What is done once is passed over "
        "when the run has checkpoints made since.",
    )
    weights: Path | None = Field(
        None,
        description="A checkpoint, or a run's folder, of which a new run takes the weights alone, at any degrees: step 0, fresh moments and schedule; "
        "once.",
    )
    save: bool = Field(True, description="Write checkpoints.")
    give_up: NonNegativeInt = Field(
        3,
        description="How many saves may fail one after another before the run stops; 0: it goes on until the last one. Each is told, and the next "
        "interval saves again. The last save of a run is tried four times within 12 s; if none does, the exit code is 2.",
    )


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
