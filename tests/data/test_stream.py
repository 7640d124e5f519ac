"""The document stream: every token once an epoch, no target lost, shares kept, the same from wherever one begins to read."""

import time
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsys.data.stream import DocumentStream, Piece, TokenStream, split_documents

LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any).map(np.array)
# Shares such as 1/3 and 0.1 round: documents of two sources with one key must not change places.
SOURCES = st.lists(st.tuples(LENGTHS, st.sampled_from([0.1, 0.3, 0.7, 1.0, 2.0, 3.0, 5.0])), min_size=1, max_size=4)


def tokens(pieces: list[Piece]) -> list[tuple[int, int, int]]:
    return [(p.source, p.document, p.offset + i) for p in pieces for i in range(p.length)]


def corpus(lengths: list[int], mask: Any = None) -> Any:
    """Documents whose tokens tell where they are: 1000 x document + position."""
    each = [1000 * d + np.arange(n) for d, n in enumerate(lengths)]
    return SimpleNamespace(
        prefix="corpus",
        lengths=np.array(lengths),
        documents=len(lengths),
        mask=mask,
        read=lambda document, start, length: each[document][start : start + length],
    )


@given(SOURCES, st.integers(0, 5), st.integers(0, 500), st.integers(1, 60), st.integers(1, 60))
@settings(max_examples=300, deadline=None)
def test_two_reads_are_one(sources: Any, seed: int, start: int, first: int, second: int) -> None:
    stream = DocumentStream(sources, seed)
    both = tokens(stream.pieces(start, first)) + tokens(stream.pieces(start + first, second))
    whole = stream.pieces(start, first + second)
    assert both == tokens(whole) and len(both) == first + second
    assert (
        tokens(DocumentStream(sources, seed).pieces(start, first + second)) == both
    )  # nothing depends on earlier reads
    assert all(0 < p.length and p.offset + p.length <= sources[p.source][0][p.document] for p in whole)


def test_equal_keys_keep_their_order_wherever_one_begins() -> None:
    stream = DocumentStream([(np.array([1]), weight) for weight in (0.3, 0.3, 0.1)], 0)
    whole = stream.pieces(0, 200)
    assert [piece for start in range(200) for piece in stream.pieces(start, 1)] == whole


@given(LENGTHS, st.integers(0, 3), st.integers(1, 17))
@settings(deadline=None)
def test_an_epoch_holds_every_token_once(lengths: Any, seed: int, step: int) -> None:
    stream = DocumentStream([(lengths, 1.0)], seed)
    size = stream.epoch_tokens
    for epoch in range(3):
        begin = epoch * size
        read = [
            t for s in range(begin, begin + size, step) for t in tokens(stream.pieces(s, min(step, begin + size - s)))
        ]
        assert sorted(read) == [(0, d, i) for d, n in enumerate(lengths) for i in range(n)]


def test_every_epoch_and_seed_has_its_own_order() -> None:
    stream, other = (DocumentStream([(np.full(50, 3), 1.0)], seed) for seed in (0, 1))
    orders = {tuple(p.document for p in s.pieces(150 * epoch, 150)) for s in (stream, other) for epoch in (0, 1, 2)}
    assert len(orders) == 6


@given(SOURCES, st.integers(0, 3))
@settings(deadline=None)
def test_each_source_has_its_share_to_within_documents(sources: Any, seed: int) -> None:
    stream = DocumentStream(sources, seed)
    total = sum(w for _, w in sources)
    longest = sum(max(lengths) for lengths, _ in sources)
    seen: Counter[int] = Counter()
    for at, (source, _, _) in enumerate(tokens(stream.pieces(0, 400)), 1):
        seen[source] += 1
        assert all(abs(seen[i] - at * w / total) <= longest for i, (_, w) in enumerate(sources))


def test_documents_of_a_source_stay_whole_in_the_blend() -> None:
    stream = DocumentStream([(np.array([5, 7, 3]), 1.0), (np.array([4, 9]), 2.0)], 0)
    pieces = stream.pieces(0, 300)
    assert all(p.offset == 0 for p in pieces) and len({p.source for p in pieces}) == 2


def test_far_places_are_found_fast() -> None:
    lengths = np.random.default_rng(0).integers(1, 2000, 100_000)
    stream = DocumentStream([(lengths, 1.0), (lengths[:10], 0.01), (np.array([3, 2]), 1e-4)], 0)
    stream.pieces(0, 10)
    began = time.perf_counter()
    far = stream.pieces(10**13, 1 << 20)
    assert time.perf_counter() - began < 3  # reading up to there would take hours
    assert sum(p.length for p in far) == 1 << 20
    began = time.perf_counter()
    for place in range(20):
        stream.pieces(10**13 + place * 1000, 1000)
    assert time.perf_counter() - began < 3


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_weights_are_positive(weight: float) -> None:
    with pytest.raises(ValueError, match=f"source 1 has weight {weight}; weights are positive"):
        DocumentStream([(np.array([1]), 1.0), (np.array([1]), weight)], 0)


def test_sources_without_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="source 0 has no tokens"):
        DocumentStream([(np.array([0, 0]), 1.0)], 0)
    with pytest.raises(ValueError, match="at least one source"):
        DocumentStream([], 0)


@pytest.mark.parametrize("budget", [1, 7, 64, 1000])
def test_no_target_is_lost(budget: int) -> None:
    lengths = [1, 41, 0, 7, 130, 3, 1, 211, 2]
    stream = TokenStream([corpus(lengths)], [1.0], seed=0, split="train", validation_fraction=0.0)
    assert stream.epoch_tokens == sum(lengths)
    read, predicted = [], []
    for start in range(0, stream.epoch_tokens, budget):
        pack = stream.batch(start, min(budget, stream.epoch_tokens - start))
        assert pack.lengths.sum() == len(pack.tokens) == len(pack.targets) == len(pack.loss_mask)
        assert [p.length for p in pack.pieces] == pack.lengths.tolist()
        places = [1000 * p.document + p.offset + i for p in pack.pieces for i in range(p.length)]
        assert places == pack.tokens.tolist()
        counted = pack.loss_mask == 1
        assert (pack.targets[counted] == pack.tokens[counted] + 1).all() and (pack.targets[~counted] == 0).all()
        read += pack.tokens.tolist()
        predicted += pack.targets[counted].tolist()
    assert sorted(read) == [1000 * d + i for d, n in enumerate(lengths) for i in range(n)]
    assert sorted(predicted) == [1000 * d + i for d, n in enumerate(lengths) for i in range(1, n)]


@pytest.mark.parametrize("budget", [3, 100])
def test_a_mask_is_of_the_target(budget: int) -> None:
    lengths = [5, 1, 8, 3]
    marks = [np.arange(n) % 3 == 1 for n in lengths]  # tokens 1, 4, 7 of a document count
    mask = SimpleNamespace(read=lambda document, start, length: marks[document][start : start + length])
    stream = TokenStream([corpus(lengths, mask)], [1.0], seed=1, split="train", validation_fraction=0.0)
    counted = []
    for start in range(0, stream.epoch_tokens, budget):
        pack = stream.batch(start, min(budget, stream.epoch_tokens - start))
        counted += pack.targets[pack.loss_mask == 1].tolist()
    assert sorted(counted) == [1, 4, 2001, 2004, 2007, 3001]


@given(st.integers(0, 200), st.floats(0, 0.99), st.integers(0, 9))
def test_splits_are_disjoint_and_whole(count: int, fraction: float, seed: int) -> None:
    train, held = split_documents(count, fraction, seed)
    assert sorted([*train, *held]) == list(range(count))
    assert len(held) == 0 if fraction == 0 or count < 2 else 1 <= len(held) < count
    again, _ = split_documents(count, fraction, seed)
    assert train.tolist() == again.tolist() == sorted(train)


def test_splits_of_a_stream_share_no_document() -> None:
    lengths = [3] * 40
    seen = []
    for split in ("train", "validation"):
        stream = TokenStream([corpus(lengths)], [1.0], seed=3, split=split, validation_fraction=0.25)
        seen.append({p.document for p in stream.batch(0, stream.epoch_tokens).pieces})
    assert len(seen[0]) == 30 and len(seen[1]) == 10 and not seen[0] & seen[1]
    with pytest.raises(ValueError, match="neither train nor validation"):
        TokenStream([corpus(lengths)], [1.0], seed=3, split="test", validation_fraction=0.25)
    with pytest.raises(ValueError, match="has no tokens for validation: 1 documents"):
        TokenStream([corpus([3])], [1.0], seed=3, split="validation", validation_fraction=0.25)
