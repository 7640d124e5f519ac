"""Which states ranks exchange, and in which order these compose."""

import random
from collections import defaultdict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.layouts import drawn_layouts
from support.linear import all_layouts

from lsys.kernels.linear_attention import segments
from lsys.kernels.linear_attention.chunked import SegmentMap
from lsys.parallel.layout import SequenceLayout
from lsys.parallel.linear.chain import block_count, chain_steps
from lsys.parallel.linear.lasp2 import gather_plan
from lsys.parallel.linear.state_exchange_plan import all_runs, external_segments
from lsys.parallel.messages.chain import columns

CPU = torch.device("cpu")


def segments_of(layout, rank, causal=True, initial=False, final=False):
    return external_segments(layout, rank, causal, initial, final, CPU)


def runs_one_by_one(layout, causal):
    """(rank, chain, place, count, length) of each run, chain after chain."""
    owner = {
        (d, p): rank
        for rank, held in enumerate(layout.segments)
        for d, start, n in held
        for p in range(start, start + n)
    }
    found = []
    for way in range(1 if causal else 2):
        for document, length in enumerate(layout.lengths):
            ranks = [owner[document, p] for p in range(length)][:: -1 if way else 1]
            runs: list[Any] = []
            for rank in ranks:
                if not runs or runs[-1][0] != rank:
                    runs.append([rank, 0])
                runs[-1][1] += 1
            chain = document + way * len(layout.lengths)
            found += [(rank, chain, place, len(runs), n) for place, (rank, n) in enumerate(runs)]
    return found


@settings(max_examples=100, deadline=None)
@given(layout=drawn_layouts(4), causal=st.booleans())
def test_runs(layout, causal):
    runs = all_runs(layout, causal)
    assert [*zip(*(column.tolist() for column in runs), strict=True)] == runs_one_by_one(layout, causal)


@settings(max_examples=50, deadline=None)
@given(layout=drawn_layouts(3), causal=st.booleans())
def test_states_compose_as_on_one_rank(layout, causal):
    """The maps of runs, and the states before segments from those before runs: numbers in the place of matrices."""
    every = all_runs(layout, causal)
    a, b = ([[0.5 + (5 * d + p * way) % 4 / 10 for d in range(9) for p in (0, 1)]] for way in (1, 3))
    maps = {}  # of a segment in a direction
    for way in range(1 if causal else 2):
        for held in layout.segments:
            for document, start, length in held:
                maps[way, document, start] = (a[0][(document + start + way) % 9], b[0][(start + length) % 9])
    before = {}
    state: dict[Any, float] = defaultdict(float)
    for way in range(1 if causal else 2):
        held = sorted((s.document, s.start) for r in layout.segments for s in r)
        for document, start in held if way == 0 else held[::-1]:
            before[way, document, start] = state[way, document]
            factor, update = maps[way, document, start]
            state[way, document] = factor * state[way, document] + update
    for rank, held in enumerate(layout.segments):
        its = segments_of(layout, rank, causal)
        places = [
            [(way, *segs[i][:2]) for i in its.segments[way]]
            for way, segs in enumerate((held, held[::-1])[: len(its.segments)])
        ]
        given_maps = [
            SegmentMap(
                torch.tensor([maps[place][0] for place in each], dtype=torch.float64).log().view(-1, 1),
                torch.tensor([maps[place][1] for place in each], dtype=torch.float64).view(-1, 1, 1, 1),
            )
            for each in places
        ]
        composed = its.compose(given_maps)
        # The state before each run, from the segment that it starts with.
        first: dict[int, Any] = {}
        for way, document, start in (place for each in places for place in each):
            number = run_of(every, layout, way, document, start)
            at = first.setdefault(number, (way, document, start))
            first[number] = min(at, (way, document, start)) if way == 0 else max(at, (way, document, start))
        assert sorted(first) == its.numbers.tolist()
        entering = torch.tensor([before[first[n]] for n in sorted(first)], dtype=torch.float64).view(-1, 1, 1, 1)
        for each, found in zip(places, its.states_before(composed, entering), strict=True):
            assert torch.allclose(found.flatten(), torch.tensor([before[place] for place in each], dtype=torch.float64))


def run_of(runs, layout, way, document, start):
    """The number of the run that a segment is in."""
    chain, position = document + way * len(layout.lengths), start if way == 0 else layout.lengths[document] - start - 1
    at = 0
    for number, (c, n) in enumerate(zip(runs.chain.tolist(), runs.length.tolist(), strict=True)):
        if c == chain:
            if at <= position < at + n:
                return number
            at += n
    raise AssertionError


def test_fragments_of_one_rank_are_one_state():
    """Ten thousand segments, none beside the one that it continues."""
    pieces = [(0, p, 1) for p in range(10_000)]
    random.Random(0).shuffle(pieces)
    layout = SequenceLayout([10_010], [[(0, 10_000, 10)], pieces])
    its = segments_of(layout, 1)
    assert len(its.segments[0]) > 9_000 and len(its.numbers) == 1 and gather_plan(layout, its).sizes == (1, 1)
    assert [count.send.keys() for count in chain_steps(layout, its, 1, False)] == [{0}]
    assert all_runs(layout, True).places.tolist() == [2, 2]


def test_nothing_is_composed_where_each_run_is_one_segment():
    for name, layout in all_layouts((0, 7, 1, 23), 4).items():
        for rank in range(4):
            its = segments_of(layout, rank)
            if name in ("contiguous", "idle ranks"):
                assert its.plan is None and its.order is None
            assert its.order is None or name in ("random", "fragments")
    q, k, v = (torch.randn(23, 2, 4) for _ in range(3))
    its = segments_of(SequenceLayout.contiguous([46], 2), 1)
    maps = segments(q, k, v, None, None, [23], its.segments[0]).segment_map()
    composed = its.compose([maps])
    assert composed.update is maps.state and composed.before is None
    state = torch.randn(1, 2, 4, 4)
    assert torch.equal(its.states_before(composed, state)[0], state) and its.states_before(composed, None) == [None]


# ---- chains


@pytest.mark.parametrize(("width", "blocks", "widths"), [(6, 4, [2, 2, 1, 1]), (8, 1, [8]), (3, 3, [1, 1, 1])])
def test_columns(width, blocks, widths):
    cut = columns(width, blocks)
    assert [c.stop - c.start for c in cut] == widths and cut[0].start == 0 and cut[-1].stop == width
    assert all(a.stop == b.start for a, b in zip(cut, cut[1:], strict=False))


def test_block_count():
    long, pair = SequenceLayout.contiguous([6400], 64), SequenceLayout.contiguous([6400], 2)
    assert block_count(long, True, 1 << 20, 128) == 16  # 62 more steps, 1 MiB, 256 KiB: the root of 248
    assert block_count(pair, True, 1 << 20, 128) == 1  # nothing to overlap with
    assert block_count(long, True, 1 << 16, 8) == 4 and block_count(long, True, 1 << 17, 2) == 2
    assert block_count(SequenceLayout([], [()]), True, 256, 8) == 1


def all_steps(layout, causal, blocks, reverse):
    return [chain_steps(layout, segments_of(layout, rank, causal), blocks, reverse) for rank in range(layout.ranks)]


@settings(max_examples=100, deadline=None)
@given(layout=drawn_layouts(4), causal=st.booleans(), blocks=st.integers(1, 4), reverse=st.booleans())
def test_every_state_goes_on_once_and_nobody_waits_in_a_circle(layout, causal, blocks, reverse):
    """Ranks end a step when its other ends have started it, and only then start the next: more than they really wait."""
    steps = [iter(each) for each in all_steps(layout, causal, blocks, reverse)]
    runs, own = all_runs(layout, causal), [segments_of(layout, rank, causal).numbers for rank in range(layout.ranks)]
    sent, awaited = defaultdict(list), defaultdict(list)  # messages by source and destination, as runs and blocks
    ends = runs.places - 1 if reverse else torch.zeros_like(runs.places)
    arrived = {(int(run), block) for run in (runs.place == ends).nonzero() for block in range(blocks)}

    def message(rank, pieces):
        return [(run, piece.block) for piece in pieces for run in own[rank][piece.rows].tolist()]

    def start(rank):
        step = next(steps[rank], None)
        for peer, pieces in step.send.items() if step else ():
            sent[rank, peer].append(message(rank, pieces))
            assert arrived.issuperset(sent[rank, peer][-1])
        for peer, pieces in step.receive.items() if step else ():
            awaited[peer, rank].append(message(rank, pieces))
        return step

    current = {rank: start(rank) for rank in range(layout.ranks)}
    while current := {rank: step for rank, step in current.items() if step is not None}:
        done = [
            rank
            for rank, step in current.items()
            if all(len(awaited[rank, peer]) >= len(sent[rank, peer]) for peer in step.send)
            and all(len(sent[peer, rank]) >= len(awaited[peer, rank]) for peer in step.receive)
        ]
        assert done, "ranks wait for each other"
        for rank in done:
            arrived.update(*(awaited[peer, rank][-1] for peer in current[rank].receive))
            current[rank] = start(rank)
    way = -1 if reverse else 1
    for pair, messages in awaited.items():
        assert [[(run + way, block) for run, block in message] for message in sent[pair]] == messages
    passed = [each for messages in sent.values() for message in messages for each in message]
    assert len(passed) == len(set(passed)) == int((runs.place > 0).sum()) * blocks
    assert all(runs.chain[run] == runs.chain[run + way] for run, _ in passed)


def test_blocks_follow_each_other():
    """Block j of run p goes at step p + j; a rank of a long chain sends one while the next arrives."""
    layout = SequenceLayout.contiguous([40], 4)
    for rank, steps in enumerate(all_steps(layout, True, 3, False)):
        sent = [[p.block for p in step.send.get(rank + 1, ())] for step in steps]
        received = [[p.block for p in step.receive.get(rank - 1, ())] for step in steps]
        if rank == 0:
            assert sent == [[0], [1], [2]]
        elif rank == 3:
            assert received == [[0], [1], [2]]
        else:
            assert received == [[0], [1], [2], []] and sent == [[], [0], [1], [2]]
