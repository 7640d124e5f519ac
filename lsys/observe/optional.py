"""What training can do without: its failure is told, tried again, and ends nothing."""

import contextlib
from collections.abc import Callable
from typing import Any


def reason_of(error: BaseException) -> str:
    """What an error says, with its kind."""
    return f"{type(error).__name__}: {error}"


def say(text: str) -> None:
    """Print a line. One that a full disk or an ended reader does not take costs nothing else."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


class Attempts:
    """Calls of what training can do without.

    Args:
        tell: says a line.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.tell = tell
        self.failing: dict[str, str] = {}  # the reason, by what is done
        self._told: set[tuple[str, str]] = set()

    def __call__(self, what: str, call: Callable[..., object], *args: Any, again: str = "at the next report") -> bool:
        """Whether `call(*args)` went well. Each reason for which it does not is told once, with when it is tried again."""
        try:
            call(*args)
        except Exception as error:  # a full disk, a folder that vanished, no fonts
            reason = reason_of(error)
            self.failing[what] = reason
            if (what, reason) not in self._told:
                self._told.add((what, reason))
                self.tell(f"warning: {what} failed: {reason}; training goes on, and it is tried again {again}")
            return False
        if self.failing.pop(what, None) is not None:
            self.tell(f"{what} does again")
        return True

    def summary(self) -> str:
        """What still fails, in words; empty if nothing does."""
        return "; ".join(f"{what}: {reason}" for what, reason in self.failing.items())
