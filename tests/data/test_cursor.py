"""Sizes of steps change, within windows and twice within one: every token is read once, and nothing but the spans says which."""

import json
import random
import time
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lsys.data.cursor import DataCursor, Rest, Span
from lsys.data.stream import TokenStream
from lsys.runtime import install_megatron

install_megatron()
from lsys.data.plan import Planner  # noqa: E402  (imports megatron)

CPU = torch.device("cpu")
FIRST = Span(0, 0, 24, 6, 4)


@dataclass(frozen=True)
class Leg:
    """Steps between two resumes, and on how many data replicas and context ranks they run."""

    batch: int
    micro_batch: int
    window: int
    steps: int
    replicas: int = 1
    context: int = 1

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.batch, self.micro_batch, self.window


def drawn(rng: random.Random) -> Leg:
    replicas, context = rng.choice([1, 2, 3]), rng.choice([1, 2, 3])
    micro_batch = rng.randint(context, 13)
    batch = micro_batch * replicas * rng.randint(1, 4)
    return Leg(batch, micro_batch, rng.choice([0, 1, 3, 7, 20, 50]), rng.randint(1, 6), replicas, context)


def resumed(cursor: DataCursor, step: int, leg: Leg) -> DataCursor:
    """As a checkpoint takes it along."""
    tree = json.loads(json.dumps(cursor.compact(step).tree()))
    again = DataCursor.from_tree(tree, step=step, tokens=cursor.tokens_seen(step), seed=cursor.seed)
    return again.changed(step, *leg.sizes)


def read(cursor: DataCursor, step: int) -> list[int]:
    """Tokens of the stream that a step reads."""
    micro_batches = (cursor.micro_batch(step, index) for index in range(cursor.micro_batches(step)))
    return [start + i for intervals in micro_batches for start, count in intervals for i in range(count)]


def by_hand(legs: list[Leg]) -> list[int]:
    """What the legs leave unread of the first tokens of a stream, from a list of them; only the order within a window is not ours."""
    left, token = list(range(20_000)), 0
    for leg in legs:
        count, span = leg.steps * leg.batch // leg.micro_batch, Span(0, token, *leg.sizes)
        parts = [left[i : i + leg.micro_batch] for i in range(0, len(left), leg.micro_batch)]
        taken = {span.place(i, 5) for i in range(count)}
        window = max(1, leg.window)
        assert len(taken) == count and all(each < -(-count // window) * window for each in taken)
        left = [token for i, part in enumerate(parts) if i not in taken for token in part]
        token += leg.steps * leg.batch
    return left


@pytest.mark.parametrize("seed", range(20))
def test_changes_of_sizes_and_degrees_read_every_token_once(seed: int) -> None:
    """Documents and offsets that all ranks hold, over twenty changes, against a list from which what was read is struck."""
    rng = random.Random(seed)
    corpora = [corpus(rng, number) for number in range(2)]
    stream = TokenStream(corpora, [1.0, 2.0], seed=5, split="train", validation_fraction=0.1)
    legs = [drawn(rng)]
    while len(legs) < 21:
        leg = drawn(rng)
        if leg.sizes != legs[-1].sizes:
            legs.append(leg)
    step, cursor = 0, DataCursor((Span(0, 0, *legs[0].sizes),), 5)
    found: list[int] = []
    for leg in legs:
        cursor = resumed(cursor, step, leg)
        planner = Planner(stream, leg.batch, leg.micro_batch, leg.context, cursor=cursor)
        for _ in range(leg.steps):
            for replica in range(leg.replicas):
                for batch in planner.step(step, replica, leg.replicas).micro_batches:
                    ranks = [batch.on_rank(rank, CPU) for rank in range(leg.context)]
                    found += [token for each in ranks for token in each.tokens[: len(each.loss_mask)].tolist()]
            step += 1
    total = sum(leg.steps * leg.batch for leg in legs)
    assert cursor.tokens_seen(step) == total == len(found)
    left = by_hand(legs)
    whole = stream.batch(0, 20_000).tokens.tolist()
    expected = Counter(whole) - Counter(whole[token] for token in left)
    assert Counter(found) == expected
    assert len(cursor.compact(step).spans) <= 8 and left[-1] == 19_999


def corpus(rng: random.Random, number: int) -> Any:
    """Documents whose tokens tell where they are; none is read twice before all are."""
    lengths = [rng.choice([0, 1, 2, 5, 30, 200]) for _ in range(400)]
    each = [10_000_000 * number + 1000 * d + np.arange(n) for d, n in enumerate(lengths)]
    return SimpleNamespace(
        prefix="corpus", lengths=np.array(lengths), documents=len(lengths), mask=None,
        read=lambda document, start, length: each[document][start : start + length],
    )  # fmt: skip


def test_two_changes_within_one_window() -> None:
    """By hand: of the first window's four micro-batches of six tokens one step of two takes two, the next leg one of three tokens."""
    first = DataCursor((Span(0, 0, 12, 6, 4),), 0)
    taken = sorted(read(first, 0))
    left = [token for token in range(24) if token not in taken]
    second = first.changed(1, 3, 3, 0)
    assert read(second, 1) == left[:3]
    third = second.changed(2, 11, 11, 0)
    assert read(third, 2) == [*left[3:], 24, 25] and read(third, 3) == list(range(26, 37))
    assert [span.token for span in third.spans] == [0, 12, 15]
    assert (
        read(third, 0) == read(first, 0) and read(third, 1) == left[:3]
    )  # a plan of any step, from any cursor that has it


def test_sizes_that_stay_change_nothing() -> None:
    cursor = DataCursor((FIRST,), 3)
    assert cursor.changed(7, *FIRST.sizes) is cursor and cursor.compact(7) == cursor
    other = cursor.changed(7, 12, 6, 4)
    assert other.changed(7, *FIRST.sizes).changed(7, 12, 6, 4) == other  # nothing was read in between
    assert len(other.changed(7, *FIRST.sizes).spans) == 2  # whose second begins a window of its own


def test_spans_on_which_nothing_depends_are_dropped() -> None:
    cursor = DataCursor((Span(0, 0, 12, 6, 4),), 1).changed(1, 4, 4, 0)
    assert len(cursor.compact(1).spans) == 2  # twelve tokens of the window are left: three steps
    assert len(cursor.compact(3).spans) == 2 and len(cursor.compact(4).spans) == 1
    for step in range(4, 9):
        assert read(cursor.compact(4), step) == read(cursor, step)
    for change in range(1000):  # as many resumes
        sizes = (4, 4, 0) if change % 2 else (12, 6, 4)
        cursor = resumed(cursor, 10 + 7 * change, Leg(*sizes, 7))
        assert len(cursor.spans) <= 3


def test_a_cursor_counts_tokens_of_other_data_too() -> None:
    cursor = DataCursor.from_tree([vars(Span(10, 0, 24, 6, 4))], step=10, tokens=5000, seed=0)
    assert (
        cursor.tokens_seen(10) == 5000
        and cursor.tokens_seen(12) == 5048
        and sorted(read(cursor, 10)) == list(range(24))
    )
    with pytest.raises(ValueError, match="step 9 is before the cursor's first, 10"):
        cursor.tokens_seen(9)


def test_planning_does_not_take_longer_with_the_steps() -> None:
    def seconds(step: int) -> float:
        began = time.process_time()
        for each in range(50):
            cursor.micro_batch(step + each, 0)
        return time.process_time() - began

    cursor = DataCursor((Span(0, 0, 4096, 64, 8192),)).changed(10**6 + 1, 2048, 64, 8192)
    assert len(read(cursor, 10**6 + 1)) == 2048
    assert seconds(10**15) < 0.5


def test_a_document_is_cut_at_a_gap_and_keeps_its_targets() -> None:
    whole: Any = SimpleNamespace(prefix="c", lengths=np.array([60]), documents=1, mask=None,
                            read=lambda document, start, length: np.arange(start, start + length))  # fmt: skip
    stream = TokenStream([whole], [1.0], seed=0, split="train", validation_fraction=0.0)
    cursor = DataCursor((Span(0, 0, 12, 6, 4),), 2).changed(1, 30, 30, 0)
    rest = [token for token in range(24) if token not in read(cursor, 0)] + list(range(24, 42))
    breaks = sum(after != token + 1 for token, after in zip(rest, rest[1:], strict=False))
    (batch,) = Planner(stream, 30, 30, cursor=cursor).step(1).micro_batches
    assert breaks and len(batch.layout.lengths) == breaks + 1
    assert batch.tokens.tolist() == rest and batch.targets.tolist() == [token + 1 for token in rest]
    assert batch.loss_mask.tolist() == [1.0] * 30
    (limited,) = Planner(stream, 30, 30, cursor=cursor, limit=26).step(1).micro_batches
    assert limited.loss_mask.tolist() == [float(token < 26) for token in rest]


def test_a_rest_reads_over_its_gaps() -> None:
    rest = Rest(((2, 3), (9, 1)), 20)
    assert rest.read(0, 6) == [(2, 3), (9, 1), (20, 2)] and rest.read(4, 2) == [(20, 2)] and rest.read(1, 1) == [(3, 1)]
    assert Rest(((2, 3), (5, 4)), 9).read(1, 20) == [(3, 20)]  # what touches is one
