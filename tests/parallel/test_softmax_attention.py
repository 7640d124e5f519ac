import contextlib
from functools import partial
from textwrap import dedent
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.attention import WIDTH, comm_of, distributed, expected, largest_error, tensors
from support.comparing import largest
from support.layouts import all_on_last, drawn_layouts, layouts, random_schedule
from support.masks import SHARES, arguments, mask_of, sees

from lsys.kernels import softmax_attention as kernel
from lsys.kernels.mask import CAUSAL, Mask
from lsys.kernels.softmax_attention import cpu
from lsys.parallel.attention import METHODS, executor, gather, ring, route, softmax_attention, ulysses
from lsys.parallel.comm import SequenceComm
from lsys.parallel.layout import SequenceLayout
from lsys.parallel.messages import usp

PACKS = [[0, 1, 7, 13, 0, 23], [31], [1, 0, 1], [], [0], [2, 67, 5, 3, 19]]
OWN = [{}, {"causal": False}, {"window": 1}, {"window": 6}, {"window": 500, "scale": 0.2}]
MASKS = [*OWN, *SHARES]
HEADS = [(4, 4), (4, 2), (3, 1), (6, 2), (2, 1)]  # also fewer than ranks, and groups cut by the ranks' shares
# Largest difference from the fp64 definition, relative to 1 + its magnitude.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 4e-2}


def _errors(rank, world_size, dtype, cases, methods=METHODS):
    """Largest differences of o, dq, dk, dv from the definition, by case."""
    comm, errors = comm_of(rank, world_size), {}
    for where, options, (heads, kv_heads), backend in cases:
        placed = {"drawn": where} if isinstance(where, SequenceLayout) else layouts(where, world_size)
        lengths = next(iter(placed.values())).lengths
        full, given = expected(lengths, heads, kv_heads, dtype, options), arguments(options, len(lengths))
        for name, layout in placed.items():
            for method in methods if comm else methods[:1]:

                def attention(q, k, v):
                    return softmax_attention(q, k, v, layout, comm, method=method, backend=backend, **given)

                got = distributed(layout, rank, heads, kv_heads, dtype, attention)
                error = largest_error(got, full, layout, rank, dtype)
                errors[f"{method}: {lengths}, {name}, {options}, {heads}/{kv_heads} heads, {backend}"] = error
    return errors


def assert_small(results, dtype):
    for rank, errors in enumerate(results):
        wrong = {case: error for case, error in errors.items() if not error < TOLERANCE[dtype]}
        assert errors and not wrong, f"rank {rank}: {wrong}"


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "masks", [pytest.param(OWN, id="own"), pytest.param(SHARES, id="shared", marks=pytest.mark.slow)]
)
def test_equals_one_device(gloo, world_size, masks):
    cases = [(lengths, mask, HEADS[1], "auto") for lengths in PACKS for mask in masks]
    cases += [(PACKS[0], mask, heads, "auto") for mask in masks[:4] for heads in HEADS]
    assert_small(gloo(world_size, _errors, torch.float64, cases), torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_one_device_in_other_types(gloo, world_size, dtype):
    cases = [(PACKS[0], mask, heads, "auto") for mask in MASKS for heads in HEADS[1:3]]
    cases += [(PACKS[-1], mask, HEADS[1], "reference") for mask in MASKS[:2]]
    assert_small(gloo(world_size, _errors, dtype, cases), dtype)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_equals_one_device_for_drawn_layouts(gloo, world_size):
    cases = []

    @settings(derandomize=True, max_examples=25, database=None)
    @given(drawn_layouts(world_size), st.sampled_from(MASKS), st.sampled_from(HEADS))
    def draw(layout, mask, heads):
        cases.append((layout, mask, heads, "auto"))

    draw()
    assert_small(gloo(world_size, _errors, torch.float64, cases), torch.float64)


def _three_rounds(layout, mask):
    return ring.schedule(layout, mask, rounds=3)


def _headwise(layout, comm, groups, options, q, k, v):
    return ulysses.attention(q, k, v, layout, comm, ring.schedule, groups, options)


def _by_detours(rank, world_size):
    """The executor with schedules that are no rings, and groups of other sizes than the nodes give."""
    comm, errors, heads, kv_heads = SequenceComm(None), {}, 6, 2
    options = executor.Options(Mask(), WIDTH**-0.5, "auto")
    for lengths in (PACKS[0], PACKS[-1]):
        full = expected(lengths, heads, kv_heads, torch.float64, {})
        for name, layout in layouts(lengths, world_size).items():

            def detours(q, k, v):
                return executor.attention(q, k, v, layout, comm, random_schedule, options)

            def rounds(q, k, v):
                return executor.attention(q, k, v, layout, comm, _three_rounds, options)

            attentions = {"detours": detours, "rounds": rounds}
            for inner in (n for n in range(1, world_size + 1) if world_size % n == 0):
                groups = usp.groups([0] * world_size, heads, inner)
                attentions[f"{inner} inner"] = partial(_headwise, layout, comm, groups, options)
            for key, attention in attentions.items():
                got = distributed(layout, rank, heads, kv_heads, torch.float64, attention)
                errors[name, key] = largest_error(got, full, layout, rank, torch.float64)
    return errors


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_any_schedule_and_any_groups_run(gloo, world_size):
    assert_small(gloo(world_size, _by_detours), torch.float64)


def _plain_ring(rank, world_size):
    """Largest error of the lines in the docstring of the ring, which run as they stand."""
    lines = [line for line in (ring.__doc__ or "").splitlines() if line.startswith("    ")]
    assert len(lines) == 10
    n, total = 7, 7 * world_size
    data, comm = tensors(total, 4, 2, torch.float64), SequenceComm(None)
    q, k, v = (x[rank * n : (rank + 1) * n] for x in data[:3])
    names = dict(vars(kernel), torch=torch, q=q, k=k, v=v, n=n, rank=rank, ranks=world_size, comm=comm)
    exec(dedent("\n".join(lines)), names)
    return float((names["o"] - expected([total], 4, 2, torch.float64, {})[0][rank * n : (rank + 1) * n]).abs().max())


def test_the_plain_ring_of_the_docstring_is_attention(gloo):
    for world_size in (2, 3):
        assert largest(gloo(world_size, _plain_ring)) < 1e-12


def _perturbed(rank, world_size, dtype):
    """Whether any change reached the tokens that may see the perturbed one; others are checked to be bitwise equal."""
    comm, lengths = comm_of(rank, world_size), [11, 40, 17]
    q, k, v, _ = tensors(sum(lengths), 4, 2, dtype)
    reached = []
    shared: list[dict[str, Any]] = [{"shares": True}, {"shares": True, "window": 30}]
    cases = [(each, 34) for each in ({}, {"window": 5}, {"causal": False}, *shared)]
    for options, at in (*cases, *((each, 7) for each in shared)):  # the latter in the prefix
        seen = sees(lengths, mask_of(options, len(lengths)))[:, at]
        for layout in layouts(lengths, world_size).values():
            for method in METHODS:
                outputs = []
                for shift in (0, 2):
                    changed = [x.clone() for x in (q, k, v)]
                    for x in changed:
                        x[at] += shift
                    a, b, c = (layout.shard(x, rank) for x in changed)
                    outputs.append(softmax_attention(a, b, c, layout, comm, method=method, **arguments(options, 3)))
                here = layout.shard(seen, rank)
                assert torch.equal(outputs[0][~here], outputs[1][~here]), (options, layout, method)
                reached.append(bool((outputs[0][here] != outputs[1][here]).flatten(1).any(1).all()))
    return all(reached)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_token_changes_only_those_that_see_it(gloo, world_size, dtype):
    assert all(gloo(world_size, _perturbed, dtype))


def _checkpointed(rank, world_size):
    """Non-reentrant checkpoints recompute when a saved tensor is asked for: ranks without tokens too, at one time."""
    comm = comm_of(rank, world_size)
    some = SequenceLayout([9, 30, 4], [[(0, 0, 9)], [(1, 0, 11)], [(1, 11, 19), (2, 0, 4)], []][:world_size])
    for layout in (some, SequenceLayout.zigzag([9, 30, 4], world_size), all_on_last([9, 30, 4], world_size)):
        for method in METHODS:

            def twice(q, k, v):  # two exchanges in one checkpoint, the second as of another layer
                o = softmax_attention(q, k, v, layout, comm, method=method)
                return softmax_attention(o, k, v, layout, comm, method=method, window=5)

            results = [distributed(layout, rank, 4, 4, torch.float64, twice, again) for again in (False, True)]
            for once, again in zip(*results, strict=True):
                assert torch.equal(once, again)


def test_recomputed_under_checkpoint(gloo):
    gloo(4, _checkpointed)


def _plans_made(rank, world_size):
    """How often schedules, routes and launches were made by the end of each of three layers, forward and backward."""
    comm, made = comm_of(rank, world_size), []
    crossing = SequenceLayout.zigzag([9, 30, 4, 41], world_size)
    for layout in (crossing, SequenceLayout([9, 30], [[(0, 0, 9)], [(1, 0, 30)]][:world_size])):
        for method in METHODS:
            with contextlib.ExitStack() as stack:
                calls = [
                    stack.enter_context(mock.patch.object(module, name, wraps=getattr(module, name)))
                    for module, name in ((ring, "crossing"), (gather, "crossing"), (route, "route"), (cpu, "plan"))
                ]
                counts = []
                for seed in range(3):
                    q, k, v, do = (
                        layout.shard(x + seed, rank).requires_grad_()
                        for x in tensors(layout.total, 4, 2, torch.float32)
                    )
                    softmax_attention(q, k, v, layout, comm, method=method).backward(do)
                    counts.append([call.call_count for call in calls])
            made.append(counts)
    return made


def test_all_layers_share_one_plan(gloo):
    for made in gloo(2, _plans_made):
        for first, second, third in made:
            assert first == second == third
        assert any(counts[0][-1] > 0 for counts in made) and any(counts[0][-2] > 0 for counts in made)


# ---- wrong uses


def _mismatched(rank, world_size):
    q, k, v, _ = tensors(6, 2, 2, torch.float32)
    with pytest.raises(ValueError, match="the layout is over 3 ranks and the comm has 2"):
        softmax_attention(q, k, v, SequenceLayout.contiguous([6], 3), SequenceComm(None))


def test_layout_and_comm_must_agree(gloo):
    gloo(2, _mismatched)
    q, k, v, _ = tensors(6, 2, 2, torch.float32)
    with pytest.raises(ValueError, match="over 3 ranks and the comm has 1; comm=None is one rank"):
        softmax_attention(q, k, v, SequenceLayout.contiguous([6], 3), None)


@pytest.mark.parametrize(
    ("heads", "total", "options", "message"),
    [
        ((2, 2), 6, {"method": "magic"}, "attention method 'magic' is not one of: ring, gather, ulysses, usp"),
        ((2, 2), 6, {"window": 0}, "a window is of 1 token or more"),
        ((2, 2), 6, {"window": 3, "causal": False}, "a window is of 1 token or more and causal"),
        ((2, 2), 6, {"backend": "cuda"}, "'cuda' cannot run here"),
        ((2, 2), 6, {"mask": mask_of({"shares": True}, 3)}, "1 groups have 3 documents and the pack 1"),
        ((2, 2), 6, {"mask": CAUSAL, "window": 3}, "window=3 beside Mask"),
        ((4, 3), 6, {}, "3 key heads do not divide 4 query heads"),
        ((2, 2), 5, {}, "the layout gives rank 0 6 tokens; q has 5 and k has 5"),
    ],
)
def test_wrong_uses_are_refused(heads, total, options, message):
    layout, (query_heads, key_heads) = SequenceLayout.contiguous([6], 1), heads
    q, k, v, _ = tensors(total, query_heads, key_heads, torch.float32)
    with pytest.raises(ValueError, match=message):
        softmax_attention(q, k, v, layout, None, **options)


def test_nan_is_refused():
    layout, (q, k, v, _) = SequenceLayout([2, 4], [[(1, 0, 4), (0, 0, 2)]]), tensors(6, 2, 2, torch.bfloat16)
    for name, x in (("q", q), ("k", k), ("v", v)):
        x[3, 1, 2] = x[5, 0, 0] = torch.nan
        with pytest.raises(ValueError, match=f"{name} has a NaN in row 3 of rank 0, token 3 of document 1, and 1 more"):
            softmax_attention(q, k, v, layout, None)
        x[3, 1, 2], x[5, 0, 0] = torch.inf, -torch.inf
    softmax_attention(q, k, v, layout, None)  # infinities are no business of ours
    for wrong in ((q, k, v.float()), (q.float(), k, v), (q, k.float(), v)):
        with pytest.raises(ValueError, match="q, k and v must share dtype and device; got torch"):
            softmax_attention(*wrong, layout, None)
    for wrong in ((q[0], k, v), (q, k[0], v[0]), (q, k, v[..., :3]), (q[..., :3], k, v)):
        with pytest.raises(ValueError, match=r"attention takes q \[T_r, H, D\] and k, v \[T_r, H_kv, D\]; got \["):
            softmax_attention(*wrong, layout, None)
