"""Why a run cannot start, or cannot go on."""

import contextlib
from collections.abc import Iterator

from lsys.kernels.not_finite import NotFiniteError

REMEDY = "a lower optimizer.lr, a longer optimizer.warmup_steps or a lower optimizer.clip may help, or other data"


class RunError(ValueError):
    """Every rank finds the same (`everywhere`), so it is said once."""

    everywhere = True


class InputError(RunError):
    """A rank's kernel was given a NaN; the other ranks wait for it and do not know."""

    everywhere = False


@contextlib.contextmanager
def step_named(what: str, rank: int) -> Iterator[None]:
    """Inside, a NaN in a kernel's input is an InputError that names `what` is done, such as a step, and the rank."""
    try:
        yield
    except NotFiniteError as error:
        text = f"{what}, rank {rank}: {error}. A layer before it, or a parameter, gave it; no update was made"
        raise InputError(f"{text}. The same command goes on from the newest checkpoint; {REMEDY}") from error
