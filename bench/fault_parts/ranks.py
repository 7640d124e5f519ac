"""Ranks that are there already: workers of the tests' pool, which run many cases each."""

import contextlib
from collections.abc import Iterator
from typing import Any

from gloo import Pool, RankError


@contextlib.contextmanager
def ranks() -> Iterator[Pool]:
    """`pool(world_size, fn, *args)`, as tests have it; the workers end with the block."""
    pool = Pool()
    try:
        yield pool
    finally:
        pool.close()


def everywhere(pool: Pool, world_size: int, fn: Any, *args: Any, timeout: float = 300) -> tuple[list[Any], str]:
    """(what each rank gave, ""), or ([], why a rank failed, died or hung)."""
    try:
        return pool(world_size, fn, *args, timeout=timeout), ""
    except RankError as error:
        return [], str(error)[-3000:]
