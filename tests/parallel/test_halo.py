from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.comparing import largest
from support.layouts import layouts, random_layout
from support.noted import noted
from torch.utils.checkpoint import checkpoint

from lsys.parallel.comm import Pending, SequenceComm
from lsys.parallel.halo import halo, halo_async, halo_state
from lsys.parallel.layout import SequenceLayout

PACKS = [[0, 1, 7, 13, 0, 23], [31], [1, 0, 1], [], [2, 67, 5, 3, 19]]
REACHES = [0, 1, 3, 50]


def crumbs(lengths, ranks):
    """Single tokens dealt out in turn, last first: the halo of a token lies on all ranks."""
    tokens = [(document, p, 1) for document, n in enumerate(lengths) for p in range(n)][::-1]
    return SequenceLayout(lengths, [tokens[rank::ranks] for rank in range(ranks)])


def all_layouts(lengths, ranks):
    return {**layouts(lengths, ranks), "crumbs": crumbs(lengths, ranks)}


def stream(total, columns=3):
    generator = torch.Generator().manual_seed(total)
    return torch.randn(total, columns, 2, generator=generator, dtype=torch.float64)


def weights(like, rank):
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


# ---- the definition: places in the stream, segment by segment


def spans(layout, rank, k):
    """Of each segment of the rank: places in the stream of its halo, and of its own tokens."""
    for document, start, length in layout.segments[rank]:
        begin = sum(layout.lengths[:document])
        yield [*range(begin + max(0, start - k), begin + start)], [*range(begin + start, begin + start + length)]


def extended(x, layout, rank, k):
    """What `halo` gives."""
    places: list[int] = []
    own: list[int] = []
    bounds = [0]
    for before, mine in spans(layout, rank, k):
        own += range(len(places) + len(before), len(places) + len(before) + len(mine))
        places += before + mine
        bounds.append(len(places))
    return x[places], bounds, own


def states(x, layout, rank, k):
    """What `halo_state` gives."""
    padded = torch.cat([x, x.new_zeros(1, *x.shape[1:])])
    places = [[len(x)] * (k - len(before)) + before for before, _ in spans(layout, rank, k)]
    return padded[torch.tensor(places, dtype=torch.int64).view(len(places), k)]


def traffic(layout, k):
    """Places in the stream that travel, by source and destination."""
    held = [{place for _, mine in spans(layout, rank, 0) for place in mine} for rank in range(layout.ranks)]
    needed = [{place for before, _ in spans(layout, rank, k) for place in before} for rank in range(layout.ranks)]
    pairs = [(s, d) for s in range(layout.ranks) for d in range(layout.ranks) if s != d]
    return {(s, d): needed[d] & held[s] for s, d in pairs if needed[d] & held[s]}


def loss_of_all(x, layout, k):
    total = x.sum() * 0
    for rank in range(layout.ranks):
        rows, *_ = extended(x, layout, rank, k)
        state = states(x, layout, rank, k)
        total = total + (rows * weights(rows, rank)).sum() + (state * weights(state, 100 + rank)).sum()
    return total


# ---- against the definition


def _equals_definition(rank, world_size):
    comm = SequenceComm(None) if world_size > 1 else None
    worst = 0.0
    for lengths in PACKS:
        x = stream(sum(lengths)).requires_grad_()
        for name, layout in all_layouts(lengths, world_size).items():
            for k in REACHES:
                mine = layout.shard(x.detach(), rank).requires_grad_()
                rows, state = halo(mine, layout, comm, k), halo_state(mine, layout, comm, k)
                expected, bounds, own = extended(x, layout, rank, k)
                case = (lengths, name, k)
                assert torch.equal(rows.x, expected) and torch.equal(state, states(x, layout, rank, k)), case
                assert (rows.cu_seqlens.tolist(), rows.own.tolist()) == (bounds, own), case
                loss = (rows.x * weights(rows.x, rank)).sum() + (state * weights(state, 100 + rank)).sum()
                (got,) = torch.autograd.grad(loss, mine)
                (whole,) = torch.autograd.grad(loss_of_all(x, layout, k), x)
                worst = largest([worst, *(got - layout.shard(whole, rank)).abs().flatten().tolist()])
    return worst


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_equals_one_device(gloo, world_size):
    assert largest(gloo(world_size, _equals_definition)) <= 1e-12


class Wire:
    """The comms of all ranks in one process: what is sent lies there until it is fetched."""

    def __init__(self, ranks):
        self.size, self.sent = ranks, {}

    def comm(self, rank):
        comm = mock.Mock(rank=rank, size=self.size)
        calls = [0]  # the transfers of a pair are matched in their order

        def exchange(send, receive):
            number, calls[0] = calls[0], calls[0] + 1
            self.sent |= {(rank, peer, number): rows.clone() for peer, rows in send.items()}

            def finish():
                for peer, buffer in receive.items():
                    buffer.copy_(self.sent.pop((peer, rank, number)))

            return Pending(finish)

        comm.exchange = exchange
        return comm


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.sampled_from([0, 1, 2, 7, 13]) | st.integers(0, 40), max_size=6),
    st.integers(1, 6),
    st.integers(0, 12) | st.just(1000),
    st.integers(0, 2**31),
)
def test_any_layout_and_reach(lengths, ranks, k, seed):
    layout, wire = random_layout(lengths, ranks, seed), Wire(ranks)
    x = stream(sum(lengths)).requires_grad_()
    pending = [halo_async(layout.shard(x, rank), layout, wire.comm(rank), k) for rank in range(ranks)]
    assert {(s, d): len(rows) for (s, d, _), rows in wire.sent.items()} == {
        pair: len(places) for pair, places in traffic(layout, k).items()
    }
    # Whoever waits first finds all rows there: the transfers were started before.
    results = [extension.wait() for extension in pending]
    assert not wire.sent
    loss, expected_loss = x.sum() * 0, x.sum() * 0
    for rank, got in enumerate(results):
        rows, bounds, own = extended(x, layout, rank, k)
        assert torch.equal(got.x, rows) and (got.cu_seqlens.tolist(), got.own.tolist()) == (bounds, own)
        loss = loss + (got.x * weights(rows, rank)).sum()
        expected_loss = expected_loss + (rows * weights(rows, rank)).sum()
    (gradient,) = torch.autograd.grad(loss, x)
    (expected,) = torch.autograd.grad(expected_loss, x)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


# ---- what is built on it


def convolve(x, filters, cu_seqlens):
    """Causal depthwise convolution of each packed sequence: y_t = sum over j of filters[j] * x_{t - j}."""
    width = len(filters)
    parts = [x[:0]]
    for part in x.split(cu_seqlens.diff().tolist()):
        padded = torch.cat([part.new_zeros(width - 1, *part.shape[1:]), part])
        parts.append(sum(filters[j] * padded[width - 1 - j : len(padded) - j] for j in range(width)))
    return torch.cat(parts)


def convolve_from(state, x, filters, cu_seqlens):
    """The same, each sequence after its state [sequences, width - 1, ...]."""
    sequences = zip(state, x.split(cu_seqlens.diff().tolist()), strict=True)
    starts = [torch.cat(pair) for pair in sequences]
    bounds = torch.tensor([0, *(len(start) for start in starts)]).cumsum(0)
    own = [
        index
        for at, start in zip(bounds, starts, strict=False)
        for index in range(at + state.shape[1], at + len(start))
    ]
    return convolve(torch.cat([x[:0], *starts]), filters, bounds)[own]


def shifted(x, cu_seqlens):
    """The token before each, zero before the first."""
    parts = x.split(cu_seqlens.diff().tolist())
    return torch.cat([x[:0], *(torch.cat([torch.zeros_like(part[:1]), part[:-1]]) for part in parts)])


def _mixers(rank, world_size, width):
    """Largest differences from one device: outputs, gradients of the tokens; and the filters' gradient on this rank."""
    comm, differences, filters_gradients = SequenceComm(None) if world_size > 1 else None, [0.0], []
    filters = weights(torch.empty(width, 3, 2), 77).requires_grad_()
    for lengths in PACKS:
        x = stream(sum(lengths)).requires_grad_()
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        wholes = [convolve(x, filters, bounds)] * 2 + [shifted(x, bounds)]
        for layout in all_layouts(lengths, world_size).values():
            mine = layout.shard(x.detach(), rank).requires_grad_()
            c, s = halo(mine, layout, comm, width - 1), halo(mine, layout, comm, 1)
            state = halo_state(mine, layout, comm, width - 1)
            starts = (layout.positions(rank) == 0)[:, None, None]
            outputs = [
                convolve(c.x, filters, c.cu_seqlens)[c.own],
                convolve_from(state, mine, filters, layout.cu_seqlens(rank)),
                torch.where(starts, 0, s.x[s.own - 1]),
            ]
            for y, whole in zip(outputs, wholes, strict=True):
                dy = weights(whole, 5)
                expected = torch.autograd.grad(whole, (x, filters), dy, retain_graph=True, materialize_grads=True)
                got = torch.autograd.grad(y, (mine, filters), layout.shard(dy, rank), materialize_grads=True)
                for ours, theirs in ((y, whole), (got[0], expected[0])):
                    differences += (ours - layout.shard(theirs, rank)).abs().flatten().tolist()
                filters_gradients.append((got[1], expected[1]))
    return largest(differences), filters_gradients


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_convolution_and_token_shift_equal_one_device(gloo, world_size, width):
    differences, gradients = zip(*gloo(world_size, _mixers, width), strict=True)
    assert largest(differences) <= 1e-12
    for case in zip(*gradients, strict=True):
        whole = case[0][1]
        torch.testing.assert_close(sum(part for part, _ in case), whole, rtol=1e-12, atol=1e-12)


# ---- what travels, when, and in which precision


def _traffic(rank, world_size, lengths, k):
    """Elements sent and received by peer, forward and backward, for each layout."""
    comm, log = SequenceComm(None), []
    for layout in all_layouts(lengths, world_size).values():
        x = layout.shard(stream(sum(lengths)), rank).requires_grad_()
        calls = []
        with mock.patch.object(comm, "exchange", wraps=comm.exchange) as exchange:
            rows = halo(x, layout, comm, k).x
            calls.append(exchange.call_args_list.copy())
            rows.sum().backward()
            calls.append(exchange.call_args_list[len(calls[0]) :])
        log.append(
            [
                [[{peer: rows.numel() for peer, rows in side.items()} for side in call.args] for call in way]
                for way in calls
            ]
        )
    return log


@pytest.mark.parametrize("k", REACHES)
@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_only_needed_rows_travel_and_each_once(gloo, world_size, k):
    lengths = PACKS[0]
    logs = gloo(world_size, _traffic, lengths, k)
    for number, layout in enumerate(all_layouts(lengths, world_size).values()):
        elements = {pair: 6 * len(places) for pair, places in traffic(layout, k).items()}
        for rank in range(world_size):
            sent = {d: n for (s, d), n in elements.items() if s == rank}
            received = {s: n for (s, d), n in elements.items() if d == rank}
            quiet = not (sent or received)
            forward, backward = logs[rank][number]
            assert forward == ([] if quiet else [[sent, received]])
            assert backward == ([] if quiet else [[received, sent]])


def _events(rank, world_size):
    """What happens in which order, forward and backward, when something is computed during the transfers."""
    layout, comm, events = SequenceLayout.contiguous([9], world_size), SequenceComm(None), []
    x = layout.shard(stream(9), rank).requires_grad_()
    real = comm.exchange

    def exchange(send, receive):
        events.append("start")
        pending = real(send, receive)
        return Pending(noted(events, "end", pending.wait))

    with mock.patch.object(comm, "exchange", exchange):
        pending = halo_async(x, layout, comm, 2)
        between = x * 2
        between.register_hook(lambda gradient: events.append("between"))
        events.append("between")
        loss = pending.wait().x.sum() + (between * between).sum()
        loss.backward()
    return events


def test_transfers_overlap_what_is_computed_meanwhile_both_ways(gloo):
    assert gloo(2, _events) == [["start", "between", "end"] * 2] * 2


def _narrow(rank, world_size, dtype):
    """Gradient 256 of each row itself and 1 of each copy in a halo: a sum in bfloat16 would stay at 256."""
    lengths, comm = [40], SequenceComm(None) if world_size > 1 else None
    gradients = []
    for layout in (crumbs(lengths, world_size), random_layout(lengths, world_size, 3)):
        x = layout.shard(stream(40), rank).to(dtype).requires_grad_()
        rows = halo(x, layout, comm, 8)
        gradient = torch.ones_like(rows.x).index_fill_(0, rows.own, 256)
        rows.x.backward(gradient)
        copies = torch.zeros(40)
        for peer in range(world_size):
            for before, _ in spans(layout, peer, 8):
                copies[before] += 1
        gradients.append((x.grad, layout.shard(256 + copies, rank)[:, None, None].expand_as(x).to(dtype)))
    return gradients


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("world_size", [1, 3])
def test_gradients_are_summed_in_fp32(gloo, world_size, dtype):
    for gradients in gloo(world_size, _narrow, dtype):
        for got, expected in gradients:
            assert got.dtype == dtype and torch.equal(got, expected)


def _recomputed(rank, world_size):
    """Largest difference of gradients with and without recompute, on ranks that save different tensors."""
    comm, differences = SequenceComm(None), [0.0]
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)

    def block(x, layout, k):
        rows = halo((x * scale).sin(), layout, comm, k).x
        # Backward, odd ranks recompute before the gradients travel; even ranks have no other cause to.
        return rows * scale if rank % 2 else rows + rows

    for lengths in PACKS:
        for layout in all_layouts(lengths, world_size).values():
            results = []
            for run in (block, lambda *args: checkpoint(block, *args, use_reentrant=False)):
                x = layout.shard(stream(sum(lengths)), rank).requires_grad_()
                y = run(x, layout, 3)
                results.append(torch.autograd.grad((y * weights(y, rank)).sum(), (x, scale), allow_unused=True))
            for plain, again in zip(*results, strict=True):
                differences += (plain - again).abs().flatten().tolist()
    return largest(differences)


@pytest.mark.parametrize("world_size", [2, 4])
def test_recompute_changes_nothing(gloo, world_size):
    assert gloo(world_size, _recomputed) == [0.0] * world_size


def test_indices_are_on_the_device_of_the_rows():
    layout, x = crumbs([7, 4], 1), torch.empty(11, 2, device="meta", requires_grad=True)
    rows = halo(x, layout, None, 3)
    assert rows.x.device == rows.own.device == x.device and rows.cu_seqlens.device.type == "cpu"
    (rows.x.sum() + halo_state(x, layout, None, 3).sum()).backward()
    assert x.grad is not None and x.grad.shape == x.shape


# ---- wrong uses


def _mismatched(rank, world_size):
    with pytest.raises(ValueError, match="the layout is over 3 ranks and the comm has 2"):
        halo(torch.zeros(2), SequenceLayout.contiguous([6], 3), SequenceComm(None), 1)


def test_layout_and_comm_must_agree(gloo):
    gloo(2, _mismatched)


@pytest.mark.parametrize(
    ("shape", "ranks", "k", "message"),
    [
        ([6], 1, -1, "k = 0 tokens or more; got k = -1"),
        ([5, 2], 1, 1, r"the layout gives rank 0 6 tokens; got \[5, 2\]"),
        ([], 1, 1, r"the layout gives rank 0 6 tokens; got \[\]"),
        ([6], 2, 1, "over 2 ranks and the comm has 1; comm=None is one rank"),
    ],
)
@pytest.mark.parametrize("function", [halo, halo_state])
def test_wrong_uses_are_refused(function, shape, ranks, k, message):
    with pytest.raises(ValueError, match=message):
        function(torch.zeros(shape), SequenceLayout.contiguous([6], ranks), None, k)
