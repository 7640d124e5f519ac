"""What the methods of linear attention communicate, and when."""

import contextlib
import math
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from support.linear import (
    HEADS,
    KEY_HEADS,
    VALUE_WIDTH,
    VARIANTS,
    WIDTH,
    Case,
    all_layouts,
    distributed,
    expected,
    inputs,
    largest_error,
)
from support.noted import noted
from support.state_traffic import traffic
from torch.utils.checkpoint import checkpoint

from lsys.kernels.linear_attention.chunked import ChunkedSegments
from lsys.parallel.comm import SequenceComm
from lsys.parallel.layout import SequenceLayout
from lsys.parallel.ledger import NETWORK, NODE, record
from lsys.parallel.linear import METHODS, linear_attention
from lsys.parallel.messages import chain
from lsys.parallel.messages.linear import DECAYS, Shape

NUMBERS = HEADS * WIDTH * VALUE_WIDTH  # of a state
CROSSING = SequenceLayout([5, 4, 30], [[(0, 0, 5)], [(1, 0, 4), (2, 0, 9)], [(2, 9, 21)], []])
APART = SequenceLayout([5, 4, 30], [[(0, 0, 5)], [], [(1, 0, 4)], [(2, 0, 30)]])


def shape_of(variant, itemsize=8):
    *delta, decay = variant.split()
    return Shape(HEADS, KEY_HEADS, WIDTH, VALUE_WIDTH, decay, bool(delta), itemsize)


def small_blocks():
    return mock.patch.object(chain, "LATENCY_BYTES", 64)


def call(layout, comm, variant, method, dtype=torch.float64, **options):
    """The output, whose backward pass is ready to go; and its gradient."""
    tensors = inputs(layout.lengths, variant, dtype)
    local = [layout.shard(x, comm.rank) if x is not None and x.dim() > 1 else x for x in tensors[:5]]
    every: list[Any] = [None if x is None else x.clone().requires_grad_() for x in local]
    q, k, v, log_decay, beta = every
    options = {"log_decay": log_decay, "beta": beta, "method": method, **options}
    return linear_attention(q, k, v, layout, comm, **options)[0], layout.shard(tensors.do, comm.rank)


# ---- bytes


def _received(rank, world_size, cases):
    """Of each case bytes received, forward and backward, by link: as measured, and as the cost table says."""
    nodes, found = [r // 2 for r in range(world_size)], []
    comm = SequenceComm(None, node_of_rank=nodes)
    for layout, variant, method, causal, final, dtype in cases:
        with small_blocks():
            told = traffic(method, layout, shape_of(variant, dtype.itemsize), causal=causal, final=final).received(
                nodes
            )
            with record() as forward:
                o, do = call(layout, comm, variant, method, dtype, causal=causal, output_final_state=final)
            with record() as backward:
                o.backward(do)
        moved = [
            [each.bytes(link=link, direction="received") for link in (NODE, NETWORK)] for each in (forward, backward)
        ]
        found.append((moved, told[:, rank].tolist()))
    return found


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_cost_table_is_exact(gloo, world_size):
    settings = [(variant, method) for method in METHODS for variant in VARIANTS]
    names = ("contiguous", "zigzag", "fragments", "random", "all on last", "idle ranks")
    cases = [
        (
            all_layouts((0, 7, 1, 23), world_size)[names[(i + i // 6) % 6]],
            *pair,
            i % 3 != 0,
            i % 3 == 1,
            (torch.float64, torch.bfloat16, torch.float32)[(i + i // 8) % 3],
        )
        for i, pair in enumerate(settings)
    ]
    for found in gloo(world_size, _received, cases):
        for case, (moved, told) in zip(cases, found, strict=True):
            assert moved == told, case


def test_traffic_of_one_long_document(gloo):
    """Formulas for W ranks of s tokens of one document, in bytes received forward and backward."""
    ranks, s, state, word = 4, 8, NUMBERS * 8, 8
    layout, zigzag = SequenceLayout.contiguous([ranks * s], ranks), SequenceLayout.zigzag([ranks * s], ranks)
    variants = ("none", "head", "token", "channel", "delta head")
    cases = [(layout, variant, "lasp2", True, False, torch.float64) for variant in variants]
    cases += [(layout, "token", method, True, False, torch.float64) for method in ("lasp1", "zeco", "ulysses")]
    cases += [
        (zigzag, "token", "lasp1", True, False, torch.float64),
        (layout, "token", "lasp2", False, False, torch.float64),
    ]
    by_rank = gloo(ranks, _received, cases)
    assert all(moved == told for found in by_rank for moved, told in found)

    def received(case, phase):
        return [sum(found[case][0][phase]) for found in by_rank]

    beside = (0, 0, HEADS, HEADS * WIDTH, HEADS * WIDTH**2)  # a decay fixed per head does not travel
    for case, numbers in enumerate(beside):
        assert received(case, 0) == [(ranks - 1) * (state + numbers * word)] * ranks
        assert received(case, 1) == [(ranks - 1) * state] * ranks
    for case in (5, 6):  # a state each, whatever the number of ranks
        assert received(case, 0) == [0, state, state, state] and received(case, 1) == [state, state, state, 0]
    row = (2 * WIDTH + VALUE_WIDTH + 1) * word  # four heads on four ranks: of each q and k, v and decay of one head
    assert received(7, 0) == [(ranks - 1) * s * (row + VALUE_WIDTH * word)] * ranks == received(7, 1)
    # Chunks 0 1 2 3 3 2 1 0 of the document: two states to each rank but for the start and the middle.
    assert received(8, 0) == [state, 2 * state, 2 * state, state]
    assert received(9, 0) == [2 * (ranks - 1) * (state + HEADS * word)] * ranks  # both directions


def test_steps():
    """Phases that follow one another, of one document over W ranks."""
    for ranks in (2, 3, 16):
        layout, shape = SequenceLayout.contiguous([64 * ranks], ranks), Shape(16, 16, 128, 128)
        steps = {method: len(traffic(method, layout, shape).forward) for method in METHODS}
        blocks = chain.block_count(ranks, shape.state, 128)
        assert steps == {"lasp1": ranks - 1, "lasp2": 1, "zeco": ranks - 2 + blocks, "ulysses": 2}
        assert blocks == max(1, round(math.sqrt((ranks - 2) * 16 * 128 * 128 * 4 / 2**18)))
        zigzag = SequenceLayout.zigzag([64 * ranks], ranks)
        assert len(traffic("lasp1", zigzag, shape).backward) == 2 * ranks - 2
        both = traffic("lasp1", zigzag, shape, causal=False)  # at the same time
        assert len(both.forward) == 2 * ranks - 2
    assert traffic("lasp1", APART, Shape(2, 2, 8, 8)).forward == ()


# ---- calls


def _calls(rank, world_size, layout, method, options):
    comm = SequenceComm(None)
    with record() as forward:
        o, do = call(layout, comm, "token", method, **options)
    with record() as backward:
        o.backward(do)
    kinds = ("all_gather", "reduce_scatter", "all_to_all", "send", "recv")
    return [{op: n for op in kinds if (n := ledger.calls(op=op))} for ledger in (forward, backward)]


def test_one_collective_each_way_and_none_without_need(gloo):
    deep = SequenceLayout([64], [[(0, p, 1) for p in range(r, 64, 4)] for r in range(4)])
    once = [[{"all_gather": 1}] * 2] * 4
    for layout in (CROSSING, deep):
        assert gloo(4, _calls, layout, "lasp2", {}) == once
        assert gloo(4, _calls, layout, "lasp2", {"causal": False}) == once
        assert gloo(4, _calls, layout, "lasp2", {"output_final_state": True}) == once
        assert gloo(4, _calls, layout, "ulysses", {}) == [[{"all_to_all": 2}] * 2] * 4
    for method in ("lasp1", "zeco"):
        assert gloo(4, _calls, CROSSING, method, {}) == [
            [{}, {}],
            [{"send": 1}, {"recv": 1}],
            [{"recv": 1}, {"send": 1}],
            [{}, {}],
        ]
    for method in METHODS[:3]:
        assert gloo(4, _calls, APART, method, {}) == gloo(4, _calls, APART, method, {"causal": False}) == [[{}, {}]] * 4
    assert gloo(4, _calls, APART, "lasp2", {"output_final_state": True}) == once


def _one_message(rank, world_size):
    """Calls for a hundred documents that go the same way."""
    layout = SequenceLayout([2] * 100, [[(d, r, 1) for d in range(100)] for r in range(2)])
    return _calls(rank, world_size, layout, "lasp1", {})


def test_documents_that_go_the_same_way_travel_together(gloo):
    assert gloo(2, _one_message) == [[{"send": 1}, {"recv": 1}], [{"recv": 1}, {"send": 1}]]


# ---- overlap


def _in_order(rank, world_size, method):
    """Starts and ends of transfers, and what tokens get from their own chunks, in the order in which they happen."""
    comm, layout, order = SequenceComm(None), SequenceLayout.contiguous([48], world_size), []

    def watched(name):
        original = getattr(SequenceComm, name)

        def start(self, *args, **options):
            pending = original(self, *args, **options)
            order.append("start")
            return pending.then(noted(order, "end", lambda got: got))

        return mock.patch.object(SequenceComm, name, start)

    intra = ChunkedSegments.intra

    class Mark(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            order.append("intra")
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            order.append("intra")
            return grad

    with contextlib.ExitStack() as stack:
        for name in ("exchange", "all_gather_async"):
            stack.enter_context(watched(name))
        stack.enter_context(mock.patch.object(ChunkedSegments, "intra", lambda self: Mark.apply(intra(self))))
        o, do = call(layout, comm, "token", method)
        forward = order.copy()
        order.clear()
        o.backward(do)
    return forward, order


def test_states_travel_while_ranks_compute(gloo):
    around = ["start", "intra", "end"]
    assert gloo(3, _in_order, "lasp2") == [(around, around)] * 3
    first, middle, last = gloo(3, _in_order, "lasp1")
    both = ["start", "intra", "end", "start", "end"]  # receive, compute, pass on
    assert first == last == (around, around) and middle == (both, both)


# ---- recomputation


def _checkpointed(rank, world_size, variant, method, flags):
    """Gradients of a layer; and of two that are recomputed, without and with re-entrance."""
    comm, tensors = SequenceComm(None), inputs(CROSSING.lengths, variant)
    local = [CROSSING.shard(x, rank) if x is not None and x.dim() > 1 else x for x in tensors[:5]]
    do, leaves = CROSSING.shard(tensors.do, rank), [None if x is None else x.clone().requires_grad_() for x in local]
    causal, final = flags

    def mix(q, k, v, log_decay, beta):
        options = dict(log_decay=log_decay, beta=beta, method=method, causal=causal, output_final_state=final)
        o, after = linear_attention(q, k, v, CROSSING, comm, **options)
        return o if after is None else o + after.sum() / 100

    given, recomputed = [x for x in leaves if x is not None], []
    with small_blocks():
        plain = torch.autograd.grad(mix(*leaves), given, do)
        for reentrant in (False, True):
            for x in given:
                x.grad = None
            # Two layers: the one's backward exchange is followed by the other's recomputation.
            for _ in range(2):
                checkpoint(mix, *leaves, use_reentrant=reentrant).backward(do)
            recomputed.append([x.grad for x in given])
    return plain, recomputed


@pytest.mark.parametrize("method", METHODS)
def test_recomputation_keeps_communication_in_order(gloo, method):
    for variant, flags in (("head", (True, True)), ("token", (False, False)), ("delta channel", (True, False))):
        for plain, recomputed in gloo(4, _checkpointed, variant, method, flags):
            for found in recomputed:
                assert all(torch.equal(x, 2 * y) for x, y in zip(found, plain, strict=True)), variant


def _partly_frozen(rank, world_size, method):
    """Calls of the backward pass if only queries are trained, so that gradients of states have nowhere to go.

    And, as nothing must be left under way, the errors of what follows.
    """
    comm, tensors = SequenceComm(None), inputs(CROSSING.lengths, "head")
    q, k, v, do = (CROSSING.shard(x, rank) for x in (*tensors[:3], tensors.do))
    with record() as ledger:
        o, _ = linear_attention(q.requires_grad_(), k, v, CROSSING, comm, method=method)
        forward = ledger.calls()
        o.backward(do)
        backward = ledger.calls() - forward
    case = Case(method, "head", CROSSING.lengths, "contiguous")
    layout = all_layouts(case.lengths, world_size)[case.layout]
    errors = largest_error(distributed(case, comm, world_size), expected(case), layout, rank)
    with torch.no_grad():
        again, _ = linear_attention(q, k, v, CROSSING, comm, method=method)
    return backward, {**errors, "again": float((again - o).abs().sum())}


@pytest.mark.parametrize("method", METHODS)
def test_gradients_that_nobody_wants_do_not_travel(gloo, method):
    for calls, errors in gloo(4, _partly_frozen, method):
        assert calls == 0 or method == "ulysses"
        assert {name: error for name, error in errors.items() if not error < 1e-10} == {}


def _queries_alone(rank, world_size, method):
    """Gradients of queries, asked for alone and among those of all that is trained; twice, as what starts must end."""
    comm, tensors = SequenceComm(None), inputs(CROSSING.lengths, "token")
    assert tensors.log_decay is not None
    *shards, do = (CROSSING.shard(x, rank) for x in (*tensors[:3], tensors.log_decay, tensors.do))
    q, k, v, g = leaves = [x.clone().requires_grad_() for x in shards]
    found = []
    for _ in range(2):
        o, _ = linear_attention(q, k, v, CROSSING, comm, log_decay=g, method=method)
        (alone,) = torch.autograd.grad(o, leaves[:1], do, retain_graph=True)
        among, *_ = torch.autograd.grad(o, leaves, do)
        found.append((alone, among))
    return found


@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_queries_alone(gloo, method):
    for found in gloo(4, _queries_alone, method):
        assert all(torch.equal(alone, among) for alone, among in found)


def test_wrong_shapes_of_layers_are_refused():
    with pytest.raises(ValueError, match=f"decay 'slow' is not one of: {', '.join(DECAYS)}"):
        Shape(2, 2, 8, 8, "slow")
    assert dist.is_available()
