"""Short convolution and token shift across ranks equal those of whole documents on one device."""

import contextlib
from functools import partial
from importlib.util import find_spec
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from support.by_tables import by_tables
from support.comparing import largest
from support.layouts import layouts
from support.noted import noted
from torch.utils.checkpoint import checkpoint

from lsys.kernels.short_convolution import reference
from lsys.parallel.comm import SequenceComm
from lsys.parallel.convolution import short_convolution, token_shift
from lsys.parallel.layout import SequenceLayout

PACKS = [[0, 1, 7, 2, 0, 23], [131], [1, 0, 1], [], [0], [2, 67, 5, 3, 19]]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}
CHANNELS = 3


def tensors(lengths, width):
    generator = torch.Generator().manual_seed(sum(lengths) + width)
    shapes = [(sum(lengths), CHANNELS), (CHANNELS, width), (CHANNELS,), (sum(lengths), CHANNELS)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def shifted(x, lengths):
    return torch.cat([x[:0], *(torch.cat([0 * part[:1], part[:-1]]) for part in x.split(list(lengths)))])


def error(x, y):
    assert x.shape == y.shape
    return largest(((x.double() - y).abs() / (1 + y.abs())).flatten().tolist())


def _differences(rank, world_size, dtype, backend="auto"):
    """Errors of outputs and of the gradients of x, weight and bias (summed over the ranks), relative."""
    comm = SequenceComm(None) if world_size > 1 else None
    wrong = {}
    for lengths in PACKS:
        for width, bias, activation in [(1, True, None), (2, False, "silu"), (4, True, "silu"), (7, False, None)]:
            x, weight, b, grad = (x.to(dtype) for x in tensors(lengths, width))
            wide_x, wide_weight, wide_b = wide = [each.double().requires_grad_() for each in (x, weight, b)]
            y = reference.convolution(wide_x, wide_weight, wide_b if bias else None, lengths)
            y = torch.nn.functional.silu(y) if activation else y
            gradients = torch.autograd.grad(y, wide, grad.double(), allow_unused=True, materialize_grads=True)
            for name, layout in layouts(lengths, world_size).items():
                mine, w, c = layout.shard(x, rank).requires_grad_(), weight.clone().requires_grad_(), b.clone()
                c.requires_grad_()
                o = short_convolution(mine, w, layout, comm, c if bias else None, activation, backend)
                d = torch.autograd.grad(o, (mine, w, c), layout.shard(grad, rank), allow_unused=True)
                sums = [
                    torch.zeros_like(like).double() if part is None else part.double()
                    for like, part in zip((w, c), d[1:], strict=True)
                ]
                for part in sums if comm else ():
                    dist.all_reduce(part)
                wanted = [layout.shard(y, rank), layout.shard(gradients[0], rank), *gradients[1:]]
                for what, found, full in zip(("y", "dx", "dw", "db"), [o, d[0], *sums], wanted, strict=True):
                    if not error(found, full) < TOLERANCE[dtype] * max(1, sum(lengths) ** 0.5):
                        wrong[f"{what}: {lengths}, {name}, {width}, {bias}, {activation}"] = error(found, full)
    return wrong


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_equals_one_device(gloo, world_size, dtype):
    assert gloo(world_size, _differences, dtype) == [{}] * world_size


def _fused_differences(rank, world_size, dtype):
    with by_tables():
        return _differences(rank, world_size, dtype, "triton")


@pytest.mark.skipif(find_spec("triton") is None, reason="the kernels' module needs Triton")
@pytest.mark.parametrize(("world_size", "dtype"), [(1, torch.float32), (3, torch.float32), (4, torch.bfloat16)])
def test_what_the_kernels_are_given_equals_one_device(gloo, world_size, dtype):
    assert gloo(world_size, _fused_differences, dtype) == [{}] * world_size


def _shifts(rank, world_size):
    comm = SequenceComm(None) if world_size > 1 else None
    for lengths in PACKS:
        x, _, _, grad = tensors(lengths, 1)
        x.requires_grad_()
        y = shifted(x, lengths)
        (d_x,) = torch.autograd.grad(y, x, grad)
        for layout in layouts(lengths, world_size).values():
            mine = layout.shard(x.detach(), rank).requires_grad_()
            before = token_shift(mine, layout, comm)
            (d_mine,) = torch.autograd.grad(before, mine, layout.shard(grad, rank))
            assert torch.equal(before, layout.shard(y, rank)) and torch.equal(d_mine, layout.shard(d_x, rank))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_token_shift(gloo, world_size):
    gloo(world_size, _shifts)


def _perturbed(rank, world_size, dtype):
    """Whether changes reach the tokens within the width, in the document; others are checked to be bitwise equal."""
    comm, lengths, document, width = SequenceComm(None) if world_size > 1 else None, [11, 140, 17], 1, 4
    x, weight, bias, _ = (x.to(dtype) for x in tensors(lengths, width))
    reached = []
    for at in (0, 23, 34, 35, 46, 47, 139):
        for layout in layouts(lengths, world_size).values():
            changed = x.clone()
            changed[lengths[0] + at] *= 3
            outputs = [
                short_convolution(layout.shard(each, rank), weight, layout, comm, bias, "silu") for each in (x, changed)
            ]
            positions = layout.positions(rank)
            sees = (layout.documents(rank) == document) & (positions >= at) & (positions < at + width)
            assert torch.equal(outputs[0][~sees], outputs[1][~sees]), (at, layout)
            reached.append(bool((outputs[0][sees] != outputs[1][sees]).all()))
    return all(reached)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_token_changes_only_those_that_see_it(gloo, world_size, dtype):
    assert all(gloo(world_size, _perturbed, dtype))


def _checkpointed(rank, world_size, backend):
    with by_tables() if backend == "triton" else contextlib.nullcontext():
        _recomputed(rank, world_size, backend)


def _recomputed(rank, world_size, backend):
    layout, comm = SequenceLayout([5, 4, 30], [[(0, 0, 5)], [(1, 0, 4), (2, 0, 9)], [(2, 9, 21)], []]), None
    comm = SequenceComm(None)
    x, weight, _, grad = (x.float() for x in tensors(layout.lengths, 4))
    x, grad, weight = layout.shard(x, rank).requires_grad_(), layout.shard(grad, rank), weight.requires_grad_()

    def mix(x, weight):
        return token_shift(short_convolution(x, weight, layout, comm, backend=backend), layout, comm)

    plain = torch.autograd.grad(mix(x, weight), (x, weight), grad)
    for reentrant in (False, True):
        x.grad = weight.grad = None
        checkpoint(mix, x, weight, use_reentrant=reentrant).backward(grad)
        assert x.grad is not None and weight.grad is not None
        assert torch.equal(x.grad, plain[0]) and torch.equal(weight.grad, plain[1])


@pytest.mark.parametrize("backend", ["sliding", *(["triton"] if find_spec("triton") else [])])
def test_recomputation_keeps_the_transfers_in_order(gloo, backend):
    gloo(4, _checkpointed, backend)


def _sums_under_way(rank, world_size):
    """Whether the transfer has begun before the sums over own tokens, and ends after them."""
    from lsys.kernels import short_convolution as kernel

    layout, seen = SequenceLayout.contiguous([40], 2), []
    comm = SequenceComm(None)
    exchange, from_zero = comm.exchange, kernel.from_zero

    def watched(send, receive):
        seen.append("begin")
        return exchange(send, receive).then(noted(seen, "end", lambda rows: rows))

    x, weight, *_ = tensors([40], 4)
    with mock.patch.object(comm, "exchange", watched), mock.patch.object(kernel, "from_zero") as sums:
        sums.side_effect = noted(seen, "sums", from_zero)
        short_convolution(layout.shard(x, rank), weight, layout, comm)
    return seen


def test_the_exchange_overlaps_the_sums(gloo):
    assert gloo(2, _sums_under_way) == [["begin", "sums", "end"]] * 2


def test_wrong_uses_are_refused():
    layout, (x, weight, *_) = SequenceLayout.contiguous([6], 1), tensors([6], 4)
    refused: list[tuple[Any, str]] = [
        ((x, weight[:2], layout, None), "weight .C, W.; got .6, 3. and .2, 4."),
        ((x, weight[0], layout, None), "weight .C, W.; got .6, 3. and .4."),
        ((x, weight, layout, None, None, "relu"), "activation 'relu'; offered are floating point, None and silu"),
        ((x[:5], weight, layout, None), "the layout gives rank 0 6 tokens; got .5, 3."),
        ((x, weight, SequenceLayout.contiguous([6], 2), None), "over 2 ranks and the comm has 1"),
        ((x, weight, layout, None, x[0, :2]), "bias is .2.; there are 3 channels"),
    ]
    for fused in (contextlib.nullcontext, by_tables) if find_spec("triton") else (contextlib.nullcontext,):
        backend = "auto" if fused is contextlib.nullcontext else "triton"
        for arguments, message in refused:
            with fused(), pytest.raises(ValueError, match=message):
                partial(short_convolution, backend=backend)(*arguments)
    with pytest.raises(ValueError, match="backend 'reference' is not one of: auto, sliding, triton"):
        short_convolution(x, weight, layout, None, backend="reference")
