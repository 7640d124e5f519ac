"""What a symbolic step did: launches, copies, stops and bytes held, by the part of the step in which they came."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

OWN = "/bench/symbolic/"
LIBRARIES = ("/torch/", "/python3")


@dataclass
class Counts:
    """What one part of a step did.

    Attributes:
        launches: kernels by name; Triton's begin with `triton `. messages: operations of process groups by kind.
        copies: from host memory to the device, by kind: pinned; those that stop the stream are pageable, or pinned and waited for.
        stops: of the host, waiting for the device. Both with the lines of code that they come from.
    """

    launches: Counter[str] = field(default_factory=Counter)
    messages: Counter[str] = field(default_factory=Counter)
    copies: Counter[tuple[str, str]] = field(default_factory=Counter)
    stops: Counter[tuple[str, str]] = field(default_factory=Counter)


class Watch:
    """Counts by part; peak of the bytes that tensors on the device hold.

    Attributes:
        parts: by name, such as "forward layer 1 mixer".
        held, peak: bytes, each allocation rounded up as torch's caching allocator does. peak_part: where that is.
    """

    def __init__(self) -> None:
        self.parts: dict[str, Counts] = {}
        self._names = ["elsewhere"]
        self.held = self.peak = 0
        self.peak_part = ""

    @property
    def now(self) -> Counts:
        return self.parts.setdefault(self._names[-1], Counts())

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._names.append(name)
        try:
            yield
        finally:
            self._names.pop()

    def enter(self, name: str) -> None:
        """From now on, as autograd runs from one module into the next."""
        self._names[-1] = name

    def hold(self, size: int) -> None:
        self.held += size
        if self.held > self.peak:
            self.peak, self.peak_part = self.held, self._names[-1]

    def launched(self, name: str) -> None:
        self.now.launches[name] += 1

    def copied(self, kind: str) -> None:
        self.now.copies[kind, where()] += 1

    def stopped(self, what: str) -> None:
        self.now.stops[what, where()] += 1


def where(depth: int = 3) -> str:
    """The lines of code that are being run, the innermost first, without torch's and this folder's."""
    found: list[str] = []
    frame = sys._getframe(1)
    while frame is not None and len(found) < depth:
        name = frame.f_code.co_filename
        if OWN not in name and not any(library in name for library in LIBRARIES if "megatron" not in name):
            found.append(f"{'/'.join(name.split('/')[-3:])}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(found)
