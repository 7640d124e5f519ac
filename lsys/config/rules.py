"""Rules that tie several keys to each other, to the number of ranks and to files."""

import math
from collections.abc import Callable, Iterable, Iterator
from numbers import Real
from pathlib import Path

from lsys.config import reports
from lsys.config.corpora import corpus_mistakes, missing_files, tokenizer_mistakes
from lsys.config.messages import FilesError, Mistake, choice, divisors, nearest, refusal
from lsys.config.model import Model, pattern_text
from lsys.config.schema import ADAMW, Config
from lsys.config.user_code import imported, is_path
from lsys.mixers.card import Card, MixerCard
from lsys.mixers.channel import ChannelCard
from lsys.mixers.registry import CARDS, CHANNEL_CARDS, CHANNEL_LETTERS, LETTERS, listed


def check(config: Config, world_size: int) -> list[Mistake]:
    """Everything about the configuration that cannot run on `world_size` ranks: value, rule, nearest valid fix."""
    if world_size < 1:
        return [Mistake("", f"{world_size} ranks", "a run has 1 or more")]
    return [mistake for rule in RULES for mistake in rule(config, world_size)]


def require(config: Config, world_size: int) -> None:
    """Raise ConfigError with all mistakes of `check`, if there are any; FilesError if a node's copy of the user's code made one."""
    if mistakes := check(config, world_size):
        raise refusal(mistakes)


def _pattern(config: Config, world_size: int) -> Iterator[Mistake]:
    mixers = config.model.mixers
    for key, family, cards, letters, what in (
        ("pattern", Card, CARDS, LETTERS, "token mixer"),
        ("channels", ChannelCard, CHANNEL_CARDS, CHANNEL_LETTERS, "channel mixer"),
    ):
        pattern = getattr(config.model, key)
        names = [name for name in mixers.keys if issubclass(mixers.card(name) or object, family)]
        variants = [name for name in names if name in (mixers.model_extra or {})]
        known = ", ".join([listed(cards), *variants])
        if not pattern:
            yield Mistake(f"model.{key}", "it is empty", f"name at least one layer: {known}")
        upper = "".join(pattern).upper()
        meant = f"did you mean {upper}? " if letters.keys() >= {*upper} and not letters.keys() >= {*pattern} else ""
        for name in dict.fromkeys(pattern):
            if letters.get(name, name) not in names:
                problem = f"{name!r} in {pattern_text(pattern)!r} is no {what}"
                yield Mistake(f"model.{key}", problem, f"{meant}there are {known}")


def _heads(config: Config, world_size: int) -> Iterator[Mistake]:
    model = config.model
    if model.heads % model.kv_heads:
        fits = nearest(model.kv_heads, divisors(model.heads))
        yield Mistake("model.groups", f"{model.kv_heads} groups do not divide {model.heads} heads", choice("", fits))
    if model.head_dim is None and model.hidden % model.heads:
        problem = f"{model.heads} heads do not divide hidden {model.hidden} and head_dim is empty"
        yield Mistake(
            "model.heads", problem, choice("", nearest(model.heads, divisors(model.hidden))) + ", or set model.head_dim"
        )
    refused = dict.fromkeys(refusal for card in _cards(model) for refusal in card.refusals())
    yield from (Mistake(f"model.{key}", problem, fix) for key, problem, fix in refused)


def _world(config: Config, world_size: int) -> Iterator[Mistake]:
    parallel = config.parallel
    degrees = dict(tensor=parallel.tensor, context=parallel.context, pipeline=parallel.pipeline)
    product = math.prod(degrees.values())
    if world_size % product == 0:
        return
    named = {axis: degree for axis, degree in degrees.items() if degree > 1}
    text = " x ".join(f"{axis} {degree}" for axis, degree in named.items())
    problem = (
        f"{text} = {product} does not divide {world_size} ranks"
        if len(named) > 1
        else f"{text} does not divide {world_size} ranks"
    )
    fix = f"the number of ranks must be a multiple of {product}"
    for axis in sorted(named, key=["context", "pipeline", "tensor"].index):
        rest = product // degrees[axis]
        if world_size % rest == 0:
            fix = choice(axis, nearest(degrees[axis], _degrees(config, axis, world_size // rest))) or fix
            break
    yield Mistake("parallel", problem, fix)


def _degrees(config: Config, axis: str, ranks: int) -> list[int]:
    """Degrees of an axis that divide `ranks` and fit the model."""
    if axis == "tensor":
        return [d for d in divisors(ranks) if all(count % d == 0 for _, _, count in _sliced(config))]
    if axis == "pipeline":
        return [d for d in divisors(ranks) if config.model.layers % (d * config.parallel.virtual_pipeline) == 0]
    return divisors(ranks)


def _sliced(config: Config) -> list[tuple[str, str, int]]:
    """(key, what it counts, how many) of everything that tensor ranks share out in equal parts."""
    model = config.model
    counts = [
        ("model.heads", "heads", model.heads),
        ("model.groups", "key-value groups", model.kv_heads),
        *_own(model.known_channel_cards.values()),
        ("model.vocab_multiple", "entries of the padded vocabulary", model.padded_vocab),
        *_own(model.known_cards.values()),
    ]
    return counts


def _own(cards: Iterable[MixerCard]) -> list[tuple[str, str, int]]:
    """What tensor ranks share out of mixers."""
    sliced = dict.fromkeys(each for card in cards for each in card.sliced())
    return [(f"model.{key}", what, count) for key, what, count in sliced]


def _cards(model: Model) -> list[MixerCard]:
    """The cards of all mixers that the model has and that are known."""
    return [*model.known_cards.values(), *model.known_channel_cards.values()]


def _tensor(config: Config, world_size: int) -> Iterator[Mistake]:
    tensor, counts = config.parallel.tensor, _sliced(config)
    wrong = [(key, f"{count} {what}") for key, what, count in counts if count % tensor]
    if wrong:
        problem = f"tensor {tensor} does not divide {', '.join(text for _, text in wrong)}"
        fits, rest = (
            divisors(math.gcd(*(count for _, _, count in counts))),
            config.parallel.context * config.parallel.pipeline,
        )
        fits = [d for d in fits if world_size % (d * rest) == 0] or fits
        fix = choice("", nearest(tensor, fits))
        yield Mistake("parallel.tensor", problem, f"{fix}, or change {', '.join(key for key, _ in wrong)}")


def _pipeline(config: Config, world_size: int) -> Iterator[Mistake]:
    layers, stages, virtual = config.model.layers, config.parallel.pipeline, config.parallel.virtual_pipeline
    if virtual > 1 and stages == 1:
        yield Mistake(
            "parallel.virtual_pipeline",
            f"{virtual} chunks per stage need more than 1 pipeline stage",
            "1 does, or raise parallel.pipeline",
        )
    elif layers % (stages * virtual):
        chunks = stages * virtual
        text = f"pipeline {stages} x virtual_pipeline {virtual} = {chunks}" if virtual > 1 else f"pipeline {stages}"
        rest = config.parallel.tensor * config.parallel.context
        fits = [d for d in divisors(layers) if d % virtual == 0 and (virtual == 1 or d > virtual)]
        fits = [d for d in fits if world_size % (d // virtual * rest) == 0] or fits
        fix = choice("pipeline", [d // virtual for d in nearest(chunks, fits)])
        multiple = " or ".join(str(n) for n in (layers // chunks * chunks, -(-layers // chunks) * chunks) if n)
        yield Mistake(
            "parallel.pipeline",
            f"{text} does not divide {layers} layers",
            f"{fix or 'no pipeline degree does'}, or model.layers {multiple}",
        )


def _experts(config: Config, world_size: int) -> Iterator[Mistake]:
    if config.parallel.expert > 1:
        yield Mistake("parallel.expert", f"expert {config.parallel.expert} for a model without experts", "1 does")


def _batch(config: Config, world_size: int) -> Iterator[Mistake]:
    train, parallel = config.train, config.parallel
    micro, batch = train.micro_batch_tokens, train.batch_tokens
    if micro < parallel.context:
        problem = f"{micro} tokens leave some of {parallel.context} context ranks without any"
        yield Mistake("train.micro_batch_tokens", problem, f"{parallel.context} or more")
    product = parallel.tensor * parallel.context * parallel.pipeline
    data = world_size // product if world_size % product == 0 else 1
    group = parallel.pipeline if parallel.virtual_pipeline > 1 else 1
    unit = micro * data * group
    fits = f"{_around(batch, unit)} does"
    if batch % micro:
        yield Mistake("train.batch_tokens", f"{batch} tokens are not whole micro-batches of {micro}", fits)
    elif batch // micro % data:
        problem = f"{batch // micro} micro-batches ({batch} / {micro} tokens) cannot be shared by {data} data replicas"
        yield Mistake("train.batch_tokens", problem, f"{fits}, or another micro_batch_tokens")
    elif batch // micro // data % group:
        # Megatron runs them in groups of `pipeline`; it refuses a smaller last group, and fewer than one group
        each = f"{batch // micro // data} micro-batches per replica"
        problem = f"{each} are no multiple of pipeline {group}, which the interleaved schedule needs"
        yield Mistake("train.batch_tokens", problem, f"{fits}, or virtual_pipeline 1")


def _around(value: int, unit: int) -> str:
    """The multiples of `unit` beside a value."""
    below = value // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)


def _schedule(config: Config, world_size: int) -> Iterator[Mistake]:
    optimizer, steps = config.optimizer, config.train.steps
    if optimizer.warmup_steps >= steps:
        yield Mistake(
            "optimizer.warmup_steps",
            f"{optimizer.warmup_steps} is not below train.steps {steps}",
            f"{steps - 1} or fewer",
        )
    decay = optimizer.decay_steps if optimizer.schedule == "wsd" else None
    if decay and decay > steps:
        yield Mistake("optimizer.decay_steps", f"{decay} is above train.steps {steps}", f"{steps} or fewer")
    elif decay and optimizer.warmup_steps < steps < decay + optimizer.warmup_steps:
        problem = f"{decay} after {optimizer.warmup_steps} steps of warm-up is above train.steps {steps}"
        yield Mistake("optimizer.decay_steps", problem, f"{steps - optimizer.warmup_steps} or fewer")
    if optimizer.min_lr > optimizer.lr:
        yield Mistake(
            "optimizer.min_lr", f"{optimizer.min_lr} is above optimizer.lr {optimizer.lr}", f"{optimizer.lr} or less"
        )


def _own_schedule(config: Config, world_size: int) -> Iterator[Mistake]:
    """A schedule of the user's own, asked for its first, middle and last factor, twice each."""
    path, last, key = config.optimizer.schedule, config.train.steps - 1, "optimizer.schedule"
    for step in sorted({0, last // 2, last}) if is_path(path) else ():
        try:
            first, second = (imported(path)(step) for _ in range(2))
        except Exception as error:
            problem = f"{path}({step}) raised {type(error).__name__}: {error}"
            fix = f"it takes each step from 0 to {last} and gives a factor of optimizer.lr"
            yield Mistake(key, problem, fix, is_local=True)
            return
        if not is_factor(first):
            fix = "a factor of optimizer.lr is a number of 0 or more"
            yield Mistake(key, f"{path}({step}) is {first!r}", fix, is_local=True)
            return
        if first != second:
            problem = f"{path}({step}) is {first!r}, then {second!r}"
            fix = "a factor follows from the step alone, so that a run goes on as it would have"
            yield Mistake(key, problem, fix, is_local=True)
            return


def is_factor(value: object) -> bool:
    """Whether a schedule may give this: a number of Python's or numpy's."""
    return isinstance(value, Real) and math.isfinite(value) and float(value) >= 0


def _optimizer(config: Config, world_size: int) -> Iterator[Mistake]:
    optimizer = config.optimizer
    if optimizer.distributed and optimizer.kind != ADAMW:
        problem = f"true shards the states of {ADAMW}; those of {optimizer.kind} are whole on each rank"
        yield Mistake("optimizer.distributed", problem, "false does")


def _start(config: Config, world_size: int) -> Iterator[Mistake]:
    asked = config.checkpoint
    if asked.weights and isinstance(asked.resume, Path):
        problem = f"{asked.weights}, and checkpoint.resume {asked.resume}: both say where the run starts"
        yield Mistake(
            "checkpoint.weights",
            problem,
            "resume goes on with moments and schedule, weights begins at step 0; give one",
        )


def _profile(config: Config, world_size: int) -> Iterator[Mistake]:
    profile, steps = config.train.profile, config.train.steps
    if not profile.first:
        return
    if beyond := [rank for rank in profile.ranks if rank >= world_size]:
        there = f"there are ranks 0 to {world_size - 1}"
        yield Mistake("train.profile.ranks", f"{beyond} are not among {world_size} ranks", there)
    last = profile.first + profile.steps - 1
    if last > steps:
        problem = f"steps {profile.first} to {last} go beyond train.steps {steps}"
        yield Mistake("train.profile.first", problem, f"{max(1, steps - profile.steps + 1)} or less")


def _declared(config: Config, world_size: int) -> Iterator[Mistake]:
    yield from reports.mistakes(config)


RULES: tuple[Callable[[Config, int], Iterable[Mistake]], ...] = (
    _pattern, _heads, _world, _tensor, _pipeline, _experts, _batch, _schedule, _own_schedule, _optimizer, _start, _profile, _declared
)  # fmt: skip


def check_files(config: Config, *others: Mistake) -> None:
    """Raise FilesError with all of `file_mistakes`, and others that are known, if there are any."""
    if mistakes := [*file_mistakes(config), *others]:
        raise FilesError(mistakes)


def file_mistakes(config: Config, absent: bool = True) -> list[Mistake]:
    """The corpora that are missing, damaged, of two tokenizers, or have tokens that the model lacks.

    `lsys.checkpoint.choice.mistakes` tells of checkpoints.

    Args:
        absent: whether those that are missing are told.
    """
    holds_out = config.data.validation_fraction > 0 and config.train.validate_tokens > 0
    mistakes = [
        m
        for i, corpus in enumerate(config.data.corpora)
        if absent or not missing_files(str(corpus.path))
        for m in corpus_mistakes(f"data.corpora.{i}.path", corpus.path, config.model.vocab, holds_out=holds_out)
    ]
    return [*mistakes, *tokenizer_mistakes([corpus.path for corpus in config.data.corpora])]
