"""Mistakes in a configuration, said so that they can be put right: the key, what is wrong with it, what would do."""

import difflib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from lsys.config.user_code import MISNAMED, REFUSED
from lsys.section import held_section

# In the context of a mistake below a name of the user's own: the section of that name, and the place in it.
INSIDE = "inside"

# What pydantic's words leave open, by its names of mistakes.
RULES = {
    "model_type": "it should be a mapping",
    "list_type": "it should be a list in brackets, such as [a, b]",
    "int_parsing": "it should be a whole number",
    "int_type": "it should be a whole number",
    "int_from_float": "it should be a whole number",
    "float_parsing": "it should be a number",
    "float_type": "it should be a number",
    "bool_parsing": "it should be true or false",
    "bool_type": "it should be true or false",
}
NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?")
LETTERS = {"k": 10, "m": 20, "g": 30, "b": 30, "t": 40}  # powers of two that are meant by a letter behind a number
# Names of keys that other systems' users are used to.
USUAL = {
    "tp": "parallel.tensor",
    "pp": "parallel.pipeline",
    "vpp": "parallel.virtual_pipeline",
    "cp": "parallel.context",
    "ep": "parallel.expert",
    "learning_rate": "optimizer.lr",
    "wd": "optimizer.weight_decay",
    "output_dir": "train.folder",
    "save_interval": "checkpoint.every",
}


@dataclass(frozen=True)
class Mistake:
    """One wrong key.

    Attributes:
        key: dotted path of the key. problem: value and rule. fix: the nearest value that would do, or what to change.
        is_local: whether another node may be without it: it lies in files or in code of the user's own, not in the configuration.
        is_file: whether it lies in files, which all ranks of a node see alike.
    """

    key: str
    problem: str
    fix: str = ""
    is_local: bool = False
    is_file: bool = False

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
    """Files or modules that the configuration names are missing or do not fit; another node may have them.

    Attributes:
        on_node: whether all ranks of a node find the same.
    """

    everywhere = False

    def __init__(self, mistakes: Sequence[Mistake]) -> None:
        super().__init__(mistakes)
        self.on_node = all(mistake.is_file or not mistake.is_local for mistake in mistakes)


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
    rule = _list_rule(found, field) or RULES.get(found["type"]) or found["msg"].replace("Input should", "it should")
    is_told = not meaning or found["type"] in (REFUSED, MISNAMED)
    problem = f"{_short(found['input'])} does not do: {rule}" + ("" if is_told else f" ({meaning})")
    return Mistake(key, problem, _number(found["type"], found["input"]), is_local=found["type"] == REFUSED)


def _list_rule(found: Any, field: Any) -> str:
    """What a list of sections looks like, with the value that was given in it."""
    inner = held_section(field.annotation) if field and found["type"] == "list_type" else None
    key = next((name for name, each in inner.model_fields.items() if each.is_required()), "") if inner else ""
    return f"it should be a list in brackets, such as [{{{key}: {found['input']}}}]" if key else ""


def _number(kind: str, value: Any) -> str:
    """What was meant by a value that is no number, or not a whole one."""
    is_whole = kind.startswith("int_")
    if kind == "int_from_float":
        return f"{math.floor(value)} or {math.ceil(value)} does"
    if kind not in ("int_parsing", "float_parsing", "int_type", "float_type"):
        return ""
    text = value.strip() if isinstance(value, str) else ""
    found = NUMBER.match(text)
    if found is None:
        return "write it in digits, such as 8" if is_whole else "write it in digits, such as 3e-4"
    number, rest = found[0].replace("_", ""), text[found.end() :].lower()
    if rest in LETTERS:
        power = LETTERS[rest]
        return f"write {float(number) * 10 ** (power * 3 // 10):.0f}, or {float(number) * 2**power:.0f}"
    return f"did you mean {math.floor(float(number)) if is_whole else number}?"


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


def meant(name: str, schema: type[BaseModel]) -> str:
    """The key `section.key` that is meant by one without its section, or by its name in other systems; empty if none is alike."""
    sections = {key: held_section(field.annotation) for key, field in schema.model_fields.items()}
    keys = {f"{above}.{key}": key for above, section in sections.items() if section for key in section.model_fields}
    name = name.replace("-", "_")
    found = [path for path, key in keys.items() if key == name]
    if not found and name in USUAL:
        found = [USUAL[name]]
    if not found:
        alike = difflib.get_close_matches(name, keys.values(), n=1, cutoff=0.75)
        found = [path for path, key in keys.items() if key in alike]
    return min(
        found, key=lambda path: not path.startswith("train."), default=""
    )  # a name of several sections: the run's


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
