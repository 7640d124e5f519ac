"""Comparisons do not lose a NaN: the helper that tests have for it, and that they use it."""

import ast
import math
from pathlib import Path

import pytest
from support.comparing import largest

TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize("place", range(3))
def test_a_nan_is_the_largest_wherever_it_is(place: int) -> None:
    differences = [1e-9, 2e-9]
    differences.insert(place, math.nan)
    assert math.isnan(largest(differences)) and not largest(differences) < 1.0


def test_the_largest_of_numbers() -> None:
    assert largest([1.0, 3.0, 2.0]) == 3.0 and largest(iter(())) == 0.0 and largest([1.0, math.inf]) == math.inf


def bounded_by_max(tree: ast.AST) -> list[int]:
    """Lines that hold what `max` gives to an upper bound: a NaN that is not the first would pass it."""

    def is_max(node: ast.expr) -> bool:
        return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "max"

    found = []
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.Compare)):
        sides = [node.left, *node.comparators]
        for left, operator, right in zip(sides, node.ops, sides[1:], strict=False):
            below = is_max(left) and isinstance(operator, (ast.Lt, ast.LtE))
            if below or is_max(right) and isinstance(operator, (ast.Gt, ast.GtE)) and isinstance(left, ast.Constant):
                found.append(node.lineno)
    return found


def test_no_test_bounds_what_max_gives() -> None:
    planted = ast.parse(
        "assert max(errors) < 1e-6\nassert 1e-6 >= max(errors.values()) >= 0\nassert largest(e) < 1\nmax(a) > 1"
    )
    assert bounded_by_max(planted) == [1, 2]
    found = {str(path): lines for path in TESTS.rglob("*.py") if (lines := bounded_by_max(ast.parse(path.read_text())))}
    assert found == {}, "take support.comparing.largest"
