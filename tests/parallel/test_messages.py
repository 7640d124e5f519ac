"""The counts without torch equal those that go by the schedules that run."""

from collections import Counter
from typing import Any

import pytest
from support import softmax_traffic, state_traffic
from support.masks import SHARES, mask_of

from lsys.kernels.mask import Mask
from lsys.parallel.layout import SequenceLayout
from lsys.parallel.messages import Placement, attention, linear
from lsys.parallel.messages.attention import Shape
from lsys.parallel.methods import SOFTMAX, STATE

PACKS = [(64,), (20000,), (1, 41, 7, 130, 0, 3, 1, 59, 2), (13, 5, 1, 1, 1, 90), (3, 2, 1)]
KINDS = ("contiguous", "zigzag")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", PACKS)
def test_placement_is_the_layout(kind, lengths):
    for ranks in (1, 2, 3, 4, 7, 16):
        layout, place = getattr(SequenceLayout, kind)(lengths, ranks), Placement.of(kind, lengths, ranks)
        held = layout.sorted()
        assert [*zip(*(x.tolist() for x in (held.rank, held.document, held.begin, held.end)), strict=True)] == [
            *place.parts
        ]
        assert place.sizes == layout.sizes


def sums(traffic, nodes):
    return traffic.received(nodes).sum(-1).tolist()


def counted(phases, ranks):
    totals = []
    for way in phases:
        received: Counter[int] = Counter()
        for phase in way:
            for _, destination, size in phase:
                received[destination] += size
        totals.append([received[rank] for rank in range(ranks)])
    return totals


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 6}, {"window": 1000}, *SHARES])
@pytest.mark.parametrize("method", SOFTMAX)
@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_counted_alike(kind, method, options):
    for lengths in PACKS:
        mask = mask_of(options, len(lengths))
        for ranks in (2, 3, 4, 8, 12):
            layout, place = getattr(SequenceLayout, kind)(lengths, ranks), Placement.of(kind, lengths, ranks)
            settings = [([rank // 2 for rank in range(ranks)], attention.Shape(6, 2, 8))]
            if method == "usp" and ranks in (4, 8):  # nodes that interleave, groups of one rank
                settings.append(([rank % 2 for rank in range(ranks)], attention.Shape(3, 1, 8)))
            for nodes, shape in settings:
                told = softmax_traffic.traffic(method, layout, shape, nodes, mask=mask)
                found = SOFTMAX[method].phases(place, shape, nodes, mask)
                assert counted(found, ranks) == sums(told, nodes), (lengths, ranks)
                assert [len(way) for way in found] == [len(told.forward), len(told.backward)]
                for mine, theirs in zip(
                    (*found.forward, *found.backward), (*told.forward, *told.backward), strict=True
                ):
                    assert sum(size for *_, size in mine) == int(theirs.bytes.sum())


@pytest.mark.parametrize("method", STATE)
@pytest.mark.parametrize("kind", KINDS)
def test_states_are_counted_alike(kind, method):
    shapes: list[Any] = [
        (6, 2, 5, 8, "head"),
        (4, 4, 16, 16, "channel"),
        (6, 3, 5, 7, "token", True),
        (16, 1, 64, 64, "none"),
    ]
    for lengths in PACKS:
        for ranks in (2, 3, 4, 8):
            layout, place = getattr(SequenceLayout, kind)(lengths, ranks), Placement.of(kind, lengths, ranks)
            for shape in shapes:
                told = state_traffic.traffic(method, layout, linear.Shape(*shape))
                found = STATE[method].phases(place, linear.Shape(*shape))
                assert counted(found, ranks) == sums(told, [0] * ranks), (lengths, ranks, shape)
                assert [len(way) for way in found] == [len(told.forward), len(told.backward)]


def test_a_gather_on_nccl_goes_around_the_ring_both_ways() -> None:
    """Two ranks that need all of each other's 8 tokens: keys and values in bf16 come once, and once more backward; their gradients go in fp32."""
    place, shape = Placement.of("contiguous", [16], 2), Shape(heads=1, kv_heads=1, width=2, itemsize=2)
    forward, backward = SOFTMAX["gather"].phases(place, shape, (0, 0), Mask(causal=False), "nccl")
    values = 8 * 2 * 2  # of a rank: tokens x (a key and a value) x width
    assert [sorted(phase) for phase in forward] == [[(0, 1, 2 * values), (1, 0, 2 * values)]]
    assert [sorted(phase) for phase in backward] == [
        [(0, 1, 2 * values), (1, 0, 2 * values)],
        [(0, 1, 4 * values), (1, 0, 4 * values)],
    ]
