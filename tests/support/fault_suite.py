"""The tests that plant the faults which runs meet: marked `fault` with the kinds of them, and told together at the end of a run of pytest."""

import ast
from collections.abc import Iterator
from pathlib import Path

KINDS = (
    "kill in a save",
    "flipped bit and kill",
    "flipped bit in memory",
    "damaged checkpoint",
    "stale listing",
    "full disk in a save",
    "NaN gradient at a save step",
    "NaN gradient at the last step",
    "full TensorBoard disk",
    "two runs in a folder",
    "resume at other degrees",
    "resume at other sizes",
    "SIGTERM in validation",
    "SIGTERM twice in a save",
)


def marked(file: Path) -> Iterator[tuple[str, tuple[str, ...], bool]]:
    """(name, kinds, whether all of its cases are slow) of each test of a file that is marked `fault`."""
    tree = ast.parse(file.read_text())
    slow_file = any(
        isinstance(each, ast.Assign) and ast.unparse(each) == "pytestmark = pytest.mark.slow" for each in tree.body
    )
    for function in (each for each in tree.body if isinstance(each, ast.FunctionDef)):
        marks = [(ast.unparse(mark).partition("(")[0], mark) for mark in function.decorator_list]
        is_slow = slow_file or any(name == "pytest.mark.slow" for name, _ in marks)
        for name, mark in marks:
            if name == "pytest.mark.fault":
                arguments = mark.args if isinstance(mark, ast.Call) else []
                yield function.name, tuple(str(ast.literal_eval(kind)) for kind in arguments), is_slow


def told(durations: dict[str, float]) -> str:
    """One sentence: how many tests planted faults, and their seconds together; "" without any.

    Args:
        durations: s, of each of these tests by its name; with its set-up.
    """
    count, seconds = len(durations), sum(durations.values())
    return f"faults: {count} test{'s' * (count != 1)} in {seconds:.0f} s" if count else ""
