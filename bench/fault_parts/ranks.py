"""Ranks that are there already: workers of the tests' pool, which run many cases each."""

import contextlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
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


def judged(
    drawn: Iterable[tuple[int, dict[str, Any]]],
    worker: Callable[..., dict[str, Any]],
    wrong: Callable[[Path, dict[str, Any], list[dict[str, Any]]], str],
    folder: Path,
) -> list[dict[str, Any]]:
    """The cases, each with `good`, and `text` where it is not.

    Args:
        drawn: how many ranks, and the case, with `changes` of the configuration.
        worker: runs a case on a rank, in a folder of its own. wrong: says what was wrong with how that went on all ranks; "" if nothing.
    """
    cases = []
    with ranks() as pool:
        for number, (count, case) in enumerate(drawn):
            path = folder / f"{number}"
            seen, failure = everywhere(pool, count, worker, path, case)
            text = failure or wrong(path, case, seen)
            shown = {
                key: str(value) if isinstance(value, float) else value
                for key, value in case.items()
                if key != "changes"
            }
            cases.append(shown | {"good": not text} | ({"text": text} if text else {}))
            shutil.rmtree(path, ignore_errors=True)
    return cases
