"""Facts of cards changed to other legal values: what is told changes, what is built does not.

A fact is whatever a public attribute of a card's class gives, down to fields, elements and entries; the facts are found by looking, so
one that is new is changed too.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import MISSING, fields, is_dataclass, replace
from functools import partial
from types import NoneType, UnionType
from typing import Any, Literal
from unittest import mock

from lsys.config.losses import LayerLoss
from lsys.mixers import card, exchange

Change = Callable[[Any], Any]

# What says how a mixer is called, configured and refused; tests/config, and the tests of documented rows and definitions, are of these.
WORDS = {
    "name",
    "letter",
    "symbol",
    "title",
    "row",
    "Options",
    "model_keys",
    "module",
    "option",
    "where",
    "refusals",
    "sliced",
}
# What follows from other facts in `Card` itself.
FOLLOWING = {"is_first_apart", "numel"}


def facts(kind: type) -> list[str]:
    """Attributes of a card's class that say something of what is built."""
    own = [owner for owner in kind.__mro__ if owner.__module__.startswith("lsys.mixers")]
    names = dict.fromkeys(name for owner in own for name in vars(owner) if not name.startswith("_"))
    return [name for name in names if name not in WORDS | FOLLOWING]


@contextmanager
def changed(kind: type, name: str, change: Change) -> Iterator[None]:
    """Where every card of this class gives something else for an attribute."""
    with mock.patch.object(kind, name, _wrapped(inspect.getattr_static(kind, name), change)):
        yield


@contextmanager
def watched(kind: type) -> Iterator[dict[str, list[Any]]]:
    """What cards of this class give for each of `facts`, as it is asked for."""
    found: dict[str, list[Any]] = {}

    def note(name: str, value: Any) -> Any:
        if value not in found.setdefault(name, []):
            found[name].append(value)
        return value

    with ExitStack() as stack:
        for name in facts(kind):
            attribute = inspect.getattr_static(kind, name)
            if isinstance(attribute, property) or callable(attribute):
                stack.enter_context(changed(kind, name, partial(note, name)))
            else:
                note(name, attribute)
        yield found


def _wrapped(attribute: Any, change: Change) -> Any:
    if isinstance(attribute, property):
        get = attribute.fget
        assert get is not None
        return property(lambda self: change(get(self)))
    if not callable(attribute):
        return change(attribute)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        value = attribute(self, *args, **kwargs)
        return change(list(value) if inspect.isgenerator(value) else value)

    return method


def changes(kind: type, name: str, value: Any, parts: Sequence[str]) -> Iterator[tuple[str, Change]]:
    """What can be else in such a value of an attribute: (which fact, what changes it).

    Args:
        parts: names that an attribute can give which names one of these.
    """
    attribute = inspect.getattr_static(kind, name)
    get = attribute.fget if isinstance(attribute, property) else attribute
    names = vars(exchange) | vars(card) | {"LayerLoss": LayerLoss}  # whose modules import it for type checkers alone
    if callable(get):
        hint = typing.get_type_hints(get, vars(inspect.getmodule(get)) | names, names).get("return")
    else:
        owners = [owner for owner in kind.__mro__ if name in vars(owner).get("__annotations__", {})]
        hint = type(value)
        if owners:
            hint = typing.get_type_hints(owners[0], vars(inspect.getmodule(owners[0])) | names)[name]
            hint = typing.get_args(hint)[0] if typing.get_origin(hint) is typing.ClassVar else hint
    for fact, change in _changes(value, hint, parts):
        if _is_legal(change, value):
            yield f"{name}{fact}", change


def _is_legal(change: Change, value: Any) -> bool:
    """Whether what holds the value can be made with another one; a window that is not causal cannot."""
    try:
        change(value)
    except ValueError:
        return False
    return True


def _changes(value: Any, hint: Any, parts: Sequence[str]) -> Iterator[tuple[str, Change]]:
    if is_dataclass(value) or hasattr(value, "_fields"):
        yield from _fields(value, parts)
    elif isinstance(value, (Mapping, Sequence)) and not value:
        yield "", partial(_filled, [_sample(each) for each in typing.get_args(hint)])
    elif isinstance(value, Mapping):
        for at, inner in enumerate(value.values()):  # keys may depend on sizes
            yield f"[{at}]", partial(_without, at)
            for fact, change in _changes(inner, type(inner), parts):
                yield f"[{at}]{fact}", partial(_entry, at, change)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        yield from _elements(value, parts)
    else:
        for change in _others(value, hint, parts):
            yield "", partial(_plain, type(value), change)


def _fields(value: Any, parts: Sequence[str]) -> Iterator[tuple[str, Change]]:
    hints = typing.get_type_hints(type(value))
    for name in getattr(value, "_fields", None) or [field.name for field in fields(value)]:
        for fact, change in _changes(getattr(value, name), hints[name], parts):
            yield f".{name}{fact}", partial(_field, type(value), name, change)


def _elements(value: Sequence[Any], parts: Sequence[str]) -> Iterator[tuple[str, Change]]:
    for at, inner in enumerate(value):
        yield f"[{at}]", partial(_spliced, at, ())
        yield f"[{at}]", partial(_spliced, at, (0, 0))
        if hasattr(inner, "name") and at:  # parameters are in the order in which they are made
            yield f"[{at}]", partial(_spliced, at - 1, (1, 0), taken=2)
        for fact, change in _changes(inner, type(inner), parts):
            yield f"[{at}]{fact}", partial(_element, at, change)


def _others(value: Any, hint: Any, parts: Sequence[str]) -> Iterator[Change]:
    """Other legal values of a plain one."""
    allowed = [hint, *typing.get_args(hint)]
    literals = [x for each in allowed if typing.get_origin(each) is Literal for x in typing.get_args(each)]
    others: list[Any] = []
    if isinstance(value, bool):
        others = [not value]
    elif isinstance(value, (int, float)):
        yield lambda found: found + 1
        if value:
            yield lambda found: 2 * found
    elif literals:
        others = literals
    elif isinstance(value, str) and NoneType not in allowed:
        others = [f"{value}_other"]
    elif str in allowed:
        others = [*parts]
    if value is None and int in allowed:
        others = [5]
    if value is not None and NoneType in allowed:
        others.append(None)
    for other in others:
        if other != value:
            yield partial(_instead, other)


def _sample(hint: Any) -> Any:
    """A legal value of a type."""
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint)[0]
    if isinstance(hint, UnionType):
        return _sample(typing.get_args(hint)[0])
    if hasattr(hint, "_fields") or is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        names = getattr(hint, "_fields", None) or [field.name for field in fields(hint) if field.default is MISSING]
        return hint(**{name: _sample(hints[name]) for name in names})
    return hint(1) if hint in (bool, int, float) else "planted"


# ---- changes, each of a value `found` of the shape of that which was seen; others stay as they are


def _plain(kind: type, change: Change, found: Any) -> Any:
    return change(found) if type(found) is kind else found


def _instead(other: Any, found: Any) -> Any:
    return other


def _filled(samples: Sequence[Any], found: Any) -> Any:
    """One entry or element where there is none."""
    if found:
        return found
    return {samples[0]: samples[1]} if isinstance(found, Mapping) else samples


def _without(at: int, found: Mapping[Any, Any]) -> dict[Any, Any]:
    return {key: value for n, (key, value) in enumerate(found.items()) if n != at}


def _entry(at: int, change: Change, found: Mapping[Any, Any]) -> dict[Any, Any]:
    return {key: change(value) if n == at else value for n, (key, value) in enumerate(found.items())}


def _field(kind: Any, name: str, change: Change, found: Any) -> Any:
    if type(found) is not kind:
        return found
    new = {name: change(getattr(found, name))}
    return found._replace(**new) if hasattr(found, "_replace") else replace(found, **new)


def _element(at: int, change: Change, found: Sequence[Any]) -> list[Any]:
    return [change(x) if n == at else x for n, x in enumerate(found)]


def _spliced(at: int, order: Sequence[int], found: Sequence[Any], taken: int = 1) -> list[Any]:
    """Instead of so many elements from `at` on these of them."""
    few = found[at : at + taken]
    return [*found[:at], *(few[n] for n in order if n < len(few)), *found[at + taken :]]
