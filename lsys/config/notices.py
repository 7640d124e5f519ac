"""What a configuration says without effect, or at a price."""

from collections.abc import Callable, Iterable

from lsys.config.mixers import MOVED
from lsys.config.model import Model, pattern_text
from lsys.config.schema import Config
from lsys.config.user_code import is_path
from lsys.mixers.card import Card, MixerCard
from lsys.mixers.channel import ChannelCard
from lsys.mixers.registry import ALL, CARDS, CHANNEL_LETTERS, CHANNELS, LETTERS
from lsys.section import Section


def notices(config: Config, world_size: int | None = None) -> list[str]:
    """Sentences about settings that change nothing and, where the number of ranks is known, about idle stages."""
    return [*_parallel(config, world_size), *_model(config), *_run(config)]


def _changed(section: Section, key: str) -> bool:
    """Whether a key differs from its default."""
    return getattr(section, key) != type(section).model_fields[key].default


def _parallel(config: Config, world_size: int | None) -> list[str]:
    parallel, cards, found = config.parallel, config.model.cards.values(), []
    if parallel.context == 1 and _changed(parallel, "layout"):
        found.append(
            f"parallel.layout {parallel.layout} has no effect: context is 1, one rank holds all tokens of a micro-batch"
        )
    if _changed(parallel, "attention") and (parallel.context == 1 or all(card.has_state for card in cards)):
        users = _listed(card for card in CARDS if not card.has_state)
        why = (
            "context is 1" if parallel.context == 1 else f"no layer of pattern {config.model.pattern_text!r} is {users}"
        )
        found.append(f"parallel.attention {parallel.attention} has no effect: {why}")
    if _changed(parallel, "linear") and (parallel.context == 1 or not any(card.has_state for card in cards)):
        why = (
            "context is 1"
            if parallel.context == 1
            else f"no layer of pattern {config.model.pattern_text!r} has a state"
        )
        found.append(f"parallel.linear {parallel.linear} has no effect: {why}")
    product = parallel.tensor * parallel.context * parallel.pipeline
    if world_size and world_size % product == 0:
        each = config.micro_batches // (world_size // product)
        if each < parallel.pipeline:
            found.append(
                f"{each} micro-batches per replica leave some of {parallel.pipeline} pipeline stages idle at any time"
            )
        if config.optimizer.distributed and world_size // parallel.tensor // parallel.pipeline == 1:
            found.append(
                "optimizer.distributed has no effect: there is one data x context rank to hold the optimizer states"
            )
    return found


def _listed(cards: Iterable[type[MixerCard]]) -> str:
    """`L, R or G`."""
    return " or ".join(", ".join(card.symbol for card in cards).rsplit(", ", 1))


def _idle(model: Model, key: str, is_user: Callable[[type[MixerCard]], bool]) -> list[str]:
    """A sentence about a key of `model` whose mixers the model lacks."""
    if any(is_user(type(card)) for card in (*model.cards.values(), *model.channel_cards.values())):
        return []
    users = tuple(filter(is_user, ALL.values()))
    return [f"model.{key} has no effect: {_lacks(model, users[0] in CHANNELS.values(), _listed(users))}"]


def _lacks(model: Model, is_channel: bool, layer: str) -> str:
    what, pattern = ("channels", model.channels) if is_channel else ("pattern", model.pattern)
    return f"no layer of {what} {pattern_text(pattern)!r} is {layer}"


def _model(config: Config) -> list[str]:
    model, found = config.model, []
    for key in type(model.linear).model_fields:
        if key in MOVED:
            if getattr(model.linear, key) is not None:
                there = " and ".join(f"model.mixers.{name}.{key}" for name in MOVED[key])
                found.append(f"model.linear.{key} is now {there}; it is read as before")
        elif _changed(model.linear, key):
            found += _idle(model, f"linear.{key}", lambda card: issubclass(card, Card) and card.has_state)
    for key in dict.fromkeys(key for card in ALL.values() for key in card.model_keys):
        if _changed(model, key):
            found += _idle(model, key, lambda card, key=key: key in card.model_keys)  # type: ignore[misc]
    for key in model.mixers.keys:
        section = model.mixers.section(key)
        changed = [name for name in type(section).model_fields if _changed(section, name)] if section else []
        if key not in {*model.kinds, *model.channel_kinds}:
            layer = _listed(card for card in ALL.values() if card.name == key) or key
            why = _lacks(model, issubclass(model.mixers.card(key) or object, ChannelCard), layer)
            found += [f"model.mixers.{key}.{name} has no effect: {why}" for name in changed]
    for key, letters, kinds in (
        ("pattern", LETTERS, model.kinds),
        ("channels", CHANNEL_LETTERS, model.channel_kinds),
    ):
        pattern = getattr(model, key)
        found += [
            f"{name} in model.{key} {pattern_text(pattern)!r} has no effect: there are only {model.layers} layers"
            for name in dict.fromkeys(pattern)
            if letters.get(name, name) not in kinds
        ]
    return found


def _run(config: Config) -> list[str]:
    train, optimizer, checkpoint, found = config.train, config.optimizer, config.checkpoint, []
    if optimizer.decay_steps is not None and optimizer.schedule != "wsd":
        found.append(f"optimizer.decay_steps has no effect: schedule is {optimizer.schedule}, not wsd")
    if is_path(optimizer.schedule):
        found += [
            f"optimizer.{key} has no effect: {optimizer.schedule} gives the factor of every step"
            for key in ("warmup_steps", "min_lr")
            if _changed(optimizer, key)
        ]
    if optimizer.min_lr and optimizer.schedule == "constant":
        found.append("optimizer.min_lr has no effect: schedule is constant")
    if train.validate_every and not train.validate_tokens:
        found.append("train.validate_every has no effect: validate_tokens is 0")
    if train.validate_tokens and not config.data.validation_fraction:
        found.append("train.validate_tokens has no effect: data.validation_fraction is 0, nothing is held out")
    if checkpoint.every and not checkpoint.save:
        found.append("checkpoint.every has no effect: save is false")
    if len(config.data.corpora) == 1 and _changed(config.data.corpora[0], "weight"):
        found.append("data.corpora.0.weight has no effect: there is one corpus")
    return found
