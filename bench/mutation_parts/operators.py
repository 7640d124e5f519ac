"""Single faults of the kinds that programmers make, as changes of a source's text. Needs the standard library."""

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# Names that stand for one another's kind: an axis or a group taken for another is such a fault.
AXES = ("tp", "cp", "dp", "pp", "dp_cp", "mp")
DEGREES = ("tensor", "context", "pipeline", "data")
REDUCTIONS = frozenset({"all_reduce", "reduce_scatter", "broadcast", "all_reduce_coalesced"})
MATH = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv)
MIRROR = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        file: relative to the checkout. line: where it is, from 1.
        kind: of fault. old, new: the text before and after, from `start` on.
        start: offset in the file's text.
    """

    file: str
    line: int
    kind: str
    old: str
    new: str
    start: int

    @property
    def name(self) -> str:
        return f"{self.file}:{self.line} {self.kind}"

    def of(self, text: str) -> str:
        """The text with the fault in it."""
        assert text[self.start : self.start + len(self.old)] == self.old, f"{self.name} is not there any more"
        return text[: self.start] + self.new + text[self.start + len(self.old) :]


def mutants(file: str, text: str) -> list[Mutant]:
    """Every fault of a source, in the order of its text. Annotations, docstrings, messages and what only type checkers see are left."""
    tree, starts = ast.parse(text), _line_starts(text)
    found = []
    for node in _code(tree):
        for kind, changed in _faults(node):
            start, stop = _span(node, starts, text)
            new = ast.unparse(changed) if isinstance(changed, ast.AST) else changed
            if isinstance(node, ast.expr) and not isinstance(node, ast.Constant | ast.Name | ast.Attribute):
                new = f"({new})"
            found.append(Mutant(file, node.lineno, kind, text[start:stop], new, start))
    return sorted(set(found), key=lambda mutant: (mutant.start, mutant.kind))


def _code(tree: ast.AST) -> Iterator[Any]:
    """The nodes that run and compute."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.JoinedStr | ast.Import | ast.ImportFrom):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.AnnAssign):
            yield from _code_of(node.value)
            continue
        if isinstance(node, ast.Raise | ast.Assert):  # what it says is text; that it is raised is a fault of its own
            yield node
            continue
        if isinstance(node, ast.arguments):
            for default in [*node.defaults, *filter(None, node.kw_defaults)]:
                yield from _code_of(default)
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node = copy.copy(node)
            node.returns = None
        yield node
        yield from _code(node)


def _code_of(node: ast.AST | None) -> Iterator[Any]:
    if node is not None:
        yield node
        yield from _code(node)


def _faults(node: ast.AST) -> Iterator[tuple[str, ast.AST | str]]:
    """The faults of one node: kind, and what stands in its place."""
    if isinstance(node, ast.BinOp):
        yield from _arithmetic(node)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
        yield "sign", node.operand
    elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in MIRROR:
        yield "off by one", ast.Compare(node.left, [MIRROR[type(node.ops[0])]()], node.comparators)
    elif isinstance(node, ast.BoolOp):
        yield "dropped term", node.values[0]
        yield "dropped term", node.values[-1]
    elif isinstance(node, ast.Constant) and type(node.value) is int and 0 <= node.value <= 64:
        yield "off by one", ast.Constant(node.value + 1)
    elif isinstance(node, ast.Constant) and type(node.value) is float:
        yield "factor 2", ast.Constant(node.value * 2 if node.value else 1.0)
    elif isinstance(node, ast.Attribute):
        yield from _other_axis(node)
    elif isinstance(node, ast.Call):
        yield from _call(node)
    elif isinstance(node, ast.Expr):
        yield from _statement(node)
    elif isinstance(node, ast.Raise):
        yield "swallowed error", "pass"
    elif isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Add | ast.Sub):
        yield "dropped term", ast.Assign([node.target], node.value, lineno=node.lineno)
    elif isinstance(node, ast.IfExp):
        yield "stale cache" if _is_memory(node.test) else "wrong branch", ast.IfExp(node.test, node.orelse, node.body)
    elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and node.value.value is None:
        if any(isinstance(target, ast.Attribute) for target in node.targets):
            yield "stale cache", "pass"


def _arithmetic(node: ast.BinOp) -> Iterator[tuple[str, ast.AST | str]]:
    if not isinstance(node.op, MATH) or _is_text(node.left) or _is_text(node.right):
        return
    if isinstance(node.op, ast.Add | ast.Sub):
        other = ast.Sub() if isinstance(node.op, ast.Add) else ast.Add()
        yield "sign", ast.BinOp(node.left, other, node.right)
        yield "dropped term", node.left
    else:
        yield "factor 2", ast.BinOp(ast.Constant(2), ast.Mult(), node)
        yield "dropped term", node.left


def _other_axis(node: ast.Attribute) -> Iterator[tuple[str, ast.AST | str]]:
    for names in (AXES, DEGREES) if isinstance(node.ctx, ast.Load) else ():
        if node.attr in names and ast.unparse(node.value) != "torch":
            other = names[(names.index(node.attr) + 1) % len(names)]
            yield "wrong group", ast.Attribute(node.value, other, node.ctx)


def _call(node: ast.Call) -> Iterator[tuple[str, ast.AST | str]]:
    for index, keyword in enumerate(node.keywords):
        value = keyword.value
        if keyword.arg in ("dim", "axis") and isinstance(value, ast.Constant | ast.UnaryOp):
            text = ast.unparse(value)
            if text.lstrip("-").isdigit():
                other = copy.deepcopy(node)
                other.keywords[index].value = ast.Constant(0 if int(text) else -1)
                yield "wrong axis", other
        if keyword.arg in ("group", "op"):
            other = copy.deepcopy(node)
            del other.keywords[index]
            yield "wrong group" if keyword.arg == "group" else "missing reduction", other
    if (
        isinstance(node.func, ast.Attribute)
        and node.func.attr in REDUCTIONS
        and len(node.args) == 1
        and not node.keywords
    ):
        yield "missing reduction", node.args[0]
    if isinstance(node.func, ast.Name) and node.func.id in ("min", "max") and len(node.args) == 2:
        yield "dropped term", node.args[0]
        yield "dropped term", node.args[1]
    if isinstance(node.func, ast.Attribute) and node.func.attr in ("clone", "detach", "contiguous") and not node.args:
        yield "stale cache" if node.func.attr == "clone" else "dropped term", node.func.value


def _statement(node: ast.Expr) -> Iterator[tuple[str, ast.AST | str]]:
    """A call for what it does: a message that is not sent, a cache that is not cleared, a step that is not made."""
    call = node.value
    if not isinstance(call, ast.Call):
        return
    name = (
        call.func.attr
        if isinstance(call.func, ast.Attribute)
        else call.func.id
        if isinstance(call.func, ast.Name)
        else ""
    )
    if name in ("print", "warning", "info", "debug", "simplefilter", "filterwarnings"):
        return
    kind = "missing reduction" if name in REDUCTIONS else "stale cache" if "clear" in name else "missing call"
    yield kind, "pass"


def _is_memory(test: ast.AST) -> bool:
    return isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.In | ast.NotIn | ast.Is | ast.IsNot)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _line_starts(text: str) -> list[int]:
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    return starts


def _span(node: ast.AST, starts: list[int], text: str) -> tuple[int, int]:
    """Offsets of a node in the text; ast counts columns in bytes of UTF-8."""

    def offset(line: int, column: int) -> int:
        begin = starts[line - 1]
        return begin + len(text[begin : starts[line]].encode()[:column].decode())

    return offset(node.lineno, node.col_offset), offset(node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]
