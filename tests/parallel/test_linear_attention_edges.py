"""Linear attention across ranks of which some have no heads or no tokens, and where only some inputs have a gradient."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import forgetting
from support.comparing import largest
from support.linear_kernels import VARIANTS

from lsys.kernels.linear_attention.recurrence import recurrence
from lsys.parallel.comm import SequenceComm
from lsys.parallel.layout import SequenceLayout
from lsys.parallel.linear import METHODS, linear_attention

LENGTHS = (13, 0, 6)
NAMES = ("q", "k", "v", "log_decay", "beta", "initial")


def stream(heads: int, key_heads: int, decay: str, is_delta: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tokens = sum(LENGTHS)
    shape = {"head": (heads,), "token": (tokens, heads), "channel": (tokens, heads, 4)}[decay]
    return {
        "q": draw(tokens, key_heads, 4),
        "k": torch.nn.functional.normalize(draw(tokens, key_heads, 4), dim=-1),
        "v": draw(tokens, heads, 3),
        "log_decay": -0.1 * draw(*shape).abs(),
        "beta": torch.rand(tokens, heads, generator=generator, dtype=torch.float64) if is_delta else None,
        "initial": draw(len(LENGTHS), heads, 4, 3),
    }


def results(rank: int, layout: SequenceLayout, comm: Any, given: dict[str, Any], wanted: str, **options: Any) -> Any:
    """o, final states and gradients of those `wanted` (all tokens', summed over ranks), by one rank or by the definition (comm None)."""
    leaves: Any = {name: x if x is None else x.clone().requires_grad_(name in wanted) for name, x in given.items()}
    initial = leaves.pop("initial")
    of_tokens = [name for name, x in leaves.items() if x is not None and x.dim() > 1]
    local: Any = (
        dict(leaves) if comm is None else leaves | {name: layout.shard(leaves[name], rank) for name in of_tokens}
    )
    o: Any
    after: Any
    if comm is None:
        packed: Any = (*(local[name] for name in NAMES[:5]), LENGTHS, 0.5, initial)
        o, after = recurrence(*packed)
        weight = torch.arange(len(o), dtype=torch.float64)
    else:
        q, k, v = (local.pop(name) for name in "qkv")
        named: Any = dict(initial_state=initial, output_final_state=True, scale=0.5)
        o, after = linear_attention(q, k, v, layout, comm, **local, **named, **options)
        weight = layout.shard(torch.arange(sum(LENGTHS), dtype=torch.float64), rank)
    loss = (o * weight[:, None, None]).sum() + after.square().sum() / (1 if comm is None else comm.size)
    every: Any = leaves | {"initial": initial}
    chosen = [every[name] for name in NAMES if name in wanted and every[name] is not None]
    gradients = torch.autograd.grad(loss, chosen, materialize_grads=True)  # a rank may have nothing of them
    if comm is not None:
        for gradient in gradients:
            dist.all_reduce(gradient)
    return o.detach(), after.detach(), *gradients


def differences(rank: int, world_size: int, cases: list[Any]) -> list[float]:
    found = []
    for heads, key_heads, decay, is_delta, layout, wanted, options in cases:
        given = stream(heads, key_heads, decay, is_delta)
        comm = SequenceComm(None)
        mine = results(rank, layout, comm, given, wanted, **options)
        exact = results(rank, layout, None, given, wanted)
        exact = (layout.shard(exact[0], rank), *exact[1:])
        found.append(
            largest(float((x - y).abs().max()) if x.numel() else 0.0 for x, y in zip(mine, exact, strict=True))
        )
    return found


@pytest.mark.parametrize("ranks", [3, 4])
def test_ulysses_on_ranks_without_a_head(gloo: Any, ranks: int) -> None:
    layout = SequenceLayout.contiguous(LENGTHS, ranks)
    shapes = [(2, 1), (2, 2), (1, 1)]
    cases = [
        (*shapes[i % 3], decay, is_delta, layout, " ".join(NAMES), {"method": "ulysses", "backend": backend})
        for i, (decay, is_delta, backend) in enumerate(
            (decay, is_delta, backend)
            for decay in ("head", "token", "channel")
            for is_delta in (False, True)
            for backend in ("reference", "chunked")
        )
    ]
    assert largest(map(largest, gloo(ranks, differences, cases, timeout=60))) < 1e-10


@pytest.mark.parametrize("method", METHODS)
def test_some_gradients_on_ranks_without_tokens(gloo: Any, method: str) -> None:
    """By each backend, and of each input alone: a rank that has nothing to say still has to hear the others."""
    idle = SequenceLayout(LENGTHS, [(), *SequenceLayout.contiguous(LENGTHS, 2).segments])
    options = [{"method": method, "backend": backend} for backend in ("reference", "chunked")]
    some = ("q", "k", "v", "log_decay", "beta", "initial", "q v", "k initial")
    cases = [
        (2, 2, ("token", "head")[i % 2], True, idle, wanted, each) for each in options for i, wanted in enumerate(some)
    ]
    assert largest(map(largest, gloo(3, differences, cases, timeout=60))) < 1e-10


def forgotten(rank: int, world_size: int, variants: list[str], lengths: Any, method: str) -> list[dict[str, float]]:
    """`forgetting.off` of each variant, by ranks that share the sequences, inside autocast."""
    layout, comm = SequenceLayout.contiguous(lengths, world_size), SequenceComm(None)
    places = layout.shard(torch.arange(sum(lengths)), rank)

    def way(backend: str, lengths: Any, q: Any, k: Any, v: Any, g: Any, beta: Any, state: Any) -> Any:
        q, k, v, g, beta = (x if x is None or x.dim() == 1 else x[places] for x in (q, k, v, g, beta))
        named: Any = dict(log_decay=g, beta=beta, initial_state=state, output_final_state=True)
        with torch.autocast("cpu", torch.bfloat16):
            o, after = linear_attention(q, k, v, layout, comm, **named, method=method, backend=backend)
        assert after is not None
        return o.new_zeros(sum(lengths), *o.shape[1:]).index_copy(0, places, o), after * (rank == 0)

    found = []
    for variant in variants:
        mine = forgetting.results(way, "chunked", lengths, variant, torch.float32)
        for each in mine:
            dist.all_reduce(each)
        found.append(forgetting.off(mine, variant, lengths))
    return found


@pytest.mark.parametrize("method", METHODS)
def test_gates_that_forget_everything_across_ranks(gloo: Any, method: str) -> None:
    """As on one device, borders of ranks inside documents; states and their gradients travel."""
    variants = [variant for variant in VARIANTS if not variant.endswith("none")]
    for each, variant in zip(gloo(2, forgotten, variants, (25, 18, 35), method, timeout=60)[0], variants, strict=True):
        assert {name: e for name, e in each.items() if not e < forgetting.TOLERANCE} == {}, variant


def backward_in_autocast(
    rank: int, world_size: int, variants: list[str], lengths: Any, methods: list[str]
) -> list[str]:
    """Variants and methods of which a backward pass inside autocast has other bits than one outside."""
    layout, comm = SequenceLayout.contiguous(lengths, world_size), SequenceComm(None)
    places, wrong = layout.shard(torch.arange(sum(lengths)), rank), []
    for variant in variants:
        (q, k, v, g, beta, state), _ = forgetting.leaves_of(variant, lengths)
        cut = [x if x is None or x.dim() == 1 else x[places] for x in (q, k, v, g, beta)]
        for method in methods:
            found = []
            for enabled in (False, True):
                leaves: list[Any] = [None if x is None else x.detach().clone().requires_grad_() for x in (*cut, state)]
                q, k, v, g, beta, initial = leaves
                named: Any = dict(log_decay=g, beta=beta, initial_state=initial, output_final_state=True, method=method)
                with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                    o, after = linear_attention(q, k, v, layout, comm, **named, backend="chunked")
                    assert after is not None
                    (o.square().sum() + after.square().sum() * (rank == 0)).backward()
                found.append([x.grad for x in leaves if x is not None])
            if not all(torch.equal(one, other) for one, other in zip(*found, strict=True)):
                wrong.append(f"{variant} {method}")
    return wrong


def test_autocast_rounds_nothing_in_the_backward_pass(gloo: Any) -> None:
    assert gloo(3, backward_in_autocast, ["token", "channel", "delta token"], (40, 9, 70), METHODS) == [[]] * 3
