import logging

import pytest
import torch
from torch import Tensor

from lsys.kernels.softmax_attention import _log_choice, softmax_attention
from lsys.kernels.softmax_attention.merge import merge

# (queries, keys) of each sequence; causal queries are the last of the keys
PACKS = {
    "whole": [(13, 13), (1, 1), (64, 64), (97, 97)],
    "with past": [(7, 19), (1, 30), (65, 130), (300, 301)],
    "empty": [(0, 0), (0, 5), (3, 3), (0, 0)],
    "nothing": [(0, 0)],
    "no sequence": [],
}
# Largest difference from the dense fp64 definition, relative to 1 + its magnitude; half precision rounds the output.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


def dense(q, k, v, pack, causal, window, scale):
    """Sequence by sequence, fp64: the test's own definition."""
    outputs, lses, a, b = [], [], 0, 0
    group = q.shape[1] // k.shape[1]
    for n, m in pack:
        qs, ks, vs = q[a : a + n], k[b : b + m].repeat_interleave(group, 1), v[b : b + m].repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", qs, ks) * scale
        age = torch.arange(m - n, m)[:, None] - torch.arange(m)  # how far behind each query each key is
        hidden = torch.zeros(n, m, dtype=torch.bool)
        if causal:
            hidden |= age < 0
        if window is not None:
            hidden |= age >= window
        scores = scores.masked_fill(hidden, -torch.inf)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), vs))
        lses.append(scores.logsumexp(-1).t())
        a, b = a + n, b + m
    return torch.cat([q[:0], *outputs]), torch.cat([q[:0, :, 0], *lses])


def inputs(pack, heads, kv_heads, width, dtype, seed=0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    queries, keys = sum(n for n, _ in pack), sum(m for _, m in pack)
    shapes = [(queries, heads, width), (keys, kv_heads, width), (keys, kv_heads, width), (queries, heads, width)]
    # k and v as views of one tensor, as after a fused gather: the kernels must not rely on dense rows
    q, k, v, do = (torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)
    k, v = torch.stack((k, v), 1).unbind(1)
    return q, k, v, do


def bounds(pack):
    pairs = torch.tensor([(0, 0), *pack]).cumsum(0)
    return {"cu_seqlens_q": pairs[:, 0], "cu_seqlens_k": pairs[:, 1]}


def run(q, k, v, do, pack, **options):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    o, lse = softmax_attention(q, k, v, **bounds(pack), **options)
    return (o, lse, *torch.autograd.grad(o, (q, k, v), do))


def check(got, expected, dtype):
    for name, x, y in zip(("o", "lse", "dq", "dk", "dv"), got, expected, strict=True):
        assert x.shape == y.shape, name
        alike = x.double() == y  # infinite ones too, of queries that see nothing
        error = ((x.double() - y).abs() / (1 + y.abs())).masked_fill(alike, 0)
        assert error.numel() == 0 or error.max() < TOLERANCE[dtype], (name, error.max())


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 1}, {"window": 5}, {"window": 90, "scale": 0.3}])
def test_equals_the_dense_definition(backend, pack, options):
    pack, width = PACKS[pack], 12
    q, k, v, do = inputs(pack, 4, 2, width, torch.float64)
    mask = {"causal": True, "window": None, "scale": width**-0.5} | options
    leaf_q, leaf_k, leaf_v = leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o, lse = dense(leaf_q, leaf_k, leaf_v, pack, **mask)
    expected = (o.detach(), lse.detach(), *torch.autograd.grad(o, leaves, do, materialize_grads=True))
    check(run(q, k, v, do, pack, backend=backend, **options), expected, torch.float64)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 4, 64), (6, 2, 24), (4, 1, 7)])
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 33}])
def test_cpu_backend_in_every_precision(dtype, heads, kv_heads, width, options):
    pack = PACKS["with past"]
    tensors = inputs(pack, heads, kv_heads, width, dtype)
    q, k, v, do = (x.double() for x in tensors)
    exact = run(q, k, v, do, pack, backend="reference", **options)
    got = run(*tensors, pack, backend="cpu", **options)
    assert got[0].dtype == dtype and got[1].dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert all(gradient.dtype == dtype for gradient in got[2:])
    check(got, exact, dtype)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 4, 64), (6, 2, 20)])
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 33}])
def test_cuda_backend(dtype, pack, heads, kv_heads, width, options):
    pack = PACKS[pack]
    tensors = inputs(pack, heads, kv_heads, width, dtype)
    q, k, v, do = (x.double() for x in tensors)
    exact = run(q, k, v, do, pack, backend="reference", **options)
    q, k, v, do = (x.cuda() for x in tensors)
    got = [x.cpu() for x in run(q, k, v, do, pack, backend="cuda", **options)]
    check(got, exact, dtype)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 20])
def test_a_token_changes_nothing_before_it(backend, dtype, window):
    pack = [(40, 90), (200, 200), (30, 30)]
    q, k, v, do = inputs(pack, 2, 1, 16, dtype)
    before, *_ = run(q, k, v, do, pack, backend=backend, window=window)
    at = 100  # of sequence 1, whose queries begin at row 40 and keys at row 90
    for x, row in ((q, 40 + at), (k, 90 + at), (v, 90 + at)):
        x[row] += 3
    after, *_ = run(q, k, v, do, pack, backend=backend, window=window)
    reached = 240 if window is None else 40 + at + window
    assert torch.equal(before[: 40 + at], after[: 40 + at]) and torch.equal(before[reached:], after[reached:])
    assert (before[40 + at : reached] != after[40 + at : reached]).any(-1).all()


def test_queries_without_keys_give_zero_and_minus_infinity():
    pack = [(3, 0), (2, 4)]
    for backend in ("reference", "cpu"):
        o, lse, dq, dk, dv = run(*inputs(pack, 2, 2, 8, torch.float32), pack, backend=backend, causal=False)
        assert not o[:3].any() and (lse[:3] == -torch.inf).all() and not dq[:3].any()
        assert all(x.isfinite().all() for x in (o, lse[3:], dq, dk, dv))


def test_expanded_gradients_and_frozen_inputs():
    pack = [(5, 9)]
    q, k, v, _ = inputs(pack, 2, 2, 8, torch.float64)
    expected = run(q, k, v, torch.ones_like(q), pack, backend="reference")[2]
    q.requires_grad_()
    softmax_attention(q, k, v, **bounds(pack), backend="cpu")[0].sum().backward()  # the gradient of o has strides 0
    torch.testing.assert_close(q.grad, expected, rtol=1e-12, atol=1e-12)


def test_merge_is_attention_over_the_union():
    pack = [(6, 11)]
    q, k, v, _ = inputs(pack, 2, 2, 8, torch.float64)
    whole, whole_lse = softmax_attention(q, k, v, **bounds(pack), causal=False)
    parts = []
    for rows in (slice(0, 4), slice(4, 11), slice(0, 0)):
        keys = k[rows], v[rows]
        parts.append(softmax_attention(q, *keys, **bounds([(6, len(keys[0]))]), causal=False))
    o, lse = (x.detach().clone() for x in parts[2])
    merge(o, lse, *parts[2])
    assert not o.any() and (lse == -torch.inf).all()
    merge(o, lse, *parts[0])
    assert torch.equal(o, parts[0][0]) and torch.equal(lse, parts[0][1])  # not so much as rounded
    merge(o, lse, *parts[1])
    merge(o, lse, *parts[2])
    torch.testing.assert_close(o, whole, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(lse, whole_lse, rtol=1e-13, atol=1e-13)


def test_auto_says_once_what_it_chose(caplog):
    _log_choice.cache_clear()
    tensors = inputs([(3, 3)], 2, 2, 8, torch.float32)
    with caplog.at_level(logging.INFO):
        run(*tensors, [(3, 3)])
        run(*tensors, [(3, 3)])
    assert [record.message for record in caplog.records] == [
        "softmax attention: cpu backend for cpu, torch.float32, head width 8 "
        "(not flash_attn: the tensors are on cpu; not cuda: the tensors are on cpu)"
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "cuda"}, "'cuda' cannot run here: the tensors are on cpu"),
        ({"backend": "magic"}, "'magic' is not one of: auto, flash_attn, cuda, cpu, reference"),
        ({"window": 0}, "a window is of 1 token or more"),
        ({"window": 2, "causal": False}, "a window is of 1 token or more and causal"),
        ({"k": torch.zeros(4, 3, 8), "v": torch.zeros(4, 3, 8)}, "3 key heads do not divide 4 query heads"),
        ({"v": torch.zeros(4, 2, 6)}, r"got \[4, 4, 8\], \[4, 2, 8\] and \[4, 2, 6\]"),
        ({"q": torch.zeros(4, 4, 8, dtype=torch.float64)}, "must share dtype and device"),
        ({"cu_seqlens_q": torch.tensor([0, 3])}, "cu_seqlens_q must go from 0 to the 4 rows of q"),
        ({"cu_seqlens_k": torch.tensor([0, 5, 4])}, "cu_seqlens_k must not decrease"),
        ({"cu_seqlens_k": torch.tensor([0, 2, 4])}, "is of 1 sequences, cu_seqlens_k of 2"),
        (
            {"k": torch.zeros(3, 2, 8), "v": torch.zeros(3, 2, 8), "cu_seqlens_k": torch.tensor([0, 3])},
            "4 causal queries",
        ),
    ],
)
def test_wrong_uses_are_refused(change, message):
    good = {"q": torch.zeros(4, 4, 8), "k": torch.zeros(4, 2, 8), "v": torch.zeros(4, 2, 8)}
    good |= {"cu_seqlens_q": torch.tensor([0, 4]), "cu_seqlens_k": torch.tensor([0, 4])}
    call = good | change
    with pytest.raises(ValueError, match=message):
        softmax_attention(call.pop("q"), call.pop("k"), call.pop("v"), **call)
