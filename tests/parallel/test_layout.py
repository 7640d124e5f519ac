import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.layouts import drawn_layouts

from lsys.parallel.layout import Segment, SequenceLayout

LENGTHS = st.lists(st.sampled_from([0, 0, 1, 2, 7, 13, 31]) | st.integers(0, 40), max_size=8)
RANKS = st.integers(1, 9)
UNHURRIED = settings(deadline=None, max_examples=60)  # the machine may be busy: time is no part of the test
MAKERS = [SequenceLayout.contiguous, SequenceLayout.zigzag]


ANY_LAYOUT = RANKS.flatmap(drawn_layouts) | st.builds(
    lambda make, n, p: make(n, p), st.sampled_from(MAKERS), LENGTHS, RANKS
)


@UNHURRIED
@given(ANY_LAYOUT)
def test_every_token_is_held_once_and_known_by_place(layout):
    expected_places = [(d, p) for d, n in enumerate(layout.lengths) for p in range(n)]
    seen = []
    for rank in range(layout.ranks):
        places = [(d, p) for d, start, n in layout.segments[rank] for p in range(start, start + n)]
        assert [*zip(layout.documents(rank).tolist(), layout.positions(rank).tolist(), strict=True)] == places
        assert [expected_places[i] for i in layout.index(rank).tolist()] == places
        assert layout.tokens(rank) == len(places)
        lengths = [segment.length for segment in layout.segments[rank]]
        assert layout.cu_seqlens(rank).tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
        assert all(n > 0 for n in lengths)
        seen += places
    assert sorted(seen) == expected_places
    assert layout.document_offsets.tolist() == [sum(layout.lengths[:i]) for i in range(len(layout.lengths) + 1)]
    for tensor in (layout.index(0), layout.positions(0), layout.documents(0), layout.cu_seqlens(0), layout.order()):
        assert tensor.dtype == torch.int64


@UNHURRIED
@given(ANY_LAYOUT)
def test_unshard_inverts_shard_and_gradients_flow(layout):
    x = torch.randn(layout.total, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)
    parts = [layout.shard(x, rank) for rank in range(layout.ranks)]
    assert [len(part) for part in parts] == list(layout.sizes)
    back = layout.unshard(parts)
    assert torch.equal(back, x)
    (back * weight).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, weight)


@UNHURRIED
@given(ANY_LAYOUT)
def test_equal_placements_are_equal_however_they_are_cut(layout):
    tokens = tuple(
        tuple(Segment(d, p, 1) for d, start, n in rank for p in range(start, start + n)) for rank in layout.segments
    )
    again = SequenceLayout(list(layout.lengths), tokens)
    assert again == layout and hash(again) == hash(layout) and len({again, layout}) == 1
    layout.index(0)
    assert pickle.loads(pickle.dumps(layout)) == layout == copy.deepcopy(layout)


@UNHURRIED
@given(LENGTHS, RANKS, st.sampled_from(MAKERS))
def test_static_layouts_balance_tokens_to_one(lengths, ranks, make):
    sizes = make(lengths, ranks).sizes
    assert len(sizes) == ranks and sum(sizes) == sum(lengths) and max(sizes) - min(sizes) <= 1


@UNHURRIED
@given(LENGTHS, RANKS)
def test_contiguous_is_the_stream_in_rank_order_longer_runs_first(lengths, ranks):
    layout = SequenceLayout.contiguous(lengths, ranks)
    assert layout.order().tolist() == list(range(layout.total))
    assert list(layout.sizes) == sorted(layout.sizes, reverse=True)


@UNHURRIED
@given(LENGTHS, RANKS)
def test_zigzag_gives_each_rank_two_mirrored_chunks(lengths, ranks):
    layout = SequenceLayout.zigzag(lengths, ranks)
    for document, length in enumerate(lengths):
        # Owner of each position, runs collapsed: up the ranks, then down.
        owner = [-1] * length
        for rank in range(ranks):
            for d, start, n in layout.segments[rank]:
                if d == document:
                    owner[start : start + n] = [rank] * n
        counts = [owner.count(rank) for rank in range(ranks)]
        assert max(counts) - min(counts) <= 1
        first = [rank for rank in range(ranks) for _ in range((counts[rank] + 1) // 2)]
        second = [rank for rank in reversed(range(ranks)) for _ in range(counts[rank] // 2)]
        assert owner == first + second


@UNHURRIED
@given(LENGTHS, RANKS)
def test_zigzag_equals_its_definition(lengths, ranks):
    """Token by token: which ranks a document's places in the stream count for, then up the ranks and down again."""
    placed: list[list[tuple[int, int, int]]] = [[] for _ in range(ranks)]
    begin = 0
    for document, length in enumerate(lengths):
        quota = [sum(place % ranks == rank for place in range(begin, begin + length)) for rank in range(ranks)]
        up = [rank for rank in range(ranks) for _ in range(quota[rank] - quota[rank] // 2)]
        down = [rank for rank in reversed(range(ranks)) for _ in range(quota[rank] // 2)]
        for position, rank in enumerate(up + down):
            placed[rank].append((document, position, 1))
        begin += length
    assert SequenceLayout.zigzag(lengths, ranks) == SequenceLayout(lengths, placed)


def test_zigzag_matches_the_usual_chunks_where_they_divide():
    layout = SequenceLayout.zigzag([8, 16], 2)
    assert layout.segments[0] == (Segment(0, 0, 2), Segment(0, 6, 2), Segment(1, 0, 4), Segment(1, 12, 4))
    assert layout.segments[1] == (Segment(0, 2, 4), Segment(1, 4, 8))


@UNHURRIED
@given(ANY_LAYOUT)
def test_tables_are_the_segments_as_columns(layout):
    begins = layout.document_offsets.tolist()
    rows = []
    for rank, held in enumerate(layout.segments):
        ends = layout.cu_seqlens(rank).tolist()
        mine = [(rank, *segment, begins[segment.document] + segment.start, ends[i]) for i, segment in enumerate(held)]
        in_order = sorted(mine, key=lambda row: row[1:3])
        for table, expected in ((layout.table(rank), mine), (layout.sorted(rank), in_order)):
            assert [*zip(*(column.tolist() for column in table), strict=True)] == expected
            assert table.end.tolist() == [begin + length for _, _, _, length, begin, _ in expected]
        rows += mine
    assert [*zip(*(column.tolist() for column in layout.table()), strict=True)] == rows
    in_order = sorted(rows, key=lambda row: row[1:3])
    assert [*zip(*(column.tolist() for column in layout.sorted()), strict=True)] == in_order


@UNHURRIED
@given(ANY_LAYOUT, st.data())
def test_a_token_dropped_doubled_or_out_of_range_is_named(layout, data):
    places = [(rank, d, p) for rank, held in enumerate(layout.segments) for d, s, n in held for p in range(s, s + n)]
    if not places:
        return
    at = data.draw(st.integers(0, len(places) - 1))
    _, document, position = places[at]
    other, where = data.draw(st.integers(0, layout.ranks - 1)), data.draw(st.integers(0, len(places)))
    outside = (other, document, layout.lengths[document] + data.draw(st.integers(0, 3)))
    cases = {
        f"token {position} of document {document} is held by no rank": places[:at] + places[at + 1 :],
        f"token {position} of document {document} is held twice": [
            *places[:where],
            (other, document, position),
            *places[where:],
        ],
        r"is outside its document; lengths are \(": places[:at] + [outside] + places[at + 1 :],
    }
    for message, wrong in cases.items():
        placed = [[(d, p, 1) for rank, d, p in wrong if rank == holder] for holder in range(layout.ranks)]
        with pytest.raises(ValueError, match=message):
            SequenceLayout(layout.lengths, placed)


@UNHURRIED
@given(ANY_LAYOUT, st.randoms(use_true_random=False))
def test_pooled_ranks_hold_the_tokens_of_their_group_in_order(layout, random):
    ranks = random.sample(range(layout.ranks), layout.ranks)
    groups: list[list[int]] = []
    while ranks:
        size = random.randint(1, len(ranks))
        groups, ranks = [*groups, sorted(ranks[:size])], ranks[size:]
    pooled = layout.pooled(groups)
    placed = [sorted(segment for rank in group for segment in layout.segments[rank]) for group in groups]
    assert pooled == SequenceLayout(layout.lengths, placed)
    assert layout.pooled(tuple(map(tuple, groups))) is pooled


@pytest.mark.parametrize("make", MAKERS)
def test_very_many_documents(make):
    lengths = [(7 * document) % 53 for document in range(10_000)]
    layout = make(lengths, 64)
    assert max(layout.sizes) - min(layout.sizes) <= 1 and sum(layout.sizes) == sum(lengths)
    assert torch.equal(layout.order()[layout.inverse()], torch.arange(layout.total))
    assert pickle.loads(pickle.dumps(layout)) == layout


def test_layouts_do_not_change_and_equal_layouts_only():
    layout = SequenceLayout.contiguous([5, 3], 2)
    with pytest.raises(AttributeError):
        layout.lengths = (8,)  # type: ignore[misc]  # which is the point
    assert layout != SequenceLayout.contiguous([5, 3], 1) and layout != SequenceLayout.contiguous([8], 2)
    assert layout != SequenceLayout([5, 3], layout.segments[::-1]) and layout != layout.segments
    assert repr(layout) == f"SequenceLayout(lengths=(5, 3), segments={layout.segments})"


def test_index_tensors_are_built_once():
    layout = SequenceLayout.zigzag([5, 9], 2)
    assert layout.index(1) is layout.index(1) and layout.order() is layout.order()
    assert layout.index(1, "meta").device.type == "meta"


@pytest.mark.parametrize(
    ("lengths", "segments", "message"),
    [
        ((5,), [[(0, 0, 3)]], "token 3 of document 0 is held by no rank"),
        ((2, 0, 5), [[(0, 0, 2)], [(2, 1, 4)]], "token 0 of document 2 is held by no rank"),
        ((5,), [[(0, 0, 3)], [(0, 2, 3)]], "token 2 of document 0 is held twice"),
        ((5,), [[(0, 0, 5), (0, 0, 5)]], "token 0 of document 0 is held twice"),
        ((5,), [[(0, 0, 2), (0, 3, 2)]], "token 2 of document 0 is held by no rank"),
        ((5,), [[(0, 0, 6)]], "outside its document"),
        ((5,), [[(1, 0, 5)]], "outside its document"),
        ((5,), [[(0, -1, 6)]], "outside its document"),
        ((5, 3), [[(0, 0, 8)]], "outside its document"),
        ((), [[(0, 0, 1)]], "outside its document"),
        ((-1,), [[]], "document 0 has length -1"),
        ((), [], "at least one rank"),
    ],
)
def test_wrong_partitions_are_refused(lengths, segments, message):
    with pytest.raises(ValueError, match=message):
        SequenceLayout(lengths, segments)


def test_wrong_uses_are_refused():
    layout = SequenceLayout.contiguous([5, 4], 2)
    with pytest.raises(ValueError, match="rank 2 is not in this layout; its ranks are 0 to 1"):
        layout.tokens(2)
    with pytest.raises(ValueError, match="T = 9"):
        layout.shard(torch.zeros(8), 0)
    with pytest.raises(ValueError, match="one part for each of 2 ranks; got 1"):
        layout.unshard([torch.zeros(5)])
    with pytest.raises(ValueError, match=r"part 1 has shape \[5\]; the layout and part 0 make it \[4\]"):
        layout.unshard([torch.zeros(5), torch.zeros(5)])
    for make in MAKERS:
        with pytest.raises(ValueError, match="at least one rank; got 0"):
            make([3], 0)
        with pytest.raises(ValueError, match="document 1 has length -3"):
            make([3, -3], 2)
