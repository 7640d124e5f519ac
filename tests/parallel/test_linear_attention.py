"""Linear attention across ranks equals the definition on one device, token by token."""

import contextlib
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.layouts import drawn_layouts
from support.linear import (
    DECAYS,
    NAMES,
    VARIANTS,
    Case,
    all_layouts,
    by_definition,
    carried,
    distributed,
    expected,
    inputs,
    largest_error,
)

from lsys.parallel.comm import SequenceComm
from lsys.parallel.layout import SequenceLayout
from lsys.parallel.linear import METHODS, linear_attention
from lsys.parallel.linear.state_exchange_plan import ExternalSegments
from lsys.parallel.messages import chain

PACKS = [(0, 1, 7, 13, 0, 23), (31,), (1, 0, 1), (), (0,), (2, 37, 5, 3, 11)]
LAYOUTS = ("contiguous", "zigzag", "random", "fragments", "all on last", "idle ranks")
FLAGS = [(False, False, True), (True, True, True), (False, False, False), (True, False, True), (False, True, True)]
# Of half precision, the rounding of inputs.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 4e-2}


def comm_of(world_size):
    return SequenceComm(None) if world_size > 1 else None


@contextlib.contextmanager
def small_blocks():
    """ZeCO's states, which are tiny here, in several blocks."""
    with mock.patch.object(chain, "LATENCY_BYTES", 64):
        yield


def _differences(rank, world_size, cases):
    comm = comm_of(world_size)
    wrong: dict[Any, Any] = {}
    with small_blocks():
        for case, full in cases:
            layout = all_layouts(case.lengths, world_size)[case.layout]
            errors = largest_error(distributed(case, comm, world_size), full, layout, rank)
            wrong |= {(case, name): e for name, e in errors.items() if not e < TOLERANCE[case.dtype]}
    return wrong


def check(gloo, world_size, cases):
    full = [(case, expected(case)) for case in cases]
    assert gloo(world_size, _differences, full, timeout=600) == [{}] * world_size
    shares = {case: carried(case, world_size) for case in {case._replace(method="any") for case in cases}}
    # A state that is lost must be seen: wherever one comes in, it makes a tenth of the output.
    assert {case: share for case, share in shares.items() if share is not None and share < 0.1} == {}
    return sum(share is not None for share in shares.values())


def sample(world_size):
    """Each variant with each method once; packs, layouts and flags take turns that do not beat with either."""
    pairs = [(variant, method) for variant in VARIANTS for method in METHODS]
    for i, (variant, method) in enumerate(pairs):
        i = 5 * i + world_size
        lengths = PACKS[(0, 1, 5)[i % 3]]
        yield Case(method, variant, lengths, LAYOUTS[(i + i // 6) % 5 if i % 7 else 5], *FLAGS[(i + i // 10) % 5])


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_equals_the_definition(gloo, world_size):
    cases = [*sample(world_size)]
    if world_size == 1:
        cases = [case for case in cases if case.method != "lasp1"]
    assert check(gloo, world_size, cases) > len(cases) / 4


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_variant_by_every_method_over_every_layout(gloo, world_size, causal):
    lengths, methods = PACKS[0] if causal else PACKS[5], METHODS if world_size > 1 else METHODS[:1]
    flags = (causal, causal, causal)
    cases = [
        Case(method, variant, lengths, layout, *flags)
        for method in methods
        for variant in VARIANTS
        for layout in LAYOUTS
    ]
    assert check(gloo, world_size, cases) or world_size == 1


@pytest.mark.parametrize("method", METHODS)
def test_tiny_packs(gloo, method):
    """Nothing at all, empty documents, single tokens; every combination of states."""
    packs = [(lengths, layout) for lengths in PACKS[2:5] for layout in ("contiguous", "random", "idle ranks")]
    cases = [Case(method, variant, *each, *flags) for each in packs for variant in ("head", "token") for flags in FLAGS]
    cases += [
        Case(method, "delta channel", PACKS[0], "zigzag", *flags, backend=b) for flags in FLAGS for b in ("reference",)
    ]
    full = [(case, expected(case)) for case in cases]
    assert gloo(3, _differences, full) == [{}] * 3


@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_final_states_alone(gloo, method):
    """Of the output there is none then, nor of what tokens get from their own chunk."""
    layouts = ("contiguous", "zigzag", "idle ranks")
    check(
        gloo, 3, [Case(method, variant, PACKS[0], x, True, True, alone=True) for variant in VARIANTS for x in layouts]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(gloo, dtype):
    cases = [
        Case(method, variant, PACKS[5], layout, *FLAGS[1], dtype=dtype)
        for method in METHODS
        for variant, layout in (
            ("head", "zigzag"),
            ("token", "random"),
            ("channel", "contiguous"),
            ("delta token", "zigzag"),
        )
    ]
    check(gloo, 3, cases)


# ---- what a wrong implementation looks like


def _without_carry(rank, world_size, cases):
    """The largest error of the output when no state comes in."""
    comm, errors = comm_of(world_size), {}
    with mock.patch.object(ExternalSegments, "states_before", lambda self, *_: [None] * len(self.segments)):
        for case, full in cases:
            layout = all_layouts(case.lengths, world_size)[case.layout]
            errors[case] = largest_error(distributed(case, comm, world_size), full, layout, rank)["o"]
    return errors


def test_a_lost_state_is_noticed(gloo):
    cases = [
        Case(method, variant, PACKS[1], layout, causal=causal)
        for method in METHODS[:3]
        for variant in VARIANTS
        for layout, causal in (("contiguous", True), ("fragments", False))
    ]
    full = [(case, expected(case)) for case in cases]
    found = gloo(3, _without_carry, full)
    assert all(max(errors[case] for errors in found) > 1e-2 for case in cases)


def _perturbed(rank, world_size, cases):
    """Whether each change reached the tokens from there on; others are checked to be bitwise equal."""
    comm, lengths, document = comm_of(world_size), (11, 70, 17), 1
    reached = []
    for method, variant, dtype, name in cases:
        layout = all_layouts(lengths, world_size)[name]
        for at in (15, 32, 50):
            outputs = []
            for factor in (1.0, 0.5):
                tensors: list[Any] = list(inputs(lengths, variant, dtype)[:5])
                for i, x in enumerate(tensors):
                    if x is not None and x.dim() > 1:
                        x = x.clone()
                        x[lengths[0] + at] *= factor
                        tensors[i] = layout.shard(x, rank)
                q, k, v, log_decay, beta = tensors
                options = dict(log_decay=log_decay, beta=beta, method=method)
                with small_blocks():
                    outputs.append(linear_attention(q, k, v, layout, comm, **options)[0])
            sees = (layout.documents(rank) == document) & (layout.positions(rank) >= at)
            assert torch.equal(outputs[0][~sees], outputs[1][~sees]), (method, variant, name, at)
            reached.append(bool((outputs[0][sees] != outputs[1][sees]).flatten(1).any(1).all()))
    return all(reached)


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_token_changes_only_those_from_there_on(gloo, world_size):
    methods = METHODS if world_size > 1 else METHODS[:1]
    pairs = [(method, variant) for method in methods for variant in VARIANTS]
    cases = [
        (*pair, (torch.float64, torch.float32)[i % 2], ("contiguous", "zigzag", "random")[i % 3])
        for i, pair in enumerate(pairs)
    ]
    assert all(gloo(world_size, _perturbed, cases))


# ---- any layout


def _drawn(rank, world_size, layout, method, causal):
    q, k, v, log_decay, *_ = inputs(layout.lengths, "token")
    assert log_decay is not None
    q, k, v, log_decay = local = [layout.shard(x, rank).detach().requires_grad_() for x in (q, k, v, log_decay)]
    with small_blocks():
        comm = SequenceComm(None)
        o, _ = linear_attention(q, k, v, layout, comm, log_decay=log_decay, method=method, causal=causal)
    do = layout.shard(inputs(layout.lengths, "token").do, rank)
    return [o.detach(), *torch.autograd.grad(o, local, do, materialize_grads=True)]


@settings(max_examples=25, deadline=None)
@given(layout=drawn_layouts(3), method=st.sampled_from(METHODS), causal=st.booleans())
def test_any_layout(gloo, layout, method, causal):
    found = gloo(3, _drawn, layout, method, causal)
    o, _, *grads = expected(Case(method, "token", layout.lengths, "drawn", causal=causal))
    for name, parts, y in zip(NAMES[:1] + NAMES[2:6], zip(*found, strict=True), [o, *grads[:4]], strict=True):
        assert torch.allclose(layout.unshard(parts), y, rtol=1e-10, atol=1e-10), name


# ---- bad input


def test_wrong_uses_are_refused():
    layout, (q, k, v, *_) = SequenceLayout.contiguous([6], 1), inputs((6,), "none")
    initial = torch.zeros(1, 4, 8, 6)
    methods = "lasp1, lasp2, zeco, ulysses"
    refused: list[tuple[dict[str, Any], str]] = [
        ({"method": "magic"}, f"linear attention method 'magic' is not one of: {methods}"),
        ({"causal": False, "initial_state": initial}, "initial_state needs causal=True"),
        ({"causal": False, "output_final_state": True}, "output_final_state needs causal=True"),
        ({"beta": q[..., 0]}, "beta is .6, 2.; it is per token and head, .6, 4."),
        ({"beta": 3 * torch.ones(6, 4)}, "beta goes from 3 to 3; it lies in .0, 2."),
        ({"log_decay": -torch.ones(6, 4, 7)}, "log_decay is .6, 4, 7.; offered are per head, .4., token"),
        ({"log_decay": torch.ones(4)}, "log_decay reaches 1; a decay has a logarithm of at most 0"),
        ({"initial_state": torch.zeros(2, 4, 8, 6)}, "initial_state is .2, 4, 8, 6.; .* makes it .1, 4, 8, 6."),
        ({"backend": "magic"}, "linear attention backend 'magic' is not one of: auto, reference"),
    ]
    for options, message in refused:
        for method in METHODS:
            with pytest.raises(ValueError, match=message):
                linear_attention(q, k, v, layout, None, **{"method": method, **options})
    with pytest.raises(ValueError, match="the layout gives rank 0 6 tokens"):
        linear_attention(q[:5], k, v, layout, None)
    with pytest.raises(ValueError, match="over 2 ranks and the comm has 1; comm=None is one rank"):
        linear_attention(q, k, v, SequenceLayout.contiguous([6], 2), None)


def _refused_before_anything_is_sent(rank, world_size):
    """Only this process raises: had it sent anything, or waited, the other calls would fail or hang."""
    layout, comm = SequenceLayout.contiguous([12], world_size), SequenceComm(None)
    q, k, v = (layout.shard(x, rank) for x in inputs((12,), "none")[:3])
    for method in METHODS:
        if rank == 0:
            wrong: list[dict[str, Any]] = [{"beta": torch.full((len(q), 4), 2.5)}, {"log_decay": torch.ones(len(q), 4)}]
            for options in wrong:
                with pytest.raises(ValueError):
                    linear_attention(q, k, v, layout, comm, method=method, **options)
        linear_attention(q, k, v, layout, comm, method=method)


def test_errors_come_before_communication(gloo):
    gloo(2, _refused_before_anything_is_sent)


def test_definition_of_both_directions():
    """Against the mixing matrix: the causal one, the reversed one transposed, and the diagonal once."""
    lengths = (5,)
    q, k, v, log_decay, *_ = inputs(lengths, "token")
    o, _ = by_definition(q, k, v, log_decay, None, None, lengths, causal=False)
    q, k = (x.repeat_interleave(2, 1) for x in (q, k))
    assert log_decay is not None
    b = log_decay.cumsum(0)
    for i in range(5):
        for h in range(4):
            row: Any = 0
            for j in range(5):
                # Going back, what token j wrote decays by j - 1, ..., i.
                decay = (b[i] - b[j])[h] if j <= i else log_decay[i:j, h].sum()
                row = row + decay.exp() * (q[i, h] @ k[j, h]) * v[j, h]
            assert torch.allclose(o[i, h], row * 8**-0.5)
    assert DECAYS
