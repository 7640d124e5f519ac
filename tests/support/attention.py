"""Softmax attention on one device, by its definition, and what tests compare with it."""

import torch
from torch.utils.checkpoint import checkpoint

from lsys.parallel.comm import SequenceComm
from support.comparing import largest
from support.masks import mask_of, sees

WIDTH = 8


def dense(q, k, v, seen, scale=None):
    """All tokens on one device, each with those that it sees, bool [T, T]: the definition. One that sees none has 0."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * (WIDTH**-0.5 if scale is None else scale)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).masked_fill(~seen, 0)
    return torch.einsum("hqk,khd->qhd", weights, v)


def tensors(total, heads, kv_heads, dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(total)
    shapes = [(total, heads, WIDTH), (total, kv_heads, WIDTH), (total, kv_heads, WIDTH), (total, heads, WIDTH)]
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def expected(lengths, heads, kv_heads, dtype, options, chosen=None):
    """o, dq, dk, dv by the definition in fp64; options as `support.masks` has them; chosen: bool [T, T], of what is seen."""
    seen = sees(lengths, mask_of(options, len(lengths)))
    seen = seen if chosen is None else seen & chosen
    q, k, v, do = tensors(sum(lengths), heads, kv_heads, dtype)
    q, k, v = leaves = [x.double().requires_grad_() for x in (q, k, v)]
    o = dense(q, k, v, seen, options.get("scale"))
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
    return largest(errors)


def comm_of(rank, world_size):
    """Ranks in nodes of two, the last one alone if they are odd."""
    return SequenceComm(None, node_of_rank=[r // 2 for r in range(world_size)]) if world_size > 1 else None
