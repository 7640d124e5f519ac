"""All token mixers: a new one is a card, a module and a line here."""

from __future__ import annotations

from collections.abc import Iterable

from lsys.mixers.card import Card
from lsys.mixers.delta_net import DeltaNet
from lsys.mixers.gated_delta import GatedDelta
from lsys.mixers.gla import GatedLinear
from lsys.mixers.lightning import Lightning
from lsys.mixers.mamba2 import Mamba2
from lsys.mixers.retention import Retention
from lsys.mixers.softmax import Softmax
from lsys.mixers.window import Window

CARDS: tuple[type[Card], ...] = (Softmax, Window, Lightning, Retention, GatedLinear, Mamba2, GatedDelta, DeltaNet)

MIXERS = {card.name: card for card in CARDS}
LETTERS = {card.letter: card.name for card in CARDS if card.letter}


def listed(cards: Iterable[type[Card]] = CARDS) -> str:
    """`S (softmax attention), W (...)`: all that can stand in a pattern, for messages."""
    return ", ".join(f"{card.symbol} ({card.title})" for card in cards)
