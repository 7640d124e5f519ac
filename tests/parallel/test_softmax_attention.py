from unittest import mock

import pytest
import torch
import torch.distributed as dist
from support.layouts import all_on_last, layouts

from lsys.parallel.attention import softmax_attention
from lsys.parallel.comm import SequenceComm
from lsys.parallel.layout import SequenceLayout

PACKS = [[0, 1, 7, 13, 0, 23], [31], [1, 0, 1], [], [0], [2, 67, 5, 3, 19]]
MASKS = [{}, {"causal": False}, {"window": 1}, {"window": 6}, {"window": 500, "scale": 0.2}]
HEADS = [(4, 4), (4, 2), (3, 1)]
# Largest difference from the fp64 definition, relative to 1 + its magnitude.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 4e-2}
WIDTH = 8


def dense(q, k, v, lengths, causal=True, window=None, scale=None):
    """All tokens on one device, document by document: the definition."""
    outputs = [q[:0]]
    group = q.shape[1] // k.shape[1]
    for qd, kd, vd in zip(*(x.split(list(lengths)) for x in (q, k, v)), strict=True):
        kd, vd = kd.repeat_interleave(group, 1), vd.repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", qd, kd) * (WIDTH**-0.5 if scale is None else scale)
        age = torch.arange(len(qd))[:, None] - torch.arange(len(qd))
        hidden = torch.zeros_like(age, dtype=torch.bool)
        if causal:
            hidden |= age < 0
        if window is not None:
            hidden |= age >= window
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), vd))
    return torch.cat(outputs)


def tensors(total, heads, kv_heads, dtype):
    generator = torch.Generator().manual_seed(total)
    shapes = [(total, heads, WIDTH), (total, kv_heads, WIDTH), (total, kv_heads, WIDTH), (total, heads, WIDTH)]
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def _differences(rank, world_size, dtype, cases):
    """Largest differences of o, dq, dk, dv from the definition, by case."""
    comm = SequenceComm(None) if world_size > 1 else None
    errors = {}
    for lengths, mask, (heads, kv_heads), backend in cases:
        q, k, v, do = tensors(sum(lengths), heads, kv_heads, dtype)
        leaves = [x.double().requires_grad_() for x in (q, k, v)]
        o = dense(*leaves, lengths, **mask)
        expected = [o.detach(), *torch.autograd.grad(o, leaves, do.double(), materialize_grads=True)]
        for name, layout in layouts(lengths, world_size).items():
            mine = [layout.shard(x, rank).requires_grad_() for x in (q, k, v)]
            o = softmax_attention(*mine, layout, comm, method="gather", backend=backend, **mask)
            got = [o, *torch.autograd.grad(o, mine, layout.shard(do, rank))]
            for part, x, full in zip(("o", "dq", "dk", "dv"), got, expected, strict=True):
                y = layout.shard(full, rank)
                assert x.shape == y.shape and x.dtype == dtype
                error = ((x.double() - y).abs() / (1 + y.abs())).flatten().tolist()
                errors[f"{part}: {lengths}, {name}, {mask}, {heads}/{kv_heads} heads, {backend}"] = max(
                    error, default=0
                )
    return errors


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_equals_one_device(gloo, world_size, dtype):
    cases = [(lengths, mask, HEADS[1], "auto") for lengths in PACKS for mask in MASKS]
    cases += [
        (PACKS[0], mask, heads, backend) for mask in MASKS[:3] for heads in HEADS for backend in ("reference", "cpu")
    ]
    for rank, errors in enumerate(gloo(world_size, _differences, dtype, cases)):
        wrong = {case: error for case, error in errors.items() if not error < TOLERANCE[dtype]}
        assert not wrong, f"rank {rank}: {wrong}"


def _perturbed(rank, world_size, dtype):
    """Whether any change reached the tokens that may see the perturbed one; others are checked to be bitwise equal."""
    comm, lengths, document, at = SequenceComm(None), [11, 40, 17], 1, 23
    q, k, v, _ = tensors(sum(lengths), 4, 2, dtype)
    reached = []
    for mask in ({}, {"window": 5}, {"causal": False}):
        for layout in layouts(lengths, world_size).values():
            outputs = []
            for shift in (0, 2):
                changed = [x.clone() for x in (q, k, v)]
                for x in changed:
                    x[lengths[0] + at] += shift
                mine = [layout.shard(x, rank) for x in changed]
                outputs.append(softmax_attention(*mine, layout, comm, **mask))
            age = layout.positions(rank) - at
            sees = layout.documents(rank) == document
            if mask.get("causal", True):
                sees &= (age >= 0) & (age < mask.get("window", 500))
            assert torch.equal(outputs[0][~sees], outputs[1][~sees]), (mask, layout)
            reached.append(bool((outputs[0][sees] != outputs[1][sees]).flatten(1).any(1).all()))
    return all(reached)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_token_changes_only_those_that_see_it(gloo, world_size, dtype):
    assert all(gloo(world_size, _perturbed, dtype))


def _collectives(rank, world_size):
    comm, layout = SequenceComm(None), all_on_last([9, 4], world_size)
    q, k, v, do = (layout.shard(x, rank).requires_grad_() for x in tensors(13, 2, 2, torch.float32))
    counts = []
    with (
        mock.patch.object(dist, "all_gather_into_tensor", wraps=dist.all_gather_into_tensor) as gathers,
        mock.patch.object(dist, "reduce_scatter_tensor", wraps=dist.reduce_scatter_tensor) as scatters,
    ):
        o = softmax_attention(q, k, v, layout, comm)
        counts.append((gathers.call_count, scatters.call_count))
        o.backward(do)
        counts.append((gathers.call_count, scatters.call_count))
    return counts


def test_one_collective_each_way_on_ranks_without_tokens_too(gloo):
    assert gloo(3, _collectives) == [[(1, 0), (1, 1)]] * 3


def _mismatched(rank, world_size):
    q, k, v, _ = tensors(6, 2, 2, torch.float32)
    with pytest.raises(ValueError, match="the layout is over 3 ranks and the comm has 2"):
        softmax_attention(q, k, v, SequenceLayout.contiguous([6], 3), SequenceComm(None))


def test_layout_and_comm_must_agree(gloo):
    gloo(2, _mismatched)
    with pytest.raises(ValueError, match="over 3 ranks and the comm has 1; comm=None is one rank"):
        softmax_attention(*tensors(6, 2, 2, torch.float32)[:3], SequenceLayout.contiguous([6], 3), None)


@pytest.mark.parametrize(
    ("heads", "total", "options", "message"),
    [
        ((2, 2), 6, {"method": "magic"}, "attention method 'magic' is not one of: gather"),
        ((2, 2), 6, {"window": 0}, "a window is of 1 token or more"),
        ((2, 2), 6, {"window": 3, "causal": False}, "a window is of 1 token or more and causal"),
        ((2, 2), 6, {"backend": "cuda"}, "'cuda' cannot run here"),
        ((4, 3), 6, {}, "3 key heads do not divide 4 query heads"),
        ((2, 2), 5, {}, "the layout gives rank 0 6 tokens; q has 5 and k has 5"),
    ],
)
def test_wrong_uses_are_refused(heads, total, options, message):
    layout = SequenceLayout.contiguous([6], 1)
    with pytest.raises(ValueError, match=message):
        softmax_attention(*tensors(total, *heads, torch.float32)[:3], layout, None, **options)
