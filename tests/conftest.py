"""Fixtures of all tests."""

import os
from collections.abc import Iterator

import pytest
from gloo import Pool

os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers inherit it; all ranks share the machine's cores


@pytest.fixture(scope="session")
def gloo() -> Iterator[Pool]:
    """`gloo(world_size, fn, *args)`: run fn(rank, world_size, *args) on every rank; see tests/gloo.py."""
    pool = Pool()
    yield pool
    pool.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gloo" in getattr(item, "fixturenames", ()):
            item.add_marker("world")
