from collections import Counter
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.layouts import all_on_last, drawn_layouts, layouts, random_schedule
from support.masks import SHARES, mask_of, sees

from lsys.kernels.mask import Mask
from lsys.parallel.attention import gather, ring
from lsys.parallel.attention.ring_distance import farthest
from lsys.parallel.attention.route import route
from lsys.parallel.layout import SequenceLayout
from lsys.parallel.schedule import Schedule, Step, Transfer, check, parts_of, returns
from lsys.parallel.segments import count, runs

PACKS = [[0, 1, 7, 13, 0, 53], [131], [1, 0, 1], [], [0], [2, 67, 5, 3, 19]]
MASKS: list[dict[str, Any]] = [{}, {"causal": False}, {"window": 1}, {"window": 6}, {"window": 500}, *SHARES]
GENERATORS = [ring.schedule, gather.schedule]


def in_rounds(layout, mask):
    return ring.schedule(layout, mask, rounds=3)


UNHURRIED = settings(deadline=None, max_examples=60, derandomize=True)


def places(parts):
    """(document, position) of each token."""
    table = zip(parts.document.tolist(), parts.start.tolist(), parts.length.tolist(), strict=True)
    return [(document, p) for document, start, n in table for p in range(start, start + n)]


def needed_by(layout, rank, mask):
    """The tokens that some query of the rank sees, token by token: the definition."""
    seen = layout.shard(sees(layout.lengths, mask), rank).any(0)
    everything = [(d, p) for d, n in enumerate(layout.lengths) for p in range(n)]
    return {everything[place] for place in seen.nonzero().flatten().tolist()}


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("generate", [*GENERATORS, in_rounds, random_schedule])
def test_schedules_are_right(ranks, generate):
    for lengths in PACKS:
        for layout in layouts(lengths, ranks).values():
            for options in MASKS:
                mask = mask_of(options, len(lengths))
                check(generate(layout, mask), layout, mask)


@UNHURRIED
@given(st.integers(1, 6).flatmap(drawn_layouts), st.sampled_from(MASKS))
def test_nothing_goes_further_than_someone_needs_it(layout, options):
    mask = mask_of(options, len(layout.lengths))
    needed = [needed_by(layout, rank, mask) for rank in range(layout.ranks)]
    for generate in GENERATORS:
        check(generate(layout, mask), layout, mask)
    schedule = ring.schedule(layout, mask)
    for number, step in enumerate(schedule.steps):
        following = schedule.steps[number + 1].transfers if number + 1 < len(schedule.steps) else ()
        for transfer in step.transfers:
            passed = {p for t in following if t.source == transfer.destination for p in places(t.parts)}
            assert set(places(transfer.parts)) - passed <= needed[transfer.destination]
    offered = gather.schedule(layout, mask).steps[0].transfers
    everything = {(d, p) for d, n in enumerate(layout.lengths) for p in range(n)}
    own = [{(d, p) for d, start, n in held for p in range(start, start + n)} for held in layout.segments]
    foreign = set().union(*(needed[rank] - own[rank] for rank in range(layout.ranks)))
    # A window's bound cuts a part where the next query of others needs it: nothing before that is sent.
    assert {place for t in offered for place in places(t.parts)} == foreign & everything


@UNHURRIED
@given(st.integers(1, 5).flatmap(drawn_layouts), st.sampled_from(MASKS))
def test_documents_are_planned_a_few_at_a_time_as_at_once(layout, options):
    mask = mask_of(options, len(layout.lengths))

    def sent():
        steps = ring.schedule(layout, mask).steps
        return [[(t.source, t.destination, places(t.parts)) for t in step.transfers] for step in steps]

    with mock.patch.object(ring, "_CHUNK", 1):
        one_by_one = sent()
    assert one_by_one == sent()


@pytest.mark.parametrize("options", SHARES)
def test_documents_that_see_others_are_no_sequences_of_their_own(options):
    """On one device, where documents are whole, too."""
    layout = SequenceLayout.contiguous([4, 3, 5, 2], 1)
    mask = mask_of(options, 4)
    assert route(ring.schedule(layout, mask), layout, 0, mask).whole is None
    for found in attended(layout, 0, mask, ring.schedule):
        assert torch.equal(found, sees(layout.lengths, mask).long())


def test_few_ranks_have_rounds_if_parts_stay_long():
    def rounds(tokens, ranks):
        return sum(1 for step in ring.schedule(SequenceLayout.zigzag([tokens], ranks)).steps if step.local)

    assert [rounds(1 << 18, ranks) for ranks in (1, 2, 3, 4, 8, 16)] == [1, 4, 2, 2, 1, 1]
    assert [rounds(tokens, 2) for tokens in (2000, 8191, 8192, 16384)] == [1, 1, 2, 4]


def test_documents_that_stay_on_one_rank_cost_nothing():
    layout = all_on_last([5, 3, 8], 3)
    apart = SequenceLayout([5, 4, 30], [[(0, 0, 5)], [], [(1, 0, 4)], [(2, 0, 30)]])
    for generate in GENERATORS:
        for each in (layout, apart):
            assert [step.transfers for step in generate(each).steps] == [()]


def received(schedule, ranks):
    """Tokens that each rank receives."""
    total = [0] * ranks
    for step in schedule.steps:
        for transfer in step.transfers:
            total[transfer.destination] += count(transfer.parts)
    return total


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_traffic_of_a_ring(ranks):
    s = 6 * ranks  # tokens of a rank, of one document
    contiguous, zigzag = SequenceLayout.contiguous([ranks * s], ranks), SequenceLayout.zigzag([ranks * s], ranks)
    assert received(ring.schedule(contiguous), ranks) == [rank * s for rank in range(ranks)]
    total = sum(received(ring.schedule(zigzag), ranks))
    assert total == 0.75 * (ranks - 1) * s * ranks
    for layout in (contiguous, zigzag):
        assert received(ring.schedule(layout, Mask(causal=False)), ranks) == [(ranks - 1) * s] * ranks
    window = received(ring.schedule(contiguous, Mask(window=5)), ranks)
    assert window == [0] + [4] * (ranks - 1)
    # Upwards, what a lower rank needs goes all the way round.
    mirrored = SequenceLayout([ranks * s], contiguous.segments[::-1])
    assert received(ring.schedule(mirrored), ranks) == [(ranks - 1 - rank) * s for rank in range(ranks)]


@UNHURRIED
@given(st.integers(1, 5).flatmap(drawn_layouts), st.sampled_from(MASKS))
def test_each_sum_that_was_begun_reaches_the_owner_once(layout, options):
    mask = mask_of(options, len(layout.lengths))
    for schedule in (ring.schedule(layout, mask), in_rounds(layout, mask), random_schedule(layout)):
        home = []
        held: dict[int, Any] = {rank: {} for rank in range(layout.ranks)}  # token and the ranks that added to its sum
        for number, entry in enumerate(returns(schedule)):
            sums = {rank: {p: {rank} for p in places(parts)} for rank, parts in schedule.received(number).items()}
            for transfer in entry:
                source, destination, parts = transfer.source, transfer.destination, transfer.parts
                owned = dict(zip(places(parts), parts.rank.repeat_interleave(parts.length).tolist(), strict=True))
                for place in places(parts):
                    contributed = held[source].pop(place)
                    if owned[place] == destination:
                        home += [(place, rank) for rank in contributed]
                    else:
                        sums[destination][place] |= contributed
            assert not any(held.values())
            held = {rank: sums.get(rank, {}) for rank in range(layout.ranks)}
        got = [(place, t.destination) for step in schedule.steps for t in step.transfers for place in places(t.parts)]
        assert sorted(home) == sorted(got)


LAYOUT = SequenceLayout([12, 3], [[(0, 0, 4)], [(0, 4, 4), (1, 0, 3)], [(0, 8, 4)]])


def changed(schedule, step, transfers):
    """The schedule with other transfers in one step."""
    steps = list(schedule.steps)
    steps[step] = steps[step]._replace(transfers=tuple(transfers))
    return Schedule(schedule.ranks, tuple(steps))


def rows(*segments):
    return parts_of(LAYOUT, segments)


def test_broken_schedules_are_refused():
    good = ring.schedule(LAYOUT)
    check(good, LAYOUT)
    sent = good.steps[0].transfers
    assert [(t.source, t.destination) for t in sent] == [(0, 1), (1, 2)]
    again = [*sent, Transfer(0, 2, rows((0, 3, 1)))]
    passed_on = [*good.steps[1].transfers, Transfer(0, 1, rows((0, 1, 2)))]
    for schedule, message in [
        (changed(good, 0, sent[1:]), r"step 1: rank 1 sends Segment\(document=0, start=0, length=4\), .* not hold"),
        (changed(good, 1, []), "rank 2 works never on token 0 of document 0"),
        (changed(good, 0, [sent[0], Transfer(1, 2, rows((0, 4, 3)))]), "rank 2 works never on token 7 of document 0"),
        (changed(good, 0, again), "rank 2 works twice on token 3 of document 0"),
        (changed(good, 1, passed_on), "rank 1 works twice on token 1 of document 0"),
        (
            changed(good, 0, [*sent, Transfer(2, 0, rows((0, 5, 1)))]),
            "rank 2 sends .* start=5.*, which it does not hold",
        ),
        (changed(good, 0, [*sent, Transfer(2, 1, rows((0, 4, 1)))]), "rank 2 sends rank 1 what that rank owns"),
        (changed(good, 0, [*sent, sent[0]]), "rank 0 sends to rank 1, itself or a second time"),
        (changed(good, 2, sent), "step 2 is the last"),
        (Schedule(3, (good.steps[0]._replace(local=()), *good.steps[1:])), "rank 0 works never on token 0"),
        (Schedule(3, (good.steps[0], good.steps[1]._replace(local=good.steps[0].local), Step())), "works twice"),
        (Schedule(3, (Step(local=good.steps[0].local[::-1]),)), "works on tokens of others as if they were its own"),
        (Schedule(2, good.steps), "over 2 ranks and the layout over 3"),
        (
            changed(good, 0, [sent[0]._replace(block=sent[0].parts._replace(row=sent[0].parts.row + 1))]),
            "another owner",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            check(schedule, LAYOUT)


def test_broken_collectives_are_refused():
    good = gather.schedule(LAYOUT)
    check(good, LAYOUT)
    sent = good.steps[0].transfers
    assert len(sent) == 4  # from ranks 0 and 1 to all others
    unlike = [*sent[:-1], sent[-1]._replace(block=rows((0, 4, 3)), number=None)]
    with pytest.raises(ValueError, match="rank 1 sends not the same to all"):
        check(changed(good, 0, unlike), LAYOUT)
    after = Schedule(3, (good.steps[0], Step((Transfer(1, 2, sent[0].parts),)), Step()))
    with pytest.raises(ValueError, match="rank 1 sends .*, which it does not hold"):
        check(after, LAYOUT)


def test_parts_lie_inside_one_segment():
    parts = parts_of(LAYOUT, [(1, 1, 2), (0, 5, 3)])
    assert (parts.rank.tolist(), parts.row.tolist(), parts.begin.tolist()) == ([1, 1], [5, 1], [13, 5])
    with pytest.raises(ValueError, match=r"Segment\(document=0, start=3, length=2\) is not inside a segment of a rank"):
        parts_of(LAYOUT, [(1, 0, 1), (0, 3, 2)])


def test_fully_visible_keys_of_one_segment_are_one_tile():
    layout = SequenceLayout.zigzag([64, 640], 4)
    steps = route(gather.schedule(layout), layout, 2, Mask()).steps
    assert [len(step.remote) for step in steps] == [0, 4, 0]  # an early and a late chunk of two documents
    assert [len(step.local) for step in steps] == [4, 0, 0]  # the late one with the early one before it


def attended(layout, rank, mask, generate):
    """Which of all tokens each of the rank's tokens attends to along its route, how often: [T_r, T]; also backward."""
    schedule, forward, backward = generate(layout, mask), *torch.zeros(2, layout.tokens(rank), layout.total).long()
    found, own = route(schedule, layout, rank, mask), layout.index(rank)
    if found.whole is not None:
        return add(forward, found.whole, own), add(backward, found.whole, own)
    for number, step in enumerate(found.steps):
        hand = schedule.received(number).get(rank, layout.table(rank).take(slice(0)))
        places = runs(hand.begin, hand.length)
        gathered = found.steps[number - 1].gather if number else None
        if gathered:  # rows of the other ranks' tokens, one after the other
            every = [t.parts for t in {t.source: t for t in schedule.steps[number - 1].transfers}.values()]
            places = torch.cat([runs(parts.begin, parts.length) for parts in every])[gathered.kept]
        add(forward, step.local, own)
        add(backward, step.local_backward, own)
        for total in (forward, backward):
            add(total, step.remote, places)
    return forward, backward


def add(total, tiles, places):
    for q, k, first, last in tiles:
        i, j = torch.arange(q.stop - q.start)[:, None], torch.arange(k.stop - k.start)
        sees = torch.ones(len(i), len(j), dtype=torch.bool) if first is None else j >= i + first
        total[q.start + i, places[k]] += sees if last is None else sees & (j <= i + last)
    return total


@UNHURRIED
@given(st.integers(1, 5).flatmap(drawn_layouts), st.sampled_from(MASKS), st.sampled_from([*GENERATORS, in_rounds]))
def test_tiles_are_the_pairs_of_the_definition(layout, options, generate):
    mask = mask_of(options, len(layout.lengths))
    seen = sees(layout.lengths, mask).long()
    for rank in range(layout.ranks):
        for found in attended(layout, rank, mask, generate):
            assert torch.equal(found, layout.shard(seen, rank))


@UNHURRIED
@given(st.integers(1, 100), st.data())
def test_the_farthest_owner_equals_its_definition(ranks, data):
    """Also for more ranks than a word of a set holds."""
    owner = data.draw(st.lists(st.integers(0, ranks - 1), max_size=40))
    ranges = [sorted(data.draw(st.tuples(*[st.integers(0, len(owner))] * 2))) for _ in owner]
    up = [max([(owner[i] - o) % ranks for i in range(*r)], default=0) for o, r in zip(owner, ranges, strict=True)]
    down = [max([(o - owner[i]) % ranks for i in range(*r)], default=0) for o, r in zip(owner, ranges, strict=True)]
    first, stop = torch.tensor(ranges, dtype=torch.int64).reshape(-1, 2).unbind(1)
    found = farthest(torch.tensor(owner, dtype=torch.int64), first, stop, ranks)
    assert [x.tolist() for x in found] == [up, down]


@pytest.mark.parametrize("options", MASKS)
@pytest.mark.parametrize("generate", GENERATORS)
def test_thousands_of_documents_are_planned_as_a_few(generate, options):
    """A pack of copies has the plan of one, so many times: the rows differ, and what sees what of them does not."""
    pack, ranks, copies = [0, 1, 7, 64, 0, 33, 15, 8], 8, 1000  # a multiple of the ranks: each copy is cut alike
    assert sum(pack) % ranks == 0
    once, many = SequenceLayout.zigzag(pack, ranks), SequenceLayout.zigzag(pack * copies, ranks)
    for rank in (0, 3, 7):
        masks = [mask_of(options, len(layout.lengths)) for layout in (once, many)]
        routes = [route(generate(x, mask), x, rank, mask) for x, mask in zip((once, many), masks, strict=True)]
        for small, large in zip(*(found.steps for found in routes), strict=True):
            for name in ("local", "remote"):
                tiles, expected = getattr(large, name), getattr(small, name)
                shapes, wanted = (
                    Counter(zip(*(column.tolist() for column in (x.n, x.m, x.first, x.last)), strict=True))
                    for x in (tiles, expected)
                )
                assert shapes == {shape: copies * number for shape, number in wanted.items()}
            assert large.receives == {other: copies * rows for other, rows in small.receives.items()}
            assert [*large.returning] == [*small.returning] and [*large.returned] == [*small.returned]
