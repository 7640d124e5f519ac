"""Mistakes in a configuration, said so that they can be put right: the key, what is wrong with it, what would do."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from lsys.config.user_code import MISNAMED, REFUSED
from lsys.section import held_section

# In the context of a mistake below a name of the user's own: the section of that name, and the place in it.
INSIDE = "inside"

# What pydantic's words leave open, by its names of mistakes.
RULES = {"model_type": "it should be a mapping", "list_type": "it should be a list in brackets, such as [a, b]"}


@dataclass(frozen=True)
class Mistake:
    """One wrong key.

    Attributes:
        key: dotted path of the key. problem: value and rule. fix: the nearest value that would do, or what to change.
        is_local: whether another node may be without it: it lies in files or in code of the user's own, not in the configuration.
    """

    key: str
    problem: str
    fix: str = ""
    is_local: bool = False

    def __str__(self) -> str:
        text = f"{self.key}: {self.problem}" if self.key else self.problem
        return f"{text}; {self.fix}" if self.fix else text


class ConfigError(ValueError):
    """The configuration is refused; `mistakes` are all that were found, alike on every rank (`everywhere`)."""

    everywhere = True

    def __init__(self, mistakes: Sequence[Mistake]) -> None:
        self.mistakes = list(mistakes)
        super().__init__("\n".join(map(str, self.mistakes)))


class FilesError(ConfigError):
    """Files or modules that the configuration names are missing or do not fit; another node may have them."""

    everywhere = False


def refusal(mistakes: Sequence[Mistake]) -> ConfigError:
    """The error of all these mistakes: a FilesError if one of them is local."""
    return (FilesError if any(mistake.is_local for mistake in mistakes) else ConfigError)(mistakes)


def from_validation(error: ValidationError, schema: type[BaseModel]) -> list[Mistake]:
    """pydantic's findings, one for each key."""
    mistakes: dict[str, Mistake] = {}
    for found in error.errors(include_url=False):
        names, section = _place(schema, found["loc"])
        if inside := found.get("ctx", {}).get(INSIDE):
            section = _place(*inside)[1]
        mistakes.setdefault(".".join(map(str, names)), _mistake(found, names, section, schema))
    return list(mistakes.values())


def _mistake(found: Any, names: list[str | int], section: type[BaseModel] | None, schema: type[BaseModel]) -> Mistake:
    key = ".".join(map(str, names))
    if found["type"] == "extra_forbidden":
        name = str(names[-1])
        if section is None:
            return Mistake(key, f"unknown key {name!r}")
        similar = _similar(name, section, names[:-1], schema)
        return Mistake(
            key,
            "unknown key",
            f"did you mean {similar}?" if similar else "there are " + ", ".join(section.model_fields),
        )
    field = section.model_fields.get(str(names[-1])) if section else None
    meaning = field.description.split("; ")[0].rstrip(".") if field and field.description else ""
    if found["type"] == "missing":
        return Mistake(key, "missing", f"give it a value ({meaning})" if meaning else "give it a value")
    rule = RULES.get(found["type"]) or found["msg"].replace("Input should", "it should")
    is_told = not meaning or found["type"] in (REFUSED, MISNAMED)
    problem = f"{_short(found['input'])} does not do: {rule}" + ("" if is_told else f" ({meaning})")
    return Mistake(key, problem, is_local=found["type"] == REFUSED)


def _place(schema: type[BaseModel], loc: Iterable[str | int]) -> tuple[list[str | int], type[BaseModel] | None]:
    """The key's path in the YAML (pydantic adds names of union branches) and the section that holds its last name."""
    names: list[str | int] = []
    section: type[BaseModel] | None = schema  # of the next name
    holder: type[BaseModel] | None = None  # of the last name
    is_open = False
    for part in loc:
        if isinstance(part, int):
            names.append(part)
        elif section is not None:
            names.append(part)
            holder = section
            is_open = section.model_config.get("extra") == "allow" and part not in section.model_fields
            section = held_section(section.model_fields[part].annotation) if part in section.model_fields else None
        elif is_open:  # keys below a name of the user's own
            names.append(part)
            holder = None
        else:
            break
    return names, holder


def _similar(name: str, section: type[BaseModel], above: list[str | int], schema: type[BaseModel]) -> str | None:
    """The key of this section that is spelled most alike, else the key of that very name in another one."""
    close = difflib.get_close_matches(name, section.model_fields, n=1, cutoff=0.6)
    if close:
        return close[0]
    for other, field in schema.model_fields.items():
        keys = getattr(held_section(field.annotation), "model_fields", {})
        if name in keys and [other] != above:
            return f"{other}.{name}"
    return None


def _short(value: Any, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def choice(name: str, values: Sequence[int], verb: str = "does") -> str:
    """'context 2 or 6 does'; nothing if there is no value."""
    return f"{name} {' or '.join(map(str, values))} {verb}".strip() if values else ""


def nearest(value: int, candidates: Iterable[int]) -> list[int]:
    """The nearest candidate below the value and the nearest above it."""
    candidates = [candidate for candidate in candidates if candidate != value]
    below = [candidate for candidate in candidates if candidate < value]
    above = [candidate for candidate in candidates if candidate > value]
    return ([max(below)] if below else []) + ([min(above)] if above else [])


def divisors(number: int) -> list[int]:
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})
