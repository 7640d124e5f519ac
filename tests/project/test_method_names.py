"""A method of the sequence axis is known in its own files and in the registry, nowhere else by its name."""

import ast
from pathlib import Path

import pytest

from lsys.parallel.methods import SOFTMAX, STATE

ROOT = Path(__file__).parents[2]
NAMES = {*SOFTMAX, *STATE}
REGISTRY = "parallel/methods.py"
# "gather" is also an operation of process groups, which these know.
OPERATIONS = {"parallel/traffic.py", "parallel/ledger/hooks.py", "parallel/replay/cost.py"}


def _defaults(tree: ast.AST) -> set[ast.expr]:
    """Defaults of parameters, and what `Field` takes first: a method that is taken if none is named."""
    found: set[ast.expr] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            found |= {each for each in (*node.args.defaults, *node.args.kw_defaults) if each is not None}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Field":
            found |= set(node.args)
    return found


def literals(path: str, text: str) -> list[str]:
    """Places of string constants that are a method's name, outside the method's own files."""
    tree = ast.parse(text)
    allowed = _defaults(tree)
    return [
        f"{path}:{node.lineno} {node.value!r}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in NAMES and node not in allowed
        if node.value != Path(path).stem and not (node.value == "gather" and path in OPERATIONS)
    ]


def test_nobody_decides_by_the_name_of_a_method():
    paths = [path for folder in ("lsys", "parallel", "kernels") for path in (ROOT / folder).rglob("*.py")]
    names = {path.relative_to(ROOT).as_posix(): path for path in paths}
    assert len(names) > 150
    found = [each for name in sorted(names) if name != REGISTRY for each in literals(name, names[name].read_text())]
    assert not found, f"names of methods outside {REGISTRY}: {found}"


@pytest.mark.parametrize(
    ("path", "text", "found"),
    [
        ("lsys/predict/seconds.py", 'ends = {"usp": 1}.get(method, 0)', ["lsys/predict/seconds.py:1 'usp'"]),
        ("parallel/linear/__init__.py", 'x = method == "zeco"', ["parallel/linear/__init__.py:1 'zeco'"]),
        ("parallel/linear/lasp2.py", 'key = "gather"', ["parallel/linear/lasp2.py:1 'gather'"]),
        ("parallel/traffic.py", 'kind == "gather" or kind == "ring"', ["parallel/traffic.py:1 'ring'"]),
        ("parallel/messages/usp.py", 'name = "usp"', []),
        ("parallel/attention/__init__.py", 'def attention(*, method: str = "ring"): ...', []),
        ("lsys/config/schema.py", 'linear: StateMethod = Field("lasp2", description="")', []),
    ],
)
def test_a_planted_name_is_found(path, text, found):
    assert literals(path, text) == found


@pytest.mark.parametrize("method", [*SOFTMAX.values(), *STATE.values()], ids=lambda method: method.run)
def test_what_runs_a_method_is_there(method):
    assert callable(method.function()) and method.summary
    assert all(method.groups([0, 0, 1, 1], heads) for heads in (1, 4, 6))
    assert method.whole == (len(method.groups([0, 0, 1, 1], 8)) == 1)
