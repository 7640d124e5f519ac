"""Modules of mixers that are the user's own."""

from typing import Any

from megatron.core.transformer.module import MegatronModule
from pydantic_core import PydanticCustomError

from lsys.config import Config
from lsys.config.messages import FilesError, Mistake
from lsys.config.modules import wrong_module
from lsys.config.user_code import imported
from lsys.mixers.card import MixerCard
from lsys.mixers.registry import ALL
from lsys.model.mixers.mixer import Mixer


def require_modules(settings: Config) -> None:
    """Import the modules that the user's own cards name, so that what is wrong with them is told before a process group starts.

    Raises:
        FilesError: a module cannot be imported, or has no class of the kind that a layer needs; it names all.
    """
    model = settings.model
    found = [*_mistakes(model.cards, Mixer), *_mistakes(model.channel_cards, MegatronModule)]
    if found:
        raise FilesError(found)


def _mistakes(cards: Any, base: type) -> list[Mistake]:
    return [
        wrong_module(key, card, problem)
        for key, card in cards.items()
        if type(card) not in ALL.values() and (problem := _problem(card, base))
    ]


def _problem(card: MixerCard, base: type) -> str:
    try:
        found = imported(card.module)
    except PydanticCustomError as error:
        return error.message()
    is_one = isinstance(found, type) and issubclass(found, base)
    return "" if is_one else f"it has to be a subclass of {base.__module__}.{base.__name__}"
