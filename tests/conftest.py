"""Fixtures of all tests."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers inherit it; two cores are shared by all ranks
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def gloo() -> Iterator:
    """`gloo(world_size, fn, *args)`: run fn(rank, world_size, *args) on every rank; see tests/gloo.py."""
    from gloo import Pool

    pool = Pool()
    yield pool
    pool.close()
