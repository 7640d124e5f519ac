"""The section `model.mixers`: one section for each mixer of the registry; variants, and mixers of the user's own, under names of theirs."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, Field, ValidationError, ValidationInfo, create_model, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from lsys.config import user_code
from lsys.config.messages import INSIDE
from lsys.config.user_code import PATH, Role, UserCode, is_path
from lsys.mixers.attention import AttentionCard
from lsys.mixers.card import MixerCard
from lsys.mixers.channel import ChannelCard
from lsys.mixers.registry import ALL
from lsys.mixers.state import StateCard
from lsys.section import Section

NAME = re.compile(r"[a-z][a-z0-9_]*")

# Keys that once were in model.linear, for all mixers that have them; they are read as before.
MOVED = {
    "decay": ("lightning",),
    "lrpe": ("lightning",),
    "norm": ("lightning",),
    "gate_rank": ("gla",),
    "conv_width": ("mamba2", "gated_delta"),
    "negative_eigenvalues": ("gated_delta",),
}


def _wrong_card(found: Any) -> str:
    """What keeps an object from being a card; "" where it is one."""
    families = (StateCard, AttentionCard, ChannelCard)
    if not (isinstance(found, type) and issubclass(found, families)):
        return f"it has to be a subclass of {', '.join(family.__name__ for family in families)} (lsys.mixers)"
    missing = [name for name in ("name", "title", "module") if not isinstance(getattr(found, name, None), str)]
    if missing := [*missing, *sorted(found.__abstractmethods__)]:
        return f"it lacks {', '.join(missing)}"
    if not NAME.fullmatch(found.name) or found.name in ALL:
        return f"its name {found.name!r} has to be of small letters, digits and _, and none of {', '.join(ALL)}"
    if found.letter:
        return (
            f"its letter is {found.letter!r}; only lsys's own have one: lists in a pattern have the name of its section"
        )
    if not PATH.fullmatch(found.module):
        return f"its module is {found.module!r}; it has to be package.module:Class"
    if not (isinstance(found.Options, type) and issubclass(found.Options, Section)):
        return "its Options have to be a subclass of lsys.section.Section"
    return "its Options have a key `kind`, which names the mixer" if "kind" in found.Options.model_fields else ""


CARD = Role("a mixer's card", _wrong_card, is_torch_free=True)


class Variants(Section):
    """Own keys of each mixer. A name of your own with `kind: NAME` is a variant of that mixer, with `kind: package.module:Card` a mixer of your
    own, for lists in `model.pattern` and `model.channels`.
    """

    model_config = ConfigDict(extra="allow")

    if TYPE_CHECKING:  # sections of the registry's mixers and of variants

        def __getattr__(self, name: str) -> Any: ...

    @model_validator(mode="before")
    @classmethod
    def _variants(cls, data: Any, info: ValidationInfo) -> Any:
        """The sections of variants, each checked as its mixer's own section is."""
        if not isinstance(data, dict):
            return data
        wrong: list[InitErrorDetails] = []
        found = dict(data)
        for name in data:
            if name in cls.model_fields or isinstance(data[name], Section):
                continue
            try:
                section = _variant(name, data[name], user_code.of(info))
                try:
                    found[name] = section.model_validate(data[name])
                except ValidationError as error:
                    wrong += [_again(e, name, section) for e in error.errors()]
            except PydanticCustomError as error:
                is_path = error.type in (user_code.REFUSED, user_code.MISNAMED)
                place = ((name, "kind"), data[name]["kind"]) if is_path else ((name,), data[name])
                wrong.append({"type": error, "loc": place[0], "input": place[1]})
        if wrong:
            raise ValidationError.from_exception_data(cls.__name__, wrong)
        return found

    def section(self, key: str) -> Section | None:
        """The section of a mixer or variant; None where there is none of this name."""
        if key in type(self).model_fields:
            return getattr(self, key)
        return (self.model_extra or {}).get(key)  # not by its attribute: a variant may be called as a method is

    def card(self, key: str) -> type[MixerCard] | None:
        """The card of which a name is, or is a variant; None where the name is unknown."""
        return ALL.get(key) or _CARDS.get(type(self.section(key)))

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of the user's own cards."""
        return paths(self.model_extra or {})

    @property
    def keys(self) -> tuple[str, ...]:
        """All names that a pattern can have."""
        return (*ALL, *(self.model_extra or {}))


def paths(sections: Mapping[str, Any]) -> tuple[str, ...]:
    """The paths that sections of `model.mixers`, or what they were read from, give as their kinds."""
    kinds = (each.get("kind") if isinstance(each, dict) else getattr(each, "kind", None) for each in sections.values())
    return tuple(dict.fromkeys(kind for kind in kinds if isinstance(kind, str) and is_path(kind)))


def _again(found: Any, name: str, section: type[Section]) -> InitErrorDetails:
    """A mistake in the section of a variant, as one that `model.mixers` tells."""
    context = {"said": found["msg"], INSIDE: (section, found["loc"])}
    problem = PydanticCustomError(found["type"], "{said}", context)
    return {"type": problem, "loc": (name, *found["loc"]), "input": found["input"]}


def _variant(name: Any, data: Any, code: UserCode) -> type[Section]:
    """The section that a variant has by what it says of its kind."""
    if not (isinstance(name, str) and NAME.fullmatch(name)):
        raise PydanticCustomError(
            "mixer_name", "a name of a variant is of small letters, digits and _, such as far_window"
        )
    kind = data.get("kind") if isinstance(data, dict) else None
    if isinstance(kind, str) and is_path(kind):
        return _variant_section(code.find(kind, CARD), kind)
    if kind not in ALL:
        said = f"kind {kind!r} is no mixer" if kind else "unknown key"
        similar = difflib.get_close_matches(str(kind or name), ALL, n=1)
        asked = f"did you mean {similar[0]}? A" if similar else "a"
        told = f"{said}; {asked} variant says kind: NAME, of {', '.join(ALL)}, or kind: package.module:Card"
        raise PydanticCustomError("mixer_kind", "{said}", {"said": told})
    return _variant_section(ALL[kind], kind)


# The sections of variants, by card, and the cards by section.
_SECTIONS: dict[tuple[type[MixerCard], str], type[Section]] = {}
_CARDS: dict[type, type[MixerCard]] = {}


def _variant_section(card: type[MixerCard], kind: str) -> type[Section]:
    if (card, kind) not in _SECTIONS:
        field = Field(description="The mixer that this is a variant of.")
        own: Any = {"kind": (Literal[kind], field)}
        _SECTIONS[card, kind] = create_model(f"{card.Options.__name__}Variant", __base__=card.Options, **own)
        _CARDS[_SECTIONS[card, kind]] = card
    return _SECTIONS[card, kind]


if TYPE_CHECKING:
    Mixers = Variants
else:
    Mixers = create_model(
        "Mixers",
        __base__=Variants,
        __doc__=Variants.__doc__,
        **{n: (c.Options, Field(c.Options(), description=f"Own keys of {c.title}.")) for n, c in ALL.items()},
    )
