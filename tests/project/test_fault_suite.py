"""Each kind of fault has a test that make test-fast runs too, and a run of pytest tells how long they take."""

from collections import defaultdict
from pathlib import Path

from support.fault_suite import KINDS, marked, told

TESTS = Path(__file__).parents[1]


def test_each_kind_has_a_test_that_is_not_slow() -> None:
    found: dict[str, list[str]] = defaultdict(list)
    for file in sorted(TESTS.rglob("test_*.py")):
        for name, kinds, is_slow in marked(file):
            assert kinds, f"{name}: of which kind?"
            for kind in kinds:
                found[kind] += [] if is_slow else [name]
    assert {kind for kind, names in found.items() if names} == set(KINDS)


FILE = """
import pytest

@pytest.mark.fault("a", "b")
@pytest.mark.parametrize("x", [1])
def test_one(x): ...

@pytest.mark.slow
@pytest.mark.fault("c")
def test_two(): ...

def test_three(): ...
"""


def test_marks_are_read_from_the_text(tmp_path: Path) -> None:
    file = tmp_path / "test_x.py"
    file.write_text(FILE)
    assert list(marked(file)) == [("test_one", ("a", "b"), False), ("test_two", ("c",), True)]
    file.write_text("pytestmark = pytest.mark.slow\n" + FILE)
    assert [is_slow for _, _, is_slow in marked(file)] == [True, True]


def test_seconds_are_told() -> None:
    assert told({"a": 1.2, "b[c]": 2.0}) == "faults: 2 tests in 3 s"
    assert told({"a": 1.2}) == "faults: 1 test in 1 s" and told({}) == ""
