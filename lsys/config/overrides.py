"""Every key of the YAML as an option of the command line, parsed and explained by tyro.

The options are made from the schema. Each takes one word, its value as YAML, so that lists and `null` can be given, and
the values of file and command line are checked alike and together.
"""

import re
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, make_dataclass
from typing import Annotated, Any, NamedTuple, TypeVar

import tyro
from pydantic import BaseModel

from lsys.config.reference import default_in_words, kind_in_words
from lsys.config.schema import Config
from lsys.section import held_section

Options = TypeVar("Options")

_NOT_GIVEN = "\0"  # no word of a command line can hold it


class Override(NamedTuple):
    """`--data.corpora.0.path x` is (("data", "corpora", "0", "path"), "x"); text None: the value is missing."""

    names: tuple[str, ...]
    text: str | None


@dataclass(frozen=True)
class _OverridesAlone:
    """Keys of the YAML."""


def parse_overrides(words: Sequence[str]) -> list[Override]:
    """The overrides that `--section.key value` and `--section.key=value` ask for; `-` may stand for `_`."""
    return parse(_OverridesAlone, words, prog="lsys")[1]


def parse(
    options: type[Options], words: Sequence[str], *, prog: str, quiet: bool = False
) -> tuple[Options, list[Override]]:
    """The options of a command (a dataclass) and the overrides among its words.

    Unknown options come back as overrides, which the schema refuses together with all other mistakes. `--help` (exit
    code 0) and a command line that cannot be parsed (2) end the process, silently if `quiet`: on ranks but the first.
    """
    kind = make_dataclass(options.__name__, _options_of(Config, words), bases=(options,), frozen=True)
    parsed: Any
    parsed, unknown = tyro.cli(
        kind, args=words, prog=prog, description=options.__doc__, return_unknown_args=True, console_outputs=not quiet
    )
    return parsed, [*_given(parsed, options), *_unknown(unknown)]


def _options_of(section: type[BaseModel], words: Sequence[str], above: str = "") -> list[tuple[str, Any, Any]]:
    """Fields of a dataclass: a text for each key of the section, a dataclass for each section in it.

    Of sections, those that the words name, and all for `--help`: to make all takes tyro longer than a command that answers at once may.
    """
    schema = section.model_json_schema()
    made: list[tuple[str, Any, Any]] = []
    for name, field in section.model_fields.items():
        inner, path = held_section(field.annotation), f"{above}{name}"
        if inner is not None and not typing.get_args(field.annotation):
            if _is_named(path, words):
                made.append(_group(name, name, _options_of(inner, words, f"{path}.")))
            continue
        kind = "list" if inner else kind_in_words(schema["properties"][name], schema)
        default = "required" if field.is_required() else f"default: {default_in_words(field.default)}"
        made.append(_text(name, kind, field.description or "", default))
        if inner and _is_named(path, words):  # a list of sections: by index, as far as the words go
            indices = [int(n) for n in re.findall(rf"--{re.escape(path)}\.(\d{{1,3}})\.", "\n".join(words))]
            items = range(max(indices, default=0) + 1)
            groups = [_group(f"item_{n}", str(n), _options_of(inner, words, f"{path}.{n}.")) for n in items]
            made.append(_group(f"{name}_items", name, groups))
    return made


def _is_named(path: str, words: Sequence[str]) -> bool:
    """Whether options of this section are among the words, or all are asked for."""
    return any(word in ("-h", "--help") or word.replace("-", "_").startswith(f"__{path}.") for word in words)


def _text(name: str, kind: str, meaning: str, default: str) -> tuple[str, Any, Any]:
    shown = tyro.conf.arg(
        name=name,
        metavar=kind.replace("`", "").replace(", ", "|").upper(),
        help=meaning.replace("`", ""),
        help_behavior_hint=f"({default.replace('`', '')})",
    )
    return name, Annotated[str, shown], _NOT_GIVEN


def _group(attribute: str, name: str, options: list[tuple[str, Any, Any]]) -> tuple[str, Any, Any]:
    kind = make_dataclass(attribute, options, frozen=True)
    return attribute, Annotated[kind, tyro.conf.arg(name=name)], kind()


def _given(parsed: Any, options: type, above: tuple[str, ...] = ()) -> Iterator[Override]:
    """What was given, lists before their items. `options` are the fields to leave out, a command's own."""
    own = {field.name for field in fields(options)}
    for field in fields(parsed):
        value = getattr(parsed, field.name)
        names = (*above, re.sub(r"^item_(?=\d+$)|_items$", "", field.name))
        if field.name in own:
            continue
        if is_dataclass(value):
            yield from _given(value, _OverridesAlone, names)
        elif value != _NOT_GIVEN:
            yield Override(names, value)


def _unknown(words: Sequence[str]) -> Iterator[Override]:
    """`--section.key value`, `--section.key=value`, or what is neither: a word as it stands, with the value behind it."""
    queue = list(words)
    while queue:
        word = queue.pop(0)
        name, equals, text = word.partition("=")
        is_key = bool(re.fullmatch(r"--[^.]+(\.[^.]+)+", name))
        names = _names(name) if is_key else (name,)
        if equals:
            yield Override(names, text)
        else:
            takes_value = is_key or re.match(r"--?[a-zA-Z]|\w+\.\w", name)
            yield Override(names, queue.pop(0) if takes_value and queue and not queue[0].startswith("--") else None)


def _names(option: str) -> tuple[str, ...]:
    return tuple(option[2:].replace("-", "_").split("."))
