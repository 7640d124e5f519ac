"""Softmax attention on one device, by its definition, and what tests compare with it."""

import torch
from torch.utils.checkpoint import checkpoint

from lsys.parallel.comm import SequenceComm

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


def tensors(total, heads, kv_heads, dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(total)
    shapes = [(total, heads, WIDTH), (total, kv_heads, WIDTH), (total, kv_heads, WIDTH), (total, heads, WIDTH)]
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def expected(lengths, heads, kv_heads, dtype, mask):
    """o, dq, dk, dv by the definition in fp64."""
    q, k, v, do = tensors(sum(lengths), heads, kv_heads, dtype)
    q, k, v = leaves = [x.double().requires_grad_() for x in (q, k, v)]
    o = dense(q, k, v, lengths, **mask)
    return [o.detach(), *torch.autograd.grad(o, leaves, do.double(), materialize_grads=True)]


def distributed(layout, rank, heads, kv_heads, dtype, attention, again=False):
    """This rank's o, dq, dk, dv; `again`: computed anew in backward."""
    q, k, v, do = (layout.shard(x, rank) for x in tensors(layout.total, heads, kv_heads, dtype))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = checkpoint(attention, *leaves, use_reentrant=False) if again else attention(*leaves)
    return [o.detach(), *torch.autograd.grad(o, leaves, do)]


def largest_error(got, full, layout, rank, dtype):
    """Of o, dq, dk and dv, relative to 1 + magnitude; all of them in the right shape and dtype."""
    errors = [0.0]
    for x, y in zip(got, full, strict=True):
        y = layout.shard(y, rank)
        assert x.shape == y.shape and x.dtype == dtype
        errors += ((x.double() - y).abs() / (1 + y.abs())).flatten().tolist()
    return max(errors) if all(error == error for error in errors) else torch.inf


def comm_of(rank, world_size):
    """Ranks in nodes of two, the last one alone if they are odd."""
    return SequenceComm(None, node_of_rank=[r // 2 for r in range(world_size)]) if world_size > 1 else None
