"""All mixers: a new one is a card, a module and a line here."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any

from lsys.mixers.card import Card, MixerCard
from lsys.mixers.channel import ChannelCard
from lsys.mixers.delta_net import DeltaNet
from lsys.mixers.dense import Dense
from lsys.mixers.gated_delta import GatedDelta
from lsys.mixers.gla import GatedLinear
from lsys.mixers.kimi_delta import KimiDelta
from lsys.mixers.lightning import Lightning
from lsys.mixers.mamba2 import Mamba2
from lsys.mixers.none import NoChannels
from lsys.mixers.retention import Retention
from lsys.mixers.softmax import Softmax
from lsys.mixers.window import Window

CARDS: tuple[type[Card], ...] = (
    Softmax, Window, Lightning, Retention, GatedLinear, Mamba2, GatedDelta, DeltaNet, KimiDelta
)  # fmt: skip
CHANNEL_CARDS: tuple[type[ChannelCard], ...] = (Dense, NoChannels)

MIXERS = {card.name: card for card in CARDS}
LETTERS = {card.letter: card.name for card in CARDS if card.letter}
CHANNELS = {card.name: card for card in CHANNEL_CARDS}
CHANNEL_LETTERS = {card.letter: card.name for card in CHANNEL_CARDS if card.letter}
ALL: dict[str, type[MixerCard]] = {**MIXERS, **CHANNELS}


def module_class(card: MixerCard) -> Any:
    """The module of a mixer, imported by the name on its card."""
    module, _, name = card.module.partition(":")
    return getattr(import_module(module), name)


def listed(cards: Iterable[type[MixerCard]] = CARDS) -> str:
    """`S (softmax attention), W (...)`: all that can stand in a pattern, for messages."""
    return ", ".join(f"{card.symbol} ({card.title})" for card in cards)
