"""Fixtures of the kernels' tests."""

from collections.abc import Iterator

import pytest
from support.interpreter import Interpreter, interpreting


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    """`interpreter(fn, *args)`: fn(*args) where Triton interprets its kernels."""
    with interpreting() as run:
        yield run
