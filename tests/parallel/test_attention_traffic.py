"""What the methods of attention communicate, when, and what they hold meanwhile."""

import contextlib
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from support.attention import WIDTH, comm_of, tensors
from support.layouts import layouts
from support.masks import SHARES, mask_of
from support.noted import noted
from support.softmax_traffic import traffic
from torch.multiprocessing.reductions import StorageWeakRef

from lsys.parallel.attention import METHODS, executor, softmax_attention
from lsys.parallel.attention.heads import pieces
from lsys.parallel.comm import SequenceComm
from lsys.parallel.layout import SequenceLayout
from lsys.parallel.ledger import NETWORK, NODE
from lsys.parallel.messages import Placement, usp
from lsys.parallel.messages.attention import Shape
from lsys.parallel.messages.choice import choose
from lsys.parallel.messages.heads import shares
from lsys.parallel.replay import Link


class Watch:
    """Numbers received by this rank from others, by dtype; and the calls, in order."""

    def __init__(self, rank):
        self.rank, self.received, self.calls = rank, {}, []

    def count(self, call, dtype, numbers):
        self.calls.append(call)
        self.received[dtype] = self.received.get(dtype, 0) + numbers

    @property
    def bytes(self):
        return sum(dtype.itemsize * numbers for dtype, numbers in self.received.items())

    @contextlib.contextmanager
    def __call__(self):
        self.received, self.calls = {}, []
        points, gathers, exchanges = dist.batch_isend_irecv, dist.all_gather_into_tensor, dist.all_to_all_single

        def batch(operations):
            for operation in operations:
                if operation.op is dist.irecv:
                    self.count("point to point", operation.tensor.dtype, operation.tensor.numel())
            return points(operations)

        def gather(out, x, **options):
            self.count("gather", x.dtype, out.numel() - x.numel())
            return gathers(out, x, **options)

        def exchange(out, x, receive, send, **options):
            row = out.numel() // len(out) if len(out) else 0
            self.count("all to all", x.dtype, (sum(receive) - receive[self.rank]) * row)
            return exchanges(out, x, receive, send, **options)

        changed: dict[str, Any] = {
            "batch_isend_irecv": batch,
            "all_gather_into_tensor": gather,
            "all_to_all_single": exchange,
        }
        with mock.patch.multiple(dist, **changed):
            yield self


def _traffic(rank, world_size, cases, dtype):
    """(forward by dtype, backward by dtype), and the bytes beside those that the cost table says."""
    comm, watch, found = comm_of(rank, world_size), Watch(rank), []
    for layout, options, (heads, kv_heads), method in cases:
        mask = mask_of(options, len(layout.lengths))
        q, k, v, do = (layout.shard(x, rank).requires_grad_() for x in tensors(layout.total, heads, kv_heads, dtype))
        told = traffic(method, layout, Shape(heads, kv_heads, WIDTH, dtype.itemsize), comm.node_of_rank, mask=mask)
        phases: list[dict[torch.dtype, int]] = []
        for sums in told.received(comm.node_of_rank).sum(-1)[:, rank].tolist():
            with watch():
                if not phases:
                    o = softmax_attention(q, k, v, layout, comm, method=method, mask=mask)
                else:
                    o.backward(do)
            assert watch.bytes == sums, (layout, mask, method, heads, kv_heads, len(phases))
            phases.append(watch.received)
        found.append(phases)
    return found


@pytest.mark.parametrize("world_size", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_cost_table_is_exact(gloo, world_size):
    cases = [
        (layout, options, heads, method)
        for lengths in ([0, 1, 7, 13, 0, 23], [64])
        for layout in layouts(lengths, world_size).values()
        for options in ({}, {"causal": False}, {"window": 6}, *SHARES)
        for heads in ((6, 2), (3, 1))
        for method in METHODS
    ]
    gloo(world_size, _traffic, cases, torch.bfloat16)


def test_traffic_of_one_long_document(gloo):
    """Formulas for P ranks of s tokens of one document, in numbers received forward, and then backward."""
    ranks, heads, kv_heads, s = 4, 8, 4, 24
    contiguous, zigzag = SequenceLayout.contiguous([ranks * s], ranks), SequenceLayout.zigzag([ranks * s], ranks)
    cases: list[tuple[SequenceLayout, dict[str, Any], tuple[int, int], str]] = [
        (layout, {}, (heads, kv_heads), method) for layout in (contiguous, zigzag) for method in ("ring", "gather")
    ]
    cases.append((contiguous, {}, (heads, kv_heads), "ulysses"))
    cases.append((contiguous, {"causal": False}, (heads, kv_heads), "gather"))
    by_rank = gloo(ranks, _traffic, cases, torch.bfloat16)
    row, small, wide = 2 * kv_heads * WIDTH, torch.bfloat16, torch.float32

    def received(case, phase, dtype):
        return [found[case][phase].get(dtype, 0) for found in by_rank]

    assert received(0, 0, small) == received(0, 1, small) == [rank * s * row for rank in range(ranks)]
    assert sum(received(0, 1, wide)) == sum(received(0, 0, small))  # a sum for each block, hop by hop and home
    assert sum(received(2, 0, small)) == sum(received(2, 1, wide)) == 0.75 * (ranks - 1) * s * row * ranks
    needed = [s, s, s, 0]  # nobody needs the last rank's
    assert received(1, 0, small) == [sum(needed) * row - own * row for own in needed]
    assert received(1, 1, wide) == [(ranks - 1) * own * row for own in needed]
    full = (ranks - 1) * s * row
    assert received(5, 0, small) == received(5, 1, small) == received(5, 1, wide) == [full] * ranks
    exchanged = (ranks - 1) * s * (2 * heads + 2 * kv_heads) // ranks * WIDTH
    assert received(4, 0, small) == received(4, 1, small) == [exchanged] * ranks


def _silent(rank, world_size):
    """Calls per method for documents that cross no ranks."""
    layout = SequenceLayout([5, 4, 30], [[(0, 0, 5)], [], [(1, 0, 4), (2, 0, 30)]])
    comm, watch, calls = comm_of(rank, world_size), Watch(rank), {}
    for method in METHODS:
        q, k, v, do = (layout.shard(x, rank).requires_grad_() for x in tensors(39, 2, 2, torch.float32))
        with watch():
            softmax_attention(q, k, v, layout, comm, method=method).backward(do)
        calls[method] = len(watch.calls)
    return calls


def test_documents_that_cross_no_ranks_cost_nothing(gloo):
    for calls in gloo(3, _silent):
        assert calls == {"ring": 0, "gather": 0, "usp": 0, "ulysses": 4}


def _blocks_held(rank, world_size):
    """Most blocks of keys and values of others that were alive at once, and copies made to pass one on."""
    comm, copies, most = SequenceComm(None), 0, 0
    exchange = SequenceComm.exchange
    for mask in ({}, {"causal": False}, {"window": 20}):
        for layout in (SequenceLayout.zigzag([64, 7, 100], world_size), SequenceLayout.contiguous([171], world_size)):
            q, k, v, do = (layout.shard(x, rank).requires_grad_() for x in tensors(171, 2, 2, torch.bfloat16))
            blocks: list[StorageWeakRef] = []  # weak references: fp32 are sums

            def watched(self, send, receive):
                nonlocal copies, most
                known = {block.cdata for block in blocks if not block.expired()}
                for x in send.values():
                    storage = x.untyped_storage()
                    is_own = storage.nbytes() == x.nbytes and StorageWeakRef(storage).cdata not in known
                    copies += x.dtype == torch.bfloat16 and len(blocks) > 1 and is_own
                storages = [x.untyped_storage() for x in receive.values() if x.dtype == torch.bfloat16]
                blocks.extend(map(StorageWeakRef, storages))
                most = max(most, sum(not block.expired() for block in blocks))
                return exchange(self, send, receive)

            with mock.patch.object(SequenceComm, "exchange", watched):
                o = softmax_attention(q, k, v, layout, comm, method="ring", **mask)
                assert all(block.expired() for block in blocks)  # none is kept for backward
                blocks.clear()
                o.backward(do)
    return most, copies


def test_no_rank_holds_more_than_two_blocks_of_others(gloo):
    assert gloo(4, _blocks_held) == [(2, 0)] * 4


def _in_order(rank, world_size):
    """The first exchange and the first attention, and the waits: in the order in which they happen."""
    comm, layout, order = SequenceComm(None), SequenceLayout.contiguous([48], world_size), []
    q, k, v, do = (layout.shard(x, rank).requires_grad_() for x in tensors(48, 2, 2, torch.float32))
    exchange, attend, backward = SequenceComm.exchange, executor.kernel.attend, executor.kernel.attend_backward

    def sent(self, send, receive):
        pending = exchange(self, send, receive)
        order.append("send")
        return pending.then(noted(order, "wait", lambda got: got))

    def computed(original):
        return noted(order, "attend", original)

    with (
        mock.patch.object(SequenceComm, "exchange", sent),
        mock.patch.object(executor.kernel, "attend", computed(attend)),
        mock.patch.object(executor.kernel, "attend_backward", computed(backward)),
    ):
        o = softmax_attention(q, k, v, layout, comm, method="ring", causal=False)
        forward = order.copy()
        o.backward(do)
    return forward, order[len(forward) :]


def test_transfers_are_under_way_while_ranks_compute(gloo):
    for forward, backward in gloo(4, _in_order):
        alone = ["send", "attend", "wait"]
        assert forward == [*alone, *alone, *alone, "attend"]
        # In the third step the sums of the first block return while the third block comes. In the last step the last
        # sums return during the other half of the local work.
        both = ["send", "send", "attend", "wait", "wait"]
        assert backward == [*alone, *alone, *both, *alone, *alone]


# ---- shares, groups and the choice


def test_shares_of_heads():
    assert [(s.query, s.key) for s in shares(5, 5, 3)] == [(slice(a, b),) * 2 for a, b in [(0, 2), (2, 4), (4, 5)]]
    assert [s.key for s in shares(8, 2, 4)] == [slice(0, 1), slice(0, 1), slice(1, 2), slice(1, 2)]
    cut = shares(8, 2, 3)  # of groups of four: three of the first; one and two; two of the second
    assert [(s.query, s.key) for s in cut] == [
        (slice(0, 3), slice(0, 1)),
        (slice(3, 6), slice(0, 2)),
        (slice(6, 8), slice(1, 2)),
    ]
    assert pieces(cut[1], 4) == ((slice(0, 1), slice(0, 1)), (slice(1, 3), slice(1, 2)))
    assert pieces(shares(8, 4, 2)[1], 2) == ((slice(0, 4), slice(0, 2)),)
    assert [s.width for s in shares(2, 1, 4)] == [3, 3, 0, 0]
    assert pieces(shares(2, 1, 4)[3], 2) == ()


def test_groups_of_ranks():
    assert usp.groups([0, 0, 1, 1], 8) == ((0, 1), (2, 3))
    assert usp.groups([0, 1, 0, 1], 8) == ((0, 2), (1, 3))
    assert usp.groups([0, 0, 1], 8) == ((0,), (1,), (2,))  # unequally filled: the largest common divisor is 1
    assert usp.groups([0] * 4 + [1] * 2, 8) == ((0, 1), (2, 3), (4, 5))
    assert usp.groups([0] * 4, 6) == ((0, 1), (2, 3))  # six heads do not keep four ranks equally busy
    assert usp.groups([0] * 4, 6, inner=4) == ((0, 1, 2, 3),)
    with pytest.raises(
        ValueError, match=r"groups of 3 ranks do not fill nodes of \[4\] ranks; groups can be of 1, 2, 4"
    ):
        usp.groups([0] * 4, 6, inner=3)


def test_choice_of_a_method():
    nodes = [rank // 8 for rank in range(16)]
    long, short = Placement.of("zigzag", [1 << 17], 16), Placement.of("contiguous", [1000] * 160, 16)
    table = {row.method: row for row in choose(long, Shape(32, 4, 128), nodes)}
    assert [*table] == [*METHODS] and [row.method for row in table.values() if row.chosen] == ["usp"]
    assert table["ring"].same_node > table["usp"].same_node and table["ring"].steps == 16 - 1 + 16 + 1
    assert [row.method for row in choose(short, Shape(32, 4, 128), nodes) if row.chosen] == ["ring"]  # nothing crosses
    assert all(row.seconds == 0 and row.steps == 0 for row in choose(short, Shape(32, 4, 128), nodes)[:2])
    slow = {NODE: Link(1.0, 200e9), NETWORK: Link(1.0, 25e9)}
    assert min(choose(long, Shape(32, 4, 128), nodes, slow), key=lambda row: row.seconds).method == "gather"
    table = {row.method: row for row in choose(long, Shape(2, 2, 128), [0] * 16)}
    assert table["ulysses"].note == "2 heads do not keep 16 ranks equally busy" and not table["ulysses"].chosen
    table = {row.method: row for row in choose(long, Shape(32, 4, 128), [0] * 16)}
    assert table["usp"].note == "here the same as ulysses"
