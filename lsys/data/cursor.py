"""Where a run stands in its stream of tokens: a pure function of the sizes that its steps had.

Steps of the same sizes are a span. A span reads what the one before it left of the stream, in the stream's order: of its unfinished window the
micro-batches that were not taken, then all that follows. So sizes may change after any step, also within a window, and every token is
read once; a micro-batch then may consist of several intervals of the stream. No rank, thread or step needs another one's plan.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

Interval = tuple[int, int]  # first token of the stream, how many


@dataclass(frozen=True)
class Span:
    """Steps of the same sizes.

    Attributes:
        step: the first of them, from 0. token: how many tokens of the stream had been read before it.
        batch_tokens, micro_batch_tokens: tokens of a step and of a micro-batch.
        shuffle_window: micro-batches are taken in random order within windows of this many, counted from the span's first (0: in order).
    """

    step: int
    token: int
    batch_tokens: int
    micro_batch_tokens: int
    shuffle_window: int = 0

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.batch_tokens, self.micro_batch_tokens, self.shuffle_window

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step, over all replicas."""
        return self.batch_tokens // self.micro_batch_tokens

    def token_at(self, step: int) -> int:
        """Tokens of the stream that were read before a step."""
        return self.token + (step - self.step) * self.batch_tokens

    def place(self, index: int, seed: int) -> int:
        """Which micro-batch of what the span reads is taken as number `index`: each exactly once."""
        if self.shuffle_window < 2:
            return index
        number, place = divmod(index, self.shuffle_window)
        return number * self.shuffle_window + int(self._order(number, seed)[place])

    def window(self, taken: int, seed: int) -> tuple[list[int], int]:
        """(micro-batches of the unfinished window that are not among the first `taken`, ascending; the first one behind it)."""
        if self.shuffle_window < 2 or not taken % self.shuffle_window:
            return [], taken
        number, place = divmod(taken, self.shuffle_window)
        begin = number * self.shuffle_window
        return sorted((begin + self._order(number, seed)[place:]).tolist()), begin + self.shuffle_window

    def _order(self, number: int, seed: int) -> NDArray[np.int64]:
        # That of the first span is what it was before there were spans.
        return _permutation(self.shuffle_window, (seed, 1, number, self.token) if self.token else (seed, 1, number))


@lru_cache(maxsize=8)
def _permutation(count: int, key: tuple[int, ...]) -> NDArray[np.int64]:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key))).permutation(count)


@dataclass(frozen=True)
class Rest:
    """What is left of the stream to read: gaps that were left out, ascending, then all from token `tail` on."""

    gaps: tuple[Interval, ...]
    tail: int

    @cached_property
    def _ends(self) -> list[int]:
        """Tokens of the gaps up to each."""
        return list(accumulate(count for _, count in self.gaps))

    @property
    def in_gaps(self) -> int:
        """Tokens of all gaps."""
        return self._ends[-1] if self.gaps else 0

    def read(self, start: int, count: int) -> list[Interval]:
        """Where tokens [start, start + count) of the rest lie in the stream."""
        found: list[Interval] = []
        for index in range(bisect_right(self._ends, start), len(self.gaps)):
            if not count:
                break
            ahead = self._ends[index] - start  # of this gap
            taken = min(count, ahead)
            found.append((sum(self.gaps[index]) - ahead, taken))
            start, count = start + taken, count - taken
        if count:
            found.append((self.tail + start - self.in_gaps, count))
        return _merged(found)

    def without(self, span: Span, steps: int, seed: int) -> "Rest":
        """What so many steps of a span leave of it."""
        size = span.micro_batch_tokens
        left, behind = span.window(steps * span.micro_batches, seed)
        gaps = [interval for index in left for interval in self.read(index * size, size)]
        if (begin := behind * size) < self.in_gaps:
            gaps += self.read(begin, self.in_gaps - begin)
        return Rest(tuple(_merged(gaps)), self.tail + max(0, begin - self.in_gaps))


def _merged(intervals: Iterable[Interval]) -> list[Interval]:
    """Ascending intervals, those that touch as one."""
    found: list[Interval] = []
    for start, count in intervals:
        if found and sum(found[-1]) == start:
            found[-1] = (found[-1][0], found[-1][1] + count)
        else:
            found.append((start, count))
    return found


@dataclass(frozen=True)
class DataCursor:
    """Which tokens every step reads, and how many were read before it.

    Attributes:
        spans: by step, one at least. seed: of the order within windows.
        before: tokens that the run read of other data, before this one's first.
    """

    spans: tuple[Span, ...]
    seed: int = 0
    before: int = 0

    @classmethod
    def from_tree(cls, tree: Sequence[dict[str, int]], *, step: int, tokens: int, seed: int) -> "DataCursor":
        """The cursor of `tree()`, after `step` steps in which the run read so many tokens in all."""
        cursor = cls(tuple(Span(**span) for span in tree), seed)
        return replace(cursor, before=tokens - cursor.tokens_seen(step))

    def tree(self) -> list[dict[str, Any]]:
        """The spans as JSON values."""
        return [asdict(span) for span in self.spans]

    def tokens_seen(self, step: int) -> int:
        """Tokens that the run read before a step, over all ranks, those of other data included."""
        return self.before + self._span(step)[0].token_at(step)

    def micro_batch(self, step: int, index: int) -> list[Interval]:
        """Where the tokens of a micro-batch of a step lie in the stream. What does not touch is not adjacent, also in one document."""
        span, rest = self._span(step)
        place = span.place((step - span.step) * span.micro_batches + index, self.seed)
        return rest.read(place * span.micro_batch_tokens, span.micro_batch_tokens)

    def micro_batches(self, step: int) -> int:
        """Micro-batches of a step, over all replicas."""
        return self._span(step)[0].micro_batches

    def sizes(self, step: int) -> tuple[int, int, int]:
        """`batch_tokens`, `micro_batch_tokens` and `shuffle_window` of a step."""
        return self._span(step)[0].sizes

    def changed(self, step: int, batch_tokens: int, micro_batch_tokens: int, shuffle_window: int) -> "DataCursor":
        """The cursor of a run whose steps have these sizes from `step` on."""
        span = self._span(step)[0]
        new = Span(step, span.token_at(step), batch_tokens, micro_batch_tokens, shuffle_window)
        if new.sizes == span.sizes:
            return self
        kept = tuple(each for each in self.spans if each.step < step)
        return replace(self, spans=(*kept, new))

    def compact(self, step: int) -> "DataCursor":
        """The same from `step` on, without the spans on which nothing depends any more."""
        ends = [span.step for span in self.spans[1:]] + [step]
        for index in reversed(range(1, len(self.spans))):
            span = self.spans[index]
            taken = (ends[index] - span.step) * span.micro_batches
            finished = taken - taken % max(1, span.shuffle_window)
            if finished * span.micro_batch_tokens >= self._rests[index].in_gaps:
                return replace(self, spans=self.spans[index:])
        return self

    def _span(self, step: int) -> tuple[Span, Rest]:
        index = bisect_right(self.spans, step, key=lambda span: span.step) - 1
        if index < 0:
            raise ValueError(f"step {step} is before the cursor's first, {self.spans[0].step}")
        return self.spans[index], self._rests[index]

    @cached_property
    def _rests(self) -> list[Rest]:
        """What each span reads. Behind its gaps the token of a span is where its reading began, so that the first may stand for all before it."""
        rests = [Rest((), self.spans[0].token)]
        for span, after in zip(self.spans, self.spans[1:], strict=False):
            rests.append(rests[-1].without(span, after.step - span.step, self.seed))
        return rests
