from unittest import mock

import pytest
import torch
import torch.distributed as dist
from support.layouts import layouts
from torch.utils.checkpoint import checkpoint

from lsys.kernels.linear_attention.chunked import ChunkedSegments
from lsys.parallel.comm import SequenceComm
from lsys.parallel.layout import SequenceLayout
from lsys.parallel.linear import linear_attention

PACKS = [[0, 1, 7, 13, 0, 53], [131], [1, 0, 1], [], [0], [2, 167, 5, 3, 19]]
DECAYS = ["none", "head", "token"]
# Largest difference from one device, relative to 1 + its magnitude; that of half precision is rounding of inputs.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 4e-2}
HEADS, KEY_HEADS, WIDTH, VALUE_WIDTH = 4, 2, 8, 6


def tensors(lengths, decay, dtype=torch.float64):
    """q, k, v, gradient of o, decay, initial state, gradient of the final state; decays and gradients are gentle."""
    total, generator = sum(lengths), torch.Generator().manual_seed(sum(lengths))

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k = draw(total, KEY_HEADS, WIDTH), draw(total, KEY_HEADS, WIDTH)
    v, do = draw(total, HEADS, VALUE_WIDTH), draw(total, HEADS, VALUE_WIDTH)
    log_decay = {"none": None, "head": -draw(HEADS).abs() * 0.02, "token": -draw(total, HEADS).abs() * 0.02}[decay]
    state, d_state = (draw(len(lengths), HEADS, WIDTH, VALUE_WIDTH) for _ in range(2))
    wide = torch.promote_types(dtype, torch.float32)  # decays and states are kept in fp32 beside half precision
    small, large = [x.to(dtype) for x in (q, k, v, do)], (log_decay, state, d_state)
    return [*small, *(None if x is None else x.to(wide) for x in large)]


def dense(q, k, v, log_decay, state, lengths):
    """All tokens on one device, document by document, each token against all before it: o and final states."""
    outputs, after = [v[:0]], [v.new_zeros(0, HEADS, WIDTH, VALUE_WIDTH)]
    decay = torch.zeros_like(v[..., 0]) if log_decay is None else log_decay.expand(v.shape[:2])
    keyed = (x.repeat_interleave(HEADS // KEY_HEADS, 1) for x in (q, k))
    parts = (x.split(list(lengths)) for x in (*keyed, v, decay))
    for d, (qd, kd, vd, g) in enumerate(zip(*parts, strict=True)):
        b = g.cumsum(0)
        later = torch.ones(len(qd), len(qd)).triu(1).bool()[..., None]
        weight = (b[:, None] - b).masked_fill(later, -torch.inf).exp()
        o = torch.einsum("ihk,jhk,ijh,jhv->ihv", qd, kd, weight, vd)
        s = torch.einsum("jhk,jh,jhv->hkv", kd, (g.sum(0) - b).exp(), vd)
        if state is not None:
            o = o + torch.einsum("ihk,ih,hkv->ihv", qd, b.exp(), state[d])
            s = s + g.sum(0).exp()[:, None, None] * state[d]
        outputs.append(o * WIDTH**-0.5)
        after.append(s[None])
    return torch.cat(outputs), torch.cat(after)


def expected(lengths, decay, initial, final, dtype):
    """Output, final state and gradients of q, k, v, decay and initial state, on one device, in fp64."""
    q, k, v, do, log_decay, state, d_state = (None if x is None else x.double() for x in tensors(lengths, decay, dtype))
    leaves = [q, k, v, log_decay, state if initial else None]
    leaves = [None if x is None else x.requires_grad_() for x in leaves]
    o, after = dense(*leaves, lengths)
    loss = (o * do).sum() + ((after * d_state).sum() if final else 0)
    grads = iter(torch.autograd.grad(loss, [x for x in leaves if x is not None], materialize_grads=True))
    return [o.detach(), after if final else None, *(None if x is None else next(grads) for x in leaves)]


NAMES = ["o", "final state", "dq", "dk", "dv", "d decay", "d initial"]


def distributed(layout, comm, decay, initial, final, dtype, backend="auto"):
    """This rank's share of `expected`, all of it for replicated tensors; each rank weighs the final state alike."""
    rank = 0 if comm is None else comm.rank
    lengths = layout.lengths
    q, k, v, do, log_decay, state, d_state = tensors(lengths, decay, dtype)
    q, k, v, do = (layout.shard(x, rank) for x in (q, k, v, do))
    log_decay = layout.shard(log_decay, rank) if decay == "token" else log_decay
    leaves = [q, k, v, log_decay, state if initial else None]
    leaves = [None if x is None else x.requires_grad_() for x in leaves]
    q, k, v, log_decay, state = leaves
    options = dict(log_decay=log_decay, initial_state=state, output_final_state=final, backend=backend)
    o, after = linear_attention(q, k, v, layout, comm, **options)
    loss = (o * do).sum() + ((after * d_state).sum() / layout.ranks if final else 0)
    grads = iter(torch.autograd.grad(loss, [x for x in leaves if x is not None], materialize_grads=True))
    found = [o.detach(), after, *(None if x is None else next(grads) for x in leaves)]
    replicated = [6] if decay == "token" else [5, 6]
    for i in replicated:
        if found[i] is not None and comm is not None:
            dist.all_reduce(found[i])
    return found


def error(x, y):
    assert x.shape == y.shape
    return max(((x.double() - y).abs() / (1 + y.abs())).flatten().tolist(), default=0)


def _differences(rank, world_size, dtype, cases):
    comm = SequenceComm(None) if world_size > 1 else None
    wrong = {}
    for lengths, decay, initial, final, backend in cases:
        full = expected(lengths, decay, initial, final, dtype)
        for name, layout in layouts(lengths, world_size).items():
            found = distributed(layout, comm, decay, initial, final, dtype, backend)
            for i, (x, y) in enumerate(zip(found, full, strict=True)):
                if y is None:
                    assert x is None
                    continue
                if i in (0, 2, 3, 4) or (i == 5 and decay == "token"):
                    y = layout.shard(y, rank)
                if not error(x, y) < TOLERANCE[dtype]:
                    wrong[f"{NAMES[i]}: {lengths}, {name}, {decay}, {initial=}, {final=}, {backend}"] = error(x, y)
    return wrong


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_equals_one_device(gloo, world_size, dtype):
    flags = [(False, False), (True, False), (False, True), (True, True)]
    cases = [(lengths, decay, *flag, "auto") for lengths in PACKS for decay in DECAYS for flag in flags]
    if dtype != torch.float64:
        cases = [case for case in cases if case[2] == case[3] and sum(case[0])]
    else:
        cases = [case for case in cases if sum(case[0]) > 2 or case[2] and case[3]]
        cases += [(PACKS[0], decay, True, True, "reference") for decay in DECAYS]
    assert gloo(world_size, _differences, dtype, cases) == [{}] * world_size


def _without_carry(rank, world_size, decay):
    """By layout: how much of this rank's output its incoming states are, and the error that their loss makes."""
    comm, lengths = SequenceComm(None), PACKS[1]
    full = expected(lengths, decay, False, False, torch.float64)[0]
    shares = {}
    for name, layout in layouts(lengths, world_size).items():
        if name == "all on last":  # nothing is exchanged
            continue
        apply = ChunkedSegments.apply
        with mock.patch.object(ChunkedSegments, "apply", lambda *args, apply=apply: apply(*args[:-1], None)):
            o = distributed(layout, comm, decay, False, False, torch.float64)[0]
        y = layout.shard(full, rank)
        if layout.tokens(rank):
            shares[name] = float((o - y).norm() / y.norm()), error(o, y)
    return shares


@pytest.mark.parametrize("decay", DECAYS)
def test_a_lost_state_is_noticed(gloo, decay):
    results = gloo(3, _without_carry, decay)
    for name in ("contiguous", "zigzag", "random"):
        shares = [result[name] for result in results if name in result]
        # The rank that holds the start alone has nothing coming in.
        assert sum(share >= 0.1 and wrong > 1e-2 for share, wrong in shares) >= 2, (name, shares)


def _perturbed(rank, world_size, decay, dtype):
    """Whether each change reached the tokens from there on; others are checked to be bitwise equal."""
    comm, lengths, document = SequenceComm(None) if world_size > 1 else None, [11, 140, 17], 1
    reached = []
    for at in (23, 64, 65, 100):  # within a chunk, at and after the start of one
        for layout in layouts(lengths, world_size).values():
            outputs = []
            for factor in (1, 3):
                q, k, v, _, log_decay, *_ = tensors(lengths, decay, dtype)
                for x in (q, k, v, *([log_decay] if decay == "token" else [])):
                    x[lengths[0] + at] *= factor
                q, k, v = (layout.shard(x, rank) for x in (q, k, v))
                log_decay = layout.shard(log_decay, rank) if decay == "token" else log_decay
                outputs.append(linear_attention(q, k, v, layout, comm, log_decay=log_decay)[0])
            sees = (layout.documents(rank) == document) & (layout.positions(rank) >= at)
            assert torch.equal(outputs[0][~sees], outputs[1][~sees]), (at, layout)
            reached.append(bool((outputs[0][sees] != outputs[1][sees]).flatten(1).any(1).all()))
    return all(reached)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_token_changes_only_those_from_there_on(gloo, world_size, decay, dtype):
    assert all(gloo(world_size, _perturbed, decay, dtype))


def _collectives(rank, world_size, layout, initial, final):
    q, k, v, do, log_decay, state, _ = tensors(layout.lengths, "head")
    q, k, v, do = (layout.shard(x, rank).requires_grad_() for x in (q, k, v, do))
    gathers = []
    with mock.patch.object(dist, "all_gather_into_tensor", wraps=dist.all_gather_into_tensor) as gather:
        state = state if initial else None
        options = dict(log_decay=log_decay, initial_state=state, output_final_state=final)
        o, _ = linear_attention(q, k, v, layout, SequenceComm(None), **options)
        gathers.append(gather.call_args_list and [len(call.args[1]) for call in gather.call_args_list])
        o.backward(do)
        gathers.append(gather.call_count)
    return gathers


def test_one_collective_each_way_and_none_without_need(gloo):
    crossing = SequenceLayout([5, 4, 30], [[(0, 0, 5)], [(1, 0, 4), (2, 0, 9)], [(2, 9, 21)], []])
    assert gloo(4, _collectives, crossing, False, False) == [[[1], 2]] * 4  # one map at most, from ranks 1 and 2
    assert gloo(4, _collectives, crossing, True, False) == [[[1], 2]] * 4
    apart = SequenceLayout([5, 4, 30], [[(0, 0, 5)], [], [(1, 0, 4)], [(2, 0, 30)]])
    assert gloo(4, _collectives, apart, False, False) == [[[], 0]] * 4
    assert gloo(4, _collectives, apart, True, False) == [[[], 0]] * 4
    assert gloo(4, _collectives, apart, False, True) == [[[1], 2]] * 4


def _checkpointed(rank, world_size, decay):
    layout = SequenceLayout([5, 4, 30], [[(0, 0, 5)], [(1, 0, 4), (2, 0, 9)], [(2, 9, 21)], []])
    q, k, v, do, log_decay, *_ = tensors(layout.lengths, decay)
    log_decay = layout.shard(log_decay, rank) if decay == "token" else log_decay
    q, k, v, do = (layout.shard(x, rank) for x in (q, k, v, do))
    leaves, comm = [q.requires_grad_(), k.requires_grad_(), v.requires_grad_()], SequenceComm(None)

    def mix(q, k, v):
        return linear_attention(q, k, v, layout, comm, log_decay=log_decay)[0]

    plain = torch.autograd.grad(mix(*leaves), leaves, do)
    for reentrant in (False, True):
        mixed = checkpoint(mix, *leaves, use_reentrant=reentrant)
        for x in leaves:
            x.grad = None
        mixed.backward(do)
        assert all(torch.equal(x.grad, grad) for x, grad in zip(leaves, plain, strict=True)), reentrant


@pytest.mark.parametrize("decay", DECAYS)
def test_recomputation_keeps_the_collectives_in_order(gloo, decay):
    gloo(4, _checkpointed, decay)


def test_wrong_uses_are_refused():
    layout, (q, k, v, *_) = SequenceLayout.contiguous([6], 1), tensors([6], "none")
    refused = [
        ({"method": "magic"}, "linear attention method 'magic' is not one of: lasp2"),
        ({"causal": False}, "causal=False is not offered across ranks"),
        ({"beta": q[..., 0]}, "beta is .6, 2.; it is per token and head, .6, 4."),
        ({"log_decay": -torch.ones(6, 4, 7)}, "log_decay is .6, 4, 7.; offered are per head, .4., token"),
        ({"log_decay": torch.ones(4)}, "log_decay reaches 1; a decay has a logarithm of at most 0"),
        ({"initial_state": torch.zeros(2, 4, 8, 6)}, "initial_state is .2, 4, 8, 6.; .* makes it .1, 4, 8, 6."),
        ({"backend": "triton"}, "linear attention backend 'triton' is not one of: auto, reference, chunked"),
    ]
    for options, message in refused:
        with pytest.raises(ValueError, match=message):
            linear_attention(q, k, v, layout, None, **options)
    with pytest.raises(ValueError, match="the layout gives rank 0 6 tokens"):
        linear_attention(q[:5], k, v, layout, None)
    with pytest.raises(ValueError, match="over 2 ranks and the comm has 1; comm=None is one rank"):
        linear_attention(q, k, v, SequenceLayout.contiguous([6], 2), None)
