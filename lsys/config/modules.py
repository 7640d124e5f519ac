"""Whether the modules that users' own cards name are there, seen without importing them: they need torch, and commands answer at once.

What can only be known of a module by running it is told when a run starts (`lsys.model.own`).
"""

from __future__ import annotations

import re
import sys

from lsys.config.messages import Mistake
from lsys.config.schema import Config
from lsys.config.user_code import lacks, not_found
from lsys.mixers.card import MixerCard
from lsys.mixers.registry import ALL

# Of a text that has one of these, what names its module has, or where its submodules are, is not seen.
DYNAMIC = re.compile(
    r"import\s*\*|__getattr__|__path__|__dict__|sys\.modules|\b(global|globals|locals|exec|vars|setattr)\b"
)


def missing_modules(config: Config) -> list[Mistake]:
    """The modules of the user's own cards that are not on this machine, or have no such class."""
    cards = {**config.model.known_cards, **config.model.known_channel_cards}
    return [
        wrong_module(key, card, problem)
        for key, card in cards.items()
        if type(card) not in ALL.values() and (problem := _problem(card.module))
    ]


def wrong_module(key: str, card: MixerCard, problem: str) -> Mistake:
    """What is wrong with the module of a card, as a mistake of the key that names the card."""
    return Mistake(f"model.mixers.{key}.kind", f"the module of {type(card).__name__}, {card.module}: {problem}")


def _problem(path: str) -> str:
    """Why there is no object of this path; "" where there is one, or where that is not seen."""
    module, _, name = path.partition(":")
    try:
        text = _text(module)
    except ModuleNotFoundError:
        return not_found(module)
    if text is None or DYNAMIC.search(text):
        return ""
    from symtable import symtable  # not needed where there are no cards of one's own

    try:
        symbols = symtable(text, module, "exec").get_symbols()
    except SyntaxError as error:
        return f"importing {module} would fail at its line {error.lineno}: SyntaxError: {error.msg}"
    names = [each.get_name() for each in symbols if each.is_assigned() or each.is_imported() or each.is_namespace()]
    return "" if name in names else lacks(module, name, names)


def _text(module: str) -> str | None:
    """The source of a module, of which nothing runs, nor of its packages, as it would by `importlib.util.find_spec`; None: it is not seen.

    Raises:
        ModuleNotFoundError: there is no such module.
    """
    text: str | None = ""
    places, parts = None, module.split(".")
    for depth in range(1, len(parts) + 1):
        name = ".".join(parts[:depth])
        finders = sys.meta_path if depth == 1 or places is not None else []
        try:
            spec = next(filter(None, (finder.find_spec(name, places) for finder in finders)), None)
            if spec is None and text is not None and not DYNAMIC.search(text):
                raise ModuleNotFoundError(name=name)
            if spec is None:
                return None
            text = spec.loader.get_source(name) if spec.loader else ""  # type: ignore[attr-defined]
        except ModuleNotFoundError:
            raise
        except Exception:  # without a text, or of a finder that wants its package imported
            return None
        places = getattr(sys.modules.get(name), "__path__", spec.submodule_search_locations)
    return text
