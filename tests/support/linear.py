"""Linear attention of the whole family on one device, token by token, and what tests compare with it."""

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from lsys.kernels.linear_attention import diagonal
from lsys.kernels.linear_attention.recurrence import recurrence
from lsys.parallel.layout import SequenceLayout
from lsys.parallel.linear import linear_attention
from lsys.parallel.linear.state_exchange_plan import all_runs
from support.layouts import layouts

HEADS, KEY_HEADS, WIDTH, VALUE_WIDTH = 4, 2, 8, 6
DECAYS = ("none", "head", "token", "channel")
VARIANTS = (*DECAYS, *(f"delta {decay}" for decay in DECAYS))
NAMES = ("o", "final state", "dq", "dk", "dv", "d decay", "d beta", "d initial")


class Case(NamedTuple):
    """One call: see `linear_attention`."""

    method: str
    variant: str
    lengths: tuple[int, ...]
    layout: str
    initial: bool = False
    final: bool = False
    causal: bool = True
    backend: str = "auto"
    dtype: torch.dtype = torch.float64
    alone: bool = False  # whether the loss is of the final states alone


class Inputs(NamedTuple):
    """Tensors of tokens are of the stream; `do` and `d_final` are the gradients of the results."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    log_decay: torch.Tensor | None
    beta: torch.Tensor | None
    initial: torch.Tensor
    do: torch.Tensor
    d_final: torch.Tensor


def fragments(lengths, ranks):
    """Pieces of one to three tokens, dealt out in turns that change, the last first."""
    placed: list[list[tuple[int, int, int]]] = [[] for _ in range(ranks)]
    for document, length in enumerate(lengths):
        start = 0
        while start < length:
            stop = min(length, start + 1 + (start + document) % 3)
            placed[(start * 5 // 3 + document) % ranks].insert(0, (document, start, stop - start))
            start = stop
    return SequenceLayout(lengths, placed)


def idle_first(lengths, ranks):
    """The first rank and, of many, the third have nothing."""
    busy = [rank for rank in range(ranks) if rank not in (0, 2)] or [0]
    held = iter(SequenceLayout.contiguous(lengths, len(busy)).segments)
    return SequenceLayout(lengths, [next(held) if rank in busy else () for rank in range(ranks)])


@cache
def all_layouts(lengths, ranks):
    return {
        **layouts(lengths, ranks),
        "fragments": fragments(lengths, ranks),
        "idle ranks": idle_first(lengths, ranks),
    }


@cache
def inputs(lengths, variant, dtype=torch.float64) -> Inputs:
    """Gentle decays and betas: strong ones would hide a missing state."""
    total, generator = sum(lengths), torch.Generator().manual_seed(sum(lengths))

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k = draw(total, KEY_HEADS, WIDTH), draw(total, KEY_HEADS, WIDTH)
    v, do = draw(total, HEADS, VALUE_WIDTH), draw(total, HEADS, VALUE_WIDTH)
    shapes = {"head": (HEADS,), "token": (total, HEADS), "channel": (total, HEADS, WIDTH)}
    *delta, decay = variant.split()
    log_decay = -0.02 * draw(*shapes[decay]).abs() if decay != "none" else None
    beta = 0.1 + 0.3 * torch.rand(total, HEADS, generator=generator, dtype=torch.float64) if delta else None
    k = k / k.norm(dim=-1, keepdim=True) if delta else k
    initial, d_final = (draw(len(lengths), HEADS, WIDTH, VALUE_WIDTH) for _ in range(2))
    wide = torch.promote_types(dtype, torch.float32)
    q, k, v, do = (x.to(dtype) for x in (q, k, v, do))
    log_decay, beta = (None if x is None else x.to(wide) for x in (log_decay, beta))
    return Inputs(q, k, v, log_decay, beta, initial.to(wide), do, d_final.to(wide))


def by_definition(q, k, v, log_decay, beta, initial, lengths, causal=True):
    """o and final states of the stream."""
    o, final = recurrence(q, k, v, log_decay, beta, lengths, WIDTH**-0.5, initial)
    if not causal:
        own = diagonal(q, k, v, beta)
        every = (q, k, v, log_decay, beta)
        q, k, v, log_decay, beta = (x if x is None or x.dim() == 1 else x.flip(0) for x in every)
        o = o + recurrence(q, k, v, log_decay, beta, lengths[::-1], WIDTH**-0.5)[0].flip(0) - own
    return o, final


def leaves_of(tensors, initial):
    """q, k, v, log_decay, beta and initial state, differentiable; None where there is none."""
    chosen = [*tensors[:5], tensors[5] if initial else None]
    return [None if x is None else x.detach().clone().requires_grad_() for x in chosen]


def expected(case):
    """What NAMES names, of the stream, in fp64."""
    return _expected(case.lengths, case.variant, case.initial, case.final, case.causal, case.dtype, case.alone)


@cache
def _expected(lengths, variant, initial, final, causal, dtype, alone):
    exact: list[Any] = [None if x is None else x.double() for x in inputs(lengths, variant, dtype)]
    tensors = Inputs(*exact)
    q, k, v, log_decay, beta, state = leaves = leaves_of(tensors, initial)
    o, after = by_definition(q, k, v, log_decay, beta, state, lengths, causal)
    loss = (o.new_zeros(()) if alone else (o * tensors.do).sum()) + ((after * tensors.d_final).sum() if final else 0)
    grads = iter(torch.autograd.grad(loss, [x for x in leaves if x is not None], materialize_grads=True))
    gradients = [None if x is None else next(grads) for x in leaves]
    return [o.detach(), after.detach() if final else None, *gradients]


def carried(case, ranks):
    """How much of the output is due to states that come into a rank's run, where any does; None: nowhere."""
    layout = all_layouts(case.lengths, ranks)[case.layout]
    runs = all_runs(layout, causal=True)
    cut = by_definition(*inputs(case.lengths, case.variant)[:5], None, runs.length.tolist(), case.causal)[0]
    enters = (runs.places > 1) & (runs.place > 0) if case.causal else runs.places > 1
    tokens = (enters | case.initial).repeat_interleave(runs.length)
    o = expected(case._replace(dtype=torch.float64))[0]
    return float((o - cut)[tokens].norm() / o[tokens].norm()) if tokens.any() else None


def distributed(case, comm, ranks):
    """This rank's share of `expected`, and all of replicated gradients. Each rank weighs the final states alike."""
    rank, layout = 0 if comm is None else comm.rank, all_layouts(case.lengths, ranks)[case.layout]
    tensors = inputs(case.lengths, case.variant, case.dtype)
    local: list[Any] = [layout.shard(x, rank) if is_sharded(i, x) else x for i, x in enumerate(tensors)]
    leaves = leaves_of(local, case.initial)
    q, k, v, log_decay, beta, initial = leaves
    options = dict(causal=case.causal, backend=case.backend, output_final_state=case.final, method=case.method)
    options |= dict(log_decay=log_decay, beta=beta, initial_state=initial)
    o, after = linear_attention(q, k, v, layout, comm, **options)
    assert o.dtype == case.dtype and (after is None) == (not case.final)
    d_final = tensors.d_final / ranks
    loss = (o.new_zeros(()) if case.alone else (o * local[6]).sum()) + ((after * d_final).sum() if case.final else 0)
    grads = iter(torch.autograd.grad(loss, [x for x in leaves if x is not None], materialize_grads=True))
    gradients = [None if x is None else next(grads) for x in leaves]
    for i in (3, 5):
        if comm is not None and leaves[i] is not None and not is_sharded(i, leaves[i]):
            dist.all_reduce(gradients[i])
    return [o.detach(), after if after is None else after.detach(), *gradients]


def is_sharded(i, x):
    """Whether tensor i of `Inputs` is of tokens."""
    return x is not None and x.dim() > 1 and i not in (5, 7)


def largest_error(found, full, layout, rank):
    """By name, relative to the largest magnitude."""
    errors = {}
    for name, x, y in zip(NAMES, found, full, strict=True):
        if y is None:
            assert x is None, name
            continue
        magnitude = float(y.abs().amax()) if y.numel() else 0.0
        if name not in ("final state", "d initial") and not (name == "d decay" and y.dim() == 1):
            y = layout.shard(y, rank)
        assert x.shape == y.shape, name
        errors[name] = float((x.double() - y).abs().amax()) / (magnitude or 1.0) if y.numel() else 0.0
    return errors
