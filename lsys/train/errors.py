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


class PeerError(RunError):
    """Another rank ended while this one waited for it, and says why itself."""

    everywhere = False
    exit_code = 1


@contextlib.contextmanager
def step_named(what: str, rank: int) -> Iterator[None]:
    """Inside, a NaN in a kernel's input is an InputError that names `what` is done, such as a step, and the rank; for ranks that waited for
    this one, on gloo, it is a PeerError.
    """
    try:
        yield
    except NotFiniteError as error:
        text = f"{what}, rank {rank}: {error}. A layer before it, or a parameter, gave it; no update was made"
        raise InputError(f"{text}. The same command goes on from the newest checkpoint; {REMEDY}") from error
    except RuntimeError as error:
        if "Connection closed by peer" not in str(error):
            raise
        raise PeerError(
            f"{what}, rank {rank}: another rank ended, which this one waited for; see what it says"
        ) from error
