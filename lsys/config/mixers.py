"""The section `model.mixers`: one section for each mixer of the registry, and variants under names of the user's own."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, Field, ValidationError, create_model, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from lsys.mixers.registry import ALL
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


class Variants(Section):
    """Own keys of each mixer. A name of your own with `kind: NAME` is a variant of that mixer, for lists in `model.pattern`."""

    model_config = ConfigDict(extra="allow")

    if TYPE_CHECKING:  # sections of the registry's mixers and of variants

        def __getattr__(self, name: str) -> Any: ...

    @model_validator(mode="before")
    @classmethod
    def _variants(cls, data: Any) -> Any:
        """The sections of variants, each checked as its mixer's own section is."""
        if not isinstance(data, dict):
            return data
        wrong: list[InitErrorDetails] = []
        found = dict(data)
        for name in data:
            if name in cls.model_fields or isinstance(data[name], Section):
                continue
            try:
                found[name] = _variant(name, data[name])
            except ValidationError as error:
                wrong += [
                    {"type": e["type"], "loc": (name, *e["loc"]), "input": e["input"], "ctx": e.get("ctx", {})}
                    for e in error.errors()
                ]  # type: ignore[typeddict-item]
            except PydanticCustomError as error:
                wrong.append({"type": error, "loc": (name,), "input": data[name]})
        if wrong:
            raise ValidationError.from_exception_data(cls.__name__, wrong)
        return found

    def section(self, key: str) -> Section | None:
        """The section of a mixer or variant; None where there is none of this name."""
        if key in type(self).model_fields:
            return getattr(self, key)
        return (self.model_extra or {}).get(key)  # not by its attribute: a variant may be called as a method is

    def kind(self, key: str) -> str | None:
        """The mixer of which a name is, or is a variant; None where the name is unknown."""
        section = self.section(key)
        return key if key in ALL else getattr(section, "kind", None)

    @property
    def keys(self) -> tuple[str, ...]:
        """All names that a pattern can have."""
        return (*ALL, *(self.model_extra or {}))


def _variant(name: Any, data: Any) -> Section:
    if not (isinstance(name, str) and NAME.fullmatch(name)):
        raise PydanticCustomError(
            "mixer_name", "a name of a variant is of small letters, digits and _, such as far_window"
        )
    kind = data.get("kind") if isinstance(data, dict) else None
    if kind not in ALL:
        said = f"kind {kind!r} is no mixer" if kind else "unknown key"
        known = ", ".join(ALL)
        raise PydanticCustomError(
            "mixer_kind", "{said}; a variant says kind: NAME, of {known}", {"said": said, "known": known}
        )
    return _variant_section(kind).model_validate(data)


_SECTIONS: dict[str, type[Section]] = {}


def _variant_section(kind: str) -> type[Section]:
    if kind not in _SECTIONS:
        options = ALL[kind].Options
        field = Field(description="The mixer that this is a variant of.")
        own: Any = {"kind": (Literal[kind], field)}
        _SECTIONS[kind] = create_model(f"{options.__name__}Variant", __base__=options, **own)
    return _SECTIONS[kind]


if TYPE_CHECKING:
    Mixers = Variants
else:
    Mixers = create_model(
        "Mixers",
        __base__=Variants,
        __doc__=Variants.__doc__,
        **{n: (c.Options, Field(c.Options(), description=f"Own keys of {c.title}.")) for n, c in ALL.items()},
    )
