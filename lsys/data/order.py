"""In which order a run reads its stream of tokens, whatever its sizes were and become.

Micro-batches are consecutive tokens of the stream, taken in random order within windows of so many. Where a run goes on with other sizes,
what it has read is no beginning of the stream any more: of the last window some micro-batches are left. So the run's past is kept as
spans, of which each reads what the one before left: first what lies in that window, in the stream's order, then all after it. Two numbers
a span say it all; no list of tokens is stored, and a plan stays a pure function of the spans.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Span:
    """A part of a run in which sizes stayed.

    Attributes:
        first: tokens of the stream that were read before it. micro_batch: tokens. window: micro-batches that change places; below 2: none do.
    """

    first: int
    micro_batch: int
    window: int

    @property
    def shuffles(self) -> bool:
        return self.window > 1


@dataclass(frozen=True)
class Position:
    """Where a run is in its stream.

    Attributes:
        spans: the first one follows on all that was read before it. read: tokens, up to now.
    """

    spans: tuple[Span, ...]
    read: int = 0

    @classmethod
    def at_start(cls, micro_batch: int, window: int) -> "Position":
        return cls((Span(0, micro_batch, window),))

    @property
    def micro_batches(self) -> int:
        """That the last span has read: whole ones."""
        span = self.spans[-1]
        count, rest = divmod(self.read - span.first, span.micro_batch)
        if rest:
            raise ValueError(f"{self.read - span.first} tokens are not whole micro-batches of {span.micro_batch}")
        return count

    def after(self, tokens: int) -> "Position":
        return replace(self, read=self.read + tokens)

    def with_sizes(self, micro_batch: int, window: int, seed: int) -> "Position":
        """The same place, from where on sizes are these. `seed`: of the order."""
        last = self.spans[-1]
        if (last.micro_batch, max(last.window, 1)) == (micro_batch, max(window, 1)):
            return self
        new = Span(self.read, micro_batch, window)
        spans = (*(span for span in self.without_past(seed).spans if span.first < self.read), new)
        # Where a window has ended, or there was none, nothing before the new span was left out.
        return replace(self, spans=spans if Order(spans, seed).holes else (new,))

    def without_past(self, seed: int) -> "Position":
        """The same, without spans whose last window has been read."""
        span, done = self.spans[-1], self.micro_batches
        begun = (
            done // span.window * span.window if span.shuffles else done
        )  # what is read from here on is behind that window
        if begun * span.micro_batch >= Order(self.spans, seed).left:
            return replace(self, spans=(span,))
        return self

    def to_tree(self) -> dict[str, Any]:
        """For JSON."""
        return {"read": self.read, "spans": [[span.first, span.micro_batch, span.window] for span in self.spans]}

    @classmethod
    def from_tree(cls, tree: dict[str, Any]) -> "Position":
        return cls(tuple(Span(*map(int, span)) for span in tree["spans"]), int(tree["read"]))


class Order:
    """The tokens of each micro-batch of the last of some spans.

    Args:
        spans: the first one follows on all that was read before it.
        seed: of the windows' order.

    Attributes:
        holes: [begin, end) of the stream, ascending, that earlier spans left behind; the last span reads them first.
        tail: where it goes on after them.
    """

    def __init__(self, spans: Sequence[Span], seed: int) -> None:
        self.spans, self.seed = tuple(spans), seed
        self.holes: list[tuple[int, int]] = []
        self.tail = spans[0].first
        for span, following in zip(spans, spans[1:], strict=False):
            left, end = _left(span, following.first - span.first, seed)
            holes = [piece for begin, stop in left for piece in self._pieces(begin, stop)]
            if end < self.left:  # the span has not come to the end of what was left to it
                holes += self._pieces(end, self.left)
            else:
                self.tail += end - self.left
            self.holes = _joined(holes)
            if self.holes and self.holes[-1][1] == self.tail:
                self.tail = self.holes.pop()[0]
            del self._sums

    @property
    def left(self) -> int:
        """Tokens in the holes."""
        return int(self._sums[-1])

    @cached_property
    def _sums(self) -> NDArray[np.int64]:
        """Tokens in the holes before each, and in all: int64 [holes + 1]."""
        sizes = [end - begin for begin, end in self.holes]
        return np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))

    def intervals(self, number: int) -> list[tuple[int, int]]:
        """[begin, end) of the stream, ascending, that make micro-batch `number` of the last span."""
        span = self.spans[-1]
        begin = place(span, number, self.seed) * span.micro_batch
        return self._pieces(begin, begin + span.micro_batch)

    def _pieces(self, begin: int, end: int) -> list[tuple[int, int]]:
        """Tokens [begin, end) of what was left, as intervals of the stream."""
        found, left = [], self.left
        index = int(np.searchsorted(self._sums, begin, side="right")) - 1
        while begin < min(end, left):
            hole, at = self.holes[index], begin - int(self._sums[index])
            count = min(hole[1] - hole[0] - at, end - begin)
            found.append((hole[0] + at, hole[0] + at + count))
            begin, index = begin + count, index + 1
        if begin < end:
            found.append((self.tail + begin - left, self.tail + end - left))
        return _joined(found)


def place(span: Span, number: int, seed: int) -> int:
    """Which micro-batch of what a span reads is taken as its number `number`: each exactly once."""
    if not span.shuffles:
        return number
    window, at = divmod(number, span.window)
    return window * span.window + int(_permutation(span, window, seed)[at])


def _permutation(span: Span, window: int, seed: int) -> NDArray[np.int64]:
    key = (seed, 1, window, span.first) if span.first else (seed, 1, window)
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key))).permutation(span.window)


def _left(span: Span, tokens: int, seed: int) -> tuple[list[tuple[int, int]], int]:
    """Intervals of what a span reads that it left in its last window after so many tokens, and where that window ends."""
    done = tokens // span.micro_batch
    if not span.shuffles or done % span.window == 0:
        return [], tokens
    window, at = divmod(done, span.window)
    rest = np.sort(_permutation(span, window, seed)[at:]) + window * span.window
    intervals = [(int(each) * span.micro_batch, int(each + 1) * span.micro_batch) for each in rest]
    return intervals, (window + 1) * span.window * span.micro_batch


def _joined(intervals: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same tokens in as few intervals as there can be: a document that goes on is not cut."""
    found: list[tuple[int, int]] = []
    for begin, end in intervals:
        if found and found[-1][1] == begin:
            found[-1] = (found[-1][0], end)
        else:
            found.append((begin, end))
    return found
