"""Which arguments a Triton kernel writes to, as its source says."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

STORES = ("store", "atomic_add", "atomic_max", "atomic_min", "atomic_xchg", "atomic_cas")


class Addresses(NamedTuple):
    """Parameters of a kernel, or of a function that kernels call: those that addresses which it writes to, and results, are made of."""

    written: frozenset[str]
    returned: frozenset[str]


def stored(kernel: Any) -> frozenset[str]:
    """Names of the parameters that addresses are made of which a kernel writes to. Those that are tensors are written.

    An address is followed back to parameters, through assignments and through the functions that are called; what is loaded on the way is
    a number, no address.
    """
    return addresses(kernel).written


@cache
def addresses(kernel: Any) -> Addresses:
    function = ast.parse(textwrap.dedent(inspect.getsource(kernel.fn))).body[0]
    assert isinstance(function, ast.FunctionDef)
    parameters = {argument.arg for argument in function.args.args}
    sources: dict[str, set[str]] = {name: set() for name in parameters}
    for node in ast.walk(function):
        if isinstance(node, (ast.Assign, ast.AugAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for name in {each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)}:
                sources.setdefault(name, set()).update(_names(node.value, kernel))

    def roots(expressions: Iterable[ast.expr]) -> frozenset[str]:
        seen: set[str] = set()
        rest = [name for each in expressions for name in _names(each, kernel)]
        while rest:
            name = rest.pop()
            if name not in seen:
                seen.add(name)
                rest += sources.get(name, ())
        return frozenset(seen & parameters)

    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
    returns = [node.value for node in ast.walk(function) if isinstance(node, ast.Return) and node.value is not None]
    return Addresses(roots(address for call in calls for address in _written(call, kernel)), roots(returns))


def _written(call: ast.Call, kernel: Any) -> list[ast.expr]:
    """The addresses that a call writes to."""
    if _of_triton(call):
        return call.args[:1] if call.func.attr in STORES else []  # type: ignore[attr-defined]
    return _given(call, kernel, "written")


def _names(node: ast.expr, kernel: Any) -> set[str]:
    """Names in an expression, but for those in what is loaded."""
    if isinstance(node, ast.Name):
        return {node.id}
    if isinstance(node, ast.Call) and _of_triton(node) and node.func.attr == "load":  # type: ignore[attr-defined]
        return set()
    if isinstance(node, ast.Call) and _called(node, kernel) is not None:
        return {name for value in _given(node, kernel, "returned") for name in _names(value, kernel)}
    children = (child for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr))
    return {name for child in children for name in _names(child, kernel)}


def _given(call: ast.Call, kernel: Any, what: str) -> list[ast.expr]:
    """What a function of kernels is given in a call, for the parameters that are `written`, or `returned`."""
    called = _called(call, kernel)
    if called is None:
        return []
    names, wanted = list(inspect.signature(called.fn).parameters), getattr(addresses(called), what)
    given = [*zip(names, call.args, strict=False), *((word.arg, word.value) for word in call.keywords)]
    return [value for name, value in given if name in wanted]


def _called(call: ast.Call, kernel: Any) -> Any:
    """The function of kernels that is called; None: it is none."""
    called: Any = kernel.fn.__globals__.get(call.func.id) if isinstance(call.func, ast.Name) else None
    return called if hasattr(called, "fn") else None


def _of_triton(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) == "tl"
